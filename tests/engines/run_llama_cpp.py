"""Driver for llama.cpp, with the server of the wheel xllamacpp."""

import json
import sys
import urllib.request

import xllamacpp


def main(request, result):
  with open(request) as file:
    options = json.load(file)
  params = xllamacpp.CommonParams()
  params.model.path = options['folder'] + '/model.gguf'
  params.n_ctx = options['context']
  params.n_parallel, params.warmup = 1, False
  # A cache in half precision would change the results.
  exact = xllamacpp.ggml_type.GGML_TYPE_F32
  params.cache_type_k = params.cache_type_v = exact
  off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
  params.flash_attn_type = off
  if options['steps']:
    kinds = xllamacpp.common_speculative_type
    speculative = params.speculative
    speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
    speculative.draft.n_max, speculative.draft.p_min = options['steps'], 0.0
    speculative.draft.cache_type_k = speculative.draft.cache_type_v = exact

  def post(server, path, **body):
    url = f'{server.listening_address}/{path}'
    data = json.dumps(body).encode()
    head = {'Content-Type': 'application/json'}
    with urllib.request.urlopen(urllib.request.Request(url, data, head)) as file:
      return json.load(file)

  ids, passes = [], []
  for prompt in options['prompts']:
    # A new server for each prompt: the first token of a text is paired with the last
    # state of the previous text, or with zeros.
    server = xllamacpp.Server(params)
    found = post(
      server,
      'completion',
      prompt=prompt,
      n_predict=options['new'],
      temperature=0,
      samplers=['temperature'],
      ignore_eos=True,
      cache_prompt=False,
      return_tokens=True,
    )
    ids.append(found['tokens'])
    accepted = found['timings'].get('draft_n_accepted', 0)
    passes.append(len(found['tokens']) - accepted)
  output = dict(
    version=f'llama.cpp (xllamacpp {xllamacpp.__version__})',
    ids=ids,
    passes=passes if options['steps'] else None,
    cut=[
      post(server, 'tokenize', content=text, add_special=True, parse_special=False)['tokens']
      for text in options['texts']
    ],
  )
  with open(result, 'w') as file:
    json.dump(output, file)


main(*sys.argv[1:])
