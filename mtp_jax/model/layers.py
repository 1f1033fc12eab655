"""RMSNorm, RoPE and the embedding."""

import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.parallel import sharding


def rms_norm(x_BTD, w_D, eps: float):
  """Computes x w / sqrt(mean(x^2) + eps) in float32 (Zhang & Sennrich 2019,
  https://arxiv.org/abs/1910.07467)."""
  x32_BTD = x_BTD.astype(jnp.float32)
  ms_BT1 = jnp.mean(x32_BTD**2, axis=-1, keepdims=True)
  w_11D = w_D.astype(jnp.float32)[None, None, :]
  return (x32_BTD * jax.lax.rsqrt(ms_BT1 + eps) * w_11D).astype(x_BTD.dtype)


def rope_rates(m: schema.ModelConfig):
  """Returns theta^(-2i/H) of each pair, (H/2,), in radians per position, float32.

  With rope_factor long wavelengths are scaled by it, short ones are not, and rates
  between the two limits are interpolated (Llama 3.1, Grattafiori et al. 2024,
  https://arxiv.org/abs/2407.21783).
  """
  i = jnp.arange(0, m.head_width, 2, dtype=jnp.float32)
  rate = m.rope_theta ** (-i / m.head_width)
  if m.rope_factor > 1:
    turns = m.original_max_position_embeddings * rate / (2 * jnp.pi)  # per context
    kept = jnp.clip((turns - m.rope_low_freq) / (m.rope_high_freq - m.rope_low_freq), 0, 1)
    rate = rate * (kept + (1 - kept) / m.rope_factor)
  return rate


def rope_tables(position_BT, m: schema.ModelConfig):
  """Returns sines and cosines (B, T, H/2) of position x rate, in float32: bfloat16
  rounds position 257 to 256, whose sine is very different."""
  rate = rope_rates(m)
  angle = position_BT.astype(jnp.float32)[:, :, None] * rate[None, None, :]
  return jnp.sin(angle), jnp.cos(angle)


def rope(x_BTNH, sin, cos):
  """Rotates the pairs (i, i + H/2) of each head (Su et al. 2021,
  https://arxiv.org/abs/2104.09864), in the rotate-half layout."""
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  sin, cos = sin[:, :, None, :], cos[:, :, None, :]
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)


def embed(table_VD, tokens_BT):
  """Looks up rows of a gathered table; the vocabulary may be sharded."""
  return table_VD.at[tokens_BT].get(out_sharding=sharding.pspec('batch', None, None))
