"""Bytes and seconds per step by formula, to rank candidates for compilation.

The state is exact, from the shardings of the Specs. The rest sums the arrays that
are known to be large. docs/guides/plan.md has its accuracy compared with compiled
programs; it ranks, and never decides what fits.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from mtp_jax.config import fields, kernels, schema, validate
from mtp_jax.losses import cross_entropy
from mtp_jax.losses import teacher as teacher_lib
from mtp_jax.model import block, flops, heads, params
from mtp_jax.parallel import chips, sharding
from mtp_jax.planning import ahead
from mtp_jax.train import state

REMAT = ('none', 'dots', 'block')


class Estimate(NamedTuple):
  """Bytes per device, and seconds per step that each resource would take."""

  cfg: schema.CommandConfig
  mesh: dict[str, int]
  total_bytes: float
  seconds: dict[str, float]

  @property
  def step_s(self) -> float:
    return max(self.seconds.values())


class _Sizes(NamedTuple):
  """Sizes of a configuration on a mesh, used by both formulas."""

  rows: int  # per device and micro-batch
  micro_batches: int
  layers: int  # of the trunk
  blocks: int  # of all heads
  layer: int  # parameters per layer
  unembed: int
  tensor: int
  batch: int  # devices over which the batch is sharded
  teacher: schema.Config | None  # of the teacher.Model of --loss.teacher
  teacher_bytes: int  # of its parameters


def estimate(cfg: schema.CommandConfig, mesh: dict[str, int], chip) -> Estimate:
  """Returns the estimate; raises ConfigError if the mesh does not divide the model."""
  m, n = cfg.model, cfg.heads.n
  batch = mesh['data'] * mesh['fsdp']
  on_mesh = dataclasses.replace(cfg, mesh=schema.MeshConfig(**mesh)), tuple(mesh.values())
  sizes = _Sizes(
    cfg.data.batch_size // cfg.train.grad_accum_steps // batch,
    cfg.train.grad_accum_steps,
    heads.trunk_layers(cfg),
    heads.n_modules(cfg.heads, n) * heads.family(cfg.heads).has_block,
    params.count(block.specs(cfg.model)),
    m.d_model * m.vocab_size,
    mesh['tensor'],
    batch,
    *_teacher(_same_state(on_mesh[0]), on_mesh[1]),
  )
  held = _state_bytes(*on_mesh)
  total = sum(held) + sizes.teacher_bytes + _temp_bytes(cfg, sizes, held[0])
  return Estimate(cfg, mesh, total, _seconds(cfg, sizes, mesh, held, chip))


@functools.lru_cache(maxsize=4096)
def _state_of(cfg, shape) -> tuple[int, int]:
  n = shape[0] * shape[1] * shape[2]
  abstract = state.abstract(cfg, sharding.abstract_mesh(cfg, n))
  return (params.bytes_per_device(abstract.params), params.bytes_per_device(abstract.opt_state))


def _state_bytes(cfg, shape) -> tuple[int, int]:
  """Returns bytes of (parameters, optimizer state)."""
  return _state_of(_same_state(cfg), shape)


def _same_state(cfg):
  """Returns cfg without micro-batches and remat, which do not change the bytes of state and
  teacher, so that a search computes them once per mesh."""
  return schema.replace(
    cfg, **{'train.grad_accum_steps': 1, 'model.remat': 'block', 'loss.chunk_size': 0}
  )


@functools.lru_cache(maxsize=4096)
def _teacher(cfg, shape) -> tuple[schema.Config | None, int]:
  """Returns the teacher's Config and the bytes of its parameters."""
  mesh = sharding.abstract_mesh(cfg, shape[0] * shape[1] * shape[2])
  found = ahead.teacher_of(cfg, mesh)
  return found, params.bytes_per_device(teacher_lib.abstract(found, mesh)) if found else 0


def _width(cfg) -> int:
  return 2 if cfg.model.compute_dtype == 'bfloat16' else 4


def _temp_bytes(cfg, s: _Sizes, params_bytes: float) -> float:
  """Returns the larger of two peaks, in the cross-entropy of a head and in the
  backward pass of a trunk layer, each plus saved inputs of layers and gradients."""
  m, w = cfg.model, _width(cfg)
  tokens = s.rows * cfg.data.seq_len
  attn = (m.n_attn_heads + 2 * m.kv_heads) * m.head_width
  inside = tokens * w * (4 * m.d_model + (2 * attn + 4 * m.ff_width) / s.tensor)
  kept = {
    'block': tokens * w * m.d_model,
    'dots': tokens * w * (3 * m.d_model + (attn + 2 * m.ff_width) / s.tensor),
    'none': inside,
  }[m.remat]
  kernel, auto = cfg.model.attention, 'flash' if ahead.gpus(cfg) else 'splash'
  if kernel == 'reference' or (kernel == 'auto' and kernels.problem(m, cfg.data.seq_len, auto)):
    scores = 6 * s.rows * m.n_attn_heads * cfg.data.seq_len**2 / s.tensor
    inside += scores
    kept += scores if m.remat == 'none' else 0
  layer = s.layer * (w + 4) / s.tensor  # gathered weights, and the full gradient
  logits = 4 * s.rows * cfg.data.seq_len * m.vocab_size / s.tensor
  if cfg.loss.chunk_size:
    logits *= cfg.loss.chunk_size / cfg.data.seq_len
  else:
    least = 4 * max(cross_entropy.TOKENS, 128 * s.rows) * m.vocab_size / s.tensor
    logits = min(logits, max(cross_entropy.LOGITS_BYTES, least))
  unembed = s.unembed * (w + 4) / s.tensor
  gradients = params_bytes * (2 if s.micro_batches > 1 else 1)
  kept_of_head = w * tokens * m.d_model * heads.family(cfg.heads).is_chained
  if cfg.loss.backward == 'interleaved':  # its cotangent in addition to its input
    kept_of_head *= 2
  if cfg.loss.compares and cfg.heads.n > 1:
    logits *= 2  # and the teacher's
    kept_of_head += 2 * w * tokens * m.d_model  # hidden states and their cotangents
  of_teacher = _width(s.teacher) * tokens * s.teacher.model.d_model if s.teacher else 0
  return (
    s.layers * kept
    + of_teacher
    + gradients
    + max(
      logits + unembed + inside + kept_of_head * cfg.heads.n,
      inside + layer,
      2 * 4 * s.unembed / s.tensor,  # the gradient of the embedding, reduced
    )
  )


def _seconds(cfg, s: _Sizes, mesh, held, chip: chips.Chip) -> dict[str, float]:
  m, n, w = cfg.model, cfg.heads.n, _width(cfg)
  tokens = s.rows * cfg.data.seq_len
  A, t = s.micro_batches, s.tensor
  executed = flops.executed(cfg, n, teacher=s.teacher)
  again_trunk = m.remat == 'block'
  eager = cfg.loss.backward == 'interleaved'
  compares = cfg.loss.compares * (n - 1)  # heads whose teacher's logits are computed
  blocks = s.layers + s.blocks
  weights = (s.layer * blocks + 2 * s.unembed) / t
  stream = blocks * tokens * w * (20 * m.d_model + 8 * m.ff_width / t)
  memory = A * (
    weights * (5 * w + 3 * 4)
    + s.teacher_bytes
    + stream * (3 + again_trunk)
    + (n + compares) * 4 * tokens * m.vocab_size / t * (4 if eager else 6)
  ) + 2 * sum(held)
  f = mesh['fsdp']
  of_fsdp = weights * (2 * w + 2 * 4) * (f - 1) / f
  slices = cfg.plan.slices
  inside, shard = mesh['data'] // slices, 2 * 4 * weights / f
  of_data = shard * (inside - 1) / inside
  of_tensor = blocks * (4 + 2 * again_trunk) * tokens * w * m.d_model * 2 * (t - 1) / t
  sent = (of_tensor, t, 1), (of_fsdp, f, t), (of_data, inside, t * f)
  between = [n_bytes * _network_share(cfg, size, stride) for n_bytes, size, stride in sent]
  links = of_fsdp + of_tensor + of_data - sum(between)
  network = shard * (slices - 1) / slices + sum(between)
  return dict(
    compute=A * tokens * executed / t / chip.flops_per_s,
    memory=memory / chip.hbm_bytes_per_s,
    links=A * links / chip.link_bytes_per_s,
    network=A * network / chip.network_bytes_per_s,
  )


def _network_share(cfg, size: int, stride: int) -> float:
  """Returns the part of what a mesh axis sends that leaves its node: of a ring over `size`
  GPUs, `stride` apart, one hop per node."""
  at = ahead.gpus(cfg)
  within = min(size, max(at.per_node // stride, 1)) if at else size
  return 1 / within if within < size else 0.0


def candidates(cfg: schema.CommandConfig, n_devices: int) -> Iterator[schema.CommandConfig]:
  """Yields every mesh, number of micro-batches and remat policy that divides the
  batch and model of cfg, with slices along data."""
  for data, fsdp in itertools.product(_divisors(n_devices), repeat=2):
    if n_devices % (data * fsdp) or data % cfg.plan.slices:
      continue
    if cfg.data.batch_size % (data * fsdp):
      continue
    for accumulate in _divisors(cfg.data.batch_size // (data * fsdp)):
      for remat in REMAT:
        one = schema.replace(
          cfg,
          **{
            'mesh.data': data,
            'mesh.fsdp': fsdp,
            'mesh.tensor': n_devices // (data * fsdp),
            'train.grad_accum_steps': accumulate,
            'model.remat': remat,
          },
        )
        try:
          sizes = sharding.mesh_sizes(validate.validate(one), n_devices)
          sharding.check_batch(one, sizes)
        except fields.ConfigError:
          continue
        yield one


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def ranked(cfg: schema.CommandConfig, n_devices: int, device_kind: str):
  """Returns the estimates of all candidates, the fastest that should fit first."""
  chip = chips.chip(device_kind)
  if chip is None:
    raise fields.ConfigError(
      'plan.search_mesh',
      True,
      f'needs a chip with known peaks, not {device_kind}; set --plan.topology',
    )
  usable = ahead.usable_bytes(device_kind, cfg) or 0.0
  found = [estimate(one, dataclasses.asdict(one.mesh), chip) for one in candidates(cfg, n_devices)]
  # Ties of rooflines are broken by the time without any overlap.
  return sorted(found, key=lambda e: (e.total_bytes > usable, e.step_s, sum(e.seconds.values())))


def check(plan: ahead.Plan) -> Estimate:
  """Returns the estimate for a compiled plan, for comparison."""
  return estimate(plan.cfg, plan.mesh, plan.chip)
