"""Loss masks: masked tokens are inputs of all heads and targets of none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.evals import heldout
from mtp_jax.losses import targets
from tests.support import tiny

# One program per backward strategy serves all tests.
REMAT = tiny.cfg(heads__n=2, model__n_layers=3, loss__chunk_size=8)
INTERLEAVED = tiny.cfg(
  heads__n=2,
  model__n_layers=2,
  heads__family='sequential',
  loss__backward='interleaved',
  train__grad_accum_steps=2,
)
BOTH = pytest.mark.parametrize('c', [REMAT, INTERLEAVED], ids=['remat', 'interleaved'])


def _rows(c, share=0.5):
  """Returns a packed batch; row 0 is fully masked, row 1 not at all."""
  rows = tiny.batch(c)
  shape = rows['tokens'].shape
  scored_BU = np.random.default_rng(1).random((8, shape[-1])) < share
  scored_BU[0], scored_BU[1] = False, True
  return rows | dict(loss_mask=scored_BU.reshape(shape))


def _flat(rows):
  return {name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()}


def _mask_by_hand(rows, c):
  """(counted_KBT, float): target by target."""
  flat, K, T = _flat(rows), c.heads.n, c.data.seq_len
  counted_KBT = np.zeros((K, 8, T))
  for k, b, t in np.ndindex(*counted_KBT.shape):
    position_U, there = flat['position'][b], t + k + 1
    ahead = position_U[there] - position_U[t]
    counted_KBT[k, b, t] = flat['loss_mask'][b, there] and ahead == k + 1
  return counted_KBT


@functools.partial(jax.jit, static_argnames='c')
def _by_hand(w, flat, counted_KBT, *, c):
  """Every logit of every head at once: ((total, loss_K), gradients)."""

  def total(w):
    logits_KBTV = tiny.dense_logits(w, flat['tokens'], flat['position'], c)
    targets_KBT, _ = targets.targets(flat, c)
    onehot_KBTV = jax.nn.one_hot(targets_KBT, c.model.vocab_size)
    nll_KBT = -jnp.sum(onehot_KBTV * jax.nn.log_softmax(logits_KBTV), -1)
    loss_K = jnp.sum(nll_KBT * counted_KBT, (1, 2)) / counted_KBT.sum((1, 2))
    return jnp.sum(loss_K), loss_K

  return jax.value_and_grad(total, has_aux=True)(w)


def _wanted(rows, c):
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    return jax.device_get(_by_hand(tiny.model(c, m), _flat(rows), _mask_by_hand(rows, c), c=c))


@BOTH
def test_loss_mask_equals_reference(c):
  rows = _rows(c)
  (total, sums), (grads, _) = tiny.value_and_grad(c, rows)
  (want, loss_K), wanted = _wanted(rows, c)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  np.testing.assert_allclose(sums['loss_K'], loss_K, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), grads, wanted)


@BOTH
def test_masked_tokens_do_not_affect_the_loss(c):
  """Tokens after the last query are targets only: masked ones may be any."""
  rows = _rows(c, share=1)
  T = c.data.seq_len
  other = rows | dict(tokens=rows['tokens'].copy())
  other['tokens'][..., T:] = (rows['tokens'][..., T:] + 1) % 32
  (a, _), _ = tiny.value_and_grad(c, rows)
  (b, _), _ = tiny.value_and_grad(c, other)
  assert a != b
  rows['loss_mask'][..., T:] = False
  if c.heads.family == 'sequential':  # which also reads token T
    rows['position'][..., T:] = other['position'][..., T:] = 0
  jax.tree.map(
    np.testing.assert_array_equal, tiny.value_and_grad(c, rows), tiny.value_and_grad(c, other)
  )


def test_full_loss_mask_equals_no_mask():
  rows = _rows(REMAT)
  rows['loss_mask'][:] = True
  masked = tiny.value_and_grad(REMAT, rows)
  del rows['loss_mask']
  plain = tiny.value_and_grad(REMAT, rows)
  jax.tree.map(np.testing.assert_array_equal, masked, plain)


@BOTH
def test_fully_masked_batch_has_zero_loss(c):
  rows = _rows(c)
  rows['loss_mask'][:] = False
  (total, sums), grads = tiny.value_and_grad(c, rows)
  assert total == 0 and not sums['loss_K'].any()
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_held_out_loss_uses_the_loss_mask():
  rows, m = _rows(REMAT), tiny.mesh(REMAT)
  bytes_V = jax.device_put(np.full(32, 3, np.int32), jax.NamedSharding(m, jax.P()))
  w = tiny.model(REMAT, m)
  got = heldout.evaluator(REMAT, m, bytes_V)(w, [rows], 1)
  (total, loss_K), _ = _wanted(rows, REMAT)
  count_K = _mask_by_hand(rows, REMAT).sum((1, 2))
  means = tiny.means(got, got['count_K'])
  np.testing.assert_allclose(means['loss_K'], loss_K, rtol=1e-5)
  np.testing.assert_allclose(got['total'], total, rtol=1e-5)
  np.testing.assert_array_equal(got['count_K'], count_K)
  assert count_K[0] != count_K[1]  # each head's is its own
  assert got['bytes'] == 3 * count_K[0]
  np.testing.assert_allclose(got['loss_sum_K'][0], loss_K[0] * count_K[0], rtol=1e-5)
