"""What a run says: flat scalars, their sinks, the log line. Floor 4.

Only head 1's loss is comparable with a next-token model's: totals of different
n are not.
"""

import contextlib
import json
import math
import os

import numpy as np
import tensorboardX
from tensorboardX import record_writer

from mtp_jax import config, jsonl, paths

# Of metrics.jsonl; all other fields are scalars.
RECORD = {
  'kind': str, 'step': jsonl.STEP, 'source?': str, ...: jsonl.NUMBER,
}  # fmt: skip


def acceptance(accepted_K) -> tuple[list[float], float]:
  """`targets.acceptance` sums -> (rate of drafts 2, 3, …, expected length).

  A rate is conditional on the drafts before it; the length is the head-1 token
  plus the drafts accepted in a row, in tokens a forward pass. NaN where nothing
  was asked.
  """
  rates, alive = [], 1.0
  length = 1.0 if accepted_K[0] else math.nan
  for before, after in zip(accepted_K[:-1], accepted_K[1:], strict=True):
    rates.append(float(after / before) if before else math.nan)
    alive *= rates[-1] if before else 0.0
    length += alive
  return rates, length


def scalars(metrics: dict) -> dict[str, float]:
  """A step's metrics, on the host, as flat names in reading order."""
  out = dict(loss=float(metrics['total']))
  for name in ('loss', 'z_loss', 'accuracy', 'head_grad_norm', 'weight'):
    values_K = metrics.get(f'{name}_K')
    if values_K is not None and (name != 'z_loss' or np.any(values_K)):
      out |= {f'{name}_{k}': float(v) for k, v in enumerate(values_K, 1)}
  if 'order_loss' in metrics:
    out['order_loss'] = float(metrics['order_loss'])
  rates, length = acceptance(metrics['accepted_K'])
  out |= {f'acceptance_{k}': rate for k, rate in enumerate(rates, 2)}
  out['accepted_length'] = length
  n_bytes = metrics['bytes']
  out['bits_per_byte'] = (
    float(metrics['nats'] / math.log(2) / n_bytes) if n_bytes else math.nan
  )
  for name in ('lr', 'grad_norm', 'skipped', 'skipped_in_a_row'):
    if name in metrics:
      out[name] = float(metrics[name])
  return out


def line(step: int, steps: int, values: dict[str, float]) -> str:
  """One log line."""
  mfu = values.get('mfu')
  return (
    f'step {step}/{steps}  loss {values["loss"]:.4f}'
    f'  head 1 {values["loss_1"]:.4f}'
    f'  bits/byte {values["bits_per_byte"]:.3f}  lr {values["lr"]:.2e}'
    f'  |grad| {values["grad_norm"]:.3f}'
    f'  E[accepted] {values["accepted_length"]:.2f}'
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


def table(values: dict[str, float]) -> list[str]:
  """Held-out results by head, as lines."""
  lines = ['head    loss  accuracy  acceptance']
  n = sum(name.startswith('accuracy_') for name in values)
  rates = {
    int(name.split('_')[1]): rate
    for name, rate in values.items()
    if name.startswith('acceptance_')
  }
  leaps = len(rates) > n - 1  # several drafts a head
  for k in range(1, n + 1):
    rate = None if leaps else rates.get(k)
    lines.append(
      f'{k:4d}  {values[f"loss_{k}"]:6.4f}  {values[f"accuracy_{k}"]:8.2%}'
      f'  {"" if rate is None else f"{rate:10.2%}"}'
    )
  if leaps:
    drafts = (f't+{j} {rate:.2%}' for j, rate in rates.items())
    lines.append('draft accepted, given those before: ' + ', '.join(drafts))
  if 'order_loss' in values:
    lines.append(f'order of the tokens to come {values["order_loss"]:.4f}')
  return [
    *lines,
    f'bits per byte {values["bits_per_byte"]:.4f}, expected accepted length'
    f' {values["accepted_length"]:.3f} tokens (teacher-forced estimate)',
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
      raise ValueError(
        f'{path}:{number}: is no record, damaged: {error}'
      ) from error
  return records


def jsonable(values: dict[str, float]) -> dict[str, float | None]:
  """NaN and infinities as None, i.e. null: JSON has no other word for them."""
  return {k: v if math.isfinite(v) else None for k, v in values.items()}


class Sinks:
  """metrics.jsonl and TensorBoard, cut back to the step a run starts at."""

  def __init__(self, workdir: str, start_step: int):
    try:
      kept = [r for r in read(workdir) if r['step'] <= start_step]
    except ValueError as error:
      raise config.ConfigError('train.workdir', workdir, str(error)) from error
    lines = ''.join(json.dumps(record) + '\n' for record in kept)
    self._jsonl = paths.growing(jsonl_path(workdir), lines.encode())
    self._events = _Events()
    if paths.scheme(workdir):  # its own writer uploads all at each flush
      record_writer.register_writer_factory(paths.scheme(workdir), self._events)
    self._board = tensorboardX.SummaryWriter(
      os.path.join(workdir, 'tensorboard'), purge_step=start_step + 1
    )

  def write(
    self, kind: str, step: int, values: dict[str, float], source=None
  ) -> None:
    """A record; `source` says of which of several validation sets it is."""
    of = dict(source=source) if source else {}
    record = dict(kind=kind, step=step) | of | jsonable(values)
    self._jsonl.write(f'{json.dumps(record)}\n'.encode())
    self._jsonl.flush()
    folder = '/'.join([kind, *of.values()])
    for name, value in values.items():
      if not math.isfinite(value):
        continue  # e.g. a rate of drafts that were never asked for
      self._board.add_scalar(f'{folder}/{name}', value, step)
    self._board.flush()

  def sync(self) -> None:
    """Before a checkpoint: what was said so far is not lost."""
    for file in (self._jsonl, *self._events.files):
      file.sync()

  def close(self) -> None:
    with contextlib.suppress(OSError):  # a full disk was told when it was met
      self._jsonl.close()
    self._board.close()


class _Events:
  """Opens TensorBoard's files where nothing can be appended to."""

  def __init__(self):
    self.files = []

  def directory_check(self, path: str) -> None:
    pass  # there are no folders

  def open(self, path: str):
    self.files.append(paths.growing(path))
    return self.files[-1]
