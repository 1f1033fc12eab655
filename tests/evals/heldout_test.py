"""Held-out metrics, compared with the training loss and the reference."""

import jax
import numpy as np
import pytest

from mtp_jax.evals import heldout
from tests.support import oracle, tiny


def _evaluate(c, step, batches):
  m = tiny.mesh(c)
  bytes_V = jax.device_put(np.ones(c.model.vocab_size, np.int32), jax.NamedSharding(m, jax.P()))
  return heldout.evaluator(c, m, bytes_V)(tiny.model(c, m), batches, step)


def test_heldout_loss_equals_training_loss_for_any_batching():
  c = tiny.cfg(heads__n=3, loss__z_loss=1e-2, loss__weights='0:1,.3')
  rows = tiny.batch(c)
  halves = [{k: x[:, s] for k, x in rows.items()} for s in (slice(4), slice(4, 8))]
  (total, sums), _ = tiny.value_and_grad(c, rows)
  for batches in ([rows], halves):
    got = _evaluate(c, 10, batches)
    np.testing.assert_allclose(got['total'], total, rtol=1e-5)
    got = tiny.means(got, got['count_K'])
    for name in ('loss_K', 'z_loss_K', 'accuracy_K', 'accepted_K'):
      np.testing.assert_allclose(got[name], sums[name], rtol=1e-5)


@pytest.mark.parametrize('family', ['parallel', 'anticausal'])
def test_heldout_uses_heads_and_weights_of_the_last_step(family):
  c = tiny.cfg(
    heads__n=3, heads__family=family, loss__curriculum='0:1;20:3', loss__weights='0:1,.5;20:1,.1'
  )
  rows = tiny.batch(c)
  for step, m, weights in ((20, 1, [1]), (21, 3, [1, 0.1, 0.1])):
    got = _evaluate(c, step, [rows])
    sums = _oracle(c, rows, m)
    got = tiny.means(got, got['count_K'])
    assert got['loss_K'].shape == (m,)
    np.testing.assert_allclose(got['loss_K'], sums['loss_K'], rtol=1e-5)
    np.testing.assert_allclose(got['total'], weights @ got['loss_K'], rtol=1e-6)


def _oracle(c, rows, m):
  """Returns the losses of a model with heads 1..m only, in float64."""
  params = tiny.flat(tiny.model(c, tiny.mesh(c)))
  params = {name: x[:m] if name.startswith('heads.') else x for name, x in params.items()}
  shape = oracle.Shape(c.heads.family, m)
  tokens_BU, position_BU = (
    rows[name][0, :, : c.data.seq_len + shape.span] for name in ('tokens', 'position')
  )
  logits_KBTV = oracle.forward(params, tokens_BU, position_BU, shape)
  return oracle.losses(logits_KBTV, tokens_BU, position_BU, shape)


def test_heldout_metrics_without_targets_are_none():
  c = tiny.cfg(heads__n=2)
  rows = tiny.batch(c)
  rows['position'][:] = 0
  from mtp_jax.losses import metrics

  values = metrics.scalars(_evaluate(c, 1, [rows]))
  assert set(values.values()) == {None}
