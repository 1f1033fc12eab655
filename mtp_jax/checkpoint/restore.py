"""TODO of mtp_jax.checkpoint."""

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from mtp_jax.checkpoint import manifest, metadata
from mtp_jax.config import fields, schema
from mtp_jax.io import paths as paths_lib
from mtp_jax.model import lm
from mtp_jax.model import params as params_lib


def open_problem(path: epath.Path, whole: bool = False) -> str:
  """What of a checkpoint cannot be opened, its metadata or the headers of its
  arrays; empty if it can. Cheap: no array is read, unless the whole is asked
  for."""
  metadata.log_failures_once()
  why = ''
  for pause_s in (0, 1, 4) if paths_lib.scheme(path) else (0,):  # a network fails
    time.sleep(pause_s)
    try:
      metadata.read_item(path)
      handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=metadata.this_process_only())
      handler.metadata(path / 'state')
      if whole:
        _read_arrays(path / 'state')
    except Exception as error:  # of orbax and tensorstore: of any class
      why = f'cannot be opened: {paths_lib.first_line(error)[:160]}'
    else:
      return ''
  return why


def _read_arrays(path: epath.Path) -> None:
  """Whether all arrays of a saved state can be read, chunk by chunk."""
  for file in (path / 'array_metadatas').iterdir():
    json.loads(file.read_text())
  folder = f'{path}/'
  base = folder if paths_lib.scheme(path) else dict(driver='file', path=folder)
  store = dict(driver='ocdbt', base=base)
  for key in ts.KvStore.open(store).result().list().result():
    name = key.decode()
    if name.endswith('/.zarray'):
      at = store | dict(path=name.removesuffix('.zarray'))
      array = ts.open(dict(driver='zarr', kvstore=at), read=True).result()
      sizes = array.chunk_layout.read_chunk.shape or ()
      for start in itertools.product(
        *(range(0, n, size) for n, size in zip(array.shape, sizes, strict=True))
      ):
        piece = zip(start, sizes, array.shape, strict=True)
        array[tuple(slice(i, min(i + size, n)) for i, size, n in piece)].read().result()


def _corruption(path: epath.Path) -> str:
  """What is wrong with it. Without a manifest, as a kill between save and
  manifest leaves it, or a copy that broke off, all of it is read once."""
  if (path / manifest.NAME).exists():
    return manifest.damage(path)
  return open_problem(path, whole=True)


def steps(workdir: str) -> list[int]:
  """Steps of the complete checkpoints, oldest first."""
  try:
    paths = list(metadata.folder(workdir).iterdir())
  except (FileNotFoundError, NotADirectoryError):
    return []
  # Where nothing can be renamed, as in a bucket, a file says that it is.
  names = [p.name for p in paths if ocp.path.step.is_path_finalized(p)]
  return sorted(int(name) for name in names if name.isdigit())


def find(path: str) -> tuple[str, int]:
  """A workdir, its newest checkpoint; or WORKDIR/checkpoints/STEP itself.

  Returns:
    (workdir, step).

  Raises:
    InputError: there is no complete checkpoint.
  """
  asked = paths_lib.as_path(path)
  workdir, wanted, there = path, None, steps(path)
  # A workdir may be called so as well.
  if not there and asked.parent.name == 'checkpoints' and asked.name.isdigit():
    workdir, wanted = str(asked.parent.parent), int(asked.name)
    there = steps(workdir)
  if not there or (wanted is not None and wanted not in there):
    why = ''
    if there:
      why = f'; there are {there} in {workdir}'
    elif not asked.is_dir():
      why = ', which is no directory'
    raise paths_lib.InputError(path, f'no complete checkpoint there{why}')
  return workdir, there[-1] if wanted is None else wanted


def verify(workdir: str, step: int) -> None:
  """Raises ConfigError unless the files are as they were saved.

  It reads them all, a block at a time: once a run, hence of several processes
  only the first one calls it.
  """
  path = metadata.folder(workdir) / str(step)
  why = _corruption(path)
  if why:
    raise paths_lib.InputError(path, f'is damaged: {why}')


def latest_valid_step(
  workdir: str, suits: Callable[[int], bool] = lambda step: True
) -> tuple[int | None, list[tuple[int, str]]]:
  """What a run goes on from; reads files as `verify` does.

  suits: steps that are looked at.

  Returns:
    (step of the newest checkpoint that is not damaged, None if there is no
    checkpoint; (step, what is wrong) of each that is newer).

  Raises:
    ConfigError: there are some, all of them damaged.
  """
  damaged = []
  for step in reversed([s for s in steps(workdir) if suits(s)]):
    why = _corruption(metadata.folder(workdir) / str(step))
    if not why:
      return step, damaged
    damaged.append((step, why))
  if damaged:
    raise fields.ConfigError(
      'train.workdir',
      workdir,
      'all of its checkpoints are damaged: ' + '; '.join(f'{step}: {why}' for step, why in damaged),
    )
  return None, []


def quarantine(workdir: str, step: int, why: str = 'damaged') -> str:
  """Renames a checkpoint, so that its step can be saved again; returns its
  name."""
  folder = metadata.folder(workdir)
  names = {path.name for path in folder.iterdir()}
  number, name = 1, f'{step}.{why}'
  while name in names:
    number += 1
    name = f'{step}.{why}{number}'
  # A bucket moves file by file: no longer complete, before some are elsewhere.
  mark = folder / str(step) / metadata.MARK
  text = mark.read_text() if mark.exists() else ''
  mark.unlink(missing_ok=True)
  (folder / str(step)).rename(folder / name)
  if text:  # or orbax would take it for a save that was cut off
    (folder / name / metadata.MARK).write_text(text)
  return name


def is_of_model(name: str) -> bool:
  """Whether a field decides what parameters there are, or what they mean; the
  curriculum says which heads trained."""
  return name.startswith(('model.', 'heads.', 'loss.curriculum')) and name not in (
    'model.compute_dtype',
    'model.remat',
  )


def restore(workdir: str, step: int, abstract_state: Any) -> Any:
  """The saved state, each leaf sharded like its abstract counterpart."""
  path = metadata.folder(workdir) / str(step)
  with metadata.reading(path):
    with ocp.StandardCheckpointer() as reader:
      return reader.restore(path / 'state', abstract_state)


def restore_model(workdir: str, step: int, cfg: schema.Config, mesh) -> lm.LM:
  """`restore_params` for the model of a Config, on a mesh."""
  abstract = params_lib.abstract(lm.specs(cfg), cfg.model.param_dtype, mesh)
  return restore_params(workdir, step, abstract)


def restore_params(workdir: str, step: int, abstract_params: Any) -> Any:
  """The parameters alone; the optimizer state is not read."""
  path = metadata.folder(workdir) / str(step)
  target = dict(params=abstract_params)
  with metadata.reading(path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      return reader.restore(
        path / 'state',
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
