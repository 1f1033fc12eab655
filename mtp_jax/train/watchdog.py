"""Ends a process that makes no progress, and says where it hung. Floor 4."""

import contextlib
import faulthandler
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
  """alive(), to be called again within `seconds`; 0 is for ever.

  Who does not call is ended with status 1, the stacks of all its threads on
  stderr. It is the system's timer in C: it also ends what hangs in a collective
  or in a compiler, where no Python runs.
  """

  def alive():
    if seconds:
      faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

  alive()
  try:
    yield alive
  finally:
    if seconds:
      faulthandler.cancel_dump_traceback_later()
