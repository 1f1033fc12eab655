"""The library as a user imports it: statements of the documentation, on one device and
on a mesh, beside the train step and decoder of the command line."""

import dataclasses
import doctest
import itertools

import jax
import numpy as np
import pytest

import mtp_jax as mtp
from mtp_jax.api import runs
from tests.support import tiny

FAMILIES = ('parallel', 'sequential', 'recursive', 'residual', 'anticausal')


def _cfg(family, **heads):
  return mtp.Config(
    model=mtp.ModelConfig(
      d_model=32, n_layers=4, d_ff=64, vocab_size=264, compute_dtype='float32', remat='none'
    ),
    heads=mtp.HeadsConfig(n=3, family=family, **heads),
    data=mtp.DataConfig(batch_size=4, seq_len=16),
    optim=mtp.OptimConfig(warmup_steps=2),
    train=mtp.TrainConfig(steps=10, grad_accum_steps=2),
    loss=mtp.LossConfig(backward='interleaved'),
  )


def _tokens(cfg):
  shape = (4, 16 + cfg.span)
  return np.random.default_rng(0).integers(0, 256, shape).astype(np.int32)


def test_the_statements_of_the_docstring_run():
  found = doctest.testmod(mtp)
  assert found.attempted >= 7 and not found.failed


@pytest.mark.parametrize(
  'family, unembedding',
  [
    *((family, 'shared') for family in FAMILIES),
    *itertools.product(('parallel', 'recursive'), ('tied', 'replicated')),
  ],
)
def test_logits_equal_the_unrolled_reference(family, unembedding):
  """Where the token that a head reads lies within the row."""
  cfg = _cfg(family, unembedding=unembedding)
  params, tokens_BU = mtp.init(cfg, jax.random.key(0)), _tokens(cfg)
  B, U = tokens_BU.shape
  T = U - cfg.span
  with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
    position_BU = np.broadcast_to(np.arange(U), (B, U))
    want_KBTV = tiny.dense_logits(params, tokens_BU, position_BU, cfg)
  got_KBTV = mtp.logits(params, tokens_BU, cfg)[:, :, :T]
  np.testing.assert_allclose(got_KBTV, want_KBTV, rtol=1e-4, atol=1e-4)


def test_loss_is_that_of_the_train_step_and_its_gradient_of_its_update():
  cfg = _cfg('sequential')
  batch = {'tokens': _tokens(cfg)}
  state = mtp.init_state(cfg)
  (loss, sums), grads = jax.value_and_grad(mtp.loss, has_aux=True)(state.params, batch, cfg)
  jitted, _ = jax.jit(mtp.loss, static_argnums=2)(state.params, batch, cfg)
  norm = np.sqrt(sum(float((g.astype(np.float32) ** 2).sum()) for g in jax.tree.leaves(grads)))
  _, metrics = mtp.train_step(state, batch, cfg)
  np.testing.assert_allclose([loss, jitted], metrics['loss'], rtol=1e-5)
  np.testing.assert_allclose(norm, metrics['grad_norm'], rtol=1e-4)
  means = np.array(sums['loss_sum_K']) / np.array(sums['count_K'])
  np.testing.assert_allclose(means, [metrics[f'loss_{k}'] for k in (1, 2, 3)], rtol=1e-5)


def test_a_mesh_of_the_context_gives_the_same_loss():
  cfg = _cfg('parallel')
  batch = {'tokens': _tokens(cfg)}
  one, _ = mtp.loss(mtp.init(cfg, jax.random.key(0)), batch, cfg)
  sharded = mtp.Config(**{**vars(cfg), 'mesh': mtp.MeshConfig(data=2, fsdp=2)})
  with mtp.mesh(sharded, jax.devices()[:4]):
    params = mtp.init(sharded, jax.random.key(0))
    assert len(jax.tree.leaves(params)[0].devices()) == 4
    several, _ = mtp.loss(params, batch, sharded)
  np.testing.assert_allclose(several, one, rtol=1e-5)


def test_parameters_without_a_mesh_are_refused():
  cfg = _cfg('parallel')
  bare = jax.tree.map(np.asarray, mtp.init(cfg, jax.random.key(0)))
  with pytest.raises(ValueError, match='have no mesh'):
    mtp.logits(jax.tree.map(jax.numpy.asarray, bare), _tokens(cfg), cfg)


@pytest.mark.parametrize('family', FAMILIES)
def test_generate_drafts_what_plain_decoding_writes(family):
  cfg = _cfg(family)
  params = mtp.init(cfg, jax.random.key(1))
  plain = mtp.generate(params, [[1, 2, 3], [7]], cfg, max_new_tokens=6, num_draft_tokens=0)
  for drafts in ('all', 'auto'):
    drafted = mtp.generate(params, [[1, 2, 3], [7]], cfg, max_new_tokens=6, num_draft_tokens=drafts)
    np.testing.assert_array_equal(drafted, plain)


def test_generate_measures_the_number_of_drafts_by_default():
  cfg = _cfg('parallel')
  model = runs.Model(mtp.init(cfg, jax.random.key(1)), cfg)
  prompts = [[1, 2, 3], [7]]
  plain = model.decode(prompts, max_new_tokens=70, num_draft_tokens=0, temperature=0.8, seed=3)
  measured = model.decode(prompts, max_new_tokens=70, temperature=0.8, seed=3)
  assert plain.auto is None and measured.auto.forward_s
  for row, wanted in zip(measured.tokens, plain.tokens, strict=True):
    np.testing.assert_array_equal(row, wanted)
  assert model.decode(prompts, max_new_tokens=6, num_draft_tokens='all').auto is None


def test_drafts_of_few_tokens_and_few_steps():
  tokens = mtp.draft_vocab(range(0, 256, 2), 264)
  of = dict(draft_vocab=tokens, share_keys_values=True, confidence=True)
  cfg = _cfg('recursive', **of)
  cfg = dataclasses.replace(cfg, loss=mtp.LossConfig(head_loss='kl'))
  model = runs.Model(mtp.init(cfg, jax.random.key(1)), cfg)
  at = dict(max_new_tokens=20, num_draft_tokens=2)
  plain, none = (model.decode([[1, 2, 3]], min_confidence=c, **at) for c in (0.0, 1.0))
  np.testing.assert_array_equal(plain.tokens[0], none.tokens[0])
  assert none.proposed_J[1] == 0 < none.proposed_J[0]  # after the first draft, none is sure
  with pytest.raises(ValueError, match='needs --decode.num_draft_tokens=all or a number'):
    model.decode([[1]], min_confidence=0.5)
  size = dataclasses.replace(cfg, heads=mtp.HeadsConfig(n=3, draft_vocab='128'))
  with pytest.raises(ValueError, match=r'--heads.draft_vocab=128: .* use draft_vocab\(ids'):
    mtp.init(size, jax.random.key(0))


def test_save_then_load_is_identity_and_refuses_what_exists(tmp_path):
  cfg = _cfg('residual')
  params = mtp.init(cfg, jax.random.key(0))
  mtp.save(params, cfg, tmp_path / 'run', tokenizer='bytes')
  model = mtp.load(tmp_path / 'run')
  jax.tree.map(np.testing.assert_array_equal, model.params, params)
  found = model.generate('def ', max_new_tokens=4, num_draft_tokens=1)
  assert found.text.startswith('def ') and len(found.tokens) <= 4
  with pytest.raises(ValueError, match='exists; give another directory'):
    mtp.save(params, cfg, tmp_path / 'run')
  mtp.save(params, cfg, tmp_path / 'ids')
  with pytest.raises(ValueError, match='has no tokenizer'):
    mtp.load(tmp_path / 'ids').generate('x')


def test_surplus_arguments_raise():
  cfg = _cfg('parallel')
  with pytest.raises(TypeError, match='too many positional arguments'):
    mtp.logits(mtp.init(cfg, jax.random.key(0)), _tokens(cfg), cfg, 3)
