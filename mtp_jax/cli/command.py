"""Shared parts of commands: argument checks, jax configuration, reports."""

import json
import os
from typing import NamedTuple

from absl import flags as absl_flags

from mtp_jax.cli import flags
from mtp_jax.config import fields, schema
from mtp_jax.io import paths
from mtp_jax.parallel import chips


class Command(NamedTuple):
  """A command: its help and its flags. mtp_jax.cli.MODULE defines run(parsed) -> exit
  status, and imports jax inside, after its flags were checked."""

  help: str
  sections: tuple[str, ...]  # sections of flags, or single ones
  common: str  # the flags that --help shows
  module: str
  arguments: str = ''  # as in its usage


ARGUMENTS = {
  'CHECKPOINT': 'a run directory, or one of its checkpoints/STEP',
  'RUN': 'the directory of a run',
}


def require(cfg: schema.CommandConfig, name: str, what: str) -> None:
  if not schema.get(cfg, name):
    raise fields.ConfigError(name, '', f'give {what}')


def print_report(lines: list[str], values: dict, out: str, writes: bool = True) -> None:
  for line in lines:
    print(line, flush=True)
  if out and writes:
    paths.write(out, json.dumps(values, indent=1).encode())


def start_jax(cfg: schema.CommandConfig) -> None:
  chips.silence_compilers()
  import jax

  if cfg.train.compilation_cache:
    jax.config.update('jax_compilation_cache_dir', os.path.expanduser(cfg.train.compilation_cache))


def parse_flags(args: list[str], name: str, sections: tuple[str, ...]) -> flags.Parsed:
  parsed = flags.parse(args)
  for text in flags.TEXTS:
    given = getattr(parsed, text)
    if given and text not in sections:
      raise fields.ConfigError(
        text, given, f'{name} does not use it; mtp {name} --help lists its flags'
      )
  out = paths.absolute(parsed.out)
  if parsed.out and paths.as_path(out).is_dir():
    raise fields.ConfigError('out', parsed.out, 'is a directory; give a file')
  if paths.scheme(out):
    return parsed
  folder = os.path.dirname(out)
  if not os.path.isdir(folder):  # not after hours of work
    raise fields.ConfigError('out', parsed.out, f'there is no {folder}')
  if parsed.out and not os.path.exists(parsed.out):
    try:
      open(parsed.out, 'x').close()
      os.remove(parsed.out)
    except OSError as error:
      raise fields.ConfigError('out', parsed.out, f'cannot be written: {error.strerror}') from error
  return parsed


def check_arguments(name: str, command: Command, given: list[str]) -> None:
  """Raises absl.flags.Error unless the arguments match those of the command."""
  wanted = command.arguments.split()
  if wanted and '|' in wanted[0]:
    choices = wanted[0].split('|')
    if not given or given[0] not in choices:
      got = f'not {given[0]!r}' if given else 'none is given'
      raise absl_flags.Error(f'{name} needs one of {", ".join(choices)}; {got}')
    wanted = ['', *(w.strip('[]') for w in wanted[1:] if given[0] == choices[-1])]
  many = bool(wanted) and wanted[-1].endswith('…')
  if len(given) < len(wanted) and not (many and given):
    missing = wanted[len(given)].strip('…')
    raise absl_flags.Error(f'{name} needs a {missing}: {ARGUMENTS[missing]}')
  if len(given) > len(wanted) and not many:
    raise absl_flags.Error(f'{given[len(wanted)]!r} is not a flag')


def single_process_config(parsed: flags.Parsed) -> schema.CommandConfig:
  """Returns the Config of a command that runs in a single process only."""
  cfg = schema.replace(schema.CommandConfig(), **parsed.given)
  if cfg.distributed.coordinator_address:
    raise fields.ConfigError(
      'distributed.coordinator_address',
      cfg.distributed.coordinator_address,
      'this command runs in one process, on all of its devices',
    )
  return cfg
