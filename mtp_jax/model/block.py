"""A pre-norm Llama layer, of the trunk and of block-like heads.

Touvron et al. 2023, https://arxiv.org/abs/2302.13971; no biases.
"""

from typing import Any, Generic, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.model import attention, layers, params
from mtp_jax.parallel import sharding


class Block(flax.struct.PyTreeNode, Generic[params.Leaf]):
  """Parameters of one layer; with a leading axis if stacked."""

  attn_norm: params.Leaf
  q: params.Leaf
  k: params.Leaf
  v: params.Leaf
  o: params.Leaf
  mlp_norm: params.Leaf
  gate: params.Leaf
  up: params.Leaf
  down: params.Leaf


class Context(NamedTuple):
  """Positions, segments and RoPE tables of a window, read by every layer."""

  position_BT: Any
  segment_BT: Any
  sin: Any  # (B, T, H/2)
  cos: Any


def specs(m: schema.ModelConfig) -> Block[params.Spec]:
  D, N, G, H, F = (m.d_model, m.n_attn_heads, m.kv_heads, m.head_width, m.ff_width)
  std = D**-0.5
  # The 2L additions to the residual stream are scaled down at initialization.
  depth = (2 * m.n_layers) ** -0.5
  S = params.Spec
  return Block(
    attn_norm=S((D,), (None,), None),
    q=S((D, N, H), ('embed', 'attn_heads', None), std, (1, 2)),
    k=S((D, G, H), ('embed', 'kv_heads', None), std, (1, 2)),
    v=S((D, G, H), ('embed', 'kv_heads', None), std, (1, 2)),
    o=S((N, H, D), ('attn_heads', None, 'embed'), (N * H) ** -0.5 * depth, (2, 1)),
    mlp_norm=S((D,), (None,), None),
    gate=S((D, F), ('embed', 'mlp'), std, (1, 1)),
    up=S((D, F), ('embed', 'mlp'), std, (1, 1)),
    down=S((F, D), ('mlp', 'embed'), F**-0.5 * depth, (1, 1)),
  )


def context(position_BT, m: schema.ModelConfig) -> Context:
  """Returns the Context of positions; a document starts wherever a position is 0."""
  sin, cos = layers.rope_tables(position_BT, m)
  segment_BT = jnp.cumsum(position_BT == 0, axis=1)
  return Context(position_BT, segment_BT, sin, cos)


def block(layer: Block[jax.Array], x_BTD, ctx: Context, cfg: schema.Config):
  """Computes x + attention + SwiGLU; gathers the sharded `layer`."""
  with jax.named_scope('gather'):
    w = params.gather_cast(layer, specs(cfg.model), cfg)
  with jax.named_scope('qkv'):
    y_BTD = layers.rms_norm(x_BTD, w.attn_norm, cfg.model.norm_eps)
    q_BTNH = queries(w, y_BTD, ctx)
    k_BTGH, v_BTGH = keys_values(w, y_BTD, ctx)
  with jax.named_scope('attend'):
    a_BTNH = attention.attend(q_BTNH, k_BTGH, v_BTGH, ctx.segment_BT, cfg.model)
  return add_mlp(w, add_attended(w, x_BTD, a_BTNH), cfg.model.norm_eps)


# Parts of a block, of gathered weights: a decoder reads keys and values from a
# cache, and has fewer query positions than it writes.


def queries(w: Block[jax.Array], y_BTD, ctx: Context):
  """Computes queries of the normed residual stream, rotated by RoPE."""
  return layers.rope(jnp.einsum('BTD,DNH->BTNH', y_BTD, w.q), ctx.sin, ctx.cos)


def keys_values(w: Block[jax.Array], y_BTD, ctx: Context):
  k_BTGH = jnp.einsum('BTD,DGH->BTGH', y_BTD, w.k)
  v_BTGH = jnp.einsum('BTD,DGH->BTGH', y_BTD, w.v)
  return layers.rope(k_BTGH, ctx.sin, ctx.cos), v_BTGH


def add_attended(w: Block[jax.Array], x_BTD, a_BTNH):
  with jax.named_scope('attend'):
    return x_BTD + jnp.einsum('BTNH,NHD->BTD', a_BTNH, w.o, out_sharding=_RESIDUAL)


def add_mlp(w: Block[jax.Array], x_BTD, eps: float):
  with jax.named_scope('mlp'):
    y_BTD = layers.rms_norm(x_BTD, w.mlp_norm, eps)
    gate_BTF = jnp.einsum('BTD,DF->BTF', y_BTD, w.gate)
    up_BTF = jnp.einsum('BTD,DF->BTF', y_BTD, w.up)
    return x_BTD + jnp.einsum(
      'BTF,FD->BTD', jax.nn.silu(gate_BTF) * up_BTF, w.down, out_sharding=_RESIDUAL
    )


_RESIDUAL = sharding.pspec('batch', None, None)
