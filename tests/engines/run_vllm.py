"""Driver: vLLM runs a folder on the CPU."""

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
    asked = json.load(file)
  drafts = {}
  if asked['steps']:
    about = {'method': 'mtp'}
    if asked['form'] == 'medusa':
      about = {'method': 'medusa', 'model': asked['folder'] + '/medusa'}
    drafts['speculative_config'] = about | {'num_speculative_tokens': asked['steps']}
  model = vllm.LLM(
    asked['folder'],
    dtype='float32',
    enforce_eager=True,
    trust_remote_code=asked['form'] == 'mimo',
    max_model_len=asked['context'],
    max_num_seqs=1,
    enable_prefix_caching=False,
    disable_log_stats=False,
    **drafts,
  )
  sampling = vllm.SamplingParams(temperature=0, max_tokens=asked['new'], ignore_eos=True)
  out = [
    model.generate({'prompt_token_ids': prompt}, sampling, use_tqdm=False)[0]
    for prompt in asked['prompts']
  ]
  ids = [list(x.outputs[0].token_ids) for x in out]
  counts = {x.name: getattr(x, 'value', 0) for x in model.get_metrics()}
  drafted = counts.get('vllm:spec_decode_num_drafts', 0)
  tokenizer = model.get_tokenizer()
  told = dict(
    version=f'vLLM {vllm.__version__}',
    ids=ids,
    passes=[len(ids) + drafted] if asked['steps'] else None,
    cut=[tokenizer(text).input_ids for text in asked['texts']],
  )
  with open(result, 'w') as file:
    json.dump(told, file)


main(*sys.argv[1:])
