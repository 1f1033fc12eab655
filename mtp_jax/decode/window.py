"""The model over a window of positions of each row, with key/value caches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import layer_types, schema
from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import setup as setup_lib
from mtp_jax.decode import state as state_lib
from mtp_jax.decode import weights as weights_lib
from mtp_jax.model import block, heads, layers, lm, markov, params
from mtp_jax.parallel import sharding

# Layers over a window.


class Window(NamedTuple):
  """The positions of each row that a forward pass computes."""

  ctx: block.Context
  slot: Any  # (B, T), or a scalar: the first position's, the same in all rows
  seen_BTS: Any
  # For layers with a sliding window, whose cache is a ring:
  end_B1: Any  # positions from here on are not kept
  tree_TT: Any = None  # whether a position sees another of the window; None = the earlier


class QueryPosition(NamedTuple):
  """The position of a window whose output is used."""

  at_B: Any
  window: Window


def take_position(x_BTD, at_B):
  """Returns x at one position per row, (B, 1, D)."""

  def rows(x_BTD, at_B):
    return jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)

  return sharding.by_rows(rows, x_BTD, at_B)


class Attended(NamedTuple):
  """What a query attends to."""

  kv: cache_lib.Layer
  seen_BTS: Any


def _layer(
  layer, x_BTD, kv, here: Window, *, cfg, layer_type: int, query: QueryPosition | None = None
):
  """Computes a layer over a window and caches its keys and values; with a query,
  the rest of it at that position only. Returns (its output, the cache, the Attended)."""
  m, whole, sliding = cfg.model, here, layer_types.distinct(cfg)[layer_type].window
  w = params.gather_cast(layer, block.specs(m), cfg)
  y_BTD = block.attention_input(w, x_BTD, m)
  new = block.keys_values(w, y_BTD, block.of_type(here.ctx, layer_type, cfg), m)
  if not sliding:
    kv = cache_lib.write(kv, *new, here.slot)
  if query is not None:
    x_BTD, y_BTD = take_position(x_BTD, query.at_B), take_position(y_BTD, query.at_B)
    here = query.window
  attended = Attended(kv, here.seen_BTS)
  if sliding:
    seen_BTX, slot_BT = _ring(here, whole, kv.k_BGSH.shape[2], sliding)
    attended = Attended(cache_lib.joined(kv, *new), seen_BTX)
    kv = cache_lib.write(kv, *new, slot_BT)
  ctx = block.of_type(here.ctx, layer_type, cfg)
  return _after_keys(w, x_BTD, y_BTD, attended, ctx=ctx, m=m), kv, attended


def _after_keys(w, x_BTD, y_BTD, attended: Attended, *, ctx: block.Context, m):
  """Computes what follows a layer's keys and values; y is attention's input."""
  q_BTNH = block.queries(w, y_BTD, ctx, m)
  a_BTNH = cache_lib.attend(q_BTNH, *attended, w.sink, m)
  return block.add_mlp(w, block.add_attended(w, x_BTD, y_BTD, a_BTNH, m), m)


def _layer_of_others(layer, x_B1D, attended: Attended, ctx: block.Context, *, cfg, layer_type):
  """Computes a layer at one position that attends to keys and values of another."""
  w, m = params.gather_cast(layer, block.specs(cfg.model), cfg), cfg.model
  y_B1D, ctx = block.attention_input(w, x_B1D, m), block.of_type(ctx, layer_type, cfg)
  return _after_keys(w, x_B1D, y_B1D, attended, ctx=ctx, m=m)


def _ring(query: Window, written: Window, S: int, window: int):
  """Returns whether each query sees each slot of a ring and each position written after
  it, (B, T, S + T'), and the slots of those positions."""

  def rows(query_BT, new_BT, slot_BT, end_B1):
    old_BS = cache_lib.ring_positions(slot_BT[:, :1], S)
    at_BX = jnp.concatenate([old_BS, new_BT], axis=1)
    distance_BTX = query_BT[:, :, None] - at_BX[:, None, :]
    seen_BTX = (distance_BTX < window) & (at_BX >= 0)[:, None]
    if query.tree_TT is None:
      seen_BTX &= distance_BTX >= 0
    else:
      tree_TX = np.pad(query.tree_TT, ((0, 0), (S, 0)), constant_values=True)
      seen_BTX &= jnp.array(tree_TX)[None]
    return seen_BTX, cache_lib.ring_slots(slot_BT, end_B1, S)

  new_BT = written.ctx.position_BT
  slot_BT = written.slot if jnp.ndim(written.slot) else new_BT
  return sharding.by_rows(rows, query.ctx.position_BT, new_BT, slot_BT, written.end_B1)


def stem(
  w: weights_lib.Weights, tokens_BT, caches: state_lib.Caches, here: Window, s: setup_lib.Setup
):
  """Computes the layers of verification; returns (the output of each, caches)."""
  x_BTD, states, written = lm.embed(w, tokens_BT, s.cfg), [], []
  types, _ = state_lib.cached_layers(s)
  for layer, kv, layer_type in zip(w.stem, caches.stem, types, strict=True):
    x_BTD, kv, _ = _layer(layer, x_BTD, kv, here, cfg=s.cfg, layer_type=layer_type)
    states.append(x_BTD)
    written.append(kv)
  return states, caches._replace(stem=tuple(written))


def trunk_state(states, s: setup_lib.Setup):
  return states[heads.trunk_layers(s.cfg) - 1]


def first_carry(w: weights_lib.Weights, z_BTD, cfg: schema.Config):
  """Returns what head 2 of a chain reads, of the last layer's output: what head 1 hands
  on, where it is the identity."""
  if cfg.heads.block_first or not heads.family(cfg.heads).is_chained:
    return z_BTD
  x = heads.Inputs(norm_D=w.norm, z_BTD=z_BTD, carry_BTD=z_BTD)
  return heads.step(None, 1, x, None, cfg)[0]


class OfHead(NamedTuple):
  """What a head computes."""

  carry_BTD: Any  # the input of the head after it
  h_BTD: Any  # normed for the unembedding
  kv: Any = None  # its cache; None where it has no block
  attended: Any = None  # what its query attends to


def later_step(w, k: int, before: OfHead, next_B1, *, here: Window, s: setup_lib.Setup) -> OfHead:
  """Computes a step of a shared module at one position, of the step before it; it attends to
  what the first step does (--heads.share_keys_values)."""

  def block_of_others(layer, x_B1D, ctx, cfg, layer_type):
    return _layer_of_others(layer, x_B1D, before.attended, ctx, cfg=cfg, layer_type=layer_type)

  x = heads.Inputs(norm_D=w.norm, z_BTD=before.carry_BTD, carry_BTD=before.carry_BTD)
  carry_B1D, h_B1D = lm.head_step(
    *(w.heads[0], k, x, here.ctx, s.cfg),
    feed=lambda k: lm.embed(w, next_B1, s.cfg),
    apply_block=block_of_others,
  )
  return before._replace(carry_BTD=carry_B1D, h_BTD=h_B1D)


def head(w, k: int, z_BTD, carry_BTD, kv, *, next_BT, here: Window, query, s: setup_lib.Setup):
  """Computes head k >= 2 over a window.

  Args:
    w: weights.
    k: the head's number.
    z_BTD: the trunk's output.
    carry_BTD: output of the head before it.
    kv: its cache; None where it has no block.
    next_BT: the token at each position whose embedding the head reads, for families
      that use it.
    here: the window.
    query: the one position whose h is returned; None = all.
    s: the Setup.

  Returns:
    its OfHead, h at the query; with --heads.share_keys_values the carry too.
  """
  cfg, f = s.cfg, heads.family(s.cfg.heads)
  module = w.heads[0 if f.shared_module else k - 2]
  # An output that no later head reads is computed at the query only.
  at_query = query is not None and (
    k == s.window or not f.is_chained or cfg.heads.share_keys_values
  )
  if f.layer is None:
    assert query is not None
    z_BTD = take_position(z_BTD, query.at_B)
  cached: list[Any] = [None, None]

  def cached_block(layer, x_BTD, ctx, cfg, layer_type):
    del ctx
    y_BTD, *cached[:] = _layer(
      layer, x_BTD, kv, here, cfg=cfg, layer_type=layer_type, query=query if at_query else None
    )
    return y_BTD

  x = heads.Inputs(norm_D=w.norm, z_BTD=z_BTD, carry_BTD=carry_BTD)
  carry_BTD, h_BTD = lm.head_step(
    module, k, x, here.ctx, cfg, feed=lambda k: lm.embed(w, next_BT, cfg), apply_block=cached_block
  )
  if query is not None and f.layer is not None and not at_query:
    h_BTD = take_position(h_BTD, query.at_B)
  return OfHead(carry_BTD, h_BTD, *cached)


def logits(w: weights_lib.Weights, h_BTD, k: int, cfg):
  """Computes head k's logits in float32, unsharded over the vocabulary; those of heads >= 2
  are of the draft vocabulary, where there is one."""
  if k > 1 and w.draft_unembed is not None:
    unembed, product = w.draft_unembed, 'BTD,DV->BTV'
  elif cfg.heads.unembedding == 'tied':
    unembed, product = w.embed, 'BTD,VD->BTV'
  else:
    one = k - 1 if cfg.heads.unembedding == 'replicated' else 0
    unembed, product = w.unembed[one], 'BTD,DV->BTV'
  with jax.named_scope('unembed'):
    logits_BTV = jnp.einsum(product, h_BTD, unembed, preferred_element_type=jnp.float32)
  return jax.reshard(layers.shaped(logits_BTV, cfg.model), sharding.pspec('batch', None, None))


def all_logits(w: weights_lib.Weights, hidden: list, cfg):
  """Computes the logits of heads 2..W at one position each: (B, W - 1, V)."""
  if cfg.heads.unembedding == 'replicated':
    of_heads = [logits(w, h_B1D, k, cfg) for k, h_B1D in enumerate(hidden, 2)]
    return jnp.concatenate(of_heads, axis=1)
  return logits(w, jnp.concatenate(hidden, axis=1), 2, cfg)


def markov_bias(w: weights_lib.Weights, before_B1):
  """Computes what a draft's logits gain by the token before it, (B, 1, V)."""
  with jax.named_scope('markov'):
    gained_B1V = markov.bias(layers.embed(w.markov.embed, before_B1), w.markov.unembed)
  return jax.reshard(gained_B1V, sharding.pspec('batch', None, None))


def next_logits(w: weights_lib.Weights, tokens_BT, length_B, s: setup_lib.Setup):
  """Computes head 1's logits after each row's last token, by a forward pass over
  the whole row."""

  def rows(tokens_BT):
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

  position_BT = sharding.by_rows(rows, tokens_BT)
  B, T = tokens_BT.shape
  here = window(position_BT, 0, length_B, S=T, cfg=s.cfg)
  caches = state_lib.empty(B, T, s.cfg.model.compute_dtype, s)
  states, _ = stem(w, tokens_BT, caches, here, s)
  last_BTD = take_position(states[-1], length_B - 1)
  h_BTD = layers.rms_norm(last_BTD, w.norm, s.cfg.model)
  return logits(w, h_BTD, 1, s.cfg)[:, 0]


# Windows of consecutive positions.


def window(position_BT, slot, end_B, *, S: int, cfg: schema.Config) -> Window:
  """Returns the Window of positions that attend to all before them; those from end_B on
  are padding, which a ring does not keep."""

  def rows(position_BT, end_B):
    return jnp.arange(S)[None, None] <= position_BT[:, :, None], end_B[:, None]

  seen_BTS, end_B1 = sharding.by_rows(rows, position_BT, end_B)
  return Window(block.context(position_BT, cfg), slot, seen_BTS, end_B1)
