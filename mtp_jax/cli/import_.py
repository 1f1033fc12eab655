"""`mtp import`: another program's checkpoint into a run directory."""

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags


def run(parsed: flags.Parsed) -> int:
  command_lib.start_jax(command_lib.single_process_config(parsed))
  from mtp_jax.interop import convert

  command_lib.print_report(convert.import_(parsed.given), {}, '')
  return 0
