"""Command lines of the engines that serve exported folders."""

import json
import os
import shlex

from mtp_jax.interop import llama_cpp

GENERATE = (
  'import sys, transformers as t;'
  ' out = dict(pretrained_model_name_or_path=sys.argv[1],'
  ' trust_remote_code=True);'
  ' text = t.AutoTokenizer.from_pretrained(**out);'
  ' model = t.AutoModelForCausalLM.from_pretrained(**out);'
  ' print(text.decode(model.generate(**text("Once", return_tensors="pt"),'
  ' use_mtp=True, max_new_tokens=64)[0]))'
)


def run_by(form: str, out: str, n: int) -> str:
  """Returns the command line of an engine that serves a folder, and drafts n tokens
  with its heads if supported; '' for formats that no engine serves."""
  gguf = ['llama-server', '-m', os.path.join(out, llama_cpp.TENSORS)]
  drafts = dict(method='mtp', num_speculative_tokens=n)
  medusa = dict(drafts, method='medusa', model=os.path.join(out, 'medusa'))
  vllm = ['vllm', 'serve', out]
  return shlex.join(
    {
      'hf': vllm,
      'transformers_mtp': ['python', '-c', GENERATE, out],
      'gguf': gguf,
      'gguf_mtp': [*gguf, '--spec-type', 'draft-mtp', '--spec-draft-n-max', str(n)],
      'mimo': [*vllm, '--trust-remote-code', '--speculative-config', json.dumps(drafts)],
      'medusa': [*vllm, '--speculative-config', json.dumps(medusa)],
    }.get(form, [])
  )
