"""Writes RUN/report.html and RUN/report/*.png; returns the printed summary."""

import json
import os

from mtp_jax.io import paths
from mtp_jax.losses import metrics
from mtp_jax.report import compiled, content, cost, curves, figures, history, page
from mtp_jax.train import goodput

SECTIONS = (
  curves.compared,
  curves.losses,
  curves.acceptance,
  curves.suites,
  cost.speed,
  cost.memory,
  compiled.where_time_goes,
  cost.where_time_went,
  cost.spikes,
  cost.flags,
)


def write(workdirs: list[str]) -> tuple[list[str], dict]:
  """Writes the report of runs to the first one's workdir.

  Returns (lines to print, the same as a JSON-able dict): the last record of each
  run, its goodput, and the files. Raises ValueError with the name of a run that is
  not a workdir or not writable.
  """
  runs = history.read(workdirs)
  workdir = runs[0].path
  if not paths.scheme(workdir) and not os.access(workdir, os.W_OK):
    raise ValueError(f'{workdir}: cannot write there')
  folder = os.path.join(workdir, 'report')
  if paths.as_path(folder).is_file():
    raise ValueError(f'{folder}: is not a directory')
  sections = [section(runs) for section in SECTIONS]
  # Skip empty sections.
  found = _with_unique_names([s for s in sections if s.plots or s.tables])
  svgs, pngs = {}, {}
  for plot in (plot for s in found for plot in s.plots):
    svgs[plot.name], pngs[f'{plot.name}.png'] = figures.draw(plot)
  _write_figures(folder, pngs)
  html = os.path.join(workdir, 'report.html')
  title = ' and '.join(run.name for run in runs) if len(runs) < 3 else f'{len(runs)} runs'
  about = [f'{run.name}: {paths.as_path(run.path)}' for run in runs]
  text = page.render(f'Report on {title}', about, found, svgs)
  paths.write(html, text.encode())
  return _summary(runs, html, [os.path.join(folder, name) for name in pngs])


def _with_unique_names(sections: list[content.Section]) -> list[content.Section]:
  """Makes the names of plots unique, which may collide between runs."""
  seen, found = set(), []
  for s in sections:
    plots = []
    for plot in s.plots:
      name, n = plot.name, 1
      while name in seen:
        n += 1
        name = f'{plot.name}-{n}'
      seen.add(name)
      plots.append(plot._replace(name=name))
    found.append(s._replace(plots=plots))
  return found


DRAWN = 'drawn.json'  # names of the figures of the last report


def _write_figures(folder: str, pngs: dict[str, bytes]) -> None:
  """Writes the figures, and removes those of an earlier report that are no longer
  drawn; other files in the folder are kept."""
  paths.make_folder(folder)
  of = paths.as_path(folder)
  try:
    before = json.loads((of / DRAWN).read_text())
    before = [name for name in before if name.endswith('.png')]
  except (OSError, ValueError, TypeError, AttributeError):
    before = []  # no or an unknown earlier report
  for name, data in pngs.items():
    paths.write(os.path.join(folder, name), data)
  paths.write(os.path.join(folder, DRAWN), json.dumps(sorted(pngs)).encode())
  for name in {*before} - {*pngs}:
    if os.path.basename(name) == name:
      (of / name).unlink(missing_ok=True)


def _summary(runs, html: str, drawn: list[str]) -> tuple[list[str], dict]:
  last, spent, lines = {}, {}, []
  for run in runs:
    records = history.last(run)
    last[run.path] = records[-1] if records else None
    for r in records:
      of = f'{r["source"]}: ' if 'source' in r else ''
      losses = ', '.join(
        f'head {k} {metrics.shown(r[name], ".4f")}'
        for k, name in history.by_head([r], 'loss').items()
      )
      lines.append(f'{run.path}: step {r["step"]}, {of}{losses}')
  for run in runs:
    spent[run.path] = goodput.summary(run.sessions)
    lines += [f'{run.path}: {line}' for line in goodput.lines(spent[run.path])]
    if run.plan_problem:
      lines.append(run.plan_problem)
  values = dict(report=html, figures=drawn, last=last, goodput=spent)
  return [*lines, f'report: {html}'], values
