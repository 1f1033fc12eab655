"""What a user looks at: held-out results, real batches. Floor 5.

Each function returns, or yields, (lines to print, the same as a JSON-able
dict).
"""

import sys
from collections.abc import Iterator

import jax
import numpy as np

from mtp_jax import checkpoint, config, flags, generate, processes, sharding, targets
from mtp_jax.data import loader
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.evals import calibration, heldout, registry, suites
from mtp_jax.evals import subject as subject_lib
from mtp_jax.train import loop, metrics


def evaluate(path: str, parsed: flags.Parsed) -> Iterator[tuple[list, dict]]:
  """What each suite of --eval.suite says of a checkpoint, under its own config:
  its lines, and the values so far; a later one may fail, after hours.

  Flags may say otherwise for how it is computed (data, mesh, loss), not for
  what the parameters are.
  """
  with processes.together():
    opened = _opened(path, parsed)
    workdir, step, _, cfg = opened
    wanted = registry.asked(cfg)
  values, subject = dict(workdir=workdir, step=step), None
  for name, arg in wanted:
    if name == registry.HELDOUT:
      lines, found = _held_out(workdir, step, cfg)
      values |= found
      yield lines, values
      continue
    subject = subject or _subject(parsed, opened)
    result = registry.SUITES[name].run(subject, arg)
    label = registry.label(name, arg)
    lines = [f'{workdir}, step {step}, {label}:', *result.lines]
    lines += suites.write_pages(workdir, step, result.pages)
    found = metrics.jsonable(result.scalars) | dict(items=result.items)
    values.setdefault('suites', {})[label] = found
    yield lines, values


def _opened(path, parsed):
  """`checkpoint.opened`; a store that is given has the run's others nowhere."""
  elsewhere = {'eval.stores': ''} if 'data.store' in parsed.given else {}
  return checkpoint.opened(path, 'eval.checkpoint', parsed, elsewhere)


def _subject(parsed: flags.Parsed, opened) -> subject_lib.Subject:
  if processes.several():
    raise config.ConfigError(
      'eval.suite',
      parsed.given.get('eval.suite', ''),
      f'one process; {registry.HELDOUT} alone runs on several',
    )
  found = generate.of_opened(parsed, opened, False, 'eval.checkpoint')
  cfg, mesh = found.cfg, sharding.serving_mesh(found.cfg)
  model = checkpoint.restore_model(found.workdir, found.step, cfg, mesh, 'eval.checkpoint')
  return subject_lib.Subject(
    f'{found.workdir}, step {found.step}',
    cfg,
    model,
    mesh,
    found.tokenizer,
    found.step,
    decoder_lib.Decoder(model, cfg, mesh, found.active),
    _say,
  )


def _say(line: str) -> None:
  """How far it is, at a terminal."""
  if sys.stderr.isatty():
    print(f'\r{line}\x1b[K', end='\r', file=sys.stderr, flush=True)


def _held_out(workdir: str, step: int, cfg: config.Config):
  """(lines, values) of the splits of the run's stores."""
  with processes.together():
    tokens, mesh = loop.open_tokens(cfg), sharding.make_mesh(cfg)
  loop.check_same_store(tokens, cfg)
  model = checkpoint.restore_model(workdir, step, cfg, mesh, 'eval.checkpoint')
  evaluate_on = heldout.evaluator(cfg, mesh, loop.bytes_of_tokens(tokens, cfg, mesh))
  sets = loop.eval_batches(tokens, cfg, mesh)
  if not sets:
    tokens.sources[0].store.split(cfg.eval.split)  # says what there is
  how_sure = calibration.evaluator(cfg, mesh)
  again = loop.eval_batches(tokens, cfg, mesh)
  lines, by_name, alone = [], {}, tokens.evaluates_itself_only(sets)
  for name, batches in sets.items():
    raw = evaluate_on(model, batches, step)
    values = metrics.scalars(raw)
    of = cfg.data.store if alone else name
    if name not in {source.ref.name for source in tokens.further}:
      of = f'{cfg.eval.split} split of {of}'  # a further one may have no split
    lines += [
      f'{workdir}, step {step}, {of}: {raw["count_K"][0]:,.0f} targets of head 1',
      *metrics.table(values),
    ]
    more = how_sure(model, again[name], step)
    found = calibration.scalars(more)
    lines += calibration.table(found)
    bins = {name: x.tolist() for name, x in more.items() if name[-1] == 'X'}
    by_name[name] = metrics.jsonable(values | found) | dict(calibration=bins)
  return lines, by_name[name] if alone else dict(sources=by_name)


def inspect(cfg: config.Config) -> tuple[list[str], dict]:
  """The batch of a training step as the loss sees it.

  For each position: the token, its position and segment, and the target of each
  head, bracketed where it does not count.
  """
  tokens = loop.open_tokens(cfg)
  mixture, window = tokens.train(), (cfg.data.seq_len, cfg.span)
  batch = next(loop.train_batches(tokens, cfg, cfg.inspect.step))
  rows = loader.row_indices(
    mixture.sizes(*window), mixture.weights, cfg.train.seed, cfg.data.batch_size, cfg.inspect.step
  )
  of_row = [mixture.find(row, *window) for row in rows]
  names = [tokens.sources[s].ref.name for s, _ in of_row]
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
    of = f' of {names[b]}' if len(tokens.sources) > 1 else ''
    lines.append(f'window {of_row[b][1]}{of}: {tokens.tokenizer.decode(flat["tokens"][b])!r}')
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
  lines.append(
    '[x]: not a target: another document' + (', or not to be scored' if 'scored' in flat else '')
  )
  return lines, dict(
    step=cfg.inspect.step,
    sources=names,
    windows=[number for _, number in of_row],
    counts=count_K.tolist(),
    **{name: x.tolist() for name, x in flat.items()},
    targets=targets_KBT.tolist(),
    valid=valid_KBT.tolist(),
  )
