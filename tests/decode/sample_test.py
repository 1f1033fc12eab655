"""Sampling: filters, and losslessness of speculative decoding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import draft_vocab
from mtp_jax.decode import sample
from tests.support import decoding, oracle, tiny

ROWS, VOCAB, NEW = 20_000, 5, 3
PROMPT = [1, 3, 0]
FILTERS = {
  'plain': dict(temperature=1.0),
  'hot': dict(temperature=1.7),
  'top_p': dict(temperature=0.8, top_p=0.8),
  'top_k': dict(temperature=1.0, top_k=3),
  'min_p': dict(temperature=1.3, min_p=0.25),
  'all': dict(temperature=1.1, top_k=4, top_p=0.9, min_p=0.1),
}


@pytest.mark.parametrize('name', FILTERS)
def test_filters_equal_reference_ranking(name):
  rng = np.random.default_rng(1)
  for V in (5, 50):
    logits = 2 * rng.normal(size=(20, V))
    values = FILTERS[name]
    s = sample.Sampling(*(values.get(f) for f in ('temperature', 'top_k', 'top_p', 'min_p')))
    got = jax.jit(sample.probabilities)(jnp.array(logits, jnp.float32), s)
    wanted = [oracle.kept(row, **values) for row in logits]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_top_k_above_the_vocabulary_keeps_all():
  logits = jnp.array([[0.0, 1.0, 2.0]])
  got = sample.probabilities(logits, sample.Sampling(1.0, 99, None, None))
  np.testing.assert_allclose(got, jax.nn.softmax(logits), rtol=1e-6)


def _cfg(**filters):
  flags = {f'decode__{k}': v for k, v in filters.items()}
  return decoding.with_flags(
    tiny.cfg(
      heads__family='residual',
      heads__n=3,
      model__n_layers=1,
      model__d_model=8,
      model__d_ff=8,
      model__n_attn_heads=2,
      model__n_kv_heads=1,
      model__vocab_size=VOCAB,
      decode__max_new_tokens=NEW,
      data__seq_len=64,
    ),
    **flags,
  )


def _exact(params, filters):
  """Probability of each text of NEW tokens, token by token in float64."""
  shape, total = oracle.Shape('residual', 3), {}
  cached = {}

  def after(text):
    if text not in cached:
      window = np.array([PROMPT + list(text) + [0] * shape.span])
      logits = oracle.forward(params, window, np.arange(window.shape[1])[None], shape)
      cached[text] = oracle.kept(logits[0, 0, -1], **filters)
    return cached[text]

  for text in itertools.product(range(VOCAB), repeat=NEW):
    p = 1.0
    for i, token in enumerate(text):
      p *= after(text[:i])[token]
    total[text] = p
  assert abs(sum(total.values()) - 1) < 1e-9
  return total


def _chi_square(texts, exact):
  """(statistic, bound): of as many independent draws it exceeds the bound, five
  standard deviations above its mean, less than once in 10^5."""
  expected = np.array([exact[t] * len(texts) for t in exact])
  counts = dict.fromkeys(exact, 0)
  for text in texts:
    counts[tuple(text)] += 1
  seen = np.array(list(counts.values()))
  assert not seen[expected == 0].any()  # nothing that a filter drops
  often = expected >= 5
  rest = ~often & (expected > 0)
  cells = [*zip(seen[often], expected[often], strict=True)]
  if expected[rest].sum() >= 5:
    cells.append((seen[rest].sum(), expected[rest].sum()))
  statistic = sum((s - e) ** 2 / e for s, e in cells)
  freedom = len(cells) - 1
  return statistic, freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize('low', [1e-6, 1e-3])
def test_minimal_filter_values_are_greedy(low):
  logits = jnp.array([[1e4, 3.0, 1e4 + 1, -1e4]])
  for s in ((low, None, None, None), (1.0, None, low, None)):
    p = sample.probabilities(logits, sample.Sampling(*s))
    assert p.tolist() == [[0, 0, 1, 0]]


# Drafts of two of three tokens, and of as many heads as are confident.
FEW = dict(
  heads__family='recursive',
  heads__share_keys_values=True,
  heads__confidence=True,
  heads__draft_vocab=draft_vocab.recorded(np.array([0, 2]), 3),
  loss__head_loss='kl',
  decode__min_confidence=0.5,
  decode__num_draft_tokens='all',
)


@pytest.mark.parametrize('changes', [dict(heads__family='sequential'), FEW], ids=['all', 'few'])
def test_rejection_sampling_is_unbiased_for_repeated_drafts(changes):
  """Six tokens at three per forward pass: an index whose draft was dropped with a
  rejected one before it is drafted again, also by heads that read the next token."""
  V, new, rows = 3, 6, 10_000
  c = tiny.cfg(
    heads__n=3,
    model__n_layers=1,
    model__d_model=8,
    model__d_ff=8,
    model__n_attn_heads=2,
    model__n_kv_heads=1,
    model__vocab_size=V,
    decode__max_new_tokens=new,
    decode__temperature=1.2,
    data__seq_len=64,
    **changes,
  )
  model = tiny.model(c, tiny.mesh(c))
  model = model.replace(unembed=5 * model.unembed)
  prompt, shape = [1, 2], oracle.Shape(c.heads.family, 3)
  params, exact = tiny.flat(model), {(): 1.0}
  for _ in range(new):
    window = np.array([prompt + list(t) + [0] * shape.span for t in exact])
    position = np.tile(np.arange(window.shape[1]), (len(window), 1))
    logits = oracle.forward(params, window, position, shape)[0, :, -1]
    exact = {
      (*text, v): p * oracle.kept(logits_V, 1.2)[v]
      for (text, p), logits_V in zip(exact.items(), logits, strict=True)
      for v in range(V)
    }
  decoded = decoding.make(c, model)([np.array(prompt)] * rows)
  statistic, bound = _chi_square(decoding.lists(decoded), exact)
  assert statistic < bound
  assert 0.2 < decoded.acceptance_J[0] < 0.95
  # Of the second drafts, some are not made.
  made = decoded.proposed_J[1] / decoded.accepted_J[0]
  assert 0.1 < made < 0.8 if c.decode.min_confidence else made > 0.8


@pytest.mark.parametrize('heads', ['good', 'bad'])
@pytest.mark.parametrize('name', ['plain', 'top_p', 'all'])
def test_speculation_keeps_the_distribution(name, heads):
  filters = FILTERS[name]
  c = _cfg(**filters)
  model = tiny.model(c, tiny.mesh(c))
  # Residual heads start as copies of head 1: close to it with small weights, and
  # confidently different with large ones.
  scale = {'good': 0.1, 'bad': 60.0}[heads]
  model = model.replace(
    heads=jax.tree.map(lambda w: scale * w, model.heads), unembed=6 * model.unembed
  )
  decode = decoding.make(c, model)
  prompts = [np.array(PROMPT)] * ROWS
  exact = _exact(tiny.flat(model), filters)
  for widths in ((), (1, 1)):
    decoded = decode(prompts, widths=widths)
    statistic, bound = _chi_square(decoding.lists(decoded), exact)
    assert statistic < bound, (widths, statistic, bound)
  assert 0 < decoded.acceptance_J[0] < 0.95
  # A text that is a tenth too frequent would be detected.
  likeliest = max(exact, key=exact.get)
  texts = decoding.lists(decoded)
  spoilt = [likeliest if i % 10 == 0 else t for i, t in enumerate(texts)]
  statistic, bound = _chi_square(spoilt, exact)
  assert statistic > bound


def test_row_does_not_depend_on_batch():
  c = decoding.cfg('sequential', 3, decode__temperature=0.9)
  decode = decoding.make(c)
  mine = np.array([1, 2, 3])
  texts = []
  for others, row in (([[5], [6, 7, 7, 2, 4]], 0), ([[0, 1, 2, 3, 4], [2]], 2)):
    prompts = [np.array(p) for p in others]
    prompts.insert(row, mine)
    seeds = [11, 12, 13]
    seeds[row] = 7
    texts.append(decode(prompts, seeds=seeds).tokens[row].tolist())
  assert texts[0] == texts[1]
  again = decode([mine] * 3, seeds=[7, 8, 7])
  assert decoding.lists(again)[0] == texts[0] == decoding.lists(again)[2]
  assert decoding.lists(again)[1] != texts[0]


def test_changing_temperature_does_not_recompile():
  from mtp_jax.decode import speculative

  prompts = [np.array([1, 2])] * 2
  c = decoding.cfg('linear', 2, decode__temperature=0.5)
  decoding.decode(c, prompts)
  before = speculative.run._cache_size()
  for temperature in (0.7, 1.0):
    decoding.decode(decoding.with_flags(c, decode__temperature=temperature), prompts)
  assert speculative.run._cache_size() == before


def test_low_temperature_is_greedy():
  c = decoding.cfg('linear', decode__temperature=1e-4)
  assert decoding.lists(decoding.decode(c)) == decoding.greedy('linear')
