"""TODO of mtp_jax.optim."""

import jax
import jax.numpy as jnp


def stochastic_round(x, key):
  """float32 -> bfloat16: to one of its two neighbours, with the probability of
  the nearness to it. x that is a bfloat16 stays; so do infinities and NaN."""
  noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=jax.typeof(x).sharding)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
