"""Measures whether a further head makes the next-token head learn induction, and writes
docs/induction.md.

  python -m tools.induction                     runs what is missing, resumes the rest
  python -m tools.induction --only main         this part only
  python -m tools.induction --jobs=2 --hours=3  two runs at a time, stops after 3 hours
  python -m tools.induction --write             runs nothing, writes the page

A run trains experiments/small/induction.flags with the changes of its variant. An
interrupted run is resumed, a finished one is not repeated. Runs go to --runs; their
curves go to docs/induction.jsonl, one line per run, and from there to the page. Its prose
is in tools/induction.md. --data holds childrens_stories.jsonl.gz, JSON lines with a field
`text`, for the test on real stories.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import math
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import threading
import time
from typing import NamedTuple

from mtp_jax.report import figures
from mtp_jax.train import metrics
from tools import results

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = 'experiments/small/induction.flags'
ROWS = ROOT / 'docs' / 'induction.jsonl'
REPORT = ROOT / 'docs' / 'induction.md'
PROSE = ROOT / 'tools' / 'induction.md'
MEASURED = 1  # raised by hand where the same flags would give other figures
TOKENS = 2048  # per step
STEPS, LONG = 2000, 5000
RATE_STEPS = 1000  # of the choice of the learning rate
RATES = ('1e-3', '2e-3', '4e-3')
RATE_SEED = 100  # of the choice of the learning rate
SEEDS, FEWER = (1, 2, 3, 4, 5), (1, 2, 3)
AT = (1, 2, 4)  # million tokens at which variants are compared
LEARNED = 0.8  # above the accuracy of guessing among the story's second syllables

# Equal parameters: 1,385,856, and 2,432 more or 1,536 fewer.
VARIANTS = {
  'n = 1': ('--heads.n=1',),
  'n = 2': ('--heads.n=2',),
  'n = 4': ('--heads.n=4',),
  'n = 2, sequential': (
    *('--heads.n=2', '--heads.family=sequential', '--model.n_layers=4', '--model.d_ff=432'),
  ),
  'token order prediction': (*('--heads.n=1', '--loss.token_order_weight=1', '--model.d_ff=396'),),
}
BOTH, SEQUENTIAL = ('n = 1', 'n = 2'), 'n = 2, sequential'


class Setting(NamedTuple):
  """What differs from the main experiment."""

  title: str
  task: str = ''  # further parameters of the stories
  flags: tuple[str, ...] = ()
  sequential: tuple[str, ...] = ()  # further flags of n = 2, sequential: equal parameters
  variants: tuple[str, ...] = (*BOTH, SEQUENTIAL)
  seeds: tuple[int, ...] = FEWER
  steps: int = STEPS
  rate: str = ''  # the learning rate; empty: each variant's own


SETTINGS = {
  'main': Setting('1.4M parameters, 5 layers', variants=tuple(VARIANTS), seeds=SEEDS),
  # The choice of n = 1 fell between runs none of which had learned anything by then.
  'rate_2e-3': Setting('1.4M parameters, 5 layers, all at 2e-3', seeds=SEEDS, rate='2e-3'),
  # That of n = 2 is not the best after 2,000 steps.
  'rate_1e-3': Setting(
    '1.4M parameters, 5 layers, both at 1e-3', variants=BOTH, seeds=SEEDS, rate='1e-3'
  ),
  'long': Setting('the same, 5,000 steps', seeds=(1, 2), steps=LONG),
  # The changes, at the rate of n = 1: at 2e-3 n = 2 is not stable in three of them.
  'names': Setting('100 x 100 syllables', task='/firsts=100/seconds=100', rate='1e-3'),
  'characters': Setting('6 characters', task='/characters=6', rate='1e-3'),
  'distance': Setting(
    'occurrences at least 60 tokens apart',
    task='/distance=60/min_sentences=13/max_sentences=16',
    flags=('--data.seq_len=256', '--data.batch_size=8'),
    rate='1e-3',
  ),
  # The fewest that n = 2 can have: one layer of trunk and one below the next token.
  'layers': Setting(
    '3 layers',
    flags=('--model.n_layers=3', '--model.d_ff=864'),
    sequential=('--model.n_layers=2', '--model.d_ff=836'),
    rate='1e-3',
  ),
  'small': Setting(
    '0.4M parameters',
    flags=('--model.d_model=64', '--model.d_ff=256'),
    sequential=('--model.d_ff=248',),
    rate='1e-3',
  ),
  'large': Setting(
    '5M parameters',
    flags=('--model.d_model=256', '--model.d_ff=832'),
    variants=BOTH,  # 16 minutes each
    rate='1e-3',
  ),
}
SETTINGS |= {
  f'{part}_2e-3': SETTINGS[part]._replace(variants=('n = 2',), rate='2e-3')
  for part in ('names', 'characters', 'distance')
}


class Job(NamedTuple):
  """One run."""

  part: str  # 'rate', or of SETTINGS
  variant: str
  seed: int
  rate: str

  @property
  def setting(self) -> Setting:
    if self.part == 'rate':
      return SETTINGS['main']._replace(steps=RATE_STEPS)
    return SETTINGS[self.part]

  @property
  def trained(self) -> tuple[str, ...]:
    """The flags of training, but for the number of steps: more of them continue a run."""
    changes = (*VARIANTS[self.variant], *self.setting.flags)
    if self.variant == SEQUENTIAL:
      changes += self.setting.sequential
    return (*changes, f'--optim.lr={self.rate}', f'--train.seed={self.seed}')

  @property
  def store(self) -> str:
    return f'store_{hashed(self.documents)}'

  @property
  def tokenizer(self) -> str:
    return f'task:stories{self.setting.task}'

  @property
  def documents(self) -> str:
    return f'task:stories{self.setting.task}/items=140000'

  @property
  def folder(self) -> str:
    return f'run_{hashed(self.documents, *_flags(), *self.trained)}'

  @property
  def key(self) -> str:
    return hashed(MEASURED, self.part, self.folder, self.setting.steps)


def _flags() -> list[str]:
  return results.flags_of(ROOT / FLAGS)


def hashed(*parts) -> str:
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def rates_of(rows: dict[str, dict]) -> dict[str, str]:
  """Returns the chosen learning rate of each variant whose rates are measured: the one
  with the lowest loss on second tokens of names at the end."""
  chosen = {}
  for variant in VARIANTS:
    found = {rate: rows.get(Job('rate', variant, RATE_SEED, rate).key) for rate in RATES}
    if all(found.values()):
      chosen[variant] = min(found, key=lambda rate: found[rate]['curve'][-1]['nats'])
  return chosen


def jobs(rows: dict[str, dict]) -> list[Job]:
  """Returns the runs whose learning rate is known, in their order: n = 1 and 2 first."""
  found = [Job('rate', v, RATE_SEED, rate) for rate in RATES for v in VARIANTS]
  chosen = rates_of(rows)
  for variants in (BOTH, VARIANTS.keys() - BOTH):
    for part, setting in SETTINGS.items():
      for seed in setting.seeds:
        now = [v for v in setting.variants if v in variants and v in chosen]
        found += [Job(part, v, seed, setting.rate or chosen[v]) for v in now]
  return found


def rows(path: pathlib.Path = ROWS) -> dict[str, dict]:
  """Returns the rows of a page by key."""
  lines = path.read_text().splitlines() if path.exists() else []
  return {row['key']: row for row in map(json.loads, lines)}


def mtp(cores: list[int], *args: str) -> float:
  """Runs a command on some cores; returns its CPU seconds."""
  command = [sys.executable, '-m', 'mtp_jax', *args]
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, cores)
  )
  _, status, used = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:  # its stderr states why
    raise RuntimeError(f'{" ".join(command)}: status {process.returncode}')
  return used.ru_utime + used.ru_stime


_preparing = threading.Lock()


def measure(job: Job, folder: pathlib.Path, data: pathlib.Path | None, core: int) -> dict:
  """Prepares, trains and evaluates what is missing; returns the run's row."""
  store, run = folder / job.store, folder / job.folder
  with _preparing:
    if not (store / 'manifest.json').exists():
      mtp(
        [core],
        'prepare',
        f'--data.store={store}',
        f'--data.documents={job.documents}',
        f'--data.tokenizer={job.tokenizer}',
        '--data.valid_fraction=0.01',
        '--data.workers=1',
      )
  cpu_s = mtp(
    [core],
    'train',
    f'--flagfile={FLAGS}',
    *job.trained,
    f'--train.steps={job.setting.steps}',
    f'--data.store={store}',
    f'--train.workdir={run}',
  )
  row = dict(
    key=job.key,
    **job._asdict(),
    curve=curve(run, job.setting.steps),
    cpu_s=round(cpu_s, 1),  # of the last sitting, if it was interrupted
  )
  if job.part == 'main' and job.variant != 'n = 1':
    row['tokens_per_forward'] = _evaluated(
      core, run, *('--eval.tasks=acceptance', '--bench.prompt_len=24', '--decode.max_new_tokens=40')
    )['acceptance']['tokens_per_forward']
  if job.part == 'long' and data:
    texts = f'jsonl:{data}/childrens_stories.jsonl.gz#text'
    found = _evaluated(
      core, run, '--eval.tasks=induction', f'--eval.data={texts}', '--eval.limit=200'
    )['induction']
    row['real'] = {name: x for name, x in found.items() if name != 'items'}
  return row


def _evaluated(core: int, run: pathlib.Path, *flags: str) -> dict:
  out = run / 'eval.json'
  mtp([core], 'eval', str(run), f'--out={out}', *flags)
  return json.loads(out.read_text())['suites']


SCALARS = (
  *('accuracy', 'nats', 'accuracy_first', 'nats_first', 'accuracy_decided', 'nats_other'),
  *('accuracy_seen_1', 'accuracy_seen_2', 'accuracy_seen_4'),
)


def curve(run: pathlib.Path, steps: int) -> list[dict]:
  """Returns the evaluations of a run up to a step, one dict each."""
  found = []
  for record in metrics.read(str(run)):
    if record.get('source') == 'stories' and record['step'] <= steps:
      of = {name: round(record[name], 5) for name in SCALARS if record[name] is not None}
      found.append(dict(tokens=record['step'] * TOKENS, **of))
  return found


# Statistics over seeds.

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t, by degrees of freedom


def interval(values: list[float]) -> tuple[float, float, float]:
  """Returns (mean, low, high): the 95% interval of Student's t over seeds."""
  mean = statistics.fmean(values)
  if len(values) < 2:
    return mean, -math.inf, math.inf
  half = T95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
  return mean, mean - half, mean + half


def at(of: list[dict], millions: float, name: str = 'accuracy') -> float:
  """Returns a curve's value at a number of tokens, interpolated."""
  tokens = millions * 1e6
  for a, b in zip(of, of[1:], strict=False):
    if a['tokens'] <= tokens <= b['tokens']:
      part = (tokens - a['tokens']) / (b['tokens'] - a['tokens'])
      return a[name] + part * (b[name] - a[name])
  return of[0][name] if tokens < of[0]['tokens'] else of[-1][name]


def tokens_to(of: list[dict], accuracy: float) -> float | None:
  """Returns the first number of tokens with this accuracy, interpolated from (0, 0);
  None if it is not reached."""
  before = dict(tokens=0, accuracy=0.0)
  for here in of:
    if here['accuracy'] >= accuracy:
      part = (accuracy - before['accuracy']) / (here['accuracy'] - before['accuracy'])
      return before['tokens'] + part * (here['tokens'] - before['tokens'])
    before = here
  return None


class Group(NamedTuple):
  """The runs of one variant of a part, by seed."""

  variant: str
  curves: dict[int, list[dict]]
  rows: list[dict]


def group(part: str, variant: str, there: dict[str, dict]) -> Group:
  rate = SETTINGS[part].rate or rates_of(there).get(variant, '')
  found = {
    seed: there[key]
    for seed in SETTINGS[part].seeds
    if (key := Job(part, variant, seed, rate).key) in there
  }
  return Group(variant, {seed: r['curve'] for seed, r in found.items()}, [*found.values()])


def ratios(a: Group, b: Group, value) -> list[float]:
  """Returns log(value(curve of a) / value(curve of b)) of each common seed."""
  found = []
  for seed in a.curves.keys() & b.curves.keys():
    x, y = value(a.curves[seed]), value(b.curves[seed])
    if x and y:
      found.append(math.log(x / y))
  return found


# The page.


def shown(values: list[float], form: str) -> str:
  if not values:
    return 'open'
  mean, low, high = interval(values)
  if form.endswith('%'):  # Student's t knows no bounds, an accuracy has them
    low, high = max(low, -1.0 if form.startswith('+') else 0.0), min(high, 1.0)
  text = format(mean, form)
  return text if len(values) < 2 else f'{text} ({format(low, form)} to {format(high, form)})'


def _ratio(a: Group, b: Group, value) -> str:
  found = ratios(a, b, value)
  if not found:
    return 'open'
  mean, low, high = (math.exp(x) if abs(x) < 50 else math.inf for x in interval(found))
  return f'{mean:.2f}' if len(found) < 2 else f'{mean:.2f} ({low:.2f} to {high:.2f})'


def _half(of: list[dict]) -> float | None:
  return tokens_to(of, of[-1]['accuracy'] / 2)


AT_EACH = [functools.partial(at, millions=m) for m in AT]
NATS = functools.partial(at, millions=4, name='nats')
ACCURACIES = ' | '.join(f'accuracy at {m}M tokens' for m in AT)


def value_table(there: dict) -> list[str]:
  lines = [
    f'| variant | learning rate | {ACCURACIES} | nats at 4M | tokens to half of its final accuracy'
    f' (millions) | tokens to {LEARNED:.0%} (millions) | seeds that reach it |',
    '|---' * (7 + len(AT)) + '|',
  ]
  for variant in VARIANTS:
    curves = group('main', variant, there).curves.values()
    reached = [tokens / 1e6 for c in curves if (tokens := tokens_to(c, LEARNED))]
    cells = [
      variant,
      rates_of(there).get(variant, 'open'),
      *(shown([value(c) for c in curves], '.1%') for value in AT_EACH),
      shown([NATS(c) for c in curves], '.3f'),
      shown([half / 1e6 for c in curves if (half := _half(c))], '.2f'),
      shown(reached, '.2f') if reached else '-',
      f'{len(reached)} of {len(curves)}',
    ]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return lines


def ratio_table(there: dict) -> list[str]:
  lines = [
    f'| over n = 1, by seed | {ACCURACIES} | nats at 4M | tokens to half of its final accuracy |',
    '|---' * (3 + len(AT)) + '|',
  ]
  one, *others = (group('main', v, there) for v in VARIANTS)
  for of in others:
    cells = [of.variant, *(_ratio(of, one, value) for value in (*AT_EACH, NATS, _half))]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return lines


def place_table(there: dict) -> list[str]:
  lines = [
    '| variant, at 4M tokens | first occurrence | second | third and fourth | fifth and later'
    ' | later ones that the first token decides |',
    '|---' * 6 + '|',
  ]
  for variant in VARIANTS:
    curves = group('main', variant, there).curves.values()
    names = ('first', 'seen_1', 'seen_2', 'seen_4', 'decided')
    cells = [shown([at(c, 4, f'accuracy_{n}') for c in curves], '.1%') for n in names]
    lines.append(f'| {variant} | ' + ' | '.join(cells) + ' |')
  return lines


def difference_table(there: dict) -> list[str]:
  lines = [
    '| | '
    + ' | '.join(f'minus n = 1 at {m}M' for m in AT)
    + ' | accuracy at 4M | n = 1 at 4M | seeds |',
    '|---' * (4 + len(AT)) + '|',
  ]
  for part, setting in SETTINGS.items():
    if part == 'long' or 'n = 1' not in setting.variants:
      continue
    one = group(part, 'n = 1', there)
    for variant in (v for v in setting.variants if v != one.variant):
      other = group(part, variant, there)
      seeds = sorted(one.curves.keys() & other.curves.keys())
      cells = []
      for m in AT:
        ahead = [at(other.curves[s], m) - at(one.curves[s], m) for s in seeds]
        cells.append(shown(ahead, '+.1%'))
      cells += [shown([at(g.curves[s], 4) for s in seeds], '.1%') for g in (other, one)]
      lines.append(f'| {setting.title}: {variant} | ' + ' | '.join(cells) + f' | {len(seeds)} |')
  return lines


def rate_table(there: dict) -> list[str]:
  lines = ['| n = 2, at 4M tokens | rate | accuracy | nats of all other tokens |', '|---' * 4 + '|']
  for part, setting in SETTINGS.items():
    if f'{part}_2e-3' in SETTINGS:
      for other in (part, f'{part}_2e-3'):
        curves = group(other, 'n = 2', there).curves.values()
        cells = [shown([at(c, 4) for c in curves], '.1%')]
        cells.append(shown([at(c, 4, 'nats_other') for c in curves], '.3f'))
        rate = SETTINGS[other].rate
        lines.append(f'| {setting.title} | {rate} | ' + ' | '.join(cells) + ' |')
  return lines


def cost_table(there: dict) -> list[str]:
  lines = ['| variant | nats of all other tokens at 4M | tokens per forward pass |']
  lines.append('|---|---|---|')
  for variant in VARIANTS:
    of = group('main', variant, there)
    other = shown([at(c, 4, 'nats_other') for c in of.curves.values()], '.4f')
    passes = [r['tokens_per_forward'] for r in of.rows if r.get('tokens_per_forward')]
    lines.append(f'| {variant} | {other} | {shown(passes, ".2f") if passes else "-"} |')
  return lines


def long_table(there: dict) -> list[str]:
  lines = [
    '| variant, seed | accuracy at 4M | at 6M | at 10M | real stories, later occurrences'
    ' | real stories, first occurrences |',
    '|---' * 6 + '|',
  ]
  for variant in SETTINGS['long'].variants:
    for row in group('long', variant, there).rows:
      cells = [f'{at(row["curve"], m):.1%}' for m in (4, 6, 10)]
      real = row.get('real', {})
      cells += [
        f'{real[n]:.1%} ({real[f"{n}_low"]:.1%} to {real[f"{n}_high"]:.1%})' if real else 'open'
        for n in ('accuracy', 'first_occurrence')
      ]
      lines.append(f'| {variant}, seed {row["seed"]} | ' + ' | '.join(cells) + ' |')
  return lines


def _band(of: Group) -> figures.Series | None:
  """Returns the mean curve of a variant with the range over its seeds."""
  if not of.curves:
    return None
  points, low, high = [], [], []
  for here in zip(*of.curves.values(), strict=True):
    values = [x['accuracy'] for x in here]
    points.append((here[0]['tokens'] / 1e6, statistics.fmean(values)))
    low.append(min(values))
    high.append(max(values))
  return figures.Series(of.variant, points, [*VARIANTS].index(of.variant), band=(low, high))


def draw(there: dict) -> None:
  """Draws accuracy against tokens, and over that of n = 1 against size."""
  series = [band for v in VARIANTS if (band := _band(group('main', v, there)))]
  if series:
    figure = figures.Lines(
      'induction_accuracy',
      'Second tokens of names, by variant',
      'million tokens',
      'accuracy',
      series,
      (0, 1),
    )
    (REPORT.parent / f'{figure.name}.png').write_bytes(figures.draw(figure)[1])
  by_size = _by_size(there)
  if len(by_size.points) > 1:
    figure = figures.Lines(
      'induction_size',
      'Accuracy at 4M tokens over that of n = 1',
      'million parameters',
      'ratio',
      [by_size],
    )
    (REPORT.parent / f'{figure.name}.png').write_bytes(figures.draw(figure)[1])


def _by_size(there: dict) -> figures.Series:
  """Returns the accuracy of n = 2 over that of n = 1, with its interval, by size."""
  one, two = BOTH
  points, low, high = [], [], []
  value = functools.partial(at, millions=AT[-1])
  for part, millions in (('small', 0.4), ('rate_1e-3', 1.4), ('large', 5.0)):
    found = ratios(group(part, two, there), group(part, one, there), value)
    if len(found) > 1:
      mean, *ends = map(math.exp, interval(found))
      points.append((millions, mean))
      low.append(ends[0])
      high.append(ends[1])
  return figures.Series(two, points, [*VARIANTS].index(two), marker='o', band=(low, high))


CAPTIONS = {
  'induction_accuracy': 'Accuracy on the second tokens of names that occurred before, over the'
  ' tokens of training; mean and range over seeds.',
  'induction_size': 'Accuracy at 4M tokens over that of n = 1, by size of the model; geometric'
  ' mean and 95% interval over seeds, all at 1e-3.',
}


def write() -> None:
  there, texts = rows(), results.prose(PROSE)
  draw(there)
  known = {job.key for job in jobs(there)}
  hours = sum(there[key]['cpu_s'] for key in known & there.keys()) / 3600
  tables = dict(
    main=(value_table, ratio_table, place_table),
    changes=(difference_table, rate_table),
    cost=(cost_table,),
    long=(long_table,),
  )
  lines = [texts['head'], '']
  lines += [f'{len(known & there.keys())} of {n_runs()} runs, {hours:.1f} CPU-hours.', '']
  pictures = dict(main='induction_accuracy', changes='induction_size')
  for name, of in tables.items():
    lines += [texts[f'{name}: question'], '']
    for table in of:
      lines += [*table(there), '']
    lines += [texts[f'{name}: answer'], '']
    picture = REPORT.parent / f'{pictures.get(name)}.png'
    if picture.exists():
      lines += [f'![{CAPTIONS[picture.stem]}]({picture.name})', '', CAPTIONS[picture.stem], '']
  REPORT.write_text('\n'.join(lines).rstrip() + '\n')


def n_runs() -> int:
  settings = sum(len(s.seeds) * len(s.variants) for s in SETTINGS.values())
  return len(RATES) * len(VARIANTS) + settings


def main(args: list[str]) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m tools.induction',
    description='Trains and measures what is missing, and writes docs/induction.md.',
  )
  parser.add_argument('--only', choices=['rate', *SETTINGS], help='a part')
  parser.add_argument('--data', metavar='DIR', help='where childrens_stories.jsonl.gz is')
  parser.add_argument('--runs', metavar='DIR', default=str(ROOT / 'runs' / 'induction'))
  parser.add_argument('--jobs', type=int, default=1, help='runs at a time, a core each; 1')
  parser.add_argument('--hours', type=float, default=math.inf, help='start no run after this')
  parser.add_argument('--write', action='store_true', help='run nothing, write the page')
  given = parser.parse_args(args)
  folder, begin = pathlib.Path(given.runs).resolve(), time.monotonic()
  data = pathlib.Path(given.data).resolve() if given.data else None
  cores: queue.SimpleQueue[int] = queue.SimpleQueue()
  for core in sorted(os.sched_getaffinity(0))[: given.jobs]:
    cores.put(core)
  if given.write:
    return write()
  folder.mkdir(parents=True, exist_ok=True)

  def run(job: Job) -> dict:
    core = cores.get()
    try:
      return measure(job, folder, data, core)
    finally:
      cores.put(core)

  running: dict[concurrent.futures.Future, Job] = {}
  with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
    while True:
      there = rows()
      busy = {job.folder for job in running.values()}
      # `long` goes on with the runs of `main`.
      waiting = [
        job
        for job in jobs(there)
        if job.key not in there
        and job.folder not in busy
        and given.only in (None, job.part)
        and time.monotonic() - begin < 3600 * given.hours
      ]
      while waiting and len(running) < given.jobs:
        job = waiting.pop(0)
        waiting = [other for other in waiting if other.folder != job.folder]
        print(*job, flush=True)
        running[pool.submit(run, job)] = job
      if not running:
        break
      done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
      for future in done:
        job, row = running.pop(future), future.result()
        with open(ROWS, 'a') as file:
          file.write(json.dumps(row) + '\n')
        last = row['curve'][-1]
        print(*job, f'{last["accuracy"]:.1%}, {row["cpu_s"]:.0f} CPU-seconds', flush=True)
  write()


if __name__ == '__main__':
  main(sys.argv[1:])
