"""What `mtp plan` does: one plan, a sweep of flags, a search.

Each function prints line by line, since a compilation takes minutes, and returns
(the same as a JSON-able dict, exit status).
"""

import itertools
import math
import time
from collections.abc import Callable

from mtp_jax.config import fields, schema, validate
from mtp_jax.planning import against, ahead, analytic
from mtp_jax.planning import report as report_lib

FITS, UNKNOWN, TOO_LARGE = 0, 4, 3  # exit statuses
COMPILES = 4  # fitting candidates that a search compiles


def status(plans: list[ahead.Plan]) -> int:
  """Returns the worst exit status of several plans."""
  fits = [plan.fits for plan in plans]
  if False in fits:
    return TOO_LARGE
  # The memory limit of a CPU is unknown; allocations succeed.
  known = all(
    plan.fits or (plan.device_kind == 'cpu' and plan.temp_bytes is not None) for plan in plans
  )
  return FITS if known else UNKNOWN


def run(cfg: schema.CommandConfig, report: Callable[[str], None]) -> tuple[dict, int]:
  """Runs what the flags of cfg request: a plan, a sweep or a search."""
  if cfg.plan.search_mesh and cfg.plan.sweep:
    raise fields.ConfigError(
      'plan.sweep', cfg.plan.sweep[0], 'not supported together with --plan.search_mesh'
    )
  # Both are of one plan.
  for name, given in ('against', cfg.plan.against), ('profile', cfg.plan.profile):
    for other, of_several in ('sweep', cfg.plan.sweep), ('search_mesh', cfg.plan.search_mesh):
      if given and of_several:
        raise fields.ConfigError(
          f'plan.{name}', given, f'not supported together with --plan.{other}'
        )
  before = against.read(cfg)
  if cfg.plan.search_mesh:
    return search(cfg, report)
  if cfg.plan.sweep:
    return sweep(cfg, report)
  if before:
    cfg = schema.replace(cfg, **{'plan.profile': True})
  plan = ahead.plan(cfg)
  values = report_lib.values_of(plan)
  for line in report_lib.lines_of(plan):
    report(line)
  if before:
    values['against'] = against.compared(before, values, cfg.plan.against)
    for line in against.lines(values['against']):
      report(line)
  return values, status([plan])


def variants(cfg: schema.CommandConfig) -> list[tuple[dict, schema.CommandConfig]]:
  """Returns the configurations of --plan.sweep: (the flags that each sets, Config).

  Raises:
    ConfigError: an entry is not FLAG=VALUE,…, or a value is invalid.
  """
  axes, swept = [], set()
  for text in cfg.plan.sweep:
    name, _, values = text.partition('=')
    name = name.removeprefix('--')
    field = schema.fields().get(name)
    wrong = {
      f'{name} is not a flag': field is None,
      f'{name} cannot be swept': name.startswith('plan.'),
      'no values after =': not values,
    }
    if any(wrong.values()):
      reason = next(text for text, is_so in wrong.items() if is_so)
      raise fields.ConfigError('plan.sweep', text, f'{reason}; FLAG=VALUE,VALUE,… of a run')
    if name in swept:
      raise fields.ConfigError('plan.sweep', text, f'duplicate flag {name}')
    swept.add(name)
    assert field
    try:
      axes.append([(name, _typed(field, v)) for v in values.split(',')])
    except ValueError:
      raise fields.ConfigError(
        'plan.sweep', text, f'values must be {schema.type_of(field).__name__}'
      ) from None
  return [
    (dict(point), validate.validate(schema.replace(cfg, **dict(point))))
    for point in itertools.product(*axes)
  ]


def _typed(field, text: str):
  if field.type is bool:
    if text.lower() not in ('true', 'false'):
      raise ValueError(text)
    return text.lower() == 'true'
  return field.type(text)


COLUMNS = ('GiB state', 'temp', 'total', 'fits', 'step s', 'days', 'compile s')


def sweep(cfg: schema.CommandConfig, report) -> tuple[dict, int]:
  """Prints one row per value of --plan.sweep, a grid for several flags."""
  points = variants(cfg)
  for _, one in points:  # check all before compiling the first
    ahead.check_mesh(one)
  widths = [max(len(name), 14) for name in points[0][0]]

  def cells(texts):
    return [f'{text!s:>{w}}' for text, w in zip(texts, widths, strict=True)]

  report('  '.join([*cells(points[0][0]), *_cells(COLUMNS)]))
  plans, rows = [], []
  for point, one in points:
    plan = ahead.plan(one)
    plans.append(plan)
    rows.append(dict(set=point) | report_lib.values_of(plan))
    report('  '.join([*cells(point.values()), *_row(plan)]))
  return dict(sweep=list(cfg.plan.sweep), rows=rows), status(plans)


def _cells(texts) -> list[str]:
  return [f'{text:>9}' for text in texts]


def _row(plan: ahead.Plan) -> list[str]:
  v = report_lib.values_of(plan)
  return _cells(
    '-' if x is None else x
    for x in (
      report_lib.gib(plan.state_bytes),
      None if plan.temp_bytes is None else report_lib.gib(plan.temp_bytes),
      None if plan.total_bytes is None else report_lib.gib(plan.total_bytes),
      {True: 'yes', False: 'NO', None: '?'}[plan.fits],
      v['step_s'] and f'{v["step_s"]:.3g}',
      v['days'] and report_lib.three_digits(v['days']),
      None if plan.compile_s is None else f'{plan.compile_s:.0f}',
    )
  )


def search(cfg: schema.CommandConfig, report) -> tuple[dict, int]:
  """Ranks meshes, micro-batches and remat by formula, and compiles the best."""
  if not ahead.has_compiler(cfg):
    one = ahead.of_shardings(cfg)
    n, kind = one.devices, one.device_kind
  else:
    on = ahead.devices(cfg)
    n, kind = len(on), on[0].device_kind
  found = analytic.ranked(cfg, n, kind)
  if not found:
    raise fields.ConfigError(
      'plan.search_mesh',
      True,
      f'no mesh of {n} devices divides --data.batch_size={cfg.data.batch_size} and the model',
    )
  usable = ahead.usable_bytes(kind, cfg)
  assert usable  # or `ranked` has raised
  fitting = sum(e.total_bytes <= usable for e in found)
  report(f'{n} x {kind}: {len(found)} candidates, {fitting} fit by formula; the best, compiled:')
  columns = ('by formula', 'step s', *COLUMNS)
  report(
    '  '.join([f'{"data x fsdp x tensor":>20}', *_cells(('micro', 'remat'))] + _cells(columns))
  )
  plans, rows, begin = [], [], time.perf_counter()
  for e in found:
    if sum(p.fits is not False for p in plans) == COMPILES:
      break
    if plans and time.perf_counter() - begin > cfg.plan.search_timeout_s:
      report(f'stopped after --plan.search_timeout_s={cfg.plan.search_timeout_s}')
      break
    plan = ahead.plan(e.cfg)
    plans.append(plan)
    chosen = e.cfg.train.grad_accum_steps, e.cfg.model.remat
    formula = report_lib.gib(e.total_bytes), f'{e.step_s:.3f}'
    mesh = ' x '.join(map(str, plan.mesh.values()))
    report('  '.join([f'{mesh:>20}', *_cells((*chosen, *formula)), *_row(plan)]))
    rows.append(dict(formula_bytes=e.total_bytes, formula_s=e.seconds) | report_lib.values_of(plan))
  best = min(
    (p for p in plans if p.fits),
    default=None,
    key=lambda p: report_lib.values_of(p)['step_s'] or math.inf,
  )
  if best:
    report('')
    report('the fastest that fits:')
    report(_flags(best.cfg))
  return (
    dict(candidates=len(found), rows=rows, best=_flags(best.cfg) if best else None),
    FITS if best else status(plans),
  )


def _flags(cfg: schema.CommandConfig) -> str:
  names = ('mesh.data', 'mesh.fsdp', 'mesh.tensor', 'train.grad_accum_steps', 'model.remat')
  return ' '.join(f'--{name}={schema.get(cfg, name)}' for name in names)
