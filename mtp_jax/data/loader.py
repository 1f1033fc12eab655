"""Batches of windows in an order that only (seed, step) decides.

Floor 3: NumPy and grain. The order is one sequence of window indices, cut into
global batches: of each split of a mixture a fresh permutation each epoch of its
own, and the splits interleaved by their weights. Each process takes the rows
of its devices out of a global batch of indices and reads only those, so step s
is made of the same rows for any number of processes, and the data position is
the step.
"""

import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from mtp_jax.config import fields
from mtp_jax.data import windows

Batch = dict[str, np.ndarray]
Ranges = tuple[tuple[int, int], ...]  # (first batch, how many), rising


def train_batches(
  split: windows.Split | windows.Mixture,
  *,
  seq_len: int,
  span: int,
  batch_size: int,
  accumulate: int,
  seed: int,
  start_step: int = 0,
  left_out: Ranges = (),
  rows: np.ndarray | None = None,
  threads: int = 2,
  prefetch: int = 8,
) -> Iterator[Batch]:
  """Endless {'tokens', 'position'}, int32 of shape (A, b, U), from start_step.

  A = accumulate micro-batches of b rows, all batch_size / A of a micro-batch or
  those of `rows`, of U = seq_len + span tokens; and 'scored', bool, if a split
  of the mixture is masked. Seeking costs nothing.

  Args:
    split: what to read, or several to mix.
    seq_len: queries of a window; windows are this far apart.
    span: further tokens a window carries for targets.
    batch_size: windows of an optimizer step, over all processes.
    accumulate: micro-batches of an optimizer step.
    seed: of the order, 0 to 2**32 - 1.
    start_step: step of the first batch.
    left_out: batches of the order that no step reads.
    rows: rows of each micro-batch to read (`sharding.local_rows`); None = all.
    threads: that read rows; 0 = read when asked.
    prefetch: steps read ahead.

  Raises:
    ConfigError: no window in the split, a batch that cannot be divided, a seed
      out of range.
  """
  if isinstance(split, windows.Split):
    split = windows.Mixture((split,), (1,))
  for part in split.splits:
    _check_windows(part, seq_len, span)
  _check_divides(batch_size, accumulate)
  columns = slice(None) if rows is None else rows

  def read(rows_B: np.ndarray) -> Batch:
    rows_AB = rows_B.reshape(accumulate, -1)[:, columns]
    return _read(split, rows_AB, seq_len, span)

  order = _index_batches(split.sizes(seq_len, span), split.weights, seed, batch_size)
  steps = (
    grain.MapDataset.range(start_step, sys.maxsize)
    .map(lambda step: order[index_of(int(step), left_out)])
    .map(read)
  )
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
  return iter(steps.to_iter_dataset(options))


def index_of(step: int, left_out: Ranges) -> int:
  """The place of a step's batch in the order."""
  for first, count in left_out:
    if step >= first:
      step += count
  return step


def leave_out(left_out: Ranges, first: int, last: int) -> Ranges:
  """`left_out` and batches first..last: rising ranges that do not touch."""
  first = max(first, 0)
  found: list[list[int]] = []
  for begin, count in sorted([*left_out, (first, last - first + 1)]):
    if found and begin <= sum(found[-1]):
      found[-1][1] = max(sum(found[-1]), begin + count) - found[-1][0]
    else:
      found.append([begin, count])
  return tuple((begin, count) for begin, count in found)


def row_indices(
  sizes: Sequence[int], weights: Sequence[int], seed: int, batch_size: int, step: int
) -> np.ndarray:
  """Windows that a training step reads, in the order of the global batch.

  Args:
    sizes: windows of each split.
    weights: of each split, positive integers: shares of windows.
    seed: of the order.
    batch_size: windows of a step.
    step: which.

  Returns:
    numbers of windows, counted through all splits, as windows.Mixture does.
  """
  return _index_batches(sizes, weights, seed, batch_size)[step]


def interleave(row: int, weights: Sequence[int]) -> tuple[int, int]:
  """Row of a mixture -> (which part it is of, how many rows of it came before).

  The first part takes every row at which row * weight / sum(weights) passes a
  whole number; what it leaves goes to the others in the same way. So sum(
  weights) rows in a row that begin at a multiple of it hold exactly weight rows
  of each part, and any number of first rows of it are less than one off for the
  first part.
  """
  left = sum(weights)
  for part, weight in enumerate(weights):
    before, after = row * weight // left, (row + 1) * weight // left
    if after > before:
      return part, before
    row, left = row - before, left - weight
  raise ValueError(f'weights {weights} must be positive')


def eval_batches(
  split: windows.Split,
  *,
  seq_len: int,
  span: int,
  batch_size: int,
  limit: int | None = None,
  rows: np.ndarray | None = None,
) -> Iterator[Batch]:
  """Every window once, in store order, as {'tokens', 'position'} (1, b, U), and
  'scored' of a masked split.

  The last batch is filled up with rows of token 0 at position 0 throughout,
  which hold no valid target. At most limit batches, of windows that are as far
  apart as the split allows: its beginning may be one long document. Of each
  batch the given rows, None = all.
  """
  _check_windows(split, seq_len, span)
  _check_divides(batch_size, 1)
  rows_B = np.arange(batch_size) if rows is None else rows
  n = split.n_windows(seq_len, span)
  n_read = n if limit is None else min(limit * batch_size, n)

  def read(start: int) -> Batch:
    row_B = start + rows_B
    window_B = np.where(row_B < n_read, row_B * n // n_read, n)
    return _read(split, window_B[None], seq_len, span)

  return map(read, range(0, n_read, batch_size))


def _index_batches(sizes, weights, seed: int, batch_size: int):
  if not 0 <= seed < 2**32:
    raise fields.ConfigError('train.seed', seed, 'from 0 to 2**32 - 1')
  orders = [
    grain.MapDataset.range(size).seed((seed + i) % 2**32).shuffle().repeat()
    for i, size in enumerate(sizes)
  ]
  first_S = np.cumsum([0, *sizes])[:-1]

  def pick(row):
    part, before = interleave(int(row), weights)
    return first_S[part] + orders[part][before]

  return grain.MapDataset.range(sys.maxsize).map(pick).batch(batch_size)


def _read(split, rows_AB: np.ndarray, seq_len: int, span: int) -> Batch:
  """The windows; a row past the last one stays 0."""
  n_windows = split.n_windows(seq_len, span)
  shape = (*rows_AB.shape, seq_len + span)
  batch = {name: np.zeros(shape, np.int32) for name in ('tokens', 'position')}
  if split.masked:
    batch['scored'] = np.zeros(shape, bool)
  for place, row in np.ndenumerate(rows_AB):
    if row < n_windows:
      tokens_U, position_U = split.window(row, seq_len, span)
      batch['tokens'][place], batch['position'][place] = tokens_U, position_U
      if split.masked:
        batch['scored'][place] = split.mask(row, seq_len, span)
  return batch


def _check_windows(split, seq_len: int, span: int):
  if not split.n_windows(seq_len, span):
    raise fields.ConfigError(
      'data.seq_len', seq_len, f'no shard of the {split.name} split has {seq_len} + {span} tokens'
    )


def _check_divides(batch_size: int, accumulate: int):
  if batch_size < 1 or batch_size % accumulate:
    raise fields.ConfigError(
      'data.batch_size',
      batch_size,
      f'must be a multiple of {accumulate} micro-batches (--train.grad_accum_steps)',
    )
