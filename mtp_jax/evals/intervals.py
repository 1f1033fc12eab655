"""How sure a share is. Floor 4."""

import math

Z = 1.959963984540054  # of a two-sided 95%


def wilson(successes: float, n: int) -> tuple[float, float]:
  """95% interval of a share (Wilson 1927): inside [0, 1], also near its ends.

  NaN where nothing was asked.
  """
  if not n:
    return math.nan, math.nan
  p, z2 = successes / n, Z * Z
  middle = (p + z2 / (2 * n)) / (1 + z2 / n)
  half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
  return max(0.0, middle - half), min(1.0, middle + half)


def share(name: str, successes: float, n: int) -> dict[str, float]:
  """The scalars NAME, NAME_low and NAME_high of `suites.Result`."""
  low, high = wilson(successes, n)
  value = successes / n if n else math.nan
  return {name: value, f'{name}_low': low, f'{name}_high': high}


def shown(scalars: dict[str, float], name: str) -> str:
  """'52.0% (48.9% to 55.1%)'"""
  low, high = scalars[f'{name}_low'], scalars[f'{name}_high']
  return f'{scalars[name]:.1%} ({low:.1%} to {high:.1%})'
