"""Where a run starts: its newest valid checkpoint, the parameters of another run
(warm start), or a random initialization.

Collective: all processes call these functions and get what process 0 found, as
file systems may be inconsistent and another run may save in the meantime.
"""

import json
from typing import NamedTuple

import jax

from mtp_jax.checkpoint import metadata, restore
from mtp_jax.config import fields, schema
from mtp_jax.parallel import distributed
from mtp_jax.train import init_from, lock


class Source(NamedTuple):
  """The checkpoint that a run is initialized from."""

  workdir: str
  step: int
  cfg: schema.Config  # as it was saved
  was: schema.Config  # without heads that have not trained yet


def newest(workdir: str) -> int | None:
  """Returns the step of the newest checkpoint, as seen by process 0."""
  found = max(restore.steps(workdir), default=None)
  return json.loads(distributed.broadcast_one_to_all(json.dumps(found)))


def source(cfg) -> Source | None:
  """Returns the checkpoint that a new run is initialized from: an import in the
  workdir, or --train.init_from; None for a random initialization."""
  path = cfg.train.init_from
  imported = newest(cfg.train.workdir)
  if imported is None and not path:
    return None
  message = ''
  with distributed.fail_together():
    if imported is not None and path:
      raise fields.ConfigError(
        'train.init_from',
        path,
        f'--train.workdir={cfg.train.workdir} holds an imported model, which a run'
        ' there is initialized from; use another workdir',
      )
    if imported is not None:
      path = cfg.train.workdir
    # The other run may save in the meantime: all use what process 0 found.
    if distributed.is_primary():
      found = restore.find(path)
      if imported is None:  # an import is verified by `start_step`
        restore.verify(*found)
      message = json.dumps(found)
  workdir, step = json.loads(distributed.broadcast_one_to_all(message))
  with distributed.fail_together():
    saved, _ = metadata.read_metadata(workdir, step)
    was = init_from.as_trained(saved, step)
    init_from.check(was, cfg, path)
    if was.data.tokenizer not in ('', cfg.data.tokenizer):
      raise fields.ConfigError(
        'data.store',
        cfg.data.store,
        f'its tokenizer is {cfg.data.tokenizer}; that of the model in {path} is'
        f' {was.data.tokenizer}',
      )
  return Source(workdir, step, saved, was)


def newest_good(workdir: str, suits=lambda step: True) -> int:
  """Returns the newest step with a valid checkpoint among those that suit, as
  seen by process 0; 0 (the start) if there is none."""
  return _newest_good(workdir, suits)[0] or 0


def _newest_good(workdir, suits=lambda step: True) -> tuple[int | None, list]:
  message = ''
  with distributed.fail_together():
    if distributed.is_primary():
      message = json.dumps(restore.latest_valid_step(workdir, suits))
  return json.loads(distributed.broadcast_one_to_all(message))


def start_step(cfg, tokens) -> int | None:
  """Returns the step of the newest valid checkpoint, None without one; corrupt
  newer ones are quarantined.

  Raises:
    ConfigError: the workdir is not shared, or holds a run with other flags.
  """
  workdir = cfg.train.workdir
  step, corrupt = _newest_good(workdir)
  with distributed.fail_together():
    if not lock.is_held(workdir):
      raise fields.ConfigError(
        'train.workdir',
        workdir,
        f'process {jax.process_index()} does not see what process 0 wrote'
        ' there; all machines must share it',
      )
    if step:
      _check_same_run(cfg, tokens, step)
  with distributed.fail_together():  # no process lists them before the rename
    for bad, why in corrupt if distributed.is_primary() else ():
      name = restore.quarantine(workdir, bad)
      print(
        f'checkpoint {bad} is corrupt: {why}; quarantined as checkpoints/{name},'
        f' resuming from step {step}'
      )
  return step


def _check_same_run(cfg, tokens, start) -> None:
  workdir = cfg.train.workdir
  old, fingerprint = metadata.read_metadata(workdir, start)
  for name, was, now in schema.changed(old, cfg):
    raise fields.ConfigError(
      name,
      now,
      f'the run in --train.workdir={workdir} was started with {was};'
      ' use that value, or another workdir',
    )
  if old.train.steps != cfg.train.steps and cfg.optim.schedule != 'constant':
    print(
      f'--train.steps was {old.train.steps}, is {cfg.train.steps}: the'
      ' learning-rate schedule changes'
    )
  if fingerprint != tokens.fingerprint:
    raise fields.ConfigError(
      'data.store',
      cfg.data.store,
      f'is not the store, or not the mixture, that the run in --train.workdir={workdir} reads',
    )
