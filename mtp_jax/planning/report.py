"""A plan as values and as lines of text."""

import jax

from mtp_jax.config import kernels
from mtp_jax.model import heads, lm, params
from mtp_jax.planning import ahead, analytic, hlo, nvidia, peak, profile, tpu


def values_of(plan: ahead.Plan) -> dict:
  """Returns a plan as flat values; bytes and FLOPs per device unless named otherwise."""
  cfg, chip = plan.cfg, plan.chip
  roofline = plan.roofline()
  by_formula = bool(unread(plan) and chip)
  if by_formula:
    roofline = analytic.check(plan).seconds
  step_s = max(roofline.values(), default=None)
  ledger = plan.ledger
  return dict(
    topology=cfg.plan.topology or None,
    slices=cfg.plan.slices,
    nodes=plan.nodes,
    device_kind=plan.device_kind,
    devices=plan.devices,
    mesh=plan.mesh,
    parameters=params.count(lm.specs(cfg)),
    heads=cfg.heads.n,
    family=cfg.heads.family,
    schedule=cfg.loss.backward,
    chunk=plan.chunk,
    remat=cfg.model.remat,
    seq_len=cfg.data.seq_len,
    batch_size=cfg.data.batch_size,
    micro_batches=cfg.train.grad_accum_steps,
    params_bytes=plan.params_bytes,
    opt_state_bytes=plan.opt_state_bytes,
    teacher_bytes=plan.teacher_bytes or None,
    temp_bytes=plan.temp_bytes,
    code_bytes=plan.code_bytes,
    held_bytes=plan.held_bytes,
    total_bytes=plan.total_bytes,
    hbm_bytes=chip.hbm_bytes if chip else None,
    usable_bytes=ahead.usable_bytes(plan.device_kind, plan.cfg),
    reserves=plan.reserves or None,
    fits=plan.fits,
    model_flops_per_token=plan.model_flops / plan.tokens,
    model_flops_per_step_all=plan.model_flops,
    executed_flops_per_step=plan.executed_flops,
    collectives=ledger.by_kind() if ledger else None,
    collectives_network_bytes=_network_bytes(ledger) if ledger else None,
    host_syncs=ledger.host_syncs if ledger and plan.per_node else None,
    largest_collectives=_largest(ledger) if ledger else None,
    memory_bytes_per_step=ledger.memory_bytes if ledger else None,
    estimated_cycles=(ledger.cycles or None) if ledger else None,
    estimated_s=plan.estimated_s,
    clock_hz=plan.clock,
    operations=[row._asdict() for row in profile.by_scope(ledger)]
    if ledger and cfg.plan.profile
    else None,
    peak_estimate_bytes=plan.peak.bytes if plan.peak else None,
    peak_buffers=plan.peak.largest() if plan.peak else None,
    roofline_s=roofline or None,
    roofline_by_formula=by_formula,
    step_s=step_s,
    tokens_per_s_all=plan.tokens / step_s if step_s else None,
    mfu=plan.model_flops / plan.devices / chip.flops_per_s / step_s if chip and step_s else None,
    steps=cfg.train.steps,
    tokens_all=plan.tokens * cfg.train.steps,
    days=step_s * cfg.train.steps / 86400 if step_s else None,
    compile_s=plan.compile_s,
  )


def _network_bytes(ledger: hlo.Ledger) -> dict[str, float]:
  """Returns the bytes per device and step that cross the network, by kind."""
  return {kind: ledger.sent_bytes(network=True, kind=kind) for kind in ledger.by_kind()}


def _largest(ledger: hlo.Ledger) -> list[dict]:
  """Returns the ten collectives that send most, with their op names."""
  found = sorted(ledger.collectives, key=lambda c: -c.sent_bytes)[:10]
  return [
    dict(
      kind=c.kind,
      devices=c.group,
      times=c.times,
      sent_bytes=c.sent_bytes,
      shapes=[list(a.dims) for a in c.arrays],
      name=c.op_name,
    )
    for c in found
  ]


def _estimate_lines(plan: ahead.Plan) -> list[str]:
  """Returns the compiler's estimate of a step."""
  if not (plan.ledger and plan.ledger.cycles):
    return []
  line = f"compiler's estimate: {plan.ledger.cycles / 1e6:,.1f} M cycles per step and device"
  if plan.estimated_s is None:
    return ['', f'{line}, without kernels; no time, as the clock is not calibrated']
  assert plan.chip
  mfu = plan.model_flops / plan.devices / plan.chip.flops_per_s / plan.estimated_s
  return [
    '',
    f'{line}; with attention kernels at {profile.KERNEL_EFFICIENCY:.0%} of the peak'
    f' {plan.estimated_s:.3g} s per step, {plan.tokens / plan.estimated_s:,.0f} tokens/s,'
    f' MFU {mfu:.1%}',
  ]


def unread(plan: ahead.Plan) -> bool:
  """Whether the program was compiled, but its text could not be parsed."""
  return (plan.code_bytes > 0 or plan.held_bytes is not None) and plan.ledger is None


def lines_of(plan: ahead.Plan) -> list[str]:
  """Returns a plan as lines of text."""
  cfg, v = plan.cfg, values_of(plan)
  where = cfg.plan.topology or 'local devices'
  if cfg.plan.slices > 1:
    where = f'{cfg.plan.slices} slices of {where}'
  if plan.nodes > 1:
    where += f', {plan.nodes} nodes of {plan.per_node}'
  axes = ' x '.join(f'{axis}={size}' for axis, size in plan.mesh.items())
  lines = [
    f'{where}: {plan.devices} x {plan.device_kind}, mesh {axes}',
    f'{v["parameters"]:,} parameters, {heads.trunk_layers(cfg)} trunk layers,'
    f' {cfg.heads.n} {cfg.heads.family} heads, loss {cfg.loss.backward}'
    f'{f" in chunks of {plan.chunk}" if plan.chunk else ""}, trunk remat'
    f' {cfg.model.remat}',
    f'{plan.tokens:,} tokens per step: {cfg.data.batch_size} windows of'
    f' {cfg.data.seq_len} in {cfg.train.grad_accum_steps} micro-batches',
    '',
  ]
  is_gpu = nvidia.is_gpu(plan.device_kind)
  if plan.temp_bytes is None:
    lines += [(nvidia if is_gpu else tpu).NO_COMPILER, '']
  platform = 'tpu' if plan.device_kind.startswith('TPU') else jax.devices()[0].platform
  platform = 'gpu' if is_gpu else platform
  if fallbacks := kernels.fallbacks(cfg, platform):
    lines += [*fallbacks, '']
  rows = [
    ('parameters', plan.params_bytes),
    ('optimizer state', plan.opt_state_bytes),
    ('teacher', plan.teacher_bytes or None),
    ('batch and layout padding', _beside_state(plan)),
    ('activations, gradients, temporaries', plan.temp_bytes),
    ('program', plan.code_bytes or None),
    ('total', plan.total_bytes),
    *_memory_rows(plan),
  ]
  lines += ['per device' + ' ' * 33 + 'GiB']
  lines += [f'  {name:36} {gib(n):>7}' for name, n in rows if n is not None]
  fits = {True: 'fits', False: 'DOES NOT FIT', None: 'unknown whether it fits'}
  lines += [f'  {fits[plan.fits]}', '']
  if plan.chip and sum(plan.reserves.values()) > plan.chip.hbm_bytes - v['usable_bytes']:
    lines[-1:] = [f'  lower {nvidia.FRACTION_VARIABLES[0]}: the reserves need more', '']
  lines += [
    f'model FLOPs: {v["model_flops_per_token"] / 1e9:.3f} GFLOP per token,'
    f' {plan.model_flops / 1e12:,.4g} TFLOP per step over all devices'
    ' (attention causal)'
  ]
  if plan.executed_flops:
    share = plan.executed_flops * plan.devices / plan.model_flops
    lines += [
      f'executed, recomputation included: {plan.executed_flops / 1e12:,.3g}'
      f' TFLOP per step and device, {share:.2f} times the model FLOPs'
    ]
  if plan.ledger:
    lines += ['', *_collective_lines(plan)]
    lines += [f'memory traffic per step and device: {plan.ledger.memory_bytes / 2**30:,.1f} GiB']
  if unread(plan):
    lines += [
      '',
      'the compiled program cannot be read here: no ledger, and the roofline is by formula',
    ]
  lines += _time_lines(v) + _estimate_lines(plan)
  if cfg.plan.profile and is_gpu:
    lines += ['the profile has no cycles: the compiler for NVIDIA GPUs estimates none']
  if cfg.plan.profile and plan.ledger and plan.ledger.cycles and plan.chip:
    lines += profile.lines(plan.ledger, plan.chip, plan.clock)
  if plan.peak:
    lines += peak.lines(plan.peak, plan.temp_bytes)
  if plan.compile_s is not None:
    lines += [f'compiled in {plan.compile_s:.0f} s']
  return lines


def _memory_rows(plan: ahead.Plan) -> list[tuple[str, float | None]]:
  """Returns the rows of a device's memory: what programs may have of it, and what a process
  needs beside that."""
  if not (plan.chip and nvidia.is_gpu(plan.device_kind)):
    return [('memory of the device', plan.chip and plan.chip.hbm_bytes)]
  usable = ahead.usable_bytes(plan.device_kind, plan.cfg) or 0.0
  return [
    (f'JAX allocates {usable / plan.chip.hbm_bytes:.3g} of {gib(plan.chip.hbm_bytes)}', usable),
    *((f'reserve beside it: {name}', n) for name, n in plan.reserves.items()),
  ]


def _collective_lines(plan: ahead.Plan) -> list[str]:
  """Returns the collectives by kind; with nodes or slices, what stays within one and what
  is sent between them."""
  assert plan.ledger
  whole = 'slice' if plan.cfg.plan.slices > 1 else 'node' if plan.nodes > 1 else ''
  title = f'collectives per step and device{"count":>15}'
  columns = f'MiB within a {whole}   MiB between {whole}s' if whole else '      MiB'
  lines = [f'{title} {columns}']
  for kind, row in plan.ledger.by_kind().items():
    sent = [row['sent_bytes']]
    if whole:
      network = plan.ledger.sent_bytes(network=True, kind=kind)
      sent = [row['sent_bytes'] - network, network]
    cells = ' '.join(f'{n / 2**20:{17 if whole else 9},.1f}' for n in sent)
    lines += [f'  {kind:36} {row["count"]:7,} {cells}']
  if plan.per_node:
    waits = 'waits for the host per step (conditionals, loops of unknown length)'
    lines += [f'{waits}: {plan.ledger.host_syncs:,}']
  return lines


def _beside_state(plan: ahead.Plan) -> float | None:
  """Returns the bytes of program arguments other than the state."""
  if plan.held_bytes is None:
    return None
  return max(plan.held_bytes - plan.state_bytes, 0)


def _time_lines(v) -> list[str]:
  if not v['step_s']:
    return []
  parts = ', '.join(f'{k} {s:.3g}' for k, s in v['roofline_s'].items() if s)
  return [
    '',
    f'roofline: {v["step_s"]:.3g} s per step, the largest of (seconds at peak) {parts}',
    f'  {v["tokens_per_s_all"]:,.0f} tokens/s over all devices, MFU {v["mfu"]:.1%} at best',
    f'  {v["steps"]:,} steps: {_count(v["tokens_all"])} tokens, {_time(v["days"])} at best',
  ]


def _count(n: float) -> str:
  for unit, size in ('T', 1e12), ('B', 1e9), ('M', 1e6):
    if n >= size:
      return f'{three_digits(n / size)}{unit}'
  return f'{n:,.0f}'


def _time(days: float) -> str:
  for unit, of_day in ('days', 1), ('hours', 24), ('minutes', 1440):
    if days * of_day >= 1:
      return f'{three_digits(days * of_day)} {unit}'
  return f'{three_digits(days * 86400)} seconds'


def three_digits(x: float) -> str:
  return f'{x:,.0f}' if x >= 999.5 else f'{x:.3g}'


def gib(n: float) -> str:
  return _short(n / 2**30)


def _short(x: float) -> str:
  """Formats with two decimals, or two significant digits below 0.1."""
  return f'{x:.2f}' if x >= 0.1 else f'{x:.2g}'
