"""Readers of documents: a list of sources becomes a stream of texts.

Floor 2: standard library; pyarrow inside the functions that need it. The order
is fixed (sorted by name), texts are read one at a time, large files in blocks;
symbolic links below a directory are not followed. A byte order mark at the
start of a file is no part of it.
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
from typing import NamedTuple

from mtp_jax.config import fields as fields_lib
from mtp_jax.data import tasks


class Document(NamedTuple):
  """cuts: characters at which scoring goes on and off in turn, from off; each
  piece between two is encoded by itself. () = the whole text is scored.

  drawn: from a distribution, where how often a text comes is part of it: one
  that was there before is no duplicate.

  read: reads the text block by block, anew each time, where it is too large to
  be held in `text`, which is '' then."""

  name: str  # relative and stable, e.g. stdlib/json/decoder.py, a.jsonl:17
  text: str
  cuts: tuple[int, ...] = ()
  drawn: bool = False
  read: Callable[[], Iterator[str]] | None = None

  def blocks(self) -> Iterator[str]:
    """Yields the text, part by part."""
    if self.read:
      yield from self.read()
    for start in range(0, len(self.text), BLOCK):
      yield self.text[start : start + BLOCK]


BLOCK = 2**16  # bytes or characters at once; of larger ones malloc keeps more
ROWS = 2**20  # bytes of parquet at once
HELD = 2**22  # bytes of the largest text that is held as a str, unless all are
File = tuple[str, str]  # (document name, path)
Fail = Callable[[str], fields_lib.ConfigError]
Skipped = collections.Counter  # reason -> files


class How(NamedTuple):
  """What readers are to do with what they come upon."""

  skipped: Skipped
  max_bytes: int | None  # of a document; None = any
  whole: bool  # whether every text is held
  report: Callable[[str], None]  # a line per document that is too large

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
  .zst. A path has no comma. jsonl:PATH#PROMPT+COMPLETION makes one document of
  two fields, of which the second is scored; so does task:NAME/KEY=VALUE/…, of
  `items` training items of tasks.py.

  Args:
    sources: what to read, in this order.
    skipped: counts, by what they are, files of python: and dir:, items of
      task: and documents over max_bytes that are skipped.
    max_bytes: of the largest document that is read; of jsonl, of its line.
    whole: False = large files are not held: see Document.read.
    report: called with a line for each document over max_bytes.

  Raises:
    ConfigError: at once for what can be known before reading (an unknown kind,
      a missing path), so that a slip in the last source does not cost the
      hours of the first; from the iterator for what is in the files.
  """
  skipped = collections.Counter() if skipped is None else skipped
  how = How(skipped, max_bytes, whole, report)
  opened = [_open(source.strip(), how) for source in sources.split(',')]
  return itertools.chain.from_iterable(opened)


def _open(source: str, how: How) -> Iterator[Document]:
  fail = functools.partial(fields_lib.ConfigError, 'data.documents', source)
  kind, _, arg = source.partition(':')
  if kind not in READERS or not arg:
    raise fail(f'KIND:ARG with KIND one of: {", ".join(READERS)}')
  return READERS[kind](arg, fail, how)


def _python(arg: str, fail: Fail, how: How) -> Iterator[Document]:
  if arg == 'stdlib':
    root = sysconfig.get_path('stdlib')
    files = _walk(root, 'stdlib', fail, how, suffix='.py', without=NOT_STDLIB)
  else:
    files = _package(arg, fail, how)
  if not files:
    raise fail('there is no .py file in it')
  return _texts(files, fail, how)


def _package(module: str, fail: Fail, how: How) -> list[File]:
  """The .py files of a module, found without importing it or its parents."""
  spec = _find_spec(module)
  if spec is None:
    raise fail('no module of this name is installed')
  name = module.replace('.', '/')
  if spec.submodule_search_locations is None:
    is_source = spec.has_location and spec.origin.endswith('.py')
    return [(f'{name}.py', spec.origin)] if is_source else []
  roots = sorted(spec.submodule_search_locations)  # a namespace has several
  walks = (_walk(root, name, fail, how, suffix='.py') for root in roots)
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


def _dir(arg: str, fail: Fail, how: How) -> Iterator[Document]:
  root = os.path.abspath(os.path.expanduser(arg))
  if not os.path.isdir(root):
    raise fail('no such directory')
  files = _walk(root, os.path.basename(root), fail, how)
  if not files:
    raise fail('there is no regular file in it')
  return _texts(files, fail, how)


VANISHED = 'files that vanished'


def _walk(root, label, fail, how, *, suffix='', without=frozenset()) -> list[File]:
  """Regular files under root, sorted by name."""

  def unreadable(error):  # os.walk would pass over it in silence
    if isinstance(error, FileNotFoundError) and error.filename != root:
      how.skipped[VANISHED] += 1
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
        how.skipped[VANISHED] += 1
        continue
      if stat.S_ISLNK(mode):
        how.skipped['symbolic links'] += 1
      elif stat.S_ISREG(mode):
        relative = os.path.relpath(path, root).replace(os.sep, '/')
        found.append((f'{label}/{relative}', path))
  return sorted(found)


def _texts(files, fail, how) -> Iterator[Document]:
  for name, path in files:
    try:
      found = _document(name, path, fail, how, open)  # a .gz is not text here
    except FileNotFoundError:
      how.skipped[VANISHED] += 1
    except ValueError as error:
      if isinstance(error, fields_lib.ConfigError):
        raise
      how.skipped['files that are not UTF-8 text'] += 1
    else:
      yield from found


def _text(arg: str, fail: Fail, how: How) -> Iterator[Document]:
  files = _match(arg, fail)

  def stream():
    for name, path in files:
      try:
        found = _document(name, path, fail, how)
      except FileNotFoundError as error:
        raise _unreadable(path, error, fail) from error
      except UnicodeDecodeError as error:
        raise fail(f'{path} is not UTF-8 text') from error
      yield from found

  return stream()


def _document(name, path, fail, how, open_bytes=None) -> list[Document]:
  """One, or none if it is too large. What is not held has been read once: it is
  text. ValueError if it is not, or has a NUL where open_bytes is given."""

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
      raise fail(f'{path} was removed while it was read') from None
    except BROKEN as error:
      raise _unreadable(path, error, fail) from error
    if before and (now.st_size, now.st_mtime_ns) != before:
      raise fail(f'{path} was changed while it was read')

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
  if not packed and not how.fits(name, status.st_size):
    return []
  if how.whole or (not packed and status.st_size <= HELD):
    return [Document(name, ''.join(text_blocks()))]
  held, n_bytes = [], 0
  for block in text_blocks():
    n_bytes += len(block.encode())
    if n_bytes <= HELD:
      held.append(block)
    if how.max_bytes is not None and n_bytes > how.max_bytes:
      how.fits(name, n_bytes)
      return []
  if n_bytes <= HELD:
    return [Document(name, ''.join(held))]
  stamp = status.st_size, status.st_mtime_ns
  return [Document(name, '', read=functools.partial(blocks, stamp))]


def _path_and_field(arg: str) -> tuple[str, str]:
  path, mark, field = arg.rpartition('#')
  return (path, field) if mark else (arg, 'text')


class Text(NamedTuple):
  """A large text that is held as bytes: in UTF-8, or as JSON spells it. A str
  takes 4 bytes per character where one of them is an emoji."""

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
  """Raises ValueError if it is not what stands between quotes in JSON."""
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
      text = PAIR.sub(_joined, text)  # of which a block had one half
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
  """Bytes of it up to the last place that is within no escape or character."""
  at = part.rfind(b'\\', max(0, len(part) - LONGEST_ESCAPE))
  if at >= 0:
    run = part[: at + 1]
    if (at + 1 - len(run.rstrip(b'\\'))) % 2:  # it begins an escape
      return at or len(part)
    return at + 1
  at = len(part) - 1
  while at and part[at] & 0xC0 == 0x80:
    at -= 1
  return at or len(part)


def _jsonl(arg: str, fail: Fail, how: How) -> Iterator[Document]:
  path, field = _path_and_field(arg)
  fields = field.split('+')
  if len(fields) > 2 or not all(fields):
    raise fail('one FIELD, or PROMPT+COMPLETION')
  files = _match(path, fail)

  def stream():
    for name, path in files:
      for number, texts in _records(path, fields, fail, how, name):
        yield _of_texts(f'{name}:{number}', texts)
        del texts  # or two large lines would be held

  return stream()


def _of_texts(name: str, texts: list) -> Document:
  """Of one text, or of two of which the second is scored."""
  if all(isinstance(text, str) for text in texts):
    cuts = (len(texts[0]),) if len(texts) == 2 else ()
    return Document(name, ''.join(texts), cuts)
  texts = [Document('', text) if isinstance(text, str) else text for text in texts]
  cuts = ()
  if len(texts) == 2:
    cuts = (sum(len(block) for block in texts[0].blocks()),)

  def read():
    for text in texts:
      yield from text.blocks()

  return Document(name, '', cuts, read=read)


def records(path: str, fields: list[str], fail: Fail) -> Iterator[tuple[int, list[str]]]:
  """(number of the line, texts of `fields`) of each object of a jsonl file.

  Reads .gz and .zst as well; null is ''. Raises fail(what is wrong, and where).
  """
  return _records(path, fields, fail, None, '')


def _records(path, fields, fail, how, name):
  """As `records`; of a large line, a text is a Text unless all are held."""
  limited = how is not None and how.max_bytes is not None
  limit = how.max_bytes + 1 if limited else -1  # with the end of the line
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
          how.fits(f'{name}:{number}', limit)
          continue
        if line.isspace() or not line:
          continue
        if len(line) < ROWS:  # a copy; errors then name a column of this line
          line = line.rstrip()
        texts = None
        if how is not None and not how.whole and len(line) > HELD:
          texts = _large_fields(line, fields)
        if texts is None:
          texts = _fields(line, fields, f'{path}:{number}', fail)
        line = b''  # it may be large, and so may be what is made of its text
        yield number, texts
        del texts
  except BROKEN as error:
    raise _unreadable(path, error, fail) from error


def _parquet(arg: str, fail: Fail, how: How) -> Iterator[Document]:
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
          open(path, 'rb') as file,  # pyarrow takes no path but in UTF-8
          pyarrow.parquet.ParquetFile(
            file,
            pre_buffer=False,
            buffer_size=ROWS,  # not a row group's bytes
          ) as table,
        ):
          yield from _rows(table, name, path)
      except UnicodeDecodeError as error:  # pyarrow does not look
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
    # As many rows as a block holds, going by the mean of the file.
    groups = table.metadata
    n_bytes = sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
    rows = max(1, ROWS * groups.num_rows // max(n_bytes, 1))
    number = 0
    for batch in table.iter_batches(min(rows, 2**16), columns=[field]):
      for text in _column(batch.column(0), not how.whole):
        number += 1  # a missing value is an empty document
        if how.fits(f'{name}:{number}', _n_bytes(text, how)):
          yield _of_texts(f'{name}:{number}', [text])
        del text  # what is large goes before the next is read
      del batch

  return stream()


def _column(array, in_blocks: bool) -> Iterator[str | Text]:
  """The texts of an array of pyarrow, '' for null. A scalar of it would be a
  copy."""
  if not in_blocks or array.nbytes <= HELD:
    yield from (text or '' for text in array.to_pylist())
    return
  _, offsets, data = (memoryview(buffer or b'') for buffer in array.buffers())
  wide = str(array.type).startswith('large')
  ends = offsets.cast('q' if wide else 'i')[array.offset :]
  for i, is_valid in enumerate(array.is_valid().to_pylist()):
    value = data[ends[i] : ends[i + 1]] if is_valid else b''
    if len(value) > HELD:
      for _ in _from_utf8(value):  # is text
        pass
      yield Text(value, _from_utf8)
    else:
      yield str(value, 'utf-8')


def _n_bytes(text: str | Text, how: How) -> int:
  """Of a text in UTF-8; a text that surely fits is not encoded."""
  if isinstance(text, Text):
    return len(text.data)
  if how.max_bytes is None or 4 * len(text) <= how.max_bytes:
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
  except ValueError as error:  # of int: it limits their digits
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
  # JSON can spell half a character, which UTF-8 (and a byte count) cannot.
  texts = [record[field] or '' for field in fields]
  return [SURROGATE.sub('\ufffd', text) if SURROGATE.search(text) else text for text in texts]


STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
LONG = 2**12  # bytes of a string in JSON that is not decoded with the rest


def _large_fields(line: bytes, fields: list) -> list[str | Text] | None:
  """The same, decoded block by block; None for what `_fields` refuses."""
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
    for text in long.values():  # also of those that nobody reads
      for _ in text.blocks():
        pass
    values = [record[field] for field in fields]
  except (ValueError, RecursionError, TypeError, KeyError):
    return None
  if not all(isinstance(value, str | None) for value in values):
    return None
  return [long.get(value) or SURROGATE.sub('\ufffd', value or '') for value in values]


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


PACKED = '.gz', '.zst'


def _open_unpacked(path: str, mode: str):
  if path.endswith('.gz'):
    return gzip.open(path, mode)
  if path.endswith('.zst'):  # pyarrow's reader notices a truncated one
    file = open(path, 'rb')  # pyarrow takes no path but in UTF-8
    return io.BufferedReader(_pyarrow().input_stream(file, compression='zstd'))
  return open(path, mode)


def _unreadable(path: str, error: Exception, fail: Fail):
  return fail(f'cannot read {path}: {getattr(error, "strerror", 0) or error}')


BROKEN = (OSError, EOFError, zlib.error)  # the last two: a damaged .gz


def _decode(data: bytes) -> str | None:
  try:
    return data.decode()
  except UnicodeDecodeError:
    return None


def _task(arg: str, fail: Fail, how: How) -> Iterator[Document]:
  try:
    of = tasks.named(arg, dict(items=100_000))
  except ValueError as error:
    raise fail(str(error)) from error
  items = of.params.pop('items')

  def stream():
    kept = 0
    for index, found in tasks.train(of, items):
      kept += 1
      yield Document(f'{of}:{index}', found.prompt + found.answer, (len(found.prompt),), drawn=True)
    if not kept:
      raise fail('a test asks all of its items: none is left to train on')
    how.skipped['items that a test asks'] += items - kept

  return stream()


READERS: dict[str, Callable[[str, Fail, How], Iterator[Document]]] = {
  'python': _python,
  'dir': _dir,
  'text': _text,
  'jsonl': _jsonl,
  'parquet': _parquet,
  'task': _task,
}
