"""The folder of checkpoints, and the metadata item `about` of each one: format,
config, store fingerprint, skipped batches, state of the spike detector."""

import contextlib
import functools
import json
import logging
import os
import sys
import warnings
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from mtp_jax.config import parse, schema, validate
from mtp_jax.io import jsonl
from mtp_jax.io import paths as paths_lib

MARK = 'commit_success.txt'  # in a bucket, marks a complete checkpoint
FORMAT = 1  # incremented when saved states of before can no longer be read
METADATA = {
  'format': int,
  'config': {...: object},
  'store': str,
  'left_out?': [[jsonl.NATURAL]],
  'spikes?': {'losses?': [float], 'pending?': [[jsonl.NUMBER]]},
}


@functools.cache
def log_failures_once() -> None:
  """Silences the libraries' reports of a failed save, which is logged in one line:
  orbax, its unawaited coroutines and tensorstore's threads would print about a
  hundred more, some of them when the process ends."""

  def is_new(record):
    of_save = 'orbax' in record.pathname or 'never retrieved' in record.msg
    return not (of_save and record.levelno >= logging.ERROR)

  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(is_new)
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
  hook = sys.unraisablehook

  def unraisable(what):
    if str(what.exc_value) != 'Event loop is closed':
      hook(what)

  sys.unraisablehook = unraisable


def folder(workdir: str) -> epath.Path:
  return paths_lib.as_path(workdir) / 'checkpoints'


def write_definition(cfg, tokenizer, workdir: str) -> None:
  """Writes run.flags, config.json and the tokenizer's files, so that checkpoints can
  be used without the token store."""
  files = {
    'run.flags': parse.to_flag_file(cfg).encode(),
    'config.json': parse.to_json(cfg).encode(),
  }
  for name, data in (tokenizer.files if tokenizer else {}).items():
    files[os.path.join('tokenizer', name)] = data
  for name, data in files.items():
    path = paths_lib.as_path(workdir) / name
    paths_lib.make_folder(path.parent)
    paths_lib.write(path, data)


def this_process_only():
  """Returns options for reading in this process alone, without orbax's barriers."""
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


@contextlib.contextmanager
def reading(path: epath.Path):
  """Converts what orbax and tensorstore raise for a corrupt file to an InputError."""
  try:
    yield
  except Exception as error:  # orbax raises a bare Exception for a corrupt array
    raise paths_lib.InputError(
      path, f'cannot be read as a checkpoint: {paths_lib.first_line(error)}'
    ) from error


class Metadata(NamedTuple):
  """What a checkpoint says of itself, besides its arrays."""

  cfg: schema.Config
  store: str  # fingerprint of the token store
  skipped_batches: tuple[tuple[int, int], ...]  # (first, count) of each range
  spikes: dict[str, Any]  # state of the spike detector


def read(workdir: str, step: int) -> Metadata:
  """Reads a checkpoint's Metadata; not collective.

  Raises:
    InputError: it is corrupt, or of another version of this program.
  """
  path = folder(workdir) / str(step)
  with reading(path):
    saved = read_item(path)
  try:
    jsonl.check(saved, {'format': int, ...: object})
    if saved['format'] != FORMAT:
      raise ValueError(f'format {saved["format"]}, this program reads {FORMAT}')
    jsonl.check(saved, METADATA)
    skipped = saved.get('left_out', ())
    if any(len(pair) != 2 for pair in skipped):
      raise ValueError('left_out must be pairs: first batch, count')
    return Metadata(
      cfg=validate.validate(parse.from_json(json.dumps(saved['config']))),
      store=saved['store'],
      skipped_batches=tuple((first, count) for first, count in skipped),
      spikes=saved.get('spikes', {}),
    )
  except ValueError as error:
    raise paths_lib.InputError(path, f'cannot be read as a checkpoint: about: {error}') from error


def read_item(path: epath.Path) -> dict:
  with ocp.Checkpointer(
    ocp.JsonCheckpointHandler(), multiprocessing_options=this_process_only()
  ) as reader:
    return reader.restore(path / 'about')
