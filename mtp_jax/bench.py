"""How fast and in how much memory: the loss, the step, the loader. Floor 5.

Programs are compiled first. Then each has its turn in every round, in one
process, so that whatever else the machine does falls on all of them alike; a
ratio is the median of the rounds' ratios, beside the smallest and largest of
them. Times of two runs of this program are not to be compared. Where the device
is a CPU, seconds of its cores are counted as well (`cpu`): they say what is
computed however many others share the cores, but not how well it is spread over
them.

Loss and step need neither a store nor the libraries that read one: their rows
are made up here.
"""

import dataclasses
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from mtp_jax import chips, config, flops, loss, params, sharding, targets, validate
from mtp_jax.model import attention, block, heads, lm
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib

READ_TOKENS = 2**18  # a turn of the loader, so that its start does not count


class Program(NamedTuple):
  """Something to be timed: args -> (args of the next call, results)."""

  call: Callable[[Any], tuple[Any, Any]]
  temp_bytes: int | None = None  # of one device


class Seconds(NamedTuple):
  """A call of each program, one number a round."""

  wall: dict[Any, list[float]]
  cpu: dict[Any, list[float]]  # of all cores; empty unless they are the device


class Group(NamedTuple):
  """Programs that take the same arguments, made before their turns and dropped
  after them: the states of two numbers of heads are never alive at once."""

  make: Callable[[], Any]
  programs: dict[Any, Program]


def run(cfg: config.Config) -> tuple[list[str], dict]:
  """(lines to print, the same as a JSON-able dict) of --bench.what."""
  mesh = sharding.make_mesh(cfg)
  with jax.set_mesh(mesh):
    lines, values = {'loss': _loss, 'step': _step, 'data': _data}[cfg.bench.what](cfg, mesh)
  about = _about(cfg, mesh)
  m = cfg.model
  head = (
    f'{cfg.bench.what} on {mesh.size} x {about["device_kind"]}, jax'
    f' {jax.__version__}: {cfg.heads.family} heads, d {m.d_model},'
    f' {m.n_layers} layers, V {m.vocab_size:,}, T {cfg.data.seq_len:,},'
    f' {cfg.data.batch_size} rows, {m.compute_dtype}'
  )
  return [head, *lines], about | values


def _about(cfg, mesh) -> dict:
  return dict(
    what=cfg.bench.what,
    device_kind=mesh.devices.flat[0].device_kind,
    platform=mesh.devices.flat[0].platform,
    mesh=dict(mesh.shape),
    versions=dict(jax=jax.__version__, jaxlib=jaxlib.__version__, python=platform.python_version()),
    config=dataclasses.asdict(cfg),
  )


# Timing.


def _turned(items: list, by: int) -> list:
  """The items from another one on each round: none is always the first."""
  by %= len(items)
  return items[by:] + items[:by]


def _measure(groups: list[Group], cfg: config.Config) -> Seconds:
  """The first round, in which everything is touched for the first time, is not
  kept."""
  seconds = Seconds({}, {})
  for r in range(cfg.bench.rounds + 1):
    for group in _turned(groups, r):
      args = group.make()
      for name, program in _turned(list(group.programs.items()), r):
        jax.block_until_ready(args)
        begin = time.perf_counter(), time.process_time()
        for _ in range(cfg.bench.calls):
          args, out = program.call(args)
        jax.block_until_ready((args, out))
        end = time.perf_counter(), time.process_time()
        for times, from_s, to_s in zip(seconds, begin, end, strict=True):
          times.setdefault(name, []).append((to_s - from_s) / cfg.bench.calls)
      del args, out
  on_cpu = jax.devices()[0].platform == 'cpu'
  wall, cpu = ({name: times[1:] for name, times in of_kind.items()} for of_kind in seconds)
  return Seconds(wall, cpu if on_cpu else {})


def ratio(times: list[float], others: list[float], by: float = 1.0) -> dict[str, float]:
  """Of the times of the same rounds, over `by`."""
  ratios = [a / b / by for a, b in zip(times, others, strict=True)]
  return dict(median=statistics.median(ratios), min=min(ratios), max=max(ratios))


def seconds(call: Callable[[], Any]) -> float:
  """That a call takes until its results are there."""
  begin = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - begin


def _key(cfg: config.Config) -> tuple[str, int, int]:
  return cfg.loss.schedule, cfg.loss.chunk, cfg.heads.n


def _row(cfg: config.Config, first: config.Config, seconds: Seconds, memory) -> dict:
  """What loss and step have in common: a variant beside the first number of
  heads, and beside the first schedule and chunk."""
  schedule, chunk, n = key = _key(cfg)
  fewest = schedule, chunk, first.heads.n
  simplest = first.loss.schedule, first.loss.chunk, n
  wall, cpu = seconds
  row = dict(
    n=n,
    schedule=schedule,
    chunk=chunk,
    time_s=statistics.median(wall[key]),
    over_first_n=ratio(wall[key], wall[fewest]),
    over_first_schedule=ratio(wall[key], wall[simplest]),
    temp_bytes=memory[key],
  )
  if cpu:
    row |= dict(
      cpu_over_first_n=ratio(cpu[key], cpu[fewest]),
      cpu_over_first_schedule=ratio(cpu[key], cpu[simplest]),
    )
  if memory[key]:
    row['temp_over_first_n'] = memory[key] / memory[fewest]
  return row


def _table(rows: list[dict], more: dict[str, Callable[[dict], str]]):
  columns = {
    'schedule': lambda r: r['schedule'],
    'chunk': lambda r: str(r['chunk']),
    'n': lambda r: str(r['n']),
    'ms': lambda r: f'{1e3 * r["time_s"]:.1f}',
    'over first n': lambda r: shown(r['over_first_n']),
    'over first schedule': lambda r: shown(r['over_first_schedule']),
    'cpu over n': lambda r: _median(r, 'cpu_over_first_n'),
    'cpu over schedule': lambda r: _median(r, 'cpu_over_first_schedule'),
    'temp MiB': lambda r: mib(r['temp_bytes']),
    **more,
  }
  return table(rows, columns)


def table(rows: list[dict], columns: dict[str, Callable[[dict], str]]):
  """Lines of a table, a column each, right-aligned."""
  cells = [list(columns), *([f(r) for f in columns.values()] for r in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return ['  '.join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells]


def shown(ratio: dict[str, float]) -> str:
  return f'{ratio["median"]:.3f} ({ratio["min"]:.3f}-{ratio["max"]:.3f})'


def _median(row: dict, name: str) -> str:
  return f'{row[name]["median"]:.3f}' if name in row else 'n/a'


def mib(n_bytes: int | None) -> str:
  return 'n/a' if n_bytes is None else f'{n_bytes / 2**20:.1f}'


def _temp_bytes(compiled) -> int | None:
  memory = compiled.memory_analysis()
  return memory.temp_size_in_bytes if memory else None


def _device_peak(n_programs: int) -> int | None:
  """Most bytes that a device held in this process, if it ran one program only:
  the counter cannot be reset."""
  stats = jax.local_devices()[0].memory_stats()
  return stats['peak_bytes_in_use'] if stats and n_programs == 1 else None


def _batch(cfg: config.Config, mesh) -> dict:
  """Random tokens, --bench.documents of equal length in each row."""
  A, U = cfg.train.accumulate, cfg.data.seq_len + cfg.span
  shape = (A, cfg.data.batch_size // A, U)
  rng = np.random.default_rng(cfg.train.seed)
  tokens = rng.integers(0, cfg.model.vocab_size, shape, np.int32)
  position_U = np.arange(U, dtype=np.int32) % -(-U // cfg.bench.documents)
  position = np.broadcast_to(position_U, shape)
  return sharding.put_batch(mesh, dict(tokens=tokens, position=position))


# The loss.


def loss_program(cfg: config.Config, mesh):
  """(make() -> args, compiled): the heads' loss of one micro-batch and its
  gradient by all that the heads read, z among them. Under jax.set_mesh."""
  specs = lm.specs(cfg)
  tied = cfg.heads.unembedding == 'tied'
  specs = specs.replace(trunk=None, embed=specs.embed if tied else None)
  T, D = cfg.data.seq_len, cfg.model.d_model
  held_dtype = jnp.promote_types(cfg.model.compute_dtype, cfg.loss.grad_dtype)
  residual = sharding.pspec('batch', None, None)
  batch = _batch(cfg, mesh)

  def weights(key):
    model = params.init(key, specs, cfg.model.param_dtype)

    def states(length):
      shape = (batch['tokens'].shape[1], length, D)
      return jax.random.normal(key, shape, held_dtype, out_sharding=residual)

    feeds = heads.family(cfg).feeds_tokens and cfg.heads.n > 1
    return loss.Weights(
      model.heads,
      states(T),
      states(T + cfg.span) if feeds else None,
      model.norm,
      model.embed if tied else model.unembed,
      model.order,
      jnp.zeros(cfg.heads.n),
    )

  def value(w: loss.Weights, batch):
    batch = jax.tree.map(lambda x: x[0], batch)
    targets_KBT, valid_KBT = targets.targets(batch, cfg)
    scale_K = 1 / jnp.maximum(jnp.sum(valid_KBT, axis=(1, 2)), 1)
    ordered = w.order_VD is not None
    rows = loss.Rows(
      jnp.arange(1, cfg.heads.n + 1),
      targets_KBT,
      valid_KBT,
      scale_K,
      batch['tokens'],
      targets.order(batch, cfg) if ordered else None,
      cfg.loss.order_weight * scale_K[0],
      block.context(batch['position'][:, :T], cfg),
    )
    return loss.SCHEDULES[cfg.loss.schedule](w, rows, cfg)

  key = jax.random.key(cfg.train.seed)
  args = jax.jit(weights)(key), batch
  compiled = jax.jit(jax.value_and_grad(value, has_aux=True)).lower(*args).compile()
  return args, compiled


def _loss(cfg: config.Config, mesh) -> tuple[list[str], dict]:
  variants, groups, memory = validate.variants(cfg), [], {}
  for c in variants:
    args, compiled = loss_program(c, mesh)
    memory[_key(c)] = _temp_bytes(compiled)

    def call(args, compiled=compiled):
      return args, compiled(*args)

    groups.append(Group(lambda args=args: args, {_key(c): Program(call)}))
  seconds = _measure(groups, cfg)
  rows = [_row(c, variants[0], seconds, memory) for c in variants]
  more = {'temp over first n': lambda r: f'{r.get("temp_over_first_n", 1):.3f}'}
  return _table(rows, more), dict(rows=rows, device_peak_bytes=_device_peak(len(rows)))


# The step.


def _step_program(cfg: config.Config, mesh) -> Program:
  bytes_V = jax.device_put(
    np.ones(cfg.model.vocab_size, np.int32), jax.NamedSharding(mesh, jax.P())
  )
  batch = _batch(cfg, mesh)
  compiled = step_lib.trace(cfg, mesh, cfg.heads.n).lower().compile()
  return Program(lambda state: compiled(state, batch, bytes_V), _temp_bytes(compiled))


def _matmul(mesh, cfg: config.Config) -> tuple[Group, float]:
  """Square matrices multiplied on one device, and their FLOPs: what it gives to
  a program that does nothing else."""
  device = mesh.devices.flat[0]
  side, times = (1024, 4) if device.platform == 'cpu' else (8192, 16)

  def multiply(x):
    return jax.lax.fori_loop(0, times, lambda _, y: (x @ y) / side**0.5, x)

  with jax.set_mesh(sharding.make_mesh(config.Config(), [device])):
    x = jax.random.normal(jax.random.key(0), (side, side))
    x = x.astype(cfg.model.compute_dtype)
    compiled = jax.jit(multiply).lower(x).compile()
  group = Group(lambda: x, {'matmul': Program(lambda x: (x, compiled(x)))})
  return group, 2.0 * times * side**3


def _step(cfg: config.Config, mesh) -> tuple[list[str], dict]:
  variants = validate.variants(cfg)
  programs = {_key(c): _step_program(c, mesh) for c in variants}
  groups = [
    Group(
      lambda c=c: state_lib.init(c, mesh), {k: p for k, p in programs.items() if k[-1] == c.heads.n}
    )
    for c in {c.heads.n: c for c in variants}.values()
  ]
  multiplied, matmul_flops = _matmul(mesh, cfg)
  seconds = _measure([*groups, multiplied], cfg)
  matmul_s = statistics.median(seconds.wall['matmul'])
  matmul_flops_per_s = mesh.size * matmul_flops / matmul_s
  # What a program multiplies that masks scores instead of skipping them.
  causal = attention.chosen(cfg) != 'reference'
  chip = chips.chip(mesh.devices.flat[0].device_kind)
  memory = {key: program.temp_bytes for key, program in programs.items()}
  tokens = cfg.data.batch_size * cfg.data.seq_len
  rows = []
  for c in variants:
    row = _row(c, variants[0], seconds, memory)
    (schedule, chunk, n), first_n = _key(c), variants[0].heads.n
    flops_ratio = flops.flops_per_token(c, n, causal) / flops.flops_per_token(
      variants[0], first_n, causal
    )
    tokens_per_s = tokens / row['time_s']
    flops_per_s = tokens_per_s * flops.flops_per_token(c, n)
    over_flops = {
      name: ratio(times[_key(c)], times[schedule, chunk, first_n], flops_ratio)
      for name, times in (('time_over_flops', seconds.wall), ('cpu_over_flops', seconds.cpu))
      if times
    }
    rows.append(
      row
      | over_flops
      | dict(
        tokens_per_s=tokens_per_s,
        model_flops_per_s=flops_per_s,
        mfu=flops_per_s / (chip.flops_per_s * mesh.size) if chip else None,
        of_matmul=flops_per_s / matmul_flops_per_s,
        flops_ratio=flops_ratio,
      )
    )
  lines = _table(
    rows,
    {
      'tokens/s': lambda r: f'{r["tokens_per_s"]:,.0f}',
      'MFU': lambda r: 'n/a' if r['mfu'] is None else f'{r["mfu"]:.1%}',
      'of matmul': lambda r: f'{r["of_matmul"]:.1%}',
      'FLOP ratio': lambda r: f'{r["flops_ratio"]:.3f}',
      'time over FLOPs': lambda r: shown(r['time_over_flops']),
      'cpu over FLOPs': lambda r: _median(r, 'cpu_over_flops'),
    },
  )
  keys = 'T / 2 of T keys (causal)' if causal else 'all T keys (reference)'
  lines += [
    f'FLOP ratio: attention counted with {keys}; MFU and matmul: with T / 2',
    f'a matrix product alone: {matmul_flops_per_s / 1e12:.3f} TFLOP/s',
  ]
  return lines, dict(
    rows=rows,
    flops_ratio_causal=causal,
    matmul_flops_per_s=matmul_flops_per_s,
    device_peak_bytes=_device_peak(len(rows)),
  )


# The loader.


def _data(cfg: config.Config, mesh) -> tuple[list[str], dict]:
  from mtp_jax.train import loop  # the only part that reads a store

  corpus = loop.open_tokens(cfg)
  tokens = cfg.data.batch_size * cfg.data.seq_len
  n_batches = max(1, math.ceil(READ_TOKENS / tokens))

  def read(start):
    batches = loop.train_batches(corpus, cfg, start, mesh)
    for _ in range(n_batches):
      batch = next(batches)
    return start + n_batches, batch

  turns = iter(range(0, 2**62, n_batches * cfg.bench.calls))
  groups = [
    Group(lambda: next(turns), {'loader': Program(read)}),
    Group(lambda: state_lib.init(cfg, mesh), {'step': _step_program(cfg, mesh)}),
  ]
  seconds = _measure(groups, cfg)
  loader, step = seconds.wall['loader'], seconds.wall['step']
  values = dict(
    n_batches=n_batches,
    loader_tokens_per_s=n_batches * tokens / statistics.median(loader),
    step_tokens_per_s=tokens / statistics.median(step),
    loader_over_step=ratio(step, loader, 1 / n_batches),
  )
  return [
    f'loader: {values["loader_tokens_per_s"]:,.0f} tokens/s, in turns of {n_batches} batches',
    f'step: {values["step_tokens_per_s"]:,.0f} tokens/s with'
    f' {cfg.heads.n} heads, {cfg.loss.schedule}',
    f'the loader gives {shown(values["loader_over_step"])} times what the step eats',
  ], values
