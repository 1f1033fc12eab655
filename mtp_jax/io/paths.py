"""Paths of this machine, or gs://BUCKET/… of object storage. Floor 1.

etils.epath makes the two alike. What object storage has not is an append, a
folder, a rename of one, a time that one can set: what differs for that reason
stands here and in train/lock.py.
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

import fsspec.config
from etils import epath

from mtp_jax.io import jsonl

REMOTE = {'gs': 'gcsfs'}  # scheme -> the library that epath needs for it
EVERY_S = 30.0  # between two uploads of what grows,
SHARE = 0.01  # or longer, so that they take this part of the time at most


# What a device answers that has no room, or no life, left.
DISK_ERRORS = {
  getattr(errno, name)
  for name in ('ENOSPC', 'EDQUOT', 'EFBIG', 'EIO', 'EROFS')
  if hasattr(errno, name)
}


@contextlib.contextmanager
def naming(path) -> Iterator[None]:
  """Errors of an open file, which does not say its name, say this one."""
  try:
    yield
  except OSError as error:
    error.filename = error.filename or str(path)
    raise


def disk_error(error: OSError) -> str | None:
  """'FILE: no space left on device', if it is an error of that kind."""
  if error.errno not in DISK_ERRORS:
    return None
  why = os.strerror(error.errno)
  return f'{error.filename or "output"}: {why[0].lower()}{why[1:]}'


def scheme(path) -> str:
  """'gs' of gs://BUCKET/…, '' of a path of this machine."""
  return str(path).partition('://')[0] if '://' in str(path) else ''


class InputError(ValueError):
  """Bad input, in one line that names what it is, often a file, and the problem."""

  status = 2  # with which a process then ends

  def __init__(self, subject: object, problem: str):
    super().__init__(str(subject), problem)  # as pickle hands them on

  def __str__(self):
    subject, problem = self.args
    return f'{jsonl.one_line(subject)}: {jsonl.one_line(problem, 1000)}'


def absolute(path: str) -> str:
  """Returns the path as it reads from any working directory.

  Raises:
    InputError: it is on a storage that is not known, or cannot be reached.
  """
  kind = scheme(path)
  if not kind:
    return os.path.abspath(os.path.expanduser(path))
  if kind not in REMOTE:
    known = ', '.join(f'{k}://' for k in REMOTE)
    raise InputError(path, f'of object storage only {known}')
  if not importlib.util.find_spec(REMOTE[kind]):
    raise InputError(path, f"needs {REMOTE[kind]}: pip install 'mtp_jax[gcs]'")
  try:
    as_path(path).exists()
  except Exception as error:  # of a client: of any class
    raise InputError(path, f'cannot be reached: {first_line(error)}') from error
  return path.rstrip('/')


def is_within(name: str) -> bool:
  """Whether a name that a file gives is that of one below its own folder; a
  stranger's file must not have others read."""
  path = pathlib.PurePosixPath(name)
  return (
    not path.is_absolute()
    and '..' not in path.parts
    and '\0' not in name
    and str(path) == name != '.'
  )


def first_line(error: Exception) -> str:
  return (str(error).strip() or repr(error)).splitlines()[0][:300]


def as_path(path) -> epath.Path:
  """The same as an epath.Path, which what is below a command works with."""
  kind = scheme(path)
  if kind:
    # Its listings would be those of the first look: other processes write, and
    # so does tensorstore beside it.
    settings = fsspec.config.conf.setdefault(kind, {})
    settings.setdefault('use_listings_cache', False)
  return epath.Path(path if kind else os.path.abspath(path))


def make_folder(path) -> None:
  if not scheme(path):  # there a folder is but a part of names
    os.makedirs(path, exist_ok=True)


def write(path, data: bytes) -> None:
  """Writes a file, whole or not at all."""
  if scheme(path):
    try:
      as_path(path).write_bytes(data)  # appears when it is complete
    except FileNotFoundError as error:
      raise FileNotFoundError(errno.ENOENT, 'there is no such bucket', str(path)) from error
    return
  path = os.path.realpath(path)  # of a link, what it points to
  if os.path.exists(path) and not os.path.isfile(path):
    with naming(path), open(path, 'wb') as file:  # a device or a pipe
      file.write(data)
    return
  part = f'{path}.{uuid.uuid4().hex[:8]}.tmp'  # of two that write at once
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
  """A file of `start` and what is then written, on disk line by line.

  `flush` after a line, `sync` where it must not be lost, `close`. In object
  storage nothing can be appended to, so that the whole is kept in memory and
  uploaded again: by `flush` when EVERY_S have passed, by `sync` and `close` at
  once. What is killed loses the lines since. An upload that fails is told, and
  tried again at its next turn.
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
    except Exception as error:  # of a client: of any class
      print(
        f'{self._path} could not be written: {first_line(error)}; it is tried again', flush=True
      )
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
  """A folder on disk to write into: the folder itself, or one whose files are
  copied to object storage at the end, those of its top last."""
  if not scheme(folder):
    yield str(folder)
    return
  with tempfile.TemporaryDirectory() as disk:
    yield disk
    for top, _, names in os.walk(disk, topdown=False):
      there = as_path(folder) / os.path.relpath(top, disk)
      for name in sorted(names):
        epath.Path(top, name).copy(there / name, overwrite=True)


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
  """A folder on disk to fill, which becomes `path` if nothing fails."""
  if scheme(path):
    with local(path) as disk:
      yield disk
    return
  with temporary_folder(path) as tmp:
    yield tmp
    os.rename(tmp, path)


@contextlib.contextmanager
def temporary_folder(path) -> Iterator[str]:
  """PATH.tmp-PID-HOST, locked, and removed at the end unless renamed; first
  removes those that killed processes of this host have left beside it."""
  _sweep(str(path))
  tmp = f'{path}.tmp-{os.getpid()}-{socket.gethostname()}'
  shutil.rmtree(tmp, ignore_errors=True)  # of a dead process with this id
  os.makedirs(tmp)
  handle = os.open(tmp, os.O_RDONLY)
  try:
    _lock(handle)
    yield tmp
  finally:
    os.close(handle)
    shutil.rmtree(tmp, ignore_errors=True)


def _lock(handle: int) -> bool:
  """Whether nobody else has it. A file system without locks gives it to all."""
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    return error.errno != errno.EWOULDBLOCK
  return True


def _sweep(path: str) -> None:
  """Removes temporary folders whose process is dead. A process id says so on
  its host alone, and there in its own namespace; a lock says it of others."""
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
    pass  # another user's
  return True
