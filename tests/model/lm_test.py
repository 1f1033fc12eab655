"""The model: causality, documents, n = 1, and the oracle's forward pass."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.cli import flags
from mtp_jax.config import draft_vocab, schema
from mtp_jax.model import attention, layers, lm, params
from mtp_jax.model import heads as heads_lib
from mtp_jax.parallel import sharding
from tests.support import oracle, tiny


def _logits(c, rows):
  """All heads' logits, and the parameters they come from."""
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    w = tiny.model(c, m)
    placed = sharding.put_batch(m, {k: x[None] for k, x in rows.items()})
    f = jax.jit(tiny.dense_logits, static_argnums=3)
    logits = f(w, *(placed[k][0] for k in ('tokens', 'position')), c)
    return jax.device_get(logits), w


def _cfg(family, n, **changes):
  """Returns a Config with two trunk layers, and those of the heads."""
  layers = 2 + (n if schema.HEAD_FAMILIES[family] else 0)
  return tiny.cfg(heads__n=n, heads__family=family, model__n_layers=layers, **changes)


def _rows(c, **kwargs):
  return {k: x[0] for k, x in tiny.batch(c, **kwargs).items()}


FAMILIES = tuple(heads_lib.FAMILIES)


@pytest.mark.parametrize('n', [1, 2, 4])
@pytest.mark.parametrize('family', FAMILIES)
def test_forward_equals_oracle(family, n):
  c = _cfg(family, n)
  rows = _rows(c)
  logits_KBTV, w = _logits(c, rows)
  want = oracle.forward(tiny.flat(w), rows['tokens'], rows['position'], oracle.Shape(family, n))
  np.testing.assert_allclose(logits_KBTV, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('family', FAMILIES)
def test_one_head_equals_a_plain_transformer(family):
  c = _cfg(family, 1)
  rows = _rows(c)
  logits_KBTV, w = _logits(c, rows)
  m = tiny.mesh(c)
  T = c.data.seq_len
  with jax.set_mesh(m):  # all L layers in one scan, no head anywhere
    stacked = w.trunk
    if c.heads.block_first:
      stacked = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), w.trunk, w.heads)
    else:
      assert w.heads is None
    assert stacked.q.shape[0] == c.model.n_layers
    placed = sharding.put_batch(m, {k: x[None] for k, x in rows.items()})
    plain = w.replace(trunk=stacked)
    z_BTD, _ = lm.trunk_output(
      plain, lm.embed(plain, placed['tokens'][0][:, :T], c), placed['position'][0][:, :T], c
    )
    want = layers.rms_norm(z_BTD, w.norm, c.model) @ w.unembed
  np.testing.assert_allclose(logits_KBTV[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'family, stride', [*((family, 1) for family in FAMILIES), ('sequential', 3)]
)
def test_heads_are_causal_by_gradient(family, stride):
  """d logits_k[t] / d embedding of token s is 0 for s > t; a token-feeding head
  k >= 2 sees up to the token of head k - 1 and no further: t + k - 1, unless
  heads leap. And each does see that far."""
  c = _cfg(family, 3, heads__stride=stride, data__batch_size=1)
  m = tiny.mesh(c)
  U = c.data.seq_len + c.span
  with jax.set_mesh(m):
    w = tiny.model(c, m)
    position_BU = jnp.arange(U)[None]
    emb_BUD = jax.random.normal(
      jax.random.key(1), (1, U, c.model.d_model), out_sharding=sharding.pspec('batch', None, None)
    )

    def jacobian(emb_BUD, k, t):
      def f(emb_BUD):
        logits = tiny.logits_of_embeddings(w, emb_BUD, position_BU, c)
        at = (jnp.arange(3) == k)[:, None, None, None]
        here = (jnp.arange(c.data.seq_len) == t)[None, None, :, None]
        return jnp.sum(jnp.where(at & here, logits, 0) ** 3)

      return jax.grad(f)(emb_BUD)

    jacobian = jax.jit(jacobian)
    index_U = np.arange(U)
    for k in range(3):
      fed = c.heads.offsets[:k] if heads_lib.family(c.heads).uses_next_token else ()
      for t in (1, 7, 15):
        g_UD = np.asarray(jacobian(emb_BUD, k, t))[0]
        seen_U = np.any(g_UD != 0, axis=-1)
        want_U = index_U <= t
        for offset in fed:  # by every query to t but that of position 0
          want_U |= (index_U > offset) & (index_U <= t + offset)
        np.testing.assert_array_equal(seen_U, want_U)


@pytest.mark.parametrize('family', FAMILIES)
def test_packed_document_equals_unpacked(family):
  c = _cfg(family, 4)  # and rows as those of the oracle: one program
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, 32, (8, 20), np.int32)

  def logits(tokens, *documents):
    position = np.concatenate([np.arange(n, dtype=np.int32) for n in documents])
    position = np.broadcast_to(position, tokens.shape)
    return _logits(c, dict(tokens=tokens, position=position))[0]

  packed = logits(tokens, 7, 13)
  alone = logits(np.concatenate([tokens[:, 7:], tokens[:, :7]], axis=1), 13, 7)
  np.testing.assert_allclose(packed[:, :, 7:16], alone[:, :, :9], rtol=1e-5, atol=1e-5)
  # Without the boundary all logits differ.
  merged = logits(tokens, 20)
  assert np.abs(packed[:, :, 7:16] - merged[:, :, 7:16]).max() > 1e-3


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('fraction', [1.0, 0.5])
def test_rope_of_tpus_has_the_same_bits(dtype, fraction):
  """As a product with zeros and ones: value and gradient, also of dimensions that are not
  rotated, whatever the mesh's platform."""
  m = schema.ModelConfig(d_model=48, n_attn_heads=3, rope_fraction=fraction)
  sin, cos = layers.rope_tables(jnp.arange(20)[None] * 7, m)
  rng = np.random.default_rng(0)
  x_BTNH, dy_BTNH = (jnp.array(rng.normal(size=(2, 20, 3, 16)), dtype) for _ in range(2))

  def outputs(rope):
    @jax.jit
    def f(x_BTNH, dy_BTNH):
      y_BTNH, vjp = jax.vjp(lambda x: rope(x, sin, cos), x_BTNH)
      return y_BTNH, *vjp(dy_BTNH)

    return f(x_BTNH, dy_BTNH)

  for got, want in zip(outputs(layers.rope_by_product), outputs(layers.rope), strict=True):
    # The compiler may contract a product and a sum of float32.
    atol = 3e-7 if dtype == 'float32' else 0
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), rtol=0, atol=atol)


def test_rope_scores_depend_on_distance_only():
  q_BTNH, k_BTNH = jax.random.normal(jax.random.key(0), (2, 1, 8, 1, 6))
  scores = []
  for shift in (0, 300):
    m = schema.ModelConfig(d_model=6, n_attn_heads=1)
    sin, cos = layers.rope_tables(jnp.arange(8)[None] + shift, m)
    q, k = layers.rope(q_BTNH, sin, cos), layers.rope(k_BTNH, sin, cos)
    scores.append(jnp.einsum('BTNH,BSNH->TS', q, k))
  np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-4)
  assert np.abs(scores[0] - jnp.einsum('BTNH,BSNH->TS', q_BTNH, k_BTNH)).max() > 0.1


def test_grouped_queries_read_their_kv_head():
  q, k, v = (
    jax.random.normal(jax.random.key(i), (2, 5, heads, 4)) for i, heads in enumerate((6, 2, 2))
  )
  segment = jnp.ones((2, 5), int)
  m = schema.ModelConfig(d_model=24, n_attn_heads=6)

  def attend(k, v):
    return attention.reference(attention.Operands(q, k, v, segment), 0, m)

  got, want = attend(k, v), attend(jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'size, total',
  [  # PAPER: S14, computed totals at a vocabulary of 32,000
    ('1m', 9.5e6),
    ('3m', 19.8e6),
    ('10m', 35.2e6),
    ('30m', 66.9e6),
    ('100m', 148e6),
    ('300m', 387e6),
    ('1b', 1.12e9),
    ('0.3b', 297e6),
    ('0.6b', 630e6),
    ('1.3b', 1.36e9),
    ('3b', 3.02e9),
    ('7b', 6.74e9),
    ('13b', 13.02e9),
  ],
)
def test_size_files_have_the_published_parameter_counts(size, total):
  for n in (1, 2):
    parsed = flags.parse([f'--flagfile=experiments/size/{size}.flags', f'--heads.n={n}'])
    assert abs(params.count(lm.specs(parsed.config())) / total - 1) < 0.01


def test_initial_values_have_their_std_and_are_independent():
  small = dict(heads__family='linear', heads__n=2, model__d_model=64)
  c = tiny.cfg(**small, model__d_ff=96)
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    w = params.init(jax.random.key(0), lm.specs(c), 'float32')
    more = tiny.cfg(**small, model__d_ff=128)
    other = params.init(jax.random.key(0), lm.specs(more), 'float32')
  for x, spec in zip(jax.tree.leaves(w), jax.tree.leaves(lm.specs(c)), strict=True):
    if spec.std is None:
      np.testing.assert_array_equal(x, 1)
    else:
      np.testing.assert_allclose(np.std(x), spec.std, rtol=0.1)
  np.testing.assert_array_equal(w.trunk.q, other.trunk.q)
  assert w.trunk.o.std() < w.trunk.q.std() / 2  # (2L)^-1/2 smaller


def test_initial_values_do_not_depend_on_the_mesh():
  values = []
  for sizes in ((1, 1, 1), (2, 2, 2)):
    c = tiny.cfg(
      heads__family='linear',
      heads__n=2,
      mesh__data=sizes[0],
      mesh__fsdp=sizes[1],
      mesh__tensor=sizes[2],
    )
    with jax.set_mesh(tiny.mesh(c)):
      make = jax.jit(lambda key: params.init(key, lm.specs(c), 'float32'))  # noqa: B023
      values.append(jax.device_get(make(jax.random.key(0))))
  jax.tree.map(np.testing.assert_array_equal, *values)


def test_weight_decay_is_defined_by_the_spec():
  decays = jax.tree.map(lambda s: s.decay, lm.specs(schema.CommandConfig()))
  assert decays.embed and decays.unembed and decays.trunk.q
  assert not decays.norm
  assert not decays.trunk.attn_norm and not decays.heads.mlp_norm


@pytest.mark.parametrize('drafted', [(), (0, 3, 4, 17)])
def test_logits_with_a_markov_head_equal_oracle(drafted):
  tokens = draft_vocab.recorded(np.array(drafted), 32) if drafted else ''
  c = _cfg('linear', 3, heads__markov_rank=4, heads__draft_vocab=tokens)
  rows = _rows(c, packed=False)
  m = tiny.mesh(c)
  T, tokens_BU = c.data.seq_len, rows['tokens']
  with jax.set_mesh(m):
    w = tiny.model(c, m)
    tokens_BT = sharding.put_batch(m, dict(tokens=tokens_BU[None, :, :T]))['tokens'][0]
    found = jax.device_get(jax.jit(lm.logits, static_argnums=2)(w, tokens_BT, c))
  want = oracle.forward(
    tiny.flat(w), tokens_BU, rows['position'], oracle.Shape('linear', 3, drafted=drafted)
  )
  # The last ones read a token beyond the row.
  np.testing.assert_allclose(found[:, :, : T - 2], want[:, :, : T - 2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(
  'of, x_axes, w_axes',
  [
    ('BTD,DNH->BTNH', ('batch', None, None), ('embed', 'attn_heads', None)),
    ('BTNH,NHD->BTD', ('batch', None, 'attn_heads', None), ('attn_heads', None, 'embed')),
    ('BTD,DF->BTF', ('batch', None, None), ('embed', 'mlp')),
  ],
)
def test_product_equals_einsum(of, x_axes, w_axes, sizes):
  """Value and gradients, also of sharded weights; on a CPU no operand is transposed in memory."""
  size = dict(B=4, T=32, D=64, N=2, H=16, F=96)
  of_x, of_w = of.split('->')[0].split(',')
  names = ('mesh__data', 'mesh__fsdp', 'mesh__tensor')
  c = tiny.cfg(**dict(zip(names, sizes, strict=True)))
  x, w = (
    jax.random.normal(jax.random.key(i), [size[letter] for letter in letters])
    for i, letters in enumerate((of_x, of_w))
  )

  def value(product, x, w):
    w = sharding.gather(w, w_axes, 'float32', 'float32')
    return jnp.sum(jnp.sin(product(of, x, w, out_sharding=out)))

  mesh = tiny.mesh(c)
  with jax.set_mesh(mesh):
    out = sharding.pspec('batch', None, None) if of.endswith('D') else None
    x, w = (
      jax.device_put(a, jax.NamedSharding(mesh, sharding.pspec(*axes)))
      for a, axes in ((x, x_axes), (w, w_axes))
    )
    got, want = (
      jax.jit(jax.value_and_grad(value, argnums=(1, 2)), static_argnums=0).lower(f, x, w).compile()
      for f in (layers.product, jnp.einsum)
    )
    values = jax.device_get((got(x, w), want(x, w)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *values)
  if sizes == (1, 1, 1):
    assert not re.findall(r'= f32\S* (?:copy|transpose)\(', str(got.as_text()))
    assert re.findall(r'= f32\S* (?:copy|transpose)\(', str(want.as_text()))
