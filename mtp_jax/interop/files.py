"""Tensor files: safetensors and PyTorch's.

safetensors are written by the library, but read by slices with a memory map: the
library reads whole tensors only, and no bfloat16 into NumPy. The format is a
length, a JSON header and the tensors' bytes
(https://huggingface.co/docs/safetensors).
"""

import hashlib
import importlib
import itertools
import math
import os
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mtp_jax.io import jsonl, paths

DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
D2T = 'd2t'  # of EAGLE-3 checkpoints: token id - index, of each token that heads draft
WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
HEADER_BYTES = 100 * 2**20  # the limit of the library

HEADER = {
  '__metadata__?': object,
  ...: {'dtype': str, 'shape': [jsonl.NATURAL], 'data_offsets': [int], ...: object},
}
WEIGHT_MAP = {'weight_map': {...: str}, ...: object}


class Tensor(NamedTuple):
  """One tensor of a file, read on demand."""

  path: str
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  def read(self) -> np.ndarray:
    """Returns a memory map of the tensor."""
    return np.memmap(self.path, self.dtype, 'r', self.offset, self.shape)


def need(module: str, extra: str) -> None:
  """Raises InputError that names the extra to install, if a module is missing."""
  try:
    importlib.import_module(module)
  except ImportError as error:
    raise paths.InputError(module, f'is needed: pip install "mtp_jax[{extra}]"') from error


def write(path: str, arrays: dict[str, np.ndarray]) -> None:
  """Writes a safetensors file; raises OSError if the disk is full or fails."""
  import safetensors
  from safetensors import numpy as library

  try:
    library.save_file(
      {name: np.ascontiguousarray(x) for name, x in arrays.items()}, path, {'format': 'pt'}
    )
  except safetensors.SafetensorError as error:  # for any failure
    number = re.search(r'\(os error (\d+)\)', str(error))
    if not number:
      raise
    raise _disk_error(int(number[1]), path) from error


def _disk_error(number: int, path: str) -> OSError:
  return OSError(number, os.strerror(number), path)


def all_finite(array: np.ndarray) -> bool:
  """Whether no value is NaN or infinite."""
  if array.dtype == ml_dtypes.bfloat16:  # its isfinite is slow
    return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
  return bool(np.isfinite(array).all())


def digest(array: np.ndarray) -> str:
  """Returns the sha256 of a tensor's bytes, shape and dtype."""
  about = f'{array.dtype.name} {array.shape}'.encode()
  data = np.ascontiguousarray(array).view(np.uint8)
  return hashlib.sha256(about + data.tobytes()).hexdigest()


def read(path: str) -> dict[str, Tensor]:
  """Returns the tensors of a file; raises InputError if it is corrupt or truncated."""

  def wrong(problem):
    return paths.InputError(path, problem)

  try:
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
      length = int.from_bytes(file.read(8), 'little')
      text = file.read(min(length, HEADER_BYTES))
  except OSError as error:
    raise wrong(f'cannot be read: {error.strerror}') from error
  if not 0 < length <= min(size - 8, HEADER_BYTES):
    raise wrong('is not a safetensors file, or is truncated')
  try:
    header = jsonl.loads(text, HEADER)
  except ValueError as error:
    raise wrong(f'is not a safetensors file: its header: {error}') from error
  header.pop('__metadata__', None)
  found, ends = {}, []
  for name, about in header.items():
    if len(about.get('data_offsets', ())) != 2:
      raise wrong(f'{name} has a corrupt entry in the header')
    kind, shape = about['dtype'], tuple(about['shape'])
    begin, end = about['data_offsets']
    dtypes = DTYPES if name != D2T else {'I64': np.int64}
    if kind not in dtypes:
      raise wrong(f'{name} is {kind}; only {", ".join(dtypes)} are supported')
    dtype = np.dtype(dtypes[kind])
    if not 0 <= begin <= end:
      raise wrong(f'{name} is at bytes {begin:,} to {end:,} of the data')
    if end - begin != dtype.itemsize * math.prod(shape):
      raise wrong(f'{name} has {end - begin} bytes, which is not the size of {shape}')
    if 8 + length + end > size:
      raise wrong(f'is truncated: {name} ends at byte {8 + length + end:,} of {size:,}')
    found[name] = Tensor(path, name, dtype, shape, 8 + length + begin)
    if begin < end:
      ends.append((begin, end, name))
  ends.sort()
  for (_, end, first), (begin, _, second) in itertools.pairwise(ends):
    if begin < end:
      raise wrong(f'{first} and {second} overlap')
  return found


def read_folder(folder: str) -> dict[str, Tensor]:
  """Returns the tensors of a model, from the files in the index; without an index,
  from model.safetensors or the only file."""

  def wrong(problem):
    return paths.InputError(folder, problem)

  names = sorted(x for x in os.listdir(folder) if x.endswith('.safetensors'))
  if os.path.exists(os.path.join(folder, INDEX)):
    file_of = _weight_map(os.path.join(folder, INDEX), wrong)
    missing = set(file_of.values()) - set(names)
    if missing:
      raise wrong(f'{min(missing)} is missing, but is in the index')
    tensors = {name: read(os.path.join(folder, name)) for name in sorted(set(file_of.values()))}
    for name, file in file_of.items():
      if name not in tensors[file]:
        raise wrong(f'{file} has no {name}, which is in the index')
    return {name: tensors[file][name] for name, file in file_of.items()}
  if not names:
    raise wrong('has no .safetensors file')
  if WHOLE not in names and len(names) > 1:
    raise wrong(f'has {len(names)} .safetensors files, but no {INDEX}')
  name = WHOLE if WHOLE in names else names[0]
  return read(os.path.join(folder, name))


def _weight_map(path: str, wrong) -> dict[str, str]:
  """Returns the map of an index: tensor -> file name."""
  try:
    with open(path, 'rb') as file:
      found = jsonl.loads(file.read(), WEIGHT_MAP)['weight_map']
  except OSError as error:
    raise wrong(f'{INDEX} cannot be read: {error.strerror}') from error
  except ValueError as error:
    raise wrong(f'{INDEX}: {error}') from error
  if not found or any(os.path.basename(x) != x for x in found.values()):
    raise wrong(f'{INDEX} has no weight_map of tensors to files in its directory')
  return found


class Loaded(NamedTuple):
  """One tensor of a PyTorch file, memory-mapped."""

  path: str
  tensor: Any
  shape: tuple[int, ...]

  def read(self) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports]

    if self.tensor.dtype != torch.bfloat16:
      return self.tensor.numpy()
    return self.tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def write_torch(path: str, arrays: dict[str, np.ndarray]) -> None:
  import torch  # pyright: ignore[reportMissingImports]

  def tensor(array):
    if array.dtype != ml_dtypes.bfloat16:
      return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)

  try:
    with open(path, 'wb') as file:  # by name, torch would not report the cause
      torch.save({name: tensor(array) for name, array in arrays.items()}, file)
  except RuntimeError as error:
    if not isinstance(error.__context__, OSError):
      raise
    raise _disk_error(error.__context__.errno or 0, path) from error


def read_torch(path: str) -> dict[str, Loaded]:
  """Returns the tensors of a PyTorch file; raises InputError if it is corrupt or
  truncated."""
  import torch  # pyright: ignore[reportMissingImports]

  if not os.path.isfile(path):
    raise paths.InputError(path, 'no such file')
  try:
    found = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
  except Exception as error:  # torch raises RuntimeError, OSError and others
    raise paths.InputError(path, 'is not a tensor file of PyTorch, or is truncated') from error
  kinds = torch.float64, torch.float32, torch.float16, torch.bfloat16
  if not isinstance(found, dict):
    found = {}
  for name, x in found.items():
    if not isinstance(x, torch.Tensor) or x.dtype not in kinds:
      what = getattr(x, 'dtype', type(x).__name__)
      raise paths.InputError(path, f'{name} is {what}; only floating-point tensors are supported')
  return {name: Loaded(path, x.contiguous(), tuple(x.shape)) for name, x in found.items()}
