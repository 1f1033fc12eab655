"""The training step: model FLOPs utilization, memory, and time by number of heads.

Each program is compiled once; what `mtp plan` predicts is read from the same program. Times
are medians of interleaved rounds, and the states of two numbers of heads are never in memory
at the same time.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from mtp_jax.bench import timing
from mtp_jax.config import schema
from mtp_jax.losses import cross_entropy
from mtp_jax.model import flops, params
from mtp_jax.parallel import chips, sharding
from mtp_jax.planning import ahead, analytic, hlo
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib
from tests.hardware import report, session

LARGEST = '1.3b'
SIZES = (LARGEST, '0.6b', '0.3b', '100m', '30m')  # the largest that fits the memory
FILL = 0.85  # of the memory by the analytic estimate
FULL = ('--data.seq_len=4096', '--data.batch_size=8', '--loss.chunk_size=1024')
TINY = (
  *('--model.d_model=32', '--model.n_layers=5', '--model.n_attn_heads=2', '--model.d_ff=48'),
  *('--model.vocab_size=64', '--model.remat=none', '--data.seq_len=128', '--data.batch_size=2'),
)
MFU, AIM, OVER_FLOPS, FLAT = 0.5, 0.6, 1.03, 1.25


class Options(NamedTuple):
  """What a part measures."""

  heads: tuple[int, ...] = (1, 4, 2)  # in the order of measurement, the first being the base
  backward: str = 'interleaved'
  documents: int = 1  # per row
  size: str = ''  # '' = the largest that fits
  has_bars: bool = True

  def name(self, size: str) -> str:
    """Returns the start of the names of its figures."""
    documents = f', {self.documents} documents per row' if self.documents > 1 else ''
    return f'step of {size}, {self.backward}{documents}'


class Compiled(NamedTuple):
  """The step of one number of heads."""

  cfg: schema.CommandConfig
  mesh: jax.sharding.Mesh
  program: timing.Program
  plan: ahead.Plan
  init: Callable[[], state_lib.State]  # compiled once, unlike state.init

  @property
  def predicted_s(self) -> float | None:
    """Seconds per step by the plan: its estimate, or else the roofline, of computation alone
    where the memory traffic is not known."""
    plan = self.plan
    if plan.chip is None or plan.executed_flops is None:
      return None
    return plan.estimated_s or max(
      plan.executed_flops / plan.chip.flops_per_s, *plan.roofline().values()
    )

  def mfu(self, seconds: float | None) -> float | None:
    """Returns the share of the chip's peak; None for an unknown chip."""
    if seconds is None or self.plan.chip is None:
      return None
    return self.plan.model_flops / seconds / self.plan.chip.flops_per_s


def run(work: session.Session, options: Options) -> None:
  """Measures each number of heads, and then all of them in interleaved rounds."""
  size = options.size or largest(work)
  if work.is_tiny and options.size:
    size = f'tiny for {size}'
  steps: dict[int, Compiled] = {}
  expected_s = 75.0
  most = 2 if options.has_bars else 1
  for n in options.heads[:most] if work.is_tiny else options.heads:
    begin = time.monotonic()
    add = functools.partial(_add, work, options, size, n, steps)
    if work.attempt(f'{options.name(size)}, n = {n}', expected_s, add):
      expected_s = 1.1 * (time.monotonic() - begin)
  if len(steps) > 1:
    rounds = functools.partial(_in_rounds, work, options, size, steps)
    work.attempt(f'{options.name(size)}, in rounds', 15, rounds)


def largest(work: session.Session) -> str:
  """Returns the largest size whose step with n = 4 fits, by the analytic estimate."""
  if work.is_tiny:
    return 'tiny'
  limit = work.memory_bytes
  if limit is None:
    return SIZES[-1]
  any_chip = work.chip or chips.Chip(*5 * [1.0])  # its peaks do not affect bytes
  for size in SIZES:
    cfg = config(work, Options(), size, 4)
    found = analytic.estimate(cfg, dict(data=1, fsdp=1, tensor=1), any_chip)
    if found.total_bytes < FILL * limit:
      return size
  return SIZES[-1]


def config(work: session.Session, options: Options, size: str, n: int) -> schema.CommandConfig:
  """Returns the Config of a size and a number of heads."""
  model = TINY if work.is_tiny else (session.size_flags(size), *FULL)
  rounds = ('--bench.rounds=2',) if work.is_tiny else ('--bench.rounds=4', '--bench.iters=2')
  return work.config(*model, *rounds, f'--heads.n={n}', f'--loss.backward={options.backward}')


def rows(cfg: schema.Config, mesh, documents: int) -> dict:
  """Returns random tokens, with documents of equal length in each row."""
  shape = (1, cfg.data.batch_size, cfg.data.seq_len + cfg.span)
  tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, np.int32)
  position_U = np.arange(shape[-1], dtype=np.int32) % -(-shape[-1] // documents)
  return sharding.put_batch(mesh, dict(tokens=tokens, position=np.broadcast_to(position_U, shape)))


def compile_step(work: session.Session, cfg: schema.CommandConfig, documents: int) -> Compiled:
  """Compiles the step of cfg, and plans it from the same program, as ahead.plan does."""
  mesh = work.mesh(cfg)
  begin = time.perf_counter()
  with jax.set_mesh(mesh):
    traced = step_lib.trace(cfg, mesh, cfg.heads.n)
    compiled = traced.lower().compile()
    chunk = cross_entropy.chunk_size(cfg.data.batch_size, cfg.data.seq_len, cfg)
    of_program = functools.partial(
      flops.of_program, traced.jaxpr, cfg.data.seq_len, flops.window_shares(cfg)
    )
    executed, of_kernels = of_program(), of_program(kernels_only=True)
  abstract, memory = state_lib.abstract(cfg, mesh), compiled.memory_analysis()
  plan = ahead.Plan(
    cfg,
    dict(mesh.shape),
    work.device.device_kind,
    params_bytes=params.bytes_per_device(abstract.params),
    opt_state_bytes=params.bytes_per_device(abstract.opt_state),
    temp_bytes=memory and ahead.temp_bytes(memory, work.device.platform),
    code_bytes=memory.generated_code_size_in_bytes if memory else 0,
    held_bytes=memory and ahead.held_bytes(memory),
    chunk=chunk,
    compile_s=time.perf_counter() - begin,
    executed_flops=executed,
    kernel_flops=of_kernels,
    ledger=_ledger(compiled),
  )
  batch, bytes_V = rows(cfg, mesh, documents), np.ones(cfg.model.vocab_size, np.int32)
  bytes_V = jax.device_put(bytes_V, jax.NamedSharding(mesh, jax.P()))
  program = timing.Program(lambda state: compiled(state, batch, bytes_V))
  return Compiled(cfg, mesh, program, plan, _init(cfg, mesh))


def _init(cfg: schema.Config, mesh) -> Callable[[], state_lib.State]:
  make = state_lib.init_program(cfg, None)

  def init():
    with jax.set_mesh(mesh):
      return make(jax.random.key(cfg.train.seed), None)

  return init


def _ledger(compiled) -> hlo.Ledger | None:
  """Returns the memory traffic of a program; None where its HLO has what the ledger does not
  know: the rest of the plan remains valid."""
  try:
    return hlo.ledger(compiled.as_text())
  except Exception:  # of various types
    return None


def _group(step: Compiled) -> timing.Group:
  return timing.Group(step.init, {step.cfg.heads.n: step.program})


def _measure(steps: list[Compiled], **bench) -> dict[int, list[float]]:
  cfg = schema.replace(steps[0].cfg, **{f'bench.{k}': v for k, v in bench.items()})
  return timing.measure([_group(step) for step in steps], cfg).wall


def _add(work: session.Session, options: Options, size: str, n: int, steps) -> bool:
  """Compiles the step of n heads; records its memory and the time of one round."""
  step = compile_step(work, config(work, options, size, n), options.documents)
  base = steps.get(options.heads[0])
  if base and step.plan.temp_bytes and base.plan.temp_bytes:
    bar = report.Bar('at most', FLAT) if options.has_bars else None
    ratio = step.plan.temp_bytes / base.plan.temp_bytes
    name = f'{options.name(size)}: temporaries at n = {n} over n = {base.cfg.heads.n}'
    work.figure(name, ratio, 'ratio', bar=bar)
  _figures(work, options, size, step, _measure([step], rounds=1)[n])
  steps[n] = step
  if work.peak_bytes:
    work.figure(
      f'{options.name(size)}: peak memory of the process after n = {n}',
      work.peak_bytes,
      'bytes',
      predicted=step.plan.total_bytes,
      note='of all programs so far: the counter cannot be reset',
    )
  return True


def _figures(work, options: Options, size: str, step: Compiled, times: list[float]) -> None:
  """Records the time per step and MFU; replaces the figures of fewer rounds."""
  seconds, n, plan = statistics.median(times), step.cfg.heads.n, step.plan
  detail = dict(
    seconds=times,
    compile_s=plan.compile_s,
    temp_bytes=plan.temp_bytes,
    executed_flops=plan.executed_flops,
    model_flops=plan.model_flops,
    roofline=plan.roofline(),
    tokens_per_s=plan.tokens / seconds,
    rounds=len(times),
  )
  temp = '' if plan.temp_bytes is None else f', temporaries {plan.temp_bytes / 2**30:.2f} GiB'
  note = f'{len(times)} rounds, compiled in {plan.compile_s:.0f} s{temp}'
  name = f'{options.name(size)}, n = {n}'
  predicted = step.predicted_s
  work.figure(f'{name}: time', seconds, 's', predicted=predicted, note=note, detail=detail)
  mfu = step.mfu(seconds)
  bar = report.Bar('at least', MFU, note=f'aim {AIM:.0%}') if options.has_bars else None
  more = dict(bar=bar, predicted=step.mfu(predicted), is_judged=size == LARGEST)
  work.figure(f'{name}: MFU', mfu, 'share', **more)


def _in_rounds(work, options: Options, size: str, steps: dict[int, Compiled]) -> None:
  """Measures all n in interleaved rounds, for the ratios of their times."""
  times = _measure(list(steps.values()))
  base = options.heads[0]
  for n, step in steps.items():
    _figures(work, options, size, step, times[n])
  for n, step in steps.items():
    if n == base or base not in steps:
      continue
    by_flops = ratio_of_flops(step.cfg, steps[base].cfg)
    over = timing.ratio(times[n], times[base], by_flops)
    bar = report.Bar('at most', OVER_FLOPS) if options.has_bars and n == 4 else None
    both = step.predicted_s, steps[base].predicted_s
    predicted = both[0] / both[1] / by_flops if both[0] and both[1] else None
    work.figure(
      f'{options.name(size)}: time at n = {n} over n = {base}, over the FLOP ratio {by_flops:.3f}',
      over['median'],
      'ratio',
      bar=bar,
      predicted=predicted,
      note=f'{over["min"]:.3f} to {over["max"]:.3f}',
      detail=dict(rounds=over),
    )


def ratio_of_flops(cfg: schema.Config, base: schema.Config) -> float:
  """Returns the ratio of model FLOPs, with causal attention."""
  n, first_n = cfg.heads.n, base.heads.n
  return flops.flops_per_token(cfg, n) / flops.flops_per_token(base, first_n)
