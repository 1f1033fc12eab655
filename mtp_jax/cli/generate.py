"""`mtp generate CHECKPOINT`: prompts in, text out."""

import contextlib
import os

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags
from mtp_jax.config import fields
from mtp_jax.io import paths


def run(parsed: flags.Parsed) -> int:
  command_lib.start_jax(command_lib.single_process_config(parsed))
  from mtp_jax.cli import prompts as prompts_lib
  from mtp_jax.cli import streaming
  from mtp_jax.decode import load

  found = load.find(parsed.rest[0], parsed.given, only_ids=parsed.prompt_ids is not None)
  d, as_rows = found.cfg.decode, parsed.out.endswith('.jsonl')
  if d.compare and (d.batch_size or as_rows):
    name = 'decode.batch_size' if d.batch_size else 'out'
    raise fields.ConfigError(
      name,
      d.batch_size or parsed.out,
      'not with --decode.compare, which decodes all prompts at once and reports figures as .json',
    )
  if parsed.out and d.prompts:
    if os.path.realpath(parsed.out) == os.path.realpath(d.prompts):
      raise fields.ConfigError('out', parsed.out, 'is the file of --decode.prompts')
  prompts = prompts_lib.read_prompts(parsed, found)
  opened = load.load(found)
  streaming.warn_of_length(prompts, opened.cfg)
  if d.compare and opened.decoder.widths:
    from mtp_jax.bench import decode

    drafted, lines, values = decode.compare(opened, [p.ids for p in prompts])
    streaming.print_rows(opened, prompts, drafted)
    command_lib.print_report(lines, values, parsed.out)
    return 0
  if as_rows:
    # Written batch by batch: an interruption leaves the finished ones.
    part = f'{parsed.out}.part'
    with contextlib.closing(paths.open_append(part)) as rows:
      values = streaming.decode_prompts(opened, prompts, streaming.write_stdout, rows)
    paths.as_path(part).replace(paths.as_path(parsed.out))
  else:
    values = streaming.decode_prompts(opened, prompts, streaming.write_stdout)
    command_lib.print_report([], values, parsed.out)
  return 0
