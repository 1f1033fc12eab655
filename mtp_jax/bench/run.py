"""Benchmarks the loss, the training step and the data loader."""

import dataclasses
import math
import platform
import statistics

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from mtp_jax.bench import timing
from mtp_jax.checkpoint import teacher as teacher_lib
from mtp_jax.config import schema, validate
from mtp_jax.losses import backward, multi_token, targets
from mtp_jax.model import attention, block, flops, heads, lm, params
from mtp_jax.parallel import chips, sharding
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib

READ_TOKENS = 2**18  # per measurement of the loader, to amortize its start


def run(cfg: schema.CommandConfig, what: str) -> tuple[list[str], dict]:
  """Measures the loss, the step or the data loader; returns lines to print, and the
  same as a JSON-able dict."""
  mesh = sharding.make_mesh(cfg)
  sharding.check_batch(cfg, mesh.shape)
  with jax.set_mesh(mesh):
    lines, values = {'loss': _loss, 'step': _step, 'data': _data}[what](cfg, mesh)
  about = _about(what, cfg, mesh)
  m = cfg.model
  head = (
    f'{what} on {mesh.size} x {about["device_kind"]}, jax'
    f' {jax.__version__}: {cfg.heads.family} heads, d {m.d_model},'
    f' {m.n_layers} layers, V {m.vocab_size:,}, T {cfg.data.seq_len:,},'
    f' {cfg.data.batch_size} rows, {m.compute_dtype}'
  )
  if what != 'data' and cfg.loss.compares:
    head += f', head_loss {cfg.loss.head_loss}'
    head += f' of teacher {cfg.loss.teacher}' * bool(cfg.loss.teacher)
  return [head, *lines], about | values


def _about(what, cfg, mesh) -> dict:
  return dict(
    what=what,
    device_kind=mesh.devices.flat[0].device_kind,
    platform=mesh.devices.flat[0].platform,
    mesh=dict(mesh.shape),
    versions=dict(
      jax=jax.__version__,
      jaxlib=jaxlib.__version__,  # pyright: ignore[reportPrivateImportUsage]
      python=platform.python_version(),
    ),
    config=dataclasses.asdict(cfg),
  )


def _key(cfg: schema.CommandConfig) -> tuple[str, int, int]:
  return cfg.loss.backward, cfg.loss.chunk_size, cfg.heads.n


def _row(
  cfg: schema.CommandConfig, first: schema.CommandConfig, seconds: timing.Seconds, memory
) -> dict:
  """Returns the values common to loss and step: a variant relative to the first
  number of heads, and to the first backward strategy and chunk."""
  schedule, chunk, n = key = _key(cfg)
  fewest = schedule, chunk, first.heads.n
  simplest = first.loss.backward, first.loss.chunk_size, n
  wall, cpu = seconds
  row = dict(
    n=n,
    schedule=schedule,
    chunk=chunk,
    time_s=statistics.median(wall[key]),
    over_first_n=timing.ratio(wall[key], wall[fewest]),
    over_first_schedule=timing.ratio(wall[key], wall[simplest]),
    temp_bytes=memory[key],
  )
  if cpu:
    row |= dict(
      cpu_over_first_n=timing.ratio(cpu[key], cpu[fewest]),
      cpu_over_first_schedule=timing.ratio(cpu[key], cpu[simplest]),
    )
  if memory[key]:
    row['temp_over_first_n'] = memory[key] / memory[fewest]
  return row


def _batch(cfg: schema.CommandConfig, mesh) -> dict:
  """Returns random tokens, with --bench.documents of equal length per row."""
  A, U = cfg.train.grad_accum_steps, cfg.data.seq_len + cfg.span
  shape = (A, cfg.data.batch_size // A, U)
  rng = np.random.default_rng(cfg.train.seed)
  tokens = rng.integers(0, cfg.model.vocab_size, shape, np.int32)
  position_U = np.arange(U, dtype=np.int32) % -(-U // cfg.bench.documents)
  position = np.broadcast_to(position_U, shape)
  batch = dict(tokens=tokens, position=position)
  if cfg.loss.reads_stored_teacher:  # equal probabilities of the first tokens, and of the rest
    queries, P = (*shape[:2], cfg.data.seq_len), cfg.data.teacher_top_k
    batch['teacher_ids'] = np.broadcast_to(np.arange(P, dtype=np.int32), (*queries, P))
    batch['teacher_logp'] = np.full((*queries, P + 1), -math.log(P + 1), np.float16)
  return sharding.put_batch(mesh, batch)


def _teacher(cfg: schema.CommandConfig, mesh):
  """Returns the teacher.Model of --loss.teacher; None without one."""
  source = teacher_lib.find(cfg, mesh.shape)
  return teacher_lib.load(source, mesh) if source else None


# The loss.


def loss_program(cfg: schema.CommandConfig, mesh, teacher=None):
  """Returns (args, compiled program) of the heads' loss of one micro-batch and its
  gradients with respect to all inputs of the heads, with the forward pass of a teacher.Model.
  Call under jax.set_mesh."""
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

    feeds = heads.family(cfg.heads).uses_next_token and cfg.heads.n > 1
    return backward.DiffInputs(
      modules=heads.active_modules(model.heads, cfg.heads.n, cfg.heads),
      z_BTD=states(T),
      emb_BUD=states(T + cfg.span) if feeds else None,
      norm_D=model.norm,
      unembed=model.embed if tied else model.unembed,
      order_VD=model.order,
      markov=model.markov,
      confidence_D=model.confidence,
      probe_K=jnp.zeros(cfg.heads.n),
    )

  def value(w: backward.DiffInputs, batch, teacher):
    batch = jax.tree.map(lambda x: x[0], batch)
    ctx = block.context(batch['position'][:, :T], cfg)
    compare = cfg.loss.compares
    counts = targets.counts(jax.tree.map(lambda x: x[None], batch), cfg, cfg.heads.n)
    weight_K = jnp.ones(cfg.heads.n)
    inputs = multi_token.nondiff_inputs(
      batch, ctx, counts, weight_K, compare=compare, cfg=cfg, teacher=teacher
    )
    return backward.STRATEGIES[cfg.loss.backward](w, inputs, cfg)

  key = jax.random.key(cfg.train.seed)
  args = jax.jit(weights)(key), batch, teacher
  compiled = jax.jit(jax.value_and_grad(value, has_aux=True)).lower(*args).compile()
  return args, compiled


def _loss(cfg: schema.CommandConfig, mesh) -> tuple[list[str], dict]:
  variants, groups, memory = validate.variants(cfg), [], {}
  teacher = _teacher(cfg, mesh)
  for c in variants:
    args, compiled = loss_program(c, mesh, teacher)
    memory[_key(c)] = timing.temp_bytes(compiled)

    def call(args, compiled=compiled):
      return args, compiled(*args)

    groups.append(timing.Group(lambda args=args: args, {_key(c): timing.Program(call)}))
  seconds = timing.measure(groups, cfg)
  rows = [_row(c, variants[0], seconds, memory) for c in variants]
  more = {'temp over first n': lambda r: f'{r.get("temp_over_first_n", 1):.3f}'}
  return timing.variants_table(rows, more), dict(
    rows=rows, device_peak_bytes=timing.device_peak(len(rows))
  )


# The step.


def _step_program(cfg: schema.CommandConfig, mesh, teacher=None) -> timing.Program:
  bytes_V = jax.device_put(
    np.ones(cfg.model.vocab_size, np.int32), jax.NamedSharding(mesh, jax.P())
  )
  batch = _batch(cfg, mesh)
  stored = cfg.data.teacher_top_k if cfg.loss.reads_stored_teacher else None
  traced = step_lib.trace(cfg, mesh, cfg.heads.n, teacher=teacher.cfg if teacher else stored)
  compiled = traced.lower().compile()
  args = (batch, bytes_V) if teacher is None else (batch, bytes_V, teacher)
  return timing.Program(lambda state: compiled(state, *args), timing.temp_bytes(compiled))


def _matmul(mesh, cfg: schema.CommandConfig) -> tuple[timing.Group, float]:
  """Returns a product of square matrices on one device, and its FLOPs, to measure
  the achievable peak."""
  device = mesh.devices.flat[0]
  side, times = (1024, 4) if device.platform == 'cpu' else (8192, 16)

  def multiply(x):
    return jax.lax.fori_loop(0, times, lambda _, y: (x @ y) / side**0.5, x)

  with jax.set_mesh(sharding.make_mesh(schema.Config(), [device])):
    x = jax.random.normal(jax.random.key(0), (side, side))
    x = x.astype(cfg.model.compute_dtype)
    compiled = jax.jit(multiply).lower(x).compile()
  group = timing.Group(lambda: x, {'matmul': timing.Program(lambda x: (x, compiled(x)))})
  return group, 2.0 * times * side**3


def _step(cfg: schema.CommandConfig, mesh) -> tuple[list[str], dict]:
  variants, teacher = validate.variants(cfg), _teacher(cfg, mesh)
  programs = {_key(c): _step_program(c, mesh, teacher) for c in variants}
  of_teacher = teacher and teacher.cfg
  groups = [
    timing.Group(
      lambda c=c: state_lib.init(c, mesh), {k: p for k, p in programs.items() if k[-1] == c.heads.n}
    )
    for c in {c.heads.n: c for c in variants}.values()
  ]
  multiplied, matmul_flops = _matmul(mesh, cfg)
  seconds = timing.measure([*groups, multiplied], cfg)
  matmul_s = statistics.median(seconds.wall['matmul'])
  matmul_flops_per_s = mesh.size * matmul_flops / matmul_s
  # Whether the kernel skips masked scores.
  causal = attention.chosen(cfg.model, cfg.data.seq_len) != 'reference'
  chip = chips.chip(mesh.devices.flat[0].device_kind)
  memory = {key: program.temp_bytes for key, program in programs.items()}
  tokens = cfg.data.batch_size * cfg.data.seq_len
  rows = []
  for c in variants:
    row = _row(c, variants[0], seconds, memory)
    (schedule, chunk, n), first_n = _key(c), variants[0].heads.n
    flops_ratio = flops.flops_per_token(c, n, causal, of_teacher) / flops.flops_per_token(
      variants[0], first_n, causal, of_teacher
    )
    tokens_per_s = tokens / row['time_s']
    flops_per_s = tokens_per_s * flops.flops_per_token(c, n, teacher=of_teacher)
    over_flops = {
      name: timing.ratio(times[_key(c)], times[schedule, chunk, first_n], flops_ratio)
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
  lines = timing.variants_table(
    rows,
    {
      'tokens/s': lambda r: f'{r["tokens_per_s"]:,.0f}',
      'MFU': lambda r: 'n/a' if r['mfu'] is None else f'{r["mfu"]:.1%}',
      'of matmul': lambda r: f'{r["of_matmul"]:.1%}',
      'FLOP ratio': lambda r: f'{r["flops_ratio"]:.3f}',
      'time over FLOPs': lambda r: timing.shown(r['time_over_flops']),
      'cpu over FLOPs': lambda r: timing.median(r, 'cpu_over_flops'),
    },
  )
  keys = 'T / 2 of T keys (causal)' if causal else 'all T keys (reference)'
  lines += [
    f'FLOP ratio: attention counted with {keys}; MFU and matmul: with T / 2',
    f'matrix product: {matmul_flops_per_s / 1e12:.3f} TFLOP/s',
  ]
  return lines, dict(
    rows=rows,
    flops_ratio_causal=causal,
    matmul_flops_per_s=matmul_flops_per_s,
    device_peak_bytes=timing.device_peak(len(rows)),
  )


# The loader.


def _data(cfg: schema.CommandConfig, mesh) -> tuple[list[str], dict]:
  from mtp_jax.data import batches as batches_lib  # only this benchmark reads a store

  corpus = batches_lib.open_tokens(cfg)
  tokens = cfg.data.batch_size * cfg.data.seq_len
  n_batches = max(1, math.ceil(READ_TOKENS / tokens))

  def read(start):
    batches = batches_lib.train_batches(corpus, cfg, start, mesh)
    for _ in range(n_batches):
      batch = next(batches)
    return start + n_batches, batch

  turns = iter(range(0, 2**62, n_batches * cfg.bench.iters))
  groups = [
    timing.Group(lambda: next(turns), {'loader': timing.Program(read)}),
    timing.Group(
      lambda: state_lib.init(cfg, mesh), {'step': _step_program(cfg, mesh, _teacher(cfg, mesh))}
    ),
  ]
  seconds = timing.measure(groups, cfg)
  loader, step = seconds.wall['loader'], seconds.wall['step']
  faster = timing.ratio(step, loader, 1 / n_batches)
  values = dict(
    n_batches=n_batches,
    loader_tokens_per_s=n_batches * tokens / statistics.median(loader),
    step_tokens_per_s=tokens / statistics.median(step),
    loader_over_step=faster,
  )
  return [
    f'loader: {values["loader_tokens_per_s"]:,.0f} tokens/s, over {n_batches} batches each',
    f'step: {values["step_tokens_per_s"]:,.0f} tokens/s with'
    f' {cfg.heads.n} heads, {cfg.loss.backward}',
    f'the loader is {timing.shown(faster)} times as fast as the step',
  ], values
