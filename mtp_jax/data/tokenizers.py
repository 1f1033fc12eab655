"""Tokenizers: text to ids and back, one record of pure functions each.

Floor 2: standard library and NumPy. What else one needs is imported inside its
reader.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mtp_jax import config


class Tokenizer(NamedTuple):
  """encode adds no BOS or EOS; decode leaves them and unknown ids out."""

  name: str
  vocab_size: int
  bos: int
  eos: int
  encode: Callable[[str], np.ndarray]
  decode: Callable[..., str]
  piece: Callable[[int], str]  # one token, printable
  token_bytes_V: np.ndarray  # UTF-8 bytes a token stands for; specials 0
  fingerprint: str  # sha256 of what defines the ids


BYTES_BOS, BYTES_EOS, BYTES_VOCAB = 256, 257, 258
ESCAPES = {'\n': '\\n', '\r': '\\r', '\t': '\\t'}


def _encode_bytes(text: str) -> np.ndarray:
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def _decode_bytes(ids) -> str:
  ids_T = np.asarray(ids, np.int64).reshape(-1)
  known_T = ids_T[(ids_T >= 0) & (ids_T < BYTES_BOS)]
  return known_T.astype(np.uint8).tobytes().decode(errors='replace')


def _byte_piece(token: int) -> str:
  if token in (BYTES_BOS, BYTES_EOS):
    return '<bos>' if token == BYTES_BOS else '<eos>'
  if not 0 <= token < BYTES_VOCAB:
    return f'<id {token}>'
  char = chr(token)
  # Above 127 a byte is a part of a character, not the Latin-1 letter.
  printable = token < 128 and char.isprintable()
  return char if printable else ESCAPES.get(char, f'<0x{token:02x}>')


def _bytes(arg: str) -> Tokenizer:
  if arg:
    raise config.ConfigError(
      'data.tokenizer', f'bytes:{arg}', 'bytes takes nothing after it'
    )
  definition = b'id = byte; BOS 256; EOS 257'
  return Tokenizer(
    name='bytes',
    vocab_size=BYTES_VOCAB,
    bos=BYTES_BOS,
    eos=BYTES_EOS,
    encode=_encode_bytes,
    decode=_decode_bytes,
    piece=_byte_piece,
    token_bytes_V=(np.arange(BYTES_VOCAB) < BYTES_BOS).astype(np.int64),
    fingerprint=hashlib.sha256(definition).hexdigest(),
  )


# What stands before ':' -> reader of what stands after it.
READERS: dict[str, Callable[[str], Tokenizer]] = {
  'bytes': _bytes,
}


def get(name: str) -> Tokenizer:
  """The tokenizer called KIND or KIND:ARG; ConfigError if there is none."""
  kind, _, arg = name.partition(':')
  if kind not in READERS:
    raise config.ConfigError(
      'data.tokenizer', name, f'one of: {", ".join(READERS)}'
    )
  return READERS[kind](arg)
