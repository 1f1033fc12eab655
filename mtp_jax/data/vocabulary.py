"""A SentencePiece vocabulary trained on the documents of a store.

Floor 2: standard library, NumPy; sentencepiece inside the function that needs
it. Byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909)
with byte fallback, digits one by one, and nothing normalised: decode(encode(x))
is x. What it sees is decided by hashes, so the same documents in any order give
the same model.
"""

import heapq
import io
import re
from collections.abc import Iterable, Iterator

from mtp_jax.config import fields
from mtp_jax.data import documents, spool, tokenizers

SAMPLE_BYTES = 16 * 10**6  # of text; ten seconds of training
CHUNK = 4096  # characters of text that SentencePiece sees as one sentence
SPECIALS = 3 + 256  # unknown, BOS, EOS; bytes


def size_of(name: str) -> int:
  """train:SIZE -> SIZE, or raises ConfigError."""
  size = name.partition(':')[2]
  ok = size.isascii() and size.isdigit() and SPECIALS < int(size) < 2**31
  if not ok:
    raise fields.ConfigError(
      'data.tokenizer',
      name,
      f'train:SIZE takes a number of tokens above {SPECIALS}, the bytes and special tokens',
    )
  return int(size)


def train(
  name: str, found: Iterable[documents.Document], valid_fraction: float
) -> tokenizers.Tokenizer:
  """The tokenizer train:SIZE of the documents that are not held out.

  Raises:
    ConfigError: no text, or too little or too varied a text for SIZE.
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
    return f'the text gives no more than {most[1]} tokens'
  least = re.search(r'required_chars\. \d+ vs (\d+)', message)
  if least:
    return f'the characters of the text need at least {least[1]} tokens'
  return f'cannot be trained: {message.splitlines()[0]}'


def sample(found: Iterable[documents.Document], valid_fraction: float, limit: int) -> list[str]:
  """Texts of the training documents with the smallest digests, in that order,
  until they have `limit` characters. Holds about twice that at any time."""
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
    while total - len(heap[0][2]) >= limit:  # it can do without the last
      _, digest, text = heapq.heappop(heap)
      seen.remove(digest)
      total -= len(text)
  return [text for _, _, text in sorted(heap, reverse=True)]


def _start(document: documents.Document, limit: int) -> str:
  """At most `limit` characters of its text."""
  found = ''
  for block in document.blocks():
    if len(found) >= limit:
      break
    found += block
  return found[:limit]


def _chunks(texts: list[str]) -> Iterator[str]:
  """Whole lines, some at a time, so that ends of lines are learned as well."""
  for text in texts:
    start = 0
    while start < len(text):
      end = text.rfind('\n', start, start + CHUNK) + 1 or start + CHUNK
      yield text[start:end]
      start = end
