"""Batches of windows in an order that depends on (seed, step) only.

NumPy and grain. The order is one sequence of window indices, split into global
batches: each split of a mixture is shuffled anew in each of its epochs, and the
splits are interleaved by weight. Each process takes the rows of its devices
from a global batch of indices and reads only those, so that a step has the same
rows for any number of processes, and the data position is the step.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from mtp_jax.config import fields
from mtp_jax.data import windows

Batch = dict[str, np.ndarray]
Ranges = tuple[tuple[int, int], ...]  # (first batch, count), ascending


def train_batches(
  split: windows.Split | windows.Mixture,
  *,
  seq_len: int,
  span: int,
  batch_size: int,
  accumulate: int,
  seed: int,
  start_step: int = 0,
  skipped_batches: Ranges = (),
  rows: np.ndarray | None = None,
  threads: int = 2,
  prefetch: int = 8,
) -> Iterator[Batch]:
  """Yields {'tokens', 'position'}, int32 of shape (A, b, U), without end.

  A = accumulate micro-batches of b rows, all batch_size / A of a micro-batch or
  those of `rows`, of U = seq_len + span tokens; also 'loss_mask', bool, if a
  split of the mixture has one; and, if it was opened with a stored teacher, 'teacher_ids',
  int32 (A, b, T, P), and 'teacher_logp', float16 (A, b, T, P + 1). Seeking is free.

  Args:
    split: what to read, or a mixture.
    seq_len: queries per window; windows are this far apart.
    span: further tokens per window, for the targets.
    batch_size: windows per optimizer step, over all processes.
    accumulate: micro-batches per optimizer step.
    seed: random seed of the order, 0 to 2**32 - 1.
    start_step: step of the first batch.
    skipped_batches: batches of the order that no step reads.
    rows: rows of each micro-batch to read (`sharding.local_rows`); None = all.
    threads: number of reader threads; 0 = read on demand.
    prefetch: steps to read ahead.

  Raises:
    ConfigError: a split without windows, an indivisible batch, a seed out of
      range.
  """
  if isinstance(split, windows.Split):
    split = windows.Mixture((split,), (1,))
  for part in split.splits:
    check_windows(part, seq_len, span)
  check_divides(batch_size, accumulate)
  columns = slice(None) if rows is None else rows

  def read(rows_B: np.ndarray) -> Batch:
    rows_AB = rows_B.reshape(accumulate, -1)[:, columns]
    return _read(split, rows_AB, seq_len, span)

  order = _index_batches(split.sizes(seq_len, span), split.weights, seed, batch_size)
  steps = (
    grain.MapDataset.range(start_step, sys.maxsize)
    .map(lambda step: order[index_of(int(step), skipped_batches)])
    .map(read)
  )
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
  return iter(steps.to_iter_dataset(options))


def index_of(step: int, skipped_batches: Ranges) -> int:
  """Returns the index of a step's batch in the order."""
  for first, count in skipped_batches:
    if step >= first:
      step += count
  return step


def with_skipped(skipped_batches: Ranges, first: int, last: int) -> Ranges:
  """Returns `skipped_batches` with first..last added: ascending, disjoint ranges."""
  first = max(first, 0)
  found: list[list[int]] = []
  for begin, count in sorted([*skipped_batches, (first, last - first + 1)]):
    if found and begin <= sum(found[-1]):
      found[-1][1] = max(sum(found[-1]), begin + count) - found[-1][0]
    else:
      found.append([begin, count])
  return tuple((begin, count) for begin, count in found)


def row_indices(
  sizes: Sequence[int], weights: Sequence[int], seed: int, batch_size: int, step: int
) -> np.ndarray:
  """Returns the windows of a training step, in the order of the global batch.

  Args:
    sizes: number of windows per split.
    weights: positive integer per split, its share of the windows.
    seed: random seed of the order.
    batch_size: windows per step.
    step: training step.

  Returns:
    indices of windows, numbered over all splits, as in windows.Mixture.
  """
  return _index_batches(sizes, weights, seed, batch_size)[step]


def interleave(row: int, weights: Sequence[int]) -> tuple[int, int]:
  """Maps a row of a mixture to (its part, the number of earlier rows of that part).

  The first part takes every row at which row * weight / sum(weights) passes an
  integer; the remaining rows are distributed over the other parts in the same
  way. So each aligned block of sum(weights) rows has exactly `weight` rows of
  each part, and every prefix of it deviates by less than one row for the first
  part.
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
  """Yields every window once, in store order, as {'tokens', 'position'} (1, b, U),
  with 'loss_mask' and a stored teacher if the split has them.

  The last batch is padded with rows of token 0 at position 0, which have no
  valid target. At most limit batches, of windows spread evenly over the split,
  since its start may be one long document. rows: as in `train_batches`.
  """
  check_windows(split, seq_len, span)
  check_divides(batch_size, 1)
  rows_B = np.arange(batch_size) if rows is None else rows
  n = split.n_windows(seq_len, span)
  n_read = n if limit is None else min(limit * batch_size, n)

  def read(start: int) -> Batch:
    row_B = start + rows_B
    window_B = np.where(row_B < n_read, row_B * n // n_read, n)
    return _read(split, window_B[None], seq_len, span)

  return map(read, range(0, n_read, batch_size))


def _index_batches(sizes, weights, seed: int, batch_size: int) -> Any:
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
  """Reads the windows; rows past the last window are 0."""
  n_windows = split.n_windows(seq_len, span)
  shape = (*rows_AB.shape, seq_len + span)
  batch: Batch = {name: np.zeros(shape, np.int32) for name in ('tokens', 'position')}
  if split.masked:
    batch['loss_mask'] = np.zeros(shape, bool)
  if P := split.teacher_top_k:
    queries = (*rows_AB.shape, seq_len)
    batch['teacher_ids'] = np.zeros((*queries, P), np.int32)
    batch['teacher_logp'] = np.zeros((*queries, P + 1), np.float16)
  for place, row in np.ndenumerate(rows_AB):
    if row < n_windows:
      tokens_U, position_U = split.window(row, seq_len, span)
      batch['tokens'][place], batch['position'][place] = tokens_U, position_U
      if split.masked:
        batch['loss_mask'][place] = split.mask(row, seq_len, span)
      if P:
        of_teacher = split.teacher(row, seq_len, span)
        batch['teacher_ids'][place], batch['teacher_logp'][place] = of_teacher
  return batch


def check_windows(split, seq_len: int, span: int):
  if not split.n_windows(seq_len, span):
    raise fields.ConfigError(
      'data.seq_len', seq_len, f'no shard of the {split.name} split has {seq_len} + {span} tokens'
    )


def check_divides(batch_size: int, accumulate: int):
  if batch_size < 1 or batch_size % accumulate:
    raise fields.ConfigError(
      'data.batch_size',
      batch_size,
      f'must be a multiple of {accumulate} micro-batches (--train.grad_accum_steps)',
    )
