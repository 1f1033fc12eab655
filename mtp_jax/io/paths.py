"""Local paths, and gs://BUCKET/… in object storage.

etils.epath has one interface for both. Object storage has no append, no folders,
no renames of folders and no settable times: code that depends on this is here and
in train/lock.py.
"""

import contextlib
import errno
import fcntl
import importlib.util
import os
import pathlib
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mtp_jax.io import jsonl

if TYPE_CHECKING:  # half of the time of `mtp --help`, which opens no path
  from etils import epath

REMOTE = {'gs': 'gcsfs'}  # scheme -> library that epath requires
EVERY_S = 30.0  # minimum interval between uploads of an appended file,
SHARE = 0.01  # or more, so that uploads take at most this fraction of the time


# Errors of a full or failing device.
DISK_ERRORS = {
  getattr(errno, name)
  for name in ('ENOSPC', 'EDQUOT', 'EFBIG', 'EIO', 'EROFS')
  if hasattr(errno, name)
}


@contextlib.contextmanager
def naming(path) -> Iterator[None]:
  """Adds this file name to errors of an open file, which lack it."""
  try:
    yield
  except OSError as error:
    error.filename = error.filename or str(path)
    raise


def disk_error(error: OSError) -> str | None:
  """Returns 'FILE: no space left on device' for errors of that kind, else None."""
  if error.errno is None or error.errno not in DISK_ERRORS:
    return None
  why = os.strerror(error.errno)
  return f'{error.filename or "output"}: {why[0].lower()}{why[1:]}'


def scheme(path) -> str:
  """Returns 'gs' for gs://BUCKET/…, '' for a local path."""
  return str(path).partition('://')[0] if '://' in str(path) else ''


class InputError(ValueError):
  """Raised for bad input, in one line with its subject, often a file, and the problem."""

  status = 2  # exit status

  def __init__(self, subject: object, problem: str):
    super().__init__(str(subject), problem)  # the arguments that pickle restores

  def __str__(self):
    subject, problem = self.args
    return f'{jsonl.one_line(subject)}: {jsonl.one_line(problem, 1000)}'


def absolute(path: str) -> str:
  """Returns the absolute path, or a checked URL.

  Raises:
    InputError: an unknown or unreachable storage.
  """
  kind = scheme(path)
  if not kind:
    return os.path.abspath(os.path.expanduser(path))
  if kind not in REMOTE:
    known = ', '.join(f'{k}://' for k in REMOTE)
    raise InputError(path, f'unsupported storage; use {known}')
  if not importlib.util.find_spec(REMOTE[kind]):
    raise InputError(path, f"needs {REMOTE[kind]}: pip install 'mtp_jax[gcs]'")
  try:
    as_path(path).exists()
  except Exception as error:  # clients raise any class
    raise InputError(path, f'cannot be reached: {first_line(error)}') from error
  return path.rstrip('/')


def is_within(name: str) -> bool:
  """Whether a name in a file refers to a file below its own folder; an untrusted
  file must not cause others to be read."""
  path = pathlib.PurePosixPath(name)
  return (
    not path.is_absolute()
    and '..' not in path.parts
    and '\0' not in name
    and str(path) == name != '.'
  )


def first_line(error: Exception) -> str:
  return (str(error).strip() or repr(error)).splitlines()[0][:300]


def as_path(path) -> 'epath.Path':
  """Converts to the epath.Path that all code below the commands uses."""
  from etils import epath

  kind = scheme(path)
  if kind:
    import fsspec.config

    # Cached listings would be stale: other processes and tensorstore also write.
    settings = fsspec.config.conf.setdefault(kind, {})
    settings.setdefault('use_listings_cache', False)
  return epath.Path(path if kind else os.path.abspath(path))


def make_folder(path) -> None:
  if not scheme(path):  # object storage has no folders
    os.makedirs(path, exist_ok=True)


def write(path, data: bytes) -> None:
  """Writes a file atomically."""
  if scheme(path):
    try:
      as_path(path).write_bytes(data)  # visible only when complete
    except FileNotFoundError as error:
      raise FileNotFoundError(errno.ENOENT, 'no such bucket', str(path)) from error
    return
  path = os.path.realpath(path)  # the target of a link
  if os.path.exists(path) and not os.path.isfile(path):
    with naming(path), open(path, 'wb') as file:  # a device or a pipe
      file.write(data)
    return
  part = f'{path}.{uuid.uuid4().hex[:8]}.tmp'  # unique among concurrent writers
  try:
    with naming(path):
      with open(part, 'wb') as file:
        file.write(data)
      os.replace(part, path)
  except OSError:
    with contextlib.suppress(OSError):
      os.remove(part)
    raise


def open_append(path, start: bytes = b''):
  """Opens a new file for appending, with the contents `start`.

  Call `flush` after a line, `sync` if it must not be lost, and `close`. Objects
  in object storage cannot be appended to: the whole file is kept in memory and
  uploaded again, by `flush` every EVERY_S, by `sync` and `close` at once. A killed
  process loses the lines since the last upload. A failed upload is logged, and
  retried at the next call.
  """
  return _Object(path, start) if scheme(path) else _File(path, start)


class _File:
  def __init__(self, path, start):
    write(path, start)
    self._path, self._file = path, open(path, 'ab')

  def write(self, data: bytes) -> None:
    with naming(self._path):
      self._file.write(data)

  def flush(self) -> None:
    with naming(self._path):
      self._file.flush()

  sync = flush

  def close(self) -> None:
    with naming(self._path):
      self._file.close()


class _Object:
  def __init__(self, path, start):
    self._path, self._data = as_path(path), bytearray(start)
    self._changed, self._next_s = True, 0.0
    self.sync()

  def write(self, data: bytes) -> None:
    self._data += data
    self._changed = True

  def flush(self) -> None:
    if time.monotonic() >= self._next_s:
      self.sync()

  def sync(self) -> None:
    if not self._changed:
      return
    begin = time.monotonic()
    try:
      self._path.write_bytes(bytes(self._data))
      self._changed = False
    except Exception as error:  # clients raise any class
      print(f'{self._path} could not be written: {first_line(error)}; will retry', flush=True)
    end = time.monotonic()
    self._next_s = end + max(EVERY_S, (end - begin) / SHARE)

  def close(self) -> None:
    for pause in (0, 1, 4):
      time.sleep(pause * self._changed)
      self.sync()
    if self._changed:
      print(f'{self._path}: its last lines are lost', flush=True)


@contextlib.contextmanager
def local(folder) -> Iterator[str]:
  """Yields a local folder to write to: the folder itself, or a temporary one whose
  files are copied to object storage at the end, top-level files last."""
  if not scheme(folder):
    yield str(folder)
    return
  with tempfile.TemporaryDirectory() as disk:
    yield disk
    for top, _, names in os.walk(disk, topdown=False):
      target = as_path(folder) / os.path.relpath(top, disk)
      for name in sorted(names):
        as_path(os.path.join(top, name)).copy(target / name, overwrite=True)


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
  """Yields a local folder, which becomes `path` if no exception is raised."""
  if scheme(path):
    with local(path) as disk:
      yield disk
    return
  with temporary_folder(path) as tmp:
    yield tmp
    os.rename(tmp, path)


@contextlib.contextmanager
def temporary_folder(path) -> Iterator[str]:
  """Yields PATH.tmp-PID-HOST, locked, and removed at the end unless renamed. First
  removes those that killed processes of this host have left."""
  _sweep(str(path))
  tmp = f'{path}.tmp-{os.getpid()}-{socket.gethostname()}'
  shutil.rmtree(tmp, ignore_errors=True)  # left by a dead process with this id
  os.makedirs(tmp)
  handle = os.open(tmp, os.O_RDONLY)
  try:
    _lock(handle)
    yield tmp
  finally:
    os.close(handle)
    shutil.rmtree(tmp, ignore_errors=True)


def _lock(handle: int) -> bool:
  """Tries to lock; returns whether it succeeded, or locks are not supported."""
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    return error.errno != errno.EWOULDBLOCK
  return True


def _sweep(path: str) -> None:
  """Removes temporary folders of dead processes. A process id is valid only on its
  host and in its namespace; locks cover the other cases."""
  folder, name = os.path.split(os.path.abspath(path))
  pattern = re.compile(rf'{re.escape(name)}\.tmp-([0-9]+)(?:-(.+))?')
  try:
    beside = os.listdir(folder)
  except OSError:
    return
  for other in beside:
    found = pattern.fullmatch(other)
    if not found or found[2] not in (None, socket.gethostname()):
      continue
    if int(found[1]) != os.getpid() and _is_alive(int(found[1])):
      continue
    try:
      handle = os.open(os.path.join(folder, other), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
      continue
    if _lock(handle):
      shutil.rmtree(os.path.join(folder, other), ignore_errors=True)
    os.close(handle)


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:
    pass  # a process of another user
  return True
