r"""Vocabularies in tiktoken's format: a base64 token and its rank per line.

They are converted to a tokenizer.json, as Llama 3's tokenizer.model is: its
regular expression and its 256 special tokens are in no file, only in Meta's code
(https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py).
"""

import base64
import json

WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
BEGIN, END, TURN = '<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'


def specials() -> list[str]:
  """Returns Llama 3's special tokens, in order of their ids after the last rank."""
  named = {0: BEGIN, 1: END, 6: '<|start_header_id|>', 7: '<|end_header_id|>', 9: TURN}
  reserved = (f'<|reserved_special_token_{i}|>' for i in range(256))
  return [named.get(i) or next(reserved) for i in range(256)]


def parse(data: bytes) -> dict[bytes, int]:
  """Returns token -> rank; raises ValueError unless ranks are 0, 1, … and cover all bytes."""
  found = {}
  for line in data.splitlines():
    if line.strip():
      token, rank = line.split()
      found[base64.b64decode(token, validate=True)] = int(rank)
  if sorted(found.values()) != list(range(len(found))):
    raise ValueError('its ranks are not 0, 1, …')
  if any(bytes([byte]) not in found for byte in range(256)):
    raise ValueError('a byte has no token')
  return found


def files(data: bytes) -> dict[str, bytes]:
  """Returns tokenizer.json, and the files that name its BOS and EOS tokens."""
  ranks = parse(data)
  letters = byte_letters()

  def spelled(token):
    return ''.join(letters[byte] for byte in token)

  first = len(ranks)
  added = [
    dict(
      id=first + i,
      content=name,
      single_word=False,
      lstrip=False,
      rstrip=False,
      normalized=False,
      special=True,
    )
    for i, name in enumerate(specials())
  ]
  begin, end, turn = (first + specials().index(name) for name in (BEGIN, END, TURN))
  split = dict(type='Split', pattern={'Regex': WORDS}, behavior='Isolated', invert=False)
  level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
  about = dict(
    version='1.0',
    truncation=None,
    padding=None,
    added_tokens=added,
    normalizer=None,
    pre_tokenizer=dict(type='Sequence', pretokenizers=[split, level]),
    post_processor=_begins_with(BEGIN, begin),
    decoder=level,
    model=dict(
      type='BPE',
      dropout=None,
      unk_token=None,
      continuing_subword_prefix=None,
      end_of_word_suffix=None,
      fuse_unk=False,
      byte_fallback=False,
      ignore_merges=True,  # a word that is a token is that token
      vocab={spelled(token): rank for token, rank in ranks.items()},
      merges=[[spelled(x), spelled(y)] for x, y in _merges(ranks)],
    ),
  )
  return {
    'tokenizer.json': json.dumps(about, ensure_ascii=False).encode(),
    'tokenizer_config.json': json.dumps(
      dict(tokenizer_class='PreTrainedTokenizerFast', bos_token=BEGIN, eos_token=END), indent=2
    ).encode(),
    'generation_config.json': json.dumps(
      dict(bos_token_id=begin, eos_token_id=[end, turn]), indent=2
    ).encode(),
  }


def _begins_with(name: str, token: int) -> dict:
  def sequence(which, number):
    return {'Sequence': dict(id=which, type_id=number)}

  def special(number):
    return {'SpecialToken': dict(id=name, type_id=number)}

  return dict(
    type='TemplateProcessing',
    single=[special(0), sequence('A', 0)],
    pair=[special(0), sequence('A', 0), special(1), sequence('B', 1)],
    special_tokens={name: dict(id=name, ids=[token], tokens=[name])},
  )


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
  """Returns the pairs of tokens that merge to a token, by its rank."""
  found = [
    (rank, ranks[token[:i]], ranks[token[i:]], token[:i], token[i:])
    for token, rank in ranks.items()
    for i in range(1, len(token))
    if token[:i] in ranks and token[i:] in ranks
  ]
  return [(left, right) for *_, left, right in sorted(found)]


def byte_letters() -> list[str]:
  """Returns the character of each byte in a byte-level vocabulary, as in GPT-2:
  a printable Latin-1 byte is itself, the n-th other one is 256 + n."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in plain]
  return [chr(b if b in plain else 256 + others.index(b)) for b in range(256)]
