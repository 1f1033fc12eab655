"""Confidence intervals of measured proportions and means."""

import math

import numpy as np

Z95 = 1.959963984540054  # the normal distribution's 97.5% point


def wilson(successes: float, n: int) -> tuple[float, float]:
  """Returns the 95% interval of a proportion with `successes` in n independent trials.

  Wilson's score interval (1927, doi:10.1080/01621459.1927.10502953), all p
  within Z95 of their own standard deviations of p̂ = successes / n:
  (p̂ + z²/2n ± z sqrt(p̂(1 - p̂)/n + z²/4n²)) / (1 + z²/n). Unlike the normal
  interval it stays in [0, 1], and is accurate near 0 and 1. n = 0 gives (0, 1).
  """
  if not n:
    return 0.0, 1.0
  rate, z2 = successes / n, Z95**2
  middle = rate + z2 / (2 * n)
  half = Z95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
  low, high = ((middle + side * half) / (1 + z2 / n) for side in (-1, 1))
  # Rounding must not exclude the observed proportion at 0 and 1.
  return (0.0 if successes == 0 else low, 1.0 if successes == n else high)


def share(name: str, successes: float, n: int) -> dict[str, float]:
  """Returns the scalars NAME, NAME_low and NAME_high of `suites.Result`; NaN for
  n = 0."""
  low, high = wilson(successes, n)
  value = successes / n if n else math.nan
  return {name: value, f'{name}_low': low, f'{name}_high': high}


def shown(scalars: dict[str, float], name: str) -> str:
  """Formats as '52.0% (48.9% to 55.1%)'; 'none' for NaN."""
  if math.isnan(scalars[name]):
    return 'none'
  low, high = scalars[f'{name}_low'], scalars[f'{name}_high']
  return f'{scalars[name]:.1%} ({low:.1%} to {high:.1%})'


RESAMPLES = 2000


def bootstrap(name: str, sums, counts) -> dict[str, float]:
  """Returns the scalars NAME, NAME_low and NAME_high of sum(sums) / sum(counts), with
  the 95% percentile interval over resamples of whole groups (Efron & Tibshirani 1993,
  chapter 13): items of one group are not independent, groups are.

  Args:
    name: of the scalars.
    sums: per group, the sum over its items.
    counts: per group, the number of its items; NaN results if all are 0.
  """
  sums, counts = np.asarray(sums, float), np.asarray(counts, float)
  if not counts.sum():
    return dict.fromkeys((name, f'{name}_low', f'{name}_high'), math.nan)
  n = len(counts)
  times_RG = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
  drawn = times_RG @ counts
  ratios = (times_RG @ sums)[drawn > 0] / drawn[drawn > 0]
  low, high = np.quantile(ratios, (0.025, 0.975))
  return {
    name: float(sums.sum() / counts.sum()),
    f'{name}_low': float(low),
    f'{name}_high': float(high),
  }
