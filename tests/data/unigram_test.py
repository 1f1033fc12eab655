"""Partial encoding with a unigram model, compared with the whole text."""

import io
import random

import numpy as np
import pytest
import sentencepiece

from mtp_jax.data import documents, encoding, splitting, tokenizers, unigram
from tests.support import texts as texts_lib

WORDS = texts_lib.WORDS + (
  'pallor tramping genet exceptionally ------ aaaa sting d\u00efce \ufb01n'
  ' \u2167 \u00bd \u0130 \uac00\u1100\u1161 \x00 \x00\x00'
  ' \U000f0000\U000f0001 \u05d0\u05d1'
).split(' ')
LETTERS = 'aeiou' * 3 + 'bcdfghlmnprstwy'


def _text(seed: int, n: int) -> str:
  """Words with nearly tied segmentations, and some unknown characters."""
  rng = random.Random(seed)

  def word():
    if rng.random() < 0.05:
      return rng.choice(WORDS) + rng.choice(texts_lib.GAPS)
    letters = rng.choices(LETTERS, k=rng.randint(1, 9))
    return ''.join(letters) + (' ' if rng.random() < 0.9 else ', ')

  return ''.join(word() for _ in range(n))


LOSSLESS = dict(
  byte_fallback=True,
  normalization_rule_name='identity',
  remove_extra_whitespaces=False,
  allow_whitespace_only_pieces=True,
)
MODELS = {
  'default': {},
  'lossless': LOSSLESS,
  'no-prefix': LOSSLESS | dict(add_dummy_prefix=False),
  'unknown-joined': LOSSLESS | dict(byte_fallback=False),
  'lower-case': dict(normalization_rule_name='nmt_nfkc_cf', byte_fallback=True),
  'spanning': LOSSLESS | dict(split_by_whitespace=False),
}
CORPUS = _text(0, 4000).replace('\0', '').split('\n')


def _tokenizer(**options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS),
    model_writer=model,
    vocab_size=500,
    minloglevel=2,
    num_threads=1,
    character_coverage=0.99,
    hard_vocab_limit=False,
    **dict(model_type='unigram') | options,
  )
  return tokenizers.of_files('sentencepiece:x', {tokenizers.PIECES: model.getvalue()})


@pytest.mark.parametrize('kind', MODELS)
def test_unigram_parts_have_the_ids_of_the_whole(kind):
  """Including where sums are rounded, and where they are reset, at -100,000."""
  tokenizer = _tokenizer(**MODELS[kind])
  encoder = unigram.of(tokenizer)
  texts = [_text(1, 60_000), _text(2, 300), 'x' * 20_000 + ' b', ' ' * 300]
  texts += ['\U0001f600' * 9000 + 'a b', '\u2581'.join(['', 'a b', ' c ', ''])]
  for text in texts:
    expected = tokenizer.encode(text)
    for size in (2**12, 2**16) if len(text) > 2**12 else (7, 50):
      found, score, n = [], None, 0
      for part in splitting.pieces([text], encoder.is_safe, size):
        ids_T, score = encoder.encode(part, score)
        found.append(ids_T)
        n += 1
      np.testing.assert_array_equal(np.concatenate(found), expected)
      if len(text) > 10**5 and kind != 'spanning':
        assert n > 4
  sums = tokenizer.encode(texts[0]).size
  assert sums > 100_000  # at most -5 each: the sum was reset


def test_unigram_parts_without_carried_score_differ():
  """Shows that the carried score is necessary."""
  tokenizer = _tokenizer(**LOSSLESS)
  encoder = unigram.of(tokenizer)
  text = _text(3, 60_000)
  found = [
    encoder.encode(part, np.float32(0) if i else None)[0]
    for i, part in enumerate(splitting.pieces([text], encoder.is_safe, 2**12))
  ]
  assert np.concatenate(found).tolist() != tokenizer.encode(text).tolist()


@pytest.mark.parametrize('options', [dict(model_type='bpe'), dict(user_defined_symbols=['<tool>'])])
def test_other_models_have_no_partial_encoder(options):
  assert unigram.of(_tokenizer(**(dict(LOSSLESS) | options))) is None
  assert unigram.of(tokenizers.get('bytes')) is None


@pytest.mark.parametrize('kind', ['default', 'no-prefix'])
@pytest.mark.parametrize('workers', [1, 2])
def test_large_documents_between_small_ones(kind, workers, monkeypatch):
  tokenizer = _tokenizer(**MODELS[kind])
  texts = [_text(i, n) for i, n in enumerate([5, 9000, 9, 9000, 30, 2000])]
  found = [documents.Document(str(i), text) for i, text in enumerate(texts)]
  found.append(documents.Document('cut', texts[1], (7, 20_000)))
  found.append(
    documents.Document('read', '', (len(texts[1]),), read=lambda: iter([texts[1], texts[3]]))
  )
  expected = [
    encoding.encode([x._replace(text=''.join(x.blocks()), read=None)], tokenizer) for x in found
  ]
  monkeypatch.setattr(encoding, 'UNIGRAM_WHOLE', 10_000)
  monkeypatch.setattr(encoding, 'BATCH_BYTES', 1)
  monkeypatch.setattr(encoding, 'PART', 2**12)
  results, loss_spans, n = [[]], [()], [0]
  for batch in encoding.run(found, tokenizer, workers):
    results[-1] += batch.tokens_P.tolist()
    loss_spans[-1] += tuple(n[-1] + at for at in batch.loss_spans[0])
    n[-1] += batch.tokens_P.size
    if not batch.is_partial:
      results.append([]), loss_spans.append(()), n.append(0)
  assert results[:-1] == [x.tokens_P.tolist() for x in expected]
  assert loss_spans[:-1] == [x.loss_spans[0] for x in expected]
