"""Per-head loss, accuracy and acceptance on held-out windows. Floor 4.

The loss is the training loss itself, in plain sums: each head's nats over its
own valid targets, over the whole split.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import config, loss, sharding


def evaluator(cfg: config.Config, mesh, bytes_V) -> Callable:
  """Returns run(params, batches) -> a step's metrics, see train/metrics.py.

  batches yield tokens and position (1, b, U) of this process's rows.
  """
  n = cfg.heads.n

  @jax.jit
  def sums(params, batch, bytes_V):
    count_K, n_bytes = loss.counts(batch, n, bytes_V)
    rows = jax.tree.map(lambda x: x[0], batch)
    one_K = jnp.ones(n)
    _, sums = loss.mtp_loss(
      params, jnp.zeros(n), rows,
      count_K=one_K, weight_K=one_K, n_active=n, cfg=cfg,
    )  # fmt: skip
    return sums | dict(count_K=count_K, bytes=n_bytes)

  def run(params, batches: Iterable[dict]) -> dict:
    total = None
    with jax.set_mesh(mesh):
      for batch in batches:
        new = sums(params, sharding.put_batch(mesh, batch), bytes_V)
        new = jax.tree.map(np.float64, jax.device_get(new))
        total = jax.tree.map(np.add, total, new) if total else new
    return _finish(total, cfg, n)

  return run


def _finish(total: dict, cfg: config.Config, n: int) -> dict:
  over_K = 1 / np.maximum(total['count_K'], 1)
  weight_K = np.array(config.head_weights(cfg)[-1][1])
  loss_K = total['loss_K'] * over_K
  return dict(
    total=np.sum(weight_K * loss_K),
    loss_K=loss_K,
    z_loss_K=total['z_loss_K'] * over_K,
    accuracy_K=total['accuracy_K'] * over_K,
    accepted_K=total['accepted_K'],
    nats=total['loss_K'][0] - total['z_loss_K'][0],
    count_K=total['count_K'],
    bytes=total['bytes'],
  )
