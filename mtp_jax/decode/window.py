"""TODO of mtp_jax.decode.speculative."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import setup as setup_lib
from mtp_jax.decode import state as state_lib
from mtp_jax.decode import weights as weights_lib
from mtp_jax.model import block, heads, layers, lm, params
from mtp_jax.parallel import sharding

# Layers over a window.


class Window(NamedTuple):
  """Positions of each row that are computed at once."""

  ctx: block.Context
  slot: Any  # (B, T), or that of the first, where all rows have the same
  seen_BTS: Any


class QueryPosition(NamedTuple):
  """The one position of a window whose outcome is of interest."""

  at_B: Any
  window: Window


def take_position(x_BTD, at_B):
  """(B, 1, D)."""

  def rows(x_BTD, at_B):
    return jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)

  return sharding.by_rows(rows, x_BTD, at_B)


def _layer(layer, x_BTD, kv, here: Window, cfg, asked: QueryPosition | None = None):
  """A layer over a window, whose keys and values are cached; the rest of it,
  if so asked, at one position."""
  w = params.gather_cast(layer, block.specs(cfg), cfg)
  y_BTD = layers.rms_norm(x_BTD, w.attn_norm, cfg.model.norm_eps)
  kv = cache_lib.write(kv, *block.keys_values(w, y_BTD, here.ctx), here.slot)
  if asked is not None:
    x_BTD, y_BTD = take_position(x_BTD, asked.at_B), take_position(y_BTD, asked.at_B)
    here = asked.window
  q_BTNH = block.queries(w, y_BTD, here.ctx)
  a_BTNH = cache_lib.attend(q_BTNH, kv, here.seen_BTS)
  return block.add_mlp(w, block.add_attended(w, x_BTD, a_BTNH), cfg), kv


def stem(
  w: weights_lib.Weights, tokens_BT, caches: state_lib.Caches, here: Window, s: setup_lib.Setup
):
  """What each layer gives that verification needs, and the caches."""
  x_BTD, states, written = lm.embed(w, tokens_BT, s.cfg), [], []
  for layer, kv in zip(w.stem, caches.stem, strict=True):
    x_BTD, kv = _layer(layer, x_BTD, kv, here, s.cfg)
    states.append(x_BTD)
    written.append(kv)
  return states, caches._replace(stem=tuple(written))


def trunk_state(states, s: setup_lib.Setup):
  return states[heads.trunk_layers(s.cfg) - 1]


def head(w, k, z_BTD, carry_BTD, next_BT, kv, here, asked, s: setup_lib.Setup):
  """Head k >= 2 over a window: (carry_BTD, its h_B1D where asked, its cache).

  next_BT: the token that head k - 1 predicts at each position, for families
  that feed them.
  """
  cfg, f = s.cfg, heads.family(s.cfg)
  module = w.heads[0 if f.one_module else k - 2]
  next_emb_BTD = lm.embed(w, next_BT, cfg) if f.feeds_tokens else None
  x = heads.Inputs(w.norm, z_BTD, carry_BTD, next_emb_BTD)
  if not f.has_block:
    x = x._replace(z_BTD=take_position(z_BTD, asked.at_B))
    return *f.leave(module, f.enter(module, x, None, cfg), x, cfg), None
  at_once = k == s.window or not f.dependent
  y_BTD, kv = _layer(
    heads.layer(module),
    f.enter(module, x, here.ctx, cfg),
    kv,
    here,
    cfg,
    asked if at_once else None,
  )
  carry_BTD, h_BTD = f.leave(module, y_BTD, x, cfg)
  if asked is not None and not at_once:
    h_BTD = take_position(h_BTD, asked.at_B)
  return carry_BTD, h_BTD, kv


def logits(w: weights_lib.Weights, h_BTD, k: int, cfg):
  """Of head k, in float32, whole over the vocabulary."""
  if cfg.heads.unembedding == 'tied':
    unembed, product = w.embed, 'BTD,VD->BTV'
  else:
    one = k - 1 if cfg.heads.unembedding == 'replicated' else 0
    unembed, product = w.unembed[one], 'BTD,DV->BTV'
  with jax.named_scope('unembed'):
    logits_BTV = jnp.einsum(product, h_BTD, unembed, preferred_element_type=jnp.float32)
  return jax.reshard(logits_BTV, sharding.pspec('batch', None, None))


def all_logits(w: weights_lib.Weights, hidden: list, cfg):
  """Of heads 2..W, one position each: (B, W - 1, V)."""
  if cfg.heads.unembedding == 'replicated':
    of_heads = [logits(w, h_B1D, k, cfg) for k, h_B1D in enumerate(hidden, 2)]
    return jnp.concatenate(of_heads, axis=1)
  return logits(w, jnp.concatenate(hidden, axis=1), 2, cfg)


def next_logits(w: weights_lib.Weights, tokens_BT, length_B, s: setup_lib.Setup):
  """Head 1's after each row's last token, by a pass over the whole row."""

  def rows(tokens_BT):
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

  position_BT = sharding.by_rows(rows, tokens_BT)
  here = window(position_BT, 0, tokens_BT.shape[1], s.cfg)
  caches = state_lib.empty(*tokens_BT.shape, s.cfg.model.compute_dtype, s)
  states, _ = stem(w, tokens_BT, caches, here, s)
  h_BTD = heads.norm(take_position(states[-1], length_B - 1), w.norm, s.cfg)
  return logits(w, h_BTD, 1, s.cfg)[:, 0]


# Reading the prompt.


def window(position_BT, slot, S: int, cfg) -> Window:
  """Positions that see all before them."""

  def rows(position_BT):
    return jnp.arange(S)[None, None] <= position_BT[:, :, None]

  return Window(block.context(position_BT, cfg), slot, sharding.by_rows(rows, position_BT))
