"""Driver for the library speculators, which trains modules and drafts with none itself.

The module is read by the library's own loader, which takes embedding and unembedding of
the model that the folder names as its verifier; transformers runs that one. Drafts are
those of the library's forward pass on a fixed text. It pairs the first place with an
embedding, mtp_jax does not, so the logits to compare are of a second pass without it.
"""

import importlib.metadata
import json
import os
import sys

# Of the library's forward pass, which is compiled otherwise.
os.environ |= {'TORCHDYNAMO_DISABLE': '1', 'HF_HUB_OFFLINE': '1'}

import numpy as np  # noqa: E402
import speculators  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def _without_first(module, args, out):
  return out * (torch.arange(out.shape[1]) > 0)[None, :, None]


def main(request, result):
  with open(request) as file:
    options = json.load(file)
  folder = options['folder']
  drafter = speculators.SpeculatorModel.from_pretrained(os.path.join(folder, 'speculator'))
  verifier = drafter.config.speculators_config.verifier.name_or_path
  model = transformers.AutoModelForCausalLM.from_pretrained(verifier, dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(verifier)
  ids = []
  for prompt in options['prompts']:
    prompt = torch.tensor([prompt])
    out = model.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      do_sample=False,
      max_new_tokens=options['new'],
      eos_token_id=None,
      pad_token_id=0,
    )
    ids.append(out[0, prompt.shape[1] :].tolist())
  text = torch.tensor([options['held_out']])
  with torch.no_grad():
    state = model.model(text).last_hidden_state  # after the final norm
    best = model.lm_head(state)[0].argmax(-1)
    drafts = torch.stack([x[0].argmax(-1) for x in drafter(text, state)[0]])
    drafter.embed_tokens.register_forward_hook(_without_first)
    logits = torch.stack([x[0] for x in drafter(text, state)[0]])
  np.save(options['logits'], logits.numpy())
  drafter.save_pretrained(options['saved'])
  n = drafts.shape[1]
  accepted = torch.stack([x == best[1 + j :][:n] for j, x in enumerate(drafts)])
  output = dict(
    version=f'speculators {importlib.metadata.version("speculators")}',
    ids=ids,
    accepted=accepted.cumprod(0).double().mean(1).tolist(),
    cut=[tokenizer(text).input_ids for text in options['texts']],
  )
  with open(result, 'w') as file:
    json.dump(output, file)


main(*sys.argv[1:])
