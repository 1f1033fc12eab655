"""The update by hand, the schedules at their corners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import optim, sharding
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib
from tests import tiny


@pytest.mark.parametrize(
  'changes, values',
  [
    (
      dict(optim__schedule='cosine', optim__end_ratio=0.1),
      {0: 0, 5: 0.5, 10: 1, 55: 0.55, 100: 0.1},
    ),
    (
      dict(optim__schedule='wsd', optim__end_ratio=0.1, optim__decay_steps=20),
      {0: 0, 5: 0.5, 10: 1, 80: 1, 90: 0.55, 100: 0.1},
    ),
    (dict(optim__schedule='constant'), {0: 0, 5: 0.5, 10: 1, 99: 1}),
  ],
)
def test_learning_rate(changes, values):
  c = tiny.cfg(
    optim__lr=2.0, optim__warmup_steps=10, train__steps=100, **changes
  )
  for step, want in values.items():
    got = optim.learning_rate(c)(jnp.int32(step))
    np.testing.assert_allclose(got, 2 * want, rtol=1e-5, err_msg=str(step))


def _steps(c, n_steps, n_active=None):
  """(State, metrics) after some steps on the same batch, on the host."""
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    rows = sharding.put_batch(m, tiny.batch(c))
    bytes_V = jnp.ones(c.model.vocab_size, jnp.int32)
    state = state_lib.init(c, m)
    step = step_lib.compiled(c, n_active or c.heads.n)
    for _ in range(n_steps):
      state, values = step(state, rows, bytes_V)
    return jax.device_get((state, values))


def test_two_updates_are_adamw_by_hand():
  c = tiny.cfg(
    heads__n=2, optim__lr=1e-2, optim__warmup_steps=0, optim__clip_norm=0.5,
    optim__schedule='constant', optim__weight_decay=0.2, optim__eps=1e-6,
  )  # fmt: skip
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
      direction = mu[name] / (1 - 0.9**t) / (
        np.sqrt(nu[name] / (1 - 0.95**t)) + 1e-6
      )  # fmt: skip
      decay = 0.0 if 'norm' in name else 0.2
      w[name] = w[name] - 1e-2 * (direction + decay * w[name])
    after, values = _steps(c, t)
    np.testing.assert_allclose(values['grad_norm'], norm, rtol=1e-4)
    for name, x in tiny.flat(after.params).items():
      np.testing.assert_allclose(x, w[name], rtol=1e-3, atol=2e-5, err_msg=name)
    params = jax.tree.map(
      lambda x, p: jax.device_put(x, p.sharding), after.params, params
    )


@pytest.mark.parametrize(
  'changes',
  [
    dict(train__accumulate=2),
    dict(train__accumulate=4, loss__schedule='eager', mesh__fsdp=2),
    dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, loss__chunk=4),
  ],
  ids=str,
)
def test_a_step_does_not_depend_on_how_it_is_cut(changes):
  base = dict(heads__n=2, optim__lr=1e-2, optim__warmup_steps=0)
  want, want_values = _steps(tiny.cfg(**base), 2)
  c = tiny.cfg(**base, **changes)
  rows = tiny.batch(tiny.cfg(**base))
  cut = tiny.batch(c)
  for name in rows:  # the same windows, only cut into micro-batches
    np.testing.assert_array_equal(
      rows[name].reshape(cut[name].shape), cut[name]
    )
  got, got_values = _steps(c, 2)
  for name in ('total', 'loss_K', 'grad_norm', 'head_grad_norm_K', 'count_K'):
    np.testing.assert_allclose(got_values[name], want_values[name], rtol=1e-4)
  np.testing.assert_allclose(
    got_values['accepted_K'], want_values['accepted_K']
  )
  jax.tree.map(
    # Adam divides by the root of a tiny second moment.
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    got.params, want.params,
  )  # fmt: skip


def test_inactive_heads_move_in_nothing():
  c = tiny.cfg(heads__n=3, optim__weight_decay=0.5, optim__warmup_steps=0)
  start = jax.device_get(state_lib.init(c, tiny.mesh(c)))
  after, values = _steps(c, 2, n_active=1)
  assert values['loss_K'].shape == (1,)
  adam = after.opt_state[1]
  for new, old, mu, nu in zip(
    *map(jax.tree.leaves, (
      after.params.heads, start.params.heads, adam.mu.heads, adam.nu.heads,
    )), strict=True,
  ):  # fmt: skip
    np.testing.assert_array_equal(new[1:], old[1:])
    assert not mu[1:].any() and not nu[1:].any()
    assert (new[0] != old[0]).any() and mu[0].any()


def test_moments_and_parameters_have_their_dtypes():
  c = tiny.cfg(
    heads__n=2, model__param_dtype='bfloat16', optim__moment_dtype='bfloat16',
    optim__warmup_steps=0, train__accumulate=2,
  )  # fmt: skip
  state, values = _steps(c, 1)
  assert state.params.unembed.dtype == 'bfloat16'
  assert state.opt_state[1].mu.unembed.dtype == 'bfloat16'
  # In bfloat16 a second moment under b2 = .999 never decays.
  assert state.opt_state[1].nu.unembed.dtype == np.float32
  assert values['total'].dtype == np.float32
