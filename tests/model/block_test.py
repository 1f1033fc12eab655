"""Options of the block: values, gradients, decoding, causality, and who sees what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import fields, schema
from mtp_jax.decode import setup, speculative, state, weights, window
from mtp_jax.model import block, heads, layers, lm, params
from mtp_jax.parallel import sharding
from mtp_jax.train import step as step_lib
from tests.support import blocks, decoding, oracle, tiny

# Backward strategy, remat, mesh, chunk of the loss.
HOW = [
  ('remat', 'none', (1, 1, 1), 0),
  ('interleaved', 'block', (1, 2, 2), 4),
  ('remat', 'dots', (2, 1, 2), 4),
  ('interleaved', 'none', (1, 1, 1), 0),
]


@pytest.mark.parametrize('how', HOW[:3], ids=str)
@pytest.mark.parametrize('family', ['parallel', 'sequential'])
def test_step_of_tpus_equals_that_of_others(monkeypatch, family, how):
  """What a TPU computes in another order: RoPE, the MLP's gradients from WIDE on, gradients of
  narrow heads."""
  backward, remat, (data, fsdp, tensor), chunk = how
  shape = dict(data=data, fsdp=fsdp, tensor=tensor)
  c = tiny.cfg(
    heads__n=2,
    heads__family=family,
    loss__backward=backward,
    loss__chunk_size=chunk,
    model__remat=remat,
    model__attention='reference',
    **{f'mesh__{axis}': n for axis, n in shape.items()},
  )
  rows = tiny.batch(c)
  (total, sums), (grads, _) = tiny.value_and_grad(c, rows)
  traced = []
  monkeypatch.setattr(sharding, 'platform', lambda: traced.append(1) or 'tpu')
  monkeypatch.setattr(block, 'WIDE', 0)
  other = schema.replace(c, **{'optim.lr': 0.125})  # traced anew
  (got, got_sums), (got_grads, _) = tiny.value_and_grad(other, rows)
  assert traced
  np.testing.assert_allclose(got, total, rtol=1e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), got_sums, sums)
  # Of the float64 derivative of sequential heads, two elements of trunk.down are off by 3.1e-6
  # of the largest in the order of other chips, by 1.2e-6 in that of TPUs (jax 0.10.2).
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=6e-6 * np.abs(y).max()),
    got_grads,
    grads,
  )


@pytest.mark.parametrize('name, how', zip(blocks.ROWS, 3 * HOW, strict=False), ids=blocks.ROWS)
def test_loss_and_gradients_equal_oracle(name, how):
  """Of packed rows, by either backward strategy, sharded or not."""
  row, (backward, remat, (data, fsdp, tensor), chunk) = blocks.ROWS[name], how
  c = tiny.cfg(
    heads__n=3,
    heads__family=row.family,
    loss__backward=backward,
    loss__chunk_size=chunk,
    model__remat=remat,
    mesh__data=data,
    mesh__fsdp=fsdp,
    mesh__tensor=tensor,
    **row.flags,
  )
  rows = tiny.batch(c)
  (total, sums), (grads, _) = tiny.value_and_grad(c, rows)
  w, shape = tiny.flat(tiny.model(c, tiny.mesh(c))), row.shape(3)
  tokens_BU, position_BU = rows['tokens'][0], rows['position'][0]

  def losses(w):
    logits = oracle.forward(w, tokens_BU, position_BU, shape)
    return oracle.losses(logits, tokens_BU, position_BU, shape)

  want = losses(w)
  np.testing.assert_allclose(sums['loss_K'], want['loss_K'], rtol=2e-5)
  np.testing.assert_allclose(total, want['total'], rtol=2e-5)
  rng = np.random.default_rng(0)
  grads = tiny.flat(grads)
  assert all(np.any(grad) for grad in grads.values())
  along = {path: rng.normal(size=g.shape) / np.linalg.norm(g) for path, g in grads.items()}

  def off(along):
    numeric = oracle.derivative(lambda w: losses(w)['total'], w, along)
    return abs(sum(np.sum(grads[path] * along[path]) for path in along) - numeric)

  # 2e-5 of each of some 30 parameters, above all where norms after attention and MLP divide
  # by small numbers (gemma3 and olmo2, jax 0.10.2).
  if off(along) > 3e-4:
    wrong = {path: off({path: along[path]}) for path in along}
    raise AssertionError(f'gradients differ from those of the oracle: {wrong}')


@pytest.mark.parametrize('name', blocks.ROWS)
def test_greedy_text_equals_oracle(name):
  """Cached = full, and speculative = plain: prompts of 1 to 9 tokens, prefilled in
  chunks of 4, continued beyond the windows."""
  row, new = blocks.ROWS[name], 16
  c = decoding.cfg(row.family, 3, decode__max_new_tokens=new, **row.flags)
  params = tiny.flat(tiny.model(c, tiny.mesh(c)))
  want = [oracle.greedy(params, p, new, row.shape(3)) for p in decoding.PROMPTS]
  decode = decoding.with_rows(c, rows=4)
  decoded = decode()
  assert decoding.lists(decoded) == want
  assert decoded.accepted_J.sum() > 0
  assert decoding.lists(decode(max_accept=0)) == want


@pytest.mark.parametrize('name', ['gpt-oss', 'gemma2', 'gemma3'])
def test_logits_with_rings_equal_a_full_forward(name):
  """Rows of 1 to 19 tokens, prefilled in chunks of 4, a ring's length beyond the shorter
  ones; then windows of a known token and two drafts, of which 0, 1 or 2 are accepted."""
  row = blocks.ROWS[name]
  c = decoding.cfg(row.family, 3, **row.flags)
  made, s = decoding.make(c), setup.setup(c, 3, (1, 1))
  rng = np.random.default_rng(0)
  prompts = [np.array(p) for p in decoding.PROMPTS]
  prompts[3] = np.tile(prompts[3], 3)[:19]
  S, B = 64, len(prompts)
  with jax.set_mesh(made.mesh):
    model = tiny.model(c, made.mesh)
    full = jax.jit(lambda tokens_BT: lm.logits(model, tokens_BT, c)[0])
    w = weights.in_use(made._weights, s)
    now, caches = made._start(prompts, range(B), 60, B=B, slots=S, sampling=None, s=s)
    for first in range(0, 20, 4):
      now, caches = speculative.prefill(w, now, caches, first, C=4, s=s)
    tokens_BS, length_B = np.asarray(now.tokens_BS).copy(), np.asarray(now.length_B).copy()

    @jax.jit
    def forward(tokens_BM, position_BM, caches):
      seen_BMS = jnp.arange(S)[None, None] <= position_BM[:, :, None]
      ctx = block.context(position_BM, c)
      here = window.Window(ctx, position_BM, seen_BMS, end_B1=position_BM[:, -1:] + 1)
      states, caches = window.stem(w, tokens_BM, caches, here, s)
      h_BMD = layers.rms_norm(states[-1], w.norm, c.model)
      return window.logits(w, h_BMD, 1, c), caches

    for accepted in (0, 2, 1, 0, 0, 2, 2, 1, 0, 2):
      at_BM = length_B[:, None] - 1 + np.arange(3)
      drafts_BJ = rng.integers(0, decoding.VOCAB, (B, 2))
      np.put_along_axis(tokens_BS, at_BM[:, 1:], drafts_BJ, axis=1)
      tokens_BM = np.take_along_axis(tokens_BS, at_BM, axis=1)
      found, caches = forward(*made._rows((tokens_BM, at_BM.astype(np.int32))), caches)
      whole = np.asarray(full(made._rows(tokens_BS[:, :48])))
      want = np.take_along_axis(whole, at_BM[:, :, None], axis=1)
      np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)  # 2e-5 on jax 0.10.2
      length_B += 1 + accepted
      np.put_along_axis(
        tokens_BS, length_B[:, None] - 1, rng.integers(0, decoding.VOCAB, (B, 1)), axis=1
      )


def test_decoded_logits_equal_oracle():
  row = blocks.ROWS['gemma2']  # its logits are capped
  c = decoding.cfg(row.family, 3, **row.flags)
  params = tiny.flat(tiny.model(c, tiny.mesh(c)))
  shape, prompt = row.shape(3), np.array(decoding.PROMPTS[1])
  window_1U = np.pad(prompt, (0, shape.span))[None]
  want = oracle.forward(params, window_1U, np.arange(window_1U.shape[1])[None], shape)
  np.testing.assert_allclose(decoding.make(c).next_logits(prompt), want[0, 0, -1], rtol=1e-4)


@pytest.mark.parametrize('name', ['gemma2', 'gpt-oss'])
def test_trees_over_sliding_layers_do_not_change_greedy_text(name):
  row, new = blocks.ROWS[name], 16
  c = decoding.cfg(row.family, 3, decode__max_new_tokens=new, decode__tree='3,2', **row.flags)
  params = tiny.flat(tiny.model(c, tiny.mesh(c)))
  want = [oracle.greedy(params, p, new, row.shape(3)) for p in decoding.PROMPTS]
  assert decoding.lists(decoding.with_rows(c, rows=4)()) == want


@pytest.mark.parametrize('name', ['gemma3', 'gpt-oss'])
def test_a_single_prompt_over_sliding_layers(name):
  row, new = blocks.ROWS[name], 8
  c = decoding.cfg(row.family, 3, decode__max_new_tokens=new, **row.flags)
  params = tiny.flat(tiny.model(c, tiny.mesh(c)))
  prompt = decoding.PROMPTS[1]
  decode = decoding.make(c)
  got = decode([np.array(prompt)]).tokens[0].tolist()
  assert got == oracle.greedy(params, prompt, new, row.shape(3))


def test_cache_of_a_sliding_layer_keeps_its_window():
  """And what may be rolled back: the three positions of a pass, and of sequential modules
  one that is read again."""
  flags = dict(model__window=5, model__layer_types='sliding,full')
  c = decoding.cfg(n=3, **flags)
  assert state.slots(64, setup.setup(c, 3, (1, 1))) == ((8, 64), (64, 64))
  c = decoding.cfg('sequential', n=3, heads__layer_type='sliding', **flags)
  assert state.slots(64, setup.setup(c, 3, (1, 1))) == ((9, 64), (9, 9))
  assert state.slots(6, setup.setup(c, 3, (1, 1))) == ((6, 6), (6, 6))


@pytest.mark.parametrize('remat', ['none', 'block'])
def test_what_sliding_layers_see_by_gradient(remat):
  """Two layers of a window of 3 see four positions back, and no further: exact zeros."""
  c = tiny.cfg(heads__n=1, model__n_layers=2, model__window=3, model__remat=remat)
  T = c.data.seq_len
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    w = tiny.model(c, m)
    position_BT = jnp.arange(T)[None]
    spec = sharding.pspec('batch', None, None)
    emb_BTD = jax.random.normal(jax.random.key(1), (1, T, c.model.d_model), out_sharding=spec)

    @jax.jit
    def jacobian(emb_BTD, t):
      def f(emb_BTD):
        z_BTD, ctx = lm.trunk_output(w, emb_BTD, position_BT, c)
        head = jax.tree.map(lambda p: p[0], w.heads)
        y_BTD = block.block(head, z_BTD, ctx, c, heads.types_of_heads(c)[0])
        return jnp.sum(jnp.where((jnp.arange(T) == t)[None, :, None], y_BTD, 0) ** 3)

      return jax.grad(f)(emb_BTD)

    for t in (2, 9, 15):
      seen_T = np.any(np.asarray(jacobian(emb_BTD, t))[0] != 0, axis=-1)
      np.testing.assert_array_equal(seen_T, (np.arange(T) <= t) & (np.arange(T) >= t - 4))


@pytest.mark.parametrize('name', ['gemma3', 'gpt-oss', 'olmo3'])
def test_packed_document_equals_unpacked(name):
  row = blocks.ROWS[name]
  c = tiny.cfg(heads__n=3, heads__family=row.family, **row.flags)
  T, U = c.data.seq_len, c.data.seq_len + c.span
  tokens_BU = np.random.default_rng(3).integers(0, 32, (8, U), np.int32)
  m, w = tiny.mesh(c), tiny.model(c, tiny.mesh(c))

  def losses(tokens_BU, first):
    position_BU = np.arange(U) - np.where(np.arange(U) < first, 0, first)
    position_BU = np.broadcast_to(position_BU, tokens_BU.shape).astype(np.int32)
    with jax.set_mesh(m):
      batch = sharding.put_batch(m, dict(tokens=tokens_BU[None], position=position_BU[None]))
      return np.asarray(_head_1(w, batch['tokens'][0], batch['position'][0], c))

  packed = losses(tokens_BU, 6)
  alone = losses(np.concatenate([tokens_BU[:, 6:], tokens_BU[:, :6]], axis=1), U - 6)
  np.testing.assert_allclose(packed[:, 6:T], alone[:, : T - 6], rtol=1e-5, atol=1e-5)


def _head_1(w, tokens_BU, position_BU, c):
  @jax.jit
  def z(w, tokens_BU, position_BU):
    T = c.data.seq_len
    emb_BTD = lm.embed(w, tokens_BU[:, :T], c)
    return lm.trunk_output(w, emb_BTD, position_BU[:, :T], c)[0]

  return z(w, tokens_BU, position_BU)


def test_head_1_keeps_its_layers_type():
  """SmolLM3: every second layer without RoPE, here the last; further heads are sliding."""
  c = tiny.cfg(heads__n=3, **blocks.ROWS['smollm3'].flags)
  assert heads.types_of_trunk(c) == (0, 1, 0)
  assert heads.types_of_heads(c) == (1, 2, 2)
  chain = tiny.cfg(heads__n=3, heads__family='anticausal', model__layer_types='full*4,nope*2')
  assert heads.types_of_trunk(chain) == (0, 0, 0)
  assert heads.types_of_heads(chain) == (1, 1, 0)  # layers 5, 4 and 3
  last = tiny.cfg(heads__n=3, heads__family='sequential', model__layer_types='full*5,nope')
  assert heads.types_of_heads(last) == (1, 1, 1)


def test_programs_do_not_grow_with_depth():
  """Layers of two kinds are scanned: as many equations for two patterns as for six."""

  def equations(n_layers):
    c = tiny.cfg(heads__n=2, model__n_layers=n_layers, **PATTERN, heads__family='sequential')
    m = tiny.mesh(c)
    with jax.set_mesh(m):
      traced = step_lib.trace(c, m, 2)
      program = params.count(lm.specs(c)), len(list(tiny.equations(traced.jaxpr.jaxpr)))
    return program

  (small, few), (large, many) = equations(6), equations(18)
  assert few == many and large > 2 * small


PATTERN = dict(model__window=5, model__layer_types='sliding*2,full', model__sliding_rope_theta=50)

REFUSED = [
  (dict(model__layer_types='full,other'), 'model.layer_types'),
  (dict(model__layer_types='full*0'), 'model.layer_types'),
  (dict(model__layer_types='full*9999,nope*2'), 'model.layer_types'),
  (dict(model__layer_types='sliding'), 'model.window'),
  (dict(model__layer_types='full', model__window=4), 'model.window'),
  (dict(model__sliding_rope_theta=5), 'model.sliding_rope_theta'),
  (dict(heads__layer_type='sliding'), 'heads.window'),
  (dict(heads__window=4), 'heads.window'),
  (dict(model__rope_fraction=0.3), 'model.rope_fraction'),
  (dict(model__rope_fraction=0.1), 'model.rope_fraction'),
  (
    dict(model__rope_scaling='yarn', model__rope_factor=2, model__rope_beta_slow=40),
    'model.rope_beta_fast',
  ),
]


@pytest.mark.parametrize('flags, name', REFUSED, ids=str)
def test_invalid_options_name_the_flag(flags, name):
  with pytest.raises(fields.ConfigError, match=f'^--{name}='):
    tiny.cfg(heads__n=2, **flags)
