"""The optimizer: schedules, AdamW by hand, groups, dtypes, stochastic rounding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import fields
from mtp_jax.optim import rounding
from mtp_jax.optim import update as update_lib
from mtp_jax.parallel import sharding
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib
from tests.support import pairwise, tiny, updates


@pytest.mark.parametrize(
  'changes, values',
  [
    (
      dict(optim__schedule='cosine', optim__min_lr_ratio=0.1),
      {0: 0, 5: 0.5, 10: 1, 54: 0.55 + 0.45 * math.sin(math.pi / 178), 99: 0.1},
    ),
    (
      dict(optim__schedule='wsd', optim__min_lr_ratio=0.1, optim__decay_steps=20),
      {0: 0, 5: 0.5, 10: 1, 79: 1, 89: 0.55, 99: 0.1},
    ),
    (dict(optim__schedule='constant'), {0: 0, 5: 0.5, 10: 1, 99: 1}),
  ],
)
def test_learning_rate(changes, values):
  c = tiny.cfg(optim__lr=2.0, optim__warmup_steps=10, train__steps=100, **changes)
  for step, want in values.items():
    got = update_lib.learning_rate(c)(jnp.int32(step))
    np.testing.assert_allclose(got, 2 * want, rtol=1e-5, err_msg=str(step))


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
@pytest.mark.parametrize('steps, warmup', [(10, 2), (10, 0), (3, 2), (1, 0)])
def test_schedule_ends_at_the_last_step(schedule, steps, warmup):
  c = tiny.cfg(
    optim__lr=2.0,
    optim__warmup_steps=warmup,
    train__steps=steps,
    optim__schedule=schedule,
    optim__min_lr_ratio=0.1,
    optim__decay_steps=1,
  )
  rate = update_lib.learning_rate(c)
  np.testing.assert_allclose(rate(steps - 1), 0.2, rtol=1e-6)
  if schedule == 'wsd' and steps - warmup > 1:  # a decay of one step
    np.testing.assert_allclose(rate(steps - 2), 2.0, rtol=1e-6)


@functools.cache
def _steps(c, n_steps, n_active=None):
  """(State, metrics) after each of some steps on one batch, on the host."""
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    rows = sharding.put_batch(m, tiny.batch(c))
    bytes_V = jnp.ones(c.model.vocab_size, jnp.int32)
    state = state_lib.init(c, m)
    step = step_lib.compiled(c, n_active or c.heads.n)
    after = []
    for _ in range(n_steps):
      state, values = step(state, rows, bytes_V)
      after.append(jax.device_get((state, values)))
    return after


BY_HAND = dict(
  heads__n=2,
  loss__token_order_weight=0.5,
  optim__lr=1e-2,
  optim__warmup_steps=0,
  optim__clip_norm=0.5,
  optim__schedule='constant',
  optim__weight_decay=0.2,
  optim__eps=1e-6,
)


def test_two_updates_are_adamw_by_hand():
  c = tiny.cfg(**BY_HAND)
  start = state_lib.init(c, tiny.mesh(c))
  w = {k: v.copy() for k, v in tiny.flat(start.params).items()}
  mu = {k: np.zeros_like(v) for k, v in w.items()}
  nu = {k: np.zeros_like(v) for k, v in w.items()}
  rows = tiny.batch(c)
  params = start.params
  for t in (1, 2):
    (_, _), (grads, _) = tiny.value_and_grad(c, rows, params)
    g = tiny.flat(grads)
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    for name, x in g.items():
      x = x * min(1, 0.5 / norm)
      mu[name] = 0.9 * mu[name] + 0.1 * x
      nu[name] = 0.95 * nu[name] + 0.05 * x**2
      direction = mu[name] / (1 - 0.9**t) / (np.sqrt(nu[name] / (1 - 0.95**t)) + 1e-6)
      decay = 0.0 if 'norm' in name else 0.2
      w[name] = w[name] - 1e-2 * (direction + decay * w[name])
    after, values = _steps(c, 2)[t - 1]
    np.testing.assert_allclose(values['grad_norm'], norm, rtol=1e-4)
    for name, x in tiny.flat(after.params).items():
      np.testing.assert_allclose(x, w[name], rtol=1e-3, atol=2e-5, err_msg=name)
    params = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), after.params, params)


@pytest.mark.parametrize(
  'changes',
  [
    dict(train__grad_accum_steps=2),
    dict(train__grad_accum_steps=4, loss__backward='interleaved', mesh__fsdp=2),
    dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, loss__chunk_size=4),
  ],
  ids=str,
)
def test_step_does_not_depend_on_micro_batches_or_mesh(changes):
  want, want_values = _steps(tiny.cfg(**BY_HAND), 2)[-1]
  c = tiny.cfg(**BY_HAND, **changes)
  rows = tiny.batch(tiny.cfg(**BY_HAND))
  cut = tiny.batch(c)
  for name in rows:  # the same windows, split into micro-batches
    np.testing.assert_array_equal(rows[name].reshape(cut[name].shape), cut[name])
  got, got_values = _steps(c, 2)[-1]
  for name in (
    'total',
    'loss_sum_K',
    'token_order_loss_sum',
    'grad_norm',
    'head_grad_norm_K',
    'count_K',
  ):
    np.testing.assert_allclose(got_values[name], want_values[name], rtol=1e-4)
  np.testing.assert_allclose(got_values['accepted_K'], want_values['accepted_K'])
  jax.tree.map(
    # Adam divides by the root of a tiny second moment.
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    got.params,
    want.params,
  )


def test_inactive_heads_are_not_updated():
  c = tiny.cfg(heads__n=3, optim__weight_decay=0.5, optim__warmup_steps=0)
  start = jax.device_get(state_lib.init(c, tiny.mesh(c)))
  after, values = _steps(c, 2, n_active=1)[-1]
  assert values['loss_sum_K'].shape == (1,)
  adam = after.opt_state[1]
  for new, old, mu, nu in zip(
    *map(jax.tree.leaves, (after.params.heads, start.params.heads, adam.mu.heads, adam.nu.heads)),
    strict=True,
  ):
    np.testing.assert_array_equal(new[1:], old[1:])
    assert not mu[1:].any() and not nu[1:].any()
    assert (new[0] != old[0]).any() and mu[0].any()


def _of(tree) -> set:
  return {str(x.dtype) for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize(
  'row',
  pairwise.rows(
    dict(
      param_dtype=fields.DTYPES,
      compute_dtype=fields.DTYPES,
      grad_dtype=fields.DTYPES,
      moment_dtype=fields.DTYPES,
    )
  ),
  ids=str,
)
def test_param_compute_grad_and_moment_dtypes(row):
  c = tiny.cfg(
    heads__n=2,
    model__param_dtype=row['param_dtype'],
    mesh__fsdp=2,
    model__compute_dtype=row['compute_dtype'],
    train__grad_accum_steps=2,
    loss__grad_dtype=row['grad_dtype'],
    optim__moment_dtype=row['moment_dtype'],
  )
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    state = state_lib.abstract(c, m)
    traced = step_lib.compiled(c, 2).trace(
      state, sharding.put_batch(m, tiny.batch(c)), jnp.ones(c.model.vocab_size, jnp.int32)
    )
  after, values = traced.out_info
  for s in (state, after):
    assert _of(s.params) == {row['param_dtype']}
    assert _of(s.opt_state[1].mu) == {row['moment_dtype']}
    # In bfloat16 a second moment under b2 = .999 never decays.
    assert _of(s.opt_state[1].nu) == {'float32'}
  assert _of([values[k] for k in ('total', 'loss_sum_K', 'grad_norm')]) == {'float32'}
  reduced = tiny.reductions(traced.jaxpr.jaxpr)
  assert len(reduced) >= 4 and set(map(str, reduced)) == {row['grad_dtype']}
  products = [
    {str(x.aval.dtype) for x in eqn.invars}
    for eqn in tiny.equations(traced.jaxpr.jaxpr)
    if eqn.primitive.name == 'dot_general'
  ]
  # Only the gradient of the logits is float32 where the compute dtype is not.
  assert all(row['compute_dtype'] in operands for operands in products)
  assert products.count({row['compute_dtype']}) > 0.9 * len(products)


def _rates(**changes):
  rates = update_lib.learning_rates(
    tiny.cfg(optim__trunk_lr_mult=0.5, optim__heads_lr_mult=3, **changes)
  )
  return {
    name: set(jax.tree.leaves(getattr(rates, name)))
    for name in ('embed', 'trunk', 'heads', 'norm', 'unembed', 'order')
  }


def test_parameter_groups_of_trunk_and_heads():
  shared = dict(embed={0.5}, trunk={0.5}, heads={3}, norm={0.5}, unembed={0.5}, order=set())
  for family in ('parallel', 'sequential', 'linear'):
    assert _rates(heads__family=family) == shared
    for unembedding, its in (('replicated', {3}), ('tied', set())):
      assert _rates(heads__family=family, heads__unembedding=unembedding) == shared | dict(
        unembed=its
      )
  plain = _rates(heads__family='linear', heads__n=1)
  assert plain == shared | dict(heads=set())
  assert _rates(loss__token_order_weight=1)['order'] == {3}


def test_two_updates_of_two_groups_are_adamw_by_hand():
  c = tiny.cfg(
    model__n_layers=2,
    heads__n=2,
    heads__family='linear',
    optim__lr=0.1,
    optim__warmup_steps=0,
    optim__schedule='constant',
    optim__clip_norm=0,
    optim__trunk_lr_mult=0.5,
    optim__heads_lr_mult=3,
    optim__weight_decay=0.2,
  )
  first = updates.start(c)
  both = [updates.gradients(c, 1), updates.gradients(c, 2)]
  (_, _), (got, _) = updates.updated(c, first, both)
  w, one, two = (tiny.flat(tree) for tree in (first[0], *both))
  for name, x in tiny.flat(got).items():
    rate = 0.1 * (3 if name == 'heads.proj' else 0.5)
    decay = 0.0 if 'norm' in name else 0.2
    y = w[name]
    y = y - rate * (np.sign(one[name]) + decay * y)
    mu = (0.09 * one[name] + 0.1 * two[name]) / 0.19
    nu = (0.05 * 0.95 * one[name] ** 2 + 0.05 * two[name] ** 2) / 0.0975
    y = y - rate * (mu / np.sqrt(nu) + decay * y)
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
@pytest.mark.parametrize('frozen, others', [('trunk', 1), ('heads', 12)])
def test_frozen_group_has_no_moments(name, frozen, others):
  c = tiny.cfg(heads__family='linear', optim__name=name, mesh__fsdp=2, train__freeze=frozen)
  m = tiny.mesh(c)
  state = state_lib.abstract(c, m)
  moments = [
    path
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if not path[-1].name == 'count'
  ]
  hidden = 7 if frozen == 'heads' else 1  # of which muon keeps one moment
  assert len(moments) == 2 * others - (hidden if name == 'muon' else 0)
  assert any('heads' in str(path) for path in moments) == (frozen == 'trunk')
  with jax.set_mesh(m):
    params, opt_state = jax.eval_shape(
      lambda s: update_lib.update(s.params, s.opt_state, s.params, step=s.step, n_active=4, cfg=c),
      state,
    )
  after = state.replace(params=params, opt_state=opt_state)
  assert jax.tree.structure(after) == jax.tree.structure(state)


def _lowered(c):
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    return step_lib.compiled(c, c.heads.n).lower(
      state_lib.abstract(c, m),
      sharding.put_batch(m, tiny.batch(c)),
      jnp.ones(c.model.vocab_size, jnp.int32),
    )


def test_frozen_trunk_has_no_moments_and_no_part_in_clipping():
  of = dict(
    heads__n=2, heads__family='linear', optim__warmup_steps=0, mesh__fsdp=2, optim__clip_norm=0
  )
  c = tiny.cfg(train__freeze='trunk', **of)
  before, ((after, values),) = updates.start(c)[0], _steps(c, 1)
  for name, x in tiny.flat(after.params).items():
    frozen = name != 'heads.proj'
    assert np.array_equal(x, tiny.flat(before)[name]) == frozen, name
  (mu,) = jax.tree.leaves(after.opt_state[1].inner_state.mu)
  assert mu.shape == after.params.heads.proj.shape
  norm = np.sqrt(np.sum((mu / 0.1) ** 2))
  np.testing.assert_allclose(values['grad_norm'], norm, rtol=1e-5)
  flops, all_flops = (_lowered(c).cost_analysis()['flops'] for c in (c, tiny.cfg(**of)))
  assert flops < 0.7 * all_flops


def _rounded(x, n, seed=0):
  """n roundings of a number."""
  x_N = jnp.full(n, x, jnp.float32)
  return np.asarray(rounding.stochastic_round(x_N, jax.random.key(seed)))


@pytest.mark.parametrize(
  'below, above', [(1.0, 1 + 2**-7), (-1 - 2**-7, -1.0), (1 - 2**-8, 1.0), (0.0, 2.0**-133)]
)
@pytest.mark.parametrize('share', [0.01, 0.5, 0.7])
def test_stochastic_rounding_is_unbiased(below, above, share):
  n = 2**14
  got = _rounded(below + share * (above - below), n)
  assert got.dtype == jnp.bfloat16
  assert set(got.astype(np.float64)) == {below, above}
  error = (got == above).mean() - share
  assert abs(error) < 4 * np.sqrt(share * (1 - share) / n)  # deviations
  assert (_rounded(below + share * (above - below), n, seed=1) != got).any()


@pytest.mark.parametrize(
  'x', [0.0, -0.0, 1.0, -3.140625, 2.0**-130, 3.0e38, np.inf, -np.inf, np.nan]
)
def test_stochastic_rounding_keeps_bfloat16_values(x):
  x = np.float64(jnp.bfloat16(x))
  got = _rounded(x, 100).astype(np.float64)
  np.testing.assert_array_equal(got, np.full(100, x))
  assert (np.signbit(got) == np.signbit(x)).all()


def test_stochastic_rounding_keeps_gpu_nan():
  nan = np.uint32(0x7FFF_FFFF).view(np.float32)  # plus anything: -0
  assert np.isnan(_rounded(nan, 100).astype(np.float64)).all()


def test_tiny_bfloat16_updates_accumulate_with_stochastic_rounding():
  """Adam under a constant gradient moves each weight by the learning rate."""
  lr, steps = 1e-4, 200
  c = tiny.cfg(
    model__param_dtype='bfloat16',
    model__n_layers=1,
    model__d_model=128,
    heads__n=2,
    heads__family='linear',
    heads__unembedding='replicated',
    optim__lr=lr,
    optim__warmup_steps=0,
    optim__schedule='constant',
    optim__clip_norm=0,
    train__freeze='heads',
  )
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    state = state_lib.init(c, m)
    ones = jax.tree.map(lambda w: jnp.ones_like(w, jnp.float32), state.params)

    @jax.jit
    def run(first):
      return jax.lax.fori_loop(
        0, steps, lambda i, s: update_lib.update(*s, ones, step=i, n_active=2, cfg=c), first
      )[0]

    first = (state.params, state.opt_state)
    one, two, old = map(tiny.flat, (run(first), run(first), state.params))
  for name, x in one.items():
    np.testing.assert_array_equal(x, two[name])  # by seed, step and path
    frozen = name.startswith(('heads', 'unembed'))
    assert np.array_equal(x, old[name]) == frozen, name
  w_D = jnp.ones(128, jnp.bfloat16)
  assert ((w_D - lr).astype(jnp.bfloat16) == w_D).all()  # all would be lost
  p = lr / 2**-8  # of a step down, in the spacing below 1
  spread = 2**-8 * np.sqrt(steps * p * (1 - p) / one['norm'].size)
  assert 4 * spread < 0.2 * steps * lr
  np.testing.assert_allclose(one['norm'].mean(), 1 - steps * lr, atol=4 * spread)


def test_micro_batch_gradients_accumulate_in_float32():
  """Gradients of bfloat16 parameters accumulate in float32."""
  c = tiny.cfg(
    heads__n=2, model__param_dtype='bfloat16', train__grad_accum_steps=4, model__n_layers=5
  )
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    jaxpr = jax.make_jaxpr(
      lambda state, rows: step_lib.train_step(
        state, rows, jnp.ones(32, jnp.int32), n_active=2, cfg=c
      )
    )(state_lib.abstract(c, m), sharding.put_batch(m, tiny.batch(c)))
  (scan,) = (
    eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan' and eqn.params['length'] == 4
  )
  carried = [x.aval for x in scan.outvars]  # it stacks nothing
  assert any(x.shape == (16, 32) for x in carried)  # the unembedding's
  assert {x.dtype for x in carried} == {jnp.dtype('float32')}
