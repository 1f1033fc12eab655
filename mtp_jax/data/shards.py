"""Files of one split: written in order, checked when they are opened.

Floor 2: standard library and NumPy. Each file goes to disk with a record of its
size and sha256. Letters: M documents, P tokens of the spool.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from mtp_jax import config
from mtp_jax.data import spool as spool_lib
from mtp_jax.data import windows

OFFSET_DTYPE = '<u8'


def write_split(
  folder: pathlib.Path,
  spool: spool_lib.Spool,
  rows_M: np.ndarray,
  shard_tokens: int,
) -> dict:
  """Writes rows of the spool in this order; returns the manifest's entry."""
  folder.mkdir()
  tokens_P = np.memmap(spool.path, spool.dtype, 'r')
  start_M = (np.cumsum(spool.length_M) - spool.length_M)[rows_M]
  length_M = spool.length_M[rows_M]
  # One document with cuts gives every shard of the store a mask.
  cuts = [spool.cuts[row] for row in rows_M] if any(spool.cuts) else []
  entries = [
    _write_shard(
      folder, number, tokens_P, start_M[first:last], length_M[first:last],
      cuts[first:last],
    )
    for number, (first, last) in enumerate(_bounds(length_M, shard_tokens))
  ]  # fmt: skip
  sync_folder(folder)
  entry = {
    'documents': len(rows_M),
    'tokens': int(length_M.sum()),
    'bytes': int(spool.bytes_M[rows_M].sum()),
    'shards': entries,
  }
  if cuts:
    entry['scored'] = sum(shard['scored'] for shard in entries)
  return entry


def _write_shard(
  folder, number: int, tokens_P, start_M, length_M, cuts
) -> dict:
  pairs = zip(start_M.tolist(), length_M.tolist(), strict=True)
  parts = (tokens_P[start : start + length] for start, length in pairs)
  offset_M = (np.cumsum(length_M) - length_M).astype(OFFSET_DTYPE)
  entry = {
    'tokens': int(length_M.sum()),
    'documents': len(length_M),
    'tokens_file': write_file(folder / f'tokens-{number:05d}.bin', parts),
    'offsets_file': write_file(
      folder / f'offsets-{number:05d}.bin', [offset_M]
    ),
  }
  if cuts:
    masks = [mask(*x) for x in zip(length_M.tolist(), cuts, strict=True)]
    entry['scored'] = sum(int(scored_T.sum()) for scored_T in masks)
    entry['scored_file'] = write_file(
      folder / f'scored-{number:05d}.bin', masks
    )
  return entry


def mask(length: int, cuts: tuple[int, ...]) -> np.ndarray:
  """scored_T of a document of so many tokens, switched on and off at cuts."""
  if not cuts:
    return np.ones(length, bool)
  switched_T = np.bincount(cuts, minlength=length)  # two in one place cancel
  return np.cumsum(switched_T) % 2 == 1


def _bounds(length_M, shard_tokens: int) -> Iterator[tuple[int, int]]:
  """Fills shards in order with as many documents as fit, at least one."""
  end_M, first = np.cumsum(length_M), 0
  while first < len(end_M):
    before = end_M[first - 1] if first else 0
    last = int(np.searchsorted(end_M, before + shard_tokens, 'right'))
    last = max(last, first + 1)
    yield first, last
    first = last


def write_file(path: pathlib.Path, parts: Iterable) -> dict:
  sha256 = hashlib.sha256()
  with open(path, 'wb', buffering=2**20) as file:
    for part in parts:
      sha256.update(part)
      file.write(part)
    file.flush()
    os.fsync(file.fileno())
    size = file.tell()
  name = f'{path.parent.name}/{path.name}'
  return {'file': name, 'size': size, 'sha256': sha256.hexdigest()}


def sync_folder(path: pathlib.Path):
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def open_split(
  root: pathlib.Path, name: str, entry: dict, dtype: str, verify: bool
) -> windows.Split:
  """Maps the files of the manifest's entry, once they are known to be whole."""
  files = {}
  for key, of_file in (
    ('tokens_file', dtype),
    ('offsets_file', OFFSET_DTYPE),
    ('scored_file', '?'),
  ):
    paths = [
      checked(root, shard[key], verify)
      for shard in entry['shards']
      if key in shard
    ]
    # A plain view: slicing the memmap subclass costs more than the read.
    files[key] = tuple(
      np.memmap(path, of_file, 'r').view(np.ndarray) for path in paths
    )
  return windows.Split(name, *files.values())


def checked(root: pathlib.Path, record: dict, verify: bool) -> pathlib.Path:
  """Path of a file that is as write_file left it, or raises ConfigError."""
  path = root / record['file']
  try:
    problem = _problem(path, record, verify)
  except OSError as error:
    problem = error.strerror
  if problem:
    raise config.ConfigError('data.store', root, f'{record["file"]}: {problem}')
  return path


def _problem(path: pathlib.Path, record: dict, verify: bool) -> str:
  size = path.stat().st_size
  if size != record['size']:
    return f'it has {size} bytes instead of {record["size"]}'
  if verify:
    with open(path, 'rb') as file:
      sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    if sha256 != record['sha256']:
      return 'it is damaged, its checksum is wrong'
  return ''
