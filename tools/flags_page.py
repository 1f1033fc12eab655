"""Writes docs/reference/flags.md from the schema of mtp_jax.config.

python tools/flags_page.py            writes the page
python tools/flags_page.py --check    exit status 1 if the page is out of date
"""

import pathlib
import sys
import typing

from mtp_jax.cli import main as cli
from mtp_jax.config import renamed, schema

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'reference' / 'flags.md'
HEAD = """\
# Flags

Written by `python tools/flags_page.py` from `mtp_jax/config/schema.py` and
`mtp_jax/config/commands.py`.

Every hyper-parameter is a flag `--section.field=VALUE` of `mtp COMMAND`, and a line of a
flag file. `--flagfile=FILE` inserts the flags of a file; files nest, and of several
values of a flag the last one wins. `mtp COMMAND --help` lists the flags of a command. A
value outside the limits, or a combination that cannot work, exits with status 2 and one
line that names the flag.

*Fixed* marks a flag that changes the result of a run: resuming a run with another value
is refused, and the message states both values. All other flags may change between two
sessions of a run.

## Flags without a section

| flag | commands | meaning |
|---|---|---|
| `--flagfile=FILE` | all | inserts the flags of a file, at this place |
| `--out=FILE` | {out} | the report as JSON; of `generate` a `.jsonl`, one row per prompt |
| `--prompt=TEXT` | {prompt} | the prompt, as text |
| `--prompt_ids=1,5,9` | {prompt_ids} | the prompt, as token ids; prints token ids |
"""


def users(name: str) -> str:
  """Returns the commands whose help lists a section or a flag."""
  found = [f'`{c}`' for c, command in cli.COMMANDS.items() if name in command.sections]
  return ', '.join(found)


def shown(value: object) -> str:
  if value in ('', ()):
    return 'empty'
  return f'`{value}`'


def number(value: float) -> str:
  """Returns a limit as one would write it."""
  if isinstance(value, int) or value == int(value) and abs(value) < 1e15:
    whole = int(value)
    power = whole.bit_length() - 1
    if whole >= 2**14 and whole == 2**power:
      return f'2^{power}'
    if whole == 2**31 - 1:
      return '2^31 - 1'
    if whole == 2**32 - 1:
      return '2^32 - 1'
    return f'{whole:,}' if whole < 10**7 else f'{value:.0e}'.replace('e+0', 'e')
  return f'{value:g}'


def allowed(metadata: typing.Mapping) -> str:
  """Returns the choices or the limits of a field."""
  if 'choices' in metadata:
    return ', '.join(f'`{choice}`' for choice in metadata['choices'])
  parts = []
  for key, sign in (('min', '≥'), ('above', '>'), ('max', '≤'), ('below', '<')):
    if key in metadata:
      parts.append(f'{sign} {number(metadata[key])}')
  return ', '.join(parts)


def escaped(text: str) -> str:
  return text.replace('|', '\\|').replace('<', '&lt;').replace('*', '\\*').replace('_', '\\_')


def page() -> str:
  lines = [HEAD.format(**{name: users(name) for name in ('out', 'prompt', 'prompt_ids')})]
  sections = typing.get_type_hints(schema.CommandConfig)
  by_section: dict[str, list] = {}
  for name, field in schema.fields().items():
    section, _, _ = name.partition('.')
    by_section.setdefault(section, []).append((name, field))
  for attribute, cls in sections.items():
    section = attribute.rstrip('_')
    about = ' '.join(cls.__doc__.split('\n\n')[0].split())
    used = users(section)
    lines += [f'## {section}', '', about + (f' Commands: {used}.' if used else ''), '']
    lines += ['| flag | default | values | fixed | meaning |', '|---|---|---|---|---|']
    for name, field in by_section[section]:
      fixed = 'fixed' if name in schema.fixed() else ''
      lines.append(
        f'| `--{name}` | {shown(field.default)} | {allowed(field.metadata)} | {fixed}'
        f' | {escaped(field.metadata["help"])} |'
      )
    lines.append('')
  lines += [
    '## Renamed flags',
    '',
    'A command line with a former name is refused with the name of today. Flag files and'
    ' checkpoints of earlier versions are read under both.',
    '',
    '| former name | today |',
    '|---|---|',
  ]
  lines += [f'| `--{old}` | `--{new}` |' for old, new in renamed.RENAMED.items()]
  lines += [
    '| `--{}` | `{}` |'.format(old, new.replace('|', '\\|'))
    for old, new in renamed.ARGUMENTS.items()
  ]
  lines += [
    f'| `--{old}={value}` | `--{renamed.RENAMED[old]}={new}` |'
    for (old, value), new in renamed.VALUES.items()
  ]
  lines += [
    '| `--decode.draft=N` (N > 0) | `--decode.num_draft_tokens=N - 1` |',
    '| `--decode.draft=0` | `--decode.num_draft_tokens=all` |',
  ]
  return '\n'.join(lines) + '\n'


def main(args: list[str]) -> int:
  text = page()
  if '--check' in args:
    return int(not PAGE.exists() or PAGE.read_text() != text)
  PAGE.parent.mkdir(parents=True, exist_ok=True)
  PAGE.write_text(text)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
