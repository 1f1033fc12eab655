r"""Where a text can be split so that its pieces have the tokens of the whole.

Floor 2: standard library; sentencepiece inside the function that needs it. Two
proofs are known, both from the files of a tokenizer:

- Byte-pair encoding merges within the vocabulary. If no token has two
  characters beside each other, no merge reaches over the place between them,
  and merges on one side do not see the other.
- Pre-tokenizers of the GPT family end a word before a space: each alternative
  of their regular expression takes a space as its first character or among
  nothing but white space. They look no further ahead than one character after
  white space, and never back.

Other tokenizers (unigram models, whose sums of scores are rounded; normalizers
that look at several characters; other expressions) have no rule: None.
"""

import json
import string
from collections.abc import Callable, Iterable, Iterator

from mtp_jax.data import tokenizers

SafeSplit = Callable[[str, str], bool]  # (character before, character after)


def rule(tokenizer: tokenizers.Tokenizer) -> SafeSplit | None:
  """Returns which places of a text are safe to split at; None if unknown."""
  if tokenizer.name == 'bytes':
    return lambda before, after: True
  if tokenizers.PIECES in tokenizer.files:
    return _of_pieces(tokenizer.files[tokenizers.PIECES])
  if 'tokenizer.json' in tokenizer.files:
    return _of_json(json.loads(tokenizer.files['tokenizer.json']))
  return None


def pieces(
  blocks: Iterable[str], is_safe: SafeSplit, size: int
) -> Iterator[str]:
  """Splits a text, given in blocks, at safe places: '' for ''.

  A piece has at most twice `size` characters, or up to the next block that has
  a safe place.
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
  """The last safe place within a text; 0 if there is none."""
  for at in range(len(text) - 1, 0, -1):
    if is_safe(text[at - 1], text[at]):
      return at
  return 0


def _of_pieces(model: bytes) -> SafeSplit | None:
  try:
    from sentencepiece import sentencepiece_model_pb2
  except ImportError:  # it needs protobuf
    return None
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(model)
  about, spec = proto.trainer_spec, proto.normalizer_spec
  if (
    about.model_type != about.BPE
    or not about.byte_fallback  # or unknown characters are joined
    or about.treat_whitespace_as_suffix
    or spec.precompiled_charsmap
    or spec.remove_extra_whitespaces
    or not spec.escape_whitespaces
  ):
    return None
  return _between_pairs(piece.piece for piece in proto.pieces)


def _between_pairs(names: Iterable[str]) -> SafeSplit:
  """Safe is what stands beside each other in no name."""
  spaced = [name.replace(tokenizers.SPACE, ' ') for name in names]
  inside = {name[i : i + 2] for name in spaced for i in range(len(name) - 1)}

  def is_safe(before, after):
    return (before + after).replace(tokenizers.SPACE, ' ') not in inside

  return is_safe


def _of_json(about: dict) -> SafeSplit | None:
  added = about.get('added_tokens') or []
  if any(
    not token['special']
    and (token['lstrip'] or token['rstrip'] or token['single_word'])
    for token in added
  ):
    return None
  names = [token['content'] for token in added]
  if _ends_words_at_spaces(about) and not any(' ' in x[1:] for x in names):
    return lambda before, after: (
      after == ' ' and (before.isalnum() or before in string.punctuation)
    )
  if _merges_freely(about):
    return _between_pairs([*about['model']['vocab'], *names])
  return None


def _steps(about: dict | None, kind: str) -> list[dict]:
  """What a normalizer or pre-tokenizer does, one after the other."""
  if about is None:
    return []
  if about['type'] == 'Sequence':
    return [x for part in about[kind] for x in _steps(part, kind)]
  return [about]


# Alternatives of the regular expressions of GPT-2, GPT-4, GPT-4o, Llama 3 and
# Qwen 2. One of each of the first four, so that nothing of a text is left over.
WORDS = frozenset([
  r' ?\p{L}+',
  r'[^\r\n\p{L}\p{N}]?\p{L}+',
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*'
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
])  # fmt: skip
NUMBERS = frozenset([r' ?\p{N}+', r'\p{N}', r'\p{N}{1,3}'])
SYMBOLS = frozenset(
  [
    r' ?[^\s\p{L}\p{N}]+',
    r' ?[^\s\p{L}\p{N}]+[\r\n]*',
    r' ?[^\s\p{L}\p{N}]+[\r\n/]*',
  ]
)
BLANKS = frozenset([r'\s+'])
FURTHER = frozenset(
  [
    *"'s 't 're 've 'm 'll 'd".split(),
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+'
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r'\s*[\r\n]+',
    r'\s+(?!\S)',
  ]
)


def _alternatives(regex: str) -> list[str]:
  found, depth = [''], 0
  for letter in regex:
    depth += (letter == '(') - (letter == ')')
    if letter == '|' and not depth:
      found.append('')
    else:
      found[-1] += letter
  return found


def _is_of_gpt(regex: str) -> bool:
  given = set(_alternatives(regex))
  needed = WORDS, NUMBERS, SYMBOLS, BLANKS
  return all(given & group for group in needed) and given <= FURTHER.union(
    *needed
  )


def _ends_words_at_spaces(about: dict) -> bool:
  if any(
    step['type'] not in ('NFC', 'NFD')
    for step in _steps(about['normalizer'], 'normalizers')
  ):
    return False
  for step in _steps(about['pre_tokenizer'], 'pretokenizers'):
    kind = step['type']
    if kind == 'ByteLevel' and step.get('use_regex', True):
      return True
    if kind == 'Metaspace' and step.get('split', True):
      return True
    if kind == 'Split':
      return (
        _is_of_gpt(step['pattern'].get('Regex', ''))
        and step['behavior'] == 'Isolated'
        and not step['invert']
      )
    if kind != 'Digits':  # which parts digits from the rest
      return False
  return False


def _merges_freely(about: dict) -> bool:
  """Whether a text is merged as a whole, by its characters alone."""
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
