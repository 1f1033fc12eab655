"""Stochastic rounding of float32 to bfloat16."""

import jax
import jax.numpy as jnp


def stochastic_round(x, key):
  """Rounds float32 to one of the two neighbouring bfloat16, with a probability
  proportional to nearness: unbiased. Representable values, infinities and NaN are
  unchanged."""
  noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=jax.typeof(x).sharding)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
