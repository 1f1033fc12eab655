"""The key/value cache of decoding, and attention to it.

Keys and values of a layer are arrays (B, G, S, H); slot s of a row is its position
s, so that a row's length alone determines the valid slots. Later slots are rolled
back: no query sees them, and the next window overwrites them. Layers are a tuple
rather than a stacked array, of which every read would be a copy.

A layer with a sliding window keeps a ring: position p is in slot p mod S of few more
slots than its window. A window of new positions attends to the ring as it was before
them, and to itself, and is then written. What a rejected draft overwrote was out of
every later query's window.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.model import attention
from mtp_jax.parallel import sharding

_AXES = ('batch', 'kv_heads', None, None)


class Layer(NamedTuple):
  """The cache of one attention layer, of the trunk or of a head."""

  k_BGSH: Any
  v_BGSH: Any


def slots(S: int, window: int, spare: int) -> int:
  """Returns the slots of a layer: S, or those of a ring, of a window and as many
  positions as may be rolled back."""
  return min(S, window + spare) if window else S


def empty(slots_L, B: int, m: schema.ModelConfig, dtype):
  """Returns a zero cache of layers with these numbers of slots, sharded over the mesh."""

  def zeros(S):
    return jnp.zeros((B, m.kv_heads, S, m.head_width), dtype, out_sharding=sharding.pspec(*_AXES))

  return tuple(Layer(zeros(S), zeros(S)) for S in slots_L)


def joined(layer: Layer, k_BTGH, v_BTGH) -> Layer:
  """Returns the keys and values of a ring, and the new ones after them."""
  news = (k_BTGH, v_BTGH)
  return Layer(
    *(
      jnp.concatenate([cache, new.swapaxes(1, 2).astype(cache.dtype)], axis=2)
      for cache, new in zip(layer, news, strict=True)
    )
  )


def ring_positions(base_B1, S: int):
  """Returns the position in each slot of a ring, (B, S), when the positions below
  `base` are written; negative where a slot is empty."""
  return base_B1 - 1 - (base_B1 - 1 - jnp.arange(S)[None]) % S


def ring_slots(slot_BT, end_B1, S: int):
  """Returns the slot in a ring of each slot of a whole cache; -1 for those that are not
  written: at or after a row's end, or more than S before it."""
  last_B1 = jnp.minimum(slot_BT[:, -1:] + 1, end_B1)
  written_BT = (slot_BT >= 0) & (slot_BT < last_B1) & (slot_BT >= last_B1 - S)
  return jnp.where(written_BT, slot_BT % S, -1)


def write(layer: Layer, k_BTGH, v_BTGH, slot) -> Layer:
  """Writes each position's key and value into its slot.

  slot: (B, T), those outside the cache are dropped; or a scalar, the slot of the
    first position in all rows.
  """
  pairs = tuple(zip(layer, (k_BTGH, v_BTGH), strict=True))
  if jnp.ndim(slot):
    written = Layer(*(_sharded(_put, (cache, new, slot)) for cache, new in pairs))
    # Of one position, XLA:CPU would fuse the write into every reader, and copy the whole cache
    # for each.
    return jax.lax.optimization_barrier(written) if sharding.platform() == 'cpu' else written
  return Layer(
    *(
      jax.lax.dynamic_update_slice_in_dim(
        cache, new.swapaxes(1, 2).astype(cache.dtype), slot, axis=2
      )
      for cache, new in pairs
    )
  )


def move(layer: Layer, from_BT, to_BT) -> Layer:
  """Copies slots of each row to other slots of the same row."""
  return Layer(*(_sharded(_move, (cache, from_BT, to_BT)) for cache in layer))


def _sharded(f, args):
  """Computes f on each device's own rows and key/value heads (shard_map)."""
  axes = {4: _AXES, 2: ('batch', None)}
  specs = [sharding.pspec(*axes[x.ndim]) for x in args]
  if len(args) == 3 and args[1].ndim == 4:  # new keys or values are (B, T, G, H)
    specs[1] = sharding.pspec('batch', None, 'kv_heads', None)
  return jax.shard_map(f, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(*args)


def _put(cache_BGSH, new_BTGH, slot_BT):
  b_B1 = jnp.arange(cache_BGSH.shape[0])[:, None]
  slot_BT = jnp.where(slot_BT < 0, cache_BGSH.shape[2], slot_BT)
  return cache_BGSH.at[b_B1, :, slot_BT].set(new_BTGH.astype(cache_BGSH.dtype), mode='drop')


def _move(cache_BGSH, from_BT, to_BT):
  b_B1 = jnp.arange(cache_BGSH.shape[0])[:, None]
  return _put(cache_BGSH, cache_BGSH[b_B1, :, from_BT], to_BT)


def attend(q_BTNH, layer: Layer, seen_BTS, sink_N, m: schema.ModelConfig):
  """Computes softmax(scale q k^T) v over the slots that a query sees.

  Equals attention.reference; products in the cache's dtype, sums and softmax in
  float32. The R queries of a key head and the T positions share a dimension: on a
  CPU a four-dimensional product takes four times as long. Returns (B, T, N, H).
  """
  B, T, N, H = q_BTNH.shape
  k_BGSH, v_BGSH = layer
  G = k_BGSH.shape[1]
  R = N // G
  axes = 'batch', 'kv_heads'
  q_BTGRH = m.score_scale * sharding.reshape(q_BTNH, (B, T, G, R, H), 'batch', None, 'kv_heads')
  q_BGXH = sharding.reshape(q_BTGRH.transpose(0, 2, 3, 1, 4), (B, G, R * T, H), *axes)
  scores_BGXS = jnp.einsum(
    'BGXH,BGSH->BGXS', q_BGXH.astype(k_BGSH.dtype), k_BGSH, preferred_element_type=jnp.float32
  )
  seen_BXS = jnp.tile(seen_BTS, (1, R, 1)) if R > 1 else seen_BTS
  sink_1GX1 = None
  if sink_N is not None:
    sink_GR = sharding.reshape(sink_N, (G, R), 'kv_heads')
    sink_1GX1 = jnp.repeat(sink_GR, T, axis=1)[None, :, :, None]
  weights_BGXS = attention.softmax(scores_BGXS, seen_BXS[:, None], sink_1GX1, m)
  out_BGXH = jnp.einsum('BGXS,BGSH->BGXH', weights_BGXS.astype(v_BGSH.dtype), v_BGSH)
  out_BTGRH = sharding.reshape(out_BGXH, (B, G, R, T, H), *axes).transpose(0, 3, 1, 2, 4)
  return sharding.reshape(out_BTGRH, (B, T, N, H), 'batch', None, 'attn_heads').astype(q_BTNH.dtype)
