"""Drafting: heads 2..W propose tokens after the last accepted one."""

import functools

import jax
import jax.numpy as jnp

from mtp_jax.decode import sample
from mtp_jax.decode import setup as setup_lib
from mtp_jax.decode import state as state_lib
from mtp_jax.decode import window as window_lib
from mtp_jax.model import confidence, heads, layers, lm
from mtp_jax.parallel import sharding


def draft(
  w, states, state: state_lib.State, caches, *, root_B, n_accepted_B, sampling, s: setup_lib.Setup
):
  """Computes heads 2..W over the window and drafts after its last accepted token."""
  cfg, f, W, R = s.cfg, heads.family(s.cfg.heads), s.window, s.num_reread
  S = state_lib.cache_length(state, s)

  def positions(root_B, n_B):
    position_BT = root_B[:, None] - R + jnp.arange(R + W)[None]
    return position_BT, (root_B + n_B)[:, None], n_B + R, root_B + W

  position_BT, last_B1, at_B, end_B = sharding.by_rows(positions, root_B, n_accepted_B)
  window = functools.partial(window_lib.window, S=S, cfg=cfg)
  here = window(position_BT, position_BT, end_B)
  query = window_lib.QueryPosition(at_B, window(last_B1, last_B1, end_B))
  z_BTD, carry_BTD = window_lib.trunk_state(states, s), states[-1]
  if R:
    z_BTD = carry_BTD = sharding.by_rows(
      lambda *x: jnp.concatenate(x, axis=1), state.tail_BRD, z_BTD
    )
    state = state._replace(
      tail_BRD=sharding.by_rows(
        lambda x_BTD, n_B: jnp.take_along_axis(
          x_BTD, (1 + n_B[:, None] + jnp.arange(R)[None])[:, :, None], axis=1
        ),
        z_BTD,
        n_accepted_B,
      )
    )

  carry_BTD = window_lib.first_carry(w, carry_BTD, cfg)

  def propose(state, logits_BKX, first):
    logits_BKV = lm.of_all_tokens(logits_BKX, cfg)
    same = sampling, jnp.int32(first)
    return sharding.by_rows(_propose, state, logits_BKV, last_B1, same=same)

  of_head, hidden, written = window_lib.OfHead(carry_BTD, None), [], []
  for k in range(2, 3 if s.min_confidence else W + 1):
    if f.reverse:
      raw_B1D = window_lib.take_position(states[len(states) - k], at_B)
      h_B1D = layers.rms_norm(raw_B1D, w.norm, cfg.model)
    else:
      at_query = k > 2 and cfg.heads.share_keys_values
      next_BT = None
      if f.uses_next_token:
        next_BT = sharding.by_rows(
          functools.partial(_next_tokens, offset=heads.next_token_offset(k, cfg.heads.stride)),
          state.tokens_BS,
          last_B1 if at_query else position_BT,
        )
      if at_query:
        of_head = window_lib.later_step(w, k, of_head, next_BT, here=query.window, s=s)
      else:
        kv = caches.heads[k - 2] if f.has_block else None
        of_head = window_lib.head(
          w, k, z_BTD, of_head.carry_BTD, kv, next_BT=next_BT, here=here, query=query, s=s
        )
        written.append(of_head.kv)
      h_B1D = of_head.h_BTD
    if f.uses_next_token:
      state = propose(state, window_lib.logits(w, h_B1D, k, cfg), k)
    hidden.append(h_B1D)
  if s.min_confidence:
    state = _while_confident(w, state, of_head, propose, last_B1, query=query, s=s)
  elif w.markov is not None:
    logits_BKV = window_lib.all_logits(w, hidden, cfg)
    for k in range(2, W + 1):
      before_B1 = sharding.by_rows(
        functools.partial(_next_tokens, offset=k - 1), state.tokens_BS, last_B1
      )
      gained_B1V = window_lib.markov_bias(w, before_B1)
      state = propose(state, logits_BKV[:, k - 2 : k - 1] + gained_B1V, k)
  elif not f.uses_next_token:
    state = propose(state, window_lib.all_logits(w, hidden, cfg), 2)
  if caches.heads:
    caches = caches._replace(heads=tuple(written))
  return state, caches


def _while_confident(w, state: state_lib.State, of_head, propose, last_B1, *, query, s):
  """Drafts with heads 3..W, of each row while the product of the confidences in the drafts so
  far is at least s.min_confidence, as long as there is such a row. Whether a draft is made
  does not depend on the draft, so that rejection sampling stays exact."""

  def confident(of_head, product_B):
    c_B = jax.nn.sigmoid(confidence.logits(of_head.h_BTD, w.confidence))[:, 0]
    return product_B * jax.reshard(c_B, jax.typeof(product_B).sharding.spec)

  def more(carry):
    state, _, product_B, k = carry
    return (k <= s.window) & jnp.any((product_B >= s.min_confidence) & ~state.done_B)

  def step(carry):
    state, carry_B1D, product_B, k = carry
    offset = heads.next_token_offset(k, s.cfg.heads.stride)
    next_B1 = sharding.by_rows(_next_tokens, state.tokens_BS, last_B1, same=(offset,))
    before = of_head._replace(carry_BTD=carry_B1D)
    found = window_lib.later_step(w, k, before, next_B1, here=query.window, s=s)
    state = propose(state, window_lib.logits(w, found.h_BTD, 2, s.cfg), k)
    n_drafts_B = state.n_drafts_B + (product_B >= s.min_confidence)
    state = state._replace(n_drafts_B=n_drafts_B)
    return state, found.carry_BTD, confident(found, product_B), k + 1

  one_B = jnp.ones_like(state.n_drafts_B)
  state = state._replace(n_drafts_B=one_B)
  first = state, of_head.carry_BTD, confident(of_head, one_B.astype(jnp.float32)), jnp.int32(3)
  return jax.lax.while_loop(more, step, first)[0]


def _next_tokens(tokens_BS, position_BT, offset):
  """Returns the token `offset` ahead of each position."""
  at_BT = jnp.maximum(position_BT + offset, 0)
  return jnp.take_along_axis(tokens_BS, at_BT, axis=1)


def _propose(state: state_lib.State, logits_BKV, last_B1, sampling, first):
  """Drafts with heads first, first + 1 …; the best candidate of each is appended to
  the known tokens, where heads that use the next token read it."""
  K = logits_BKV.shape[1]
  at_BK = last_B1 + first + jnp.arange(K)[None]

  def put(of_all, new):
    return jax.lax.dynamic_update_slice_in_dim(of_all, new, first - 2, axis=1)

  q_BJV, candidates_BJX = state.q_BJV, state.candidates_BJX
  X = candidates_BJX.shape[2]
  if sampling is not None:
    q_BKV = sample.probabilities(logits_BKV, sampling)
    # Drafts to be accepted where equal use the random numbers of head 1's draw.
    purpose = sample.DRAW if q_BJV is None else sample.DRAFT
    new_BKX = sample.draw(q_BKV, state.seed_B, at_BK, purpose)[:, :, None]
    if q_BJV is not None:
      q_BJV = put(q_BJV, q_BKV)
  elif X == 1:
    new_BKX = jnp.argmax(logits_BKV, axis=-1, keepdims=True).astype(jnp.int32)
  else:
    _, new_BKX = jax.lax.top_k(logits_BKV, X)
  b_B1 = jnp.arange(logits_BKV.shape[0])[:, None]
  return state._replace(
    tokens_BS=state.tokens_BS.at[b_B1, at_BK].set(new_BKX[:, :, 0], mode='drop'),
    candidates_BJX=put(candidates_BJX, new_BKX),
    q_BJV=q_BJV,
  )
