"""Continuations: whole texts of prompts, stops, samples."""

import numpy as np
import pytest

from mtp_jax.config import schema
from mtp_jax.data import tokenizers
from mtp_jax.decode import decoder
from mtp_jax.evals import subject
from tests.support import tiny

PROMPTS = ('def f(', 'x', 'import os\nprint(os', '')


@pytest.fixture(scope='module')
def asked():
  c = tiny.cfg(
    heads__n=2,
    model__vocab_size=258,
    model__n_layers=3,
    decode__prefill_chunk_size=4,
    decode__batch_size=3,
    decode__stream_every=2,
  )
  m = tiny.mesh(c)
  w = tiny.model(c, m)
  return subject.Subject('tiny', c, w, m, tokenizers.get('bytes'), 1, decoder.Decoder(w, c, m, 2))


def _ids(found):
  return [[text.ids.tolist() for text in row] for row in found]


def test_greedy_texts_are_the_decoder_s(asked):
  found = subject.continuations(asked, PROMPTS, subject.Ask(max_new=9))
  for prompt, (text,) in zip(PROMPTS, found, strict=True):
    ids = np.array([256, *prompt.encode()])
    decode = asked.decoder.with_sampling(max_new_tokens=9)
    alone = decode([ids], rows=3, cache=64 + 9, stop_ids=(257,))
    assert text.ids.tolist() == alone.tokens[0].tolist()
    assert text.text == asked.tokenizer.decode(text.ids)
    assert text.finish == ('stop' if 257 in text.ids else 'length')


def test_ids_are_taken_as_they_are(asked):
  ids = [np.array([256, *prompt.encode()]) for prompt in PROMPTS]
  ask = subject.Ask(max_new=9)
  found = subject.continuations(asked, ids, ask)
  assert _ids(found) == _ids(subject.continuations(asked, PROMPTS, ask))


def test_samples_do_not_depend_on_the_batch(asked):
  ask = subject.Ask(max_new=6, samples=3, temperature=0.9, seed=5)
  found = subject.continuations(asked, PROMPTS, ask)
  other = asked._replace(cfg=schema.replace(asked.cfg, **{'decode.batch_size': 8}))
  assert _ids(subject.continuations(other, PROMPTS, ask)) == _ids(found)
  assert len({str(ids) for row in _ids(found) for ids in row}) > 6


def test_each_sample_of_each_prompt_has_a_seed_of_its_own(asked):
  ask = subject.Ask(max_new=8, samples=3, temperature=1.0)
  found = subject.continuations(asked, ['x'] * 4, ask)
  assert len({str(ids) for row in _ids(found) for ids in row}) == 12


def test_runs_of_other_seeds_share_no_draw(asked):
  first, second = (
    subject.continuations(asked, ['x'], subject.Ask(max_new=8, samples=4, temperature=1.0, seed=s))
    for s in (0, 1)
  )
  assert len({str(ids) for ids in _ids(first)[0] + _ids(second)[0]}) == 8


def test_the_best_token_alone_is_greedy(asked):
  ask = subject.Ask(max_new=8, temperature=1.0, top_p=1e-6)
  greedy = subject.continuations(asked, PROMPTS, subject.Ask(max_new=8))
  assert _ids(subject.continuations(asked, PROMPTS, ask)) == _ids(greedy)


def test_the_end_token_ends_a_text(asked):
  (plain,), *_ = subject.continuations(asked, PROMPTS[:1], subject.Ask(max_new=9))
  ends = asked._replace(tokenizer=asked.tokenizer._replace(eos=int(plain.ids[4])))
  at = plain.ids.tolist().index(plain.ids[4])
  (text,), *_ = subject.continuations(ends, PROMPTS[:1], subject.Ask(max_new=9))
  assert text.ids.tolist() == plain.ids[: at + 1].tolist()
  assert text.finish == 'stop' and plain.finish == 'length'


def test_a_joined_text_keeps_its_first_space(asked):
  """Of a tokenizer that drops the space which begins a text."""
  (plain,), *_ = subject.continuations(asked, PROMPTS[:1], subject.Ask(max_new=9))
  first = plain.text[0]
  drops = asked.tokenizer._replace(
    decode=lambda ids: asked.tokenizer.decode(ids).removeprefix(first)
  )
  for joined, text in ((True, plain.text), (False, plain.text[1:])):
    (found,), *_ = subject.continuations(
      asked._replace(tokenizer=drops), PROMPTS[:1], subject.Ask(max_new=9, joined=joined)
    )
    assert found.text == text


def test_heads_that_the_next_token_needs(asked):
  for family, n in (('parallel', 1), ('causal', 1), ('anticausal', 2)):
    cfg = schema.replace(asked.cfg, **{'heads.family': family})
    assert subject.next_token_heads(asked._replace(cfg=cfg)) == n


def test_a_stop_ends_a_text_and_saves_passes(asked):
  (plain,), *_ = subject.continuations(asked, PROMPTS[:1], subject.Ask(max_new=40))
  stop = plain.text[5:7]
  at = plain.text.find(stop)
  ask = subject.Ask(max_new=40, stop=('not there', stop))
  (text,), *_ = subject.continuations(asked, PROMPTS[:1], ask)
  assert text.text == plain.text[:at] and text.finish == 'stop'
  assert text.forwards < plain.forwards


def test_cut_at_the_first_of_the_stops():
  assert subject._cut('abcabd', ('d', 'bc', 'x')) == ('a', True)
  assert subject._cut('abc', ()) == ('abc', False)
