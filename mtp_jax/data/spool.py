"""The spool: documents encoded once, in reading order, into one file.

Floor 2: standard library and NumPy. What a document is worth to the store stays
in memory (hash, tokens, bytes); its tokens go to disk. Letters: M documents.
"""

import array
import hashlib
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from mtp_jax.data import tokenizers

PROGRESS_TOKENS = 2**20  # between two reports
Progress = Callable[[int, int, int], None]  # documents, tokens, bytes so far


class Spool(NamedTuple):
  """All documents in reading order: tokens in a file, the rest here."""

  path: pathlib.Path
  dtype: str
  digest_M4: np.ndarray  # sha256 of the text as four uint64
  length_M: np.ndarray  # tokens
  bytes_M: np.ndarray  # UTF-8 bytes of the text
  duplicates: int
  empty: int


def fill(
  path: pathlib.Path,
  documents: Iterable,
  tokenizer: tokenizers.Tokenizer,
  progress: Progress | None = None,
) -> Spool:
  """Writes the tokens of every new text to path."""
  token_dtype = _dtype(tokenizer.vocab_size)
  seen, digests = set(), bytearray()
  lengths, sizes = array.array('q'), array.array('q')
  duplicates = empty = n_tokens = n_bytes = reported = 0
  with open(path, 'wb', buffering=2**20) as file:
    for document in documents:
      data = document.text.encode()
      digest = hashlib.sha256(data).digest()
      if not data or digest in seen:
        empty, duplicates = empty + (not data), duplicates + bool(data)
        continue
      tokens_T = _frame(document.text, tokenizer, token_dtype)
      file.write(tokens_T)
      seen.add(digest)
      digests += digest
      lengths.append(tokens_T.size)
      sizes.append(len(data))
      n_tokens, n_bytes = n_tokens + tokens_T.size, n_bytes + len(data)
      if progress and n_tokens >= reported + PROGRESS_TOKENS:
        reported = n_tokens
        progress(len(seen), n_tokens, n_bytes)
  if progress:
    progress(len(seen), n_tokens, n_bytes)
  digest_M4 = np.frombuffer(digests, '>u8').reshape(-1, 4)
  length_M, bytes_M = (np.array(x, np.int64) for x in (lengths, sizes))
  return Spool(
    path, token_dtype, digest_M4, length_M, bytes_M, duplicates, empty
  )


def _dtype(vocab_size: int) -> str:
  return '<u2' if vocab_size <= 2**16 else '<u4'


def _frame(text: str, tokenizer, token_dtype: str) -> np.ndarray:
  ids_T = np.asarray(tokenizer.encode(text))
  if ids_T.size and not 0 <= ids_T.min() <= ids_T.max() < tokenizer.vocab_size:
    raise ValueError(  # it would wrap around in silence
      f'tokenizer {tokenizer.name} gave an id from {ids_T.min()} to'
      f' {ids_T.max()}, its vocab_size is {tokenizer.vocab_size}'
    )
  tokens_T = np.empty(ids_T.size + 2, token_dtype)
  tokens_T[0], tokens_T[-1] = tokenizer.bos, tokenizer.eos
  tokens_T[1:-1] = ids_T
  return tokens_T
