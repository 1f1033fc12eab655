"""`star_graph` and `polynomial`: exact match on the test items of synthetic tasks.

The items are those of data/tasks.py. The task is that of the run's store, unless
the argument sets its parameters: star_graph:d=2/length=5. Answers are greedy.
"""

import collections
import os

from mtp_jax.config import fields, parse, schema
from mtp_jax.data import store as store_lib
from mtp_jax.data import tasks
from mtp_jax.evals import intervals, suites
from mtp_jax.evals import subject as subject_lib


def check(name: str, arg: str, cfg: schema.CommandConfig) -> tasks.Named:
  """Returns the task; raises ConfigError."""
  text = f'{name}/{arg}' if arg else _of_store(name, cfg)
  try:
    task = tasks.named(text, dict(items=0))
  except ValueError as error:
    entry = f'{name}:{arg}' if arg else name
    raise fields.ConfigError('eval.tasks', entry, str(error)) from error
  task.params.pop('items')
  if cfg.eval.limit > tasks.N_TESTS:
    raise fields.ConfigError(
      'eval.limit', cfg.eval.limit, f'at most {tasks.N_TESTS} per level are excluded from training'
    )
  return task


def _of_store(name: str, cfg: schema.CommandConfig) -> str:
  """Returns NAME/KEY=VALUE/… from the sources of the run's store, or NAME."""
  for ref in parse.parse_stores(cfg.data.store):
    if not os.path.isdir(ref.path):
      raise fields.ConfigError(
        'data.store',
        ref.path,
        f'not found, so that its {name} is unknown; set --eval.tasks={name}:KEY=VALUE/…',
      )
    found = store_lib.open_store(ref.path, verify=False)
    for source in found.manifest['sources'].split(','):
      if source.strip().startswith(f'task:{name}'):
        return source.strip().removeprefix('task:')
  return name


def run(name: str, subject: subject_lib.Subject, arg: str) -> suites.Result:
  task = check(name, arg, subject.cfg)
  items = tasks.tests(task, subject.cfg.eval.limit or tasks.N_TESTS)
  longest = max(len(item.answer.encode()) for item in items)
  texts = subject_lib.continuations(
    subject, [item.prompt for item in items], subject_lib.GenerationConfig(max_new=longest + 1)
  )
  warnings = subject_lib.context_warnings(subject, [item.prompt for item in items], longest + 1)
  answers = [text.text for (text,) in texts]
  forwards = sum(text.forwards for (text,) in texts)
  scalars = score(name, items, answers)
  tokens = sum(len(text.ids) for (text,) in texts)
  scalars['tokens_per_forward'] = tokens / max(forwards, 1)
  return suites.Result(
    [str(task), *_table(items, scalars), *warnings],
    scalars,
    [
      dict(level=item.level, prompt=item.prompt, right=item.answer, said=answer)
      for item, answer in zip(items, answers, strict=True)
    ],
  )


def score(name: str, items, answers: list[str]) -> dict[str, float]:
  """Returns the accuracy, overall and per level; for star graphs also whether the
  first step enters the right arm, which requires lookahead: 1 / d by chance."""
  right, total = collections.Counter(), collections.Counter()
  first = 0
  for item, answer in zip(items, answers, strict=True):
    total[item.level] += 1
    right[item.level] += answer == item.answer
    first += answer[:2] == item.answer[:2]
  n = sum(total.values())
  scalars = intervals.share('accuracy', sum(right.values()), n)
  if name == 'star_graph':
    scalars |= intervals.share('first_step', first, n)
  if len(total) > 1:
    for level in sorted(total):
      scalars |= intervals.share(f'accuracy_{level}', right[level], total[level])
  return scalars


def _table(items, scalars: dict[str, float]) -> list[str]:
  lines = [
    f'{len(items):,} items, accuracy {intervals.shown(scalars, "accuracy")}'
    f', {scalars["tokens_per_forward"]:.2f} tokens per forward pass'
  ]
  if 'first_step' in scalars:
    lines.append(f'first step accuracy {intervals.shown(scalars, "first_step")}')
  levels = sorted({item.level for item in items})
  if len(levels) > 1:
    lines += [
      f'  {level} operations: {intervals.shown(scalars, f"accuracy_{level}")}' for level in levels
    ]
  return lines
