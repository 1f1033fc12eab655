"""Sections on the results of runs: sizes, losses, acceptance rates, evaluations."""

import math

from mtp_jax.report import content, figures, history

# Summary.


def compared(runs: list[history.Run]) -> content.Section:
  """Heads, size, tokens and last results of each run."""
  n, count = history.heads, history.n_parameters

  def family(run):
    return run.cfg.heads.family if n(run) > 1 and run.cfg else content.NONE

  def tokens(run):
    each = history.tokens_per_step(run)
    return each and each * history.steps(run)

  rows = {
    'heads n': [str(n(run) or content.NONE) for run in runs],
    'family': [family(run) for run in runs],
    'parameters': [content.shown(count(run), ',') for run in runs],
    'steps': [content.shown(history.steps(run), ',') for run in runs],
    'tokens seen': [content.shown(tokens(run), ',') for run in runs],
  }
  sets = [history.by_source(run.of('eval')) for run in runs]
  for source in dict.fromkeys(s for of_run in sets for s in of_run):
    rows |= _held_out(runs, [s.get(source, []) for s in sets], source)
  several = len(runs) > 1
  text = []
  if several:
    text = [
      _alike({'parameters': [count(run) for run in runs], 'tokens': [tokens(run) for run in runs]}),
      'Between different n only the loss of head 1, the next token, is'
      ' comparable: a total over heads sums different targets. Acceptance lengths'
      ' are teacher-forced estimates of the tokens per forward pass.',
    ]
  title = 'The runs compared' if several else 'The run'
  return content.Section(
    'runs',
    title,
    text,
    _head_1(runs) if several else [],
    [content.by_run('Size, and the last held-out results', runs, rows)],
  )


def _held_out(runs, evals: list[list[dict]], source: str) -> dict[str, list]:
  last = [found[-1] if found else {} for found in evals]
  of = f', {source}' if source else ''
  rows = {
    f'held-out loss of head 1 (nats){of}': [content.shown(r.get('loss_1'), '.4f') for r in last]
  }
  plain = [
    r['loss_1']
    for run, r in zip(runs, last, strict=True)
    if history.heads(run) == 1 and history.number(r.get('loss_1'))
  ]
  if plain and len(runs) > 1:
    rows[f'difference to n = 1{of}'] = [
      content.shown(r['loss_1'] - plain[0], '+.4f')
      if history.number(r.get('loss_1'))
      else content.NONE
      for r in last
    ]
  return rows | {
    f'bits per byte{of}': [content.shown(r.get('bits_per_byte'), '.4f') for r in last],
    f'accuracy of head 1{of}': [content.shown(r.get('accuracy_1'), '.2%') for r in last],
    f'mean acceptance length (tokens){of}': [
      content.shown(r.get('mean_acceptance_length'), '.3f') for r in last
    ],
    f'mean acceptance length, sampled (tokens){of}': [
      content.shown(r.get('mean_acceptance_length_sampled'), '.3f') for r in last
    ],
  }


def _alike(counts: dict[str, list[int | None]]) -> str:
  known = {what: [n for n in values if n] for what, values in counts.items() if all(values)}
  apart = {what: max(v) / min(v) - 1 for what, v in known.items()}
  same = [what for what, by in apart.items() if not by]
  lines = [f'All have the same number of {" and ".join(same)}.'] if same else []
  lines += [f'They differ in {what} by up to {by:.1%}.' for what, by in apart.items() if by]
  unknown = [what for what in counts if what not in known]
  if unknown:
    lines.append(f'Not all runs record their {" and ".join(unknown)}.')
  return ' '.join(lines)


def _head_1(runs: list[history.Run]) -> list[figures.Lines]:
  """Held-out loss of head 1 over tokens seen."""
  over_tokens = all(run.cfg for run in runs)
  series = []
  for i, run in enumerate(runs):
    scale = history.tokens_per_step(run) if over_tokens else 1
    assert scale
    sets = history.by_source(run.of('eval'))
    for marker, (source, records) in enumerate(sets.items()):
      found = [(s * scale, y) for s, y in history.points(records, 'loss_1')]
      label = f'{run.name}, {source}' if source else run.name
      if found:
        series.append(_dotted(label, found, i, marker))
  return content.drawn(
    figures.Lines(
      'head-1-held-out',
      'Held-out loss of head 1, by run',
      'tokens seen' if over_tokens else 'steps',
      'nats per token',
      series,
    )
  )


def _dotted(label, found, color, marker=0, **more) -> figures.Series:
  shape = figures.MARKERS[marker % len(figures.MARKERS)]
  return figures.Series(label, found, color, shape, **more)


# By head.


def losses(runs: list[history.Run]) -> content.Section:
  plots = [plot for run in runs for plot in content.drawn(_by_head(run, 'loss', 'head '))]
  limits = _limits(plots)
  plots = [plot._replace(limits=limits) for plot in plots]
  text = []
  if any(history.heads(run) > 1 for run in runs):
    text = ['Each head predicts a token further ahead than the previous one.']
  if limits and any(y > limits[1] for p in plots for s in p.series for _, y in s.points):
    text.append('The highest losses, mostly of the first steps, are clipped.')
  return content.Section(
    'loss',
    'Loss by head',
    [' '.join(text)] if text else [],
    plots,
    [table for run in runs for table in _heads_table(run)],
  )


def acceptance(runs: list[history.Run]) -> content.Section:
  text = (
    'How often a draft equals the prediction of head 1, given that the earlier'
    ' drafts did; teacher-forced, an estimate of acceptance in decoding. alpha: the same of'
    ' sampled drafts, of each head alone.'
  )
  plots = [
    plot._replace(limits=(0, 1.02))
    for run in runs
    for plot in content.drawn(_by_head(run, 'acceptance', 't+'))
  ]
  return content.Section('acceptance', 'Drafts accepted', [text], plots)


TITLES = {'loss': 'Loss by head', 'acceptance': 'Drafts accepted by position'}


def _by_head(run: history.Run, name: str, what: str) -> figures.Lines:
  """Training as lines, held-out values as markers, one shape per set."""
  series, evals, each = [], history.by_source(run.of('eval')), 1
  for k, field in history.by_head(run.records, name).items():
    found = history.points(run.of('train'), field)
    label = f'{what}{k}'
    if found:
      found, each = history.thinned(found)
      series.append(figures.Series(label, found, k - 1))
      label = ''
    for marker, (_, records) in enumerate(evals.items()):
      held = history.points(records, field)
      if held:
        series.append(_dotted(label, held, k - 1, marker, joined=False))
        label = ''
  if name == 'loss' and history.spikes(run):
    series.append(figures.Series('spike', history.spikes(run), 6, marker='x', joined=False))
  note = 'Lines: training' + (f', means of {each} log lines' if each > 1 else '')
  if any(evals):
    shapes = ('circles', 'squares', 'triangles', 'triangles down', 'diamonds')
    note += '. Markers: held out' + ''.join(
      f'; {source}: {shapes[i % len(shapes)]}' for i, source in enumerate(evals)
    )
  elif evals:
    note += '. Circles: held out'
  return figures.Lines(
    content.slug(name, run.name),
    f'{TITLES[name]}, {run.name}',
    'step',
    'nats per token' if name == 'loss' else 'rate',
    series,
    note=f'{note}.',
  )


def _limits(plots: list[figures.Lines]) -> tuple[float, float] | None:
  """Returns common limits, so that runs are comparable. Clips what would flatten the
  rest: losses of the first 5% of the steps, and outliers in the top 2%."""
  if not plots:
    return None
  end = max(x for plot in plots for s in plot.series for x, _ in s.points)
  ys = sorted(y for plot in plots for s in plot.series for x, y in s.points if x > end / 20)
  low, usual = ys[0], ys[math.ceil(0.98 * (len(ys) - 1))]
  high = min(ys[-1], low + 2 * (usual - low))
  pad = 0.04 * (high - low) or 0.1
  return low - pad, high + pad


def _heads_table(run: history.Run) -> list[content.Table]:
  """Returns the last held-out results of each set; acceptance rates beyond the heads
  (of strided heads) have their own rows."""
  tables = []
  for source, records in history.by_source(run.of('eval')).items():
    r = records[-1]
    rates = history.by_head([r], 'acceptance')
    sampled = history.by_head([r], 'alpha')
    ks = history.by_head([r], 'loss').keys() | rates.keys()
    header = ['head', 'loss (nats)', 'accuracy']
    rows = [
      [
        str(k),
        content.shown(r.get(f'loss_{k}'), '.4f'),
        content.shown(r.get(f'accuracy_{k}'), '.2%'),
        *([content.shown(r.get(f'acceptance_{k}'), '.2%')] if rates else []),
        *([content.shown(r.get(f'alpha_{k}'), '.2%')] if sampled else []),
      ]
      for k in sorted(ks)
    ]
    of = f', {source}' if source else ''
    tables.append(
      content.Table(
        f'{run.name}{of}: held out after step {r["step"]:,}',
        [*header, *(['accepted'] if rates else []), *(['alpha'] if sampled else [])],
        rows,
      )
    )
  return tables


# Evaluators.


def suites(runs: list[history.Run]) -> content.Section:
  plots, tables = [], {}
  for (source, group), names in history.suites(runs).items():
    several = sum(_has(run, source, names) for run in runs) > 1
    # One run: one figure for all levels. Several runs: one figure per level.
    for title, shown in [(name, [name]) for name in names] if several else [(group, names)]:
      plots += _suite_plot(runs, source, title, shown)
    rows = tables.setdefault(source, {})
    for name in names:
      rows[name] = [_with_band(history.suite_records(run, source), name) for run in runs]
  text = 'Bands, and brackets in the tables, are intervals as recorded.'
  has_bands = any(s.band for plot in plots for s in plot.series)
  return content.Section(
    'evaluators',
    'Evaluators',
    [text] if has_bands else [],
    plots,
    [
      content.by_run(f'{source or "suite"}: last values', runs, rows)
      for source, rows in tables.items()
    ],
  )


def _has(run: history.Run, source: str, names: list[str]) -> bool:
  records = history.suite_records(run, source)
  return any(history.points(records, name) for name in names)


def _suite_plot(runs, source, group, names) -> list[figures.Plot]:
  """Returns no plot for values that never change: the table has them."""
  series = []
  for i, run in enumerate(runs):
    records = history.suite_records(run, source)
    for j, name in enumerate(names):
      found = history.points(records, name)
      parts = [run.name] * (len(runs) > 1) + [name] * (len(names) > 1)
      if found:
        color = i if len(names) == 1 else i * len(names) + j
        series.append(
          _dotted(', '.join(parts) or name, found, color, i, band=history.band(records, name))
        )
  changes = any(len({y for _, y in s.points}) > 1 for s in series)
  title = f'{source}: {group}' if source else group
  return [
    figures.Lines(content.slug('suite', source, group), title, 'step', group, series)
  ] * changes


def _with_band(records: list[dict], name: str) -> str:
  values = [r for r in records if history.number(r.get(name))]
  if not values:
    return content.NONE
  low, high = (values[-1].get(f'{name}_{end}') for end in ('low', 'high'))
  text = figures.plain(values[-1][name])
  if history.number(low) and history.number(high):
    text += f' [{figures.plain(low)}, {figures.plain(high)}]'
  return text
