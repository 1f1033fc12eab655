"""Ends a process that makes no progress, printing where it hung."""

import contextlib
import faulthandler
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
  """Yields heartbeat(), to be called again within `seconds`; 0 disables it.

  On expiry the process exits with status 1 and the stacks of all its threads on
  stderr. The timer is in C, so that it also fires while a collective or the
  compiler hangs and no Python runs.
  """

  def heartbeat():
    if seconds:
      faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)

  heartbeat()
  try:
    yield heartbeat
  finally:
    if seconds:
      faulthandler.cancel_dump_traceback_later()
