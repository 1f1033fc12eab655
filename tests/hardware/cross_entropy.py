"""The loss's linear cross-entropy: value and gradients of hidden states and unembedding."""

import functools
import math
import statistics

import jax
import jax.numpy as jnp

from mtp_jax.bench import timing
from mtp_jax.config import schema
from mtp_jax.losses import cross_entropy
from mtp_jax.model import flops
from mtp_jax.planning import ahead
from tests.hardware import report, session

B, T, D, V = 8, 4096, 2560, 128256  # 32768 positions
TINY = 2, 256, 64, 512
CHUNKS = (0, 256, 512)  # positions per row; 0 = what the loss chooses
BAR_S, BAR_BYTES = 0.1, 5 * 2**30
BAR_FLOPS_PER_S = 989e12  # the peak of the GPUs for which the bar is
TOLERANCE = 2e-2  # of the largest entry, bfloat16 against float32


def run(work: session.Session) -> None:
  """Measures each chunk size; the bar is of the fastest within the memory."""
  sizes = TINY if work.is_tiny else (B, T, D, V)
  found: list[tuple[float, int]] = []
  for chunk in CHUNKS[:2] if work.is_tiny else CHUNKS:
    chunk //= 2 if work.is_tiny else 1
    name = f'cross-entropy, chunks of {chunk or "the default"}'
    add = functools.partial(_add, work, config(work, sizes, chunk), name, found)
    work.attempt(name, 15, add)
  fit = [seconds for seconds, temp_bytes in found if temp_bytes <= BAR_BYTES]
  if found and not fit:
    bar = report.Bar('at most', BAR_BYTES)
    name = 'cross-entropy, smallest temporaries of any chunks'
    work.figure(name, min(temp_bytes for _, temp_bytes in found), 'bytes', bar=bar)
  if fit:
    bar = report.Bar('at most', BAR_S, note='H100, 5 GiB')
    is_judged = bool(work.chip and work.chip.flops_per_s >= BAR_FLOPS_PER_S)
    name = 'cross-entropy, fastest chunks with temporaries of at most 5 GiB'
    work.figure(name, min(fit), 's', bar=bar, is_judged=is_judged, predicted=_floor(work, sizes))
  work.attempt('cross-entropy against float32', 20, lambda: _against_float32(work))


def _floor(work, sizes) -> float | None:
  """Returns the seconds of three products at the peak."""
  return 6 * math.prod(sizes) / work.chip.flops_per_s if work.chip else None


def config(work: session.Session, sizes, chunk: int, dtype='bfloat16') -> schema.CommandConfig:
  rows, length, width, vocab_size = sizes
  return work.config(
    f'--model.d_model={width}',
    f'--model.vocab_size={vocab_size}',
    f'--model.compute_dtype={dtype}',
    f'--data.seq_len={length}',
    f'--data.batch_size={rows}',
    f'--loss.chunk_size={chunk}',
  )


def arrays(cfg: schema.Config):
  """Returns (hidden states, unembedding, targets, valid) on the device of the mesh."""
  shape, m = (cfg.data.batch_size, cfg.data.seq_len), cfg.model

  @jax.jit
  def make(key):
    of_h, of_unembed, of_target = jax.random.split(key, 3)
    return (
      jax.random.normal(of_h, (*shape, m.d_model), m.compute_dtype),
      jax.random.normal(of_unembed, (m.d_model, m.vocab_size), m.compute_dtype) / m.d_model**0.5,
      jax.random.randint(of_target, shape, 0, m.vocab_size),
      jnp.ones(shape, bool),
    )

  return make(jax.random.key(0))


def loss_and_grads(cfg: schema.Config):
  """Returns the function of `arrays`: the mean loss, gradients of hidden states and of the
  unembedding (in float32, as the loss accumulates them over heads)."""

  def of(h_BTD, unembed_DV, target_BT, valid_BT):
    scale = 1 / valid_BT.size
    dunembed_DV, dh_BTD, loss, _ = cross_entropy.grad_chunks(
      cross_entropy.softmax_xent,
      h_BTD,
      (unembed_DV, jnp.zeros(unembed_DV.shape, jnp.float32)),
      (target_BT, valid_BT),
      scale,
      cfg=cfg,
    )
    return scale * loss, dh_BTD, dunembed_DV

  return of


def _add(work: session.Session, cfg: schema.CommandConfig, name: str, found: list) -> None:
  """Records time and temporaries of one chunk size."""
  with jax.set_mesh(work.mesh(cfg)):
    args = arrays(cfg)
    traced = jax.jit(loss_and_grads(cfg)).trace(*args)
    executed = flops.of_program(traced.jaxpr, cfg.data.seq_len)
    chunk = cross_entropy.chunk_size(cfg.data.batch_size, cfg.data.seq_len, cfg)
    compiled = traced.lower().compile()
    jax.block_until_ready(compiled(*args))
    times = [timing.seconds(lambda: compiled(*args)) for _ in range(7)]
  seconds, memory = statistics.median(times), compiled.memory_analysis()
  # Unknown temporaries count as too large.
  temp_bytes = ahead.temp_bytes(memory, work.device.platform) if memory else math.inf
  found.append((seconds, temp_bytes))
  rows, width = cfg.data.batch_size * cfg.data.seq_len, cfg.model.d_model
  work.figure(
    f'{name}: {rows} x {width} x {cfg.model.vocab_size}, bfloat16',
    seconds,
    's',
    predicted=work.chip and executed / work.chip.flops_per_s,
    note=f'temporaries {temp_bytes / 2**30:.2f} GiB, {chunk} positions of each row',
    detail=dict(seconds=times, temp_bytes=temp_bytes, executed_flops=executed, chunk=chunk),
  )


def _against_float32(work: session.Session) -> None:
  """Compares chunked bfloat16 with float32 in one chunk, at a vocabulary that fits it."""
  sizes = TINY if work.is_tiny else (2, 1024, D, 32000)
  cfg, exact = config(work, sizes, 128), config(work, sizes, sizes[1], 'float32')
  with jax.set_mesh(work.mesh(cfg)):
    args = arrays(cfg)
    found = jax.jit(loss_and_grads(cfg))(*args)
    as_float32 = [x.astype(jnp.float32) for x in args[:2]]
    with jax.default_matmul_precision('highest'):
      wanted = jax.jit(loss_and_grads(exact))(*as_float32, *args[2:])
    pairs = zip(('loss', 'hidden states', 'unembedding'), found, wanted, strict=True)
    errors = {
      name: float(jnp.max(jnp.abs(got.astype(jnp.float32) - want)) / jnp.max(jnp.abs(want)))
      for name, got, want in pairs
    }
  worst = max(errors.values()) if all(map(math.isfinite, errors.values())) else math.nan
  bar = report.Bar('at most', TOLERANCE, is_equality=True, note='of the largest entry')
  name = 'cross-entropy in chunks, bfloat16: value and gradients against float32'
  work.figure(name, worst, 'difference', bar=bar, detail=dict(by_output=errors))
