"""The section on where a step's time goes, by the compiler: of RUN/plan.json."""

from mtp_jax.parallel import chips
from mtp_jax.planning import profile
from mtp_jax.report import content, figures, history

SHOWN = 20  # scopes, and buffers
LEVELS = 4  # pass, module, scope within it, the rest of the name


def where_time_goes(runs: list[history.Run]) -> content.Section:
  """An icicle and a table of scopes for each run with a plan, made with --plan.profile."""
  plots, tables, text = [], [], []
  for run in runs:
    if run.plan_problem:
      text += [run.plan_problem]
    if run.plan is None:
      continue
    rows = [r for r in run.plan.get('operations') or () if r['cycles'] > 0]
    text += _other_flags(run)
    if rows:
      plots += [_icicle(run, rows)]
      tables += [_scopes(run, rows)]
    if run.plan.get('peak_buffers'):
      tables += [_buffers(run)]
  about = (
    "The TPU compiler's estimate in cycles per step and device, of RUN/plan.json. Kernels, such as"
    ' attention, have none.'
  )
  return content.Section(
    'compiled',
    "Where a step's time goes, by the compiler",
    [about, *text] if plots else text,
    plots,
    tables,
  )


def _other_flags(run: history.Run) -> list[str]:
  """Returns a line if the plan is of another model or batch than the run."""
  if run.cfg is None or run.plan is None:
    return []
  now = {
    'heads': run.cfg.heads.n,
    'seq_len': run.cfg.data.seq_len,
    'batch_size': run.cfg.data.batch_size,
    'parameters': history.n_parameters(run),
  }
  other = [
    f'{name} {run.plan[name]}, the run {value}'
    for name, value in now.items()
    if run.plan.get(name, value) != value
  ]
  return [f'The plan of {run.name} is of other flags: it has {"; ".join(other)}.'] if other else []


def _icicle(run: history.Run, rows: list[dict]) -> figures.Icicle:
  whole = figures.Node('', 0.0, {})
  for row in rows:
    node, value = whole, row['cycles'] / 1e6
    direction, _, rest = row['scope'].partition(' ')
    for name in (direction, *rest.split('/', LEVELS - 2)):
      node = node.parts.setdefault(name, figures.Node(name, 0.0, {}))
    node.parts[''] = figures.Node('', value, {})
  return figures.Icicle(
    content.slug('compiled', run.name),
    f'Cycles by scope, {run.name}',
    'M cycles per step and device',
    whole.summed().parts,
    'Pass, module, scope and operation, from left to right; heights are cycles.',
  )


def _scopes(run: history.Run, rows: list[dict]) -> content.Table:
  assert run.plan
  chip, clock = chips.chip(run.plan['device_kind']), run.plan.get('clock_hz')
  whole = sum(r['cycles'] for r in rows)
  cells = []
  for r in sorted(rows, key=lambda r: -r['cycles'])[:SHOWN]:
    row = profile.Row(r['scope'], r['cycles'], r['flops'], r['memory_bytes'])
    floor = row.floor_s(chip) * clock / row.cycles if chip and clock else None
    cells += [
      [
        profile.shown(row.scope),
        f'{row.cycles / 1e6:,.2f}',
        f'{row.cycles / whole:.1%}',
        f'{row.flops / 1e9:,.1f}',
        f'{row.memory_bytes / 2**20:,.1f}',
        content.shown(floor, '.0%'),
      ]
    ]
  return content.Table(
    f'Scopes with most cycles, {run.name}; floor: the part that the peaks of the chip take',
    ['', 'M cycles', 'share', 'GFLOP', 'MiB', 'floor'],
    cells,
  )


def _buffers(run: history.Run) -> content.Table:
  assert run.plan
  return content.Table(
    f'Largest temporaries at the peak, {run.name}, estimated from the program',
    ['', 'array', 'MiB'],
    [
      [profile.shown(b['scope']), b['shape'], f'{b["bytes"] / 2**20:,.1f}']
      for b in run.plan['peak_buffers']
    ],
  )
