"""Keys and values of the tokens so far, and attention to them. Floor 3.

A layer's are one array each, (B, G, S, H): slot s of a row is its position s,
so that a row's length is all that says which slots count. What lies beyond is
rolled back: no query sees it, and the next window is written over it. Layers
are a tuple, not one stacked array, of which every read would be a copy.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.parallel import sharding

_AXES = ('batch', 'kv_heads', None, None)


class Layer(NamedTuple):
  """Of one attention: the trunk's layers and each head's have their own."""

  k_BGSH: Any
  v_BGSH: Any


def empty(layers: int, B: int, S: int, cfg: schema.Config, dtype):
  """Zeros for so many layers, sharded as the mesh says."""
  shape = (B, cfg.model.kv_heads, S, cfg.model.head_width)

  def zeros():
    return jnp.zeros(shape, dtype, out_sharding=sharding.pspec(*_AXES))

  return tuple(Layer(zeros(), zeros()) for _ in range(layers))


def write(layer: Layer, k_BTGH, v_BTGH, slot) -> Layer:
  """Puts each position's key and value into its slot.

  slot: (B, T), of which those outside the cache are left out; or one number,
  the slot of the first position of all rows.
  """
  if jnp.ndim(slot):
    return Layer(
      *(
        _sharded(_put, (cache, new, slot))
        for cache, new in zip(layer, (k_BTGH, v_BTGH), strict=True)
      )
    )
  return Layer(
    *(
      jax.lax.dynamic_update_slice_in_dim(
        cache, new.swapaxes(1, 2).astype(cache.dtype), slot, axis=2
      )
      for cache, new in zip(layer, (k_BTGH, v_BTGH), strict=True)
    )
  )


def move(layer: Layer, from_BT, to_BT) -> Layer:
  """Copies what is in some slots of a row to others of it."""
  return Layer(*(_sharded(_move, (cache, from_BT, to_BT)) for cache in layer))


def _sharded(f, args):
  """f on each device's own rows and key/value heads."""
  axes = {4: _AXES, 2: ('batch', None)}
  specs = [sharding.pspec(*axes[x.ndim]) for x in args]
  if len(args) == 3 and args[1].ndim == 4:  # new ones come as (B, T, G, H)
    specs[1] = sharding.pspec('batch', None, 'kv_heads', None)
  return jax.shard_map(f, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(*args)


def _put(cache_BGSH, new_BTGH, slot_BT):
  b_B1 = jnp.arange(cache_BGSH.shape[0])[:, None]
  slot_BT = jnp.where(slot_BT < 0, cache_BGSH.shape[2], slot_BT)
  return cache_BGSH.at[b_B1, :, slot_BT].set(new_BTGH.astype(cache_BGSH.dtype), mode='drop')


def _move(cache_BGSH, from_BT, to_BT):
  b_B1 = jnp.arange(cache_BGSH.shape[0])[:, None]
  return _put(cache_BGSH, cache_BGSH[b_B1, :, from_BT], to_BT)


def attend(q_BTNH, layer: Layer, seen_BTS):
  """softmax(q k^T / sqrt(H)) v over the slots that a query sees.

  As attention.reference has it; products in the cache's dtype, sums and softmax
  in float32. The R queries that share a key head are one dimension with the T
  positions: on a CPU a product of four dimensions takes four times as long.
  Returns (B, T, N, H).
  """
  B, T, N, H = q_BTNH.shape
  k_BGSH, v_BGSH = layer
  G = k_BGSH.shape[1]
  R = N // G
  axes = 'batch', 'kv_heads'
  q_BTGRH = H**-0.5 * sharding.reshape(q_BTNH, (B, T, G, R, H), 'batch', None, 'kv_heads')
  q_BGXH = sharding.reshape(q_BTGRH.transpose(0, 2, 3, 1, 4), (B, G, R * T, H), *axes)
  scores_BGXS = jnp.einsum(
    'BGXH,BGSH->BGXS', q_BGXH.astype(k_BGSH.dtype), k_BGSH, preferred_element_type=jnp.float32
  )
  seen_BXS = jnp.tile(seen_BTS, (1, R, 1)) if R > 1 else seen_BTS
  scores_BGXS = jnp.where(seen_BXS[:, None], scores_BGXS, jnp.finfo(jnp.float32).min)
  weights_BGXS = jax.nn.softmax(scores_BGXS, axis=-1).astype(v_BGSH.dtype)
  out_BGXH = jnp.einsum('BGXS,BGSH->BGXH', weights_BGXS, v_BGSH)
  out_BTGRH = sharding.reshape(out_BGXH, (B, G, R, T, H), *axes).transpose(0, 3, 1, 2, 4)
  return sharding.reshape(out_BTGRH, (B, T, N, H), 'batch', None, 'attn_heads').astype(q_BTNH.dtype)
