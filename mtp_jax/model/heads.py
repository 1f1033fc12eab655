"""The prediction heads, one Family each: z -> the hidden state of head k.

Floor 2. A family is a few pure functions with the same signature, so that the
loss is one scan over heads whatever the family. To add one, write its specs and
its step and name it in FAMILIES and in config.Heads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from mtp_jax import config, params
from mtp_jax.model import block, layers


class Family(NamedTuple):
  """How head k is computed.

  specs(cfg): of one head. step(head, norm_D, z_BTD, carry_BTD, next_emb_BTD,
  ctx, cfg) -> (carry_BTD, h_BTD): `carry` is what the previous head of the scan
  handed on (z before the first), `next_emb` the embedding of token t + k - 1
  (None for a family that feeds no tokens back), h what the unembedding reads,
  normed.
  """

  specs: Callable[[config.Config], Any]
  step: Callable[..., tuple[Any, Any]]


def _parallel(head, norm_D, z_BTD, carry_BTD, next_emb_BTD, ctx, cfg):
  """h_k = block_k(z) (Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737).

  RoPE and the mask are those of the query's own position t, whatever k is.
  """
  del next_emb_BTD
  h_BTD = block.block(head, z_BTD, ctx, cfg)
  return carry_BTD, layers.rms_norm(h_BTD, norm_D, cfg.model.norm_eps)


FAMILIES = {
  'parallel': Family(specs=block.specs, step=_parallel),
}


def family(cfg: config.Config) -> Family:
  return FAMILIES[cfg.heads.family]


def specs(cfg: config.Config):
  """All heads, stacked on a leading K axis."""
  return params.stack(cfg.heads.n, family(cfg).specs(cfg))


def trunk_layers(cfg: config.Config) -> int:
  """Each head is a layer, head 1 too: n = 1 is a plain L-layer Transformer."""
  return cfg.model.n_layers - cfg.heads.n
