"""Causal attention within documents: a reference implementation and kernels.

`attend` dispatches by --model.attention or, with auto, by the platform of the mesh.
Kernels never materialize scores; the reference does, of a block of queries at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import kernels, layer_types, schema
from mtp_jax.model import flash as flash_lib
from mtp_jax.model import layers
from mtp_jax.parallel import sharding

SPLASH_BLOCK = 512  # maximum block size of the TPU kernel, in positions
QUERIES, BLOCKS = 64, 8  # of the reference: positions of a block, at least; blocks, at most


class Operands(NamedTuple):
  """The arrays of attention."""

  q_BTNH: Any
  k_BSGH: Any
  v_BSGH: Any
  segment_BT: Any
  sink_N: Any = None  # a further score in the denominator, per head; None = none


def attend(x: Operands, layer_type, cfg: schema.Config):
  """Computes softmax(scale q k^T) v over earlier positions of the same document.

  Query head n reads key/value head n // R, R = N / G (Ainslie et al. 2023,
  https://arxiv.org/abs/2305.13245). Softmax in float32, with --model.attn_scale,
  attn_softcap and attn_sink.

  Args:
    x: the Operands.
    layer_type: index in layer_types.distinct(cfg), which has its window; may be traced.
    cfg: the Config.

  Returns:
    (B, T, N, H).
  """
  windows = tuple(t.window for t in layer_types.distinct(cfg))
  by_window = sorted(set(windows))
  if len(by_window) == 1 or isinstance(layer_type, int):
    return _attend(x, layers.at(windows, layer_type), by_window, cfg.model)
  if chosen(cfg.model, x.q_BTNH.shape[1]) == 'flash':
    # An array to it; a conditional would make the host wait for the GPU.
    return _attend(x, layers.at(windows, layer_type), by_window, cfg.model)
  attends = [functools.partial(_attend, window=w, by_window=[w], m=cfg.model) for w in by_window]
  index = layers.at(tuple(map(by_window.index, windows)), layer_type)
  return jax.lax.switch(index, attends, x)


def _attend(x: Operands, window, by_window: list[int], m: schema.ModelConfig):
  """Computes attention of a window: one of by_window, which may be traced."""
  kernel = KERNELS[chosen(m, x.q_BTNH.shape[1])]
  if kernel is reference:
    return reference(x, window, m)
  q_spec = sharding.pspec('batch', None, 'attn_heads', None)
  kv_spec = sharding.pspec('batch', None, 'kv_heads', None)
  sink_spec = None if x.sink_N is None else sharding.pspec('attn_heads')
  specs = Operands(q_spec, kv_spec, kv_spec, sharding.pspec('batch', None), sink_spec)
  traced = () if isinstance(window, int) else (window,)
  # Each device runs the kernel on its own rows and heads.
  sharded = jax.shard_map(
    lambda x, *traced: kernel(x, window=traced[0] if traced else window, m=m),
    in_specs=(specs, *(sharding.pspec() for _ in traced)),
    out_specs=q_spec,
    check_vma=False,
  )
  named = by_window if traced else (window,)
  with jax.named_scope('attend_window_' + '_'.join(map(str, named))):  # read by flops.of_program
    return sharded(x, *traced)


def chosen(m: schema.ModelConfig, T: int) -> str:
  """Returns the kernel of --model.attention for T positions on the devices of the
  current mesh."""
  if m.attention != 'auto':
    return m.attention
  for kernel, platform in schema.KERNELS.items():
    if sharding.platform() == platform:
      return 'reference' if kernels.problem(m, T, kernel) else kernel
  return 'reference'


def reference(x: Operands, window: int, m: schema.ModelConfig):
  """Computes attention from the scores, in float32, of all pairs of a block of queries and the
  keys from its first window to its end."""
  B, T, N, H = x.q_BTNH.shape
  G = x.k_BSGH.shape[2]
  size = max(QUERIES, -(-T // BLOCKS))
  # Heads before positions, once: a CPU would transpose the scores of each block instead.
  q_BNTH, k_BGSH, v_BGSH = (a.swapaxes(1, 2) for a in (x.q_BTNH, x.k_BSGH, x.v_BSGH))
  heads = B, G, N // G, T, H
  q_BGRTH = m.score_scale * sharding.reshape(q_BNTH, heads, 'batch', 'kv_heads')
  blocks = [
    _reference(x, (q_BGRTH, k_BGSH, v_BGSH), slice(t, min(t + size, T)), window, m)
    for t in range(0, T, size)
  ]
  out_BGRTH = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
  out_BNTH = sharding.reshape(out_BGRTH, (B, N, T, H), 'batch', 'attn_heads')
  return out_BNTH.swapaxes(1, 2)


def _reference(x: Operands, by_head, queries: slice, window: int, m: schema.ModelConfig):
  q_BGRTH, k_BGSH, v_BGSH = by_head
  keys = slice(max(queries.start - window + 1, 0) if window else 0, queries.stop)
  q_BGRTH, k_BGSH, v_BGSH = q_BGRTH[:, :, :, queries], k_BGSH[:, :, keys], v_BGSH[:, :, keys]
  B, G, R, T, H = q_BGRTH.shape
  S = k_BGSH.shape[2]
  q_BGXH = sharding.reshape(q_BGRTH, (B, G, R * T, H), 'batch', 'kv_heads')
  scores_BGXS = jnp.einsum('BGXH,BGSH->BGXS', q_BGXH, k_BGSH, preferred_element_type=jnp.float32)
  scores_BGRTS = sharding.reshape(scores_BGXS, (B, G, R, T, S), 'batch', 'kv_heads')
  t, s = jnp.arange(queries.start, queries.stop), jnp.arange(keys.start, keys.stop)
  seen_BTS = x.segment_BT[:, queries, None] == x.segment_BT[:, None, keys]
  seen_BTS &= (t[:, None] >= s[None, :])[None]
  if window:
    seen_BTS &= (t[:, None] - s[None, :] < window)[None]
  sink_1GR11 = None
  if x.sink_N is not None:
    sink_GR = sharding.reshape(x.sink_N, (G, R), 'kv_heads')
    sink_1GR11 = sink_GR[None, :, :, None, None]
  weights_BGRTS = softmax(scores_BGRTS, seen_BTS[:, None, None], sink_1GR11, m)
  weights_BGXS = sharding.reshape(weights_BGRTS, (B, G, R * T, S), 'batch', 'kv_heads')
  out_BGXH = jnp.einsum('BGXS,BGSH->BGXH', weights_BGXS.astype(v_BGSH.dtype), v_BGSH)
  return sharding.reshape(out_BGXH, (B, G, R, T, H), 'batch', 'kv_heads')


def softmax(scores, seen, sink, m: schema.ModelConfig):
  """Computes the softmax over keys, the last dimension, of capped scores that are seen.

  sink: a score per row that has no key: it is in the denominator only (Xiao et al. 2023,
    https://arxiv.org/abs/2309.17453; learned as in gpt-oss, OpenAI 2025,
    https://arxiv.org/abs/2508.10925); None = none. It is not capped.
  """
  scores = layers.softcap(scores, m.attn_softcap)
  scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
  if sink is None:
    return jax.nn.softmax(scores, axis=-1)
  sink = sink.astype(jnp.float32)
  top = jnp.maximum(jnp.max(jax.lax.stop_gradient(scores), axis=-1, keepdims=True), sink)
  top = jax.lax.stop_gradient(top)
  exp = jnp.exp(scores - top)
  return exp / (jnp.sum(exp, axis=-1, keepdims=True) + jnp.exp(sink - top))


def splash(x: Operands, window: int, m: schema.ModelConfig, interpret: bool = False):
  """Computes JAX's splash attention for TPU, vmapped over rows: blocks above the
  diagonal or outside the window are skipped, pairs across documents masked."""
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  _, T, N, H = x.q_BTNH.shape
  # Positions along the lanes: no transposition, and no padding of heads narrower than 128.
  layout = lib.QKVLayout.SEQ_MINOR if H % schema.TILE else lib.QKVLayout.HEAD_DIM_MINOR
  block = next(b for b in (SPLASH_BLOCK, 256, schema.TILE) if T % b == 0)
  mask = lib.LocalMask((T, T), (window - 1, 0), 0) if window else lib.CausalMask((T, T))
  kernel = lib.make_splash_mha(
    lib.MultiHeadMask([mask] * N),
    block_sizes=lib.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      block_q_dq=block,
      block_kv_dq=block,
      q_layout=layout,
      k_layout=layout,
      v_layout=layout,
    ),
    attn_logits_soft_cap=m.attn_softcap or None,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )

  def row(q_NTH, k_GSH, v_GSH, segment_T) -> Any:
    segments = lib.SegmentIds(segment_T, segment_T)
    return kernel(q_NTH, k_GSH, v_GSH, segment_ids=segments)

  scaled_BTNH = x.q_BTNH * m.score_scale
  q_BNTH, k_BGSH, v_BGSH = (a.swapaxes(1, 2) for a in (scaled_BTNH, x.k_BSGH, x.v_BSGH))
  out_BNTH = jax.vmap(row)(q_BNTH, k_BGSH, v_BGSH, x.segment_BT)
  return out_BNTH.swapaxes(1, 2)


def flash(x: Operands, window: int, m: schema.ModelConfig, interpret: bool = False):
  """Computes attention with the kernel of flash.py. A sink is a part of the denominator."""
  options = flash_lib.Options(m.score_scale, m.attn_softcap, interpret)
  begin_BT = flash_lib.begins(x.segment_BT, window)
  found: Any = flash_lib.attend(x.q_BTNH, x.k_BSGH, x.v_BSGH, begin_BT, options)
  out_BTNH, lse_BNT = found
  if x.sink_N is None:
    return out_BTNH
  share_BTN = jax.nn.sigmoid(lse_BNT.swapaxes(1, 2) - x.sink_N.astype(jnp.float32)[None, None])
  return out_BTNH * share_BTN[..., None].astype(out_BTNH.dtype)


KERNELS: dict[str, Callable] = {'reference': reference, 'splash': splash, 'flash': flash}
