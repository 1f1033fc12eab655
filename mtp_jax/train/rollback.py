"""Loss spikes: their detection, and the rollback to a checkpoint before one."""

import collections
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from mtp_jax.checkpoint import metadata, restore
from mtp_jax.checkpoint import saver as saver_lib
from mtp_jax.data import loader
from mtp_jax.losses import metrics as metrics_lib
from mtp_jax.parallel import distributed
from mtp_jax.train import goodput, metrics, resume
from mtp_jax.train import run as run_lib

MAX_ROLLBACKS = 8  # to the same checkpoint


class Spike(NamedTuple):
  """A step with a loss spike, detected after `done` steps."""

  step: int
  done: int
  log_line: Callable


def roll_back(run: run_lib.Run, spike: Spike, skipped, stack):
  """Rolls back to the newest checkpoint before a spike, skipping the batches that
  led to it. Returns (run, resume.Position) to continue with.

  Only checkpoints at the run's cadence qualify: with those of interruptions the
  result would depend on when a signal arrived.
  """
  cfg, workdir = run.cfg, run.cfg.train.workdir
  batch = loader.index_of(spike.step - 1, skipped)
  first = max(0, batch + 1 - cfg.train.skip_batches)
  skipped = loader.with_skipped(skipped, first, batch)
  run.saver.wait_until_finished()
  run_lib.check_held(run)
  start, _ = resume.newest_valid(
    workdir, lambda step: step < spike.step and saver_lib.is_at_cadence(step, cfg.train)
  )
  if not start and spike.step > (cfg.train.checkpoint_every or cfg.train.steps):
    # The run had another cadence before.
    start, _ = resume.newest_valid(workdir, lambda step: step < spike.step)
  start, saved = start or 0, None
  with distributed.fail_together():
    for step in restore.steps(workdir) if distributed.is_primary() else ():
      if step > start:
        restore.quarantine(workdir, step, 'spike')
    if start:
      saved = metadata.read(workdir, start)
  spike.log_line(f'rolling back to step {start}; skipping batches {first}-{batch}')
  saver = saver_lib.Saver(workdir, cfg)
  stack.callback(saver.close)
  run = run._replace(saver=saver)
  if run.sinks and run.ledger:
    run.ledger.write(spike.done, run.clock, 'rolled back', left_out=[first, batch])
    run.sinks.close()
    run.ledger.close()
    sinks, ledger = metrics.Sinks(workdir, start), goodput.Ledger(workdir, start)
    run = run._replace(sinks=sinks, ledger=ledger)
    stack.callback(sinks.close)
    stack.callback(ledger.close)
  spikes = saved.spikes if saved else {}
  return run._replace(clock=goodput.Clock()), resume.Position(start, skipped, spikes)


class SpikeMonitor:
  """Detects, logs and counts loss spikes; a call returns a spike's step.

  Each loss is read LAG steps after its dispatch, so that the loop never blocks
  on it.

  saved: the `state` of an earlier monitor; with it a run that was interrupted or
  rolled back detects what an uninterrupted run would.
  """

  LAG = 2

  def __init__(self, run: run_lib.Run, saved: dict):
    self._run = run
    self._spike = Detector(run.cfg.train.spike_sigma, saved.get('losses', ()))
    self._pending: collections.deque[tuple[int, Any]] = collections.deque(
      map(tuple, saved.get('pending', ()))
    )

  def __call__(self, done: int, values: dict, log_line) -> int | None:
    of_head_1 = values['loss_sum_K'], values['count_K']
    self._pending.append((done, of_head_1))
    if len(self._pending) <= self.LAG:
      return None
    step, loss = self._pending.popleft()
    loss = self._read(loss)
    if not self._spike(loss):
      return None
    log_line(f'step {step}: head 1 {loss:.4f} is a loss spike')
    if self._run.ledger:
      self._run.ledger.write(done, self._run.clock, spike=step, loss=loss)
    return step

  @staticmethod
  def _read(loss) -> float | None:
    """Returns the mean loss from a step's sums on the devices, or a saved one."""
    if not isinstance(loss, tuple):
      return loss
    sum_K, count_K = jax.device_get(loss)
    return metrics_lib.mean(sum_K[0], count_K[0])

  def state(self) -> dict:
    """Returns the JSON state; blocks on the steps in flight."""
    self._pending = collections.deque((step, self._read(loss)) for step, loss in self._pending)
    # JSON has no NaN or infinity; neither is a spike.
    return dict(
      losses=list(self._spike.losses),
      pending=[
        [step, loss if loss is not None and math.isfinite(loss) else None]
        for step, loss in self._pending
      ],
    )


WINDOW, ENOUGH = 128, 16
# Lower bound of a deviation, relative to the median: without it any change would
# be a spike in a run with a near-constant loss.
LEAST = 0.01


class Detector:
  """Detects spikes in head 1's loss, one call per step; `losses` is its state.

  A loss is a spike if it is more than `sigma` deviations above the median of
  the last WINDOW losses that were not. A deviation is 1.4826 x the median
  absolute deviation, the standard deviation of a normal distribution, which is
  robust to spikes; it is at least LEAST x the median. Never spikes: the first
  ENOUGH losses, non-finite ones (their steps change nothing), and None, of a
  batch in which head 1 has no target.
  """

  def __init__(self, sigma: float, losses: Iterable[float] = ()):
    self._sigma = sigma
    self.losses = collections.deque(losses, maxlen=WINDOW)

  def __call__(self, loss: float | None) -> bool:
    if not self._sigma or loss is None or not math.isfinite(loss):
      return False
    if len(self.losses) >= ENOUGH:
      median = statistics.median(self.losses)
      spread = statistics.median(abs(x - median) for x in self.losses)
      deviation = max(1.4826 * spread, LEAST * abs(median))
      if loss > median + self._sigma * deviation:
        return True
    self.losses.append(loss)
    return False
