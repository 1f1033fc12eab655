"""`mtp plan`: compiles the train step ahead of time."""

import contextlib
import os
import signal

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

  with _ends_at_once():
    values, status = run_lib.run(cfg, lambda line: print(line, flush=True))
  command_lib.print_report([], values, parsed.out)
  return status


@contextlib.contextmanager
def _ends_at_once():
  """Python acts on Ctrl-C only once the compiler returns, which takes minutes."""
  handler = signal.getsignal(signal.SIGINT)
  if handler is signal.default_int_handler:  # not ignored, as in the background
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)
