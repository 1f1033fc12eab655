"""`mtp plan`: compiles the train step ahead of time."""

import contextlib
import os
import signal
import threading

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags
from mtp_jax.config import fields


def run(parsed: flags.Parsed) -> int:
  cfg = parsed.config()
  if cfg.plan.topology:
    # jaxlib's warnings about what it cannot read back are part of the report.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    import jax

    jax.config.update('jax_platforms', 'cpu')  # compiles only, runs nothing
  elif cfg.plan.slices > 1:
    raise fields.ConfigError('plan.slices', cfg.plan.slices, 'needs --plan.topology')
  else:
    command_lib.start_jax(cfg)
  from mtp_jax.planning import run as run_lib

  with _default_sigint():
    values, status = run_lib.run(cfg, lambda line: print(line, flush=True))
  command_lib.print_report([], values, parsed.out)
  return status


@contextlib.contextmanager
def _default_sigint():
  """Ctrl-C ends the process: Python would act on it only once the compiler returns, minutes
  later. Where it is ignored, as in the background, it stays so."""
  handler = signal.getsignal(signal.SIGINT)
  is_main = threading.current_thread() is threading.main_thread()
  if handler is not signal.default_int_handler or not is_main:
    yield
    return
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)
