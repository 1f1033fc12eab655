"""`mtp bench`: time and memory of the loss, step, loader or decoding."""

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags
from mtp_jax.config import validate


def run(parsed: flags.Parsed) -> int:
  what = parsed.rest[0]
  if what == 'decode':
    command_lib.start_jax(command_lib.single_process_config(parsed))
    from mtp_jax.bench import decode
    from mtp_jax.decode import load

    opened = load.load(load.find(parsed.rest[1], parsed.given, only_ids=True))
    command_lib.print_report(*decode.measure(opened), parsed.out)
    return 0
  cfg = parsed.config()
  if what == 'data':
    command_lib.require(cfg, 'data.store', 'the store that `mtp prepare` wrote')
  else:
    validate.variants(cfg)
  command_lib.start_jax(cfg)
  from mtp_jax.bench import run as run_lib

  lines, values = run_lib.run(cfg, what)
  command_lib.print_report(lines, values, parsed.out)
  return 0
