"""Reads the records of runs, and extracts points and numbers."""

import math
import os
import re
import statistics
from collections.abc import Iterable
from typing import NamedTuple, TypeGuard

from mtp_jax.config import parse, schema, validate
from mtp_jax.io import paths
from mtp_jax.model import lm, params
from mtp_jax.planning import saved
from mtp_jax.train import goodput, metrics

Points = list[tuple[float, float]]


class Run(NamedTuple):
  """The contents of a workdir."""

  path: str
  name: str  # short and unique
  cfg: schema.Config | None  # None if written by another version
  records: list[dict]  # lines of metrics.jsonl
  sessions: list[dict]  # lines of goodput.jsonl
  plan: dict | None = None  # plan.json, of mtp plan --plan.profile
  plan_problem: str = ''  # why a plan.json is skipped

  def of(self, kind: str) -> list[dict]:
    return [r for r in self.records if r['kind'] == kind]


def read(workdirs: list[str]) -> list[Run]:
  """Reads runs in the given order, without duplicates; raises ValueError if one is
  not a workdir, or has a corrupt file."""
  found = list(dict.fromkeys(map(_normal, workdirs)))
  runs = []
  for path, name in zip(found, _names(found), strict=True):
    records = metrics.read(path)
    if not records:
      raise ValueError(f'{metrics.jsonl_path(path)}: has no record; report takes workdirs')
    plan, problem = _plan(path)
    runs.append(Run(path, name, _config(path), records, goodput.read(path), plan, problem))
  return runs


def _plan(path: str) -> tuple[dict | None, str]:
  """Returns (the plan beside a run, ''), or (None, why it is skipped): unlike the records, it
  is no part of the run."""
  file = paths.as_path(path) / 'plan.json'
  try:
    plan = saved.parse(file.read_bytes())
  except FileNotFoundError:
    return None, ''
  except OSError as error:
    return None, f'{file} is skipped: {error.strerror or paths.first_line(error)}'
  except ValueError as error:
    return None, f'{file} is skipped: {error}'
  if not (plan.get('operations') or plan.get('peak_buffers')):
    return None, f'{file} is skipped: has no operations; mtp plan --plan.profile writes them'
  return plan, ''


def _config(path: str) -> schema.Config | None:
  file = paths.as_path(path) / 'config.json'
  try:
    return validate.validate(parse.from_json(file.read_bytes()))
  except (OSError, parse.OtherVersion, paths.InputError):
    return None  # written by another version, or no longer valid
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from error


def _normal(path: str) -> str:
  return path.rstrip('/') if paths.scheme(path) else os.path.normpath(path)


def _names(workdirs: list[str]) -> list[str]:
  """Returns the last parts of the paths, as many as make them unique."""
  parts = [str(paths.as_path(path)).strip('/').split('/') for path in workdirs]
  n = 1
  while len({tuple(p[-n:]) for p in parts}) < len(parts):
    n += 1
  return ['/'.join(p[-n:]) for p in parts]


def number(value) -> TypeGuard[float]:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def points(records: Iterable[dict], name: str) -> Points:
  """Returns (step, value) where there is a value."""
  return [(r['step'], r[name]) for r in records if number(r.get(name))]


def thinned(found: Points, most: int = 240) -> tuple[Points, int]:
  """Returns (at most `most` points, the number of points averaged into each)."""
  each = -(-len(found) // most) or 1
  parts = [found[i : i + each] for i in range(0, len(found), each)]
  return [
    (statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part)) for part in parts
  ], each


def by_head(records: Iterable[dict], name: str) -> dict[int, str]:
  """Returns the fields name_1, name_2, … that occur, by number."""
  found = {
    int(field.rpartition('_')[2]): field
    for record in records
    for field in record
    if re.fullmatch(rf'{name}_[0-9]{{1,6}}', field)
  }
  return dict(sorted(found.items()))


def by_source(records: Iterable[dict]) -> dict[str, list[dict]]:
  """Groups records by evaluation set; '' if it has no name."""
  found = {}
  for record in records:
    found.setdefault(record.get('source') or '', []).append(record)
  return found


def last(run: Run) -> list[dict]:
  """Returns the last record, and those of other sets evaluated at the same step."""
  found = [r for r in run.records if r['kind'] in ('train', 'eval')]
  same = found and (found[-1]['kind'], found[-1]['step'])
  return [r for r in found if (r['kind'], r['step']) == same]


def heads(run: Run) -> int:
  return run.cfg.heads.n if run.cfg else len(by_head(run.records, 'loss'))


def n_parameters(run: Run) -> int | None:
  return params.count(lm.specs(run.cfg)) if run.cfg else None


def tokens_per_step(run: Run) -> int | None:
  return run.cfg and run.cfg.data.batch_size * run.cfg.data.seq_len


def steps(run: Run) -> int:
  return max(r['step'] for r in run.records)


def median(run: Run, name: str) -> float | None:
  """Returns the median of a metric over the training log."""
  values = [y for _, y in points(run.of('train'), name)]
  return statistics.median(values) if values else None


def sessions(run: Run) -> list[dict]:
  """Returns the last record of each session, in order."""
  found = {r['session']: r for r in run.sessions}
  return [found[session] for session in sorted(found)]


def step_seconds(run: Run) -> dict[str, float]:
  """Returns mean seconds per step by cause, over all sessions."""
  found = sessions(run)
  done = sum(r['step'] - r['start'] for r in found)
  return {
    cause: sum(r['seconds'][cause] for r in found) / done
    for cause in ('data', 'host', 'device')
    if done > 0
  }


def memory(run: Run) -> dict[str, int] | None:
  """Returns bytes per device of the largest program, in the last session that
  compiled one."""
  found = [r for r in run.sessions if 'memory' in r]
  of_last = [r for r in found if r['session'] == found[-1]['session']]
  return max((r['memory'] for r in of_last), key=lambda m: m['temporaries'], default=None)


def spikes(run: Run) -> Points:
  """Returns (step, loss of head 1) of each spike, without duplicates."""
  found = {(r['spike'], r['loss']) for r in run.sessions if 'spike' in r and number(r.get('loss'))}
  return sorted(found, key=lambda point: point[0])


def suites(runs: list[Run]) -> dict[tuple[str, str], list[str]]:
  """Returns (suite, group) -> its scalars; x_1, x_2, … form a group."""
  found: dict[tuple[str, str], dict] = {}
  for run in runs:
    for record in run.of('suite'):
      for name, value in record.items():
        if name == 'step' or re.search('_(low|high)$', name):
          continue
        if number(value):
          group = re.sub(r'_\d+$', '', name)
          key = record.get('source') or '', group
          found.setdefault(key, {})[name] = None
  return {key: list(names) for key, names in found.items()}


def suite_records(run: Run, source: str) -> list[dict]:
  return [r for r in run.of('suite') if (r.get('source') or '') == source]


def band(records: list[dict], name: str) -> tuple[list, list] | None:
  """Returns (low, high) at each of `points`, if all have both."""
  found = [r for r in records if number(r.get(name))]
  low, high = ([r.get(f'{name}_{end}') for r in found] for end in ('low', 'high'))
  return (low, high) if all(map(number, low + high)) else None


def differing(runs: list[Run]) -> dict[str, tuple]:
  """Returns flag -> values by run, where they differ, except for the workdir."""
  cfgs = [run.cfg for run in runs if run.cfg]
  return {
    name: tuple(schema.get(run.cfg, name) if run.cfg else None for run in runs)
    for name in schema.fields(schema.Config)
    if name != 'train.workdir' and len({repr(schema.get(cfg, name)) for cfg in cfgs}) > 1
  }


def given(run: Run) -> dict[str, tuple]:
  """Returns flag -> (value,) for non-default values."""
  default = schema.Config()
  return {
    name: (schema.get(run.cfg, name),)
    for name in schema.fields(schema.Config)
    if run.cfg
    and name != 'train.workdir'
    and schema.get(run.cfg, name) != schema.get(default, name)
  }
