"""Flags: definition from the schema, flag files, parsing, help texts."""

import collections
import dataclasses
import os
import re
import textwrap
from typing import NamedTuple

from absl import flags

from mtp_jax.config import fields, renamed, schema, validate
from mtp_jax.io import paths

_DEFINE = {
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
  bool: flags.DEFINE_boolean,
  tuple: flags.DEFINE_multi_string,  # may be repeated
}
_ALLOWED = {int: 'must be an integer', float: 'must be a number', bool: 'must be true or false'}
_ILLEGAL = re.compile('flag --([^=]+)=(.*?): ', re.DOTALL)
# Limits over all flag files of a command; absl's time is quadratic in flags.
MOST_FILES, MOST_FLAGS, MOST_BYTES = 1000, 10_000, 2**20


def expand(args: list[str]) -> list[str]:
  """Replaces each --flagfile by the flags in it, recursively.

  Raises:
    ConfigError: a file is missing, not a flag file, or includes itself; all files
      together exceed MOST_FILES or MOST_FLAGS.
  """
  return _expanded(args, '', (), collections.Counter())


def _expanded(args, beside: str, seen: tuple, total) -> list[str]:
  """Expands recursively; `seen` are the real paths of the including files, `total`
  counts all."""
  out, rest = [], iter(args)
  for arg in rest:
    name, _, path = arg.partition('=')
    if name not in ('--flagfile', '-flagfile'):
      out.append(arg)
      continue
    path = path or next(rest, '')
    lines, real = _read_flag_file(path, beside)
    if real in seen:
      cycle = ' > '.join([*seen[seen.index(real) :], real])
      raise fields.ConfigError('flagfile', path, f'includes itself: {cycle}')
    total.update(files=1, flags=len(lines))
    for what, most in (('files', MOST_FILES), ('flags', MOST_FLAGS)):
      if total[what] > most:
        raise fields.ConfigError('flagfile', path, f'with it there are more than {most:,} {what}')
    out += _expanded(lines, os.path.dirname(real), (*seen, real), total)
  return out


def _read_flag_file(path: str, beside: str) -> tuple[list[str], str]:
  """Returns (lines without comments, real path) of a flag file."""

  def wrong(problem):
    return fields.ConfigError('flagfile', path, problem)

  if problem := fields.wrong_text(path):
    raise wrong(problem)
  if paths.scheme(path):
    real = paths.absolute(path)
    found = paths.as_path(real).exists()
  else:
    both = (os.path.join(beside, path), path)
    found = [p for p in both if os.path.isfile(p)]
    real = os.path.realpath(found[0]) if found else ''
  if not found:
    part = os.path.normpath(path).split(os.sep)[0] == 'experiments'
    raise wrong(
      'no such file'
      + '; experiments/ is in the source repository, not in the installed package' * part
    )
  try:
    with paths.as_path(real).open('rb') as file:
      data = file.read(MOST_BYTES + 1)
    lines = [line.strip() for line in data.decode('utf-8-sig').split('\n')]
  except UnicodeDecodeError:
    raise wrong('is not text') from None
  except OSError as error:
    raise wrong(f'cannot be read: {error.strerror or error}') from error
  if len(data) > MOST_BYTES:
    raise wrong(f'has more than {MOST_BYTES:,} bytes')
  args = [line for line in lines if line and not line.startswith('#')]
  for arg in args:
    if not arg.startswith('-'):
      raise wrong(f'{arg!r} is not a flag')
  if os.path.basename(real) == 'run.flags':  # perhaps of an earlier version
    args = [today for arg in args for today in _of_today(arg)]
    given = dict(arg.lstrip('-').split('=', 1) for arg in args if '=' in arg)
    before = renamed.trunk_state(given.get('heads.family')) if _is_of_before(given) else {}
    args = [f'--{name}={value}' for name, value in before.items()] + args
  return args, real


def _is_of_before(given: dict[str, str]) -> bool:
  """Whether run.flags, which has every field of a run, lacks --heads.trunk_state."""
  return 'heads.stride' in given and 'heads.trunk_state' not in given


def _of_today(arg: str) -> list[str]:
  """Returns a line of run.flags under today's names."""
  name, equals, value = arg.lstrip('-').partition('=')
  if not value and name in renamed.ARGUMENTS:
    return []
  found = renamed.successor(name, value) if equals else None
  return [f'--{found[0]}={found[1]}'] if found else [arg]


def _define() -> flags.FlagValues:
  values = flags.FlagValues()
  values.set_gnu_getopt(True)  # flags may follow the runs of a report
  for name, field in schema.fields().items():
    help = field.metadata['help']
    if 'choices' in field.metadata:
      help += f' [{" | ".join(field.metadata["choices"])}]'
    default = field.default
    assert default is not dataclasses.MISSING
    default = list(default) if field.type is tuple else default
    _DEFINE[field.type](name, default, help, flag_values=values)
  for name, help in TEXTS.items():
    flags.DEFINE_string(name, None, help, flag_values=values)
  return values


# Flags of a command line that are not fields of a Config.
TEXTS = {
  'out': 'JSON file for the report; of generate, .jsonl: a row per prompt',
  'prompt': 'text to continue',
  'prompt_ids': 'token ids to continue, with commas; ids are printed',
}


class Parsed(NamedTuple):
  """A command line: the fields it sets, the file for a report, the rest."""

  given: dict[str, object]
  out: str
  rest: list[str]
  prompt: str | None = None
  prompt_ids: str | None = None

  def config(self, base: schema.CommandConfig | None = None) -> schema.CommandConfig:
    """Returns `base` (or the defaults) with the given fields, validated."""
    return validate.configured(self.given, base)


def parse(args: list[str]) -> Parsed:
  """Reads flags and flag files.

  Raises:
    ConfigError: a flag file is missing or invalid; a value has another type.
    absl.flags.Error: a flag is unknown.
  """
  values, args = _define(), expand(args)
  for arg in args:
    name = arg.lstrip('-').partition('=')[0] if arg.startswith('-') else ''
    # absl's own flag, and names that absl would compare with all others, recursively.
    if name == 'undefok' or len(name) > 100:
      raise flags.Error(f'{arg!r} is not a flag')
    if advice := renamed.advice(name, arg.partition('=')[2] if '=' in arg else None):
      raise flags.Error(advice)
  try:
    rest = values(['mtp', *args])[1:]
  except ValueError as error:  # of --noFLAG=VALUE
    raise flags.Error(str(error)) from error
  except flags.IllegalFlagValueError as error:
    # absl's reasons are Python's, which do not state what is allowed.
    found = _ILLEGAL.match(str(error))
    assert found
    name, value = found.groups()
    allowed = _ALLOWED[schema.fields()[name].type]
    raise fields.ConfigError(name, value, allowed) from error
  for text in rest:
    if problem := fields.wrong_text(text):
      raise flags.Error(f'argument {text!r}: {problem}')
  out = values['out'].value or ''
  if problem := fields.wrong_text(out):
    raise fields.ConfigError('out', out, problem)
  given = {
    name: schema.type_of(field)(values[name].value)
    for name, field in schema.fields().items()
    if values[name].present
  }
  return Parsed(given, out, rest, values['prompt'].value, values['prompt_ids'].value)


def _shown(name: str, default: object) -> str:
  return f'--{name}=' + (str(default) if default not in ('', [], None) else "''")


def short_usage(names: list[str]) -> str:
  """Returns a line per flag: its default and the first clause of its help."""
  found = _define()._flags()
  shown = [_shown(name, found[name].default) for name in names]
  width = min(max(map(len, shown)), 44)
  lines = []
  for name, flag in zip(names, shown, strict=True):
    help = re.split(r'[;:(]| \[', found[name].help)[0].strip()
    lines.append(f'  {flag:{width}}  {textwrap.shorten(help, 96 - width, placeholder=" …")}')
  return '\n'.join(lines)


def usage(sections: tuple[str, ...]) -> str:
  """Returns all flags of some sections, single ones, and of TEXTS, with help and
  default, grouped."""
  lines, found = [], _define()._flags()
  names = [*schema.fields(), *TEXTS]
  for section in sections:  # the command's own first
    group = [name for name in names if section in (name, name.split('.')[0])]
    lines += ['', section] if group and section not in names else []
    for name in group:
      lines.append(f'  {_shown(name, found[name].default)}')
      lines += textwrap.wrap(
        found[name].help, 96, initial_indent=' ' * 6, subsequent_indent=' ' * 6
      )
  return '\n'.join(lines).strip('\n')
