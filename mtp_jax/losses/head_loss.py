"""The loss of one head's hidden state: a value, and a value with gradients, which is
all that a backward strategy uses.

Cross-entropy for head 1 and, by --loss.head_loss, for the others or a loss of
acceptance.py; with --loss.token_order_weight token order prediction for head 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import draft_vocab, schema
from mtp_jax.losses import acceptance, cross_entropy, token_order
from mtp_jax.model import block, confidence, lm, markov, params
from mtp_jax.parallel import sharding


class SharedWeights(NamedTuple):
  """Parameters that several heads use: gathered once, gradients reduced once. With
  --heads.unembedding=replicated each head has its own unembedding, and `unembed_DV`
  is None."""

  norm_D: Any
  unembed_DV: Any
  # Of heads >= 2, of the tokens of --heads.draft_vocab alone; None = unembed_DV.
  draft_unembed_DX: Any = None
  order_VD: Any = None  # None without token order prediction
  markov: Any = None  # None without a Markov head
  confidence_D: Any = None  # None without --heads.confidence

  def of_head(self, is_head_1) -> str:
    """Returns the name of the unembedding of a head."""
    is_own = self.draft_unembed_DX is not None and not is_head_1
    return 'draft_unembed_DX' if is_own else 'unembed_DV'


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
  step: Any = None  # for --heads.mix_hidden_states; None = states are not mixed


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


def gather_shared(norm_D, unembed, order_VD, markov_head, cfg: schema.Config) -> SharedWeights:
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
    draft_unembed_DX=_draft_unembed(unembed, cfg),
    order_VD=params.gather(order_VD, specs.order, cfg),
    markov=params.gather(markov_head, specs.markov, cfg) if markov_head is not None else None,
  )


def _draft_unembed(unembed, cfg: schema.Config):
  """Gathers the columns of --heads.draft_vocab of an unembedding at rest."""
  ids_X = draft_vocab.of(cfg)
  if ids_X is None:
    return None
  return gather_own(lm.draft_unembed(unembed, ids_X, cfg, sharding.pspec('embed', 'vocab')), cfg)


def gather_own(unembed_DV, cfg: schema.Config):
  """Gathers one head's own unembedding."""
  axes = ('embed', 'vocab')
  return sharding.gather(unembed_DV, axes, cfg.model.compute_dtype, cfg.loss.grad_dtype)


def needs_head_1_apart(cfg: schema.Config) -> bool:
  """Whether head 1's loss or gradients differ from those of the other heads."""
  h = cfg.heads
  return bool(h.isolated or h.markov_rank or h.draft_vocab or cfg.loss.token_order_weight)


def of(window: Window, cfg: schema.Config, detail=None, teacher=None) -> HeadLoss:
  """Returns the loss of every head of a micro-batch; its value's HeadStats have
  detail(Logits, target_BC) of each position. With a Teacher, drafts are compared with
  it."""
  loss = _chunked(window, cfg, detail, teacher)
  if cfg.heads.confidence and teacher is not None:
    loss = _with_confidence(loss)
  return loss if window.order_WBT is None else _with_token_order(loss, window, cfg)


class _Chunk(NamedTuple):
  """What a head's loss reads of a chunk of positions."""

  target_BC: Any
  valid_BC: Any
  of_teacher: Any = None  # hidden states (B, C, D), or acceptance.Stored
  draft_valid_BC: Any = None
  slope_BC: Any = None


def _of_tokens(head: HeadBatch, teacher, is_head_1) -> _Chunk:
  if teacher is None or is_head_1:
    return _Chunk(head.target_BT, head.valid_BT)
  d = head.drafts
  assert d is not None
  of_teacher = acceptance.shifted(teacher, d.shift)
  return _Chunk(head.target_BT, head.valid_BT, of_teacher, d.valid_BT, d.slope_BT)


class _Read(NamedTuple):
  """What logits are computed from: hidden states and rows of the Markov head, of a chunk or
  of all positions; or what they are multiplied by."""

  h: Any
  markov: Any  # None without a Markov head, and for head 1


def _of_chunk(
  read: _Read, by: _Read, of_tokens: _Chunk, cfg, *, head: HeadBatch, is_head_1, teacher, detail
):
  """Computes (the differentiated loss, (value, Stats, Found or None, detail)) of a chunk;
  the two losses differ by e2e_tv's linear term."""
  x, ids_X = of_tokens, None if is_head_1 else draft_vocab.of(cfg)
  logits_BCV = cross_entropy.scores(read.h, by.h, cfg.model)
  if read.markov is not None:
    logits_BCV += markov.bias(read.markov, by.markov)
  of = cross_entropy.of_scores(logits_BCV, x.target_BC, ids_X)
  stats = cross_entropy.stats(of, x.target_BC, x.valid_BC, cfg)
  found = detail(of, x.target_BC) if detail else None
  if x.of_teacher is None or head.drafts is None:
    value = head.scale * stats.loss
    return value, (value, stats, None, found)
  if isinstance(teacher, acceptance.Stored):
    alpha_BC, loss_BC = acceptance.of_stored(of, x.of_teacher, cfg, ids_X)
  else:
    teacher_BCV = cross_entropy.scores(x.of_teacher, teacher.unembed_DV, teacher.model)
    alpha_BC, loss_BC = acceptance.of_chunk(of, teacher_BCV, cfg.loss, ids_X)
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


def _chunked(window: Window, cfg: schema.Config, detail, teacher) -> HeadLoss:
  """Returns the loss by chunks of positions, under the shared unembedding or the head's
  own, of heads >= 2 with a Markov head."""

  def tokens_and_loss(head, is_head_1, fixed_DV=None):
    """Returns (what is read of each position, the loss of a chunk); fixed_DV: an
    unembedding without a gradient."""
    of_tokens, layout = jax.tree.flatten(_of_tokens(head, teacher, is_head_1))

    def loss(read, by, *rest):
      *of_chunk, _ = rest
      chunk = jax.tree.unflatten(layout, of_chunk)
      by = by if fixed_DV is None else by._replace(h=fixed_DV)
      of_head = dict(head=head, is_head_1=is_head_1, teacher=teacher, detail=detail)
      return _of_chunk(read, by, chunk, cfg, **of_head)

    return of_tokens, loss

  def rows(embed_VR, head, h_BTD):
    return markov.rows(embed_VR, window.tokens_BU, head.k, h_BTD.shape[1], cfg)

  def value(h_BTD, shared: SharedWeights, head: HeadBatch, is_head_1):
    own_DV, name = head.unembed_DV, shared.of_head(is_head_1)
    unembed_DV = getattr(shared, name) if own_DV is None else gather_own(own_DV, cfg)
    if own_DV is None and _is_isolated(is_head_1, cfg):
      unembed_DV = jax.lax.stop_gradient(unembed_DV)
    read, by = _Read(h_BTD, None), _Read(unembed_DV, None)
    if shared.markov is not None and not is_head_1:
      read = read._replace(markov=rows(shared.markov.embed, head, h_BTD))
      by = by._replace(markov=shared.markov.unembed)
    of_tokens, loss = tokens_and_loss(head, is_head_1)
    with jax.named_scope('ce'):
      _, of_chunks = cross_entropy.sum_chunks(loss, read, by, of_tokens, cfg)
    return _total(of_chunks, h_BTD, teacher)

  def value_and_grad(h_BTD, shared: SharedWeights, dshared, head: HeadBatch, is_head_1):
    name = shared.of_head(is_head_1)
    unembed_DV, dunembed_DV = (getattr(x, name) for x in (shared, dshared))
    gather_vjp, fixed_DV, rows_vjp = None, None, None
    if head.unembed_DV is not None:
      unembed_DV, gather_vjp = jax.vjp(lambda u: gather_own(u, cfg), head.unembed_DV)
      dunembed_DV = sharding.zeros_cotangent(unembed_DV)
    elif _is_isolated(is_head_1, cfg):
      fixed_DV, unembed_DV, dunembed_DV = unembed_DV, None, None
    read, by, dby = (_Read(x, None) for x in (h_BTD, unembed_DV, dunembed_DV))
    if shared.markov is not None and not is_head_1:
      rows_BTR, rows_vjp = jax.vjp(lambda w: rows(w, head, h_BTD), shared.markov.embed)
      read = read._replace(markov=rows_BTR)
      by, dby = (
        x._replace(markov=m.unembed) for x, m in ((by, shared.markov), (dby, dshared.markov))
      )
    of_tokens, loss = tokens_and_loss(head, is_head_1, fixed_DV)
    with jax.named_scope('ce'):
      dby, dread, _, of_chunks = cross_entropy.grad_chunks(
        loss, read, (by, dby), of_tokens, 1.0, cfg=cfg
      )
    own_DV = None
    if gather_vjp is not None:
      (own_DV,) = gather_vjp(dby.h)
    elif fixed_DV is None:
      dshared = dshared._replace(**{name: dby.h})
    if rows_vjp is not None:
      (dembed_VR,) = rows_vjp(dread.markov)
      dmarkov = dshared.markov.replace(embed=dshared.markov.embed + dembed_VR, unembed=dby.markov)
      dshared = dshared._replace(markov=dmarkov)
    total, stats = _total(of_chunks, h_BTD, teacher)
    return dshared, HeadGrads(dread.h, own_DV), total, stats

  return HeadLoss(value, value_and_grad)


def _is_isolated(is_head_1, cfg: schema.Config) -> bool:
  return cfg.heads.isolated and not is_head_1


def _with_confidence(loss: HeadLoss) -> HeadLoss:
  """Adds the loss of the confidence head to that of heads >= 2."""

  def of_head(stats: HeadStats, h_BTD, w_D, head: HeadBatch):
    assert stats.drafts is not None and head.drafts is not None
    d = head.drafts
    found = confidence.loss(h_BTD, w_D, stats.drafts.alpha_BT, d.valid_BT)
    return d.over_count * found, stats._replace(drafts=stats.drafts._replace(confidence_loss=found))

  def of_head_1(stats: HeadStats) -> HeadStats:
    assert stats.drafts is not None
    return stats._replace(drafts=stats.drafts._replace(confidence_loss=jnp.zeros(())))

  def value(h_BTD, shared: SharedWeights, head: HeadBatch, is_head_1):
    total, stats = loss.value(h_BTD, shared, head, is_head_1)
    if is_head_1:
      return total, of_head_1(stats)
    found, stats = of_head(stats, h_BTD, shared.confidence_D, head)
    return total + found, stats

  def value_and_grad(h_BTD, shared: SharedWeights, dshared, head: HeadBatch, is_head_1):
    dshared, grads, total, stats = loss.value_and_grad(h_BTD, shared, dshared, head, is_head_1)
    if is_head_1:
      return dshared, grads, total, of_head_1(stats)
    both_ways = jax.value_and_grad(lambda w_D: of_head(stats, h_BTD, w_D, head), has_aux=True)
    (found, stats), d_D = both_ways(shared.confidence_D)
    dshared = dshared._replace(confidence_D=dshared.confidence_D + d_D)
    return dshared, grads, total + found, stats

  return HeadLoss(value, value_and_grad)


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
