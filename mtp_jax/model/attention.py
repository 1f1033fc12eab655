"""Causal attention within documents. Floor 2."""

import jax
import jax.numpy as jnp


def attend(q_BTNH, k_BSGH, v_BSGH, segment_BT):
  """softmax(q k^T / sqrt(H)) v over earlier positions of the same document.

  The reference: scores of all T x S pairs, in float32. Query head n reads
  key/value head n // R, R = N / G (Ainslie et al. 2023,
  https://arxiv.org/abs/2305.13245). Returns (B, T, N, H).
  """
  B, T, N, H = q_BTNH.shape
  G = k_BSGH.shape[2]
  q_BTGRH = q_BTNH.reshape(B, T, G, N // G, H) * H**-0.5
  scores_BGRTS = jnp.einsum(
    'BTGRH,BSGH->BGRTS', q_BTGRH, k_BSGH, preferred_element_type=jnp.float32
  )
  t = jnp.arange(T)
  seen_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
  seen_BTS &= (t[:, None] >= t[None, :])[None]
  scores_BGRTS = jnp.where(
    seen_BTS[:, None, None], scores_BGRTS, jnp.finfo(jnp.float32).min
  )
  weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGH.dtype)
  out_BTGRH = jnp.einsum('BGRTS,BSGH->BTGRH', weights_BGRTS, v_BSGH)
  return out_BTGRH.reshape(B, T, N, H)
