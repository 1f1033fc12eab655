"""Tokenizers of an export, compared with transformers."""

import argparse
import io
import json

import pytest
import sentencepiece
import tokenizers as hf

from mtp_jax.data import tokenizers
from mtp_jax.interop import tokens
from tests.support import parity

transformers = parity.library('transformers')

CODE = open(argparse.__file__, encoding='utf-8').read()
TEXTS = (
  'def f(x):\n\treturn "é€😀"  # \x7f',
  'a  b   c\n\n\n    d',
  ' leading and trailing ',
  'one </s> two <s> three',
  'a</s>> b</p> <unk> <0x0A> </ s>',
  '',
  CODE[:3000],
)


KEEPS = dict(normalization_rule_name='identity', remove_extra_whitespaces=False)


def _write(ours, path):
  """Writes the tokenizer files of an export."""
  for name, data in tokens.files_of(ours).items():
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(data)
  (path / 'config.json').write_text('{"model_type": "llama"}')


def _pieces(path, kind, **settings):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CODE.split('\n')),
    model_writer=model,
    vocab_size=500,
    model_type=kind,
    minloglevel=2,
    **dict(byte_fallback=True) | settings,
  )
  (path / 'code.model').write_bytes(model.getvalue())
  return tokenizers.get(f'sentencepiece:{path / "code.model"}')


HTML = ['<p>a</p> <s>b</s> </s>> x</ y>', '</s>>', '<unk><0x0A></p>'] * 200


def _html(path):
  """A model with pieces like '</' and 's>>'."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(HTML + CODE.split('\n')),
    model_writer=model,
    vocab_size=500,
    model_type='unigram',
    byte_fallback=True,
    minloglevel=2,
    **KEEPS,
  )
  (path / 'html.model').write_bytes(model.getvalue())
  return tokenizers.get(f'sentencepiece:{path / "html.model"}')


def _code(path):
  """A byte-level vocabulary with the same BOS and EOS, as in code models."""
  fast = hf.Tokenizer(hf.models.BPE())
  fast.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  fast.decoder = hf.decoders.ByteLevel()
  fast.train_from_iterator(
    CODE.split('\n'),
    hf.trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=['<|endoftext|>'],
      show_progress=False,
      initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  fast.save(str(path / 'tokenizer.json'))
  return tokenizers.get(f'hf:{path / "tokenizer.json"}')


def _named_ends(path):
  """The same, with BOS and EOS in tokenizer_config.json, one of them an object."""
  _code(path)
  about = json.loads((path / 'tokenizer.json').read_text())
  (path / 'tokenizer.json').write_text(json.dumps(about).replace('<|endoftext|>', '<done>'))
  (path / 'tokenizer_config.json').write_text(
    json.dumps(
      dict(
        bos_token={'__type': 'AddedToken', 'content': '<done>'},
        eos_token='<done>',
        chat_template='{{ messages }}',
      )
    )
  )
  return tokenizers.get(f'hf:{path / "tokenizer.json"}')


KEEPS = dict(normalization_rule_name='identity', remove_extra_whitespaces=False)
MADE = {
  'bytes': lambda path: tokenizers.get('bytes'),
  'bpe': lambda path: _pieces(path, 'bpe', **KEEPS),
  'bpe, normalised': lambda path: _pieces(path, 'bpe'),
  'bpe, no prefix': lambda path: _pieces(path, 'bpe', add_dummy_prefix=False, **KEEPS),
  'unigram': lambda path: _pieces(path, 'unigram', **KEEPS),
  'unigram of html': _html,
  'no bytes': lambda path: _pieces(path, 'bpe', byte_fallback=False),
  'byte-level': _code,
  'named ends': _named_ends,
}


@pytest.mark.parity
@pytest.mark.parametrize('kind', MADE)
def test_transformers_ids_match(kind, tmp_path):
  (tmp_path / 'in').mkdir()
  (tmp_path / 'out').mkdir()
  ours = MADE[kind](tmp_path / 'in')
  _write(ours, tmp_path / 'out')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
  for text in TEXTS:
    ids = ours.encode(text).tolist()
    first = [] if tokens.JSON in ours.files else [ours.bos]
    assert theirs(text)['input_ids'] == [*first, *ids], text
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.parametrize('kind', MADE)
def test_imported_tokenizer_is_identical(kind, tmp_path):
  (tmp_path / 'in').mkdir()
  (tmp_path / 'out').mkdir()
  ours = MADE[kind](tmp_path / 'in')
  _write(ours, tmp_path / 'out')
  back = tokens.read(str(tmp_path / 'out'), tokenizers.recorded_name(ours))
  assert back.fingerprint == ours.fingerprint
  assert (back.bos, back.eos) == (ours.bos, ours.eos)
  assert ours.files.items() <= back.files.items()
  for text in TEXTS:
    assert back.encode(text).tolist() == ours.encode(text).tolist()


def test_user_defined_symbols_export_no_tokenizer_json(tmp_path):
  (tmp_path / 'in').mkdir()
  ours = _pieces(tmp_path / 'in', 'bpe', user_defined_symbols=['return'])
  files = tokens.files_of(ours)
  assert files[tokens.MODEL] and tokens.JSON not in files
  assert b'LlamaTokenizer' in files['tokenizer_config.json']


def test_folder_without_tokenizer_gives_none(tmp_path):
  assert tokens.read(str(tmp_path), None) is None


@pytest.mark.parametrize('prefix', [True, False])
def test_add_prefix_space_is_recorded(prefix, tmp_path):
  """llama.cpp's converter reads this field, which is true by default."""
  ours = _pieces(tmp_path, 'bpe', add_dummy_prefix=prefix, **KEEPS)
  about = json.loads(tokens.files_of(ours)['tokenizer_config.json'])
  assert about['add_prefix_space'] is prefix
