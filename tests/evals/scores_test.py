"""Scores of single tokens sum to the float64 reference loss, to which
tests/losses/loss_test.py compares the training loss."""

import jax
import numpy as np
import pytest

from mtp_jax.config import schema
from mtp_jax.evals import scores
from mtp_jax.losses import cross_entropy
from mtp_jax.model import heads
from tests.support import tiny


@pytest.mark.parametrize(
  'family, unembedding, mesh',
  [
    *((f, 'shared', (2, 2, 2)) for f in heads.FAMILIES),
    ('parallel', 'tied', (1, 1, 1)),
    ('parallel', 'replicated', (8, 1, 1)),
    ('sequential', 'replicated', (1, 4, 2)),
  ],
)
def test_score_sums_match_the_loss(family, unembedding, mesh):
  c = tiny.cfg(
    model__n_layers=2 + 3 * (schema.HEAD_FAMILIES[family]),
    heads__n=3,
    heads__family=family,
    heads__unembedding=unembedding,
    mesh__data=mesh[0],
    mesh__fsdp=mesh[1],
    mesh__tensor=mesh[2],
    data__batch_size=16,
  )
  m, batch = tiny.mesh(c), tiny.batch(c)
  w = tiny.model(c, m)
  rows = {name: x[0] for name, x in batch.items()}
  sums = tiny.oracle_losses(c, rows)
  got = scores.of_batch(w, rows, m, c, n_active=3)
  count_K = got.valid.sum((1, 2))
  np.testing.assert_array_equal(count_K, sums['count_K'])
  np.testing.assert_allclose(
    (got.nats * got.valid).sum((1, 2)) / count_K, sums['loss_K'], rtol=2e-5
  )
  correct = (got.rank == 0) & got.valid
  np.testing.assert_allclose(correct.sum((1, 2)) / count_K, sums['accuracy_K'], rtol=1e-6)
  target = np.stack([rows['tokens'][:, k : k + c.data.seq_len] for k in (1, 2, 3)])
  np.testing.assert_array_equal(got.rank == 0, got.argmax == target)
  assert (got.top <= 1).all() and (np.exp(-got.nats) <= got.top + 1e-6).all()


def test_scores_do_not_depend_on_the_batch():
  """For rows of any length, padded or not, in batches of any size."""
  c = tiny.cfg(heads__n=2, data__batch_size=16)
  m = tiny.mesh(c)
  w, rng = tiny.model(c, m), np.random.default_rng(0)
  rows = [rng.integers(0, c.model.vocab_size, size=n) for n in (70, 3, 40, 2, 9)]
  together = scores.of_rows(w, rows, m, c, n_active=2, batch_size=5)
  for i, row in enumerate(rows):
    (alone,) = scores.of_rows(w, [row], m, c, n_active=2, batch_size=1)
    assert together[i].nats.shape == (2, len(row) - 1)
    assert together[i].valid[0].all()
    assert together[i].valid[1].sum() == len(row) - 2
    for a, b in zip(alone, together[i], strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_ranks_on_known_logits():
  logits = np.array([1.0, 3.0, 3.0, 2.0, 0.0], np.float32)
  h, unembed = np.ones((1, 5, 1), np.float32), logits[None]
  with jax.set_mesh(tiny.mesh(tiny.cfg())):
    target = np.arange(5)[None]
    nats, rank, top, best = scores.of_target(
      cross_entropy.logits(h, unembed, target, schema.ModelConfig()), target
    )
  p = np.exp(logits) / np.exp(logits).sum()
  np.testing.assert_allclose(np.exp(-nats[0]), p, rtol=1e-6)
  assert rank[0].tolist() == [3, 0, 1, 2, 4] and (best == 1).all()
  np.testing.assert_allclose(top, p[1], rtol=1e-6)
