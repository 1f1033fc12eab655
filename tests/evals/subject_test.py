"""Continuations of prompts: stop strings, samples, seeds."""

import numpy as np
import pytest

from mtp_jax.config import schema
from mtp_jax.data import tokenizers
from mtp_jax.decode import decoder
from mtp_jax.evals import subject
from tests.support import tiny

PROMPTS = ('def f(', 'x', 'import os\nprint(os', '')


@pytest.fixture(scope='module')
def model_subject():
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


def test_greedy_continuations_match_the_decoder(model_subject):
  found = subject.continuations(model_subject, PROMPTS, subject.GenerationConfig(max_new=9))
  for prompt, (text,) in zip(PROMPTS, found, strict=True):
    ids = np.array([256, *prompt.encode()])
    decode = model_subject.decoder.with_sampling(max_new_tokens=9)
    alone = decode([ids], rows=3, cache=64 + 9, stop_ids=(257,))
    assert text.ids.tolist() == alone.tokens[0].tolist()
    assert text.text == model_subject.tokenizer.decode(text.ids)
    assert text.finish == ('stop' if 257 in text.ids else 'length')


def test_prompts_of_ids_are_used_unchanged(model_subject):
  ids = [np.array([256, *prompt.encode()]) for prompt in PROMPTS]
  generation = subject.GenerationConfig(max_new=9)
  found = subject.continuations(model_subject, ids, generation)
  assert _ids(found) == _ids(subject.continuations(model_subject, PROMPTS, generation))


def test_samples_do_not_depend_on_the_batch_size(model_subject):
  generation = subject.GenerationConfig(max_new=6, samples=3, temperature=0.9, seed=5)
  found = subject.continuations(model_subject, PROMPTS, generation)
  other = model_subject._replace(cfg=schema.replace(model_subject.cfg, **{'decode.batch_size': 8}))
  assert _ids(subject.continuations(other, PROMPTS, generation)) == _ids(found)
  assert len({str(ids) for row in _ids(found) for ids in row}) > 6


def test_samples_of_equal_prompts_have_distinct_seeds(model_subject):
  generation = subject.GenerationConfig(max_new=8, samples=3, temperature=1.0)
  found = subject.continuations(model_subject, ['x'] * 4, generation)
  assert len({str(ids) for row in _ids(found) for ids in row}) == 12


def test_different_seeds_give_different_samples(model_subject):
  first, second = (
    subject.continuations(
      model_subject, ['x'], subject.GenerationConfig(max_new=8, samples=4, temperature=1.0, seed=s)
    )
    for s in (0, 1)
  )
  assert len({str(ids) for ids in _ids(first)[0] + _ids(second)[0]}) == 8


def test_tiny_top_p_is_greedy(model_subject):
  generation = subject.GenerationConfig(max_new=8, temperature=1.0, top_p=1e-6)
  greedy = subject.continuations(model_subject, PROMPTS, subject.GenerationConfig(max_new=8))
  assert _ids(subject.continuations(model_subject, PROMPTS, generation)) == _ids(greedy)


def test_end_token_stops_generation(model_subject):
  (plain,), *_ = subject.continuations(
    model_subject, PROMPTS[:1], subject.GenerationConfig(max_new=9)
  )
  ends = model_subject._replace(tokenizer=model_subject.tokenizer._replace(eos=int(plain.ids[4])))
  at = plain.ids.tolist().index(plain.ids[4])
  (text,), *_ = subject.continuations(ends, PROMPTS[:1], subject.GenerationConfig(max_new=9))
  assert text.ids.tolist() == plain.ids[: at + 1].tolist()
  assert text.finish == 'stop' and plain.finish == 'length'


def test_joined_continuations_keep_a_leading_space(model_subject):
  """With a tokenizer that drops a leading space."""
  (plain,), *_ = subject.continuations(
    model_subject, PROMPTS[:1], subject.GenerationConfig(max_new=9)
  )
  first = plain.text[0]
  drops = model_subject.tokenizer._replace(
    decode=lambda ids: model_subject.tokenizer.decode(ids).removeprefix(first)
  )
  for joined, text in ((True, plain.text), (False, plain.text[1:])):
    (found,), *_ = subject.continuations(
      model_subject._replace(tokenizer=drops),
      PROMPTS[:1],
      subject.GenerationConfig(max_new=9, joined=joined),
    )
    assert found.text == text


def test_next_token_heads_by_family(model_subject):
  for family, n in (('parallel', 1), ('causal', 1), ('anticausal', 2)):
    cfg = schema.replace(model_subject.cfg, **{'heads.family': family})
    assert subject.next_token_heads(model_subject._replace(cfg=cfg)) == n


def test_stop_string_ends_generation_early(model_subject):
  (plain,), *_ = subject.continuations(
    model_subject, PROMPTS[:1], subject.GenerationConfig(max_new=40)
  )
  stop = plain.text[5:7]
  at = plain.text.find(stop)
  generation = subject.GenerationConfig(max_new=40, stop=('not there', stop))
  (text,), *_ = subject.continuations(model_subject, PROMPTS[:1], generation)
  assert text.text == plain.text[:at] and text.finish == 'stop'
  assert text.forwards < plain.forwards


def test_truncation_at_the_first_stop_string():
  assert subject._truncate('abcabd', ('d', 'bc', 'x')) == ('a', True)
  assert subject._truncate('abc', ()) == ('abc', False)
