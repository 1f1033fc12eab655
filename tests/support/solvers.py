"""Independent solvers of the synthetic tasks."""

import collections
import itertools


def all_paths(prompt: str) -> list[str]:
  """All paths from start to goal that follow the edges of a prompt."""
  edges, query = prompt.split('/')
  start, goal, equals = query
  assert equals == '='
  after = collections.defaultdict(list)
  for a, b in edges.split('|'):
    after[a].append(b)
  found, open_ = [], [start]
  while open_:
    path = open_.pop()
    if path[-1] == goal:
      found.append(path)
    open_ += [path + b for b in after[path[-1]] if b not in path]
  return found


def polynomial_value(expression: str, p: int, n: int) -> list[int]:
  """Another evaluation: Python's own parser, polynomials as functions of dicts
  {power: coefficient}, reduced at each operation's end."""
  terms = []

  def reduced(f):
    return {k: c % p for k, c in f.items() if k < n}

  class Poly:
    def __init__(self, f):
      self.f = reduced(f)

    def __neg__(self):
      return Poly({k: -c for k, c in self.f.items()})

    def __add__(self, g):
      powers = set(self.f) | set(g.f)
      return Poly({k: self.f.get(k, 0) + g.f.get(k, 0) for k in powers})

    def __mul__(self, g):
      out = collections.Counter()
      for (i, a), (j, b) in itertools.product(self.f.items(), g.f.items()):
        out[i + j] += a * b
      return Poly(out)

    def __matmul__(self, g):
      out, power = Poly({}), Poly({0: 1})
      for k in range(n):
        out = out + Poly({0: self.f.get(k, 0)}) * power
        power = power * g
      return out

  source, at = '', 0
  while at < len(expression):
    c = expression[at]
    if c.isdigit():
      terms.append(Poly(dict(enumerate(map(int, expression[at : at + n])))))
      source, at = source + f't[{len(terms) - 1}]', at + n
    else:
      source, at = source + {'o': '@'}.get(c, c), at + 1
  f = eval(source, dict(t=terms)).f  # the expression is our own
  return [f.get(k, 0) for k in range(n)]
