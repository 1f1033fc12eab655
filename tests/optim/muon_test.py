"""Muon against a hand-written update, sharded, and with an inactive head."""

import types

import jax
import numpy as np
import optax.contrib
import pytest

from mtp_jax.config import schema
from mtp_jax.model import lm, params
from mtp_jax.optim import muon as muon_lib
from mtp_jax.train import state as state_lib
from tests.support import tiny, updates

# Written out independently of the Spec: (numbers of input, output dimensions) of each
# unstacked leaf.
HIDDEN = dict(
  q=(16, 16),
  k=(16, 8),
  v=(16, 8),
  o=(16, 16),
  gate=(16, 24),
  up=(16, 24),
  down=(24, 16),
  proj=(32, 16),
  attn_gate=(16, 16),
)
LR, DECAY, CLIP, MOMENTUM = 0.1, 0.2, 0.5, 0.8
BASE = dict(
  heads__n=3,
  heads__family='sequential',
  heads__unembedding='replicated',
  model__n_layers=2,
  optim__name='muon',
  optim__lr=LR,
  optim__warmup_steps=0,
  optim__schedule='constant',
  optim__weight_decay=DECAY,
  optim__clip_norm=CLIP,
  optim__momentum=MOMENTUM,
  optim__trunk_lr_mult=0.5,
  optim__heads_lr_mult=2.0,
)


# Its gate is hidden; biases, norms of all queries and sinks are not.
OPTIONS = dict(
  model__attn_gate=True,
  model__attn_sink=True,
  model__qk_norm='full',
  model__qkv_bias=True,
  model__o_bias=True,
  model__mlp_bias=True,
  model__norm_placement='both',
)


@pytest.fixture(scope='module')
def run(request):
  """Two updates on one device: start, gradients, states after each."""
  c = tiny.cfg(**BASE, **getattr(request, 'param', {}))
  start = updates.start(c)
  gradients = [updates.gradients(c, seed) for seed in (1, 2)]
  states = updates.updated(c, start, gradients)
  return types.SimpleNamespace(start=start, gradients=gradients, states=states)


def _matrices(name, x):
  """Returns (stack, inputs, outputs); None for parameters that are not hidden."""
  shape = HIDDEN.get(name.split('.')[-1])
  return None if shape is None else x.reshape(-1, *shape)


def _newton_schulz(x):
  """Computes the iteration on a float64 matrix, after Jordan's description."""
  x = x / np.sqrt((x**2).sum())
  for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
  return x


@pytest.mark.parametrize('run', [{}, OPTIONS], indirect=True, ids=['plain', 'options'])
def test_two_updates_are_muon_by_hand(run):
  w = tiny.flat(run.start[0])
  mu = {name: np.zeros_like(x) for name, x in w.items()}
  nu = {name: np.zeros_like(x) for name, x in w.items()}
  for t, (grads, after) in enumerate(zip(run.gradients, run.states, strict=True), 1):
    g = tiny.flat(grads)
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    for name, x in g.items():
      x = x * min(1, CLIP / norm)
      if _matrices(name, x) is None:
        mu[name] = 0.9 * mu[name] + 0.1 * x
        nu[name] = 0.95 * nu[name] + 0.05 * x**2
        direction = mu[name] / (1 - 0.9**t) / (np.sqrt(nu[name] / (1 - 0.95**t)) + 1e-8)
      else:
        b = MOMENTUM
        mu[name] = b * mu[name] + (1 - b) * x
        ahead = b * mu[name] + (1 - b) * x
        m = _matrices(name, ahead)
        direction = (
          0.2 * np.sqrt(max(m.shape[1:])) * np.reshape([_newton_schulz(one) for one in m], x.shape)
        )
      decay = 0.0 if name.endswith(('norm', 'bias', 'sink')) else DECAY
      rate = LR * (2.0 if name.split('.')[0] in ('heads', 'unembed') else 0.5)
      w[name] = w[name] - rate * (direction + decay * w[name])
    for name, x in tiny.flat(after[0]).items():
      np.testing.assert_allclose(x, w[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('shape', [(3, 16, 24), (2, 24, 8)])
def test_newton_schulz_equals_optax(shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  muon = optax.contrib.scale_by_muon(
    beta=0, nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2)
  )
  want, _ = jax.jit(lambda x: muon.update(x, muon.init(x)))(x)
  got = jax.jit(muon_lib.newton_schulz)(x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(muon_lib.newton_schulz(0 * x), 0)
  for tiny_one in (1e-18, 1e-20, 1e-22, 1e-30):  # whose squares underflow
    np.testing.assert_allclose(
      muon_lib.newton_schulz(x * np.float32(tiny_one)), got, rtol=1e-3, atol=1e-4
    )


def test_matrix_with_zero_gradient_is_not_updated(run):
  """As of a head of weight 0: orthogonalized momentum would never decay."""
  c = tiny.cfg(**BASE)
  first, second = run.gradients
  proj = np.array(second.heads.proj)
  proj[1] = 0
  rests = second.replace(heads=second.heads.replace(proj=proj))
  one, two = updates.updated(c, run.start, [first, rests])
  before, after = one[0].heads.proj, two[0].heads.proj
  # Only weight decay; the other module is updated.
  np.testing.assert_allclose(after[1], before[1] * (1 - 2 * LR * DECAY), rtol=1e-5)
  # As before, but for the norm that clips, hence what momentum is mixed of.
  usual = run.states[1][0].heads.proj[0]
  np.testing.assert_allclose(after[0], usual, atol=2e-3, rtol=0)
  assert not np.allclose(after[0], before[0] * (1 - 2 * LR * DECAY))


def test_singular_values_of_an_update_are_near_one(run):
  """Between the extremes of five quintic steps, if none was below .01."""
  seen = set()
  before, after = tiny.flat(run.start[0]), tiny.flat(run.states[0][0])
  for name, x in after.items():
    old = before[name]
    moved = _matrices(name, (old * (1 - 2 * LR * DECAY) - x) / (2 * LR))
    if moved is None or not name.startswith('heads'):
      continue
    s = np.linalg.svd(moved / (0.2 * np.sqrt(max(moved.shape[1:]))))[1]
    gradient = _matrices(name, tiny.flat(run.gradients[0])[name])
    of_gradient = np.linalg.svd(gradient)[1]
    fed = of_gradient / np.sqrt((of_gradient**2).sum(-1, keepdims=True))
    inside = s[fed > 0.01]
    assert inside.size > 0.9 * s.size
    assert 0.67 < inside.min() and inside.max() < 1.15, name
    # One learning rate for both groups: AdamW moves by 0.2 to 0.4.
    rms = np.sqrt((moved**2).mean())
    assert 0.15 < rms < 0.25, (name, rms)
    seen.add(name.split('.')[-1])
  assert seen == set(HIDDEN) - {'attn_gate'}


def test_sharded_muon_equals_unsharded_with_inactive_head(run):
  c = tiny.cfg(**BASE, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  states = updates.updated(c, run.start, run.gradients, n_active=2)
  for (new, opt), (want, want_opt) in zip(states, run.states, strict=True):
    for (path, x), y, old in zip(
      jax.tree_util.tree_leaves_with_path((new, opt)),
      jax.tree.leaves((want, want_opt)),
      jax.tree.leaves(run.start),
      strict=True,
    ):
      name = jax.tree_util.keystr(path)
      used = None
      if '.heads' in name or '.unembed' in name:
        used = 1 if '.heads' in name else 2  # modules of heads 2..n; all
        np.testing.assert_array_equal(x[used:], old[used:], err_msg=name)
        assert not np.array_equal(y[used:], old[used:]), name
      np.testing.assert_allclose(
        x[:used] if x.ndim else x, y[:used] if x.ndim else y, rtol=1e-4, atol=1e-6, err_msg=name
      )


@pytest.mark.parametrize('unembedding', ['shared', 'replicated', 'tied'])
@pytest.mark.parametrize('family', schema.fields()['heads.family'].metadata['choices'])
def test_muon_has_one_moment_adam_two(family, unembedding):
  of = dict(heads__family=family, heads__unembedding=unembedding)
  c, adamw = (tiny.cfg(**of, optim__name=name) for name in ('muon', 'adamw'))
  m = tiny.mesh(c)
  specs = lm.specs(c)
  count = {
    kind: sum(
      np.prod(s.shape)
      for path, s in jax.tree_util.tree_leaves_with_path(specs)
      if (path[-1].name in HIDDEN) == kind
    )
    for kind in (True, False)
  }
  got, want = (params.bytes_per_device(state_lib.abstract(c, m).opt_state) for c in (c, adamw))
  assert got == 4 * count[True] + 8 * count[False] + 4  # and Adam's counter
  assert want == 8 * count[True] + 8 * count[False] + 4
