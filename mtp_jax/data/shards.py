"""The shard files of a split: written in order, checked on opening and reading.

Standard library and NumPy. The size and sha256 of each file are recorded. A file
that changes while a run reads it ends the run; a memory map would give SIGBUS or
zeros instead, and holds a descriptor per file. Letters: M documents, P tokens of
the spool.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mtp_jax.config import fields
from mtp_jax.data import spool as spool_lib
from mtp_jax.data import windows
from mtp_jax.io import paths

COPIED = 2**20  # bytes per copy
OFFSET_DTYPE, LOGP_DTYPE = '<u8', '<f2'
# Documents -> (ids_MP, logp_MP1) of consecutive tokens, all of them in order.
Predict = Callable[[Iterable[np.ndarray]], Iterator[tuple[np.ndarray, np.ndarray]]]


def write_split(
  folder: pathlib.Path, spool: spool_lib.Spool, rows_M: np.ndarray, shard_tokens: int
) -> dict:
  """Writes rows of the spool in this order; returns the entry of the manifest."""
  folder.mkdir()
  start_M = (np.cumsum(spool.length_M) - spool.length_M)[rows_M]
  length_M = spool.length_M[rows_M]
  # A single document with loss spans gives every shard of the store a mask.
  loss_spans = [spool.loss_spans[row] for row in rows_M] if any(spool.loss_spans) else []
  width = np.dtype(spool.dtype).itemsize
  with open(spool.path, 'rb', buffering=0) as file:
    entries = [
      _write_shard(
        folder,
        number,
        file.fileno(),
        width=width,
        start_M=start_M[first:last],
        length_M=length_M[first:last],
        loss_spans=loss_spans[first:last],
      )
      for number, (first, last) in enumerate(_bounds(length_M, shard_tokens))
    ]
  sync_folder(folder)
  entry = {
    'documents': len(rows_M),
    'tokens': int(length_M.sum()),
    'bytes': int(spool.bytes_M[rows_M].sum()),
    'shards': entries,
  }
  if loss_spans:
    entry['scored'] = sum(shard['scored'] for shard in entries)
  return entry


def _write_shard(
  folder, number: int, spool: int, *, width: int, start_M, length_M, loss_spans
) -> dict:
  pairs = zip(start_M.tolist(), length_M.tolist(), strict=True)
  parts = (  # not memory-mapped: mapped pages count as memory in use
    os.pread(spool, min(width * length - at, COPIED), width * start + at)
    for start, length in pairs
    for at in range(0, width * length, COPIED)
  )
  offset_M = (np.cumsum(length_M) - length_M).astype(OFFSET_DTYPE)
  entry = {
    'tokens': int(length_M.sum()),
    'documents': len(length_M),
    'tokens_file': write_file(folder / f'tokens-{number:05d}.bin', parts),
    'offsets_file': write_file(folder / f'offsets-{number:05d}.bin', [offset_M]),
  }
  if loss_spans:
    entry['scored'] = 0

    def masks():
      for length, spans in zip(length_M.tolist(), loss_spans, strict=True):
        loss_mask_T = mask(length, spans)
        entry['scored'] += int(loss_mask_T.sum())
        yield loss_mask_T

    entry['scored_file'] = write_file(folder / f'scored-{number:05d}.bin', masks())
  return entry


def mask(length: int, loss_spans: tuple[int, ...]) -> np.ndarray:
  """Returns the loss mask (T,) of a document, which switches at each of loss_spans."""
  if not loss_spans:
    return np.ones(length, bool)
  switched_T = np.bincount(loss_spans, minlength=length)  # two at the same token cancel
  return np.cumsum(switched_T) % 2 == 1


def _bounds(length_M, shard_tokens: int) -> Iterator[tuple[int, int]]:
  """Yields (first, last) document per shard: as many as fit, at least one."""
  end_M, first = np.cumsum(length_M), 0
  shard_tokens = min(shard_tokens, 2**62)  # as an int64 below
  while first < len(end_M):
    before = end_M[first - 1] if first else 0
    last = int(np.searchsorted(end_M, before + shard_tokens, 'right'))
    last = max(last, first + 1)
    yield first, last
    first = last


def write_teacher(folder: pathlib.Path, entry: dict, dtype: str, predict: Predict) -> None:
  """Writes a teacher's files beside those of a split, and adds them to its entry."""
  split = open_split(folder.parent, folder.name, entry, dtype, False)
  for number, shard in enumerate(entry['shards']):
    one = split._replace(tokens=split.tokens[number:][:1], offsets=split.offsets[number:][:1])
    parts = (
      (_narrow(ids_MP, dtype), np.ascontiguousarray(logp_MP1, LOGP_DTYPE))
      for ids_MP, logp_MP1 in predict(one.documents())
    )
    names = [folder / f'teacher_{name}-{number:05d}.bin' for name in ('ids', 'logp')]
    shard['teacher_ids_file'], shard['teacher_logp_file'] = write_files(names, parts)
  sync_folder(folder)


def _narrow(ids_MP, dtype: str) -> np.ndarray:
  if ids_MP.size and ids_MP.max() > np.iinfo(dtype).max:
    raise fields.ConfigError(
      'data.teacher_top_k',
      ids_MP.shape[1],
      f'token {ids_MP.max()} of the teacher does not fit the {np.dtype(dtype)} of a store of this'
      ' tokenizer, which has fewer tokens; use fewer',
    )
  return np.ascontiguousarray(ids_MP, dtype)


def write_file(path: pathlib.Path, parts: Iterable) -> dict:
  return write_files([path], ((part,) for part in parts))[0]


def write_files(files: list[pathlib.Path], parts: Iterable[tuple]) -> list[dict]:
  """Writes files side by side, the i-th item of each part to the i-th; returns their records."""
  hashes = [hashlib.sha256() for _ in files]
  with contextlib.ExitStack() as stack:
    out = [stack.enter_context(open(path, 'wb', buffering=2**20)) for path in files]
    for part in parts:
      for data, file, sha256 in zip(part, out, hashes, strict=True):
        sha256.update(data)
        file.write(data)
    for file in out:
      file.flush()
      os.fsync(file.fileno())
    return [
      {'file': f'{path.parent.name}/{path.name}', 'size': file.tell(), 'sha256': sha256.hexdigest()}
      for path, file, sha256 in zip(files, out, hashes, strict=True)
    ]


def sync_folder(path: pathlib.Path):
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


OPEN_FILES = 64  # shard descriptors that a process keeps open
READ_BYTES = 2**30  # limit per system call


class File:
  """A file of numbers as an array, which is read by slices.

  Raises FileChanged if the file no longer has the size and modification time
  that it had when the store was opened. (Inodes are not compared: some network
  file systems renumber them.)
  """

  def __init__(self, root: pathlib.Path, record: dict, dtype: str, verify):
    self.root, self.name, self.dtype = root, record['file'], np.dtype(dtype)
    path, self._stamp = checked(root, record, verify)
    self._path = os.fspath(path)
    self.size = record['size'] // self.dtype.itemsize

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, at: slice) -> np.ndarray:
    width = self.dtype.itemsize
    first, last, _ = at.indices(self.size)
    try:
      handle = _descriptor(self)
      data = _read(handle.number, width * max(last - first, 0), width * first)
      # After reading, so that the data is from before any change.
      now = _stamp(os.fstat(handle.number))
    except OSError as error:
      raise self._changed(error.strerror or str(error)) from error
    if now != self._stamp or len(data) != width * max(last - first, 0):
      raise self._changed(f'{now[0]:,} bytes, {self._stamp[0]:,} before')
    return np.frombuffer(data, self.dtype)

  def _changed(self, how: str) -> fields.FileChanged:
    return fields.FileChanged(
      'data.store', self.root, f'{self.name} was changed after the store was opened ({how})'
    )

  def open(self) -> int:
    return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)


class _Descriptor:
  """A file descriptor, closed when no thread uses it any more."""

  def __init__(self, number: int):
    self.number = number

  def __del__(self, close=os.close):
    close(self.number)


@functools.lru_cache(OPEN_FILES)
def _descriptor(file: File) -> _Descriptor:
  return _Descriptor(file.open())


def _read(descriptor: int, size: int, offset: int) -> bytes:
  data = os.pread(descriptor, min(size, READ_BYTES), offset)
  if len(data) == size:
    return data
  parts = [data]
  while parts[-1] and size > (got := sum(map(len, parts))):
    parts.append(os.pread(descriptor, min(size - got, READ_BYTES), offset + got))
  return b''.join(parts)


def _stamp(stat: os.stat_result) -> tuple[int, int]:
  return stat.st_size, stat.st_mtime_ns


def open_split(
  root: pathlib.Path, name: str, entry: dict, dtype: str, verify: bool, *, teacher: bool = False
) -> windows.Split:
  """Opens the files of a split, after checking them against its manifest entry; those of a
  stored teacher, which are much larger, only with `teacher`."""
  files = [
    tuple(File(root, shard[key], of_file, verify) for shard in entry['shards'] if key in shard)
    for key, of_file in (
      ('tokens_file', dtype),
      ('offsets_file', OFFSET_DTYPE),
      ('scored_file', '?'),
      ('teacher_ids_file' if teacher else '', dtype),
      ('teacher_logp_file' if teacher else '', LOGP_DTYPE),
    )
  ]
  return windows.Split(name, *files)


def checked(root: pathlib.Path, record: dict, verify: bool) -> tuple[pathlib.Path, tuple[int, int]]:
  """Returns the path and stamp of a file that is as write_file left it; raises
  ConfigError if it is not."""
  path = root / record['file']
  try:
    if not paths.is_within(record['file']):
      raise OSError(0, 'is outside of the store')
    stamp = _stamp(path.stat())
    problem = _problem(path, record, stamp[0], verify)
  except OSError as error:
    problem = error.strerror
  if problem:
    raise fields.ConfigError('data.store', root, f'{record["file"]}: {problem}')
  return path, stamp


def _problem(path, record: dict, size: int, verify: bool) -> str:
  if size != record['size']:
    return f'has {size} bytes instead of {record["size"]}'
  if verify:
    with open(path, 'rb') as file:
      sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    if sha256 != record['sha256']:
      return 'is corrupt: checksum mismatch'
  return ''
