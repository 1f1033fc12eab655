"""Files of tensors: safetensors, and PyTorch's. Floor 4.

safetensors are written by the library, and read a slice at a time: the library
reads into NumPy without bfloat16, and whole tensors only; the format is a
length, a JSON header and the tensors' bytes
(https://huggingface.co/docs/safetensors), so that a memory map does.
"""

import hashlib
import importlib
import json
import math
import os
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mtp_jax import config

DTYPES = {
  'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
}  # fmt: skip
HEADER_BYTES = 100 * 2**20  # at most, as the library has it


class Tensor(NamedTuple):
  """One tensor of a file, not read yet."""

  path: str
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  def read(self) -> np.ndarray:
    """A view of the file."""
    return np.memmap(self.path, self.dtype, 'r', self.offset, self.shape)


def need(flag: str, value: str, module: str, extra: str) -> None:
  """ConfigError that says which extra to install, unless it is there."""
  try:
    importlib.import_module(module)
  except ImportError as error:
    raise config.ConfigError(
      flag, value, f'needs {module}: pip install "mtp_jax[{extra}]"'
    ) from error


def write(path: str, arrays: dict[str, np.ndarray]) -> None:
  from safetensors import numpy as library

  library.save_file(
    {name: np.ascontiguousarray(x) for name, x in arrays.items()}, path,
    {'format': 'pt'},
  )  # fmt: skip


def digest(array: np.ndarray) -> str:
  """sha256 of a tensor's bytes, shape and dtype."""
  about = f'{array.dtype.name} {array.shape}'.encode()
  data = np.ascontiguousarray(array).view(np.uint8)
  return hashlib.sha256(about + data.tobytes()).hexdigest()


def read(path: str, flag: str) -> dict[str, Tensor]:
  """The tensors of a file; ConfigError if it is damaged or cut off."""

  def wrong(problem):
    return config.ConfigError(flag, path, problem)

  try:
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
      length = int.from_bytes(file.read(8), 'little')
      text = file.read(min(length, HEADER_BYTES))
  except OSError as error:
    raise wrong(f'cannot be read: {error.strerror}') from error
  if not 0 < length <= min(size - 8, HEADER_BYTES):
    raise wrong('is no safetensors file, or it is cut off')
  try:
    header = json.loads(text)
  except ValueError as error:
    raise wrong('is no safetensors file: its header is damaged') from error
  header.pop('__metadata__', None)
  found = {}
  for name, about in header.items():
    if about['dtype'] not in DTYPES:
      raise wrong(
        f'{name} is {about["dtype"]}; only {", ".join(DTYPES)} can be read'
      )
    begin, end = about['data_offsets']
    dtype, shape = np.dtype(DTYPES[about['dtype']]), tuple(about['shape'])
    if end - begin != dtype.itemsize * math.prod(shape):
      raise wrong(f'{name} has {end - begin} bytes, not those of {shape}')
    if 8 + length + end > size:
      raise wrong(
        f'is cut off: {name} ends at byte {8 + length + end:,} of {size:,}'
      )
    found[name] = Tensor(path, name, dtype, shape, 8 + length + begin)
  return found


def read_folder(folder: str, flag: str) -> dict[str, Tensor]:
  """Of all .safetensors files of a folder; those of an index must be there."""
  names = sorted(x for x in os.listdir(folder) if x.endswith('.safetensors'))
  index = os.path.join(folder, 'model.safetensors.index.json')
  if os.path.exists(index):
    with open(index, encoding='utf-8') as file:
      wanted = set(json.load(file)['weight_map'].values())
    missing = wanted - set(names)
    if missing:
      raise config.ConfigError(
        flag, folder, f'{min(missing)} is missing; the index names it'
      )
  if not names:
    raise config.ConfigError(flag, folder, 'has no .safetensors file')
  found = {}
  for name in names:
    found |= read(os.path.join(folder, name), flag)
  return found


class Loaded(NamedTuple):
  """One tensor of a PyTorch file, mapped from it."""

  tensor: Any
  shape: tuple[int, ...]

  def read(self) -> np.ndarray:
    import torch

    if self.tensor.dtype != torch.bfloat16:
      return self.tensor.numpy()
    return self.tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def write_torch(path: str, arrays: dict[str, np.ndarray]) -> None:
  import torch

  def tensor(array):
    if array.dtype != ml_dtypes.bfloat16:
      return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)

  torch.save({name: tensor(array) for name, array in arrays.items()}, path)


def read_torch(path: str, flag: str) -> dict[str, Loaded]:
  """The tensors of a PyTorch file; ConfigError if it is damaged or cut off."""
  import torch

  if not os.path.isfile(path):
    raise config.ConfigError(flag, path, 'there is no such file')
  try:
    found = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
  except Exception as error:  # torch raises RuntimeError, OSError and others
    raise config.ConfigError(
      flag, path, 'is no file of tensors that PyTorch reads, or it is cut off'
    ) from error
  kinds = torch.float64, torch.float32, torch.float16, torch.bfloat16
  if not isinstance(found, dict):
    found = {}
  for name, x in found.items():
    if not isinstance(x, torch.Tensor) or x.dtype not in kinds:
      what = getattr(x, 'dtype', type(x).__name__)
      raise config.ConfigError(
        flag, path, f'{name} is {what}; only tensors of floats can be read'
      )
  return {
    name: Loaded(x.contiguous(), tuple(x.shape)) for name, x in found.items()
  }
