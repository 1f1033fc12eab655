"""Where the time of a run went, over all its starts. Floor 4.

WORKDIR/goodput.jsonl has a line for each log line and for the end of a session,
that is of one start of the program: its seconds so far, by cause. It is never
cut back, so that steps which were lost, and done again, are seen.
"""

import json
import os
import time

from mtp_jax.config import fields
from mtp_jax.io import jsonl, paths

CAUSES = {
  'start': 'stores opened, parameters restored or made',
  'compile': 'compiling the step',
  'data': 'waiting for batches',
  'host': 'steps: preparing and dispatching them',
  'device': 'steps: waiting for the devices',
  'eval': 'evaluations',
  'checkpoint': 'held up by saves',
}
KILLED = 'killed'  # of a session that did not say how it ended

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
  """Each second belongs to the cause that was named last."""

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
    """(seconds of a step, the shares of them that waited for data and that the
    host was at work) since the last one; NaN if there was no step."""
    self.at(self._cause)
    data, host, device = (self.seconds[c] - self._lap[c] for c in ('data', 'host', 'device'))
    n, self.steps, self._lap = self.steps, 0, dict(self.seconds)
    if not n:
      return (float('nan'),) * 3
    whole = data + host + device
    return whole / n, data / whole, host / whole


def path(workdir: str) -> str:
  return os.path.join(workdir, 'goodput.jsonl')


class Ledger:
  """Writes the lines of one session."""

  def __init__(self, workdir: str, start: int):
    try:
      session = len({r['session'] for r in read(workdir)})
    except ValueError as error:
      raise fields.ConfigError('train.workdir', workdir, str(error)) from error
    self._about = dict(session=session, start=start, began=time.time())
    before = _bytes(workdir)
    if before and not before.endswith(b'\n'):  # a line cut off by a crash
      before += b'\n'
    self._file = paths.open_append(path(workdir), before)

  def write(self, step: int, clock: Clock, end: str = '', **more) -> None:
    """end: how the session ended; '' while it goes on."""
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
  """Lines of goodput.jsonl but for those cut off by a crash.

  Raises:
    ValueError: one is JSON, but not of such a line.
  """
  records = []
  for number, line in enumerate(_bytes(workdir).splitlines(), 1):
    try:
      record = jsonl.loads(line)
    except ValueError:  # cut off
      continue
    try:
      records.append(jsonl.check(record, FORM))
    except ValueError as error:
      raise ValueError(f'{path(workdir)}:{number}: {error}') from error
  return records


def summary(records: list[dict]) -> dict:
  """Of the lines of `read`, in seconds: the whole from the first start to the
  last line, its parts by cause, what was done again (`repeated`), and the time
  between sessions (`down`). `goodput` is the share of the whole in steps that
  did not have to be done again; `sessions` says how each ended."""
  last = {r['session']: r for r in records}  # a later line replaces
  if not last:
    return {}
  sessions, repeated_s = [], 0.0
  for session in sorted(last):
    r = last[session]
    done = r['step'] - r['start']
    before = sessions[-1] if sessions else None
    again = max(0, before['step'] - r['start']) if before else 0
    if again:
      repeated_s += again * before['step_s']
    sessions.append(
      dict(
        start=r['start'],
        step=r['step'],
        end=r['end'] or KILLED,
        repeated_steps=again,
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
  """A summary for a reader."""
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
    again = s['repeated_steps']
    out.append(
      f'  session {i}: steps {s["start"]} to {s["step"]}, {s["end"]}'
      + (f'; {again} steps done again' if again else '')
    )
  if found['spikes']:
    out.append(f'  {found["spikes"]} loss spikes')
  return out
