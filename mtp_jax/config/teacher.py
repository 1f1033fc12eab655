"""What --loss.teacher excludes."""

from mtp_jax.config import fields, schema


def problem(l: schema.LossConfig) -> fields.ConfigError | None:
  """Returns why other flags contradict --loss.teacher; None if none does."""
  if l.teacher and l.head_loss == 'ce':
    return fields.ConfigError('loss.teacher', l.teacher, 'needs another --loss.head_loss than ce')
  for flag, unused in (('temperature', 1), ('top_p', 1), ('min_p', 0)):
    if l.reads_stored_teacher and not l.top_k and getattr(l, flag) != unused:
      return fields.ConfigError(
        f'loss.{flag}',
        getattr(l, flag),
        f'must be {unused} with --loss.teacher=store, which has no more than the most probable'
        ' tokens; or give --loss.top_k, at most as many as are stored',
      )
  return None
