"""Values that change with the step: head weights and active heads."""

import re
from typing import NamedTuple

from mtp_jax.config import fields, schema


class Phase(NamedTuple):
  """Weights of all heads from a step on."""

  start: int
  weights: tuple[float, ...]
  is_linear: bool  # they move to those of the next phase, by the same amount per step


def parse_steps(text: str) -> tuple[tuple[int, tuple[float, ...]], ...]:
  """Parses '0:1;1000:2' to ((0, (1.0,)), (1000, (2.0,)))."""
  phases = []
  for phase in text.split(';'):
    step, values = phase.split(':')
    phases.append((int(step), tuple(float(v) for v in values.split(','))))
  starts = [step for step, _ in phases]
  if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] > fields.INT32:
    raise ValueError(f'steps must start at 0 and rise, to at most {fields.INT32:,}')
  return tuple(phases)


def parse_weights(text: str, n: int) -> tuple[Phase, ...]:
  """Parses '0:1,.3~2000:1,0;5000:beta=.6' to Phases of n heads.

  After ~ instead of ; weights have moved linearly to the next ones. The last weight
  is that of all further heads; beta=B are B^(k-1) of head k, divided by their sum (Cai et
  al. 2025, FastMTP, https://arxiv.org/abs/2509.18362).

  Raises:
    ValueError: of another form, or steps do not start at 0 and rise.
  """
  parts = re.split('([;~])', text)

  def listed(values: str) -> str:
    if not values.startswith('beta='):
      return values
    beta = float(values.removeprefix('beta='))
    if not 0 < beta <= 1:
      raise ValueError('beta must be above 0, at most 1')
    powers = [beta**k for k in range(n)]
    return ','.join(repr(power / sum(powers)) for power in powers)

  phases = [phase.split(':') for phase in parts[::2]]
  steps = parse_steps(';'.join(f'{step}:{listed(values)}' for step, values in phases))
  moves = [mark == '~' for mark in parts[1::2]] + [False]
  return tuple(
    Phase(start, values + values[-1:] * (n - len(values)), is_linear)
    for (start, values), is_linear in zip(steps, moves, strict=True)
  )


def head_weights(cfg: schema.Config, step: int) -> tuple[float, ...]:
  """Returns the weight of each head at a step, from --loss.weights."""
  phases = parse_weights(cfg.loss.weights, cfg.heads.n)
  at = sum(phase.start <= step for phase in phases) - 1
  here = phases[at]
  if not here.is_linear:
    return here.weights
  after = phases[at + 1]
  share = (step - here.start) / (after.start - here.start)
  return tuple(a + share * (b - a) for a, b in zip(here.weights, after.weights, strict=True))


def in_force(phases, step: int):
  """Returns the values of the phase that contains a step."""
  return [values for start, values in phases if start <= step][-1]


def active_heads(cfg: schema.Config, step: int) -> int:
  """Returns m such that heads 1..m train at this step, under --loss.curriculum."""
  if not cfg.loss.curriculum:
    return cfg.heads.n
  return int(in_force(parse_steps(cfg.loss.curriculum), step)[0])


def trained_heads(cfg: schema.Config, step: int) -> int:
  """Returns m such that heads 1..m trained in the last of `step` optimizer steps; for
  step 0, those that the first step trains."""
  return active_heads(cfg, max(step - 1, 0))
