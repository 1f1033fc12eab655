"""Measures losses of acceptance, isolated heads and Markov heads, and writes docs/heads.md.

  python -m tools.heads --data=DIR           runs what is missing, resumes the rest
  python -m tools.heads --only frozen        this part only
  python -m tools.heads --write              runs nothing, writes the page

An interrupted run is resumed, a finished one is not repeated. Runs go to --runs; their
figures go to docs/heads.jsonl, one line per run, and from there to the page. Its prose is in
tools/heads.md.
"""

import argparse
import json
import os
import pathlib
import random
import sys
from typing import NamedTuple

from mtp_jax.data import store as store_lib
from mtp_jax.data import tokenizers
from tools import induction, results

ROOT = pathlib.Path(__file__).parents[1]
ROWS = ROOT / 'docs' / 'heads.jsonl'
REPORT = ROOT / 'docs' / 'heads.md'
PROSE = ROOT / 'tools' / 'heads.md'
CODE = 'python:stdlib'
TRUNK, FROZEN = 'experiments/heads/code_trunk.flags', 'experiments/heads/frozen.flags'
PRETRAINING = 'experiments/small/code.flags'
MEASURED = 1  # raised by hand where the same flags would give other figures
SEEDS = (1, 2, 3)
SHORT = '--eval.limit=64 --bench.prompt_len=32 --decode.max_new_tokens=192'
LONG = 'long'  # prompts and texts of docs/results.md
EVALUATIONS = {
  'T0': f'{SHORT} --decode.temperature=0',
  'T1': f'{SHORT} --decode.temperature=1',
  LONG: '--eval.limit=32 --bench.prompt_len=128 --decode.max_new_tokens=128',
}
N_PROMPTS, PROMPT, NEW = 1200, 32, 224  # of the trunk's own text, in bytes
LOSSES = ('ce', 'kl', 'tv', 'lk', 'lk_hybrid', 'e2e_tv')
MARKOV = '--heads.markov_rank=16'


def _loss(name: str) -> str:
  return f'--loss.head_loss={name}'


VARIANTS = {
  'frozen': {
    **{f'sequential, {name}': (_loss(name),) for name in LOSSES},
    'residual, ce': ('--heads.family=residual', _loss('ce')),
    'residual, ce, Markov head': ('--heads.family=residual', _loss('ce'), MARKOV),
    'residual, lk_hybrid, Markov head': ('--heads.family=residual', _loss('lk_hybrid'), MARKOV),
  },
  'books': {f'sequential, {name}': (_loss(name),) for name in ('ce', 'kl', 'lk_hybrid')},
  'pretraining': {
    'parallel': (),
    'parallel, isolated': ('--heads.isolated',),
    'parallel, Markov head': (MARKOV,),
    'parallel, lk_hybrid': (_loss('lk_hybrid'),),
    'parallel, lk_hybrid, Markov head': (_loss('lk_hybrid'), MARKOV),
    'parallel, isolated, Markov head': ('--heads.isolated', MARKOV),
    'parallel, isolated, lk_hybrid, Markov head': ('--heads.isolated', _loss('lk_hybrid'), MARKOV),
    'parallel, Markov head, own text': (MARKOV,),
  },
}
# Of the steps of these, the last fifth trains the further heads alone, on the model's own text.
OWN_TEXT = {'parallel, Markov head, own text': ('--train.freeze=trunk', _loss('kl'))}


class Job(NamedTuple):
  """One run."""

  part: str
  variant: str
  seed: int

  @property
  def flags(self) -> tuple[str, ...]:
    return (*VARIANTS[self.part][self.variant], f'--train.seed={self.seed}')

  @property
  def key(self) -> str:
    files = (PRETRAINING,) if self.part == 'pretraining' else (TRUNK, FROZEN)
    of_files = [results.flags_of(ROOT / name) for name in files]
    more = [OWN_TEXT[self.variant]] if self.variant in OWN_TEXT else []
    more += [self.part] if self.part == 'books' else []
    return induction.hashed(MEASURED, of_files, N_PROMPTS, PROMPT, NEW, self.flags, *more)


def jobs() -> list[Job]:
  return [
    Job(part, variant, seed)
    for seed in SEEDS
    for part, variants in VARIANTS.items()
    for variant in variants
  ]


def _mtp(*args: object) -> float:
  return induction.mtp(sorted(os.sched_getaffinity(0)), *map(str, args))


def _text(folder: pathlib.Path, documents: str) -> pathlib.Path:
  """Returns the store of documents, in a folder of its own."""
  store = folder / ('code' if documents == CODE else 'books')
  if not (store / 'manifest.json').exists():
    of_text = f'--data.documents={documents}', '--data.valid_fraction=0.05'
    _mtp('prepare', f'--data.store={store}', *of_text)
  return store


def _own_text(text_of: pathlib.Path, run: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
  """Returns a store in the folder `to` of what a run generates after bytes of a store."""
  store, prompts, text = (to / name for name in ('own', 'prompts.jsonl', 'own.jsonl'))
  if (store / 'manifest.json').exists():
    return store
  bytes_ = tokenizers.get('bytes')
  found = []
  for tokens in store_lib.open_store(str(text_of), verify=False).split('train').documents():
    for start in range(1, len(tokens) - PROMPT, 64 * PROMPT):
      found.append(bytes_.decode(tokens[start : start + PROMPT].tolist()))
  random.Random(0).shuffle(found)
  lines = [json.dumps(dict(prompt=prompt)) for prompt in found[:N_PROMPTS] if prompt.strip()]
  prompts.write_text('\n'.join(lines) + '\n')
  _mtp(
    *('generate', run, f'--decode.prompts={prompts}', f'--decode.max_new_tokens={NEW}'),
    *('--decode.temperature=1', '--decode.batch_size=100', f'--out={text}'),
  )
  documents = f'--data.documents=jsonl:{text}#prompt+text'
  _mtp('prepare', f'--data.store={store}', documents, '--data.valid_fraction=0.1')
  return store


def _train(flag_file: str, flags: tuple[str, ...], store, run) -> float:
  of_run = f'--data.store={store}', f'--train.workdir={run}'
  return _mtp('train', f'--flagfile={flag_file}', *flags, *of_run)


def measure(job: Job, folder: pathlib.Path, books: str) -> dict:
  """Trains and evaluates what is missing; returns the run's row."""
  run, prompts = folder / f'run_{job.key}', _text(folder, books if job.part == 'books' else CODE)
  if job.part != 'pretraining':
    trunk = folder / ('books_trunk' if job.part == 'books' else 'trunk')
    _train(TRUNK, (), prompts, trunk)
    own = folder / 'own_books' if job.part == 'books' else folder
    own.mkdir(exist_ok=True)
    prompts = _own_text(prompts, trunk, own)
    init = (f'--train.init_from={trunk}',)
    cpu_s = _train(FROZEN, job.flags + init, prompts, run)
  elif job.variant in OWN_TEXT:
    given = [flag.partition('=') for flag in results.flags_of(ROOT / PRETRAINING)]
    steps = int(dict((name, value) for name, _, value in given)['--train.steps'])
    first, last = (f'--train.steps={n}' for n in (steps - steps // 5, steps // 5))
    before = run / 'before'
    cpu_s = _train(PRETRAINING, (*job.flags, first), prompts, before)
    then = (*job.flags, *OWN_TEXT[job.variant], last, f'--train.init_from={before}')
    cpu_s += _train(PRETRAINING, then, _own_text(prompts, before, run), run)
  else:
    cpu_s = _train(PRETRAINING, job.flags, prompts, run)
  row = dict(key=job.key, **job._asdict(), cpu_s=round(cpu_s, 1))
  return row | {name: evaluated(job, name, run, prompts) for name in EVALUATIONS}


def evaluated(job: Job, name: str, run, prompts) -> dict:
  """Returns an evaluation of a run; {} of one that its part does not have."""
  if name == LONG and job.part != 'pretraining':
    return {}
  out = run / f'eval_{name}.json'
  of_all = '--eval.tasks=heldout,acceptance', '--decode.num_draft_tokens=all'
  where = f'--data.store={prompts}', f'--out={out}'
  _mtp('eval', run, *of_all, *EVALUATIONS[name].split(), *where)
  return _of_eval(json.loads(out.read_text()))


def _of_eval(found: dict) -> dict:
  accepted = {k: x for k, x in found['suites']['acceptance'].items() if isinstance(x, float)}
  names = ('loss_1', 'alpha_2', 'alpha_3', 'alpha_4', 'mean_acceptance_length_sampled')
  return accepted | {name: found[name] for name in names}


# The page.


def table(part: str, there: dict[str, dict]) -> list[str]:
  columns = {'T0': 'tokens per forward pass, T = 0', LONG: 'T = 0, longer prompts', 'T1': 'T = 1'}
  if part != 'pretraining':
    del columns[LONG]
  head = ['variant', *columns.values(), 'T = 1 over the first', 'alpha of head 2', 'of head 3']
  head += ['of head 4', 'held-out nats of head 1', 'seeds']
  lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  first = next(iter(VARIANTS[part]))

  def of(variant):
    keys = {seed: Job(part, variant, seed).key for seed in SEEDS}
    return {seed: there[key] for seed, key in keys.items() if key in there}

  def passes(found, name):
    rows = [row[name] for row in found.values() if row.get(name)]
    return [row['tokens_per_forward'] for row in rows]

  base = of(first)
  for variant in VARIANTS[part]:
    found = of(variant)
    of_seeds = [(row['T1'], base[seed]['T1']) for seed, row in found.items() if seed in base]
    ratios = [row['tokens_per_forward'] / b['tokens_per_forward'] for row, b in of_seeds]
    held = [r['T1'] for r in found.values()]
    cells = [induction.shown(passes(found, name), '.2f') for name in columns]
    cells.append('1' if variant == first else induction.shown(ratios, '.3f'))
    cells += [induction.shown([h[f'alpha_{k}'] for h in held], '.1%') for k in (2, 3, 4)]
    cells.append(induction.shown([h['loss_1'] for h in held], '.4f'))
    lines.append(f'| {variant} | ' + ' | '.join(cells) + f' | {len(found)} |')
  return lines


def write() -> None:
  there, texts = induction.rows(ROWS), results.prose(PROSE)
  done = [job for job in jobs() if job.key in there]
  hours = sum(there[job.key]['cpu_s'] for job in done) / 3600
  lines = [texts['head'], '', f'{len(done)} of {len(jobs())} runs, {hours:.1f} CPU-hours.', '']
  for part in VARIANTS:
    lines += [texts[f'{part}: question'], '', *table(part, there), '', texts[f'{part}: answer'], '']
  REPORT.write_text('\n'.join(lines).rstrip() + '\n')


def main(args: list[str]) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m tools.heads',
    description='Trains and measures what is missing, and writes docs/heads.md.',
  )
  parser.add_argument('--only', choices=[*VARIANTS], help='a part')
  parser.add_argument('--data', metavar='DIR', help='has books.jsonl.gz; without it no books')
  parser.add_argument('--runs', metavar='DIR', default=str(ROOT / 'runs' / 'heads'))
  parser.add_argument('--write', action='store_true', help='run nothing, write the page')
  given = parser.parse_args(args)
  folder = pathlib.Path(given.runs).resolve()
  folder.mkdir(parents=True, exist_ok=True)
  for job in jobs():
    if given.write or job.key in induction.rows(ROWS) or given.only not in (None, job.part):
      continue
    if job.part == 'books' and not given.data:
      continue
    print(*job, flush=True)
    row = measure(job, folder, f'jsonl:{given.data}/books.jsonl.gz#text')
    with open(ROWS, 'a') as file:
      file.write(json.dumps(row) + '\n')
    found = {name: row[name].get('tokens_per_forward') for name in EVALUATIONS}
    print(*job, found, f'{row["cpu_s"]:.0f} CPU-seconds', flush=True)
  write()


if __name__ == '__main__':
  main(sys.argv[1:])
