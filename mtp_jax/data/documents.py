"""Readers of documents: a list of sources becomes a stream of texts.

Floor 2: standard library; pyarrow inside the functions that need it. The order
is fixed (sorted by name), texts are read one at a time, and symbolic links
below a directory are not followed.
"""

import collections
import functools
import glob
import gzip
import importlib.machinery
import importlib.util
import io
import itertools
import json
import os
import re
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mtp_jax import config
from mtp_jax.data import tasks


class Document(NamedTuple):
  """cuts: characters at which scoring goes on and off in turn, from off; each
  piece between two is encoded by itself. () = the whole text is scored.

  drawn: from a distribution, where how often a text comes is part of it: one
  that was there before is no duplicate."""

  name: str  # relative and stable, e.g. stdlib/json/decoder.py, a.jsonl:17
  text: str
  cuts: tuple[int, ...] = ()
  drawn: bool = False


File = tuple[str, str]  # (document name, path)
Fail = Callable[[str], config.ConfigError]
Skipped = collections.Counter  # reason -> files

NOT_STDLIB = frozenset(
  'site-packages dist-packages test tests idle_test __pycache__'.split()
)
LONE_SURROGATE = re.compile('[\ud800-\udfff]')


def read(sources: str, skipped: Skipped | None = None) -> Iterator[Document]:
  """Streams the documents of `KIND:ARG,KIND:ARG…`.

  Kinds: python:stdlib, python:PACKAGE, dir:PATH, text:PATH, jsonl:PATH#FIELD,
  parquet:PATH#FIELD; the last three take globs; text and jsonl read .gz and
  .zst. A path has no comma. jsonl:PATH#PROMPT+COMPLETION makes one document of
  two fields, of which the second is scored; so does task:NAME/KEY=VALUE/…, of
  `items` training items of tasks.py.

  Args:
    sources: what to read, in this order.
    skipped: counts, by what they are, files of python: and dir: and items of
      task: that are left out.

  Raises:
    ConfigError: at once for what can be known before reading (an unknown kind,
      a missing path), so that a slip in the last source does not cost the
      hours of the first; from the iterator for what is in the files.
  """
  skipped = collections.Counter() if skipped is None else skipped
  opened = [_open(source.strip(), skipped) for source in sources.split(',')]
  return itertools.chain.from_iterable(opened)


def _open(source: str, skipped: Skipped) -> Iterator[Document]:
  fail = functools.partial(config.ConfigError, 'data.documents', source)
  kind, _, arg = source.partition(':')
  if kind not in READERS or not arg:
    raise fail(f'KIND:ARG with KIND one of: {", ".join(READERS)}')
  return READERS[kind](arg, fail, skipped)


def _python(arg: str, fail: Fail, skipped: Skipped) -> Iterator[Document]:
  if arg == 'stdlib':
    root = sysconfig.get_path('stdlib')
    files = _walk(root, 'stdlib', fail, suffix='.py', without=NOT_STDLIB)
  else:
    files = _package(arg, fail)
  if not files:
    raise fail('there is no .py file in it')
  return _texts(files, fail, skipped)


def _package(module: str, fail: Fail) -> list[File]:
  """The .py files of a module, found without importing it or its parents."""
  spec = _find_spec(module)
  if spec is None:
    raise fail('no module of this name is installed')
  name = module.replace('.', '/')
  if spec.submodule_search_locations is None:
    is_source = spec.has_location and spec.origin.endswith('.py')
    return [(f'{name}.py', spec.origin)] if is_source else []
  roots = sorted(spec.submodule_search_locations)  # a namespace has several
  walks = (_walk(root, name, fail, suffix='.py') for root in roots)
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


def _dir(arg: str, fail: Fail, skipped: Skipped) -> Iterator[Document]:
  root = os.path.abspath(os.path.expanduser(arg))
  if not os.path.isdir(root):
    raise fail('no such directory')
  files = _walk(root, os.path.basename(root), fail)
  if not files:
    raise fail('there is no regular file in it')
  return _texts(files, fail, skipped)


def _walk(root, label, fail, *, suffix='', without=frozenset()) -> list[File]:
  """Regular files under root, sorted by name."""

  def unreadable(error):  # os.walk would pass over it in silence
    raise fail(f'cannot read {error.filename}: {error.strerror}')

  found = []
  for folder, folders, files in os.walk(root, onerror=unreadable):
    folders[:] = [name for name in folders if name not in without]
    for file in files:
      path = os.path.join(folder, file)
      if file.endswith(suffix) and stat.S_ISREG(os.lstat(path).st_mode):
        relative = os.path.relpath(path, root).replace(os.sep, '/')
        found.append((f'{label}/{relative}', path))
  return sorted(found)


def _texts(files, fail, skipped) -> Iterator[Document]:
  for name, path in files:
    data = _read_bytes(path, fail, open)  # a .gz is not text here
    text = None if b'\0' in data else _decode(data)
    if text is None:
      skipped['files that are not UTF-8 text'] += 1
    else:
      yield Document(name, text)


def _text(arg: str, fail: Fail, skipped: Skipped) -> Iterator[Document]:
  files = _match(arg, fail)

  def stream():
    for name, path in files:
      text = _decode(_read_bytes(path, fail))
      if text is None:
        raise fail(f'{path} is not UTF-8 text')
      yield Document(name, text)

  return stream()


def _path_and_field(arg: str) -> tuple[str, str]:
  path, mark, field = arg.rpartition('#')
  return (path, field) if mark else (arg, 'text')


def _jsonl(arg: str, fail: Fail, skipped: Skipped) -> Iterator[Document]:
  path, field = _path_and_field(arg)
  fields = field.split('+')
  if len(fields) > 2 or not all(fields):
    raise fail('one FIELD, or PROMPT+COMPLETION')
  files = _match(path, fail)

  def stream():
    for name, path in files:
      for number, texts in records(path, fields, fail):
        cuts = (len(texts[0]),) if len(texts) == 2 else ()
        yield Document(f'{name}:{number}', ''.join(texts), cuts)

  return stream()


def records(
  path: str, fields: list[str], fail: Fail
) -> Iterator[tuple[int, list[str]]]:
  """(number of the line, texts of `fields`) of each object of a jsonl file.

  Reads .gz and .zst as well. Raises fail(what is wrong, and where).
  """
  for number, line in _lines(path, fail):
    yield number, _fields(line, fields, f'{path}:{number}', fail)


def _parquet(arg: str, fail: Fail, skipped: Skipped) -> Iterator[Document]:
  try:
    pyarrow = _pyarrow()
  except OSError as error:
    raise fail(str(error)) from error
  path, field = _path_and_field(arg)
  files = _match(path, fail)

  def stream():
    for name, path in files:
      try:
        with pyarrow.parquet.ParquetFile(path) as table:
          yield from _rows(table, name, path)
      except (OSError, pyarrow.ArrowException) as error:
        first = str(error).splitlines()[0]
        raise fail(f'cannot read {path}: {first}') from error

  def _rows(table, name, path):
    columns = table.schema_arrow.names
    if field not in columns:
      has = ', '.join(columns) or 'none'
      raise fail(f'{path}: no field {field!r}, its fields are: {has}')
    kind = table.schema_arrow.field(field).type
    if not (
      pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    ):
      raise fail(f'{path}: field {field!r} is {kind}, not a string')
    number = 0
    for batch in table.iter_batches(columns=[field]):
      for text in batch.column(0).to_pylist():
        number += 1  # a missing value is an empty document
        yield Document(f'{name}:{number}', text or '')

  return stream()


def _fields(line: bytes, fields: list, place: str, fail: Fail) -> list[str]:
  text = _decode(line)
  if text is None:
    raise fail(f'{place}: not UTF-8 text')
  try:
    record = json.loads(text)
  except json.JSONDecodeError as error:
    message = f'{place}: bad JSON: {error.msg} at column {error.colno}'
    raise fail(message) from error
  except RecursionError as error:
    raise fail(f'{place}: bad JSON: nested too deeply') from error
  if not isinstance(record, dict):
    raise fail(f'{place}: {type(record).__name__} where an object should be')
  for field in fields:
    if field not in record:
      has = ', '.join(sorted(record)) or 'none'
      raise fail(f'{place}: no field {field!r}, its fields are: {has}')
    if not isinstance(record[field], str):
      kind = type(record[field]).__name__
      raise fail(f'{place}: field {field!r} is {kind}, not a string')
  # JSON can spell half a character, which UTF-8 (and a byte count) cannot.
  return [LONE_SURROGATE.sub('\ufffd', record[field]) for field in fields]


def _match(pattern: str, fail: Fail) -> list[File]:
  """Files that a path or glob names, each named from where the glob begins."""
  pattern = os.path.abspath(os.path.expanduser(pattern))
  if os.path.isdir(pattern):
    raise fail('is a directory; dir:PATH reads one')
  if os.path.exists(pattern):  # also a name with brackets in it
    return [(os.path.basename(pattern), pattern)]
  if not glob.has_magic(pattern):
    raise fail('no such file')
  found = filter(os.path.isfile, glob.glob(pattern, recursive=True))
  base = os.path.dirname(pattern)
  while glob.has_magic(base):
    base = os.path.dirname(base)
  files = [(os.path.relpath(p, base).replace(os.sep, '/'), p) for p in found]
  if not files:
    raise fail('no file matches')
  return sorted(files)


def _pyarrow():
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise OSError('needs pyarrow: pip install "mtp_jax[data]"') from error
  return pyarrow


def _open_unpacked(path: str, mode: str):
  if path.endswith('.gz'):
    return gzip.open(path, mode)
  if path.endswith('.zst'):  # pyarrow's reader notices a truncated one
    return io.BufferedReader(_pyarrow().input_stream(path, compression='zstd'))
  return open(path, mode)


def _unreadable(path: str, error: Exception, fail: Fail):
  return fail(f'cannot read {path}: {getattr(error, "strerror", 0) or error}')


BROKEN = (OSError, EOFError, zlib.error)  # the last two: a damaged .gz


def _read_bytes(path: str, fail: Fail, open_bytes=_open_unpacked) -> bytes:
  try:
    with open_bytes(path, 'rb') as file:
      return file.read()
  except BROKEN as error:
    raise _unreadable(path, error, fail) from error


def _lines(path: str, fail: Fail) -> Iterator[tuple[int, bytes]]:
  """(number from 1, line) of the lines that are not blank."""
  try:
    with _open_unpacked(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield number, line.rstrip()
  except BROKEN as error:
    raise _unreadable(path, error, fail) from error


def _decode(data: bytes) -> str | None:
  try:
    return data.decode()
  except UnicodeDecodeError:
    return None


def _task(arg: str, fail: Fail, skipped: Skipped) -> Iterator[Document]:
  try:
    of = tasks.named(arg, dict(items=100_000))
  except ValueError as error:
    raise fail(str(error)) from error
  items = of.params.pop('items')

  def stream():
    kept = 0
    for index, found in tasks.train(of, items):
      kept += 1
      yield Document(
        f'{of}:{index}', found.prompt + found.answer, (len(found.prompt),),
        drawn=True,
      )  # fmt: skip
    if not kept:
      raise fail('a test asks all of its items: none is left to train on')
    skipped['items that a test asks'] += items - kept

  return stream()


READERS: dict[str, Callable[[str, Fail, Skipped], Iterator[Document]]] = {
  'python': _python,
  'dir': _dir,
  'text': _text,
  'jsonl': _jsonl,
  'parquet': _parquet,
  'task': _task,
}
