"""TODO of mtp_jax.train.loop."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from mtp_jax.config import schema
from mtp_jax.data import corpus
from mtp_jax.parallel import distributed
from mtp_jax.train import goodput, lock, metrics

Progress = Callable[[int, int], contextlib.AbstractContextManager[Callable]]


@contextlib.contextmanager
def plain_lines(start: int, steps: int):
  """Yields say(text, step=None), which prints a line."""
  del start, steps
  yield lambda text, step=None: print(text, flush=True)


class Run(NamedTuple):
  """What a training run holds while it runs."""

  cfg: schema.Config
  mesh: Any
  tokens: corpus.Corpus
  bytes_V: Any
  held: lock.Lock | None
  sinks: metrics.Sinks | None
  saver: Any
  stop: distributed.Stop
  clock: goodput.Clock
  ledger: goodput.Ledger | None
  alive: Callable[[], None]  # the watchdog's
  progress: Progress


def check_held(run, closely=True):
  with distributed.fail_together():
    if run.held:
      run.held.check(closely)


def write_record(run, kind, done, values, source=None):
  check_held(run, closely=False)
  if run.sinks:
    run.sinks.write(kind, done, values, source)
