import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from mtp_jax import config
from mtp_jax.data import loader, windows

T, SPAN = 7, 3
U = T + SPAN


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
    rows_B = loader.row_indices(n, 3, 8, step)
    assert batch['tokens'].shape == (1, 8, U)
    for b, row in enumerate(rows_B):
      tokens_U, position_U = split.window(row, T, SPAN)
      np.testing.assert_array_equal(batch['tokens'][0, b], tokens_U)
      np.testing.assert_array_equal(batch['position'][0, b], position_U)


@pytest.mark.parametrize('n, batch_size', [(1, 4), (2, 3), (35, 8), (1000, 7)])
def test_every_epoch_is_a_new_permutation(n, batch_size):
  n_steps = -(-5 * n // batch_size)
  steps = [loader.row_indices(n, 0, batch_size, s) for s in range(n_steps)]
  epochs_EN = np.concatenate(steps)[: 5 * n].reshape(5, n)
  for epoch_N in epochs_EN:
    assert sorted(epoch_N) == list(range(n))
  if n > 10:
    assert len({tuple(epoch_N) for epoch_N in epochs_EN}) == 5
    other = loader.row_indices(n, 1, batch_size, 0)
    assert not np.array_equal(steps[0], other)


def test_seek_equals_uninterrupted():
  whole = _train(40)
  for start in (1, 5, 17, 39):
    _assert_equal(_train(40 - start, start_step=start), whole[start:])
  far = loader.row_indices(_split().n_windows(T, SPAN), 3, 8, 10**9)
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


def test_rows_need_not_lie_together():
  rows = np.array([0, 3, 6])
  for some, whole in (
    (_train(5, rows=rows), _train(5)),
    (_eval(rows=rows), _eval()),
  ):
    _assert_equal(some, [{k: x[:, rows] for k, x in b.items()} for b in whole])


@pytest.mark.parametrize('accumulate', [2, 4, 8])
def test_accumulate_is_a_reshape(accumulate):
  whole = [
    {key: array.reshape(accumulate, -1, U) for key, array in batch.items()}
    for batch in _train(5)
  ]
  _assert_equal(_train(5, accumulate=accumulate), whole)


def test_threads_do_not_change_the_order():
  whole = _train(50, threads=0)
  for threads in (1, 4, 16):
    _assert_equal(_train(50, threads=threads), whole)
  _assert_equal(_train(50, threads=2, prefetch=1), whole)


def test_a_process_reads_its_own_rows_only():
  split, read = _split(), []

  class Counting(windows.Split):
    def window(self, index, *args):
      read.append(index)
      return super().window(index, *args)

  _train(3, Counting(*split), threads=0, rows=np.array([2, 3]))
  rows = [loader.row_indices(split.n_windows(T, SPAN), 3, 8, s) for s in (0, 1)]
  assert read[:4] == [*rows[0][2:4], *rows[1][2:4]] and len(read) == 6


def test_fewer_windows_than_a_batch_repeat():
  split = _split((25,))
  assert split.n_windows(T, SPAN) == 3
  first = [batch['tokens'][0, :, 0] for batch in _train(3, split)]
  assert np.bincount(np.concatenate(first) // T).tolist() == [8, 8, 8]


def test_errors():
  for call in (_eval, lambda split: _train(1, split)):
    with pytest.raises(config.ConfigError) as error:
      call(_split((9,)))
    assert str(error.value) == (
      '--data.seq_len=7: no shard of the train split has 7 + 3 tokens'
    )
  with pytest.raises(config.ConfigError, match='--data.batch_size=8: must'):
    _train(1, accumulate=3)
  with pytest.raises(config.ConfigError, match='--data.batch_size=0: '):
    _eval(batch_size=0)
  for seed in (-1, 2**32):
    with pytest.raises(config.ConfigError, match=f'--train.seed={seed}: from'):
      _train(1, seed=seed)


def test_errors_of_a_reading_thread_reach_the_loop():
  class Failing(windows.Split):
    def window(self, *args):
      raise OSError('disk gone')

  with pytest.raises(OSError, match='disk gone'):
    _train(1, Failing(*_split()))


@pytest.mark.parametrize('batch_size', [1, 4, 8, 33, 34, 35, 100])
def test_eval_reads_each_window_once_and_pads(batch_size):
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
  for limit, n in ((1, 1), (3, 3), (99, 5), (0, 0)):
    _assert_equal(_eval(limit=limit), whole[:n])
  for process_count in (2, 4, 8):
    rows = np.arange(8).reshape(process_count, -1)
    parts = [_eval(rows=mine) for mine in rows]
    _assert_equal(_concatenate(parts), whole)


def test_no_flags_are_needed():
  """grain's workers want parsed absl flags; its threads must not."""
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
    [sys.executable, '-c', program],
    cwd=root,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == '(1, 2, 5)\n'
