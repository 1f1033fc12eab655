"""Self-speculative decoding: prefill, and the loop of verify and draft.

Each forward pass verifies the drafts of the previous one with head 1 and drafts
anew with heads 2..W (Stern et al. 2018, https://arxiv.org/abs/1811.03115).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import draft, verify
from mtp_jax.decode import setup as setup_lib
from mtp_jax.decode import state as state_lib
from mtp_jax.decode import weights as weights_lib
from mtp_jax.decode import window as window_lib
from mtp_jax.model import block, heads, layers
from mtp_jax.parallel import sharding


@functools.partial(jax.jit, static_argnames=('C', 's'), donate_argnames=('state', 'caches'))
def prefill(
  w: weights_lib.Weights,
  state: state_lib.State,
  caches: state_lib.Caches,
  first,
  *,
  C: int,
  s: setup_lib.Setup,
):
  """Reads C tokens of all rows from position `first` on: prompts without their last
  token, which the first window reads.

  Shorter rows are padded: slots beyond a row's length are masked out, then
  overwritten. Returns (state, caches).
  """
  f, cfg = heads.family(s.cfg.heads), s.cfg

  def tokens(tokens_BS, ahead):
    return jax.lax.dynamic_slice_in_dim(tokens_BS, ahead, C, axis=1)

  def read(k):
    return sharding.by_rows(tokens, state.tokens_BS, same=(first + k,))

  def positions(length_B, first):
    return jnp.broadcast_to(first + jnp.arange(C), (length_B.shape[0], C)), length_B - 1

  position_BC, end_B = sharding.by_rows(positions, state.length_B, same=(first,))
  here = window_lib.window(position_BC, first, end_B, S=state_lib.cache_length(state, s), cfg=cfg)
  states, caches = window_lib.stem(w, read(0), caches, here, s)
  z_BCD = window_lib.trunk_state(states, s)
  carry_BCD, written = states[-1], []
  if caches.heads:
    carry_BCD = window_lib.first_carry(w, carry_BCD, cfg)
  for k, kv in enumerate(caches.heads, 2):
    of_head = window_lib.head(
      w,
      k,
      z_BCD,
      carry_BCD,
      kv,
      next_BT=read(heads.next_token_offset(k, cfg.heads.stride)),
      here=here,
      query=None,
      s=s,
    )
    carry_BCD = of_head.carry_BTD
    written.append(of_head.kv)
  if f.uses_next_token and s.num_reread:
    state = state._replace(
      tail_BRD=sharding.by_rows(_tail, state.tail_BRD, z_BCD, state.length_B, same=(first,))
    )
  return state, caches._replace(heads=tuple(written))


def _tail(tail_BRD, z_BCD, length_B, first):
  """Returns z of the R positions before a row's last token, where in this chunk."""
  R, C = tail_BRD.shape[1], z_BCD.shape[1]
  at_BR = length_B[:, None] - 1 - R + jnp.arange(R)[None] - first
  here_BRD = jnp.take_along_axis(z_BCD, jnp.clip(at_BR, 0, C - 1)[:, :, None], axis=1)
  inside_BR1 = ((at_BR >= 0) & (at_BR < C))[:, :, None]
  return jnp.where(inside_BR1, here_BRD, tail_BRD)


# The loop, and one forward pass of it.


@functools.partial(jax.jit, static_argnames=('s',), donate_argnames=('state', 'caches'))
def run(
  w: weights_lib.Weights,
  state: state_lib.State,
  caches: state_lib.Caches,
  *,
  max_forwards,
  max_accept,
  sampling,
  s: setup_lib.Setup,
):
  """Decodes until all rows are done, in at most max_forwards forward passes.

  Args:
    w: the Weights.
    state: donated, as are the caches.
    caches: of the prompts without their last tokens.
    max_forwards: limit of this call; another call continues.
    max_accept: maximum number of accepted drafts per forward pass. With 0 the same
      program decodes one token per forward pass.
    sampling: sample.Sampling, or None for greedy.
    s: the static Setup.

  Returns:
    (state, caches).
  """

  def more(carry):
    state, _, i = carry
    return (i < max_forwards) & ~jnp.all(state.done_B)

  def forward(carry):
    state, caches, i = carry
    state, caches = _forward(w, state, caches, max_accept=max_accept, sampling=sampling, s=s)
    return state, caches, i + 1

  state, caches, _ = jax.lax.while_loop(more, forward, (state, caches, jnp.int32(0)))
  return state, caches


def _forward(
  w, state: state_lib.State, caches: state_lib.Caches, *, max_accept, sampling, s: setup_lib.Setup
):
  cfg = s.cfg
  S = state_lib.cache_length(state, s)
  tokens_BM, position_BM, slot_BM, seen_BMS = sharding.by_rows(
    functools.partial(_read_window, S=S, tree=s.tree), state
  )
  here = window_lib.Window(
    block.context(position_BM, cfg),
    slot_BM,
    seen_BMS,
    end_B1=slot_BM[:, -1:] + 1,
    tree_TT=None if s.tree.is_chain else setup_lib.sees(s.tree),
  )
  with jax.named_scope('stem'):
    states, caches = window_lib.stem(w, tokens_BM, caches, here, s)
    h_BMD = layers.rms_norm(states[-1], w.norm, cfg.model)
    logits_BMV = window_lib.logits(w, h_BMD, 1, cfg)
  with jax.named_scope('verify'):
    root_B = state.length_B - 1
    state, n_accepted_B, path_BW = sharding.by_rows(
      functools.partial(verify.verify, s=s),
      state,
      tokens_BM,
      logits_BMV,
      same=(max_accept, sampling),
    )
  if s.window == 1:
    return state, caches
  if not s.tree.is_chain:
    states, caches = verify.keep_path(states, caches, root_B, path_BW)
  with jax.named_scope('draft'):
    return draft.draft(
      w, states, state, caches, root_B=root_B, n_accepted_B=n_accepted_B, sampling=sampling, s=s
    )


def _read_window(state: state_lib.State, S: int, tree: setup_lib.Tree):
  """Returns (tokens_BM, position_BM, slot_BM, seen_BMS) of each row's next window."""
  M = len(tree.depth_M)
  root_B1 = state.length_B[:, None] - 1
  known_B1 = jnp.take_along_axis(state.tokens_BS, root_B1, axis=1)
  of_draft = np.array(tree.depth_M[1:], int) - 1, np.array(tree.rank_M[1:], int)
  drafts_BX = state.candidates_BJX[:, *of_draft] if M > 1 else known_B1[:, :0]
  position_BM = root_B1 + jnp.array(tree.depth_M)[None]
  slot_BM = root_B1 + jnp.arange(M)[None]
  slot_11S = jnp.arange(S)[None, None]
  if tree.is_chain:
    seen_BMS = slot_11S <= position_BM[:, :, None]
  else:
    mask_MM = setup_lib.sees(tree)
    at_BS = jnp.arange(S)[None] - root_B1
    above_BSM = jnp.array(mask_MM.T)[jnp.clip(at_BS, 0, M - 1)]
    inside_BS1 = ((at_BS >= 0) & (at_BS < M))[:, :, None]
    seen_BSM = (at_BS < 0)[:, :, None] | (inside_BS1 & above_BSM)
    seen_BMS = seen_BSM.swapaxes(1, 2)
  tokens_BM = jnp.concatenate([known_B1, drafts_BX], axis=1)
  return tokens_BM, position_BM, slot_BM, seen_BMS
