"""Driver for transformers. Standard library, PyTorch and transformers only.

REQUEST and RESULT are files of JSON; see __main__.py.
"""

import json
import sys

import torch
import transformers


def main(request, result):
  with open(request) as file:
    options = json.load(file)
  folder = options['folder']
  # Without trust_remote_code, config.json would be loaded as a generic one.
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=True
  )
  forwards = []
  model.register_forward_pre_hook(lambda *_: forwards.append(1))
  ids, passes = [], []
  for prompt in options['prompts']:
    forwards.clear()
    drafts = {'use_mtp': True} if options['steps'] else {}
    prompt = torch.tensor([prompt])
    out = model.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      do_sample=False,
      max_new_tokens=options['new'],
      eos_token_id=None,
      pad_token_id=0,
      **drafts,
    )
    ids.append(out[0, prompt.shape[1] :].tolist())
    passes.append(len(forwards))
  output = dict(
    version=f'transformers {transformers.__version__}',
    ids=ids,
    passes=passes if options['steps'] else None,
    cut=[tokenizer(text).input_ids for text in options['texts']],
  )
  with open(result, 'w') as file:
    json.dump(output, file)


main(*sys.argv[1:])
