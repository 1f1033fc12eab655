"""Tokenizers: text to ids and back, each a record of pure functions.

Standard library and NumPy; other libraries are imported in `make` functions. A
kind of tokenizer reads files, and builds a tokenizer from their contents. A
store keeps these files, so that the originals are no longer needed.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mtp_jax.config import fields
from mtp_jax.data import ranks, stories, tasks
from mtp_jax.io import jsonl, paths


class Tokenizer(NamedTuple):
  """encode adds no BOS or EOS; decode skips them and unknown ids."""

  name: str
  vocab_size: int
  bos: int
  eos: int
  encode: Callable[[str], np.ndarray]
  decode: Callable[..., str]
  piece: Callable[[int], str]  # one token, printable
  token_bytes_V: np.ndarray  # UTF-8 bytes per token; 0 for special tokens
  fingerprint: str  # sha256 of what defines the ids
  files: dict[str, bytes]  # the argument of `of_files` that rebuilds it
  more_eos: tuple[int, ...] = ()  # further stop tokens of decoding
  start: tuple[int, ...] = ()  # bos, which a text starts with; none where it is stated as null

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """All end tokens, that of documents first."""
    return (self.eos, *self.more_eos)


Files = dict[str, bytes]


class Kind(NamedTuple):
  """The part of a tokenizer's name before ':'."""

  read: Callable[[str, str], Files]  # (name, part after ':')
  make: Callable[[str, Files], Tokenizer]  # (name, result of `read`)


BYTES_BOS, BYTES_EOS, BYTES_VOCAB = 256, 257, 258
BYTE_PIECE = re.compile('<0x[0-9A-Fa-f]{2}>')
BOS_NAMES = ('<s>', '<bos>', '<|begin_of_text|>', '<|endoftext|>')
EOS_NAMES = ('</s>', '<eos>', '<|end_of_text|>', '<|endoftext|>')
ESCAPES = {'\n': '\\n', '\r': '\\r', '\t': '\\t'}


def _encode_bytes(text: str) -> np.ndarray:
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def _decode_bytes(ids) -> str:
  ids_T = np.asarray(ids, np.int64).reshape(-1)
  known_T = ids_T[(ids_T >= 0) & (ids_T < BYTES_BOS)]
  return known_T.astype(np.uint8).tobytes().decode(errors='replace')


def _byte_piece(token: int) -> str:
  if token in (BYTES_BOS, BYTES_EOS):
    return '<bos>' if token == BYTES_BOS else '<eos>'
  if not 0 <= token < BYTES_VOCAB:
    return f'<id {token}>'
  char = chr(token)
  # Above 127 a byte is part of a character, not the Latin-1 letter.
  printable = token < 128 and char.isprintable()
  return char if printable else ESCAPES.get(char, f'<0x{token:02x}>')


def _error(name: str, problem: str) -> fields.ConfigError:
  return fields.ConfigError('data.tokenizer', name, problem)


def _read_bytes(name: str, arg: str) -> Files:
  if arg:
    raise _error(name, 'bytes takes no argument')
  return {}


def _make_bytes(name: str, files: Files) -> Tokenizer:
  definition = b'id = byte; BOS 256; EOS 257'
  return Tokenizer(
    name=name,
    vocab_size=BYTES_VOCAB,
    bos=BYTES_BOS,
    eos=BYTES_EOS,
    encode=_encode_bytes,
    decode=_decode_bytes,
    piece=_byte_piece,
    token_bytes_V=(np.arange(BYTES_VOCAB) < BYTES_BOS).astype(np.int64),
    start=(BYTES_BOS,),
    fingerprint=hashlib.sha256(definition).hexdigest(),
    files=files,
  )


def _read_model(name: str, path: str) -> bytes:
  try:
    return paths.as_path(os.path.expanduser(path)).read_bytes()
  except OSError as error:
    why = error.strerror or error
    raise _error(name, f'cannot be read: {why}') from error


def _special(name: str, kind: str, token: int | None) -> int:
  if token is None or token < 0:
    raise _error(name, f'has no {kind} token, which documents need')
  return token


PIECES = 'sentencepiece.model'
SPACE = '\u2581'  # SentencePiece's mark of a space


def _read_sentencepiece(name: str, path: str) -> Files:
  return {PIECES: _read_model(name, path)} | _generation(name, path)


def _read_ranks(name: str, path: str) -> Files:
  try:
    return ranks.files(_read_model(name, path))
  except ValueError as error:
    if isinstance(error, fields.ConfigError):
      raise
    raise _error(name, f'is not a file of base64 tokens: {error}') from error


def _read_trained(name: str, size: str) -> Files:
  raise _error(name, 'only mtp prepare trains a tokenizer, which its store keeps')


def _read_task(name: str, arg: str) -> Files:
  try:
    task = tasks.named(arg)
    if task.name != 'stories':
      raise ValueError('the only task with a tokenizer is stories')
    return {PIECES: stories.sentencepiece_model(task.params)}
  except ValueError as error:
    raise _error(name, str(error)) from error
  except ImportError as error:
    raise _error(name, 'needs protobuf: pip install protobuf') from error


def _make_sentencepiece(name: str, files: Files) -> Tokenizer:
  """Builds a tokenizer from a SentencePiece .model (Kudo & Richardson 2018,
  https://arxiv.org/abs/1808.06226).

  Bytes per piece are those of its text, with the space marker as one byte. The
  space that most models prepend is included: one byte per encoded text.
  """
  import sentencepiece

  model = files[PIECES]
  try:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    for i in range(pieces.vocab_size()):
      pieces.id_to_piece(i)  # check that it is UTF-8
  except (RuntimeError, UnicodeDecodeError) as error:
    raise _error(name, 'is not a SentencePiece model') from error
  size = pieces.vocab_size()
  marks = [pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i) for i in range(size)]

  def n_bytes(i):
    if marks[i]:
      return 0
    return 1 if pieces.is_byte(i) else len(_spaced(pieces.id_to_piece(i)))

  def decode(ids):
    ids = np.asarray(ids, np.int64).reshape(-1).tolist()
    return pieces.decode([i for i in ids if 0 <= i < size and not marks[i]])

  return Tokenizer(
    name=name,
    vocab_size=size,
    bos=_special(name, 'BOS', pieces.bos_id()),
    eos=_special(name, 'EOS', pieces.eos_id()),
    encode=_piece_encoder(pieces),
    decode=decode,
    piece=lambda i: _printable(pieces.id_to_piece(int(i))) if 0 <= i < size else f'<id {i}>',
    token_bytes_V=np.array([n_bytes(i) for i in range(size)], np.int64),
    fingerprint=hashlib.sha256(model).hexdigest(),
    files=files,
    more_eos=_more_eos(name, files, pieces.eos_id()),
    start=(pieces.bos_id(),),
  )


def _piece_encoder(pieces) -> Callable[[str], np.ndarray]:
  def encode(text):
    return np.asarray(pieces.encode(text), np.int32)

  mark = [pieces.piece_to_id(f'<0x{b:02X}>') for b in SPACE.encode()]
  if pieces.unk_id() in mark or pieces.normalize('a') != 'a':
    return encode

  # The model would decode a literal space marker in a text as a space. It is
  # encoded as bytes, so that a model without normalization is lossless.
  def encode_all(text):
    first, *rest = text.split(SPACE)
    ids = pieces.encode(first)
    for part in rest:
      ids += mark + pieces.encode(part)
    return np.asarray(ids, np.int32)

  return encode_all


ENDS = 'tokenizer_config.json'
ENDS_FORM = {
  **dict.fromkeys(('bos_token?', 'eos_token?'), (str, {'content': str, ...: object}, None)),
  ...: object,
}
GENERATION = 'generation_config.json'
# Files next to a tokenizer.json, exported with it unchanged.
BESIDE = ENDS, 'special_tokens_map.json', 'chat_template.jinja', GENERATION
MOST_IDS = 2**24  # per vocabulary: tables of this length are allocated


def _read_hugging_face(name: str, path: str) -> Files:
  files = {'tokenizer.json': _read_model(name, path)}
  folder = os.path.dirname(os.path.expanduser(path))
  for other in BESIDE:
    beside = os.path.join(folder, other)
    if os.path.exists(beside):
      files[other] = _read_model(name, beside)
  return _generation(name, path) | files


def _generation(name: str, path: str) -> Files:
  """Returns the GENERATION file next to a tokenizer, or one made from config.json
  there, if that has several end tokens."""
  folder = os.path.dirname(os.path.expanduser(path))
  if os.path.exists(beside := os.path.join(folder, GENERATION)):
    return {GENERATION: _read_model(name, beside)}
  if not os.path.exists(beside := os.path.join(folder, 'config.json')):
    return {}
  about = _object(name, 'config.json', _read_model(name, beside), ANY)
  if not isinstance(about.get('eos_token_id'), list):
    return {}
  kept = ('bos_token_id', 'eos_token_id')
  made = {field: about[field] for field in kept if field in about}
  return {GENERATION: json.dumps(made, indent=2).encode()}


ANY = {...: object}


def _object(name: str, file: str, data: bytes, form: dict) -> dict:
  try:
    return jsonl.loads(data, form)
  except ValueError as error:
    raise _error(name, f'{file} next to it: {error}') from error


def _more_eos(name: str, files: Files, eos: int) -> tuple[int, ...]:
  """Returns the end tokens of GENERATION other than `eos`."""
  about = _object(name, GENERATION, files.get(GENERATION, b'{}'), ANY)
  found = about.get('eos_token_id')
  found = [] if found is None else found if isinstance(found, list) else [found]
  if not all(type(i) is int and 0 <= i < MOST_IDS for i in found):
    raise _error(name, f'{GENERATION} next to it has eos_token_id={found!r}, not token ids')
  return tuple(i for i in dict.fromkeys(found) if i != eos)


def _of_library(error: BaseException) -> bool:
  """Whether an error is of the tokenizers library, which raises plain Exception, or
  PanicException, a BaseException."""
  return type(error).__name__ in ('Exception', 'PanicException')


def _make_hugging_face(name: str, files: Files) -> Tokenizer:
  """Builds a tokenizer from a tokenizer.json, with the tokenizers library.

  BOS and EOS are those of tokenizer_config.json next to it, or the usual names.
  Bytes per token are one per character in a byte-level vocabulary; otherwise as
  for SentencePiece.
  """
  model = files['tokenizer.json']
  try:
    import tokenizers
  except ImportError as error:
    raise _error(name, 'needs tokenizers: pip install "mtp_jax[data]"') from error
  try:
    fast = tokenizers.Tokenizer.from_buffer(model)
  except BaseException as error:
    if not isinstance(error, Exception) and not _of_library(error):
      raise
    raise _error(name, 'is not a tokenizer.json') from error
  fast.no_padding()
  fast.no_truncation()
  fast.encode_special_tokens = True  # '</s>' within a text is plain text
  size = 1 + max(fast.get_vocab().values(), default=-1)  # ids may have gaps
  if size > MOST_IDS:
    raise _error(name, f'has the id {size - 1:,}; at most {MOST_IDS - 1:,}')
  pieces = [fast.id_to_token(i) or '' for i in range(size)]
  added = fast.get_added_tokens_decoder()
  for token in json.loads(model).get('added_tokens') or ():
    known = fast.token_to_id(token['content'])
    if known != token['id']:  # the library numbers added tokens consecutively
      raise _error(
        name,
        f'has {token["content"]!r} as {token["id"]}, which the tokenizers'
        f' library reads as {known}: ids before it have a gap',
      )
  byte_level = b'"ByteLevel"' in model

  def n_bytes(i):
    if i in added:
      return 0 if added[i].special else len(added[i].content.encode())
    if byte_level or BYTE_PIECE.fullmatch(pieces[i]):
      return len(pieces[i]) if byte_level else 1
    return len(_spaced(pieces[i]))

  def encode(text):
    try:
      ids = fast.encode(text, add_special_tokens=False).ids
    except BaseException as error:
      if not _of_library(error):
        raise
      raise _error(name, f'cannot encode a text: {error}') from error
    return np.asarray(ids, np.int32)

  def decode(ids):
    ids = np.asarray(ids, np.int64).reshape(-1).tolist()
    return fast.decode([i for i in ids if 0 <= i < size], True)

  bos, eos, start = _hugging_face_ends(name, files, fast)
  return Tokenizer(
    name=name,
    vocab_size=size,
    bos=bos,
    eos=eos,
    encode=encode,
    decode=decode,
    piece=lambda i: _printable(pieces[i]) if 0 <= i < size else f'<id {i}>',
    token_bytes_V=np.array([n_bytes(i) for i in range(size)], np.int64),
    fingerprint=hashlib.sha256(model + b'%d %d' % (bos, eos)).hexdigest(),
    files=files,
    more_eos=_more_eos(name, files, eos),
    start=start,
  )


def _hugging_face_ends(name, files, fast) -> tuple[int, int, tuple[int, ...]]:
  about = _object(name, ENDS, files.get(ENDS, b'{}'), ENDS_FORM)

  def find(kind, usual):
    stated = about.get(f'{kind}_token')
    stated = stated.get('content') if isinstance(stated, dict) else stated
    if not isinstance(stated, str | None):
      raise _error(name, f'{ENDS} next to it has {kind}_token={stated!r}, not a string')
    ids = [fast.token_to_id(t) for t in ([stated] if stated else usual)]
    found = [i for i in ids if i is not None]
    return _special(name, kind.upper(), found[0] if found else None)

  bos, eos = find('bos', BOS_NAMES), find('eos', EOS_NAMES)
  return bos, eos, () if about.get('bos_token', '') is None else (bos,)


def _printable(piece: str) -> str:
  return piece.translate(str.maketrans(ESCAPES))


def _spaced(piece: str) -> bytes:
  return piece.replace(SPACE, ' ').encode()


KINDS: dict[str, Kind] = {
  'bytes': Kind(_read_bytes, _make_bytes),
  'train': Kind(_read_trained, _make_sentencepiece),
  'task': Kind(_read_task, _make_sentencepiece),
  'sentencepiece': Kind(_read_sentencepiece, _make_sentencepiece),
  'hf': Kind(_read_hugging_face, _make_hugging_face),
  'tiktoken': Kind(_read_ranks, _make_hugging_face),
}


def _kind(name: str) -> Kind:
  kind = name.partition(':')[0]
  if kind not in KINDS:
    raise _error(name, f'one of: {", ".join(KINDS)}')
  return KINDS[kind]


def kind_of_files(files: Files) -> str:
  """Returns the kind: sentencepiece (also for a trained one) or hf."""
  return 'sentencepiece' if PIECES in files else 'hf'


def get(name: str) -> Tokenizer:
  """Loads the tokenizer KIND or KIND:ARG; raises ConfigError if there is none."""
  return of_files(name, _kind(name).read(name, name.partition(':')[2]))


def of_files(name: str, files: Files) -> Tokenizer:
  """Builds the tokenizer of that name from `Tokenizer.files`."""
  return _kind(name).make(name, files)


def load(folder: str) -> Tokenizer:
  """Loads the tokenizer whose files are in a folder."""
  files = {
    path.name: _read_model(folder, str(path))
    for path in sorted(paths.as_path(folder).iterdir())
    if path.suffix != '.tmp'
  }
  return of_files(kind_of_files(files), files)


def matches(tokenizer: Tokenizer, recorded: str) -> bool:
  """Whether a run has recorded this tokenizer as its own."""
  return recorded in (tokenizer.name, recorded_name(tokenizer))


def recorded_name(tokenizer: Tokenizer) -> str:
  """Returns KIND#FINGERPRINT, independent of paths; 'bytes' for bytes."""
  kind = kind_of_files(tokenizer.files)
  return f'{kind}#{tokenizer.fingerprint[:12]}' if tokenizer.files else tokenizer.name
