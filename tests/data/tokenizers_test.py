import random

import numpy as np
import pytest

from mtp_jax.config import fields
from mtp_jax.data import tokenizers


def _random_text(rng: random.Random) -> str:
  spans = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0x1F300, 0x1FAFF))
  return ''.join(chr(rng.randint(*rng.choice(spans))) for _ in range(rng.randint(0, 200)))


def test_bytes_round_trip():
  tok = tokenizers.get('bytes')
  rng = random.Random(0)
  texts = [_random_text(rng) for _ in range(200)]
  for text in ['', '\0', '👩‍👩‍👧 é\r\n', '\U0010ffff', *texts]:
    ids_T = tok.encode(text)
    assert ids_T.ndim == 1 and np.issubdtype(ids_T.dtype, np.integer)
    assert tok.decode(ids_T) == text
    assert tok.token_bytes_V[ids_T].sum() == len(text.encode())
    assert tok.bos not in ids_T and tok.eos not in ids_T


def test_bytes_decode_skips_other_ids():
  tok = tokenizers.get('bytes')
  assert tok.decode([tok.bos, 104, 258, 105, 9999, -1, tok.eos]) == 'hi'
  assert tok.decode(np.array([[104, 105]], np.uint16)) == 'hi'
  assert tok.decode([]) == ''
  assert tok.decode([0xE2, 0x82]) == '\ufffd'  # half a character


@pytest.mark.parametrize(
  'token, piece',
  [
    (97, 'a'),
    (32, ' '),
    (10, '\\n'),
    (9, '\\t'),
    (13, '\\r'),
    (0, '<0x00>'),
    (127, '<0x7f>'),
    (0xE9, '<0xe9>'),
    (255, '<0xff>'),
    (256, '<bos>'),
    (257, '<eos>'),
    (258, '<id 258>'),
    (-1, '<id -1>'),
  ],
)
def test_piece(token, piece):
  assert tokenizers.get('bytes').piece(token) == piece


def test_bytes_record():
  tok = tokenizers.get('bytes')
  assert (tok.name, tok.vocab_size, tok.bos, tok.eos) == ('bytes', 258, 256, 257)
  assert tok.token_bytes_V.shape == (tok.vocab_size,)
  assert tok.token_bytes_V[[tok.bos, tok.eos]].tolist() == [0, 0]
  assert len(tok.fingerprint) == 64
  assert tok.fingerprint == tokenizers.get('bytes').fingerprint


def test_unknown_tokenizer_names_raise():
  for name in ('words', 'gpt:2', ''):
    with pytest.raises(fields.ConfigError) as error:
      tokenizers.get(name)
    kinds = 'bytes, train, task, sentencepiece, hf, tiktoken'
    assert str(error.value) == f'--data.tokenizer={name}: one of: {kinds}'
  with pytest.raises(fields.ConfigError, match='bytes takes no argument'):
    tokenizers.get('bytes:x')
