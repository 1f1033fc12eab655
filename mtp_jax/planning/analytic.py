"""Bytes and seconds of a step by formula: to rank what is then compiled.

Floor 5. The state is exact, from the Specs' shardings. The rest adds up the
arrays that are known to be large. docs/STATUS.md says how near that comes to
compiled programs; it ranks, and never decides what fits.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from mtp_jax.config import fields, schema, validate
from mtp_jax.losses import cross_entropy
from mtp_jax.model import block, flops, heads, params
from mtp_jax.parallel import chips, sharding
from mtp_jax.planning import ahead
from mtp_jax.train import state

REMAT = ('none', 'dots', 'block')


class Estimate(NamedTuple):
  """Of one device; seconds that each resource alone would take for a step."""

  cfg: schema.Config
  mesh: dict[str, int]
  total_bytes: float
  seconds: dict[str, float]

  @property
  def step_s(self) -> float:
    return max(self.seconds.values())


class _Sizes(NamedTuple):
  """A configuration on a mesh, in numbers that both formulas use."""

  rows: int  # of one device and micro-batch
  micro_batches: int
  layers: int  # of the trunk
  blocks: int  # of all heads
  layer: int  # parameters of a layer
  unembed: int
  tensor: int
  batch: int  # devices that split the batch


def estimate(cfg: schema.Config, mesh: dict[str, int], chip) -> Estimate:
  """Raises ConfigError where the mesh does not divide the model."""
  m, n = cfg.model, cfg.heads.n
  batch = mesh['data'] * mesh['fsdp']
  sizes = _Sizes(
    cfg.data.batch_size // cfg.train.grad_accum_steps // batch,
    cfg.train.grad_accum_steps,
    heads.trunk_layers(cfg),
    heads.n_modules(cfg, n) * heads.family(cfg).has_block,
    params.count(block.specs(cfg)),
    m.d_model * m.vocab_size,
    mesh['tensor'],
    batch,
  )
  held = _state_bytes(
    dataclasses.replace(cfg, mesh=schema.MeshConfig(**mesh)), tuple(mesh.values())
  )
  total = sum(held) + _temp_bytes(cfg, sizes, held[0])
  return Estimate(cfg, mesh, total, _seconds(cfg, sizes, mesh, held, chip))


@functools.lru_cache(maxsize=4096)
def _state_of(cfg, shape) -> tuple[int, int]:
  n = shape[0] * shape[1] * shape[2]
  abstract = state.abstract(cfg, sharding.abstract_mesh(cfg, n))
  return (params.bytes_per_device(abstract.params), params.bytes_per_device(abstract.opt_state))


def _state_bytes(cfg, shape) -> tuple[int, int]:
  """(parameters, optimizer state); neither micro-batches nor remat change it,
  so that a search asks once a mesh."""
  same = schema.replace(
    cfg, **{'train.grad_accum_steps': 1, 'model.remat': 'block', 'loss.chunk_size': 0}
  )
  return _state_of(same, shape)


def _width(cfg) -> int:
  return 2 if cfg.model.compute_dtype == 'bfloat16' else 4


def _temp_bytes(cfg, s: _Sizes, params_bytes: float) -> float:
  """The larger of two moments: the cross-entropy of a head, and a layer of the
  trunk going backward. Beside either: inputs that layers keep, gradients."""
  m, w = cfg.model, _width(cfg)
  tokens = s.rows * cfg.data.seq_len
  attn = (m.n_attn_heads + 2 * m.kv_heads) * m.head_width
  inside = tokens * w * (4 * m.d_model + (2 * attn + 4 * m.ff_width) / s.tensor)
  kept = {
    'block': tokens * w * m.d_model,
    'dots': tokens * w * (3 * m.d_model + (attn + 2 * m.ff_width) / s.tensor),
    'none': inside,
  }[m.remat]
  kernel = cfg.model.attention
  if kernel == 'reference' or (kernel == 'auto' and validate.kernel_problem(cfg, 'splash')):
    scores = 6 * s.rows * m.n_attn_heads * cfg.data.seq_len**2 / s.tensor
    inside += scores
    kept += scores if m.remat == 'none' else 0
  layer = s.layer * (w + 4) / s.tensor  # gathered, and its whole gradient
  logits = 4 * s.rows * cfg.data.seq_len * m.vocab_size / s.tensor
  if cfg.loss.chunk_size:
    logits *= cfg.loss.chunk_size / cfg.data.seq_len
  else:
    logits = min(logits, cross_entropy.LOGITS_BYTES)
  unembed = s.unembed * (w + 4) / s.tensor
  gradients = params_bytes * (2 if s.micro_batches > 1 else 1)
  kept_of_head = w * tokens * m.d_model * heads.family(cfg).dependent
  if cfg.loss.backward == 'interleaved':  # its cotangent beside what it is handed
    kept_of_head *= 2
  return (
    s.layers * kept
    + gradients
    + max(
      logits + unembed + inside + kept_of_head * cfg.heads.n,
      inside + layer,
      2 * 4 * s.unembed / s.tensor,  # the embedding's gradient, summed
    )
  )


def _seconds(cfg, s: _Sizes, mesh, held, chip: chips.Chip) -> dict[str, float]:
  m, n, w = cfg.model, cfg.heads.n, _width(cfg)
  tokens = s.rows * cfg.data.seq_len
  A, t = s.micro_batches, s.tensor
  trunk, modules, unembeddings, order = flops.forward(cfg, n)
  again_trunk = m.remat == 'block'
  dependent = heads.family(cfg).dependent
  eager = cfg.loss.backward == 'interleaved'
  executed = (
    (3 + again_trunk) * trunk
    + (3 if eager and not dependent else 4) * modules
    + (3 if eager else 4) * (unembeddings + order)
  )
  blocks = s.layers + s.blocks
  weights = (s.layer * blocks + 2 * s.unembed) / t
  stream = blocks * tokens * w * (20 * m.d_model + 8 * m.ff_width / t)
  memory = A * (
    weights * (5 * w + 3 * 4)
    + stream * (3 + again_trunk)
    + n * 4 * tokens * m.vocab_size / t * (4 if eager else 6)
  ) + 2 * sum(held)
  f = mesh['fsdp']
  of_fsdp = weights * (2 * w + 2 * 4) * (f - 1) / f
  slices = cfg.plan.slices
  inside, shard = mesh['data'] // slices, 2 * 4 * weights / f
  of_data = shard * (inside - 1) / inside
  of_tensor = blocks * (4 + 2 * again_trunk) * tokens * w * m.d_model * 2 * (t - 1) / t
  return dict(
    compute=A * tokens * executed / t / chip.flops_per_s,
    memory=memory / chip.hbm_bytes_per_s,
    links=A * (of_fsdp + of_tensor + of_data) / chip.link_bytes_per_s,
    network=A * shard * (slices - 1) / slices / chip.network_bytes_per_s,
  )


def candidates(cfg: schema.Config, n_devices: int) -> Iterator[schema.Config]:
  """Every mesh, number of micro-batches and remat policy that divides cfg's
  batch and model, slices along data."""
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
          sharding.mesh_sizes(validate.validate(one), n_devices)
        except fields.ConfigError:
          continue
        yield one


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def ranked(cfg: schema.Config, n_devices: int, device_kind: str):
  """Estimates of all candidates, the fastest that should fit first."""
  chip = chips.chip(device_kind)
  if chip is None:
    raise fields.ConfigError(
      'plan.search_mesh',
      True,
      f'needs a chip whose peaks are known, not {device_kind}; give --plan.topology',
    )
  found = [estimate(one, dataclasses.asdict(one.mesh), chip) for one in candidates(cfg, n_devices)]
  # What overlaps not at all would take: of equal rooflines the one with the
  # least beside it.
  return sorted(
    found, key=lambda e: (e.total_bytes > chip.hbm_bytes, e.step_s, sum(e.seconds.values()))
  )


def check(plan: ahead.Plan) -> Estimate:
  """The estimate of what was compiled, to compare."""
  return estimate(plan.cfg, plan.mesh, plan.chip)
