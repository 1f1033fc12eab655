"""Per-head loss, accuracy and acceptance on held-out windows.

The loss is the training loss, as sums and counts: each head's nats over its own
valid targets, over the whole split.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np

from mtp_jax.config import schedule, schema
from mtp_jax.evals import calibration, scores
from mtp_jax.losses import multi_token, targets
from mtp_jax.parallel import sharding


def evaluator(cfg: schema.Config, mesh, bytes_V, calibrated: bool = False) -> Callable:
  """Returns run(params, batches, step, teacher=None) -> metrics as of a training step.

  step: number of optimizer steps of the parameters. Evaluates the heads that
  were active, and the head weights, at the last of them: a head that was never
  trained would be noise, also for its successors in a chain. batches yield
  tokens and position (1, b, U) of this process's rows (`sharding.local_rows`),
  the same number on every process. teacher: the teacher.Model of --loss.teacher. With
  calibrated=True, metrics['calibration'] has the sums of `calibration.sums`.
  """

  @functools.partial(jax.jit, static_argnames='n_active')
  def sums(params, batch, bytes_V, teacher, *, n_active):
    counts = targets.counts(batch, cfg, n_active)
    rows = jax.tree.map(lambda x: x[0], batch)
    detail = scores.of_target if calibrated else None
    sums, stats, valid_KBT = multi_token.evaluate(
      params, rows, n_active=n_active, cfg=cfg, detail=detail, teacher=teacher
    )
    sums |= dict(count_K=counts.target_K, bytes=targets.target_bytes(batch, cfg, bytes_V))
    if calibrated:
      of_targets = scores.Scores(*stats.detail, valid=valid_KBT[:n_active])
      sums['calibration'] = calibration.sums(of_targets)
    return sums

  def run(params, batches: Iterable[dict], step: int, teacher=None) -> dict:
    last, total = max(step - 1, 0), None
    n_active = schedule.active_heads(cfg, last)
    with jax.set_mesh(mesh):
      for batch in batches:
        batch = sharding.put_batch(mesh, batch)
        new = jax.device_get(sums(params, batch, bytes_V, teacher, n_active=n_active))
        new = jax.tree.map(np.float64, new)
        total = jax.tree.map(np.add, total, new) if total else new
    weight_K = schedule.head_weights(cfg, last)[:n_active]
    assert total is not None  # there is a batch
    return _finish(total, np.array(weight_K), cfg.loss)

  return run


def _finish(total: dict, weight_K, l: schema.LossConfig) -> dict:
  """Adds the total loss to the sums, over heads that have a target."""
  over_K = 1 / np.maximum(total['count_K'], 1)
  loss_K = total['loss_sum_K'] * over_K
  if l.compares and len(loss_K) > 1:
    z_loss_K = total['z_loss_sum_K'] * over_K
    draft_K = total['draft_loss_sum_K'] / np.maximum(total['draft_count_K'], 1)
    share = l.head_ce_share
    loss_K[1:] = (share * (loss_K - z_loss_K) + z_loss_K + (1 - share) * draft_K)[1:]
  loss = np.sum(weight_K * loss_K)
  loss += l.token_order_weight * total.get('token_order_loss_sum', 0) * over_K[0]
  return total | dict(total=loss)
