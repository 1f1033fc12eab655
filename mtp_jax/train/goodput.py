"""Goodput: the wall-clock time of a run by cause, over all its sessions.

A session is one start of the program. WORKDIR/goodput.jsonl has a line per log
line and per end of a session: the session's seconds so far, by cause. It is
never truncated, so that lost and repeated steps remain visible.
"""

import json
import math
import os
import time

from mtp_jax.config import fields
from mtp_jax.io import jsonl, paths

CAUSES = {
  'start': 'opening stores, restoring or initializing parameters',
  'compile': 'compiling the step',
  'data': 'waiting for batches',
  'host': 'steps: preparing and dispatching them',
  'device': 'steps: waiting for the devices',
  'eval': 'evaluations',
  'checkpoint': 'blocked on checkpointing',
}
KILLED = 'killed'  # end of a session without a record of its end

FORM = {
  'session': jsonl.STEP,
  'start': jsonl.STEP,
  'began': float,
  'step': jsonl.STEP,
  'time': float,
  'end': str,
  'seconds': {c: float for c in CAUSES} | {...: float},
  'memory?': {
    'heads?': int,
    'parameters': jsonl.NATURAL,
    'optimizer': jsonl.NATURAL,
    'temporaries': jsonl.NATURAL,
  },
  'spike?': jsonl.STEP,
  'loss?': jsonl.NUMBER,
  ...: object,
}


class Clock:
  """Attributes wall-clock time to the cause of the latest `at` call."""

  def __init__(self):
    self.seconds = dict.fromkeys(CAUSES, 0.0)
    self.steps = 0  # since the last lap
    self._cause, self._since = 'start', time.perf_counter()
    self._lap = dict(self.seconds)

  def at(self, cause: str) -> None:
    now = time.perf_counter()
    self.seconds[self._cause] += now - self._since
    self._cause, self._since = cause, now

  def lap(self) -> tuple[float, float, float]:
    """Returns (seconds per step, fraction waiting for data, fraction at work on
    the host) since the previous lap; NaN without a step."""
    self.at(self._cause)
    data, host, device = (self.seconds[c] - self._lap[c] for c in ('data', 'host', 'device'))
    n, self.steps, self._lap = self.steps, 0, dict(self.seconds)
    if not n:
      return math.nan, math.nan, math.nan
    whole = data + host + device
    return whole / n, data / whole, host / whole


def path(workdir: str) -> str:
  return os.path.join(workdir, 'goodput.jsonl')


class Ledger:
  """Appends the lines of one session to goodput.jsonl."""

  def __init__(self, workdir: str, start: int):
    try:
      session = len({r['session'] for r in read(workdir)})
    except ValueError as error:
      raise fields.ConfigError('train.workdir', workdir, str(error)) from error
    self._about = dict(session=session, start=start, began=time.time())
    before = _bytes(workdir)
    if before and not before.endswith(b'\n'):  # a line truncated by a crash
      before += b'\n'
    self._file = paths.open_append(path(workdir), before)

  def write(self, step: int, clock: Clock, end: str = '', **more) -> None:
    """Writes a line; `end` states how the session ended, '' while it runs."""
    now = dict(step=step, time=time.time(), end=end, seconds=clock.seconds)
    line = json.dumps(self._about | now | more)
    self._file.write(f'{line}\n'.encode())
    self._file.flush()

  def sync(self) -> None:
    self._file.sync()

  def close(self) -> None:
    self._file.close()


def _bytes(workdir: str) -> bytes:
  try:
    return paths.as_path(path(workdir)).read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return b''


def read(workdir: str) -> list[dict]:
  """Returns the records of goodput.jsonl, without lines truncated by a crash.

  Raises:
    ValueError: a line is JSON, but not a goodput record.
  """
  records = []
  for number, line in enumerate(_bytes(workdir).splitlines(), 1):
    try:
      record = jsonl.loads(line)
    except ValueError:  # truncated
      continue
    try:
      records.append(jsonl.check(record, FORM))
    except ValueError as error:
      raise ValueError(f'{path(workdir)}:{number}: {error}') from error
  return records


def summary(records: list[dict]) -> dict:
  """Summarizes the records of `read`, in seconds: the total from the first start
  to the last line, its parts by cause, repeated steps (`repeated`), and the time
  between sessions (`down`). `goodput` is the fraction of the total spent in
  steps that were not repeated; `sessions` has each session's steps and end."""
  last = {r['session']: r for r in records}  # a later line supersedes
  if not last:
    return {}
  sessions, repeated_s = [], 0.0
  for session in sorted(last):
    r = last[session]
    done = r['step'] - r['start']
    before = sessions[-1] if sessions else None
    n_repeated = max(0, before['step'] - r['start']) if before else 0
    if before and n_repeated:
      repeated_s += n_repeated * before['step_s']
    sessions.append(
      dict(
        start=r['start'],
        step=r['step'],
        end=r['end'] or KILLED,
        repeated_steps=n_repeated,
        step_s=sum(r['seconds'][c] for c in ('data', 'host', 'device')) / max(done, 1),
      )
    )
  parts = {c: sum(r['seconds'][c] for r in last.values()) for c in CAUSES}
  first = min(r['began'] for r in last.values())
  whole = max(r['time'] for r in last.values()) - first
  useful = max(0.0, parts['host'] + parts['device'] - repeated_s)
  return dict(
    whole_s=whole,
    **{f'{c}_s': s for c, s in parts.items()},
    repeated_s=repeated_s,
    down_s=max(0.0, whole - sum(parts.values())),
    goodput=useful / whole if whole else 0.0,
    sessions=sessions,
    spikes=sum('spike' in r for r in records),
  )


def lines(found: dict) -> list[str]:
  """Formats a `summary` as text lines."""
  if not found:
    return []
  whole = found['whole_s']

  def share(name):
    return f'{found[f"{name}_s"] / whole:.1%}' if whole else 'n/a'

  out = [
    f'goodput {found["goodput"]:.1%} of {whole:,.0f} s: '
    + ', '.join(f'{c} {share(c)}' for c in [*CAUSES, 'repeated', 'down'])
  ]
  for i, s in enumerate(found['sessions']):
    n_repeated = s['repeated_steps']
    out.append(
      f'  session {i}: steps {s["start"]} to {s["step"]}, {s["end"]}'
      + (f'; {n_repeated} steps repeated' if n_repeated else '')
    )
  if found['spikes']:
    out.append(f'  {found["spikes"]} loss spikes')
  return out
