"""A document, and how files of documents are found and opened."""

import collections
import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mtp_jax.config import fields as fields_lib
from mtp_jax.data import tokenizers


class Document(NamedTuple):
  """One document.

  loss_spans: characters at which the loss mask switches on and off in turn,
  starting off; each piece between two is encoded separately. () = the loss
  covers the whole text.

  rendered: written by a chat template (chat.py): encoded whole, with the special tokens in it
  and no others; a token is in the loss if one of its characters is.

  drawn: sampled from a distribution, in which the frequency of a text matters:
  repeated texts are not dropped as duplicates.

  read: yields the text block by block, from the start on each call, if it is
  too large to be held in `text`, which is '' then."""

  name: str  # relative and stable, e.g. stdlib/json/decoder.py, a.jsonl:17
  text: str
  loss_spans: tuple[int, ...] = ()
  drawn: bool = False
  read: Callable[[], Iterator[str]] | None = None
  rendered: bool = False

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
  tokenizer: tokenizers.Tokenizer | None  # whose chat template renders conversations

  def fits(self, name: str, n_bytes: int) -> bool:
    if self.max_bytes is None or n_bytes <= self.max_bytes:
      return True
    limit = f'--data.max_document_mib={self.max_bytes / 2**20:g}'
    self.skipped[f'documents over {limit}'] += 1
    self.report(f'skipped {name}: {n_bytes:,} bytes or more, over {limit}')
    return False


Documents = Iterator[Document]
Reader = Callable[[str, Fail, ReadOptions], Documents]  # of an argument


def path_and_field(arg: str) -> tuple[str, str]:
  path, mark, field = arg.rpartition('#')
  return (path, field) if mark else (arg, 'text')


def match(pattern: str, fail: Fail) -> list[File]:
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


def pyarrow():
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise OSError('needs pyarrow: pip install "mtp_jax[data]"') from error
  return pyarrow


PACKED = '.gz', '.zst'


def open_unpacked(path: str, mode: str) -> Any:
  if path.endswith('.gz'):
    return gzip.open(path, mode)
  if path.endswith('.zst'):  # pyarrow's reader detects truncation
    file = open(path, 'rb')  # pyarrow accepts only UTF-8 paths
    return io.BufferedReader(pyarrow().input_stream(file, compression='zstd'))
  return open(path, mode)


def unreadable(path: str, error: Exception, fail: Fail):
  return fail(f'cannot read {path}: {getattr(error, "strerror", 0) or error}')


BROKEN = (OSError, EOFError, zlib.error)  # the last two: a corrupt .gz


def decode(data: bytes) -> str | None:
  try:
    return data.decode()
  except UnicodeDecodeError:
    return None
