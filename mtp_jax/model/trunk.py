"""The trunk: a scan over stacked layers, with rematerialization."""

import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.model import block, layers

POLICIES = {
  'block': jax.checkpoint_policies.save_only_these_names(layers.MEAN_SQUARE),
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def trunk(stacked: block.Block, x_BTD, ctx: block.Context, cfg: schema.Config, types):
  """Applies the stacked layers; --model.remat selects what each saves for backward.

  types: index of each layer's type in layer_types.distinct(cfg).
  """
  traced = len(set(types)) > 1

  def layer(x_BTD, xs):
    params, layer_type = xs
    return block.block(params, x_BTD, ctx, cfg, layer_type if traced else types[0]), None

  if cfg.model.remat != 'none':
    layer = jax.checkpoint(layer, policy=POLICIES[cfg.model.remat])
  with jax.named_scope('trunk'):
    z_BTD, _ = jax.lax.scan(layer, x_BTD, (stacked, jnp.array(types) if traced else None))
  return z_BTD
