"""Sections on the cost of runs: speed, memory, goodput, spikes, flags."""

from mtp_jax.report import content, figures, history
from mtp_jax.train import goodput

BARS = 12  # sessions per figure


def speed(runs: list[history.Run]) -> content.Section:
  medians = {
    'tokens/s': ('tokens_per_s', 1, ',.0f'),
    'step (ms)': ('step_time_s', 1e3, ',.1f'),
    'model TFLOP/s': ('model_flops_per_s', 1e-12, '.4g'),
    'MFU': ('mfu', 1, '.1%'),
    'waiting for data': ('data_wait_frac', 1, '.1%'),
  }
  rows = {}
  for label, (name, scale, form) in medians.items():
    values = [history.median(run, name) for run in runs]
    rows[label] = [content.NONE if v is None else content.shown(v * scale, form) for v in values]
  causes = {run.name: history.step_seconds(run) for run in runs}
  bars = figures.Bars(
    'step-time',
    'Time per step, by cause',
    'milliseconds',
    {name: {NAMES[cause]: 1e3 * s for cause, s in of.items()} for name, of in causes.items() if of},
    note='Means over all sessions.',
  )
  table = content.by_run('Medians over the training log', runs, rows)
  return content.Section(
    'speed',
    'Speed',
    [],
    [
      *content.drawn(
        _training(runs, 'tokens_per_s', 'Tokens per second', 'tokens/s'),
        _training(runs, 'mfu', 'Model FLOPs utilization', 'MFU'),
      ),
      *([bars] if bars.rows else []),
    ],
    [table] if table.rows else [],
  )


def _training(runs, name, title, unit) -> figures.Lines:
  series, most = [], 1
  for i, run in enumerate(runs):
    found, each = history.thinned(history.points(run.of('train'), name))
    most = max(most, each)
    if found:
      series.append(figures.Series(run.name, found, i))
  top = max((y for s in series for _, y in s.points), default=1)
  note = f'Means of {most} log lines.' if most > 1 else ''
  return figures.Lines(content.slug(name), title, 'step', unit, series, (0, 1.08 * top or 1), note)


def memory(runs: list[history.Run]) -> content.Section:
  found = {run.name: history.memory(run) for run in runs}
  parts = ('parameters', 'optimizer', 'temporaries')
  bars = figures.Bars(
    'memory',
    'Memory of the compiled step',
    'MiB per device',
    {name: {part: m[part] / 2**20 for part in parts} for name, m in found.items() if m},
  )
  rows = {
    f'{part} (MiB)': [content.shown(m and m[part] / 2**20, ',.1f') for m in found.values()]
    for part in parts
  }
  text = (
    'Per device: parameters, optimizer state, and the temporaries of the training'
    ' step as reported by the compiler.'
  )
  table = content.by_run('Memory per device', runs, rows)
  return content.Section(
    'memory', 'Memory', [text], [bars] if bars.rows else [], [table] if table.rows else []
  )


NAMES = {'data': 'waiting for data', 'host': 'host work', 'device': 'waiting for device'}


def where_time_went(runs: list[history.Run]) -> content.Section:
  """Goodput: by cause per run, and by session."""
  sums = [goodput.summary(run.sessions) for run in runs]

  def shares(name):
    return [
      content.shown(s[f'{name}_s'] / s['whole_s'], '.1%') if s and s['whole_s'] else content.NONE
      for s in sums
    ]

  rows = {
    'goodput': [content.shown(s.get('goodput'), '.1%') for s in sums],
    'whole (s)': [content.shown(s.get('whole_s'), ',.0f') for s in sums],
  }
  causes = [*goodput.CAUSES, 'repeated', 'down']
  rows |= {cause: shares(cause) for cause in causes}
  bars, by_session = {}, []
  for run, found in zip(runs, sums, strict=True):
    for i, (summary, at) in enumerate(
      zip(found.get('sessions', []), history.sessions(run), strict=True)
    ):
      name = f'{run.name}, session {i}' if len(runs) > 1 else f'session {i}'
      bars[name] = {cause: at['seconds'][cause] for cause in goodput.CAUSES}
      by_session.append(
        [
          name,
          f'{summary["start"]:,} to {summary["step"]:,}',
          summary['end'],
          f'{summary["repeated_steps"]:,}',
          *(f'{at["seconds"][cause]:,.1f}' for cause in goodput.CAUSES),
        ]
      )
  of = f', the last {BARS}' if len(bars) > BARS else ''
  plot = figures.Bars(
    'goodput', f'Seconds of each session, by cause{of}', 'seconds', dict(list(bars.items())[-BARS:])
  )
  header = ['', 'steps', 'ended', 'repeated', *goodput.CAUSES]
  terms = goodput.CAUSES | dict(
    repeated='steps repeated because a session ended without saving them',
    down='between two sessions',
  )
  text = (
    'Goodput is the fraction of the time since the first start spent in steps that'
    ' were not repeated.'
  )
  if not bars:
    return content.Section('goodput', 'Goodput', [])
  return content.Section(
    'goodput',
    'Goodput',
    [text],
    [plot],
    [
      content.by_run('Fraction of total time', runs, rows),
      content.Table('Sessions, in seconds', header, by_session),
    ],
    terms,
  )


def spikes(runs: list[history.Run]) -> content.Section:
  rows = [
    [f'{step:,}', run.name, content.shown(loss, '.4f')]
    for run in runs
    for step, loss in history.spikes(run)
  ]
  header = ['step', 'run', 'loss of head 1']
  text = 'Steps whose loss was --train.spike_sigma deviations above the median.'
  tables = [content.Table('Loss spikes', header, rows)] if rows else []
  return content.Section('spikes', 'Loss spikes', [text], [], tables)


def flags(runs: list[history.Run]) -> content.Section:
  """Flags that differ between runs; for a single run, non-default flags."""
  several = len(runs) > 1
  found = history.differing(runs) if several else history.given(runs[0])
  title = 'Flags that differ' if several else 'Non-default flags'
  rows = [
    [name, *(content.NONE if v is None else _flag(v) for v in values)]
    for name, values in found.items()
  ]
  header = ['', *(run.name for run in runs)]
  tables = [content.Table(title, header, rows)] if rows else []
  return content.Section('flags', 'Configuration', [], [], tables)


def _flag(value) -> str:
  if isinstance(value, tuple):
    return ','.join(map(str, value)) or "''"
  return "''" if value == '' else str(value)
