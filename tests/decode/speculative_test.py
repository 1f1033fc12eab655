"""Drafts change how fast a text is written, never which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import flops, sharding
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import sample, speculative
from tests import oracle, tiny
from tests.decode import decoding
from tests.decode.decoding import FAMILIES, PROMPTS

DRAFTS = {1: (), 2: (1,), 3: (1, 1), 4: (1, 1, 1)}


@pytest.fixture(scope='module', params=FAMILIES)
def family(request):
  """One after the other, so that a decoder is made once."""
  return request.param


@pytest.fixture(scope='module')
def decode(family):
  made = decoding.make(decoding.cfg(family))
  return lambda *args, **kwargs: made(
    [np.array(p) for p in PROMPTS], *args, **kwargs
  )


@pytest.mark.parametrize('W', [1, 3, 4])
def test_greedy_text_is_that_of_float64(family, decode, W):
  decoded = decode(widths=DRAFTS[W])
  assert decoding.lists(decoded) == decoding.greedy(family)
  asked_J, accepted_J = decoded.asked_J, decoded.accepted_J
  assert len(asked_J) == W - 1
  if W > 1:
    # Some drafts stand and some fall, or this test would show nothing.
    assert 0 < accepted_J[0] < asked_J[0]
    assert (asked_J[1:] <= accepted_J[:-1]).all()
    assert decoded.forwards.sum() < decoded.n_tokens


@pytest.mark.parametrize('widths', [(3, 2), (2, 1, 3)])
def test_a_tree_of_drafts_changes_nothing_but_the_pace(family, decode, widths):
  decoded = decode(widths=widths)
  assert decoding.lists(decoded) == decoding.greedy(family)
  chain = decode(widths=DRAFTS[len(widths) + 1])
  assert decoded.forwards.sum() < chain.forwards.sum()


def test_the_same_program_without_acceptance_writes_the_same(family):
  """2,000 tokens, ragged rows; nothing but what stands differs."""
  decode = decoding.make(decoding.cfg(family, decode__max_new=500))
  prompts = [np.array(p) for p in PROMPTS]
  decoded, forced = decode(prompts), decode(prompts, max_accept=0)
  assert decoded.n_tokens == 2000
  assert decoding.lists(decoded) == decoding.lists(forced)
  assert forced.forwards.tolist() == [500] * 4
  assert decoded.forwards.sum() < 2000
  assert forced.accepted_J.sum() == 0


@pytest.mark.parametrize(
  'widths, temperature',
  [((1,), 0), ((1, 1, 1), 0), ((1, 1, 1), 1.3), ((2, 2), 0)],
)
def test_drafts_are_what_the_heads_say(family, widths, temperature):
  """Cached = full forward, for all heads: after each pass the drafts are those
  of the whole text so far, with what was drafted as the tokens that are fed."""
  c = decoding.cfg(family, decode__temperature=float(temperature))
  model = tiny.model(c, tiny.mesh(c))
  params, shape = tiny.flat(model), oracle.Shape(family, 4)
  decode = decoding.make(c, model)
  sampling = sample.sampling(c)
  s = speculative.setup(c, 4, widths)
  prompts = [np.array(p) for p in PROMPTS]
  with jax.set_mesh(decode.mesh):
    w = speculative.in_use(decode._weights, s)
    state, caches = decode._start(prompts, range(4), 64, 4, 128, sampling, s)
    for first in range(0, 8, 4):
      state, caches = speculative.prefill(w, state, caches, first, C=4, s=s)
    for _ in range(6):
      state, caches = speculative.run(w, state, caches, 1, 99, sampling, s=s)
      now = jax.device_get(state)
      for row in range(4):
        q = now.length_B[row] - 2
        known = now.tokens_BS[row, : q + 2].tolist()
        drafts = now.candidates_BJX[row, :, 0].tolist()
        window = np.array([(known + drafts + [0] * 4)[: q + 5]])
        logits = oracle.forward(
          params, window, np.arange(window.shape[1])[None], shape
        )[1 : s.window, 0, q]
        for j, (width, logits_V) in enumerate(zip(widths, logits, strict=True)):
          if temperature:
            wanted = oracle.kept(logits_V, temperature)
            np.testing.assert_allclose(now.q_BJV[row, j], wanted, atol=1e-4)
          else:
            best = np.argsort(-logits_V, kind='stable')[:width]
            got = now.candidates_BJX[row, j, :width]
            assert got.tolist() == best.tolist()


def test_what_is_computed_where(family):
  """FLOPs of a pass, as traced, are those of the module's docstring: heads 2..W
  have queries, MLP and logits where they are needed."""
  c, W, B, S = decoding.cfg(family), 4, 4, 128
  made = decoding.make(c)
  s = speculative.setup(c, 4, (1, 1, 1))
  prompts = [np.array(p) for p in PROMPTS]
  with jax.set_mesh(made.mesh):
    state, caches = made._start(prompts, range(4), 64, B, S, None, s)
    traced = jax.make_jaxpr(
      lambda w, state, caches: speculative._forward(
        w, state, caches, 99, None, s
      )
    )(made._weights, state, caches)
  m = c.model
  D, V, NH, GH = (
    m.d_model, m.vocab_size, m.d_model, m.kv_heads * m.head_width
  )  # fmt: skip
  keys = 2 * D * 2 * GH
  rest = 2 * 2 * D * NH + 3 * 2 * D * m.ff_width + 2 * 2 * NH * S

  def layer(positions, asked):
    return positions * keys + asked * rest

  square, again = 2 * D * D, 2 * W - 2
  further = {
    'parallel': 3 * layer(W, 1),
    'causal': 2 * layer(W, W) + layer(W, 1),
    'anticausal': 3 * layer(W, W),
    'linear': 3 * square,
    'residual': 3 * square,
    'sequential': 2 * layer(again, again) + layer(again, 1)
    + 3 * again * 2 * square,
  }  # fmt: skip
  further['recursive'] = further['sequential']
  stem = 2 + c.heads.block_first
  wanted = stem * layer(W, W) + further[family] + 2 * D * V * (W + W - 1)
  assert flops.of_program(traced.jaxpr, 0) == B * wanted


@pytest.mark.parametrize('unembedding', ['replicated', 'tied'])
@pytest.mark.parametrize('family', ['parallel', 'anticausal', 'sequential'])
def test_greedy_text_under_each_unembedding(family, unembedding):
  c = decoding.cfg(family, heads__unembedding=unembedding)
  wanted = decoding.greedy(family, unembedding=unembedding)
  assert decoding.lists(decoding.decode(c)) == wanted


@pytest.mark.parametrize('family', ['anticausal', 'causal', 'recursive'])
def test_heads_that_did_not_train_are_not_used(family):
  """Under a curriculum heads 1..m are active; an anticausal chain begins at m,
  so that head 1 says something else than with all heads."""
  c = decoding.cfg(family)
  model = tiny.model(c, tiny.mesh(c))
  prompts = [np.array(p) for p in PROMPTS]
  fewer = decoding.make(c, model, active=2)
  assert fewer.widths == (1,)
  two = decoding.cfg(family, 2)
  if c.heads.block_first:
    kept = jax.tree.map(lambda w: w[:2], model.heads)
  else:
    kept = model.heads
  wanted = oracle_greedy(two, model.replace(heads=kept))
  assert decoding.lists(fewer(prompts)) == wanted


def oracle_greedy(c, model):
  params = tiny.flat(model)
  shape = oracle.Shape(c.heads.family, c.heads.n)
  return [oracle.greedy(params, p, c.decode.max_new, shape) for p in PROMPTS]


def test_perfect_drafts_all_stand_and_stops_cut_them():
  c, model = decoding.counter()
  decode = decoding.make(c, model)
  prompts = [np.array([0]), np.array([4, 5, 6])]
  decoded = decode(prompts)
  for prompt, tokens in zip(prompts, decoded.tokens, strict=True):
    wanted = (prompt[-1] + 1 + np.arange(40)) % decoding.VOCAB
    assert tokens.tolist() == wanted.tolist()
  # The first pass has no drafts: 1 + 9 x 4 + 3 of the last one's 4.
  assert decoded.forwards.tolist() == [11, 11]
  assert decoded.asked_J.tolist() == decoded.accepted_J.tolist()
  assert decoded.asked_J.tolist() == [20, 20, 20]
  assert decoded.acceptance_J == [1.0, 1.0, 1.0]
  # 3 is the third token after 0, the second of its pass of four.
  for stop, n in ((3, 3), (1, 1), (2, 2), (5, 5), (0, 8)):
    stopped = decode(prompts, stop_ids=(stop,))
    assert stopped.tokens[0].tolist() == decoded.tokens[0][:n].tolist()
    assert stopped.tokens[0][-1] == stop
  both = decode(prompts, stop_ids=(6, 3))
  assert [t[-1] for t in both.tokens] == [3, 3]
  assert [len(t) for t in both.tokens] == [3, 5]


def test_limits_cut_a_pass_too():
  c, model = decoding.counter()
  for new in (1, 2, 5, 6):
    decoded = decoding.decode(
      decoding.with_flags(c, decode__max_new=new), [[0], [1, 2, 3]], model
    )
    assert [len(t) for t in decoded.tokens] == [new, new]
    assert decoded.tokens[0].tolist() == [1, 2, 3, 4, 5, 6][:new]


@pytest.mark.parametrize('family', ['parallel', 'sequential'])
@pytest.mark.parametrize('widths', [(1, 1, 1), (2, 2)])
def test_a_cache_is_full_to_its_last_slot(family, widths):
  s = speculative.tree(widths)
  cache = decoder_lib.SLOTS - (len(s.depth_M) - 1)  # not a slot is left over
  c = decoding.cfg(family, decode__max_new=cache)
  decoded = decoding.make(c)(
    [np.array(p) for p in PROMPTS], widths=widths, cache=cache
  )
  wanted = decoding.greedy(family, new=cache)
  for prompt, tokens, all_of_it in zip(
    PROMPTS, decoded.tokens, wanted, strict=True
  ):
    assert len(prompt) + len(tokens) == cache
    assert tokens.tolist() == all_of_it[: len(tokens)]


def test_a_tampered_head_changes_the_pace_only():
  c = decoding.cfg('parallel')
  model = tiny.model(c, tiny.mesh(c))
  spoilt = jax.tree.map(
    lambda w: jnp.concatenate([w[:1], -3.0 * w[1:]]), model.heads
  )
  honest = decoding.decode(c, model=model)
  decoded = decoding.decode(c, model=model.replace(heads=spoilt))
  assert decoding.lists(decoded) == decoding.lists(honest)
  assert decoded.accepted_J.tolist() != honest.accepted_J.tolist()
  c, model = decoding.counter()
  wrong = model.replace(heads=jax.tree.map(lambda w: -w, model.heads))
  decoded = decoding.decode(c, [[0]], wrong)
  assert decoded.tokens[0].tolist() == [(1 + i) % 8 for i in range(40)]
  assert decoded.forwards.tolist() == [40]


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('family', ['parallel', 'anticausal', 'recursive'])
def test_sharded_equals_single(family, temperature):
  prompts = [np.array(p) for p in PROMPTS] * 2
  texts = []
  for data, fsdp, tensor in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
    c = decoding.cfg(
      family, decode__temperature=temperature, mesh__data=data,
      mesh__fsdp=fsdp, mesh__tensor=tensor,
    )  # fmt: skip
    decode = decoding.make(c)
    texts.append(decoding.lists(decode(prompts)))
    kept = jax.tree.leaves(decode._weights.stem)[1].sharding.spec
    assert not any(axis in sharding.BATCH for axis in kept)
  assert texts[0] == texts[1] == texts[2]
  assert len({tuple(t) for t in texts[0]}) >= 3


def test_a_tree_on_a_mesh():
  c = decoding.cfg(mesh__fsdp=2, mesh__tensor=2)
  decoded = decoding.decode(c, widths=(2, 2))
  assert decoding.lists(decoded) == decoding.greedy('parallel')


@pytest.mark.parametrize('kv_heads', [1, 4])
def test_any_number_of_key_heads_and_a_row_alone(kv_heads):
  """A single row on a mesh that splits heads, which a reshape may confuse."""
  texts = []
  for tensor in (1, kv_heads):
    c = decoding.cfg(model__n_kv_heads=kv_heads, mesh__tensor=tensor)
    texts.append(decoding.lists(decoding.decode(c, [PROMPTS[1]])))
  c = decoding.cfg(model__n_kv_heads=kv_heads)
  params = tiny.flat(tiny.model(c, tiny.mesh(c)))
  wanted = oracle.greedy(params, PROMPTS[1], 40, oracle.Shape('parallel', 4))
  assert texts == [[wanted], [wanted]]


@pytest.mark.parametrize('family', ['anticausal', 'recursive'])
def test_bfloat16_writes_one_text_at_any_width(family):
  c = decoding.cfg(family, model__compute_dtype='bfloat16')
  decode = decoding.make(c)
  prompts = [np.array(p) for p in PROMPTS]
  forced = decode(prompts, max_accept=0)
  decoded = decode(prompts)
  assert decoding.lists(decoded) == decoding.lists(forced)
  assert decoded.accepted_J[0] > 0


def test_a_module_that_serves_all_heads_is_there_once():
  made = decoding.make(decoding.cfg('recursive'))
  assert len(made._weights.heads) == 1
  once = made.read_bytes(DRAFTS[2]) - made.read_bytes(())
  assert made.read_bytes(DRAFTS[4]) - made.read_bytes(()) == 3 * once


def test_a_stop_ends_a_sampled_row_and_one_of_a_tree():
  c = decoding.cfg(decode__temperature=1.0)
  free = decoding.decode(c)
  stop = int(free.tokens[1][5])
  stopped = decoding.decode(c, stop_ids=(stop,))
  tree = decoding.decode(decoding.cfg(), widths=(2, 2), stop_ids=(stop,))
  for decoded, wanted in (
    (stopped, decoding.lists(free)), (tree, decoding.greedy('parallel'))
  ):  # fmt: skip
    for text, whole in zip(decoding.lists(decoded), wanted, strict=True):
      n = whole.index(stop) + 1 if stop in whole else len(whole)
      assert text == whole[:n]


def test_chunks_of_a_prompt_change_nothing():
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 8, n) for n in (40, 3, 33, 17)]
  texts = []
  for chunk in (1, 8, 512):
    for family in ('causal', 'sequential'):
      c = decoding.cfg(family, decode__prefill=chunk)
      texts.append(decoding.lists(decoding.decode(c, prompts)))
  assert texts[0] == texts[2] == texts[4]
  assert texts[1] == texts[3] == texts[5]


def test_lengths_of_one_bucket_share_a_program():
  decode = decoding.make(decoding.cfg(decode__prefill=4, decode__seed=3))
  decode([np.arange(5), np.arange(7)])
  decode([np.arange(1), np.arange(1)])
  assert decode([np.arange(1), np.arange(2)]).compile_s > 0  # has a prefill
  before = speculative.run._cache_size(), speculative.prefill._cache_size()
  for lengths in ((6, 4), (8, 8), (5, 3)):
    decoded = decode([np.arange(n) for n in lengths])
    assert decoded.compile_s == 0
  after = speculative.run._cache_size(), speculative.prefill._cache_size()
  assert before == after


def test_a_narrow_cache_is_near():
  """bfloat16 keys and values move logits a little, so text may part late."""
  c = decoding.cfg(decode__cache_dtype='bfloat16')
  texts = decoding.lists(decoding.decode(c))
  same = [
    sum(a == b for a, b in zip(x, y, strict=True))
    for x, y in zip(texts, decoding.greedy('parallel'), strict=True)
  ]
  assert sum(same) > 0.5 * 4 * decoding.NEW


def test_each_gets_the_text_as_it_grows():
  c = decoding.cfg(decode__segment=3)
  seen = []
  decoded = decoding.make(c)([np.array(PROMPTS[1])], each=seen.append)
  for rows in seen:  # also those whose buffers were donated since
    assert rows[0].tolist() == decoded.tokens[0][: len(rows[0])].tolist()
  lengths = [len(rows[0]) for rows in seen]
  assert lengths == sorted(lengths) and len(lengths) > 3
  assert seen[-1][0].tolist() == decoded.tokens[0].tolist()
  assert decoding.lists(decoded) == [decoding.greedy('parallel')[1]]


def test_whole_pass_equals_the_last_logits():
  c = decoding.cfg('anticausal')
  decode = decoding.make(c)
  params = tiny.flat(tiny.model(c, tiny.mesh(c)))
  window = np.array([PROMPTS[3] + [0] * 4])
  wanted = oracle.forward(
    params, window, np.arange(window.shape[1])[None],
    oracle.Shape('anticausal', 4),
  )[0, 0, -1]  # fmt: skip
  got = decode.next_logits(np.array(PROMPTS[3]))
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
