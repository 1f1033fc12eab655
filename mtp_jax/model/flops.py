"""FLOPs per training token by formula, and FLOPs of a traced program."""

import math

import jax
import jax.extend.core
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.model import heads as heads_lib
from mtp_jax.model import lm, params


def flops_per_token(cfg: schema.Config, n_active: int, causal: bool = True) -> float:
  """Returns the model FLOPs per training token: forward, and twice that backward.

  Two per weight of a matrix product (the unembedding once per head and once for
  token order prediction, the embedding excluded) and 4 N H per layer and attended
  key, T / 2 keys on average; T with causal=False, the convention of Chowdhery et al.
  2022 (https://arxiv.org/abs/2204.02311, appendix B) and the cost of a program that
  masks scores instead of skipping them. Frozen weights have no gradient, and a
  frozen trunk has no backward pass. Recomputation is excluded.
  """
  trunk, heads, unembeddings, order = forward(cfg, n_active, causal)
  own = cfg.heads.unembedding == 'replicated'
  trunk_moves = cfg.train.freeze != 'trunk'
  heads_move = cfg.train.freeze != 'heads'
  return (
    (3 if trunk_moves else 1) * trunk
    + (2 + heads_move) * heads
    + (2 + (heads_move if own else trunk_moves)) * unembeddings
    + (2 + heads_move) * order
  )


def forward(
  cfg: schema.Config, n_active: int, causal: bool = True
) -> tuple[float, float, float, float]:
  """Returns the forward FLOPs per token of (the trunk, head modules, their
  unembeddings, the unembedding of token order prediction)."""
  m = cfg.model
  # Head 1 of an identity-first family has no module.
  modules = n_active if cfg.heads.block_first else n_active - 1
  family = heads_lib.family(cfg.heads)
  keys = cfg.data.seq_len / 2 if causal else cfg.data.seq_len
  attention = 4 * keys * m.n_attn_heads * m.head_width
  trunk, head = (
    2 * _matrices(specs) + layers * attention
    for specs, layers in (
      (lm.specs(cfg).trunk, heads_lib.trunk_layers(cfg)),
      (family.specs(m), family.has_block),
    )
  )
  unembedding = 2 * m.d_model * m.vocab_size
  return (
    trunk,
    modules * head,
    n_active * unembedding,
    (cfg.loss.token_order_weight > 0) * unembedding,
  )


def _matrices(specs) -> int:
  return params.count([s for s in jax.tree.leaves(specs) if s.decay])


# Matrix products of T x T x H per query head of a kernel, half of each above the
# diagonal and skipped; by a part of the kernel's name.
KERNELS = {
  'splash_mha_fwd': 2,
  'splash_mha_dq': 3,
  'splash_mha_dkv': 4,
  'mha_forward': 2,
  'mha_backward': 7,
  'mha_preprocess': 0,
  'dot_product_attention_fwd': 2,
  'dot_product_attention_bwd': 5,
}


def of_program(jaxpr, seq_len: int, trips: int = 1) -> float:
  """Returns the FLOPs of the matrix products of a traced program, per device.

  Executed FLOPs, including recomputation and work repeated on several devices:
  shapes are those of shards. A loop counts once per trip; a conditional as its most
  expensive branch, but once per loop where another branch has no product (work of
  head 1 alone); attention kernels by their products per query head. Elementwise work
  is excluded.

  trips: trip count of the enclosing loop.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == 'dot_general':
      total += _dot(eqn)
    elif name == 'pallas_call' or name.startswith('dot_product_attention'):
      total += _kernel(eqn, seq_len)
    elif name == 'cond':
      choices = [of_program(branch.jaxpr, seq_len, trips) for branch in eqn.params['branches']]
      total += max(choices) / (1 if min(choices) else trips)
    else:
      times = eqn.params['length'] if name == 'scan' else 1
      total += times * sum(
        of_program(inner, seq_len, times if name == 'scan' else trips)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params)
      )
  return total


def _shard(aval) -> list[int]:
  """Returns the shape of a device's shard."""
  mesh, partitions = aval.sharding.mesh, aval.sharding.spec.partitions
  shape = list(aval.shape)
  for i, axes in enumerate(partitions):
    for axis in (axes,) if isinstance(axes, str) else axes or ():
      shape[i] //= mesh.shape[axis]
  return shape


def _dot(eqn) -> float:
  (contracted, _), _ = eqn.params['dimension_numbers']
  left = _shard(eqn.invars[0].aval)
  return 2.0 * math.prod(_shard(eqn.outvars[0].aval)) * math.prod(left[i] for i in contracted)


def _kernel(eqn, seq_len: int) -> float:
  name = eqn.params.get('name') or getattr(
    eqn.params.get('name_and_src_info'), 'name', eqn.primitive.name
  )
  known = [products for key, products in KERNELS.items() if key in name]
  if not known:
    raise ValueError(f'kernel {name}: unknown FLOPs')
  query = next(
    v.aval
    for v in eqn.invars
    if len(v.aval.shape) >= 3 and jnp.issubdtype(v.aval.dtype, jnp.floating)
  )
  return known[0] * 2.0 * math.prod(query.shape) * seq_len / 2
