import itertools
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from mtp_jax.config import fields
from mtp_jax.data import documents, loader, store, tokenizers, windows

T, SPAN = 7, 3
U = T + SPAN
ROWS_BEFORE_MIXTURES = [[28, 9, 0, 8], [8, 20, 3, 30]]


def _split(sizes=(150, 101, 5)) -> windows.Split:
  """Shards of rising tokens, a document every 11."""
  tokens, offsets, first = [], [], 0
  for size in sizes:
    tokens.append(np.arange(first, first + size).astype('<u2'))
    offsets.append(np.arange(0, size, 11).astype('<u8'))
    first += size
  return windows.Split('train', tuple(tokens), tuple(offsets))


def _train(n_steps: int, split=None, **kwargs) -> list[loader.Batch]:
  defaults = dict(seq_len=T, span=SPAN, batch_size=8, accumulate=1, seed=3)
  batches = loader.train_batches(split or _split(), **defaults | kwargs)
  taken = list(itertools.islice(batches, n_steps))
  batches.close()
  return taken


def _eval(split=None, **kwargs) -> list[loader.Batch]:
  defaults = dict(seq_len=T, span=SPAN, batch_size=8)
  return list(loader.eval_batches(split or _split(), **defaults | kwargs))


def _assert_equal(a: list[loader.Batch], b: list[loader.Batch]):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys() == {'tokens', 'position'}
    for key in x:
      assert x[key].dtype == y[key].dtype == np.int32
      np.testing.assert_array_equal(x[key], y[key])


def _concatenate(parts: list[list[loader.Batch]]) -> list[loader.Batch]:
  """Batches of several processes, put together along b."""
  return [
    {key: np.concatenate([b[key] for b in step], axis=1) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]


def test_batches_are_the_windows_of_row_indices():
  split = _split()
  n = split.n_windows(T, SPAN)
  for step, batch in enumerate(_train(12, split)):
    rows_B = loader.row_indices([n], [1], 3, 8, step)
    assert batch['tokens'].shape == (1, 8, U)
    for b, row in enumerate(rows_B):
      tokens_U, position_U = split.window(row, T, SPAN)
      np.testing.assert_array_equal(batch['tokens'][0, b], tokens_U)
      np.testing.assert_array_equal(batch['position'][0, b], position_U)


@pytest.mark.parametrize('n, batch_size', [(1, 4), (2, 3), (35, 8), (1000, 7)])
def test_every_epoch_is_a_new_permutation(n, batch_size):
  n_steps = -(-5 * n // batch_size)
  steps = [loader.row_indices([n], [1], 0, batch_size, s) for s in range(n_steps)]
  epochs_EN = np.concatenate(steps)[: 5 * n].reshape(5, n)
  for epoch_N in epochs_EN:
    assert sorted(epoch_N) == list(range(n))
  if n > 10:
    assert len({tuple(epoch_N) for epoch_N in epochs_EN}) == 5
    other = loader.row_indices([n], [1], 1, batch_size, 0)
    assert not np.array_equal(steps[0], other)


def test_seek_equals_uninterrupted():
  whole = _train(40)
  for start in (1, 5, 17, 39):
    _assert_equal(_train(40 - start, start_step=start), whole[start:])
  far = loader.row_indices([_split().n_windows(T, SPAN)], [1], 3, 8, 10**9)
  batch = _train(1, start_step=10**9)[0]
  for b, row in enumerate(far):
    tokens_U, _ = _split().window(row, T, SPAN)
    np.testing.assert_array_equal(batch['tokens'][0, b], tokens_U)


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('process_count', [2, 4])
def test_processes_share_one_order(process_count, accumulate):
  rows = np.arange(8 // accumulate).reshape(process_count, -1)
  parts = [_train(10, accumulate=accumulate, rows=mine) for mine in rows]
  assert parts[0][0]['tokens'].shape == (accumulate, rows.shape[1], U)
  _assert_equal(_concatenate(parts), _train(10, accumulate=accumulate))


def test_rows_may_be_non_contiguous():
  rows = np.array([0, 3, 6])
  for some, whole in ((_train(5, rows=rows), _train(5)), (_eval(rows=rows), _eval())):
    _assert_equal(some, [{k: x[:, rows] for k, x in b.items()} for b in whole])


@pytest.mark.parametrize('accumulate', [2, 4, 8])
def test_accumulate_is_a_reshape(accumulate):
  whole = [
    {key: array.reshape(accumulate, -1, U) for key, array in batch.items()} for batch in _train(5)
  ]
  _assert_equal(_train(5, accumulate=accumulate), whole)


def test_threads_do_not_change_the_order():
  whole = _train(50, threads=0)
  for threads in (1, 4, 16):
    _assert_equal(_train(50, threads=threads), whole)
  _assert_equal(_train(50, threads=2, prefetch=1), whole)


def test_process_reads_only_its_own_rows():
  split, read = _split(), []

  class Counting(windows.Split):
    def window(self, index, *args):
      read.append(index)
      return super().window(index, *args)

  _train(3, Counting(*split), threads=0, rows=np.array([2, 3]))
  n = split.n_windows(T, SPAN)
  rows = [loader.row_indices([n], [1], 3, 8, s) for s in (0, 1)]
  assert read[:4] == [*rows[0][2:4], *rows[1][2:4]] and len(read) == 6


def test_fewer_windows_than_a_batch_repeat():
  split = _split((25,))
  assert split.n_windows(T, SPAN) == 3
  first = [batch['tokens'][0, :, 0] for batch in _train(3, split)]
  assert np.bincount(np.concatenate(first) // T).tolist() == [8, 8, 8]


# Mixtures.


def _mixture(weights=(3, 1), sizes=((150, 101), (99,))) -> windows.Mixture:
  splits = [_split(size) for size in sizes]
  return windows.Mixture(tuple(splits), weights)


def _rows(mixture, n_steps, seed=3, batch_size=8) -> np.ndarray:
  sizes = mixture.sizes(T, SPAN)
  return np.concatenate(
    [loader.row_indices(sizes, mixture.weights, seed, batch_size, s) for s in range(n_steps)]
  )


@pytest.mark.parametrize('weights', [(1,), (1, 1), (3, 1), (1, 3), (7, 2, 1), (1, 997), (5, 5, 5)])
def test_interleave_shares_are_exact_and_evenly_spread(weights):
  W = sum(weights)
  parts, before = zip(*(loader.interleave(row, weights) for row in range(3 * W)), strict=True)
  for part, weight in enumerate(weights):
    at = [row for row in range(3 * W) if parts[row] == part]
    assert [before[row] for row in at] == list(range(3 * weight))
    for cycle in range(3):
      inside = [row for row in at if cycle * W <= row < (cycle + 1) * W]
      assert len(inside) == weight
    for row in range(3 * W):  # never far from its share
      assert abs(sum(r <= row for r in at) - (row + 1) * weight / W) < len(weights)
  far = 10**15 * W
  assert [loader.interleave(far + r, weights)[0] for r in range(3 * W)] == [*parts]


def test_mixture_shuffles_each_part_separately():
  mixture = _mixture()
  first, second = mixture.sizes(T, SPAN)
  rows = _rows(mixture, 1, batch_size=32 * first)
  for part, (lo, hi, share) in enumerate([(0, first, 3 / 4), (first, first + second, 1 / 4)]):
    own = rows[(lo <= rows) & (rows < hi)] - lo
    assert own.size == rows.size * share
    epochs = own[: own.size // (hi - lo) * (hi - lo)].reshape(-1, hi - lo)
    assert len(epochs) > 4
    for epoch in epochs:
      assert sorted(epoch) == list(range(hi - lo)), part
    alone = loader.row_indices([hi - lo], [1], 3 + part, own.size, 0)
    np.testing.assert_array_equal(own, alone)


def test_mixture_batches_match_its_windows():
  mixture = _mixture()
  first = mixture.sizes(T, SPAN)[0]
  rows = _rows(mixture, 5).reshape(5, 8)
  for step, batch in enumerate(_train(5, mixture)):
    for b, row in enumerate(rows[step]):
      split = mixture.splits[int(row >= first)]
      own = row - first * (row >= first)
      assert mixture.find(row, T, SPAN) == (row >= first, own)
      tokens_U, position_U = split.window(own, T, SPAN)
      np.testing.assert_array_equal(batch['tokens'][0, b], tokens_U)
      np.testing.assert_array_equal(batch['position'][0, b], position_U)


@pytest.mark.parametrize('process_count', [2, 4])
def test_processes_share_one_mixture_order_from_any_step(process_count):
  mixture = _mixture((2, 1))
  whole = _train(12, mixture, accumulate=2)
  rows = np.arange(4).reshape(process_count, -1)
  parts = [_train(7, mixture, accumulate=2, start_step=5, rows=mine) for mine in rows]
  _assert_equal(_concatenate(parts), whole[5:])


def test_mixture_of_one_split_equals_the_split():
  split = _split()
  _assert_equal(_train(20, windows.Mixture((split,), (1,))), _train(20, split))
  # The same rows as before mixtures existed, so that old runs can be resumed.
  rows = [loader.row_indices([35], [1], 7, 4, s).tolist() for s in (0, 50)]
  assert rows == ROWS_BEFORE_MIXTURES


def test_mixture_part_without_windows_raises():
  mixture = _mixture()
  small = _split((9,))._replace(name='b train')
  with pytest.raises(fields.ConfigError, match='shard of the b train split'):
    _train(1, mixture._replace(splits=(mixture.splits[0], small)))


# Masks.


def _masked(sizes=(150, 101, 5), seed=0) -> windows.Split:
  rng, split = np.random.default_rng(seed), _split(sizes)
  return split._replace(loss_mask=tuple(rng.random(t.size) < 0.5 for t in split.tokens))


def test_loss_mask_matches_its_tokens():
  split = _masked()
  whole = np.concatenate(split.loss_mask)
  plain = _train(3, _split())
  for batch, same in zip(_train(3, split), plain, strict=True):
    assert batch['loss_mask'].dtype == bool
    # A token of _split equals its index.
    np.testing.assert_array_equal(batch['loss_mask'], whole[batch['tokens']])
    _assert_equal([{k: batch[k] for k in same}], [same])
  *_, last = _eval(split)
  n = split.n_windows(T, SPAN) % 8
  assert last['loss_mask'][0, :n].any() and not last['loss_mask'][0, n:].any()


def test_mixture_with_one_masked_split_has_a_loss_mask():
  mixture = windows.Mixture((_split((99,)), _masked()), (1, 1))
  first = mixture.sizes(T, SPAN)[0]
  rows = _rows(mixture, 3).reshape(3, 8)
  for step, batch in enumerate(_train(3, mixture)):
    for b, row in enumerate(rows[step]):
      loss_mask_U = batch['loss_mask'][0, b]
      if row < first:
        assert loss_mask_U.all()
      else:
        own = mixture.splits[1].mask(row - first, T, SPAN)
        np.testing.assert_array_equal(loss_mask_U, own)
        assert not loss_mask_U.all()


def test_loader_errors():
  for call in (_eval, lambda split: _train(1, split)):
    with pytest.raises(fields.ConfigError) as error:
      call(_split((9,)))
    assert str(error.value) == ('--data.seq_len=7: no shard of the train split has 7 + 3 tokens')
  with pytest.raises(fields.ConfigError, match='--data.batch_size=8: must'):
    _train(1, accumulate=3)
  with pytest.raises(fields.ConfigError, match='--data.batch_size=0: '):
    _eval(batch_size=0)
  for seed in (-1, 2**32):
    with pytest.raises(fields.ConfigError, match=f'--train.seed={seed}: from'):
      _train(1, seed=seed)


def test_errors_of_reader_threads_are_raised():
  class Failing(windows.Split):
    def window(self, *args):
      raise OSError('disk gone')

  with pytest.raises(OSError, match='disk gone'):
    _train(1, Failing(*_split()))


def test_overwritten_shard_raises_file_changed(tmp_path):
  texts = (documents.Document(str(i), f'text {i}') for i in range(99))
  store.write(tmp_path / 's', texts, tokenizers.get('bytes'), valid_fraction=0)
  split = store.open_store(tmp_path / 's').split('train')
  batches = loader.train_batches(
    split, seq_len=T, span=SPAN, batch_size=8, accumulate=1, seed=0, prefetch=2
  )
  next(batches)
  path = tmp_path / 's/train/tokens-00000.bin'
  with open(path, 'r+b') as file:
    file.write(bytes(path.stat().st_size))
  with pytest.raises(fields.FileChanged, match='tokens-00000.bin was changed'):
    for _ in range(100):
      next(batches)


@pytest.mark.parametrize('batch_size', [1, 4, 8, 33, 34, 35, 100])
def test_eval_batches_read_each_window_once_and_pad(batch_size):
  split = _split()
  n = split.n_windows(T, SPAN)
  batches = _eval(split, batch_size=batch_size)
  assert len(batches) == -(-n // batch_size)
  assert all(b['tokens'].shape == (1, batch_size, U) for b in batches)
  rows = {k: np.concatenate([b[k][0] for b in batches]) for k in batches[0]}
  for row in range(n):
    tokens_U, position_U = split.window(row, T, SPAN)
    np.testing.assert_array_equal(rows['tokens'][row], tokens_U)
    np.testing.assert_array_equal(rows['position'][row], position_U)
  assert not rows['tokens'][n:].any() and not rows['position'][n:].any()


def test_eval_limit_and_processes():
  whole = _eval()
  assert len(whole) == 5
  for limit in (5, 99):
    _assert_equal(_eval(limit=limit), whole)
  assert not _eval(limit=0)
  for process_count in (2, 4, 8):
    rows = np.arange(8).reshape(process_count, -1)
    parts = [_eval(rows=mine) for mine in rows]
    _assert_equal(_concatenate(parts), whole)


@pytest.mark.parametrize('limit, batch_size', [(1, 8), (3, 8), (4, 3), (16, 2)])
def test_limited_eval_batches_are_spread_over_the_split(limit, batch_size):
  """The windows are distinct and evenly spaced."""
  split = _split()
  n = split.n_windows(T, SPAN)
  batches = _eval(limit=limit, batch_size=batch_size)
  assert len(batches) == limit
  rows = np.concatenate([b['tokens'][0] for b in batches])
  whole = np.concatenate([b['tokens'][0] for b in _eval(batch_size=1)])
  m = limit * batch_size
  expected = [math.floor(i * n / m) for i in range(m)]
  assert len(set(expected)) == m < n
  np.testing.assert_array_equal(rows, whole[expected])
  halves = [
    _eval(limit=limit, batch_size=batch_size, rows=r)
    for r in np.array_split(np.arange(batch_size), min(2, batch_size))
  ]
  _assert_equal(_concatenate(halves), batches)


def test_loader_works_without_parsed_flags():
  """grain's worker processes need parsed absl flags; its threads must not."""
  program = (
    'import numpy as np\n'
    'from mtp_jax.data import loader, windows\n'
    'split = windows.Split("x", (np.arange(99, dtype="<u2"),),'
    ' (np.zeros(1, "<u8"),))\n'
    'batches = loader.train_batches(split, seq_len=4, span=1, batch_size=2,'
    ' accumulate=1, seed=0)\n'
    'print(next(batches)["tokens"].shape)\n'
  )
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run(
    [sys.executable, '-c', program], cwd=root, capture_output=True, text=True, check=True
  )
  assert done.stdout == '(1, 2, 5)\n'


def test_skipped_ranges_are_merged():
  """Compares with a list from which the batches are removed."""
  skipped, order = (), list(range(40))
  for first, last in ((10, 12), (5, 5), (12, 15), (-2, 1), (6, 9), (30, 31)):
    skipped = loader.with_skipped(skipped, first, last)
    order = [x for x in order if not first <= x <= last]
    assert [loader.index_of(i, skipped) for i in range(len(order))] == order
  assert skipped == ((0, 2), (5, 11), (30, 2))


def test_loader_skips_quarantined_batches():
  whole = _train(9)
  some = _train(4, skipped_batches=((1, 2), (5, 1)))
  _assert_equal(some, [whole[i] for i in (0, 3, 4, 6)])
  later = _train(2, skipped_batches=((1, 2), (5, 1)), start_step=3)
  _assert_equal(later, [whole[i] for i in (6, 7)])
