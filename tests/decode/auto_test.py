"""--decode.num_draft_tokens=auto: whatever it chooses, and whenever, the text is that of
plain decoding. Times are given; no test reads a clock."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.decode import adaptive, auto, sample, speculative
from mtp_jax.decode import batch as batch_lib
from tests.decode import sample_test
from tests.support import decoding, tiny

DRAFTS_PAY = {0: 1.0, 1: 1.1, 2: 1.2, 3: 1.3}
NEVER_PAY = {0: 1.0, 3: 5.0}


@pytest.fixture
def given(monkeypatch):
  """Gives the times of programs, and the plans of a Policy if any."""

  def give(forward_s, plans=None):
    def measure(batch, most):
      known = {j: s for j, s in forward_s.items() if j <= most}
      return adaptive.Times(known, compile_s=0.0)

    monkeypatch.setattr(auto, 'measure', measure)
    monkeypatch.setattr(adaptive, 'MIN_NEW_TOKENS', 1)
    # What a clock says does not count.
    monkeypatch.setattr(adaptive.Times, 'update', lambda self, *args: None)
    if plans is not None:
      planned = itertools.cycle(plans)
      monkeypatch.setattr(
        adaptive.Policy, 'plan', lambda self, live_B, **kwargs: adaptive.Plan(*next(planned))
      )

  return give


@pytest.mark.parametrize('family', ['parallel', 'anticausal'])
def test_greedy_text_with_a_change_at_every_forward_pass(family, given):
  given(DRAFTS_PAY, [(J, 1) for J in (3, 0, 3, 0, 0, 3, 3)])
  decoded = decoding.with_rows(decoding.cfg(family))(widths='auto')
  assert decoding.lists(decoded) == decoding.greedy(family)
  assert set(decoded.auto.forwards) == {0, 3}
  assert decoded.proposed_J[0] > 0 and decoded.accepted_J[0] > 0
  assert decoded.forwards.sum() < decoded.n_tokens


def test_any_number_of_drafts_after_any_other(given):
  given(DRAFTS_PAY, [(J, 1) for J in (3, 1, 0, 1, 3, 0, 3)])
  decoded = decoding.with_rows(decoding.cfg('sequential'))(widths='auto')
  assert decoding.lists(decoded) == decoding.greedy('sequential')
  assert set(decoded.auto.forwards) == {0, 1, 3}


@pytest.mark.parametrize('family', ['causal', 'sequential'])
def test_heads_that_draft_again_have_read_what_they_missed(family):
  """After plain decoding their drafts are those of heads that drafted all along."""
  c = decoding.cfg(family)
  made = decoding.make(c)
  prompts = [np.array(p) for p in decoding.PROMPTS]
  s = batch_lib.with_drafts(made._widest, 3)

  def drafts(changes):
    with jax.set_mesh(made.mesh):
      state, caches = made._start(
        prompts, range(4), 128, B=decoding.ROWS, slots=128, sampling=None, s=s
      )
      batch = batch_lib.Batch(made._weights, state, caches, sampling=None, max_accept=0, s=s)
      batch.prefill(range(0, 8, 4), 4)
      for num_drafts, forwards in changes:
        batch.change(num_drafts)
        batch.forward(forwards)
      assert batch.counts().length_B[:4].tolist() == [len(p) + 36 for p in prompts]
      return jax.device_get(batch.state.candidates_BJX)[:4]

  all_along = drafts([(3, 36)])
  np.testing.assert_array_equal(drafts([(3, 2), (0, 33), (3, 1)]), all_along)
  np.testing.assert_array_equal(drafts([(0, 20), (1, 2), (3, 2), (0, 10), (3, 2)]), all_along)


def test_catch_up_stays_inside_the_cache():
  assert batch_lib.catch_up_chunks(0, 1, 128) == [0]
  assert batch_lib.catch_up_chunks(63, 65, 128) == [0, 64]
  assert batch_lib.catch_up_chunks(64, 64, 128) == []
  assert batch_lib.catch_up_chunks(70, 200, 128) == [64]


def test_windows_only_change_to_fewer_drafts(given):
  """The ring of a layer with a sliding window has lost what heads would have to read."""
  c = decoding.cfg('parallel', model__window=4, model__layer_types='sliding')
  made = decoding.make(c)
  prompts = [np.array(p) for p in decoding.PROMPTS]
  plain = made(prompts, widths=())
  given(DRAFTS_PAY, [(J, 1) for J in (3, 0, 3, 3, 0)])
  decoded = made(prompts, widths='auto')
  assert decoding.lists(decoded) == decoding.lists(plain)


def _residual(heads, name):
  c = sample_test._cfg(**sample_test.FILTERS[name])
  model = tiny.model(c, tiny.mesh(c))
  scale = {'good': 0.1, 'bad': 60.0}[heads]
  return c, model.replace(
    heads=jax.tree.map(lambda w: scale * w, model.heads), unembed=6 * model.unembed
  )


@pytest.mark.parametrize('heads, name', [('good', 'plain'), ('bad', 'all')])
def test_samples_under_changes_keep_the_distribution(heads, name, given):
  c, model = _residual(heads, name)
  decode = decoding.make(c, model)
  prompts = [np.array(sample_test.PROMPT)] * sample_test.ROWS
  exact = sample_test._exact(tiny.flat(model), sample_test.FILTERS[name])
  plain = decode(prompts, widths=())
  given({0: 1.0, 2: 1.2}, [(J, 1) for J in (2, 2, 0, 2)])
  decoded = decode(prompts, widths='auto')
  statistic, bound = sample_test._chi_square(decoding.lists(decoded), exact)
  assert statistic < bound
  # Not only in distribution: for a seed, the text of plain decoding.
  same = np.mean([a == b for a, b in zip(*map(decoding.lists, (plain, decoded)), strict=True)])
  assert same > 0.9999
  # Coupled draws: independent ones would agree a quarter of the time.
  assert decoded.proposed_J[0] > 1000
  assert decoded.acceptance_J[0] > {'good': 0.45, 'bad': 0.0}[heads]


def test_sampled_text_is_that_of_plain_decoding(given):
  c = decoding.cfg('linear', decode__temperature=0.9)
  made = decoding.make(c)
  prompts = [np.array(p) for p in decoding.PROMPTS]
  plain = made(prompts, widths=())
  for plans in ([(3, 1)], [(3, 2), (0, 1)]):
    given(DRAFTS_PAY, plans)
    found = made(prompts, widths='auto')
    assert decoding.lists(found) == decoding.lists(plain)
    assert found.accepted_J[0] > 0
  assert decoding.lists(made(prompts, widths=(1, 1, 1))) != decoding.lists(plain)


def test_perfect_and_bad_heads(given):
  given(DRAFTS_PAY)
  c, model = decoding.counter()
  decoded = decoding.make(c, model)([np.array([0])], widths='auto')
  assert decoded.tokens[0].tolist() == [(1 + i) % 8 for i in range(40)]
  assert decoded.auto.forwards == {3: 11}
  wrong = model.replace(heads=jax.tree.map(lambda w: -w, model.heads))
  given({0: 1.0, 3: 1.9})
  decoded = decoding.make(c, wrong)([np.array([0])], widths='auto')
  assert decoded.tokens[0].tolist() == [(1 + i) % 8 for i in range(40)]
  assert decoded.auto.num_draft_tokens == 0 and decoded.auto.forwards[3] == 9
  assert decoded.acceptance_J == [0.0, None, None]


def test_drafts_that_cannot_pay_are_not_run(given):
  given(NEVER_PAY)
  c, model = decoding.counter()
  decoded = decoding.make(c, model)([np.array([0, 1, 2])], widths='auto', stop_ids=(7,))
  assert decoded.tokens[0].tolist() == [3, 4, 5, 6, 7]
  assert decoded.auto.forwards == {0: 5} and decoded.proposed_J.tolist() == [0, 0, 0]


def test_few_tokens_are_not_measured_and_one_head_is_plain(monkeypatch):
  monkeypatch.setattr(auto, 'measure', lambda *args: pytest.fail('measured'))
  c, model = decoding.counter()
  short = decoding.make(decoding.with_flags(c, decode__max_new_tokens=20), model)
  decoded = short([np.array([0])], widths='auto')
  assert decoded.forwards.tolist() == [20] and 'fewer than 64' in decoded.auto.line()
  assert decoded.proposed_J.tolist() == [0, 0, 0]
  for one in (decoding.cfg(n=1), decoding.cfg('parallel', 3, heads__stride=2)):
    made = decoding.make(decoding.with_flags(one, decode__max_new_tokens=70))
    found = made([np.array([1, 2])], widths='auto')
    assert len(found.tokens[0]) == 70 and found.auto.line().endswith('no head drafts')
  # Batches of one shape are long enough together: the fourth of 20 tokens.
  short([np.array([0])], widths='auto')
  short([np.array([0])], widths='auto')
  with pytest.raises(pytest.fail.Exception, match='measured'):
    short([np.array([0])], widths='auto')


def test_measuring_changes_no_text_and_is_done_once_per_shape():
  c = decoding.cfg('parallel', decode__max_new_tokens=64)
  made = decoding.make(c)
  prompts = [np.array(p) for p in decoding.PROMPTS]
  first = made(prompts, widths='auto')
  assert first.compile_s > 0
  assert set(first.auto.forward_s) >= {0, 3} and min(first.auto.forward_s.values()) >= 0
  before = speculative.run._cache_size()
  again = made(prompts, widths='auto')
  assert speculative.run._cache_size() == before
  wanted = decoding.greedy('parallel', new=64)
  assert decoding.lists(first) == decoding.lists(again) == wanted


def test_callback_and_its_ends_under_auto(given):
  given(DRAFTS_PAY, [(3, 4), (0, 2)])
  c, model = decoding.counter()
  c = decoding.with_flags(c, decode__stream_every=3)
  seen = []

  def each(rows):
    seen.append([len(row) for row in rows])
    return np.array([len(rows[0]) >= 8, False])

  decoded = decoding.make(c, model)([np.array([0]), np.array([5])], widths='auto', each=each)
  assert len(decoded.tokens[0]) < 16 and len(decoded.tokens[1]) == 40
  assert seen == sorted(seen) and len(seen) > 4
  assert max(np.diff([0, *(n for _, n in seen)])) <= 3 * 4


def test_equal_drafts_are_accepted():
  tokens_BM = jnp.array([[5, 1, 2], [5, 1, 0], [5, 0, 2]])
  logits_BMV = jnp.log(jax.nn.one_hot(jnp.array([[1, 2, 3]] * 3), 6) + 1e-9)
  levels = (((1,), (0,)), ((2,), (1,)))
  for sampling in (None, sample.Sampling(0.1, None, None, None)):
    index_BM = jnp.arange(3)[None] + jnp.zeros((3, 1), int)
    best_BM = sample.tokens(logits_BMV, jnp.arange(3), index_BM, sampling)
    n_B, _, emitted_BW = sample.accept_equal(tokens_BM, best_BM, jnp.array([2, 2, 2]), levels)
    assert n_B.tolist() == [2, 1, 0]
    assert emitted_BW.tolist() == [[1, 2, 3]] * 3
