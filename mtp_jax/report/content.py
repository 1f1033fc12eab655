"""The contents of a page: sections of text, plots and tables."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from mtp_jax.report import figures, history

NONE = '–'  # table cell: not recorded, or not finite


class Table(NamedTuple):
  """A table; the first cell of a row is its heading."""

  caption: str
  header: list[str]
  rows: list[list[str]]


class Section(NamedTuple):
  key: str  # anchor within the page
  title: str
  text: list[str]
  plots: Sequence[figures.Plot] = []
  tables: list[Table] = []
  terms: dict[str, str] = {}


def shown(value, form: str) -> str:
  return format(value, form) if history.number(value) else NONE


def slug(*parts) -> str:
  """Returns a file name and id for any text."""
  text = re.sub(r'[^A-Za-z0-9]+', '-', '-'.join(map(str, parts)))
  return text.strip('-')[:80]


def by_run(caption: str, runs: list[history.Run], rows: dict[str, list]) -> Table:
  """Returns a table with one column per run, without empty rows."""
  return Table(
    caption,
    ['', *(run.name for run in runs)],
    [[name, *row] for name, row in rows.items() if set(row) - {NONE}],
  )


def drawn(*plots: figures.Lines) -> list[figures.Lines]:
  return [plot for plot in plots if plot.series]
