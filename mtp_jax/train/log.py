"""Log lines of a run: its setup, its steps, and stragglers among processes."""

import statistics

import jax

from mtp_jax.config import kernels
from mtp_jax.model import flops, heads, lm, params
from mtp_jax.parallel import chips, distributed
from mtp_jax.train import metrics
from mtp_jax.train import run as run_lib

STRAGGLER_FRACTION = 0.3  # of the time; above it a straggler is logged


def _log_stragglers(run: run_lib.Run, waited: float, worked: float, log_line) -> None:
  """Logs the process that the others wait for, because of its data or its host.
  While a straggler's host is at work, the other hosts wait for their devices,
  which wait for the straggler's."""
  n = jax.process_count()
  waits, works = distributed.process_allgather(waited), distributed.process_allgather(worked)
  most = max(range(n), key=waits.__getitem__)
  if waits[most] > STRAGGLER_FRACTION:
    log_line(
      f'{f"process {most} of {n}" if n > 1 else "the run"} waits for data'
      f' {waits[most]:.0%} of the time: a slow disk, or'
      f' --data.read_threads={run.cfg.data.read_threads} too few'
    )
  straggler = max(range(n), key=works.__getitem__)
  if works[straggler] > STRAGGLER_FRACTION + statistics.median_low(works):
    log_line(
      f'process {straggler} of {n} is a straggler: at work {works[straggler]:.0%}'
      f' of the time, others {statistics.median_low(works):.0%}'
    )


def log_step(run, done, n_active, values, log_line):
  cfg = run.cfg
  step_time_s, waited, worked = run.clock.lap()
  tokens_per_s = cfg.data.batch_size * cfg.data.seq_len / step_time_s
  flops_per_s = tokens_per_s * flops.flops_per_token(
    cfg, n_active, teacher=run.teacher and run.teacher.cfg
  )
  values |= dict(
    step_time_s=step_time_s,
    tokens_per_s=tokens_per_s,
    model_flops_per_s=flops_per_s,
    time_left_s=step_time_s * (cfg.train.steps - done),
  )
  chip = chips.chip(jax.devices()[0].device_kind)
  if chip:
    values['mfu'] = flops_per_s / (chip.flops_per_s * run.mesh.size)
  values['data_wait_frac'] = waited
  run_lib.write_record(run, 'train', done, values)
  log_line(metrics.line(done, cfg.train.steps, values), done)
  _log_stragglers(run, waited, worked, log_line)
  if run.ledger:
    run.ledger.write(done, run.clock)


def log_setup(run: run_lib.Run, abstract, start: int) -> None:
  cfg, specs = run.cfg, lm.specs(run.cfg)
  split = cfg.eval.split
  for source in run.tokens.sources:
    if split not in source.store.splits:
      print(f'{source.ref.name} has no {split} split: excluded from evaluation')
  trunk, head, ends = (
    params.count(tree)
    for tree in (
      specs.trunk,
      (specs.heads, specs.markov, specs.confidence),
      (specs.embed, specs.unembed, specs.order),
    )
  )
  held = params.bytes_per_device(abstract.params)
  moments = params.bytes_per_device(abstract.opt_state)
  axes = ' x '.join(f'{a}={s}' for a, s in run.mesh.shape.items())
  tokens = cfg.data.batch_size * cfg.data.seq_len
  kind = jax.devices()[0].device_kind
  shares = not cfg.heads.isolated and cfg.train.freeze == 'none'
  if cfg.loss.compares and cfg.heads.n > 1 and shares:
    print(
      f'--loss.head_loss={cfg.loss.head_loss}: gradients of heads >= 2 reach the trunk, and make'
      ' head 1 worse; --heads.isolated or --train.freeze=trunk stops them'
    )
  if cfg.train.freeze == 'trunk' and cfg.heads.block_first:
    print(
      f'head 1 of the {cfg.heads.family} family is a layer of its own and is'
      ' trained, not frozen; with modules beside the trunk (linear, residual,'
      ' sequential, recursive) the next-token logits would not change'
    )
  if run.teacher is not None:
    of_teacher = params.bytes_per_device(run.teacher.params)
    print(
      f'teacher {cfg.loss.teacher}: {params.count(run.teacher.params):,} parameters,'
      f' {of_teacher / 2**20:.1f} MiB per device'
    )
  for line in kernels.fallbacks(cfg, run.mesh.devices.flat[0].platform):
    print(line)
  print(
    f'parameters {params.count(specs):,}: trunk {trunk:,}'
    f' ({heads.trunk_layers(cfg)} layers), {cfg.heads.n} {cfg.heads.family}'
    f' heads {head:,}, embeddings {ends:,}\n'
    f'per device: parameters {held / 2**20:.1f} MiB, optimizer state'
    f' {moments / 2**20:.1f} MiB; {run.mesh.size} x {kind}, mesh {axes}\n'
    f'{tokens:,} tokens per step ({cfg.data.batch_size} windows of'
    f' {cfg.data.seq_len}, {cfg.train.grad_accum_steps} micro-batches);'
    f' step {start} of {cfg.train.steps}, {cfg.train.steps - start} remaining\n'
    f'writing to {cfg.train.workdir}',
    flush=True,
  )
