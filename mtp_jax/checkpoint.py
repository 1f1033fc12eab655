"""Checkpoints: the state, and what one must know to go on from it.

Floor 3; the only file that imports orbax and tensorstore. Each lies in
WORKDIR/checkpoints/STEP and appears by a rename when it is complete, so that a
save that was cut off leaves none. A manifest of its files follows, by which a
reader knows that they are still what was saved. A checkpoint restores onto any
mesh: the target's shardings say where each shard goes. In a bucket (gs://…)
nothing is renamed: a file MARK says that a checkpoint is complete.
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from mtp_jax import config, flags, jsonl, manifest, paths, processes, validate
from mtp_jax import params as params_lib
from mtp_jax.model import lm

MARK = 'commit_success.txt'  # in a bucket, of a complete one
FORMAT = 1  # raised when a saved state can no longer be read as it is
ABOUT = {
  'format': int,
  'config': {...: object},
  'store': str,
  'left_out?': [[jsonl.NATURAL]],
  'spikes?': {'losses?': [float], 'pending?': [[jsonl.NUMBER]]},
}


class Saver:
  """Saves while a run goes on, in threads; keeps the last --train.keep_last and
  each keep_every-th.

  A checkpoint counts as saved once it was opened again where it lies: a library
  may write what it then cannot find, e.g. below a folder whose name it takes
  for a pattern.
  A save that fails, say on a full disk, is told in one line. It leaves nothing
  behind, what was saved before stays, and the next one is tried at its turn.
  """

  def __init__(self, workdir: str, cfg: config.Config):
    self.failed: tuple[int, str] | None = None  # the newest save's step, why
    self._workdir, self._folder = workdir, _folder(workdir)
    self._saving: int | None = None  # the step
    self._following: threading.Thread | None = None
    self._options = ocp.CheckpointManagerOptions(
      preservation_policy=_Kept(cfg.train),
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,  # what a killed save left behind
      async_options=ocp.AsyncOptions(barrier_sync_fn=_meet),
    )
    self._orbax = self._manager()
    _tell_failures_once()

  def _manager(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(self._folder, options=self._options)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def save(self, step: int, args: ocp.args.CheckpointArgs) -> float:
    """Starts a save; returns the seconds that it held up the caller, those
    included in which the one before was not yet done."""
    begin = time.perf_counter()
    self.wait_until_finished()
    self.failed, self._saving = None, step
    try:
      self._orbax = self._orbax or self._manager()
      with jax.transfer_guard('allow'):  # orbax copies to the host
        self._orbax.save(step, args=args)
    except OSError as error:
      if jax.process_count() > 1:
        raise  # the others are waiting for this one within orbax
      self._tell(step, error)
    else:
      self._following = threading.Thread(target=self._follow, args=(step,))
      self._following.start()
    return time.perf_counter() - begin

  def _follow(self, step: int) -> None:
    try:
      self._orbax.wait_until_finished()
    except Exception as error:  # of tensorstore: of any class
      self._tell(step, error)
      return
    # If a kill leaves it without a manifest it is used all the same where it
    # can be opened, only that damage within arrays is not noticed.
    if processes.first():
      why = unreadable(self._folder / str(step))
      if why:
        self._tell(step, OSError(f'it was written, but {why}'))
        with contextlib.suppress(OSError):
          set_aside(self._workdir, step, 'unreadable')
        return
      try:
        manifest.write(self._folder / str(step))
      except Exception as error:  # of a bucket: of any class
        _say(f'checkpoint {step} has no manifest: {_why(error)}')

  def _tell(self, step: int, error: Exception) -> None:
    self.failed = step, _why(error)
    _say(f'checkpoint {step} could not be saved: {self.failed[1]}; those before it stay')
    self._sweep()

  def _sweep(self) -> None:
    """Removes what a failed save has written; its threads may still be at it,
    and make folders anew."""
    for _ in range(20 if processes.first() else 0):
      left = list(ocp.path.step.all_temporary_paths(self._folder))
      if not left:
        return
      for path in left:
        with contextlib.suppress(OSError):
          path.get().rmtree()
      time.sleep(0.1)

  def wait_until_finished(self) -> None:
    """Until the last save has its manifest, or has failed; all processes must
    call it, and all then know whether one has failed."""
    if self._saving is None:
      return
    self._join()
    step, self._saving = self._saving, None
    try:
      with processes.together():
        if self.failed:
          raise OSError
    except OSError:
      pass
    except processes.Ended:
      self.failed = self.failed or (step, 'another process could not do it')
    if self.failed:
      self._sweep()
      # It keeps errors, to raise them at the next save, and has forgotten the
      # checkpoints that this one was to replace: the next save gets another.
      self._orbax = None

  def _join(self) -> None:
    if self._following:
      self._following.join()
      self._following = None

  def check(self) -> None:
    """Raises ConfigError if the last save, which is over, has failed."""
    if self.failed:
      step, why = self.failed
      there = steps(self._workdir)
      raise config.ConfigError(
        'train.workdir',
        self._workdir,
        f'checkpoint {step} could not be saved: {why}; the newest there is'
        f' {there[-1] if there else "none"}',
      )

  def close(self) -> None:
    """Waits for this process's part of the save; the others may have ended."""
    self._join()
    if self.failed:
      self._sweep()
    elif self._orbax:
      self._orbax.close()


def is_at_cadence(step: int, t: config.Train) -> bool:
  """Whether a run saves after so many steps by itself, not for a signal."""
  return step % (t.checkpoint_every or t.steps) == 0


class _Kept:
  """Which checkpoints stay: the newest --train.keep_last, at least two, since
  older ones go once the newest is written, before it was opened again; each
  keep_every-th; and where a rollback may go, which no number of interruptions,
  each with a checkpoint of its own, may push out: of the newest at the run's
  cadence one more than may hold a spike, which is known two steps later; and
  step 0, if it was imported."""

  def __init__(self, t: config.Train):
    self._t = t

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    t, steps = self._t, sorted(c.step for c in checkpoints)
    kept = {*steps[-max(t.keep_last, 2) :]}
    kept |= {s for s in steps if t.keep_every and s % t.keep_every == 0}
    if t.skip_batches:
      most = 3 if t.checkpoint_every == 1 else 2
      kept |= {0, *[s for s in steps if s and is_at_cadence(s, t)][-most:]}
    return [c.step in kept for c in checkpoints]


_meetings = itertools.count()  # all processes have as many


def _meet(*, key: str, timeout_ms: int) -> None:
  """orbax's threads wait here for those of the other processes. One whose part
  has failed is already waiting for the end of the save: the others, who would
  wait for it until it is too late, learn it and fail as well."""
  if jax.process_count() == 1:
    return
  client = ocp.multihost.get_jax_distributed_client()
  while True:
    number = next(_meetings)
    mine = f'mtp_save/{{}}/{jax.process_index()}'
    client.key_value_set(mine.format(number), key)
    client.wait_at_barrier(f'mtp_save_{number}', timeout_ms)
    keys = {k for _, k in client.key_value_dir_get(f'mtp_save/{number}/')}
    if number:  # which all have read, since they are here
      client.key_value_delete(mine.format(number - 1))
    if len(keys) == 1:
      return
    ends = {k: 'set_value' in k for k in keys}
    if not ends[key] or all(ends.values()):
      raise OSError('another process could not write its part')


def _say(line: str) -> None:
  to = sys.stdout if processes.first() else sys.stderr  # others have no stdout
  with contextlib.suppress(OSError):  # it may be on the full disk
    print(line, file=to, flush=True)


def _why(error: Exception) -> str:
  """In a few words; tensorstore's are a paragraph."""
  if os.strerror(errno.ENOSPC) in str(error):
    return 'no space left on the device'
  return paths.first_line(error)


@functools.cache
def _tell_failures_once() -> None:
  """A save that fails is a line. Without this some hundred follow it, some of
  them only when the process ends: from orbax, from what it had begun to await,
  and from tensorstore's threads, whom nobody hears any more."""

  def is_new(record):
    of = 'orbax' in record.pathname or 'never retrieved' in record.msg
    return not (of and record.levelno >= logging.ERROR)

  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(is_new)
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
  hook = sys.unraisablehook

  def unraisable(what):
    if str(what.exc_value) != 'Event loop is closed':
      hook(what)

  sys.unraisablehook = unraisable


def _folder(workdir: str) -> epath.Path:
  return paths.of(workdir) / 'checkpoints'


def save(
  to: Saver,
  step: int,
  state: Any,
  cfg: config.Config,
  store: str,
  left_out=(),
  spikes: dict | None = None,
) -> float:
  """Starts to save the state; returns before it is done.

  Every process of a run calls it, as it does `restore` and `restore_params`:
  each writes the shards of its devices, process 0 the rest.

  Args:
    to: a Saver.
    step: the state's step, under which it is filed.
    state: the State; may be donated as soon as this returns.
    cfg: what the state was trained with.
    store: fingerprint of the token store. The position in it is step x
      batch_size, hence not saved,
    left_out: but for the batches that no step reads.
    spikes: what the detector of loss spikes remembers, as JSON has it.

  Returns:
    Seconds for which it held up the caller.
  """
  about = dict(
    format=FORMAT,
    config=json.loads(config.to_json(cfg)),
    store=store,
    left_out=left_out,
    spikes=spikes or {},
  )
  args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
  return to.save(step, args)


def check_workdir(workdir: str) -> None:
  """Raises ConfigError if checkpoints could be written there but not merged:
  orbax finds the parts of one by a pattern into which it puts the path as it
  is, so that [1] is looked for as 1, and * also finds those of other runs."""
  found = sorted({*'*?[]'} & {*str(workdir)})
  if found:
    raise config.ConfigError(
      'train.workdir',
      workdir,
      f'no path of checkpoints may have {" ".join(found)} in it, which their'
      ' library reads as a pattern',
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
    path = paths.of(workdir) / name
    paths.make_folder(path.parent)
    paths.write(path, data)


def save_params(params: Any, cfg: config.Config, tokenizer, workdir: str) -> None:
  """Step 0 of a workdir, without an optimizer's state: what an import gives.
  `restore_params` reads it, and a run begins with it."""
  write_definition(cfg, tokenizer, workdir)
  with contextlib.closing(Saver(workdir, cfg)) as to:
    save(to, 0, dict(params=params), cfg, store='')
    to.wait_until_finished()
    to.check()


def unreadable(path: epath.Path, whole: bool = False) -> str:
  """What of a checkpoint cannot be opened, its metadata or the headers of its
  arrays; empty if it can. Cheap: no array is read, unless the whole is asked
  for."""
  _tell_failures_once()
  why = ''
  for pause_s in (0, 1, 4) if paths.scheme(path) else (0,):  # a network fails
    time.sleep(pause_s)
    try:
      _read_about(path)
      handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
      handler.metadata(path / 'state')
      if whole:
        _read_arrays(path / 'state')
    except Exception as error:  # of orbax and tensorstore: of any class
      why = f'cannot be opened: {paths.first_line(error)[:160]}'
    else:
      return ''
  return why


def _read_arrays(path: epath.Path) -> None:
  """Whether all arrays of a saved state can be read, chunk by chunk."""
  for file in (path / 'array_metadatas').iterdir():
    json.loads(file.read_text())
  folder = f'{path}/'
  base = folder if paths.scheme(path) else dict(driver='file', path=folder)
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


def _alone():
  """For a reader of this process alone; orbax would wait for the others."""
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def _damage(path: epath.Path) -> str:
  """What is wrong with it. Without a manifest, as a kill between save and
  manifest leaves it, or a copy that broke off, all of it is read once."""
  if (path / manifest.NAME).exists():
    return manifest.damage(path)
  return unreadable(path, whole=True)


def steps(workdir: str) -> list[int]:
  """Steps of the complete checkpoints, oldest first."""
  try:
    paths = list(_folder(workdir).iterdir())
  except (FileNotFoundError, NotADirectoryError):
    return []
  # Where nothing can be renamed, as in a bucket, a file says that it is.
  names = [p.name for p in paths if ocp.path.step.is_path_finalized(p)]
  return sorted(int(name) for name in names if name.isdigit())


def find(path: str, flag: str = 'eval.checkpoint') -> tuple[str, int]:
  """A workdir, its newest checkpoint; or WORKDIR/checkpoints/STEP itself.

  Returns:
    (workdir, step), or raises ConfigError that names the flag.
  """
  asked = paths.of(path)
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
    raise config.ConfigError(flag, path, f'no complete checkpoint there{why}')
  return workdir, there[-1] if wanted is None else wanted


def verify(workdir: str, step: int, flag: str) -> None:
  """Raises ConfigError unless the files are as they were saved.

  It reads them all, a block at a time: once a run, hence of several processes
  only the first one calls it.
  """
  path = _folder(workdir) / str(step)
  why = _damage(path)
  if why:
    raise config.ConfigError(flag, str(path), f'is damaged: {why}')


def newest_good(
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
    why = _damage(_folder(workdir) / str(step))
    if not why:
      return step, damaged
    damaged.append((step, why))
  if damaged:
    raise config.ConfigError(
      'train.workdir',
      workdir,
      'all of its checkpoints are damaged: ' + '; '.join(f'{step}: {why}' for step, why in damaged),
    )
  return None, []


def set_aside(workdir: str, step: int, why: str = 'damaged') -> str:
  """Renames a checkpoint, so that its step can be saved again; returns its
  name."""
  folder = _folder(workdir)
  names = {path.name for path in folder.iterdir()}
  number, name = 1, f'{step}.{why}'
  while name in names:
    number += 1
    name = f'{step}.{why}{number}'
  # A bucket moves file by file: no longer complete, before some are elsewhere.
  mark = folder / str(step) / MARK
  text = mark.read_text() if mark.exists() else ''
  mark.unlink(missing_ok=True)
  (folder / str(step)).rename(folder / name)
  if text:  # or orbax would take it for a save that was cut off
    (folder / name / MARK).write_text(text)
  return name


@contextlib.contextmanager
def _reading(path: epath.Path, flag: str = 'train.workdir'):
  """What orbax and tensorstore raise for a broken file, as one line."""
  try:
    yield
  except Exception as error:  # orbax raises just that for a damaged array
    raise config.ConfigError(
      flag, str(path), f'cannot be read as a checkpoint: {paths.first_line(error)}'
    ) from error


def about(workdir: str, step: int, flag: str = 'train.workdir') -> tuple[config.Config, str]:
  """(Config, store fingerprint) of a checkpoint; waits for no other process."""
  saved = _about(workdir, step, flag)
  try:
    cfg = validate.validate(config.from_json(json.dumps(saved['config'])))
  except ValueError as error:
    raise _unreadable(workdir, step, flag, error) from error
  return cfg, saved['store']


def _unreadable(workdir, step, flag, why) -> config.ConfigError:
  path = _folder(workdir) / str(step)
  return config.ConfigError(flag, str(path), f'cannot be read as a checkpoint: about: {why}')


def left_out(workdir: str, step: int) -> tuple[tuple[int, int], ...]:
  """The batches that its run has left out."""
  saved = _about(workdir, step, 'train.workdir').get('left_out', ())
  return tuple((first, count) for first, count in saved)


def spikes(workdir: str, step: int) -> dict:
  """What the detector of loss spikes remembered, as it was given to `save`."""
  return _about(workdir, step, 'train.workdir').get('spikes', {})


def _read_about(path: epath.Path) -> dict:
  with ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=_alone()) as reader:
    return reader.restore(path / 'about')


def _about(workdir: str, step: int, flag: str) -> dict:
  path = _folder(workdir) / str(step)
  with _reading(path, flag):
    saved = _read_about(path)
  try:
    jsonl.check(saved, {'format': int, ...: object})
    if saved['format'] != FORMAT:
      raise ValueError(f'format {saved["format"]}, this program reads {FORMAT}')
    jsonl.check(saved, ABOUT)
    if any(len(pair) != 2 for pair in saved.get('left_out', ())):
      raise ValueError('left_out must be pairs: first batch, count')
    return saved
  except ValueError as error:
    raise _unreadable(workdir, step, flag, error) from error


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
    ConfigError: no checkpoint, a damaged one, a flag that contradicts it.
  """
  workdir, step = find(path, flag)
  if processes.first():
    verify(workdir, step, flag)
  saved, _ = about(workdir, step, flag)
  # Where and beside what it was trained is no matter any more.
  base = dataclasses.replace(
    saved,
    processes=config.Processes(),
    decode=config.Decode(),
    bench=config.Bench(),
    plan=config.Plan(),
    export=config.Export(),
  )
  cfg = parsed.config(config.replace(base, **elsewhere or {}))
  other_tree = bool(saved.loss.order_weight) != bool(cfg.loss.order_weight)
  for name, was, now in config.changed(saved, cfg):
    if is_of_model(name) or (name == 'loss.order_weight' and other_tree):
      raise config.ConfigError(name, now, f'the checkpoint {path} was trained with {was}')
  return workdir, step, saved, cfg


def is_of_model(name: str) -> bool:
  """Whether a field decides what parameters there are, or what they mean; the
  curriculum says which heads trained."""
  return name.startswith(('model.', 'heads.', 'loss.curriculum')) and name not in (
    'model.compute_dtype',
    'model.remat',
  )


def restore(workdir: str, step: int, abstract_state: Any) -> Any:
  """The saved state, each leaf sharded like its abstract counterpart."""
  path = _folder(workdir) / str(step)
  with _reading(path):
    with ocp.StandardCheckpointer() as reader:
      return reader.restore(path / 'state', abstract_state)


def restore_model(workdir: str, step: int, cfg: config.Config, mesh, flag: str) -> lm.LM:
  """`restore_params` for the model of a Config, on a mesh."""
  abstract = params_lib.abstract(lm.specs(cfg), cfg.model.param_dtype, mesh)
  return restore_params(workdir, step, abstract, flag)


def restore_params(
  workdir: str, step: int, abstract_params: Any, flag: str = 'train.workdir'
) -> Any:
  """The parameters alone; the optimizer state is not read."""
  path = _folder(workdir) / str(step)
  target = dict(params=abstract_params)
  with _reading(path, flag):
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
