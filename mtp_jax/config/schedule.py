"""Values that change with the step: head weights and active heads."""

from mtp_jax.config import fields, schema


def parse_steps(text: str) -> tuple[tuple[int, tuple[float, ...]], ...]:
  """Parses '0:1,.3;50000:1,.1' to ((0, (1.0, 0.3)), (50000, (1.0, 0.1)))."""
  phases = []
  for phase in text.split(';'):
    step, values = phase.split(':')
    phases.append((int(step), tuple(float(v) for v in values.split(','))))
  starts = [step for step, _ in phases]
  if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] > fields.INT32:
    raise ValueError(f'steps must start at 0 and rise, to at most {fields.INT32:,}')
  return tuple(phases)


def head_weights(cfg: schema.Config) -> tuple[tuple[int, tuple[float, ...]], ...]:
  """Returns --loss.weights by phase, one weight per head."""
  return tuple(
    (start, values + values[-1:] * (cfg.heads.n - len(values)))
    for start, values in parse_steps(cfg.loss.weights)
  )


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
