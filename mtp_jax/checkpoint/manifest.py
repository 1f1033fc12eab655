"""The manifest of a checkpoint, by which corruption is detected.

CHECKPOINT/manifest.json holds the size and the sha256 of each file of that
folder. It lies inside, so that it is deleted and copied with the checkpoint.
Files that it does not list are ignored.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterator

from etils import epath

from mtp_jax.io import jsonl, paths

NAME = 'manifest.json'
FORM = {'files': {...: {'size': jsonl.NATURAL, 'sha256': str}}}
BLOCK = 2**22  # bytes per read and thread
THREADS = min(8, os.cpu_count() or 1)  # hashlib and reads release the GIL


def write(folder: epath.Path) -> None:
  """Writes the manifest atomically; the checkpoint's files must be complete."""
  names = sorted(str(path.relative_to(folder)) for path in _files(folder))
  names = [name for name in names if not name.startswith(NAME)]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    found = pool.map(lambda name: _digest(folder / name), names)
    files = {
      name: dict(size=size, sha256=digest)
      for name, (size, digest) in zip(names, found, strict=True)
    }
  paths.write(folder / NAME, json.dumps(dict(files=files), indent=1).encode())


def problem(folder: epath.Path) -> str:
  """Returns which file is corrupt and why; '' if none is, or without a manifest.

  A checkpoint without a manifest may be valid: it appears by a rename when it is
  complete, and a run may be killed before its files are hashed.
  """
  path = folder / NAME
  if not path.exists():
    return ''
  try:
    files = jsonl.loads(path.read_bytes(), FORM)['files']
  except OSError as error:
    return f'{NAME} cannot be read: {error.strerror or error}'
  except ValueError as error:
    return f'{NAME} cannot be read: {error}'
  for name in files:
    if not paths.is_within(name):
      return f'{NAME} names {jsonl.one_line(name)!r}, which lies elsewhere'
  wanted = {name: (f['size'], f['sha256']) for name, f in files.items()}
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    # Sizes first: they are cheap.
    for check in (_wrong_size, _wrong_bytes):
      futures = [pool.submit(check, folder, name, file) for name, file in wanted.items()]
      for future in futures:
        if future.result():
          pool.shutdown(cancel_futures=True)
          return future.result()
  return ''


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def _digest(path: epath.Path) -> tuple[int, str]:
  """Returns (size, sha256) of a file, reading a block at a time."""
  size, digest = 0, hashlib.sha256()
  with path.open('rb') as f:
    while block := f.read(BLOCK):
      size += len(block)
      digest.update(block)
  return size, digest.hexdigest()


def _wrong_size(folder, name, wanted) -> str:
  try:
    path = folder / name
    size = path.stat().length
    # A device could be read forever; epath considers it a file.
    if not paths.scheme(path) and not os.path.isfile(path):
      return f'{name} is not a regular file'
  except FileNotFoundError:
    return f'{name} is missing'
  except OSError as error:
    return f'{name} cannot be read: {error.strerror or error}'
  if size != wanted[0]:
    return f'{name} has {size:,} bytes, not {wanted[0]:,}'
  return ''


def _wrong_bytes(folder, name, wanted) -> str:
  try:
    found = _digest(folder / name)
  except OSError as error:
    return f'{name} cannot be read: {error.strerror or error}'
  return '' if found == wanted else f'{name} does not match its sha256'
