"""Per-head loss, accuracy and acceptance on held-out windows. Floor 4.

The loss is the training loss itself, in sums and counts: each head's nats over
its own valid targets, over the whole split.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import schedule, schema
from mtp_jax.losses import multi_token, targets
from mtp_jax.parallel import sharding


def evaluator(cfg: schema.Config, mesh, bytes_V) -> Callable:
  """Returns run(params, batches, step) -> metrics as a training step has them.

  step: optimizer steps that made the parameters. The heads that were active and
  the weights in force at the last of them are those of the evaluation: a head
  that never trained would be noise, to its neighbours in a chain as well.
  batches yield tokens and position (1, b, U) of this process's rows
  (`sharding.local_rows`); every process needs as many.
  """
  n = cfg.heads.n

  @functools.partial(jax.jit, static_argnames='n_active')
  def sums(params, batch, bytes_V, *, n_active):
    count_K, n_bytes = targets.counts(batch, cfg, bytes_V)
    rows = jax.tree.map(lambda x: x[0], batch)
    one_K = jnp.ones(n)  # the total is made of all batches' sums, at the end
    _, sums = multi_token.mtp_loss(
      params, jnp.zeros(n), rows, count_K=one_K, weight_K=one_K, n_active=n_active, cfg=cfg
    )
    return sums | dict(count_K=count_K[:n_active], bytes=n_bytes)

  def run(params, batches: Iterable[dict], step: int) -> dict:
    last, total = max(step - 1, 0), None
    n_active = schedule.active_heads(cfg, last)
    with jax.set_mesh(mesh):
      for batch in batches:
        batch = sharding.put_batch(mesh, batch)
        new = jax.device_get(sums(params, batch, bytes_V, n_active=n_active))
        new = jax.tree.map(np.float64, new)
        total = jax.tree.map(np.add, total, new) if total else new
    weight_K = schedule.in_force(schedule.head_weights(cfg), last)[:n_active]
    return _finish(total, np.array(weight_K), cfg.loss.token_order_weight)

  return run


def _finish(total: dict, weight_K, order_weight: float) -> dict:
  """The sums with the loss that they make: of heads that have a target."""
  over_K = 1 / np.maximum(total['count_K'], 1)
  loss = np.sum(weight_K * total['loss_sum_K'] * over_K)
  loss += order_weight * total.get('order_loss_sum', 0) * over_K[0]
  return total | dict(total=loss)
