"""What changes with the step: head weights and active heads. Floor 0."""

from mtp_jax.config import fields, schema


def parse_steps(text: str) -> tuple[tuple[int, tuple[float, ...]], ...]:
  """'0:1,.3;50000:1,.1' -> ((0, (1.0, 0.3)), (50000, (1.0, 0.1)))."""
  phases = []
  for phase in text.split(';'):
    step, values = phase.split(':')
    phases.append((int(step), tuple(float(v) for v in values.split(','))))
  starts = [step for step, _ in phases]
  if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] > fields.INT32:
    raise ValueError(f'steps must start at 0 and rise, to at most {fields.INT32:,}')
  return tuple(phases)


def head_weights(cfg: schema.Config) -> tuple[tuple[int, tuple[float, ...]], ...]:
  """--loss.weights by phase, one weight a head."""
  return tuple(
    (start, values + values[-1:] * (cfg.heads.n - len(values)))
    for start, values in parse_steps(cfg.loss.weights)
  )


def in_force(phases, step: int):
  """The values of the phase that a step lies in."""
  return [values for start, values in phases if start <= step][-1]


def active_heads(cfg: schema.Config, step: int) -> int:
  """Heads 1..m that train at this step, under --loss.curriculum."""
  if not cfg.loss.curriculum:
    return cfg.heads.n
  return int(in_force(parse_steps(cfg.loss.curriculum), step)[0])


def trained_heads(cfg: schema.Config, step: int) -> int:
  """Heads 1..m that the last of `step` optimizer steps trained; of no step, those
  that the first one will."""
  return active_heads(cfg, max(step - 1, 0))
