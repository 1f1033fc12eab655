"""Draws the diagrams of the documentation as SVG files in docs/assets.

  python tools/figures.py            writes all of them
  python tools/figures.py --check    exit status 1 if a file is out of date

Every figure is 360 units wide, so that its text is legible on a phone, has a
background of its own, and follows the colour scheme of the reader's system.
"""

import pathlib
import sys
from collections.abc import Callable
from xml.sax import saxutils

FOLDER = pathlib.Path(__file__).parents[1] / 'docs' / 'assets'
WIDTH = 360
STYLE = """\
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
svg{--paper:#fff;--ink:#1b1f24;--soft:#59636e;--line:#8c959f;--trunk:#d0e3ff;--head:#d3f0d9;
--back:#ffd9c2;--again:#e7dcff;--off:#eceff2;--a:#0a62c9;--b:#c4500b}
@media(prefers-color-scheme:dark){svg{--paper:#15191f;--ink:#e8edf2;--soft:#a3aebb;
--line:#6b7683;--trunk:#173a66;--head:#1b4d2b;--back:#66341a;--again:#43306b;--off:#262d36;
--a:#71b0ff;--b:#ff9d63}}
.paper{fill:var(--paper)}.trunk{fill:var(--trunk)}.head{fill:var(--head)}.back{fill:var(--back)}
.again{fill:var(--again)}.off{fill:var(--off)}.none{fill:none}
rect,.arrow,.axis{stroke:var(--line)}.paper{stroke:none}.arrow,.axis,.a,.b{fill:none}
.tip{fill:var(--line);stroke:none}.soft{fill:var(--soft)}.bold{font-weight:600}
.small{font-size:11px}.mid{text-anchor:middle}.end{text-anchor:end}
.a{stroke:var(--a);stroke-width:2.5}.b{stroke:var(--b);stroke-width:2.5}
.ta{fill:var(--a)}.tb{fill:var(--b)}.dash{stroke-dasharray:4 3}
"""
# Temporary memory of the loss and its gradient, MiB, at n = 1, 2, 4, 8:
# launch/test.sh tests/losses/loss_test.py -k memory, V = 4096, d = 32.
HEADS = (1, 2, 4, 8)
ALL_LOGITS = (19.8, 31.8, 55.8, 103.9)
ONE_HEAD = (9.0, 9.0, 9.0, 9.0)  # interleaved; remat 8.2, 9.0, 9.0, 8.9


def text(x: float, y: float, words: str, kind: str = '') -> str:
  return f'<text x="{x:g}" y="{y:g}" class="{kind}">{saxutils.escape(words)}</text>'


def box(x, y, w, h, kind: str, label: str = '', under: str = '') -> str:
  """Returns a box with one centred line of text, or two."""
  lines = [f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" class="{kind}"/>']
  middle = y + h / 2
  if label:
    lines.append(text(x + w / 2, middle + (-2 if under else 4), label, 'mid'))
  if under:
    lines.append(text(x + w / 2, middle + 12, under, 'mid small soft'))
  return ''.join(lines)


def arrow(x1, y1, x2, y2, kind: str = 'arrow') -> str:
  """Returns a line with a tip at its end; it points along its longer side."""
  line = f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" class="{kind}"/>'
  if abs(y2 - y1) >= abs(x2 - x1):
    d = 6 if y2 > y1 else -6
    tip = f'M{x2:g} {y2:g}l-4 {-d}h8z'
  else:
    d = 6 if x2 > x1 else -6
    tip = f'M{x2:g} {y2:g}l{-d} -4v8z'
  return line + f'<path d="{tip}" class="tip"/>'


def line(points, kind: str) -> str:
  return f'<path d="M{"L".join(f"{x:g} {y:g}" for x, y in points)}" class="{kind}"/>'


def svg(height: int, title: str, parts: list[str]) -> str:
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
    f' height="{height}" role="img" aria-label="{saxutils.escape(title)}">'
    f'<title>{saxutils.escape(title)}</title><style>{STYLE}</style>'
    f'<rect width="{WIDTH}" height="{height}" rx="6" class="paper"/>' + ''.join(parts) + '</svg>\n'
  )


def overview() -> str:
  """Trunk, heads, and what memory does as n grows."""
  parts = [
    text(180, 20, 'tokens up to position t', 'mid'),
    arrow(180, 26, 180, 42),
    box(60, 42, 240, 34, 'trunk', 'trunk: L − n layers, runs once'),
    text(186, 92, 'z at t', 'small soft'),
  ]
  for k in range(1, 5):
    x = 12 + 86 * (k - 1)
    parts += [
      line([(180, 76), (180, 98), (x + 39, 98)], 'arrow'),
      arrow(x + 39, 98, x + 39, 112),
      box(x, 112, 78, 36, 'head', f'head {k}', 'one layer'),
      arrow(x + 39, 148, x + 39, 164),
      arrow(x + 39, 190, x + 39, 206),
      text(x + 39, 220, f'token t + {k}', 'mid'),
    ]
  parts += [
    box(12, 164, 336, 26, 'off', 'one unembedding, logits of one head at a time'),
    text(12, 250, 'Temporary memory of the loss (MiB)', 'bold'),
  ]
  left, right, top, bottom = 44, 344, 266, 396
  scale = (bottom - top) / 110

  def at(values):
    return [(left + 20 + 88 * i, bottom - scale * value) for i, value in enumerate(values)]

  for tick in (0, 50, 100):
    y = bottom - scale * tick
    parts += [
      line([(left, y), (right, y)], 'axis dash' if tick else 'axis'),
      text(left - 6, y + 4, str(tick), 'end small'),
    ]
  for (x, _), n in zip(at(ONE_HEAD), HEADS, strict=True):
    parts.append(text(x, bottom + 16, str(n), 'mid small'))
  parts += [
    text((left + right) / 2, bottom + 34, 'n, prediction heads', 'mid'),
    line(at(ALL_LOGITS), 'b'),
    line(at(ONE_HEAD), 'a'),
    text(56, 304, 'logits of all heads in memory', 'tb'),
    text(150, bottom - scale * ONE_HEAD[0] - 8, 'mtp_jax, either backward', 'ta'),
  ]
  return svg(442, 'A shared trunk feeds n heads; memory of the loss does not grow with n', parts)


def families() -> str:
  """Block first and identity first."""
  parts = [
    text(12, 22, 'Block first', 'bold'),
    text(12, 38, 'parallel, causal, anticausal', 'small soft'),
    box(12, 48, 336, 30, 'trunk', 'trunk: L − n layers'),
  ]
  for k in range(1, 4):
    x = 12 + 114 * (k - 1)
    parts += [
      arrow(x + 54, 78, x + 54, 96),
      box(x, 96, 108, 36, 'head', f'head {k}', 'a layer'),
      arrow(x + 54, 132, x + 54, 150),
      text(x + 54, 164, f'token t + {k}', 'mid'),
    ]
  parts += [
    text(12, 204, 'Identity first', 'bold'),
    text(12, 220, 'linear, residual, sequential, recursive', 'small soft'),
    box(12, 230, 336, 30, 'trunk', 'trunk: all L layers'),
  ]
  for k in range(1, 4):
    x = 12 + 114 * (k - 1)
    label, under = ('head 1', 'the identity') if k == 1 else (f'head {k}', 'a module')
    parts += [
      arrow(x + 54, 260, x + 54, 278),
      box(x, 278, 108, 36, 'off' if k == 1 else 'head', label, under),
      arrow(x + 54, 314, x + 54, 332),
      text(x + 54, 346, f'token t + {k}', 'mid'),
    ]
  return svg(
    360, 'Block first heads are layers; identity first heads stand beside the trunk', parts
  )


def targets() -> str:
  """Which target counts at which position of a packed window."""
  tokens = ['a0', 'a1', 'a2', 'a3', 'b0', 'b1', 'b2', 'b3', 'b4', 'b5', 'b6']
  queries, left, size = 8, 62, 26
  parts = [text(12, 20, 'A window: T = 8 queries, span 3, two documents', 'bold')]

  def row(y, label, cells):
    parts.append(text(8, y + 17, label, 'small'))
    for i, (kind, word) in enumerate(cells):
      parts.append(
        f'<rect x="{left + size * i:g}" y="{y}" width="{size}" height="26" class="{kind}"/>'
        + text(left + size * (i + 0.5), y + 17, word, 'mid small')
      )

  row(34, 'token', [('trunk' if t[0] == 'a' else 'again', t) for t in tokens])
  row(64, 'position', [('none', t[1]) for t in tokens])
  for k in range(1, 4):
    cells = []
    for t in range(queries):
      here, there = tokens[t], tokens[t + k]
      valid = int(there[1]) == int(here[1]) + k and here[0] == there[0]
      cells.append(('head', there) if valid else ('off', '–'))
    row(104 + 30 * (k - 1), f'head {k}', cells)
  for t in range(queries):
    parts.append(text(left + size * (t + 0.5), 206, str(t), 'mid small'))
  parts += [
    text(left + size * queries / 2, 222, 'query t', 'mid'),
    box(12, 236, 16, 14, 'head'),
    text(34, 248, 'target', 'small'),
    box(96, 236, 16, 14, 'off'),
    text(118, 248, 'masked out: in another document', 'small'),
  ]
  return svg(262, 'Targets of three heads over a packed window', parts)


def backward() -> str:
  """What remat and interleaved compute, and hold, over time."""
  parts, longest = [], 14.3  # of remat: one scale of time for all

  def track(y, title, about, steps):
    parts.extend([text(12, y, title, 'bold'), text(12, y + 16, about, 'small soft')])
    size = 336 / longest
    x, held, points = 12, 0.0, []
    for kind, label, memory, width in steps:
      w = size * width
      parts.append(
        f'<rect x="{x:.5g}" y="{y + 26}" width="{w:.5g}" height="28" class="{kind}"/>'
        + text(x + w / 2, y + 44, label, 'mid small')
      )
      points += [(round(x, 1), memory), (round(x + w, 1), memory)]
      x += w
      held = max(held, memory)
    base, scale = y + 118, 8
    curve = [(12, base)] + [(px, base - scale * m) for px, m in points] + [(x, base)]
    parts.extend(
      [
        line(curve, 'a'),
        line([(12, base), (348, base)], 'axis'),
        text(12, y + 72, 'memory in use', 'small soft'),
        text(348, base + 14, 'time →', 'end small soft'),
      ]
    )

  heads = (1, 2, 3)
  remat = [('trunk', 'trunk F', 1, 2)]
  remat += [('head', f'F{k}', 3, 1) for k in heads]
  for k in reversed(heads):
    remat += [('again', f'F{k}', 3, 1), ('back', f'B{k}', 3.6, 1.3)]
  remat += [('back', 'trunk B', 1.6, 2.4)]
  track(22, 'remat', 'one scan forward, one scan backward; F is computed twice', remat)
  inter = [('trunk', 'trunk F', 1, 2)]
  for k in heads:
    inter += [('head', f'F{k}', 3.2, 1), ('back', f'B{k}', 3.8, 1.3)]
  inter += [('back', 'trunk B', 1.6, 2.4)]
  track(182, 'interleaved', 'one scan: each head forward, backward, then the next', inter)
  naive = [('trunk', 'trunk F', 1, 2)]
  naive += [('head', f'F{k}', 1 + 1.7 * k, 1) for k in heads]
  naive += [('back', f'B{k}', 1.6 + 1.7 * k, 1.3) for k in reversed(heads)]
  naive += [('back', 'trunk B', 1.6, 2.4)]
  track(342, 'autodiff of a sum of losses', 'logits of all heads wait for their backward', naive)
  y = 484
  for x, kind, label in (
    (12, 'head', 'forward'),
    (96, 'back', 'backward'),
    (186, 'again', 'forward, recomputed'),
  ):
    parts += [box(x, y, 16, 14, kind), text(x + 22, y + 12, label, 'small')]
  return svg(512, 'Order of computation and memory of two backward strategies, n = 3', parts)


def decode() -> str:
  """One forward pass of speculative decoding."""
  left, size = 92, 66
  parts = [text(12, 20, 'One forward pass, W = 4', 'bold')]

  def row(y, label, under, cells):
    parts.append(text(8, y + 13, label, 'small'))
    parts.append(text(8, y + 27, under, 'small soft'))
    for i, (kind, word) in enumerate(cells):
      if word:
        parts.append(box(left + size * i, y, size - 6, 32, kind, word))

  row(34, 'window', 'read at once', [('trunk', 'def'), *(('again', w) for w in ('␣f', '(', 'y'))])
  row(86, 'head 1', 'best token', [('head', w) for w in ('␣f', '(', 'x', ')')])
  row(138, 'verify', 'equal?', [('none', w) for w in ('', '✓', '✓', '✗')])
  row(190, 'new text', '', [('head', w) for w in ('␣f', '(', 'x')])
  for i in range(4):
    parts.append(arrow(left + size * i + 30, 66, left + size * i + 30, 85))
  for i in range(3):
    x = left + size * i + 60
    parts.append(arrow(x, 104, left + size * (i + 1) + 8, 137))
  parts += [
    text(left, 240, '2 drafts accepted, 1 token of head 1: 3 tokens', 'small'),
    text(left, 256, 'per forward pass. Heads 2 to 4 then draft from', 'small'),
    text(left, 272, 'the last accepted position.', 'small'),
    box(12, 288, 16, 14, 'trunk'),
    text(34, 300, 'last known token', 'small'),
    box(150, 288, 16, 14, 'again'),
    text(172, 300, 'drafts of heads 2, 3, 4', 'small'),
  ]
  return svg(314, 'Speculative decoding with the further heads as draft', parts)


FIGURES: dict[str, Callable[[], str]] = {
  'overview': overview,
  'families': families,
  'targets': targets,
  'backward': backward,
  'decode': decode,
}


def main(args: list[str]) -> int:
  FOLDER.mkdir(parents=True, exist_ok=True)
  status = 0
  for name, draw in FIGURES.items():
    path, drawn = FOLDER / f'{name}.svg', draw()
    if '--check' in args:
      status |= not path.exists() or path.read_text() != drawn
    else:
      path.write_text(drawn)
  return int(status)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
