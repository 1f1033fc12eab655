"""The carry of the decoding loop: per-row state and key/value caches."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from mtp_jax.config import layer_types
from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import setup as setup_lib
from mtp_jax.model import heads
from mtp_jax.parallel import sharding


class State(NamedTuple):
  """The state of each row: known tokens, drafts, counters."""

  tokens_BS: Any  # known tokens, followed by drafts
  length_B: Any  # number of known tokens; all but the last are in the cache
  limit_B: Any  # maximum length of a row
  done_B: Any
  seed_B: Any
  n_drafts_B: Any  # drafts of the row, at most W - 1
  candidates_BJX: Any  # drafts of heads 2..W, best first
  q_BJV: Any  # the distributions of the drafts; None if accepted only where equal
  tail_BRD: Any  # z of the R positions before the window; None if R = 0
  forwards_B: Any  # forward passes
  proposed_BJ: Any  # drafts verified, those before them having been accepted
  accepted_BJ: Any


class Caches(NamedTuple):
  stem: tuple[cache_lib.Layer, ...]
  heads: tuple[cache_lib.Layer, ...]


def start(tokens_BS, length_B, limit_B, seed_B, *, rejection: bool, s: setup_lib.Setup):
  """Returns the initial State; call it under jit.

  tokens_BS must have room for a window beyond the longest limit. rejection: whether
  drafts are accepted by rejection sampling.
  """
  J, V, R = s.window - 1, s.cfg.model.vocab_size, s.num_reread
  width = max(s.tree.widths, default=1)

  def rows(tokens_BS, length_B, limit_B, seed_B):
    B = tokens_BS.shape[0]

    def zeros(*shape, dtype=jnp.int32):
      return jnp.zeros((B, *shape), dtype)

    return State(
      tokens_BS,
      length_B,
      limit_B,
      length_B >= limit_B,
      seed_B,
      zeros(),
      zeros(J, width),
      zeros(J, V, dtype=jnp.float32) if rejection else None,
      zeros(R, s.cfg.model.d_model, dtype=s.cfg.model.compute_dtype) if R else None,
      zeros(),
      zeros(J),
      zeros(J),
    )

  return sharding.by_rows(rows, tokens_BS, length_B, limit_B, seed_B)


def cached_layers(s: setup_lib.Setup) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the layer types of the cached layers (of the stem, of the heads after it),
  as indices in layer_types.distinct."""
  f, cfg = heads.family(s.cfg.heads), s.cfg
  of_heads, stem = heads.types_of_heads(cfg), heads.types_of_trunk(cfg)
  if cfg.heads.block_first:
    first = s.active if f.reverse else 1
    stem += of_heads[:first][::-1]
  last = min(s.window, 2) if cfg.heads.share_keys_values else s.window
  return stem, () if f.reverse or not f.has_block else of_heads[1:last]


def slots(S: int, s: setup_lib.Setup) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the slots of each cached layer (of the stem, of the heads after it)."""
  types, spare = layer_types.distinct(s.cfg), s.slots + s.num_reread
  stem, further = (
    tuple(cache_lib.slots(S, types[i].window, spare) for i in layers) for layers in cached_layers(s)
  )
  return stem, further


def empty(B: int, S: int, dtype, s: setup_lib.Setup) -> Caches:
  """Returns caches of S slots, M - 1 more than the longest row, fewer in layers with a
  sliding window; call it under jit."""
  return Caches(*(cache_lib.empty(of, B, s.cfg.model, dtype) for of in slots(S, s)))


def cache_length(state: State, s: setup_lib.Setup) -> int:
  """Returns S, the slots of a layer without a window."""
  return state.tokens_BS.shape[1] - s.window
