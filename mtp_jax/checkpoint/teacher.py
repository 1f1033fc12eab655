"""The checkpoint of --loss.teacher: which one it is, and its trunk and head 1."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from mtp_jax.checkpoint import metadata, restore
from mtp_jax.config import fields, schema
from mtp_jax.io import paths
from mtp_jax.losses import teacher as teacher_lib
from mtp_jax.model import next_token
from mtp_jax.parallel import distributed, sharding


class Source(NamedTuple):
  """A checkpoint that is a teacher."""

  workdir: str
  step: int
  saved: schema.Config
  cfg: schema.Config  # of its teacher.Model

  @property
  def path(self) -> str:
    return f'{self.workdir}/checkpoints/{self.step}'


def find(
  cfg: schema.Config, sizes: Mapping[str, int], *, path: str = '', verify: bool = True
) -> Source | None:
  """Finds the checkpoint of --loss.teacher, or of path; None without one. Collective: all
  processes use what process 0 found.

  Args:
    cfg: of the run, or of another use of its step; its tokenizer is compared if it is recorded.
    sizes: devices along each mesh axis.
    path: in place of the flag's value.
    verify: whether to read all files of the checkpoint.

  Raises:
    ConfigError: no checkpoint, a corrupt one, another vocabulary or tokenizer, or a model that
      the mesh does not divide.
  """
  given = path or cfg.loss.teacher
  if not given or cfg.loss.reads_stored_teacher:
    return None
  source = open_source('loss.teacher', given, cfg, verify=verify)
  with distributed.fail_together():
    _check(source, cfg, sizes)
  return source


def open_source(flag: str, given: str, cfg: schema.Config, *, verify: bool = True) -> Source:
  """Opens the checkpoint that a flag names. Collective; see `find`."""
  found = None
  try:
    with distributed.fail_together():
      if distributed.is_primary():
        found = restore.find(given)
        if verify:
          restore.verify(*found)
    workdir, step = distributed.broadcast_one_to_all(found)
    with distributed.fail_together():
      saved = metadata.read(workdir, step).cfg
  except paths.InputError as error:
    raise fields.ConfigError(flag, given, str(error)) from error
  return Source(workdir, step, saved, config(next_token.as_trained(saved, step), cfg))


def _check(source: Source, cfg: schema.Config, sizes: Mapping[str, int]) -> None:
  def need(ok, problem):
    if not ok:
      raise fields.ConfigError('loss.teacher', source.path, problem)

  theirs, ours = source.saved.model.vocab_size, cfg.model.vocab_size
  need(theirs == ours, f'has --model.vocab_size={theirs}, the run {ours}')
  tokenizer = source.saved.data.tokenizer
  need(
    tokenizer == cfg.data.tokenizer or not tokenizer or not cfg.data.tokenizer,
    f'its tokenizer is {tokenizer}, that of --data.store {cfg.data.tokenizer}',
  )
  try:
    sharding.mesh_sizes(source.cfg, math.prod(sizes.values()))
  except fields.ConfigError as error:
    need(False, f'does not fit the mesh: {error}')


def config(was: schema.Config, cfg: schema.Config) -> schema.Config:
  """Returns the Config of the teacher.Model of `was` in a run of cfg: its own architecture and
  dtypes, on the run's windows and mesh."""
  of = next_token.config(was)
  kernel = cfg.model.attention if cfg.model.attention == 'reference' else 'auto'
  return schema.Config(
    model=dataclasses.replace(of.model, attention=kernel, remat='none'),  # has no backward pass
    heads=of.heads,
    loss=of.loss,
    data=schema.DataConfig(seq_len=cfg.data.seq_len),
    mesh=cfg.mesh,
  )


def load(source: Source, mesh) -> teacher_lib.Model:
  """Loads the parameters of trunk and head 1, sharded as those of a run."""
  was = next_token.as_trained(source.saved, source.step)
  on_mesh = dataclasses.replace(source.saved, mesh=source.cfg.mesh)
  old = restore.restore_model(source.workdir, source.step, on_mesh, mesh)
  with jax.set_mesh(mesh):
    model = jax.jit(lambda old: next_token.model(next_token.trained_part(old, was), was))(old)
  return teacher_lib.Model(model, source.cfg)
