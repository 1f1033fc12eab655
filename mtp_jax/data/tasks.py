"""Synthetic tasks, any item by its index. Floor 2: standard library.

Two tasks on which predicting several tokens at once is said to help:

  star_graph  find the path from the centre of a star to the end of one of its
              arms (Bachmann & Nagarajan 2024, https://arxiv.org/abs/2403.06963)
  polynomial  evaluate an expression over F_p[X]/(X^n) (Gloeckle et al. 2024,
              https://arxiv.org/abs/2404.19737, section 4.2)

A task is named NAME/KEY=VALUE/…; what is not said has its default. An item is
drawn from a generator seeded by that, the part (train or test), the level and
the index alone, so that a test set is the same wherever it is made.

Every character is one byte, and every choice one character.
"""

import random
import string
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Item(NamedTuple):
  """What is asked, the only right answer, and how hard it is."""

  prompt: str
  answer: str
  level: int


class Task(NamedTuple):
  """make(rng, level, params) -> Item. levels(params, part) -> those that an
  item of this part may have. check(params) -> what is wrong, or ''.
  question(prompt) -> what two prompts that ask the same have in common."""

  defaults: dict[str, int]
  make: Callable[[random.Random, int, dict], Item]
  levels: Callable[[dict, str], range]
  check: Callable[[dict], str]
  question: Callable[[str], str] = str


# Star graphs.

NODES = string.ascii_letters + string.digits + '!#$%&()*+,-.:;<>?@[]^_{}~'


def _star(rng: random.Random, level: int, params: dict) -> Item:
  """All edges in random order, each from the centre outwards; then the centre
  and the goal; the path from one to the other is the answer:

    ab|ac|bd|ce/ad=abd

  An arm has `length` nodes, the centre among them, and so has the path.
  """
  d, length = params['d'], params['length']
  labels = rng.sample(NODES[: params['nodes']], d * (length - 1) + 1)
  centre, rest = labels[0], labels[1:]
  arms = [centre + ''.join(rest[i * (length - 1) : (i + 1) * (length - 1)]) for i in range(d)]
  edges = [a + b for arm in arms for a, b in zip(arm, arm[1:])]  # noqa: B905
  rng.shuffle(edges)
  path = rng.choice(arms)
  return Item(f'{"|".join(edges)}/{centre}{path[-1]}=', path, level)


def _sorted_edges(prompt: str) -> str:
  edges, asked = prompt.split('/')
  return '|'.join(sorted(edges.split('|'))) + '/' + asked


def _check_star(params: dict) -> str:
  d, length, nodes = params['d'], params['length'], params['nodes']
  if d < 1 or length < 2:
    return 'd >= 1 arms of length >= 2 nodes'
  if not d * (length - 1) + 1 <= nodes <= len(NODES):
    return f'nodes from {d * (length - 1) + 1}, which the graph has, to {len(NODES)}'
  return ''


# Polynomials.


def evaluate(expression: str, p: int, n: int) -> str:
  """The value of an expression of `_polynomial`, lowest coefficient first."""
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
  """Modulo X^n."""
  return [sum(f[i] * g[k - i] for i in range(k + 1)) % p for k in range(len(f))]


def _compose(f, g, p):
  """f(g(X)) modulo X^n, of the representatives of degree < n, by Horner."""
  value = [0] * len(f)
  for c in reversed(f):
    value = _multiply(value, g, p)
    value[0] = (value[0] + c) % p
  return value


OPERATIONS = {'+': _add, '*': _multiply, 'o': _compose}


def _polynomial(rng: random.Random, level: int, params: dict) -> Item:
  """An expression of `level` operations and its value:

    (120+-(305*001))=530

  A polynomial is its n coefficients, lowest first; a leading - negates; each
  binary operation has its brackets: + * and o, f(g(X)). The operation at the
  root is one of the four with equal chances; the others are divided between its
  two sides by a uniform draw.
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
    return 'p a prime of one digit, as each coefficient is, and n >= 1'
  if not 1 <= params['train'] or not 1 <= params['test']:
    return 'operations, train and test, from 1'
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
  """Of NAME/KEY=VALUE/…, `more` being further keys with their defaults.

  Raises:
    ValueError: what is wrong with it.
  """
  name, *given = text.split('/')
  if name not in TASKS:
    raise ValueError(f'a task is one of: {", ".join(TASKS)}')
  params, seen = TASKS[name].defaults | (more or {}), set()
  for entry in given:
    key, _, value = entry.partition('=')
    if key in seen:
      raise ValueError(f'{key} is there twice')
    seen.add(key)
    if key not in params or not value.isdecimal():
      keys = ', '.join(f'{k}={v}' for k, v in params.items())
      raise ValueError(f'{entry!r} is none of: {keys}; whole numbers')
    params[key] = int(value)
  problem = TASKS[name].check(params)
  if problem:
    raise ValueError(problem)
  return Named(name, params)


def item(of: Named, part: str, index: int, level: int | None = None) -> Item:
  """One item of train or test: of a level, or of one drawn for it."""
  shape = {k: v for k, v in of.params.items() if k not in ('train', 'test')}
  rng = random.Random(f'{Named(of.name, shape)} {part} {level} {index}')
  if level is None:
    levels = of.task.levels(of.params, part)
    level = levels[rng.randrange(len(levels))]
  return of.task.make(rng, level, of.params)


def tests(of: Named, n: int, parts: tuple[str, ...] = ('test',)) -> list[Item]:
  """The first n test items of each level that one of `parts` may have."""
  levels = {x for part in parts for x in of.task.levels(of.params, part)}
  return [item(of, 'test', i, level) for level in sorted(levels) for i in range(n)]


N_TESTS = 2000  # of each level; what these ask is not trained on


def train(of: Named, n: int) -> Iterator[tuple[int, Item]]:
  """(index, item) of the first n training items, without those that ask what a
  test item asks: short expressions are few, and so are small graphs, whose
  edges may be told in another order."""
  question = of.task.question
  # A test may name other levels than this task's own.
  kept_out = tests(of, N_TESTS, ('test', 'train'))
  held_out = {question(found.prompt) for found in kept_out}
  for index in range(n):
    found = item(of, 'train', index)
    if question(found.prompt) not in held_out:
      yield index, found
