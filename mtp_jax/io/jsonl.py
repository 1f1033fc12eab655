"""Reads JSON that comes from outside, with its one type check. Floor 0.

NaN and Infinity, which are not JSON, are read as null.

What a file must hold is data, a form:

  int, float, str, bool, None   that type: an int has 64 bits, a float may be an
                                integer and is at most 1e100, no bool is one
  range(a, b)                   an integer in it
  [FORM]                        a list, each element of that form
  (FORM, FORM, …)               one of these, the first that fits the type
  {'a': FORM, 'b?': FORM}       an object with a field a, perhaps a field b, and
                                no other; the key ... gives the form of others
  object                        anything
"""

import json
import re
from typing import Any

NATURAL = range(2**63)  # 0, 1, …
STEP = range(2**31)
NUMBER = (float, None)  # null: not finite, or nothing to measure
NAMES = {int: 'an integer', str: 'text', bool: 'true or false', None: 'null'}


def one_line(value: object, most: int = 200) -> str:
  """Returns its text with what does not print escaped, such as a line break,
  and the middle of a long one skipped."""
  text = str(value)
  if len(text) > most:
    half = most // 2
    text = f'{text[:half]}…({len(text):,} characters)…{text[-half:]}'
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def loads(text: bytes | str, form: Any = object) -> Any:
  """Parses one JSON value and checks its form.

  Raises:
    ValueError: one line that names the field, its value, and what it must be.
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
  """Returns a parsed value; ValueError, as of `loads`, if it has not the form.

  name: of the field that holds it.
  """
  forms = form if isinstance(form, tuple) else (form,)
  for one in forms:
    if _has_type(value, one):
      _check_within(value, one, name)
      return value
  wanted = ' or '.join(map(_wanted, forms))
  try:
    shown = json.dumps(value)
  except (TypeError, ValueError, RecursionError):  # e.g. of orbax, not of JSON
    shown = type(value).__name__
  raise ValueError(f'{name or "it"}={one_line(shown, 60)}: must be {wanted}')


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
  if form is float:  # what is larger has sums and squares that overflow
    return type(value) in (int, float) and abs(value) <= 1e100
  if form is str:  # half of a surrogate pair cannot be written
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
    wanted = fields.get(field, form.get(...))
    shown = of + one_line(field, 60)
    if field not in fields and ... not in form:
      raise ValueError(f'{shown}: no such field')
    check(element, wanted, shown)


def _wanted(form) -> str:
  if isinstance(form, range):
    upper = f' to {form.stop - 1:,}' if form.stop < 2**63 else ''
    return f'an integer from {form.start}{upper}'
  if isinstance(form, list):
    return 'a list'
  if isinstance(form, dict):
    return 'an object'
  return 'a number, at most 1e100' if form is float else NAMES[form]
