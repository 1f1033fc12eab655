"""Where a run starts: its newest valid checkpoint, the parameters of another run
(warm start), or a random initialization.

Collective: all processes call these functions and get what process 0 found, as
file systems may be inconsistent and another run may save in the meantime.
"""

import re
from typing import Any, NamedTuple

import jax

from mtp_jax.checkpoint import metadata, restore
from mtp_jax.checkpoint import teacher as teacher_lib
from mtp_jax.config import draft_vocab, fields, parse, schema
from mtp_jax.data import loader
from mtp_jax.io import paths
from mtp_jax.model import next_token
from mtp_jax.parallel import distributed
from mtp_jax.train import init_from, lock


class Position(NamedTuple):
  """Where a run continues."""

  step: int = 0
  skipped_batches: loader.Ranges = ()
  spikes: dict[str, Any] = {}  # state of the spike detector


class Source(NamedTuple):
  """The checkpoint that a run is initialized from."""

  workdir: str
  step: int
  cfg: schema.Config  # as it was saved
  was: schema.Config  # without heads that have not trained yet


def newest(workdir: str) -> int | None:
  """Returns the step of the newest checkpoint, as seen by process 0."""
  found = max(restore.steps(workdir), default=None)
  return distributed.broadcast_one_to_all(found)


def source(cfg) -> Source | None:
  """Returns the checkpoint that a new run is initialized from: an import in the
  workdir, or --train.init_from; None for a random initialization."""
  path = cfg.train.init_from
  imported = newest(cfg.train.workdir)
  if imported is None and not path:
    return None
  found = None
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
      if imported is None:  # an import is verified by `position`
        restore.verify(*found)
  workdir, step = distributed.broadcast_one_to_all(found)
  with distributed.fail_together():
    saved = metadata.read(workdir, step).cfg
    was = next_token.as_trained(saved, step)
    init_from.check(was, cfg, path)
    if was.data.tokenizer not in ('', cfg.data.tokenizer):
      raise fields.ConfigError(
        'data.store',
        cfg.data.store,
        f'its tokenizer is {cfg.data.tokenizer}; that of the model in {path} is'
        f' {was.data.tokenizer}',
      )
  return Source(workdir, step, saved, was)


def teacher(cfg, mesh) -> teacher_lib.Source | None:
  """Returns the checkpoint of --loss.teacher. A resumed run has the teacher that it started
  with, which config.json records, although the teacher's run may have newer checkpoints."""
  path = cfg.loss.teacher
  if path and newest(cfg.train.workdir):
    recorded = distributed.broadcast_one_to_all(_recorded_teacher(cfg.train.workdir))
    if re.fullmatch(re.escape(path) + r'/checkpoints/\d+', recorded):
      path = recorded
  return teacher_lib.find(cfg, mesh.shape, path=path)


def _recorded_teacher(workdir: str) -> str:
  try:
    text = (paths.as_path(workdir) / 'config.json').read_text()
    return parse.from_json(text).loss.teacher
  except (OSError, ValueError):  # the checkpoint's own config is compared later
    return ''


def newest_valid(workdir: str, suits=lambda step: True) -> tuple[int | None, list]:
  """Returns (the newest step with a valid checkpoint among those that suit, or None;
  the corrupt newer ones), as seen by process 0."""
  found = None
  with distributed.fail_together():
    if distributed.is_primary():
      found = restore.latest_valid_step(workdir, suits)
  return distributed.broadcast_one_to_all(found)


def position(cfg, tokens) -> Position | None:
  """Returns the Position of the newest valid checkpoint, None without one; corrupt
  newer ones are quarantined.

  Raises:
    ConfigError: the workdir is not shared, or holds a run with other flags.
  """
  workdir = cfg.train.workdir
  step, corrupt = newest_valid(workdir)
  found = None if step is None else Position(step)
  with distributed.fail_together():
    if not lock.is_held(workdir):
      raise fields.ConfigError(
        'train.workdir',
        workdir,
        f'process {jax.process_index()} does not see what process 0 wrote'
        ' there; all machines must share it',
      )
    if step:
      saved = metadata.read(workdir, step)
      _check_same_run(cfg, tokens, saved)
      found = Position(step, saved.skipped_batches, saved.spikes)
  with distributed.fail_together():  # no process lists them before the rename
    for bad, why in corrupt if distributed.is_primary() else ():
      name = restore.quarantine(workdir, bad)
      print(
        f'checkpoint {bad} is corrupt: {why}; quarantined as checkpoints/{name},'
        f' resuming from step {step}'
      )
  return found


def _check_same_run(cfg, tokens, saved: metadata.Metadata) -> None:
  workdir, old = cfg.train.workdir, saved.cfg
  for name, was, now in schema.changed(old, cfg):
    if name == draft_vocab.FLAG:
      was, now = map(draft_vocab.shown, (was, now))
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
  if saved.store != tokens.fingerprint:
    raise fields.ConfigError(
      'data.store',
      cfg.data.store,
      f'is not the store, or not the mixture, that the run in --train.workdir={workdir} reads',
    )
