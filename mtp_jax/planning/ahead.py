"""Compiles the real train step ahead of time, for devices that need not be present."""

import functools
import re
import time
from typing import NamedTuple

import jax

from mtp_jax.config import fields, schema
from mtp_jax.losses import cross_entropy
from mtp_jax.losses import teacher as teacher_model
from mtp_jax.model import flops, params
from mtp_jax.parallel import chips, sharding
from mtp_jax.planning import hlo, nvidia, profile, tpu
from mtp_jax.planning import peak as peak_lib
from mtp_jax.train import state, step


class Plan(NamedTuple):
  """One configuration on one set of devices; bytes are per device."""

  cfg: schema.CommandConfig
  mesh: dict[str, int]
  device_kind: str
  params_bytes: int
  opt_state_bytes: int
  # None: not compiled. For a program that did not fit, what it would need.
  temp_bytes: float | None = None
  code_bytes: float = 0.0
  # State and batch in the compiled program, including layout padding.
  held_bytes: float | None = None
  refused: bool = False  # the compiler ran out of memory
  chunk: int = 0  # positions whose logits are live at the same time
  compile_s: float | None = None
  executed_flops: float | None = None  # per device and step
  ledger: hlo.Ledger | None = None
  kernel_flops: float = 0.0  # of executed_flops: those of attention kernels
  clock: float | None = None  # Hz, where the compiler's estimate is calibrated
  per_node: int = 0  # GPUs of a node; 0 = on a TPU
  peak: peak_lib.Peak | None = None  # temporaries, with --plan.profile
  teacher: schema.Config | None = None  # of the teacher.Model of --loss.teacher
  teacher_bytes: int = 0  # of its parameters

  @property
  def chip(self) -> chips.Chip | None:
    return chips.chip(self.device_kind)

  @property
  def devices(self) -> int:
    return self.mesh['data'] * self.mesh['fsdp'] * self.mesh['tensor']

  @property
  def state_bytes(self) -> int:
    return self.params_bytes + self.opt_state_bytes + self.teacher_bytes

  @property
  def total_bytes(self) -> float | None:
    if self.temp_bytes is None:
      return None
    held = self.state_bytes if self.held_bytes is None else self.held_bytes
    return held + self.temp_bytes + self.code_bytes

  @property
  def nodes(self) -> int:
    """Nodes of GPUs; 1 on a TPU."""
    return self.devices // self.per_node if self.per_node else 1

  @property
  def reserves(self) -> dict[str, float]:
    """Bytes that a process needs beside its program, by purpose, on a GPU."""
    if not nvidia.is_gpu(self.device_kind):
      return {}
    if self.ledger:
      communicators = len({c.members for c in self.ledger.collectives})
    else:  # of each axis that communicates, and of all devices
      communicators = sum(size > 1 for size in self.mesh.values())
      communicators += communicators > 1
    return nvidia.reserves(self.device_kind, self.per_node, communicators)

  @property
  def fits(self) -> bool | None:
    """None: unknown, without a compiler or the memory size of the chip."""
    usable = usable_bytes(self.device_kind, self.cfg)
    if self.refused:
      return False
    if self.chip is None or usable is None:
      return None
    if sum(self.reserves.values()) > self.chip.hbm_bytes - usable and self.reserves:
      return False
    if self.total_bytes is None:
      return False if self.state_bytes > usable else None
    return self.total_bytes <= usable

  @property
  def tokens(self) -> int:
    """Tokens per step, over all devices."""
    return self.cfg.data.batch_size * self.cfg.data.seq_len

  @property
  def model_flops(self) -> float:
    """Model FLOPs per step, over all devices, with causal attention."""
    return self.tokens * flops.flops_per_token(self.cfg, self.cfg.heads.n, teacher=self.teacher)

  @property
  def estimated_s(self) -> float | None:
    """Seconds per step by the compiler's cycles, and attention kernels at a stated share
    of the peak; None without a calibrated clock."""
    if self.ledger is None or self.chip is None or self.clock is None:
      return None
    kernels_s = self.kernel_flops / (profile.KERNEL_EFFICIENCY * self.chip.flops_per_s)
    return self.ledger.cycles / self.clock + kernels_s

  def roofline(self) -> dict[str, float]:
    """Seconds per step that each resource would take at its peak."""
    if self.ledger is None or self.chip is None:
      return {}
    assert self.executed_flops is not None  # as the ledger
    return dict(
      compute=self.executed_flops / self.chip.flops_per_s,
      memory=self.ledger.memory_bytes / self.chip.hbm_bytes_per_s,
      links=self.ledger.sent_bytes(network=False) / self.chip.link_bytes_per_s,
      network=self._reductions
      * self.ledger.sent_bytes(network=True)
      / self.chip.network_bytes_per_s,
    )

  @property
  def _reductions(self) -> float:
    """How often the bytes that the ledger has for the network cross it: in an all-reduce
    between slices each sends its summand once."""
    slices = self.cfg.plan.slices
    return 2 * (1 - 1 / slices) if slices > 1 else 1.0


def usable_bytes(device_kind: str, cfg: schema.CommandConfig) -> float | None:
  """Returns the memory of a device that programs may have: all of a TPU's, what JAX
  allocates of a GPU's, of one here by the environment of this process. None if it is unknown."""
  chip = chips.chip(device_kind)
  if chip is None or not nvidia.is_gpu(device_kind):
    return chip and chip.hbm_bytes
  return chip.hbm_bytes * nvidia.memory_fraction(bool(cfg.plan.topology))


def devices(cfg: schema.CommandConfig) -> list:
  """Returns the devices of --plan.topology, which needs its compiler but no TPU or GPU, or
  the local devices.

  Raises:
    ConfigError: an unknown topology.
  """
  if not cfg.plan.topology:
    return jax.devices()
  at = topology(cfg)
  return tpu.devices(at) if isinstance(at, tpu.Topology) else nvidia.devices(at)


def check_mesh(cfg: schema.CommandConfig) -> None:
  """Raises ConfigError if the mesh does not divide the devices or the model, without
  compiling."""
  if not has_compiler(cfg):
    of_shardings(cfg)
  else:
    sharding.check_batch(cfg, sharding.make_mesh(cfg, devices(cfg)).shape)


def topology(cfg: schema.CommandConfig) -> tpu.Topology | nvidia.Topology:
  """Returns --plan.topology, which must be given.

  Raises:
    ConfigError: an unknown or invalid topology, or GPUs with --plan.slices.
  """
  p = cfg.plan
  at = tpu.topology(p.topology, p.slices) or nvidia.topology(p.topology)
  if at is None:
    tpus, gpus = (' or '.join(names) for names in (tpu.TPUS, nvidia.GPUS))
    allowed = f'{tpus}, a colon, and e.g. 4x4 or 2x2x4; or {gpus}, a colon, and e.g. 8 or 2x8'
    raise fields.ConfigError('plan.topology', p.topology, allowed)
  if isinstance(at, nvidia.Topology) and p.slices > 1:
    raise fields.ConfigError(
      'plan.slices',
      p.slices,
      f'only TPUs have slices; --plan.topology={p.topology} takes nodes, as in h100:2x8',
    )
  return at


def gpus(cfg: schema.CommandConfig) -> nvidia.Topology | None:
  """Returns the GPUs of --plan.topology; None of TPUs, or none."""
  at = topology(cfg) if cfg.plan.topology else None
  return at if isinstance(at, nvidia.Topology) else None


def has_compiler(cfg: schema.CommandConfig) -> bool:
  """Whether the step of cfg can be compiled here: for --plan.topology by libtpu or the
  wheels of CUDA."""
  if not cfg.plan.topology:
    return True
  return nvidia.has_compiler() if gpus(cfg) else tpu.has_compiler()


def plan(cfg: schema.CommandConfig) -> Plan:
  """Compiles the step of cfg and reads its memory and cost."""
  if not has_compiler(cfg):
    return of_shardings(cfg)
  at, on = gpus(cfg), devices(cfg)
  mesh = sharding.make_mesh(cfg, on)
  sharding.check_batch(cfg, mesh.shape)
  found = _of_state(cfg, mesh, on[0].device_kind)
  if nvidia.is_gpu(found.device_kind):
    found = found._replace(per_node=at.per_node if at else jax.local_device_count())
  begin = time.perf_counter()
  with jax.set_mesh(mesh):
    stored = cfg.data.teacher_top_k if cfg.loss.reads_stored_teacher else None
    traced = step.trace(cfg, mesh, cfg.heads.n, teacher=found.teacher or stored)
    rows = cfg.data.batch_size // cfg.train.grad_accum_steps
    of_program = functools.partial(
      flops.of_program, traced.jaxpr, cfg.data.seq_len, flops.window_shares(cfg)
    )
    found = found._replace(
      executed_flops=of_program(),
      kernel_flops=of_program(kernels_only=True),
      chunk=cross_entropy.chunk_size(rows, cfg.data.seq_len, cfg),
    )
    try:
      compiled = traced.lower().compile(compiler_options=nvidia.compiler_options() if at else None)
    except jax.errors.JaxRuntimeError as error:
      needed = _needed(str(error))
      if needed is None:
        raise
      return found._replace(
        temp_bytes=needed(found), compile_s=time.perf_counter() - begin, refused=True
      )
  compile_s = time.perf_counter() - begin
  memory = compiled.memory_analysis()
  assert memory is not None
  return found._replace(
    temp_bytes=temp_bytes(memory, on[0].platform),
    code_bytes=memory.generated_code_size_in_bytes,
    held_bytes=held_bytes(memory),
    compile_s=compile_s,
    ledger=_ledger(compiled, found.per_node),
    peak=_peak(compiled) if cfg.plan.profile else None,
    clock=profile.clock(on) if cfg.plan.topology and not at else None,
  )


def held_bytes(memory) -> int:
  """Returns the bytes of a program's arguments and results."""
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.argument_size_in_bytes + results


def temp_bytes(memory, platform: str) -> int:
  """Returns the bytes of a program's temporaries.

  libtpu's temp_size_in_bytes is up to a third above what it allocates in HBM, which its
  dump of the buffer assignment has, and newer jaxlibs as total_allocation_bytes, arguments
  included.
  """
  allocated = getattr(memory, 'total_allocation_bytes', 0) if platform == 'tpu' else 0
  return allocated - held_bytes(memory) if allocated else memory.temp_size_in_bytes


def _ledger(compiled, per_node: int = 0) -> hlo.Ledger | None:
  """Returns the ledger of a program. None if jaxlib cannot parse the output of a newer
  libtpu (it is stricter about operands of an async-update, which programs for v5p
  have), or a trip count or what runs a collective is unknown: the rest of the plan
  remains valid."""
  try:
    return hlo.ledger(compiled.as_text(), per_node)
  except (jax.errors.JaxRuntimeError, ValueError):
    return None


def _peak(compiled) -> peak_lib.Peak | None:
  """Returns the temporaries at the peak of a program; None as `_ledger`."""
  try:
    return peak_lib.of_program(compiled.as_text())
  except (jax.errors.JaxRuntimeError, ValueError):
    return None


def of_shardings(cfg: schema.CommandConfig) -> Plan:
  """Returns the sharding-only estimate: the bytes of the state."""
  at = topology(cfg)
  mesh = sharding.abstract_mesh(cfg, at.devices)
  sharding.check_batch(cfg, mesh.shape)
  return _of_state(cfg, mesh, at.device_kind)._replace(per_node=at.per_node)


def _of_state(cfg, mesh, device_kind) -> Plan:
  abstract = state.abstract(cfg, mesh)
  teacher = teacher_of(cfg, mesh)
  of_teacher = teacher_model.abstract(teacher, mesh) if teacher else None
  return Plan(
    cfg,
    dict(mesh.shape),
    device_kind,
    params.bytes_per_device(abstract.params),
    params.bytes_per_device(abstract.opt_state),
    teacher=teacher,
    teacher_bytes=params.bytes_per_device(of_teacher),
  )


def teacher_of(cfg: schema.Config, mesh) -> schema.Config | None:
  """Returns the Config of the teacher.Model of --loss.teacher, from its metadata alone; None
  where the step has none."""
  if not cfg.loss.teacher or cfg.heads.n == 1:
    return None
  # A plan without a teacher needs no library of checkpoints.
  from mtp_jax.checkpoint import teacher as teacher_lib

  found = teacher_lib.find(cfg, mesh.shape, verify=False)
  return found and found.cfg


def _needed(error: str):
  """Parses from a compiler error how much memory a program would have needed; None
  if the error is not about memory. Returns a function of the Plan, since only some
  messages include the state."""
  temporaries = re.search(r'HLO temporaries \(([\d.]+[KMGT]?)\)', error)
  if temporaries:
    return lambda plan: _bytes(temporaries[1])
  used = re.search(r'Used ([\d.]+[KMGT]?) of ', error)
  if used:
    return lambda plan: max(_bytes(used[1]) - plan.state_bytes, 0)
  return None


def _bytes(text: str) -> float:
  unit = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  return float(text.rstrip('KMGT')) * unit.get(text[-1], 1)
