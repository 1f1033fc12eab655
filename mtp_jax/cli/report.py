"""`mtp report RUN…`: report.html of one or several runs."""

from absl import flags as absl_flags

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags
from mtp_jax.io import paths


def run(parsed: flags.Parsed) -> int:
  from mtp_jax.report import files

  try:
    for run in parsed.rest:
      paths.absolute(run)  # raises if a path cannot be reached
    lines, values = files.write(parsed.rest)
  except ValueError as error:  # names the run; no flag is to blame
    raise absl_flags.Error(str(error)) from error
  command_lib.print_report(lines, values, parsed.out)
  return 0
