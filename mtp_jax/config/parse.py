"""Text forms of a Config: lists in flags, JSON, flag files, earlier versions."""

import dataclasses
import fractions
import json
import os
import re
import typing

from mtp_jax.config import renamed, schema
from mtp_jax.io import jsonl

VERSION = 3  # of the JSON form; incremented when a field changes its name or meaning


def to_json(cfg: schema.Config) -> str:
  """Returns the JSON form of a run, without the options of commands."""
  return json.dumps(dict(version=VERSION) | dataclasses.asdict(schema.run_config(cfg)), indent=1)


def _of_version_1(values: dict[str, object]) -> dict[str, object]:
  """Returns the 'section.field' values of a version 1 under today's names."""
  for group in 'trunk', 'heads':  # before --train.freeze existed, a rate of 0 froze
    if values.get(f'optim.{group}_lr') == 0:
      values |= {f'optim.{group}_lr': 1.0, 'train.freeze': group}
  values = {name: value for name, value in values.items() if name not in renamed.ARGUMENTS}
  return dict(renamed.successor(name, value) or (name, value) for name, value in values.items())


class OtherVersion(ValueError):
  """A Config that another version of this program wrote."""


def from_json(text: str | bytes) -> schema.Config:
  """Returns the Config that to_json wrote, without checking limits.

  Raises:
    OtherVersion: another version wrote it, or it has an unknown field.
    ValueError: it is not JSON, or a field has another type; in one line.
  """
  sections = jsonl.loads(text, {...: object})
  version = sections.pop('version', None)
  if version not in range(1, VERSION + 1):
    raise OtherVersion(f'config version {jsonl.one_line(version)}, this program reads {VERSION}')
  jsonl.check(sections, {...: {...: object}})
  values = {
    f'{section.rstrip("_")}.{name}': value
    for section, of in sections.items()
    for name, value in of.items()
  }
  if version == 1:
    values = _of_version_1(values)
  if version < 3:
    values = renamed.trunk_state(values.get('heads.family')) | values
  known, every = schema.fields(schema.Config), schema.fields()
  # Before it had its own options, a command's were saved with the run.
  values = {name: value for name, value in values.items() if name in known or name not in every}
  for name, value in values.items():
    if name not in known:
      raise OtherVersion(f'{jsonl.one_line(name)}: no such field; it is of another version')
    jsonl.check(value, known[name].type, name)
  return schema.replace(schema.Config(), **values)


def parse_numbers(text: str) -> tuple[int, ...]:
  """Parses '1,2,4' to (1, 2, 4), '' to ()."""
  return tuple(int(number) for number in text.split(',')) if text else ()


def parse_drafts(text: str) -> tuple[tuple[int, ...], bool]:
  """Parses '0,3,auto' to ((0, 3), True), '' to ((), False); auto at most once."""
  words = text.split(',') if text else []
  with_auto = 'auto' in words
  if with_auto:
    words.remove('auto')
  return tuple(int(word) for word in words), with_auto


def parse_stop_ids(text: str) -> tuple[int, ...] | None:
  """Parses '3,7' to (3, 7), 'none' to (), '' to None (unset)."""
  if not text:
    return None
  return () if text == 'none' else parse_numbers(text)


class StoreRef(typing.NamedTuple):
  """A store in a flag's value."""

  name: str
  path: str
  weight: str = '1'  # as written: decimal, hence exact

  @property
  def share(self) -> fractions.Fraction:
    return fractions.Fraction(self.weight)


STORE = re.compile(r'(?:([\w.-]+)=)?(.+?)(?::(\d+\.?\d*|\.\d+))?')


def parse_stores(text: str) -> tuple[StoreRef, ...]:
  """Parses 'a/b,c=d:.5' to (('b', 'a/b', '1'), ('c', 'd', '.5')).

  A path has no comma; one that starts like NAME= or ends like :WEIGHT can be written
  as ./PATH and PATH:1.
  """
  refs = []
  for entry in text.split(',') if text else ():
    match = STORE.fullmatch(entry.strip())
    if not match:
      raise ValueError('an empty path')
    name, path, weight = match.groups()
    name = name or os.path.basename(os.path.normpath(path))
    refs.append(StoreRef(name, path, weight or '1'))
    if not 1e-12 <= refs[-1].share <= 1e12:
      raise ValueError('weights must be from 1e-12 to 1e12')
  return tuple(refs)


def format_stores(refs: typing.Iterable[StoreRef]) -> str:
  """Returns the shortest text that parse_stores parses to refs."""
  entries = []
  for ref in refs:
    named = f'{ref.name}={ref.path}'
    forms = (ref.path, named, f'{ref.path}:{ref.weight}')
    forms += (f'{named}:{ref.weight}', f'{ref.path}:{ref.weight}')
    exact = (form for form in forms if parse_stores(form) == (ref,))
    # Some names, e.g. '~', cannot be written; then the path is.
    entries.append(next(exact, forms[-1]))
  return ','.join(entries)


def to_flag_file(cfg: schema.Config) -> str:
  """Returns all fields of a run as flag lines, without the workdir."""
  return ''.join(
    f'--{name}={schema.get(cfg, name)}\n'
    for name in schema.fields(schema.Config)
    if name != 'train.workdir'
  )
