"""Calibration of each head: its confidence, compared with its accuracy."""

import jax.numpy as jnp
import numpy as np

from mtp_jax.evals import scores

BINS = 15  # of equal width, over the probability of the top token
TOP = 5


def sums(s: scores.Scores) -> dict:
  """Returns sums over all valid targets of a batch's scores, under jit.

  count_K, top_K (targets in the top TOP) and, for each of BINS bins of the top
  token's probability, count_KX, the sum of probabilities sure_KX, and the correct
  ones right_KX.
  """
  bin_KBT = jnp.minimum((s.top * BINS).astype(jnp.int32), BINS - 1)

  def by_bin(x_KBT):
    return jnp.stack(
      [jnp.sum(x_KBT, axis=(1, 2), where=s.valid & (bin_KBT == x)) for x in range(BINS)], axis=1
    )

  return dict(
    count_K=jnp.sum(s.valid, axis=(1, 2)),
    top_K=jnp.sum(s.valid & (s.rank < TOP), axis=(1, 2)),
    count_KX=by_bin(jnp.ones_like(s.top)),
    sure_KX=by_bin(s.top),
    right_KX=by_bin((s.rank == 0).astype(jnp.float32)),
  )


def error(total: dict) -> np.ndarray:
  """Returns the expected calibration error per head: the mean difference, over
  targets, of a bin's accuracy and its mean probability (Guo et al. 2017,
  https://arxiv.org/abs/1706.04599)."""
  off_KX = np.abs(total['right_KX'] - total['sure_KX'])
  with np.errstate(invalid='ignore'):
    return off_KX.sum(axis=1) / total['count_K']


def scalars(total: dict) -> dict[str, float]:
  """Returns the metrics per head; NaN for a head without a valid target."""
  out = {}
  with np.errstate(invalid='ignore'):
    top_K = total['top_K'] / total['count_K']
  for k, (top, off) in enumerate(zip(top_K, error(total), strict=True), 1):
    out |= {f'top{TOP}_{k}': float(top), f'calibration_error_{k}': float(off)}
  return out


def table(found: dict[str, float]) -> list[str]:
  """Formats the metrics as a table with one line per head; `-` for NaN."""

  def shown(value, width):
    return f'{"-" if np.isnan(value) else f"{value:.2%}":>{width}}'

  n = sum(name.startswith('calibration_error_') for name in found)
  return [
    f'head   top-{TOP}  calibration error',
    *(
      f'{k:4d}  {shown(found[f"top{TOP}_{k}"], 6)}  {shown(found[f"calibration_error_{k}"], 17)}'
      for k in range(1, n + 1)
    ),
  ]
