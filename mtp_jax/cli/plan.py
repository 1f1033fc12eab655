"""`mtp plan`: compiles the train step ahead of time."""

import os

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
  from mtp_jax.planning import report as report_lib

  values, status = report_lib.run(cfg, lambda line: print(line, flush=True))
  command_lib.print_report([], values, parsed.out)
  return status
