"""Tokenizers that are files: SentencePiece models and tokenizer.json."""

import argparse
import base64
import io
import itertools
import json
import re

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from mtp_jax.config import fields
from mtp_jax.data import documents, ranks, readers, special_tokens, store, tokenizers

CODE = open(argparse.__file__, encoding='utf-8').read()[:20_000]
TEXTS = ('def f(x):\n  return "é😀"\n', CODE[:3000])


@pytest.fixture(scope='module')
def spm(tmp_path_factory):
  """A small lossless model: no normalization, byte fallback."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CODE.split('\n')),
    model_writer=model,
    vocab_size=500,
    model_type='bpe',
    byte_fallback=True,
    minloglevel=2,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
  )
  path = tmp_path_factory.mktemp('spm') / 'code.model'
  path.write_bytes(model.getvalue())
  return path


def _byte_level(path):
  fast = hf.Tokenizer(hf.models.BPE())
  fast.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  fast.decoder = hf.decoders.ByteLevel()
  alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
  fast.train_from_iterator(
    CODE.split('\n'),
    hf.trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=['<|endoftext|>'],
      initial_alphabet=alphabet,
      show_progress=False,
    ),
  )
  fast.save(str(path))


def _llama_like(path):
  """Characters and bytes, with the space marker, as in Llama's file."""
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
  pieces += sorted(set(CODE.replace(' ', '\u2581')) - {'\n'})
  vocab = {piece: i for i, piece in enumerate(pieces)}
  fast = hf.Tokenizer(hf.models.BPE(vocab, [], byte_fallback=True, unk_token='<unk>'))
  fast.normalizer = hf.normalizers.Replace(' ', '\u2581')
  fast.decoder = hf.decoders.Sequence(
    [hf.decoders.Replace('\u2581', ' '), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
  )
  fast.add_special_tokens(['<unk>', '<s>', '</s>'])
  fast.save(str(path))


@pytest.fixture(params=['sentencepiece', 'byte level', 'llama-like'])
def tokenizer(request, spm, tmp_path):
  if request.param == 'sentencepiece':
    return tokenizers.get(f'sentencepiece:{spm}')
  path = tmp_path / 'tokenizer.json'
  (_byte_level if request.param == 'byte level' else _llama_like)(path)
  return tokenizers.get(f'hf:{path}')


@pytest.mark.parametrize('text', TEXTS)
def test_round_trip_and_bytes(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and len(ids) < len(text.encode()) + 2
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text
  # SentencePiece prepends a space to each text.
  ahead = tokenizer.name.startswith('sentencepiece')
  assert tokenizer.token_bytes_V[ids].sum() == len(text.encode()) + ahead
  assert tokenizer.token_bytes_V.shape == (tokenizer.vocab_size,)
  assert not tokenizer.token_bytes_V[[tokenizer.bos, tokenizer.eos]].any()
  assert {tokenizer.bos, tokenizer.eos}.isdisjoint(ids.tolist())


def test_token_pieces_are_printable(tokenizer):
  ids = tokenizer.encode('return')
  joined = ''.join(tokenizer.piece(int(i)) for i in ids)
  assert joined.lstrip('\u2581') == 'return'
  assert tokenizer.piece(tokenizer.vocab_size) == (f'<id {tokenizer.vocab_size}>')


def test_store_contains_its_tokenizer(tokenizer, tmp_path):
  path = tmp_path / 's'
  texts = (documents.Document(str(i), f'text {i}') for i in range(40))
  store.write(path, texts, tokenizer, valid_fraction=0.2)
  for file in tmp_path.glob('*.json'):
    file.unlink()  # the original is no longer needed
  opened = store.open_store(path)
  assert opened.manifest['tokenizer']['token_bytes'][tokenizer.bos] == 0
  again = store.tokenizer_of(opened)
  for key in ('name', 'vocab_size', 'bos', 'eos', 'fingerprint', 'files'):
    assert getattr(again, key) == getattr(tokenizer, key)
  for text in TEXTS:
    np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
  (name, *_) = tokenizer.files
  file = path / 'tokenizer' / name
  whole = file.read_bytes()
  for bad, problem in (
    (whole[:-1], f'has {len(whole) - 1} bytes instead of {len(whole)}'),
    (bytes([whole[0] ^ 1]) + whole[1:], 'is corrupt: checksum mismatch'),
  ):
    file.write_bytes(bad)
    line = f'--data.store={path}: tokenizer/{name}: {problem}'
    with pytest.raises(fields.ConfigError, match=f'^{re.escape(line)}$'):
      store.tokenizer_of(store.open_store(path, verify=False))


def test_special_tokens_in_a_text_are_encoded_as_text(tmp_path):
  path = tmp_path / 'tokenizer.json'
  _byte_level(path)
  fast = hf.Tokenizer.from_file(str(path))
  fast.add_tokens(['日本'])
  fast.save(str(path))
  tokenizer = tokenizers.get(f'hf:{path}')
  text = 'a <|endoftext|> 日本 b'
  ids = tokenizer.encode(text)
  assert tokenizer.eos not in ids and tokenizer.bos not in ids
  assert tokenizer.decode(ids) == text
  assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())


def test_bos_and_eos_are_read_from_tokenizer_config(tmp_path):
  path = tmp_path / 'tokenizer.json'
  _llama_like(path)
  about = dict(bos_token='</s>', eos_token={'content': '<s>'})
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(about))
  tokenizer = tokenizers.get(f'hf:{path}')
  assert (tokenizer.bos, tokenizer.eos) == (2, 1)
  texts = (documents.Document(str(i), f'text {i}') for i in range(9))
  store.write(tmp_path / 's', texts, tokenizer, valid_fraction=0)
  kept = store.tokenizer_of(store.open_store(tmp_path / 's'))
  assert (kept.bos, kept.eos) == (2, 1)
  about['bos_token'] = '<none>'
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(about))
  with pytest.raises(fields.ConfigError, match='has no BOS token'):
    tokenizers.get(f'hf:{path}')


def test_a_tokenizer_that_states_no_bos_has_none(tmp_path):
  """Qwen's: texts are as in Transformers, alone and in a store."""
  path = tmp_path / 'tokenizer.json'
  _llama_like(path)
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(dict(bos_token=None)))
  tokenizer = tokenizers.get(f'hf:{path}')
  assert tokenizer.start == () and tokenizer.eos == 2
  found = [documents.Document('a', 'text 1'), documents.Document('b', 'text 12', (4,))]
  store.write(tmp_path / 's', found, tokenizer, valid_fraction=0)
  split = store.open_store(tmp_path / 's').split('train')
  want = [[*tokenizer.encode(d.text), tokenizer.eos] for d in found]
  assert sorted(x.tolist() for x in split.documents()) == sorted(map(list, want))
  masks = split.loss_mask[0][:].tolist()
  assert masks.count(True) == len(want[0]) + len(tokenizer.encode(' 12')) + 1
  (tmp_path / 'tokenizer_config.json').unlink()
  assert tokenizers.get(f'hf:{path}').start == (1,)


@pytest.mark.parametrize('kind', ['sentencepiece', 'hf'])
def test_invalid_tokenizer_files_raise(tmp_path, kind):
  with pytest.raises(fields.ConfigError, match='No such file') as error:
    tokenizers.get(f'{kind}:{tmp_path}/none')
  assert str(error.value).startswith(f'--data.tokenizer={kind}:')
  (tmp_path / 'junk').write_bytes(b'junk')
  with pytest.raises(fields.ConfigError, match='is not a '):
    tokenizers.get(f'{kind}:{tmp_path}/junk')


def test_parquet_and_zst(tmp_path):
  import pyarrow
  import pyarrow.parquet

  table = pyarrow.table(dict(text=['a', None, 'b'], n=[1, 2, 3]))
  pyarrow.parquet.write_table(table, tmp_path / 't.parquet')
  found = list(readers.read(f'parquet:{tmp_path}/*.parquet'))
  assert [d.text for d in found] == ['a', '', 'b']
  assert found[2].name == 't.parquet:3'
  packed = pyarrow.compress(b'{"text":"x"}\n{"text":"y"}\n', codec='zstd', asbytes=True)
  (tmp_path / 'a.jsonl.zst').write_bytes(packed * 2)  # two frames
  found = list(readers.read(f'jsonl:{tmp_path}/a.jsonl.zst'))
  assert [d.text for d in found] == ['x', 'y', 'x', 'y']


@pytest.mark.parametrize(
  'source, problem',
  [
    ('parquet:{}/t.parquet#n', "field 'n' is int64, not a string"),
    ('parquet:{}/t.parquet#z', "no field 'z', its fields are: text, n"),
    ('parquet:{}/cut.parquet', 'cannot read'),
    ('text:{}/cut.txt.zst', 'Truncated'),
    ('text:{}/junk.txt.zst', 'cannot read'),
  ],
)
def test_corrupt_documents_raise_on_one_line(tmp_path, source, problem):
  import pyarrow
  import pyarrow.parquet

  whole = tmp_path / 't.parquet'
  table = pyarrow.table(dict(text=['a'] * 100, n=range(100)))
  pyarrow.parquet.write_table(table, whole)
  (tmp_path / 'cut.parquet').write_bytes(whole.read_bytes()[:-20])
  packed = pyarrow.compress(b'hello ' * 99, codec='zstd', asbytes=True)
  (tmp_path / 'cut.txt.zst').write_bytes(packed[:-3])
  (tmp_path / 'junk.txt.zst').write_bytes(b'junk')
  with pytest.raises(fields.ConfigError, match=problem) as error:
    list(readers.read(source.format(tmp_path)))
  assert '\n' not in str(error.value)


def test_vocab_size_covers_the_largest_id(tmp_path):
  path = tmp_path / 'tokenizer.json'
  vocab = {'<s>': 0, '</s>': 1, '?': 2, 'a': 7, 'b': 40}
  fast = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token='?'))
  fast.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  fast.add_special_tokens(['<s>', '</s>'])
  fast.save(str(path))
  tokenizer = tokenizers.get(f'hf:{path}')
  assert tokenizer.vocab_size == tokenizer.token_bytes_V.size == 41
  ids = tokenizer.encode('a b b x')
  assert ids.tolist() == [7, 40, 40, 2]
  assert tokenizer.decode([3, *ids, 39]) == 'a b b ?'
  assert tokenizer.token_bytes_V[[3, 7, 40]].tolist() == [0, 1, 1]
  about = json.loads(path.read_text())
  about['added_tokens'].append(about['added_tokens'][0] | dict(id=41, content='[PAD]'))
  path.write_text(json.dumps(about))
  with pytest.raises(fields.ConfigError, match=r"'\[PAD\]' as 41, which"):
    tokenizers.get(f'hf:{path}')
  del about['added_tokens'][-1]
  about['model']['vocab']['b'] = 2**31
  path.write_text(json.dumps(about))
  with pytest.raises(fields.ConfigError, match='has the id 2,147,483,648; at'):
    tokenizers.get(f'hf:{path}')


@pytest.mark.parametrize('file', ['generation_config.json', 'config.json'])
@pytest.mark.parametrize('kind', ['hf', 'sentencepiece'])
def test_stop_tokens_are_read_from_generation_config(tmp_path, spm, file, kind):
  path = tmp_path / 'x.json'
  if kind == 'hf':
    _llama_like(path)
  else:
    path.write_bytes(spm.read_bytes())
  plain = tokenizers.get(f'{kind}:{path}')
  assert plain.stop_ids == (plain.eos,)
  for stated, wanted in (([plain.eos, 9], (9,)), ([9, 8], (9, 8)), (plain.eos, ()), (None, ())):
    (tmp_path / file).write_text(json.dumps(dict(eos_token_id=stated)))
    tokenizer = tokenizers.get(f'{kind}:{path}')
    assert tokenizer.stop_ids == (plain.eos, *wanted)
    assert tokenizer.fingerprint == plain.fingerprint
    kept = tokenizers.of_files(f'{kind}:x', tokenizer.files)
    assert kept.stop_ids == tokenizer.stop_ids
  for wrong in ([2, '426'], [-1], [[3]]):
    (tmp_path / file).write_text(json.dumps(dict(eos_token_id=wrong)))
    with pytest.raises(fields.ConfigError, match='eos_token_id='):
      tokenizers.get(f'{kind}:{path}')


# Files of ranks, as Llama 3's.


def _ranks_file(path) -> tuple[bytes, dict]:
  """Returns a byte-level vocabulary as a file of ranks, and its ranks."""
  _byte_level(path)
  vocab = json.loads(path.read_text())['model']['vocab']
  byte_of = {letter: b for b, letter in enumerate(ranks.byte_letters())}
  names = sorted(vocab.keys() - {'<|endoftext|>'}, key=vocab.get)
  tokens = [bytes(byte_of[letter] for letter in name) for name in names]
  lines = (b'%s %d' % (base64.b64encode(t), i) for i, t in enumerate(tokens))
  return b'\n'.join(lines), {token: i for i, token in enumerate(tokens)}


def _by_ranks(word: bytes, index_of) -> list[int]:
  """tiktoken's rule: merges the leftmost pair of the lowest rank first."""
  if word in index_of:
    return [index_of[word]]
  parts = [bytes([byte]) for byte in word]
  while True:
    pairs = [
      (index_of[a + b], i)
      for i, (a, b) in enumerate(itertools.pairwise(parts))
      if a + b in index_of
    ]
    if not pairs:
      return [index_of[part] for part in parts]
    i = min(pairs)[1]
    parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_tiktoken_ranks_encode_like_tiktoken(tmp_path):
  data, index_of = _ranks_file(tmp_path / 'trained.json')
  (tmp_path / 'tokenizer.model').write_bytes(data)
  tokenizer = tokenizers.get(f'tiktoken:{tmp_path}/tokenizer.model')
  n = len(index_of)
  assert tokenizer.vocab_size == n + 256
  assert (tokenizer.bos, tokenizer.stop_ids) == (n, (n + 1, n + 9))
  assert tokenizer.piece(n + 255) == '<|reserved_special_token_250|>'
  assert special_tokens.begins(tokenizer)
  for text in ('the tooth heats', ' the  eta\n\n12345 x!', 'é日 <|eot_id|>'):
    words = tokenizer.encode(text)
    assert tokenizer.decode(words) == text
    assert tokenizer.token_bytes_V[words].sum() == len(text.encode())
  words = set(re.findall(r' ?[a-zA-Z]+', CODE)) | {'selfself', 'eeeeee'}
  assert len(words) > 300
  for word in words:
    assert tokenizer.encode(word).tolist() == _by_ranks(word.encode(), index_of)
  again = tokenizers.of_files(
    tokenizers.recorded_name(tokenizer).replace('#', ':'), tokenizer.files
  )
  assert again.fingerprint == tokenizer.fingerprint
  for wrong, problem in (
    (data[:-5], 'base64'),
    (b'junk', 'base64'),
    (data + b'\nYWE= 9999', 'ranks'),
    (b'YQ== 0', 'a byte has no token'),
  ):
    (tmp_path / 'tokenizer.model').write_bytes(wrong)
    with pytest.raises(fields.ConfigError, match=problem):
      tokenizers.get(f'tiktoken:{tmp_path}/tokenizer.model')
