"""TODO of mtp_jax.main."""

import importlib
import io
import os
import sys

from absl import flags as absl_flags

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags
from mtp_jax.io import jsonl, paths

COMMANDS = {
  'prepare': command_lib.Command('documents -> token store', ('data', 'out'), 'prepare'),
  'inspect': command_lib.Command(
    'print real batches: tokens, positions, targets, masks, counts',
    ('inspect', 'data', 'heads', 'train', 'out'),
    'inspect',
  ),
  'train': command_lib.Command(
    'train, or go on with, the model of a flag file',
    ('train', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'processes', 'eval'),
    'train',
  ),
  'eval': command_lib.Command(
    'held-out loss, accuracy and acceptance by head; other suites',
    ('eval', 'data', 'decode', 'bench.prompt_len', 'mesh', 'processes', 'out'),
    'eval',
    'CHECKPOINT',
  ),
  'generate': command_lib.Command(
    'text from a checkpoint, several tokens a forward pass',
    ('decode', 'mesh', 'bench', 'prompt', 'prompt_ids', 'out'),
    'generate',
    'CHECKPOINT',
  ),
  'export': command_lib.Command(
    'a checkpoint for other tools: Hugging Face Llama and what it has not',
    ('export', 'data', 'mesh'),
    'export',
    'CHECKPOINT',
  ),
  'import': command_lib.Command(
    "another tool's checkpoint into --train.workdir",
    ('import', 'train.workdir', 'heads.family', 'model.param_dtype', 'model.compute_dtype', 'mesh'),
    'import_',
  ),
  'plan': command_lib.Command(
    'compile the step for a TPU slice, or the devices here: memory, FLOPs,'
    ' traffic, time; exit status 0 fits, 3 does not, 4 not known',
    ('plan', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'train', 'out'),
    'plan',
  ),
  'bench': command_lib.Command(
    'time and memory of the loss, the step, the loader or decoding here',
    ('bench', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'train', 'out'),
    'bench',
    'loss|step|data|decode [CHECKPOINT]',
  ),
  'report': command_lib.Command(
    'RUN [RUN …]: what one or more runs came to, on one page: RUN/report.html', ('out',), 'report'
  ),
}


def _usage() -> str:
  width = max(map(len, COMMANDS))
  return '\n'.join(
    [
      'mtp COMMAND [--flagfile=FILE] [--section.field=VALUE …]',
      '',
      *(f'  {name:{width}}  {c.help}' for name, c in COMMANDS.items()),
      '',
      'mtp COMMAND --help lists the flags that matter there, with defaults.',
    ]
  )


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns the exit status: 0, 2 for bad input, or what the
  command says (README.md lists them)."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # a path may be no UTF-8
      stream.reconfigure(errors='backslashreplace')
  args = sys.argv[1:] if argv is None else list(argv)
  if not args or args[0] in ('-h', '--help', 'help'):
    print(_usage())
    return 0 if args else 2
  name, *args = args
  try:
    if name not in COMMANDS:
      raise absl_flags.Error(f'no command {name!r}; there are {", ".join(COMMANDS)}')
    command = COMMANDS[name]
    if '--help' in args or '-h' in args:
      print(f'mtp {name}: {command.help}\n\n{flags.usage(command.sections)}')
      sys.stdout.flush()
      return 0
    parsed = command_lib.parse_flags(args, name, command.sections)
    command_lib.check_arguments(name, command, parsed.rest)
    status = importlib.import_module(f'mtp_jax.cli.{command.module}').run(parsed)
    sys.stdout.flush()
    return status
  except KeyboardInterrupt:
    print('mtp: interrupted', file=sys.stderr)
    return 130
  except BrokenPipeError:  # `mtp … | head` has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except OSError as error:
    why = paths.disk_error(error)
    if not why and not error.filename:
      raise  # no file is to blame
    why = why or f'{error.filename}: {error.strerror}'
    print(f'mtp: {jsonl.one_line(why)}', file=sys.stderr)
    if error.errno not in paths.DISK_ERRORS:
      return 2
    # Python would try to write it once more at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2
  except (paths.InputError, absl_flags.Error) as error:
    print(f'mtp: {jsonl.one_line(error, 1500)}', file=sys.stderr)
    return 2
