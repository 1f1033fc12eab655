"""`mtp eval CHECKPOINT`: held-out loss and other tasks."""

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags
from mtp_jax.config import schema, validate
from mtp_jax.io import paths


def run(parsed: flags.Parsed) -> int:
  # The checkpoint's own config, read later, is the base of all flags.
  cfg = schema.replace(schema.CommandConfig(), **parsed.given)
  validate.validate(schema.CommandConfig(distributed=cfg.distributed))
  command_lib.start_jax(cfg)
  from mtp_jax.evals import run as run_lib
  from mtp_jax.parallel import distributed

  path = paths.absolute(parsed.rest[0])

  def command():
    for lines, values in run_lib.evaluate(path, parsed.given):
      command_lib.print_report(lines, values, parsed.out, distributed.is_primary())
    return 0

  return distributed.run(cfg, command)
