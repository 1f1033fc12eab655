"""Confidence intervals of measured proportions."""

import math

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
