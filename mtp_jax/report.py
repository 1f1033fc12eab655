"""What a user looks at: held-out results, real batches, curves. Floor 5.

Each function returns (lines to print, the same as a JSON-able dict).
"""

import os

import jax
import numpy as np

from mtp_jax import (
  checkpoint,
  config,
  flags,
  params,
  processes,
  sharding,
  targets,
)
from mtp_jax.data import loader
from mtp_jax.evals import heldout
from mtp_jax.model import lm
from mtp_jax.train import loop, metrics


def evaluate(path: str, parsed: flags.Parsed) -> tuple[list[str], dict]:
  """Held-out results of a checkpoint, under its own config.

  Flags may say otherwise for how it is computed (data, mesh, loss), not for
  what the parameters are.
  """
  with processes.together():
    workdir, step, cfg, tokens, mesh = _open(path, parsed)
  loop.check_same_store(tokens, cfg)
  abstract = params.abstract(lm.specs(cfg), cfg.model.param_dtype, mesh)
  model = checkpoint.restore_params(workdir, step, abstract)
  bytes_V = loop.bytes_of_tokens(tokens, cfg, mesh)
  raw = heldout.evaluator(cfg, mesh, bytes_V)(
    model, loop.eval_batches(tokens, cfg, mesh), step
  )
  values = metrics.scalars(raw)
  lines = [
    f'{workdir}, step {step}, {cfg.eval.split} split of {cfg.data.store}:'
    f' {raw["count_K"][0]:,.0f} targets of head 1',
    *metrics.table(values),
  ]
  return lines, dict(workdir=workdir, step=step) | metrics.jsonable(values)


def _open(path, parsed):
  """(workdir, step, Config, tokens, mesh) of an evaluation."""
  workdir, step = checkpoint.find(path)
  saved, _ = checkpoint.about(workdir, step)
  cfg = parsed.config(saved)
  for name, was, now in config.changed(saved, cfg):
    if name.startswith(('model.', 'heads.')) and name not in (
      'model.compute_dtype', 'model.remat',
    ):  # fmt: skip
      raise config.ConfigError(
        name, now, f'the checkpoint {path} was trained with {was}'
      )
  return workdir, step, cfg, loop.open_tokens(cfg), sharding.make_mesh(cfg)


def inspect(cfg: config.Config) -> tuple[list[str], dict]:
  """The batch of a training step as the loss sees it.

  For each position: the token, its position and segment, and the target of each
  head, bracketed where it does not count.
  """
  tokens = loop.open_tokens(cfg)
  split = tokens.store.split('train')
  batch = next(loop.train_batches(tokens, cfg, cfg.inspect.step))
  rows = loader.row_indices(
    split.n_windows(cfg.data.seq_len, cfg.span),
    cfg.train.seed,
    cfg.data.batch_size,
    cfg.inspect.step,
  )
  flat = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()}
  targets_KBT, valid_KBT = jax.device_get(targets.targets(flat, cfg))
  count_K = valid_KBT.sum(axis=(1, 2))

  def piece(token):
    text = tokens.tokenizer.piece(int(token))
    return text if text.strip() else text.replace(' ', '␣')

  lines = [
    f'step {cfg.inspect.step}: {len(rows)} windows of {cfg.data.seq_len} +'
    f' {cfg.span} tokens; valid targets by head '
    + ' '.join(f'{k}: {c:,}' for k, c in enumerate(count_K, 1))
  ]
  for b in range(min(cfg.inspect.rows, len(rows))):
    lines.append(
      f'window {rows[b]}: {tokens.tokenizer.decode(flat["tokens"][b])!r}'
    )
    lines.append(
      '    t  token     position  segment  targets '
      + ' '.join(f't+{offset}' for offset in cfg.heads.offsets)
    )
    segment_U = np.cumsum(flat['position'][b] == 0)
    for t in range(min(cfg.inspect.tokens, cfg.data.seq_len)):
      shown = [
        piece(x) if ok else f'[{piece(x)}]'
        for x, ok in zip(targets_KBT[:, b, t], valid_KBT[:, b, t], strict=True)
      ]
      lines.append(
        f'{t:5d}  {piece(flat["tokens"][b, t]):8}'
        f'  {flat["position"][b, t]:8d}  {segment_U[t]:7d}  {"  ".join(shown)}'
      )
  lines.append('[x]: not a target: another document')
  return lines, dict(
    step=cfg.inspect.step,
    windows=rows.tolist(),
    counts=count_K.tolist(),
    tokens=flat['tokens'].tolist(),
    position=flat['position'].tolist(),
    targets=targets_KBT.tolist(),
    valid=valid_KBT.tolist(),
  )


def curves(runs: list[str]) -> tuple[list[str], dict]:
  """Draws RUN/curves.png for the first run: loss by head while training and
  held out, the further runs beside it, and acceptance. Returns last values."""
  records = {run: metrics.read(run) for run in runs}
  for run, found in records.items():
    if not found:
      raise ValueError(f'{run}: has no metrics.jsonl; report takes workdirs')
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot

  figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
  for style, (run, found) in zip(
    ('-', '--', ':', '-.') * len(records), records.items(), strict=False
  ):
    label = '' if len(records) == 1 else f' {os.path.basename(run.rstrip("/"))}'
    for color, name in enumerate(_heads(found, 'loss')):
      _line(left, found, name, f'C{color}', style, label)
    for color, name in enumerate(_heads(found, 'acceptance'), 1):
      _line(right, found, name, f'C{color}', style, label)
  left.set(xlabel='step', ylabel='nats a token', title='loss by head')
  right.set(
    xlabel='step', ylabel='rate', ylim=(0, 1),
    title='draft accepted, given those before (teacher-forced)',
  )  # fmt: skip
  for axes in (left, right):
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize='small')
  figure.tight_layout()
  path = os.path.join(runs[0], 'curves.png')
  figure.savefig(path + '.tmp', format='png', dpi=120)
  os.replace(path + '.tmp', path)
  pyplot.close(figure)
  last = {run: found[-1] for run, found in records.items()}
  lines = [
    f'{run}: step {r["step"]}, '
    + ', '.join(
      f'head {n[5:]} ' + ('nan' if r[n] is None else f'{r[n]:.4f}')
      for n in _heads([r], 'loss')
    )
    for run, r in last.items()
  ]
  return [*lines, f'curves: {path}'], dict(curves=path, last=last)


def _heads(found, name):
  """The fields name_1, name_2 … that occur, in order."""
  fields = {key for record in found for key in record}
  wanted = [f for f in fields if f.startswith(f'{name}_') and f[-1].isdigit()]
  return sorted(wanted, key=lambda f: int(f.rsplit('_', 1)[1]))


def _line(axes, found, name, color, style, label):
  """Training as a line, held-out values as dots."""
  for kind in ('train', 'eval'):
    points = [
      (r['step'], r[name])
      for r in found
      if r['kind'] == kind and r.get(name) is not None
    ]
    if points and kind == 'train':
      axes.plot(
        *zip(*points, strict=True), style, color=color, alpha=0.8, linewidth=1,
        label=f'head {name.rsplit("_", 1)[1]}{label}',
      )  # fmt: skip
    elif points:
      axes.plot(*zip(*points, strict=True), 'o', color=color, markersize=4)
