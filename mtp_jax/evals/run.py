"""Evaluates a checkpoint on the suites of --eval.tasks (mtp eval)."""

import sys
from collections.abc import Iterator
from typing import Any

from mtp_jax.checkpoint import restore
from mtp_jax.checkpoint import teacher as teacher_lib
from mtp_jax.config import fields, schema
from mtp_jax.data import batches as batches_lib
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import load
from mtp_jax.evals import calibration, heldout, registry, suites
from mtp_jax.evals import subject as subject_lib
from mtp_jax.losses import metrics
from mtp_jax.parallel import distributed, sharding


def evaluate(path: str, given: dict[str, object]) -> Iterator[tuple[list, dict]]:
  """Yields, for each suite of --eval.tasks, its lines and all values so far, since
  a later suite may fail after hours.

  Uses the config of the checkpoint. Flags may override how results are computed
  (data, mesh, loss), not what the parameters are.
  """
  with distributed.fail_together():
    opened = _open(path, given)
    workdir, step, _, cfg = opened
    selected = registry.selected(cfg)
  values: dict[str, Any] = dict(workdir=workdir, step=step)
  subject = None
  for name, arg in selected:
    if name == registry.HELDOUT:
      lines, found = _held_out(workdir, step, cfg)
      values |= found
      yield lines, values
      continue
    subject = subject or _subject(given, opened)
    result = registry.SUITES[name].run(subject, arg)
    label = registry.label(name, arg)
    lines = [f'{workdir}, step {step}, {label}:', *result.lines]
    lines += suites.write_pages(workdir, step, result.pages)
    found = metrics.jsonable(result.scalars) | dict(items=result.items)
    values.setdefault('suites', {})[label] = found
    yield lines, values


def _open(path, given):
  """Opens the checkpoint; with --data.store, drops the run's --eval.stores."""
  elsewhere = {'eval.stores': ''} if 'data.store' in given else {}
  return load.open_checkpoint(path, given, elsewhere)


def _subject(given: dict[str, object], opened) -> subject_lib.Subject:
  if distributed.is_multiprocess():
    raise fields.ConfigError(
      'eval.tasks',
      given.get('eval.tasks', ''),
      f'needs a single process; only {registry.HELDOUT} supports several',
    )
  found = load.of_opened(given, opened, False)
  assert found.tokenizer
  cfg, mesh = found.cfg, sharding.make_mesh(found.cfg)
  model = restore.restore_model(found.workdir, found.step, cfg, mesh)
  return subject_lib.Subject(
    f'{found.workdir}, step {found.step}',
    cfg,
    model,
    mesh,
    found.tokenizer,
    found.step,
    decoder_lib.Decoder(model, cfg, mesh, found.active),
    _show_progress,
  )


def _show_progress(line: str) -> None:
  """Shows progress, on a terminal."""
  if sys.stderr.isatty():
    print(f'\r{line}\x1b[K', end='\r', file=sys.stderr, flush=True)


def _held_out(workdir: str, step: int, cfg: schema.CommandConfig):
  """Returns (lines, values) of the held-out splits of the run's stores."""
  with distributed.fail_together():
    tokens, mesh = batches_lib.open_tokens(cfg), sharding.make_mesh(cfg)
    sharding.check_batch(cfg, mesh.shape)
  batches_lib.check_same_store(tokens, cfg)
  source = teacher_lib.find(cfg, mesh.shape)
  teacher = teacher_lib.load(source, mesh) if source else None
  model = restore.restore_model(workdir, step, cfg, mesh)
  bytes_V = batches_lib.bytes_of_tokens(tokens, cfg, mesh)
  evaluate_on = heldout.evaluator(cfg, mesh, bytes_V, calibrated=True)
  sets = batches_lib.eval_batches(tokens, cfg, mesh)
  if not sets:
    tokens.sources[0].store.split(cfg.eval.split)  # raises with the names of its splits
  lines, by_name, alone = [], {}, tokens.evaluates_itself_only(sets)
  for name, batches in sets.items():
    raw = evaluate_on(model, batches, step, teacher)
    values = metrics.scalars(raw)
    of = cfg.data.store if alone else name
    if name not in {source.ref.name for source in tokens.further}:
      of = f'{cfg.eval.split} split of {of}'  # an --eval.stores entry may have no such split
    lines += [
      f'{workdir}, step {step}, {of}: {raw["count_K"][0]:,.0f} targets of head 1',
      *metrics.table(values),
    ]
    more = raw['calibration']
    found = calibration.scalars(more)
    lines += calibration.table(found)
    bins = {name: x.tolist() for name, x in more.items() if name[-1] == 'X'}
    by_name[name] = metrics.jsonable(values | found) | dict(calibration=bins)
  return lines, by_name[name] if alone else dict(sources=by_name)
