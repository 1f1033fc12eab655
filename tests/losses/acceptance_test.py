"""Losses that train heads to be accepted, and isolated heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import draft_vocab, fields, schedule, schema
from mtp_jax.decode import sample
from mtp_jax.losses import acceptance, cross_entropy, metrics, targets
from mtp_jax.model import heads, lm
from mtp_jax.parallel import sharding
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib
from tests.support import oracle, pairwise, tiny

FILTERS = {'all': {}, 'some': dict(temperature=0.7, top_k=9, top_p=0.8, min_p=0.02)}
DRAFTED = {'every': (), 'few': (1, 2, 5, 6, 8, 9, 13, 14, 17, 20, 21, 30)}
OPTIONS = dict(
  family=tuple(heads.FAMILIES),
  loss=('kl', 'tv', 'lk', 'lk_hybrid', 'e2e_tv'),
  share=(0.3, 0.0),
  isolated=(False, True),
  unembedding=('shared', 'replicated', 'tied'),
  filters=('all', 'some'),
  masked=(False, True),
  order=(0.0, 0.7),
  markov=(0, 6),
  drafted=('every', 'few'),
  backward=('remat', 'interleaved'),
  chunk=(4, 0),
  accumulate=(1, 2),
  mesh=((1, 1, 1), (2, 2, 2)),
)


def _cfg(family='parallel', n=3, mesh=(1, 1, 1), **changes):
  n_layers = 2 + (n if schema.HEAD_FAMILIES[family] else 0)
  data, fsdp, tensor = mesh
  return tiny.cfg(
    model__n_layers=n_layers,
    heads__family=family,
    heads__n=n,
    mesh__data=data,
    mesh__fsdp=fsdp,
    mesh__tensor=tensor,
    **changes,
  )


def _reads_next_token(family):
  return heads.FAMILIES[family].uses_next_token


def _masked(rows):
  rng = np.random.default_rng(1)
  return rows | dict(loss_mask=rng.random(rows['tokens'].shape) < 0.8)


@pytest.mark.parametrize(
  'row',
  pairwise.rows(OPTIONS),
  ids=lambda row: '-'.join(str(x).replace(' ', '') for x in row.values()),
)
def test_equals_oracle(row):
  """Value, and gradients along a random direction, for any strategy and sharding."""
  family, loss, share = row['family'], row['loss'], row['share']
  isolated = row['isolated'] and family != 'anticausal'
  filters = FILTERS[row['filters']]
  drafted = () if row['unembedding'] == 'replicated' else DRAFTED[row['drafted']]
  order_weight = 0.0 if row['masked'] else row['order']  # the oracle's has no mask
  c = _cfg(
    family,
    mesh=row['mesh'],
    heads__isolated=isolated,
    heads__markov_rank=0 if _reads_next_token(family) else row['markov'],
    heads__unembedding=row['unembedding'],
    heads__draft_vocab=draft_vocab.recorded(list(drafted), 32) if drafted else '',
    loss__head_loss=loss,
    loss__head_ce_weight=share,
    loss__lk_eta=2.0 if loss == 'lk_hybrid' else 3.0,
    loss__z_loss=1e-2,
    loss__weights='0:1,.5,.3',
    loss__token_order_weight=order_weight,
    loss__token_order_window=5,
    loss__backward=row['backward'],
    loss__chunk_size=row['chunk'],
    train__grad_accum_steps=row['accumulate'],
    **{f'loss__{name}': value for name, value in filters.items()},
  )
  rows = tiny.batch(c)
  rows = _masked(rows) if row['masked'] else rows
  (total, sums), (grads, _) = tiny.value_and_grad(c, rows)
  flat = {name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()}
  window = 5 if order_weight else 0
  shape = oracle.Shape(family, 3, z_loss=1e-2, window=window, drafted=drafted)
  how = oracle.Comparison(loss, 2.0, **filters)
  base = tiny.flat(tiny.model(c, tiny.mesh(c)))
  mask_BU, weight_K = flat.get('loss_mask'), np.array([1, 0.5, 0.3])
  logits = functools.partial(
    oracle.forward, tokens_BU=flat['tokens'], position_BU=flat['position'], shape=shape
  )
  teacher_BTV = logits(base)[0]
  found = oracle.compared(logits(base), teacher_BTV, flat['position'], shape, how, mask_BU=mask_BU)

  def own(path):
    """Of heads >= 2 alone: all, or those that follow head 1's in the stack."""
    replicated = path == 'unembed' and row['unembedding'] == 'replicated'
    is_markov = path.startswith('markov')
    is_own = path.startswith('heads') or replicated or is_markov
    return is_own, replicated or (c.heads.block_first and not is_markov)

  def isolate(w):
    moved = {}
    for path, x in w.items():
      is_own, is_stacked = own(path)
      moved[path] = np.array(x if is_own else base[path])
      if is_own and is_stacked:
        moved[path][0] = base[path][0]
    return moved

  def value(w):
    logits_KBTV = logits(w)
    if isolated:
      logits_KBTV = np.concatenate([logits_KBTV[:1], logits(isolate(w))[1:]])
    out = oracle.losses(
      logits_KBTV, flat['tokens'], flat['position'], shape._replace(z_loss=0), mask_BU=mask_BU
    )
    with_z = oracle.losses(logits_KBTV, flat['tokens'], flat['position'], shape, mask_BU=mask_BU)
    drafts = oracle.compared(
      *(logits_KBTV, teacher_BTV, flat['position'], shape, how),
      held=found['alpha'],
      mask_BU=mask_BU,
    )
    share_K = np.array([1, share, share])
    loss_K = share_K * out['loss_K'] + with_z['loss_K'] - out['loss_K']
    loss_K += (1 - share_K) * drafts['loss_K']
    order = 0.0
    if window:
      order = 0.7 * oracle.order(w, flat['tokens'], flat['position'], shape)
    return float(weight_K @ loss_K) + order

  np.testing.assert_allclose(total, value(base), rtol=1e-5)
  np.testing.assert_array_equal(sums['draft_count_K'], found['count_K'])
  np.testing.assert_array_equal(sums['alpha_count_K'], found['alpha_count_K'])
  np.testing.assert_allclose(sums['alpha_sum_K'], found['alpha_sum_K'], rtol=1e-5)
  np.testing.assert_allclose(sums['alpha_in_a_row_K'], found['in_a_row_K'], rtol=1e-5)
  means_K = sums['draft_loss_sum_K'] / np.maximum(found['count_K'], 1)
  np.testing.assert_allclose(means_K, found['loss_K'], rtol=2e-5)
  rng = np.random.default_rng(0)
  grads = tiny.flat(grads)
  along = {
    path: rng.normal(size=grad.shape) / max(np.linalg.norm(grad), 1e-9)
    for path, grad in grads.items()
  }

  def off(along):
    numeric = oracle.derivative(value, base, along, eps=1e-8)  # few kinks of min(p, q) within
    return abs(sum(np.sum(grads[path] * along[path]) for path in along) - numeric)

  if off(along) > 3e-5:
    wrong = {path: off({path: along[path]}) for path in along}
    raise AssertionError(f'gradients differ from those of the oracle: {wrong}')


def _shared(grads, c):
  """The gradients of what heads >= 2 share with head 1, and of head 1's own."""
  flat, out = tiny.flat(grads), {}
  for path, x in flat.items():
    if path == 'unembed' and c.heads.unembedding == 'replicated':
      out[path] = x[0]
    elif not path.startswith('heads'):
      out[path] = x
    elif c.heads.block_first:
      out[path] = x[0]
  return out


def _moved_heads(w, c):
  """Other parameters of heads >= 2."""

  def leaf(path, x):
    name = path[0].name
    own = name == 'heads' or (name == 'unembed' and c.heads.unembedding == 'replicated')
    if not own:
      return x
    first = x[:1] if c.heads.block_first or name == 'unembed' else x[:0]
    return jnp.concatenate([first, 1.5 * x[len(first) :] + 0.1])

  return jax.tree_util.tree_map_with_path(leaf, w)


ISOLATED = [family for family in heads.FAMILIES if family != 'anticausal']


@pytest.mark.parametrize('freeze', ['none', 'trunk'])
@pytest.mark.parametrize(
  'family, unembedding, loss, backward',
  [
    (family, unembedding, loss, backward)
    for i, family in enumerate(ISOLATED)
    for unembedding, loss, backward in [
      (
        ('shared', 'tied', 'replicated')[i % 3],
        ('ce', 'tv', 'e2e_tv')[(i + i // 3) % 3],
        ('remat', 'interleaved')[i % 2],
      )
    ]
  ],
)
def test_isolated_heads_leave_no_bit_in_what_they_share(
  family, unembedding, loss, backward, freeze
):
  """Whatever heads >= 2 are, the parameters of the next token, their gradients and moments
  have the same bits, also where gradients are clipped."""
  c = _cfg(
    family,
    heads__isolated=True,
    heads__unembedding=unembedding,
    heads__share_keys_values=family == 'recursive',
    loss__head_loss=loss,
    loss__backward=backward,
    train__freeze=freeze,
    optim__warmup_steps=0,
    optim__clip_norm=1e-2,
  )
  m = tiny.mesh(c)
  bytes_V, after = jnp.ones(c.model.vocab_size, jnp.int32), []
  with jax.set_mesh(m):
    step = step_lib.compiled(c, c.heads.n)
    for moved in (False, True):
      state = state_lib.init(c, m)
      params = _moved_heads(state.params, c) if moved else state.params
      # Anew, as the step donates its state.
      state = jax.tree.map(jnp.copy, state.replace(params=params))
      before = jax.device_get(state.params)
      new, _ = step(state, sharding.put_batch(m, tiny.batch(c)), bytes_V)
      after.append((before, jax.device_get(new)))
  (before, one), (moved, other) = after
  for a, b in zip(
    jax.tree.leaves((_shared(one.params, c), _moments(one, c))),
    jax.tree.leaves((_shared(other.params, c), _moments(other, c))),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  shared_moves = any(
    np.any(x != y)
    for x, y in zip(_shared(before, c).values(), _shared(one.params, c).values(), strict=True)
  )
  # With a frozen trunk, only a module or an unembedding of head 1's own trains.
  assert shared_moves == (freeze == 'none' or c.heads.block_first or unembedding == 'replicated')
  own = tiny.flat(one.params.heads), tiny.flat(before.heads)
  assert all(np.any(own[0][path][-1] != own[1][path][-1]) for path in own[0])
  assert any(
    np.any(x != y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  )


def _moments(state, c):
  """The first and second moments of `_shared`; all other leaves of the optimizer."""
  found = []
  for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state):
    names = [getattr(key, 'name', None) for key in path]
    if 'heads' in names:
      found += [x[0]] if c.heads.block_first else []
    elif 'unembed' in names and c.heads.unembedding == 'replicated':
      found.append(x[0])
    else:
      found.append(x)
  return found


def test_heads_that_are_not_isolated_change_the_trunk():
  """As the test above would see."""
  c = _cfg('sequential', loss__head_loss='tv')
  m = tiny.mesh(c)
  rows, w = tiny.batch(c), tiny.model(c, m)
  (_, (a, _)), (_, (b, _)) = (tiny.value_and_grad(c, rows, x) for x in (w, _moved_heads(w, c)))
  for name in ('embed', 'norm', 'unembed'):
    assert np.any(getattr(a, name) != getattr(b, name))


def test_heads_equal_to_head_1_are_accepted_and_have_no_gradient():
  """Constant logits: p = q everywhere, a corner of min(p, q)."""
  for loss in ('kl', 'tv', 'lk', 'lk_hybrid', 'e2e_tv'):
    c = _cfg(loss__head_loss=loss, loss__z_loss=0.0)
    m = tiny.mesh(c)
    w = tiny.model(c, m)
    w = w.replace(unembed=jnp.zeros_like(w.unembed))
    (_, sums), (grads, _) = tiny.value_and_grad(c, tiny.batch(c), w)
    np.testing.assert_allclose(sums['alpha_sum_K'], sums['alpha_count_K'], rtol=1e-6)
    np.testing.assert_allclose(sums['draft_loss_sum_K'], 0, atol=1e-4)
    only_1 = tiny.value_and_grad(c, tiny.batch(c), w, n_active=1)[1][0]
    np.testing.assert_allclose(grads.unembed, only_1.unembed, atol=1e-7)


def test_gradient_by_logits_is_the_published_one():
  """-q_j (1[q_j <= p_j] - S) of tv, at every entry at most 1."""
  rng = np.random.default_rng(0)
  z_BCV, y_BCV = (jnp.array(rng.normal(size=(2, 3, 11)), jnp.float32) for _ in range(2))
  l = tiny.cfg(loss__head_loss='tv').loss

  def loss(z_BCV):
    of = _logits(z_BCV)
    return jnp.sum(acceptance.of_chunk(of, y_BCV, l)[1])

  q, p = jax.nn.softmax(z_BCV), jax.nn.softmax(y_BCV)
  below = q <= p
  s = jnp.sum(below * q, axis=-1, keepdims=True)
  np.testing.assert_allclose(jax.grad(loss)(z_BCV), -q * (below - s), atol=1e-6)


def _logits(z_BCV):
  eye = jnp.eye(z_BCV.shape[-1])
  return cross_entropy.logits(z_BCV, eye, jnp.zeros(z_BCV.shape[:2], int), tiny.cfg().model)


@pytest.mark.parametrize(
  'filters',
  [
    dict(top_k=3),
    dict(top_k=100),
    dict(top_p=0.6),
    dict(top_p=1e-6),
    dict(min_p=0.2),
    dict(top_k=7, top_p=0.7, min_p=0.05),
  ],
  ids=str,
)
def test_filters_are_those_of_the_decoder(filters):
  """Ties, negative zeros and large logits too."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(1, 40, 23)) * rng.choice([0.1, 1, 10], size=(1, 40, 1))
  logits[0, ::3] = np.round(logits[0, ::3])
  logits[0, 0, :5], logits[0, 1] = -0.0, 0.0
  logits = jnp.array(logits, jnp.float32)
  l = tiny.cfg(**{f'loss__{name}': x for name, x in filters.items()}).loss
  given = dict(top_k=None, top_p=None, min_p=None) | filters
  want = sample.probabilities(logits, sample.Sampling(1.0, **given))
  np.testing.assert_array_equal(acceptance.kept(logits, l), want > 0)


@pytest.mark.parametrize('loss', ['kl', 'e2e_tv'])
@pytest.mark.parametrize('backward', ['remat', 'interleaved'])
def test_logits_of_a_sharded_vocabulary_are_never_gathered(backward, loss):
  c = _cfg(
    mesh=(1, 2, 2),
    loss__head_loss=loss,
    loss__backward=backward,
    loss__top_p=0.9,
    loss__top_k=5,
    model__vocab_size=88,
    loss__chunk_size=4,
  )
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    lowered = tiny._value_and_grad.lower(
      tiny.model(c, m), sharding.put_batch(m, tiny.batch(c)), c=c, n_active=3
    )
    text = lowered.compile().as_text()
  gathers = [line for line in text.splitlines() if ' all-gather(' in line]
  assert gathers and not any(',4,88]' in line for line in gathers)
  assert any(',4,44]' in line for line in text.splitlines())  # a shard of a chunk's


def test_memory_of_drafts_in_a_row_falls_with_chunk_size():
  """Two chunks of logits, not the rows of two heads."""

  def temp_bytes(loss, chunk, n):
    c = _cfg(
      n=n,
      loss__head_loss=loss,
      loss__chunk_size=chunk,
      loss__backward='interleaved',
      model__vocab_size=4096,
      data__seq_len=64,
      data__batch_size=4,
    )
    m = tiny.mesh(c)
    with jax.set_mesh(m):
      rows = sharding.put_batch(m, tiny.batch(c))
      lowered = tiny._value_and_grad.lower(tiny.model(c, m), rows, c=c, n_active=n)
      return lowered.compile().memory_analysis().temp_size_in_bytes

  whole, chunked = (temp_bytes('e2e_tv', chunk, 3) for chunk in (64, 16))
  assert chunked < 0.5 * whole
  assert temp_bytes('e2e_tv', 16, 6) < 1.2 * chunked


def test_drafts_are_verified_in_the_window_and_the_document():
  position_BU = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
  rows = dict(tokens=jnp.zeros((1, 11), int), position=position_BU)
  c = tiny.cfg(heads__n=3)
  _, valid_KBT = targets.targets(rows, c)
  # Head 2 at t is verified at t + 1 < 8, head 3 at t + 2.
  want = [[0] * 8, [1, 1, 0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 1, 1, 0, 0]]
  np.testing.assert_array_equal(targets.drafts(valid_KBT, c)[:, 0], want)
  whole = tiny.cfg(heads__n=3, loss__head_loss='e2e_tv')
  want = [[0] * 8, want[2], want[2]]
  np.testing.assert_array_equal(targets.drafts(valid_KBT, whole)[:, 0], want)
  np.testing.assert_array_equal(
    targets.compared(valid_KBT, whole), targets.drafts(valid_KBT, tiny.cfg(heads__n=3))
  )


def test_registered_families_are_refused_by_what_they_do():
  for name, changes, flag in (
    ('anticausal', dict(heads__isolated=True), 'heads.isolated'),
    ('sequential', dict(heads__markov_rank=4), 'heads.markov_rank'),
  ):
    family = f'own_{name}'
    heads.register(family, heads.FAMILIES[name], block_first=schema.HEAD_FAMILIES[name])
    try:
      with pytest.raises(fields.ConfigError, match=flag):
        lm.specs(_cfg(family, **changes))
    finally:
      del heads.FAMILIES[family], schema.HEAD_FAMILIES[family]


@pytest.mark.parametrize('family', ['residual', 'causal'])
def test_head_gradient_norms_of_isolated_heads_are_those_at_their_inputs(family):
  norms = [
    tiny.value_and_grad(c, tiny.batch(c))[1][1]
    for backward in ('remat', 'interleaved')
    for c in [_cfg(family, heads__isolated=True, loss__backward=backward)]
  ]
  np.testing.assert_allclose(*norms, rtol=1e-4)
  assert np.all(norms[0] > 0)
  if family == 'residual':  # independent heads: as without isolation
    c = _cfg(family)
    np.testing.assert_allclose(norms[0], tiny.value_and_grad(c, tiny.batch(c))[1][1], rtol=1e-4)


def test_strided_heads_are_compared_where_they_are_verified():
  c = tiny.cfg(heads__n=2, heads__stride=3, loss__head_loss='tv', model__n_layers=4)
  rows = tiny.batch(c)
  (total, sums), _ = tiny.value_and_grad(c, rows)
  flat = {name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()}
  shape = oracle.Shape('parallel', 2, stride=3)
  w = tiny.flat(tiny.model(c, tiny.mesh(c)))
  logits = oracle.forward(w, flat['tokens'], flat['position'], shape)
  found = oracle.compared(logits, logits[0], flat['position'], shape, oracle.Comparison('tv'))
  np.testing.assert_allclose(sums['alpha_sum_K'], found['alpha_sum_K'], rtol=1e-5)
  np.testing.assert_allclose(total, sums['loss_K'][0] + found['loss_K'][1], rtol=1e-5)
  assert 'alpha_in_a_row_K' not in sums


def test_weights_move_linearly():
  c = tiny.cfg(heads__n=3, loss__weights='0:1,.5~10:1,0;20:2~40:0,1,1', train__steps=100)
  for step, want in (
    (0, [1, 0.5, 0.5]),
    (5, [1, 0.25, 0.25]),
    (10, [1, 0, 0]),
    (19, [1, 0, 0]),
    (20, [2, 2, 2]),
    (25, [1.5, 1.75, 1.75]),
    (40, [0, 1, 1]),
    (99, [0, 1, 1]),
  ):
    np.testing.assert_allclose(targets.weights(jnp.int32(step), c), want, rtol=1e-6)
    np.testing.assert_allclose(schedule.head_weights(c, step), want, rtol=1e-6)


def test_geometric_weights():
  c = tiny.cfg(heads__n=3, loss__weights='0:beta=.5')
  np.testing.assert_allclose(schedule.head_weights(c, 0), [4 / 7, 2 / 7, 1 / 7])
  np.testing.assert_allclose(targets.weights(jnp.int32(7), c), [4 / 7, 2 / 7, 1 / 7])


def test_scalars_of_drafts():
  values = metrics.scalars(
    dict(
      total=1.0,
      loss_sum_K=np.array([4.0, 6, 0]),
      z_loss_sum_K=np.zeros(3),
      correct_K=np.array([1.0, 1, 0]),
      count_K=np.array([4.0, 3, 0]),
      accepted_K=np.array([2.0, 1, 0]),
      draft_count_K=np.array([0.0, 3, 0]),
      alpha_sum_K=np.array([0.0, 1.5, 0]),
      alpha_count_K=np.array([0.0, 6, 0]),
      draft_loss_sum_K=np.array([0.0, 6, 0]),
      alpha_in_a_row_K=np.array([4.0, 2, 1]),
      bytes=8.0,
    )
  )
  assert (values['alpha_2'], values['alpha_3']) == (0.25, None)
  assert (values['draft_loss_2'], values['draft_loss_3']) == (2, None)
  assert values['mean_acceptance_length_sampled'] == 1 + 2 / 4 + 1 / 4
  assert 'alpha' in metrics.table(values)[0] and '25.00%' in metrics.table(values)[2]
