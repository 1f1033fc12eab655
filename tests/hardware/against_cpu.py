"""A training step's loss and gradients on the accelerator, in float32 and bfloat16, against the
CPU of the same machine in float32."""

import concurrent.futures
import functools
import itertools
import math

import jax
import numpy as np

from mtp_jax.api import model as api
from mtp_jax.config import schema
from mtp_jax.parallel import sharding
from tests.hardware import report, session
from tests.support import tiny

FAMILIES = {'parallel': 6, 'sequential': 2}  # and layers: two of the trunk
# Relative, in norm: of the loss, of all gradients together, of a single array's gradient. float32
# has products in full precision, so that sums in another order remain. bfloat16 on a CPU itself
# is off by up to 5e-5, 1.8e-2 and 2.3e-2: it rounds 8 bits at every product of six layers.
TOLERANCES = {'float32': (1e-4, 1e-3, 1e-3), 'bfloat16': (2e-3, 3e-2, 4e-2)}


def run(work: session.Session) -> None:
  try:
    cpu = jax.devices('cpu')[-1]  # another one in tests, which have two
  except RuntimeError as error:  # JAX_PLATFORMS names the accelerator alone
    reason = f'jax has no CPU backend here: {session.one_line(error)}; unset JAX_PLATFORMS'
    raise RuntimeError(reason) from error
  rows = list(itertools.product(TOLERANCES, FAMILIES, ['interleaved']))
  # The log-sum-exp of the forward pass meets logits that are computed again.
  rows += [('bfloat16', 'parallel', 'remat')]
  for dtype, family, backward in rows[-1:] if work.is_tiny else rows:
    what = f'{family} heads, {backward}, {dtype}'
    cfg = schema.replace(config(work, family, dtype), **{'loss.backward': backward})
    compare = functools.partial(_compare, work, cpu, what, cfg)
    work.attempt(f'{what}: loss and gradients against the CPU', 25, compare)


def config(work: session.Session, family: str, dtype: str) -> schema.CommandConfig:
  """Returns a small model with grouped keys; rows of a tile, so that kernels are used."""
  d_model, d_ff, vocab_size = (64, 96, 64) if work.is_tiny else (256, 768, 1024)
  return tiny.cfg(
    model__d_model=d_model,
    model__n_layers=FAMILIES[family],
    model__d_ff=d_ff,
    model__vocab_size=vocab_size,
    model__compute_dtype=dtype,
    model__remat='none' if work.is_tiny else 'block',
    heads__n=4,
    heads__family=family,
    loss__backward='interleaved',
    data__seq_len=schema.TILE if work.is_tiny else 2 * schema.TILE,
    data__batch_size=2,
  )


@functools.partial(jax.jit, static_argnames='cfg')
def _value_and_grad(params, rows, *, cfg):
  def loss(params):
    return api.loss(params, rows, cfg)[0]

  return jax.value_and_grad(loss)(params)


def loss_and_grads(cfg: schema.Config, device):
  """Returns (loss, gradients by name) of packed rows on one device, in float64 on the host."""
  mesh = sharding.make_mesh(cfg, [device])
  rows = {name: x[0] for name, x in tiny.batch(cfg, packed=True).items()}
  with jax.set_mesh(mesh), jax.default_matmul_precision('highest'):
    rows = jax.device_put(rows, jax.NamedSharding(mesh, sharding.pspec('batch', None)))
    loss, grads = jax.device_get(_value_and_grad(tiny.model(cfg, mesh), rows, cfg=cfg))
  return float(loss), tiny.flat(grads)


def _compare(work: session.Session, cpu, what: str, cfg: schema.Config) -> None:
  exact = schema.replace(cfg, **{'model.compute_dtype': 'float32'})
  # Both compile for some time.
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    sides = [pool.submit(loss_and_grads, *of) for of in ((cfg, work.device), (exact, cpu))]
    (loss, grads), (cpu_loss, cpu_grads) = [side.result() for side in sides]
  by_array = {name: _difference(grads[name], cpu_grads[name]) for name in cpu_grads}
  both = [np.concatenate([g.ravel() for g in of.values()]) for of in (grads, cpu_grads)]
  finite = all(map(math.isfinite, by_array.values()))
  measured = (
    abs(loss - cpu_loss) / abs(cpu_loss),
    _difference(*both),
    max(by_array.values()) if finite else math.nan,
  )
  names = 'loss', 'all gradients', 'gradient of any array'
  tolerances = TOLERANCES[cfg.model.compute_dtype]
  for name, value, tolerance in zip(names, measured, tolerances, strict=True):
    bar = report.Bar('at most', tolerance, is_equality=True, note='relative, in norm')
    detail = dict(by_array=by_array) if name == names[-1] else {}
    work.figure(f'{what}: {name} against the CPU', value, 'difference', bar=bar, detail=detail)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))
