"""Trains a SentencePiece vocabulary on the documents of a store.

Byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) with
byte fallback, split digits and no normalization: decode(encode(x)) is x. The
sample of the text is chosen by hashes, so that the same documents in any order
give the same model.
"""

import heapq
import io
import re
from collections.abc import Iterable, Iterator

from mtp_jax.config import fields
from mtp_jax.data import documents, spool, tokenizers

SAMPLE_BYTES = 16 * 10**6  # of text; about ten seconds of training
CHUNK = 4096  # characters of text that SentencePiece sees as one sentence
SPECIALS = 3 + 256  # unknown, BOS, EOS; bytes


def size_of(name: str) -> int:
  """Parses the SIZE of train:SIZE; raises ConfigError."""
  size = name.partition(':')[2]
  ok = size.isascii() and size.isdigit() and SPECIALS < int(size) < 2**31
  if not ok:
    raise fields.ConfigError(
      'data.tokenizer',
      name,
      f'SIZE of train:SIZE must be an integer above {SPECIALS} (bytes and special tokens)',
    )
  return int(size)


def train(
  name: str, found: Iterable[documents.Document], valid_fraction: float
) -> tokenizers.Tokenizer:
  """Trains the tokenizer train:SIZE on the documents that are not held out.

  Raises:
    ConfigError: no text, or too little or too varied text for SIZE.
  """
  import sentencepiece

  size = size_of(name)
  texts = sample(found, valid_fraction, SAMPLE_BYTES)
  if not texts:
    raise fields.ConfigError('data.tokenizer', name, 'there is no text to train it on')
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_chunks(texts),
      model_writer=model,
      vocab_size=size,
      model_type='bpe',
      byte_fallback=True,
      split_digits=True,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      max_sentence_length=4 * CHUNK,
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise fields.ConfigError('data.tokenizer', name, _problem(str(error))) from error
  return tokenizers.of_files(name, {tokenizers.PIECES: model.getvalue()})


def _problem(message: str) -> str:
  most = re.search(r'value <= (\d+)', message)
  if most:
    return f'the text yields at most {most[1]} tokens'
  least = re.search(r'required_chars\. \d+ vs (\d+)', message)
  if least:
    return f'the characters of the text need at least {least[1]} tokens'
  return f'cannot be trained: {message.splitlines()[0]}'


def sample(found: Iterable[documents.Document], valid_fraction: float, limit: int) -> list[str]:
  """Returns the texts of the training documents with the smallest digests, in that
  order, up to `limit` characters. Needs memory for about twice that."""
  heap, seen, total = [], set(), 0
  for document in found:
    digest = spool.digest(document)
    text = _start(document, limit)
    if not text or digest in seen:
      continue
    if spool.held_out(spool.words(digest)[0], valid_fraction):
      continue
    seen.add(digest)
    heapq.heappush(heap, (-int.from_bytes(digest), digest, text))
    total += len(text)
    while total - len(heap[0][2]) >= limit:  # the last text is not needed
      _, digest, text = heapq.heappop(heap)
      seen.remove(digest)
      total -= len(text)
  return [text for _, _, text in sorted(heap, reverse=True)]


def _start(document: documents.Document, limit: int) -> str:
  """Returns the first `limit` characters of the text."""
  found = ''
  for block in document.blocks():
    if len(found) >= limit:
      break
    found += block
  return found[:limit]


def _chunks(texts: list[str]) -> Iterator[str]:
  """Yields chunks of whole lines, so that newlines are learned as well."""
  for text in texts:
    start = 0
    while start < len(text):
      end = text.rfind('\n', start, start + CHUNK) + 1 or start + CHUNK
      yield text[start:end]
      start = end
