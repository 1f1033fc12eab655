"""What there is to show of runs, as data. A section without any is left out."""

import re
from typing import NamedTuple

from mtp_jax.run_report import figures, history
from mtp_jax.run_report.figures import Bars, Lines, Plot, Series
from mtp_jax.run_report.history import Run
from mtp_jax.train import goodput

NONE = '–'  # in a table: not recorded, or not a number
BARS = 12  # sessions in one figure


class Table(NamedTuple):
  """The first cell of a row is its heading."""

  caption: str
  header: list[str]
  rows: list[list[str]]


class Section(NamedTuple):
  key: str  # of a link within the page
  title: str
  text: list[str]
  plots: list[Plot] = []
  tables: list[Table] = []
  terms: dict[str, str] = {}


def sections(runs: list[Run]) -> list[Section]:
  found = [
    make(runs)
    for make in (
      compared, losses, acceptance, suites, speed, memory, where_time_went,
      spikes, flags,
    )
  ]  # fmt: skip
  return [s for s in found if s.plots or s.tables]


def _shown(value, form: str) -> str:
  return format(value, form) if history.number(value) else NONE


def _slug(*parts) -> str:
  return re.sub(r'[^A-Za-z0-9]+', '-', '-'.join(map(str, parts))).strip('-')


def _by_run(caption: str, runs: list[Run], rows: dict[str, list]) -> Table:
  """A column for each run; a row that no run has is left out."""
  return Table(
    caption, ['', *(run.name for run in runs)],
    [[name, *row] for name, row in rows.items() if set(row) - {NONE}],
  )  # fmt: skip


# The whole.


def compared(runs: list[Run]) -> Section:
  """Heads, size, tokens and what they came to, of each run."""
  n, count = history.heads, history.n_parameters

  def family(run):
    return run.cfg.heads.family if n(run) > 1 and run.cfg else NONE

  def tokens(run):
    each = history.tokens_a_step(run)
    return each and each * history.steps(run)

  rows = {
    'heads n': [str(n(run)) for run in runs],
    'family': [family(run) for run in runs],
    'parameters': [_shown(count(run), ',') for run in runs],
    'steps': [_shown(history.steps(run), ',') for run in runs],
    'tokens seen': [_shown(tokens(run), ',') for run in runs],
  }
  sets = [history.by_source(run.of('eval')) for run in runs]
  for source in dict.fromkeys(s for of_run in sets for s in of_run):
    rows |= _held_out(runs, [s.get(source, []) for s in sets], source)
  several = len(runs) > 1
  text = []
  if several:
    text = [
      ' '.join(
        _alike(what, [of(run) for run in runs])
        for what, of in (('parameters', count), ('tokens', tokens))
      ),
      'Between different n only the loss of head 1, the next token, is'
      ' comparable: a total over heads is a sum of different things. Accepted'
      ' lengths are teacher-forced estimates of the tokens of a forward pass.',
    ]
  title = 'The runs compared' if several else 'The run'
  return Section(
    'runs', title, text, _head_1(runs) if several else [],
    [_by_run('Size, and the last held-out results', runs, rows)],
  )  # fmt: skip


def _held_out(runs, evals: list[list[dict]], source: str) -> dict[str, list]:
  last = [found[-1] if found else {} for found in evals]
  of = f', {source}' if source else ''
  rows = {
    f'held-out loss of head 1 (nats){of}': [
      _shown(r.get('loss_1'), '.4f') for r in last
    ]
  }
  plain = [
    r['loss_1']
    for run, r in zip(runs, last, strict=True)
    if history.heads(run) == 1 and history.number(r.get('loss_1'))
  ]
  if plain and len(runs) > 1:
    rows[f'  against n = 1{of}'] = [
      _shown(r['loss_1'] - plain[0], '+.4f')
      if history.number(r.get('loss_1'))
      else NONE
      for r in last
    ]
  return rows | {
    f'bits per byte{of}': [_shown(r.get('bits_per_byte'), '.4f') for r in last],
    f'accuracy of head 1{of}': [
      _shown(r.get('accuracy_1'), '.2%') for r in last
    ],
    f'expected accepted length (tokens){of}': [
      _shown(r.get('accepted_length'), '.3f') for r in last
    ],
  }


def _alike(what: str, values: list) -> str:
  if not all(values):
    return f'Not all runs say how many {what} they have.'
  apart = max(values) / min(values) - 1
  if not apart:
    return f'All have the same number of {what}.'
  return f'They differ in {what} by {apart:.1%} at most.'


def _head_1(runs: list[Run]) -> list[Plot]:
  """Held-out loss of head 1 over what each run had read by then."""
  over_tokens = all(run.cfg for run in runs)
  series = []
  for i, run in enumerate(runs):
    scale = history.tokens_a_step(run) if over_tokens else 1
    sets = history.by_source(run.of('eval'))
    for marker, (source, records) in enumerate(sets.items()):
      found = [(s * scale, y) for s, y in history.points(records, 'loss_1')]
      label = f'{run.name}, {source}' if source else run.name
      if found:
        series.append(_dotted(label, found, i, marker))
  return _plots(Lines(
    'head-1-held-out', 'Held-out loss of head 1, by run',
    'tokens seen' if over_tokens else 'steps', 'nats a token', series,
  ))  # fmt: skip


def _dotted(label, found, color, marker=0, **more) -> Series:
  shape = figures.MARKERS[marker % len(figures.MARKERS)]
  return Series(label, found, color, shape, **more)


def _plots(*plots: Lines) -> list[Plot]:
  return [plot for plot in plots if plot.series]


# By head.


def losses(runs: list[Run]) -> Section:
  plots = [
    plot for run in runs for plot in _plots(_by_head(run, 'loss', 'head '))
  ]
  limits = _limits(plots)
  plots = [plot._replace(limits=limits) for plot in plots]
  text = 'Each head looks further ahead than the one before it.'
  return Section(
    'loss', 'Loss by head', [text], plots,
    [table for run in runs for table in _heads_table(run)],
  )  # fmt: skip


def acceptance(runs: list[Run]) -> Section:
  text = (
    'How often a draft is the token that head 1 says, given that those before'
    ' it were; teacher-forced, an estimate of what decoding accepts.'
  )
  plots = [
    plot._replace(limits=(0, 1.02))
    for run in runs
    for plot in _plots(_by_head(run, 'acceptance', 't+'))
  ]
  return Section('acceptance', 'Drafts accepted', [text], plots)


TITLES = {'loss': 'Loss by head', 'acceptance': 'Drafts accepted by position'}


def _by_head(run: Run, name: str, what: str) -> Lines:
  """Training as lines, held-out values as dots; of another shape a set."""
  series, evals, each = [], history.by_source(run.of('eval')), 1
  for k, field in history.by_head(run.records, name).items():
    found = history.points(run.of('train'), field)
    label = f'{what}{k}'
    if found:
      found, each = history.thinned(found)
      series.append(Series(label, found, k - 1))
      label = ''
    for marker, (_, records) in enumerate(evals.items()):
      held = history.points(records, field)
      if held:
        series.append(_dotted(label, held, k - 1, marker, joined=False))
        label = ''
  if name == 'loss' and history.spikes(run):
    series.append(
      Series('spike', history.spikes(run), 6, marker='x', joined=False)
    )
  note = 'Lines: training' + (
    f', means of {each} log lines' if each > 1 else ''
  )
  if any(evals):
    shapes = ('circles', 'squares', 'triangles', 'triangles down', 'diamonds')
    note += '. Marks: held out' + ''.join(
      f'; {source}: {shapes[i % len(shapes)]}' for i, source in enumerate(evals)
    )
  elif evals:
    note += '. Circles: held out'
  return Lines(
    _slug(name, run.name), f'{TITLES[name]}, {run.name}', 'step',
    'nats a token' if name == 'loss' else 'rate', series, note=f'{note}.',
  )  # fmt: skip


def _limits(plots: list[Lines]) -> tuple[float, float] | None:
  """The same for all, so that runs compare; the first twentieth of the steps,
  whose losses would flatten the rest, may leave the frame above."""
  if not plots:
    return None
  end = max(x for plot in plots for s in plot.series for x, _ in s.points)
  ys = [
    y for plot in plots for s in plot.series for x, y in s.points
    if x > end / 20 or s.label == 'spike'
  ]  # fmt: skip
  pad = 0.04 * (max(ys) - min(ys)) or 0.1
  return min(ys) - pad, max(ys) + pad


def _heads_table(run: Run) -> list[Table]:
  """The last held-out results of each set; rates of drafts beyond the heads
  (leaps) have rows of their own."""
  tables = []
  for source, records in history.by_source(run.of('eval')).items():
    r = records[-1]
    rates = history.by_head([r], 'acceptance')
    ks = history.by_head([r], 'loss').keys() | rates.keys()
    header = ['head', 'loss (nats)', 'accuracy']
    rows = [
      [
        str(k), _shown(r.get(f'loss_{k}'), '.4f'),
        _shown(r.get(f'accuracy_{k}'), '.2%'),
        *([_shown(r.get(f'acceptance_{k}'), '.2%')] if rates else []),
      ]
      for k in sorted(ks)
    ]  # fmt: skip
    of = f', {source}' if source else ''
    tables.append(Table(
      f'{run.name}{of}: held out after step {r["step"]:,}',
      [*header, *(['accepted'] if rates else [])], rows,
    ))  # fmt: skip
  return tables


# Evaluators.


def suites(runs: list[Run]) -> Section:
  plots, tables = [], {}
  for (source, group), names in history.suites(runs).items():
    plots += _suite_plot(runs, source, group, names)
    rows = tables.setdefault(source, {})
    for name in names:
      rows[name] = [
        _with_band(history.suite_records(run, source), name) for run in runs
      ]
  text = 'Bands, and brackets in the tables, are intervals as recorded.'
  has_bands = any(s.band for plot in plots for s in plot.series)
  return Section(
    'evaluators', 'Evaluators', [text] if has_bands else [], plots,
    [
      _by_run(f'{source or "suite"}: last values', runs, rows)
      for source, rows in tables.items()
    ],
  )  # fmt: skip


def _suite_plot(runs, source, group, names) -> list[Plot]:
  """None of what never changes, or was measured once: the table has it."""
  series = []
  for i, run in enumerate(runs):
    records = history.suite_records(run, source)
    for j, name in enumerate(names):
      found = history.points(records, name)
      parts = [run.name] * (len(runs) > 1) + [name] * (len(names) > 1)
      if found:
        color = i if len(names) == 1 else i * len(names) + j
        series.append(
          _dotted(
            ', '.join(parts) or name, found, color, i,
            band=history.band(records, name),
          )
        )  # fmt: skip
  changes = any(len({y for _, y in s.points}) > 1 for s in series)
  title = f'{source}: {group}' if source else group
  return [
    Lines(_slug('suite', source, group), title, 'step', group, series)
  ] * changes


def _with_band(records: list[dict], name: str) -> str:
  values = [r for r in records if history.number(r.get(name))]
  if not values:
    return NONE
  low, high = (values[-1].get(f'{name}_{end}') for end in ('low', 'high'))
  text = f'{values[-1][name]:.4g}'
  if history.number(low) and history.number(high):
    text += f' [{low:.3g}, {high:.3g}]'
  return text


# What it took.


def speed(runs: list[Run]) -> Section:
  medians = {
    'tokens/s': ('tokens_per_s', 1, ',.0f'),
    'step (ms)': ('step_time_s', 1e3, ',.1f'),
    'model TFLOP/s': ('model_flops_per_s', 1e-12, '.4g'),
    'MFU': ('mfu', 1, '.1%'),
    'waiting for data': ('data_wait', 1, '.1%'),
  }
  rows = {}
  for label, (name, scale, form) in medians.items():
    values = [history.median(run, name) for run in runs]
    rows[label] = [
      NONE if v is None else _shown(v * scale, form) for v in values
    ]
  causes = {run.name: history.step_seconds(run) for run in runs}
  bars = Bars(
    'step-time', 'Time of a step, by cause', 'milliseconds',
    {
      name: {NAMES[cause]: 1e3 * s for cause, s in of.items()}
      for name, of in causes.items()
      if of
    },
    note='Means over all sessions.',
  )  # fmt: skip
  table = _by_run('Medians of the log lines of training', runs, rows)
  return Section(
    'speed', 'Speed', [],
    [
      *_plots(
        _training(runs, 'tokens_per_s', 'Tokens a second', 'tokens/s'),
        _training(runs, 'mfu', 'Model FLOPs utilization', 'MFU'),
      ),
      *([bars] if bars.rows else []),
    ],
    [table] if table.rows else [],
  )  # fmt: skip


def _training(runs, name, title, unit) -> Lines:
  series, most = [], 1
  for i, run in enumerate(runs):
    found, each = history.thinned(history.points(run.of('train'), name))
    most = max(most, each)
    if found:
      series.append(Series(run.name, found, i))
  top = max((y for s in series for _, y in s.points), default=1)
  note = f'Means of {most} log lines.' if most > 1 else ''
  return Lines(
    _slug(name), title, 'step', unit, series, (0, 1.08 * top or 1), note
  )


def memory(runs: list[Run]) -> Section:
  found = {run.name: history.memory(run) for run in runs}
  parts = ('parameters', 'optimizer', 'temporaries')
  bars = Bars(
    'memory', 'Memory of the compiled step', 'MiB a device',
    {
      name: {part: m[part] / 2**20 for part in parts}
      for name, m in found.items()
      if m
    },
  )  # fmt: skip
  rows = {
    f'{part} (MiB)': [
      _shown(m and m[part] / 2**20, ',.1f') for m in found.values()
    ]
    for part in parts
  }
  text = (
    'Of each device: parameters and optimizer state, and the temporaries of the'
    ' training step as the compiler counts them.'
  )
  table = _by_run('Memory a device', runs, rows)
  return Section(
    'memory', 'Memory', [text], [bars] if bars.rows else [],
    [table] if table.rows else [],
  )  # fmt: skip


NAMES = {
  'data': 'waiting for data',
  'host': 'host at work',
  'device': 'waiting for device',
}


def where_time_went(runs: list[Run]) -> Section:
  """Goodput: by cause for each run, by session for all."""
  sums = [goodput.summary(run.sessions) for run in runs]

  def shares(name):
    return [
      _shown(s[f'{name}_s'] / s['whole_s'], '.1%')
      if s and s['whole_s']
      else NONE
      for s in sums
    ]

  rows = {
    'goodput': [_shown(s.get('goodput'), '.1%') for s in sums],
    'whole (s)': [_shown(s.get('whole_s'), ',.0f') for s in sums],
  }
  causes = [*goodput.CAUSES, 'repeated', 'down']
  rows |= {cause: shares(cause) for cause in causes}
  bars, by_session = {}, []
  for run, found in zip(runs, sums, strict=True):
    for i, (said, at) in enumerate(
      zip(found.get('sessions', []), history.sessions(run), strict=True)
    ):
      name = f'{run.name}, session {i}' if len(runs) > 1 else f'session {i}'
      bars[name] = {cause: at['seconds'][cause] for cause in goodput.CAUSES}
      by_session.append([
        name, f'{said["start"]:,} to {said["step"]:,}', said['end'],
        f'{said["repeated_steps"]:,}',
        *(f'{at["seconds"][cause]:,.1f}' for cause in goodput.CAUSES),
      ])  # fmt: skip
  of = f', the last {BARS}' if len(bars) > BARS else ''
  plot = Bars(
    'goodput', f'Seconds of each session, by cause{of}', 'seconds',
    dict(list(bars.items())[-BARS:]),
  )  # fmt: skip
  header = ['', 'steps', 'ended', 'done again', *goodput.CAUSES]
  terms = goodput.CAUSES | dict(
    repeated='steps done again: a session ended without saving them',
    down='between two sessions',
  )
  text = (
    'Goodput is the share of the time since the first start in steps that did'
    ' not have to be done again.'
  )
  if not bars:
    return Section('goodput', 'Goodput', [])
  return Section(
    'goodput', 'Goodput', [text], [plot],
    [
      _by_run('Share of the whole time', runs, rows),
      Table('Sessions, in seconds', header, by_session),
    ],
    terms,
  )  # fmt: skip


# What else differs.


def spikes(runs: list[Run]) -> Section:
  rows = [
    [f'{step:,}', run.name, _shown(loss, '.4f')]
    for run in runs
    for step, loss in history.spikes(run)
  ]
  header = ['step', 'run', 'loss of head 1']
  text = 'Steps whose loss was --train.spike_sigma deviations above the median.'
  tables = [Table('Loss spikes', header, rows)] if rows else []
  return Section('spikes', 'Loss spikes', [text], [], tables)


def flags(runs: list[Run]) -> Section:
  """Those that differ; of one run, those that are not the defaults."""
  several = len(runs) > 1
  found = history.differing(runs) if several else history.given(runs[0])
  title = 'Flags that differ' if several else 'Flags beside the defaults'
  rows = [
    [name, *(NONE if v is None else _flag(v) for v in values)]
    for name, values in found.items()
  ]
  header = ['', *(run.name for run in runs)]
  tables = [Table(title, header, rows)] if rows else []
  return Section('flags', 'Configuration', [], [], tables)


def _flag(value) -> str:
  if isinstance(value, tuple):
    return ','.join(map(str, value)) or "''"
  return "''" if value == '' else str(value)
