"""Verification of drafts with head 1's logits, and the cache after it."""

import jax.numpy as jnp

from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import sample
from mtp_jax.decode import state as state_lib
from mtp_jax.parallel import sharding


def verify(state: state_lib.State, tokens_BM, logits_BMV, max_accept, sampling, *, s):
  """Returns (state with the emitted tokens, accepted drafts (B,), path_BW)."""
  W, J = s.window, s.window - 1
  tokens_BS, length_B, live_B = state.tokens_BS, state.length_B, ~state.done_B
  allowed_B = jnp.where(live_B, jnp.minimum(max_accept, state.n_drafts_B), 0)
  index_1W = jnp.arange(W)[None]
  if state.q_BJV is None:
    wanted_BM = sample.tokens(logits_BMV, state.seed_B, length_B[:, None] + index_1W, sampling)
    n_B, path_BW, emitted_BW = sample.accept_equal(tokens_BM, wanted_BM, allowed_B, s.tree.levels)
  else:
    n_B, emitted_BW = sample.accept_sampled(
      tokens_BM,
      logits_BMV,
      state.q_BJV,
      allowed_B,
      seed_B=state.seed_B,
      index_BW=length_B[:, None] + index_1W,
      s=sampling,
    )
    path_BW = jnp.broadcast_to(index_1W, emitted_BW.shape)
  new_B = jnp.minimum(n_B + 1, state.limit_B - length_B)
  stops_BW = jnp.zeros(emitted_BW.shape, bool)
  for stop_id in s.stop_ids:
    stops_BW |= emitted_BW == stop_id
  stops_BW &= index_1W < new_B[:, None]
  stopped_B = jnp.any(stops_BW, axis=1)
  new_B = jnp.where(stopped_B, 1 + jnp.argmax(stops_BW, axis=1), new_B)
  new_B = jnp.where(live_B, new_B, 0)
  at_BW = jnp.where(index_1W < new_B[:, None], length_B[:, None] + index_1W, tokens_BS.shape[1])
  b_B1 = jnp.arange(tokens_BS.shape[0])[:, None]
  draft_1J = 1 + jnp.arange(J)[None]
  proposed_BJ = (draft_1J <= allowed_B[:, None]) & (
    draft_1J <= jnp.minimum(n_B + 1, new_B)[:, None]
  )
  return (
    state._replace(
      tokens_BS=tokens_BS.at[b_B1, at_BW].set(emitted_BW, mode='drop'),
      length_B=length_B + new_B,
      done_B=~live_B | stopped_B | (length_B + new_B >= state.limit_B),
      n_drafts_B=jnp.full_like(length_B, J),
      forwards_B=state.forwards_B + live_B,
      proposed_BJ=state.proposed_BJ + proposed_BJ,
      accepted_BJ=state.accepted_BJ + (proposed_BJ & (draft_1J <= n_B[:, None])),
    ),
    n_B,
    path_BW,
  )


def keep_path(states, caches: state_lib.Caches, root_B, path_BW):
  """Compacts states and caches to the accepted path of a tree, as of a chain."""

  def slots(root_B, path_BW):
    W = path_BW.shape[1]
    return root_B[:, None] + path_BW, root_B[:, None] + jnp.arange(W)[None]

  def along(x_BMD, path_BW):
    return jnp.take_along_axis(x_BMD, path_BW[:, :, None], axis=1)

  from_BW, to_BW = sharding.by_rows(slots, root_B, path_BW)
  stem = tuple(
    cache_lib.move(kv, from_BW % kv.k_BGSH.shape[2], to_BW % kv.k_BGSH.shape[2])
    for kv in caches.stem
  )
  states = [sharding.by_rows(along, x, path_BW) for x in states]
  return states, caches._replace(stem=stem)
