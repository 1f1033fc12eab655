"""Renders a self-contained HTML page."""

import html

from mtp_jax.report import content
from mtp_jax.report import figures as figures_lib

GROUNDS = f"""
:root {{ color-scheme: light dark; --ground: {figures_lib.LIGHT};
  --ink: {figures_lib.INK}; --soft: #5b6470; --line: #dfe3e8; --card: #f6f7f9;
  --link: #1b62c0; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ground: {figures_lib.DARK};
  --ink: #e4e7eb; --soft: #a0a8b3; --line: #30363f; --card: #1c2027;
  --link: #7db2ff; }} }}
"""
CSS = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1rem 4rem;
  background: var(--ground); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
.soft { margin: .1rem 0; }
.soft, figcaption span { color: var(--soft); font-size: .875rem; }
a { color: var(--link); }
nav ul { list-style: none; padding: 0; margin: .8rem 0; display: flex;
  flex-wrap: wrap; gap: .4rem; }
nav a { display: block; padding: .3rem .75rem; border-radius: 1rem;
  background: var(--card); border: 1px solid var(--line);
  text-decoration: none; }
.grid { display: grid; gap: 1rem; align-items: start; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; padding: .7rem; border: 1px solid var(--line);
  border-radius: .6rem; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto,
  sans-serif !important; }
figcaption { margin-bottom: .4rem; font-weight: 600; }
figcaption span { display: block; font-weight: 400; }
.box { overflow-x: auto; overflow-wrap: break-word; margin: 1rem 0;
  max-width: 100%; width: fit-content; border: 1px solid var(--line);
  border-radius: .6rem; }
.grid .box { margin: 0; }
.tall { max-height: 34rem; }
table { border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; overflow-wrap: anywhere; font-weight: 600;
  padding: .6rem .7rem; font-size: 1rem; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top;
  border-top: 1px solid var(--line); max-width: 16rem; }
th:first-child { text-align: left; position: sticky; left: 0;
  background: var(--ground); max-width: 12rem; }
thead th { background: var(--card); font-weight: 600; }
thead th:first-child { background: var(--card); }
tbody th { font-weight: 400; color: var(--soft); }
@media (max-width: 30rem) { th, td { padding: .3rem .45rem; }
  th:first-child { max-width: 8.2rem; } }
summary { cursor: pointer; color: var(--link); }
dl { max-width: 46rem; }
dt { font-weight: 600; }
dd { margin: 0 0 .3rem 1rem; }
"""


def render(title: str, about: list[str], sections: list[content.Section], svgs) -> str:
  """Renders the page; svgs: name of a plot -> its SVG element."""
  links = ''.join(f'<li><a href="#{s.key}">{_text(s.title)}</a></li>' for s in sections)
  return ''.join(
    [
      '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
      '<link rel="icon" href="data:,">\n',  # or browsers would request one
      f'<title>{_text(title)}</title>\n<style>{GROUNDS}{CSS}</style>\n</head>\n<body>\n',
      f'<header>\n<h1>{_text(title)}</h1>\n',
      *(f'<p class="soft">{_text(line)}</p>\n' for line in about),
      f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main>\n',
      *(_section(s, svgs) for s in sections),
      '</main>\n</body>\n</html>\n',
    ]
  )


def _text(text: str) -> str:
  return html.escape(text)


def _section(s: content.Section, svgs) -> str:
  figures = ''.join(_figure(plot, svgs[plot.name]) for plot in s.plots)
  narrow = [t for t in s.tables if len(t.header) <= 4]
  wide = [t for t in s.tables if len(t.header) > 4]
  cells = figures + ''.join(map(_table, narrow))
  return ''.join(
    [
      f'<section aria-labelledby="{s.key}">\n',
      f'<h2 id="{s.key}">{_text(s.title)}</h2>\n',
      *(f'<p>{_text(line)}</p>\n' for line in s.text),
      _terms(s.terms),
      f'<div class="grid">\n{cells}</div>\n' if cells else '',
      *map(_table, wide),
      '</section>\n',
    ]
  )


def _terms(terms: dict[str, str]) -> str:
  if not terms:
    return ''
  rows = ''.join(f'<dt>{_text(term)}</dt><dd>{_text(what)}</dd>\n' for term, what in terms.items())
  return f'<details><summary>Definitions</summary>\n<dl>\n{rows}</dl></details>\n'


def _figure(plot, svg: str) -> str:
  description = html.escape(plot.description())
  svg = svg.replace('<svg', f'<svg role="img" aria-label="{description}"', 1)
  note = f'<span>{_text(plot.note)}</span>' if plot.note else ''
  return f'<figure><figcaption>{_text(plot.title)}{note}</figcaption>\n{svg}</figure>\n'


def _table(t: content.Table) -> str:
  head = ''.join(f'<th scope="col">{_text(cell)}</th>' for cell in t.header)
  rows = ''.join(
    f'<tr><th scope="row">{_text(row[0])}</th>'
    + ''.join(f'<td>{_text(cell)}</td>' for cell in row[1:])
    + '</tr>\n'
    for row in t.rows
  )
  tall = ' tall' if len(t.rows) > 24 else ''
  # A scrollable box must be focusable by keyboard.
  return (
    f'<div class="box{tall}" role="region" tabindex="0" aria-label='
    f'"{html.escape(t.caption)}">\n<table><caption>{_text(t.caption)}</caption>'
    f'\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'
  )
