"""TODO of mtp_jax.train.loop."""

import collections
import contextlib
import sys
import time
from collections.abc import Iterator

import jax

from mtp_jax.checkpoint import metadata, restore
from mtp_jax.checkpoint import saver as saver_lib
from mtp_jax.config import fields, schedule, schema
from mtp_jax.data import batches as batches_lib
from mtp_jax.io import paths
from mtp_jax.losses import metrics as metrics_lib
from mtp_jax.model import params
from mtp_jax.parallel import distributed, sharding
from mtp_jax.train import (
  evaluation,
  goodput,
  init_from,
  lock,
  log,
  metrics,
  resume,
  rollback,
  watchdog,
)
from mtp_jax.train import profile as profile_lib
from mtp_jax.train import run as run_lib
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib

EXIT_INTERRUPTED = 75  # saved after SIGTERM or SIGINT; start it again to go on
EXIT_REPLACED = lock.Lost.status  # another run has taken the workdir
EXIT_DIVERGED = 76  # max_nonfinite steps in a row were not finite


def train(cfg: schema.Config, progress: run_lib.Progress = run_lib.plain_lines) -> int:
  """Trains to --train.steps, from the newest checkpoint of the workdir if there
  is one. Returns the exit status."""
  clock = goodput.Clock()
  with distributed.fail_together():
    saver_lib.check_workdir(cfg.train.workdir)
    tokens = batches_lib.open_tokens(cfg)
    mesh = sharding.make_mesh(cfg)
    sharding.check_batch(cfg, mesh.shape)
    batches_lib.train_batches(tokens, cfg, 0, mesh)  # refuses what it cannot divide,
    batches_lib.eval_batches(tokens, cfg, mesh)  # and sets without a window
    evaluation.check(cfg)
  batches_lib.check_same_store(tokens, cfg)
  cfg = schema.replace(cfg, **{'data.tokenizer': tokens.recorded})
  workdir = cfg.train.workdir
  # Before anything is written; a run that goes on has begun long ago.
  source = None if resume.newest(workdir) else resume.source(cfg)
  with contextlib.ExitStack() as stack:
    held = sinks = ledger = None  # but in the process that writes
    with distributed.fail_together():
      if distributed.is_primary():
        held = _acquire_lock(workdir)
        stack.callback(held.release)
    newest = resume.start_step(cfg, tokens)
    start = newest or 0
    if newest == 0 and not source:  # all that came after an import is damaged
      source = resume.source(cfg)
    if start >= cfg.train.steps and not evaluation.missing(cfg, tokens, start):
      print(f'{workdir} is trained already, to step {start}')
      return 0
    with distributed.fail_together():
      if held:
        metadata.write_definition(cfg, tokens.tokenizer, workdir)
        sinks = metrics.Sinks(workdir, start)
        stack.callback(sinks.close)
        ledger = goodput.Ledger(workdir, start)
        stack.callback(ledger.close)
    stack.enter_context(jax.set_mesh(mesh))
    saver = saver_lib.Saver(workdir, cfg)
    stack.callback(saver.close)  # waits for the save that is under way
    stop = stack.enter_context(distributed.Stop(mesh).on_signal())
    run = run_lib.Run(
      cfg,
      mesh,
      tokens,
      batches_lib.bytes_of_tokens(tokens, cfg, mesh),
      held,
      sinks,
      saver,
      stop,
      clock,
      ledger,
      stack.enter_context(watchdog.watchdog(cfg.train.watchdog_s)),
      progress,
    )
    left_out = metadata.skipped_batches(workdir, start) if start else ()
    back_to = collections.Counter()
    try:
      while True:
        batches = batches_lib.train_batches(tokens, cfg, start, mesh, left_out)
        ended = _loop(run, start, source, batches, left_out)
        if not isinstance(ended, rollback.Spike):
          return ended
        run, start, left_out = rollback.roll_back(run, ended, left_out, stack)
        if not start and not source:  # of a run that was resumed
          source = resume.source(cfg)
        back_to[start] += 1
        if back_to[start] > rollback.MAX_ROLLBACKS:
          print(f'went back {rollback.MAX_ROLLBACKS} times; stopped at step {start}')
          return EXIT_DIVERGED
    except lock.Lost as error:
      print(f'mtp: {error}', file=sys.stderr)
      return EXIT_REPLACED


def _acquire_lock(workdir: str) -> lock.Lock:
  try:
    paths.make_folder(workdir)
    return lock.Lock(workdir)
  except paths.InputError:
    raise
  except Exception as error:  # of a bucket: of any class
    why = getattr(error, 'strerror', None) or paths.first_line(error)
    raise fields.ConfigError('train.workdir', workdir, f'cannot write there: {why}') from error


def _loop(
  run: run_lib.Run, start: int, source, batches: Iterator[dict], left_out
) -> int | rollback.Spike:
  cfg, t = run.cfg, run.cfg.train
  abstract = state_lib.abstract(cfg, run.mesh)
  if start:
    state = restore.restore(t.workdir, start, abstract)
  else:
    state = _first_state(cfg, run.mesh, source)
  log.log_setup(run, abstract, start)
  step_of = _compiler(run, abstract)
  evaluate = evaluation.evaluations(run)
  clock = run.clock
  spikes = rollback.SpikeMonitor(run, metadata.spikes(t.workdir, start) if start else {})
  with (
    run.progress(start, t.steps) as say,
    profile_lib.profile(cfg) as profile,
    _transfers_are_explicit(),
  ):
    clock.at('eval')
    if not evaluate(start, state, evaluation.missing(cfg, run.tokens, start), say):
      return _interrupted(run, start, say)
    for done in range(start + 1, t.steps + 1):
      n_active = schedule.active_heads(cfg, done - 1)
      step = step_of(n_active, done - 1, say)
      profile(done - 1, state)
      run.alive()
      clock.at('data')
      batch = next(batches)
      clock.at('host')
      batch = sharding.put_batch(run.mesh, batch)
      state, values = step(state, batch, run.bytes_V)
      clock.steps += 1
      clock.at('device')
      spike = spikes(done, values, say)
      if spike and t.skip_batches:
        return rollback.Spike(spike, done, say)
      last, stop = done == t.steps, run.stop()
      clock.at('host')
      if done % t.log_every == 0 or last:
        clock.at('device')
        values = metrics_lib.scalars(jax.device_get(values))
        clock.at('host')
        log.log_step(run, done, n_active, values, say)
        if values['skipped_in_a_row'] >= t.max_nonfinite:
          say(
            f'{values["skipped_in_a_row"]:.0f} steps in a row were not finite'
            f' (--train.max_nonfinite={t.max_nonfinite}); stopped, unsaved'
          )
          _finish(run, done, 'diverged')
          return EXIT_DIVERGED
      due = last or (t.checkpoint_every and done % t.checkpoint_every == 0)
      wanted = evaluation.wanted(cfg, run.tokens, done)
      if due or stop or wanted:
        clock.at('device')
        jax.block_until_ready(state)  # else others would get its seconds

      # First what would be lost: evaluating may take longer than the machine
      # has left, and is done again where it was broken off.
      if due or stop:
        _save(run, done, state, left_out, spikes)
      if stop:
        return _interrupted(run, done, say)
      if wanted:
        clock.at('eval')
        if not evaluate(done, state, wanted, say):
          if not due:
            _save(run, done, state, left_out, spikes)
          return _interrupted(run, done, say)
      clock.at('host')
    clock.at('checkpoint')
    _wait_for_save(run)
    _finish(run, t.steps, 'finished')
  return 0


def _save(run: run_lib.Run, done: int, state, left_out, spikes: rollback.SpikeMonitor) -> None:
  run.clock.at('checkpoint')
  run_lib.check_held(run)
  if run.sinks:
    run.sinks.sync()
    run.ledger.sync()
  saver_lib.save(run.saver, done, state, run.cfg, run.tokens.fingerprint, left_out, spikes.state())


def _interrupted(run: run_lib.Run, done: int, say) -> int:
  run.clock.at('checkpoint')
  _wait_for_save(run)
  say(f'interrupted: saved step {done}; run the same command to go on')
  _finish(run, done, 'interrupted')
  return EXIT_INTERRUPTED


def _wait_for_save(run: run_lib.Run) -> None:
  """Of the last step; ConfigError if it could not be saved."""
  run.saver.wait_until_finished()
  with distributed.fail_together():
    run.saver.check()


def _finish(run: run_lib.Run, done: int, how: str) -> None:
  run.clock.at('host')
  if run.ledger:
    run.ledger.write(done, run.clock, how)


def _first_state(cfg, mesh, source: resume.Source | None) -> state_lib.State:
  if not source:
    return state_lib.init(cfg, mesh)
  dtype = {'model.param_dtype': cfg.model.param_dtype}
  old = restore.restore_model(
    source.workdir, source.step, schema.replace(source.cfg, **dtype), mesh
  )
  print(f'begins with {source.workdir}, step {source.step}: {init_from.described(source.was, cfg)}')
  return state_lib.init(cfg, mesh, (old, source.was))


def _compiler(run: run_lib.Run, abstract):
  """(n_active, steps done, say) -> compiled step; one compile a number of
  heads, whose bytes a device go into goodput.jsonl: what a program needs may
  differ from session to session, and metrics.jsonl may not."""
  cfg, steps = run.cfg, {}
  masked = run.tokens.train().masked

  def step_of(n_active, done, say):
    if n_active not in steps:
      run.alive()
      run.clock.at('compile')
      begin = time.perf_counter()
      traced = step_lib.trace(cfg, run.mesh, n_active, masked)
      steps[n_active] = traced.lower().compile()
      memory = steps[n_active].memory_analysis()
      say(
        f'compiled the step with {n_active} heads in'
        f' {time.perf_counter() - begin:.1f} s'
        + (f'; temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB a device' if memory else '')
      )
      distributed.barrier('compiled')  # or the first step would wait, unsaid
      run.clock.at('host')
      if run.ledger and memory:
        run.ledger.write(
          done,
          run.clock,
          memory=dict(
            heads=n_active,
            parameters=params.bytes_per_device(abstract.params),
            optimizer=params.bytes_per_device(abstract.opt_state),
            temporaries=memory.temp_size_in_bytes,
          ),
        )
    return steps[n_active]

  return step_of


def _transfers_are_explicit():
  """A hidden copy between host and device would wait for the device."""
  return jax.transfer_guard('disallow')
