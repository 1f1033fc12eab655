"""Synthetic tasks with random access to their items. Standard library only.

Tasks on which predicting several tokens at once is reported to help:

  star_graph  find the path from the centre of a star to the end of one of its
              arms (Bachmann & Nagarajan 2024, https://arxiv.org/abs/2403.06963)
  polynomial  evaluate an expression over F_p[X]/(X^n) (Gloeckle et al. 2024,
              https://arxiv.org/abs/2404.19737, section 4.2)
  stories     recall names of a story: stories.py

A task is named NAME/KEY=VALUE/…, with defaults for missing keys. An item is
sampled from a generator seeded by that name, the part (train or test), the
level and the index only, so that a test set is reproducible.

In star_graph and polynomial every character is one byte, and every choice one
character.
"""

import random
import string
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mtp_jax.data import stories


class Item(NamedTuple):
  """A prompt, its only correct answer, and its difficulty."""

  prompt: str
  answer: str
  level: int


class Task(NamedTuple):
  """The functions of a task.

  make(rng, level, params) -> Item. levels(params, part) -> the levels of items
  of this part. check(params) -> an error, or ''. question(item) -> a canonical form,
  equal for equivalent items."""

  defaults: dict[str, int]
  make: Callable[[random.Random, int, dict], Item]
  levels: Callable[[dict, str], range]
  check: Callable[[dict], str]
  question: Callable[[Item], str] = lambda item: item.prompt


# Star graphs.

NODES = string.ascii_letters + string.digits + '!#$%&()*+,-.:;<>?@[]^_{}~'


def _star(rng: random.Random, level: int, params: dict) -> Item:
  """Makes a star graph: all edges in random order, each from the centre outwards,
  then the centre and the goal; the answer is the path between them:

    ab|ac|bd|ce/ad=abd

  An arm has `length` nodes including the centre, and so has the path.
  """
  d, length = params['d'], params['length']
  labels = rng.sample(NODES[: params['nodes']], d * (length - 1) + 1)
  centre, rest = labels[0], labels[1:]
  arms = [centre + ''.join(rest[i * (length - 1) : (i + 1) * (length - 1)]) for i in range(d)]
  edges = [a + b for arm in arms for a, b in zip(arm, arm[1:])]  # noqa: B905
  rng.shuffle(edges)
  path = rng.choice(arms)
  return Item(f'{"|".join(edges)}/{centre}{path[-1]}=', path, level)


def _sorted_edges(item: Item) -> str:
  edges, query = item.prompt.split('/')
  return '|'.join(sorted(edges.split('|'))) + '/' + query


def _check_star(params: dict) -> str:
  d, length, nodes = params['d'], params['length'], params['nodes']
  if d < 1 or length < 2:
    return 'd must be at least 1, length at least 2'
  if not d * (length - 1) + 1 <= nodes <= len(NODES):
    return f'nodes from {d * (length - 1) + 1}, the size of the graph, to {len(NODES)}'
  return ''


# Polynomials.


def evaluate(expression: str, p: int, n: int) -> str:
  """Returns the value of an expression of `_polynomial`, lowest coefficient first."""
  value, end = _parse(expression, 0, p, n)
  if end != len(expression):
    raise ValueError(f'{expression!r} ends at {end}')
  return ''.join(map(str, value))


def _parse(text: str, at: int, p: int, n: int) -> tuple[list[int], int]:
  if text[at] == '-':
    value, at = _parse(text, at + 1, p, n)
    return [-c % p for c in value], at
  if text[at] == '(':
    left, at = _parse(text, at + 1, p, n)
    right, end = _parse(text, at + 1, p, n)
    return OPERATIONS[text[at]](left, right, p), end + 1
  return [int(c) for c in text[at : at + n]], at + n


def _add(f, g, p):
  return [(a + b) % p for a, b in zip(f, g, strict=True)]


def _multiply(f, g, p):
  """Returns f * g modulo X^n."""
  return [sum(f[i] * g[k - i] for i in range(k + 1)) % p for k in range(len(f))]


def _compose(f, g, p):
  """Returns f(g(X)) modulo X^n, by Horner's method."""
  value = [0] * len(f)
  for c in reversed(f):
    value = _multiply(value, g, p)
    value[0] = (value[0] + c) % p
  return value


OPERATIONS = {'+': _add, '*': _multiply, 'o': _compose}


def _polynomial(rng: random.Random, level: int, params: dict) -> Item:
  """Makes an expression of `level` operations and its value:

    (120+-(305*001))=530

  A polynomial is written as its n coefficients, lowest first; a leading -
  negates; binary operations are in brackets: + * and o, f(g(X)). The operation
  at the root is uniform over the four; the remaining ones are split between its
  two sides uniformly.
  """
  p, n = params['p'], params['n']

  def draw(m):
    if not m:
      return ''.join(str(rng.randrange(p)) for _ in range(n))
    operation = rng.choice('-+*o')
    if operation == '-':
      return '-' + draw(m - 1)
    of_left = rng.randint(0, m - 1)
    return f'({draw(of_left)}{operation}{draw(m - 1 - of_left)})'

  expression = draw(level)
  return Item(f'{expression}=', evaluate(expression, p, n), level)


def _check_polynomial(params: dict) -> str:
  if params['p'] not in (2, 3, 5, 7) or params['n'] < 1:
    return 'p must be a prime of one digit, and n >= 1'
  if not 1 <= params['train'] or not 1 <= params['test']:
    return 'the numbers of operations, train and test, must be at least 1'
  return ''


TASKS = {
  'star_graph': Task(
    dict(d=2, length=5, nodes=50), _star, lambda params, part: range(1), _check_star, _sorted_edges
  ),
  'polynomial': Task(
    dict(p=7, n=5, train=5, test=10),
    _polynomial,
    lambda params, part: range(1, params[part] + 1),
    _check_polynomial,
  ),
  'stories': Task(
    stories.DEFAULTS,
    lambda rng, level, params: Item('', stories.story(rng, params), level),
    lambda params, part: range(1),
    stories.check,
    lambda item: item.answer,
  ),
}


class Named(NamedTuple):
  """A task with all its parameters."""

  name: str
  params: dict[str, int]

  @property
  def task(self) -> Task:
    return TASKS[self.name]

  def __str__(self):
    return '/'.join([self.name, *(f'{k}={v}' for k, v in self.params.items())])


def named(text: str, more: dict[str, int] | None = None) -> Named:
  """Parses NAME/KEY=VALUE/…; `more` are further keys with their defaults.

  Raises:
    ValueError: an unknown task or key, or a bad value.
  """
  name, *given = text.split('/')
  if name not in TASKS:
    raise ValueError(f'the task must be one of: {", ".join(TASKS)}')
  params, seen = TASKS[name].defaults | (more or {}), set()
  for entry in given:
    key, _, value = entry.partition('=')
    if key in seen:
      raise ValueError(f'duplicate key {key}')
    seen.add(key)
    if key not in params or not value.isdecimal():
      keys = ', '.join(f'{k}={v}' for k, v in params.items())
      raise ValueError(f'{entry!r} is none of: {keys}; values must be integers')
    params[key] = int(value)
  problem = TASKS[name].check(params)
  if problem:
    raise ValueError(problem)
  return Named(name, params)


def item(task: Named, part: str, index: int, level: int | None = None) -> Item:
  """Returns one item of train or test, of the given or of a random level."""
  shape = {k: v for k, v in task.params.items() if k not in ('train', 'test')}
  rng = random.Random(f'{Named(task.name, shape)} {part} {level} {index}')
  if level is None:
    levels = task.task.levels(task.params, part)
    level = levels[rng.randrange(len(levels))]
  return task.task.make(rng, level, task.params)


def tests(task: Named, n: int, parts: tuple[str, ...] = ('test',)) -> list[Item]:
  """Returns the first n test items of each level of `parts`."""
  levels = {x for part in parts for x in task.task.levels(task.params, part)}
  return [item(task, 'test', i, level) for level in sorted(levels) for i in range(n)]


N_TESTS = 2000  # per level; their questions are excluded from training


def train(task: Named, n: int) -> Iterator[tuple[int, Item]]:
  """Yields (index, item) of the first n training items, except for those whose
  question is in the test set (short expressions and small graphs are few, and
  the edges of a graph may come in another order)."""
  question = task.task.question
  # The test set may have other levels than those of this task.
  test_items = tests(task, N_TESTS, ('test', 'train'))
  held_out = {question(found) for found in test_items}
  for index in range(n):
    found = item(task, 'train', index)
    if question(found) not in held_out:
      yield index, found
