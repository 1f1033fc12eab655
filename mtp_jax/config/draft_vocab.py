"""The draft vocabulary of --heads.draft_vocab: the tokens that heads >= 2 score.

Their unembedding is that of these tokens alone (Zhao et al. 2025,
https://arxiv.org/abs/2502.14856). Decoding stays exact: head 1 verifies with all tokens.
A run records the ids within the flag's value, SIZE:BITS, so that whatever reads its config
has them: zlib-compressed bits of the vocabulary in base64, at most 1.4 V / 8 characters.
"""

import base64
import binascii
import functools
import zlib

import numpy as np

from mtp_jax.config import fields, schema

FLAG = 'heads.draft_vocab'


def of(cfg: schema.Config) -> np.ndarray | None:
  """Returns the ids, ascending int32; None where heads >= 2 score all tokens. Of a size that
  no store has made ids of yet, as in a plan, the first ones."""
  return parse(cfg.heads.draft_vocab, cfg.model.vocab_size)


def check(cfg: schema.Config) -> None:
  """Raises ConfigError unless the flag's value is of this model."""
  if of(cfg) is not None and cfg.heads.unembedding == 'replicated':
    raise fields.ConfigError(
      FLAG,
      cfg.heads.draft_vocab.partition(':')[0],
      'with --heads.unembedding=replicated each head has an unembedding of all tokens; use'
      ' shared or tied',
    )


def size(cfg: schema.Config) -> int:
  """Returns the number of tokens that heads >= 2 score."""
  ids_X = of(cfg)
  return cfg.model.vocab_size if ids_X is None else len(ids_X)


def check_ids(cfg: schema.Config) -> None:
  """Raises ConfigError for a size without ids, which only a store could give."""
  text = cfg.heads.draft_vocab
  if text and ':' not in text:
    raise fields.ConfigError(
      FLAG, text, 'a size is of `mtp train`, which counts tokens; use draft_vocab(ids, vocab_size)'
    )


def recorded(ids_X, vocab_size: int) -> str:
  """Returns the value of --heads.draft_vocab, of HeadsConfig(draft_vocab=…), that holds these
  ids; vocab_size: that of the model."""
  bits_V = np.zeros(vocab_size, bool)
  bits_V[np.asarray(ids_X)] = True
  packed = zlib.compress(np.packbits(bits_V).tobytes(), 9)
  return f'{bits_V.sum()}:{base64.b64encode(packed).decode()}'


def shown(text: object) -> str:
  """Returns a value for a message: the size, and what tells sets of ids apart."""
  number, _, bits = str(text).partition(':')
  return f'{number} (ids {zlib.crc32(bits.encode()):08x})' if bits else number


@functools.lru_cache(maxsize=16)
def parse(text: str, vocab_size: int) -> np.ndarray | None:
  """Returns the ids of a flag's value; raises ConfigError."""
  if not text:
    return None
  number, _, bits = text.partition(':')
  is_number = number.isascii() and number.isdigit() and len(number) < 10
  n = int(number) if is_number else 0
  if not 1 <= n <= vocab_size:
    raise fields.ConfigError(
      FLAG, number, f'must be a number of tokens from 1 to --model.vocab_size={vocab_size}'
    )
  ids_X = np.arange(n, dtype=np.int32)
  if bits:
    ids_X = _ids(bits, vocab_size)
  if len(ids_X) != n:
    raise fields.ConfigError(FLAG, f'{number}:…', f'the ids after the colon are not {n} tokens')
  ids_X.flags.writeable = False
  return ids_X


def _ids(bits: str, vocab_size: int) -> np.ndarray:
  try:
    packed = zlib.decompress(base64.b64decode(bits, validate=True))
    bits_V = np.unpackbits(np.frombuffer(packed, np.uint8))
  except (binascii.Error, zlib.error, ValueError):
    bits_V = np.zeros(0, np.uint8)
  if len(bits_V) != -(-vocab_size // 8) * 8:
    return np.zeros(0, np.int32)
  return np.flatnonzero(bits_V[:vocab_size]).astype(np.int32)
