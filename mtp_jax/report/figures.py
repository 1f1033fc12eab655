"""Draws figures from data: SVG for the page and PNG for papers.

The SVG takes its text colour from the page (currentColor), so that it is legible
on light and dark backgrounds, as COLORS are.
"""

import io
import re
from typing import Any, NamedTuple

LIGHT, DARK = '#ffffff', '#15181d'  # backgrounds of the page
INK = '#1f2329'  # replaced by currentColor
COLORS = (
  '#2f7de1',
  '#d97706',
  '#16a065',
  '#d6409f',
  '#8b5cf6',
  '#0e93a8',
  '#e5484d',
  '#8a7a3d',
  '#6f7782',
)
MARKERS = 'osv^D*P<>'
WIDTH_IN, HEIGHT_IN = 4.4, 3.3
LABEL = 34  # characters
ICICLE_IN = 5.6  # height
COLUMNS = (0.23, 0.17, 0.24, 0.36)  # of an icicle, shares of its width
SMALLEST = 0.002  # share of the whole below which a part is not drawn
CHARACTER = 0.075  # width at the font size of an icicle, in inches
LINE = 0.15  # height


def plain(value: float) -> str:
  """Formats with three significant digits, or as an integer from 100."""
  return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'


class Series(NamedTuple):
  """A line or markers through points (x, y), in the colour with index `color`."""

  label: str  # '' if the legend has another series of this colour
  points: list
  color: int
  marker: str = ''  # '' = a line without markers
  joined: bool = True  # connect the points
  band: tuple | None = None  # (low, high) at each point


class Lines(NamedTuple):
  """Series over steps or tokens."""

  name: str  # file name of the PNG
  title: str
  x: str
  y: str
  series: list[Series]
  limits: tuple | None = None  # y limits
  note: str = ''

  def description(self) -> str:
    """Alternative text for readers who cannot see the figure."""
    ends = [f'{s.label} ends at {plain(s.points[-1][1])}' for s in self.series if s.label]
    return f'{self.title}: {self.y} over {self.x}. ' + '; '.join(ends)


class Bars(NamedTuple):
  """Stacked horizontal bars."""

  name: str
  title: str
  x: str
  rows: dict[str, dict[str, float]]  # row -> part -> value
  note: str = ''

  def description(self) -> str:
    rows = [
      f'{row}: ' + ', '.join(f'{part} {plain(v)}' for part, v in parts.items())
      for row, parts in self.rows.items()
    ]
    return f'{self.title}, in {self.x}. ' + '; '.join(rows)


class Node(NamedTuple):
  """A part of a whole, and its own parts."""

  name: str  # '' = what the parts of a node do not cover
  value: float  # of a part without parts; `summed` sets the others
  parts: dict[str, 'Node']

  def summed(self) -> 'Node':
    """Returns the node with the sums of its parts, the largest first."""
    parts = sorted((p.summed() for p in self.parts.values()), key=lambda p: -p.value)
    value = self.value + sum(p.value for p in parts)
    return Node(self.name, value, {p.name: p for p in parts})


class Icicle(NamedTuple):
  """Nested parts of a whole: a column per level, heights in proportion to values."""

  name: str
  title: str
  y: str
  parts: dict[str, Node]  # of the first level
  note: str = ''

  def description(self) -> str:
    def part_of(node: Node) -> str:
      largest = [f'{p.name} {plain(p.value)}' for p in node.parts.values() if p.name][:3]
      return f'{node.name} {plain(node.value)}' + (
        f', of which {", ".join(largest)}' * bool(largest)
      )

    return f'{self.title}, in {self.y}. ' + '; '.join(map(part_of, self.parts.values()))


Plot = Lines | Bars | Icicle

STYLE: dict[Any, Any] = {
  'font.size': 10.5,
  'svg.fonttype': 'none',  # keep text as text, in the reader's font
  'svg.hashsalt': 'mtp',  # deterministic ids
  **dict.fromkeys(
    ('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color', 'grid.color'),
    INK,
  ),
  'grid.alpha': 0.15,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'legend.frameon': False,
}


def draw(plot: Plot) -> tuple[str, bytes]:
  """Returns (SVG element, PNG file)."""
  import matplotlib
  from matplotlib import figure

  with matplotlib.rc_context(STYLE):
    height = 1.1 + 0.6 * len(plot.rows) if isinstance(plot, Bars) else HEIGHT_IN
    height = ICICLE_IN if isinstance(plot, Icicle) else height
    drawn = figure.Figure((WIDTH_IN, height), layout='constrained')
    axes = drawn.subplots()
    kinds: dict[type, Any] = {Bars: _bars, Lines: _lines, Icicle: _icicle}
    key = kinds[type(plot)](axes, plot)
    if key:
      longest = max(map(len, key))
      legend = drawn.legend(
        key.values(),
        key,
        loc='outside upper left',
        ncols=max(1, min(5, 50 // (longest + 5))),
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.2,
      )
      for line in legend.get_lines():
        line.set_alpha(1)
    return _svg(drawn, plot), _png(drawn)


def short(text: str) -> str:
  """Shortens a label to fit a figure, and escapes $, which starts a formula."""
  if len(text) > LABEL:
    text = f'{text[: LABEL // 2]}…{text[1 - LABEL // 2 :]}'
  return text.replace('$', r'\$')


def _lines(axes, plot: Lines) -> dict:
  """Draws lines; returns label -> legend handle."""
  from matplotlib import ticker

  # Training curves behind held-out markers.
  behind = 0.75 if any(not s.joined for s in plot.series) else 1
  key = {}
  for s in plot.series:
    x, y = zip(*s.points, strict=True)
    color = COLORS[s.color % len(COLORS)]
    marker = s.marker or ('.' if len(x) == 1 else '')
    (line,) = axes.plot(
      x,
      y,
      color=color,
      marker=marker,
      markersize=4.5,
      linewidth=1.3,
      linestyle='-' if s.joined else '',
      zorder=3 if marker else 2,
      alpha=1 if marker else behind,
    )
    if s.label:
      key.setdefault(short(s.label), line)
    if s.band:
      axes.fill_between(x, *s.band, color=color, alpha=0.18, linewidth=0)
  axes.set(xlabel=plot.x, ylabel=plot.y)
  if plot.limits:
    axes.set_ylim(*plot.limits)
  axes.grid(True)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  if max(y for s in plot.series for _, y in s.points) >= 1e4:
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  return key


def _bars(axes, plot: Bars) -> dict:
  """Draws bars; returns part -> legend handle."""
  from matplotlib import ticker

  key = {}
  parts = list(dict.fromkeys(p for row in plot.rows.values() for p in row))
  whole = max(sum(row.values()) for row in plot.rows.values())
  for i, part in enumerate(parts):
    left = [sum(row.get(p, 0) for p in parts[:i]) for row in plot.rows.values()]
    key[part] = axes.barh(
      range(len(plot.rows)),
      [row.get(part, 0) for row in plot.rows.values()],
      left=left,
      height=0.42,
      color=COLORS[i % len(COLORS)],
    )
  for i, (name, row) in enumerate(plot.rows.items()):
    axes.text(0, i - 0.3, f'{short(name)}: {plain(sum(row.values()))}', va='bottom')
  axes.set(xlabel=plot.x, xlim=(0, whole * 1.02 or 1), yticks=[])
  axes.set_ylim(len(plot.rows) - 0.7, -0.75)
  if whole >= 1e4:
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  axes.spines['left'].set_visible(False)
  axes.xaxis.grid(True)
  return key


def _icicle(axes, plot: Icicle) -> dict:
  """Draws nested parts from left to right; returns no legend. A label is drawn where it fits,
  shortened to the width of its column."""
  whole = sum(p.value for p in plot.parts.values())
  inch = whole / (ICICLE_IN - 0.4)  # values per inch

  def column(parts: dict[str, Node], top: float, level: int, color: str) -> None:
    if level == len(COLUMNS):
      return
    left, width = sum(COLUMNS[:level]), COLUMNS[level]
    fits = int((width * (WIDTH_IN - 0.7) - 0.06) / CHARACTER)
    for k, part in enumerate(parts.values()):
      color = color if level else COLORS[k % len(COLORS)]
      if part.name and part.value >= SMALLEST * whole:
        style = dict(align='edge', color=color, linewidth=0)
        # A pale fill, so that text has contrast on it; gaps between siblings.
        gap = min(0.02 * inch, part.value / 4)
        axes.barh(top, width - 0.006, part.value - gap, left, alpha=0.42 - 0.08 * (k % 2), **style)
        if part.value >= LINE * inch and fits > 2:
          text = part.name if len(part.name) <= fits else f'{part.name[: fits - 1]}…'
          axes.text(
            left + 0.012, top + (part.value - gap) / 2, short(text), va='center', fontsize=9
          )
        column(part.parts, top, level + 1, color)
      top += part.value

  column(plot.parts, 0.0, 0, '')
  axes.set(xlim=(0, 1), xticks=[], ylabel=plot.y)
  axes.set_ylim(whole, 0)
  axes.spines['bottom'].set_visible(False)
  return {}


def _svg(drawn, plot: Plot) -> str:
  """Returns the SVG element for embedding: unique ids, no size, no namespaces or
  metadata."""
  file = io.StringIO()
  drawn.savefig(file, format='svg', transparent=True)
  text = file.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  tag, rest = text.split('>', 1)
  tag = re.sub(r' (width|height|xmlns(:\w+)?)="[^"]*"', '', tag)
  text = f'{tag}>{rest}'
  text = re.sub(r'\bid="', f'id="{plot.name}-', text)
  text = re.sub(r'(href="|url\()#', rf'\1#{plot.name}-', text)
  return text.replace(INK, 'currentColor')


def _png(drawn) -> bytes:
  file = io.BytesIO()
  drawn.savefig(file, format='png', dpi=200, facecolor=LIGHT)
  return file.getvalue()
