"""Tensors that are one in the files of a model family and several here: rows joined."""

from collections.abc import Iterable, Iterator

import numpy as np

from mtp_jax.interop import dialects, files


def _whole(name: str, dialect: dialects.Dialect) -> tuple[str, tuple[str, ...]]:
  """Returns (the tensor in the file, all of its parts) of one of ours."""
  for whole, parts in dialect.fused.items():
    for part in parts:
      if name.endswith(f'.{part}.weight'):
        prefix = name.removesuffix(f'{part}.weight')
        return f'{prefix}{whole}.weight', tuple(f'{prefix}{p}.weight' for p in parts)
  return name, (name,)


def split(found: dict[str, files.Tensor], dialect: dialects.Dialect) -> dict[str, files.Tensor]:
  """Returns the tensors under our names, those that are joined in the file as parts."""
  out = dict(found)
  for whole, parts in dialect.fused.items():
    for name in [x for x in found if x.endswith(f'.{whole}.weight')]:
      tensor = out.pop(name)
      rows, *rest = tensor.shape
      if rows % len(parts):
        out[name] = tensor  # refused as no part of the model
        continue
      shape = (rows // len(parts), *rest)
      size = int(np.prod(shape)) * tensor.dtype.itemsize
      prefix = name.removesuffix(f'{whole}.weight')
      for i, part in enumerate(parts):
        out[f'{prefix}{part}.weight'] = tensor._replace(
          shape=shape, offset=tensor.offset + i * size
        )
  return out


def joined(
  arrays: Iterable[tuple[str, np.ndarray]], dialect: dialects.Dialect
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the arrays as the file has them; parts come one after another."""
  held: list[np.ndarray] = []
  for name, array in arrays:
    whole, parts = _whole(name, dialect)
    if len(parts) == 1:
      yield name, array
      continue
    held.append(array)
    if name == parts[-1]:
      yield whole, np.concatenate(held)
      held = []
