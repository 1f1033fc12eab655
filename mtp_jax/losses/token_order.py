"""Token order prediction (TOP): a second unembedding of head 1's hidden state ranks
the upcoming tokens by distance (Zuhri et al. 2025, https://arxiv.org/abs/2508.19228).
Its target distribution has at most W non-zero entries, so it is never materialized
over the vocabulary."""

import math

import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.losses import cross_entropy
from mtp_jax.losses import targets as targets_lib
from mtp_jax.model import layers


def lse(h_BCD, order_VD, valid_BC, cfg):
  """Returns (sum of log-sum-exp over valid positions, None), under the second
  unembedding."""
  del cfg
  logits_BCV = jnp.einsum(
    'BCD,VD->BCV', h_BCD, order_VD.astype(h_BCD.dtype), preferred_element_type=jnp.float32
  )
  return jnp.sum(valid_BC * jax.nn.logsumexp(logits_BCV, axis=-1)), None


def token_order_score(h_BTD, order_VD, tokens_BU, order_WBT):
  """Computes sum_t sum_d p_td (h_t . row of token t + d), which ListNet's
  cross-entropy subtracts from the log-sum-exp. Rows are looked up and mixed over the
  window, without logits."""
  T = h_BTD.shape[1]
  emb_BUD = layers.embed(order_VD, tokens_BU)

  def add(mixed_BTD, xs):
    d, p_BT = xs
    here_BTD = jax.lax.dynamic_slice_in_dim(emb_BUD, d, T, axis=1)
    return mixed_BTD + p_BT[:, :, None] * here_BTD, None

  distance_W = jnp.arange(1, order_WBT.shape[0] + 1)
  zeros_BTD = jnp.zeros_like(h_BTD, jnp.float32)
  mixed_BTD, _ = jax.lax.scan(add, zeros_BTD, (distance_W, order_WBT))
  return jnp.sum(h_BTD * mixed_BTD)


def token_order_targets(rows: dict, cfg: schema.Config):
  """Computes the target distribution over the next W tokens.

  Token order prediction ranks the vocabulary by first occurrence: a token that first
  occurs at t + d, d <= W, has score W - d, any other -inf; ListNet (Cao et al. 2007)
  maps scores to p = softmax(score) (Zuhri et al. 2025,
  https://arxiv.org/abs/2508.19228), with at most W non-zero entries.

  Returns:
    p_WBT float32, p[d - 1] of token t + d: sums to 1 over d, or to 0 where token
    t + 1 is not a target of t.
  """
  W = cfg.loss.token_order_window
  tokens_BU = rows['tokens']
  T = tokens_BU.shape[1] - cfg.span
  # Distance back to the same token: t + d is its first occurrence after t iff
  # that is at least d. Shifts are W comparisons per token, not W^2.
  back_BU = jnp.full_like(tokens_BU, W)
  for d in range(W - 1, 0, -1):
    same_BU = tokens_BU == jnp.roll(tokens_BU, d, axis=1)
    same_BU &= jnp.arange(tokens_BU.shape[1])[None] >= d
    back_BU = jnp.where(same_BU, d, back_BU)
  masses = []
  for d in range(1, W + 1):
    _, valid_BT = targets_lib.ahead(rows, d, T)
    first_BT = back_BU[:, d : d + T] >= d
    masses.append(math.exp(1 - d) * (valid_BT & first_BT))
  # No order loss at positions without a next-token target.
  mass_WBT = jnp.stack(masses) * (masses[0] > 0)[None]
  total_BT = jnp.sum(mass_WBT, axis=0)
  return mass_WBT / jnp.where(total_BT > 0, total_BT, 1)[None]


def loss(h_BTD, order_VD, valid_BT, window, cfg: schema.Config):
  """Computes the loss, a sum over valid positions in nats.

  Args:
    h_BTD: head 1's hidden state.
    order_VD: the second unembedding, gathered.
    valid_BT: positions with a next token to predict.
    window: tokens_BU and order_WBT of `token_order_targets`.
    cfg: the Config.
  """
  total, _ = cross_entropy.sum_chunks(lse, h_BTD, order_VD, (valid_BT,), cfg)
  return total - token_order_score(h_BTD, order_VD, window.tokens_BU, window.order_WBT)


def loss_and_grads(h_BTD, weights, valid_BT, window, cfg: schema.Config):
  """`loss` and the gradients of window.order_scale x loss, computed at once.

  weights: (order_VD, the gradient of it so far).

  Returns:
    (gradient of order_VD with this one's added, dh_BTD, loss).
  """
  order_VD, _ = weights

  def scored(h_BTD, order_VD):
    score = token_order_score(h_BTD, order_VD, window.tokens_BU, window.order_WBT)
    return -window.order_scale * score, score

  dorder_VD, d_BTD, total, _ = cross_entropy.grad_chunks(
    lse, h_BTD, weights, (valid_BT,), window.order_scale, cfg=cfg
  )
  (_, score), (d2_BTD, d_VD) = jax.value_and_grad(scored, argnums=(0, 1), has_aux=True)(
    h_BTD, order_VD
  )
  return dorder_VD + d_VD, d_BTD + d2_BTD, total - score
