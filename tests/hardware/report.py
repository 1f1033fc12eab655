"""Figures with their bars and verdicts, and the two files that hold them at any time."""

import json
import math
import os
import threading
from typing import Any, NamedTuple

from mtp_jax.io import paths

UNITS = {  # of a figure -> how its value is shown
  's': lambda x: f'{1e3 * x:,.2f} ms',
  'bytes': lambda x: f'{x / 2**30:,.2f} GiB',
  'bytes/s': lambda x: f'{x / 1e9:,.0f} GB/s',
  'FLOP/s': lambda x: f'{x / 1e12:,.1f} TFLOP/s',
  'tokens/s': lambda x: f'{x:,.0f} tokens/s',
  'share': lambda x: f'{x:.1%}',
  'ratio': lambda x: f'{x:.3f}',
  'difference': lambda x: f'{x:.1e}',
  'tokens/forward': lambda x: f'{x:.2f} tokens per forward pass',
  'minutes': lambda x: f'{x:.1f} minutes',
  'text': str,
}
MET, MISSED, NOT_JUDGED, OUT_OF_TIME, FAILED = VERDICTS = (
  'met',
  'missed',
  'not judged',
  'out of time',
  'failed',
)
SIGNS = {'at least': lambda x, bar: x >= bar, 'at most': lambda x, bar: x <= bar}


class Bar(NamedTuple):
  """What a figure must reach.

  sign: of SIGNS. is_equality: holds at any size and on any device, unlike time and memory.
  note: shown beside it, such as an aim beyond it.
  """

  sign: str
  value: float
  is_equality: bool = False
  note: str = ''

  def is_met(self, measured: float) -> bool:
    """NaN meets no bar."""
    return SIGNS[self.sign](measured, self.value)

  def shown(self, unit: str) -> str:
    return f'{self.sign} {UNITS[unit](self.value)}' + (f' ({self.note})' if self.note else '')


class Report:
  """A run's parts and figures. Each change is on disk before the next measurement: a GPU
  process that is killed hard loses nothing but the measurement under way."""

  def __init__(self, out: str, **head):
    """out: the JSON file; the Markdown table is written beside it."""
    self.out, self.markdown_out = out, os.path.splitext(out)[0] + '.md'
    self.values: dict[str, Any] = dict(status='running', **head, parts=[])
    self._lock = threading.RLock()  # the thread that waits for SIGTERM writes as well
    self.save()

  def start(self, part: str, shows: str, command: str) -> None:
    self._change(lambda: self._parts.append(_part(part, shows, 'running', command=command)))

  def end(self, status: str, seconds: float, error: str = '') -> None:
    """Ends the part under way; status: done, failed, interrupted."""
    part = self._parts[-1]
    changes = dict(status=status, seconds=round(seconds, 2)) | (dict(error=error) if error else {})
    self._change(lambda: part.update(changes))

  def skip(self, part: str, shows: str, command: str) -> None:
    """Names a part that no longer fits the time."""
    self._change(lambda: self._parts.append(_part(part, shows, OUT_OF_TIME, command=command)))

  def add(self, figure: dict) -> None:
    """Adds a figure to the part under way, in place of an earlier one of that name."""
    figures = self._parts[-1]['figures']
    names = [f['name'] for f in figures]

    def change():
      if figure['name'] in names:
        figures[names.index(figure['name'])] = figure
      else:
        figures.append(figure)

    self._change(change)

  def set(self, **values) -> None:
    self._change(lambda: self.values.update(values))

  def interrupt(self, reason: str, left: list[tuple[str, str, str]]) -> None:
    """Ends the report early; left: (name, what it shows, command) of parts not started."""
    with self._lock:
      if self._parts and self._parts[-1]['status'] == 'running':
        self._parts[-1].update(status='interrupted', error=reason)
      for part in left:
        self.skip(*part)
      self.set(status='interrupted', error=reason)

  @property
  def _parts(self) -> list[dict]:
    return self.values['parts']

  def _change(self, change) -> None:
    with self._lock:
      change()
      self.save()

  def save(self) -> None:
    with self._lock:
      text = json.dumps(_strict(self.values), indent=1, allow_nan=False)
      paths.write(self.out, text.encode())
      paths.write(self.markdown_out, ('\n'.join(self.markdown()) + '\n').encode())

  @property
  def is_complete(self) -> bool:
    """Whether every part had the time it needs."""
    verdicts = [f['verdict'] for part in self._parts for f in part['figures']]
    statuses = [part['status'] for part in self._parts]
    return not any(v.startswith(OUT_OF_TIME) for v in [*verdicts, *statuses])

  @property
  def is_met(self) -> bool:
    """Whether no bar was missed and nothing failed."""
    verdicts = {f['verdict'] for part in self._parts for f in part['figures']}
    statuses = {part['status'] for part in self._parts}
    return not (verdicts & {MISSED, FAILED}) and FAILED not in statuses

  def markdown(self) -> list[str]:
    """Returns the table of docs/hardware.md."""
    v = self.values
    lines = [
      f'`{v["command"]}`, {v["date"]}: {v["device"]}; '
      + ', '.join(f'{name} {version}' for name, version in v['versions'].items())
      + f'; size {v["size"]}; {v["status"]}.',
      '',
      "| figure | bar | measured | plan's prediction | verdict |",
      '|---|---|---|---|---|',
    ]
    for part in self._parts:
      lines += [_row(f) for f in part['figures']]
      about = {
        OUT_OF_TIME: f'{OUT_OF_TIME}: `{part.get("command")}`',
        FAILED: f'{FAILED}: {part.get("error")}',
        'interrupted': f'interrupted: `{part.get("command")}`',
      }
      if part['status'] in about:
        lines.append(_row(dict(name=f'part {part["name"]}', verdict=about[part['status']])))
    return lines


def _part(name: str, shows: str, status: str, **more) -> dict:
  return dict(name=name, shows=shows, status=status, **more, figures=[])


def figure(name: str, measured, unit: str, **more) -> dict:
  """Returns a figure as it is saved.

  Args:
    name: unique in its part.
    measured: value, in seconds, bytes and so on; None = not measured.
    unit: of UNITS.
    more: bar, a Bar; predicted, in the same unit; is_judged, of time and memory; note,
      shown beside the value; detail, a dict of further values.
  """
  bar, predicted = more.get('bar'), more.get('predicted')
  verdict = ''
  if bar and measured is None:
    verdict = NOT_JUDGED
  elif bar:
    is_judged = more.get('is_judged', True) or bar.is_equality
    verdict = (MET if bar.is_met(measured) else MISSED) if is_judged else NOT_JUDGED
  show = UNITS[unit]
  note = f' ({more["note"]})' if more.get('note') else ''
  return dict(
    name=name,
    measured=measured,
    unit=unit,
    shown=('n/a' if measured is None else show(measured)) + note,
    bar=bar and bar.shown(unit),
    predicted=predicted,
    predicted_shown='' if predicted is None else show(predicted),
    verdict=verdict,
    **more.get('detail', {}),
  )


def _row(f: dict) -> str:
  cells = [f['name'], f.get('bar'), f.get('shown'), f.get('predicted_shown'), f['verdict']]
  return '| ' + ' | '.join(str(cell or '').replace('|', '/') for cell in cells) + ' |'


def _strict(value):
  """Replaces what JSON does not have: NaN and infinities by null, keys by text."""
  if isinstance(value, dict):
    return {str(k): _strict(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_strict(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
