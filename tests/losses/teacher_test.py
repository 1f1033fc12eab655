"""Losses of acceptance with another model as the teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.checkpoint import teacher as checkpoint_teacher
from mtp_jax.config import draft_vocab, fields, schema
from mtp_jax.losses import acceptance, cross_entropy, multi_token, targets
from mtp_jax.losses import teacher as teacher_lib
from mtp_jax.model import flops, next_token
from mtp_jax.parallel import sharding
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib
from tests.support import oracle, tiny

WEIGHTS = np.array([1, 0.5, 0.3])


def _cfg(family='residual', n=3, mesh=(1, 1, 1), **changes):
  n_layers = 2 + (n if schema.HEAD_FAMILIES[family] else 0)
  sizes = dict(zip(('mesh__data', 'mesh__fsdp', 'mesh__tensor'), mesh, strict=True))
  changes = dict(loss__teacher='RUN', loss__head_loss='kl', loss__weights='0:1,.5,.3') | changes
  return tiny.cfg(model__n_layers=n_layers, heads__family=family, heads__n=n, **sizes, **changes)


def _was(family='causal', n=2, **changes):
  """The config of a wider teacher with another family of heads."""
  none = dict(loss__teacher='', loss__head_loss='ce', loss__weights='0:1', model__logits_scale=1.5)
  return _cfg(family, n, **none | dict(model__d_model=24, model__n_attn_heads=2) | changes)


def _teacher(was, c, m) -> teacher_lib.Model:
  """Of `tiny.model` of a config, as a run of c loads it."""
  cfg = checkpoint_teacher.config(was, c)
  with jax.set_mesh(m):
    w = jax.jit(lambda w: next_token.model(w, was))(tiny.model(was, m))
  return teacher_lib.Model(w, cfg)


def _teacher_logits(was, flat, T):
  w = tiny.flat(tiny.model(was, tiny.mesh(was)))
  shape = oracle.Shape(was.heads.family, was.heads.n, block=oracle.Block(logits_scale=1.5))
  return oracle.forward(w, flat['tokens'], flat['position'], shape)[0][:, :T]


def _flat(rows):
  return {name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()}


def _masked(rows):
  rng = np.random.default_rng(1)
  return rows | dict(loss_mask=rng.random(rows['tokens'].shape) < 0.8)


CASES = [
  # loss, student, teacher, its unembedding, backward, chunk, micro-batches, mesh, masked
  ('kl', 'residual', 'causal', 'replicated', 'interleaved', 4, 2, (1, 1, 1), True),
  ('tv', 'sequential', 'anticausal', 'shared', 'remat', 4, 1, (2, 2, 2), False),
  ('lk', 'parallel', 'linear', 'tied', 'interleaved', 0, 1, (1, 2, 2), False),
  ('lk_hybrid', 'causal', 'sequential', 'tied', 'remat', 0, 2, (1, 1, 1), True),
  ('e2e_tv', 'residual', 'parallel', 'shared', 'interleaved', 4, 1, (2, 2, 1), False),
]


def _check_gradients(grads, value, base):
  """Along a random direction, against the oracle's."""
  rng = np.random.default_rng(0)
  grads = tiny.flat(grads)
  along = {
    path: rng.normal(size=grad.shape) / max(np.linalg.norm(grad), 1e-9)
    for path, grad in grads.items()
  }
  numeric = oracle.derivative(value, base, along, eps=1e-8)
  analytic = sum(np.sum(grads[path] * along[path]) for path in along)
  assert abs(analytic - numeric) < 3e-5


@pytest.mark.parametrize(
  'loss, family, other, unembedding, backward, chunk, accumulate, mesh, masked',
  [
    pytest.param(*case, id=case[0], marks=[pytest.mark.slow] if case[0] == 'lk' else [])
    for case in CASES
  ],
)
def test_equals_oracle(loss, family, other, unembedding, backward, chunk, accumulate, mesh, masked):
  """Value, and gradients along a random direction."""
  filters = dict(temperature=0.7, top_p=0.8) if masked else {}
  c = _cfg(
    family,
    mesh=mesh,
    loss__head_loss=loss,
    loss__lk_eta=2.0 if loss == 'lk_hybrid' else 3.0,
    loss__head_ce_weight=0.3,
    loss__backward=backward,
    loss__chunk_size=chunk,
    train__grad_accum_steps=accumulate,
    **{f'loss__{name}': value for name, value in filters.items()},
  )
  was = _was(other, heads__unembedding=unembedding)
  rows = _masked(tiny.batch(c)) if masked else tiny.batch(c)
  m = tiny.mesh(c)
  (total, sums), (grads, _) = tiny.value_and_grad(c, rows, teacher=_teacher(was, c, m))
  flat, shape = _flat(rows), oracle.Shape(family, 3)
  how = oracle.Comparison(loss, 2.0, **filters)
  teacher_BTV = _teacher_logits(was, flat, c.data.seq_len)
  base, mask_BU = tiny.flat(tiny.model(c, m)), flat.get('loss_mask')
  logits = functools.partial(
    oracle.forward, tokens_BU=flat['tokens'], position_BU=flat['position'], shape=shape
  )
  compared = functools.partial(
    oracle.compared,
    teacher_BTV=teacher_BTV,
    position_BU=flat['position'],
    shape=shape,
    how=how,
    mask_BU=mask_BU,
  )
  found = compared(logits(base))

  def value(w):
    logits_KBTV = logits(w)
    loss_K = oracle.losses(logits_KBTV, flat['tokens'], flat['position'], shape, mask_BU=mask_BU)[
      'loss_K'
    ]
    drafts_K = compared(logits_KBTV, held=found['alpha'])['loss_K']
    share_K = np.array([1, 0.3, 0.3])
    return float(WEIGHTS @ (share_K * loss_K + (1 - share_K) * drafts_K))

  np.testing.assert_allclose(total, value(base), rtol=1e-5)
  np.testing.assert_array_equal(sums['draft_count_K'], found['count_K'])
  np.testing.assert_allclose(sums['teacher_alpha_sum_K'], found['alpha_sum_K'], rtol=1e-5)
  assert 'alpha_sum_K' not in sums  # of head 1, which verifies: in evaluations
  _check_gradients(grads, value, base)


@pytest.mark.parametrize(
  'family',
  ['parallel', *(pytest.param(f, marks=pytest.mark.slow) for f in ('residual', 'anticausal'))],
)
def test_a_teacher_that_is_the_model_gives_the_loss_without_one(family):
  c = _cfg(family, loss__head_loss='lk_hybrid')
  itself = schema.replace(c, **{'loss.teacher': ''})
  rows, m = tiny.batch(c), tiny.mesh(c)
  (total, sums), (grads, norms) = tiny.value_and_grad(c, rows, teacher=_teacher(c, c, m))
  (want, of_head_1), (same, their_norms) = tiny.value_and_grad(itself, rows)
  np.testing.assert_allclose(total, want, rtol=1e-6)
  np.testing.assert_allclose(sums['teacher_alpha_sum_K'], of_head_1['alpha_sum_K'], rtol=1e-6)
  np.testing.assert_allclose(norms, their_norms, rtol=1e-4)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def _stored(teacher_BTV, rows, P):
  """The batch with the teacher's P most probable tokens at each query, as a store has them."""
  order_BTV = np.argsort(-teacher_BTV, axis=-1)
  log_BTV = teacher_BTV - np.log(np.sum(np.exp(teacher_BTV), axis=-1, keepdims=True))
  log_BTV = np.take_along_axis(log_BTV, order_BTV, axis=-1)
  with np.errstate(divide='ignore'):
    rest_BT1 = np.log(np.sum(np.exp(log_BTV[..., P:]), axis=-1, keepdims=True))
  logp_BTP1 = np.concatenate([log_BTV[..., :P], rest_BT1], axis=-1).astype(np.float16)
  of = dict(teacher_ids=order_BTV[..., :P].astype(np.int32), teacher_logp=logp_BTP1)
  rows_AB = rows['tokens'].shape[:2]
  return rows | {name: x.reshape(*rows_AB, *x.shape[1:]) for name, x in of.items()}


STORED = [
  # loss, backward, chunk, micro-batches, mesh, filters
  ('kl', 'interleaved', 4, 2, (1, 1, 1), {}),
  ('tv', 'interleaved', 0, 1, (1, 2, 2), {}),
  ('lk_hybrid', 'remat', 4, 1, (2, 2, 2), {}),
  ('lk', 'remat', 0, 1, (1, 1, 1), dict(temperature=0.7, top_k=5, top_p=0.9)),
  ('lk_hybrid', 'interleaved', 4, 1, (1, 2, 2), dict(drafted=tuple(range(1, 32, 2)))),
]


@pytest.mark.parametrize(
  'loss, backward, chunk, accumulate, mesh, filters',
  STORED,
  ids=['kl', 'tv', 'lk_hybrid', 'lk', 'drafted'],
)
def test_stored_teacher_equals_oracle(loss, backward, chunk, accumulate, mesh, filters):
  """Value, and gradients along a random direction, where 6 of 32 tokens are known."""
  drafted = filters.get('drafted', ())
  filters = {name: value for name, value in filters.items() if name != 'drafted'}
  c = _cfg(
    mesh=mesh,
    heads__draft_vocab=draft_vocab.recorded(np.array(drafted), 32) if drafted else '',
    loss__teacher='store',
    loss__head_loss=loss,
    loss__backward=backward,
    loss__chunk_size=chunk,
    train__grad_accum_steps=accumulate,
    **{f'loss__{name}': value for name, value in filters.items()},
  )
  rows = _masked(tiny.batch(c))
  flat, m = _flat(rows), tiny.mesh(c)
  shape = oracle.Shape('residual', 3, drafted=drafted)
  rows = _stored(_teacher_logits(_was(), flat, c.data.seq_len), rows, 6)
  (total, sums), (grads, _) = tiny.value_and_grad(c, rows)
  base = tiny.flat(tiny.model(c, m))
  logits = functools.partial(
    oracle.forward, tokens_BU=flat['tokens'], position_BU=flat['position'], shape=shape
  )
  stored = [
    rows[f'teacher_{name}'].reshape(-1, *rows[f'teacher_{name}'].shape[2:]).astype(float)
    for name in ('ids', 'logp')
  ]
  compared = functools.partial(
    oracle.compared,
    teacher_BTV=None,
    position_BU=flat['position'],
    shape=shape,
    how=oracle.Comparison(loss, **filters),
    mask_BU=flat['loss_mask'],
    stored=stored,
  )
  found = compared(logits(base))

  def value(w):
    logits_KBTV = logits(w)
    loss_1 = oracle.losses(
      logits_KBTV[:1], flat['tokens'], flat['position'], shape, mask_BU=flat['loss_mask']
    )['loss_K'][0]
    return float(loss_1 + WEIGHTS[1:] @ compared(logits_KBTV, held=found['alpha'])['loss_K'][1:])

  np.testing.assert_allclose(total, value(base), rtol=1e-5)
  np.testing.assert_allclose(sums['teacher_alpha_sum_K'], found['alpha_sum_K'], rtol=1e-5)
  _check_gradients(grads, value, base)


@pytest.mark.slow
def test_all_tokens_of_a_teacher_stored_give_its_loss():
  """To what float16 rounds; the bucket of the others is empty."""
  c = _cfg(loss__head_loss='lk_hybrid')
  of_store = schema.replace(c, **{'loss.teacher': 'store'})
  rows, m, was = tiny.batch(c), tiny.mesh(c), _was()
  rows_of_store = _stored(_teacher_logits(was, _flat(rows), c.data.seq_len), rows, 32)
  (total, sums), (grads, _) = tiny.value_and_grad(of_store, rows_of_store)
  (want, of_teacher), (same, _) = tiny.value_and_grad(c, rows, teacher=_teacher(was, c, m))
  np.testing.assert_allclose(total, want, rtol=1e-4)
  np.testing.assert_allclose(
    sums['teacher_alpha_sum_K'], of_teacher['teacher_alpha_sum_K'], rtol=1e-3
  )
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-4)


def test_kl_of_few_stored_tokens_is_at_most_that_of_all():
  """A bucket has less information; of q that is all but stored, log(q_rest) is exact."""
  rng = np.random.default_rng(0)
  z_BCV, y_BCV = (jnp.array(rng.normal(size=(2, 3, 32)), jnp.float32) for _ in range(2))
  z_BCV = z_BCV.at[0, 0].add(40 * (y_BCV[0, 0] == jnp.max(y_BCV[0, 0])))
  c = _cfg(loss__teacher='store')
  eye, zeros = jnp.eye(32), jnp.zeros((2, 3), int)
  of = cross_entropy.logits(z_BCV, eye, zeros, tiny.cfg().model)
  whole = acceptance.of_chunk(of, y_BCV, c.loss)[1]
  kl = {}
  for P in (1, 4, 31):
    rows = _stored(np.asarray(y_BCV), dict(tokens=np.zeros((1, 2, 3))), P)
    stored = acceptance.Stored(rows['teacher_ids'][0], rows['teacher_logp'][0])
    kl[P] = acceptance.of_stored(of, stored, c)[1]
  assert np.all(kl[1] <= kl[4] + 0.01) and np.all(kl[4] <= kl[31] + 0.01)
  np.testing.assert_allclose(kl[31], whole, rtol=5e-3)
  assert kl[1][0, 0] > 15  # p_rest is large, log(q_rest) about -37


def test_stored_probabilities_of_a_sharded_vocabulary_are_never_gathered():
  c = _cfg(
    n=2,
    mesh=(1, 2, 2),
    loss__teacher='store',
    loss__weights='0:1',
    loss__chunk_size=4,
    model__vocab_size=88,
  )
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    text = step_lib.trace(c, m, 2, teacher=6).lower().compile().as_text()
  gathers = [line for line in text.splitlines() if ' all-gather(' in line]
  assert gathers and not any(',4,88]' in line for line in gathers)
  assert any(',4,44]' in line for line in text.splitlines())  # a shard of a chunk's


@pytest.mark.parametrize('flag, value', [('temperature', 0.7), ('top_p', 0.9), ('min_p', 0.1)])
def test_stored_teacher_refuses_what_it_cannot_give(flag, value):
  with pytest.raises(fields.ConfigError, match=f'--loss.{flag}={value}: must be [01] with'):
    _cfg(loss__teacher='store', **{f'loss__{flag}': value})
  _cfg(loss__teacher='store', loss__top_k=6, **{f'loss__{flag}': value})


def test_evaluation_has_rates_of_head_1_and_the_loss_of_the_teacher():
  c = _cfg(loss__head_loss='tv')
  rows, m = tiny.batch(c), tiny.mesh(c)
  teacher, w = _teacher(_was(), c, m), tiny.model(c, m)

  @functools.partial(jax.jit, static_argnames='of')
  def evaluate(w, rows, teacher, of):
    rows = jax.tree.map(lambda x: x[0], rows)
    return multi_token.evaluate(w, rows, n_active=3, cfg=of, teacher=teacher)[0]

  with jax.set_mesh(m):
    placed = sharding.put_batch(m, rows)
    sums = jax.device_get(evaluate(w, placed, teacher, c))
    alone = jax.device_get(evaluate(w, placed, None, c))
  (_, trained), _ = tiny.value_and_grad(c, rows, teacher=teacher)
  for name in ('alpha_sum_K', 'alpha_in_a_row_K', 'loss_sum_K', 'accepted_K'):
    np.testing.assert_array_equal(sums[name], alone[name])
  for name in ('draft_loss_sum_K', 'teacher_alpha_sum_K'):
    np.testing.assert_allclose(sums[name], trained[name], rtol=1e-5)
  assert np.all(np.abs(sums['draft_loss_sum_K'] - alone['draft_loss_sum_K'])[1:] > 1)


def test_step_does_not_move_the_teacher():
  """It is an argument of the step: neither donated nor differentiated nor in the state."""
  c = _cfg(optim__warmup_steps=0)
  m = tiny.mesh(c)
  teacher = _teacher(_was(), c, m)
  before = jax.device_get(teacher.params)
  bytes_V = np.ones(c.model.vocab_size, np.int32)
  with jax.set_mesh(m):
    step = step_lib.compiled(c, 3)
    state, rows = state_lib.init(c, m), sharding.put_batch(m, tiny.batch(c))
    shapes = jax.tree.map(np.shape, state)
    for _ in range(2):
      state, _ = step(state, rows, bytes_V, teacher)
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(teacher.params))
  assert jax.tree.map(np.shape, state) == shapes


def test_flops_have_the_teachers_forward_pass():
  c = _cfg()
  was = _was()
  of = checkpoint_teacher.config(was, c)
  found, alone = flops.forward(c, 3, teacher=of), flops.forward(c, 3)
  of_was = flops.forward(was, 1)
  assert found.teacher_trunk == of_was.trunk + of_was.heads > 0 == alone.teacher_trunk
  assert found.teacher == alone.teacher * 24 / 16
  assert flops.forward(c, 1, teacher=of).teacher_trunk == 0
  m = tiny.mesh(c)
  for backward in ('remat', 'interleaved'):
    c = _cfg(loss__backward=backward, model__attention='reference')
    with jax.set_mesh(m):
      traced = step_lib.trace(c, m, 3, teacher=of)
    assert all(np.size(x) < 100 for x in traced.jaxpr.consts)
    program = flops.of_program(traced.jaxpr, c.data.seq_len)
    tokens = c.data.batch_size * c.data.seq_len
    assert program == tokens * flops.executed(c, 3, causal=False, teacher=of)


def test_a_step_without_its_teacher_raises():
  c = _cfg()
  m = tiny.mesh(c)
  with jax.set_mesh(m), pytest.raises(fields.ConfigError, match='--loss.teacher=RUN: '):
    step_lib.trace(c, m, 3)
  with pytest.raises(fields.ConfigError, match='--loss.teacher=RUN: needs another --loss.head'):
    _cfg(loss__head_loss='ce')
  rows = {name: x[None] for name, x in _flat(tiny.batch(c)).items()}
  assert targets.counts(rows, c, 1).draft_K.tolist() == [0]  # one head needs none
  with jax.set_mesh(m):
    step_lib.trace(c, m, 1)
