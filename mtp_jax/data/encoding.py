"""Encodes documents to tokens, in this process or in worker processes.

Standard library and NumPy. Documents are sent in batches of a few hundred
thousand bytes to workers that are spawned, not forked (fork would copy
threads); results are yielded in reading order, so that the number of workers
does not change them. A few batches per worker are in flight at any time, which
bounds memory. Letters: M documents, P tokens.
"""

import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import queue
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import connection, resource_tracker
from typing import NamedTuple, cast

import numpy as np

from mtp_jax.config import fields
from mtp_jax.data import chat, documents, splitting, tokenizers, unigram

BATCH_BYTES = 2**18  # of text per batch sent to a worker
UNIGRAM_WHOLE = 2**19  # characters that a unigram model encodes at once; its parts
# depend on each other, so that a single process has to encode them
PART = 2**16  # characters per part: libraries take about 200 bytes for each


class Part(NamedTuple):
  """A part of a document that is too large to be encoded at once."""

  name: str
  text: str
  before: str  # the character before it; '' at the start of a document or loss span
  follows: bool  # whether there is text before it
  begins: bool
  starts_span: bool  # whether a loss span boundary precedes it
  ends: bool


class Encoded(NamedTuple):
  """The tokens of some documents, concatenated: each BOS, its tokens, EOS; a rendered one as
  it is."""

  tokens_P: np.ndarray
  length_M: np.ndarray
  loss_spans: list[tuple[int, ...]]  # as in Document, in tokens instead of characters
  n_bytes: int  # of text
  is_partial: bool = False  # a part of a document, and not its last


DTYPES = '<u2', '<u4'  # of the tokens in a store


def dtype(vocab_size: int) -> str:
  return DTYPES[vocab_size > 2**16]


def encode(
  batch: list[documents.Document] | list[Part] | Encoded, tokenizer: tokenizers.Tokenizer
) -> Encoded:
  """Encodes documents, or one part of a document."""
  if isinstance(batch, Encoded):
    return batch
  part = batch[0]
  if isinstance(part, Part):
    framed = [_frame_part(part, tokenizer)]
    is_partial = not part.ends
  else:
    framed = [_frame(document, tokenizer) for document in batch]
    is_partial = False
  return Encoded(
    np.concatenate([tokens_T for tokens_T, _ in framed]),
    np.array([tokens_T.size for tokens_T, _ in framed], np.int64),
    [loss_spans for _, loss_spans in framed],
    sum(len(document.text.encode()) for document in batch),
    is_partial,
  )


def _frame(document, tokenizer) -> tuple[np.ndarray, tuple[int, ...]]:
  if document.rendered:
    ids_T, loss_spans = chat.encode(document.text, document.loss_spans, tokenizer)
    return _checked(document.name, ids_T, tokenizer, False, False), loss_spans
  if not document.loss_spans:  # most are short, and many
    ids_T = np.asarray(tokenizer.encode(document.text))
    return _checked(document.name, ids_T, tokenizer, True, True), ()
  bounds = [0, *document.loss_spans, len(document.text)]
  parts = []
  for first, last in itertools.pairwise(bounds):
    text = document.text[first:last]
    parts.append(np.asarray((_encode_continuation if first else _encode)(text, tokenizer)))
  loss_spans = len(tokenizer.start) + np.cumsum([ids_T.size for ids_T in parts])[:-1]
  tokens_T = _checked(document.name, np.concatenate(parts), tokenizer, True, True)
  return tokens_T, tuple(loss_spans.tolist())


def _frame_part(part, tokenizer) -> tuple[np.ndarray, tuple[int, ...]]:
  if part.before:  # no token spans the boundary after it
    n = np.asarray(tokenizer.encode(part.before)).size
    ids_T = np.asarray(tokenizer.encode(part.before + part.text))[n:]
  else:
    encode = _encode_continuation if part.follows else _encode
    ids_T = np.asarray(encode(part.text, tokenizer))
  tokens_T = _checked(part.name, ids_T, tokenizer, part.begins, part.ends)
  return tokens_T, (0,) * part.starts_span


def _checked(name, ids_T, tokenizer, begins, ends) -> np.ndarray:
  """Returns the ids as they are stored, with BOS and EOS where a document starts or ends (no
  BOS if the tokenizer states that it has none)."""
  if ids_T.size and not 0 <= ids_T.min() <= ids_T.max() < tokenizer.vocab_size:
    raise fields.ConfigError(  # the cast would wrap around silently
      'data.tokenizer',
      tokenizer.name,
      f'returned ids from {ids_T.min()} to {ids_T.max()} in {name}, its'
      f' vocab_size is {tokenizer.vocab_size}',
    )
  n = len(tokenizer.start) if begins else 0
  tokens_T = np.empty(n + ids_T.size + ends, dtype(tokenizer.vocab_size))
  tokens_T[:n] = tokenizer.start[:n]
  tokens_T[n : n + ids_T.size] = ids_T
  if ends:
    tokens_T[-1] = tokenizer.eos
  return tokens_T


def _encode(text: str, tokenizer):
  return tokenizer.encode(text)


def _encode_continuation(text: str, tokenizer):
  """Returns the ids of a text that follows another one: without the space that
  many models prepend to their input."""
  before, n = _head(text, tokenizer)
  return np.asarray(tokenizer.encode(before + text))[n:]


def _head(text: str, tokenizer) -> tuple[str, int]:
  """Returns (a prefix for a text that follows another one, its number of tokens)."""
  if tokenizer.token_bytes_V[tokenizer.encode('a')].sum() == 1:
    return '', 0
  for before in ('\n', '\ue000'):  # neither merges with what follows
    head_T = np.asarray(tokenizer.encode(before))
    both_T = np.asarray(tokenizer.encode(before + text))
    if head_T.size and np.array_equal(both_T[: head_T.size], head_T):
      return before, head_T.size
  return '', 0


def run(
  found: Iterable[documents.Document], tokenizer: tokenizers.Tokenizer, workers: int
) -> Iterator[Encoded]:
  """Encodes documents batch by batch, in order; large ones in parts, where this
  is known to give the same tokens."""
  _release_freed_memory()
  batches = _batches(found, tokenizer)
  here = functools.partial(encode, tokenizer=tokenizer)
  if workers == 1 or not tokenizer.files:  # the bytes tokenizer is cheap
    yield from map(here, batches)
    return
  first = list(itertools.islice(batches, workers))
  if len(first) < 2:  # not worth starting a worker
    yield from map(here, first)
    return
  batches = itertools.chain(first, batches)
  yield from _in_processes(batches, tokenizer, workers, len(first))


M_MMAP_THRESHOLD, SMALL = -3, 2**17  # of glibc's malloc.h; bytes


def _release_freed_memory() -> None:
  """Makes malloc return large blocks to the system once they are freed. By
  default glibc raises this threshold with each block freed, and retains more
  memory the longer a document is."""
  with contextlib.suppress(AttributeError, OSError):  # another C library
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALL)


def _batches(found, tokenizer) -> Iterator[list[documents.Document] | list[Part] | Encoded]:
  is_safe = functools.cache(lambda: splitting.rule(tokenizer))
  encoder = functools.cache(lambda: unigram.of(tokenizer))
  batch, size = [], 0
  for document in found:
    if document.read or (len(document.text) > PART and not document.rendered):
      if safe := is_safe():
        if batch:
          yield batch
          batch, size = [], 0
        yield from ([part] for part in _parts(document, safe))
        del document  # or two large ones would be live
        continue
      if (document.read or len(document.text) > UNIGRAM_WHOLE) and encoder():
        if batch:
          yield batch
          batch, size = [], 0
        yield from _encode_sequentially(document, encoder(), tokenizer)
        del document
        continue
      document = document._replace(text=''.join(document.blocks()), read=None)
    batch.append(document)
    size += len(document.text)
    if size >= BATCH_BYTES:
      yield batch
      batch, size = [], 0
    del document
  if batch:
    yield batch


def _parts(document, is_safe: splitting.SafeSplit) -> Iterator[Part]:
  """Yields the parts of a document, split at loss spans and at safe places."""
  part = None
  end = sys.maxsize if document.read else len(document.text)
  for first, last in itertools.pairwise([0, *document.loss_spans, end]):
    blocks = _between(document, first, last)
    before = ''
    for text in splitting.pieces(blocks, is_safe, PART):
      if part:
        yield part
      at_start = not before
      part = Part(
        document.name, text, before, first > 0, part is None, at_start and part is not None, False
      )
      before = text[-1:]
  assert part
  yield part._replace(ends=True)


def _encode_sequentially(document, encoder, tokenizer) -> Iterator[Encoded]:
  """Encodes a large document part by part, each with the score so far."""
  score = None
  for part in _parts(document, encoder.is_safe):
    begins = not part.before
    before, n = '', 0
    if begins and part.follows:
      before, n = _head(part.text, tokenizer)
    ids_T, score = encoder.encode(before + part.text, None if begins else score)
    tokens_T = _checked(part.name, ids_T[n:], tokenizer, part.begins, part.ends)
    yield Encoded(
      tokens_T,
      np.array([tokens_T.size], np.int64),
      [(0,) * part.starts_span],
      len(part.text.encode()),
      not part.ends,
    )


def _between(document, first: int, last: int) -> Iterator[str]:
  """Yields the text from character `first` to `last`, in parts."""
  if not document.read:
    for start in range(first, last, PART):
      yield document.text[start : min(start + PART, last)]
    return
  at = 0
  for block in document.blocks():
    yield block[max(first - at, 0) : max(last - at, 0)]
    at += len(block)
    if at >= last:
      return


def _in_processes(batches, tokenizer, workers, n) -> Iterator[Encoded]:
  """Encodes in worker processes with one pipe each, which closes when its worker
  dies. With a shared queue (concurrent.futures), a worker killed in the middle
  of a result would make this process wait forever."""
  started, done, turn = [], {}, 0

  def in_order():
    nonlocal turn
    while turn in done:
      result = done.pop(turn)
      if isinstance(result, Exception):
        raise result  # the first in order, whichever arrived first
      yield result
      turn += 1

  try:
    started += (_started(tokenizer) for _ in range(n))
    in_flight = {pipe: [] for _, pipe in started}
    free = [*in_flight, *in_flight]  # one batch to encode, one queued
    for number, batch in enumerate(batches):
      if isinstance(batch, Encoded):
        done[number] = batch
        while len(done) > 2 * workers and turn not in done:
          free += _received(in_flight, done, turn, workers)
        yield from in_order()
        continue
      if not free:
        free += _received(in_flight, done, turn, workers)
      pipe = free.pop(0)
      with _detect_killed_worker(workers):
        pipe.send(batch)
      in_flight[pipe].append(number)
      yield from in_order()
    while any(in_flight.values()):
      _received(in_flight, done, turn, workers)
      yield from in_order()
  finally:
    for process, pipe in started:
      pipe.close()
      process.terminate()
    for process, _ in started:
      process.join()


@contextlib.contextmanager
def _detect_killed_worker(workers: int):
  try:
    yield
  except (EOFError, OSError) as error:
    raise fields.ConfigError(
      'data.workers',
      workers,
      'a worker process was killed, perhaps out of memory; fewer workers need less',
    ) from error


def _received(in_flight: dict, done: dict, turn: int, workers: int) -> list:
  """Receives results into `done`, by batch number, and returns the pipes that they
  came from. If too many are done out of order, waits for the next one only."""
  pipes = [pipe for pipe, numbers in in_flight.items() if numbers]
  if len(done) >= 2 * workers:
    pipes = [pipe for pipe in pipes if turn in in_flight[pipe]]
  ready = cast(list[connection.Connection], connection.wait(pipes))
  for pipe in ready:
    with _detect_killed_worker(workers):
      done[in_flight[pipe].pop(0)] = pipe.recv()
  return ready


def _started(tokenizer: tokenizers.Tokenizer):
  """Returns (a worker that encodes the batches of a pipe, our end of the pipe)."""
  context = multiprocessing.get_context('spawn')
  ours, theirs = context.Pipe()
  process = context.Process(
    target=_work, args=(theirs, tokenizer.name, tokenizer.files), daemon=True
  )
  # The worker inherits the mask and never sees Ctrl-C; this process ends it. The
  # resource tracker, started with the first worker, would unblock the signal.
  resource_tracker.ensure_running()
  old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    process.start()
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, old)
    theirs.close()  # so that only the worker holds it
  return process, ours


def _work(pipe, name: str, files: tokenizers.Files) -> None:
  """Encodes batches until the pipe closes, also when the parent was killed. A
  thread receives at once, so that both ends never block on writing."""
  batches = queue.SimpleQueue()

  def receive():
    with contextlib.suppress(EOFError, OSError):
      while True:
        batches.put(pipe.recv())
    batches.put(None)

  _release_freed_memory()
  threading.Thread(target=receive, daemon=True).start()
  tokenizer = tokenizers.of_files(name, files)
  with contextlib.suppress(OSError):
    while (batch := batches.get()) is not None:
      try:
        result = encode(batch, tokenizer)
      except Exception as error:  # noqa: BLE001 the parent raises it
        result = error
      pipe.send(result)
