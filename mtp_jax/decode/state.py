"""TODO of mtp_jax.decode.speculative."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import setup as setup_lib
from mtp_jax.model import heads
from mtp_jax.parallel import sharding


class State(NamedTuple):
  """Of each row: what is known, what is drafted, how it went."""

  tokens_BS: Any  # the known ones; beyond them, what is drafted
  length_B: Any  # known tokens; all but the last are in the cache
  limit_B: Any  # the length at which a row ends
  done_B: Any
  seed_B: Any
  drafted_B: Any  # whether there are drafts yet
  candidates_BJX: Any  # of heads 2..W, best first
  q_BJV: Any  # what they were drawn from; None if greedy
  tail_BRD: Any  # z of the R positions before the window; None without
  forwards_B: Any
  asked_BJ: Any  # drafts that were compared, those before them having stood
  accepted_BJ: Any


class Caches(NamedTuple):
  stem: tuple[cache_lib.Layer, ...]
  heads: tuple[cache_lib.Layer, ...]


def start(tokens_BS, length_B, limit_B, seed_B, sampled: bool, s: setup_lib.Setup):
  """The State before anything was read. Under jit, arguments by rows.

  tokens_BS needs room for a window beyond the longest limit.
  """
  J, V = s.window - 1, s.cfg.model.vocab_size
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
      zeros(dtype=bool),
      zeros(J, width),
      zeros(J, V, dtype=jnp.float32) if sampled else None,
      zeros(s.again, s.cfg.model.d_model, dtype=s.cfg.model.compute_dtype) if s.again else None,
      zeros(),
      zeros(J),
      zeros(J),
    )

  return sharding.by_rows(rows, tokens_BS, length_B, limit_B, seed_B)


def cached_layers(s: setup_lib.Setup) -> tuple[int, int]:
  """That have keys and values: of the stem, of the heads after it."""
  f = heads.family(s.cfg)
  stem = heads.trunk_layers(s.cfg)
  if s.cfg.heads.block_first:
    stem += s.active if f.reverse else 1
  return stem, 0 if f.reverse or not f.has_block else s.window - 1


def empty(B: int, S: int, dtype, s: setup_lib.Setup) -> Caches:
  """Of S slots. Under jit; S needs room for M - 1 beyond the longest row."""
  stem, further = cached_layers(s)
  return Caches(
    cache_lib.empty(stem, B, S, s.cfg, dtype), cache_lib.empty(further, B, S, s.cfg, dtype)
  )
