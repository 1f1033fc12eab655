"""Checkpoints: the state, and what one must know to go on from it.

Floor 3; the only file that imports orbax. Each lies in WORKDIR/checkpoints/STEP
and appears by a rename when it is complete, so that a save that was cut off
leaves none. A checkpoint restores onto any mesh: the target's shardings say
where each shard goes.
"""

import contextlib
import dataclasses
import json
import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from mtp_jax import config, flags
from mtp_jax import params as params_lib
from mtp_jax.model import lm

FORMAT = 1  # raised when a saved state can no longer be read as it is


def manager(workdir: str, cfg: config.Config) -> ocp.CheckpointManager:
  """Asynchronous; keeps the last --train.keep_last and each keep_every-th."""
  return ocp.CheckpointManager(
    _folder(workdir),
    options=ocp.CheckpointManagerOptions(
      max_to_keep=cfg.train.keep_last,
      keep_period=cfg.train.keep_every or None,
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,  # what a killed save left behind
    ),
  )


def _folder(workdir: str) -> str:
  return os.path.join(os.path.abspath(workdir), 'checkpoints')


def save(
  to: ocp.CheckpointManager, step: int, state: Any, cfg: config.Config,
  store: str,
) -> None:  # fmt: skip
  """Starts to save the state; returns before it is done.

  Every process of a run calls it, as it does `restore` and `restore_params`:
  each writes the shards of its devices, process 0 the rest.

  Args:
    to: a manager.
    step: the state's step, under which it is filed.
    state: the State; may be donated as soon as this returns.
    cfg: what the state was trained with.
    store: fingerprint of the token store. The position in it is step x
      batch_size, hence not saved.
  """
  about = dict(
    format=FORMAT, config=json.loads(config.to_json(cfg)), store=store
  )
  with jax.transfer_guard('allow'):  # orbax copies to the host
    to.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
      ),
    )


def write_definition(cfg, tokenizer, workdir: str) -> None:
  """What the run is, and the files of its tokenizer, if it has one: a
  checkpoint can be used where the store is not."""
  files = {
    'run.flags': flags.to_flag_file(cfg).encode(),
    'config.json': config.to_json(cfg).encode(),
  }
  for name, data in (tokenizer.files if tokenizer else {}).items():
    files[os.path.join('tokenizer', name)] = data
  for name, data in files.items():
    path = os.path.join(workdir, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + '.tmp', 'wb') as f:
      f.write(data)
    os.replace(path + '.tmp', path)


def save_params(
  params: Any, cfg: config.Config, tokenizer, workdir: str
) -> None:
  """Step 0 of a workdir, without an optimizer's state: what an import gives.
  `restore_params` reads it, and a run begins with it."""
  write_definition(cfg, tokenizer, workdir)
  with contextlib.closing(manager(workdir, cfg)) as to:
    save(to, 0, dict(params=params), cfg, store='')
    to.wait_until_finished()


def steps(workdir: str) -> list[int]:
  """Steps of the complete checkpoints, oldest first."""
  try:
    names = os.listdir(_folder(workdir))
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted(int(name) for name in names if name.isdigit())


def find(path: str, flag: str = 'eval.checkpoint') -> tuple[str, int]:
  """A workdir, its newest checkpoint; or WORKDIR/checkpoints/STEP itself.

  Returns:
    (workdir, step), or raises ConfigError that names the flag.
  """
  folder, name = os.path.split(os.path.abspath(path))
  if os.path.basename(folder) == 'checkpoints' and name.isdigit():
    workdir, wanted = os.path.dirname(folder), int(name)
  else:
    workdir, wanted = path, None
  there = steps(workdir)
  if not there or (wanted is not None and wanted not in there):
    why = ''
    if there:
      why = f'; there are {there} in {workdir}'
    elif not os.path.isdir(path):
      why = ', which is no directory'
    raise config.ConfigError(flag, path, f'no complete checkpoint there{why}')
  return workdir, there[-1] if wanted is None else wanted


@contextlib.contextmanager
def _reading(path: str, flag: str = 'train.workdir'):
  """What orbax and tensorstore raise for a broken file, as one line."""
  try:
    yield
  except Exception as error:  # orbax raises just that for a damaged array
    first = (str(error).strip() or repr(error)).splitlines()[0][:300]
    raise config.ConfigError(
      flag, path, f'cannot be read as a checkpoint: {first}'
    ) from error


def about(
  workdir: str, step: int, flag: str = 'train.workdir'
) -> tuple[config.Config, str]:
  """(Config, store fingerprint) of a checkpoint; waits for no other process."""
  path = os.path.join(_folder(workdir), str(step))
  me = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}
  )
  with _reading(path, flag):
    with ocp.Checkpointer(
      ocp.JsonCheckpointHandler(), multiprocessing_options=alone
    ) as reader:
      saved = reader.restore(os.path.join(path, 'about'))
  if saved['format'] != FORMAT:
    raise config.ConfigError(
      'train.workdir', workdir,
      f'checkpoint {step} has format {saved["format"]}, this program reads'
      f' {FORMAT}',
    )  # fmt: skip
  return config.from_json(json.dumps(saved['config'])), saved['store']


def opened(
  path: str, flag: str, parsed: flags.Parsed, elsewhere: dict | None = None
) -> tuple[str, int, config.Config, config.Config]:
  """(workdir, step, its Config, the same with the flags that are given).

  Flags may say otherwise for how something is computed, not for what the
  parameters are.

  Args:
    path: as `find` takes it.
    flag: that gave it.
    parsed: the command line.
    elsewhere: fields that the saved Config does not decide.

  Raises:
    ConfigError: no checkpoint, a flag that contradicts it.
  """
  workdir, step = find(path, flag)
  saved, _ = about(workdir, step, flag)
  # Where and beside what it was trained is no matter any more.
  base = dataclasses.replace(
    saved, processes=config.Processes(), decode=config.Decode(),
    bench=config.Bench(), plan=config.Plan(), export=config.Export(),
  )  # fmt: skip
  cfg = parsed.config(config.replace(base, **elsewhere or {}))
  other_tree = bool(saved.loss.order_weight) != bool(cfg.loss.order_weight)
  for name, was, now in config.changed(saved, cfg):
    if is_of_model(name) or (name == 'loss.order_weight' and other_tree):
      raise config.ConfigError(
        name, now, f'the checkpoint {path} was trained with {was}'
      )
  return workdir, step, saved, cfg


def is_of_model(name: str) -> bool:
  """Whether a field decides what parameters there are, or what they mean; the
  curriculum says which heads trained."""
  return name.startswith(
    ('model.', 'heads.', 'loss.curriculum')
  ) and name not in ('model.compute_dtype', 'model.remat')


def restore(workdir: str, step: int, abstract_state: Any) -> Any:
  """The saved state, each leaf sharded like its abstract counterpart."""
  path = os.path.join(_folder(workdir), str(step))
  with _reading(path):
    with ocp.StandardCheckpointer() as reader:
      return reader.restore(os.path.join(path, 'state'), abstract_state)


def restore_model(
  workdir: str, step: int, cfg: config.Config, mesh, flag: str
) -> lm.LM:
  """`restore_params` for the model of a Config, on a mesh."""
  abstract = params_lib.abstract(lm.specs(cfg), cfg.model.param_dtype, mesh)
  return restore_params(workdir, step, abstract, flag)


def restore_params(
  workdir: str, step: int, abstract_params: Any, flag: str = 'train.workdir'
) -> Any:
  """The parameters alone; the optimizer state is not read."""
  path = os.path.join(_folder(workdir), str(step))
  target = dict(params=abstract_params)
  with _reading(path, flag):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      return reader.restore(
        os.path.join(path, 'state'),
        args=ocp.args.PyTreeRestore(
          item=target,
          restore_args=jax.tree.map(
            lambda x: ocp.ArrayRestoreArgs(
              sharding=x.sharding, dtype=x.dtype, global_shape=x.shape
            ),
            target,
          ),
          partial_restore=True,
        ),
      )['params']
