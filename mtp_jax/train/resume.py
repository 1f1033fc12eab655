"""Where a run starts: at its newest good checkpoint, with the parameters of
another run, or from nothing. Floor 4.

All processes call these together, and get what process 0 has found: a file
system may show them different things, another run may save meanwhile.
"""

import json
from typing import NamedTuple

import jax

from mtp_jax.checkpoint import metadata, restore
from mtp_jax.config import fields, schema
from mtp_jax.parallel import distributed
from mtp_jax.train import init_from, lock


class Source(NamedTuple):
  """A checkpoint that a run begins with, and what it is."""

  workdir: str
  step: int
  cfg: schema.Config  # as it was saved
  was: schema.Config  # without heads that have not trained yet


def newest(workdir: str) -> int | None:
  """Step of the newest checkpoint, as process 0 sees it."""
  found = max(restore.steps(workdir), default=None)
  return json.loads(distributed.broadcast_one_to_all(json.dumps(found)))


def source(cfg) -> Source | None:
  """What a new run begins with if with the parameters of another: what was
  imported into the workdir, or --train.init_from."""
  path = cfg.train.init_from
  imported = newest(cfg.train.workdir)
  if imported is None and not path:
    return None
  answer = ''
  with distributed.fail_together():
    if imported is not None and path:
      raise fields.ConfigError(
        'train.init_from',
        path,
        f'--train.workdir={cfg.train.workdir} holds what was imported, which a'
        ' run there begins with; give another workdir',
      )
    if imported is not None:
      path = cfg.train.workdir
    # The other run may save meanwhile: all begin with what process 0 has found.
    if distributed.is_primary():
      found = restore.find(path)
      if imported is None:  # else `start_step` reads all of it, once
        restore.verify(*found)
      answer = json.dumps(found)
  workdir, step = json.loads(distributed.broadcast_one_to_all(answer))
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
  """The newest good checkpoint of those steps that suit, as process 0 sees it;
  0, the start, if there is none."""
  return _newest_good(workdir, suits)[0] or 0


def _newest_good(workdir, suits=lambda step: True) -> tuple[int | None, list]:
  answer = ''
  with distributed.fail_together():
    if distributed.is_primary():
      answer = json.dumps(restore.latest_valid_step(workdir, suits))
  return json.loads(distributed.broadcast_one_to_all(answer))


def start_step(cfg, tokens) -> int | None:
  """Step of the newest checkpoint that is good, None without one; refused if
  the run there is another one."""
  workdir = cfg.train.workdir
  step, damaged = _newest_good(workdir)
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
  with distributed.fail_together():  # nobody lists them before they are renamed
    for bad, why in damaged if distributed.is_primary() else ():
      name = restore.quarantine(workdir, bad)
      print(
        f'checkpoint {bad} is damaged: {why}; it is now checkpoints/{name},'
        f' and the run goes on from step {step}'
      )
  return step


def _check_same_run(cfg, tokens, start) -> None:
  workdir = cfg.train.workdir
  old, fingerprint = metadata.read_metadata(workdir, start)
  for name, was, now in schema.changed(old, cfg):
    raise fields.ConfigError(
      name,
      now,
      f'the run in --train.workdir={workdir} was started with {was}; give that, or another workdir',
    )
  if old.train.steps != cfg.train.steps and cfg.optim.schedule != 'constant':
    print(
      f'--train.steps was {old.train.steps}, is {cfg.train.steps}: the learning'
      ' rate goes on along another curve'
    )
  if fingerprint != tokens.fingerprint:
    raise fields.ConfigError(
      'data.store',
      cfg.data.store,
      f'is not the store, or not the mixture, that the run in --train.workdir={workdir} reads',
    )
