"""Document readers: a list of sources becomes a stream of texts.

Standard library; pyarrow is imported in the functions that need it. The order
is deterministic (sorted by name), texts are read one at a time, large files in
blocks. Symbolic links below a directory are not followed. A byte order mark at
the start of a file is dropped.
"""

import codecs
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
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mtp_jax.config import fields as fields_lib
from mtp_jax.data import tasks


class Document(NamedTuple):
  """One document.

  loss_spans: characters at which the loss mask switches on and off in turn,
  starting off; each piece between two is encoded separately. () = the loss
  covers the whole text.

  drawn: sampled from a distribution, in which the frequency of a text matters:
  repeated texts are not dropped as duplicates.

  read: yields the text block by block, from the start on each call, if it is
  too large to be held in `text`, which is '' then."""

  name: str  # relative and stable, e.g. stdlib/json/decoder.py, a.jsonl:17
  text: str
  loss_spans: tuple[int, ...] = ()
  drawn: bool = False
  read: Callable[[], Iterator[str]] | None = None

  def blocks(self) -> Iterator[str]:
    """Yields the text, part by part."""
    if self.read:
      yield from self.read()
    for start in range(0, len(self.text), BLOCK):
      yield self.text[start : start + BLOCK]


BLOCK = 2**16  # bytes or characters per read; malloc retains more of larger ones
ROWS = 2**20  # bytes of parquet per read
HELD = 2**22  # bytes of the largest text held as a str, unless `whole`
File = tuple[str, str]  # (document name, path)
Fail = Callable[[str], fields_lib.ConfigError]
Skipped = collections.Counter  # reason -> files


class ReadOptions(NamedTuple):
  """Limits and callbacks of the readers."""

  skipped: Skipped
  max_bytes: int | None  # per document; None = no limit
  whole: bool  # whether every text is held in memory
  report: Callable[[str], None]  # receives one line per document over the limit

  def fits(self, name: str, n_bytes: int) -> bool:
    if self.max_bytes is None or n_bytes <= self.max_bytes:
      return True
    limit = f'--data.max_document_mib={self.max_bytes / 2**20:g}'
    self.skipped[f'documents over {limit}'] += 1
    self.report(f'skipped {name}: {n_bytes:,} bytes or more, over {limit}')
    return False


NOT_STDLIB = frozenset('site-packages dist-packages test tests idle_test __pycache__'.split())


def read(
  sources: str,
  skipped: Skipped | None = None,
  *,
  max_bytes: int | None = None,
  whole: bool = True,
  report: Callable[[str], None] = lambda line: None,
) -> Iterator[Document]:
  """Streams the documents of `KIND:ARG,KIND:ARG…`.

  Kinds: python:stdlib, python:PACKAGE, dir:PATH, text:PATH, jsonl:PATH#FIELD,
  parquet:PATH#FIELD; the last three take globs; text and jsonl read .gz and
  .zst. A path must not contain a comma. jsonl:PATH#PROMPT+COMPLETION joins two
  fields into one document with a loss mask over the second; task:NAME/KEY=VALUE/…
  does the same with `items` training items of tasks.py.

  Args:
    sources: what to read, in this order.
    skipped: counter, by reason, of skipped files of python: and dir:, items of
      task: and documents over max_bytes.
    max_bytes: limit on the size of a document (for jsonl, of its line).
    whole: False = large files are not held in memory: see Document.read.
    report: called with one line for each document over max_bytes.

  Raises:
    ConfigError: on the call for what is known before reading (an unknown kind,
      a missing path), so that a typo in the last source does not cost the hours
      spent on the first; from the iterator for the contents of files.
  """
  skipped = collections.Counter() if skipped is None else skipped
  options = ReadOptions(skipped, max_bytes, whole, report)
  opened = [_open(source.strip(), options) for source in sources.split(',')]
  return itertools.chain.from_iterable(opened)


def _open(source: str, options: ReadOptions) -> Iterator[Document]:
  fail = functools.partial(fields_lib.ConfigError, 'data.documents', source)
  kind, _, arg = source.partition(':')
  if kind not in READERS or not arg:
    raise fail(f'KIND:ARG with KIND one of: {", ".join(READERS)}')
  return READERS[kind](arg, fail, options)


def _python(arg: str, fail: Fail, options: ReadOptions) -> Iterator[Document]:
  if arg == 'stdlib':
    root = sysconfig.get_path('stdlib')
    files = _walk(root, 'stdlib', fail, options, suffix='.py', without=NOT_STDLIB)
  else:
    files = _package(arg, fail, options)
  if not files:
    raise fail('contains no .py file')
  return _texts(files, fail, options)


def _package(module: str, fail: Fail, options: ReadOptions) -> list[File]:
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


def _dir(arg: str, fail: Fail, options: ReadOptions) -> Iterator[Document]:
  root = os.path.abspath(os.path.expanduser(arg))
  if not os.path.isdir(root):
    raise fail('no such directory')
  files = _walk(root, os.path.basename(root), fail, options)
  if not files:
    raise fail('contains no regular file')
  return _texts(files, fail, options)


VANISHED = 'files that vanished'


def _walk(root, label, fail, options, *, suffix='', without=frozenset()) -> list[File]:
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


def _texts(files, fail, options) -> Iterator[Document]:
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


def _text(arg: str, fail: Fail, options: ReadOptions) -> Iterator[Document]:
  files = _match(arg, fail)

  def stream():
    for name, path in files:
      try:
        found = _document(name, path, fail, options)
      except FileNotFoundError as error:
        raise _unreadable(path, error, fail) from error
      except UnicodeDecodeError as error:
        raise fail(f'{path} is not UTF-8 text') from error
      yield from found

  return stream()


def _document(name, path, fail, options, open_bytes=None) -> list[Document]:
  """Returns one document, or none if it is too large. One that is not held in
  memory has been read once, to check that it is text. Raises ValueError if it is
  not UTF-8, or contains a NUL while open_bytes is given."""

  def blocks(before=None):
    decode = codecs.getincrementaldecoder('utf-8-sig')().decode
    try:
      with (open_bytes or _open_unpacked)(path, 'rb') as file:
        now = os.stat(path)
        while data := file.read(BLOCK):
          yield decode(data)
      yield decode(b'', True)
    except FileNotFoundError:
      if before is None:
        raise
      raise fail(f'{path} was removed during reading') from None
    except BROKEN as error:
      raise _unreadable(path, error, fail) from error
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
    raise _unreadable(path, error, fail) from error
  packed = open_bytes is None and path.endswith(PACKED)
  if not packed and not options.fits(name, status.st_size):
    return []
  if options.whole or (not packed and status.st_size <= HELD):
    return [Document(name, ''.join(text_blocks()))]
  held, n_bytes = [], 0
  for block in text_blocks():
    n_bytes += len(block.encode())
    if n_bytes <= HELD:
      held.append(block)
    if options.max_bytes is not None and n_bytes > options.max_bytes:
      options.fits(name, n_bytes)
      return []
  if n_bytes <= HELD:
    return [Document(name, ''.join(held))]
  stamp = status.st_size, status.st_mtime_ns
  return [Document(name, '', read=functools.partial(blocks, stamp))]


def _path_and_field(arg: str) -> tuple[str, str]:
  path, mark, field = arg.rpartition('#')
  return (path, field) if mark else (arg, 'text')


class Text(NamedTuple):
  """A large text held as bytes, in UTF-8 or JSON-escaped: a str with an emoji
  takes 4 bytes per character."""

  data: memoryview
  decode: Callable[[memoryview], Iterator[str]]

  def blocks(self) -> Iterator[str]:
    """Yields the text, part by part."""
    return self.decode(self.data)


def _from_utf8(data: memoryview) -> Iterator[str]:
  decode = codecs.getincrementaldecoder('utf-8')().decode
  for start in range(0, len(data), BLOCK):
    yield decode(data[start : start + BLOCK])
  yield decode(b'', True)


def _from_json(data: memoryview) -> Iterator[str]:
  """Decodes the body of a JSON string; raises ValueError if it is invalid."""
  start, half = 0, ''
  while start < len(data):
    part = bytes(data[start : start + BLOCK])
    if start + len(part) < len(data):
      part = part[: _whole(part)]
    start += len(part)
    text = half + json.loads(f'"{part.decode()}"')
    half = text[-1:] if '\ud800' <= text[-1:] <= '\udbff' else ''
    text = text[: len(text) - len(half)]
    if SURROGATE.search(text):
      text = PAIR.sub(_joined, text)  # split between two blocks
      text = SURROGATE.sub('\ufffd', text)
    yield text
  if half:
    yield '\ufffd'


SURROGATE = re.compile('[\ud800-\udfff]')
PAIR = re.compile('^[\ud800-\udbff][\udc00-\udfff]')
LONGEST_ESCAPE = len(rb'\ud83d')


def _joined(pair: re.Match) -> str:
  return pair[0].encode('utf-16-le', 'surrogatepass').decode('utf-16-le')


def _whole(part: bytes) -> int:
  """Returns the length up to the last position inside no escape or character."""
  at = part.rfind(b'\\', max(0, len(part) - LONGEST_ESCAPE))
  if at >= 0:
    run = part[: at + 1]
    if (at + 1 - len(run.rstrip(b'\\'))) % 2:  # it starts an escape
      return at or len(part)
    return at + 1
  at = len(part) - 1
  while at and part[at] & 0xC0 == 0x80:
    at -= 1
  return at or len(part)


def _jsonl(arg: str, fail: Fail, options: ReadOptions) -> Iterator[Document]:
  path, field = _path_and_field(arg)
  fields = field.split('+')
  if len(fields) > 2 or not all(fields):
    raise fail('one FIELD, or PROMPT+COMPLETION')
  files = _match(path, fail)

  def stream():
    for name, path in files:
      for number, texts in _records(path, fields, fail, options, name):
        yield _of_texts(f'{name}:{number}', texts)
        del texts  # or two large lines would be live

  return stream()


def _of_texts(name: str, texts: list) -> Document:
  """Makes a document of one text, or of two with a loss mask over the second."""
  if all(isinstance(text, str) for text in texts):
    loss_spans = (len(texts[0]),) if len(texts) == 2 else ()
    return Document(name, ''.join(texts), loss_spans)
  texts = [Document('', text) if isinstance(text, str) else text for text in texts]
  loss_spans = ()
  if len(texts) == 2:
    loss_spans = (sum(len(block) for block in texts[0].blocks()),)

  def read():
    for text in texts:
      yield from text.blocks()

  return Document(name, '', loss_spans, read=read)


def records(path: str, fields: list[str], fail: Fail) -> Iterator[tuple[int, list[str]]]:
  """Yields (line number, texts of `fields`) for each object of a jsonl file.

  Reads .gz and .zst as well; null becomes ''. Raises fail(problem with its place).
  """
  return _records(path, fields, fail, None, '')


def _records(path, fields, fail, options, name) -> Iterator[tuple[int, list]]:
  """Like `records`; texts of a large line are of class Text unless options.whole."""
  most = None if options is None else options.max_bytes
  limit = -1 if most is None else most + 1  # including the newline
  number = 0
  try:
    with _open_unpacked(path, 'rb') as file:
      while line := file.readline(limit):
        number += 1
        if number == 1:
          line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) == limit and not line.endswith(b'\n'):
          while (line := file.readline(BLOCK)) and not line.endswith(b'\n'):
            pass
          assert options  # which has the limit
          options.fits(f'{name}:{number}', limit)
          continue
        if line.isspace() or not line:
          continue
        if len(line) < ROWS:  # a copy, so that errors give a column of this line
          line = line.rstrip()
        texts = None
        if options is not None and not options.whole and len(line) > HELD:
          texts = _large_fields(line, fields)
        if texts is None:
          texts = _fields(line, fields, f'{path}:{number}', fail)
        line = b''  # it may be large, and so may be the result of its text
        yield number, texts
        del texts
  except BROKEN as error:
    raise _unreadable(path, error, fail) from error


def _parquet(arg: str, fail: Fail, options: ReadOptions) -> Iterator[Document]:
  try:
    pyarrow = _pyarrow()
  except OSError as error:
    raise fail(str(error)) from error
  path, field = _path_and_field(arg)
  files = _match(path, fail)

  def stream():
    for name, path in files:
      try:
        with (
          open(path, 'rb') as file,  # pyarrow accepts only UTF-8 paths
          pyarrow.parquet.ParquetFile(
            file,
            pre_buffer=False,
            buffer_size=ROWS,  # rather than a whole row group
          ) as table,
        ):
          yield from _rows(table, name, path)
      except UnicodeDecodeError as error:  # pyarrow does not validate
        raise fail(f'{path} is not UTF-8 text') from error
      except (OSError, pyarrow.ArrowException) as error:
        first = str(error).splitlines()[0]
        raise fail(f'cannot read {path}: {first}') from error

  def _rows(table, name, path):
    columns = table.schema_arrow.names
    if field not in columns:
      has = ', '.join(columns) or 'none'
      raise fail(f'{path}: no field {field!r}, its fields are: {has}')
    kind = table.schema_arrow.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
      raise fail(f'{path}: field {field!r} is {kind}, not a string')
    # As many rows as fit into a block, by the mean row size of the file.
    groups = table.metadata
    n_bytes = sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
    rows = max(1, ROWS * groups.num_rows // max(n_bytes, 1))
    number = 0
    for batch in table.iter_batches(min(rows, 2**16), columns=[field]):
      for text in _column(batch.column(0), not options.whole):
        number += 1  # a missing value is an empty document
        if options.fits(f'{name}:{number}', _n_bytes(text, options)):
          yield _of_texts(f'{name}:{number}', [text])
        del text  # free a large text before reading the next
      del batch

  return stream()


def _column(array, in_blocks: bool) -> Iterator[str | Text]:
  """Yields the texts of a pyarrow array, '' for null, without the copy that a
  pyarrow scalar makes."""
  if not in_blocks or array.nbytes <= HELD:
    yield from (text or '' for text in array.to_pylist())
    return
  _, offsets, data = (memoryview(buffer or b'') for buffer in array.buffers())
  wide = str(array.type).startswith('large')
  ends = offsets.cast('q' if wide else 'i')[array.offset :]
  for i, is_valid in enumerate(array.is_valid().to_pylist()):
    value = data[ends[i] : ends[i + 1]] if is_valid else memoryview(b'')
    if len(value) > HELD:
      for _ in _from_utf8(value):  # check that it is UTF-8
        pass
      yield Text(value, _from_utf8)
    else:
      yield str(value, 'utf-8')


def _n_bytes(text: str | Text, options: ReadOptions) -> int:
  """Returns the bytes in UTF-8, or a lower bound if the text fits in any case."""
  if isinstance(text, Text):
    return len(text.data)
  if options.max_bytes is None or 4 * len(text) <= options.max_bytes:
    return len(text)
  return len(text.encode())


def _fields(line: bytes, fields: list, place: str, fail: Fail) -> list[str]:
  text = _decode(line)
  if text is None:
    raise fail(f'{place}: not UTF-8 text')
  try:
    record = json.loads(text)
  except json.JSONDecodeError as error:
    what = error.msg.removesuffix(' at')
    raise fail(f'{place}: bad JSON: {what} at column {error.colno}') from error
  except ValueError as error:  # int() limits the number of digits
    raise fail(f'{place}: bad JSON: a number has too many digits') from error
  except RecursionError as error:
    raise fail(f'{place}: bad JSON: nested too deeply') from error
  if not isinstance(record, dict):
    raise fail(f'{place}: {type(record).__name__} where an object should be')
  for field in fields:
    if field not in record:
      has = ', '.join(sorted(record)) or 'none'
      raise fail(f'{place}: no field {field!r}, its fields are: {has}')
    if not isinstance(record[field], str | None):
      kind = type(record[field]).__name__
      raise fail(f'{place}: field {field!r} is {kind}, not a string')
  # JSON can escape a lone surrogate, which UTF-8 cannot encode.
  texts = [record[field] or '' for field in fields]
  return [SURROGATE.sub('\ufffd', text) if SURROGATE.search(text) else text for text in texts]


STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
LONG = 2**12  # bytes of a JSON string that is decoded separately


def _large_fields(line: bytes, fields: list) -> list[str | Text] | None:
  """Like `_fields`, decoded block by block; None where `_fields` would raise."""
  mark = uuid.uuid4().hex
  view, short, long, end = memoryview(line), [], {}, 0
  for found in STRING.finditer(line):
    first, last = found.span(1)
    if last - first > LONG:
      name = f'{mark} {len(long)}'
      short += [view[end:first], name.encode()]
      long[name], end = Text(view[first:last], _from_json), last
  short.append(view[end:])
  try:
    record = json.loads(b''.join(short).decode())
    for text in long.values():  # validate unused fields as well
      for _ in text.blocks():
        pass
    values = [record[field] for field in fields]
  except (ValueError, RecursionError, TypeError, KeyError):
    return None
  if not all(isinstance(value, str | None) for value in values):
    return None
  return [long.get(value) or SURROGATE.sub('\ufffd', value or '') for value in values]


def _match(pattern: str, fail: Fail) -> list[File]:
  """Returns the files of a path or glob, named relative to its fixed prefix."""
  pattern = os.path.abspath(os.path.expanduser(pattern))
  if os.path.isdir(pattern):
    raise fail('is a directory; dir:PATH reads one')
  if os.path.exists(pattern):  # also if its name contains brackets
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


PACKED = '.gz', '.zst'


def _open_unpacked(path: str, mode: str) -> Any:
  if path.endswith('.gz'):
    return gzip.open(path, mode)
  if path.endswith('.zst'):  # pyarrow's reader detects truncation
    file = open(path, 'rb')  # pyarrow accepts only UTF-8 paths
    return io.BufferedReader(_pyarrow().input_stream(file, compression='zstd'))
  return open(path, mode)


def _unreadable(path: str, error: Exception, fail: Fail):
  return fail(f'cannot read {path}: {getattr(error, "strerror", 0) or error}')


BROKEN = (OSError, EOFError, zlib.error)  # the last two: a corrupt .gz


def _decode(data: bytes) -> str | None:
  try:
    return data.decode()
  except UnicodeDecodeError:
    return None


def _task(arg: str, fail: Fail, options: ReadOptions) -> Iterator[Document]:
  try:
    task = tasks.named(arg, dict(items=100_000))
  except ValueError as error:
    raise fail(str(error)) from error
  items = task.params.pop('items')

  def stream():
    kept = 0
    for index, found in tasks.train(task, items):
      kept += 1
      yield Document(
        f'{task}:{index}', found.prompt + found.answer, (len(found.prompt),), drawn=True
      )
    if not kept:
      raise fail('all of its items are in the test set: none is left to train on')
    options.skipped['items in the test set'] += items - kept

  return stream()


READERS: dict[str, Callable[[str, Fail, ReadOptions], Iterator[Document]]] = {
  'python': _python,
  'dir': _dir,
  'text': _text,
  'jsonl': _jsonl,
  'parquet': _parquet,
  'task': _task,
}
