"""Self-speculative decoding of a randomly initialized and of a quickly trained model.

The same programs decode both, so that only their drafts differ. Every text must equal that of
the same program accepting no draft (the project's rule: programs of different widths may round
differently).
"""

import functools
import pathlib
import statistics
import sysconfig
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.bench import timing
from mtp_jax.config import schema
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.model import lm
from mtp_jax.model import params as params_lib
from mtp_jax.parallel import sharding
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib
from tests.hardware import report, session

HELD_OUT = 20  # every so many files
MODEL = '--heads.unembedding=replicated', '--model.vocab_size=264', '--loss.backward=interleaved'


class Sizes(NamedTuple):
  """Flags of the model and its training, and what is decoded."""

  flags: tuple[str, ...]
  widths: tuple[int, ...]  # W, 1 + drafts, in the order of measurement; 1 first
  batches: tuple[int, ...]
  prompt: int  # tokens
  new: int
  rounds: int
  corpus_bytes: int


FULL = Sizes(
  (
    *(session.size_flags('300m'), '--model.n_layers=25', '--heads.n=8'),
    *('--data.seq_len=512', '--data.batch_size=16', '--train.steps=300', '--optim.lr=6e-4'),
  ),
  widths=(1, 4, 2, 8),
  batches=(1, 8, 42),
  prompt=512,
  new=512,
  rounds=3,
  corpus_bytes=2**23,
)
SMALL = Sizes(
  (
    *('--model.d_model=32', '--model.n_layers=5', '--model.n_attn_heads=2', '--model.d_ff=48'),
    *('--model.compute_dtype=float32', '--model.remat=none'),
    *('--data.seq_len=32', '--data.batch_size=4', '--train.steps=200', '--optim.warmup_steps=2'),
    '--optim.lr=1e-2',
  ),
  widths=(1, 4),
  batches=(1,),
  prompt=16,
  new=32,
  rounds=1,
  corpus_bytes=2**10,  # learned by heart, so that drafts are accepted,
)


class Model(NamedTuple):
  name: str
  decoder: decoder_lib.Decoder


class Point(NamedTuple):
  """Prompts, how many of them are decoded at a time, and W, the number of heads in use."""

  prompts: list[np.ndarray]
  batch: int
  W: int

  def of(self, model: Model) -> str:
    """Returns the start of the names of its figures."""
    return f'decoding, {model.name}, batch {self.batch}, W = {self.W}'


def run(work: session.Session) -> None:
  """Measures both models at every batch size and W."""
  sizes = SMALL if work.is_tiny else FULL
  cfg = work.config(*MODEL, *sizes.flags, f'--decode.max_new_tokens={sizes.new}')
  mesh, (train_N, held_out) = work.mesh(cfg), corpus(sizes, max(sizes.batches))
  models = [Model('random', decoder(_initial(cfg, mesh), cfg, mesh))]
  train = functools.partial(trained, work, cfg, mesh, train_N)
  model = work.attempt('a quickly trained model', 90, train)
  models += [Model('trained', decoder(model, cfg, mesh))] if model else []
  for B in sizes.batches:
    prompts = held_out[: B * -(-2 // B)]  # two at least
    expected_s = 60.0 * len(models)
    for W in sizes.widths:
      begin = time.monotonic()
      add = functools.partial(_add, work, models, Point(prompts, B, W), sizes.rounds)
      if work.attempt(f'decoding, batch {B}, W = {W}', expected_s, add):
        expected_s = time.monotonic() - begin


# Models.


def corpus(sizes, n_prompts: int) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns bytes of Python's standard library to train on, and prompts of other files, which
  start at the beginning of a file: n_prompts at least."""
  paths = sorted(pathlib.Path(sysconfig.get_path('stdlib')).glob('*.py'))
  texts = [np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32) for path in paths]
  texts = [text for text in texts if len(text) > sizes.prompt]
  held_out = [text for i, text in enumerate(texts) if i % HELD_OUT == 0]
  train = [text for i, text in enumerate(texts) if i % HELD_OUT]
  pieces = [
    text[at : at + sizes.prompt]
    for at in range(0, 64 * sizes.prompt, sizes.prompt)
    for text in held_out
    if len(text) >= at + sizes.prompt
  ]
  assert len(pieces) >= n_prompts
  return np.concatenate(train)[: sizes.corpus_bytes], pieces


def _initial(cfg: schema.Config, mesh) -> lm.LM:
  with jax.set_mesh(mesh):
    key = jax.random.key(cfg.train.seed)
    init = jax.jit(lambda key: params_lib.init(key, lm.specs(cfg), cfg.model.param_dtype))
    return init(key)


def decoder(model: lm.LM, cfg: schema.CommandConfig, mesh) -> decoder_lib.Decoder:
  return decoder_lib.Decoder(model, cfg, mesh, cfg.heads.n)


def trained(
  work: session.Session, cfg: schema.CommandConfig, mesh, train_N, *, of='', start=None
) -> lm.LM:
  """Returns the model after --train.steps on windows drawn from the bytes; of: the start of the
  figure's name; start: the State at first, which is donated."""
  rng = np.random.default_rng(cfg.train.seed)
  U = cfg.data.seq_len + cfg.span
  position = np.broadcast_to(np.arange(U, dtype=np.int32), (1, cfg.data.batch_size, U))
  bytes_V = np.ones(cfg.model.vocab_size, np.int32)
  with jax.set_mesh(mesh):
    state = start or state_lib.init(cfg, mesh)
    step = step_lib.compiled(cfg, cfg.heads.n)
    bytes_V = jax.device_put(bytes_V, jax.NamedSharding(mesh, jax.P()))
    begin, losses = time.monotonic(), []
    for _ in range(cfg.train.steps):
      at_B1 = rng.integers(0, len(train_N) - U, (cfg.data.batch_size, 1))
      tokens = train_N[at_B1 + np.arange(U)][None]
      batch = sharding.put_batch(mesh, dict(tokens=tokens, position=position))
      state, metrics = step(state, batch, bytes_V)
      losses.append((metrics['loss_sum_K'][-1], metrics['count_K'][-1]))
  first, last = (float(total) / float(count) for total, count in (losses[0], losses[-1]))
  work.figure(
    f'{of}loss of head {cfg.heads.n} after {cfg.train.steps} steps of'
    f' {cfg.data.batch_size * cfg.data.seq_len} bytes',
    last / first,
    'ratio',
    bar=report.Bar('at most', 0.95, is_equality=True, note='it learns'),
    note=f'{first:.2f} to {last:.2f} nats, {time.monotonic() - begin:.0f} s',
  )
  return state.params


# Decoding.


def _decode(model: Model, at: Point, W: int, **kwargs) -> decoder_lib.Decoded:
  """Decodes the prompts with W - 1 drafts."""
  batches = [at.prompts[i : i + at.batch] for i in range(0, len(at.prompts), at.batch)]
  return decoder_lib.joined(
    [model.decoder(batch, widths=(1,) * (W - 1), rows=at.batch, **kwargs) for batch in batches]
  )


def _add(work: session.Session, models: list[Model], at: Point, rounds: int) -> bool:
  """Measures a point, plain decoding of the same models in the same rounds."""
  for model in models:
    drafted = _decode(model, at, at.W)  # compiles, and warms up
    if at.W > 1:
      _identical(work, model, at, drafted)
  last, times = {}, {(model.name, W): [] for model in models for W in (1, at.W)}
  for r in range(rounds):
    for model in models if r % 2 else models[::-1]:
      for W in sorted({1, at.W}, reverse=bool(r % 2)):
        decoded = last[model.name, W] = _decode(model, at, W)
        times[model.name, W].append(decoded.decode_s / decoded.n_tokens)
  for model in models:
    of = times[model.name, at.W], times[model.name, 1]
    _speed(work, model, at, last[model.name, at.W], of)
  return True


def _identical(work, model: Model, at: Point, drafted: decoder_lib.Decoded) -> None:
  """Records the share of rows whose text is that of the same program accepting no draft."""
  plain = _decode(model, at, at.W, max_accept=0)
  pairs = zip(drafted.tokens, plain.tokens, strict=True)
  same = [np.array_equal(a, b) for a, b in pairs]
  work.figure(
    f'{at.of(model)}: texts equal to those with no draft accepted',
    sum(same) / len(same),
    'share',
    bar=report.Bar('at least', 1.0, is_equality=True),
    note=f'{sum(same)} of {len(same)}',
  )


def _speed(work, model: Model, at: Point, decoded: decoder_lib.Decoded, times) -> None:
  """Records tokens per second.

  times: seconds per token of each round, with drafts and plain.
  """
  over_plain = timing.ratio(times[1], times[0])
  work.figure(
    at.of(model),
    1 / statistics.median(times[0]),
    'tokens/s',
    predicted=predicted(work, model, at, decoded.tokens_per_forward),
    note=f'{decoded.tokens_per_forward:.2f} tokens per forward pass,'
    f' {over_plain["median"]:.2f} of plain',
    detail=dict(
      tokens_per_forward=decoded.tokens_per_forward,
      over_plain=over_plain,
      acceptance=decoded.acceptance_J,
      read_bytes=model.decoder.read_bytes((1,) * (at.W - 1)),
      seconds_per_token=times[0],
      longest_forwards=int(decoded.forwards.max()),
    ),
  )


def predicted(work, model: Model, at: Point, tokens_per_forward: float) -> float | None:
  """Returns tokens per second, if a forward pass reads its weights at the chip's bandwidth or
  multiplies with them at its peak, the slower of both; caches are not counted."""
  if not work.chip:
    return None
  read = model.decoder.read_bytes((1,) * (at.W - 1))
  itemsize = np.dtype(jnp.dtype(model.decoder.cfg.model.compute_dtype)).itemsize
  compute_s = 2 * at.batch * at.W * read / itemsize / work.chip.flops_per_s
  return at.batch * tokens_per_forward / max(read / work.chip.hbm_bytes_per_s, compute_s)
