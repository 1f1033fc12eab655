"""Documents to tokens, in this process or in several at once.

Floor 2: standard library and NumPy. Documents go in batches of some hundred
thousand bytes to processes that were spawned, not forked (which would copy
threads); what comes back is in the order of reading, so the number of processes
changes nothing. A few batches a process are under way at any time, hence memory
is bounded. Letters: M documents, P tokens.
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
from typing import NamedTuple

import numpy as np

from mtp_jax.config import fields
from mtp_jax.data import documents, splitting, tokenizers, unigram

BATCH_BYTES = 2**18  # of text that goes to a process at once
UNIGRAM_WHOLE = 2**19  # characters that such a model encodes at once; its parts
# depend on each other, so that one process has to encode them all
PART = 2**16  # characters of it, since libraries take some 200 bytes for each


class Part(NamedTuple):
  """Some of the text of a document that is too large to be encoded at once."""

  name: str
  text: str
  before: str  # the character before it; '' at a beginning or a cut
  follows: bool  # whether there is text before it
  begins: bool
  is_cut: bool  # whether there is a cut before it
  ends: bool


class Encoded(NamedTuple):
  """Some documents, each BOS, its tokens, EOS, one after another."""

  tokens_P: np.ndarray
  length_M: np.ndarray
  cuts: list[tuple[int, ...]]  # as in Document, but in tokens of the document
  n_bytes: int  # of text
  goes_on: bool = False  # it is one part of a document, and not the last


DTYPES = '<u2', '<u4'  # of tokens in a store


def dtype(vocab_size: int) -> str:
  return DTYPES[vocab_size > 2**16]


def encode(
  batch: list[documents.Document] | list[Part] | Encoded, tokenizer: tokenizers.Tokenizer
) -> Encoded:
  """Encodes documents, or one part of one."""
  if isinstance(batch, Encoded):
    return batch
  if isinstance(batch[0], Part):
    (part,) = batch
    framed = [_frame_part(part, tokenizer)]
    goes_on = not part.ends
  else:
    framed = [_frame(document, tokenizer) for document in batch]
    goes_on = False
  return Encoded(
    np.concatenate([tokens_T for tokens_T, _ in framed]),
    np.array([tokens_T.size for tokens_T, _ in framed], np.int64),
    [cuts for _, cuts in framed],
    sum(len(document.text.encode()) for document in batch),
    goes_on,
  )


def _frame(document, tokenizer) -> tuple[np.ndarray, tuple[int, ...]]:
  if not document.cuts:  # most are short, and many
    ids_T = np.asarray(tokenizer.encode(document.text))
    return _checked(document.name, ids_T, tokenizer, 1, 1), ()
  bounds = [0, *document.cuts, len(document.text)]
  parts = []
  for first, last in itertools.pairwise(bounds):
    text = document.text[first:last]
    parts.append(np.asarray((_after_cut if first else _encode)(text, tokenizer)))
  cuts = 1 + np.cumsum([ids_T.size for ids_T in parts])[:-1]
  tokens_T = _checked(document.name, np.concatenate(parts), tokenizer, 1, 1)
  return tokens_T, tuple(cuts.tolist())


def _frame_part(part, tokenizer) -> tuple[np.ndarray, tuple[int, ...]]:
  if part.before:  # no token reaches over the place after it
    n = np.asarray(tokenizer.encode(part.before)).size
    ids_T = np.asarray(tokenizer.encode(part.before + part.text))[n:]
  else:
    encode = _after_cut if part.follows else _encode
    ids_T = np.asarray(encode(part.text, tokenizer))
  tokens_T = _checked(part.name, ids_T, tokenizer, part.begins, part.ends)
  return tokens_T, (0,) * part.is_cut


def _checked(name, ids_T, tokenizer, begins, ends) -> np.ndarray:
  """The ids as they are stored, framed where a document begins or ends."""
  if ids_T.size and not 0 <= ids_T.min() <= ids_T.max() < tokenizer.vocab_size:
    raise fields.ConfigError(  # it would wrap around in silence
      'data.tokenizer',
      tokenizer.name,
      f'gave an id from {ids_T.min()} to {ids_T.max()} in {name}, its'
      f' vocab_size is {tokenizer.vocab_size}',
    )
  tokens_T = np.empty(begins + ids_T.size + ends, dtype(tokenizer.vocab_size))
  tokens_T[begins : begins + ids_T.size] = ids_T
  if begins:
    tokens_T[0] = tokenizer.bos
  if ends:
    tokens_T[-1] = tokenizer.eos
  return tokens_T


def _encode(text: str, tokenizer):
  return tokenizer.encode(text)


def _after_cut(text: str, tokenizer):
  """Ids of a text that stands after another: without the space that many
  models put before what they are given."""
  before, n = _head(text, tokenizer)
  return np.asarray(tokenizer.encode(before + text))[n:]


def _head(text: str, tokenizer) -> tuple[str, int]:
  """(what is put before a text that stands after another, its tokens)."""
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
  """Encodes documents batch by batch, in their order; a large one in parts,
  where it is known that this gives the same tokens."""
  _gives_back()
  batches = _batches(found, tokenizer)
  here = functools.partial(encode, tokenizer=tokenizer)
  if workers == 1 or not tokenizer.files:  # a byte is its own id
    yield from map(here, batches)
    return
  first = list(itertools.islice(batches, workers))
  if len(first) < 2:  # not worth the start of a process
    yield from map(here, first)
    return
  batches = itertools.chain(first, batches)
  yield from _in_processes(batches, tokenizer, workers, len(first))


M_MMAP_THRESHOLD, SMALL = -3, 2**17  # of glibc's malloc.h; bytes


def _gives_back() -> None:
  """Has this process give large blocks back to the system once they are free.
  glibc raises the size from which it does with each that is freed, and then
  keeps the more the longer a document is."""
  with contextlib.suppress(AttributeError, OSError):  # another C library
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALL)


def _batches(found, tokenizer) -> Iterator[list[documents.Document] | list[Part]]:
  is_safe = functools.cache(lambda: splitting.rule(tokenizer))
  encoder = functools.cache(lambda: unigram.of(tokenizer))
  batch, size = [], 0
  for document in found:
    if document.read or len(document.text) > PART:
      if is_safe():
        if batch:
          yield batch
          batch, size = [], 0
        yield from ([part] for part in _parts(document, is_safe()))
        del document  # or two large ones would be held
        continue
      if (document.read or len(document.text) > UNIGRAM_WHOLE) and encoder():
        if batch:
          yield batch
          batch, size = [], 0
        yield from _in_turn(document, encoder(), tokenizer)
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
  """The parts of a document: of what is between two cuts, of safe size."""
  part = None
  end = sys.maxsize if document.read else len(document.text)
  for first, last in itertools.pairwise([0, *document.cuts, end]):
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
  yield part._replace(ends=True)


def _in_turn(document, encoder, tokenizer) -> Iterator[Encoded]:
  """A large document, encoded part by part, each after what it begins with."""
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
      [(0,) * part.is_cut],
      len(part.text.encode()),
      not part.ends,
    )


def _between(document, first: int, last: int) -> Iterator[str]:
  """The text from one character to another, in parts."""
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
  """Each process at a pipe of its own, which ends where the process does: of a
  queue that several write to (concurrent.futures), half a result of one that
  was killed would be waited for in all eternity."""
  started, done, turn = [], {}, 0

  def in_turn():
    nonlocal turn
    while turn in done:
      result = done.pop(turn)
      if isinstance(result, Exception):
        raise result  # in its turn, whichever came first
      yield result
      turn += 1

  try:
    started += (_started(tokenizer) for _ in range(n))
    under_way = {pipe: [] for _, pipe in started}
    free = [*under_way, *under_way]  # one batch to encode, one to go on with
    for number, batch in enumerate(batches):
      if isinstance(batch, Encoded):
        done[number] = batch
        while len(done) > 2 * workers and turn not in done:
          free += _received(under_way, done, turn, workers)
        yield from in_turn()
        continue
      if not free:
        free += _received(under_way, done, turn, workers)
      pipe = free.pop(0)
      with _said_if_killed(workers):
        pipe.send(batch)
      under_way[pipe].append(number)
      yield from in_turn()
    while any(under_way.values()):
      _received(under_way, done, turn, workers)
      yield from in_turn()
  finally:
    for process, pipe in started:
      pipe.close()
      process.terminate()
    for process, _ in started:
      process.join()


@contextlib.contextmanager
def _said_if_killed(workers: int):
  try:
    yield
  except (EOFError, OSError) as error:
    raise fields.ConfigError(
      'data.workers',
      workers,
      'a process that encodes was killed, perhaps for want of memory; fewer of them need less',
    ) from error


def _received(under_way: dict, done: dict, turn: int, workers: int) -> list:
  """Puts results into `done`, by the numbers of their batches; the pipes that
  they came from. Where too many are done before their turn, the next alone."""
  pipes = [pipe for pipe, numbers in under_way.items() if numbers]
  if len(done) >= 2 * workers:
    pipes = [pipe for pipe in pipes if turn in under_way[pipe]]
  ready = connection.wait(pipes)
  for pipe in ready:
    with _said_if_killed(workers):
      done[under_way[pipe].pop(0)] = pipe.recv()
  return ready


def _started(tokenizer: tokenizers.Tokenizer):
  """(a process that encodes what comes through a pipe, our end of it)."""
  context = multiprocessing.get_context('spawn')
  ours, theirs = context.Pipe()
  process = context.Process(
    target=_work, args=(theirs, tokenizer.name, tokenizer.files), daemon=True
  )
  # One that is started now never sees Ctrl-C; this one will end it. The tracker
  # that starts with the first process would let it through again.
  resource_tracker.ensure_running()
  old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    process.start()
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, old)
    theirs.close()  # the only other end is the process's
  return process, ours


def _work(pipe, name: str, files: tokenizers.Files) -> None:
  """Ends with its pipe, as when the parent was killed. What comes is taken at
  once: neither end waits for the other to read while it writes."""
  batches = queue.SimpleQueue()

  def receive():
    with contextlib.suppress(EOFError, OSError):
      while True:
        batches.put(pipe.recv())
    batches.put(None)

  _gives_back()
  threading.Thread(target=receive, daemon=True).start()
  tokenizer = tokenizers.of_files(name, files)
  with contextlib.suppress(OSError):
    while (batch := batches.get()) is not None:
      try:
        result = encode(batch, tokenizer)
      except Exception as error:  # noqa: BLE001 it is the parent's to raise
        result = error
      pipe.send(result)
