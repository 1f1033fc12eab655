"""metrics.jsonl and TensorBoard: the records of a run, written and read."""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX import event_file_writer, record_writer
from tensorboardX.proto import event_pb2, summary_pb2

from mtp_jax.config import fields
from mtp_jax.io import jsonl, paths
from mtp_jax.losses import metrics as metrics_lib

# Schema of a record of metrics.jsonl; all other fields are scalars.
RECORD = {'kind': str, 'step': jsonl.STEP, 'source?': str, ...: jsonl.NUMBER}


# Metrics keys of runs of earlier versions -> keys of today; applied by `read`.
RENAMED = {
  'accepted_length': 'mean_acceptance_length',
  'skipped_in_a_row': 'consecutive_nonfinite',
  'order_loss': 'token_order_loss',
  'data_wait': 'data_wait_frac',
}


def line(step: int, steps: int, values: Mapping[str, Any]) -> str:
  """Formats the log line of a training step."""
  mfu = values.get('mfu')
  return (
    f'step {step}/{steps}  loss {metrics_lib.shown(values["loss"], ".4f")}'
    f'  head 1 {metrics_lib.shown(values["loss_1"], ".4f")}'
    f'  bits/byte {metrics_lib.shown(values["bits_per_byte"], ".3f")}'
    f'  lr {values["lr"]:.2e}'
    f'  |grad| {values["grad_norm"]:.3f}'
    f'  E[accepted] {metrics_lib.shown(values["mean_acceptance_length"], ".2f")}'
    f'  {values["tokens_per_s"]:,.0f} tokens/s'
    f'  {values["model_flops_per_s"] / 1e12:.3g} TFLOP/s'
    f'  MFU {"n/a" if mfu is None else f"{mfu:.1%}"}'
    f'  left {duration(values["time_left_s"])}'
    + (f'  skipped {values["skipped"]:.0f}' if values['skipped'] else '')
  )


def duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def jsonl_path(workdir: str) -> str:
  return os.path.join(workdir, 'metrics.jsonl')


def read(workdir: str) -> list[dict]:
  """Returns the records of metrics.jsonl under today's keys (`RENAMED`), without a
  last line truncated by a crash.

  Raises:
    ValueError: another line is corrupt.
  """
  path, records = jsonl_path(workdir), []
  try:
    text = paths.as_path(path).read_bytes().decode(errors='replace')
  except (FileNotFoundError, NotADirectoryError):
    return []
  for number, line in enumerate(text.split('\n')[:-1], 1):
    try:
      record = jsonl.loads(line, RECORD)
    except ValueError as error:
      raise ValueError(f'{path}:{number}: not a record, corrupt: {error}') from error
    records.append({RENAMED.get(name, name): value for name, value in record.items()})
  return records


def recorded(workdir: str, step: int) -> list[tuple[str, str | None]]:
  """Returns (kind, source) of each record of a step.

  Raises:
    ConfigError: a line of metrics.jsonl is corrupt.
  """
  return [
    (record['kind'], record.get('source')) for record in _read(workdir) if record['step'] == step
  ]


def _read(workdir: str) -> list[dict]:
  try:
    return read(workdir)
  except ValueError as error:
    raise fields.ConfigError('train.workdir', workdir, str(error)) from error


class Sinks:
  """Writes metrics.jsonl and TensorBoard, truncated to the step a run starts at.

  TensorBoard's file is written synchronously: the thread of tensorboardX's own
  writer dies on a full disk, after which the next write blocks forever, and it
  sleeps for as long as the clock is set back.
  """

  def __init__(self, workdir: str, start_step: int):
    kept = [r for r in _read(workdir) if r['step'] <= start_step]
    lines = ''.join(json.dumps(record) + '\n' for record in kept)
    self._jsonl = paths.open_append(jsonl_path(workdir), lines.encode())
    self._events = _Events()
    if paths.scheme(workdir):  # tensorboardX would upload the whole file at each flush
      record_writer.register_writer_factory(paths.scheme(workdir), self._events)
    self._folder = os.path.join(workdir, 'tensorboard')
    paths.make_folder(self._folder)
    with paths.naming(self._folder):
      self._board = event_file_writer.EventsWriter(os.path.join(self._folder, 'events'))
    log = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    forget = log(status=log.START)
    self._event(start_step + 1, session_log=forget)

  def _event(self, step: int, **what) -> None:
    make = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
    event = make(wall_time=time.time(), step=step, **what)
    with paths.naming(self._folder):
      self._board.write_event(event)
      self._board.flush()

  def write(self, kind: str, step: int, values: dict[str, float | None], source=None) -> None:
    """Writes a record; `source` names the validation set if there are several."""
    of = dict(source=source) if source else {}
    values = metrics_lib.jsonable(values)
    record = dict(kind=kind, step=step) | of | values
    self._jsonl.write(f'{json.dumps(record)}\n'.encode())
    self._jsonl.flush()
    folder = '/'.join([kind, *of.values()])
    summary = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]
    scalars = [
      summary.Value(tag=f'{folder}/{name}', simple_value=value)
      for name, value in values.items()
      if value is not None
    ]
    self._event(step, summary=summary(value=scalars))

  def sync(self) -> None:
    """Makes all records durable; called before a checkpoint."""
    for file in (self._jsonl, *self._events.files):
      file.sync()

  def close(self) -> None:
    for file in (self._jsonl, self._board):
      # A full disk was reported by `write`; ValueError: already closed.
      with contextlib.suppress(OSError, ValueError):
        file.close()


class _Events:
  """Opens TensorBoard's files in object storage, which cannot append."""

  def __init__(self):
    self.files = []

  def directory_check(self, path: str) -> None:
    pass  # there are no folders

  def open(self, path: str):
    self.files.append(paths.open_append(path))
    return self.files[-1]
