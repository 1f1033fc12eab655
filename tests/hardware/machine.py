"""Versions and device, and what a matrix product and a sum over memory reach on it."""

import os
import platform

import jax
import jax.numpy as jnp
import jaxlib

from mtp_jax.bench import timing
from tests.hardware import session

TRIES = 8
# What changes the programs that XLA compiles, or where it puts them.
VARIABLES = (
  'XLA_FLAGS',
  'LIBTPU_INIT_ARGS',
  'JAX_PLATFORMS',
  'XLA_PYTHON_CLIENT_MEM_FRACTION',
  'JAX_COMPILATION_CACHE_DIR',
)


def about(device) -> dict:
  """Returns the head of a report."""
  backend: str = device.client.platform_version
  return dict(
    device=f'{len(jax.devices())} x {device.device_kind} ({device.platform}), one of them used',
    device_kind=device.device_kind,
    platform=device.platform,
    versions=dict(
      jax=jax.__version__,
      jaxlib=jaxlib.__version__,  # pyright: ignore[reportPrivateImportUsage]
      python=platform.python_version(),
      backend=' '.join(backend.split()),
    ),
    environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
  )


def run(work: session.Session) -> None:
  chip = work.chip
  if work.memory_bytes:
    name = 'memory that this process may allocate'
    work.figure(name, work.memory_bytes, 'bytes', predicted=chip and chip.hbm_bytes)
  side, n_bytes = (256, 2**16) if work.is_tiny else (8192, 2**31)
  work.attempt('matrix product', 10, lambda: _product(work, chip, side))
  work.attempt('sum over memory', 5, lambda: _sum(work, chip, n_bytes))


def _fastest_s(call, x) -> float:
  call = jax.jit(call)
  jax.block_until_ready(call(x))
  return min(timing.seconds(lambda: call(x)) for _ in range(TRIES))


def _product(work, chip, side: int) -> None:
  x = jnp.ones((side, side), jnp.bfloat16, device=work.device)
  seconds = _fastest_s(lambda x: x @ x, x)
  work.figure(
    f'matrix product of {side} x {side} in bfloat16',
    2 * side**3 / seconds,
    'FLOP/s',
    predicted=chip and chip.flops_per_s,
  )


def _sum(work, chip, n_bytes: int) -> None:
  x = jnp.ones(n_bytes // 4, jnp.float32, device=work.device)
  work.figure(
    f'sum over {n_bytes / 2**20:g} MiB',
    n_bytes / _fastest_s(jnp.sum, x),
    'bytes/s',
    predicted=chip and chip.hbm_bytes_per_s,
  )
