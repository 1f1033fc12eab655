"""Fields of a Config: their declaration, limits, and the error of a wrong value."""

import dataclasses
from typing import Any

from mtp_jax.io import jsonl, paths

DTYPES = ('float32', 'bfloat16')
INT32 = 2**31 - 1
UNSIGNED: dict[str, Any] = dict(min=0, max=INT32)
POSITIVE: dict[str, Any] = dict(min=1, max=INT32)


def limits(most, least=1) -> dict[str, Any]:
  """Returns limits of a number; the upper one is beyond any practical use."""
  return dict(min=least, max=most)


class ConfigError(paths.InputError):
  """An error of one line: the flag, its value and what is allowed."""

  def __init__(self, flag: str, value: object, allowed: str):
    ValueError.__init__(self, flag, value, allowed)  # the arguments that pickle restores

  def __str__(self):
    flag, value, allowed = self.args
    line = f'--{flag}={jsonl.one_line(value)}: '
    return line + jsonl.one_line(allowed, 1000)


def wrong_text(text: str) -> str:
  """Returns why a text cannot be the value of a flag, as libraries can neither open
  nor store it; '' if it can."""
  if '\0' in text:
    return 'must not contain a NUL character'
  try:
    text.encode()
  except UnicodeEncodeError:  # undecodable bytes of the command line
    return 'must be UTF-8'
  return ''


class FileChanged(ConfigError):
  """An input that changed during a run; a single process may detect it."""


def field(default, help, *, result=True, **limits):
  metadata = dict(help=help, result=result, **limits)
  return dataclasses.field(default=default, metadata=metadata)
