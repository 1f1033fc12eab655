"""Encodes a long text with a unigram model in parts, with the ids of the whole.

SentencePiece searches the best path through a text (Kudo 2018,
https://arxiv.org/abs/1804.10959) and accumulates scores in float32, so that
later pieces depend on the sum so far: rounding decides between two nearly tied
paths. At a place that no piece spans, all paths meet, and the remaining text
depends on that sum only. The sum is passed to a copy of the model that has
further pieces of one character each: some with scores -2**k, which prefixed to
the next part add up to the sum exactly, and some with the score of unknown
characters, which such pieces would have changed.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.data import splitting, tokenizers

POWERS = range(127, -150, -1)  # all exponents of float32
PRIVATE = range(0xF0000, 0xFFFFD), range(0x100000, 0x10FFFD)
RESET = np.float32(100_000)  # sentencepiece 0.2.3, unigram_model.cc
USUAL = {*map(chr, range(1, 0x530)), *map(chr, range(0x2000, 0x2070))}
UNKNOWN_PENALTY = 10.0  # same file


class Encoder:
  """Encodes the parts of a text one after another."""

  def __init__(self, model: bytes, is_safe: splitting.SafeSplit):
    from sentencepiece import sentencepiece_model_pb2

    self.is_safe = is_safe
    self._proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    self._proto.ParseFromString(model)
    self._apart = splitting.between_pairs(x.piece for x in self._proto.pieces)
    about = _About.of(self._proto)
    self._about, self._added = about, []
    self._dummy = ' ' * self._proto.normalizer_spec.add_dummy_prefix
    self._proto.normalizer_spec.add_dummy_prefix = False
    self._n = len(self._proto.pieces)
    self._unknown: dict[str, int] = {}
    self._model: Any = None
    # Letters that occur in longer pieces only, which may or may not be on a path.
    # Any other unknown letter is on all paths.
    self._build(self._about.all_letters | USUAL, set())

  def encode(self, text: str, score: np.float32 | None = None) -> tuple[np.ndarray, np.float32]:
    """Returns (ids, the sum of scores after them); score = None starts a text."""
    if not self._about.splits_marks:
      return self._encode(text, score)
    first, *rest = text.split(tokenizers.SPACE)  # as _piece_encoder does
    ids_T, score = self._encode(first, score)
    found = [ids_T]
    for part in rest:
      ids_T, score = self._encode(part, None)
      found += [self._about.mark_T, ids_T]
    return np.concatenate(found), score

  def _encode(self, text, score):
    if not text:
      return np.zeros(0, np.int32), score or np.float32(0)
    begins = score is None
    score = np.float32(0) if begins else score
    text = self._dummy + text if begins else text
    found_T = self._found(text, score)
    if found_T is None:  # it has a new letter, or one of the signs
      self._build(set(self._model.normalize(text)), set(text))
      found_T = self._found(text, score)
    score = self._sum(found_T, score)
    # In this case, the next place starts with a reset.
    if score < -RESET:
      score = np.float32(0)
    return self._known(found_T), score

  def _found(self, text, score) -> np.ndarray | None:
    """Returns None if the text has characters that the model lacks."""
    prefix = _bits(score) if score else [len(POWERS)]  # the last one has 0
    head = ''.join(self._signs[i] for i in prefix)
    if self._nul in text:
      return None
    text = text.replace('\0', self._nul)
    found_T = np.asarray(self._model.encode(head + text), np.int32)
    n = len(prefix)
    if found_T[:n].tolist() != [self._n + i for i in prefix]:
      return None
    return None if self._odd_V[found_T[n:]].any() else found_T[n:]

  def _build(self, letters: set[str], others: set[str]) -> None:
    import sentencepiece

    new = letters - self._about.letters - self._unknown.keys()
    for letter in sorted(new - {'\0'}):
      self._unknown[letter] = len(self._unknown)
    free = (chr(x) for x in itertools.chain(*PRIVATE))
    used = self._unknown.keys() | self._about.all_letters | letters | others
    free = (x for x in free if x not in used)
    self._signs = list(itertools.islice(free, len(POWERS) + 1))
    self._nul = next(free)  # replaces NUL, which no piece can contain
    # A copy: a protobuf message never releases its memory.
    proto = type(self._proto)()
    proto.CopyFrom(self._proto)
    scores = [*(-(2.0**k) for k in POWERS), 0.0]
    for sign, score in zip(self._signs, scores, strict=True):
      proto.pieces.add(piece=sign, score=score)
    for letter in (self._nul, *self._unknown):
      proto.pieces.add(piece=letter, score=self._about.unknown_score)
    self._model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    self._tables(proto.pieces)

  def _tables(self, pieces):
    about = self._about
    self._names = [piece.piece for piece in pieces]
    self._score_V = np.array([piece.score for piece in pieces], np.float32)
    self._size_V = np.array([len(name) for name in self._names])
    self._starts_V = np.array([x[:1] == tokenizers.SPACE for x in self._names])
    is_apart = {letter: self._apart(letter, ' ') for letter in {x[-1:] for x in self._names}}
    self._ends_V = np.array([is_apart[x[-1:]] for x in self._names])
    real = [piece.type == piece.NORMAL for piece in pieces]
    real[self._n : self._n + len(self._signs)] = [False] * len(self._signs)
    self._odd_V = ~np.array(real)
    self._pieces = {self._names[i]: self._score_V[i] for i in np.flatnonzero(real)}
    self._longest = max(map(len, self._pieces))
    self._unknown_score = np.float32(about.unknown_score)

  def _sum(self, found_T, score) -> np.float32:
    """Accumulates scores as the library does: in float32, restarting from 0 where
    a place is below -RESET, whether or not it is on the best path."""
    if not found_T.size:
      return score
    size_T = self._size_V[found_T]
    # All paths meet before a space that follows this character in no piece.
    meets_T = self._starts_V[found_T]
    meets_T[1:] &= self._ends_V[found_T[:-1]]
    meets_T[0] = True
    meet_N = np.flatnonzero(meets_T)
    at_T = np.cumsum(size_T) - size_T
    sizes_N = np.diff(at_T[meet_N], append=size_T.sum())
    # Lower bound of any path between two such places.
    below_N = np.asarray(1.01 * self._about.unknown_score * sizes_N - 1, np.float32)
    nth = 0
    while True:
      first = int(meet_N[nth])
      sums_T = np.add.accumulate(np.concatenate([[score], self._score_V[found_T[first:]]]))
      near = sums_T[meet_N[nth:] - first] + below_N[nth:] < -RESET
      if not near.any():
        return sums_T[-1]
      nth += int(near.argmax())
      was_reset, score = False, sums_T[int(meet_N[nth]) - first]
      while not was_reset:
        if nth == len(meet_N):
          return score
        last = int(meet_N[nth + 1]) if nth + 1 < len(meet_N) else len(found_T)
        names = (self._names[i] for i in found_T[meet_N[nth] : last].tolist())
        score, was_reset = self._best(''.join(names), score)
        nth += 1
      if nth == len(meet_N):
        return score

  def _best(self, text: str, score) -> tuple[np.float32, bool]:
    """Returns (the score of the best path through a text, whether it was reset)."""
    best: list = [None] * (len(text) + 1)
    best[0], was_reset, frontier = np.float32(score), False, 0
    for start in range(len(text)):
      if best[start] < -RESET:
        offset, was_reset = best[start], True
        for i in range(start, frontier + 1):
          if best[i] is not None:
            best[i] -= offset
      for end in range(start + 1, min(len(text), start + self._longest) + 1):
        piece = self._pieces.get(text[start:end])
        if piece is None and end > start + 1:
          continue
        frontier = max(frontier, end)
        add = self._unknown_score if piece is None else piece
        found = best[start] + add
        if best[end] is None or found > best[end]:
          best[end] = found
    return best[-1], was_reset

  def _known(self, found_T) -> np.ndarray:
    """Replaces unknown characters by bytes, or each run of them by one unknown
    token."""
    first = self._n + len(self._signs)
    new_T = found_T >= first
    if not new_T.any():
      return found_T
    if not self._about.byte_ids:
      found_T = np.where(new_T, self._about.unknown, found_T)
      again_T = new_T & np.concatenate([[False], new_T[:-1]])
      return found_T[~again_T].astype(np.int32)
    letters = [b'\0', *(x.encode() for x in self._unknown)]
    found, start = [], 0
    for i in np.flatnonzero(new_T).tolist():
      data = letters[found_T[i] - first]
      found += [found_T[start:i], [self._about.byte_ids[x] for x in data]]
      start = i + 1
    return np.concatenate([*found, found_T[start:]]).astype(np.int32)


def _bits(score: np.float32) -> list[int]:
  """Returns the indices into POWERS, highest first, that sum to a negative score."""
  rest, found = -float(score), []
  for i, k in enumerate(POWERS):
    if rest >= 2.0**k:
      rest -= 2.0**k
      found.append(i)
  return found


class _About(NamedTuple):
  letters: set[str]  # pieces of one character
  all_letters: set[str]  # of all pieces
  unknown_score: float
  unknown: int
  byte_ids: list[int]
  splits_marks: bool
  mark_T: np.ndarray

  @classmethod
  def of(cls, proto):
    kinds = type(proto).SentencePiece
    by_name = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = [p.score for p in proto.pieces if p.type == kinds.NORMAL]
    worst = np.float32(min(normal)) - np.float32(UNKNOWN_PENALTY)
    bytes_ = [by_name.get(f'<0x{b:02X}>', -1) for b in range(256)]
    mark = [bytes_[b] for b in tokenizers.SPACE.encode()]
    dummy = proto.normalizer_spec.add_dummy_prefix
    return cls(
      letters={p.piece for p in proto.pieces if len(p.piece) == 1 and p.type == kinds.NORMAL},
      all_letters=set().union(*(p.piece for p in proto.pieces)),
      unknown_score=float(worst),
      unknown=next(i for i, p in enumerate(proto.pieces) if p.type == kinds.UNKNOWN),
      byte_ids=bytes_ if proto.trainer_spec.byte_fallback else [],
      splits_marks=-1 not in mark and not dummy,
      mark_T=np.array(mark, np.int32),
    )


def of(tokenizer: tokenizers.Tokenizer) -> Encoder | None:
  """Returns an encoder in parts; None for other models, or if no place is safe."""
  model = tokenizer.files.get(tokenizers.PIECES)
  if not model:
    return None
  is_safe = splitting.between_pieces(model, 'UNIGRAM')
  return Encoder(model, is_safe) if is_safe and _is_usual(model) else None


def _is_usual(model: bytes) -> bool:
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
  proto.ParseFromString(model)
  spec = proto.normalizer_spec
  return (
    not any(p.type in (p.UNUSED, p.USER_DEFINED) for p in proto.pieces)
    and all(piece.score <= 0 for piece in proto.pieces)  # a logarithm
    and (spec.add_dummy_prefix or not spec.remove_extra_whitespaces)
  )
