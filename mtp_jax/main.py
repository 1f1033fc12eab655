"""`mtp COMMAND --flagfile=…`: dispatch only. Floor 6.

jax is imported when a command needs it, so that a wrong flag fails at once.
"""

import collections
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from absl import flags as absl_flags

from mtp_jax import chips, config, flags, jsonl, paths, validate


class Command(NamedTuple):
  """What a command is for, the flags that matter to it, and its function."""

  help: str
  sections: tuple[str, ...]
  run: Callable[[flags.Parsed], int]


def _absolute_stores(cfg: config.Config, flag: str) -> str:
  refs = config.parse_stores(config.get(cfg, flag))
  return config.format_stores(ref._replace(path=paths.absolute(ref.path, flag)) for ref in refs)


def _need(cfg: config.Config, name: str, what: str) -> None:
  if not config.get(cfg, name):
    raise config.ConfigError(name, '', f'give {what}')


def _report(lines: list[str], values: dict, out: str, writes: bool = True) -> None:
  for line in lines:
    print(line, flush=True)
  if out and writes:
    paths.write(out, json.dumps(values, indent=1).encode())


def _start_jax(cfg: config.Config) -> None:
  if not chips.has_tpu():
    chips.answer_libtpu()
  import jax

  if cfg.train.compilation_cache:
    jax.config.update('jax_compilation_cache_dir', os.path.expanduser(cfg.train.compilation_cache))


def _parse(args: list[str], name: str) -> flags.Parsed:
  parsed = flags.parse(args)
  for text in flags.TEXTS:
    given = getattr(parsed, text)
    if given and text not in COMMANDS[name].sections:
      raise config.ConfigError(
        text, given, f'{name} does not use it; mtp {name} --help lists its flags'
      )
  out = paths.absolute(parsed.out, 'out')
  if parsed.out and paths.of(out).is_dir():
    raise config.ConfigError('out', parsed.out, 'is a directory; give a file')
  if paths.scheme(out):
    return parsed
  folder = os.path.dirname(out)
  if not os.path.isdir(folder):  # not after hours of work
    raise config.ConfigError('out', parsed.out, f'there is no {folder}')
  if parsed.out and not os.path.exists(parsed.out):
    try:
      open(parsed.out, 'x').close()
      os.remove(parsed.out)
    except OSError as error:
      raise config.ConfigError('out', parsed.out, f'cannot be written: {error.strerror}') from error
  return parsed


def _no_more(parsed: flags.Parsed) -> None:
  if parsed.rest:
    raise absl_flags.Error(f'{parsed.rest[0]!r} is not a flag')


def _prepare(parsed: flags.Parsed) -> int:
  _no_more(parsed)
  from mtp_jax.data import documents, progress, store, tokenizers, vocabulary

  cfg = parsed.config()
  path, name = cfg.data.store, cfg.data.tokenizer or 'bytes'
  _need(cfg, 'data.store', 'the directory to write')
  if [ref.path for ref in config.parse_stores(path)] != [path]:
    raise config.ConfigError(
      'data.store', path, 'prepare writes one store; no comma, NAME= or :WEIGHT'
    )
  store.check_target(path, cfg.data.overwrite)
  skipped = collections.Counter()

  def found(report):
    skipped.clear()
    return documents.read(
      cfg.data.documents,
      skipped,
      report=report,
      whole=False,
      max_bytes=cfg.data.max_document_mib * 2**20,
    )

  def report(line):
    print(f'mtp: {line}', file=sys.stderr, flush=True)

  if name.startswith('train:'):
    with progress.timed(f'tokenizer {name}'):
      tokenizer = vocabulary.train(name, found(lambda line: None), cfg.data.valid_fraction)
  else:
    tokenizer = tokenizers.get(name)
  shard_bytes = cfg.data.max_shard_gib * 2**30
  with progress.status() as show:
    manifest = store.write(
      path,
      found(report),
      tokenizer,
      valid_fraction=cfg.data.valid_fraction,
      shard_tokens=shard_bytes // store.token_bytes(tokenizer),
      sources=cfg.data.documents,
      progress=show,
      overwrite=cfg.data.overwrite,
      workers=cfg.data.workers or os.cpu_count(),
    )
  left_out = {what: n for what, n in sorted(skipped.items()) if n}
  lines = [f'left out   {n:,} {what}' for what, n in left_out.items()]
  if left_out:
    manifest['skipped'] = left_out
  _report(store.summary(manifest) + lines, manifest, parsed.out)
  return 0


def _train(parsed: flags.Parsed) -> int:
  _no_more(parsed)
  cfg = parsed.config()
  _need(cfg, 'train.workdir', 'the directory of the run')
  _need(cfg, 'data.store', 'the store that `mtp prepare` wrote')
  # A run repeats from any working directory.
  cfg = config.replace(
    cfg,
    **{flag: _absolute_stores(cfg, flag) for flag in ('data.store', 'eval.stores')},
    **{
      flag: paths.absolute(path, flag)
      for flag in ('train.workdir', 'train.init_from')
      if (path := config.get(cfg, flag))
    },
  )
  _start_jax(cfg)
  from mtp_jax import processes
  from mtp_jax.train import loop

  return processes.run(cfg, lambda: loop.train(cfg))


def _eval(parsed: flags.Parsed) -> int:
  _no_more(parsed)
  path = parsed.given.get('eval.checkpoint')
  if not path:
    raise config.ConfigError('eval.checkpoint', '', 'give a workdir')
  # The run's own config is the base of all flags, and is read later.
  cfg = config.replace(config.Config(), **parsed.given)
  validate.validate(config.Config(processes=cfg.processes))
  _start_jax(cfg)
  from mtp_jax import processes, report

  path = paths.absolute(path, 'eval.checkpoint')

  def command():
    for lines, values in report.evaluate(path, parsed):
      _report(lines, values, parsed.out, processes.first())
    return 0

  return processes.run(cfg, command)


def _inspect(parsed: flags.Parsed) -> int:
  _no_more(parsed)
  cfg = parsed.config()
  _need(cfg, 'data.store', 'the store that `mtp prepare` wrote')
  _start_jax(cfg)
  from mtp_jax import report

  lines, values = report.inspect(cfg)
  _report(lines, values, parsed.out)
  return 0


def _plan(parsed: flags.Parsed) -> int:
  _no_more(parsed)
  cfg = parsed.config()
  if cfg.plan.topology:
    # What jaxlib cannot read back is said in the report, not in its own words.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    import jax

    jax.config.update('jax_platforms', 'cpu')  # none of it runs
  elif cfg.plan.slices > 1:
    raise config.ConfigError('plan.slices', cfg.plan.slices, 'needs --plan.topology')
  else:
    _start_jax(cfg)
  from mtp_jax.plan import report

  values, status = report.run(cfg, lambda line: print(line, flush=True))
  _report([], values, parsed.out)
  return status


def _bench(parsed: flags.Parsed) -> int:
  _no_more(parsed)
  if parsed.given.get('bench.what') == 'decode':
    _start_jax(_alone(parsed))
    from mtp_jax import generate

    opened = generate.load(generate.find(parsed, only_ids=True))
    _report(*generate.measure(opened), parsed.out)
    return 0
  cfg = parsed.config()
  if cfg.bench.what == 'data':
    _need(cfg, 'data.store', 'the store that `mtp prepare` wrote')
  else:
    validate.variants(cfg)
  _start_jax(cfg)
  from mtp_jax import bench

  lines, values = bench.run(cfg)
  _report(lines, values, parsed.out)
  return 0


def _alone(parsed: flags.Parsed) -> config.Config:
  """Commands of one process; a bigger machine decodes more rows."""
  cfg = config.replace(config.Config(), **parsed.given)
  if cfg.processes.coordinator:
    raise config.ConfigError(
      'processes.coordinator',
      cfg.processes.coordinator,
      'this command runs in one process, on all of its devices',
    )
  return cfg


def _generate(parsed: flags.Parsed) -> int:
  _no_more(parsed)
  _start_jax(_alone(parsed))
  from mtp_jax import generate

  found = generate.find(parsed, generate.wants_only_ids(parsed))
  d, as_rows = found.cfg.decode, parsed.out.endswith('.jsonl')
  if d.compare and (d.batch_size or as_rows):
    name = 'decode.batch_size' if d.batch_size else 'out'
    raise config.ConfigError(
      name,
      d.batch_size or parsed.out,
      'not with --decode.compare, which decodes all prompts at once and reports figures as .json',
    )
  if parsed.out and d.prompts:
    if os.path.realpath(parsed.out) == os.path.realpath(d.prompts):
      raise config.ConfigError('out', parsed.out, 'is the file of --decode.prompts')
  prompts = generate.read_prompts(parsed, found)
  opened = generate.load(found)
  if d.compare and opened.decoder.widths:
    lines, values = generate.compare(opened, prompts, generate.say)
    _report(lines, values, parsed.out)
    return 0
  if as_rows:
    # Batch by batch: what is interrupted leaves those that are done.
    part = f'{parsed.out}.part'
    with contextlib.closing(paths.growing(part)) as rows:
      values = generate.run(opened, prompts, generate.say, rows)
    paths.of(part).replace(paths.of(parsed.out))
  else:
    values = generate.run(opened, prompts, generate.say)
    _report([], values, parsed.out)
  return 0


def _export(parsed: flags.Parsed) -> int:
  _no_more(parsed)
  _start_jax(_alone(parsed))
  from mtp_jax import transfer

  _report(transfer.export(parsed), {}, '')
  return 0


def _import(parsed: flags.Parsed) -> int:
  _no_more(parsed)
  _start_jax(_alone(parsed))
  from mtp_jax import transfer

  _report(transfer.import_(parsed), {}, '')
  return 0


def _report_runs(parsed: flags.Parsed) -> int:
  if not parsed.rest:
    raise absl_flags.Error('report needs the workdir of a run, or several')
  from mtp_jax.run_report import files

  try:
    for run in parsed.rest:
      paths.absolute(run, 'report')  # says what is not there to reach it
    lines, values = files.write(parsed.rest)
  except ValueError as error:  # names the run; no flag is to blame
    raise absl_flags.Error(str(error)) from error
  _report(lines, values, parsed.out)
  return 0


COMMANDS = {
  'prepare': Command('documents -> token store', ('data', 'out'), _prepare),
  'inspect': Command(
    'print real batches: tokens, positions, targets, masks, counts',
    ('inspect', 'data', 'heads', 'train', 'out'),
    _inspect,
  ),
  'train': Command(
    'train, or go on with, the model of a flag file',
    ('train', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'processes', 'eval'),
    _train,
  ),
  'eval': Command(
    'held-out loss, accuracy and acceptance by head; other suites',
    ('eval', 'data', 'decode', 'bench.prompt', 'mesh', 'processes', 'out'),
    _eval,
  ),
  'generate': Command(
    'text from a checkpoint, several tokens a forward pass',
    ('decode', 'mesh', 'bench', 'prompt', 'prompt_ids', 'out'),
    _generate,
  ),
  'export': Command(
    'a checkpoint for other tools: Hugging Face Llama and what it has not',
    ('export', 'data', 'mesh'),
    _export,
  ),
  'import': Command(
    "another tool's checkpoint into --train.workdir",
    ('import', 'train.workdir', 'heads.family', 'model.param_dtype', 'model.compute_dtype', 'mesh'),
    _import,
  ),
  'plan': Command(
    'compile the step for a TPU slice, or the devices here: memory, FLOPs,'
    ' traffic, time; exit status 0 fits, 3 does not, 4 not known',
    ('plan', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'train', 'out'),
    _plan,
  ),
  'bench': Command(
    'time and memory of the loss, the step, the loader or decoding here',
    ('bench', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'train', 'out'),
    _bench,
  ),
  'report': Command(
    'RUN [RUN …]: what one or more runs came to, on one page: RUN/report.html',
    ('out',),
    _report_runs,
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
    status = command.run(_parse(args, name))
    sys.stdout.flush()
    return status
  except KeyboardInterrupt:
    print('mtp: interrupted', file=sys.stderr)
    return 130
  except BrokenPipeError:  # `mtp … | head` has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except OSError as error:
    why = paths.of_a_disk(error)
    if not why and not error.filename:
      raise  # no file is to blame
    why = why or f'{error.filename}: {error.strerror}'
    print(f'mtp: {jsonl.one_line(why)}', file=sys.stderr)
    if error.errno not in paths.OF_A_DISK:
      return 2
    # Python would try to write it once more at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2
  except (config.ConfigError, absl_flags.Error) as error:
    print(f'mtp: {jsonl.one_line(error, 1500)}', file=sys.stderr)
    return 2
