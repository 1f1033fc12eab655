"""Windows, compared with a loop over documents, token by token."""

import numpy as np
import pytest

from mtp_jax.data import windows

LENGTHS = ((5, 2, 9, 1, 30, 3), (4,), (1, 1, 1, 40), (2,))


def _split(lengths=LENGTHS) -> windows.Split:
  token, tokens, offsets = 0, [], []
  for shard in lengths:
    ends = np.cumsum(shard)
    tokens.append(np.arange(token, token + ends[-1]).astype('<u2'))
    offsets.append((ends - shard).astype('<u8'))
    token += ends[-1]
  return windows.Split('train', tuple(tokens), tuple(offsets))


def test_split_documents_yields_all_documents():
  expected = [length for shard in LENGTHS for length in shard]
  found = list(_split().documents())
  assert [tokens.size for tokens in found] == expected
  assert np.concatenate(found).tolist() == list(range(sum(expected)))


def _by_hand(lengths, seq_len: int, span: int):
  """Returns (tokens, positions, documents) of all windows, by counting."""
  found, token, document = [], 0, 0
  for shard in lengths:
    rows = []
    for length in shard:
      for at in range(length):
        rows.append((token, at, document))
        token += 1
      document += 1
    start = 0
    while start + seq_len + span <= len(rows):
      window = rows[start : start + seq_len + span]
      first = window[0]
      positions = [at - first[1] if doc == first[2] else at for _, at, doc in window]
      found.append(([t for t, _, _ in window], positions, window))
      start += seq_len
  return found


@pytest.mark.parametrize('seq_len', [1, 2, 3, 7, 16, 45])
@pytest.mark.parametrize('span', [1, 2, 4])
def test_windows_match_reference_loop(seq_len, span):
  split, expected = _split(), _by_hand(LENGTHS, seq_len, span)
  assert split.n_windows(seq_len, span) == len(expected)
  for index, (tokens, positions, _) in enumerate(expected):
    tokens_U, position_U = split.window(index, seq_len, span)
    assert tokens_U.dtype == position_U.dtype == np.int32
    assert tokens_U.tolist() == tokens and position_U.tolist() == positions


@pytest.mark.parametrize('seq_len, span', [(3, 1), (7, 4), (16, 4)])
def test_valid_targets_stay_in_their_document(seq_len, span):
  """position[t+k] == position[t] + k iff t and t + k share a document."""
  split = _split()
  for index, (_, _, window) in enumerate(_by_hand(LENGTHS, seq_len, span)):
    _, position_U = split.window(index, seq_len, span)
    for k in range(1, span + 1):
      for t in range(seq_len):
        valid = position_U[t + k] == position_U[t] + k
        assert valid == (window[t][2] == window[t + k][2])


@pytest.mark.parametrize('seq_len, span', [(1, 1), (7, 4), (44, 2)])
def test_index_out_of_range(seq_len, span):
  split = _split()
  n = split.n_windows(seq_len, span)
  for index in (-1, n, n + 100):
    with pytest.raises(IndexError, match=f'window {index} of {n} in train'):
      split.window(index, seq_len, span)
  assert split.n_windows(1000, 1) == 0
  with pytest.raises(IndexError, match='window 0 of 0 in train'):
    split.window(0, 1000, 1)


@pytest.mark.parametrize('seq_len, span', [(0, 1), (4, 0), (4, -1)])
def test_empty_windows_raise(seq_len, span):
  with pytest.raises(ValueError, match='must be at least 1'):
    _split().n_windows(seq_len, span)


def test_offsets_beyond_float64_are_exact():
  """uint64 offsets are searched as integers: 2**53 + 1 is no float64."""
  far = 2**53

  class Far:  # a shard of which only the last tokens exist
    size = far + 10

    def __getitem__(self, at):
      return np.arange(at.start - far, at.stop - far, dtype=np.uint16)

  offsets = np.array([0, far + 1, far + 4], '<u8')
  split = windows.Split('train', (Far(),), (offsets,))
  tokens_U, position_U = split.window(far // 8, 8, 1)
  assert tokens_U.tolist() == list(range(9))
  assert position_U.tolist() == [0, 0, 1, 2, 0, 1, 2, 3, 4]


@pytest.mark.parametrize('n, longest', [(1, 9), (700, 3), (5000, 2), (999, 90)])
def test_offsets_between_match_a_full_search(n, longest):
  rng = np.random.default_rng(n)
  length_M = rng.integers(1, longest, n, endpoint=True)
  length_M[: n // 3] = 1  # so that a guess by the mean is far off
  offset_M = (np.cumsum(length_M) - length_M).astype('<u8')
  size = int(length_M.sum())
  for first in [0, size - 1, *rng.integers(0, size, 50).tolist()]:
    for width in (1, 7, size):
      low, high = np.searchsorted(offset_M, np.array([first, first + width], np.uint64))
      found = windows.between(offset_M, first, first + width, size)
      assert found.tolist() == offset_M[low:high].tolist()
