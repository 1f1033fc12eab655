"""Finding, verifying, quarantining and reading checkpoints."""

import itertools
import json
import time
from collections.abc import Callable
from typing import Any, cast

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
  """Returns why a checkpoint cannot be opened: its metadata, or the headers of its
  arrays; '' if it can. Array data is read only with `whole`."""
  metadata.log_failures_once()
  why = ''
  for pause_s in (0, 1, 4) if paths_lib.scheme(path) else (0,):  # retries for network failures
    time.sleep(pause_s)
    try:
      metadata.read_item(path)
      handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=metadata.this_process_only())
      handler.metadata(path / 'state')
      if whole:
        _read_arrays(path / 'state')
    except Exception as error:  # orbax and tensorstore raise any class
      why = f'cannot be opened: {paths_lib.first_line(error)[:160]}'
    else:
      return ''
  return why


def _read_arrays(path: epath.Path) -> None:
  """Reads all arrays of a saved state chunk by chunk; raises if one is corrupt."""
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
      sizes = cast(tuple[int, ...], array.chunk_layout.read_chunk.shape or ())
      for start in itertools.product(
        *(range(0, n, size) for n, size in zip(array.shape, sizes, strict=True))
      ):
        piece = zip(start, sizes, array.shape, strict=True)
        array[tuple(slice(i, min(i + size, n)) for i, size, n in piece)].read().result()


def _corruption(path: epath.Path) -> str:
  """Returns why a checkpoint is corrupt, '' if it is valid. Without a manifest (a
  kill before it was written, an incomplete copy) all arrays are read once."""
  if (path / manifest.NAME).exists():
    return manifest.problem(path)
  return open_problem(path, whole=True)


def steps(workdir: str) -> list[int]:
  """Returns the steps of the complete checkpoints, oldest first."""
  try:
    paths = list(metadata.folder(workdir).iterdir())
  except (FileNotFoundError, NotADirectoryError):
    return []
  # Buckets have no atomic rename: a marker file completes a checkpoint there.
  names = [p.name for p in paths if ocp.path.step.is_path_finalized(p)]
  return sorted(int(name) for name in names if name.isdigit())


def find(path: str) -> tuple[str, int]:
  """Resolves a workdir to its newest checkpoint, or WORKDIR/checkpoints/STEP to
  that one.

  Returns:
    (workdir, step).

  Raises:
    InputError: there is no complete checkpoint.
  """
  given = paths_lib.as_path(path)
  workdir, wanted, there = path, None, steps(path)
  # A workdir may have such a name as well.
  if not there and given.parent.name == 'checkpoints' and given.name.isdigit():
    workdir, wanted = str(given.parent.parent), int(given.name)
    there = steps(workdir)
  if not there or (wanted is not None and wanted not in there):
    why = ''
    if there:
      why = f'; there are {there} in {workdir}'
    elif not given.is_dir():
      why = ', which is not a directory'
    raise paths_lib.InputError(path, f'no complete checkpoint there{why}')
  return workdir, there[-1] if wanted is None else wanted


def verify(workdir: str, step: int) -> None:
  """Raises InputError if a checkpoint is corrupt.

  Reads all of its files, so that only the primary process of a run calls it.
  """
  path = metadata.folder(workdir) / str(step)
  why = _corruption(path)
  if why:
    raise paths_lib.InputError(path, f'is corrupt: {why}')


def latest_valid_step(
  workdir: str, suits: Callable[[int], bool] = lambda step: True
) -> tuple[int | None, list[tuple[int, str]]]:
  """Finds the checkpoint that a run resumes from; reads files as `verify` does.

  suits: step -> whether to consider it.

  Returns:
    (step of the newest valid checkpoint, None if there is no checkpoint;
    (step, reason) of each newer, corrupt one).

  Raises:
    ConfigError: there are checkpoints, and all are corrupt.
  """
  corrupt = []
  for step in reversed([s for s in steps(workdir) if suits(s)]):
    why = _corruption(metadata.folder(workdir) / str(step))
    if not why:
      return step, corrupt
    corrupt.append((step, why))
  if corrupt:
    raise fields.ConfigError(
      'train.workdir',
      workdir,
      'all of its checkpoints are corrupt: ' + '; '.join(f'{step}: {why}' for step, why in corrupt),
    )
  return None, []


def quarantine(workdir: str, step: int, why: str = 'corrupt') -> str:
  """Renames a checkpoint to STEP.WHY, so that its step can be saved again; returns
  the new name."""
  folder = metadata.folder(workdir)
  names = {path.name for path in folder.iterdir()}
  number, name = 1, f'{step}.{why}'
  while name in names:
    number += 1
    name = f'{step}.{why}{number}'
  # A bucket moves file by file: mark it incomplete first.
  mark = folder / str(step) / metadata.MARK
  text = mark.read_text() if mark.exists() else ''
  mark.unlink(missing_ok=True)
  (folder / str(step)).rename(folder / name)
  if text:  # or orbax would consider it an interrupted save
    (folder / name / metadata.MARK).write_text(text)
  return name


def is_of_model(name: str) -> bool:
  """Whether a field determines the parameters or their meaning; the curriculum
  determines which heads trained."""
  return name.startswith(('model.', 'heads.', 'loss.curriculum')) and name not in (
    'model.compute_dtype',
    'model.remat',
    'heads.isolated',
    'heads.mix_hidden_states',
  )


def restore(workdir: str, step: int, abstract_state: Any) -> Any:
  """Restores the saved state, each leaf sharded like its abstract counterpart."""
  path = metadata.folder(workdir) / str(step)
  with metadata.reading(path):
    with ocp.StandardCheckpointer() as reader:
      saved = reader.restore(path / 'state', lm.without_unused(abstract_state))
  return lm.with_unused(saved, abstract_state)


def restore_model(workdir: str, step: int, cfg: schema.Config, mesh) -> lm.LM:
  """Restores the parameters of a Config's model onto a mesh."""
  abstract = params_lib.abstract(lm.specs(cfg), cfg.model.param_dtype, mesh)
  return restore_params(workdir, step, abstract)


def restore_params(workdir: str, step: int, abstract_params: Any) -> Any:
  """Restores the parameters alone; the optimizer state is not read."""
  path = metadata.folder(workdir) / str(step)
  target = dict(params=lm.without_unused(abstract_params))
  with metadata.reading(path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      saved = reader.restore(
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
  return lm.with_unused(saved, abstract_params)
