"""The spool: documents encoded once, in reading order, into one file.

Standard library and NumPy. The metadata of a document (hash, tokens, bytes) is
kept in memory, its tokens on disk. Letters: M documents.
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
  """All documents in reading order: tokens in a file, metadata in memory."""

  path: pathlib.Path
  dtype: str
  digest_M4: np.ndarray  # `digest` as four uint64
  length_M: np.ndarray  # tokens
  bytes_M: np.ndarray  # UTF-8 bytes of the text
  loss_spans: list[tuple[int, ...]]  # per document, as in Document, but in tokens
  duplicates: int
  empty: int


def digest(document: documents.Document) -> bytes:
  """Returns the sha256 of the text and its loss spans, the document's identity.
  For a drawn document it depends on the name as well, except for the last word,
  so that equal texts belong to the same split."""
  return _digest(document)[0]


def _digest(document: documents.Document) -> tuple[bytes, int]:
  """Returns (digest, bytes of the text)."""
  if document.read or len(document.text) > documents.BLOCK:
    sha256, n_bytes = hashlib.sha256(), 0
    for block in document.blocks():
      data = block.encode()
      n_bytes += len(data)
      sha256.update(data)
  else:  # most are short, and many
    data = document.text.encode()
    sha256, n_bytes = hashlib.sha256(data), len(data)
  if document.loss_spans:  # after a byte that is not in UTF-8
    sha256.update(b'\xff' + repr(document.loss_spans).encode())
  if document.rendered:
    sha256.update(b'\xfe')
  found = sha256.digest()
  if document.drawn:
    named = hashlib.sha256(found + document.name.encode()).digest()
    return named[:24] + found[24:], n_bytes
  return found, n_bytes


def held_out(digest_M4: np.ndarray, fraction: float) -> np.ndarray:
  """Returns which documents are in the validation split, by the last word of the
  digest, on which the order of the store does not depend."""
  return digest_M4[..., 3] < np.uint64(int(fraction * 2**64))


def words(digests: bytes | bytearray) -> np.ndarray:
  """Converts concatenated digests to (M, 4) uint64."""
  return np.frombuffer(digests, '>u8').reshape(-1, 4)


def fill(
  path: pathlib.Path,
  found: Iterable[documents.Document],
  tokenizer: tokenizers.Tokenizer,
  progress: Progress | None = None,
  workers: int = 1,
) -> Spool:
  """Encodes every new document, and writes the tokens to path."""
  digests, sizes, lengths = bytearray(), array.array('q'), array.array('q')
  loss_spans, skipped = [], dict(duplicates=0, empty=0)
  n_tokens = n_bytes = 0
  new = _new(found, digests, sizes, skipped)
  begun, begun_spans = 0, ()  # tokens and loss spans of a partial document
  with open(path, 'wb', buffering=2**20) as file:
    for batch in encoding.run(new, tokenizer, workers):
      file.write(batch.tokens_P.data)
      length_M, batch_spans = batch.length_M.tolist(), batch.loss_spans
      if begun:
        batch_spans = [begun_spans + tuple(begun + at for at in batch_spans[0])]
        length_M = [begun + length_M[0]]
      if batch.is_partial:
        (begun,), (begun_spans,) = length_M, batch_spans
      else:
        begun, begun_spans = 0, ()
        lengths.extend(length_M)
        loss_spans += batch_spans
      n_tokens += batch.tokens_P.size
      n_bytes += batch.n_bytes
      if progress:
        progress(len(lengths), n_tokens, n_bytes)
  length_M, bytes_M = (np.array(x, np.int64) for x in (lengths, sizes))
  return Spool(
    path,
    encoding.dtype(tokenizer.vocab_size),
    words(digests),
    length_M,
    bytes_M,
    loss_spans,
    **skipped,
  )


def _new(found, digests, sizes, skipped) -> Iterator[documents.Document]:
  """Yields documents with a new text; records their digests and sizes."""
  seen = set()
  for document in found:
    key, n_bytes = _digest(document)
    if not n_bytes or key in seen:
      skipped['duplicates' if n_bytes else 'empty'] += 1
      continue
    seen.add(key)
    digests += key
    sizes.append(n_bytes)
    yield document
    del document  # or two large ones would be live
