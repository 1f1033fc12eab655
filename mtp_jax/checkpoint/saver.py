"""TODO of mtp_jax.checkpoint."""

import contextlib
import errno
import itertools
import json
import os
import sys
import threading
import time
from typing import Any

import jax
import orbax.checkpoint as ocp

from mtp_jax.checkpoint import manifest, metadata
from mtp_jax.checkpoint import restore as restore_lib
from mtp_jax.config import fields, parse, schema
from mtp_jax.io import paths as paths_lib
from mtp_jax.parallel import distributed


class Saver:
  """Saves while a run goes on, in threads; keeps the last --train.max_to_keep and
  each keep_every-th.

  A checkpoint counts as saved once it was opened again where it lies: a library
  may write what it then cannot find, e.g. below a folder whose name it takes
  for a pattern.
  A save that fails, say on a full disk, is told in one line. It leaves nothing
  behind, what was saved before stays, and the next one is tried at its turn.
  """

  def __init__(self, workdir: str, cfg: schema.Config):
    self.failed: tuple[int, str] | None = None  # the newest save's step, why
    self._workdir, self._folder = workdir, metadata.folder(workdir)
    self._saving: int | None = None  # the step
    self._following: threading.Thread | None = None
    self._options = ocp.CheckpointManagerOptions(
      preservation_policy=_Retention(cfg.train),
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,  # what a killed save left behind
      async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier),
    )
    self._orbax = self._manager()
    metadata.log_failures_once()

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
    if distributed.is_primary():
      why = restore_lib.open_problem(self._folder / str(step))
      if why:
        self._tell(step, OSError(f'it was written, but {why}'))
        with contextlib.suppress(OSError):
          restore_lib.quarantine(self._workdir, step, 'unreadable')
        return
      try:
        manifest.write(self._folder / str(step))
      except Exception as error:  # of a bucket: of any class
        _log(f'checkpoint {step} has no manifest: {_why(error)}')

  def _tell(self, step: int, error: Exception) -> None:
    self.failed = step, _why(error)
    _log(f'checkpoint {step} could not be saved: {self.failed[1]}; those before it stay')
    self._sweep()

  def _sweep(self) -> None:
    """Removes what a failed save has written; its threads may still be at it,
    and make folders anew."""
    for _ in range(20 if distributed.is_primary() else 0):
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
      with distributed.fail_together():
        if self.failed:
          raise OSError
    except OSError:
      pass
    except distributed.Aborted:
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
      there = restore_lib.steps(self._workdir)
      raise fields.ConfigError(
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


def is_at_cadence(step: int, t: schema.TrainConfig) -> bool:
  """Whether a run saves after so many steps by itself, not for a signal."""
  return step % (t.checkpoint_every or t.steps) == 0


class _Retention:
  """Which checkpoints stay: the newest --train.max_to_keep, at least two, since
  older ones go once the newest is written, before it was opened again; each
  keep_every-th; and where a rollback may go, which no number of interruptions,
  each with a checkpoint of its own, may push out: of the newest at the run's
  cadence one more than may hold a spike, which is known two steps later; and
  step 0, if it was imported."""

  def __init__(self, t: schema.TrainConfig):
    self._t = t

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    t, steps = self._t, sorted(c.step for c in checkpoints)
    kept = {*steps[-max(t.max_to_keep, 2) :]}
    kept |= {s for s in steps if t.keep_every and s % t.keep_every == 0}
    if t.skip_batches:
      most = 3 if t.checkpoint_every == 1 else 2
      kept |= {0, *[s for s in steps if s and is_at_cadence(s, t)][-most:]}
    return [c.step in kept for c in checkpoints]


_barriers = itertools.count()  # all processes have as many


def _barrier(*, key: str, timeout_ms: int) -> None:
  """orbax's threads wait here for those of the other processes. One whose part
  has failed is already waiting for the end of the save: the others, who would
  wait for it until it is too late, learn it and fail as well."""
  if jax.process_count() == 1:
    return
  client = ocp.multihost.get_jax_distributed_client()
  while True:
    number = next(_barriers)
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


def _log(line: str) -> None:
  to = sys.stdout if distributed.is_primary() else sys.stderr  # others have no stdout
  with contextlib.suppress(OSError):  # it may be on the full disk
    print(line, file=to, flush=True)


def _why(error: Exception) -> str:
  """In a few words; tensorstore's are a paragraph."""
  if os.strerror(errno.ENOSPC) in str(error):
    return 'no space left on the device'
  return paths_lib.first_line(error)


def save(
  to: Saver,
  step: int,
  state: Any,
  cfg: schema.Config,
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
    format=metadata.FORMAT,
    config=json.loads(parse.to_json(cfg)),
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
    raise fields.ConfigError(
      'train.workdir',
      workdir,
      f'no path of checkpoints may have {" ".join(found)} in it, which their'
      ' library reads as a pattern',
    )


def save_params(params: Any, cfg: schema.Config, tokenizer, workdir: str) -> None:
  """Step 0 of a workdir, without an optimizer's state: what an import gives.
  `restore_params` reads it, and a run begins with it."""
  metadata.write_definition(cfg, tokenizer, workdir)
  with contextlib.closing(Saver(workdir, cfg)) as to:
    save(to, 0, dict(params=params), cfg, store='')
    to.wait_until_finished()
    to.check()
