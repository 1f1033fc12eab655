"""TODO of mtp_jax.train.loop."""

import json
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


def due(cfg: schema.Config, done: int) -> tuple[bool, bool]:
  """Whether held-out data, and the suites, are to be evaluated after `done`
  steps. Held-out data is a suite as well, if it is named as one."""
  t = cfg.train

  def at(every):
    return bool(done and every and done % every == 0) or done == t.steps

  suites_too = at(t.eval_tasks_every)
  names = {name for name, _ in registry.named(cfg)}
  return (at(t.eval_every) or (suites_too and registry.HELDOUT in names), suites_too)


def wanted(cfg, tokens, done: int) -> list[tuple[str, str | None]]:
  """(kind, source) of the records that evaluations after `done` steps make."""
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
  """Those of `_wanted` that are not in metrics.jsonl: a signal or a kill came
  between checkpoint and evaluation."""
  records, found = wanted(cfg, tokens, done), ''
  if not records:
    return []
  with distributed.fail_together():
    if distributed.is_primary():
      found = json.dumps(metrics.recorded(cfg.train.workdir, done))
  found = {tuple(of) for of in json.loads(distributed.broadcast_one_to_all(found))}
  return [of for of in records if of not in found]


def evaluations(run: run_lib.Run):
  """evaluate(done, state, wanted, say): makes the wanted records, of the state
  after so many steps. False if a signal broke it off; what is complete is
  recorded."""
  held_out = heldout.evaluator(run.cfg, run.mesh, run.bytes_V)

  def evaluate(done, state, wanted, say) -> bool:
    try:
      if any(kind == 'eval' for kind, _ in wanted):
        _evaluate(run, done, state, held_out, wanted, say)
      _run_suites(run, done, state, wanted, say)
    except distributed.Interrupted:
      return False
    return True

  return evaluate


def _evaluate(run, done, state, evaluate, wanted, say):
  sets = batches_lib.eval_batches(run.tokens, run.cfg, run.mesh)
  for name, batches in sets.items():
    source = None if run.tokens.evaluates_itself_only(sets) else name
    if ('eval', source) not in wanted:
      continue
    with run.stop.interrupting():
      values = metrics_lib.scalars(evaluate(state.params, _fed(run, batches), done))
    run_lib.write_record(run, 'eval', done, values, source)
    say(f'held out{f" of {source}" if source else ""}, after step {done}:')
    for line in metrics_lib.table(values):
      say('  ' + line)


def _run_suites(run, done, state, wanted, say):
  def alive():
    run.alive()
    run.held.check(closely=False)  # one process: it is this one's

  for name, arg in named(run.cfg):
    label = registry.label(name, arg)
    if ('suite', label) not in wanted:
      continue
    try:
      with run.stop.interrupting():
        result = run_suite(
          name, arg, state.params, run.cfg, run.mesh, run.tokens.tokenizer, done, alive
        )
    except fields.FileChanged:
      raise
    except paths.InputError as error:  # not worth a run; the next start tries
      say(f'{label}, after step {done}: skipped: {error}')
      continue
    # Before the record, with which it would not be evaluated again.
    pages = suites.write_pages(run.cfg.train.workdir, done, result.pages)
    # Also without a number: it was evaluated.
    run_lib.write_record(run, 'suite', done, result.scalars, label)
    say(f'{label}, after step {done}:')
    for line in [*result.lines, *pages]:
      say('  ' + line)


def _fed(run, batches):
  for batch in batches:
    run.alive()
    if distributed.is_multiprocess():
      run.stop.check()  # all processes have as many batches
    yield batch


def check(cfg: schema.Config) -> None:
  """Raises ConfigError where `registry.asked` does, or where suites beside
  held-out windows are to be evaluated by several processes."""
  registry.asked(cfg)
  if named(cfg) and distributed.is_multiprocess():
    raise fields.ConfigError(
      'eval.tasks',
      cfg.eval.tasks,
      'one process; on several, give these to `mtp eval` beside the run',
    )


def named(cfg: schema.Config) -> list[tuple[str, str]]:
  """(name, argument) of the suites beside held-out windows."""
  return [s for s in registry.named(cfg) if s[0] != registry.HELDOUT]


def run_suite(
  name: str,
  arg: str,
  model,
  cfg: schema.Config,
  mesh,
  tokenizer: tokenizers.Tokenizer,
  step: int,
  alive: Callable[[], None],
) -> suites.Result:
  """What a suite finds of the parameters after `step` steps; alive() is called
  while it runs.

  Raises:
    ConfigError: it cannot be evaluated after all.
  """
  active = schedule.trained_heads(cfg, step)
  with jax.transfer_guard('allow'):  # prompts come from the host
    subject = subject_lib.Subject(
      f'{cfg.train.workdir}, step {step}',
      cfg,
      model,
      mesh,
      tokenizer,
      step,
      decoder_lib.Decoder(model, cfg, mesh, active),
      lambda line: alive(),
    )
    return registry.SUITES[name].run(subject, arg)
