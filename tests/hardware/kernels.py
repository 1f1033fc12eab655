"""Attention kernels of the platform against the reference: value, gradients, speed."""

import functools
import math
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.bench import timing
from mtp_jax.config import schema
from mtp_jax.model import attention, flops
from mtp_jax.planning import profile
from tests.hardware import report, session

# Of the largest entry, of bfloat16 inputs against the reference in float32 throughout: as in
# tests/model/attention_test.py, where the kernels are interpreted.
TOLERANCE = 2e-2
SHAPES = ((64, True), (128, True), (64, False), (128, False))  # width, packed
OUTPUTS = ('value', 'dq', 'dk', 'dv')


def run(work: session.Session) -> None:
  """Compares every kernel of the device's platform; on a CPU all of them, interpreted."""
  shapes = SHAPES[:1] if work.is_cpu else SHAPES  # interpreted, they compile for seconds
  for name, platform in schema.KERNELS.items():
    if platform != work.device.platform and not work.is_cpu:
      continue
    for width, packed in shapes:
      row = 'packed' if packed else 'one document per row'
      what = f'{name}, width {width}, {row}: value and gradients against the reference'
      work.attempt(what, 15, functools.partial(_compare, work, name, what, width, packed))
    what = f'{name}, forward and backward, share of the peak'
    work.attempt(what, 20, functools.partial(_time, work, name, what))


def _kernel(work: session.Session, name: str) -> Callable:
  kernel = attention.KERNELS[name]
  return functools.partial(kernel, interpret=True) if work.is_cpu else kernel


def arrays(work: session.Session, *, B: int, T: int, N: int, G: int, H: int, packed: bool):
  """Returns (q, k, v, weights of the output) in bfloat16, and the segments."""
  rng = np.random.default_rng(0)
  of_heads = [
    jax.device_put(rng.standard_normal((B, T, n, H), np.float32), work.device).astype(jnp.bfloat16)
    for n in (N, G, G, N)
  ]
  start_BT = rng.random((B, T)) < (8 / T if packed else 0)  # nine documents on average
  segment_BT = np.cumsum(start_BT, axis=1).astype(np.int32)
  return of_heads, jax.device_put(segment_BT, work.device)


def value_and_grads(kernel: Callable, m: schema.ModelConfig):
  """Returns a function of (q, k, v, weights) and segments: value, dq, dk, dv."""

  def outputs(of_heads, segment_BT):
    *qkv, weight_BTNH = of_heads

    def attend(q_BTNH, k_BTGH, v_BTGH):
      return kernel(attention.Operands(q_BTNH, k_BTGH, v_BTGH, segment_BT), window=0, m=m)

    out_BTNH, vjp = jax.vjp(attend, *qkv)
    return out_BTNH, *vjp(weight_BTNH)

  return outputs


def _compare(work, name: str, what: str, width: int, packed: bool) -> None:
  B, T, N, G = (1, 256, 2, 1) if work.is_tiny else (2, 2048, 8, 4)
  m = schema.ModelConfig(d_model=N * width, n_attn_heads=N, n_kv_heads=G)
  of_heads, segment_BT = arrays(work, B=B, T=T, N=N, G=G, H=width, packed=packed)
  found = jax.jit(value_and_grads(_kernel(work, name), m))(of_heads, segment_BT)
  exact = [x.astype(jnp.float32) for x in of_heads]
  # Without it a GPU rounds float32 factors to TF32, and a TPU to bfloat16.
  with jax.default_matmul_precision('highest'):
    wanted = jax.jit(value_and_grads(attention.reference, m))(exact, segment_BT)
  errors = {
    output: float(jnp.max(jnp.abs(got.astype(jnp.float32) - want)) / jnp.max(jnp.abs(want)))
    for output, got, want in zip(OUTPUTS, found, wanted, strict=True)
  }
  worst = max(errors.values()) if all(map(math.isfinite, errors.values())) else math.nan
  bar = report.Bar('at most', TOLERANCE, is_equality=True, note='of the largest entry')
  work.figure(what, worst, 'difference', bar=bar, detail=dict(by_output=errors))


def _time(work, name: str, what: str) -> None:
  """Times one layer of 1.3B: 4096 positions, 16 heads of 128."""
  B, T, N, H = (1, 256, 2, 64) if work.is_tiny else (4, 4096, 16, 128)
  m = schema.ModelConfig(d_model=N * H, n_attn_heads=N)
  args = arrays(work, B=B, T=T, N=N, G=N, H=H, packed=False)
  traced = jax.jit(value_and_grads(_kernel(work, name), m)).trace(*args)
  executed = flops.of_program(traced.jaxpr, T, kernels_only=True)
  compiled = traced.lower().compile()
  jax.block_until_ready(compiled(*args))
  seconds = statistics.median(timing.seconds(lambda: compiled(*args)) for _ in range(9))
  work.figure(
    what,
    executed / seconds / work.chip.flops_per_s if work.chip else None,
    'share',
    predicted=profile.KERNEL_EFFICIENCY,
    note=f'{1e3 * seconds:.2f} ms, T {T}, {N} heads of {H}, {B} rows',
    detail=dict(seconds=seconds, executed_flops=executed),
  )
