"""A Transformer layer, of the trunk and of block-like heads.

By default Llama's (Touvron et al. 2023, https://arxiv.org/abs/2302.13971): norms before
attention and MLP, no biases. Options of --model.* make it the layer of Qwen, Gemma, OLMo
and other models; docs/guides/import_export.md lists which.
"""

import dataclasses
from typing import Any, Generic, NamedTuple, Self

import jax
import jax.numpy as jnp

from mtp_jax.config import layer_types, schema
from mtp_jax.model import attention, layers, params
from mtp_jax.parallel import sharding

# From this width, a TPU's products of a layer are faster if elementwise functions are not
# computed within them (docs/performance.md, "Cycles by the compiler").
WIDE = 4096


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Block(Generic[params.Leaf]):
  """Parameters of one layer; with a leading axis if stacked. None without their option.

  A pytree of those that are not None: a checkpoint has no entry for an option that its
  model does not use, nor for one that did not exist when it was written.
  """

  attn_norm: params.Leaf | None  # before attention
  q: params.Leaf
  k: params.Leaf
  v: params.Leaf
  o: params.Leaf
  mlp_norm: params.Leaf | None
  gate: params.Leaf
  up: params.Leaf
  down: params.Leaf
  attn_out_norm: params.Leaf | None = None  # after attention
  mlp_out_norm: params.Leaf | None = None
  q_norm: params.Leaf | None = None
  k_norm: params.Leaf | None = None
  q_bias: params.Leaf | None = None
  k_bias: params.Leaf | None = None
  v_bias: params.Leaf | None = None
  o_bias: params.Leaf | None = None
  gate_bias: params.Leaf | None = None
  up_bias: params.Leaf | None = None
  down_bias: params.Leaf | None = None
  attn_gate: params.Leaf | None = None
  sink: params.Leaf | None = None

  def replace(self, **changes) -> Self:
    return dataclasses.replace(self, **changes)

  def tree_flatten_with_keys(self):
    # Those of the tree that it was mapped from, whose values may be None now.
    names = vars(self).get('_names') or tuple(
      field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None
    )
    return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], names

  @classmethod
  def tree_unflatten(cls, names, children):
    values: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(cls))
    self = cls(**values | dict(zip(names, children, strict=True)))
    object.__setattr__(self, '_names', names)
    return self


class Context(NamedTuple):
  """Positions, segments and RoPE tables of a window, read by every layer."""

  position_BT: Any
  segment_BT: Any
  sin: Any  # (B, T, R/2) of R rotated dimensions; (X, B, T, R/2) of X layer types
  cos: Any


def specs(m: schema.ModelConfig) -> Block[params.Spec]:
  D, N, G, H, F = (m.d_model, m.n_attn_heads, m.kv_heads, m.head_width, m.ff_width)
  std = D**-0.5
  # The 2L additions to the residual stream are scaled down at initialization.
  depth = (2 * m.n_layers) ** -0.5
  S, norm, bias = params.Spec, params.norm(m), params.bias

  def qk_norm(heads, axis):
    return {
      'none': None,
      'head': params.norm(m, (H,)),
      'full': params.norm(m, (heads, H), (axis, None)),
    }[m.qk_norm]

  before, after = m.norm_placement != 'after', m.norm_placement != 'before'
  return Block(
    attn_norm=norm if before else None,
    q=S((D, N, H), ('embed', 'attn_heads', None), std, (1, 2)),
    k=S((D, G, H), ('embed', 'kv_heads', None), std, (1, 2)),
    v=S((D, G, H), ('embed', 'kv_heads', None), std, (1, 2)),
    o=S((N, H, D), ('attn_heads', None, 'embed'), (N * H) ** -0.5 * depth, (2, 1)),
    mlp_norm=norm if before else None,
    gate=S((D, F), ('embed', 'mlp'), std, (1, 1)),
    up=S((D, F), ('embed', 'mlp'), std, (1, 1)),
    down=S((F, D), ('mlp', 'embed'), F**-0.5 * depth, (1, 1)),
    attn_out_norm=norm if after else None,
    mlp_out_norm=norm if after else None,
    q_norm=qk_norm(N, 'attn_heads'),
    k_norm=qk_norm(G, 'kv_heads'),
    q_bias=bias(N, H, axes=('attn_heads', None)) if m.qkv_bias else None,
    k_bias=bias(G, H, axes=('kv_heads', None)) if m.qkv_bias else None,
    v_bias=bias(G, H, axes=('kv_heads', None)) if m.qkv_bias else None,
    o_bias=bias(D) if m.o_bias else None,
    gate_bias=bias(F, axes=('mlp',)) if m.mlp_bias else None,
    up_bias=bias(F, axes=('mlp',)) if m.mlp_bias else None,
    down_bias=bias(D) if m.mlp_bias else None,
    attn_gate=S((D, N, H), ('embed', 'attn_heads', None), std, (1, 2)) if m.attn_gate else None,
    sink=bias(N, axes=('attn_heads',)) if m.attn_sink else None,
  )


def context(position_BT, cfg: schema.Config) -> Context:
  """Returns the Context of positions; a document starts wherever a position is 0."""
  tables = [_tables(position_BT, t, cfg.model) for t in layer_types.distinct(cfg)]
  sin, cos = (x[0] if len(x) == 1 else jnp.stack(x) for x in zip(*tables, strict=True))
  segment_BT = jnp.cumsum(position_BT == 0, axis=1)
  return Context(position_BT, segment_BT, sin, cos)


def _tables(position_BT, of: layer_types.LayerType, m: schema.ModelConfig):
  if of.theta:
    return layers.rope_tables(position_BT, m, of.theta, of.scaled)
  # No rotation: x cos + 0 is x, bit for bit.
  angle = jnp.zeros((*position_BT.shape, m.rotary_width // 2)) * position_BT[:, :, None]
  return angle, angle + 1


def block(
  layer: Block[jax.Array], x_BTD, ctx: Context, cfg: schema.Config, layer_type=0, *, of_others=None
):
  """Computes x + attention + gated MLP; gathers the sharded `layer`.

  layer_type: index of its type in layer_types.distinct(cfg); may be traced.
  of_others: (k_BTGH, v_BTGH) to attend to; None = the layer's own.
  """
  m = cfg.model
  with jax.named_scope('gather'):
    w = params.gather_cast(layer, specs(m), cfg)
  ctx = of_type(ctx, layer_type, cfg)
  with jax.named_scope('qkv'):
    y_BTD = attention_input(w, x_BTD, m)
    y_BTD = layers.gradient_in_memory(y_BTD) if _is_apart(m) else y_BTD
    q_BTNH = queries(w, y_BTD, ctx, m)
    k_BTGH, v_BTGH = of_others or keys_values(w, y_BTD, ctx, m)
  with jax.named_scope('attend'):
    a_BTNH = attention.attend(
      attention.Operands(q_BTNH, k_BTGH, v_BTGH, ctx.segment_BT, w.sink), layer_type, cfg
    )
  return add_mlp(w, add_attended(w, x_BTD, y_BTD, a_BTNH, m), m)


def own_keys_values(layer: Block[jax.Array], x_BTD, ctx: Context, cfg: schema.Config, layer_type):
  """Computes the keys and values (k_BTGH, v_BTGH) of a block's input."""
  w, ctx = params.gather_cast(layer, specs(cfg.model), cfg), of_type(ctx, layer_type, cfg)
  with jax.named_scope('qkv'):
    return keys_values(w, attention_input(w, x_BTD, cfg.model), ctx, cfg.model)


# Parts of a block, of gathered weights: a decoder reads keys and values from a
# cache, and has fewer query positions than it writes.


def of_type(ctx: Context, layer_type, cfg: schema.Config) -> Context:
  """Returns the Context with the RoPE tables of one layer type."""
  if len(layer_types.distinct(cfg)) == 1:
    return ctx
  sin, cos = (
    jax.lax.dynamic_index_in_dim(x, layer_type, keepdims=False) for x in (ctx.sin, ctx.cos)
  )
  return ctx._replace(sin=sin, cos=cos)


def attention_input(w: Block[jax.Array], x_BTD, m: schema.ModelConfig):
  return x_BTD if w.attn_norm is None else layers.rms_norm(x_BTD, w.attn_norm, m)


def queries(w: Block[jax.Array], y_BTD, ctx: Context, m: schema.ModelConfig):
  """Computes queries of attention's input, rotated by RoPE."""
  q_BTNH = _biased(layers.product('BTD,DNH->BTNH', y_BTD, w.q), w.q_bias)
  return layers.rope(_qk_normed(q_BTNH, w.q_norm, m), ctx.sin, ctx.cos)


def keys_values(w: Block[jax.Array], y_BTD, ctx: Context, m: schema.ModelConfig):
  k_BTGH = _biased(layers.product('BTD,DGH->BTGH', y_BTD, w.k), w.k_bias)
  v_BTGH = _biased(layers.product('BTD,DGH->BTGH', y_BTD, w.v), w.v_bias)
  return layers.rope(_qk_normed(k_BTGH, w.k_norm, m), ctx.sin, ctx.cos), v_BTGH


def _qk_normed(x_BTNH, w, m: schema.ModelConfig):
  return x_BTNH if w is None else layers.rms_norm(x_BTNH, w, m, m.qk_norm_eps)


def _biased(x, bias):
  """Adds a bias over the last dimensions, in float32."""
  if bias is None:
    return x
  bias = jnp.expand_dims(bias, tuple(range(x.ndim - bias.ndim))).astype(jnp.float32)
  return (x.astype(jnp.float32) + bias).astype(x.dtype)


def add_attended(w: Block[jax.Array], x_BTD, y_BTD, a_BTNH, m: schema.ModelConfig):
  """Adds the projected attention a to the residual stream x; y is attention's input."""
  with jax.named_scope('attend'):
    if w.attn_gate is not None:
      a_BTNH *= jax.nn.sigmoid(layers.product('BTD,DNH->BTNH', y_BTD, w.attn_gate))
    o_BTD = layers.product('BTNH,NHD->BTD', a_BTNH, w.o, out_sharding=_RESIDUAL)
    return x_BTD + _added(_biased(o_BTD, w.o_bias), w.attn_out_norm, m)


def _is_apart(m: schema.ModelConfig) -> bool:
  """Whether elementwise functions of products are not computed within them."""
  return m.d_model >= WIDE and sharding.platform() == 'tpu'


def add_mlp(w: Block[jax.Array], x_BTD, m: schema.ModelConfig):
  with jax.named_scope('mlp'):
    y_BTD = x_BTD if w.mlp_norm is None else layers.rms_norm(x_BTD, w.mlp_norm, m)
    y_BTD = layers.gradient_in_memory(y_BTD) if _is_apart(m) else y_BTD
    gate_BTF = _biased(layers.product('BTD,DF->BTF', y_BTD, w.gate), w.gate_bias)
    up_BTF = _biased(layers.product('BTD,DF->BTF', y_BTD, w.up), w.up_bias)
    if _is_apart(m):
      gate_BTF, up_BTF = layers.gradient_in_memory((gate_BTF, up_BTF))
    active_BTF = layers.ACTIVATIONS[m.activation](gate_BTF) * up_BTF
    o_BTD = (_down_apart if _is_apart(m) else _down)(active_BTF, w.down)
    return x_BTD + _added(_biased(o_BTD, w.down_bias), w.mlp_out_norm, m)


def _down(active_BTF, w_FD):
  return layers.product('BTF,FD->BTD', active_BTF, w_FD, out_sharding=_RESIDUAL)


def _down_apart_bwd(saved, do_BTD):
  active_BTF, w_FD = saved
  return jax.vjp(_down, jax.lax.optimization_barrier(active_BTF), w_FD)[1](do_BTD)


_down_apart: Any = jax.custom_vjp(_down)
_down_apart.defvjp(lambda active, w: (_down(active, w), (active, w)), _down_apart_bwd)


def _added(o_BTD, norm_D, m: schema.ModelConfig):
  """Returns what a sublayer adds to the residual stream."""
  if norm_D is not None:
    o_BTD = layers.rms_norm(o_BTD, norm_D, m)
  return o_BTD if m.residual_scale == 1 else m.residual_scale * o_BTD


_RESIDUAL = sharding.pspec('batch', None, None)
