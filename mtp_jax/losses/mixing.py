"""Random numbers of hidden-state mixing (--heads.mix_hidden_states).

In training, the input of module k + 1 at each token is drawn from the trunk's state and the
outputs of modules 2..k, with equal probabilities (Megatron-LM, `mtp_hsm`): after module k its
output replaces what was drawn before with probability 1 / k (reservoir sampling, Vitter 1985,
doi:10.1145/3147.3165). A number depends on the step, the head, and the token with the next
one and its position in its document: on no row, device or micro-batch, so that a batch has
the same loss however it is divided.
"""

import jax.numpy as jnp


def _mixed(x):
  """The finalizer of MurmurHash3 (Appleby 2008), a bijection of 32 bits."""
  x ^= x >> 16
  x *= jnp.uint32(0x85EBCA6B)
  x ^= x >> 13
  x *= jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def draws(window, k, T: int):
  """Returns numbers in [0, 1), (B, T), of head k (may be traced) in a head_loss.Window."""
  tokens_BU = window.tokens_BU.astype(jnp.uint32)
  found_BT = _mixed(window.ctx.position_BT.astype(jnp.uint32))
  for x in (tokens_BU[:, :T], tokens_BU[:, 1 : T + 1], k, window.step):
    found_BT = _mixed(found_BT ^ jnp.asarray(x).astype(jnp.uint32)) + jnp.uint32(0x9E3779B9)
  return (_mixed(found_BT) >> 8).astype(jnp.float32) * jnp.float32(2**-24)
