"""Compares a plan with an earlier one, scope by scope: --plan.against.

Both are values as `mtp plan --plan.profile --out=FILE.json` writes them.
"""

from mtp_jax.config import fields, schema
from mtp_jax.io import paths
from mtp_jax.planning import nvidia, profile, saved

FLAG = 'plan.against'
SHOWN = 25  # scopes
FACTS = (  # that two plans may differ in, as their JSON names them
  'topology',
  'slices',
  'nodes',
  'device_kind',
  'devices',
  'mesh',
  'parameters',
  'heads',
  'family',
  'schedule',
  'chunk',
  'remat',
  'seq_len',
  'batch_size',
  'micro_batches',
  'steps',
)
TOTALS = {  # name -> (what is printed, unit, units per printed one)
  'estimated_cycles': ('estimated cycles', 'M', 1e6),
  'estimated_s': ('estimated step', 'ms', 1e-3),
  'temp_bytes': ('temporaries', 'GiB', 2**30),
  'total_bytes': ('total memory', 'GiB', 2**30),
  'executed_flops_per_step': ('executed FLOPs', 'TFLOP', 1e12),
  'memory_bytes_per_step': ('memory traffic', 'GiB', 2**30),
}
NO_CYCLES = 'no cycles to compare: only a program compiled for TPUs has them'


def read(cfg: schema.CommandConfig) -> dict | None:
  """Returns the plan of --plan.against; None without the flag. Compiles nothing.

  Raises:
    ConfigError: the file cannot be read, or is not a plan with operations.
  """
  path = cfg.plan.against
  if not path:
    return None
  allowed = 'a file that mtp plan --plan.profile --out wrote'
  try:
    before = saved.parse(paths.as_path(paths.absolute(path)).read_bytes())
  except OSError as error:
    problem = error.strerror or paths.first_line(error)
    raise fields.ConfigError(FLAG, path, f'cannot be read: {problem}; {allowed}') from error
  except paths.InputError as error:
    raise fields.ConfigError(FLAG, path, f'{error.args[1]}; {allowed}') from error
  except ValueError as error:
    raise fields.ConfigError(FLAG, path, f'{error}; {allowed}') from error
  if before.get('operations') is None and not nvidia.is_gpu(before['device_kind']):
    raise fields.ConfigError(FLAG, path, f'has no operations; {allowed}')
  return before


def compared(before: dict, now: dict, path: str) -> dict:
  """Returns what differs, as a JSON-able dict.

  Args:
    before: values of the earlier plan.
    now: values of this plan.
    path: file of the earlier plan.

  Returns:
    file; differs: fact -> [before, now]; totals: name -> before, now, ratio;
    collectives: kind -> before, now, each with count and sent_bytes; scopes: rows with
    cycles, the largest difference first, or None if a plan has no cycles.
  """
  kinds = [plan.get('collectives') or {} for plan in (before, now)]
  nothing = dict(count=0, sent_bytes=0.0)
  return dict(
    file=path,
    differs={
      name: [before.get(name), now.get(name)] for name in FACTS if before.get(name) != now.get(name)
    },
    totals={
      name: _total(before.get(name), now.get(name))
      for name in TOTALS
      if before.get(name) is not None or now.get(name) is not None
    },
    collectives={
      kind: dict(zip(('before', 'now'), (of.get(kind, nothing) for of in kinds), strict=True))
      for kind in sorted({*kinds[0], *kinds[1]})
    },
    scopes=_scopes(before, now),
  )


def _total(before: float | None, now: float | None) -> dict:
  ratio = now / before if before and now is not None else None
  return dict(before=before, now=now, ratio=ratio)


def _scopes(before: dict, now: dict) -> list[dict] | None:
  if not (before.get('estimated_cycles') and now.get('estimated_cycles')):
    return None
  # Scopes of an earlier plan are unique, except in a file that was edited.
  cycles = [{r['scope']: r['cycles'] for r in plan['operations']} for plan in (before, now)]
  rows = []
  for scope in {**cycles[0], **cycles[1]}:
    was, is_now = (of.get(scope) for of in cycles)
    difference = (is_now or 0) - (was or 0)
    if difference:
      rows += [dict(scope=scope, before=was, now=is_now, difference=difference)]
  return sorted(rows, key=lambda row: (-abs(row['difference']), row['scope']))


def lines(found: dict) -> list[str]:
  """Returns a comparison as lines of text."""
  out = ['', f'against {found["file"]}', '']
  if found['differs']:
    out += ['differs' + ' ' * 25 + 'before  now']
    out += [f'  {k:22} {_fact(a):>14}  {_fact(b)}' for k, (a, b) in found['differs'].items()]
  else:
    out += ['no difference in devices, model, loss or batch']
  out += ['', f'{"per step and device":34} {"before":>10} {"now":>10} {"ratio":>7}']
  for name, of in found['totals'].items():
    what, unit, size = TOTALS[name]
    before, now = (_number(of[k], size) for k in ('before', 'now'))
    ratio = '-' if of['ratio'] is None else f'{of["ratio"]:.3f}'
    out += [f'  {f"{what} ({unit})":32} {before:>10} {now:>10} {ratio:>7}']
  out += _collectives(found['collectives'])
  if found['scopes'] is None:
    return [*out, '', NO_CYCLES]
  return [*out, *_scope_lines(found['scopes'])]


def _scope_lines(rows: list[dict]) -> list[str]:
  if not rows:
    return ['', 'every scope has the same cycles']
  out = ['', f'M cycles{"before":>10} {"now":>10} {"difference":>11}  scope']
  for row in rows[:SHOWN]:
    before = 'new' if row['before'] is None else f'{row["before"] / 1e6:.2f}'
    now = 'gone' if row['now'] is None else f'{row["now"] / 1e6:.2f}'
    difference = f'{row["difference"] / 1e6:+.2f}'
    out += [f'{before:>18} {now:>10} {difference:>11}  {profile.shown(row["scope"])}']
  if more := rows[SHOWN:]:
    rest = sum(row['difference'] for row in more) / 1e6
    out += [f'{"":29} {rest:+11.2f}  {len(more)} others']
  return out


def _collectives(kinds: dict) -> list[str]:
  if not kinds:
    return []
  out = ['', f'{"collectives, count and MiB":34} {"before":>17}  {"now":>17}']
  for kind, of in kinds.items():
    cells = [f'{of[k]["count"]:7,} {of[k]["sent_bytes"] / 2**20:9,.1f}' for k in ('before', 'now')]
    out += [f'  {kind:32} {cells[0]:>17}  {cells[1]:>17}']
  return out


def _fact(value) -> str:
  if isinstance(value, dict):
    return ' x '.join(f'{k}={v}' for k, v in value.items())
  return '-' if value is None else f'{value:,}' if isinstance(value, int) else str(value)


def _number(value: float | None, size: float) -> str:
  if value is None:
    return '-'
  scaled = value / size
  return f'{scaled:,.1f}' if scaled >= 100 else f'{scaled:.3g}'
