"""`choice_points`: a page with the loss of each head at each token of a text.

A token that near heads expect and far heads do not was decided between their
positions: a choice point (Gloeckle et al. 2024,
https://arxiv.org/abs/2404.19737, section 5.1). The page shows the loss in nats
of every head at every token, and marks choice points.
"""

import html
import itertools
import math

import numpy as np

from mtp_jax.config import schedule, schema
from mtp_jax.evals import induction, scores, suites
from mtp_jax.evals import subject as subject_lib

DOCUMENTS = 4  # default of --eval.limit
NEAR, FAR = math.log(2), 3 * math.log(2)  # nats: expected, unexpected
STRONG = 6.0  # nats of the most opaque colour


def check(arg: str, cfg: schema.CommandConfig) -> None:
  induction.check_documents('choice_points', arg, cfg)


def run(subject: subject_lib.Subject, arg: str) -> suites.Result:
  cfg, tokenizer = subject.cfg, subject.tokenizer
  n = cfg.eval.limit or DOCUMENTS
  documents = list(itertools.islice(induction.texts(cfg, tokenizer), n))
  rows = [
    np.array([*tokenizer.start, *tokenizer.encode(d.text)])[: cfg.data.seq_len] for d in documents
  ]
  if not any(len(row) > 1 for row in rows):
    raise induction.data_error(cfg, 'contains no text')
  active = schedule.trained_heads(cfg, subject.step)
  found = scores.of_rows(
    subject.model,
    rows,
    subject.mesh,
    cfg,
    n_active=active,
    batch_size=cfg.decode.batch_size or subject_lib.ROWS,
  )
  nats = [
    by_token(score, len(row), cfg.heads.offsets[:active])
    for row, score in zip(rows, found, strict=True)
  ]
  chosen_M = np.concatenate([choices(x_KU) for x_KU in nats])
  nats_KM = np.concatenate(nats, axis=1)
  seen_KM = np.isfinite(nats_KM)
  mean_K = np.nansum(nats_KM, axis=1) / np.maximum(seen_KM.sum(axis=1), 1)
  scalars = {
    f'nats_{k}': float(x)
    for k, (x, seen_M) in enumerate(zip(mean_K, seen_KM, strict=True), 1)
    if seen_M.any()
  }
  n_both = int((seen_KM[0] & seen_KM[-1]).sum())
  share = float(chosen_M.sum() / n_both) if n_both else math.nan
  scalars['choice_points'] = share
  lines = [
    f'{len(rows)} documents, {sum(map(len, rows)):,} tokens; of {n_both:,} that'
    f' heads 1 and {active} predict, choice points'
    f' {f"{share:.1%}" if n_both else "-"}: head 1 below'
    f' {NEAR:.2f} nats, head {active} above {FAR:.2f}'
  ]
  page = render(
    subject.name,
    [
      (d.name, [tokenizer.piece(int(t)) for t in row], x_KU)
      for d, row, x_KU in zip(documents, rows, nats, strict=True)
    ],
  )
  return suites.Result(lines, scalars, [], {'choice_points.html': page})


def by_token(found: scores.Scores, n_tokens: int, offsets) -> np.ndarray:
  """Returns nats_KU, the loss of head k at token u, predicted from position
  u - offset; NaN where there is no such position."""
  nats_KU = np.full((len(offsets), n_tokens), np.nan)
  for k, offset in enumerate(offsets):
    valid_T = found.valid[k]
    places_T = np.flatnonzero(valid_T)
    nats_KU[k, places_T + offset] = found.nats[k][places_T]
  return nats_KU


def choices(nats_KU: np.ndarray) -> np.ndarray:
  """Returns which tokens are choice points; none if there is only one head."""
  far_U = nats_KU[-1] > FAR  # False for NaN
  return (nats_KU[0] < NEAR) & far_U


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.4 system-ui, sans-serif; margin: 1rem auto;
  max-width: 70rem; padding: 0 .75rem; }
.text { font: 13px/1.1 ui-monospace, monospace; }
.t { display: inline-block; vertical-align: top; margin: 0 1px 4px 0; }
.t b { font-weight: 400; display: block; white-space: pre; min-width: .6em; }
.t.c b { outline: 2px solid #d33; border-radius: 2px; }
.t i { display: block; height: 5px; background: #d9480f; }
.key i { display: inline-block; width: 2rem; height: .7rem;
  background: #d9480f; vertical-align: middle; }
"""


def render(name: str, texts: list[tuple[str, list[str], np.ndarray]]) -> str:
  """Renders the page, self-contained: one bar per head below each token, head 1
  on top."""
  n = texts[0][2].shape[0]
  steps = (0, 1, 2, 4, 6)
  key = ' '.join(f'<i style="opacity:{_opacity(x):.2f}"></i>&nbsp;{x}' for x in steps)
  body = [
    '<!doctype html><html lang="en"><head><meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    f'<title>Choice points: {html.escape(name)}</title>',
    f'<style>{STYLE}</style></head><body>',
    f'<h1>Choice points</h1><p>{html.escape(name)}. Below each token one bar per'
    f' head, head 1 on top, head {n} at the bottom: its loss at this token, in'
    f' nats, predicted from its offset before it.</p><p class="key">nats: {key} or more.'
    f' Outlined: head 1 below {NEAR:.2f} nats, head {n} above {FAR:.2f}.</p>',
  ]
  for title, pieces, nats_KU in texts:
    marked_U = choices(nats_KU)
    body.append(f'<h2>{html.escape(title)}</h2><div class="text">')
    for u, piece in enumerate(pieces):
      body.append(_token(piece, nats_KU[:, u], bool(marked_U[u])))
      if piece.endswith(('\\n', '\n')):
        body.append('<br>')
    body.append('</div>')
  return '\n'.join([*body, '</body></html>', ''])


def _token(piece: str, nats_K, marked: bool) -> str:
  shown = html.escape(piece).replace('\u2581', ' ')
  losses = ', '.join('-' if np.isnan(x) else f'{x:.1f}' for x in nats_K)
  bars = ''.join(f'<i style="opacity:{_opacity(x):.2f}"></i>' for x in nats_K)
  chosen = ' c' if marked else ''
  return f'<span class="t{chosen}" title="{losses}"><b>{shown}</b>{bars}</span>'


def _opacity(nats: float) -> float:
  return 0.0 if np.isnan(nats) else min(nats / STRONG, 1.0)
