"""The loss of one head's hidden state: a value, and a value with gradients, which is
all that a backward strategy uses.

Cross-entropy for head 1 and, by --loss.head_loss, for the others or a loss of
acceptance.py; with --loss.token_order_weight token order prediction for head 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.losses import acceptance, cross_entropy, token_order
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
  drafts: acceptance.Drafts | None = None  # None where nothing is compared with head 1


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
  drafts: acceptance.Found | None = None  # None where nothing is compared with head 1


class HeadGrads(NamedTuple):
  """Gradients specific to one head."""

  h_BTD: Any
  unembed_DV: Any  # of its own unembedding, as sharded at rest; None where heads share one


class HeadLoss(NamedTuple):
  """A loss of a head's hidden state h.

  value(h_BTD, shared, head, is_head_1) -> (scaled loss, HeadStats).
  value_and_grad(h_BTD, shared, dshared, head, is_head_1) -> (dshared with this
  head's gradients added, HeadGrads, scaled loss, HeadStats).

  is_head_1 is None where a scan visits head 1 along with the others, whose loss is the
  same; see `heads.scan_heads`.
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


def needs_head_1_apart(cfg: schema.Config) -> bool:
  """Whether head 1's loss or gradients differ from those of the other heads."""
  return cfg.heads.isolated or bool(cfg.loss.token_order_weight)


def of(window: Window, cfg: schema.Config, detail=None, teacher=None) -> HeadLoss:
  """Returns the loss of every head of a micro-batch; its value's HeadStats have
  detail(Logits, target_BC) of each position. With a Teacher, drafts are compared with
  it."""
  loss = _chunked(cfg, detail, teacher)
  return loss if window.order_WBT is None else _with_token_order(loss, window, cfg)


class _Chunk(NamedTuple):
  """What a head's loss reads of a chunk of positions."""

  target_BC: Any
  valid_BC: Any
  teacher_BCD: Any = None
  draft_valid_BC: Any = None
  slope_BC: Any = None


def _of_tokens(head: HeadBatch, teacher, is_head_1) -> _Chunk:
  if teacher is None or is_head_1:
    return _Chunk(head.target_BT, head.valid_BT)
  d = head.drafts
  assert d is not None
  teacher_BTD = acceptance.shifted(teacher, d.shift)
  return _Chunk(head.target_BT, head.valid_BT, teacher_BTD, d.valid_BT, d.slope_BT)


def _of_chunk(h_BCD, unembed_DV, of_tokens: _Chunk, cfg, *, head: HeadBatch, teacher, detail):
  """Computes (the differentiated loss, (value, Stats, Found or None, detail)) of a chunk;
  the two losses differ by e2e_tv's linear term."""
  x = of_tokens
  of = cross_entropy.logits(h_BCD, unembed_DV, x.target_BC, cfg.model)
  stats = cross_entropy.stats(of, x.target_BC, x.valid_BC, cfg)
  found = detail(of, x.target_BC) if detail else None
  if x.teacher_BCD is None or head.drafts is None:
    value = head.scale * stats.loss
    return value, (value, stats, None, found)
  teacher_BCV = cross_entropy.scores(x.teacher_BCD, teacher.unembed_DV, cfg.model)
  alpha_BC, loss_BC = acceptance.of_chunk(of, teacher_BCV, cfg.loss)
  drafts = acceptance.Found(jnp.sum(x.draft_valid_BC * loss_BC), alpha_BC)
  share = cfg.loss.head_ce_share
  value = head.scale * (share * (stats.loss - stats.z_loss) + stats.z_loss)
  value += head.drafts.scale * drafts.loss
  linear = 0.0 if x.slope_BC is None else jnp.sum(x.slope_BC * alpha_BC)
  return value + linear, (value, stats, drafts, found)


def _total(of_chunks, h_BTD, teacher):
  """Returns (scaled loss, HeadStats) of what `_of_chunk` returned for each chunk."""
  value_X, stats, drafts, found = of_chunks
  stats = cross_entropy.total(stats)
  if drafts is not None:
    alpha_BT = cross_entropy.out_of_chunks(drafts.alpha_BT)
    drafts = acceptance.Found(jnp.sum(drafts.loss), alpha_BT)
  elif teacher is not None:
    drafts = acceptance.no_drafts(h_BTD)
  found = jax.tree.map(cross_entropy.out_of_chunks, found)
  return jnp.sum(value_X), HeadStats(stats, jnp.zeros(()), found, drafts)


def _chunked(cfg: schema.Config, detail, teacher) -> HeadLoss:
  """Returns the loss by chunks of positions, under the shared unembedding or the head's
  own."""

  def tokens_and_loss(head, is_head_1):
    of_tokens, layout = jax.tree.flatten(_of_tokens(head, teacher, is_head_1))

    def loss(h_BCD, unembed_DV, *rest):
      *of_chunk, _ = rest
      chunk = jax.tree.unflatten(layout, of_chunk)
      return _of_chunk(h_BCD, unembed_DV, chunk, cfg, head=head, teacher=teacher, detail=detail)

    return of_tokens, loss

  def value(h_BTD, shared: SharedWeights, head: HeadBatch, is_head_1):
    own_DV = head.unembed_DV
    unembed_DV = shared.unembed_DV if own_DV is None else gather_own(own_DV, cfg)
    if own_DV is None and _is_isolated(is_head_1, cfg):
      unembed_DV = jax.lax.stop_gradient(unembed_DV)
    of_tokens, loss = tokens_and_loss(head, is_head_1)
    with jax.named_scope('ce'):
      _, of_chunks = cross_entropy.sum_chunks(loss, h_BTD, unembed_DV, of_tokens, cfg)
    return _total(of_chunks, h_BTD, teacher)

  def value_and_grad(h_BTD, shared: SharedWeights, dshared, head: HeadBatch, is_head_1):
    unembed_DV, dunembed_DV, gather_vjp = shared.unembed_DV, dshared.unembed_DV, None
    if head.unembed_DV is not None:
      unembed_DV, gather_vjp = jax.vjp(lambda u: gather_own(u, cfg), head.unembed_DV)
      dunembed_DV = sharding.zeros_cotangent(unembed_DV)
    elif _is_isolated(is_head_1, cfg):
      dunembed_DV = None
    of_tokens, loss = tokens_and_loss(head, is_head_1)
    with jax.named_scope('ce'):
      dunembed_DV, dh_BTD, _, of_chunks = cross_entropy.grad_chunks(
        loss, h_BTD, (unembed_DV, dunembed_DV), of_tokens, 1.0, cfg=cfg
      )
    own_DV = None
    if gather_vjp is not None:
      (own_DV,) = gather_vjp(dunembed_DV)
    elif dunembed_DV is not None:
      dshared = dshared._replace(unembed_DV=dunembed_DV)
    total, stats = _total(of_chunks, h_BTD, teacher)
    return dshared, HeadGrads(dh_BTD, own_DV), total, stats

  return HeadLoss(value, value_and_grad)


def _is_isolated(is_head_1, cfg: schema.Config) -> bool:
  return cfg.heads.isolated and not is_head_1


def _with_token_order(loss: HeadLoss, window: Window, cfg: schema.Config) -> HeadLoss:
  """Adds token order prediction to the loss of head 1."""

  def value(h_BTD, shared: SharedWeights, head: HeadBatch, is_head_1):
    total, stats = loss.value(h_BTD, shared, head, is_head_1)
    if not is_head_1:
      return total, stats
    with jax.named_scope('token_order'):
      order_loss = token_order.loss(h_BTD, shared.order_VD, head.valid_BT, window, cfg)
    return total + window.order_scale * order_loss, stats._replace(order_loss=order_loss)

  def value_and_grad(h_BTD, shared: SharedWeights, dshared, head: HeadBatch, is_head_1):
    dshared, grads, total, stats = loss.value_and_grad(h_BTD, shared, dshared, head, is_head_1)
    if not is_head_1:
      return dshared, grads, total, stats
    with jax.named_scope('token_order'):
      dorder_VD, d_BTD, order_loss = token_order.loss_and_grads(
        h_BTD, (shared.order_VD, dshared.order_VD), head.valid_BT, window, cfg
      )
    total += window.order_scale * order_loss
    dshared = dshared._replace(order_VD=dorder_VD)
    grads = grads._replace(h_BTD=grads.h_BTD + d_BTD)
    return dshared, grads, total, stats._replace(order_loss=order_loss)

  return HeadLoss(value, value_and_grad)
