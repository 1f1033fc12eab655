"""Who is evaluated, and how it is asked to write. Floor 4."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import schedule, schema
from mtp_jax.data import tokenizers
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.model import heads

ROWS = 32  # decoded together, unless --decode.batch_size says otherwise
Say = Callable[[str], None]


class Subject(NamedTuple):
  """A model under evaluation.

  cfg is its own, with what the flags say of how it is asked. say() is told how
  far a long evaluation is.
  """

  name: str
  cfg: schema.Config
  model: Any  # lm.LM
  mesh: Any
  tokenizer: tokenizers.Tokenizer
  step: int
  decoder: decoder_lib.Decoder
  say: Say = lambda line: None


def next_token_heads(subject: Subject) -> int:
  """Heads that are computed for the next token: head 1 and those it sits on."""
  cfg = subject.cfg
  if not heads.family(cfg).reverse:
    return 1
  return schedule.trained_heads(cfg, subject.step)


def context(cfg: schema.Config) -> int:
  """Tokens of a text that the model has learned to read at once."""
  return max(cfg.data.seq_len, cfg.model.max_position_embeddings)


def beyond(subject: Subject, prompts: Sequence[str], max_new: int) -> list[str]:
  """A line, if some prompts are longer than it has learned to read."""
  room = context(subject.cfg) - max_new
  n = sum(1 + len(subject.tokenizer.encode(p)) > room for p in prompts)
  if not n:
    return []
  return [
    f'  {n:,} of them are longer, with {max_new:,} tokens that are written,'
    f' than the {context(subject.cfg):,} that it was trained on'
  ]


class Text(NamedTuple):
  """What a prompt was continued with."""

  text: str  # without the stop
  ids: np.ndarray  # all that was written: a stop ends a row a little later
  forwards: int  # passes that they took
  finish: str  # stop | length


class Ask(NamedTuple):
  """How prompts are to be continued."""

  max_new: int
  stop: tuple[str, ...] = ()  # strings that end a text, beside the end token
  samples: int = 1
  temperature: float = 0.0  # 0 = greedy
  top_p: float = 1.0
  seed: int = 0
  joined: bool = False  # goes on with the prompt's text, its first space kept


def continuations(
  subject: Subject, prompts: Sequence[str | np.ndarray], ask: Ask
) -> list[list[Text]]:
  """`ask.samples` continuations of each prompt, with the heads' drafts.

  A text starts a document; ids are taken as they are. What a row says depends
  on its prompt, the seed, the place of its prompt and of the sample alone, not
  on the batch.

  Raises:
    ConfigError: a prompt has more tokens than --decode.cache_length has room for.
  """
  cfg, tokenizer = subject.cfg, subject.tokenizer
  ids = [
    np.array([tokenizer.bos, *tokenizer.encode(p)], np.int64) if isinstance(p, str) else p
    for p in prompts
  ]
  jobs = [(i, j) for i in range(len(ids)) for j in range(ask.samples)]
  jobs.sort(key=lambda job: len(ids[job[0]]))  # rows of a batch are padded
  B = min(cfg.decode.batch_size or ROWS, len(jobs))
  decoder = subject.decoder.with_sampling(
    max_new_tokens=ask.max_new, temperature=ask.temperature, top_p=ask.top_p
  )
  found = [[None] * ask.samples for _ in ids]
  for first in range(0, len(jobs), B):
    batch = jobs[first : first + B]
    rows = [ids[i] for i, _ in batch]
    for (i, j), text in zip(batch, _batch(decoder, tokenizer, rows, batch, B, ask), strict=True):
      found[i][j] = text
    done = min(first + B, len(jobs))
    subject.say(f'{done:,} of {len(jobs):,} texts')
  return found


def _batch(decoder, tokenizer, rows, jobs, B: int, ask: Ask) -> list[Text]:
  longest = -(-max(map(len, rows)) // decoder_lib.SLOTS) * decoder_lib.SLOTS

  before = [tokenizer.decode(row) if ask.joined else '' for row in rows]

  def text_of(b: int, ids) -> str:
    if not ask.joined:
      return tokenizer.decode(ids)
    # A tokenizer may drop the space that begins a text.
    return tokenizer.decode([*rows[b], *ids])[len(before[b]) :]

  def ended(tokens) -> np.ndarray | None:
    # Called between segments even if nothing stops a text: a signal is heard
    # there, where all of it at once would be one call of minutes.
    if not ask.stop:
      return None
    return np.array([_cut(text_of(b, ids), ask.stop)[1] for b, ids in enumerate(tokens)])

  decoded = decoder(
    rows,
    rows=B,
    cache=decoder.cfg.decode.cache_length or longest + ask.max_new,
    seeds=[seed(ask.seed, i, j) for i, j in jobs],
    stop_ids=tokenizer.stop_ids,
    each=ended,
  )
  texts = []
  for b, (ids, forwards) in enumerate(zip(decoded.tokens, decoded.forwards, strict=True)):
    text, stopped = _cut(text_of(b, ids), ask.stop)
    stopped |= len(ids) > 0 and int(ids[-1]) in tokenizer.stop_ids
    finish = 'stop' if stopped else 'length'
    texts.append(Text(text, ids, int(forwards), finish))
  return texts


def seed(of_run: int, prompt: int, sample: int) -> int:
  """A row's own: neither prompts nor samples nor runs share draws."""
  digest = hashlib.sha256(f'{of_run} {prompt} {sample}'.encode()).digest()
  return int.from_bytes(digest[:4], 'little') % 2**31


def _cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
  """(text up to the first stop, whether there was one)."""
  found = [at for at in (text.find(s) for s in stop) if at >= 0]
  return (text[: min(found)], True) if found else (text, False)
