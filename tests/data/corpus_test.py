"""The corpus of a run: store lists, mixtures, tokenizers."""

import collections
import os
import re

import numpy as np
import pytest

from mtp_jax.config import draft_vocab, fields, parse, schema, validate
from mtp_jax.data import batches, corpus, documents, store, tokenizers, vocabulary

TEXTS = [f'text {i} of some, {i * i} ' * 3 for i in range(80)]
BYTES = tokenizers.get('bytes')


def _write(path, tokenizer=BYTES, texts=TEXTS, fraction=0.3, loss_spans=()):
  found = (documents.Document(str(i), t, loss_spans) for i, t in enumerate(texts))
  store.write(path, found, tokenizer, valid_fraction=fraction)


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  """Directories: a and b in bytes, whole without a split, words with a trained
  vocabulary, more with the same one, other with a different one."""
  root = tmp_path_factory.mktemp('stores')
  _write(root / 'a')
  _write(root / 'b', texts=TEXTS[:50], loss_spans=(4,))
  _write(root / 'whole', texts=TEXTS[:40], fraction=0)
  found = [documents.Document('', text) for text in TEXTS]
  trained = vocabulary.train('train:290', found, 0)
  _write(root / 'words', trained)
  (root / 'x.model').write_bytes(trained.files[tokenizers.PIECES])
  same = tokenizers.get(f'sentencepiece:{root}/x.model')
  _write(root / 'more', same, TEXTS[:60])
  _write(root / 'other', vocabulary.train('train:280', found, 0))
  return root


def _cfg(stores, text, **changes):
  """`text` is a list of stores with @ for their directory."""
  text = text.replace('@', f'{stores}/')
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  return schema.replace(schema.CommandConfig(), **{'data.store': text} | changes)


def _open(stores, text, **changes) -> corpus.Corpus:
  return corpus.open_corpus(_cfg(stores, text, **changes))


def _refused(call, *args, **kwargs) -> str:
  with pytest.raises(fields.ConfigError) as error:
    call(*args, **kwargs)
  assert '\n' not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(
  'text, refs',
  [
    ('', []),
    ('x', [('x', 'x', '1')]),
    ('/a/b/', [('b', '/a/b/', '1')]),
    ('a/b:3', [('b', 'a/b', '3')]),
    ('a/b:.5, c:2.25', [('b', 'a/b', '.5'), ('c', 'c', '2.25')]),
    ('n=a/b:3', [('n', 'a/b', '3')]),
    ('s3://x/y', [('y', 's3://x/y', '1')]),
    ('/n=x/y', [('y', '/n=x/y', '1')]),
    ('./n=x:1:1', [('n=x:1', './n=x:1', '1')]),
    ('a:1e3', [('a:1e3', 'a:1e3', '1')]),
  ],
)
def test_parse_stores_reads_names_paths_and_weights(text, refs):
  found = parse.parse_stores(text)
  assert [tuple(ref) for ref in found] == refs
  assert parse.parse_stores(parse.format_stores(found)) == found


def test_format_stores_keeps_a_single_store_unchanged():
  for text in ('/x/y', 'a:3', 'n=/x/y', 'n=x:2,/y:.5', '/a:3:1'):
    assert parse.format_stores(parse.parse_stores(text)) == text
  # NAME= cannot be '~'; only the path matters.
  found = parse.format_stores([parse.StoreRef('~', '/root')])
  assert parse.parse_stores(found)[0].path == '/root'


@pytest.mark.parametrize(
  'flag, text, problem',
  [
    ('data.store', 'a,,b', '[NAME=]PATH[:WEIGHT],… with weights above 0'),
    ('data.store', 'a:0,b', '[NAME=]PATH[:WEIGHT],… with weights above 0'),
    ('data.store', 'a:0.0', '[NAME=]PATH[:WEIGHT],… with weights above 0'),
    ('data.store', 'x/a,y/a', "duplicate name 'a'; give NAME=PATH"),
    ('eval.stores', 'x/s', "duplicate name 's'; give NAME=PATH"),
    ('eval.stores', 'a:3', '[NAME=]PATH,…, without weights'),
    ('eval.stores', ',', '[NAME=]PATH,…'),
  ],
)
def test_bad_store_lists_raise(flag, text, problem):
  cfg = schema.replace(schema.CommandConfig(), **{'data.store': 's', flag: text})
  line = _refused(validate.validate, cfg)
  assert line == f'--{flag}={text}: {problem}'


def test_mixture_weights_are_reduced_to_integers(stores):
  for text, weights in (
    ('@a', (1,)),
    ('@a:7', (1,)),
    ('@a,@b', (1, 1)),
    ('@a:.75,@b:.25', (3, 1)),
    ('@a:6,@b:4.5,@whole:1.5', (4, 3, 1)),
    ('@a:.1,@b:.3', (1, 3)),
    ('@a:1000000007,@b', (1000000007, 1)),
  ):
    mixture = _open(stores, text).train()
    assert mixture.weights == weights
    assert len(mixture.splits) == len(weights)
  assert mixture.masked and not _open(stores, '@a,@whole').train().masked


def test_draft_vocabulary_is_of_the_most_frequent_tokens(stores, capsys):
  cfg = _cfg(stores, '@a:3,@b', heads__draft_vocab='9', model__vocab_size=264)
  tokens = corpus.open_corpus(cfg)
  share = np.zeros(264)
  for split, weight in zip(tokens.train().splits, (3, 1), strict=True):
    count = collections.Counter(token for x in split.documents() for token in x.tolist())
    for token, n in count.items():
      share[token] += weight / 4 * n / count.total()
  np.testing.assert_allclose(tokens.frequency(264), share, rtol=1e-12)
  recorded = batches.recorded(tokens, cfg)
  ids = draft_vocab.of(recorded).tolist()
  assert ids == sorted(sorted(range(264), key=lambda v: (-share[v], v))[:9]) != list(range(9))
  assert f'--heads.draft_vocab=9: {share[ids].sum():.2%} of the tokens' in capsys.readouterr().out
  assert batches.recorded(tokens, recorded) == recorded


def test_fingerprint_depends_on_stores_and_weights(stores):
  one = _open(stores, '@a')
  assert one.fingerprint == one.sources[0].store.manifest['sha256']
  texts = ['@a', '@b', '@a,@b', '@b,@a', '@a:2,@b', '@a,@b:2', '@a,@b,@whole']
  assert len({_open(stores, t).fingerprint for t in texts}) == len(texts)
  for text, same in (('@a', 'n=@a:3'), ('@a,@b', 'n=@a:.5,@b:.5'), ('@a:2,@b', '@a:3,@b:1.5')):
    a, b = (_open(stores, t).fingerprint for t in (text, same))
    assert a == b
  further = _open(stores, '@a', eval__stores=f'{stores}/b')
  assert further.fingerprint == one.fingerprint


def test_held_out_sets_are_named_after_their_stores(stores):
  def sets(text, split='valid', **changes):
    found = _open(stores, text, **changes).held_out(split)
    return {name: split.name for name, split in found.items()}

  assert sets('@a') == {'a': 'valid'}
  assert sets('@whole') == {}
  assert sets('x=@a,@b,@whole') == {'x': 'x valid', 'b': 'b valid'}
  further = dict(eval__stores=f'y={stores}/b,{stores}/whole')
  assert sets('@a', **further) == {'a': 'a valid', 'y': 'y valid', 'whole': 'whole train'}
  assert sets('@a,@b', 'train') == {'a': 'a train', 'b': 'b train'}


def test_missing_store_error_names_its_flag(stores):
  line = _refused(_open, stores, '@a,@none')
  assert line.startswith(f'--data.store={stores}/none: no such directory')
  line = _refused(_open, stores, '@a', eval__stores=f'{stores}/none')
  assert line.startswith(f'--eval.stores={stores}/none: no such directory')


def test_stores_with_different_tokenizers_raise(stores):
  line = _refused(_open, stores, '@words,@a')
  assert line == (
    f'--data.store={stores}/words,{stores}/a: {stores}/words was made with the'
    f' tokenizer train:290, {stores}/a with bytes, which differs'
  )
  line = _refused(_open, stores, '@words,@other')
  assert 'with train:280, which differs' in line
  further = dict(eval__stores=f'{stores}/a')
  line = _refused(_open, stores, '@words', **further)
  assert line.startswith(f'--eval.stores={stores}/a: {stores}/words was made')
  # One was made with the file of the model that the other has trained.
  assert _open(stores, '@words,@more').tokenizer.name == 'train:290'


def test_corpus_loads_the_tokenizer_of_the_store(stores):
  assert _open(stores, '@a').tokenizer.name == 'bytes'
  words = _open(stores, '@words')
  assert (words.tokenizer.name, words.tokenizer.vocab_size) == ('train:290', 290)
  assert _open(stores, '@a').recorded == 'bytes'
  fingerprint = words.tokenizer.fingerprint
  assert words.recorded == f'sentencepiece#{fingerprint[:12]}'
  assert _open(stores, '@more').recorded == words.recorded


def test_given_tokenizer_must_match_the_store(stores, tmp_path):
  def given(text, name):
    return _open(stores, text, data__tokenizer=name)

  words = _open(stores, '@words')
  model = f'sentencepiece:{stores}/x.model'
  for text, name in (
    ('@a', 'bytes'),
    ('@words', 'train:290'),
    ('@words', model),
    ('@words', words.recorded),
    ('@more', words.recorded),
    ('@more', model),
  ):
    assert given(text, name).recorded == given(text, '').recorded
  for text, name in (
    ('@words', 'bytes'),
    ('@a', model),
    ('@words', 'train:400'),
    ('@other', 'train:290'),
    ('@other', words.recorded),
    ('@other', model),
    ('@a', words.recorded),
  ):
    line = _refused(given, text, name)
    path = text.replace('@', f'{stores}/')
    assert re.fullmatch(
      rf'--data.tokenizer={re.escape(name)}: the store {path} was made with'
      r' a different one, [\w:]+ with fingerprint \w{12}; omit the flag to use it',
      line,
    )
  line = _refused(given, '@a', 'sentencepiece:/none')
  assert line.endswith('cannot be read: No such file or directory')
  # The tokenizer file in its name may have been moved.
  os.rename(stores / 'x.model', tmp_path / 'y.model')
  try:
    assert given('@more', model).tokenizer.vocab_size == 290
    assert given('@words', f'sentencepiece:{tmp_path}/y.model')
  finally:
    os.rename(tmp_path / 'y.model', stores / 'x.model')
