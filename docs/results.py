"""docs/RESULTS.md: what multi-token prediction is for, at the size of a laptop.

  python docs/results.py --data=DIR               goes on where it was stopped
  python docs/results.py --data=DIR star_graph    this result only
  python docs/results.py --write                  the document of what is there

Each result is a store, a flag file of experiments/small and some variants of
it, trained with each seed; a run goes on where it was stopped, and one that is
done is not run again. DIR has books.jsonl.gz and childrens_stories.jsonl.gz,
texts as lines of JSON with a field `text`. Runs go to --runs; what was measured
of them goes to docs/results.jsonl, a line a run, and from there to the
document.
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

ROOT = pathlib.Path(__file__).parents[1]
ROWS = ROOT / 'docs' / 'results.jsonl'
REPORT = ROOT / 'docs' / 'RESULTS.md'
# Raised by hand where the same flags would give other figures (tasks, the split
# of documents, the model, an evaluator): what was measured before is not there.
MEASURED = 1


class Result(NamedTuple):
  """One question.

  columns: (header, source, scalar, format); the source is a suite, 'eval' or
  'bench'. asks: commands after training, without the checkpoint. answer: what
  the figures say, once they are there. figure: of the report of the first
  seed's runs.
  """

  name: str
  title: str
  question: str
  documents: str  # {data}: where the texts are
  variants: dict[str, tuple[str, ...]]
  columns: tuple[tuple[str, str, str, str], ...]
  paper: str
  answer: str = ''
  flags: str = ''  # of experiments/small; empty = the result's name
  tokenizer: str = 'bytes'
  prepare: tuple[str, ...] = ()
  asks: tuple[tuple[str, ...], ...] = ()
  seeds: tuple[int, ...] = (0,)
  figure: str = ''


def _heads(*ns: int) -> dict[str, tuple[str, ...]]:
  return {f'n = {n}': (f'--heads.n={n}',) for n in ns}


STORIES = 'jsonl:{data}/childrens_stories.jsonl.gz#text'
HELD_OUT = (
  ('nats of head 1', 'eval', 'loss_1', '.3f'),
  ('bits a byte', 'eval', 'bits_per_byte', '.3f'),
)
ACCEPTED = (
  ('E[accepted]', 'eval', 'accepted_length', '.2f'),
  ('tokens a pass', 'acceptance', 'tokens_per_forward', '.2f'),
)
ASKED = (
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
  ('tokens a pass', 'bench', 'tokens_per_forward', '.2f'),
  ('a pass takes', 'bench', 'pass_cost', '.2f'),
)
TIMED = (
  (
    'bench',
    'decode',
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
    'Does a model that is taught the next token alone look ahead? Paths in'
    ' a star of two arms of three nodes, 20 labels, edges in random order; 500'
    ' test items. The first step is right by chance in 1 / d = 50%.',
    'task:star_graph/d=2/length=3/nodes=20/items=200000',
    _heads(1, 2, 3),
    (
      ('path right', 'star_graph', 'accuracy', '.1%'),
      ('first step right', 'star_graph', 'first_step', '.1%'),
      ('tokens a pass', 'star_graph', 'tokens_per_forward', '.2f'),
    ),
    'Section 4 has no figure of star graphs; Bachmann & Nagarajan (2024):'
    ' next-token training stays at 1 / d.',
    'n = 2 has learnt it after these 1,000 steps with every seed, n = 3 with'
    ' two of three. So small a graph is no wall for n = 1 either: it leaves'
    ' 1 / d later, and with seed 0 has not stopped rising where training ends.'
    ' (Tried once, no row here: G(2, 4) was not learnt by n = 4 in 4,000'
    ' steps.)',
    prepare=('--data.valid_fraction=0.01',),
    seeds=(0, 1, 2),
    figure='suite-star-graph-accuracy',
  ),
  Result(
    'polynomial',
    'Polynomial arithmetic',
    'Does a longer reach help to learn an algorithm? Expressions over'
    ' F_3[X]/(X^3) of 1 or 2 operations in training, 1 to 3 in the test, 2,000'
    ' items each (500 in the picture), greedy. No item of the test is trained'
    ' on: of the 2,214 of one operation 1,091 are, which makes them 30% of the'
    ' items, and no single negation; of the 1,508 others of the test 455 are'
    ' with the sides of + or * changed. Of the 2,000 of one operation 1,123'
    ' differ, so that their interval is too narrow. Who always says 000 is'
    ' right in 7.0, 8.9, 11.9% by m.',
    'task:polynomial/p=3/n=3/train=2/test=3/items=800000',
    _heads(1, 2, 4),
    (
      ('m = 1', 'polynomial', 'accuracy_1', '.1%'),
      ('m = 2', 'polynomial', 'accuracy_2', '.1%'),
      ('m = 3 (never trained)', 'polynomial', 'accuracy_3', '.1%'),
    ),
    'F_7[X]/(X^5), 1 to 5 operations, 100M parameters, m = 1, 2, 3: n = 1'
    ' 87/65/44, n = 2 93/73/53, n = 4 92/72/52%. Ours is a smaller ring and a'
    ' model of 0.7M parameters.',
    'No gain at this size: the intervals of n = 1, 2 and 4 overlap, with two'
    ' operations and with three, which were never trained on. Of one operation'
    ' each has 99% of the sums, products and compositions right; m = 1 differs'
    ' by the single negations alone (29, 16 and 10% of 492 right), which were'
    ' not trained on.',
    prepare=('--data.valid_fraction=0.002',),
    asks=(('eval', '--eval.tasks=polynomial', '--eval.limit=2000'),),
    figure='suite-polynomial-accuracy-2',
  ),
  *(
    Result(
      f'stories_{size}',
      f'Induction, {size}',
      "Is a made-up name known again? Children's stories; accuracy on the"
      ' second token of each later occurrence of a two-token name, on held-out'
      ' stories.',
      STORIES,
      _heads(1, 2),
      (
        ('second token right', 'induction', 'accuracy', '.1%'),
        ('of a first occurrence', 'induction', 'first_occurrence', '.1%'),
        ('nats of it', 'induction', 'nats', '.2f'),
        ('of a first one', 'induction', 'first_nats', '.2f'),
        *HELD_OUT,
      ),
      'n = 2 far above n = 1 up to 30M parameters beside the embeddings, equal'
      ' at 100M (figure), after 26 billion tokens with a context of 2,048. Ours'
      f' has a vocabulary of 2,048, a context of 256 and {tokens} million'
      ' tokens.',
      'Neither has learnt it: the second token of a name that was read before'
      ' is no more likely than that of a new one, for either n, and both become'
      ' less likely with training. That is far before what the paper trains.',
      tokenizer='train:2048',
      prepare=('--data.valid_fraction=0.2',),
      figure='suite-induction-nats',
    )
    for size, tokens in (('1m', 2.0), ('3m', 4.1))
  ),
  Result(
    'code',
    'Bytes of Python code',
    'What do more heads cost head 1, and what do they give a decoder? The'
    " standard library's files, 700 steps of 1,024 bytes.",
    'python:stdlib',
    _heads(1, 2, 4, 8),
    HELD_OUT + ACCEPTED,
    '7B, 8 heads on bytes of code: 7.04 tokens a pass with 8 heads, 3.84 with'
    ' 4. Below about 1.3B parameters heads hurt head 1.',
    'Head 1 pays for each further head, which at equal parameters takes a layer'
    ' of ten from the trunk; what the heads would give a decoder grows with n.'
    ' As in the paper below 1.3B.',
    prepare=('--data.valid_fraction=0.05',),
    asks=ASKED,
    seeds=(0, 1, 2),
  ),
  Result(
    'decoding',
    'Decoding bytes of Python code',
    'How much faster do its own heads make a model? The runs of the result'
    ' before, all heads over head 1 alone, greedy, one text at a time, 32'
    ' held-out pieces of 128 bytes and 128 new ones. "A pass takes": times a'
    ' pass of head 1 alone.',
    'python:stdlib',
    _heads(2, 4, 8),
    SPED_UP,
    '7B, n = 8 on bytes of code: 6.39 times as fast at 7.04 tokens a pass with'
    ' 8 heads, 3.67 at 3.84 with 4, 1.94 at 1.98 with 2.',
    'Two heads make it 1.36 times as fast, four 1.19 times; eight slow it down.'
    ' A pass with all eight takes 3.9 times one of head 1 alone, since they are'
    ' eight of ten layers of which head 1 needs three, and no more than 2.3 of'
    ' the tokens that it gives stand. The 7B model of the paper has 32 layers,'
    ' and its drafts are better.',
    flags='code',
    prepare=('--data.valid_fraction=0.05',),
    asks=TIMED,
    seeds=(0, 1, 2),
  ),
  Result(
    'families',
    'Head families at equal parameters',
    'Which head? n = 4, bytes of Python code, totals within 1% of parallel.',
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
    '7B, MBPP pass@1, n = 4: parallel 33.8, linear 33.6, causal 31.9, anticausal 30.8, n = 1 30.0.',
    'In nats of head 1 parallel and linear are level, and ahead of causal and'
    ' anticausal, as in the paper, and of residual; sequential and recursive'
    ' are ahead of all, at no greater depth than others (7 and 9 layers to head'
    ' 1; parallel has 7, linear 10). Their drafts know the tokens before them'
    ' (E[accepted] is with the true ones). Tokens a pass, of text that repeats'
    ' itself, have another order.',
    flags='code',
    prepare=('--data.valid_fraction=0.05',),
    asks=ASKED,
    seeds=(0, 1, 2),
  ),
  Result(
    'curriculum',
    'Curricula',
    'Does a small model gain from starting with one head (forward), or from'
    ' ending with one (reverse)? n = 4, bytes of Python code.',
    'python:stdlib',
    {
      'constant': ('--heads.n=4',),
      'forward': ('--loss.curriculum=0:1;175:2;350:3;525:4',),
      'reverse': ('--loss.curriculum=0:4;175:3;350:2;525:1',),
      'n = 1': ('--heads.n=1',),
    },
    HELD_OUT + ACCEPTED,
    'arXiv 2505.22757: forward helps small models and keeps self-speculation;'
    ' reverse helps the next token and loses it.',
    'Reverse leaves a better head 1 than constant n = 4 with every seed, by two'
    ' standard deviations, forward with two of three (-.057, -.065, +.011);'
    ' neither one as good as n = 1. Forward keeps its drafts. Reverse ends with'
    ' one head in use: nothing is drafted, 1.00 by construction.',
    flags='code',
    prepare=('--data.valid_fraction=0.05',),
    asks=ASKED,
    seeds=(0, 1, 2),
  ),
  Result(
    'books',
    'Books',
    'Natural language: n = 1, 2, 4 at equal tokens, bytes of books.',
    'jsonl:{data}/books.jsonl.gz#text',
    _heads(1, 2, 4),
    HELD_OUT + ACCEPTED,
    '7B, 200B tokens: choice tasks n = 2 as n = 1, n = 4 slightly below;'
    ' decoding books with 4 heads 3.09 tokens a pass.',
    'A second head costs head 1 nothing that the seeds could show; four cost it'
    ' something with each (.042, .019, .009 nats).',
    flags='code',
    prepare=('--data.valid_fraction=0.1',),
    asks=ASKED,
    seeds=(0, 1, 2),
  ),
)


def key_of(result: Result, label: str, seed: int) -> tuple[str, int]:
  """What a run is made of: results that share a run have the same."""
  return made_of(result, label), seed


def made_of(result: Result, label: str) -> str:
  """A hash of what a row was measured of: of another, it is not there."""
  return _hash(trained_of(result, label), result.asks)


def trained_of(result: Result, label: str) -> str:
  path = ROOT / 'experiments' / 'small' / f'{result.flags or result.name}.flags'
  return _hash(stored_of(result), result.variants[label], flags_of(path))


def stored_of(result: Result) -> str:
  return _hash(MEASURED, result.documents, result.tokenizer, result.prepare)


def _hash(*said) -> str:
  return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def flags_of(path: pathlib.Path) -> list[str]:
  """A flag file's, those of the files that it includes in their places."""
  found = []
  for line in path.read_text().splitlines():
    if line.startswith('--flagfile='):
      found += flags_of(path.parent / line.partition('=')[2])
    elif line.startswith('--'):
      found.append(line)
  return found


def rows() -> dict[tuple[str, int], dict]:
  """By key; those alone that this program and its flag files would measure."""
  lines = ROWS.read_text().splitlines() if ROWS.exists() else []
  now = {
    key_of(result, label, seed)
    for result in RESULTS
    for label in result.variants
    for seed in result.seeds
  }
  found = {(r['made_of'], r['seed']): r for r in map(json.loads, lines)}
  return {key: row for key, row in found.items() if key in now}


def command(result: Result, label: str, seed: int, store: str, run: str):
  """The arguments of `mtp train`."""
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
  if done.returncode:  # it has said why
    sys.exit(done.returncode)


def _cpu_s() -> float:
  """Of the commands so far."""
  found = resource.getrusage(resource.RUSAGE_CHILDREN)
  return found.ru_utime + found.ru_stime


def measure(result, label, seed, folder: pathlib.Path, data: str) -> dict:
  """Prepares, trains and evaluates what is not there yet; the run's row."""
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
  finally:  # also if it was stopped, to go on later
    if run.is_dir():
      so_far += _cpu_s() - before
      spent.write_text(str(so_far))
  for what, *flags in result.asks:
    _mtp([what, *asked_of(what, str(store), str(run)), f'--out={run}/{what}.json', *flags])
  return dict(
    name=f'{result.name}, {label}',
    made_of=key,
    seed=seed,
    run=run.name,
    cpu_s=so_far,
    values=values(result, run),
  )


def asked_of(what: str, store: str, run: str) -> list[str]:
  if what == 'eval':
    return [run]
  return [run, f'--data.store={store}']


def draw(result: Result, folder: pathlib.Path) -> None:
  """The report's figure, beside the document, once its runs are there."""
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
  """Rows by label, of those that the picture shows."""
  keys = {v: key_of(result, v, result.seeds[0]) for v in result.variants}
  return {label: there[key] for label, key in keys.items() if key in there}


def picture_of(result: Result) -> pathlib.Path:
  return REPORT.parent / f'{result.name}.png'


def values(result: Result, run: pathlib.Path) -> dict[str, float]:
  """The scalars of the columns, with their intervals, of the last step."""
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  of = {}
  for record in map(json.loads, lines):
    of[record.get('source', record['kind'])] = record
  asked = {what for what, *_ in result.asks}
  if 'eval' in asked:
    found = json.loads((run / 'eval.json').read_text())
    of |= found['suites'] | dict(eval=found)
  if 'bench' in asked:
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
  """The mean over seeds and its standard deviation, or one run's interval."""
  _, source, scalar, form = column
  name = f'{source}/{scalar}'
  found = [
    there[key]['values'] for seed in result.seeds if (key := key_of(result, label, seed)) in there
  ]
  got = [v[name] for v in found if v.get(name) is not None]
  if not got:
    return 'open' if not found else '-'
  said = format(statistics.fmean(got), form)
  low, high = (found[0].get(f'{name}_{end}') for end in ('low', 'high'))
  if len(got) > 1:
    said += f' ± {format(statistics.stdev(got), form)}'
  elif low is not None:
    said += f' ({format(low, form)} to {format(high, form)})'
  if len(got) < len(result.seeds):
    said += f' [{len(got)} of {len(result.seeds)}]'
  return said


def section(result: Result, there: dict) -> list[str]:
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
    result.question,
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
    *((result.answer, '') if result.answer else ()),
    f'The paper: {result.paper}',
    '',
    f'Seeds {seeds}; {len(done)} of {len(keys)} runs, {hours:.2f} CPU-hours.',
    '',
    '```',
    prepare,
    'mtp ' + ' '.join(first),
    *(
      ' '.join(['mtp', what, *asked_of(what, 'STORE', 'RUN'), *flags])
      for what, *flags in result.asks
    ),
    '```',
    '',
  ]


HEAD = """\
# Results

Written by `python docs/results.py --data=DIR`, from docs/results.jsonl. Small
models on two CPU cores: they show what the code measures and where an effect is
large enough to be seen at this size; they are no reproduction of the paper.
Below about 1.3B parameters the paper finds that further heads cost head 1
something.

One run: 95% Wilson interval over items where there is one. Several seeds: mean
± standard deviation over them, of the same test items or held-out text, so that
it says nothing about other text. `open`: not run; [1 of 3]: one of three seeds.
A run that several results ask for is run once, and its time said with each.
`decoding` is timed: it is to be run on idle cores.

E[accepted] is the tokens that drafts would give a pass on held-out text. Tokens
a pass are counted while a model goes on from 32 held-out pieces (of as many
files of code, of 9 books) with text of its own, which repeats itself the more
the smaller the model is.

Texts: the standard library of Python 3.11; `books.jsonl.gz` and
`childrens_stories.jsonl.gz`, 90 and 45 public-domain books (41.8 and 15.0 MB,
published before 1929, of the collection classic-books-markdown), a line
`{"text": …}` each.

"""


def write() -> None:
  there = rows()
  hours = sum({r['run']: r['cpu_s'] for r in there.values()}.values()) / 3600
  lines = [line for result in RESULTS for line in section(result, there)]
  n_runs = len({row['run'] for row in there.values()})
  total = f'{n_runs} runs, {hours:.1f} CPU-hours in all.\n\n'
  REPORT.write_text(HEAD + total + '\n'.join(lines))


def main(args: list[str]) -> None:
  parser = argparse.ArgumentParser(
    prog='python docs/results.py',
    description='Trains and measures what is not there yet, and writes docs/RESULTS.md.',
  )
  parser.add_argument(
    'names', nargs='*', help='results; all unless given: ' + ' '.join(r.name for r in RESULTS)
  )
  parser.add_argument('--data', metavar='DIR', help='where the texts are')
  parser.add_argument(
    '--runs',
    metavar='DIR',
    default=str(ROOT / 'runs' / 'results'),
    help='where stores and runs go; runs/results',
  )
  parser.add_argument('--write', action='store_true', help='run nothing, write the document')
  given = parser.parse_args(args)
  unknown = set(given.names) - {result.name for result in RESULTS}
  there = ' '.join(r.name for r in RESULTS)
  if unknown:
    parser.error(f'{" ".join(sorted(unknown))}: results are {there}')
  folder = pathlib.Path(given.runs).resolve()
  asked = [r for r in RESULTS if r.name in (given.names or [r.name])]
  data = pathlib.Path(given.data or '').resolve()
  for result in [] if given.write else asked:
    path = result.documents.partition(':')[2].partition('#')[0]
    if '{data}' in path and not given.data:
      parser.error(f'{result.name} needs --data=DIR: where the texts are')
    if '{data}' in path and not pathlib.Path(path.format(data=data)).exists():
      parser.error(f'--data={given.data}: {result.name} needs {path[7:]} there')
  todo = [
    (result, label, seed)
    for seed in sorted({seed for r in asked for seed in r.seeds})
    for result in asked
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
