"""The resources of a running training job, shared by the modules of the loop."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from mtp_jax.config import schema
from mtp_jax.data import corpus
from mtp_jax.losses import teacher as teacher_lib
from mtp_jax.parallel import distributed
from mtp_jax.train import goodput, lock, metrics

Progress = Callable[[int, int], contextlib.AbstractContextManager[Callable]]


@contextlib.contextmanager
def plain_lines(start: int, steps: int):
  """Yields log_line(text, step=None), which prints a line to stdout."""
  del start, steps
  yield lambda text, step=None: print(text, flush=True)


class Run(NamedTuple):
  """Resources of a training run; lock, sinks and ledger in the primary process."""

  cfg: schema.CommandConfig
  mesh: Any
  tokens: corpus.Corpus
  bytes_V: Any
  teacher: teacher_lib.Model | None  # of --loss.teacher
  held: lock.Lock | None
  sinks: metrics.Sinks | None
  saver: Any
  stop: distributed.Stop
  clock: goodput.Clock
  ledger: goodput.Ledger | None
  heartbeat: Callable[[], None]  # resets the watchdog
  progress: Progress

  @property
  def step_args(self) -> tuple:
    """What the step reads besides state and batch."""
    return (self.bytes_V,) if self.teacher is None else (self.bytes_V, self.teacher)


def check_held(run, closely=True):
  with distributed.fail_together():
    if run.held:
      run.held.check(closely)


def write_record(run, kind, done, values, source=None):
  check_held(run, closely=False)
  if run.sinks:
    run.sinks.write(kind, done, values, source)
