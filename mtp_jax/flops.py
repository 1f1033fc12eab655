"""FLOPs of a training token, by formula. Floor 3."""

import jax

from mtp_jax import config, params
from mtp_jax.model import heads, lm


def flops_per_token(
  cfg: config.Config, n_active: int, causal: bool = True
) -> float:
  """Model FLOPs of one training token: forward, and twice that backward.

  Two a weight of a matrix product (the unembedding once a head and once for
  the order of tokens, the embedding not at all) and 4 N H a layer for each key
  that attention sees: T / 2 of them on average. With causal=False all T, which
  is the convention of Chowdhery et al. 2022 (https://arxiv.org/abs/2204.02311,
  appendix B), and what a program does that masks scores instead of skipping
  them. A frozen group has no gradient of weights, and a frozen trunk no
  backward at all. Recomputation is not counted: it is a cost, not work.
  """
  m = cfg.model
  # Head 1 of an identity-first family has no module.
  modules = n_active if cfg.heads.block_first else n_active - 1
  family = heads.family(cfg)
  keys = cfg.data.seq_len / 2 if causal else cfg.data.seq_len
  attention = 4 * keys * m.n_attn_heads * m.head_width
  trunk, head = (
    2 * _matrices(specs) + layers * attention
    for specs, layers in (
      (lm.specs(cfg).trunk, heads.trunk_layers(cfg)),
      (family.specs(cfg), family.has_block),
    )
  )
  own = cfg.heads.unembedding == 'replicated'
  trunk_moves, heads_move = cfg.optim.trunk_lr > 0, cfg.optim.heads_lr > 0
  unembedding = 2 * m.d_model * m.vocab_size
  return (
    (3 if trunk_moves else 1) * trunk
    + (2 + heads_move) * modules * head
    + (2 + (heads_move if own else trunk_moves)) * n_active * unembedding
    + (2 + heads_move) * (cfg.loss.order_weight > 0) * unembedding
  )


def _matrices(specs) -> int:
  return params.count([s for s in jax.tree.leaves(specs) if s.decay])
