"""One writer a workdir. Floor 4.

WORKDIR/lock.json names the run that may write. A run takes the lock at its
start and looks at it again before each write, so that a process that was
frozen, replaced and then wakes up stops instead of writing into its successor's
files.

In object storage two that start in the same second may both see nobody, and
both write their name: the last one stands. Each reads it again SETTLE_S later,
and before each checkpoint, so that of two at most one goes on for longer than
that; what says that a run lives is a time in the file, written again.
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

STALE_S = 600.0  # another machine's lock, untouched for so long, is abandoned
LIVES_S = 60.0  # one that seems so by our clock is watched at least so long
LOOK_S = 1.0  # between two looks at one that may be
AGAIN_S = 20.0  # between two looks at one's own in object storage, for a line
SHOW_S = 60.0  # between two touches while nothing is written
SETTLE_S = 3.0  # there, from one's look to the write of one who looked as well


class Lost(RuntimeError):
  """Another run has taken the workdir, or may have."""

  status = 77  # with which a process then ends


class Lock:
  """Taken on construction; ConfigError if a living run holds the workdir.

  Whether a process of another machine, or of another container of this one,
  lives is seen by its lock alone: either it touches it, from a thread, however
  long a step or a compilation takes, or it is silent for STALE_S. That is
  waited for, since a run whose machine has died is started on another at once.
  What is waited for is a change: clocks of machines differ, and one may have
  been set. So for LIVES_S also where the lock seems to be older than STALE_S.
  """

  def __init__(self, workdir: str):
    self._workdir = workdir
    self._path = os.path.join(workdir, 'lock.json')
    self._id = uuid.uuid4().hex
    self._seen = 0.0  # when this run last saw that it is the holder
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
      if _here(holder) or touched not in (None, now):
        raise fields.ConfigError(
          'train.workdir',
          workdir,
          f'is being written by process {holder["pid"]} on {holder["host"]}; one run a workdir',
        )
      if touched is None:
        print(
          f'{self._path} is that of process {holder["pid"]} on'
          f' {holder["host"]}; waits up to {wait_s:.0f} s whether it lives',
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
    """Raises Lost unless this run still holds the lock; shows it is alive.

    In object storage, where a look costs two requests, one that is not close
    may be AGAIN_S old.
    """
    if not paths.scheme(self._path):
      mine = self._mine()
      if mine:
        with contextlib.suppress(FileNotFoundError):  # seen at the next look
          os.utime(self._path)
    elif not closely and time.time() - self._seen < AGAIN_S:
      return
    else:
      mine = self._look_there()
    if not mine:
      self._tell()

  def _tell(self):
    """Raises what has become of it."""
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
    except Exception:  # of a client: of any class
      # Nobody takes it before it was silent for STALE_S.
      if time.time() - self._seen > STALE_S / 2:
        raise
      return True
    return mine

  def _show(self):
    while not self._released.wait(SHOW_S):
      with contextlib.suppress(Exception):  # who writes next is told
        self.check()

  def release(self) -> None:
    self._released.set()
    self._shows.join()
    if self._mine():
      paths.as_path(self._path).unlink()
    elif not paths.scheme(self._path) and not os.path.lexists(self._path):
      # What was being written as the workdir was renamed makes its folders
      # anew; empty ones would be in the way of renaming it back.
      for folder, _, _ in os.walk(self._workdir, topdown=False):
        with contextlib.suppress(OSError):
          os.rmdir(folder)


def is_held(workdir: str) -> bool:
  """Whether anybody holds it."""
  return paths.as_path(os.path.join(workdir, 'lock.json')).exists()


@contextlib.contextmanager
def _one_at_a_time(workdir):
  """Of runs that start together one looks and takes before the next looks. The
  system lets go when a process dies. Where a file system has no such lock,
  `check` still tells the loser."""
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
  """What names the holder; None without one, or of what no run has written."""
  try:
    return jsonl.loads(paths.as_path(path).read_bytes(), FORM)
  except (FileNotFoundError, NotADirectoryError, ValueError):
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


@functools.cache
def _machine() -> str:
  """The machine since it was started, and the namespace in which a pid of this
  process means something: containers share names of hosts, and pids."""
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
  """Whether its process can be looked for in here."""
  return (
    holder['host'] == socket.gethostname()
    and holder.get('machine', _machine()) == _machine()
    and holder['pid'] > 0  # others are names of groups to the system
  )


def _dead(holder) -> bool:
  """Of a process in here."""
  try:
    os.kill(holder['pid'], 0)
  except (ProcessLookupError, OverflowError):
    return True
  except PermissionError:
    return False
  return _started(holder['pid']) != holder['started']
