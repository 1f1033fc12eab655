"""TODO of mtp_jax.config."""

import dataclasses

from mtp_jax.io import jsonl, paths

DTYPES = ('float32', 'bfloat16')
INT32 = 2**31 - 1
UNSIGNED = dict(min=0, max=INT32)
POSITIVE = dict(min=1, max=INT32)


def limits(most, least=1):
  """Limits of a number; the upper one is far beyond any use."""
  return dict(min=least, max=most)


class ConfigError(paths.InputError):
  """One line that names the flag, its value and what is allowed."""

  def __init__(self, flag: str, value: object, allowed: str):
    ValueError.__init__(self, flag, value, allowed)  # as pickle hands them on

  def __str__(self):
    flag, value, allowed = self.args
    line = f'--{flag}={jsonl.one_line(value)}: '
    return line + jsonl.one_line(allowed, 1000)


def wrong_text(text: str) -> str:
  """Why a text cannot be a flag's: libraries can neither open nor store it.
  Empty if it can."""
  if '\0' in text:
    return 'must not contain a NUL character'
  try:
    text.encode()
  except UnicodeEncodeError:  # bytes of the command line that no decoder takes
    return 'must be UTF-8'
  return ''


class FileChanged(ConfigError):
  """An input that changed during a run; one process of several may find it."""


def field(default, help, *, result=True, **limits):
  metadata = dict(help=help, result=result, **limits)
  return dataclasses.field(default=default, metadata=metadata)
