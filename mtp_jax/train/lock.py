"""One writer a workdir. Floor 4.

WORKDIR/lock.json names the run that may write. A run takes the lock at its
start and looks at it again before each write, so that a process that was
frozen, replaced and then wakes up stops instead of writing into its successor's
files.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid

from mtp_jax import config

STALE_S = 600.0  # another machine's lock, untouched for so long, is abandoned
LOOK_S = 1.0  # between two looks at one that may be


class Lost(RuntimeError):
  """Another run has taken the workdir."""

  status = 77  # with which a process then ends


class Lock:
  """Taken on construction; ConfigError if a living run holds the workdir.

  Whether a process of another machine lives is seen by its lock alone: either
  it touches it, or it is silent for STALE_S. That is waited for, since a run
  whose machine has died is started on another one at once.
  """

  def __init__(self, workdir: str):
    self._path = os.path.join(workdir, 'lock.json')
    self._id = uuid.uuid4().hex
    touched = None
    while True:
      with _one_at_a_time(workdir):
        holder, now = _read(self._path), None
        with contextlib.suppress(FileNotFoundError):  # released just now
          now = holder and (holder['run'], os.path.getmtime(self._path))
        if not now or not _alive(holder, self._path):
          self._take()
          return
      if _here(holder) or touched not in (None, now):
        raise config.ConfigError(
          'train.workdir', workdir,
          f'is being written by process {holder["pid"]} on {holder["host"]};'
          ' one run a workdir',
        )  # fmt: skip
      if touched is None:
        print(
          f'{self._path} is that of process {holder["pid"]} on'
          f' {holder["host"]}; waits up to {STALE_S:.0f} s whether it lives',
          flush=True,
        )
      touched = now
      time.sleep(LOOK_S)

  def _take(self):
    mine = f'{self._path}.{self._id}'
    with open(mine, 'w', encoding='utf-8') as f:
      json.dump(
        dict(
          run=self._id,
          host=socket.gethostname(),
          pid=os.getpid(),
          started=_started(os.getpid()),
        ),
        f,
      )
    os.replace(mine, self._path)

  def check(self) -> None:
    """Raises Lost unless this run still holds the lock; shows it is alive."""
    holder = _read(self._path)
    if not holder or holder['run'] != self._id:
      raise Lost(f'{self._path} was taken by another run; nothing was written')
    os.utime(self._path)

  def release(self) -> None:
    holder = _read(self._path)
    if holder and holder['run'] == self._id:
      os.remove(self._path)


def held(workdir: str) -> bool:
  """Whether anybody holds it."""
  return os.path.exists(os.path.join(workdir, 'lock.json'))


@contextlib.contextmanager
def _one_at_a_time(workdir):
  """Of runs that start together one looks and takes before the next looks. The
  system lets go when a process dies. Where a file system has no such lock,
  `check` still tells the loser."""
  folder = os.open(workdir, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      fcntl.flock(folder, fcntl.LOCK_EX)
    yield
  finally:
    os.close(folder)


def _read(path):
  try:
    with open(path, encoding='utf-8') as f:
      return json.load(f)
  except (FileNotFoundError, json.JSONDecodeError):
    return None


def _started(pid: int) -> str:
  """When a process of this machine began, so that a reused pid is told apart;
  empty where the system does not say, and of a dead one nobody has waited for.
  """
  try:
    with open(f'/proc/{pid}/stat', encoding='utf-8') as f:
      state, *rest = f.read().rsplit(')', 1)[1].split()
    return '' if state == 'Z' else rest[18]
  except OSError:
    return ''


def _here(holder) -> bool:
  return holder['host'] == socket.gethostname()


def _alive(holder, path) -> bool:
  if not _here(holder):
    with contextlib.suppress(FileNotFoundError):
      return time.time() - os.path.getmtime(path) < STALE_S
    return False
  try:
    os.kill(holder['pid'], 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return _started(holder['pid']) == holder['started']
