"""TODO of mtp_jax.train.metrics."""

import contextlib
import json
import os
import time

from tensorboardX import event_file_writer, record_writer
from tensorboardX.proto import event_pb2, summary_pb2

from mtp_jax.config import fields
from mtp_jax.io import jsonl, paths
from mtp_jax.losses import metrics as metrics_lib

# Of metrics.jsonl; all other fields are scalars.
RECORD = {'kind': str, 'step': jsonl.STEP, 'source?': str, ...: jsonl.NUMBER}


def line(step: int, steps: int, values: dict[str, float | None]) -> str:
  """One log line."""
  mfu = values.get('mfu')
  return (
    f'step {step}/{steps}  loss {metrics_lib.shown(values["loss"], ".4f")}'
    f'  head 1 {metrics_lib.shown(values["loss_1"], ".4f")}'
    f'  bits/byte {metrics_lib.shown(values["bits_per_byte"], ".3f")}'
    f'  lr {values["lr"]:.2e}'
    f'  |grad| {values["grad_norm"]:.3f}'
    f'  E[accepted] {metrics_lib.shown(values["accepted_length"], ".2f")}'
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
  """Records of metrics.jsonl; a last line cut off by a crash is left out.

  Raises:
    ValueError: another line is damaged.
  """
  path, records = jsonl_path(workdir), []
  try:
    text = paths.as_path(path).read_bytes().decode(errors='replace')
  except (FileNotFoundError, NotADirectoryError):
    return []
  for number, line in enumerate(text.split('\n')[:-1], 1):
    try:
      records.append(jsonl.loads(line, RECORD))
    except ValueError as error:
      raise ValueError(f'{path}:{number}: is no record, damaged: {error}') from error
  return records


def recorded(workdir: str, step: int) -> list[tuple[str, str | None]]:
  """(kind, source) of each record of a step.

  Raises:
    ConfigError: a line of metrics.jsonl is damaged.
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
  """metrics.jsonl and TensorBoard, cut back to the step a run starts at.

  TensorBoard's file is written here and now. The thread in which tensorboardX's
  own writer does it dies of a full disk, and the next write then waits for
  ever; it also sleeps for as long as the clock is set back.
  """

  def __init__(self, workdir: str, start_step: int):
    kept = [r for r in _read(workdir) if r['step'] <= start_step]
    lines = ''.join(json.dumps(record) + '\n' for record in kept)
    self._jsonl = paths.open_append(jsonl_path(workdir), lines.encode())
    self._events = _Events()
    if paths.scheme(workdir):  # its own writer uploads all at each flush
      record_writer.register_writer_factory(paths.scheme(workdir), self._events)
    self._folder = os.path.join(workdir, 'tensorboard')
    paths.make_folder(self._folder)
    with paths.naming(self._folder):
      self._board = event_file_writer.EventsWriter(os.path.join(self._folder, 'events'))
    forget = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._event(start_step + 1, session_log=forget)

  def _event(self, step: int, **what) -> None:
    event = event_pb2.Event(wall_time=time.time(), step=step, **what)
    with paths.naming(self._folder):
      self._board.write_event(event)
      self._board.flush()

  def write(self, kind: str, step: int, values: dict[str, float | None], source=None) -> None:
    """A record; `source` says of which of several validation sets it is."""
    of = dict(source=source) if source else {}
    values = metrics_lib.jsonable(values)
    record = dict(kind=kind, step=step) | of | values
    self._jsonl.write(f'{json.dumps(record)}\n'.encode())
    self._jsonl.flush()
    folder = '/'.join([kind, *of.values()])
    scalars = [
      summary_pb2.Summary.Value(tag=f'{folder}/{name}', simple_value=value)
      for name, value in values.items()
      if value is not None
    ]
    self._event(step, summary=summary_pb2.Summary(value=scalars))

  def sync(self) -> None:
    """Before a checkpoint: what was said so far is not lost."""
    for file in (self._jsonl, *self._events.files):
      file.sync()

  def close(self) -> None:
    for file in (self._jsonl, self._board):
      # A full disk was told when it was met; ValueError: it is closed already.
      with contextlib.suppress(OSError, ValueError):
        file.close()


class _Events:
  """Opens TensorBoard's files where nothing can be appended to."""

  def __init__(self):
    self.files = []

  def directory_check(self, path: str) -> None:
    pass  # there are no folders

  def open(self, path: str):
    self.files.append(paths.open_append(path))
    return self.files[-1]
