"""Windows of packed tokens: what a model reads from one split of a store.

Floor 2: NumPy. A window is U = seq_len + span tokens, windows are seq_len apart
and stay within a shard; span = K gives every query its K targets. The tail of
a shard that fills no window is left out.
"""

from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
  """Memory-mapped shards; the reads of windows are pure."""

  name: str
  tokens: tuple[np.ndarray, ...]  # one array a shard
  offsets: tuple[np.ndarray, ...]

  def n_windows(self, seq_len: int, span: int) -> int:
    """Windows of seq_len + span tokens, seq_len apart, within a shard."""
    return int(self._windows_S(seq_len, span).sum())

  def window(self, index: int, seq_len: int, span: int):
    """(tokens_U, position_U), int32; position 0 starts window or document."""
    end_S = np.cumsum(self._windows_S(seq_len, span))
    if not 0 <= index < end_S[-1]:
      raise IndexError(f'window {index} of {end_S[-1]} in {self.name}')
    s = int(np.searchsorted(end_S, index, 'right'))
    first = int(end_S[s - 1]) if s else 0
    start, length = (int(index) - first) * seq_len, seq_len + span
    tokens_U = self.tokens[s][start : start + length].astype(np.int32)
    # With a Python int NumPy would turn all offsets into float64 first.
    bounds = np.array([start, start + length], np.uint64)
    lo, hi = np.searchsorted(self.offsets[s], bounds)
    at_M = (self.offsets[s][lo:hi] - bounds[0]).astype(np.int32)
    begin_U = np.zeros(length, np.int32)
    begin_U[at_M] = at_M
    position_U = np.arange(length, dtype=np.int32)
    return tokens_U, position_U - np.maximum.accumulate(begin_U)

  def _windows_S(self, seq_len: int, span: int) -> np.ndarray:
    if seq_len < 1 or span < 1:
      raise ValueError(f'{seq_len=} and {span=} must be at least 1')
    size_S = np.array([tokens.size for tokens in self.tokens], np.int64)
    return np.maximum(size_S - span, 0) // seq_len
