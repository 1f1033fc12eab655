"""A Markov head: what head k's logits gain by the token before the one it drafts.

  logits_k(t) += W2^T W1[x_{t+k-1}],  W1: V x r, W2: r x V, for heads >= 2

(V in W2 is the draft vocabulary of --heads.draft_vocab, where there is one)

(DSpark, 2026, https://arxiv.org/abs/2607.05147). Heads that read the trunk alone draft
their tokens independently of each other; with this bias head k's draft depends on head
k - 1's, at the cost of a product of rank r. In training x is the text, in decoding the
draft. All heads share W1 and W2, which is 0 at first.
"""

from typing import Generic

import flax.struct
import jax
import jax.numpy as jnp

from mtp_jax.config import draft_vocab, schema
from mtp_jax.model import layers, params


class Markov(flax.struct.PyTreeNode, Generic[params.Leaf]):
  """W1 and W2; field names are checkpoint paths."""

  embed: params.Leaf
  unembed: params.Leaf


def specs(cfg: schema.Config) -> Markov[params.Spec] | None:
  """Returns the specs; None without --heads.markov_rank, or without heads >= 2."""
  V, D, R = cfg.model.vocab_size, cfg.model.d_model, cfg.heads.markov_rank
  X = draft_vocab.size(cfg)
  if not R or cfg.heads.n == 1:
    return None
  return Markov(
    embed=params.Spec((V, R), ('vocab', 'embed'), D**-0.5),
    unembed=params.Spec((R, X), ('embed', 'vocab'), 0.0),  # heads that exist do not change
  )


def rows(embed_VR, tokens_BU, k, T: int, cfg: schema.Config):
  """Returns the rows (B, T, r) of W1 that head k reads in a window, in the compute
  dtype; k may be traced."""
  before_BT = jax.lax.dynamic_slice_in_dim(tokens_BU, k - 1, T, axis=1)
  return layers.embed(embed_VR, before_BT).astype(cfg.model.compute_dtype)


def bias(rows_BTR, unembed_RV):
  """Returns W2^T rows in float32, (B, T, V)."""
  return layers.product(
    'BTR,RV->BTV', rows_BTR, unembed_RV.astype(rows_BTR.dtype), preferred_element_type=jnp.float32
  )
