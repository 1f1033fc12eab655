"""Driver for vLLM on the CPU."""

import json
import os
import sys

os.environ |= {
  'VLLM_CPU_KVCACHE_SPACE': '1',
  'VLLM_ENABLE_V1_MULTIPROCESSING': '0',
  'VLLM_LOGGING_LEVEL': 'WARNING',
  'HF_HUB_OFFLINE': '1',
}

import vllm  # noqa: E402


def main(request, result):
  with open(request) as file:
    options = json.load(file)
  drafts = {}
  if options['steps']:
    about = {'method': 'mtp'}
    if options['form'] == 'medusa':
      about = {'method': 'medusa', 'model': options['folder'] + '/medusa'}
    drafts['speculative_config'] = about | {'num_speculative_tokens': options['steps']}
  model = vllm.LLM(
    options['folder'],
    dtype='float32',
    enforce_eager=True,
    trust_remote_code=options['form'] == 'mimo',
    max_model_len=options['context'],
    max_num_seqs=1,
    enable_prefix_caching=False,
    disable_log_stats=False,
    **drafts,
  )
  sampling = vllm.SamplingParams(temperature=0, max_tokens=options['new'], ignore_eos=True)
  out = [
    model.generate({'prompt_token_ids': prompt}, sampling, use_tqdm=False)[0]
    for prompt in options['prompts']
  ]
  ids = [list(x.outputs[0].token_ids) for x in out]
  counts = {x.name: getattr(x, 'value', 0) for x in model.get_metrics()}
  drafted = counts.get('vllm:spec_decode_num_drafts', 0)
  tokenizer = model.get_tokenizer()
  output = dict(
    version=f'vLLM {vllm.__version__}',
    ids=ids,
    passes=[len(ids) + drafted] if options['steps'] else None,
    cut=[tokenizer(text).input_ids for text in options['texts']],
  )
  with open(result, 'w') as file:
    json.dump(output, file)


main(*sys.argv[1:])
