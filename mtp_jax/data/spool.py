"""The spool: documents encoded once, in reading order, into one file.

Floor 2: standard library and NumPy. What a document is worth to the store stays
in memory (hash, tokens, bytes); its tokens go to disk. Letters: M documents.
"""

import array
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mtp_jax.data import documents, encoding, tokenizers

Progress = Callable[[int, int, int], None]  # documents, tokens, bytes so far


class Spool(NamedTuple):
  """All documents in reading order: tokens in a file, the rest here."""

  path: pathlib.Path
  dtype: str
  digest_M4: np.ndarray  # `digest` as four uint64
  length_M: np.ndarray  # tokens
  bytes_M: np.ndarray  # UTF-8 bytes of the text
  cuts: list[tuple[int, ...]]  # as in Document, but in tokens; a document each
  duplicates: int
  empty: int


def digest(document: documents.Document) -> bytes:
  """sha256 of the text and of what is scored of it: the document's identity.
  One that is drawn has its name's as well, but for the last word, so that equal
  ones are of the same split."""
  return _digest(document)[0]


def _digest(document: documents.Document) -> tuple[bytes, int]:
  """(digest, bytes of the text)."""
  if document.read or len(document.text) > documents.BLOCK:
    sha256, n_bytes = hashlib.sha256(), 0
    for block in document.blocks():
      data = block.encode()
      n_bytes += len(data)
      sha256.update(data)
  else:  # most are short, and many
    data = document.text.encode()
    sha256, n_bytes = hashlib.sha256(data), len(data)
  if document.cuts:  # after a byte that UTF-8 does not have
    sha256.update(b'\xff' + repr(document.cuts).encode())
  found = sha256.digest()
  if document.drawn:
    named = hashlib.sha256(found + document.name.encode()).digest()
    return named[:24] + found[24:], n_bytes
  return found, n_bytes


def held_out(digest_M4: np.ndarray, fraction: float) -> np.ndarray:
  """Which documents are of the valid split: the last word of the digest says.
  The order of the store does not depend on it."""
  return digest_M4[..., 3] < np.uint64(int(fraction * 2**64))


def words(digests: bytes) -> np.ndarray:
  """Digests one after another -> (M, 4) uint64."""
  return np.frombuffer(digests, '>u8').reshape(-1, 4)


def fill(
  path: pathlib.Path,
  found: Iterable[documents.Document],
  tokenizer: tokenizers.Tokenizer,
  progress: Progress | None = None,
  workers: int = 1,
) -> Spool:
  """Writes the tokens of every new document to path."""
  digests, sizes, lengths = bytearray(), array.array('q'), array.array('q')
  cuts, left_out = [], dict(duplicates=0, empty=0)
  n_tokens = n_bytes = 0
  new = _new(found, digests, sizes, left_out)
  begun, begun_cuts = 0, ()  # tokens and cuts of a document that goes on
  with open(path, 'wb', buffering=2**20) as file:
    for batch in encoding.run(new, tokenizer, workers):
      file.write(batch.tokens_P)
      length_M, batch_cuts = batch.length_M.tolist(), batch.cuts
      if begun:
        batch_cuts = [begun_cuts + tuple(begun + at for at in batch_cuts[0])]
        length_M = [begun + length_M[0]]
      if batch.goes_on:
        (begun,), (begun_cuts,) = length_M, batch_cuts
      else:
        begun, begun_cuts = 0, ()
        lengths.extend(length_M)
        cuts += batch_cuts
      n_tokens += batch.tokens_P.size
      n_bytes += batch.n_bytes
      if progress:
        progress(len(lengths), n_tokens, n_bytes)
  length_M, bytes_M = (np.array(x, np.int64) for x in (lengths, sizes))
  return Spool(
    path, encoding.dtype(tokenizer.vocab_size), words(digests), length_M, bytes_M, cuts, **left_out
  )


def _new(found, digests, sizes, left_out) -> Iterator[documents.Document]:
  """Documents with a text that was not there yet; notes what it passes on."""
  seen = set()
  for document in found:
    key, n_bytes = _digest(document)
    if not n_bytes or key in seen:
      left_out['duplicates' if n_bytes else 'empty'] += 1
      continue
    seen.add(key)
    digests += key
    sizes.append(n_bytes)
    yield document
    del document  # or two large ones would be held
