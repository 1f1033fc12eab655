"""The whole model: its parameters, and the way from tokens to z. Floor 2."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mtp_jax import config, params
from mtp_jax.model import block, heads, layers, trunk


@flax.struct.dataclass
class LM:
  """Parameters; their field names are the paths in a checkpoint."""

  embed: Any
  trunk: block.Block
  heads: Any
  norm: Any
  unembed: Any


def specs(cfg: config.Config) -> LM:
  D, V = cfg.model.d_model, cfg.model.vocab_size
  S = params.Spec
  return LM(
    embed=S((V, D), ('vocab', 'embed'), D**-0.5),
    trunk=params.stack(heads.trunk_layers(cfg), block.specs(cfg)),
    heads=heads.specs(cfg),
    norm=S((D,), (None,), None),
    unembed=S((D, V), ('embed', 'vocab'), D**-0.5),
  )


def hidden(lm: LM, tokens_BT, position_BT, cfg: config.Config):
  """tokens -> (z_BTD, context): one pass through embedding and trunk."""
  ctx = block.context(position_BT, cfg)
  with jax.named_scope('embed'):
    table_VD = params.gather(
      lm.embed, specs(cfg).embed, cfg.model.compute_dtype, cfg.loss.grad_dtype
    )
    x_BTD = layers.embed(table_VD, tokens_BT)
    x_BTD = x_BTD.astype(jnp.dtype(cfg.model.compute_dtype))
  return trunk.trunk(lm.trunk, x_BTD, ctx, cfg), ctx
