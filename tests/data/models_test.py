"""Tokenizers that are files: SentencePiece models and tokenizer.json."""

import argparse
import io
import json
import re

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from mtp_jax import config
from mtp_jax.data import documents, store, tokenizers

CODE = open(argparse.__file__, encoding='utf-8').read()[:20_000]
TEXTS = ('def f(x):\n  return "é😀"\n', CODE[:3000])


@pytest.fixture(scope='module')
def spm(tmp_path_factory):
  """A small model that loses nothing: no normalisation, byte fallback."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CODE.split('\n')), model_writer=model,
    vocab_size=500, model_type='bpe', byte_fallback=True, minloglevel=2,
    normalization_rule_name='identity', remove_extra_whitespaces=False,
  )  # fmt: skip
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
      vocab_size=400, special_tokens=['<|endoftext|>'],
      initial_alphabet=alphabet, show_progress=False,
    ),
  )  # fmt: skip
  fast.save(str(path))


def _llama_like(path):
  """Characters and bytes, with the mark of a space, as Llama's file has."""
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
  pieces += sorted(set(CODE.replace(' ', '\u2581')) - {'\n'})
  vocab = {piece: i for i, piece in enumerate(pieces)}
  fast = hf.Tokenizer(
    hf.models.BPE(vocab, [], byte_fallback=True, unk_token='<unk>')
  )
  fast.normalizer = hf.normalizers.Replace(' ', '\u2581')
  fast.decoder = hf.decoders.Sequence(
    [
      hf.decoders.Replace('\u2581', ' '),
      hf.decoders.ByteFallback(),
      hf.decoders.Fuse(),
    ]
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
  # SentencePiece puts a space before each text.
  ahead = tokenizer.name.startswith('sentencepiece')
  assert tokenizer.token_bytes_V[ids].sum() == len(text.encode()) + ahead
  assert tokenizer.token_bytes_V.shape == (tokenizer.vocab_size,)
  assert not tokenizer.token_bytes_V[[tokenizer.bos, tokenizer.eos]].any()
  assert {tokenizer.bos, tokenizer.eos}.isdisjoint(ids.tolist())


def test_pieces_are_printable(tokenizer):
  ids = tokenizer.encode('return')
  joined = ''.join(tokenizer.piece(int(i)) for i in ids)
  assert joined.lstrip('\u2581') == 'return'
  assert tokenizer.piece(tokenizer.vocab_size) == (
    f'<id {tokenizer.vocab_size}>'
  )


def test_a_store_carries_its_tokenizer(tokenizer, tmp_path):
  path = tmp_path / 's'
  texts = (documents.Document(str(i), f'text {i}') for i in range(40))
  store.write(path, texts, tokenizer, valid_fraction=0.2)
  for file in tmp_path.glob('*.json'):
    file.unlink()  # nobody needs the original any more
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
    (whole[:-1], f'it has {len(whole) - 1} bytes instead of {len(whole)}'),
    (bytes([whole[0] ^ 1]) + whole[1:], 'it is damaged, its checksum is wrong'),
  ):
    file.write_bytes(bad)
    line = f'--data.store={path}: tokenizer/{name}: {problem}'
    with pytest.raises(config.ConfigError, match=f'^{re.escape(line)}$'):
      store.tokenizer_of(store.open_store(path, verify=False))


def test_special_tokens_in_a_text_are_text(tmp_path):
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


def test_ends_are_read_beside_the_file(tmp_path):
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
  with pytest.raises(config.ConfigError, match='has no BOS token'):
    tokenizers.get(f'hf:{path}')


@pytest.mark.parametrize('kind', ['sentencepiece', 'hf'])
def test_what_is_no_model_is_refused(tmp_path, kind):
  with pytest.raises(config.ConfigError, match='No such file') as error:
    tokenizers.get(f'{kind}:{tmp_path}/none')
  assert str(error.value).startswith(f'--data.tokenizer={kind}:')
  (tmp_path / 'junk').write_bytes(b'junk')
  with pytest.raises(config.ConfigError, match='is not a '):
    tokenizers.get(f'{kind}:{tmp_path}/junk')


def test_parquet_and_zst(tmp_path):
  import pyarrow
  import pyarrow.parquet

  table = pyarrow.table(dict(text=['a', None, 'b'], n=[1, 2, 3]))
  pyarrow.parquet.write_table(table, tmp_path / 't.parquet')
  found = list(documents.read(f'parquet:{tmp_path}/*.parquet'))
  assert [d.text for d in found] == ['a', '', 'b']
  assert found[2].name == 't.parquet:3'
  packed = pyarrow.compress(
    b'{"text":"x"}\n{"text":"y"}\n', codec='zstd', asbytes=True
  )
  (tmp_path / 'a.jsonl.zst').write_bytes(packed * 2)  # two frames
  found = list(documents.read(f'jsonl:{tmp_path}/a.jsonl.zst'))
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
def test_a_broken_file_is_one_line(tmp_path, source, problem):
  import pyarrow
  import pyarrow.parquet

  whole = tmp_path / 't.parquet'
  table = pyarrow.table(dict(text=['a'] * 100, n=range(100)))
  pyarrow.parquet.write_table(table, whole)
  (tmp_path / 'cut.parquet').write_bytes(whole.read_bytes()[:-20])
  packed = pyarrow.compress(b'hello ' * 99, codec='zstd', asbytes=True)
  (tmp_path / 'cut.txt.zst').write_bytes(packed[:-3])
  (tmp_path / 'junk.txt.zst').write_bytes(b'junk')
  with pytest.raises(config.ConfigError, match=problem) as error:
    list(documents.read(source.format(tmp_path)))
  assert '\n' not in str(error.value)
