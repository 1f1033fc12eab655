"""Asynchronous saving of checkpoints, and which of them are retained."""

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
from mtp_jax.model import lm
from mtp_jax.parallel import distributed


class Saver:
  """Saves asynchronously, in threads; retains the last --train.max_to_keep
  checkpoints and each keep_every-th.

  A checkpoint counts as saved once it was opened again in its final place: orbax
  may write what it cannot find again, e.g. below a folder whose name it reads as a
  pattern. A failed save (a full disk) is logged in one line and leaves no files;
  earlier checkpoints remain, and the next save happens on schedule.
  """

  def __init__(self, workdir: str, cfg: schema.Config, host_gib: int | None = None):
    """host_gib: limit of the copies on the host while writing, at least those of the
    largest array; None = orbax's default."""
    self._host_gib = host_gib
    self.failed: tuple[int, str] | None = None  # (step, reason) of the last save
    self._workdir, self._folder = workdir, metadata.folder(workdir)
    self._saving: int | None = None  # the step
    self._following: threading.Thread | None = None
    self._options = ocp.CheckpointManagerOptions(
      preservation_policy=_Retention(cfg.train),
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,  # of killed saves
      async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier),
    )
    self._orbax = self._manager()
    metadata.log_failures_once()

  def _manager(self) -> ocp.CheckpointManager:
    handlers = None
    if self._host_gib is not None:
      state = ocp.StandardCheckpointHandler(save_concurrent_gb=self._host_gib)
      handlers = dict(state=state, about=ocp.JsonCheckpointHandler())
    return ocp.CheckpointManager(self._folder, options=self._options, item_handlers=handlers)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def save(self, step: int, args: ocp.args.CheckpointArgs) -> float:
    """Starts a save; returns the seconds for which the caller was blocked, waiting
    for the previous save included."""
    begin = time.perf_counter()
    self.wait_until_finished()
    self.failed, self._saving = None, step
    try:
      self._orbax = self._orbax or self._manager()
      with jax.transfer_guard('allow'):  # orbax copies arrays to the host
        self._orbax.save(step, args=args)
    except OSError as error:
      if jax.process_count() > 1:
        raise  # the others wait for this process within orbax
      self._fail(step, error)
    else:
      self._following = threading.Thread(target=self._follow, args=(step,))
      self._following.start()
    return time.perf_counter() - begin

  def _follow(self, step: int) -> None:
    try:
      assert self._orbax
      self._orbax.wait_until_finished()
    except Exception as error:  # tensorstore raises any class
      self._fail(step, error)
      return
    # A checkpoint that a kill leaves without a manifest remains usable: it is then
    # read as a whole before a run resumes from it.
    if distributed.is_primary():
      why = restore_lib.open_problem(self._folder / str(step))
      if why:
        self._fail(step, OSError(f'it was written, but {why}'))
        with contextlib.suppress(OSError):
          restore_lib.quarantine(self._workdir, step, 'unreadable')
        return
      try:
        manifest.write(self._folder / str(step))
      except Exception as error:  # bucket clients raise any class
        _log(f'checkpoint {step} has no manifest: {_why(error)}')

  def _fail(self, step: int, error: Exception) -> None:
    self.failed = step, _why(error)
    _log(f'checkpoint {step} could not be saved: {self.failed[1]}; earlier ones remain')
    self._sweep()

  def _sweep(self) -> None:
    """Removes the files of a failed save; retries, as its threads may still run and
    recreate folders."""
    for _ in range(20 if distributed.is_primary() else 0):
      left = list(ocp.path.step.all_temporary_paths(self._folder))
      if not left:
        return
      for path in left:
        with contextlib.suppress(OSError):
          path.get().rmtree()
      time.sleep(0.1)

  def wait_until_finished(self) -> None:
    """Waits until the last save has its manifest or has failed. Collective: all
    processes must call it, and all then know whether one has failed."""
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
      self.failed = self.failed or (step, 'another process failed to write its part')
    if self.failed:
      self._sweep()
      # The manager would raise its errors at the next save, and has dropped the
      # checkpoints that this one was to replace: the next save creates another.
      self._orbax = None

  def _join(self) -> None:
    if self._following:
      self._following.join()
      self._following = None

  def check(self) -> None:
    """Raises ConfigError if the last save, which must be over, has failed."""
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
    """Waits for this process's part of the save; other processes may have exited."""
    self._join()
    if self.failed:
      self._sweep()
    elif self._orbax:
      self._orbax.close()


def is_at_cadence(step: int, t: schema.TrainConfig) -> bool:
  """Whether a run saves after this step on schedule, not because of a signal."""
  return step % (t.checkpoint_every or t.steps) == 0


class _Retention:
  """Retains the newest --train.max_to_keep checkpoints, at least two, since older
  ones are deleted once the newest is written, before it was opened again; each
  keep_every-th; and the targets of a rollback, whatever number of interruptions
  saved checkpoints of their own: of the newest at the run's cadence one more than
  may contain a spike (detected two steps later), and an imported step 0."""

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


_barriers = itertools.count()  # the same in all processes


def _barrier(*, key: str, timeout_ms: int) -> None:
  """Barrier of orbax's threads across processes. A process whose part has failed
  already waits at the barrier that ends the save: the others, which would wait for
  it until the timeout, detect that and fail as well."""
  if jax.process_count() == 1:
    return
  client = ocp.multihost.get_jax_distributed_client()
  while True:
    number = next(_barriers)
    mine = f'mtp_save/{{}}/{jax.process_index()}'
    client.key_value_set(mine.format(number), key)
    client.wait_at_barrier(f'mtp_save_{number}', timeout_ms)
    keys = {k for _, k in client.key_value_dir_get(f'mtp_save/{number}/')}
    if number:  # every process has read the previous key
      client.key_value_delete(mine.format(number - 1))
    if len(keys) == 1:
      return
    ends = {k: 'set_value' in k for k in keys}
    if not ends[key] or all(ends.values()):
      raise OSError('another process could not write its part')


def _log(line: str) -> None:
  to = sys.stdout if distributed.is_primary() else sys.stderr  # only the primary has a stdout
  with contextlib.suppress(OSError):  # stdout may be on the full disk
    print(line, file=to, flush=True)


def _why(error: Exception) -> str:
  """Returns a short reason; tensorstore's messages are paragraphs."""
  if os.strerror(errno.ENOSPC) in str(error):
    return 'no space left on the device'
  return paths_lib.first_line(error)


def save(
  to: Saver,
  step: int,
  state: Any,
  cfg: schema.Config,
  *,
  store: str,
  skipped_batches=(),
  spikes: dict | None = None,
) -> float:
  """Starts an asynchronous save of the state.

  Collective, as are `restore` and `restore_params`: each process writes the
  shards of its devices, process 0 the rest.

  Args:
    to: a Saver.
    step: the state's step, which names the checkpoint.
    state: the State; may be donated as soon as this returns.
    cfg: the Config that the state was trained with.
    store: fingerprint of the token store. The position in it is step x
      batch_size plus the skipped batches, hence not saved.
    skipped_batches: (first, count) of each range of batches that no step reads.
    spikes: JSON state of the spike detector.

  Returns:
    Seconds for which the caller was blocked.
  """
  about = dict(
    format=metadata.FORMAT,
    config=json.loads(parse.to_json(cfg)),
    store=store,
    left_out=skipped_batches,
    spikes=spikes or {},
  )
  tree = ocp.args.StandardSave(lm.without_unused(state))
  args = ocp.args.Composite(state=tree, about=ocp.args.JsonSave(about))
  return to.save(step, args)


def check_workdir(workdir: str) -> None:
  """Raises ConfigError if checkpoints could be written there but not merged: orbax
  finds the parts of one by a glob pattern that contains the unescaped path, so
  that [1] matches 1, and * also matches other runs."""
  found = sorted({*'*?[]'} & {*str(workdir)})
  if found:
    raise fields.ConfigError(
      'train.workdir',
      workdir,
      f'no path of checkpoints may have {" ".join(found)} in it, which orbax reads as a pattern',
    )


def save_params(params: Any, cfg: schema.Config, tokenizer, workdir: str) -> None:
  """Saves parameters as step 0 of a workdir, without optimizer state, as an import
  does. `restore_params` reads it, and a run is initialized from it."""
  metadata.write_definition(cfg, tokenizer, workdir)
  largest = max(x.nbytes for x in jax.tree.leaves(params))
  with contextlib.closing(Saver(workdir, cfg, host_gib=-(-largest // 2**30))) as to:
    save(to, 0, dict(params=params), cfg, store='')
    to.wait_until_finished()
    to.check()
