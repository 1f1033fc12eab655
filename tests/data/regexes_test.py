"""Pairs of adjacent characters in a match, compared with the tokenizers library."""

import itertools
import random

import pytest
import tokenizers as hf

from mtp_jax.data import regexes, splitting
from tests.support import texts

CHARS = "aB1_.,'<\n\t \u4e2d\u3002\u00e9"
REGEXES = {
  'llama-3': texts.LLAMA_3,
  'gpt-4o': texts.GPT_4O,
  'deepseek': texts.DEEPSEEK,
  'possessive': r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
  r' ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$?',
  'digits': r'\d\d\d|\d|\D|.',
  'sets': r'[a-c\-_]+|[^\w\s]|\s+(?=\S)|\s+|\w',
  'groups': r'(?:a|B)(?:1|_)*|(a\.)?,+|\S|\s',
}


def _holds(regex: str) -> set[tuple[str, str]]:
  """Returns the pairs that were adjacent in a match of the library."""
  rng, found = random.Random(0), set()
  split = hf.pre_tokenizers.Split(hf.Regex(regex), 'isolated')
  for _ in range(4000):
    text = ''.join(rng.choices(CHARS, k=rng.randint(2, 8)))
    parts = split.pre_tokenize_str(text)
    ends = {end for _, (_, end) in parts}
    found |= {(text[i - 1], text[i]) for i in range(1, len(text)) if i not in ends}
  return found


@pytest.mark.parametrize('name', sorted(set(REGEXES) - {'possessive'}))
def test_may_hold_covers_pairs_inside_matches(name):
  parsed = regexes.parse(REGEXES[name])
  held = _holds(REGEXES[name])
  safe = {
    (a, b)
    for a, b in itertools.product(CHARS, CHARS)
    if not regexes.may_hold(parsed, a, b) and regexes.always_takes(parsed, a)
  }
  assert safe and not held & safe


@pytest.mark.parametrize(
  'regex',
  [
    r'(?<=a)b',
    r'(?<!a)b',
    r'^a',
    r'a$',
    r'\bword',
    r'a*',
    r'a|',
    r'[[:alpha:]]',
    r'[a&&b]',
    r'\p{Han}',
    r'(?!ab)c',
    r'(?=a+)b',
    r'a)',
    r'(a',
    r'[a',
    r'\h',
    r'(?i:[^a])',
    r'(?i:[\p{Lu}])',
    r'(?i:\P{Ll})',
    r'a{x}',
    r'\x41',
    r'(?>a)',
    '*',
    REGEXES['possessive'],
  ],
)
def test_unsupported_regexes_raise(regex):
  with pytest.raises(regexes.Unsupported):
    regexes.parse(regex)


def test_always_takes_by_first_character():
  parsed = regexes.parse(r'\d{2}|ab?|[^c]?+c|(?!x)d|ee+|f(?:g|h)*')
  taken = {x for x in 'abcdefg1' if regexes.always_takes(parsed, x)}
  assert taken == {'a', 'c', 'f'}


@pytest.mark.parametrize('name', ['w', 's', 'd', 'p{L}', 'p{N}', 'p{P}', 'p{Lu}'])
def test_character_classes_match_the_library(name):
  """For every character that all versions of Unicode agree about."""
  plain = [x for x in map(chr, range(0x110000)) if splitting._is_plain(x)]
  split = hf.pre_tokenizers.Split(hf.Regex(rf'\{name}'), 'removed')
  parsed = regexes.parse(rf'\{name}')
  theirs = {x for x in plain if len(split.pre_tokenize_str(f'\x01{x}\x01')) == 2}
  ours = {x for x in plain if regexes.always_takes(parsed, x)}
  assert ours == theirs
