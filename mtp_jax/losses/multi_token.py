"""The multi-head loss: cross-entropy, and two schedules of one value.

Floor 3. Follows Gloeckle et al. 2024 (https://arxiv.org/abs/2404.19737),
section 2: head k predicts token t + k from the shared trunk's z_t, and

  total = sum_k weight_k  sum_t valid_kt nll_kt / count_k ,

targets, counts and weights as in targets.py; --loss.token_order_weight adds the order
of the tokens to come, asked of head 1's hidden state.

Logits and their gradients are by far the largest arrays, B x T x V a head.
Neither schedule ever holds those of two heads, nor of more positions than
`cross_entropy.chunk` says:

  remat  one scan over heads, each rematerialised: its backward pass recomputes
         its block and its logits. Kept between the passes: nothing a head.
  eager  one scan over heads that runs each one forward and backward at once and
         adds into dL/dz, so that nothing is computed twice. Kept between the
         passes: dL/dz (B x T x D) and the gradients of heads and unembedding,
         which have to be made anyway. Heads that depend on each other recompute
         their blocks, never their logits, and keep 2 K B T D numbers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.losses import cross_entropy, targets, token_order
from mtp_jax.model import block, heads, lm, params
from mtp_jax.parallel import sharding


class SharedWeights(NamedTuple):
  """What all heads read: gathered once, its gradient reduced once. A replicated
  unembedding is a head's own, and None here."""

  norm_D: Any
  unembed_DV: Any
  order_VD: Any


class Weights(NamedTuple):
  """Parameters and activations that the heads are differentiated by."""

  modules: Any
  z_BTD: Any
  emb_BUD: Any  # of all tokens, for families that feed them; else None
  norm_D: Any
  unembed: Any  # at rest: (D, V), tied (V, D), or replicated (K, D, V)
  order_VD: Any  # None without token order prediction
  probe_K: Any


class LossInputs(NamedTuple):
  """What a window asks of K heads, and the weight of each of their tokens."""

  k_K: Any  # 1..K
  targets_KBT: Any
  valid_KBT: Any
  scale_K: Any  # weight_k / count_k
  tokens_BU: Any
  order_WBT: Any  # targets.order; None without it
  order_scale: Any
  ctx: block.Context


def mtp_loss(
  model: lm.LM, probe_K, batch: dict, *, count_K, weight_K, n_active: int, cfg: schema.Config
):
  """The multi-head loss of one micro-batch.

  Args:
    model: parameters, as sharded at rest.
    probe_K: zeros. Their gradient is |dL/dz|^2 of each head, a sum over tokens;
      in a chain, of all that comes back to head k's input, its own loss and
      those of the heads that sit on it.
    batch: tokens_BU and position_BU, int32, U = T + span; scored_BU, bool,
      where there is a mask.
    count_K: each head's valid targets in the whole step, over all micro-batches
      and devices.
    weight_K: the heads' weights.
    n_active: heads 1..n_active are computed at all.
    cfg: its schedule and chunk change memory and time, not the value.

  Returns:
    (total, sums). Totals and sums of micro-batches add up to those of the step;
    sums carry no gradient: loss_sum_K (nats with z-loss, unweighted),
    z_loss_sum_K and correct_K over each head's valid targets, order_loss_sum
    over head 1's, and accepted_K, see `targets.acceptance`. A head without a
    valid target adds 0 to the total; its mean is formed by nobody here, since a
    mean over nothing is not 0.
  """
  model = _wide_where_shared(model, cfg)
  tokens_BU, position_BU = batch['tokens'], batch['position']
  T = tokens_BU.shape[1] - cfg.span
  family, m = heads.family(cfg), n_active
  feeds = family.feeds_tokens and m > 1
  targets_KBT, valid_KBT = targets.targets(batch, cfg)
  emb_BUD = lm.embed(model, tokens_BU if feeds else tokens_BU[:, :T], cfg)
  z_BTD, ctx = lm.hidden(model, emb_BUD[:, :T], position_BU[:, :T], cfg)
  # Heads add their gradients up in the dtype that these are held in.
  held_dtype = jnp.promote_types(z_BTD.dtype, cfg.loss.grad_dtype)
  z_BTD = z_BTD.astype(held_dtype)
  over_K = 1 / jnp.maximum(count_K, 1)[:m]
  ordered = model.order is not None
  rows = LossInputs(
    jnp.arange(1, m + 1),
    targets_KBT[:m],
    valid_KBT[:m],
    weight_K[:m] * over_K,
    tokens_BU,
    token_order.token_order_targets(batch, cfg) if ordered else None,
    cfg.loss.token_order_weight * over_K[0],
    ctx,
  )
  in_use = 0 if family.one_module else slice(heads.n_modules(cfg, m))
  unembed = model.embed if model.unembed is None else model.unembed
  if cfg.heads.unembedding == 'replicated':
    unembed = unembed[:m]
  weights = Weights(
    jax.tree.map(lambda w: w[in_use], model.heads),
    z_BTD,
    emb_BUD.astype(held_dtype) if feeds else None,
    model.norm,
    unembed,
    model.order,
    probe_K[:m],
  )
  weights = _order_head_grads(weights)
  with jax.named_scope('heads'):
    total, (stats, order) = BACKWARD[cfg.loss.backward](weights, rows, cfg)
  sums = dict(
    loss_sum_K=stats.loss,
    z_loss_sum_K=stats.z_loss,
    correct_K=stats.correct,
    accepted_K=targets.acceptance(stats.argmax_BT, jnp.all(valid_KBT, axis=0), cfg.heads.stride),
  )
  if ordered:
    sums['order_loss_sum'] = order
  return total, jax.lax.stop_gradient(sums)


@jax.custom_vjp
def _order_head_grads(weights: Weights) -> Weights:
  """weights; backwards, no gradient of the heads is left for later."""
  return weights


def _order_head_grads_bwd(_, grads: Weights):
  # Else XLA runs the trunk's backward pass first and reduces the unembedding's
  # gradient after it: whole on each device, half a GiB at 7B, until then.
  return (jax.lax.optimization_barrier(grads),)


_order_head_grads.defvjp(lambda weights: (weights, None), _order_head_grads_bwd)


def _wide_where_shared(model: lm.LM, cfg) -> lm.LM:
  """Parameters that several heads use, in a dtype that their gradients can be
  added up in; nothing is done unless parameters are narrower than grad_dtype.
  """
  wide = jnp.promote_types(cfg.model.param_dtype, cfg.loss.grad_dtype)

  def cast(tree):
    return jax.tree.map(lambda w: w.astype(wide), tree)

  model = model.replace(norm=cast(model.norm))
  if cfg.heads.unembedding == 'tied':
    model = model.replace(embed=cast(model.embed))
  if heads.family(cfg).one_module:
    model = model.replace(heads=cast(model.heads))
  return model


def gather_shared(norm_D, unembed, order_VD, cfg) -> SharedWeights:
  specs = lm.specs(cfg)
  unembed_DV = {
    'shared': lambda: params.gather(unembed, specs.unembed, cfg),
    'tied': lambda: params.gather(unembed, specs.embed, cfg).T,
    'replicated': lambda: None,
  }[cfg.heads.unembedding]()
  return SharedWeights(
    params.gather(norm_D, specs.norm, cfg), unembed_DV, params.gather(order_VD, specs.order, cfg)
  )


def gather_own(unembed_DV, cfg):
  """One head's unembedding, where each has one."""
  axes = ('embed', 'vocab')
  return sharding.gather(unembed_DV, axes, cfg.model.compute_dtype, cfg.loss.grad_dtype)


@jax.custom_vjp
def _probe_grad_norm(z_BTD, probe):
  """z; backwards, the probe's gradient is the squared norm of z's."""
  del probe
  return z_BTD


def _probe_grad_norm_bwd(_, dz_BTD):
  return dz_BTD, jnp.sum(dz_BTD.astype(jnp.float32) ** 2)


_probe_grad_norm.defvjp(lambda z_BTD, probe: (z_BTD, None), _probe_grad_norm_bwd)


def _hidden(step, module, w: Weights, norm_D, carry_BTD, k, probe, ctx, cfg):
  """Head k's (carry, h); the probe measures what flows back to its input."""
  family, dtype = heads.family(cfg), cfg.model.compute_dtype
  z_BTD = w.z_BTD.astype(dtype)
  if family.dependent:
    carry_BTD = _probe_grad_norm(carry_BTD, probe)
    z_BTD = carry_BTD if step is heads.identity else z_BTD
  else:
    z_BTD = _probe_grad_norm(z_BTD, probe)
  next_emb_BTD = None
  if family.feeds_tokens and step is not heads.identity:
    next_emb_BTD = lm.next_embeddings(w.emb_BUD, k, ctx, cfg).astype(dtype)
  inputs = heads.Inputs(norm_D, z_BTD, carry_BTD, next_emb_BTD)
  return step(module, inputs, ctx, cfg)


def _at_head_1(step, k, shared: SharedWeights, cfg, yes, no, *operands):
  """yes(*operands) at head 1 if the order of tokens is asked, else no(…): a
  branch only where one scan visits head 1 and others."""
  if shared.order_VD is None:
    return no(*operands)
  if cfg.heads.block_first:
    return jax.lax.cond(k == 1, yes, no, *operands)
  return (yes if step is heads.identity else no)(*operands)


def _remat(w: Weights, rows: LossInputs, cfg):
  shared = gather_shared(w.norm_D, w.unembed, w.order_VD, cfg)
  own = w.unembed if cfg.heads.unembedding == 'replicated' else None

  @functools.partial(jax.checkpoint, static_argnums=0)
  def head(step, carry_BTD, module, of_head):
    k, probe, target_BT, valid_BT, own_DV = of_head
    carry_BTD, h_BTD = _hidden(step, module, w, shared.norm_D, carry_BTD, k, probe, rows.ctx, cfg)
    if own_DV is None:
      unembed_DV = shared.unembed_DV
    else:
      unembed_DV = gather_own(own_DV, cfg)
    with jax.named_scope('ce'):
      loss, stats = cross_entropy.sum_chunks(
        cross_entropy.softmax_xent, h_BTD, unembed_DV, (target_BT, valid_BT), cfg
      )

    def ordered(h_BTD):
      order_VD = shared.order_VD
      with jax.named_scope('order'):
        lse, _ = cross_entropy.sum_chunks(token_order.lse, h_BTD, order_VD, (valid_BT,), cfg)
        return lse - token_order.token_order_score(h_BTD, order_VD, rows.tokens_BU, rows.order_WBT)

    order = _at_head_1(step, k, shared, cfg, ordered, lambda _: jnp.zeros(()), h_BTD)
    return carry_BTD, ((loss, cross_entropy.total_over_chunks(stats), order), None)

  of_heads = (rows.k_K, w.probe_K, rows.targets_KBT, rows.valid_KBT, own)
  z_BTD = w.z_BTD.astype(cfg.model.compute_dtype)
  _, ((loss_K, stats, order_K), _) = heads.scan_heads(head, z_BTD, w.modules, of_heads, cfg)
  return _summed(loss_K, stats, jnp.sum(order_K), rows)


def _summed(loss_K, stats, order, rows: LossInputs):
  total = jnp.sum(rows.scale_K * loss_K) + rows.order_scale * order
  return total, (stats, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _interleaved(w: Weights, rows: LossInputs, cfg):
  # Undifferentiated, as in an evaluation, there is no backward to hurry.
  return _remat(w, rows, cfg)


def _head_loss_and_grads(h_BTD, own_DV, dshared_DV, shared: SharedWeights, of_head, cfg):
  """A head's loss and gradients at once, under the shared unembedding, whose
  gradient is handed on, or the head's own, whose gradient is complete.

  Returns:
    (dshared_DV, down_DV, dh_BTD, loss, Stats).
  """
  *of_tokens, scale = of_head
  unembed_DV, dunembed_DV = shared.unembed_DV, dshared_DV
  if own_DV is not None:
    unembed_DV, scatter = jax.vjp(lambda u: gather_own(u, cfg), own_DV)
    dunembed_DV = sharding.zeros_cotangent(unembed_DV)
  with jax.named_scope('ce'):
    dunembed_DV, dh_BTD, loss, stats = cross_entropy.grad_chunks(
      cross_entropy.softmax_xent, h_BTD, unembed_DV, dunembed_DV, of_tokens, scale, cfg
    )
  out = dh_BTD, loss, cross_entropy.total_over_chunks(stats)
  if own_DV is None:
    return dunembed_DV, None, *out
  return dshared_DV, *scatter(dunembed_DV), *out


def _order_at_head_1(step, k, dorder_VD, dh_BTD, h_BTD, of_ce, shared, rows, cfg):
  """`_order_grads` at head 1, what came in elsewhere."""
  return _at_head_1(
    step,
    k,
    shared,
    cfg,
    lambda *grads: _order_grads(*grads, h_BTD, of_ce[1], shared, rows, cfg),
    lambda *grads: (*grads, jnp.zeros(())),
    dorder_VD,
    dh_BTD,
  )


def _order_grads(dorder_VD, dh_BTD, h_BTD, valid_BT, shared, rows, cfg):
  """(dorder_VD, dh_BTD, each with the order's part added, its loss)."""

  def in_order(h_BTD, order_VD):
    score = token_order.token_order_score(h_BTD, order_VD, rows.tokens_BU, rows.order_WBT)
    return -rows.order_scale * score, score

  with jax.named_scope('order'):
    dorder_VD, d_BTD, lse, _ = cross_entropy.grad_chunks(
      token_order.lse, h_BTD, shared.order_VD, dorder_VD, (valid_BT,), rows.order_scale, cfg
    )
    (_, score), (d2_BTD, d_VD) = jax.value_and_grad(in_order, argnums=(0, 1), has_aux=True)(
      h_BTD, shared.order_VD
    )
  return dorder_VD + d_VD, dh_BTD + d_BTD + d2_BTD, lse - score


def _interleaved_fwd(w: Weights, rows: LossInputs, cfg):
  shared, scatter = jax.vjp(
    lambda norm_D, unembed, order_VD: gather_shared(norm_D, unembed, order_VD, cfg),
    w.norm_D,
    w.unembed,
    w.order_VD,
  )
  own = w.unembed if cfg.heads.unembedding == 'replicated' else None
  of_heads = rows.targets_KBT, rows.valid_KBT, rows.scale_K
  run = _interleaved_chain if heads.family(cfg).dependent else _interleaved_each
  dw, dshared, down, loss_K, stats, order = run(w, shared, own, of_heads, rows, cfg)
  dnorm_D, dunembed, dorder_VD = scatter(dshared)
  if own is not None:
    dunembed = down
  grads = dw._replace(norm_D=dnorm_D, unembed=dunembed, order_VD=dorder_VD)
  grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, w)
  return _summed(loss_K, stats, order, rows), grads


def _interleaved_each(w, shared, own, of_heads, rows, cfg):
  """Independent heads: one scan, each forward and backward at once."""

  def head(step, carry, module, of_head):
    dz_BTD, dshared = carry
    k, probe, own_DV, of_ce = of_head

    def hidden(module, z_BTD, norm_D, probe):
      here = w._replace(z_BTD=z_BTD)
      return _hidden(step, module, here, norm_D, z_BTD, k, probe, rows.ctx, cfg)[1]

    h_BTD, pull = jax.vjp(hidden, module, w.z_BTD, shared.norm_D, probe)
    dunembed_DV, down_DV, dh_BTD, loss, stats = _head_loss_and_grads(
      h_BTD, own_DV, dshared.unembed_DV, shared, of_ce, cfg
    )
    dorder_VD, dh_BTD, order = _order_at_head_1(
      step, k, dshared.order_VD, dh_BTD, h_BTD, of_ce, shared, rows, cfg
    )
    dmodule, d_BTD, dnorm_D, norm2 = pull(dh_BTD)
    carry = (
      dz_BTD + d_BTD.astype(dz_BTD.dtype),
      SharedWeights(dshared.norm_D + dnorm_D, dunembed_DV, dorder_VD),
    )
    return carry, ((loss, stats, norm2, down_DV, order), dmodule)

  zeros = (sharding.zeros_cotangent(w.z_BTD), jax.tree.map(sharding.zeros_cotangent, shared))
  (dz_BTD, dshared), (outs, dmodules) = heads.scan_heads(
    head, zeros, w.modules, (rows.k_K, w.probe_K, own, of_heads), cfg
  )
  loss_K, stats, norm2_K, down, order_K = outs
  dw = w._replace(modules=dmodules, z_BTD=dz_BTD, probe_K=norm2_K)
  return dw, dshared, down, loss_K, stats, jnp.sum(order_K)


def _interleaved_chain(w, shared, own, of_heads, rows, cfg):
  """Dependent heads: forward through the chain, each head's cross-entropy
  forward and backward on the way; then the chain backward, its blocks, and
  nothing else, recomputed. Kept: 2 K B T D numbers of the compute dtype, what
  each head is handed and dL/dh_k."""

  def chain(modules, z_BTD, emb_BUD, norm_D, probe_K):
    here = w._replace(z_BTD=z_BTD, emb_BUD=emb_BUD)

    @functools.partial(jax.checkpoint, static_argnums=0)
    def hidden(step, carry_BTD, module, k, probe):
      return _hidden(step, module, here, norm_D, carry_BTD, k, probe, rows.ctx, cfg)

    def head(step, carry, module, of_head):
      carry_BTD, dshared = carry
      k, probe, own_DV, of_ce = of_head
      carry_BTD, h_BTD = hidden(step, carry_BTD, module, k, probe)
      fixed_BTD = jax.lax.stop_gradient(h_BTD)
      dunembed_DV, down_DV, dh_BTD, loss, stats = _head_loss_and_grads(
        fixed_BTD, own_DV, dshared.unembed_DV, shared, of_ce, cfg
      )
      dorder_VD, dh_BTD, order = _order_at_head_1(
        step, k, dshared.order_VD, dh_BTD, fixed_BTD, of_ce, shared, rows, cfg
      )
      dshared = SharedWeights(None, dunembed_DV, dorder_VD)
      # Of which the gradient by h is dL/dh: that of the chain follows.
      stand_in = jnp.sum(h_BTD * dh_BTD, dtype=jnp.float32)
      return (carry_BTD, dshared), ((stand_in, loss, stats, down_DV, order), None)

    carry_BTD = z_BTD.astype(cfg.model.compute_dtype)
    zeros = jax.tree.map(sharding.zeros_cotangent, shared._replace(norm_D=None))
    per_head = (rows.k_K, probe_K, own, of_heads)
    (_, dshared), ((stand_in_K, *outs), _) = heads.scan_heads(
      head, (carry_BTD, zeros), modules, per_head, cfg
    )
    return jnp.sum(stand_in_K), (dshared, *outs)

  total, pull, (dshared, loss_K, stats, down, order_K) = jax.vjp(
    chain, w.modules, w.z_BTD, w.emb_BUD, shared.norm_D, w.probe_K, has_aux=True
  )
  dmodules, dz_BTD, demb_BUD, dnorm_D, norm2_K = pull(jnp.ones_like(total))
  dw = w._replace(modules=dmodules, z_BTD=dz_BTD, emb_BUD=demb_BUD, probe_K=norm2_K)
  dshared = dshared._replace(norm_D=dnorm_D)
  return dw, dshared, down, loss_K, stats, jnp.sum(order_K)


def _interleaved_bwd(cfg, grads: Weights, cotangents):
  del cfg
  dtotal, _ = cotangents
  scaled = jax.tree.map(lambda g: (dtotal * g).astype(g.dtype), grads)
  return scaled._replace(probe_K=dtotal * scaled.probe_K), None


_interleaved.defvjp(_interleaved_fwd, _interleaved_bwd)

BACKWARD = {'remat': _remat, 'interleaved': _interleaved}
