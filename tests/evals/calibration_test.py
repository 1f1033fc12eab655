"""Calibration bins, on known values and compared with single scores."""

import numpy as np
import pytest

from mtp_jax.evals import calibration, heldout, scores
from tests.support import tiny


def _evaluator(c, m):
  return heldout.evaluator(c, m, np.ones(c.model.vocab_size, np.int32), calibrated=True)


@pytest.mark.parametrize('mesh', [(1, 1, 1), (2, 2, 2)])
def test_calibration_sums_match_single_scores(mesh):
  c = tiny.cfg(
    heads__n=2, mesh__data=mesh[0], mesh__fsdp=mesh[1], mesh__tensor=mesh[2], data__batch_size=16
  )
  m, batch = tiny.mesh(c), tiny.batch(c)
  w = tiny.model(c, m)
  halves = [{k: x[:, s] for k, x in batch.items()} for s in (slice(8), slice(8, 16))]
  got = _evaluator(c, m)(w, halves, 1)['calibration']
  s = scores.of_batch(w, {k: x[0] for k, x in batch.items()}, m, c, 2)
  for k in range(2):
    valid = s.valid[k]
    assert got['count_K'][k] == valid.sum()
    assert got['top_K'][k] == (s.rank[k][valid] < 5).sum()
    edges = np.linspace(0, 1, calibration.BINS + 1)
    n, _ = np.histogram(s.top[k][valid], edges)
    assert got['count_KX'][k].tolist() == n.tolist()
    right, _ = np.histogram(s.top[k][valid & (s.rank[k] == 0)], edges)
    assert got['right_KX'][k].tolist() == right.tolist()
    np.testing.assert_allclose(got['sure_KX'][k].sum(), s.top[k][valid].sum(), rtol=1e-5)


def test_calibration_covers_trained_heads():
  c = tiny.cfg(heads__n=2, loss__curriculum='0:1;20:2')
  m = tiny.mesh(c)
  run, rows = _evaluator(c, m), [tiny.batch(c)]
  for step, n in ((20, 1), (21, 2)):
    found = run(tiny.model(c, m), rows, step)
    assert found['calibration']['count_K'].shape == (n,)


def test_calibration_error_on_known_values():
  """Ten with probability .9, of which 7 are right, ten with .3, of which 5 are."""
  total = dict(
    count_K=np.array([20.0]),
    top_K=np.array([15.0]),
    right_KX=np.array([[5.0, 7.0]]),
    sure_KX=np.array([[3.0, 9.0]]),
    count_KX=np.array([[10.0, 10.0]]),
  )
  found = calibration.scalars(total)
  assert found == dict(top5_1=0.75, calibration_error_1=pytest.approx(0.2))
  assert calibration.table(found)[1].split() == ['1', '75.00%', '20.00%']


def test_calibration_error_is_zero_or_nan_without_targets():
  total = dict(
    count_K=np.array([4.0, 0.0]),
    top_K=np.array([4.0, 0.0]),
    right_KX=np.array([[1.0, 2.0], [0, 0]]),
    sure_KX=np.array([[1.0, 2.0], [0, 0]]),
  )
  np.testing.assert_array_equal(calibration.error(total), [0, np.nan])
  found = calibration.scalars(total)
  assert (found['top5_1'], np.isnan(found['top5_2'])) == (1, True)
  assert calibration.table(found)[2].split() == ['2', '-', '-']
