"""params.json of Meta's Llamas, and of the paper's release.

https://huggingface.co/facebook/multi-token-prediction: n_layers includes all
heads; layers.{n_layers - n_future_tokens}, the last one, is head 1, and
extra_heads.0 is head 2. The context length is not recorded.
"""

import json
import os

from mtp_jax.config import schema, validate
from mtp_jax.interop import files
from mtp_jax.io import jsonl, paths

TENSORS = 'consolidated.pth'
FIRST = 'consolidated.00.pth'  # name in Llama 2 and 3; 01 … are further shards
CONTEXT = 4096  # context length of the released models

SIZE = range(1, 2**31)
# The fields that are used.
ABOUT = {
  **dict.fromkeys(('dim', 'n_layers', 'n_heads', 'vocab_size'), SIZE),
  **dict.fromkeys(('n_kv_heads?', 'n_future_tokens?'), (SIZE, None)),
  'multiple_of?': SIZE,
  **dict.fromkeys(('ffn_dim_multiplier?', 'norm_eps?', 'rope_theta?'), (float, None)),
  ...: object,
}

# Fields that must have this value, if present.
FIXED = {'use_scaled_rope': False}


def tensors_of(folder: str) -> dict[str, files.Loaded]:
  names = [n for n in os.listdir(folder) if n.startswith('consolidated.')]
  if FIRST in names and len(names) > 1:
    raise paths.InputError(
      folder, f'is sharded over {len(names)} files by attention heads; merge them first'
    )
  name = FIRST if FIRST in names else TENSORS
  return files.read_torch(os.path.join(folder, name))


def describe(cfg: schema.CommandConfig, tokenizer, dtype, about) -> dict[str, str]:
  """Returns the text files of an export, by name."""
  del tokenizer, dtype, about
  m = cfg.model
  values = dict(
    dim=m.d_model,
    n_layers=m.n_layers,
    n_heads=m.n_attn_heads,
    n_kv_heads=m.kv_heads,
    **_multiples(m.d_model, m.ff_width),
    norm_eps=m.norm_eps,
    rope_theta=m.rope_theta,
    n_future_tokens=cfg.heads.n,
    vocab_size=m.vocab_size,
  )
  return {'params.json': json.dumps(values, indent=2)}


def width(dim: int, multiple_of: int, multiplier: float | None) -> int:
  """Returns the width of the feed-forward network, as Meta's code computes it."""
  hidden = int(2 * 4 * dim / 3)
  if multiplier is not None:
    hidden = int(multiplier * hidden)
  return -(-hidden // multiple_of) * multiple_of


def _multiples(dim: int, d_ff: int) -> dict:
  """Returns the fields for which `width` is d_ff, as few as possible."""
  if width(dim, 256, None) == d_ff:
    return dict(multiple_of=256, ffn_dim_multiplier=None)
  # Plus one half, so that rounding down gives d_ff.
  multiplier = (d_ff + 0.5) / int(2 * 4 * dim / 3)
  return dict(multiple_of=1, ffn_dim_multiplier=multiplier)


def read(folder: str, about: dict, given: dict) -> schema.CommandConfig:
  """Converts a third-party params.json to a Config."""

  def wrong(problem):
    return paths.InputError(folder, problem)

  for field, expected in FIXED.items():
    if about.get(field, expected) != expected:
      raise wrong(f'{field}={about[field]!r} in params.json; only {expected!r}')
  if about.get('vocab_size', -1) == -1:  # as in Llama 2, where the tokenizer defines it
    tensors = tensors_of(folder)
    embed = tensors.get('tok_embeddings.weight')
    about = about | {'vocab_size': embed.shape[0] if embed else None}
  try:
    jsonl.check(about, ABOUT)
  except ValueError as error:
    raise wrong(f'params.json: {error}') from error
  about = {name: value for name, value in about.items() if value is not None}
  values = {
    'model.d_model': about['dim'],
    'model.n_layers': about['n_layers'],
    'model.n_attn_heads': about['n_heads'],
    'model.n_kv_heads': about.get('n_kv_heads') or about['n_heads'],
    'model.d_ff': width(
      about['dim'], about.get('multiple_of', 256), about.get('ffn_dim_multiplier')
    ),
    'model.vocab_size': about['vocab_size'],
    'model.norm_eps': about.get('norm_eps', 1e-5),
    'model.rope_theta': float(about.get('rope_theta', 10_000.0)),
    'heads.n': about.get('n_future_tokens', 1),
    'heads.unembedding': 'shared',
    'data.seq_len': CONTEXT,
    'export.format': 'meta',
    **given,
  }
  return validate.validate(schema.replace(schema.CommandConfig(), **values))
