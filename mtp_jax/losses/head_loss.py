"""The loss of one head's hidden state: a value, and a value with gradients, which is
all that a backward strategy uses.

Cross-entropy for every head and, with --loss.token_order_weight, token order
prediction for head 1.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.losses import cross_entropy, token_order
from mtp_jax.model import block, lm, params
from mtp_jax.parallel import sharding


class SharedWeights(NamedTuple):
  """Parameters that several heads use: gathered once, gradients reduced once. With
  --heads.unembedding=replicated each head has its own unembedding, and `unembed_DV`
  is None."""

  norm_D: Any
  unembed_DV: Any
  order_VD: Any = None  # None without token order prediction


class HeadBatch(NamedTuple):
  """One head's part of a micro-batch; with a leading K axis, that of all heads."""

  k: Any  # the head's number, from 1
  target_BT: Any
  valid_BT: Any
  scale: Any  # weight_k / count_k
  probe: Any  # 0; its gradient is |dL/dz|^2 of the head
  unembed_DV: Any = None  # the head's own, at rest; None where heads share one


class Window(NamedTuple):
  """The part of a micro-batch that all heads share."""

  ctx: block.Context
  tokens_BU: Any
  order_WBT: Any = None  # token_order_targets; None without token order prediction
  order_scale: Any = 0.0  # its weight / the count of head 1's targets


class HeadStats(NamedTuple):
  """Sums over the valid targets of one head; stacked by the scan over heads."""

  xent: cross_entropy.Stats
  order_loss: Any  # 0 but for head 1
  detail: Any  # of each position, in an evaluation that asks for it; else None


class HeadGrads(NamedTuple):
  """Gradients specific to one head."""

  h_BTD: Any
  unembed_DV: Any  # of its own unembedding, as sharded at rest; None where heads share one


class HeadLoss(NamedTuple):
  """A loss of a head's hidden state h.

  value(h_BTD, shared, head, is_head_1) -> (scaled loss, HeadStats).
  value_and_grad(h_BTD, shared, dshared, head, is_head_1) -> (dshared with this
  head's gradients added, HeadGrads, scaled loss, HeadStats).
  """

  value: Callable[..., tuple[Any, HeadStats]]
  value_and_grad: Callable[..., tuple[SharedWeights, HeadGrads, Any, HeadStats]]


def gather_shared(norm_D, unembed, order_VD, cfg: schema.Config) -> SharedWeights:
  """Gathers the shared weights over the batch axes; at rest `unembed` is (D, V),
  tied (V, D), or replicated (K, D, V)."""
  specs = lm.specs(cfg)
  unembed_DV = {
    'shared': lambda: params.gather(unembed, specs.unembed, cfg),
    'tied': lambda: params.gather(unembed, specs.embed, cfg).T,
    'replicated': lambda: None,
  }[cfg.heads.unembedding]()
  return SharedWeights(
    norm_D=params.gather(norm_D, specs.norm, cfg),
    unembed_DV=unembed_DV,
    order_VD=params.gather(order_VD, specs.order, cfg),
  )


def gather_own(unembed_DV, cfg: schema.Config):
  """Gathers one head's own unembedding."""
  axes = ('embed', 'vocab')
  return sharding.gather(unembed_DV, axes, cfg.model.compute_dtype, cfg.loss.grad_dtype)


def of(window: Window, cfg: schema.Config, detail=None) -> HeadLoss:
  """Returns the loss of every head of a micro-batch; its value's HeadStats have
  detail(Logits, target_BC) of each position."""
  loss = _cross_entropy(cfg, detail)
  return loss if window.order_WBT is None else _with_token_order(loss, window, cfg)


def _cross_entropy(cfg: schema.Config, detail) -> HeadLoss:
  """Returns chunked softmax cross-entropy with z-loss, under the shared unembedding
  or the head's own."""

  def value(h_BTD, shared: SharedWeights, head: HeadBatch, is_head_1):
    del is_head_1
    own_DV = head.unembed_DV
    unembed_DV = shared.unembed_DV if own_DV is None else gather_own(own_DV, cfg)
    with jax.named_scope('ce'):
      loss, of_chunks = cross_entropy.sum_chunks(
        functools.partial(cross_entropy.softmax_xent, detail=detail),
        h_BTD,
        unembed_DV,
        (head.target_BT, head.valid_BT),
        cfg,
      )
    stats, found = cross_entropy.total_over_chunks(of_chunks)
    return head.scale * loss, HeadStats(stats, jnp.zeros(()), found)

  def value_and_grad(h_BTD, shared: SharedWeights, dshared, head: HeadBatch, is_head_1):
    del is_head_1
    unembed_DV, dunembed_DV, gather_vjp = shared.unembed_DV, dshared.unembed_DV, None
    if head.unembed_DV is not None:
      unembed_DV, gather_vjp = jax.vjp(lambda u: gather_own(u, cfg), head.unembed_DV)
      dunembed_DV = sharding.zeros_cotangent(unembed_DV)
    with jax.named_scope('ce'):
      dunembed_DV, dh_BTD, loss, of_chunks = cross_entropy.grad_chunks(
        cross_entropy.softmax_xent,
        h_BTD,
        (unembed_DV, dunembed_DV),
        (head.target_BT, head.valid_BT),
        head.scale,
        cfg=cfg,
      )
    own_DV = None
    if gather_vjp is None:
      dshared = dshared._replace(unembed_DV=dunembed_DV)
    else:
      (own_DV,) = gather_vjp(dunembed_DV)
    stats, _ = cross_entropy.total_over_chunks(of_chunks)
    stats = HeadStats(stats, jnp.zeros(()), None)
    return dshared, HeadGrads(dh_BTD, own_DV), head.scale * loss, stats

  return HeadLoss(value, value_and_grad)


def _with_token_order(loss: HeadLoss, window: Window, cfg: schema.Config) -> HeadLoss:
  """Adds token order prediction to the loss of head 1, with `jax.lax.cond` only
  where head 1 is part of a scan over heads."""

  def value(h_BTD, shared: SharedWeights, head: HeadBatch, is_head_1):
    def order(h_BTD):
      with jax.named_scope('token_order'):
        return token_order.loss(h_BTD, shared.order_VD, head.valid_BT, window, cfg)

    total, stats = loss.value(h_BTD, shared, head, is_head_1)
    order_loss = _cond(is_head_1, order, lambda _: jnp.zeros(()), h_BTD)
    return total + window.order_scale * order_loss, stats._replace(order_loss=order_loss)

  def value_and_grad(h_BTD, shared: SharedWeights, dshared, head: HeadBatch, is_head_1):
    def order(dorder_VD, dh_BTD):
      with jax.named_scope('token_order'):
        dorder_VD, d_BTD, order_loss = token_order.loss_and_grads(
          h_BTD, (shared.order_VD, dorder_VD), head.valid_BT, window, cfg
        )
      return dorder_VD, dh_BTD + d_BTD, order_loss

    dshared, grads, total, stats = loss.value_and_grad(h_BTD, shared, dshared, head, is_head_1)
    dorder_VD, dh_BTD, order_loss = _cond(
      is_head_1, order, lambda *grads: (*grads, jnp.zeros(())), dshared.order_VD, grads.h_BTD
    )
    total += window.order_scale * order_loss
    dshared = dshared._replace(order_VD=dorder_VD)
    return dshared, grads._replace(h_BTD=dh_BTD), total, stats._replace(order_loss=order_loss)

  return HeadLoss(value, value_and_grad)


def _cond(pred, yes, no, *operands):
  if isinstance(pred, bool):
    return (yes if pred else no)(*operands)
  return jax.lax.cond(pred, yes, no, *operands)
