"""Document readers: a list of sources becomes a stream of texts.

Standard library; pyarrow is imported in the functions that need it. The order
is deterministic (sorted by name), texts are read one at a time, large files in
blocks. Symbolic links below a directory are not followed. A byte order mark at
the start of a file is dropped.
"""

import codecs
import collections
import functools
import importlib.machinery
import importlib.util
import itertools
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator

from mtp_jax.config import fields as fields_lib
from mtp_jax.data import documents, tasks, tokenizers
from mtp_jax.data import records as records_lib

NOT_STDLIB = frozenset('site-packages dist-packages test tests idle_test __pycache__'.split())


def read(
  sources: str,
  skipped: documents.Skipped | None = None,
  *,
  max_bytes: int | None = None,
  whole: bool = True,
  report: Callable[[str], None] = lambda line: None,
  tokenizer: tokenizers.Tokenizer | None = None,
) -> documents.Documents:
  """Streams the documents of `KIND:ARG,KIND:ARG…`.

  Kinds: python:stdlib, python:PACKAGE, dir:PATH, text:PATH, jsonl:PATH#FIELD,
  parquet:PATH#FIELD; the last three take globs; text and jsonl read .gz and
  .zst. A path must not contain a comma. jsonl:PATH#PROMPT+COMPLETION joins two
  fields into one document with a loss mask over the second; task:NAME/KEY=VALUE/…
  does the same with `items` training items of tasks.py. jsonl:PATH#messages and
  parquet:PATH#messages are conversations, rendered by the chat template of `tokenizer`.

  Args:
    sources: what to read, in this order.
    skipped: counter, by reason, of skipped files of python: and dir:, items of
      task: and documents over max_bytes.
    max_bytes: limit on the size of a document (for jsonl, of its line).
    whole: False = large files are not held in memory: see Document.read.
    report: called with one line for each document over max_bytes.
    tokenizer: its chat template renders conversations.

  Raises:
    ConfigError: on the call for what is known before reading (an unknown kind,
      a missing path), so that a typo in the last source does not cost the hours
      spent on the first; from the iterator for the contents of files.
  """
  skipped = collections.Counter() if skipped is None else skipped
  options = documents.ReadOptions(skipped, max_bytes, whole, report, tokenizer)
  opened = [_open(source.strip(), options) for source in sources.split(',')]
  return itertools.chain.from_iterable(opened)


def _open(source: str, options: documents.ReadOptions) -> documents.Documents:
  fail = functools.partial(fields_lib.ConfigError, 'data.documents', source)
  kind, _, arg = source.partition(':')
  if kind not in READERS or not arg:
    raise fail(f'KIND:ARG with KIND one of: {", ".join(READERS)}')
  return READERS[kind](arg, fail, options)


def _python(arg: str, fail: documents.Fail, options: documents.ReadOptions) -> documents.Documents:
  if arg == 'stdlib':
    root = sysconfig.get_path('stdlib')
    files = _walk(root, 'stdlib', fail, options, suffix='.py', without=NOT_STDLIB)
  else:
    files = _package(arg, fail, options)
  if not files:
    raise fail('contains no .py file')
  return _texts(files, fail, options)


def _package(
  module: str, fail: documents.Fail, options: documents.ReadOptions
) -> list[documents.File]:
  """Returns the .py files of a module without importing it or its parents."""
  spec = _find_spec(module)
  if spec is None:
    raise fail('no module of this name is installed')
  name = module.replace('.', '/')
  if spec.submodule_search_locations is None:
    source = spec.origin if spec.has_location else None
    return [(f'{name}.py', source)] if source and source.endswith('.py') else []
  roots = sorted(spec.submodule_search_locations)  # a namespace package has several
  walks = (_walk(root, name, fail, options, suffix='.py') for root in roots)
  return sorted(itertools.chain.from_iterable(walks))


def _find_spec(module: str) -> importlib.machinery.ModuleSpec | None:
  parts = module.split('.')
  if not all(part.isidentifier() for part in parts):
    return None
  # PathFinder first: unlike importlib.util it shows where the source of a
  # frozen module (os) is, and it descends without importing parents.
  find = importlib.machinery.PathFinder.find_spec
  try:
    spec = find(parts[0]) or importlib.util.find_spec(parts[0])
  except ValueError:  # __main__ has no spec
    return None
  for end in range(2, len(parts) + 1):
    places = spec and spec.submodule_search_locations
    spec = find('.'.join(parts[:end]), places) if places else None
  return spec


def _dir(arg: str, fail: documents.Fail, options: documents.ReadOptions) -> documents.Documents:
  root = os.path.abspath(os.path.expanduser(arg))
  if not os.path.isdir(root):
    raise fail('no such directory')
  files = _walk(root, os.path.basename(root), fail, options)
  if not files:
    raise fail('contains no regular file')
  return _texts(files, fail, options)


VANISHED = 'files that vanished'


def _walk(root, label, fail, options, *, suffix='', without=frozenset()) -> list[documents.File]:
  """Returns the regular files under root, sorted by name."""

  def unreadable(error):  # os.walk ignores errors by default
    if isinstance(error, FileNotFoundError) and error.filename != root:
      options.skipped[VANISHED] += 1
      return
    raise fail(f'cannot read {error.filename}: {error.strerror}')

  found = []
  for folder, folders, files in os.walk(root, onerror=unreadable):
    folders[:] = [name for name in folders if name not in without]
    for name in [*folders, *(x for x in files if x.endswith(suffix))]:
      path = os.path.join(folder, name)
      try:
        mode = os.lstat(path).st_mode
      except FileNotFoundError:
        options.skipped[VANISHED] += 1
        continue
      if stat.S_ISLNK(mode):
        options.skipped['symbolic links'] += 1
      elif stat.S_ISREG(mode):
        relative = os.path.relpath(path, root).replace(os.sep, '/')
        found.append((f'{label}/{relative}', path))
  return sorted(found)


def _texts(files, fail, options) -> documents.Documents:
  for name, path in files:
    try:
      found = _document(name, path, fail, options, open)  # a .gz is not text here
    except FileNotFoundError:
      options.skipped[VANISHED] += 1
    except ValueError as error:
      if isinstance(error, fields_lib.ConfigError):
        raise
      options.skipped['files that are not UTF-8 text'] += 1
    else:
      yield from found


def _text(arg: str, fail: documents.Fail, options: documents.ReadOptions) -> documents.Documents:
  files = documents.match(arg, fail)

  def stream():
    for name, path in files:
      try:
        found = _document(name, path, fail, options)
      except FileNotFoundError as error:
        raise documents.unreadable(path, error, fail) from error
      except UnicodeDecodeError as error:
        raise fail(f'{path} is not UTF-8 text') from error
      yield from found

  return stream()


def _document(name, path, fail, options, open_bytes=None) -> list[documents.Document]:
  """Returns one document, or none if it is too large. One that is not held in
  memory has been read once, to check that it is text. Raises ValueError if it is
  not UTF-8, or contains a NUL while open_bytes is given."""

  def blocks(before=None):
    decode = codecs.getincrementaldecoder('utf-8-sig')().decode
    try:
      with (open_bytes or documents.open_unpacked)(path, 'rb') as file:
        now = os.stat(path)
        while data := file.read(documents.BLOCK):
          yield decode(data)
      yield decode(b'', True)
    except FileNotFoundError:
      if before is None:
        raise
      raise fail(f'{path} was removed during reading') from None
    except documents.BROKEN as error:
      raise documents.unreadable(path, error, fail) from error
    if before and (now.st_size, now.st_mtime_ns) != before:
      raise fail(f'{path} was changed during reading')

  def text_blocks():
    for block in blocks():
      if open_bytes and '\0' in block:
        raise ValueError(f'{path} is binary')
      yield block

  try:
    status = os.stat(path)
  except FileNotFoundError:
    raise
  except OSError as error:
    raise documents.unreadable(path, error, fail) from error
  packed = open_bytes is None and path.endswith(documents.PACKED)
  if not packed and not options.fits(name, status.st_size):
    return []
  if options.whole or (not packed and status.st_size <= documents.HELD):
    return [documents.Document(name, ''.join(text_blocks()))]
  held, n_bytes = [], 0
  for block in text_blocks():
    n_bytes += len(block.encode())
    if n_bytes <= documents.HELD:
      held.append(block)
    if options.max_bytes is not None and n_bytes > options.max_bytes:
      options.fits(name, n_bytes)
      return []
  if n_bytes <= documents.HELD:
    return [documents.Document(name, ''.join(held))]
  stamp = status.st_size, status.st_mtime_ns
  return [documents.Document(name, '', read=functools.partial(blocks, stamp))]


def _task(arg: str, fail: documents.Fail, options: documents.ReadOptions) -> documents.Documents:
  try:
    task = tasks.named(arg, dict(items=100_000))
  except ValueError as error:
    raise fail(str(error)) from error
  items = task.params.pop('items')

  def stream():
    kept = 0
    for index, found in tasks.train(task, items):
      kept += 1
      loss_spans = (len(found.prompt),) if found.prompt else ()
      yield documents.Document(
        f'{task}:{index}', found.prompt + found.answer, loss_spans, drawn=True
      )
    if not kept:
      raise fail('all of its items are in the test set: none is left to train on')
    options.skipped['items in the test set'] += items - kept

  return stream()


READERS: dict[
  str, Callable[[str, documents.Fail, documents.ReadOptions], Iterator[documents.Document]]
] = {
  'python': _python,
  'dir': _dir,
  'text': _text,
  'jsonl': records_lib.jsonl,
  'parquet': records_lib.parquet,
  'task': _task,
}
