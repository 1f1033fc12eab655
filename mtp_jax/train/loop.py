"""The training run: everything that has an effect. Floor 5.

  take the workdir -> restore or make the state -> evaluate what is due there
  and not recorded -> for each step: batch, step, and at their cadence log line,
  checkpoint, evaluation.

A run writes WORKDIR/{run.flags, config.json, tokenizer/, metrics.jsonl,
tensorboard/, checkpoints/}, on a disk or on gs://. The position in the data is
the step, so a run that was stopped and resumed is, bit for bit, the run that
was not.
"""

import collections
import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.progress

from mtp_jax import checkpoint, chips, config, flops, params, paths, processes, sharding
from mtp_jax.data import corpus, loader
from mtp_jax.evals import heldout, registry
from mtp_jax.evals import suites as eval_suites
from mtp_jax.model import heads, lm
from mtp_jax.train import begin, goodput, lock, metrics, origin, spikes, suites, watchdog
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib

EXIT_INTERRUPTED = 75  # saved after SIGTERM or SIGINT; start it again to go on
EXIT_REPLACED = lock.Lost.status  # another run has taken the workdir
EXIT_DIVERGED = 76  # max_nonfinite steps in a row were not finite
MAX_BACK = 8  # times that a run goes back to one checkpoint
HELD_UP = 0.3  # of the time, by one process, is worth a line


def open_tokens(cfg: config.Config) -> corpus.Corpus:
  """The stores of a run, refused unless whole, and not of too many tokens."""
  tokens = corpus.open_corpus(cfg)
  tokenizer = tokens.tokenizer
  if tokenizer.vocab_size > cfg.model.vocab_size:
    raise config.ConfigError(
      'model.vocab_size',
      cfg.model.vocab_size,
      f'tokenizer {tokenizer.name} needs at least {tokenizer.vocab_size}',
    )
  return tokens


def check_same_store(tokens: corpus.Corpus, cfg: config.Config) -> None:
  """Each process may read copies of its own, but of the same stores."""
  wanted = processes.of_first(tokens.fingerprint_of_all)
  with processes.together():
    if tokens.fingerprint_of_all != wanted:
      raise config.ConfigError(
        'data.store',
        cfg.data.store,
        f'process {jax.process_index()} reads another store than process 0',
      )


def bytes_of_tokens(tokens: corpus.Corpus, cfg: config.Config, mesh):
  """UTF-8 bytes of each row of the vocabulary, on every device."""
  bytes_V = np.zeros(cfg.model.vocab_size, np.int32)
  bytes_V[: tokens.tokenizer.vocab_size] = tokens.tokenizer.token_bytes_V
  return jax.device_put(bytes_V, jax.NamedSharding(mesh, jax.P()))


def train_batches(
  tokens: corpus.Corpus,
  cfg: config.Config,
  start_step: int,
  mesh=None,
  left_out: loader.Ranges = (),
) -> Iterator[dict]:
  """Batches of each step from start_step on, endlessly, but for those that are
  left out; with a mesh, the rows of this process."""
  n_rows = cfg.data.batch_size // cfg.train.accumulate
  return loader.train_batches(
    tokens.train(),
    seq_len=cfg.data.seq_len,
    span=cfg.span,
    batch_size=cfg.data.batch_size,
    accumulate=cfg.train.accumulate,
    seed=cfg.train.seed,
    start_step=start_step,
    left_out=left_out,
    rows=sharding.local_rows(mesh, n_rows) if mesh else None,
    threads=cfg.data.read_threads,
  )


def eval_batches(tokens: corpus.Corpus, cfg: config.Config, mesh=None) -> dict[str, Iterator[dict]]:
  """Batches of each set to evaluate on, by name; with a mesh, the rows of this
  process. Every process has as many batches."""
  n_rows = cfg.data.batch_size // cfg.train.accumulate
  return {
    name: loader.eval_batches(
      split,
      seq_len=cfg.data.seq_len,
      span=cfg.span,
      batch_size=n_rows,
      limit=cfg.eval.batches * cfg.train.accumulate or None,
      rows=sharding.local_rows(mesh, n_rows) if mesh else None,
    )
    for name, split in tokens.held_out(cfg.eval.split).items()
  }


def train(cfg: config.Config) -> int:
  """Trains to --train.steps, from the newest checkpoint of the workdir if there
  is one. Returns the exit status."""
  clock = goodput.Clock()
  with processes.together():
    checkpoint.check_workdir(cfg.train.workdir)
    tokens = open_tokens(cfg)
    mesh = sharding.make_mesh(cfg)
    train_batches(tokens, cfg, 0, mesh)  # refuses what it cannot divide,
    eval_batches(tokens, cfg, mesh)  # and sets without a window
    suites.check(cfg)
  check_same_store(tokens, cfg)
  cfg = config.replace(cfg, **{'data.tokenizer': tokens.recorded})
  workdir = cfg.train.workdir
  # Before anything is written; a run that goes on has begun long ago.
  source = None if origin.newest(workdir) else origin.source(cfg)
  with contextlib.ExitStack() as stack:
    held = sinks = ledger = None  # but in the process that writes
    with processes.together():
      if processes.first():
        held = _take(workdir)
        stack.callback(held.release)
    newest = origin.start_step(cfg, tokens)
    start = newest or 0
    if newest == 0 and not source:  # all that came after an import is damaged
      source = origin.source(cfg)
    if start >= cfg.train.steps and not _missing(cfg, tokens, start):
      print(f'{workdir} is trained already, to step {start}')
      return 0
    with processes.together():
      if held:
        checkpoint.write_definition(cfg, tokens.tokenizer, workdir)
        sinks = metrics.Sinks(workdir, start)
        stack.callback(sinks.close)
        ledger = goodput.Ledger(workdir, start)
        stack.callback(ledger.close)
    stack.enter_context(jax.set_mesh(mesh))
    saver = checkpoint.Saver(workdir, cfg)
    stack.callback(saver.close)  # waits for the save that is under way
    stop = stack.enter_context(processes.Stop(mesh).on_signal())
    run = _Run(
      cfg,
      mesh,
      tokens,
      bytes_of_tokens(tokens, cfg, mesh),
      held,
      sinks,
      saver,
      stop,
      clock,
      ledger,
      stack.enter_context(watchdog.watchdog(cfg.train.watchdog_s)),
    )
    left_out = checkpoint.left_out(workdir, start) if start else ()
    back_to = collections.Counter()
    try:
      while True:
        batches = train_batches(tokens, cfg, start, mesh, left_out)
        ended = _loop(run, start, source, batches, left_out)
        if not isinstance(ended, _Spike):
          return ended
        run, start, left_out = _go_back(run, ended, left_out, stack)
        if not start and not source:  # of a run that was resumed
          source = origin.source(cfg)
        back_to[start] += 1
        if back_to[start] > MAX_BACK:
          print(f'went back {MAX_BACK} times; stopped at step {start}')
          return EXIT_DIVERGED
    except lock.Lost as error:
      print(f'mtp: {error}', file=sys.stderr)
      return EXIT_REPLACED


class _Run(NamedTuple):
  cfg: config.Config
  mesh: Any
  tokens: corpus.Corpus
  bytes_V: Any
  held: lock.Lock | None
  sinks: metrics.Sinks | None
  saver: Any
  stop: processes.Stop
  clock: goodput.Clock
  ledger: goodput.Ledger | None
  alive: Callable[[], None]  # the watchdog's


def _take(workdir: str) -> lock.Lock:
  try:
    paths.make_folder(workdir)
    return lock.Lock(workdir)
  except config.ConfigError:
    raise
  except Exception as error:  # of a bucket: of any class
    why = getattr(error, 'strerror', None) or paths.first_line(error)
    raise config.ConfigError('train.workdir', workdir, f'cannot write there: {why}') from error


class _Spike(NamedTuple):
  """A step whose loss was one, known when `done` steps were."""

  step: int
  done: int
  say: Callable


def _go_back(run: _Run, spike: _Spike, left_out, stack):
  """(run, step, left_out) with which to go on after a spike: from the newest
  checkpoint before it, without the batches that led there.

  Of those at the run's cadence: a checkpoint of an interruption would make what
  follows depend on when a signal came.
  """
  cfg, workdir = run.cfg, run.cfg.train.workdir
  batch = loader.index_of(spike.step - 1, left_out)
  first = max(0, batch + 1 - cfg.train.skip_batches)
  left_out = loader.leave_out(left_out, first, batch)
  run.saver.wait_until_finished()
  _check_held(run)
  start = origin.newest_good(
    workdir, lambda step: step < spike.step and checkpoint.is_at_cadence(step, cfg.train)
  )
  if not start and spike.step > (cfg.train.checkpoint_every or cfg.train.steps):
    # Of a run that had another cadence before.
    start = origin.newest_good(workdir, lambda step: step < spike.step)
  with processes.together():
    for step in checkpoint.steps(workdir) if processes.first() else ():
      if step > start:
        checkpoint.set_aside(workdir, step, 'spike')
  spike.say(f'goes back to step {start}; batches {first} to {batch} of the order are left out')
  saver = checkpoint.Saver(workdir, cfg)
  stack.callback(saver.close)
  run = run._replace(saver=saver)
  if run.sinks:
    run.ledger.write(spike.done, run.clock, 'went back', left_out=[first, batch])
    run.sinks.close()
    run.ledger.close()
    run = run._replace(sinks=metrics.Sinks(workdir, start), ledger=goodput.Ledger(workdir, start))
    stack.callback(run.sinks.close)
    stack.callback(run.ledger.close)
  return run._replace(clock=goodput.Clock()), start, left_out


def _loop(run: _Run, start: int, source, batches: Iterator[dict], left_out) -> int | _Spike:
  cfg, t = run.cfg, run.cfg.train
  abstract = state_lib.abstract(cfg, run.mesh)
  if start:
    state = checkpoint.restore(t.workdir, start, abstract)
  else:
    state = _first_state(cfg, run.mesh, source)
  _say_what(run, abstract, start)
  step_of = _compiler(run, abstract)
  evaluate = _evaluations(run)
  clock = run.clock
  spikes = _Spikes(run, checkpoint.spikes(t.workdir, start) if start else {})
  with _progress(start, t.steps) as say, _profile(cfg) as profile, _transfers_are_explicit():
    clock.at('eval')
    if not evaluate(start, state, _missing(cfg, run.tokens, start), say):
      return _interrupted(run, start, say)
    for done in range(start + 1, t.steps + 1):
      n_active = config.active_heads(cfg, done - 1)
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
        return _Spike(spike, done, say)
      last, stop = done == t.steps, run.stop()
      clock.at('host')
      if done % t.log_every == 0 or last:
        clock.at('device')
        values = metrics.scalars(jax.device_get(values))
        clock.at('host')
        _log(run, done, n_active, values, say)
        if values['skipped_in_a_row'] >= t.max_nonfinite:
          say(
            f'{values["skipped_in_a_row"]:.0f} steps in a row were not finite'
            f' (--train.max_nonfinite={t.max_nonfinite}); stopped, unsaved'
          )
          _end(run, done, 'diverged')
          return EXIT_DIVERGED
      due = last or (t.checkpoint_every and done % t.checkpoint_every == 0)
      wanted = _wanted(cfg, run.tokens, done)
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
    _end(run, t.steps, 'finished')
  return 0


def _save(run: _Run, done: int, state, left_out, spikes: '_Spikes') -> None:
  run.clock.at('checkpoint')
  _check_held(run)
  if run.sinks:
    run.sinks.sync()
    run.ledger.sync()
  checkpoint.save(run.saver, done, state, run.cfg, run.tokens.fingerprint, left_out, spikes.state())


def _interrupted(run: _Run, done: int, say) -> int:
  run.clock.at('checkpoint')
  _wait_for_save(run)
  say(f'interrupted: saved step {done}; run the same command to go on')
  _end(run, done, 'interrupted')
  return EXIT_INTERRUPTED


def _wait_for_save(run: _Run) -> None:
  """Of the last step; ConfigError if it could not be saved."""
  run.saver.wait_until_finished()
  with processes.together():
    run.saver.check()


def _end(run: _Run, done: int, how: str) -> None:
  run.clock.at('host')
  if run.ledger:
    run.ledger.write(done, run.clock, how)


def _first_state(cfg, mesh, source: origin.Source | None) -> state_lib.State:
  if not source:
    return state_lib.init(cfg, mesh)
  dtype = {'model.param_dtype': cfg.model.param_dtype}
  old = checkpoint.restore_model(
    source.workdir, source.step, config.replace(source.cfg, **dtype), mesh, 'train.init_from'
  )
  print(f'begins with {source.workdir}, step {source.step}: {begin.described(source.was, cfg)}')
  return state_lib.init(cfg, mesh, (old, source.was))


def _compiler(run: _Run, abstract):
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
      processes.meet('compiled')  # or the first step would wait, unsaid
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


class _Spikes:
  """Says and counts loss spikes: each step's loss is read when the next but one
  has been dispatched, so that nothing waits for it. Returns a spike's step.

  saved: what `state` of an earlier one returned; a run that was interrupted, or
  went back, sees what it would have seen.
  """

  LAG = 2

  def __init__(self, run: _Run, saved: dict):
    self._run = run
    self._spike = spikes.Detector(run.cfg.train.spike_sigma, saved.get('losses', ()))
    self._pending = collections.deque(map(tuple, saved.get('pending', ())))

  def __call__(self, done: int, values: dict, say) -> int | None:
    of_head_1 = values['loss_sum_K'], values['count_K']
    self._pending.append((done, of_head_1))
    if len(self._pending) <= self.LAG:
      return None
    step, loss = self._pending.popleft()
    loss = self._read(loss)
    if not self._spike(loss):
      return None
    say(f'step {step}: head 1 {loss:.4f} is a loss spike')
    if self._run.ledger:
      self._run.ledger.write(done, self._run.clock, spike=step, loss=loss)
    return step

  @staticmethod
  def _read(loss) -> float | None:
    """Of a step's sums on the devices, or as it was saved."""
    if not isinstance(loss, tuple):
      return loss
    sum_K, count_K = jax.device_get(loss)
    return metrics.mean(sum_K[0], count_K[0])

  def state(self) -> dict:
    """All of it as JSON has it; waits for the steps that are under way."""
    self._pending = collections.deque((step, self._read(loss)) for step, loss in self._pending)
    # JSON has neither NaN nor infinity; a step of either is no spike.
    return dict(
      losses=list(self._spike.losses),
      pending=[
        [step, loss if loss is not None and math.isfinite(loss) else None]
        for step, loss in self._pending
      ],
    )


def _held_up(run: _Run, waited: float, worked: float, say) -> None:
  """Names the process that the others wait for: by its data, or by its host.
  While one host is at work alone, those of the others wait for their devices,
  which wait for its."""
  n = jax.process_count()
  waits, works = processes.of_each(waited), processes.of_each(worked)
  most = max(range(n), key=waits.__getitem__)
  if waits[most] > HELD_UP:
    say(
      f'{f"process {most} of {n}" if n > 1 else "the run"} waits for data'
      f' {waits[most]:.0%} of the time: a slow disk, or'
      f' --data.read_threads={run.cfg.data.read_threads} too few'
    )
  slow = max(range(n), key=works.__getitem__)
  if works[slow] > HELD_UP + statistics.median_low(works):
    say(
      f'process {slow} of {n} is a slow host: at work {works[slow]:.0%} of the'
      f' time, others {statistics.median_low(works):.0%}'
    )


def _log(run, done, n_active, values, say):
  cfg = run.cfg
  step_time_s, waited, worked = run.clock.lap()
  tokens_per_s = cfg.data.batch_size * cfg.data.seq_len / step_time_s
  flops_per_s = tokens_per_s * flops.flops_per_token(cfg, n_active)
  values |= dict(
    step_time_s=step_time_s,
    tokens_per_s=tokens_per_s,
    model_flops_per_s=flops_per_s,
    time_left_s=step_time_s * (cfg.train.steps - done),
  )
  chip = chips.chip(jax.devices()[0].device_kind)
  if chip:
    values['mfu'] = flops_per_s / (chip.flops_per_s * run.mesh.size)
  values['data_wait'] = waited
  _write(run, 'train', done, values)
  say(metrics.line(done, cfg.train.steps, values), done)
  _held_up(run, waited, worked, say)
  if run.ledger:
    run.ledger.write(done, run.clock)


def _check_held(run, closely=True):
  with processes.together():
    if run.held:
      run.held.check(closely)


def _write(run, kind, done, values, source=None):
  _check_held(run, closely=False)
  if run.sinks:
    run.sinks.write(kind, done, values, source)


def _due(cfg: config.Config, done: int) -> tuple[bool, bool]:
  """Whether held-out data, and the suites, are to be evaluated after `done`
  steps. Held-out data is a suite as well, if it is named as one."""
  t = cfg.train

  def at(every):
    return bool(done and every and done % every == 0) or done == t.steps

  suites_too = at(t.suite_every)
  names = {name for name, _ in registry.named(cfg)}
  return (at(t.eval_every) or (suites_too and registry.HELDOUT in names), suites_too)


def _wanted(cfg, tokens, done: int) -> list[tuple[str, str | None]]:
  """(kind, source) of the records that evaluations after `done` steps make."""
  held_out, suites_too = _due(cfg, done)
  found = []
  if held_out:
    sets = tokens.held_out(cfg.eval.split)
    alone = tokens.evaluates_itself_only(sets)
    found += [('eval', None if alone else name) for name in sets]
  if suites_too:
    found += [('suite', registry.label(*s)) for s in suites.named(cfg)]
  return found


def _missing(cfg, tokens, done: int) -> list[tuple[str, str | None]]:
  """Those of `_wanted` that are not in metrics.jsonl: a signal or a kill came
  between checkpoint and evaluation."""
  wanted, found = _wanted(cfg, tokens, done), ''
  if not wanted:
    return []
  with processes.together():
    if processes.first():
      found = json.dumps(metrics.recorded(cfg.train.workdir, done))
  found = {tuple(of) for of in json.loads(processes.of_first(found))}
  return [of for of in wanted if of not in found]


def _evaluations(run: _Run):
  """evaluate(done, state, wanted, say): makes the wanted records, of the state
  after so many steps. False if a signal broke it off; what is complete is
  recorded."""
  held_out = heldout.evaluator(run.cfg, run.mesh, run.bytes_V)

  def evaluate(done, state, wanted, say) -> bool:
    try:
      if any(kind == 'eval' for kind, _ in wanted):
        _evaluate(run, done, state, held_out, wanted, say)
      _ask_suites(run, done, state, wanted, say)
    except processes.Interrupted:
      return False
    return True

  return evaluate


def _evaluate(run, done, state, evaluate, wanted, say):
  sets = eval_batches(run.tokens, run.cfg, run.mesh)
  for name, batches in sets.items():
    source = None if run.tokens.evaluates_itself_only(sets) else name
    if ('eval', source) not in wanted:
      continue
    with run.stop.interrupting():
      values = metrics.scalars(evaluate(state.params, _fed(run, batches), done))
    _write(run, 'eval', done, values, source)
    say(f'held out{f" of {source}" if source else ""}, after step {done}:')
    for line in metrics.table(values):
      say('  ' + line)


def _ask_suites(run, done, state, wanted, say):
  def alive():
    run.alive()
    run.held.check(closely=False)  # one process: it is this one's

  for name, arg in suites.named(run.cfg):
    label = registry.label(name, arg)
    if ('suite', label) not in wanted:
      continue
    try:
      with run.stop.interrupting():
        result = suites.evaluate(
          name, arg, state.params, run.cfg, run.mesh, run.tokens.tokenizer, done, alive
        )
    except config.FileChanged:
      raise
    except config.ConfigError as error:  # not worth a run; the next start tries
      say(f'{label}, after step {done}: skipped: {error}')
      continue
    # Before the record, with which it would not be evaluated again.
    pages = eval_suites.write_pages(run.cfg.train.workdir, done, result.pages)
    # Also without a number: it was evaluated.
    _write(run, 'suite', done, result.scalars, label)
    say(f'{label}, after step {done}:')
    for line in [*result.lines, *pages]:
      say('  ' + line)


def _fed(run, batches):
  for batch in batches:
    run.alive()
    if processes.several():
      run.stop.check()  # all processes have as many batches
    yield batch


def _say_what(run: _Run, abstract, start: int) -> None:
  cfg, specs = run.cfg, lm.specs(run.cfg)
  split = cfg.eval.split
  for source in run.tokens.sources:
    if split not in source.store.splits:
      print(f'{source.ref.name} has no {split} split: not evaluated on')
  trunk, head, ends = (
    params.count(tree)
    for tree in (specs.trunk, specs.heads, (specs.embed, specs.unembed, specs.order))
  )
  held = params.bytes_per_device(abstract.params)
  moments = params.bytes_per_device(abstract.opt_state)
  axes = ' x '.join(f'{a}={s}' for a, s in run.mesh.shape.items())
  tokens = cfg.data.batch_size * cfg.data.seq_len
  kind = jax.devices()[0].device_kind
  if cfg.train.freeze == 'trunk' and cfg.heads.block_first:
    print(
      f'head 1 of the {cfg.heads.family} family is a layer of its own, which'
      ' trains; with modules beside the trunk (linear, residual, sequential,'
      ' recursive) the next token would stay as it is'
    )
  print(
    f'parameters {params.count(specs):,}: trunk {trunk:,}'
    f' ({heads.trunk_layers(cfg)} layers), {cfg.heads.n} {cfg.heads.family}'
    f' heads {head:,}, embeddings {ends:,}\n'
    f'per device: parameters {held / 2**20:.1f} MiB, optimizer state'
    f' {moments / 2**20:.1f} MiB; {run.mesh.size} x {kind}, mesh {axes}\n'
    f'{tokens:,} tokens a step ({cfg.data.batch_size} windows of'
    f' {cfg.data.seq_len}, {cfg.train.accumulate} micro-batches);'
    f' step {start} of {cfg.train.steps}, {cfg.train.steps - start} to go\n'
    f'writing to {cfg.train.workdir}',
    flush=True,
  )


@contextlib.contextmanager
def _progress(start: int, steps: int):
  """say(text, step=None): a bar at a terminal, plain lines elsewhere."""
  if not sys.stdout.isatty():
    yield lambda text, step=None: print(text, flush=True)
    return
  with rich.progress.Progress(
    *rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn()
  ) as bar:
    task = bar.add_task('training', total=steps, completed=start)

    def say(text, step=None):
      bar.console.print(text, markup=False, highlight=False)
      if step:
        bar.update(task, completed=step)

    yield say


def _transfers_are_explicit():
  """A hidden copy between host and device would wait for the device."""
  return jax.transfer_guard('disallow')


@contextlib.contextmanager
def _profile(cfg: config.Config):
  """at(step, state), called before each step, traces those of the profile; a
  run that begins or ends among them traces what it has of them."""
  t, tracing = cfg.train, False
  n_steps = t.profile_steps if processes.first() else 0
  wanted = range(t.profile_start, t.profile_start + n_steps)

  def at(step, state):
    nonlocal tracing
    if tracing and step not in wanted:
      jax.block_until_ready(state)  # dispatched is not yet done
      jax.profiler.stop_trace()
    elif not tracing and step in wanted:
      jax.profiler.start_trace(folder)
    tracing = step in wanted

  with paths.local(os.path.join(t.workdir, 'profile')) as folder:
    try:
      yield at
    finally:
      if tracing:
        jax.profiler.stop_trace()
