"""FLOPs of a training token by formula, and of a program as traced. Floor 3."""

import math

import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.model import heads as heads_lib
from mtp_jax.model import lm, params


def flops_per_token(cfg: schema.Config, n_active: int, causal: bool = True) -> float:
  """Model FLOPs of one training token: forward, and twice that backward.

  Two a weight of a matrix product (the unembedding once a head and once for
  the order of tokens, the embedding not at all) and 4 N H a layer for each key
  that attention sees: T / 2 of them on average. With causal=False all T, which
  is the convention of Chowdhery et al. 2022 (https://arxiv.org/abs/2204.02311,
  appendix B), and what a program does that masks scores instead of skipping
  them. A frozen group has no gradient of weights, and a frozen trunk no
  backward at all. Recomputation is not counted: it is a cost, not work.
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
  """Of one token, forward: (trunk, head modules, their unembeddings, that of
  the order of tokens)."""
  m = cfg.model
  # Head 1 of an identity-first family has no module.
  modules = n_active if cfg.heads.block_first else n_active - 1
  family = heads_lib.family(cfg)
  keys = cfg.data.seq_len / 2 if causal else cfg.data.seq_len
  attention = 4 * keys * m.n_attn_heads * m.head_width
  trunk, head = (
    2 * _matrices(specs) + layers * attention
    for specs, layers in (
      (lm.specs(cfg).trunk, heads_lib.trunk_layers(cfg)),
      (family.specs(cfg), family.has_block),
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


# Matrix products of T x T x H a kernel makes of one query head, half of them
# above the diagonal and skipped; by what its name has in it.
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
  """FLOPs of the matrix products of a traced program, of one device.

  What is executed, recomputation included, and what several devices repeat as
  well: shapes are those of shards. Loops times their trips; of a branch the
  dearest choice, but once a loop where another choice multiplies nothing (what
  is asked of head 1 alone); attention kernels by the products that they make of
  each query head. Elementwise work is not counted.

  trips: of the loop around it.
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
  """The shape that one device holds of it."""
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
    raise ValueError(f'kernel {name}: its products are not known')
  query = next(
    v.aval
    for v in eqn.invars
    if len(v.aval.shape) >= 3 and jnp.issubdtype(v.aval.dtype, jnp.floating)
  )
  return known[0] * 2.0 * math.prod(query.shape) * seq_len / 2
