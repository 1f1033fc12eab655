"""`star_graph` and `polynomial`: whole answers to test items. Floor 4.

The items are those of data/tasks.py; the task is the one that the run's store
was made of, unless the argument names its parameters: star_graph:d=2/length=5.
Answers are greedy.
"""

import collections
import os

from mtp_jax.config import fields, parse, schema
from mtp_jax.data import store as store_lib
from mtp_jax.data import tasks
from mtp_jax.evals import intervals, suites
from mtp_jax.evals import subject as subject_lib


def check(name: str, arg: str, cfg: schema.Config) -> tasks.Named:
  """The task; ConfigError says what is wrong."""
  text = f'{name}/{arg}' if arg else _of_store(name, cfg)
  try:
    of = tasks.named(text, dict(items=0))
  except ValueError as error:
    entry = f'{name}:{arg}' if arg else name
    raise fields.ConfigError('eval.tasks', entry, str(error)) from error
  of.params.pop('items')
  if cfg.eval.limit > tasks.N_TESTS:
    raise fields.ConfigError(
      'eval.limit',
      cfg.eval.limit,
      f'at most {tasks.N_TESTS} of each level are kept out of training',
    )
  return of


def _of_store(name: str, cfg: schema.Config) -> str:
  """NAME/KEY=VALUE/… of a source of the run's store, or NAME alone."""
  for ref in parse.parse_stores(cfg.data.store):
    if not os.path.isdir(ref.path):
      raise fields.ConfigError(
        'data.store',
        ref.path,
        f'is not there to say which {name} it was made of; give --eval.tasks={name}:KEY=VALUE/…',
      )
    found = store_lib.open_store(ref.path, verify=False)
    for source in found.manifest['sources'].split(','):
      if source.strip().startswith(f'task:{name}'):
        return source.strip().removeprefix('task:')
  return name


def run(name: str, subject: subject_lib.Subject, arg: str) -> suites.Result:
  of = check(name, arg, subject.cfg)
  items = tasks.tests(of, subject.cfg.eval.limit or tasks.N_TESTS)
  longest = max(len(item.answer.encode()) for item in items)
  texts = subject_lib.continuations(
    subject, [item.prompt for item in items], subject_lib.Ask(max_new=longest + 1)
  )
  beyond = subject_lib.beyond(subject, [item.prompt for item in items], longest + 1)
  answers = [text.text for (text,) in texts]
  forwards = sum(text.forwards for (text,) in texts)
  scalars = score(name, items, answers)
  tokens = sum(len(text.ids) for (text,) in texts)
  scalars['tokens_per_forward'] = tokens / max(forwards, 1)
  return suites.Result(
    [str(of), *_table(items, scalars), *beyond],
    scalars,
    [
      dict(level=item.level, prompt=item.prompt, right=item.answer, said=said)
      for item, said in zip(items, answers, strict=True)
    ],
  )


def score(name: str, items, answers: list[str]) -> dict[str, float]:
  """Accuracy, of each level too; of a star graph also whether the first step
  was into the right arm, which takes looking ahead: 1 / d by chance."""
  right, asked = collections.Counter(), collections.Counter()
  first = 0
  for item, said in zip(items, answers, strict=True):
    asked[item.level] += 1
    right[item.level] += said == item.answer
    first += said[:2] == item.answer[:2]
  n = sum(asked.values())
  scalars = intervals.share('accuracy', sum(right.values()), n)
  if name == 'star_graph':
    scalars |= intervals.share('first_step', first, n)
  if len(asked) > 1:
    for level in sorted(asked):
      scalars |= intervals.share(f'accuracy_{level}', right[level], asked[level])
  return scalars


def _table(items, scalars: dict[str, float]) -> list[str]:
  lines = [
    f'{len(items):,} items, right {intervals.shown(scalars, "accuracy")}'
    f', {scalars["tokens_per_forward"]:.2f} tokens a pass'
  ]
  if 'first_step' in scalars:
    lines.append(f'first step right {intervals.shown(scalars, "first_step")}')
  levels = sorted({item.level for item in items})
  if len(levels) > 1:
    lines += [
      f'  {level} operations: {intervals.shown(scalars, f"accuracy_{level}")}' for level in levels
    ]
  return lines
