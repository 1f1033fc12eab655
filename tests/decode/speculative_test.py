"""Speculative decoding changes the number of forward passes, never the text."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import draft_vocab, fields, schema
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import sample, setup, speculative, weights
from mtp_jax.decode import state as state_lib
from mtp_jax.model import flops, heads
from mtp_jax.parallel import sharding
from tests.support import decoding, oracle, tiny
from tests.support.decoding import FAMILIES, PROMPTS

DRAFTS = {1: (), 2: (1,), 3: (1, 1), 4: (1, 1, 1)}


def one_of(*families):
  """Parametrizes a test over some families."""
  return pytest.mark.parametrize('family', families, indirect=True)


@pytest.fixture(scope='module', params=FAMILIES)
def family(request):
  """Groups tests by family, so that a decoder is created once."""
  return request.param


@pytest.fixture(scope='module')
def decode(family):
  return decoding.with_rows(decoding.cfg(family))


@pytest.mark.parametrize('W', [1, 3, 4])
def test_greedy_text_equals_float64_reference(family, decode, W):
  decoded = decode(widths=DRAFTS[W])
  assert decoding.lists(decoded) == decoding.greedy(family)
  proposed_J, accepted_J = decoded.proposed_J, decoded.accepted_J
  assert len(proposed_J) == W - 1
  if W > 1:
    # The test needs both accepted and rejected drafts.
    assert 0 < accepted_J[0] < proposed_J[0]
    assert (proposed_J[1:] <= accepted_J[:-1]).all()
    assert decoded.forwards.sum() < decoded.n_tokens


def test_tree_drafts_do_not_change_greedy_text(family, decode):
  tree_changes_nothing_but_the_pace(family, decode, (3, 2))


@one_of('parallel', 'anticausal', 'sequential')
def test_deep_tree_does_not_change_greedy_text(family, decode):
  tree_changes_nothing_but_the_pace(family, decode, (2, 1, 3))


def tree_changes_nothing_but_the_pace(family, decode, widths):
  decoded = decode(widths=widths)
  assert decoding.lists(decoded) == decoding.greedy(family)
  chain = decode(widths=DRAFTS[len(widths) + 1])
  assert decoded.forwards.sum() < chain.forwards.sum()


def test_max_accept_zero_does_not_change_text(family):
  """2,000 tokens, ragged rows; only acceptance differs."""
  decode = decoding.with_rows(decoding.cfg(family, decode__max_new_tokens=42))
  rng = np.random.default_rng(0)
  prompts = [
    rng.integers(0, decoding.VOCAB, n).tolist() for n in rng.integers(1, 10, decoding.ROWS)
  ]
  writes_the_same_without_acceptance(decode, prompts, new=42)


@one_of('causal')
def test_max_accept_zero_does_not_change_long_texts(family):
  decode = decoding.with_rows(decoding.cfg(family, decode__max_new_tokens=500), rows=4)
  writes_the_same_without_acceptance(decode, PROMPTS, new=500)


def writes_the_same_without_acceptance(decode, prompts, new):
  decoded, forced = decode(prompts), decode(prompts, max_accept=0)
  assert decoded.n_tokens == new * len(prompts) >= 2000
  assert decoding.lists(decoded) == decoding.lists(forced)
  assert forced.forwards.tolist() == [new] * len(prompts)
  assert decoded.forwards.sum() < decoded.n_tokens
  assert forced.accepted_J.sum() == 0


@pytest.mark.parametrize('widths', [(1, 1), (1, 1, 1), (3, 2)])
def test_drafts_equal_head_argmax(family, widths):
  drafts_are_what_the_heads_say(decoding.cfg(family), widths)


@one_of('parallel', 'anticausal', 'linear', 'recursive')
def test_sampled_drafts_follow_head_distributions(family):
  c = decoding.cfg(family, decode__temperature=1.3)
  drafts_are_what_the_heads_say(c, (1, 1))


def drafts_are_what_the_heads_say(c, widths, model=None, trained=None, **shape):
  """Cached = full forward, for all heads: after each forward pass the drafts are those
  of the whole text so far, with what was drafted as the tokens that are fed.

  trained: (Config, model) of those heads of the model that are in use.
  """
  model = tiny.model(c, tiny.mesh(c)) if model is None else model
  of, whole = trained or (c, model)
  params = tiny.flat(whole)
  shape = oracle.Shape(of.heads.family, of.heads.n, **shape)
  temperature = c.decode.temperature
  decode = decoding.make(c, model, active=of.heads.n)
  sampling = sample.sampling(c)
  s = setup.setup(c, of.heads.n, widths)
  prompts = [np.array(p) for p in PROMPTS]
  with jax.set_mesh(decode.mesh):
    w = weights.in_use(decode._weights, s)
    state, caches = decode._start(
      prompts, range(4), 49, B=decoding.ROWS, slots=64, sampling=sampling, s=s
    )
    for first in range(0, 8, 4):
      state, caches = speculative.prefill(w, state, caches, first, C=4, s=s)
    for _ in range(6):
      state, caches = speculative.run(
        w, state, caches, max_forwards=1, max_accept=99, sampling=sampling, s=s
      )
      now = jax.device_get(state)
      for row in range(4):
        q = now.length_B[row] - 2
        known = now.tokens_BS[row, : q + 2].tolist()
        drafts = now.candidates_BJX[row, :, 0].tolist()
        window = np.array([(known + drafts + [0] * 4)[: q + 5]])
        logits = oracle.forward(params, window, np.arange(window.shape[1])[None], shape)[
          1 : s.window, 0, q
        ]
        for j, (width, logits_V) in enumerate(zip(widths, logits, strict=True)):
          if temperature:
            wanted = oracle.kept(logits_V, temperature)
            np.testing.assert_allclose(now.q_BJV[row, j], wanted, atol=1e-4)
          else:
            best = np.argsort(-logits_V, kind='stable')[:width]
            got = now.candidates_BJX[row, j, :width]
            assert got.tolist() == best.tolist()


def test_products_per_forward_pass(family):
  """Traced FLOPs per forward pass: heads 2..W compute queries, MLP and logits only
  at the positions where they are needed."""
  c, W, B, S = decoding.cfg(family), 4, decoding.ROWS, 64
  made = decoding.make(c)
  s = setup.setup(c, 4, (1, 1, 1))
  prompts = [np.array(p) for p in PROMPTS]
  with jax.set_mesh(made.mesh):
    state, caches = made._start(prompts, range(4), 64, B=B, slots=S, sampling=None, s=s)
    traced = jax.make_jaxpr(
      lambda w, state, caches: speculative._forward(
        w, state, caches, max_accept=99, sampling=None, s=s
      )
    )(made._weights, state, caches)
  m = c.model
  D, V, NH, GH = (m.d_model, m.vocab_size, m.d_model, m.kv_heads * m.head_width)
  keys = 2 * D * 2 * GH
  rest = 2 * 2 * D * NH + 3 * 2 * D * m.ff_width + 2 * 2 * NH * S

  def layer(positions, queries):
    return positions * keys + queries * rest

  square, again = 2 * D * D, 2 * W - 2
  further = {
    'parallel': 3 * layer(W, 1),
    'causal': 2 * layer(W, W) + layer(W, 1),
    'anticausal': 3 * layer(W, W),
    'linear': 3 * square,
    'residual': 3 * square,
    'sequential': 2 * layer(again, again) + layer(again, 1) + 3 * again * 2 * square,
  }
  further['recursive'] = further['sequential']
  stem = 2 * layer(W, W)
  wanted = stem + further[family] + 2 * D * V * (W + W - 1)
  assert flops.of_program(traced.jaxpr, 0) == B * wanted


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason='its XLA drops barriers before it fuses')
def test_plain_decoding_of_a_row_copies_no_cache():
  """XLA:CPU copied the keys and values of every layer four times per token."""
  made, prompts = decoding.make(decoding.cfg('parallel')), [np.array(PROMPTS[0])]
  s = setup.setup(made.cfg, 4, ())
  with jax.set_mesh(made.mesh):
    state, caches = made._start(prompts, [0], 64, B=1, slots=64, sampling=None, s=s)
    program = speculative.run.lower(
      weights.in_use(made._weights, s),
      state,
      caches,
      max_forwards=8,
      max_accept=0,
      sampling=None,
      s=s,
    )
  shape = ','.join(map(str, caches.stem[0].k_BGSH.shape))
  assert f'f32[{shape}]' in (text := str(program.compile().as_text()))
  assert not re.findall(rf'= f32\[{shape}\]\S* copy\(', text)


@pytest.mark.parametrize(
  'family, unembedding',
  [
    ('parallel', 'tied'),
    ('anticausal', 'replicated'),
    ('sequential', 'replicated'),
    ('sequential', 'tied'),
  ],
)
def test_text_and_drafts_with_each_unembedding(family, unembedding):
  c = decoding.cfg(family, 3, heads__unembedding=unembedding)
  wanted = decoding.greedy(family, 3, unembedding=unembedding)
  assert decoding.lists(decoding.with_rows(c)()) == wanted
  drafts_are_what_the_heads_say(c, (1, 1))


@pytest.mark.parametrize('unembedding', ['shared', 'tied'])
def test_shared_module_drafts_deeper_than_it_was_trained(unembedding):
  """As a model of more heads with the same module, and head 1's text."""
  of = dict(heads__unembedding=unembedding)
  shallow = decoding.cfg('recursive', 2, decode__num_draft_tokens='4', **of)
  model = tiny.model(shallow, tiny.mesh(shallow))
  deep = decoding.cfg('recursive', 5, **of)
  found = decoding.with_rows(shallow, model)()
  assert decoding.lists(found) == decoding.greedy('recursive', 2, unembedding=unembedding)
  assert len(found.proposed_J) == 4 and found.accepted_J[1:].sum() > 0
  assert found.accepted_J.tolist() == decoding.with_rows(deep, model)().accepted_J.tolist()
  with pytest.raises(fields.ConfigError, match='needs 5 heads; 1 trained'):
    decoding.make(shallow, model, active=1)


@pytest.mark.parametrize('family', ['parallel', 'anticausal', 'residual'])
@pytest.mark.parametrize('temperature', [0.0, 1.3])
def test_text_and_drafts_with_a_markov_head(family, temperature):
  """Head 1's text, and drafts that depend on the drafts before them."""
  c = decoding.cfg(family, 3, heads__markov_rank=4, decode__temperature=temperature)
  if not temperature:
    assert decoding.lists(decoding.with_rows(c)()) == decoding.greedy(family, 3)
  drafts_are_what_the_heads_say(c, (1, 1))


@pytest.mark.parametrize(
  'changes',
  [
    dict(),
    dict(decode__temperature=1.3, heads__trunk_state='pre_norm'),
    dict(model__layer_types='sliding', model__window=5),
  ],
)
def test_drafts_with_shared_keys_and_values(changes):
  """Later steps compute one position of a row, and attend to what the first step does."""
  c = decoding.cfg('recursive', 4, heads__share_keys_values=True, **changes)
  block = oracle.Block(layers=(oracle.Layer(window=c.model.window),))
  shape = dict(share_kv=True, trunk_state=c.heads.trunk_state, block=block)
  drafts_are_what_the_heads_say(c, (1, 1, 1), **shape)
  if not c.decode.temperature:
    model = tiny.model(c, tiny.mesh(c))
    decode = decoding.with_rows(c, model)
    found, plain = decode(), decode(max_accept=0)
    assert decoding.lists(found) == decoding.lists(plain) and found.accepted_J.sum() > 0
    s = setup.setup(c, 4, (1, 1, 1))
    assert len(state_lib.cached_layers(s)[1]) == 1 and s.num_reread == 0
    shallow = schema.replace(c, **{'heads.n': 2, 'decode.num_draft_tokens': '3'})
    deeper = decoding.with_rows(shallow, model)()
    assert deeper.accepted_J.tolist() == found.accepted_J.tolist()


@pytest.mark.parametrize('temperature', [0.0, 1.3])
def test_drafting_stops_where_confidence_is_low(temperature):
  """Each row has the drafts of a product of confidences above the threshold, and one more."""
  c = decoding.cfg(
    'recursive',
    4,
    heads__share_keys_values=True,
    heads__confidence=True,
    loss__head_loss='kl',
    decode__temperature=temperature,
    decode__min_confidence=0.3,
    decode__num_draft_tokens='all',
  )
  model = tiny.model(c, tiny.mesh(c))
  w = tiny.flat(model)
  assert np.any(w['confidence'])
  decode, sampling = decoding.make(c, model), sample.sampling(c)
  s, prompts = decode._widest, [np.array(p) for p in PROMPTS]
  assert s.min_confidence == 0.3
  with jax.set_mesh(decode.mesh):
    of = weights.in_use(decode._weights, s)
    now, caches = decode._start(
      prompts, range(4), 49, B=decoding.ROWS, slots=64, sampling=sampling, s=s
    )
    for first in range(0, 8, 4):
      now, caches = speculative.prefill(of, now, caches, first, C=4, s=s)
    seen = set()
    for _ in range(8):
      now, caches = speculative.run(
        of, now, caches, max_forwards=1, max_accept=99, sampling=sampling, s=s
      )
      here = jax.device_get(now)
      for row in range(4):
        q = here.length_B[row] - 2
        known = here.tokens_BS[row, : q + 2].tolist()
        window = np.array([(known + here.candidates_BJX[row, :, 0].tolist() + [0] * 4)[: q + 5]])
        h = oracle.hidden(
          w, window, np.arange(window.shape[1])[None], oracle.Shape('recursive', 4, share_kv=True)
        )
        product, wanted = 1.0, 1
        for k in (2, 3):
          product /= 1 + np.exp(-h[k][0, q] @ w['confidence'])
          wanted += product >= 0.3
        assert here.n_drafts_B[row] == wanted
        seen.add(wanted)
  assert seen == {1, 2, 3}
  if not temperature:
    texts = [decoding.with_rows(c, model)(max_accept=most) for most in (0, 99)]
    assert decoding.lists(texts[0]) == decoding.lists(texts[1])
    assert texts[1].accepted_J.sum() > 0


@pytest.mark.parametrize(
  'family, unembedding, rank',
  [('parallel', 'shared', 4), ('recursive', 'tied', 0), ('anticausal', 'shared', 0)],
)
@pytest.mark.parametrize('temperature', [0.0, 1.3])
def test_text_and_drafts_with_a_draft_vocabulary(family, unembedding, rank, temperature):
  """Head 1's text, all tokens in it, and drafts of some."""
  drafted = (1, 2, 5, 6)
  c = decoding.cfg(
    family,
    3,
    heads__unembedding=unembedding,
    heads__markov_rank=rank,
    heads__draft_vocab=draft_vocab.recorded(np.array(drafted), 8),
    decode__temperature=temperature,
  )
  if not temperature:
    texts = decoding.lists(decoding.with_rows(c)())
    assert texts == decoding.greedy(family, 3, unembedding=unembedding)
    assert {token for text in texts for token in text} - {*drafted}
  widths = (1, 1) if temperature or heads.FAMILIES[family].uses_next_token else (2, 1)
  drafts_are_what_the_heads_say(c, widths, drafted=drafted)


@one_of('anticausal', 'causal', 'recursive')
def test_untrained_heads_do_not_draft(family):
  """Under a curriculum heads 1..m are active; an anticausal chain starts at m, so that
  head 1's logits differ from those with all heads."""
  c = decoding.cfg(family)
  model = tiny.model(c, tiny.mesh(c))
  fewer = decoding.with_rows(c, model, active=2)
  assert fewer.widths == (1,)
  two = decoding.cfg(family, 2)
  if c.heads.block_first:
    kept = jax.tree.map(lambda w: w[:2], model.heads)
  else:
    kept = model.heads
  trained = two, model.replace(heads=kept)
  assert decoding.lists(fewer()) == oracle_greedy(*trained)
  drafts_are_what_the_heads_say(c, (1,), model, trained)


def oracle_greedy(c, model):
  params = tiny.flat(model)
  shape = oracle.Shape(c.heads.family, c.heads.n)
  return [oracle.greedy(params, p, c.decode.max_new_tokens, shape) for p in PROMPTS]


def test_perfect_drafts_are_all_accepted_up_to_a_stop():
  c, model = decoding.counter()
  decode = decoding.make(c, model)
  prompts = [np.array([0]), np.array([4, 5, 6])]
  decoded = decode(prompts)
  for prompt, tokens in zip(prompts, decoded.tokens, strict=True):
    wanted = (prompt[-1] + 1 + np.arange(40)) % decoding.VOCAB
    assert tokens.tolist() == wanted.tolist()
  # The first pass has no drafts: 1 + 9 x 4 + 3 of the last one's 4.
  assert decoded.forwards.tolist() == [11, 11]
  assert decoded.proposed_J.tolist() == decoded.accepted_J.tolist()
  assert decoded.proposed_J.tolist() == [20, 20, 20]
  assert decoded.acceptance_J == [1.0, 1.0, 1.0]
  # Rows end at each place of a pass: the third token, the second of its pass
  # of four; the first; the second; the fifth; the eighth.
  lengths = {5: 3, 7: 1, 6: 2, 3: 5, 0: 8}
  stopped = decode([np.array([x]) for x in lengths], stop_ids=(0,))
  for (x, n), tokens in zip(lengths.items(), stopped.tokens, strict=True):
    assert tokens.tolist() == ((x + 1 + np.arange(n)) % 8).tolist()
    assert tokens[-1] == 0
  both = decode(prompts, stop_ids=(6, 3))
  assert [t[-1] for t in both.tokens] == [3, 3]
  assert [len(t) for t in both.tokens] == [3, 5]


def test_max_new_tokens_truncates_a_forward_pass():
  c, model = decoding.counter()
  for new in (1, 2, 5, 6):
    decoded = decoding.decode(
      decoding.with_flags(c, decode__max_new_tokens=new), [[0], [1, 2, 3]], model
    )
    assert [len(t) for t in decoded.tokens] == [new, new]
    assert decoded.tokens[0].tolist() == [1, 2, 3, 4, 5, 6][:new]


@pytest.mark.parametrize('family', ['parallel', 'sequential'])
@pytest.mark.parametrize('widths', [(1, 1, 1), (3, 2)])
def test_cache_is_used_to_its_last_slot(family, widths):
  s = setup.tree(widths)
  cache = decoder_lib.SLOTS - (len(s.depth_M) - 1)  # no spare slot
  c = decoding.cfg(family, decode__max_new_tokens=cache)
  decoded = decoding.with_rows(c)(widths=widths, cache=cache)
  wanted = decoding.greedy(family, new=cache)
  for prompt, tokens, all_of_it in zip(PROMPTS, decoded.tokens, wanted, strict=True):
    assert len(prompt) + len(tokens) == cache
    assert tokens.tolist() == all_of_it[: len(tokens)]


def test_perturbed_head_changes_acceptance_only():
  c = decoding.cfg('parallel')
  model = tiny.model(c, tiny.mesh(c))
  spoilt = jax.tree.map(lambda w: jnp.concatenate([w[:1], -3.0 * w[1:]]), model.heads)
  honest = decoding.with_rows(c, model)()
  decoded = decoding.with_rows(c, model.replace(heads=spoilt))()
  assert decoding.lists(decoded) == decoding.lists(honest)
  assert decoded.accepted_J.tolist() != honest.accepted_J.tolist()
  c, model = decoding.counter()
  wrong = model.replace(heads=jax.tree.map(lambda w: -w, model.heads))
  decoded = decoding.decode(c, [[0]], wrong)
  assert decoded.tokens[0].tolist() == [(1 + i) % 8 for i in range(40)]
  assert decoded.forwards.tolist() == [40]


@pytest.mark.parametrize(
  'family, temperature, mesh',
  [  # every pair
    ('parallel', 0.0, (1, 8, 1)),
    ('parallel', 1.0, (2, 2, 2)),
    ('anticausal', 0.0, (2, 2, 2)),
    ('anticausal', 1.0, (1, 8, 1)),
    ('recursive', 0.0, (1, 8, 1)),
    ('recursive', 1.0, (2, 2, 2)),
  ],
)
def test_sharded_decoding_equals_single_device(family, temperature, mesh):
  texts = []
  for data, fsdp, tensor in ((1, 1, 1), mesh):
    c = decoding.cfg(
      family, decode__temperature=temperature, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor
    )
    decode = decoding.make(c)
    prompts = [np.array(p) for p in PROMPTS * 2]
    decoded = decode(prompts, widths=(1, 1), rows=decoding.ROWS)
    texts.append(decoding.lists(decoded))
    kept = jax.tree.leaves(decode._weights.stem)[1].sharding.spec
    assert not any(axis in sharding.BATCH for axis in kept)
  assert texts[0] == texts[1]
  assert len({tuple(t) for t in texts[0]}) >= 3


def test_tree_decoding_on_a_mesh():
  c = decoding.cfg('linear', mesh__fsdp=2, mesh__tensor=2)
  decoded = decoding.decode(c, widths=(2, 2))
  assert decoding.lists(decoded) == decoding.greedy('linear')


@pytest.mark.parametrize('kv_heads', [1, 4])
def test_any_number_of_kv_heads_and_a_single_row(kv_heads):
  """A single row on a mesh that shards heads, which a reshape might get wrong."""
  texts = []
  for tensor in {1, kv_heads}:
    c = decoding.cfg(n=2, model__n_kv_heads=kv_heads, mesh__tensor=tensor)
    texts.append(decoding.lists(decoding.decode(c, [PROMPTS[1]])))
  c = decoding.cfg(n=2, model__n_kv_heads=kv_heads)
  params = tiny.flat(tiny.model(c, tiny.mesh(c)))
  wanted = oracle.greedy(params, PROMPTS[1], 40, oracle.Shape('parallel', 2))
  assert all(text == [wanted] for text in texts)


@pytest.mark.parametrize('family', ['anticausal', 'recursive'])
def test_bfloat16_text_does_not_depend_on_width(family):
  c = decoding.cfg(family, 3, model__compute_dtype='bfloat16')
  decode = decoding.make(c)
  prompts = [np.array(p) for p in PROMPTS]
  forced = decode(prompts, max_accept=0)
  decoded = decode(prompts)
  assert decoding.lists(decoded) == decoding.lists(forced)
  assert decoded.accepted_J[0] > 0


def test_shared_module_is_stored_once():
  made = decoding.make(decoding.cfg('recursive'))
  assert len(made._weights.heads) == 1
  once = made.read_bytes(DRAFTS[2]) - made.read_bytes(())
  assert made.read_bytes(DRAFTS[4]) - made.read_bytes(()) == 3 * once


def test_stop_token_ends_sampled_and_tree_rows():
  c = decoding.cfg('linear', decode__temperature=1.0)
  free = decoding.with_rows(c)(widths=(1, 1))
  stop = int(free.tokens[1][5])
  stopped = decoding.with_rows(c)(widths=(1, 1), stop_ids=(stop,))
  greedy = decoding.with_rows(decoding.cfg('linear'))
  tree = greedy(widths=(2, 2), stop_ids=(stop,))
  for decoded, wanted in ((stopped, decoding.lists(free)), (tree, decoding.greedy('linear'))):
    for text, whole in zip(decoding.lists(decoded), wanted, strict=True):
      n = whole.index(stop) + 1 if stop in whole else len(whole)
      assert text == whole[:n]


def test_prefill_chunk_size_does_not_change_text():
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 8, n) for n in (40, 3, 33, 17)]
  texts = []
  for chunk in (1, 8, 512):
    for family in ('causal', 'sequential'):
      c = decoding.cfg(family, decode__prefill_chunk_size=chunk, decode__max_new_tokens=20)
      texts.append(decoding.lists(decoding.with_rows(c)(prompts)))
  assert texts[0] == texts[2] == texts[4]
  assert texts[1] == texts[3] == texts[5]


def test_cache_lengths_of_one_bucket_share_a_program():
  decode = decoding.make(decoding.cfg('linear', 2, decode__seed=3))
  decode([np.arange(5), np.arange(7)])
  decode([np.arange(1), np.arange(1)])
  assert decode([np.arange(1), np.arange(2)]).compile_s > 0  # has a prefill
  before = speculative.run._cache_size(), speculative.prefill._cache_size()
  for lengths in ((6, 4), (8, 8), (5, 3)):
    decoded = decode([np.arange(n) for n in lengths])
    assert decoded.compile_s == 0
  after = speculative.run._cache_size(), speculative.prefill._cache_size()
  assert before == after


def test_bfloat16_cache_is_close():
  """bfloat16 keys and values perturb logits slightly, so texts may diverge late."""
  c = decoding.cfg(n=2, decode__cache_dtype='bfloat16')
  texts = decoding.lists(decoding.decode(c))
  same = [
    sum(a == b for a, b in zip(x, y, strict=True))
    for x, y in zip(texts, decoding.greedy('parallel', 2), strict=True)
  ]
  assert sum(same) > 0.5 * 4 * decoding.NEW


def test_callback_streams_new_tokens():
  c = decoding.cfg(decode__stream_every=3)
  seen = []
  decoded = decoding.with_rows(c)([PROMPTS[1]], each=seen.append)
  for rows in seen:  # also those whose buffers have since been donated
    assert rows[0].tolist() == decoded.tokens[0][: len(rows[0])].tolist()
  lengths = [len(rows[0]) for rows in seen]
  assert lengths == sorted(lengths) and len(lengths) > 3
  assert seen[-1][0].tolist() == decoded.tokens[0].tolist()
  assert decoding.lists(decoded) == [decoding.greedy('parallel')[1]]


def test_next_logits_equal_cached_decoding():
  c = decoding.cfg('anticausal')
  decode = decoding.make(c)
  params = tiny.flat(tiny.model(c, tiny.mesh(c)))
  window = np.array([PROMPTS[3] + [0] * 4])
  wanted = oracle.forward(
    params, window, np.arange(window.shape[1])[None], oracle.Shape('anticausal', 4)
  )[0, 0, -1]
  got = decode.next_logits(np.array(PROMPTS[3]))
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
