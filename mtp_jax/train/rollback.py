"""TODO of mtp_jax.train.loop."""

import collections
import math
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax

from mtp_jax.checkpoint import restore
from mtp_jax.checkpoint import saver as saver_lib
from mtp_jax.data import loader
from mtp_jax.losses import metrics as metrics_lib
from mtp_jax.parallel import distributed
from mtp_jax.train import goodput, metrics, resume
from mtp_jax.train import run as run_lib

MAX_ROLLBACKS = 8  # times that a run goes back to one checkpoint


class Spike(NamedTuple):
  """A step whose loss was one, known when `done` steps were."""

  step: int
  done: int
  say: Callable


def roll_back(run: run_lib.Run, spike: Spike, left_out, stack):
  """(run, step, left_out) with which to go on after a spike: from the newest
  checkpoint before it, without the batches that led there.

  Of those at the run's cadence: a checkpoint of an interruption would make what
  follows depend on when a signal came.
  """
  cfg, workdir = run.cfg, run.cfg.train.workdir
  batch = loader.index_of(spike.step - 1, left_out)
  first = max(0, batch + 1 - cfg.train.skip_batches)
  left_out = loader.leave_out(left_out, first, batch)
  run.saver.wait_until_finished()
  run_lib.check_held(run)
  start = resume.newest_good(
    workdir, lambda step: step < spike.step and saver_lib.is_at_cadence(step, cfg.train)
  )
  if not start and spike.step > (cfg.train.checkpoint_every or cfg.train.steps):
    # Of a run that had another cadence before.
    start = resume.newest_good(workdir, lambda step: step < spike.step)
  with distributed.fail_together():
    for step in restore.steps(workdir) if distributed.is_primary() else ():
      if step > start:
        restore.quarantine(workdir, step, 'spike')
  spike.say(f'goes back to step {start}; batches {first} to {batch} of the order are left out')
  saver = saver_lib.Saver(workdir, cfg)
  stack.callback(saver.close)
  run = run._replace(saver=saver)
  if run.sinks:
    run.ledger.write(spike.done, run.clock, 'went back', left_out=[first, batch])
    run.sinks.close()
    run.ledger.close()
    run = run._replace(sinks=metrics.Sinks(workdir, start), ledger=goodput.Ledger(workdir, start))
    stack.callback(run.sinks.close)
    stack.callback(run.ledger.close)
  return run._replace(clock=goodput.Clock()), start, left_out


class SpikeMonitor:
  """Says and counts loss spikes: each step's loss is read when the next but one
  has been dispatched, so that nothing waits for it. Returns a spike's step.

  saved: what `state` of an earlier one returned; a run that was interrupted, or
  went back, sees what it would have seen.
  """

  LAG = 2

  def __init__(self, run: run_lib.Run, saved: dict):
    self._run = run
    self._spike = Detector(run.cfg.train.spike_sigma, saved.get('losses', ()))
    self._pending = collections.deque(map(tuple, saved.get('pending', ())))

  def __call__(self, done: int, values: dict, say) -> int | None:
    of_head_1 = values['loss_sum_K'], values['count_K']
    self._pending.append((done, of_head_1))
    if len(self._pending) <= self.LAG:
      return None
    step, loss = self._pending.popleft()
    loss = self._read(loss)
    if not self._spike(loss):
      return None
    say(f'step {step}: head 1 {loss:.4f} is a loss spike')
    if self._run.ledger:
      self._run.ledger.write(done, self._run.clock, spike=step, loss=loss)
    return step

  @staticmethod
  def _read(loss) -> float | None:
    """Of a step's sums on the devices, or as it was saved."""
    if not isinstance(loss, tuple):
      return loss
    sum_K, count_K = jax.device_get(loss)
    return metrics_lib.mean(sum_K[0], count_K[0])

  def state(self) -> dict:
    """All of it as JSON has it; waits for the steps that are under way."""
    self._pending = collections.deque((step, self._read(loss)) for step, loss in self._pending)
    # JSON has neither NaN nor infinity; a step of either is no spike.
    return dict(
      losses=list(self._spike.losses),
      pending=[
        [step, loss if loss is not None and math.isfinite(loss) else None]
        for step, loss in self._pending
      ],
    )


WINDOW, ENOUGH = 128, 16
# Losses of so regular a run that any wiggle would be a spike.
LEAST = 0.01


class Detector:
  """spike(loss of head 1), step by step; `losses` is all that it remembers.

  A loss is a spike if it is more than `sigma` deviations above the median of
  the last 128 that were none; a deviation is 1.4826 times the median distance
  from the median, which is that of a normal distribution and does not see
  spikes themselves, and at least a hundredth of the median. The first 16 are
  none, and so are those that are not finite, whose steps change nothing, and
  None, of a batch in which head 1 has no target.
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
