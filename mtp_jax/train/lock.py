"""The lock of a workdir: one writer at a time.

WORKDIR/lock.json names the run that may write. A run acquires the lock at its
start and checks it before each write, so that a process that was frozen and
replaced stops when it resumes instead of writing into its successor's files.

In object storage two runs that start in the same second may both find no lock
and write theirs; the last write wins. Each reads it again SETTLE_S later, and
before each checkpoint, so that at most one continues for longer than that. The
lease is renewed by rewriting the time in the file.
"""

import contextlib
import fcntl
import functools
import json
import os
import socket
import threading
import time
import uuid

from mtp_jax.config import fields
from mtp_jax.io import jsonl, paths

STALE_S = 600.0  # another machine's lock, untouched for this long, is abandoned
LIVES_S = 60.0  # minimum watch of a lock that is stale by this machine's clock
LOOK_S = 1.0  # polling interval while waiting for another run's lock
AGAIN_S = 20.0  # maximum age of a check before a log line, in object storage
SHOW_S = 60.0  # interval of the renewal thread
SETTLE_S = 3.0  # in object storage, until a concurrent write is visible


class Lost(RuntimeError):
  """Another run has taken the workdir, or may have."""

  status = 77  # exit status


class Lock:
  """Acquired on construction; raises ConfigError if a live run holds the workdir.

  A process on another machine, or in another container, is known to be live by
  its lock alone: a thread renews it however long a step or compilation takes, or
  it is silent for STALE_S. Construction waits for that, since schedulers restart
  a run at once after its machine has died. It waits for a change of the lock, at
  least LIVES_S even where its time seems older than STALE_S, as the clocks of
  machines differ.
  """

  def __init__(self, workdir: str):
    self._workdir = workdir
    self._path = os.path.join(workdir, 'lock.json')
    self._id = uuid.uuid4().hex
    self._seen = 0.0  # when this run last verified that it holds the lock
    self._released = threading.Event()
    self._take()
    self._shows = threading.Thread(target=self._show, daemon=True)
    self._shows.start()

  def _take(self):
    workdir = self._workdir
    touched = patience_s = None
    while True:
      with _one_at_a_time(workdir):
        holder, now = _read(self._path), None
        with contextlib.suppress(FileNotFoundError):  # released just now
          now = holder and (holder['run'], _touched(holder, self._path))
        waited = patience_s is not None and time.monotonic() > patience_s
        if not now or (_dead(holder) if _here(holder) else waited):
          self._write()
          if self._settled():
            return
          continue
        if patience_s is None and not _here(holder):
          silent_s = time.time() - now[1]  # below 0 by a clock ahead of ours
          wait_s = max(STALE_S - max(silent_s, 0), LIVES_S)
          patience_s = time.monotonic() + wait_s
      assert holder  # as `now`
      if _here(holder) or touched not in (None, now):
        raise fields.ConfigError(
          'train.workdir',
          workdir,
          f'is being written by process {holder["pid"]} on {holder["host"]};'
          ' only one run per workdir',
        )
      if touched is None:
        print(
          f'{self._path} is held by process {holder["pid"]} on'
          f' {holder["host"]}; waiting up to {wait_s:.0f} s for it to expire',
          flush=True,
        )
      touched = now
      time.sleep(LOOK_S)

  def _write(self):
    self._seen = time.time()
    paths.write(
      self._path,
      json.dumps(
        dict(
          run=self._id,
          host=socket.gethostname(),
          machine=_machine(),
          pid=os.getpid(),
          started=_started(os.getpid()),
          time=self._seen,
        )
      ).encode(),
    )

  def _settled(self) -> bool:
    if not paths.scheme(self._path):
      return True
    time.sleep(SETTLE_S)
    return self._mine()

  def _mine(self) -> bool:
    holder = _read(self._path)
    return bool(holder) and holder['run'] == self._id

  def check(self, closely: bool = True) -> None:
    """Raises Lost unless this run still holds the lock; renews it.

    closely: whether to check now. In object storage, where a check costs two
      requests, a result may otherwise be AGAIN_S old.
    """
    if not paths.scheme(self._path):
      mine = self._mine()
      if mine:
        with contextlib.suppress(FileNotFoundError):  # detected by the next check
          os.utime(self._path)
    elif not closely and time.time() - self._seen < AGAIN_S:
      return
    else:
      mine = self._look_there()
    if not mine:
      self._raise_lost()

  def _raise_lost(self):
    """Raises the error for a lock that was deleted or replaced."""
    if not paths.as_path(self._workdir).exists():
      raise fields.ConfigError(
        'train.workdir',
        self._workdir,
        'is gone: it was deleted, or has another name now; nothing was written',
      )
    there = paths.as_path(self._path).exists()
    how = 'taken by another run' if there else 'deleted'
    raise Lost(f'{self._path} was {how}; nothing was written')

  def _look_there(self) -> bool:
    try:
      mine = self._mine()
      if mine:
        self._write()
    except Exception:  # bucket clients raise any class
      # No run takes it over before it was silent for STALE_S.
      if time.time() - self._seen > STALE_S / 2:
        raise
      return True
    return mine

  def _show(self):
    while not self._released.wait(SHOW_S):
      with contextlib.suppress(Exception):  # the next write raises it
        self.check()

  def release(self) -> None:
    self._released.set()
    self._shows.join()
    if self._mine():
      paths.as_path(self._path).unlink()
    elif not paths.scheme(self._path) and not os.path.lexists(self._path):
      # Writes in flight while the workdir was renamed recreate its folders;
      # empty ones would block renaming it back.
      for folder, _, _ in os.walk(self._workdir, topdown=False):
        with contextlib.suppress(OSError):
          os.rmdir(folder)


def is_held(workdir: str) -> bool:
  """Whether a lock file exists in the workdir."""
  return paths.as_path(os.path.join(workdir, 'lock.json')).exists()


@contextlib.contextmanager
def _one_at_a_time(workdir):
  """Serializes check and acquisition among runs that start together. The system
  releases it when a process dies. On file systems without flock the loser is
  still detected by `check`."""
  if paths.scheme(workdir):
    yield
    return
  folder = os.open(workdir, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      fcntl.flock(folder, fcntl.LOCK_EX)
    yield
  finally:
    os.close(folder)


FORM = {
  'run': str,
  'host': str,
  'pid': int,
  'started': str,
  'machine?': str,
  'time?': float,
  ...: object,
}


def _read(path) -> dict | None:
  """Returns the lock's content; None without a lock or if it is not valid."""
  try:
    return jsonl.loads(paths.as_path(path).read_bytes(), FORM)
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return None


def _started(pid: int) -> str:
  """Returns the start time of a local process, which identifies it where pids are
  reused; empty if unknown, or if the process is a zombie."""
  try:
    with open(f'/proc/{pid}/stat', encoding='utf-8') as f:
      state, *rest = f.read().rsplit(')', 1)[1].split()
    return '' if state == 'Z' else rest[18]
  except OSError:
    return ''


@functools.cache
def _machine() -> str:
  """Returns an id of the machine's boot and the pid namespace of this process:
  containers may share host names and pids."""
  parts = []
  with contextlib.suppress(OSError):
    with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as f:
      parts.append(f.read().strip())
    parts.append(os.readlink('/proc/self/ns/pid'))
  return ' '.join(parts)


def _touched(holder, path) -> float:
  if paths.scheme(path):
    return holder.get('time', 0.0)
  return os.path.getmtime(path)


def _here(holder) -> bool:
  """Whether its process would be visible in this pid namespace."""
  return (
    holder['host'] == socket.gethostname()
    and holder.get('machine', _machine()) == _machine()
    and holder['pid'] > 0  # others name process groups
  )


def _dead(holder) -> bool:
  """Whether a local process has exited."""
  try:
    os.kill(holder['pid'], 0)
  except (ProcessLookupError, OverflowError):
    return True
  except PermissionError:
    return False
  return _started(holder['pid']) != holder['started']
