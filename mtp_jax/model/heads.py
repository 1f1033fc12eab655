"""The prediction heads, one Family each: z -> the hidden state of head k.

Floor 2. A family is a few pure functions with the same signature, so that the
loss is one scan over heads whatever the family, and decoding one walk. To add
one, write its specs, its enter and its leave and name it in FAMILIES and in
config.Heads.

In a *block first* family each head is a layer, head 1 too: the trunk has L - n.
In an *identity first* family the trunk has all L layers, head 1 reads z itself,
and n - 1 modules stand beside it. n = 1 is a plain L-layer Transformer in all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.model import block, layers, params
from mtp_jax.parallel import sharding


class Inputs(NamedTuple):
  """What a head may read. `carry` is what the head before it in the scan handed
  on (z before the first), `next_emb` the embedding of head k - 1's token (t + k
  - 1, unless heads leap), already known when head k drafts its own; None unless
  the family feeds tokens."""

  norm_D: Any  # of the trunk, before the unembedding
  z_BTD: Any
  carry_BTD: Any
  next_emb_BTD: Any


class Family(NamedTuple):
  """How head k is computed, before and after its layer if it has one.

  specs(cfg): of one module. enter(module, inputs, ctx, cfg) -> x_BTD, what the
  layer reads. leave(module, x_BTD, inputs, cfg) -> (carry_BTD, h_BTD), h normed
  as the unembedding reads it; x is what the layer gave.
  """

  specs: Callable[[schema.Config], Any]
  enter: Callable[..., Any]
  leave: Callable[..., tuple[Any, Any]]
  reverse: bool = False  # the scan starts at head n
  dependent: bool = False  # a head reads the carry
  feeds_tokens: bool = False  # a head reads next_emb
  one_module: bool = False  # serves all extra heads
  has_block: bool = True  # its module holds a layer


def step(module, x: Inputs, ctx, cfg):
  """(carry_BTD, h_BTD) of one head."""
  f = family(cfg)
  y_BTD = f.enter(module, x, ctx, cfg)
  if f.has_block:
    y_BTD = block.block(layer(module), y_BTD, ctx, cfg)
  return f.leave(module, y_BTD, x, cfg)


def identity(module, x: Inputs, ctx, cfg):
  """h_1 = z: head 1 of the identity-first families."""
  del module, ctx
  return x.carry_BTD, norm(x.z_BTD, x.norm_D, cfg)


def layer(module) -> block.Block:
  """That of a module which has one."""
  return module.block if isinstance(module, Sequential) else module


def norm(x_BTD, w_D, cfg):
  return layers.rms_norm(x_BTD, w_D, cfg.model.norm_eps)


def _enter_z(module, x: Inputs, ctx, cfg):
  """h_k = block_k(z) (Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737).

  RoPE and the mask are those of the query's own position t, whatever k is.
  """
  del module, ctx, cfg
  return x.z_BTD


def _leave(module, y_BTD, x: Inputs, cfg):
  del module
  return x.carry_BTD, norm(y_BTD, x.norm_D, cfg)


def _enter_chain(module, x: Inputs, ctx, cfg):
  """h_k = block_k(h_k-1), or of h_k+1 in reverse (same paper, appendix B).

  "Anticausal" orders the heads; attention is causal over positions in both.
  """
  del module, ctx, cfg
  return x.carry_BTD


def _leave_chain(module, y_BTD, x: Inputs, cfg):
  del module
  return y_BTD, norm(y_BTD, x.norm_D, cfg)


def _linear(module, x: Inputs, ctx, cfg):
  """h_k = W_k z (same paper, appendix B)."""
  del ctx
  proj_DE = _gathered(module, linear_specs(cfg), cfg).proj
  return jnp.einsum('BTD,DE->BTE', x.z_BTD, proj_DE, out_sharding=_RESIDUAL)


def _residual(module, x: Inputs, ctx, cfg):
  """h_k = y + silu(W_k y), y = norm(z), with no norm after it: Medusa's head
  (Cai et al. 2024, https://arxiv.org/abs/2401.10774)."""
  del ctx
  proj_DE = _gathered(module, linear_specs(cfg), cfg).proj
  y_BTD = norm(x.z_BTD, x.norm_D, cfg)
  w_BTD = jnp.einsum('BTD,DE->BTE', y_BTD, proj_DE, out_sharding=_RESIDUAL)
  return y_BTD + jax.nn.silu(w_BTD)


def _leave_residual(module, y_BTD, x: Inputs, cfg):
  del module, cfg
  return x.carry_BTD, y_BTD


def _enter_sequential(module, x: Inputs, ctx, cfg):
  """h_k = block_k(M_k [norm(h_k-1); norm(embedding of token t + k - 1)]), with
  M_k: 2D -> D and its own final norm; the raw h_k is handed on (DeepSeek-V3,
  2024, https://arxiv.org/abs/2412.19437, the report's order: hidden first).

  RoPE at the query's position t. At position 0 of a document the embedding is
  zeroed, as serving engines do.
  """
  w = _gathered(module, sequential_specs(cfg), cfg)
  known_BT1 = (ctx.position_BT > 0)[:, :, None]
  next_BTD = jnp.where(known_BT1, x.next_emb_BTD, 0)
  pair_BTE = jnp.concatenate(
    [norm(x.carry_BTD, w.hidden_norm, cfg), norm(next_BTD, w.embed_norm, cfg)], axis=-1
  )
  return jnp.einsum('BTE,ED->BTD', pair_BTE, w.proj, out_sharding=_RESIDUAL)


def _leave_sequential(module, y_BTD, x: Inputs, cfg):
  del x
  return y_BTD, norm(y_BTD, module.final_norm, cfg)


@flax.struct.dataclass
class Projection:
  """A linear or residual head."""

  proj: Any


@flax.struct.dataclass
class Sequential:
  """A module that reads the next token's embedding beside the hidden state."""

  hidden_norm: Any
  embed_norm: Any
  proj: Any
  block: Any
  final_norm: Any


_RESIDUAL = sharding.pspec('batch', None, None)


def _gathered(module, specs, cfg):
  """A module as compute reads it, but for its block, which gathers itself."""
  if isinstance(module, Sequential):
    module, specs = module.replace(block=None), specs.replace(block=None)
  return params.gather_cast(module, specs, cfg)


def linear_specs(cfg: schema.Config) -> Projection:
  D = cfg.model.d_model
  return Projection(proj=params.Spec((D, D), ('embed', None), D**-0.5, (1, 1)))


def sequential_specs(cfg: schema.Config) -> Sequential:
  D = cfg.model.d_model
  norm = params.Spec((D,), (None,), None)
  return Sequential(
    hidden_norm=norm,
    embed_norm=norm,
    proj=params.Spec((2 * D, D), ('embed', None), (2 * D) ** -0.5, (1, 1)),
    block=block.specs(cfg),
    final_norm=norm,
  )


FAMILIES = {
  'parallel': Family(block.specs, _enter_z, _leave),
  'causal': Family(block.specs, _enter_chain, _leave_chain, dependent=True),
  'anticausal': Family(block.specs, _enter_chain, _leave_chain, dependent=True, reverse=True),
  'linear': Family(linear_specs, _linear, _leave, has_block=False),
  'residual': Family(linear_specs, _residual, _leave_residual, has_block=False),
  'sequential': Family(
    sequential_specs, _enter_sequential, _leave_sequential, dependent=True, feeds_tokens=True
  ),
  'recursive': Family(
    sequential_specs,
    _enter_sequential,
    _leave_sequential,
    dependent=True,
    feeds_tokens=True,
    one_module=True,
  ),
}


def family(cfg: schema.Config) -> Family:
  return FAMILIES[cfg.heads.family]


def n_modules(cfg: schema.Config, n: int) -> int:
  """Modules that heads 1..n use."""
  if cfg.heads.block_first:
    return n
  return min(n - 1, 1) if family(cfg).one_module else n - 1


def specs(cfg: schema.Config):
  """All modules, stacked on a leading axis; None where there is none."""
  n = n_modules(cfg, cfg.heads.n)
  return params.stack(n, family(cfg).specs(cfg)) if n else None


def trunk_layers(cfg: schema.Config) -> int:
  """Block-like heads count as layers, head 1 too, so that n = 1 is a plain
  L-layer Transformer for every family."""
  return cfg.model.n_layers - (cfg.heads.n if cfg.heads.block_first else 0)


def next_token_layers(cfg: schema.Config) -> list[tuple[str, int]]:
  """The layers that compute the next token, trunk and head 1, in their order:
  each by the prefix of its leaves' paths and its index in them."""
  layers = [('trunk.', i) for i in range(trunk_layers(cfg))]
  if cfg.heads.block_first:
    # What head 1 sits on, then itself.
    first = cfg.heads.n if family(cfg).reverse else 1
    layers += [('heads.', k - 1) for k in range(first, 0, -1)]
  return layers


def scan_heads(body, carry, modules, per_head, cfg: schema.Config):
  """Visits heads 1..m in the family's order: lax.scan, but for an identity.

  Args:
    body: (step, carry, module, of_head) -> (carry, (out, of_module)).
    carry: what the first one gets.
    modules: stacked on the heads that have one; a single one if all share it.
    per_head: pytree with leading m.
    cfg: its family says what is scanned and how.

  Returns:
    (carry, (outs with leading m, of_modules stacked like modules)).
  """
  f = family(cfg)
  if cfg.heads.block_first:
    return jax.lax.scan(
      lambda carry, xs: body(step, carry, *xs), carry, (modules, per_head), reverse=f.reverse
    )
  first, rest = (
    jax.tree.map(lambda x: x[at], per_head)  # noqa: B023
    for at in (0, slice(1, None))
  )
  carry, (out, _) = body(identity, carry, None, first)
  outs = jax.tree.map(lambda x: x[None], out)
  if not jax.tree.leaves(rest)[0].shape[0]:
    return carry, (outs, jax.tree.map(jnp.zeros_like, modules))
  scanned, fixed = (None, modules) if f.one_module else (modules, None)
  carry, (more, of_modules) = jax.lax.scan(
    lambda carry, xs: body(step, carry, fixed if f.one_module else xs[0], xs[1]),
    carry,
    (scanned, rest),
  )
  return carry, (jax.tree.map(_prepend, outs, more), of_modules)


def _prepend(first, more):
  return jnp.concatenate([first, more])
