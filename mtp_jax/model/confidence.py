"""The confidence head: how probably a draft is accepted, by the hidden state that drafts it.

  c_k = sigmoid(w . h_k),  loss: binary cross-entropy of c_k with the acceptance rate alpha_k

(DSpark, 2026, https://arxiv.org/abs/2607.05147). All heads >= 2 share w. Neither h nor alpha
gets a gradient, so that drafts are, bit for bit, those of a model without it; there all is
trained together. A decoder stops drafting where the product of c_2, c_3, … falls below
--decode.min_confidence.
"""

import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.model import params


def specs(cfg: schema.Config) -> params.Spec | None:
  """Returns the Spec of w; None without --heads.confidence, or without heads >= 2."""
  if not cfg.heads.confidence or cfg.heads.n == 1:
    return None
  return params.Spec((cfg.model.d_model,), (None,), None, fill=0.0)


def logits(h_BTD, w_D):
  """Returns log(c / (1 - c)), (B, T), float32."""
  return jnp.einsum('BTD,D->BT', h_BTD.astype(jnp.float32), w_D.astype(jnp.float32))


def loss(h_BTD, w_D, alpha_BT, valid_BT):
  """Returns the sum of the binary cross-entropy over valid drafts, whose gradient is w's alone."""
  z_BT = logits(jax.lax.stop_gradient(h_BTD), w_D)
  alpha_BT = jax.lax.stop_gradient(alpha_BT)
  return jnp.sum(valid_BT * (jax.nn.softplus(z_BT) - alpha_BT * z_BT))
