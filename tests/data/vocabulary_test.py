"""A vocabulary trained on the documents of a store."""

import argparse
import inspect
import random

import pytest

from mtp_jax.cli import main
from mtp_jax.config import fields
from mtp_jax.data import documents, spool, store, tokenizers, vocabulary

CODE = inspect.getsource(argparse)[:60_000]
DOCUMENTS = [
  documents.Document(str(i), CODE[start : start + 1500])
  for i, start in enumerate(range(0, len(CODE), 1500))
]
ODD = (
  '  two\n\n\n\tfour \r\n',
  'a▁b ▁ c▁▁',  # SentencePiece's space marker
  '\0 ▅ <s> </s> <0x0A> <unk>',
  'naïve 日本語 😀 e\u0301 \ufeff\u200b\xa0',
  ' ',
  '\n',
)


def _train(size=600, found=DOCUMENTS, fraction=0.1):
  return vocabulary.train(f'train:{size}', iter(found), fraction)


@pytest.fixture(scope='module')
def tokenizer():
  return _train()


def test_trained_vocabulary_is_lossless(tokenizer):
  for text in (CODE, *ODD):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())
    assert not {tokenizer.bos, tokenizer.eos} & set(ids.tolist())
  assert len(tokenizer.encode(CODE)) < len(CODE) / 2
  assert tokenizer.encode('').size == 0


def test_trained_vocabulary_has_the_requested_size_and_options(tokenizer):
  assert (tokenizer.name, tokenizer.vocab_size) == ('train:600', 600)
  pieces = [tokenizer.piece(i) for i in range(600)]
  assert not any(sum(c.isdigit() for c in p) > 1 and p[0] != '<' for p in pieces)
  assert ':\\n' in pieces  # newlines are learned, and printable
  assert '▁▁▁▁' in pieces  # an indentation


def test_training_ignores_order_duplicates_and_held_out_documents(tokenizer):
  shuffled = random.Random(0).sample(DOCUMENTS, len(DOCUMENTS))
  empty = documents.Document('empty', '')
  again = _train(found=[*shuffled, empty, *shuffled[:7]])
  assert again.files == tokenizer.files
  held_out = [d for d in DOCUMENTS if spool.held_out(spool.words(spool.digest(d))[0], 0.1)]
  assert held_out
  trained_on = [d for d in DOCUMENTS if d not in held_out]
  assert _train(found=trained_on).files == tokenizer.files
  assert _train(fraction=0).files != tokenizer.files


def test_vocabulary_sample_is_bounded_and_independent_of_order():
  found = [documents.Document(str(i), f'{i:04d}' * 25) for i in range(300)]
  texts = vocabulary.sample(iter(found), 0, 1000)
  assert len(texts) == 10
  keys = [spool.digest(documents.Document('', text)) for text in texts]
  assert keys == sorted(spool.digest(d) for d in found)[:10]
  assert vocabulary.sample(reversed(found), 0, 1000) == texts
  assert len(vocabulary.sample(found, 0, 10**6)) == 300
  assert [len(t) for t in vocabulary.sample(found[:1], 0, 30)] == [30]


@pytest.mark.parametrize(
  'size, problem',
  [
    ('', 'must be an integer above 259'),
    ('8k', 'must be an integer above 259'),
    ('-5', 'must be an integer above 259'),
    ('259', 'must be an integer above 259'),
    (str(2**40), 'must be an integer above 259'),
    ('270', 'the characters of the text need at least 3'),
    ('90000', 'the text yields at most'),
  ],
)
def test_bad_vocabulary_sizes_raise(tmp_path, capsys, size, problem):
  (tmp_path / 'a.txt').write_text(CODE[:20_000])
  (tmp_path / 'b.txt').write_text(CODE[20_000:])
  line = [
    'prepare',
    f'--data.documents=text:{tmp_path}/*.txt',
    f'--data.store={tmp_path}/s',
    f'--data.tokenizer=train:{size}',
    '--data.valid_fraction=0',
  ]
  assert main.main(line) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'mtp: --data.tokenizer=train:{size}: ')
  assert problem in error and error.count('\n') == 1
  assert not (tmp_path / 's').exists()


def test_vocabulary_without_text_raises():
  with pytest.raises(fields.ConfigError, match='there is no text to train'):
    _train(found=[documents.Document('a', '')])


def test_prepare_keeps_the_trained_model_in_the_store(tmp_path, capsys):
  for i, document in enumerate(DOCUMENTS):
    (tmp_path / f'{i}.txt').write_text(document.text)
  out, again = f'{tmp_path}/s', f'{tmp_path}/t'
  args = ['prepare', f'--data.documents=text:{tmp_path}/*.txt', '--data.valid_fraction=0.1']
  trained = [*args, f'--data.store={out}', '--data.tokenizer=train:600']
  assert main.main(trained) == 0
  assert 'tokenizer  train:600, 600 tokens as uint16' in capsys.readouterr().out
  made = store.tokenizer_of(store.open_store(out))
  assert made.files == _train().files and made.name == 'train:600'
  assert main.main(trained) == 2  # at once, not after the training
  assert 'exists; choose another' in capsys.readouterr().err
  # Another store with the same tokenizer is made from the file of the first.
  file = f'{out}/tokenizer/{tokenizers.PIECES}'
  same = [*args, f'--data.store={again}', f'--data.tokenizer=sentencepiece:{file}']
  assert main.main(same) == 0
  one, two = (store.open_store(path).manifest for path in (out, again))
  assert one['splits'] == two['splits']
  assert one['tokenizer']['fingerprint'] == two['tokenizer']['fingerprint']
