"""`stories`: induction on the stories of data/stories.py.

Whether head 1, teacher-forced, predicts the second token of a name of two tokens, by
what the story says before: how often the name occurred (0 = chance), how far the last
occurrence is, and whether the first token alone decides, no other character having it
(Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737, section 4.1). The intervals are
bootstraps over stories, whose occurrences are not independent.
"""

import collections
import itertools
import math
from typing import NamedTuple

import numpy as np

from mtp_jax.config import fields, schema
from mtp_jax.data import stories, tasks
from mtp_jax.evals import intervals, scores, suites, synthetic
from mtp_jax.evals import subject as subject_lib

NAME = 'stories'
BEFORE = {1: 'once', 2: 'two or three times', 4: 'four times or more'}  # occurrences
DISTANCES = {1: 'within 15 tokens', 16: '16 to 31', 32: '32 to 63', 64: '64 or more'}


class Mention(NamedTuple):
  """An occurrence of a name in a story."""

  at: int  # index of its first token
  before: int  # earlier occurrences of the name
  distance: int  # tokens since the last one; 0 at the first occurrence
  decided: bool  # whether no other name of the story has the same first token


class Second(NamedTuple):
  """A model's prediction of the second token of a Mention."""

  mention: Mention
  right: bool  # whether it is the top token
  nats: float  # -log of its probability


def check(arg: str, cfg: schema.CommandConfig) -> tasks.Named:
  return synthetic.check(NAME, arg, cfg)


def syllables(tokenizer, params: dict) -> tuple[set[int], set[int]]:
  """Returns the ids of the first, and of the second syllables of names.

  Raises:
    ConfigError: the tokenizer makes other than two tokens of a name.
  """

  def pair(name):
    ids = tokenizer.encode(name).tolist()
    if len(ids) != 2:
      raise fields.ConfigError(
        'eval.tasks', NAME, f'the name {name} has {len(ids)} tokens under {tokenizer.name}, not 2'
      )
    return ids

  firsts = stories.FIRSTS[: params['firsts']]
  seconds = stories.SECONDS[: params['seconds']]
  return (
    {pair(first + seconds[0])[0] for first in firsts},
    {pair(firsts[0] + second)[1] for second in seconds},
  )


def mentions(ids, firsts: set[int], seconds: set[int]) -> list[Mention]:
  """Returns the occurrences of names in a story's token ids."""
  ids = [int(i) for i in ids]
  found = [
    (p, pair)
    for p, pair in enumerate(itertools.pairwise(ids))
    if pair[0] in firsts and pair[1] in seconds
  ]
  sharing = collections.Counter(first for first, _ in {pair for _, pair in found})
  seen: collections.Counter = collections.Counter()
  last: dict[tuple[int, int], int] = {}
  out = []
  for p, pair in found:
    out.append(Mention(p, seen[pair], p - last.get(pair, p), sharing[pair[0]] == 1))
    seen[pair] += 1
    last[pair] = p
  return out


def run(subject: subject_lib.Subject, arg: str) -> suites.Result:
  cfg, tokenizer = subject.cfg, subject.tokenizer
  task = check(arg, cfg)
  firsts, seconds = syllables(tokenizer, task.params)
  texts = [item.answer for item in tasks.tests(task, cfg.eval.limit or tasks.N_TESTS)]
  whole = [np.array([*tokenizer.start, *tokenizer.encode(text)]) for text in texts]
  rows = [ids[: cfg.data.seq_len + 1] for ids in whole]
  found = scores.of_rows(
    subject.model,
    rows,
    subject.mesh,
    cfg,
    n_active=subject_lib.next_token_heads(subject),
    batch_size=cfg.decode.batch_size or subject_lib.ROWS,
  )
  # Position p of a row predicts ids[p + 1].
  by_story = [
    [
      Second(m, bool(row.argmax[0, m.at] == ids[m.at + 1]), float(row.nats[0, m.at]))
      for m in mentions(ids, firsts, seconds)
    ]
    for ids, row in zip(rows, found, strict=True)
  ]
  scalars = score(by_story) | other_nats(rows, found, by_story)
  lines = [str(task), *_table(by_story, scalars)]
  if cut := sum(len(row) < len(ids) for row, ids in zip(rows, whole, strict=True)):
    lines.append(f'{cut:,} stories are longer than --data.seq_len={cfg.data.seq_len}, and cut')
  return suites.Result(
    lines,
    scalars,
    [
      dict(story=text, right=[s.right for s in of_story])
      for text, of_story in zip(texts, by_story, strict=True)
    ],
  )


def groups() -> dict:
  """Returns the suffix of each group's scalars, and whether a Second belongs to it."""

  def between(value, first, after):
    return lambda s: s.mention.before and first <= value(s.mention) < (after or math.inf)

  found = {
    '': lambda s: s.mention.before,
    '_first': lambda s: not s.mention.before,
    '_decided': lambda s: s.mention.before and s.mention.decided,
  }
  for low, after in itertools.pairwise((*BEFORE, None)):
    found[f'_seen_{low}'] = between(lambda m: m.before, low, after)
  for low, after in itertools.pairwise((*DISTANCES, None)):
    found[f'_distance_{low}'] = between(lambda m: m.distance, low, after)
  return found


def score(by_story: list[list[Second]]) -> dict[str, float]:
  """Returns accuracy and nats, with intervals, of later occurrences, of first ones
  (accuracy_first), where the first token decides (accuracy_decided), and by number
  (accuracy_seen_1 …) and distance (accuracy_distance_1 …); NaN for an empty group."""
  scalars = {}
  for suffix, belongs in groups().items():
    of_stories = [[s for s in story if belongs(s)] for story in by_story]
    counts = [len(story) for story in of_stories]
    right = [sum(s.right for s in story) for story in of_stories]
    nats = [sum(s.nats for s in story) for story in of_stories]
    scalars |= intervals.bootstrap(f'accuracy{suffix}', right, counts)
    scalars |= intervals.bootstrap(f'nats{suffix}', nats, counts)
  return scalars


def other_nats(rows, found, by_story: list[list[Second]]) -> dict[str, float]:
  """Returns nats_other, the loss of head 1 on all tokens but the second ones of names,
  with its interval: what learning names costs elsewhere."""
  totals, counts = [], []
  for ids, row, story in zip(rows, found, by_story, strict=True):
    totals.append(float(row.nats[0].sum()) - sum(s.nats for s in story))
    counts.append(len(ids) - 1 - len(story))
  return intervals.bootstrap('nats_other', totals, counts)


def _table(by_story: list[list[Second]], scalars: dict[str, float]) -> list[str]:
  n_later = sum(s.mention.before > 0 for story in by_story for s in story)

  def line(suffix):
    nats = scalars[f'nats{suffix}']
    shown = '' if math.isnan(nats) else f', {nats:.2f} nats'
    return intervals.shown(scalars, f'accuracy{suffix}') + shown

  return [
    f'{len(by_story):,} stories, {n_later:,} later occurrences: accuracy of the second token'
    f' {line("")}; at first occurrences {line("_first")}',
    f'  where the first token decides: {line("_decided")}',
    *(f'  seen {times}: {line(f"_seen_{low}")}' for low, times in BEFORE.items()),
    *(f'  last seen {far}: {line(f"_distance_{low}")}' for low, far in DISTANCES.items()),
    f'  all other tokens: {scalars["nats_other"]:.3f} nats',
  ]
