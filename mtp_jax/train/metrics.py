"""What a run says: flat scalars, their sinks, the log line. Floor 4.

Only head 1's loss is comparable with a next-token model's: totals of different
n are not.
"""

import contextlib
import json
import math
import os
import time

import numpy as np
from tensorboardX import event_file_writer, record_writer
from tensorboardX.proto import event_pb2, summary_pb2

from mtp_jax import config, jsonl, paths

# Of metrics.jsonl; all other fields are scalars.
RECORD = {'kind': str, 'step': jsonl.STEP, 'source?': str, ...: jsonl.NUMBER}


def mean(total, count) -> float | None:
  """None where there is nothing to average: that is null in JSON and `-` on a
  line, and no 0."""
  return float(total / count) if count else None


def acceptance(accepted_K) -> tuple[list[float | None], float | None]:
  """`targets.acceptance` sums -> (rate of drafts 2, 3, …, expected length).

  A rate is conditional on the drafts before it; the length is the head-1 token
  plus the drafts accepted in a row, in tokens per forward pass. None where
  nothing was proposed.
  """
  rates, alive = [], 1.0
  length = 1.0
  for before, after in zip(accepted_K[:-1], accepted_K[1:], strict=True):
    rates.append(mean(after, before))
    alive *= rates[-1] or 0.0
    length += alive
  return rates, length if accepted_K[0] else None


def scalars(metrics: dict) -> dict[str, float | None]:
  """A step's metrics, on the host, as flat names in reading order: sums over
  their counts. Means of nothing are None."""
  count_K = metrics['count_K']
  out = dict(loss=float(metrics['total']) if np.any(count_K) else None)
  for name, total in dict(loss='loss_sum_K', z_loss='z_loss_sum_K', accuracy='correct_K').items():
    sum_K = metrics[total]
    if name != 'z_loss' or np.any(sum_K):
      out |= {f'{name}_{k}': mean(*of) for k, of in enumerate(zip(sum_K, count_K, strict=True), 1)}
  for name in ('head_grad_norm', 'weight'):
    for k, value in enumerate(metrics.get(f'{name}_K', ()), 1):
      out[f'{name}_{k}'] = float(value)
  if 'order_loss_sum' in metrics:
    out['order_loss'] = mean(metrics['order_loss_sum'], count_K[0])
  rates, length = acceptance(metrics['accepted_K'])
  out |= {f'acceptance_{k}': rate for k, rate in enumerate(rates, 2)}
  out['accepted_length'] = length
  nats = metrics['loss_sum_K'][0] - metrics['z_loss_sum_K'][0]
  out['bits_per_byte'] = mean(nats / math.log(2), metrics['bytes'])
  for name in ('lr', 'grad_norm', 'skipped', 'skipped_in_a_row'):
    if name in metrics:
      out[name] = float(metrics[name])
  return out


def shown(value: float | None, form: str) -> str:
  """A number in a format, `-` for one that is not there."""
  return '-' if value is None else format(value, form)


def line(step: int, steps: int, values: dict[str, float | None]) -> str:
  """One log line."""
  mfu = values.get('mfu')
  return (
    f'step {step}/{steps}  loss {shown(values["loss"], ".4f")}'
    f'  head 1 {shown(values["loss_1"], ".4f")}'
    f'  bits/byte {shown(values["bits_per_byte"], ".3f")}'
    f'  lr {values["lr"]:.2e}'
    f'  |grad| {values["grad_norm"]:.3f}'
    f'  E[accepted] {shown(values["accepted_length"], ".2f")}'
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


def table(values: dict[str, float | None]) -> list[str]:
  """Held-out results by head, as lines."""
  lines = ['head    loss  accuracy  acceptance']
  n = sum(name.startswith('accuracy_') for name in values)
  rates = {
    int(name.split('_')[1]): rate for name, rate in values.items() if name.startswith('acceptance_')
  }
  leaps = len(rates) > n - 1  # several drafts a head
  for k in range(1, n + 1):
    rate = '' if leaps or k not in rates else shown(rates[k], '.2%')
    lines.append(
      f'{k:4d}  {shown(values[f"loss_{k}"], ".4f"):>6}'
      f'  {shown(values[f"accuracy_{k}"], ".2%"):>8}  {rate:>10}'
    )
  if leaps:
    drafts = (f't+{j} {shown(rate, ".2%")}' for j, rate in rates.items())
    lines.append('draft accepted, given those before: ' + ', '.join(drafts))
  if 'order_loss' in values:
    loss = shown(values['order_loss'], '.4f')
    lines.append(f'order of the tokens to come {loss}')
  return [
    *lines,
    f'bits per byte {shown(values["bits_per_byte"], ".4f")}, expected accepted'
    f' length {shown(values["accepted_length"], ".3f")} tokens (teacher-forced'
    ' estimate)',
  ]


def jsonl_path(workdir: str) -> str:
  return os.path.join(workdir, 'metrics.jsonl')


def read(workdir: str) -> list[dict]:
  """Records of metrics.jsonl; a last line cut off by a crash is left out.

  Raises:
    ValueError: another line is damaged.
  """
  path, records = jsonl_path(workdir), []
  try:
    text = paths.of(path).read_bytes().decode(errors='replace')
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
    raise config.ConfigError('train.workdir', workdir, str(error)) from error


def jsonable(values: dict[str, float | None]) -> dict[str, float | None]:
  """NaN, infinities and what is as good as one as None, i.e. null: JSON has no
  other word for them."""
  return {k: v if v is not None and abs(v) <= 1e100 else None for k, v in values.items()}


class Sinks:
  """metrics.jsonl and TensorBoard, cut back to the step a run starts at.

  TensorBoard's file is written here and now. The thread in which tensorboardX's
  own writer does it dies of a full disk, and the next write then waits for
  ever; it also sleeps for as long as the clock is set back.
  """

  def __init__(self, workdir: str, start_step: int):
    kept = [r for r in _read(workdir) if r['step'] <= start_step]
    lines = ''.join(json.dumps(record) + '\n' for record in kept)
    self._jsonl = paths.growing(jsonl_path(workdir), lines.encode())
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
    values = jsonable(values)
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
    self.files.append(paths.growing(path))
    return self.files[-1]
