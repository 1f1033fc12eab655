"""The whole model: its parameters, and the way from tokens to hidden states."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.model import block, heads, layers, params, trunk


@flax.struct.dataclass
class LM:
  """Parameters; their field names are the paths in a checkpoint."""

  embed: Any
  trunk: block.Block
  heads: Any
  norm: Any
  unembed: Any
  order: Any  # a second unembedding of head 1, for --loss.token_order_weight


def specs(cfg: schema.Config) -> LM:
  D, V = cfg.model.d_model, cfg.model.vocab_size
  S = params.Spec
  table = S((V, D), ('vocab', 'embed'), D**-0.5)
  unembed = S((D, V), ('embed', 'vocab'), D**-0.5)
  return LM(
    embed=table,
    trunk=params.stack(heads.trunk_layers(cfg), block.specs(cfg)),
    heads=heads.specs(cfg),
    norm=S((D,), (None,), None),
    unembed={'shared': unembed, 'replicated': params.stack(cfg.heads.n, unembed), 'tied': None}[
      cfg.heads.unembedding
    ],
    order=table if cfg.loss.token_order_weight else None,
  )


def embed(lm: LM, tokens_BU, cfg: schema.Config):
  """Embeddings of all tokens of a window, in the compute dtype."""
  with jax.named_scope('embed'):
    table_VD = params.gather(lm.embed, specs(cfg).embed, cfg)
    x_BUD = layers.embed(table_VD, tokens_BU)
    return x_BUD.astype(cfg.model.compute_dtype)


def trunk_output(model: LM, x_BTD, position_BT, cfg: schema.Config):
  """Returns (z_BTD, ctx): one forward pass of embeddings through the trunk, and the
  positions that every later layer needs."""
  ctx = block.context(position_BT, cfg)
  return trunk.trunk(model.trunk, x_BTD, ctx, cfg), ctx


def next_embeddings(emb_BUD, k, T: int, cfg: schema.Config):
  """Returns the embeddings (B, T, D) that head k reads, of those of a whole window."""
  start = heads.next_token_offset(k, cfg)
  return jax.lax.dynamic_slice_in_dim(emb_BUD, start, T, axis=1)


def head_step(
  module,
  k,
  x: heads.Inputs,
  ctx: block.Context,
  cfg: schema.Config,
  *,
  feed,
  apply_block=block.block,
):
  """Computes head k: feed, block input, block, block output. The only body of
  every scan over heads: loss, scores, decoder and `forward`.

  Args:
    module: its parameters; None for an identity head.
    k: the head's number, from 1; may be traced.
    x: what it reads, but for the embedding that it is fed.
    ctx: positions of the window.
    cfg: the Config.
    feed: k -> next_emb_BTD, called where the family uses the next token.
    apply_block: in place of `block.block`, see `heads.step`.

  Returns:
    (carry_BTD, h_BTD): what the next head in the scan reads, and this one's hidden
    state, normed for the unembedding.
  """
  if module is None:
    if heads.family(cfg).is_chained:
      x = x._replace(z_BTD=x.carry_BTD)  # the same numbers; gradients join here
  elif heads.family(cfg).uses_next_token:
    x = x._replace(next_emb_BTD=feed(k))
  return heads.step(module, x, ctx, cfg, apply_block)


def forward(model: LM, tokens_BT, cfg: schema.Config):
  """Computes every head's hidden state.

  Args:
    model: parameters.
    tokens_BT: token ids, each row one document from its start.
    cfg: the Config.

  Returns:
    h_KBTD: of head k at position t, normed for the unembedding, in the compute
    dtype. A head that reads the next token reads zeros where that token lies
    beyond T: its last `offset` positions are not those of a longer row.
  """
  B, T = tokens_BT.shape
  n = cfg.heads.n
  position_BT = jax.lax.broadcasted_iota(tokens_BT.dtype, (B, T), 1)
  position_BT = jax.reshard(position_BT, jax.typeof(tokens_BT).sharding.spec)
  emb_BTD = embed(model, tokens_BT, cfg)
  z_BTD, ctx = trunk_output(model, emb_BTD, position_BT, cfg)
  emb_BUD = jnp.pad(emb_BTD, ((0, 0), (0, cfg.heads.offsets[-1]), (0, 0)))
  norm_D = params.gather(model.norm, specs(cfg).norm, cfg)

  def head(carry_BTD, module, k):
    x = heads.Inputs(norm_D=norm_D, z_BTD=z_BTD, carry_BTD=carry_BTD)
    carry_BTD, h_BTD = head_step(
      module, k, x, ctx, cfg, feed=lambda k: next_embeddings(emb_BUD, k, T, cfg)
    )
    return carry_BTD, (h_BTD, None)

  modules = heads.active_modules(model.heads, n, cfg)
  _, (h_KBTD, _) = heads.scan_heads(head, z_BTD, modules, jnp.arange(1, n + 1), cfg)
  return h_KBTD


def logits(model: LM, tokens_BT, cfg: schema.Config):
  """Computes every head's logits (K, B, T, V) in float32: those of the token that
  head k predicts, `cfg.heads.offsets[k - 1]` tokens after position t.

  All heads' logits are in memory at the same time, which training never needs;
  see `forward` for the arguments and for the last positions.
  """
  h_KBTD = forward(model, tokens_BT, cfg)
  of = {'shared': model.unembed, 'tied': model.embed, 'replicated': model.unembed}
  spec = specs(cfg)
  w = of[cfg.heads.unembedding]
  if cfg.heads.unembedding == 'tied':
    unembed = params.gather(w, spec.embed, cfg).T
  else:
    unembed = params.gather(w, spec.unembed, cfg)
  product = 'KBTD,KDV->KBTV' if cfg.heads.unembedding == 'replicated' else 'KBTD,DV->KBTV'
  return jnp.einsum(
    product, h_KBTD, unembed.astype(h_KBTD.dtype), preferred_element_type=jnp.float32
  )
