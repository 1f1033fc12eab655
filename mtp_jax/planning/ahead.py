"""The real train step, compiled for devices that need not be there. Floor 5."""

import importlib.util
import re
import time
from typing import NamedTuple

import jax

from mtp_jax.config import fields, schema
from mtp_jax.losses import cross_entropy
from mtp_jax.model import flops, params
from mtp_jax.parallel import chips, sharding
from mtp_jax.planning import hlo
from mtp_jax.train import state, step

NO_LIBTPU = (
  "the TPU compiler is not installed: pip install 'mtp_jax[tpu]';"
  ' below is what the shardings alone say, without activations'
)
GENERATIONS = {  # of --plan.topology -> as jax names the chip
  'v4': 'TPU v4',
  'v5e': 'TPU v5 lite',
  'v5p': 'TPU v5',
  'v6e': 'TPU v6 lite',
}


class Plan(NamedTuple):
  """One configuration on one set of devices; bytes are of one device."""

  cfg: schema.Config
  mesh: dict[str, int]
  device_kind: str
  params_bytes: int
  opt_state_bytes: int
  # None: not compiled. Of a program that did not fit: what it would need.
  temp_bytes: float | None = None
  code_bytes: float = 0.0
  # State and batch as the compiled program holds them, in tiles of the chip.
  held_bytes: float | None = None
  refused: bool = False  # by the compiler, for want of memory
  chunk: int = 0  # positions whose logits are alive at once
  compile_s: float | None = None
  executed_flops: float | None = None  # of one device, a step
  ledger: hlo.Ledger | None = None

  @property
  def chip(self) -> chips.Chip | None:
    return chips.chip(self.device_kind)

  @property
  def devices(self) -> int:
    return self.mesh['data'] * self.mesh['fsdp'] * self.mesh['tensor']

  @property
  def state_bytes(self) -> int:
    return self.params_bytes + self.opt_state_bytes

  @property
  def total_bytes(self) -> float | None:
    if self.temp_bytes is None:
      return None
    held = self.state_bytes if self.held_bytes is None else self.held_bytes
    return held + self.temp_bytes + self.code_bytes

  @property
  def fits(self) -> bool | None:
    """None: not known, for want of a compiler or of the memory's size."""
    if self.refused:
      return False
    if self.chip is None:
      return None
    if self.total_bytes is None:
      return False if self.state_bytes > self.chip.hbm_bytes else None
    return self.total_bytes <= self.chip.hbm_bytes

  @property
  def tokens(self) -> int:
    """Of a step, over all devices."""
    return self.cfg.data.batch_size * self.cfg.data.seq_len

  @property
  def model_flops(self) -> float:
    """Of a step, over all devices, attention causal."""
    return self.tokens * flops.flops_per_token(self.cfg, self.cfg.heads.n)

  def roofline(self) -> dict[str, float]:
    """Seconds of a step that each resource alone would take, at its peak."""
    if self.ledger is None or self.chip is None:
      return {}
    return dict(
      compute=self.executed_flops / self.chip.flops_per_s,
      memory=self.ledger.memory_bytes / self.chip.hbm_bytes_per_s,
      links=self.ledger.sent_bytes(network=False) / self.chip.link_bytes_per_s,
      # Slices reduce among themselves; what is sent is a summand, once.
      network=2
      * (1 - 1 / self.cfg.plan.slices)
      * self.ledger.sent_bytes(network=True)
      / self.chip.network_bytes_per_s,
    )


def devices(cfg: schema.Config) -> list:
  """Of --plan.topology, which needs libtpu but no TPU; else those here.

  Raises:
    ConfigError: there is no such topology.
  """
  p = cfg.plan
  if not p.topology:
    return jax.devices()
  chips.answer_libtpu()
  from jax.experimental import topologies

  several = dict(num_slices=p.slices) if p.slices > 1 else {}
  try:
    return topologies.get_topology_desc(p.topology, platform='tpu', **several).devices
  except Exception as error:  # of several types, by what is wrong
    raise fields.ConfigError(
      'plan.topology',
      p.topology,
      'e.g. v5e:4x4, v5p:4x4x4 or v6e:16x16; the TPU compiler says:'
      f' {str(error).splitlines()[0][:120]}',
    ) from error


def check_mesh(cfg: schema.Config) -> None:
  """Raises ConfigError where the mesh does not divide the devices or the model:
  what can be known of them without compiling."""
  if cfg.plan.topology and not has_libtpu():
    of_shardings(cfg)
  else:
    sharding.make_mesh(cfg, devices(cfg))


def has_libtpu() -> bool:
  return importlib.util.find_spec('libtpu') is not None


def plan(cfg: schema.Config) -> Plan:
  """Compiles the step of cfg and reads what it needs."""
  if cfg.plan.topology and not has_libtpu():
    return of_shardings(cfg)
  on = devices(cfg)
  mesh = sharding.make_mesh(cfg, on)
  found = _of_state(cfg, mesh, on[0].device_kind)
  begin = time.perf_counter()
  with jax.set_mesh(mesh):
    traced = step.trace(cfg, mesh, cfg.heads.n)
    rows = cfg.data.batch_size // cfg.train.grad_accum_steps
    found = found._replace(
      executed_flops=flops.of_program(traced.jaxpr, cfg.data.seq_len),
      chunk=cross_entropy.chunk(cfg, rows),
    )
    try:
      compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      needed = _needed(str(error))
      if needed is None:
        raise
      return found._replace(
        temp_bytes=needed(found), compile_s=time.perf_counter() - begin, refused=True
      )
  compile_s = time.perf_counter() - begin
  memory = compiled.memory_analysis()
  return found._replace(
    temp_bytes=memory.temp_size_in_bytes,
    code_bytes=memory.generated_code_size_in_bytes,
    held_bytes=memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    compile_s=compile_s,
    ledger=_ledger(compiled),
  )


def _ledger(compiled) -> hlo.Ledger | None:
  """None where jaxlib cannot read back what a newer libtpu has compiled (it is
  stricter about operands of an async-update, which programs for v5p have), or
  a loop does not say how often it runs: the rest of a plan stands without."""
  try:
    return hlo.ledger(compiled.as_text())
  except (jax.errors.JaxRuntimeError, ValueError):
    return None


def of_shardings(cfg: schema.Config) -> Plan:
  """What can be known without a compiler: the state's own bytes."""
  generation, _, shape = cfg.plan.topology.partition(':')
  sizes = re.findall(r'\d+', shape)
  if generation not in GENERATIONS or not sizes:
    raise fields.ConfigError(
      'plan.topology', cfg.plan.topology, f'{" or ".join(GENERATIONS)}, a colon, and e.g. 4x4'
    )
  n = cfg.plan.slices
  for size in sizes:
    n *= int(size)
  mesh = sharding.abstract_mesh(cfg, n)
  return _of_state(cfg, mesh, GENERATIONS[generation])


def _of_state(cfg, mesh, device_kind) -> Plan:
  abstract = state.abstract(cfg, mesh)
  return Plan(
    cfg,
    dict(mesh.shape),
    device_kind,
    params.bytes_per_device(abstract.params),
    params.bytes_per_device(abstract.opt_state),
  )


def _needed(error: str):
  """Reads how much memory a program would have needed off the compiler's
  message; None where memory is not what it complains about. Returns a function
  of the Plan, since some messages count the state in and some do not."""
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
