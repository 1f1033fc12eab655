"""A naive multi-token loss, with the logits of all heads live at the same time.

Plain JAX with batched heads: no scan over heads, no rematerialisation, no chunks.
It uses only the parameter names of the package; parallel heads, a shared
unembedding, one document per row.
"""

import jax
import jax.numpy as jnp


def _norm(x_BTD, w_D, eps):
  scale = jax.lax.rsqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + eps)
  return x_BTD * scale * w_D.reshape(1, 1, -1)


def _rotate(x_BTNH, theta):
  T, H = x_BTNH.shape[1], x_BTNH.shape[3]
  rate = theta ** (-jnp.arange(0, H, 2) / H)
  angle = jnp.outer(jnp.arange(T), rate).reshape(1, T, 1, H // 2)
  a, b = x_BTNH[..., : H // 2], x_BTNH[..., H // 2 :]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _block(w, x_BTD, m):
  """One Llama layer; m is config.Model."""
  y_BTD = _norm(x_BTD, w.attn_norm, m.norm_eps)
  q, k, v = (jnp.einsum('btd,dnh->btnh', y_BTD, p) for p in (w.q, w.k, w.v))
  q, k = _rotate(q, m.rope_theta), _rotate(k, m.rope_theta)
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum('btnh,bsnh->bnts', q, k) * q.shape[3] ** -0.5
  T = x_BTD.shape[1]
  seen = jnp.tril(jnp.ones((T, T), bool)).reshape(1, 1, T, T)
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
  mixed = jnp.einsum('bnts,bsnh->btnh', weights, v)
  x_BTD = x_BTD + jnp.einsum('btnh,nhd->btd', mixed, w.o)
  y_BTD = _norm(x_BTD, w.mlp_norm, m.norm_eps)
  return x_BTD + (jax.nn.silu(y_BTD @ w.gate) * (y_BTD @ w.up)) @ w.down


def loss(w, tokens_BU, n: int, m):
  """Sum over heads of the mean cross-entropy of token t + k.

  Args:
    w: lm.LM of unsharded arrays in float32.
    tokens_BU: U = T + n.
    n: number of heads.
    m: config.Model.
  """
  T = tokens_BU.shape[1] - n
  z_BTD, _ = jax.lax.scan(
    lambda x, layer: (_block(layer, x, m), None), w.embed[tokens_BU[:, :T]], w.trunk
  )
  h_KBTD = jax.vmap(lambda head: _norm(_block(head, z_BTD, m), w.norm, m.norm_eps))(w.heads)
  logits_KBTV = jnp.einsum('kbtd,dv->kbtv', h_KBTD, w.unembed)
  targets_KBT = jnp.stack([tokens_BU[:, k : k + T] for k in range(1, n + 1)])
  label_KBT = jnp.take_along_axis(logits_KBTV, targets_KBT[..., None], axis=-1)[..., 0]
  nll_KBT = jax.nn.logsumexp(logits_KBTV, axis=-1) - label_KBT
  return jnp.sum(jnp.mean(nll_KBT, axis=(1, 2)))
