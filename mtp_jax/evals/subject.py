"""The model under evaluation, and how it generates texts."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import schedule, schema
from mtp_jax.data import tokenizers
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.model import heads

ROWS = 32  # default of --decode.batch_size
Report = Callable[[str], None]


class Subject(NamedTuple):
  """A model under evaluation.

  cfg is its own config, with the evaluation flags. report() receives the
  progress of a long evaluation.
  """

  name: str
  cfg: schema.CommandConfig
  model: Any  # lm.LM
  mesh: Any
  tokenizer: tokenizers.Tokenizer
  step: int
  decoder: decoder_lib.Decoder
  report: Report = lambda line: None


def next_token_heads(subject: Subject) -> int:
  """Returns the number of heads needed for the next token: head 1 and its inputs."""
  cfg = subject.cfg
  if not heads.family(cfg.heads).reverse:
    return 1
  return schedule.trained_heads(cfg, subject.step)


def context(cfg: schema.CommandConfig) -> int:
  """Returns the context length that the model was trained for, in tokens."""
  return max(cfg.data.seq_len, cfg.model.max_position_embeddings)


def context_warnings(subject: Subject, prompts: Sequence[str], max_new: int) -> list[str]:
  """Returns a line if some prompts exceed the context length."""
  budget = context(subject.cfg) - max_new
  n = sum(1 + len(subject.tokenizer.encode(p)) > budget for p in prompts)
  if not n:
    return []
  return [
    f'  {n:,} prompts with {max_new:,} new tokens exceed the'
    f' {context(subject.cfg):,} tokens that the model was trained on'
  ]


class Text(NamedTuple):
  """The continuation of a prompt."""

  text: str  # without the stop string
  ids: np.ndarray  # all generated tokens, some of them after a stop string
  forwards: int  # number of forward passes
  finish: str  # stop | length


class GenerationConfig(NamedTuple):
  """How prompts are continued."""

  max_new: int
  stop: tuple[str, ...] = ()  # stop strings, in addition to the end token
  samples: int = 1
  temperature: float = 0.0  # 0 = greedy
  top_p: float = 1.0
  seed: int = 0
  joined: bool = False  # keep a leading space of the continuation


def continuations(
  subject: Subject, prompts: Sequence[str | np.ndarray], generation: GenerationConfig
) -> list[list[Text]]:
  """Generates `generation.samples` continuations per prompt, with the heads' drafts.

  A text starts a document; ids are used as they are. A row depends only on its
  prompt, the seed, the index of its prompt and of the sample, not on the batch.

  Raises:
    ConfigError: a prompt exceeds --decode.cache_length.
  """
  cfg, tokenizer = subject.cfg, subject.tokenizer
  ids = [
    np.array([*tokenizer.start, *tokenizer.encode(p)], np.int64) if isinstance(p, str) else p
    for p in prompts
  ]
  jobs = [(i, j) for i in range(len(ids)) for j in range(generation.samples)]
  jobs.sort(key=lambda job: len(ids[job[0]]))  # rows of a batch are padded
  B = min(cfg.decode.batch_size or ROWS, len(jobs))
  decoder = subject.decoder.with_sampling(
    max_new_tokens=generation.max_new, temperature=generation.temperature, top_p=generation.top_p
  )
  found: list[list[Any]] = [[None] * generation.samples for _ in ids]
  for first in range(0, len(jobs), B):
    batch = jobs[first : first + B]
    rows = [ids[i] for i, _ in batch]
    for (i, j), text in zip(
      batch, _batch(decoder, tokenizer, rows, batch, B=B, generation=generation), strict=True
    ):
      found[i][j] = text
    done = min(first + B, len(jobs))
    subject.report(f'{done:,} of {len(jobs):,} texts')
  return found


def _batch(decoder, tokenizer, rows, jobs, *, B: int, generation: GenerationConfig) -> list[Text]:
  longest = -(-max(map(len, rows)) // decoder_lib.SLOTS) * decoder_lib.SLOTS

  before = [tokenizer.decode(row) if generation.joined else '' for row in rows]

  def text_of(b: int, ids) -> str:
    if not generation.joined:
      return tokenizer.decode(ids)
    # A tokenizer may drop a leading space.
    return tokenizer.decode([*rows[b], *ids])[len(before[b]) :]

  def ended(tokens) -> np.ndarray | None:
    # Called between segments even without stop strings, so that signals are
    # handled: a single call could take minutes.
    if not generation.stop:
      return None
    return np.array(
      [_truncate(text_of(b, ids), generation.stop)[1] for b, ids in enumerate(tokens)]
    )

  decoded = decoder(
    rows,
    rows=B,
    cache=decoder.cfg.decode.cache_length or longest + generation.max_new,
    seeds=[seed(generation.seed, i, j) for i, j in jobs],
    stop_ids=tokenizer.stop_ids,
    each=ended,
  )
  texts = []
  for b, (ids, forwards) in enumerate(zip(decoded.tokens, decoded.forwards, strict=True)):
    text, stopped = _truncate(text_of(b, ids), generation.stop)
    stopped |= len(ids) > 0 and int(ids[-1]) in tokenizer.stop_ids
    finish = 'stop' if stopped else 'length'
    texts.append(Text(text, ids, int(forwards), finish))
  return texts


def seed(of_run: int, prompt: int, sample: int) -> int:
  """Returns the seed of a row: distinct for each prompt, sample and run."""
  digest = hashlib.sha256(f'{of_run} {prompt} {sample}'.encode()).digest()
  return int.from_bytes(digest[:4], 'little') % 2**31


def _truncate(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
  """Returns (text up to the first stop string, whether there was one)."""
  found = [at for at in (text.find(s) for s in stop) if at >= 0]
  return (text[: min(found)], True) if found else (text, False)
