"""`induction`: does a model repeat a made-up name that is in its context?

In passages of held-out text a character's name is replaced by a random one of
exactly two tokens. After the first token of a later occurrence, the second is
predictable from earlier occurrences only (Gloeckle et al. 2024,
https://arxiv.org/abs/2404.19737, section 4.1). Head 1, teacher-forced.
"""

import collections
import itertools
import math
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mtp_jax.config import fields, parse, schema
from mtp_jax.data import documents, readers, records, tokenizers
from mtp_jax.data import store as store_lib
from mtp_jax.evals import intervals, scores, suites
from mtp_jax.evals import subject as subject_lib

# A capitalized word inside a sentence; excluded if it also occurs in lower case.
NAME = re.compile(r'(?<=[a-z,;] )[A-Z][a-z]{2,}\b')
WORD = re.compile(r'[A-Za-z]+')
OCCURRENCES = 3  # minimum per name and passage
TRIES = 2000
BEFORE = {1: 'once', 2: '2 or 3 times', 4: '4 times or more'}  # levels


class Item(NamedTuple):
  """A passage with a made-up name, and the positions of its two tokens."""

  document: str
  name: str
  ids: np.ndarray  # starts with BOS
  at: list[int]  # indices of the first token of each occurrence
  before: list[int]  # number of earlier occurrences, of any tokens


class Second(NamedTuple):
  """A model's prediction of the second token of one occurrence."""

  before: int  # number of earlier occurrences
  right: bool  # whether it is the top token
  nats: float  # -log of its probability


def check(arg: str, cfg: schema.CommandConfig) -> None:
  check_documents('induction', arg, cfg)


def check_documents(name: str, arg: str, cfg: schema.CommandConfig) -> None:
  """Raises ConfigError unless there are texts, and no argument."""
  if arg:
    raise fields.ConfigError(
      'eval.tasks', f'{name}:{arg}', 'takes no argument; --eval.data names documents'
    )
  if cfg.eval.data:
    _named(cfg)
  elif not cfg.data.store:
    raise fields.ConfigError(
      'eval.data', '', 'needs documents, in the format of --data.documents, or a store'
    )


def run(subject: subject_lib.Subject, arg: str) -> suites.Result:
  cfg = subject.cfg
  items = make(texts(cfg, subject.tokenizer), subject.tokenizer, cfg.data.seq_len, cfg.eval.limit)
  if not items:
    raise data_error(
      cfg,
      f'has no name that occurs {OCCURRENCES} times in --data.seq_len={cfg.data.seq_len} tokens',
    )
  batch = cfg.decode.batch_size or subject_lib.ROWS
  found = scores.of_rows(
    subject.model,
    [item.ids for item in items],
    subject.mesh,
    cfg,
    n_active=subject_lib.next_token_heads(subject),
    batch_size=batch,
  )
  # Position p of a row predicts ids[p + 1].
  seconds = [
    [
      Second(n, bool(row.argmax[0, p] == item.ids[p + 1]), float(row.nats[0, p]))
      for n, p in zip(item.before, item.at, strict=True)
    ]
    for item, row in zip(items, found, strict=True)
  ]
  scalars = score(list(itertools.chain(*seconds)))
  n_documents = len({item.document for item in items})
  lines = [
    f'{len(items):,} passages of {n_documents:,} documents,'
    f' {sum(n > 0 for item in items for n in item.before):,} later'
    f' occurrences, accuracy of the second token'
    f' {intervals.shown(scalars, "accuracy")}; at first'
    f' occurrences {intervals.shown(scalars, "first_occurrence")}',
    *(
      f'  seen {times} before: {intervals.shown(scalars, f"accuracy_{of}")}'
      for of, times in BEFORE.items()
    ),
    f'  loss {scalars["nats"]:.2f} nats, at first occurrences {scalars["first_nats"]:.2f}',
  ]
  return suites.Result(
    lines,
    scalars,
    [
      dict(document=item.document, name=item.name, right=[s.right for s in of_item])
      for item, of_item in zip(items, seconds, strict=True)
    ],
  )


def score(seconds: list[Second]) -> dict[str, float]:
  """Returns accuracy by number of earlier occurrences, and mean nats (NaN if there
  are none), which improve long before the token is the top one. The intervals
  treat occurrences as independent, which those of one passage or document are
  not: they are too narrow, the more so the fewer documents there are."""

  def of(first, after=None):
    return [s for s in seconds if s.before >= first and (after is None or s.before < after)]

  def share(name, group):
    return intervals.share(name, sum(s.right for s in group), len(group))

  def nats(group):
    return sum(s.nats for s in group) / len(group) if group else math.nan

  later, first = of(1), of(0, 1)
  scalars = share('accuracy', later) | share('first_occurrence', first)
  for level, after in itertools.pairwise((*BEFORE, None)):
    scalars |= share(f'accuracy_{level}', of(level, after))
  return scalars | dict(nats=nats(later), first_nats=nats(first))


def data_error(cfg: schema.CommandConfig, why: str) -> fields.ConfigError:
  """Returns the error for `texts`, with the flag that locates them."""
  flag = 'eval.data' if cfg.eval.data else 'data.store'
  return fields.ConfigError(flag, schema.get(cfg, flag), why)


def _named(cfg: schema.CommandConfig) -> Iterator[documents.Document]:
  try:
    return readers.read(cfg.eval.data)
  except fields.ConfigError as error:
    raise fields.ConfigError('eval.data', *error.args[1:]) from error


def texts(cfg: schema.CommandConfig, tokenizer) -> Iterator[documents.Document]:
  """Yields the documents of --eval.data, or held-out ones of the run's first store."""
  if cfg.eval.data:
    yield from _named(cfg)
    return
  path = parse.parse_stores(cfg.data.store)[0].path
  opened = store_lib.open_store(path, verify=False)
  sources = opened.manifest['sources'].split(',')
  if any(x.strip().endswith(f'#{records.CONVERSATION}') for x in sources):
    # The text of special tokens is lost.
    raise data_error(cfg, 'holds conversations; --eval.data names other texts')
  split = opened.split(cfg.eval.split)
  for m, tokens in enumerate(split.documents()):
    yield documents.Document(f'{cfg.eval.split} {m}', tokenizer.decode(tokens))


def make(
  found: Iterator[documents.Document], tokenizer, seq_len: int, limit: int = 0
) -> list[Item]:
  """Makes passages of at most seq_len + 1 tokens with one name replaced in each,
  deterministically. Of `limit` > 0 passages, takes the first of each document,
  then the second of each, and so on."""
  pool = _pool(tokenizer)

  def of_one(document: documents.Document) -> Iterator[Item]:
    lower = set(WORD.findall(document.text))
    names = {n for n in NAME.findall(document.text) if n.lower() not in lower}
    for number, passage in enumerate(_passages(document.text, 4 * seq_len)):
      rng = random.Random(f'{document.name}:{number}')
      item = _item(
        document.name, passage, names, pool, tokenizer=tokenizer, seq_len=seq_len, rng=rng
      )
      if item:
        yield item

  if not limit:
    return [item for document in found for item in of_one(document)]
  items = []
  # At most `limit` texts in memory at the same time, enough for one item of each.
  while len(items) < limit and (some := list(itertools.islice(found, limit))):
    rounds = itertools.zip_longest(*map(of_one, some))
    here = (item for of_round in rounds for item in of_round if item)
    items += itertools.islice(here, limit - len(items))
  return items


def _passages(text: str, size: int) -> Iterator[str]:
  """Yields passages of whole paragraphs, of about `size` characters each."""
  passage = ''
  for paragraph in text.split('\n\n'):
    passage += paragraph + '\n\n'
    if len(passage) >= size:
      yield passage
      passage = ''
  if passage:
    yield passage


def _item(document, passage, names, pool, *, tokenizer, seq_len, rng):
  words = collections.Counter(WORD.findall(passage))
  counts = {word: n for word, n in words.items() if word in names}
  if not counts:
    return None
  old = max(counts, key=counts.__getitem__)
  if counts[old] < OCCURRENCES:
    return None
  name, pair = _name(pool, tokenizer, rng)
  text = re.sub(rf'\b{old}\b', name, passage)
  ids = np.array([*tokenizer.start, *tokenizer.encode(text)])[: seq_len + 1]
  # Occurrences with other tokens, as after a quotation mark, are not scored.
  at = [int(p) for p in np.flatnonzero((ids[:-1] == pair[0]) & (ids[1:] == pair[1]))]
  if len(at) < OCCURRENCES or passage.count(name):
    return None
  before = [len(re.findall(rf'\b{name}\b', tokenizer.decode(ids[:p]))) for p in at]
  return Item(document, name, ids, at, before)


def _pool(tokenizer: tokenizers.Tokenizer):
  """Returns tokens that start a name after a space, and those that may continue it."""
  before = tokenizer.encode('the')
  n = len(tokenizer.decode(before))
  firsts, seconds = [], []
  for token in range(tokenizer.vocab_size):
    text = tokenizer.decode([*before, token])[n:]
    if re.fullmatch(r' ?[A-Z][a-z]*', text):
      firsts.append((token, text))
    elif re.fullmatch(r'[a-z]+', text):
      seconds.append((token, text))
  spaced = [pair for pair in firsts if pair[1].startswith(' ')]
  return spaced or firsts, seconds


def _name(pool, tokenizer, rng) -> tuple[str, tuple[int, int]]:
  """Returns a random name and its two tokens."""
  for _ in range(TRIES):
    (a, start), (b, end) = (rng.choice(tokens or [(0, '')]) for tokens in pool)
    name = (start + end).strip()
    ids = list(tokenizer.encode(f'the {name} was'))
    if len(name) > 1 and (a, b) in zip(ids, ids[1:]):  # noqa: B905
      return name, (a, b)
  raise fields.ConfigError('data.tokenizer', tokenizer.name, 'has no names of two tokens')
