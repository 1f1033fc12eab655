r"""Which pairs of adjacent characters a match of a regular expression can contain.

The syntax is that of pre-tokenizers (the part of Oniguruma that they use). Each
character of an expression is a position (Glushkov 1961,
https://doi.org/10.1070/RM1961v016n05ABEH004112): a match can start at `first`
and end at `last` positions, and `follow` holds pairs of which the second can
come right after the first. A match that contains characters c and d next to
each other implies such a pair, of which one accepts c and the other d.

A lookahead is an optional position that accepts nothing.
"""

import unicodedata
from collections.abc import Callable
from typing import NamedTuple

Accepts = Callable[[str], bool]


class Unsupported(ValueError):
  """Raised for syntax outside of the supported subset."""


class Position(NamedTuple):
  number: int
  accepts: Accepts
  looks_ahead: bool


class Node(NamedTuple):
  nullable: bool
  first: frozenset[Position]
  last: frozenset[Position]
  follow: frozenset[tuple[Position, Position]]


EMPTY = Node(True, frozenset(), frozenset(), frozenset())


def parse(regex: str) -> list[Node]:
  """Returns the alternatives of an expression; raises Unsupported."""
  parser = _Parser(regex)
  found = parser.alternatives()
  if parser.text:
    raise Unsupported(regex)
  if any(node.nullable for node in found):
    raise Unsupported(f'{regex} matches the empty string')
  return found


def may_hold(found: list[Node], before: str, after: str) -> bool:
  """Whether a match can span these two adjacent characters, or look ahead from
  the first to the second."""
  return any(
    p.accepts(before) and (q.looks_ahead or q.accepts(after))
    for node in found
    for p, q in node.follow
  )


def always_takes(found: list[Node], char: str) -> bool:
  """Whether some match starts at this character, whatever follows."""
  for node in found:
    starts = [p for p in node.first if p.looks_ahead or p.accepts(char)]
    everywhere = node.first | node.last | {p for pair in node.follow for p in pair}
    # Exactly one start, since a possessive quantifier does not backtrack.
    if len(starts) == 1 and starts[0] in node.last and not any(p.looks_ahead for p in everywhere):
      return True
  return False


def _then(a: Node, b: Node) -> Node:
  joined = frozenset((p, q) for p in a.last for q in b.first)
  return Node(
    a.nullable and b.nullable,
    a.first | b.first if a.nullable else a.first,
    a.last | b.last if b.nullable else b.last,
    a.follow | b.follow | joined,
  )


def _either(found: list[Node]) -> Node:
  return Node(
    any(node.nullable for node in found),
    frozenset().union(*(node.first for node in found)),
    frozenset().union(*(node.last for node in found)),
    frozenset().union(*(node.follow for node in found)),
  )


def _repeated(node: Node) -> Node:
  again = frozenset((p, q) for p in node.last for q in node.first)
  return node._replace(follow=node.follow | again)


def is_space(char: str) -> bool:
  return char in '\t\n\v\f\r\x85' or unicodedata.category(char)[0] == 'Z'


def _of_category(name: str) -> Accepts:
  if not name.isalpha() or len(name) > 2 or name[0] not in 'LMNPSZC':
    raise Unsupported(rf'\p{{{name}}}')
  return lambda char: unicodedata.category(char).startswith(name)


CLASSES: dict[str, Accepts] = {
  's': is_space,
  'd': _of_category('Nd'),
  'w': lambda char: (
    unicodedata.category(char)[0] in 'LM'
    or unicodedata.category(char) in ('Nd', 'Nl', 'Pc')
    or '\u24b6' <= char <= '\u24e9'  # circled letters are alphabetic
  ),
}
LETTERS = {'n': '\n', 'r': '\r', 't': '\t', 'f': '\f', 'v': '\v'}


def _not(accepts: Accepts) -> Accepts:
  return lambda char: not accepts(char)


def _nothing(char: str) -> bool:
  return False


class _Parser:
  """Recursive-descent parser, which consumes its text."""

  def __init__(self, text: str):
    self.text, self.n, self.any_case = text, 0, False

  def take(self, *starts: str) -> str:
    for start in starts:
      if self.text.startswith(start):
        self.text = self.text[len(start) :]
        return start
    return ''

  def one(self) -> str:
    if not self.text:
      raise Unsupported('unexpected end')
    char, self.text = self.text[0], self.text[1:]
    return char

  def until(self, end: str) -> str:
    found, mark, self.text = self.text.partition(end)
    if not mark:
      raise Unsupported(f'no {end}')
    return found

  def alternatives(self) -> list[Node]:
    found = [self.sequence()]
    while self.take('|'):
      found.append(self.sequence())
    return found

  def sequence(self) -> Node:
    node = EMPTY
    while self.text and self.text[0] not in '|)':
      node = _then(node, self.quantified())
    return node

  def quantified(self) -> Node:
    node = self.atom()
    while mark := self.take('*', '+', '?', '{'):
      if mark == '{':
        least, comma, most = self.until('}').partition(',')
        if not (least + most).isdigit():
          raise Unsupported('{')
        if most != '1' and (comma or least != '1'):
          node = _repeated(node)
        optional = int(least or 0) == 0
        if int(least or 0) > 1:  # one repetition is not enough: treated as a lookahead
          node = _then(node, self.position(_nothing, looks_ahead=True))
      else:  # after another quantifier: lazy, possessive or a repetition
        node = _repeated(node) if mark in '*+' else node
        optional = mark in '*?'
      node = node._replace(nullable=node.nullable or optional)
    return node

  def position(self, accepts: Accepts, looks_ahead: bool = False) -> Node:
    self.n += 1
    one = frozenset([Position(self.n, accepts, looks_ahead)])
    return Node(looks_ahead, one, one, frozenset())

  def atom(self) -> Node:
    if self.take('(?!', '(?='):
      if self.text[:1] in '(|)':
        raise Unsupported('a lookahead')
      self.atom()  # of one character
      if not self.take(')'):
        raise Unsupported('a lookahead of several characters')
      return self.position(_nothing, looks_ahead=True)
    if self.text.startswith('('):
      return self.group()
    return self.position(self.character())

  def group(self) -> Node:
    before = self.any_case
    if self.take('(?i:'):
      self.any_case = True
    elif not self.take('(?:'):
      self.take('(')
      if self.text.startswith('?'):
        raise Unsupported('(?')
    node = _either(self.alternatives())
    if not self.take(')'):
      raise Unsupported('no )')
    self.any_case = before
    return node

  def character(self) -> Accepts:
    char = self.one()
    if char == '[':
      return self.set()
    if char == '\\':
      return self.escaped()
    if char == '.':
      return lambda char: char != '\n'
    if char in '^$*+?{)':
      raise Unsupported(char)
    return self.literal(char)

  def literal(self, char: str) -> Accepts:
    if self.any_case:
      return lambda other: other.casefold() == char.casefold()
    return lambda other: other == char

  def escaped(self) -> Accepts:
    char = self.one()
    if char in 'pP':
      if not self.take('{'):
        raise Unsupported(r'\p')
      name = self.until('}')
      if self.any_case and name.removeprefix('^') in ('Lu', 'Ll', 'Lt'):
        raise Unsupported('a case category, case-insensitive')
      accepts = _of_category(name.removeprefix('^'))
      return _not(accepts) if (char == 'P') != name.startswith('^') else accepts
    if char.lower() in CLASSES:
      accepts = CLASSES[char.lower()]
      return _not(accepts) if char.isupper() else accepts
    if char in LETTERS:
      return self.literal(LETTERS[char])
    if char.isalnum():
      raise Unsupported(f'\\{char}')
    return self.literal(char)

  def set(self) -> Accepts:
    negated = bool(self.take('^'))
    if negated and self.any_case:
      raise Unsupported('a negated set, case-insensitive')
    parts = []
    while not self.take(']'):
      if self.text[:1] == '[' or self.text.startswith('&&'):
        raise Unsupported('a nested set')
      start = self.text
      accepts = self.escaped() if self.take('\\') else self.literal(self.one())
      if self.text[:1] == '-' and self.text[1:2] not in ('', ']'):
        if start[0] == '\\' or self.text[1] in '\\[' or self.any_case:
          raise Unsupported('a range')
        accepts = self.range(start[0], self.text[1])
        self.text = self.text[2:]
      parts.append(accepts)

    def is_in(char):
      return any(accepts(char) for accepts in parts) != negated

    return is_in

  def range(self, first: str, last: str) -> Accepts:
    return lambda char: first <= char <= last
