"""Windows of packed tokens, the examples that a model reads from a split.

A window has U = seq_len + span tokens; windows start seq_len apart and stay
within a shard. span = K gives every query its K targets. The tail of a shard
that does not fill a window is dropped.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

BLOCK = 512  # offsets per read


class _Shards(NamedTuple):
  name: str
  tokens: tuple[Any, ...]  # one per shard; anything that slices to an array
  offsets: tuple[Any, ...]
  loss_mask: tuple[Any, ...] = ()  # bool; () = all True
  teacher_ids: tuple[Any, ...] = ()  # P per token; () = no teacher, or not opened
  teacher_logp: tuple[Any, ...] = ()  # P + 1 per token


class Split(_Shards):
  """The shards of a split (arrays, or shards.File); window reads are pure."""

  @property
  def masked(self) -> bool:
    """Whether the split has a loss mask."""
    return bool(self.loss_mask)

  @property
  def teacher_top_k(self) -> int:
    """Returns P, the tokens per position of a stored teacher; 0 without one."""
    return self.teacher_ids[0].size // self.tokens[0].size if self.teacher_ids else 0

  def documents(self) -> Iterator[np.ndarray]:
    """Yields the tokens of each document, in store order."""
    for tokens, offset_M in zip(self.tokens, self.offsets, strict=True):
      bounds = itertools.chain(offset_M[:].tolist(), [tokens.size])
      yield from (tokens[begin:end] for begin, end in itertools.pairwise(bounds))

  def n_windows(self, seq_len: int, span: int) -> int:
    """Returns the number of windows of seq_len + span tokens."""
    return int(self._ends_S(seq_len, span)[-1])

  def window(self, index: int, seq_len: int, span: int):
    """Returns (tokens_U, position_U), int32; position 0 starts a window or document."""
    s, start = self._find(index, seq_len, span)
    length = seq_len + span
    tokens_U = self.tokens[s][start : start + length].astype(np.int32)
    offset_M = between(self.offsets[s], start, start + length, self.tokens[s].size)
    at_M = (offset_M - np.uint64(start)).astype(np.int32)
    begin_U = np.zeros(length, np.int32)
    begin_U[at_M] = at_M
    position_U = np.arange(length, dtype=np.int32)
    return tokens_U, position_U - np.maximum.accumulate(begin_U)

  def mask(self, index: int, seq_len: int, span: int) -> np.ndarray:
    """Returns loss_mask_U, bool: the tokens of this window that are targets."""
    s, start = self._find(index, seq_len, span)
    if not self.masked:
      return np.ones(seq_len + span, bool)
    return self.loss_mask[s][start : start + seq_len + span]

  def teacher(self, index: int, seq_len: int, span: int):
    """Returns (ids_TP int32, logp_TP1 float16), a stored teacher's most probable next tokens
    at each query of this window."""
    s, start = self._find(index, seq_len, span)
    P = self.teacher_top_k

    def rows(shard, n):
      return shard[start * n : (start + seq_len) * n].reshape(seq_len, n)

    ids_TP = rows(self.teacher_ids[s], P).astype(np.int32)
    return ids_TP, rows(self.teacher_logp[s], P + 1)

  def _find(self, index: int, seq_len: int, span: int) -> tuple[int, int]:
    """Returns (shard, first token in it) of a window."""
    end_S = self._ends_S(seq_len, span)
    if not 0 <= index < end_S[-1]:
      raise IndexError(f'window {index} of {end_S[-1]} in {self.name}')
    s = int(np.searchsorted(end_S, index, 'right'))
    first = int(end_S[s - 1]) if s else 0
    return s, (int(index) - first) * seq_len

  def _ends_S(self, seq_len: int, span: int) -> np.ndarray:
    """Returns the cumulative number of windows per shard; cached."""
    if seq_len < 1 or span < 1:
      raise ValueError(f'{seq_len=} and {span=} must be at least 1')
    if (seq_len, span) not in self._ends:
      size_S = np.array([tokens.size for tokens in self.tokens], np.int64)
      windows_S = np.maximum(size_S - span, 0) // seq_len
      self._ends[seq_len, span] = np.cumsum(windows_S)
    return self._ends[seq_len, span]

  @functools.cached_property
  def _ends(self) -> dict[tuple[int, int], np.ndarray]:
    return {}


def between(offset_M, first: int, end: int, size: int) -> np.ndarray:
  """Returns the offsets from `first` to below `end`, uint64.

  Reads a few blocks of the sorted offsets of a shard of `size` tokens. The first
  guess is close, since document lengths vary little along a shard.
  """
  low, high = 0, offset_M.size  # bounds of the first offset to return
  at = max(0, first * high // max(size, 1) - BLOCK // 2)
  bounds = np.array([first, end], np.uint64)  # a Python int would give float64
  while True:
    at = max(low, min(at, high - BLOCK))
    block_M = offset_M[at : at + BLOCK]
    if at > low and block_M[0] >= bounds[0]:
      high = at
    elif at + BLOCK < high and block_M[-1] < bounds[0]:
      low = at + BLOCK
    else:
      break
    at = (low + high) // 2
  begin, stop = np.searchsorted(block_M, bounds)
  found = [block_M[begin:stop]]
  while stop == BLOCK and at + BLOCK < offset_M.size:
    at += BLOCK
    block_M = offset_M[at : at + BLOCK]
    stop = np.searchsorted(block_M, bounds[1])
    found.append(block_M[:stop])
  return found[0] if len(found) == 1 else np.concatenate(found)


class Mixture(NamedTuple):
  """Splits that are mixed, with windows numbered consecutively over all of them."""

  splits: tuple[Split, ...]
  weights: tuple[int, ...]  # windows of each, per sum(weights) windows

  @property
  def masked(self) -> bool:
    return any(split.masked for split in self.splits)

  def sizes(self, seq_len: int, span: int) -> list[int]:
    return [split.n_windows(seq_len, span) for split in self.splits]

  def n_windows(self, seq_len: int, span: int) -> int:
    return sum(self.sizes(seq_len, span))

  def find(self, index: int, seq_len: int, span: int) -> tuple[int, int]:
    """Returns (split, window in it) of a window of the mixture."""
    end_S = np.cumsum(self.sizes(seq_len, span))
    s = int(np.searchsorted(end_S, index, 'right'))
    return s, int(index) - (int(end_S[s - 1]) if s else 0)

  def window(self, index: int, seq_len: int, span: int):
    s, own = self.find(index, seq_len, span)
    return self.splits[s].window(own, seq_len, span)

  @property
  def teacher_top_k(self) -> int:
    return min(split.teacher_top_k for split in self.splits)

  def teacher(self, index: int, seq_len: int, span: int):
    s, own = self.find(index, seq_len, span)
    return self.splits[s].teacher(own, seq_len, span)

  def mask(self, index: int, seq_len: int, span: int) -> np.ndarray:
    s, own = self.find(index, seq_len, span)
    return self.splits[s].mask(own, seq_len, span)
