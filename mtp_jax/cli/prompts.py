"""Prompts of `mtp generate`, read from flags or a file and checked. Imports jax."""

import functools
import io
from typing import NamedTuple

import numpy as np

from mtp_jax.cli import flags
from mtp_jax.config import fields, parse
from mtp_jax.data import chat
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import load as load_lib
from mtp_jax.io import jsonl, paths


class Prompt(NamedTuple):
  """A prompt: token ids; its text, unless ids or messages were given; its line in a file
  and the other fields of that record; the messages of a conversation to continue."""

  ids: np.ndarray
  text: str | None
  line: int = 0
  fields: dict | None = None
  messages: list[dict] | None = None


def read_prompts(parsed: flags.Parsed, found: load_lib.CheckpointInfo) -> list[Prompt]:
  """Reads the prompts of --prompt, --prompt_ids or --decode.prompts, exactly one of
  which must be given, and checks them.

  A text starts a document: the begin-of-document token is prepended.
  """
  cfg, path = found.cfg, found.cfg.decode.prompts
  given = [parsed.prompt is not None, parsed.prompt_ids is not None, bool(path)]
  if sum(given) != 1:
    raise fields.ConfigError(
      'prompt',
      parsed.prompt or '',
      ('give one of' if any(given) else 'none is given; there are')
      + ' --prompt, --prompt_ids and --decode.prompts',
    )
  if parsed.prompt_ids is not None:
    prompts = [Prompt(_numbers(parsed.prompt_ids), None)]
  elif parsed.prompt is not None:
    prompts = [_encoded(parsed.prompt, found.tokenizer)]
  else:
    prompts = _read_file(path, found.tokenizer)
  ids = [prompt.ids for prompt in prompts]
  if path:
    names = [f'{path}, line {p.line}' for p in prompts]
  else:
    names = [
      f'--prompt_ids={parsed.prompt_ids}' if parsed.prompt is None else f'--prompt={parsed.prompt}'
    ]
  decoder_lib.check(ids, decoder_lib.cache_length(ids, cfg), cfg, names)
  return prompts


def _numbers(text: str) -> np.ndarray:
  try:
    return np.array(parse.parse_numbers(text), np.int64)
  except (ValueError, OverflowError):
    raise fields.ConfigError('prompt_ids', text, 'token ids, with commas') from None


def _encoded(text: str, tokenizer) -> Prompt:
  try:
    text.encode()
  except UnicodeEncodeError:
    raise fields.ConfigError('prompt', repr(text), 'is not text') from None
  ids = [*tokenizer.start, *tokenizer.encode(text)]
  return Prompt(np.array(ids, np.int64), text)


def _read_file(path: str, tokenizer) -> list[Prompt]:
  def wrong(problem):
    return paths.InputError(path, problem)

  path = paths.absolute(path)
  try:
    text = paths.as_path(path).read_bytes().decode('utf-8-sig')
    lines = [line.rstrip('\n') for line in io.StringIO(text, newline=None)]
  except UnicodeDecodeError as error:
    raise wrong('is not text') from error
  except OSError as error:
    raise wrong(f'cannot be read: {error.strerror or error}') from error
  template = functools.cache(lambda: chat.template_of(tokenizer))
  read = functools.partial(_of_record, template) if path.endswith('.jsonl') else _encoded
  prompts = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      prompt = read(line, tokenizer)
    except fields.ConfigError as error:
      raise wrong(f'line {number} {error.args[2]}') from error
    except ValueError as error:
      raise wrong(f'line {number} {error}') from error
    prompts.append(prompt._replace(line=number))
  if not prompts:
    raise wrong('has no prompt')
  return prompts


FORM = (
  'must be an object with prompt, a text, or prompt_ids, a list of token ids, or messages,'
  ' a conversation'
)


def _of_record(template, line: str, tokenizer) -> Prompt:
  """Parses a line of .jsonl; raises ValueError if it is invalid."""
  record = jsonl.loads(line)
  if not isinstance(record, dict):
    raise ValueError(FORM)
  known = ('prompt', 'prompt_ids', 'messages')
  fields = {k: v for k, v in record.items() if k not in known}
  text, ids, messages = (record.get(name) for name in known)
  given = [name for name in known if record.get(name) is not None]
  if len(given) > 1:
    raise ValueError(f'has both {given[0]} and {given[1]}')
  if messages is not None:
    rendered = chat.prompt(template(), record)
    ids, _ = chat.encode(rendered, (), tokenizer)
    return Prompt(ids.astype(np.int64), None, fields=fields, messages=messages)
  if isinstance(text, str):
    return _encoded(text, tokenizer)._replace(fields=fields)
  if isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids):
    return Prompt(np.array(ids, np.int64), None, fields=fields)
  raise ValueError(FORM)
