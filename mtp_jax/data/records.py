"""Documents of jsonl and parquet files. Large texts are held as bytes and decoded in
blocks.
"""

import codecs
import json
import re
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mtp_jax.data import chat, documents


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
  for start in range(0, len(data), documents.BLOCK):
    yield decode(data[start : start + documents.BLOCK])
  yield decode(b'', True)


def _from_json(data: memoryview) -> Iterator[str]:
  """Decodes the body of a JSON string; raises ValueError if it is invalid."""
  start, half = 0, ''
  while start < len(data):
    part = bytes(data[start : start + documents.BLOCK])
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


def jsonl(arg: str, fail: documents.Fail, options: documents.ReadOptions) -> documents.Documents:
  path, field = documents.path_and_field(arg)
  fields = field.split('+')
  if len(fields) > 2 or not all(fields):
    raise fail('one FIELD, or PROMPT+COMPLETION')
  files = documents.match(path, fail)
  template = chat.template_of(options.tokenizer) if field == CONVERSATION else None

  def stream():
    for name, path in files:
      if template:
        for number, line in _lines(path, fail, options, name):
          record = _record(line, f'{path}:{number}', fail)
          found = _conversation(record, template, options.skipped, f'{path}:{number}', fail)
          if found:
            yield documents.Document(f'{name}:{number}', *found, rendered=True)
        continue
      for number, texts in _records(path, fields, fail, options, name):
        yield _of_texts(f'{name}:{number}', texts)
        del texts  # or two large lines would be live

  return stream()


CONVERSATION = 'messages'  # the field of a conversation, not of a text


def _conversation(record: dict, template, skipped, place: str, fail: documents.Fail):
  """Returns (text, loss spans), or None if the conversation is skipped."""
  if chat.has_special(template, record):
    skipped['conversations with the text of a special token in a message'] += 1
    return None
  try:
    text, loss_spans = chat.conversation(template, record)
  except ValueError as error:
    raise fail(f'{place}: {error}') from error
  if not loss_spans:
    skipped["conversations without an assistant's turn"] += 1
    return None
  return SURROGATE.sub('\ufffd', text), loss_spans


def _of_texts(name: str, texts: list) -> documents.Document:
  """Makes a document of one text, or of two with a loss mask over the second."""
  if all(isinstance(text, str) for text in texts):
    loss_spans = (len(texts[0]),) if len(texts) == 2 else ()
    return documents.Document(name, ''.join(texts), loss_spans)
  texts = [documents.Document('', text) if isinstance(text, str) else text for text in texts]
  loss_spans = ()
  if len(texts) == 2:
    loss_spans = (sum(len(block) for block in texts[0].blocks()),)

  def read():
    for text in texts:
      yield from text.blocks()

  return documents.Document(name, '', loss_spans, read=read)


def of_file(path: str, fields: list[str], fail: documents.Fail) -> Iterator[tuple[int, list[str]]]:
  """Yields (line number, texts of `fields`) for each object of a jsonl file.

  Reads .gz and .zst as well; null becomes ''. Raises fail(problem with its place).
  """
  return _records(path, fields, fail, None, '')


def _records(path, fields, fail, options, name) -> Iterator[tuple[int, list]]:
  """Like `of_file`; texts of a large line are of class Text unless options.whole."""
  for number, line in _lines(path, fail, options, name):
    texts = None
    if options is not None and not options.whole and len(line) > documents.HELD:
      texts = _large_fields(line, fields)
    if texts is None:
      texts = _fields(line, fields, f'{path}:{number}', fail)
    del line  # it may be large, and so may be the result of its text
    yield number, texts
    del texts


def _lines(path, fail, options, name) -> Iterator[tuple[int, bytes]]:
  """Yields (number, line) of the lines that are not blank."""
  most = None if options is None else options.max_bytes
  limit = -1 if most is None else most + 1  # including the newline
  number = 0
  try:
    with documents.open_unpacked(path, 'rb') as file:
      while line := file.readline(limit):
        number += 1
        if number == 1:
          line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) == limit and not line.endswith(b'\n'):
          while (line := file.readline(documents.BLOCK)) and not line.endswith(b'\n'):
            pass
          assert options  # which has the limit
          options.fits(f'{name}:{number}', limit)
          continue
        if line.isspace() or not line:
          continue
        if len(line) < documents.ROWS:  # a copy, so that errors give a column of this line
          line = line.rstrip()
        lines = [line]
        del line  # a large one is held by whoever takes it
        yield number, lines.pop()
  except documents.BROKEN as error:
    raise documents.unreadable(path, error, fail) from error


def parquet(arg: str, fail: documents.Fail, options: documents.ReadOptions) -> documents.Documents:
  try:
    pyarrow = documents.pyarrow()
  except OSError as error:
    raise fail(str(error)) from error
  path, field = documents.path_and_field(arg)
  files = documents.match(path, fail)
  template = chat.template_of(options.tokenizer) if field == CONVERSATION else None

  def stream():
    for name, path in files:
      try:
        with (
          open(path, 'rb') as file,  # pyarrow accepts only UTF-8 paths
          pyarrow.parquet.ParquetFile(
            file,
            pre_buffer=False,
            buffer_size=documents.ROWS,  # rather than a whole row group
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
    if template:
      yield from _conversations(table, [x for x in columns if x in chat.FIELDS], name, path)
      return
    kind = table.schema_arrow.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
      raise fail(f'{path}: field {field!r} is {kind}, not a string')
    number = 0
    for batch in table.iter_batches(_batch_rows(table), columns=[field]):
      for text in _column(batch.column(0), not options.whole):
        number += 1  # a missing value is an empty document
        if options.fits(f'{name}:{number}', _n_bytes(text, options)):
          yield _of_texts(f'{name}:{number}', [text])
        del text  # free a large text before reading the next
      del batch

  def _conversations(table, columns, name, path):
    number = 0
    for batch in table.iter_batches(_batch_rows(table), columns=columns):
      for record in batch.to_pylist():
        number += 1
        found = _conversation(record, template, options.skipped, f'{path}:{number}', fail)
        if found and options.fits(f'{name}:{number}', _n_bytes(found[0], options)):
          yield documents.Document(f'{name}:{number}', *found, rendered=True)

  return stream()


def _batch_rows(table) -> int:
  """Returns as many rows as fit into a block, by the mean row size of the file."""
  groups = table.metadata
  n_bytes = sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
  return min(max(1, documents.ROWS * groups.num_rows // max(n_bytes, 1)), 2**16)


def _column(array, in_blocks: bool) -> Iterator[str | Text]:
  """Yields the texts of a pyarrow array, '' for null, without the copy that a
  pyarrow scalar makes."""
  if not in_blocks or array.nbytes <= documents.HELD:
    yield from (text or '' for text in array.to_pylist())
    return
  _, offsets, data = (memoryview(buffer or b'') for buffer in array.buffers())
  wide = str(array.type).startswith('large')
  ends = offsets.cast('q' if wide else 'i')[array.offset :]
  for i, is_valid in enumerate(array.is_valid().to_pylist()):
    value = data[ends[i] : ends[i + 1]] if is_valid else memoryview(b'')
    if len(value) > documents.HELD:
      for _ in _from_utf8(value):  # check that it is UTF-8
        pass
      yield Text(value, _from_utf8)
    else:
      yield str(value, 'utf-8')


def _n_bytes(text: str | Text, options: documents.ReadOptions) -> int:
  """Returns the bytes in UTF-8, or a lower bound if the text fits in any case."""
  if isinstance(text, Text):
    return len(text.data)
  if options.max_bytes is None or 4 * len(text) <= options.max_bytes:
    return len(text)
  return len(text.encode())


def _record(line: bytes, place: str, fail: documents.Fail) -> dict:
  text = documents.decode(line)
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
  return record


def _fields(line: bytes, fields: list, place: str, fail: documents.Fail) -> list[str]:
  record = _record(line, place, fail)
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
