"""TODO of mtp_jax.checkpoint."""

import contextlib
import functools
import json
import logging
import os
import sys
import warnings

import jax
import orbax.checkpoint as ocp
from etils import epath

from mtp_jax.config import parse, schema, validate
from mtp_jax.io import jsonl
from mtp_jax.io import paths as paths_lib

MARK = 'commit_success.txt'  # in a bucket, of a complete one
FORMAT = 1  # raised when a saved state can no longer be read as it is
METADATA = {
  'format': int,
  'config': {...: object},
  'store': str,
  'left_out?': [[jsonl.NATURAL]],
  'spikes?': {'losses?': [float], 'pending?': [[jsonl.NUMBER]]},
}


@functools.cache
def log_failures_once() -> None:
  """A save that fails is a line. Without this some hundred follow it, some of
  them only when the process ends: from orbax, from what it had begun to await,
  and from tensorstore's threads, whom nobody hears any more."""

  def is_new(record):
    of = 'orbax' in record.pathname or 'never retrieved' in record.msg
    return not (of and record.levelno >= logging.ERROR)

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
  """What the run is, and the files of its tokenizer, if it has one: a
  checkpoint can be used where the store is not."""
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
  """For a reader of this process alone; orbax would wait for the others."""
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


@contextlib.contextmanager
def reading(path: epath.Path):
  """What orbax and tensorstore raise for a broken file, as one line."""
  try:
    yield
  except Exception as error:  # orbax raises just that for a damaged array
    raise paths_lib.InputError(
      path, f'cannot be read as a checkpoint: {paths_lib.first_line(error)}'
    ) from error


def read_metadata(workdir: str, step: int) -> tuple[schema.Config, str]:
  """(Config, store fingerprint) of a checkpoint; waits for no other process."""
  saved = read_json(workdir, step)
  try:
    cfg = validate.validate(parse.from_json(json.dumps(saved['config'])))
  except ValueError as error:
    raise metadata_error(workdir, step, error) from error
  return cfg, saved['store']


def metadata_error(workdir, step, why) -> paths_lib.InputError:
  path = folder(workdir) / str(step)
  return paths_lib.InputError(path, f'cannot be read as a checkpoint: about: {why}')


def skipped_batches(workdir: str, step: int) -> tuple[tuple[int, int], ...]:
  """The batches that its run has left out."""
  saved = read_json(workdir, step).get('left_out', ())
  return tuple((first, count) for first, count in saved)


def spikes(workdir: str, step: int) -> dict:
  """What the detector of loss spikes remembered, as it was given to `save`."""
  return read_json(workdir, step).get('spikes', {})


def read_item(path: epath.Path) -> dict:
  with ocp.Checkpointer(
    ocp.JsonCheckpointHandler(), multiprocessing_options=this_process_only()
  ) as reader:
    return reader.restore(path / 'about')


def read_json(workdir: str, step: int) -> dict:
  path = folder(workdir) / str(step)
  with reading(path):
    saved = read_item(path)
  try:
    jsonl.check(saved, {'format': int, ...: object})
    if saved['format'] != FORMAT:
      raise ValueError(f'format {saved["format"]}, this program reads {FORMAT}')
    jsonl.check(saved, METADATA)
    if any(len(pair) != 2 for pair in saved.get('left_out', ())):
      raise ValueError('left_out must be pairs: first batch, count')
    return saved
  except ValueError as error:
    raise metadata_error(workdir, step, error) from error
