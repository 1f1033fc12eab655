"""Heads added to a frozen trunk, as docs/guides/add_heads.md does, at 0.3B: a next-token model is
trained on bytes of code, continues its prompts at temperature 1, and three modules are trained on
that text, by cross-entropy and to be accepted.
"""

import functools
import time
from typing import NamedTuple

import numpy as np

from mtp_jax.config import schema
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.train import state as state_lib
from tests.hardware import decoding, report, session

SHAPE = (
  *('--model.vocab_size=264', '--loss.backward=interleaved'),
  *('--heads.family=sequential', '--heads.trunk_state=post_norm'),
)
HEADS = '--train.freeze=trunk', '--heads.n=4'
LOSSES = 'ce', 'lk_hybrid'
TEMPERATURES = 0.0, 1.0


class Sizes(NamedTuple):
  """Flags of the model and of its training, and of what is generated."""

  flags: tuple[str, ...]
  steps: int  # of the heads
  texts: int  # of its own that heads are trained on
  batch: int  # of what is decoded at a time
  prompts: int  # that are measured
  prompt: int  # bytes
  new: int
  corpus_bytes: int


FULL = Sizes(
  (
    *(session.size_flags('300m'), '--model.n_layers=25'),
    *('--data.seq_len=512', '--data.batch_size=16', '--train.steps=300', '--optim.lr=6e-4'),
  ),
  steps=150,
  texts=1024,
  batch=128,
  prompts=32,
  prompt=64,
  new=448,
  corpus_bytes=2**23,
)
SMALL = Sizes(
  (
    *('--model.d_model=32', '--model.n_layers=2', '--model.n_attn_heads=2', '--model.d_ff=48'),
    *('--model.compute_dtype=float32', '--model.remat=none'),
    *('--data.seq_len=32', '--data.batch_size=4', '--train.steps=60', '--optim.warmup_steps=2'),
    '--optim.lr=1e-2',
  ),
  steps=60,
  texts=8,
  batch=8,
  prompts=2,
  prompt=16,
  new=48,
  corpus_bytes=2**10,
)


def run(work: session.Session) -> None:
  """Records the time of each step of the recipe, and tokens per forward pass by loss."""
  sizes = SMALL if work.is_tiny else FULL
  flags = *SHAPE, *sizes.flags, f'--decode.max_new_tokens={sizes.new}'
  of_trunk = work.config(*flags, '--heads.n=1')
  mesh, (train_N, held_out) = work.mesh(of_trunk), decoding.corpus(sizes, 42)
  begin = time.monotonic()
  train = functools.partial(
    decoding.trained, work, of_trunk, mesh, train_N, of='a next-token model: '
  )
  trunk = work.attempt('a next-token model', 60, train)
  if trunk is None:
    return
  generate = functools.partial(_own_text, work, trunk, of_trunk, mesh, sizes, train_N)
  text_N = work.attempt('text of its own', 60, generate)
  if text_N is None:
    return
  for loss in LOSSES:
    cfg = work.config(*(*flags, *HEADS, f'--loss.head_loss={loss}', f'--train.steps={sizes.steps}'))
    add = functools.partial(_add_heads, work, (trunk, of_trunk), cfg, mesh, text_N, held_out, sizes)
    work.attempt(f'heads by {loss}', 60, add)
  work.figure(
    'heads added to a frozen trunk: the whole recipe',
    (time.monotonic() - begin) / 60,
    'minutes',
    bar=report.Bar('at most', 5.0),
  )


def _own_text(work, trunk, cfg: schema.CommandConfig, mesh, sizes: Sizes, train_N) -> np.ndarray:
  """Returns what the model continues pieces of its training text by, one text after another."""
  rng, begin = np.random.default_rng(0), time.monotonic()
  decoder = decoding.decoder(trunk, cfg, mesh).with_sampling(temperature=1.0)
  found = []
  for _ in range(-(-sizes.texts // sizes.batch)):
    starts = rng.integers(0, len(train_N) - sizes.prompt, sizes.batch)
    prompts = [train_N[at : at + sizes.prompt] for at in starts]
    decoded = decoder(
      prompts, widths=(), rows=sizes.batch, seeds=rng.integers(0, 2**31, len(prompts))
    )
    for prompt, tokens in zip(prompts, decoded.tokens, strict=True):
      found += [prompt, tokens]
  text_N = np.concatenate(found).astype(np.int32)
  work.figure(
    'text of its own',
    len(text_N) / (time.monotonic() - begin),
    'tokens/s',
    note=f'{len(text_N):,} bytes, with compilation',
  )
  return text_N


def _add_heads(work, old, cfg: schema.CommandConfig, mesh, text_N, held_out, sizes: Sizes) -> bool:
  """Trains heads on the frozen trunk, and decodes held-out prompts with them."""
  loss = cfg.loss.head_loss
  state = state_lib.init(cfg, mesh, old)
  model = decoding.trained(work, cfg, mesh, text_N, of=f'heads by {loss}: ', start=state)
  for temperature in TEMPERATURES:
    decoder = decoding.decoder(model, cfg, mesh).with_sampling(temperature=temperature)
    prompts = [prompt[: sizes.prompt] for prompt in held_out[: sizes.prompts]]
    decoded: decoder_lib.Decoded = decoder(prompts, widths=(1, 1, 1), rows=sizes.prompts)
    work.figure(
      f'heads by {loss}, temperature {temperature:g}',
      decoded.tokens_per_forward,
      'tokens/forward',
      note='accepted: ' + ', '.join(f'{rate:.1%}' for rate in decoded.acceptance_J),
    )
  return True
