"""Batches of windows in an order that only (seed, step) decides.

Floor 3: NumPy and grain. The order is one sequence of window indices: a fresh
permutation each epoch, cut into global batches. Each process takes the rows
of its devices out of a global batch of indices and reads only those, so step s
is made of the same rows for any number of processes, and the data position is
the step.
"""

from collections.abc import Iterator

import grain
import numpy as np

from mtp_jax import config
from mtp_jax.data import windows

Batch = dict[str, np.ndarray]


def train_batches(
  split: windows.Split,
  *,
  seq_len: int,
  span: int,
  batch_size: int,
  accumulate: int,
  seed: int,
  start_step: int = 0,
  rows: np.ndarray | None = None,
  threads: int = 2,
  prefetch: int = 8,
) -> Iterator[Batch]:
  """Endless {'tokens', 'position'}, int32 of shape (A, b, U), from start_step.

  A = accumulate micro-batches of b rows, all batch_size / A of a micro-batch or
  those of `rows`, of U = seq_len + span tokens. Seeking costs nothing.

  Args:
    split: what to read.
    seq_len: queries of a window; windows are this far apart.
    span: further tokens a window carries for targets.
    batch_size: windows of an optimizer step, over all processes.
    accumulate: micro-batches of an optimizer step.
    seed: of the order, 0 to 2**32 - 1.
    start_step: step of the first batch.
    rows: rows of each micro-batch to read (`sharding.local_rows`); None = all.
    threads: that read rows; 0 = read when asked.
    prefetch: steps read ahead.

  Raises:
    ConfigError: no window in the split, a batch that cannot be divided, a seed
      out of range.
  """
  _check_windows(split, seq_len, span)
  _check_divides(batch_size, accumulate)
  columns = slice(None) if rows is None else rows

  def read(rows_B: np.ndarray) -> Batch:
    rows_AB = rows_B.reshape(accumulate, -1)[:, columns]
    return _read(split, rows_AB, seq_len, span)

  n_windows = split.n_windows(seq_len, span)
  steps = _index_batches(n_windows, seed, batch_size)[start_step:].map(read)
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=max(prefetch, threads)
  )
  return iter(steps.to_iter_dataset(options))


def row_indices(
  n_windows: int, seed: int, batch_size: int, step: int
) -> np.ndarray:
  """Windows that training step reads, in the order of the global batch."""
  return _index_batches(n_windows, seed, batch_size)[step]


def eval_batches(
  split: windows.Split,
  *,
  seq_len: int,
  span: int,
  batch_size: int,
  limit: int | None = None,
  rows: np.ndarray | None = None,
) -> Iterator[Batch]:
  """Every window once, in store order, as {'tokens', 'position'} (1, b, U).

  The last batch is filled up with rows of token 0 at position 0 throughout,
  which hold no valid target. At most limit batches; of each the given rows,
  None = all.
  """
  _check_windows(split, seq_len, span)
  _check_divides(batch_size, 1)
  rows_B = np.arange(batch_size) if rows is None else rows
  starts = range(0, split.n_windows(seq_len, span), batch_size)

  def read(start: int) -> Batch:
    return _read(split, start + rows_B[None], seq_len, span)

  return map(read, starts[:limit])


def _index_batches(n_windows: int, seed: int, batch_size: int):
  if not 0 <= seed < 2**32:
    raise config.ConfigError('train.seed', seed, 'from 0 to 2**32 - 1')
  order = grain.MapDataset.range(n_windows).seed(seed).shuffle().repeat()
  return order.batch(batch_size)


def _read(split, rows_AB: np.ndarray, seq_len: int, span: int) -> Batch:
  """The windows; a row past the last one stays 0."""
  n_windows = split.n_windows(seq_len, span)
  shape = (*rows_AB.shape, seq_len + span)
  tokens_ABU, position_ABU = (
    np.zeros(shape, np.int32),
    np.zeros(shape, np.int32),
  )
  for place, row in np.ndenumerate(rows_AB):
    if row < n_windows:
      tokens_U, position_U = split.window(row, seq_len, span)
      tokens_ABU[place], position_ABU[place] = tokens_U, position_U
  return {'tokens': tokens_ABU, 'position': position_ABU}


def _check_windows(split, seq_len: int, span: int):
  if not split.n_windows(seq_len, span):
    raise config.ConfigError(
      'data.seq_len', seq_len,
      f'no shard of the {split.name} split has {seq_len} + {span} tokens',
    )  # fmt: skip


def _check_divides(batch_size: int, accumulate: int):
  if batch_size < 1 or batch_size % accumulate:
    raise config.ConfigError(
      'data.batch_size', batch_size,
      f'must be a multiple of {accumulate} micro-batches (--train.accumulate)',
    )  # fmt: skip
