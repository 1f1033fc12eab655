"""Parses and validates JSON input.

NaN and Infinity, which are not JSON, are read as null.

A schema is data, called a form here:

  int, float, str, bool, None   that type: an int has 64 bits, a float may be an
                                integer and is at most 1e100, neither is a bool
  range(a, b)                   an integer in the range
  [FORM]                        a list, each element of that form
  (FORM, FORM, …)               one of these, the first that fits the type
  {'a': FORM, 'b?': FORM}       an object with a field a, an optional field b, and
                                no other; the key ... is the form of other fields
  object                        anything
"""

import json
import re
from typing import Any

NATURAL = range(2**63)  # 0, 1, …
STEP = range(2**31)
NUMBER = (float, None)  # null: not finite, or not measured
NAMES = {int: 'an integer', str: 'text', bool: 'true or false', None: 'null'}


def one_line(value: object, most: int = 200) -> str:
  """Returns a value as text with unprintable characters, such as line breaks,
  escaped, and the middle of a long text elided."""
  text = str(value)
  if len(text) > most:
    half = most // 2
    text = f'{text[:half]}…({len(text):,} characters)…{text[-half:]}'
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def loads(text: bytes | str, form: Any = object) -> Any:
  """Parses one JSON value and checks its form.

  Raises:
    ValueError: one line with the field, its value, and what it must be.
  """
  try:
    # NaN and infinities, which some programs write, are not JSON.
    value = json.loads(text, parse_constant=lambda _: None)
  except RecursionError as error:
    raise ValueError('is not JSON: nested too deep') from error
  except UnicodeDecodeError as error:
    raise ValueError('is not JSON: it is not UTF-8') from error
  except ValueError as error:
    raise ValueError(f'is not JSON: {error}') from error
  return check(value, form)


def check(value: Any, form: Any, name: str = '') -> Any:
  """Returns a parsed value; raises ValueError, like `loads`, if it does not match.

  name: name of its field.
  """
  forms = form if isinstance(form, tuple) else (form,)
  for one in forms:
    if _has_type(value, one):
      _check_within(value, one, name)
      return value
  expected = ' or '.join(map(_describe, forms))
  try:
    shown = json.dumps(value)
  except (TypeError, ValueError, RecursionError):  # e.g. an object of orbax
    shown = type(value).__name__
  raise ValueError(f'{name or "it"}={one_line(shown, 60)}: must be {expected}')


def _has_type(value, form) -> bool:
  if form is object:
    return True
  if form is None:
    return value is None
  if isinstance(form, list | dict):
    return isinstance(value, type(form))
  if isinstance(form, range):
    return type(value) is int and value in form
  if form is int:
    return type(value) is int and -(2**63) <= value < 2**63
  if form is float:  # sums and squares of larger values overflow
    return type(value) in (int, float) and abs(value) <= 1e100
  if form is str:  # lone surrogates cannot be encoded
    return type(value) is str and not re.search('[\ud800-\udfff]', value)
  return type(value) is form


def _check_within(value, form, name: str) -> None:
  if isinstance(form, list):
    for i, element in enumerate(value):
      check(element, form[0], f'{name}[{i}]')
  if not isinstance(form, dict):
    return
  of = f'{name}.' if name else ''
  fields = {k.rstrip('?'): f for k, f in form.items() if k is not ...}
  for field in form:
    if field is not ... and not field.endswith('?') and field not in value:
      raise ValueError(f'has no field {of}{field}')
  for field, element in value.items():
    expected = fields.get(field, form.get(...))
    shown = of + one_line(field, 60)
    if field not in fields and ... not in form:
      raise ValueError(f'{shown}: no such field')
    check(element, expected, shown)


def _describe(form) -> str:
  if isinstance(form, range):
    upper = f' to {form.stop - 1:,}' if form.stop < 2**63 else ''
    return f'an integer from {form.start}{upper}'
  if isinstance(form, list):
    return 'a list'
  if isinstance(form, dict):
    return 'an object'
  return 'a number, at most 1e100' if form is float else NAMES[form]
