"""`mtp train`: trains a model, or resumes a run."""

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags
from mtp_jax.config import fields, parse, schema
from mtp_jax.io import paths


def _absolute_stores(cfg: schema.CommandConfig, flag: str) -> str:
  refs = parse.parse_stores(schema.get(cfg, flag))
  return parse.format_stores(ref._replace(path=paths.absolute(ref.path)) for ref in refs)


def run(parsed: flags.Parsed) -> int:
  cfg = parsed.config()
  command_lib.require(cfg, 'train.workdir', 'the directory of the run')
  command_lib.require(cfg, 'data.store', 'the store that `mtp prepare` wrote')
  if cfg.data.teacher:
    raise fields.ConfigError(
      'data.teacher',
      cfg.data.teacher,
      'is of `mtp prepare`; a run reads --loss.teacher=RUN or store',
    )
  # Absolute paths: the run can be resumed from any working directory.
  cfg = schema.replace(
    cfg,
    **{flag: _absolute_stores(cfg, flag) for flag in ('data.store', 'eval.stores')},
    **{
      flag: paths.absolute(path)
      for flag in ('train.workdir', 'train.init_from', 'loss.teacher')
      if (path := schema.get(cfg, flag)) and (flag, path) != ('loss.teacher', 'store')
    },
  )
  command_lib.start_jax(cfg)
  from mtp_jax.cli import progress
  from mtp_jax.parallel import distributed
  from mtp_jax.train import loop

  return distributed.run(cfg, lambda: loop.train(cfg, progress.bar))
