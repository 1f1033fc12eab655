"""The training loop: setup, steps, evaluations, checkpoints and their order.

Imports everything below it; exit statuses are those of docs/operations.md.
"""

import collections
import contextlib
import sys
import time

import jax

from mtp_jax.checkpoint import metadata, restore
from mtp_jax.checkpoint import saver as saver_lib
from mtp_jax.checkpoint import teacher as teacher_lib
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

EXIT_INTERRUPTED = 75  # saved after a signal; run the same command to resume
EXIT_REPLACED = lock.Lost.status  # another run has taken over the workdir
EXIT_DIVERGED = 76  # max_nonfinite consecutive steps were not finite


def train(cfg: schema.CommandConfig, progress: run_lib.Progress = run_lib.plain_lines) -> int:
  """Trains to --train.steps, resuming from the newest valid checkpoint of the
  workdir if there is one. Returns the exit status."""
  clock = goodput.Clock()
  with distributed.fail_together():
    saver_lib.check_workdir(cfg.train.workdir)
    tokens = batches_lib.open_tokens(cfg)
    mesh = sharding.make_mesh(cfg)
    sharding.check_batch(cfg, mesh.shape)
    batches_lib.check(tokens, cfg)
    evaluation.check(cfg)
  batches_lib.check_same_store(tokens, cfg)
  cfg = batches_lib.recorded(tokens, cfg)
  workdir = cfg.train.workdir
  # Checked before anything is written; a resumed run needs no source.
  source = None if resume.newest(workdir) else resume.source(cfg)
  teacher = resume.teacher(cfg, mesh)
  if teacher:  # the checkpoint, as that of the teacher's run may change
    cfg = schema.replace(cfg, **{'loss.teacher': teacher.path})
  with contextlib.ExitStack() as stack:
    held = sinks = ledger = None  # set in the primary process only
    with distributed.fail_together():
      if distributed.is_primary():
        held = _acquire_lock(workdir)
        stack.callback(held.release)
    position = resume.position(cfg, tokens)
    if position and not position.step and not source:  # all after the import are corrupt
      source = resume.source(cfg)
    position = position or resume.Position()
    start = position.step
    if start >= cfg.train.steps and not evaluation.missing(cfg, tokens, start):
      print(f'{workdir}: training already finished (step {start})')
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
    stack.callback(saver.close)  # waits for the save in progress
    stop = stack.enter_context(distributed.Stop(mesh).on_signal())
    run = run_lib.Run(
      cfg=cfg,
      mesh=mesh,
      tokens=tokens,
      bytes_V=batches_lib.bytes_of_tokens(tokens, cfg, mesh),
      teacher=teacher_lib.load(teacher, mesh) if teacher else None,
      held=held,
      sinks=sinks,
      saver=saver,
      stop=stop,
      clock=clock,
      ledger=ledger,
      heartbeat=stack.enter_context(watchdog.watchdog(cfg.train.watchdog_s)),
      progress=progress,
    )
    n_rollbacks = collections.Counter()  # by the step that the run rolled back to
    try:
      while True:
        ended = _loop(run, position, source)
        if not isinstance(ended, rollback.Spike):
          return ended
        run, position = rollback.roll_back(run, ended, position.skipped_batches, stack)
        start = position.step
        if not start and not source:  # of a run that was resumed
          source = resume.source(cfg)
        n_rollbacks[start] += 1
        if n_rollbacks[start] > rollback.MAX_ROLLBACKS:
          print(f'rolled back {rollback.MAX_ROLLBACKS} times; stopped at step {start}')
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
  except Exception as error:  # bucket clients raise any class
    why = getattr(error, 'strerror', None) or paths.first_line(error)
    raise fields.ConfigError('train.workdir', workdir, f'cannot write there: {why}') from error


def _loop(run: run_lib.Run, position: resume.Position, source) -> int | rollback.Spike:
  cfg, t, start = run.cfg, run.cfg.train, position.step
  skipped = position.skipped_batches
  batches = batches_lib.train_batches(run.tokens, cfg, start, run.mesh, skipped)
  abstract = state_lib.abstract(cfg, run.mesh)
  if start:
    state = restore.restore(t.workdir, start, abstract)
  else:
    state = _first_state(cfg, run.mesh, source)
  log.log_setup(run, abstract, start)
  step_of = _compiler(run, abstract)
  evaluate = evaluation.evaluations(run)
  clock = run.clock
  spikes = rollback.SpikeMonitor(run, position.spikes)
  with (
    run.progress(start, t.steps) as log_line,
    profile_lib.profile(cfg) as profile,
    _transfers_are_explicit(),
  ):
    clock.at('eval')
    if not evaluate(start, state, evaluation.missing(cfg, run.tokens, start), log_line):
      return _interrupted(run, start, log_line)
    for done in range(start + 1, t.steps + 1):
      n_active = schedule.active_heads(cfg, done - 1)
      step = step_of(n_active, done - 1, log_line)
      profile(done - 1, state)
      run.heartbeat()
      clock.at('data')
      batch = next(batches)
      clock.at('host')
      batch = sharding.put_batch(run.mesh, batch)
      state, values = step(state, batch, *run.step_args)
      clock.steps += 1
      clock.at('device')
      spike = spikes(done, values, log_line)
      if spike and t.skip_batches:
        return rollback.Spike(spike, done, log_line)
      last, stop = done == t.steps, run.stop()
      clock.at('host')
      if done % t.log_every == 0 or last:
        clock.at('device')
        values = metrics_lib.scalars(jax.device_get(values))
        clock.at('host')
        log.log_step(run, done, n_active, values, log_line)
        if values['consecutive_nonfinite'] >= t.max_nonfinite:
          log_line(
            f'{values["consecutive_nonfinite"]:.0f} consecutive steps were not finite'
            f' (--train.max_nonfinite={t.max_nonfinite}); stopped without saving'
          )
          _finish(run, done, 'diverged')
          return EXIT_DIVERGED
      due = last or (t.checkpoint_every and done % t.checkpoint_every == 0)
      wanted = evaluation.wanted(cfg, run.tokens, done)
      if due or stop or wanted:
        clock.at('device')
        jax.block_until_ready(state)  # or its time would count as checkpoint or eval

      # Save first: an evaluation may outlast the machine's grace period, and an
      # interrupted one is repeated at the next start.
      if due or stop:
        _save(run, done, state, skipped, spikes)
      if stop:
        return _interrupted(run, done, log_line)
      if wanted:
        clock.at('eval')
        if not evaluate(done, state, wanted, log_line):
          if not due:
            _save(run, done, state, skipped, spikes)
          return _interrupted(run, done, log_line)
      clock.at('host')
    clock.at('checkpoint')
    _wait_for_save(run)
    _finish(run, t.steps, 'finished')
  return 0


def _save(run: run_lib.Run, done: int, state, skipped, spikes: rollback.SpikeMonitor) -> None:
  run.clock.at('checkpoint')
  run_lib.check_held(run)
  if run.sinks and run.ledger:
    run.sinks.sync()
    run.ledger.sync()
  saver_lib.save(
    run.saver,
    done,
    state,
    run.cfg,
    store=run.tokens.fingerprint,
    skipped_batches=skipped,
    spikes=spikes.state(),
  )


def _interrupted(run: run_lib.Run, done: int, log_line) -> int:
  run.clock.at('checkpoint')
  _wait_for_save(run)
  log_line(f'interrupted: saved step {done}; run the same command to resume')
  _finish(run, done, 'interrupted')
  return EXIT_INTERRUPTED


def _wait_for_save(run: run_lib.Run) -> None:
  """Waits for the save of the last step; raises ConfigError if it failed."""
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
  print(
    f'initialized from {source.workdir}, step {source.step}: {init_from.described(source.was, cfg)}'
  )
  return state_lib.init(cfg, mesh, (old, source.was))


def _compiler(run: run_lib.Run, abstract):
  """Returns (n_active, steps done, log_line) -> compiled step: one compilation per
  number of active heads. Its bytes per device are written to goodput.jsonl: they
  may differ between sessions, and metrics.jsonl must not."""
  cfg, steps = run.cfg, {}
  train = run.tokens.train()
  of_teacher = run.teacher.cfg if run.teacher else train.teacher_top_k or None

  def step_of(n_active, done, log_line):
    if n_active not in steps:
      run.heartbeat()
      run.clock.at('compile')
      begin = time.perf_counter()
      traced = step_lib.trace(cfg, run.mesh, n_active, train.masked, of_teacher)
      steps[n_active] = traced.lower().compile()
      memory = steps[n_active].memory_analysis()
      log_line(
        f'compiled the step with {n_active} heads in'
        f' {time.perf_counter() - begin:.1f} s'
        + (
          f'; temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB per device' if memory else ''
        )
      )
      distributed.barrier('compiled')  # or its wait would count as the first step
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
  """Disallows implicit transfers between host and device, which would block."""
  return jax.transfer_guard('disallow')
