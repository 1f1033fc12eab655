r"""Where a text can be split so that its pieces have the tokens of the whole.

Standard library and NumPy; other libraries are imported in the functions that
need them. Three proofs are used, all from the files of a tokenizer:

- Byte-pair encoding merges within the vocabulary. If no token contains two
  adjacent characters, no merge spans the place between them, and merges on one
  side do not depend on the other.
- A pre-tokenizer splits a text into words, each encoded separately. If no match
  of its regular expression contains two adjacent characters, and the first is
  always in a match (regexes.py), a word ends between them.
- A normalizer rewrites a text. Those supported here do it character by
  character, or by a table or a normal form that never combines a space with a
  letter before it.

Where nothing is proven, there is no rule: None.
"""

import base64
import functools
import json
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mtp_jax.data import regexes, tokenizers

SafeSplit = Callable[[str, str], bool]  # (character before, character after)


def rule(tokenizer: tokenizers.Tokenizer) -> SafeSplit | None:
  """Returns which places of a text are safe to split at; None if unknown."""
  if tokenizer.name == 'bytes':
    return lambda before, after: True
  if tokenizers.PIECES in tokenizer.files:
    return between_pieces(tokenizer.files[tokenizers.PIECES], 'BPE', 'CHAR')
  if 'tokenizer.json' in tokenizer.files:
    return _of_json(json.loads(tokenizer.files['tokenizer.json']))
  return None


def pieces(blocks: Iterable[str], is_safe: SafeSplit, size: int) -> Iterator[str]:
  """Splits a text, given in blocks, at safe places; yields '' for ''.

  A piece has at most twice `size` characters, unless a block has no safe place.
  """
  held, n = [], 0
  for block in blocks:
    for start in range(0, len(block), size):
      part = block[start : start + size]
      tail = held[-1][-1] if held else ''
      n += len(part)
      at = _last(tail + part, is_safe) if n >= size else 0
      if at:
        at -= len(tail)
        yield ''.join([*held, part[:at]])
        part = part[at:]
        held, n = [], len(part)
      held.append(part)
  yield ''.join(held)


def _last(text: str, is_safe: SafeSplit) -> int:
  """Returns the last safe place within a text; 0 if there is none."""
  for at in range(len(text) - 1, 0, -1):
    if is_safe(text[at - 1], text[at]):
      return at
  return 0


def between_pieces(model: bytes, *kinds: str) -> SafeSplit | None:
  """Returns the places that no piece of a SentencePiece model of these kinds spans.

  If the model normalizes, these are between a letter or digit that it does not
  change and a space. Unknown characters are joined unless they become bytes, so
  that the first of the two must be known.
  """
  try:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
  except ImportError:  # it needs protobuf
    return None
  proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
  proto.ParseFromString(model)
  about, spec = proto.trainer_spec, proto.normalizer_spec
  if (
    about.ModelType.Name(about.model_type) not in kinds
    or about.treat_whitespace_as_suffix
    or not spec.escape_whitespaces
  ):
    return None
  is_apart = between_pairs(piece.piece for piece in proto.pieces)
  is_plain = not spec.precompiled_charsmap and not spec.remove_extra_whitespaces
  if is_plain and about.byte_fallback and about.model_type != about.UNIGRAM:
    return is_apart
  known = {
    piece.piece
    for piece in proto.pieces
    if len(piece.piece) == 1 and piece.type in (piece.NORMAL, piece.USER_DEFINED)
  }
  if tokenizers.SPACE not in known or not known.intersection(USUAL_LETTERS):
    return None
  if not is_plain:
    if _takes_spaces(spec.precompiled_charsmap):
      return None
    normalize = sentencepiece.SentencePieceProcessor(model_proto=model).normalize
    known.intersection_update(
      x for x in USUAL_LETTERS if normalize(f'a{x} {x}a').endswith(f'{x}{tokenizers.SPACE}{x}a')
    )

  def is_safe(before, after):
    if before not in known or not (is_plain or after == ' '):
      return False
    return is_apart(before, after)

  return is_safe if known else None


USUAL_LETTERS = string.ascii_letters + string.digits


@functools.lru_cache(8)
def _takes_spaces(charsmap: bytes) -> bool:
  """Whether the table of a normalizer has a key with a space next to another
  character.

  The table holds the size of a double array, the array itself, uint32
  (darts-clone, https://github.com/s-yata/darts-clone), and texts.
  """
  if not charsmap:
    return False
  size = int(np.frombuffer(charsmap[:4], '<u4')[0])
  units = np.frombuffer(charsmap[4 : 4 + size], '<u4').astype(np.int64)
  labels = units & (2**31 | 0xFF)
  offsets = (units >> 10) << ((units & 2**9) >> 6)

  def below(places):  # (child nodes, their byte); suffixes are shared
    found = (places ^ offsets[places])[:, None] ^ np.arange(1, 256)
    is_there = found < len(units)
    is_there &= labels[np.minimum(found, len(units) - 1)] == np.arange(1, 256)
    return found[is_there], np.nonzero(is_there)[1] + 1

  places, chars = below(np.zeros(1, np.int64))
  if below(places[chars == ord(' ')])[0].size:
    return True
  while places.size:
    found = []
    for start in range(0, places.size, 2**10):
      part, chars = below(places[start : start + 2**10])
      if (chars == ord(' ')).any():
        return True
      found.append(part)
    places = np.unique(np.concatenate(found))
  return False


def between_pairs(names: Iterable[str]) -> SafeSplit:
  """Returns a rule by which two characters adjacent in no name are safe."""
  spaced = [name.replace(tokenizers.SPACE, ' ') for name in names]
  inside = {name[i : i + 2] for name in spaced for i in range(len(name) - 1)}

  def is_safe(before, after):
    return (before + after).replace(tokenizers.SPACE, ' ') not in inside

  return is_safe


def _of_json(about: dict) -> SafeSplit | None:
  added = about.get('added_tokens') or []
  if any(
    not token['special'] and (token['lstrip'] or token['rstrip'] or token['single_word'])
    for token in added
  ):
    return None
  normalizers = _steps(about['normalizer'], 'normalizers')
  written = [x for x in added if not x['special']]
  names = {x['content']: _forms(x, normalizers) for x in written}
  if not all(names.values()):
    return None
  is_safe = _between_words(about, names)
  if any(is_safe(before, after) for before, after in USUAL):
    return is_safe
  if not _merges_freely(about):
    return None
  everything = *about['model']['vocab'], *(x['content'] for x in added)
  is_apart, is_away = between_pairs(everything), _away_from(names)

  def is_between_merges(before, after):
    spaced = after.replace(' ', tokenizers.SPACE)
    return is_away(before, after) and is_away(before, spaced) and is_apart(before, after)

  return is_between_merges


def _forms(token: dict, normalizers: list[dict]) -> set[str]:
  """Returns the spellings of an added token in a text; {} if unknown."""
  name = token['content']
  found = {name, name.casefold()}
  if not token['normalized']:
    return found
  if normalizers and not name.isascii():
    return set()
  for step in normalizers:  # those that `_normalized` supports
    if step['type'] == 'Replace':
      text = step['pattern'].get('String')
      if text:
        name = name.replace(text, step['content'])
      elif step['pattern'] in SPACES_AS_ONE:
        name = re.sub(' +', step['content'], name)
      else:
        return set()
    elif step['type'] == 'Prepend':
      name = step['prepend'] + name
    elif step['type'] == 'Strip':
      name = name.strip()
    found |= {name, name.casefold()}
  return found


def _away_from(names: dict[str, set[str]]) -> SafeSplit:
  """Returns a rule by which places in or right after an added token are unsafe:
  the text after one is encoded anew, and may get a prefix."""
  inner = {x for forms in names.values() for form in forms for x in form[1:]}
  last = {form[-1:] for forms in names.values() for form in forms}

  def is_away(before, after):
    return last.isdisjoint((before, before.casefold())) and inner.isdisjoint(
      (after, after.casefold())
    )

  return is_away


USUAL = ('a ', 'a\n', '. ', '\u4e2d\uff0c', 'a.')  # candidates for safe places


def _steps(about: dict | None, kind: str) -> list[dict]:
  """Returns the steps of a normalizer or pre-tokenizer, flattened."""
  if about is None:
    return []
  if about['type'] == 'Sequence':
    return [x for part in about[kind] for x in _steps(part, kind)]
  return [about]


def _between_words(about: dict, names: dict[str, set[str]]) -> SafeSplit:
  """Returns a rule by which places where the pre-tokenizer always ends a word are safe.

  Words are encoded separately. `_normalized` and `_is_parted` describe what
  normalizers and pre-tokenizers do at a place between two characters.
  """
  normalizers = _steps(about['normalizer'], 'normalizers')
  if normalizers and not all(name.isascii() for name in names):
    return lambda before, after: False
  steps = [_parsed(step) for step in _steps(about['pre_tokenizer'], 'pretokenizers')]

  is_away = _away_from(names)

  @functools.lru_cache(2**16)
  def is_safe(before, after):
    if not (_is_plain(before) and _is_plain(after) and is_away(before, after)):
      return False
    afters = {after}
    for step in normalizers:
      afters = _normalized(step, before, afters)
      if not afters:
        return False
    return all(is_away(before, one) and _is_parted(steps, before, one) for one in afters)

  return is_safe


def _is_plain(char: str) -> bool:
  """Whether all versions of Unicode agree about a character, and Oniguruma is
  consistent: it accepts ½ as \\w, but not within a set."""
  if char < ' ':
    return char in '\t\n\r'
  if char in '\xb2\xb3\xb9\xbc\xbd\xbe':
    return False
  category = unicodedata.category(char)
  return category == unicodedata.ucd_3_2_0.category(char) and category[0] in 'LNPSZ'


def _is_steady(char: str) -> bool:
  """Whether normal forms change neither the character nor the one before it."""
  if char.isascii():
    return True
  return (unicodedata.category(char)[0] in 'PZ' or '\u4e00' <= char <= '\u9fa5') and all(
    unicodedata.normalize(form, char) == char for form in ('NFC', 'NFD', 'NFKC', 'NFKD')
  )


def _normalized(step: dict, before: str, afters: set[str]) -> set[str]:
  """Returns the characters that may follow `before` after a normalizer step; {} if
  unknown, or if the step spans the place between."""
  kind, known = step['type'], set()
  both = {before, *afters}
  if kind in ('NFC', 'NFD', 'NFKC', 'NFKD', 'StripAccents'):
    joins = any(x.isascii() and (x.isalpha() or x in '<=>') for x in afters)
    known = afters if all(map(_is_steady, both)) and not joins else known
  elif kind == 'Lowercase':
    known = afters if all(x.isascii() and x == x.lower() for x in both) else known
  elif kind == 'Prepend':
    known = afters
  elif kind == 'Strip':  # strips at the ends only
    known = afters if not regexes.is_space(before) else known
  elif kind in ('BertNormalizer', 'Nmt'):
    known = afters if _is_small(before) and afters <= set(SPACES) else known
  elif kind == 'Precompiled':
    if _is_small(before) and afters <= set(SPACES):
      chars = before, *sorted(afters)
      known = afters if _keeps(step['precompiled_charsmap'], chars) else known
  elif kind == 'Replace':
    known = _replaced(step, before, afters)
  return known


SPACES = (' ', tokenizers.SPACE)


def _is_small(char: str) -> bool:
  return char in string.ascii_lowercase or char in string.digits


@functools.lru_cache(2**10)
def _keeps(charsmap: str, chars: tuple[str, ...]) -> bool:
  """Whether SentencePiece's table changes none of the characters. It rewrites
  whole graphemes, and one ends between a letter and a space."""
  from tokenizers import normalizers

  fast = normalizers.Precompiled(base64.b64decode(charsmap))
  return all(fast.normalize_str(x) == x for x in chars)


SPACES_AS_ONE = {'Regex': ' {2,}'}, {'Regex': ' +'}


def _replaced(step: dict, before: str, afters: set[str]) -> set[str]:
  pattern, content = step['pattern'], step['content']
  if pattern in SPACES_AS_ONE:
    return afters | {content} if content in SPACES and before != ' ' else set()
  text = pattern.get('String')
  if text and before not in text and not any(x in text for x in afters):
    return afters
  if text and len(text) == len(content) == 1 and text != before:
    return {content if x == text else x for x in afters}
  return set()


GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _parsed(step: dict) -> tuple[dict, list[regexes.Node]]:
  """Returns (step, the alternatives of its regular expression)."""
  regex = ''
  if step['type'] == 'ByteLevel' and step.get('use_regex', True):
    regex = GPT_2
  if step['type'] == 'Split':
    regex = step['pattern'].get('Regex', '')
  try:
    return step, regexes.parse(regex) if regex else []
  except regexes.Unsupported:
    return step, []


def _is_parted(steps, before: str, after: str) -> bool:
  """Whether a step always ends a word between the two, and no earlier step
  depends on the other side."""
  for step, found in steps:
    kind = step['type']
    if kind == 'Metaspace':
      if after in (' ', step['replacement']):
        return step.get('split', True)
      return False
    if kind in ('WhitespaceSplit', 'Whitespace', 'BertPreTokenizer'):
      if regexes.is_space(after) and not regexes.is_space(before):
        return True
    elif kind == 'CharDelimiterSplit':
      if after == step['delimiter'] != before:
        return True
    elif kind == 'Split' and not found:
      text, behavior = step['pattern'].get('String'), step['behavior']
      if not text or len(text) > 1 or step['invert'] or before == text:
        return False
      if behavior not in ('Isolated', 'Removed', 'MergedWithNext'):
        return False
      if after == text:
        return True
    elif found:
      if kind == 'Split' and step['behavior'] not in ('Isolated', 'Removed'):
        return False
      if regexes.may_hold(found, before, after):
        return False
      if regexes.always_takes(found, before):
        return True
      if kind == 'ByteLevel':  # the next step sees bytes
        return False
    elif kind == 'Punctuation':
      if step.get('behavior', 'Isolated') not in ('Isolated', 'Removed'):
        return False
    elif kind != 'Digits':
      return False
  return False


def _merges_freely(about: dict) -> bool:
  """Whether merges apply to the text as a whole, and depend on its characters only."""
  model, steps = about['model'], _steps(about['normalizer'], 'normalizers')
  before = _steps(about['pre_tokenizer'], 'pretokenizers')
  return (
    model.get('type') == 'BPE'
    and not model.get('dropout')
    and not model.get('ignore_merges')
    and not model.get('continuing_subword_prefix')
    and not model.get('end_of_word_suffix')
    and bool(model.get('byte_fallback'))
    and all(f'<0x{byte:02X}>' in model['vocab'] for byte in range(256))
    and all(step['type'] == 'Metaspace' for step in before)
    and all(
      step['type'] == 'Prepend'
      or (
        step['type'] == 'Replace'
        and step['pattern'] == {'String': ' '}
        and step['content'] == tokenizers.SPACE
      )
      for step in steps
    )
  )
