"""RMSNorm, activations, RoPE and the embedding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import schema
from mtp_jax.parallel import sharding

MEAN_SQUARE = 'mean_square'  # of a norm: a number per position, which remat keeps


def rms_norm(x, w, m: schema.ModelConfig, eps: float = 0.0):
  """Computes x w / sqrt(mean(x^2) + eps) in float32, over the dimensions of w (Zhang &
  Sennrich 2019, https://arxiv.org/abs/1910.07467); 1 + w with --model.norm_offset."""
  x32, w32 = x.astype(jnp.float32), w.astype(jnp.float32)
  if m.norm_offset:
    w32 += 1
  mean_square = jnp.mean(x32**2, axis=tuple(range(-w.ndim, 0)), keepdims=True)
  mean_square = checkpoint_name(mean_square, MEAN_SQUARE)
  w32 = jnp.expand_dims(w32, tuple(range(x.ndim - w.ndim)))
  return (x32 * jax.lax.rsqrt(mean_square + (eps or m.norm_eps)) * w32).astype(x.dtype)


ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
}


def softcap(x, cap: float):
  """Computes cap tanh(x / cap) (Gemma Team 2024, https://arxiv.org/abs/2408.00118);
  the identity without a cap."""
  return cap * jnp.tanh(x / cap) if cap else x


def shaped(logits, m: schema.ModelConfig):
  """Applies --model.logits_scale and logits_softcap to logits."""
  return softcap(logits if m.logits_scale == 1 else m.logits_scale * logits, m.logits_softcap)


def rope_rates(m: schema.ModelConfig, theta: float = 0.0, scaled: bool = True):
  """Returns theta^(-2i/R) of each pair, (R/2,), in radians per position, float32, for
  the R dimensions that rotate.

  theta: the base; 0 = --model.rope_theta. scaled: whether --model.rope_factor applies,
  as --model.rope_scaling says.
  """
  R = m.rotary_width
  i = jnp.arange(0, R, 2, dtype=jnp.float32)
  rate = (theta or m.rope_theta) ** (-i / R)
  if m.rope_factor == 1 or not scaled:
    return rate
  if m.rope_scaling == 'linear':
    return rate / m.rope_factor
  if m.rope_scaling == 'yarn':
    # The dimension whose wavelength turns so often in the original context.
    low, high = (
      R
      * math.log(m.original_max_position_embeddings / (turns * 2 * math.pi))
      / (2 * math.log(theta or m.rope_theta))
      for turns in (m.rope_beta_fast, m.rope_beta_slow)
    )
    if m.rope_truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    kept = 1 - jnp.clip((i / 2 - low) / max(high - low, 0.001), 0, 1)
  else:
    turns = m.original_max_position_embeddings * rate / (2 * jnp.pi)  # per context
    kept = jnp.clip((turns - m.rope_low_freq) / (m.rope_high_freq - m.rope_low_freq), 0, 1)
  return rate * (kept + (1 - kept) / m.rope_factor)


def rope_temperature(m: schema.ModelConfig) -> float:
  """Returns the factor of queries and keys that yarn applies, else 1."""
  if m.rope_factor == 1 or m.rope_scaling != 'yarn':
    return 1.0
  return m.rope_attention_factor or 0.1 * math.log(m.rope_factor) + 1


def rope_tables(position_BT, m: schema.ModelConfig, theta: float = 0.0, scaled: bool = True):
  """Returns sines and cosines (B, T, R/2) of position x rate, in float32: bfloat16
  rounds position 257 to 256, whose sine is very different."""
  rate = rope_rates(m, theta, scaled)
  angle = position_BT.astype(jnp.float32)[:, :, None] * rate[None, None, :]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  if scaled and (factor := rope_temperature(m)) != 1:
    sin, cos = factor * sin, factor * cos
  return sin, cos


def rope(x_BTNH, sin, cos):
  """Rotates the pairs (i, i + R/2) of the first R dimensions of each head, R/2 the width
  of the tables (Su et al. 2021, https://arxiv.org/abs/2104.09864), in the rotate-half
  layout."""
  if sharding.platform() == 'tpu':
    return rope_by_product(x_BTNH, sin, cos)
  half = sin.shape[-1]
  x32_BTNH = x_BTNH.astype(jnp.float32)
  a, b, rest = jnp.split(x32_BTNH, (half, 2 * half), axis=-1)
  sin, cos = sin[:, :, None, :], cos[:, :, None, :]
  parts = [a * cos - b * sin, b * cos + a * sin]
  rotated = jnp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1)
  return rotated.astype(x_BTNH.dtype)


@jax.custom_vjp
def rope_by_product(x_BTNH, sin, cos):
  """Computes `rope` as x cos + swap(x) sin, where swap is a product with zeros and ones.

  The same bits: each sum of the product has one term. Half of a head is less than the 128
  lanes of a TPU's registers, which it would be padded to, while the product of the whole
  head is the matrix unit's.
  """
  H, half = x_BTNH.shape[-1], sin.shape[-1]
  rest = H - 2 * half
  # Zeros for dimensions that are not rotated.
  swap_HH = np.zeros((H, H), np.float32)
  swap_HH[: 2 * half, : 2 * half] = np.roll(np.eye(2 * half), half, axis=1)
  # Of float32, which would be rounded to bfloat16 by default.
  swapped_BTNH = jnp.einsum(
    'BTNH,HI->BTNI',
    x_BTNH,
    jnp.asarray(swap_HH, x_BTNH.dtype),
    precision=None if x_BTNH.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
  )
  edge = [(0, 0)] * (sin.ndim - 1) + [(0, rest)]
  sin_BTH = jnp.pad(jnp.concatenate([-sin, sin], axis=-1), edge)
  cos_BTH = jnp.pad(jnp.concatenate([cos, cos], axis=-1), edge, constant_values=1)
  x32_BTNH, swapped_BTNH = (x.astype(jnp.float32) for x in (x_BTNH, swapped_BTNH))
  turned_BTNH = x32_BTNH * cos_BTH[:, :, None] + swapped_BTNH * sin_BTH[:, :, None]
  return turned_BTNH.astype(x_BTNH.dtype)


def _rope_by_product_fwd(x_BTNH, sin, cos):
  return rope_by_product(x_BTNH, sin, cos), (sin, cos)


def _rope_by_product_bwd(saved, dy_BTNH):
  sin, cos = saved  # of positions: no gradient
  return rope_by_product(dy_BTNH, -sin, cos), None, None


rope_by_product.defvjp(_rope_by_product_fwd, _rope_by_product_bwd)


def product(of: str, x, w, *, out_sharding=None, **options):
  """Computes jnp.einsum(of, x, w), of the form 'BTD,DNH->BTNH': contracts the last dimensions of
  activations x with the first ones of a weight w.

  On a CPU as a product of two matrices: to compute the gradient of w, XLA transposes an operand of
  more dimensions in memory, a third of the step of a small model.
  """
  of_x, of_w = of.split('->')[0].split(',')
  n = sum(letter in of_w for letter in of_x)  # contracted dimensions
  if sharding.platform() == 'cpu':
    x_XC, w_CY = sharding.as_matrix(x, x.ndim - n), sharding.as_matrix(w, n)
    if x_XC is not None and w_CY is not None:
      spec = out_sharding or jax.P(*sharding.spec(x)[:-n], *sharding.spec(w)[n:])
      of_matrix = jax.P(spec[0], spec[x.ndim - n])
      y_XY = jnp.einsum('XC,CY->XY', x_XC, w_CY, out_sharding=of_matrix, **options)
      return jnp.reshape(y_XY, (*x.shape[:-n], *w.shape[n:]), out_sharding=spec)
  return jnp.einsum(of, x, w, out_sharding=out_sharding, **options)


@jax.custom_vjp
def gradient_in_memory(x):
  """Identity on arrays, whose gradients are computed once and together, before what reads them:
  XLA may compute one anew within each product, or another one late."""
  return x


gradient_in_memory.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.optimization_barrier(dx),))


def at(indices: tuple[int, ...], i):
  """Returns indices[i]: an int where all are equal or i is one, else traced."""
  if isinstance(i, int):
    return indices[i]
  return indices[0] if len(set(indices)) == 1 else jnp.array(indices)[i]


def embed(table_VD, tokens_BT):
  """Looks up rows of a gathered table; the vocabulary may be sharded."""
  return table_VD.at[tokens_BT].get(out_sharding=sharding.pspec('batch', None, None))
