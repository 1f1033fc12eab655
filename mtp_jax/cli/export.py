"""`mtp export CHECKPOINT`: to the format of another program."""

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags


def run(parsed: flags.Parsed) -> int:
  command_lib.start_jax(command_lib.single_process_config(parsed))
  from mtp_jax.interop import convert

  command_lib.print_report(convert.export(parsed.rest[0], parsed.given), {}, '')
  return 0
