"""`mtp COMMAND`: help, dispatch, exit status. A command's module is imported when it
runs, and jax by that, so that a wrong flag fails at once."""

import importlib
import io
import os
import sys
import textwrap

from absl import flags as absl_flags

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags
from mtp_jax.io import jsonl, paths

COMMANDS = {
  'prepare': command_lib.Command(
    help='tokenize documents into a token store',
    sections=('data', 'out'),
    common='data.documents data.store data.tokenizer data.valid_fraction data.workers'
    ' data.overwrite',
    module='prepare',
  ),
  'inspect': command_lib.Command(
    help='print real batches: tokens, positions, targets, masks, counts',
    sections=('inspect', 'data', 'heads', 'train', 'out'),
    common='data.store inspect.step inspect.rows inspect.tokens heads.n data.seq_len',
    module='inspect',
  ),
  'train': command_lib.Command(
    help='train a model, or resume a run',
    sections=(
      *('train', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'distributed', 'eval'),
    ),
    common='data.store train.workdir train.steps data.batch_size data.seq_len heads.n'
    ' heads.family model.d_model model.n_layers model.vocab_size loss.backward optim.name'
    ' optim.lr optim.warmup_steps mesh.fsdp mesh.tensor train.grad_accum_steps'
    ' train.eval_every train.checkpoint_every train.init_from',
    module='train',
  ),
  'eval': command_lib.Command(
    help='evaluate a checkpoint: validation loss, accuracy and acceptance by head; other tasks',
    sections=('eval', 'data', 'decode', 'bench.prompt_len', 'mesh', 'distributed', 'out'),
    common='eval.tasks eval.limit eval.num_fewshot eval.data eval.samples'
    ' eval.allow_code_execution data.store decode.max_new_tokens out',
    module='eval',
    arguments='CHECKPOINT',
  ),
  'generate': command_lib.Command(
    help='decode text from a checkpoint, several tokens per forward pass',
    sections=('decode', 'mesh', 'bench', 'prompt', 'prompt_ids', 'out'),
    common='prompt decode.prompts decode.max_new_tokens decode.num_draft_tokens'
    ' decode.temperature decode.top_p decode.top_k decode.seed decode.compare out',
    module='generate',
    arguments='CHECKPOINT',
  ),
  'export': command_lib.Command(
    help='write a checkpoint for other programs: Hugging Face, GGUF, vLLM and others',
    sections=('export', 'data', 'mesh'),
    common='export.out export.format export.dtype export.max_shard_gib',
    module='export',
    arguments='CHECKPOINT',
  ),
  'import': command_lib.Command(
    help="read another program's checkpoint into --train.workdir",
    sections=(
      *('import', 'train.workdir', 'heads.family', 'model.param_dtype', 'model.compute_dtype'),
      'mesh',
    ),
    common='import.path train.workdir import.format import.tokenizer heads.family'
    ' model.param_dtype',
    module='import_',
  ),
  'plan': command_lib.Command(
    help='compile the train step for TPUs or NVIDIA GPUs, or the devices here: memory, FLOPs,'
    ' traffic, time; exit status 0 fits, 3 does not fit, 4 unknown',
    sections=('plan', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'train', 'out'),
    common='plan.topology plan.slices plan.sweep plan.search_mesh plan.search_timeout_s mesh.data'
    ' mesh.fsdp mesh.tensor data.batch_size train.grad_accum_steps model.remat loss.backward',
    module='plan',
  ),
  'bench': command_lib.Command(
    help='measure time and memory of the loss, the train step, the data loader or decoding here',
    sections=('bench', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'train', 'out'),
    common='bench.heads bench.backward bench.chunk_size bench.rounds bench.iters'
    ' bench.num_draft_tokens bench.batches bench.num_prompts bench.prompt_len out',
    module='bench',
    arguments='loss|step|data|decode [CHECKPOINT]',
  ),
  'report': command_lib.Command(
    help='write RUN/report.html: what one or several runs recorded, side by side',
    sections=('out',),
    common='out',
    module='report',
    arguments='RUN…',
  ),
}


def _usage() -> str:
  width = max(map(len, COMMANDS))
  lines = ['usage: mtp COMMAND [ARGUMENT] [--flagfile=FILE] [--section.field=VALUE …]', '']
  for name, command in COMMANDS.items():
    first, *rest = textwrap.wrap(command.help, 96 - width)
    lines += [f'  {name:{width}}  {first}', *(' ' * (width + 4) + line for line in rest)]
  return '\n'.join(
    [
      *lines,
      '',
      'mtp COMMAND --help lists the common flags of a command, --helpfull all of them.',
      'Exit status: 0 done, 2 bad input (one line on stderr), 75 saved after a signal: run the'
      ' same command to resume.',
    ]
  )


def _help(name: str, full: bool) -> str:
  command = COMMANDS[name]
  lines = [
    f'usage: mtp {name} {command.arguments}'.rstrip() + ' [--flagfile=FILE] [--FLAG=VALUE …]',
    '',
    *textwrap.wrap(command.help[0].upper() + command.help[1:] + '.', 100),
    '',
  ]
  if full:
    return '\n'.join([*lines, flags.usage(command.sections)])
  lines.append(flags.short_usage(command.common.split()))
  return '\n'.join([*lines, '', f'mtp {name} --helpfull lists all flags.'])


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns the exit status: 0, 2 for bad input, or the command's own
  (docs/operations.md lists them)."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # a path may not be UTF-8
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
    if {'--help', '-h', '--helpfull'} & {*args}:
      print(_help(name, '--helpfull' in args))
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
  except BrokenPipeError:  # `mtp … | head` closed the pipe
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
    # Python would try to flush stdout again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2
  except (paths.InputError, absl_flags.Error) as error:
    print(f'mtp: {jsonl.one_line(error, 1500)}', file=sys.stderr)
    return 2
