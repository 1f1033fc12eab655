"""Few rows that hold every pair of values of any two factors."""

import itertools


def rows(factors: dict[str, tuple]) -> list[dict]:
  """Greedy covering design: each row covers as many open pairs as it can.

  Deterministic. Kuhn, Kacker & Lei 2010,
  https://doi.org/10.6028/NIST.SP.800-142: most faults need two factors.
  """
  names = list(factors)
  pairs = {
    frozenset([(a, x), (b, y)])
    for a, b in itertools.combinations(names, 2)
    for x in factors[a]
    for y in factors[b]
  }
  out = []
  while pairs:
    # Start from an open pair, so that every row closes at least one.
    row = dict(min(pairs, key=lambda p: sorted(map(str, p))))
    for name in names:
      if name not in row:
        row[name] = max(factors[name], key=lambda x: len(pairs & _pairs(row | {name: x})))
    pairs -= _pairs(row)
    out.append({name: row[name] for name in names})
  return out


def _pairs(row):
  return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
