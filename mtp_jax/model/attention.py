"""Causal attention within documents: a reference implementation and kernels.

`attend` dispatches by --model.attention or, with auto, by the platform of the mesh.
Kernels never materialize the T x T scores; the reference does.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config import schema, validate
from mtp_jax.parallel import sharding, versions

SPLASH_BLOCK = 512  # maximum block size of the TPU kernel, in positions
FLASH_BLOCK = 128  # maximum block size of the Triton kernel
FLASH_TILE_BYTES = 32 * 1024  # five of them fit an A100's shared memory


def attend(q_BTNH, k_BSGH, v_BSGH, segment_BT, m: schema.ModelConfig):
  """Computes softmax(q k^T / sqrt(H)) v over earlier positions of the same document.

  Query head n reads key/value head n // R, R = N / G (Ainslie et al. 2023,
  https://arxiv.org/abs/2305.13245). Softmax in float32. Returns (B, T, N, H).
  """
  kernel = KERNELS[chosen(m, q_BTNH.shape[1])]
  if kernel is reference:
    return reference(q_BTNH, k_BSGH, v_BSGH, segment_BT)
  rows = sharding.pspec('batch', None)
  q_spec = sharding.pspec('batch', None, 'attn_heads', None)
  kv_spec = sharding.pspec('batch', None, 'kv_heads', None)
  # Each device runs the kernel on its own rows and heads.
  return jax.shard_map(
    kernel, in_specs=(q_spec, kv_spec, kv_spec, rows), out_specs=q_spec, check_vma=False
  )(q_BTNH, k_BSGH, v_BSGH, segment_BT)


def chosen(m: schema.ModelConfig, T: int) -> str:
  """Returns the kernel of --model.attention for T positions on the devices of the
  current mesh."""
  if m.attention != 'auto':
    return m.attention
  device = jax.sharding.get_abstract_mesh().abstract_device
  for kernel, platform in schema.KERNELS.items():
    if device and device.platform == platform and not validate.kernel_problem(m, T, kernel):
      return kernel
  return 'reference'


def reference(q_BTNH, k_BSGH, v_BSGH, segment_BT):
  """Computes attention from the scores of all T x S pairs, in float32."""
  B, T, N, H = q_BTNH.shape
  G = k_BSGH.shape[2]
  q_BTGRH = H**-0.5 * sharding.reshape(q_BTNH, (B, T, G, N // G, H), 'batch', None, 'kv_heads')
  scores_BGRTS = jnp.einsum(
    'BTGRH,BSGH->BGRTS', q_BTGRH, k_BSGH, preferred_element_type=jnp.float32
  )
  t = jnp.arange(T)
  seen_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
  seen_BTS &= (t[:, None] >= t[None, :])[None]
  scores_BGRTS = jnp.where(seen_BTS[:, None, None], scores_BGRTS, jnp.finfo(jnp.float32).min)
  weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGH.dtype)
  out_BTGRH = jnp.einsum('BGRTS,BSGH->BTGRH', weights_BGRTS, v_BSGH)
  return sharding.reshape(out_BTGRH, (B, T, N, H), 'batch', None, 'attn_heads')


def splash(q_BTNH, k_BSGH, v_BSGH, segment_BT, interpret: bool = False):
  """Computes JAX's splash attention for TPU, vmapped over rows: blocks above the
  diagonal are skipped, pairs across documents masked."""
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  _, T, N, H = q_BTNH.shape
  block = next(b for b in (SPLASH_BLOCK, 256, schema.TILE) if T % b == 0)
  kernel = lib.make_splash_mha(
    lib.MultiHeadMask([lib.CausalMask((T, T))] * N),
    block_sizes=lib.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )

  def row(q_NTH, k_GSH, v_GSH, segment_T) -> Any:
    segments = lib.SegmentIds(segment_T, segment_T)
    return kernel(q_NTH, k_GSH, v_GSH, segment_ids=segments)

  q_BNTH, k_BGSH, v_BGSH = (x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BSGH, v_BSGH))
  out_BNTH = jax.vmap(row)(q_BNTH, k_BGSH, v_BGSH, segment_BT)
  return out_BNTH.swapaxes(1, 2)


def flash(q_BTNH, k_BSGH, v_BSGH, segment_BT, interpret: bool = False):
  """Computes attention on NVIDIA GPUs: cuDNN if every row of the device is a single
  document, else JAX's Pallas Triton kernel, which supports segment ids. The branch
  is taken at run time, per batch. cuDNN supports neither float32 nor every width,
  and has no interpreter."""
  packed = functools.partial(_triton, interpret=interpret)
  H = q_BTNH.shape[-1]
  if interpret or q_BTNH.dtype != jnp.bfloat16 or H % 8 or H > 128:
    return packed(q_BTNH, k_BSGH, v_BSGH, segment_BT)
  return jax.lax.cond(
    jnp.all(segment_BT == segment_BT[:, :1]), _cudnn, packed, q_BTNH, k_BSGH, v_BSGH, segment_BT
  )


def _cudnn(q_BTNH, k_BSGH, v_BSGH, segment_BT):
  del segment_BT
  return jax.nn.dot_product_attention(
    q_BTNH, k_BSGH, v_BSGH, is_causal=True, implementation='cudnn'
  )


def _triton(q_BTNH, k_BSGH, v_BSGH, segment_BT, interpret):
  from jax.experimental import pallas as pl

  with versions.pallas_triton():
    from jax.experimental.pallas.ops.gpu import attention as lib

  _, _, N, H = q_BTNH.shape
  repeats = N // k_BSGH.shape[2]  # this kernel needs one key head per query head
  row_bytes = pl.next_power_of_2(H) * q_BTNH.dtype.itemsize
  block = min(FLASH_BLOCK, FLASH_TILE_BYTES // row_bytes)
  sizes = lib.BlockSizes.get_default()  # the backward blocks are small enough
  return lib.mha(
    q_BTNH,
    jnp.repeat(k_BSGH, repeats, axis=2),
    jnp.repeat(v_BSGH, repeats, axis=2),
    segment_BT,
    sm_scale=H**-0.5,
    causal=True,
    block_sizes=dataclasses.replace(sizes, block_q=block, block_k=block),
    interpret=interpret,
  )


KERNELS: dict[str, Callable] = {'reference': reference, 'splash': splash, 'flash': flash}
