"""The loss: equal values and gradients of every implementation and option."""

import functools
import importlib.util
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import schema
from mtp_jax.losses import (
  backward,
  cross_entropy,
  head_loss,
  mixing,
  multi_token,
  targets,
  token_order,
)
from mtp_jax.model import block, heads, layers, lm, params
from mtp_jax.parallel import sharding
from tests.support import ahead, oracle, pairwise, runs, tiny

# float32 rounding: sums of a few thousand terms, in another order.
TOLERANCE = dict(rtol=2e-4, atol=2e-6)

FAMILIES = tuple(heads.FAMILIES)
# Where any value closes as many pairs, a row takes the first: several heads.
WHAT = dict(  # options that change the value
  family=FAMILIES,
  n=(3, 1),
  unembedding=('shared', 'replicated', 'tied'),
  packed=(True, False),
  weights=('0:1,.3', '0:1'),
  z_loss=(1e-2, 0.0),
  stride=(3, 1),
  order=(0.0, 0.7),
)
HOW = dict(  # options that must not
  schedule=('remat', 'interleaved'),
  chunk=(4, 0),
  accumulate=(1, 2),
  mesh=((1, 1, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2)),
  remat=('none', 'block', 'dots'),
)


def _cfg(
  family='parallel',
  n=2,
  unembedding='shared',
  weights='0:1',
  z_loss=0.0,
  stride=1,
  order=0.0,
  schedule='remat',
  chunk=0,
  accumulate=1,
  mesh=(1, 1, 1),
  remat='none',
):
  # Two layers of trunk, which the dense loss has to unroll.
  n_layers = 2 + (n if schema.HEAD_FAMILIES[family] else 0)
  return tiny.cfg(
    model__n_layers=n_layers,
    heads__family=family,
    heads__n=n,
    heads__unembedding=unembedding,
    heads__stride=stride,
    loss__token_order_weight=order,
    loss__token_order_window=9,
    loss__weights=weights if n > 1 else '0:1',
    loss__z_loss=z_loss,
    loss__backward=schedule,
    loss__chunk_size=chunk,
    train__grad_accum_steps=accumulate,
    mesh__data=mesh[0],
    mesh__fsdp=mesh[1],
    mesh__tensor=mesh[2],
    model__remat=remat,
    data__batch_size=16,
  )


@functools.cache
def _dense(packed, **what):
  """Computes (total, loss_K, gradients) unrolled, with all logits in memory."""
  c = _cfg(**what)
  m = tiny.mesh(c)
  rows = sharding.put_batch(m, tiny.batch(c, packed=packed))
  with jax.set_mesh(m):
    f = jax.jit(jax.value_and_grad(functools.partial(tiny.dense_loss, c=c), has_aux=True))
    (total, loss_K), grads = jax.device_get(f(tiny.model(c, m), rows))
  return total, loss_K, grads


def _equals_dense(row):
  what = {name: row[name] for name in WHAT}
  how = {name: row[name] for name in HOW}
  total, loss_K, grads = _dense(**what)
  packed = what.pop('packed')
  c = _cfg(**what, **how)
  (got, sums), (got_grads, _) = tiny.value_and_grad(c, tiny.batch(c, packed=packed))
  np.testing.assert_allclose(got, total, **TOLERANCE)
  np.testing.assert_allclose(sums['loss_K'], loss_K, **TOLERANCE)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), got_grads, grads)


def _id(row):
  return '-'.join(str(value).replace(' ', '') for value in row.values())


@pytest.mark.parametrize('row', pairwise.rows(WHAT | HOW), ids=_id)
def test_equals_oracle(row):
  """For any backward strategy, chunk size, sharding and accumulation."""
  row = dict(row)
  packed = row.pop('packed')
  c = _cfg(**row)
  rows = tiny.batch(c, packed=packed)
  (total, sums), (grads, _) = tiny.value_and_grad(c, rows)
  flat = {name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()}
  window = c.loss.token_order_window if row['order'] else 0
  shape = oracle.Shape(
    row['family'], row['n'], z_loss=row['z_loss'], stride=row['stride'], window=window
  )
  w = tiny.flat(tiny.model(c, tiny.mesh(c)))
  weights = [1.0, *[0.3 if '.3' in row['weights'] else 1.0] * (row['n'] - 1)]

  def losses(w):
    logits = oracle.forward(w, flat['tokens'], flat['position'], shape)
    out = oracle.losses(logits, flat['tokens'], flat['position'], shape, weights)
    if window:
      out['order'] = oracle.order(w, flat['tokens'], flat['position'], shape)
      out['total'] += row['order'] * out['order']
    return logits, out

  logits, want = losses(w)
  np.testing.assert_allclose(total, want['total'], rtol=1e-5)
  np.testing.assert_allclose(sums['loss_K'], want['loss_K'], rtol=1e-5)
  np.testing.assert_allclose(sums['accuracy_K'], want['accuracy_K'], rtol=1e-5)
  if window:
    np.testing.assert_allclose(sums['token_order_loss'], want['order'], rtol=1e-5)
  accepted_J = oracle.acceptance(logits, flat['position'], shape)
  np.testing.assert_array_equal(sums['accepted_K'], accepted_J)
  # Along a random direction in all entries of all parameters, by central
  # differences: one wrong entry changes it; then find the parameter.
  rng = np.random.default_rng(0)
  grads = tiny.flat(grads)
  along = {path: rng.normal(size=grad.shape) / np.linalg.norm(grad) for path, grad in grads.items()}

  def off(along):
    numeric = oracle.derivative(lambda w: losses(w)[1]['total'], w, along)
    return abs(sum(np.sum(grads[path] * along[path]) for path in along) - numeric)

  if off(along) > 1e-5:
    wrong = {path: off({path: along[path]}) for path in along}
    raise AssertionError(f'gradients differ from those of the oracle: {wrong}')


@pytest.mark.parametrize('schedule, chunk', [('remat', 4), ('interleaved', 0)])
def test_single_row_and_single_kv_head_on_one_device(schedule, chunk):
  """Of dimensions of size 1 JAX cannot tell which one is sharded."""
  c = tiny.cfg(
    heads__n=2,
    data__batch_size=1,
    model__n_kv_heads=1,
    model__n_layers=4,
    loss__backward=schedule,
    loss__chunk_size=chunk,
  )
  rows = tiny.batch(c)
  (got, sums), _ = tiny.value_and_grad(c, rows)
  want = tiny.oracle_losses(c, rows)
  np.testing.assert_allclose(got, want['total'], rtol=1e-5)
  np.testing.assert_allclose(sums['loss_K'], want['loss_K'], rtol=1e-5)


def test_log_sum_exp_is_differentiable_twice_and_infinite_where_logits_are():
  m = tiny.cfg().model

  def lse(h_BCD):
    return cross_entropy.logits(h_BCD, jnp.eye(4), jnp.zeros((1, 1), int), m).lse_BC[0, 0]

  logits = jnp.array([[[0.3, -0.2, 1, 0]]])
  p = np.exp(logits[0, 0]) / np.exp(logits[0, 0]).sum()
  np.testing.assert_allclose(jax.grad(lse)(logits)[0, 0], p, rtol=1e-6)
  found = jax.hessian(lse)(logits)[0, 0, :, 0, 0]
  np.testing.assert_allclose(found, np.diag(p) - np.outer(p, p), atol=1e-6)
  h_BCD, unembed_DV = jnp.ones((1, 1, 1)), jnp.array([[0, jnp.inf]])
  of = functools.partial(cross_entropy.logits, h_BCD, target_BC=jnp.zeros((1, 1), int), m=m)
  assert of(unembed_DV).lse_BC == jnp.inf and of(jnp.full((1, 2), -jnp.inf)).lse_BC == -jnp.inf


def test_argmax_is_the_first_of_equals():
  unembed_DV = jnp.array([[0.0, 2, 1, 2, 2, -1]])
  h_BCD, target_BC = jnp.array([[[1.0], [0.0], [-1.0]]]), jnp.zeros((1, 3), int)
  found = cross_entropy.logits(h_BCD, unembed_DV, target_BC, tiny.cfg().model)
  assert found.argmax_BC.tolist() == [[1, 0, 5]]
  np.testing.assert_allclose(found.lse_BC[0, 1], np.log(6), rtol=1e-6)


def test_default_chunk_size_bounds_logits_per_device():
  c = tiny.cfg(data__seq_len=2048, model__vocab_size=32_000)
  chunk_size = cross_entropy.chunk_size
  assert chunk_size(1, 2048, c) == 1024  # 125 MiB
  assert chunk_size(4, 2048, c) == 256  # of 1000 MiB
  assert chunk_size(1000, 2048, c) == 128  # no less
  given = schema.replace(c, **{'loss.chunk_size': 64})
  assert chunk_size(1000, 2048, given) == 64
  assert chunk_size(4, 3 * 641, c) == 641
  sharded = tiny.cfg(
    data__seq_len=2048,
    model__vocab_size=32_000,
    mesh__data=2,
    mesh__fsdp=2,
    mesh__tensor=2,
    data__batch_size=64,
  )
  with jax.set_mesh(tiny.mesh(sharded)):
    assert chunk_size(32, 2048, sharded) == 256  # 8 rows, half the logits


# All of the paper's own family; the others differ in their blocks only, and
# all seven with all else would be 48,384 cases.
FULL = WHAT | HOW | dict(family=('parallel',), unembedding=('shared',), stride=(1,), order=(0.0,))


@pytest.mark.slow
@pytest.mark.parametrize('values', itertools.product(*FULL.values()), ids=str)
def test_full_option_product_equals_dense(values):
  _equals_dense(dict(zip(FULL, values, strict=True)))


def test_pairwise_rows_hold_every_pair():
  rows = pairwise.rows(WHAT | HOW)
  for a, b in itertools.combinations(WHAT | HOW, 2):
    for x, y in itertools.product((WHAT | HOW)[a], (WHAT | HOW)[b]):
      assert any(r[a] == x and r[b] == y for r in rows)


def test_targets_on_a_periodic_sequence():
  tokens_BU = jnp.arange(20)[None] % 5
  position_BU = jnp.arange(20)[None]
  rows = dict(tokens=tokens_BU, position=position_BU)
  targets_KBT, valid_KBT = targets.targets(rows, tiny.cfg(heads__n=4))
  assert targets_KBT.shape == (4, 1, 16) and valid_KBT.all()
  for k in range(1, 5):
    np.testing.assert_array_equal(targets_KBT[k - 1, 0], (np.arange(16) + k) % 5)


def test_strided_targets():
  tokens_BU = jnp.arange(23)[None]
  c = tiny.cfg(heads__n=3, heads__stride=3)
  assert c.heads.offsets == (1, 4, 7) and c.span == 7
  targets_KBT, valid_KBT = targets.targets(dict(tokens=tokens_BU, position=tokens_BU), c)
  assert valid_KBT.all()
  for k, offset in enumerate((1, 4, 7)):
    np.testing.assert_array_equal(targets_KBT[k, 0], np.arange(16) + offset)


def test_targets_never_cross_a_document():
  position_BU = jnp.array([[0, 1, 2, 0, 1, 0, 0, 1, 2, 3]])
  rows = dict(tokens=jnp.zeros((1, 10), int), position=position_BU)
  _, valid_KBT = targets.targets(rows, tiny.cfg(heads__n=3))
  brute = [
    [int(all(position_BU[0, t + j] for j in range(1, k + 1))) for t in range(7)] for k in (1, 2, 3)
  ]
  np.testing.assert_array_equal(valid_KBT[:, 0], brute)


def test_batch_without_targets_has_zero_loss_and_finite_gradients():
  for schedule in ('remat', 'interleaved'):
    c = tiny.cfg(heads__n=3, loss__backward=schedule, loss__z_loss=1e-2)
    rows = tiny.batch(c)
    rows['position'][:] = 0
    (total, sums), (grads, norm2_K) = tiny.value_and_grad(c, rows)
    assert total == 0
    np.testing.assert_array_equal(sums['loss_K'], 0)
    for g in jax.tree.leaves((grads, norm2_K)):
      np.testing.assert_array_equal(g, 0)


def test_loss_of_a_head_is_normalized_by_its_own_count():
  # Documents of three tokens: head 1 has two targets of each, head 2 one, and
  # head 3 none.
  c = tiny.cfg(heads__n=3)
  rows = tiny.batch(c)
  rows['position'][:] = np.arange(rows['position'].shape[-1]) % 3
  (total, sums), _ = tiny.value_and_grad(c, rows)
  assert (sums['loss_K'][:2] > 1).all() and sums['loss_K'][2] == 0
  want = tiny.oracle_losses(c, rows)
  np.testing.assert_allclose(sums['loss_K'], want['loss_K'], rtol=1e-5)
  np.testing.assert_allclose(total, want['total'], rtol=1e-5)


def test_micro_batches_with_unequal_counts_sum_exactly():
  # The first micro-batch has more valid targets than the others, whose documents have
  # three tokens; each has some.
  one, four = (tiny.cfg(heads__n=2, train__grad_accum_steps=a) for a in (1, 4))
  rows = tiny.batch(one, packed=False)
  rows['position'][:, 2:] = np.arange(rows['position'].shape[-1]) % 3
  cut = {k: x.reshape(4, 2, -1) for k, x in rows.items()}
  (a, a_sums), (a_grads, _) = tiny.value_and_grad(one, rows)
  (b, b_sums), (b_grads, _) = tiny.value_and_grad(four, cut)
  np.testing.assert_allclose(a, b, rtol=1e-6)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), (a_sums, a_grads), (b_sums, b_grads)
  )


@pytest.mark.parametrize(
  'family, schedule',
  [('parallel', 'remat'), ('parallel', 'interleaved'), ('residual', 'interleaved')],
)
def test_head_gradient_norms_equal_separate_heads(schedule, family):
  c = tiny.cfg(heads__n=3, loss__backward=schedule, train__grad_accum_steps=2, heads__family=family)
  _, (_, norm2_K) = tiny.value_and_grad(c, tiny.batch(c))
  want_K = _dz_norm2(tiny.cfg(heads__n=3, heads__family=family))
  np.testing.assert_allclose(norm2_K, want_K, rtol=1e-4)


@pytest.mark.parametrize('family', ['anticausal', 'sequential'])
def test_head_gradient_norms_of_a_chain_agree_between_strategies(family):
  norms = []
  for schedule in ('remat', 'interleaved'):
    c = tiny.cfg(heads__n=3, loss__backward=schedule, heads__family=family)
    norms.append(tiny.value_and_grad(c, tiny.batch(c))[1][1])
  assert (norms[0] > 0).all()
  np.testing.assert_allclose(*norms, rtol=1e-4)


@functools.cache
def _dz_norm2(c):
  """(K,) |d loss_k / dz|^2 with z a free variable and all logits kept."""
  m, rows = tiny.mesh(c), tiny.batch(c)
  T = c.data.seq_len
  targets_KBT, valid_KBT = targets.targets({name: x[0] for name, x in rows.items()}, c)

  @jax.jit
  def norms(w, tokens_BU, position_BU):
    emb_BTD = lm.embed(w, tokens_BU[:, :T], c)
    z_BTD, ctx = lm.trunk_output(w, emb_BTD, position_BU[:, :T], c)

    def losses(z_BTD):
      h_KBTD = [
        heads.step(
          jax.tree.map(lambda p: p[k], w.heads),  # noqa: B023
          k + 1 + (not c.heads.block_first),
          heads.Inputs(w.norm, z_BTD, z_BTD, None),
          ctx,
          c,
        )[1]
        for k in range(c.heads.n - 1 + c.heads.block_first)
      ]
      if not c.heads.block_first:
        first = heads.Inputs(w.norm, z_BTD, z_BTD, None)
        h_KBTD.insert(0, heads.step(None, 1, first, ctx, c)[1])
      logits = jnp.einsum('KBTD,DV->KBTV', jnp.stack(h_KBTD), w.unembed)
      onehot = jax.nn.one_hot(targets_KBT, c.model.vocab_size)
      nll_KBT = -jnp.sum(onehot * jax.nn.log_softmax(logits), -1)
      return jnp.sum(nll_KBT * valid_KBT, (1, 2)) / jnp.sum(valid_KBT, (1, 2))

    _, back = jax.vjp(losses, z_BTD)
    (dz_KBTD,) = jax.vmap(back)(jnp.eye(c.heads.n))
    return jnp.sum(dz_KBTD**2, (1, 2, 3))

  with jax.set_mesh(m):
    return norms(tiny.model(c, m), rows['tokens'][0], rows['position'][0])


def test_z_loss_is_part_of_the_loss_and_reported():
  c = tiny.cfg(heads__n=3, loss__z_loss=1e-2)
  plain = tiny.cfg(heads__n=3)
  (_, a), _ = tiny.value_and_grad(c, tiny.batch(c))
  (_, b), _ = tiny.value_and_grad(plain, tiny.batch(c))
  assert (a['z_loss_K'] > 0).all()
  np.testing.assert_allclose(a['loss_K'] - a['z_loss_K'], b['loss_K'], rtol=1e-5)


def test_loss_weights_by_step():
  c = tiny.cfg(heads__n=3, loss__weights='0:1,.3;10:1,.1,.2')
  for step, want in ((0, [1, 0.3, 0.3]), (9, [1, 0.3, 0.3]), (10, [1, 0.1, 0.2])):
    np.testing.assert_allclose(targets.weights(jnp.int32(step), c), want)


@pytest.mark.parametrize(
  'family',
  [
    'parallel',
    'anticausal',
    'recursive',
    *(
      pytest.param(family, marks=pytest.mark.slow)
      for family in ('causal', 'linear', 'residual', 'sequential')
    ),
  ],
)
def test_inactive_heads_have_no_flops_and_no_gradient(family):
  c = tiny.cfg(heads__n=3, heads__family=family)
  rows = tiny.batch(c)
  (total, sums), (grads, _) = tiny.value_and_grad(c, rows, n_active=2)
  (_, all_sums), _ = tiny.value_and_grad(c, rows)
  if family != 'anticausal':  # there the near heads sit on the far ones
    np.testing.assert_allclose(sums['loss_K'], all_sums['loss_K'][:2], rtol=1e-6)
  np.testing.assert_allclose(total, sum(sums['loss_K']), rtol=1e-6)
  used = heads.n_modules(c.heads, 2)
  for g in jax.tree.leaves(grads.heads):
    assert np.any(g[:used]) and not np.any(g[used:])
  # No FLOPs: as many as a model without them.
  one = tiny.cfg(
    heads__n=1, heads__family=family, model__n_layers=c.model.n_layers - 2 * c.heads.block_first
  )
  # XLA counts the body of a loop once: a head is 0.2% here, hence 0.1%.
  np.testing.assert_allclose(_flops(c, 1), _flops(one, 1), rtol=1e-3)


@pytest.mark.parametrize(
  'family, schedule, changes',
  [
    ('sequential', 'remat', dict(mesh__fsdp=2, mesh__tensor=2)),
    ('sequential', 'interleaved', dict(train__grad_accum_steps=2)),
    ('recursive', 'interleaved', dict(loss__head_loss='tv', heads__isolated=True)),
  ],
)
def test_mixed_hidden_states_equal_oracle(family, schedule, changes):
  """Each token of a module reads one of the states before it, drawn by step."""
  c = tiny.cfg(
    heads__n=4,
    heads__family=family,
    heads__mix_hidden_states=True,
    model__n_layers=2,
    loss__backward=schedule,
    **changes,
  )
  rows = tiny.batch(c)
  flat = {name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()}
  w = tiny.flat(tiny.model(c, tiny.mesh(c)))
  found = {}
  for step in (None, 0, 7):
    (_, sums), _ = tiny.value_and_grad(c, rows, step=step)
    shape = oracle.Shape(family, 4, mix_step=step)
    logits = oracle.forward(w, flat['tokens'], flat['position'], shape)
    want = oracle.losses(logits, flat['tokens'], flat['position'], shape)
    np.testing.assert_allclose(sums['loss_K'], want['loss_K'], rtol=1e-5)
    found[step] = sums['loss_K']
  assert len({float(loss_K[3]) for loss_K in found.values()}) == 3
  assert len({float(loss_K[1]) for loss_K in found.values()}) == 1  # reads the trunk


@pytest.mark.parametrize(
  'changes',
  [
    dict(loss__backward='remat', mesh__fsdp=2, mesh__tensor=2),
    dict(loss__backward='interleaved', train__grad_accum_steps=2, heads__trunk_state='pre_norm'),
    dict(loss__backward='interleaved', loss__head_loss='lk', loss__head_ce_weight=1),
    dict(loss__backward='remat', heads__unembedding='tied', model__remat='block'),
  ],
)
def test_shared_keys_and_values_equal_oracle(changes):
  """Value, and gradients along a random direction: steps attend to keys of the first one."""
  c = tiny.cfg(
    heads__n=4,
    heads__family='recursive',
    heads__share_keys_values=True,
    model__n_layers=2,
    **changes,
  )
  rows = tiny.batch(c)
  flat = {name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()}
  (total, sums), (grads, _) = tiny.value_and_grad(c, rows)
  base, grads = tiny.flat(tiny.model(c, tiny.mesh(c))), tiny.flat(grads)
  shape = oracle.Shape('recursive', 4, trunk_state=c.heads.trunk_state, share_kv=True)

  def losses(w, shape=shape):
    logits = oracle.forward(w, flat['tokens'], flat['position'], shape)
    return oracle.losses(logits, flat['tokens'], flat['position'], shape)

  np.testing.assert_allclose(sums['loss_K'], losses(base)['loss_K'], rtol=1e-5)
  own_K = losses(base, shape._replace(share_kv=False))['loss_K']
  assert (own_K != losses(base)['loss_K']).tolist() == [False, False, True, True]
  rng = np.random.default_rng(0)
  along = {path: rng.normal(size=g.shape) / np.linalg.norm(g) for path, g in grads.items()}
  numeric = oracle.derivative(lambda w: losses(w)['total'], base, along)
  assert abs(sum(np.sum(grads[path] * along[path]) for path in along) - numeric) < 1e-4


@pytest.mark.parametrize(
  'changes',
  [
    dict(loss__head_loss='lk_hybrid', loss__backward='interleaved', train__grad_accum_steps=2),
    dict(loss__head_loss='e2e_tv', loss__backward='remat', mesh__fsdp=2, mesh__tensor=2),
    dict(loss__head_loss='e2e_tv', loss__backward='interleaved', heads__isolated=True),
  ],
)
def test_confidence_head_equals_oracle(changes):
  """Its loss and gradient; no bit of any other gradient changes."""
  shape = dict(heads__n=4, heads__family='recursive', heads__share_keys_values=True, **changes)
  c = tiny.cfg(heads__confidence=True, model__n_layers=2, **shape)
  without = tiny.cfg(model__n_layers=2, **shape)
  rows, m = tiny.batch(c), tiny.mesh(c)
  model = tiny.model(c, m)
  (total, sums), (grads, _) = tiny.value_and_grad(c, rows)
  (plain, _), (same, _) = tiny.value_and_grad(without, rows, model.replace(confidence=None))
  for a, b in zip(
    jax.tree.leaves(grads.replace(confidence=None)), jax.tree.leaves(same), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  flat = {name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()}
  w = tiny.flat(model)
  of = oracle.Shape('recursive', 4, share_kv=True)
  logits = oracle.forward(w, flat['tokens'], flat['position'], of)
  how = oracle.Comparison(c.loss.head_loss)
  found = oracle.compared(logits, logits[0], flat['position'], of, how)
  h = oracle.hidden(w, flat['tokens'], flat['position'], of)
  complete = {(b, t) for k, b, t in found['alpha'] if k == 4}
  loss_K, d_D = np.zeros(4), np.zeros(c.model.d_model)
  for (k, b, t), alpha in found['alpha'].items():
    if c.loss.head_loss == 'e2e_tv' and (b, t) not in complete:
      continue
    z, over = h[k][b, t] @ w['confidence'], 1 / found['count_K'][k - 1]
    loss_K[k - 1] += over * (np.log1p(np.exp(z)) - alpha * z)
    d_D += over * (1 / (1 + np.exp(-z)) - alpha) * h[k][b, t]
  np.testing.assert_allclose(total - plain, loss_K.sum(), rtol=1e-4)
  means_K = sums['confidence_loss_sum_K'] / np.maximum(found['count_K'], 1)
  np.testing.assert_allclose(means_K, loss_K, rtol=1e-5)
  np.testing.assert_allclose(grads.confidence, d_D, rtol=1e-4, atol=1e-6)


def test_draws_of_mixing_are_uniform_and_independent():
  rng = np.random.default_rng(0)
  tokens_BU = jnp.array(rng.integers(0, 500, (64, 129)))
  position_BT = jnp.broadcast_to(jnp.arange(128)[None], (64, 128))
  found = []
  for step, k in ((0, 2), (1, 2), (0, 3)):
    ctx = block.Context(position_BT, None, None, None)
    window = head_loss.Window(ctx=ctx, tokens_BU=tokens_BU, step=jnp.int32(step))
    found.append(np.asarray(mixing.draws(window, k, 128)).ravel())
  for u in found:
    assert u.min() >= 0 and u.max() < 1
    np.testing.assert_allclose(np.histogram(u, 8, (0, 1))[0] / u.size, 1 / 8, atol=0.015)
  for a, b in itertools.combinations(found, 2):
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.04


def _flops(c, n_active):
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    args = tiny.model(c, m), sharding.put_batch(m, tiny.batch(c))
    lowered = tiny._value_and_grad.lower(*args, c=c, n_active=n_active)
    return lowered.cost_analysis()['flops']


def test_target_counts_and_bytes():
  c = tiny.cfg(heads__n=2, train__grad_accum_steps=2)
  rows = tiny.batch(c)
  bytes_V = np.arange(32, dtype=np.int32)
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    put = sharding.put_batch(m, rows)
    count_K = jax.jit(targets.counts, static_argnums=(1, 2))(put, c, 2).target_K
    n_bytes = jax.jit(targets.target_bytes, static_argnums=1)(put, c, jnp.array(bytes_V))
  want_K, want_bytes = np.zeros(2), 0
  tokens, position = (x.reshape(8, -1) for x in rows.values())
  for b, t, k in itertools.product(range(8), range(16), (1, 2)):
    if position[b, t + k] == position[b, t] + k:
      want_K[k - 1] += 1
      want_bytes += bytes_V[tokens[b, t + 1]] if k == 1 else 0
  np.testing.assert_array_equal(count_K, want_K)
  assert n_bytes == want_bytes


def test_acceptance_is_agreement_with_head_1_not_label_accuracy():
  # Head 2 predicts head 1's next argmax; both differ from the text.
  argmax_KBT = jnp.array([[[7, 8, 9, 7]], [[8, 9, 5, 0]], [[9, 0, 0, 0]]])
  accepted_K = targets.acceptance(argmax_KBT, jnp.ones((1, 4), bool))
  np.testing.assert_array_equal(accepted_K, [2, 2, 1])
  masked = targets.acceptance(argmax_KBT, jnp.array([[False, True, True, True]]))
  np.testing.assert_array_equal(masked, [1, 1, 0])


def test_strided_acceptance_uses_drafts_of_earlier_positions():
  # Stride 2: head 2 at t - 1 drafts t + 2, at t it drafts t + 3.
  argmax_KBT = jnp.array([[[1, 2, 3, 4, 5, 6]], [[3, 4, 0, 6, 7, 8]]])
  valid_BT = jnp.ones((1, 6), bool)
  accepted_J = targets.acceptance(argmax_KBT, valid_BT, stride=2)
  # t = 1, 2, 3: the drafts of t + 2 are 3, 4, 0, head 1's argmax 3, 4, 5; of the two
  # accepted, the drafts of t + 3 are 4, 0, head 1's argmax 4, 5.
  np.testing.assert_array_equal(accepted_J, [3, 2, 1])
  # A document that starts at t = 1 has no token before.
  masked = targets.acceptance(argmax_KBT, valid_BT.at[0, 0].set(False), 2)
  np.testing.assert_array_equal(masked, [2, 1, 0])


def test_token_order_targets_are_a_softmax_over_first_occurrences():
  c = tiny.cfg(loss__token_order_weight=1.0, loss__token_order_window=5, heads__n=1)
  tokens_BU = jnp.array([[9, 7, 7, 5, 9, 7, 5, 2, 2, 2, 2, 2]])
  position_BU = jnp.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
  p_WBT = token_order.token_order_targets(dict(tokens=tokens_BU, position=position_BU), c)
  e = np.exp(-1.0)
  at_0 = np.array([1, 0, e**2, e**3, 0])  # 7, 5 and 9; 7 again counts not
  at_3 = np.array([1, e, 0, 0, 0])  # 9 and 7; then the document ends
  np.testing.assert_allclose(p_WBT[:, 0, 0], at_0 / at_0.sum(), rtol=1e-6)
  np.testing.assert_allclose(p_WBT[:, 0, 3], at_3 / at_3.sum(), rtol=1e-6)
  np.testing.assert_array_equal(p_WBT[:, 0, 5], 0)  # its last token
  masked = dict(tokens=tokens_BU, position=position_BU, loss_mask=jnp.arange(12)[None] >= 2)
  np.testing.assert_array_equal(token_order.token_order_targets(masked, c)[:, 0, 0], 0)


def test_bfloat16_log_sum_exp_is_computed_in_float32():
  c = tiny.cfg(model__compute_dtype='bfloat16', heads__n=3)
  full = tiny.cfg(heads__n=3)
  (low, _), (grads, _) = tiny.value_and_grad(c, tiny.batch(c))
  (high, _), _ = tiny.value_and_grad(full, tiny.batch(c))
  assert low.dtype == np.float32
  # bfloat16 has 8 bits: a log-sum-exp in it would be off by 4e-3 relative.
  np.testing.assert_allclose(low, high, rtol=1e-3)
  for g in jax.tree.leaves(grads):
    assert g.dtype == np.float32 and np.isfinite(g).all()


def test_log_sum_exp_of_one_token_is_computed_in_float32():
  """A mean over tokens would hide errors that cancel."""
  # 32 logits of 10: 13.4657, of which bfloat16 would make 13.4375.
  loss, stats = cross_entropy.softmax_xent(
    jnp.full((1, 1, 4), 2.5, jnp.bfloat16),
    jnp.ones((4, 32), jnp.bfloat16),
    jnp.array([[3]]),
    jnp.ones((1, 1), bool),
    tiny.cfg(loss__z_loss=1.0),
  )
  lse = 10 + np.log(32)
  np.testing.assert_allclose(stats.z_loss, lse**2, rtol=1e-6)
  np.testing.assert_allclose(loss - stats.z_loss, np.log(32), rtol=1e-4)


@functools.cache
def _temp_bytes(n, schedule, chunk=0, order=0.0):
  c = tiny.cfg(
    heads__n=n,
    model__n_layers=10,
    model__vocab_size=4096,
    data__seq_len=64,
    loss__backward='remat' if schedule == 'dense' else schedule,
    loss__chunk_size=chunk,
    data__batch_size=4,
    model__remat='block',
    loss__token_order_weight=order,
    loss__token_order_window=8,
  )
  m = tiny.mesh(c)
  rows = {
    name: jax.ShapeDtypeStruct(
      (1, 4, 64 + c.span),
      np.int32,
      sharding=jax.NamedSharding(m, sharding.pspec(None, 'batch', None)),
    )
    for name in ('tokens', 'position')
  }
  with jax.set_mesh(m):
    w = params.abstract(lm.specs(c), jnp.float32, m)
    if schedule == 'dense':
      f = jax.jit(jax.grad(functools.partial(tiny.dense_loss, c=c), has_aux=True))
      lowered = f.lower(w, rows)
    else:
      lowered = tiny._value_and_grad.lower(w, rows, c=c, n_active=n)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('schedule', ['remat', 'interleaved'])
def test_memory_is_constant_in_the_number_of_heads(schedule):
  one = _temp_bytes(1, schedule)
  assert abs(_temp_bytes(8, schedule) - one) < 0.1 * one
  assert _temp_bytes(8, schedule, chunk=16) < 0.5 * one


@pytest.mark.parametrize('schedule', ['interleaved', pytest.param('remat', marks=pytest.mark.slow)])
def test_token_order_memory_is_constant_and_falls_with_chunk_size(schedule):
  one = _temp_bytes(1, schedule, order=1.0)
  assert _temp_bytes(8, schedule, order=1.0) < 1.1 * one
  assert _temp_bytes(8, schedule, chunk=16, order=1.0) < 0.5 * one


@pytest.mark.slow
def test_memory_with_all_logits_grows_with_heads():
  assert _temp_bytes(8, 'dense') > 4 * _temp_bytes(1, 'remat')


def _outside_of_loops(jaxpr):
  """Yields the shapes of what a program computes once from arrays: what it computes from a
  number XLA computes where it is read."""
  for eqn in jaxpr.eqns:
    called = list(jax.extend.core.jaxprs_in_params(eqn.params))
    if not called and any(v.aval.size > 1 for v in eqn.invars):
      yield from (v.aval.shape for v in eqn.outvars)
    for sub in called if eqn.primitive.name != 'scan' else ():
      yield from _outside_of_loops(sub)


@pytest.fixture
def trace_losses_for(monkeypatch):
  def patch(platform):
    patched = types.SimpleNamespace(**vars(sharding) | dict(platform=lambda: platform))
    for module in (backward, cross_entropy):
      monkeypatch.setattr(module, 'sharding', patched)
    tiny._value_and_grad.clear_cache()

  yield patch
  tiny._value_and_grad.clear_cache()


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('ids', [None, (1, 4, 5, 9, 30)], ids=['all', 'of_a_draft_vocabulary'])
def test_logits_of_a_chunk_equal_numpy(platform, ids, trace_losses_for):
  trace_losses_for(platform)
  V = 32 if ids is None else len(ids)
  tokens_V = np.arange(V) if ids is None else np.array(ids)
  logits_BCV = np.random.default_rng(0).normal(size=(2, 4, V)).astype(np.float32)
  logits_BCV[1, 2] = 0.5  # a tie
  target_BC = np.array([[4, 5, 9, 1], [30, 4, 1, 7]])
  found = jax.jit(cross_entropy.of_scores, static_argnums=2)(logits_BCV, target_BC, ids)
  wide_BCV = logits_BCV.astype(np.float64)
  is_target_BCV = tokens_V == target_BC[:, :, None]
  np.testing.assert_array_equal(found.argmax_BC, tokens_V[np.argmax(wide_BCV, axis=-1)])
  np.testing.assert_allclose(found.label_BC, np.sum(is_target_BCV * wide_BCV, axis=-1), rtol=1e-6)
  np.testing.assert_allclose(found.lse_BC, np.log(np.sum(np.exp(wide_BCV), axis=-1)), rtol=1e-6)
  np.testing.assert_array_equal(found.ids_11V, tokens_V[None, None])


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('family', ['parallel', 'sequential'])
def test_nothing_per_logit_is_computed_before_the_loop_over_chunks(
  family, platform, trace_losses_for
):
  """JAX computes what a loop does not change, as the ids of tokens, before a loop that it
  differentiates."""
  trace_losses_for(platform)
  c = tiny.cfg(heads__n=3, heads__family=family, loss__backward='interleaved', loss__chunk_size=4)
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    w, rows = tiny.model(c, m), sharding.put_batch(m, tiny.batch(c))
    jaxpr = jax.make_jaxpr(lambda w, rows: tiny._value_and_grad(w, rows, c=c, n_active=3))(w, rows)
  V, found = c.model.vocab_size, set(_outside_of_loops(jaxpr.jaxpr))
  assert (c.model.d_model, V) in found
  assert {x for x in found if len(x) == 3 and x[-1] == V} <= {(1, 1, V)}


@pytest.mark.parametrize('schedule', ['remat', 'interleaved'])
@pytest.mark.parametrize('grad_dtype', ['float32', 'bfloat16'])
def test_gradients_are_reduced_over_devices_in_grad_dtype(schedule, grad_dtype):
  c = tiny.cfg(
    model__compute_dtype='bfloat16',
    loss__grad_dtype=grad_dtype,
    mesh__fsdp=4,
    loss__backward=schedule,
    heads__n=2,
  )
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    w, rows = tiny.model(c, m), sharding.put_batch(m, tiny.batch(c))
    jaxpr = jax.make_jaxpr(lambda w, rows: tiny._value_and_grad(w, rows, c=c, n_active=2))(w, rows)
  found = tiny.reductions(jaxpr.jaxpr)
  assert len(found) >= 4 and set(found) == {jnp.dtype(grad_dtype)}


def _reshards(jaxpr, in_loop=False):
  """Yields (resharded array, whether in a loop) in all nested jaxprs."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'reshard':
      yield eqn.invars[0].aval, in_loop
    for sub in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from _reshards(sub, in_loop or eqn.primitive.name == 'scan')


def _reshards_of_a_step(**changes):
  c = tiny.cfg(mesh__fsdp=4, heads__n=2, **changes)
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    w, rows = tiny.model(c, m), sharding.put_batch(m, tiny.batch(c))
    jaxpr = jax.make_jaxpr(lambda w, rows: tiny._value_and_grad(w, rows, c=c, n_active=2))(w, rows)
  return list(_reshards(jaxpr.jaxpr))


@pytest.mark.parametrize('family', ['parallel', 'causal'])
@pytest.mark.parametrize('schedule', ['remat', 'interleaved'])
def test_unembedding_is_gathered_once(schedule, family):
  found = _reshards_of_a_step(loss__backward=schedule, heads__family=family, model__vocab_size=40)
  unembed_DV = [in_loop for x, in_loop in found if x.shape == (16, 40)]
  # Gathered, and its gradient scattered over fsdp, then added over data.
  assert unembed_DV == [False, False, False]
  assert any(in_loop for _, in_loop in found)  # as layers are


def test_what_is_done_on_a_tpu_has_the_same_gradients(trace_losses_for):
  """A chain's backward pass, interleaved, after its unembedding's; ids of tokens."""
  of = dict(heads__family='sequential', heads__n=3, loss__backward='interleaved', mesh__fsdp=2)
  c = tiny.cfg(**of)
  found = []
  for platform in ('cpu', 'tpu'):
    trace_losses_for(platform)
    found.append(tiny.value_and_grad(c, tiny.batch(c, packed=True)))
  jax.tree.map(np.testing.assert_array_equal, *found)


TPU = """
import re
from tests.support import ahead, kernels, tiny
of = dict(heads__family='sequential', heads__n=4, loss__backward='interleaved', mesh__fsdp=4)
of |= dict(data__seq_len=512, data__batch_size=4, mesh__tensor=1)
text = ahead.tpu_step(tiny.cfg(**kernels.STEP | of))
entry = text[text.index('ENTRY '):]
parts = 'jvp(heads)/jvp()/reshard', 'jvp(heads)/transpose(jvp())/while'
found = re.findall('op_name="jit.step./([^"]*)"', entry)
print(*(name for name in dict.fromkeys(found) if name in parts))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_a_tpu_reduces_the_unembedding_before_the_backward_pass_of_a_chain():
  """Or its gradient would be in memory, unsharded, through it."""
  out = runs.printed(TPU, variables=ahead.VARIABLES)
  assert out.split() == ['jvp(heads)/jvp()/reshard', 'jvp(heads)/transpose(jvp())/while']


@pytest.mark.parametrize('family', ['parallel', 'causal'])
def test_gradient_scales_with_the_cotangent(family):
  c = tiny.cfg(heads__n=2, loss__backward='interleaved', heads__family=family)
  m, two = tiny.mesh(c), jnp.ones(2)
  counts = targets.Counts(100 * two, 100 * two)
  with jax.set_mesh(m):
    w, rows = tiny.model(c, m), sharding.put_batch(m, tiny.batch(c))
    rows = jax.tree.map(lambda x: x[0], rows)

    @jax.jit
    def grads(factor):
      def total(w, probe_K):
        value, _ = multi_token.mtp_loss(
          w, probe_K, rows, counts=counts, weight_K=two, n_active=2, cfg=c
        )
        return factor * value

      return jax.grad(total, argnums=(0, 1))(w, 0 * two)

    (one, norm2_one_K), (four, norm2_four_K) = grads(1.0), grads(4.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(4 * a, b, **TOLERANCE), one, four)
  np.testing.assert_allclose(16 * norm2_one_K, norm2_four_K, rtol=1e-5)


@pytest.mark.parametrize('schedule', ['remat', 'interleaved'])
def test_gradients_of_shared_bfloat16_parameters_accumulate_in_float32(schedule):
  """Rounded once: what float32 parameters of the same values have."""
  of = dict(heads__n=4, heads__family='recursive', heads__unembedding='tied')
  narrow = tiny.cfg(**of, loss__backward=schedule, model__param_dtype='bfloat16')
  wide = tiny.cfg(**of)
  m = tiny.mesh(wide)
  w = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.model(wide, m))
  rows = tiny.batch(wide)
  _, (got, _) = tiny.value_and_grad(narrow, rows, w)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), w)
  _, (want, _) = tiny.value_and_grad(wide, rows, exact)
  for name in ('norm', 'embed', 'heads'):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b, rtol=2**-8, atol=1e-7),
      getattr(got, name),
      getattr(want, name),
    )


def test_grad_dtype_does_not_change_the_forward_pass():
  totals = []
  for dtype in ('float32', 'bfloat16'):
    c = tiny.cfg(heads__n=3, loss__grad_dtype=dtype)
    totals.append(tiny.value_and_grad(c, tiny.batch(c))[0][0])
  assert totals[0] == totals[1]


def test_norm_weights_are_not_cast_to_bfloat16():
  """A change below the spacing of bfloat16 is seen in a norm, in no matrix."""
  c = tiny.cfg(
    heads__n=2, heads__family='sequential', model__n_layers=1, model__compute_dtype='bfloat16'
  )
  m = tiny.mesh(c)

  @jax.jit
  def losses(w, rows):
    counts = targets.counts(rows, c, 2)
    _, sums = multi_token.mtp_loss(
      w,
      jnp.zeros(2),
      jax.tree.map(lambda x: x[0], rows),
      counts=counts,
      weight_K=jnp.ones(2),
      n_active=2,
      cfg=c,
    )
    return sums['loss_sum_K'] / counts.target_K

  with jax.set_mesh(m):
    rows = sharding.put_batch(m, tiny.batch(c))
    w = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tiny.model(c, m))
    want_K, seen = losses(w, rows), {}
    for changed, _ in jax.tree_util.tree_leaves_with_path(w):
      other = jax.tree_util.tree_map_with_path(
        lambda path, x: x * (1 + 2.0**-11) if path == changed else x,  # noqa: B023
        w,
      )
      got_K = losses(other, rows)
      seen[jax.tree_util.keystr(changed)] = bool((got_K != want_K).any())
  assert sum('norm' in name for name in seen) == 8
  assert seen == {name: 'norm' in name for name in seen}


@pytest.mark.slow
def test_all_logits_baseline_has_the_same_loss(monkeypatch):
  """The baseline of docs/performance.md's memory comparison is the same loss."""
  from tests.baselines import ahead

  c = tiny.cfg(heads__n=3)
  rows = tiny.batch(c)
  want, _ = tiny.value_and_grad(c, rows)
  tiny._value_and_grad.clear_cache()  # or a cached program of another strategy would be used
  monkeypatch.setitem(backward.STRATEGIES, 'interleaved', ahead.keeps_all_logits)
  got, _ = tiny.value_and_grad(tiny.cfg(heads__n=3, loss__backward='interleaved'), rows)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), got, want)


@pytest.mark.parametrize('shared', [False, True])
def test_a_registered_family_that_reads_the_next_token_without_a_chain(shared, monkeypatch):
  """No family of the package does; the gradient of its embeddings is not lost, and that
  of a module that all heads share is the sum over heads."""

  def block_input(module, x, ctx, cfg):
    w = params.gather_cast(module, heads.linear_specs(cfg.model), cfg)
    return x.z_BTD + jnp.einsum('BTD,DE->BTE', x.next_emb_BTD, w.proj)

  def block_output(module, y_BTD, x, cfg):
    return x.carry_BTD, layers.rms_norm(y_BTD, x.norm_D, cfg.model)

  peek = heads.Family(
    heads.linear_specs,
    block_input,
    block_output,
    layer=None,
    uses_next_token=True,
    shared_module=shared,
  )
  monkeypatch.setitem(heads.FAMILIES, 'peek', peek)
  monkeypatch.setitem(schema.HEAD_FAMILIES, 'peek', False)
  found = []
  for schedule in ('remat', 'interleaved'):
    c = _cfg('peek', n=3, schedule=schedule)
    (total, _), (grads, _) = tiny.value_and_grad(c, tiny.batch(c, packed=True))
    found.append((total, grads))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), *found)
  assert np.abs(found[0][1].embed).max() > 1e-4
