"""Conversations: a chat template makes them texts, whose loss covers the assistant's turns.

A template is a jinja2 program among the files of a tokenizer, which writes messages as its
model has read them (https://huggingface.co/docs/transformers/chat_templating). It runs in
jinja2's sandbox, with the functions that Transformers defines. The result is encoded whole:
special tokens in it are tokens.
"""

import datetime
import functools
import json
import re
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import fields
from mtp_jax.data import special_tokens, tokenizers
from mtp_jax.io import jsonl

FIELDS = 'messages', 'tools', 'documents', 'chat_template_kwargs'  # of a conversation
FORM = 'messages must be a list of objects with a role and a content'
MARK = uuid.uuid4().hex  # around what a template marks as generated, until it is removed
MARKS = re.compile(r'\{%[-+]?\s*generation\s*[-+]?%\}')
REASONING = 'reasoning_content', 'thinking', 'reasoning'  # names of one field
TEMPLATE = 'chat_template.jinja'


class Template(NamedTuple):
  """A compiled chat template.

  variables: the special tokens by name, as bos_token. marks: whether it marks what the
  assistant generates, by {% generation %}. special: matches the special tokens."""

  program: Any
  variables: dict[str, str]
  marks: bool
  special: re.Pattern

  def writes(self, record: dict, messages: list[dict], prompt: bool = False) -> str:
    """Renders messages; with `prompt`, up to where the assistant's next turn begins."""
    try:
      return self.program.render(
        messages=messages,
        tools=record.get('tools'),
        documents=record.get('documents'),
        add_generation_prompt=prompt,
        **self.variables | (record.get('chat_template_kwargs') or {}),
      )
    except Exception as error:  # a template may fail like any program
      line = str(error).partition('\n')[0] or type(error).__name__
      raise ValueError(f'the chat template fails: {line}') from error


def template_of(tokenizer: tokenizers.Tokenizer | None) -> Template:
  """Compiles the chat template of a tokenizer; raises ConfigError if it has none."""
  name = tokenizer.name if tokenizer else 'train'
  files = tokenizer.files if tokenizer else {}

  def fail(problem):
    return fields.ConfigError('data.tokenizer', name, problem)

  about = jsonl.loads(files.get(tokenizers.ENDS, b'{}'), tokenizers.ANY)
  try:
    source = files[TEMPLATE].decode() if TEMPLATE in files else about.get('chat_template')
  except UnicodeDecodeError as error:
    raise fail(f'{TEMPLATE} beside it is not UTF-8 text') from error
  if isinstance(source, list):  # several, by name
    several = [x for x in source if isinstance(x, dict)]
    source = {x.get('name'): x.get('template') for x in several}.get('default')
  if not isinstance(source, str) or 'tokenizer.json' not in files:
    raise fail(
      'has no chat template, which messages need: hf:FOLDER/tokenizer.json'
      f' with {TEMPLATE} beside it, or with chat_template in {tokenizers.ENDS}'
    )
  try:
    import jinja2

    program = _environment().from_string(source)
  except ImportError as error:
    raise fail('needs jinja2: pip install "mtp_jax[data]"') from error
  except jinja2.TemplateSyntaxError as error:
    raise fail(f'its chat template, line {error.lineno}: {error.message}') from error
  added = jsonl.loads(files['tokenizer.json']).get('added_tokens') or ()
  special = [re.escape(token['content']) for token in added if token.get('special')]
  more = about.get('extra_special_tokens')  # of older versions a list, without names
  stated = about | (more if isinstance(more, dict) else {})
  named = {name: _content(token) for name, token in stated.items() if name.endswith('_token')}
  return Template(
    program,
    {name: text for name, text in named.items() if text is not None},
    bool(MARKS.search(source)),
    re.compile('|'.join(special) or '(?!)'),
  )


def _content(token) -> str | None:
  token = token.get('content') if isinstance(token, dict) else token
  return token if isinstance(token, str) else None


@functools.cache
def _environment():
  import jinja2
  from jinja2 import ext, nodes, sandbox

  class Generation(ext.Extension):
    """{% generation %} … {% endgeneration %}, around what the assistant generates."""

    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      return nodes.CallBlock(self.call_method('marked'), [], [], body).set_lineno(line)

    def marked(self, caller):
      return MARK + caller() + MARK

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  made = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
  )
  made.filters['tojson'] = tojson
  made.globals['raise_exception'] = raise_exception
  made.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  return made


def prompt(template: Template, record: dict) -> str:
  """Renders a conversation up to where the assistant's next turn begins.

  Raises:
    ValueError: the record is no conversation, has a special token in a message, or its
      template refuses it.
  """
  messages = _messages(record)
  if has_special(template, record):
    raise ValueError('has the text of a special token in a message')
  return template.writes(record, messages, prompt=True).replace(MARK, '')


def has_special(template: Template, record: dict) -> bool:
  """Whether a message contains the text of a special token, which would become one."""
  return any(map(template.special.search, _strings([record.get(name) for name in FIELDS])))


def _strings(value) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, list | dict):
    for part in [*value, *value.values()] if isinstance(value, dict) else value:
      yield from _strings(part)


def conversation(template: Template, record: dict) -> tuple[str, tuple[int, ...]]:
  """Renders a conversation with the assistant's turns.

  They are what the template marks as generated. Without marks a turn is what its message
  adds to the rendering of those before it.

  Returns:
    (text, loss spans as of documents.Document); no spans without an assistant's turn.

  Raises:
    ValueError: the record is no conversation, its template refuses it, or rewrites
      earlier turns, so that no part of the text is what a turn adds.
  """
  messages = _messages(record)
  text = template.writes(record, messages)
  if template.marks:
    parts = text.split(MARK)
    ends = np.cumsum([len(part) for part in parts])
    return ''.join(parts), tuple(ends[:-1].tolist())
  spans = []
  for i, message in enumerate(messages):
    if message['role'] != 'assistant':
      continue
    before = template.writes(record, messages[:i], prompt=True) if i else ''
    after = template.writes(record, messages[: i + 1])
    if not after.startswith(before):
      raise ValueError(
        f'the chat template begins turn {i + 1} otherwise than it prompts for it, and marks'
        ' no text as generated'
      )
    if not text.startswith(after):
      raise ValueError(
        f'the chat template rewrites turn {i + 1} when others follow, and marks no text as'
        ' generated: end the conversation there'
      )
    spans += [len(before), len(after)]
  return text, tuple(spans)


def _messages(record: dict) -> list[dict]:
  """Returns the messages without null fields, as Transformers hands them to a template."""
  messages = record.get('messages')
  if not (isinstance(messages, list) and messages):
    raise ValueError(FORM)
  if not all(isinstance(x, dict) and isinstance(x.get('role'), str) for x in messages):
    raise ValueError(FORM)
  kwargs = record.get('chat_template_kwargs')
  if not isinstance(kwargs, dict | None):
    raise ValueError('chat_template_kwargs must be an object')
  messages = [_message(message) for message in messages]
  for message in messages:
    has_more = message.keys() - {'role'}  # tool_calls alone, for example
    if not (has_more and isinstance(message.get('content', ''), str | list)):
      raise ValueError(FORM)
  return messages


def _message(message: dict) -> dict:
  message = {name: value for name, value in message.items() if value is not None}
  reasoning = [message[name] for name in REASONING if name in message][:1]
  for name in REASONING[:2] if reasoning else ():
    message.setdefault(name, reasoning[0])
  return message


def encode(
  text: str, loss_spans: tuple[int, ...], tokenizer: tokenizers.Tokenizer
) -> tuple[np.ndarray, tuple[int, ...]]:
  """Encodes a rendering, special tokens included.

  Returns:
    (ids_T, loss spans in tokens): a token is in the loss if one of its characters is.
  """
  fast = special_tokens.with_special_tokens(tokenizer.files['tokenizer.json'])
  found = fast.encode(text, add_special_tokens=False)
  start_T, end_T = np.array(found.offsets, np.int64).reshape(-1, 2).T
  inside_T = np.zeros(len(start_T), bool)
  for first, last in zip(loss_spans[::2], loss_spans[1::2], strict=True):
    inside_T |= (end_T > first) & (start_T < last)
  switches = np.flatnonzero(np.diff(inside_T, prepend=False))
  # No switch at all would mean that the loss covers everything.
  return np.array(found.ids, np.int32), tuple(switches.tolist()) or (0, 0)
