"""Writes docs/results.md: evidence for multi-token prediction, at laptop size.

  python tools/results.py --data=DIR               runs what is missing, resumes the rest
  python tools/results.py --data=DIR star_graph    this result only
  python tools/results.py --write                  runs nothing, writes the page

Each result is a store, a flag file of experiments/small and some variants of it,
trained with each seed. An interrupted run is resumed, a finished one is not repeated.
DIR holds books.jsonl.gz and childrens_stories.jsonl.gz, JSON lines with a field
`text`. Runs go to --runs; their figures go to docs/results.jsonl, one line per run, and
from there to the page. Its prose is in tools/results.md.
"""

import argparse
import hashlib
import json
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

from mtp_jax.config import renamed
from mtp_jax.train import metrics

ROOT = pathlib.Path(__file__).parents[1]
ROWS = ROOT / 'docs' / 'results.jsonl'
REPORT = ROOT / 'docs' / 'results.md'
PROSE = ROOT / 'tools' / 'results.md'
# To be raised by hand where the same flags would give other figures (tasks, the split
# of documents, the model, an evaluator): rows of a lower number do not count.
MEASURED = 1
# A renamed flag invalidates no row: keys are made of the names of the first rows.
FORMER = {new: old for old, new in renamed.RENAMED.items()}
FORMER_VALUES = {
  (new, value): old
  for (name, old), value in renamed.VALUES.items()
  if (new := renamed.RENAMED[name])
}


class Result(NamedTuple):
  """One question; its prose is that of its name in tools/results.md.

  columns: (header, source, scalar, format); the source is a suite, 'eval' or 'bench'.
  commands: run after training, without the checkpoint. figure: of the report of the first
  seed's runs.
  """

  name: str
  title: str
  documents: str  # {data}: where the texts are
  variants: dict[str, tuple[str, ...]]
  columns: tuple[tuple[str, str, str, str], ...]
  flags: str = ''  # of experiments/small; empty = the result's name
  tokenizer: str = 'bytes'
  prepare: tuple[str, ...] = ()
  commands: tuple[tuple[str, ...], ...] = ()
  seeds: tuple[int, ...] = (0,)
  figure: str = ''


def _heads(*ns: int) -> dict[str, tuple[str, ...]]:
  return {f'n = {n}': (f'--heads.n={n}',) for n in ns}


STORIES = 'jsonl:{data}/childrens_stories.jsonl.gz#text'
HELD_OUT = (
  ('nats of head 1', 'eval', 'loss_1', '.3f'),
  ('bits per byte', 'eval', 'bits_per_byte', '.3f'),
)
ACCEPTED = (
  ('E[accepted]', 'eval', 'mean_acceptance_length', '.2f'),
  ('tokens per forward pass', 'acceptance', 'tokens_per_forward', '.2f'),
)
EVALUATED = (
  (
    'eval',
    '--eval.tasks=heldout,acceptance',
    '--eval.batches=100',
    '--bench.prompt_len=128',
    '--decode.max_new_tokens=128',
  ),
)
SPED_UP = (
  ('speed-up', 'bench', 'speed_up', '.2f'),
  ('tokens per forward pass', 'bench', 'tokens_per_forward', '.2f'),
  ('relative cost', 'bench', 'pass_cost', '.2f'),
)
TIMED = (
  (
    'bench',
    '--bench.batches=1',
    '--bench.prompt_len=128',
    '--decode.max_new_tokens=128',
    '--bench.num_prompts=32',
    '--bench.rounds=3',
  ),
)
RESULTS = (
  Result(
    'star_graph',
    'Star graphs',
    'task:star_graph/d=2/length=3/nodes=20/items=200000',
    _heads(1, 2, 3),
    (
      ('path right', 'star_graph', 'accuracy', '.1%'),
      ('first step right', 'star_graph', 'first_step', '.1%'),
      ('tokens per forward pass', 'star_graph', 'tokens_per_forward', '.2f'),
    ),
    prepare=('--data.valid_fraction=0.01',),
    seeds=(0, 1, 2),
    figure='suite-star-graph-accuracy',
  ),
  Result(
    'polynomial',
    'Polynomial arithmetic',
    'task:polynomial/p=3/n=3/train=2/test=3/items=800000',
    _heads(1, 2, 4),
    (
      ('m = 1', 'polynomial', 'accuracy_1', '.1%'),
      ('m = 2', 'polynomial', 'accuracy_2', '.1%'),
      ('m = 3 (never trained)', 'polynomial', 'accuracy_3', '.1%'),
    ),
    prepare=('--data.valid_fraction=0.002',),
    commands=(('eval', '--eval.tasks=polynomial', '--eval.limit=2000'),),
    figure='suite-polynomial-accuracy-2',
  ),
  *(
    Result(
      f'stories_{size}',
      f'Induction, {size}',
      STORIES,
      _heads(1, 2),
      (
        ('accuracy, later occurrence', 'induction', 'accuracy', '.1%'),
        ('accuracy, first occurrence', 'induction', 'first_occurrence', '.1%'),
        ('nats, later occurrence', 'induction', 'nats', '.2f'),
        ('nats, first occurrence', 'induction', 'first_nats', '.2f'),
        *HELD_OUT,
      ),
      tokenizer='train:2048',
      prepare=('--data.valid_fraction=0.2',),
      figure='suite-induction-nats',
    )
    for size in ('1m', '3m')
  ),
  Result(
    'code',
    'Bytes of Python code',
    'python:stdlib',
    _heads(1, 2, 4, 8),
    HELD_OUT + ACCEPTED,
    prepare=('--data.valid_fraction=0.05',),
    commands=EVALUATED,
    seeds=(0, 1, 2),
  ),
  Result(
    'decoding',
    'Decoding bytes of Python code',
    'python:stdlib',
    _heads(2, 4, 8),
    SPED_UP,
    flags='code',
    prepare=('--data.valid_fraction=0.05',),
    commands=TIMED,
    seeds=(0, 1, 2),
  ),
  Result(
    'families',
    'Head families at equal parameters',
    'python:stdlib',
    {
      'parallel': ('--heads.n=4',),
      'causal': ('--heads.family=causal',),
      'anticausal': ('--heads.family=anticausal',),
      'linear': ('--heads.family=linear', '--model.d_ff=248'),
      'residual': ('--heads.family=residual', '--model.d_ff=248'),
      'sequential': ('--heads.family=sequential', '--model.n_layers=7', '--model.d_ff=240'),
      'recursive': ('--heads.family=recursive', '--model.n_layers=9', '--model.d_ff=248'),
    },
    HELD_OUT + ACCEPTED,
    flags='code',
    prepare=('--data.valid_fraction=0.05',),
    commands=EVALUATED,
    seeds=(0, 1, 2),
  ),
  Result(
    'curriculum',
    'Curricula',
    'python:stdlib',
    {
      'constant': ('--heads.n=4',),
      'forward': ('--loss.curriculum=0:1;175:2;350:3;525:4',),
      'reverse': ('--loss.curriculum=0:4;175:3;350:2;525:1',),
      'n = 1': ('--heads.n=1',),
    },
    HELD_OUT + ACCEPTED,
    flags='code',
    prepare=('--data.valid_fraction=0.05',),
    commands=EVALUATED,
    seeds=(0, 1, 2),
  ),
  Result(
    'books',
    'Books',
    'jsonl:{data}/books.jsonl.gz#text',
    _heads(1, 2, 4),
    HELD_OUT + ACCEPTED,
    flags='code',
    prepare=('--data.valid_fraction=0.1',),
    commands=EVALUATED,
    seeds=(0, 1, 2),
  ),
)


def prose(path: pathlib.Path = PROSE) -> dict[str, str]:
  """Returns the sections of a page's prose: 'head', and 'NAME: part' of each result."""
  found, name = {}, ''
  for line in path.read_text().splitlines():
    if line.startswith('<!-- ') and line.endswith(' -->'):
      name = line[5:-4]
      found[name] = ''
    elif name:
      found[name] += line + '\n'
  return {name: text.strip() for name, text in found.items()}


def key_of(result: Result, label: str, seed: int) -> tuple[str, int]:
  """Returns the key of a run; results that share a run have the same."""
  return made_of(result, label), seed


def made_of(result: Result, label: str) -> str:
  """Returns a hash of what determines a row; a row with another hash is ignored."""
  commands = [
    [what, *(['--bench.what=decode'] if what == 'bench' else []), *map(_former, flags)]
    for what, *flags in result.commands
  ]
  return _hash(trained_of(result, label), commands)


def trained_of(result: Result, label: str) -> str:
  path = ROOT / 'experiments' / 'small' / f'{result.flags or result.name}.flags'
  flags = [list(map(_former, given)) for given in (result.variants[label], flags_of(path))]
  return _hash(stored_of(result), *flags)


def stored_of(result: Result) -> str:
  return _hash(MEASURED, result.documents, result.tokenizer, list(map(_former, result.prepare)))


def _former(flag: str) -> str:
  """Returns a flag by the name that it had when the first rows were measured."""
  name, equals, value = flag[2:].partition('=')
  return f'--{FORMER.get(name, name)}{equals}{FORMER_VALUES.get((name, value), value)}'


def _hash(*parts) -> str:
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def flags_of(path: pathlib.Path) -> list[str]:
  """Returns the flags of a file, those of included files in their places."""
  found = []
  for line in path.read_text().splitlines():
    if line.startswith('--flagfile='):
      found += flags_of(path.parent / line.partition('=')[2])
    elif line.startswith('--'):
      found.append(line)
  return found


def rows() -> dict[tuple[str, int], dict]:
  """Returns the rows by key, except those that other flags or code measured."""
  lines = ROWS.read_text().splitlines() if ROWS.exists() else []
  now = {
    key_of(result, label, seed)
    for result in RESULTS
    for label in result.variants
    for seed in result.seeds
  }
  found = {(r['made_of'], r['seed']): _of_today(r) for r in map(json.loads, lines)}
  return {key: row for key, row in found.items() if key in now}


def _of_today(row: dict) -> dict:
  """Returns a stored row under today's metrics keys."""

  def today(name):
    source, _, scalar = name.partition('/')
    return f'{source}/{metrics.RENAMED.get(scalar, scalar)}'

  return row | dict(values={today(name): value for name, value in row['values'].items()})


def command(result: Result, label: str, seed: int, store: str, run: str):
  """Returns the arguments of `mtp train`."""
  flags = result.flags or result.name
  return [
    'train',
    f'--flagfile=experiments/small/{flags}.flags',
    *result.variants[label],
    f'--data.store={store}',
    f'--train.workdir={run}',
    f'--train.seed={seed}',
  ]


def _mtp(args: list[str]) -> None:
  done = subprocess.run([sys.executable, '-m', 'mtp_jax', *args], cwd=ROOT)
  if done.returncode:  # its stderr states why
    sys.exit(done.returncode)


def _cpu_s() -> float:
  """Returns the CPU seconds of the commands so far."""
  found = resource.getrusage(resource.RUSAGE_CHILDREN)
  return found.ru_utime + found.ru_stime


def measure(result, label, seed, folder: pathlib.Path, data: str) -> dict:
  """Prepares, trains and evaluates what is missing; returns the run's row."""
  source = result.documents.format(data=data)
  store = folder / f'store_{stored_of(result)}'
  if not (store / 'manifest.json').exists():
    _mtp(
      [
        'prepare',
        f'--data.store={store}',
        f'--data.documents={source}',
        f'--data.tokenizer={result.tokenizer}',
        *result.prepare,
      ]
    )
  key = made_of(result, label)  # before a flag file is edited meanwhile
  run = folder / f'{trained_of(result, label)}_{seed}'
  spent = run / 'cpu_s.txt'
  so_far = float(spent.read_text()) if spent.exists() else 0.0
  before = _cpu_s()
  try:
    _mtp(command(result, label, seed, str(store), str(run)))
  finally:  # also if it was stopped, to be resumed later
    if run.is_dir():
      so_far += _cpu_s() - before
      spent.write_text(str(so_far))
  for what, *flags in result.commands:
    _mtp([what, *arguments_of(what, str(store), str(run)), f'--out={run}/{what}.json', *flags])
  return dict(
    name=f'{result.name}, {label}',
    made_of=key,
    seed=seed,
    run=run.name,
    cpu_s=so_far,
    values=values(result, run),
  )


def arguments_of(what: str, store: str, run: str) -> list[str]:
  if what == 'eval':
    return [run]
  return ['decode', run, f'--data.store={store}']


def draw(result: Result, folder: pathlib.Path) -> None:
  """Copies the report's figure beside the page, once its runs are there."""
  picture_of(result).unlink(missing_ok=True)  # of other rows
  found = {label: folder / row['run'] for label, row in of_first_seed(result, rows()).items()}
  here = all(run.is_dir() for run in found.values())
  if not result.figure or not here or found.keys() != result.variants.keys():
    return
  with tempfile.TemporaryDirectory() as named:
    runs = [pathlib.Path(named, label.replace(' ', '')) for label in found]
    for named_so, run in zip(runs, found.values(), strict=True):
      named_so.symlink_to(run)
    _mtp(['report', *map(str, runs)])
    shutil.copy(runs[0] / 'report' / f'{result.figure}.png', picture_of(result))


def of_first_seed(result: Result, there: dict) -> dict[str, dict]:
  """Returns the rows that the figure shows, by label."""
  keys = {v: key_of(result, v, result.seeds[0]) for v in result.variants}
  return {label: there[key] for label, key in keys.items() if key in there}


def picture_of(result: Result) -> pathlib.Path:
  return REPORT.parent / f'{result.name}.png'


def values(result: Result, run: pathlib.Path) -> dict[str, float]:
  """Returns the scalars of the columns, with their intervals, at the last step."""
  of = {}
  for record in metrics.read(str(run)):
    of[record.get('source', record['kind'])] = record
  commands = {what for what, *_ in result.commands}
  if 'eval' in commands:
    found = json.loads((run / 'eval.json').read_text())
    of |= found['suites'] | dict(eval=found)
  if 'bench' in commands:
    *_, most = json.loads((run / 'bench.json').read_text())['rows']
    speed_up = most['speed_up']['median']
    of['bench'] = most | dict(speed_up=speed_up, pass_cost=most['tokens_per_forward'] / speed_up)
  found = {}
  for _, source, scalar, _ in result.columns:
    for name in (scalar, f'{scalar}_low', f'{scalar}_high'):
      if name in of.get(source, {}):
        found[f'{source}/{name}'] = of[source][name]
  return found


def cell(result: Result, label: str, column, there: dict) -> str:
  """Returns the mean over seeds and its standard deviation, or one run's interval."""
  _, source, scalar, form = column
  name = f'{source}/{scalar}'
  found = [
    there[key]['values'] for seed in result.seeds if (key := key_of(result, label, seed)) in there
  ]
  got = [v[name] for v in found if v.get(name) is not None]
  if not got:
    return 'open' if not found else '-'
  text = format(statistics.fmean(got), form)
  low, high = (found[0].get(f'{name}_{end}') for end in ('low', 'high'))
  if len(got) > 1:
    text += f' ± {format(statistics.stdev(got), form)}'
  elif low is not None:
    text += f' ({format(low, form)} to {format(high, form)})'
  if len(got) < len(result.seeds):
    text += f' [{len(got)} of {len(result.seeds)}]'
  return text


def section(result: Result, there: dict, texts: dict[str, str]) -> list[str]:
  keys = [key_of(result, label, seed) for label in result.variants for seed in result.seeds]
  done = [there[key] for key in keys if key in there]
  hours = sum(row['cpu_s'] for row in done) / 3600
  first = command(result, next(iter(result.variants)), 0, 'STORE', 'RUN')
  prepare = ' '.join(
    [
      'mtp prepare --data.store=STORE',
      f'--data.documents={result.documents.format(data="DIR")}',
      f'--data.tokenizer={result.tokenizer}',
      *result.prepare,
    ]
  )
  lines = [
    f'## {result.title}',
    '',
    texts[f'{result.name}: question'],
    '',
    '| | ' + ' | '.join(column[0] for column in result.columns) + ' |',
    '|---' * (1 + len(result.columns)) + '|',
  ]
  for label, flags in result.variants.items():
    cells = [cell(result, label, c, there) for c in result.columns]
    alone = len(flags) == 1 and flags[0].endswith(f'={label}')
    shown = f' `{" ".join(flags)}`' if flags and not alone else ''
    lines.append(f'| {label}{shown} | ' + ' | '.join(cells) + ' |')
  drawn = of_first_seed(result, there).keys() == result.variants.keys()
  if drawn and picture_of(result).exists():
    shown = f'![{result.title}, {result.figure}]({picture_of(result).name})'
    lines += ['', shown, '', f'Seed {result.seeds[0]}, over training.']
  seeds = ', '.join(map(str, result.seeds))
  return [
    *lines,
    '',
    texts[f'{result.name}: answer'],
    '',
    f'The paper: {texts[f"{result.name}: paper"]}',
    '',
    f'Seeds {seeds}; {len(done)} of {len(keys)} runs, {hours:.2f} CPU-hours.',
    '',
    '```',
    prepare,
    'mtp ' + ' '.join(first),
    *(
      ' '.join(['mtp', what, *arguments_of(what, 'STORE', 'RUN'), *flags])
      for what, *flags in result.commands
    ),
    '```',
    '',
  ]


def write() -> None:
  there = rows()
  hours = sum({r['run']: r['cpu_s'] for r in there.values()}.values()) / 3600
  texts = prose()
  lines = [line for result in RESULTS for line in section(result, there, texts)]
  n_runs = len({row['run'] for row in there.values()})
  total = f'{n_runs} runs, {hours:.1f} CPU-hours in all.'
  REPORT.write_text('\n'.join([texts['head'], '', total, '', *lines]))


def main(args: list[str]) -> None:
  parser = argparse.ArgumentParser(
    prog='python tools/results.py',
    description='Trains and measures what is missing, and writes docs/results.md.',
  )
  parser.add_argument(
    'names', nargs='*', help='results; all unless given: ' + ' '.join(r.name for r in RESULTS)
  )
  parser.add_argument('--data', metavar='DIR', help='where the texts are')
  parser.add_argument(
    '--runs',
    metavar='DIR',
    default=str(ROOT / 'runs' / 'results'),
    help='directory of stores and runs; runs/results',
  )
  parser.add_argument('--write', action='store_true', help='run nothing, write the page')
  given = parser.parse_args(args)
  unknown = set(given.names) - {result.name for result in RESULTS}
  there = ' '.join(r.name for r in RESULTS)
  if unknown:
    parser.error(f'{" ".join(sorted(unknown))}: results are {there}')
  folder = pathlib.Path(given.runs).resolve()
  chosen = [r for r in RESULTS if r.name in (given.names or [r.name])]
  data = pathlib.Path(given.data or '').resolve()
  for result in [] if given.write else chosen:
    path = result.documents.partition(':')[2].partition('#')[0]
    if '{data}' in path and not given.data:
      parser.error(f'{result.name} needs --data=DIR: where the texts are')
    if '{data}' in path and not pathlib.Path(path.format(data=data)).exists():
      parser.error(f'--data={given.data}: {result.name} needs {path[7:]} there')
  todo = [
    (result, label, seed)
    for seed in sorted({seed for r in chosen for seed in r.seeds})
    for result in chosen
    if seed in result.seeds
    for label in result.variants
  ]
  for result, label, seed in [] if given.write else todo:
    if key_of(result, label, seed) in rows():
      continue
    folder.mkdir(parents=True, exist_ok=True)
    row = measure(result, label, seed, folder, str(data))
    with open(ROWS, 'a') as f:
      f.write(json.dumps(row) + '\n')
    if seed == result.seeds[0]:
      draw(result, folder)
    write()
  write()


if __name__ == '__main__':
  main(sys.argv[1:])
