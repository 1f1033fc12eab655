"""The whole model: its parameters, and the way from tokens to z. Floor 2."""

from typing import Any

import flax.struct
import jax

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


def hidden(lm: LM, x_BTD, position_BT, cfg: schema.Config):
  """embeddings -> (z_BTD, context): one pass through the trunk."""
  ctx = block.context(position_BT, cfg)
  return trunk.trunk(lm.trunk, x_BTD, ctx, cfg), ctx


def next_embeddings(emb_BUD, k, ctx: block.Context, cfg: schema.Config):
  """What a token-feeding head k reads at t: the token of head k - 1."""
  T = ctx.position_BT.shape[1]
  start = 1 + cfg.heads.stride * (k - 2)
  return jax.lax.dynamic_slice_in_dim(emb_BUD, start, T, axis=1)
