"""The prediction heads: one Family per architecture, z -> the hidden state of head k.

A family is a few pure functions with the same signature, so that loss and decoding
are one scan over heads whatever the family. To add one, write its specs,
block_input and block_output, and name it in FAMILIES and schema.HEAD_FAMILIES.

In a *block-first* family each head is a layer, head 1 too: the trunk has L - n.
In an *identity-first* family the trunk has all L layers, head 1 is the identity on
z, and heads 2..n have n - 1 modules. With n = 1 each is a plain L-layer Transformer.
"""

import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import fields, layer_types, schema
from mtp_jax.model import block, layers, params
from mtp_jax.parallel import sharding

BLOCK_OUTPUT = 'block_output'  # of a head, before its norm


class Inputs(NamedTuple):
  """The inputs of a head."""

  norm_D: Any  # weight of the trunk's final norm, before the unembedding
  z_BTD: Any  # the trunk's output
  carry_BTD: Any  # output of the head before it in the scan; z before the first
  next_emb_BTD: Any = None  # see `next_token_offset`; None unless the family uses it


def whole_module(module):
  """Returns the layer of a module that is a single layer."""
  return module


class Family(NamedTuple):
  """The functions of a head: a block, its input, and its output.

  specs(cfg.model): Specs of one module.
  block_input(module, inputs, ctx, cfg) -> x_BTD, the block's input.
  block_output(module, y_BTD, inputs, cfg) -> (carry_BTD, h_BTD), of the block's
  output y; h is normed for the unembedding.
  layer(module) -> block.Block; None where a head has no block, and y = x.
  """

  specs: Callable[[schema.ModelConfig], Any]
  block_input: Callable[..., Any]
  block_output: Callable[..., tuple[Any, Any]]
  layer: Callable[[Any], block.Block] | None = whole_module
  reverse: bool = False  # the scan starts at head n
  is_chained: bool = False  # a head reads the previous one's output
  uses_next_token: bool = False  # a head reads next_emb
  shared_module: bool = False  # one module serves all extra heads
  normed_chain: bool = False  # --heads.trunk_state applies to what a head hands on

  @property
  def has_block(self) -> bool:
    return self.layer is not None


def next_token_offset(k, stride: int):
  """Returns the offset from the query of the token whose embedding head k reads,
  where its family uses one: head k - 1's target, known when head k drafts."""
  return 1 + stride * (k - 2)


def step(module, k, x: Inputs, ctx, cfg, *, apply_block=block.block):
  """Computes one head: block input, block, block output.

  Args:
    module: its parameters, as sharded at rest; None for an identity head.
    k: the head's number, from 1; may be traced.
    x: its Inputs.
    ctx: Context of the window.
    cfg: the Config.
    apply_block: (layer, x_BTD, ctx, cfg, layer_type) -> y_BTD; a decoder's has a cache.

  Returns:
    (carry_BTD, h_BTD).
  """
  f = family(cfg.heads)
  if module is None:  # head 1 of an identity-first family: h_1 = norm(z)
    h_BTD = layers.rms_norm(x.z_BTD, x.norm_D, cfg.model)
    normed = f.normed_chain and cfg.heads.trunk_state == 'post_norm'
    return h_BTD if normed else x.carry_BTD, h_BTD
  y_BTD = f.block_input(module, x, ctx, cfg)
  if f.layer is not None:
    layer_type = layers.at(types_of_heads(cfg), k - 1)
    y_BTD = apply_block(f.layer(module), y_BTD, ctx, cfg, layer_type)
    y_BTD = checkpoint_name(y_BTD, BLOCK_OUTPUT)
  return f.block_output(module, y_BTD, x, cfg)


def _block_input_z(module, x: Inputs, ctx, cfg):
  """h_k = block_k(z) (Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737).

  RoPE and the mask are those of the query's position t for every k.
  """
  del module, ctx, cfg
  return x.z_BTD


def _block_output(module, y_BTD, x: Inputs, cfg):
  del module
  return x.carry_BTD, layers.rms_norm(y_BTD, x.norm_D, cfg.model)


def _block_input_chain(module, x: Inputs, ctx, cfg):
  """h_k = block_k(h_k-1), or of h_k+1 in reverse (same paper, appendix B).

  "Anticausal" orders the heads; attention is causal over positions in both.
  """
  del module, ctx, cfg
  return x.carry_BTD


def _block_output_chain(module, y_BTD, x: Inputs, cfg):
  del module
  return y_BTD, layers.rms_norm(y_BTD, x.norm_D, cfg.model)


def _linear(module, x: Inputs, ctx, cfg):
  """h_k = W_k z (same paper, appendix B)."""
  del ctx
  proj_DE = _gathered(module, linear_specs(cfg.model), cfg).proj
  return layers.product('BTD,DE->BTE', x.z_BTD, proj_DE, out_sharding=_RESIDUAL)


def _residual(module, x: Inputs, ctx, cfg):
  """h_k = y + silu(W_k y), y = norm(z), with no norm after it: Medusa's head
  (Cai et al. 2024, https://arxiv.org/abs/2401.10774)."""
  del ctx
  proj_DE = _gathered(module, linear_specs(cfg.model), cfg).proj
  y_BTD = layers.rms_norm(x.z_BTD, x.norm_D, cfg.model)
  w_BTD = layers.product('BTD,DE->BTE', y_BTD, proj_DE, out_sharding=_RESIDUAL)
  return y_BTD + jax.nn.silu(w_BTD)


def _block_output_residual(module, y_BTD, x: Inputs, cfg):
  del module, cfg
  return x.carry_BTD, y_BTD


def _block_input_sequential(module, x: Inputs, ctx, cfg):
  """h_k = block_k(M_k [norm(h_k-1); norm(embedding of token t + k - 1)]), with
  M_k: 2D -> D and its own final norm; the carry is h_k after the norms, or before them
  with --heads.trunk_state=pre_norm (DeepSeek-V3, 2024, https://arxiv.org/abs/2412.19437,
  the report's order: hidden first).

  RoPE at the query's position t. At position 0 of a document the embedding is
  zeroed, as serving engines do.
  """
  w, m = _gathered(module, sequential_specs(cfg.model), cfg), cfg.model
  known_BT1 = (ctx.position_BT > 0)[:, :, None]
  next_BTD = jnp.where(known_BT1, x.next_emb_BTD, 0)
  hidden_BTD = layers.rms_norm(x.carry_BTD, w.hidden_norm, m)
  pair_BTE = jnp.concatenate([hidden_BTD, layers.rms_norm(next_BTD, w.embed_norm, m)], axis=-1)
  return layers.product('BTE,ED->BTD', pair_BTE, w.proj, out_sharding=_RESIDUAL)


def _block_output_sequential(module, y_BTD, x: Inputs, cfg):
  del x
  h_BTD = layers.rms_norm(y_BTD, module.final_norm, cfg.model)
  return y_BTD if cfg.heads.trunk_state == 'pre_norm' else h_BTD, h_BTD


class Projection(flax.struct.PyTreeNode, Generic[params.Leaf]):
  """A linear or residual head."""

  proj: params.Leaf


class Sequential(flax.struct.PyTreeNode, Generic[params.Leaf]):
  """A module that reads the next token's embedding and the hidden state."""

  hidden_norm: params.Leaf
  embed_norm: params.Leaf
  proj: params.Leaf
  block: block.Block[params.Leaf]
  final_norm: params.Leaf


_RESIDUAL = sharding.pspec('batch', None, None)


def _gathered(module, specs, cfg):
  """Gathers and casts a module, except its block, which `block.block` gathers."""
  if isinstance(module, Sequential):
    module, specs = module.replace(block=None), specs.replace(block=None)
  return params.gather_cast(module, specs, cfg)


def linear_specs(m: schema.ModelConfig) -> Projection[params.Spec]:
  D = m.d_model
  return Projection(proj=params.Spec((D, D), ('embed', None), D**-0.5, (1, 1)))


def sequential_specs(m: schema.ModelConfig) -> Sequential[params.Spec]:
  D = m.d_model
  norm = params.norm(m)
  return Sequential(
    hidden_norm=norm,
    embed_norm=norm,
    proj=params.Spec((2 * D, D), ('embed', None), (2 * D) ** -0.5, (1, 1)),
    block=block.specs(m),
    final_norm=norm,
  )


def _sequential_layer(module: Sequential[params.Leaf]) -> block.Block[params.Leaf]:
  return module.block


_SEQUENTIAL = Family(
  sequential_specs,
  _block_input_sequential,
  _block_output_sequential,
  layer=_sequential_layer,
  is_chained=True,
  uses_next_token=True,
  normed_chain=True,
)
_CHAIN = Family(block.specs, _block_input_chain, _block_output_chain, is_chained=True)
FAMILIES = {
  'parallel': Family(block.specs, _block_input_z, _block_output),
  'causal': _CHAIN,
  'anticausal': _CHAIN._replace(reverse=True),
  'linear': Family(linear_specs, _linear, _block_output, layer=None),
  'residual': Family(linear_specs, _residual, _block_output_residual, layer=None),
  'sequential': _SEQUENTIAL,
  'recursive': _SEQUENTIAL._replace(shared_module=True),
}


def register(name: str, family: Family, *, block_first: bool) -> None:
  """Registers a head family from outside the package as --heads.family=NAME.

  Training, decoding, planning and checkpoints support it; `mtp export` refuses it,
  as no other program implements it.

  Args:
    name: an identifier, different from those of FAMILIES.
    family: its functions.
    block_first: whether every head, head 1 too, is one of --model.n_layers layers;
      else head 1 is the identity on the trunk's output, and heads 2..n have modules.

  Raises:
    ValueError: the name is not an identifier, or exists.
  """
  if not name.isidentifier() or name in FAMILIES:
    raise ValueError(f'{name!r}: must be an identifier other than {", ".join(FAMILIES)}')
  schema.HEAD_FAMILIES[name] = block_first
  FAMILIES[name] = family


def check(cfg: schema.Config) -> None:
  """Raises ConfigError for options that a family, also a registered one, does not have."""
  h, f = cfg.heads, family(cfg.heads)
  for flag, problem in (
    ('isolated', f.reverse and 'head 1 is computed from the others'),
    ('markov_rank', f.uses_next_token and 'its heads read the token before'),
    ('mix_hidden_states', not f.normed_chain and 'its heads are no chain of modules'),
    ('share_keys_values', not f.shared_module and 'its heads do not share a module'),
  ):
    if getattr(h, flag) and problem:
      raise fields.ConfigError(
        f'heads.{flag}', getattr(h, flag), f'--heads.family={h.family}: {problem}'
      )


def keys_values(module, x: Inputs, ctx, cfg):
  """Computes the keys and values of the block of head 2, a shared module's first step."""
  f = family(cfg.heads)
  assert f.layer is not None
  x_BTD = f.block_input(module, x, ctx, cfg)
  return block.own_keys_values(f.layer(module), x_BTD, ctx, cfg, types_of_heads(cfg)[1])


def family(h: schema.HeadsConfig) -> Family:
  return FAMILIES[h.family]


def active_modules(modules, n: int, h: schema.HeadsConfig):
  """Returns the stacked modules that heads 1..n use; a shared module unstacked."""
  in_use = 0 if family(h).shared_module else slice(n_modules(h, n))
  return jax.tree.map(lambda w: w[in_use], modules)


def n_modules(h: schema.HeadsConfig, n: int) -> int:
  """Returns the number of modules that heads 1..n use."""
  if h.block_first:
    return n
  return min(n - 1, 1) if family(h).shared_module else n - 1


def specs(cfg: schema.Config):
  """Returns the specs of all modules, stacked on a leading axis; None without any."""
  n = n_modules(cfg.heads, cfg.heads.n)
  return params.stack(n, family(cfg.heads).specs(cfg.model)) if n else None


def trunk_layers(cfg: schema.Config) -> int:
  """Returns the number of trunk layers. Block-like heads count as layers, head 1
  too, so that n = 1 is a plain L-layer Transformer for every family."""
  return cfg.model.n_layers - (cfg.heads.n if cfg.heads.block_first else 0)


@functools.lru_cache(maxsize=256)
def types_of_trunk(cfg: schema.Config) -> tuple[int, ...]:
  """Returns the index of each trunk layer's type in layer_types.distinct(cfg)."""
  types = layer_types.distinct(cfg)
  return tuple(types.index(layer_types.of_layer(cfg.model, i)) for i in range(trunk_layers(cfg)))


@functools.lru_cache(maxsize=256)
def types_of_heads(cfg: schema.Config) -> tuple[int, ...]:
  """Returns the index of the type of each head's block in layer_types.distinct(cfg).

  Head 1 of a block-first family is a layer of the next token, as are all heads of a
  reversed chain; further heads are of --heads.layer_type, or else like the last layer.
  """
  types, h, own = layer_types.distinct(cfg), cfg.heads, layer_types.of_heads(cfg)
  trunk, found = trunk_layers(cfg), []
  for k in range(1, h.n + 1):
    if h.block_first and family(h).reverse:
      of_k = layer_types.of_layer(cfg.model, trunk + h.n - k)
    else:
      of_k = layer_types.of_layer(cfg.model, trunk - (not h.block_first))
    found.append(types.index(own if own and k > 1 else of_k))
  return tuple(found)


def next_token_layers(cfg: schema.Config) -> list[tuple[str, int]]:
  """Returns the layers that compute the next token (trunk and head 1) in order: the
  path prefix of their leaves, and the index in the stacked axis."""
  layers = [('trunk.', i) for i in range(trunk_layers(cfg))]
  if cfg.heads.block_first:
    # The layers below head 1, then head 1.
    first = cfg.heads.n if family(cfg.heads).reverse else 1
    layers += [('heads.', k - 1) for k in range(first, 0, -1)]
  return layers


def scan_heads(body, carry, modules, per_head, h: schema.HeadsConfig, *, apart: bool = False):
  """Scans over heads 1..m in the family's order, by lax.scan.

  Args:
    body: (carry, module, of_head, is_head_1) -> (carry, (out, of_module)); module is
      None for an identity head.
    carry: initial carry.
    modules: stacked over the heads that have one; a single one if all share it.
    per_head: pytree with leading axis m.
    h: its family determines modules and order.
    apart: whether head 1 is visited outside of the scan, as an identity head is in any
      case; else a block-first family is a single scan, and is_head_1 is None.

  Returns:
    (carry, (outs with leading axis m, of_modules stacked like modules)).
  """
  f = family(h)
  if h.block_first and not apart:
    return jax.lax.scan(
      lambda carry, xs: body(carry, *xs, None), carry, (modules, per_head), reverse=f.reverse
    )
  module_1 = jax.tree.map(lambda w: w[0], modules) if h.block_first else None
  others = jax.tree.map(lambda w: w[1:], modules) if h.block_first else modules
  scanned = None if f.shared_module else others

  def visit_1(carry):
    return body(carry, module_1, jax.tree.map(lambda x: x[0], per_head), True)

  def visit_others(carry):
    def visit(carry, xs):
      module, of_head = xs
      return body(carry, others if f.shared_module else module, of_head, False)

    rest = jax.tree.map(lambda x: x[1:], per_head)
    return jax.lax.scan(visit, carry, (scanned, rest), reverse=f.reverse)

  if jax.tree.leaves(per_head)[0].shape[0] == 1:
    carry, (out, of_module_1) = visit_1(carry)
    outs = jax.tree.map(lambda x: x[None], out)
    if h.block_first:
      return carry, (outs, jax.tree.map(lambda x: x[None], of_module_1))
    return carry, (outs, jax.tree.map(jnp.zeros_like, modules))
  if f.reverse:
    carry, (more, of_others) = visit_others(carry)
    carry, (out, of_module_1) = visit_1(carry)
  else:
    carry, (out, of_module_1) = visit_1(carry)
    carry, (more, of_others) = visit_others(carry)
  outs = jax.tree.map(prepend, out, more)
  if h.block_first:
    return carry, (outs, jax.tree.map(prepend, of_module_1, of_others))
  return carry, (outs, of_others)


def is_kept(cfg: schema.Config, n_active: int) -> bool:
  """Whether --loss.backward=remat keeps the activations of the heads: of a single wide one, whose
  recomputation would free nothing, since the peak is in the trunk's backward pass."""
  return n_active == 1 and cfg.model.d_model >= block.WIDE


def prepend(first, more):
  """Returns head 1's value and, stacked, those of the others as one stack."""
  return jnp.concatenate([first[None], more])
