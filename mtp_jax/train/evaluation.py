"""Evaluations of a run: which are due after a step, and their records."""

from collections.abc import Callable

import jax

from mtp_jax.config import fields, schedule, schema
from mtp_jax.data import batches as batches_lib
from mtp_jax.data import tokenizers
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.evals import heldout, registry, suites
from mtp_jax.evals import subject as subject_lib
from mtp_jax.io import paths
from mtp_jax.losses import metrics as metrics_lib
from mtp_jax.parallel import distributed
from mtp_jax.train import metrics
from mtp_jax.train import run as run_lib


def due(cfg: schema.CommandConfig, done: int) -> tuple[bool, bool]:
  """Returns (whether held-out data is due, whether the tasks are due) after
  `done` steps. Held-out data is also a task if --eval.tasks names it."""
  t = cfg.train

  def at(every):
    return bool(done and every and done % every == 0) or done == t.steps

  suites_too = at(t.eval_tasks_every)
  names = {name for name, _ in registry.named(cfg)}
  return (at(t.eval_every) or (suites_too and registry.HELDOUT in names), suites_too)


def wanted(cfg, tokens, done: int) -> list[tuple[str, str | None]]:
  """Returns (kind, source) of each record that is due after `done` steps."""
  held_out, suites_too = due(cfg, done)
  found = []
  if held_out:
    sets = tokens.held_out(cfg.eval.split)
    alone = tokens.evaluates_itself_only(sets)
    found += [('eval', None if alone else name) for name in sets]
  if suites_too:
    found += [('suite', registry.label(*s)) for s in named(cfg)]
  return found


def missing(cfg, tokens, done: int) -> list[tuple[str, str | None]]:
  """Returns the entries of `wanted` without a record in metrics.jsonl: the run
  was interrupted or killed between checkpoint and evaluation."""
  records, found = wanted(cfg, tokens, done), []
  if not records:
    return []
  with distributed.fail_together():
    if distributed.is_primary():
      found = [list(of) for of in metrics.recorded(cfg.train.workdir, done)]
  found = {tuple(of) for of in distributed.broadcast_one_to_all(found)}
  return [of for of in records if of not in found]


def evaluations(run: run_lib.Run):
  """Returns evaluate(done, state, wanted, log_line), which writes the wanted
  records of the state after `done` steps. It returns False if a signal
  interrupted it; complete evaluations are recorded."""
  held_out = heldout.evaluator(run.cfg, run.mesh, run.bytes_V)

  def evaluate(done, state, wanted, log_line) -> bool:
    try:
      if any(kind == 'eval' for kind, _ in wanted):
        _evaluate(run, done, state, evaluate=held_out, wanted=wanted, log_line=log_line)
      _run_suites(run, done, state, wanted, log_line)
    except distributed.Interrupted:
      return False
    return True

  return evaluate


def _evaluate(run, done, state, *, evaluate, wanted, log_line):
  sets = batches_lib.eval_batches(run.tokens, run.cfg, run.mesh)
  for name, batches in sets.items():
    source = None if run.tokens.evaluates_itself_only(sets) else name
    if ('eval', source) not in wanted:
      continue
    with run.stop.interrupting():
      values = metrics_lib.scalars(evaluate(state.params, _fed(run, batches), done, run.teacher))
    run_lib.write_record(run, 'eval', done, values, source)
    log_line(f'held-out{f" {source}" if source else ""}, after step {done}:')
    for line in metrics_lib.table(values):
      log_line('  ' + line)


def _run_suites(run, done, state, wanted, log_line):
  def heartbeat():
    run.heartbeat()
    run.held.check(closely=False)  # single process: this one holds the lock

  for name, arg in named(run.cfg):
    label = registry.label(name, arg)
    if ('suite', label) not in wanted:
      continue
    try:
      with run.stop.interrupting():
        result = run_suite(
          name,
          arg,
          state.params,
          run.cfg,
          mesh=run.mesh,
          tokenizer=run.tokens.tokenizer,
          step=done,
          heartbeat=heartbeat,
        )
    except fields.FileChanged:
      raise
    except paths.InputError as error:  # not fatal; retried at the next start
      log_line(f'{label}, after step {done}: skipped: {error}')
      continue
    # Written before the record, which marks the evaluation as complete.
    pages = suites.write_pages(run.cfg.train.workdir, done, result.pages)
    # Recorded even without scalars, so that it is not evaluated again.
    run_lib.write_record(run, 'suite', done, result.scalars, label)
    log_line(f'{label}, after step {done}:')
    for line in [*result.lines, *pages]:
      log_line('  ' + line)


def _fed(run, batches):
  for batch in batches:
    run.heartbeat()
    if distributed.is_multiprocess():
      run.stop.check()  # every process has the same number of batches
    yield batch


def check(cfg: schema.CommandConfig) -> None:
  """Validates --eval.tasks.

  Raises:
    ConfigError: see `registry.selected`; or a multi-process run would evaluate a
      task other than held-out windows.
  """
  registry.selected(cfg)
  if named(cfg) and distributed.is_multiprocess():
    raise fields.ConfigError(
      'eval.tasks',
      cfg.eval.tasks,
      'needs a single process; in a multi-process run evaluate these with `mtp eval`',
    )


def named(cfg: schema.CommandConfig) -> list[tuple[str, str]]:
  """Returns (name, argument) of each task except held-out windows."""
  return [s for s in registry.named(cfg) if s[0] != registry.HELDOUT]


def run_suite(
  name: str,
  arg: str,
  model,
  cfg: schema.CommandConfig,
  *,
  mesh,
  tokenizer: tokenizers.Tokenizer,
  step: int,
  heartbeat: Callable[[], None],
) -> suites.Result:
  """Evaluates a task on the parameters after `step` steps; calls heartbeat()
  while it runs.

  Raises:
    ConfigError: the task cannot be evaluated.
  """
  active = schedule.trained_heads(cfg, step)
  with jax.transfer_guard('allow'):  # prompts are host arrays
    subject = subject_lib.Subject(
      f'{cfg.train.workdir}, step {step}',
      cfg,
      model,
      mesh,
      tokenizer,
      step,
      decoder_lib.Decoder(model, cfg, mesh, active),
      lambda line: heartbeat(),
    )
    return registry.SUITES[name].run(subject, arg)
