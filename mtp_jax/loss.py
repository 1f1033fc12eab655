"""The multi-head loss: targets, cross-entropy, and two schedules of one value.

Floor 3. Follows Gloeckle et al. 2024 (https://arxiv.org/abs/2404.19737),
section 2: head k predicts token t + k from the shared trunk's z_t, and

  total = sum_k weight_k  sum_t valid_kt nll_kt / count_k .

Logits and their gradients are by far the largest arrays, B x T x V a head.
Neither schedule ever holds those of two heads, nor, with --loss.chunk=C, of
more than C positions:

  remat  one scan over heads, each rematerialised: its backward pass recomputes
         its block and its logits. Kept between the passes: nothing a head.
  eager  one scan over heads that runs each one forward and backward at once and
         adds into dL/dz, so that nothing is computed twice. Kept between the
         passes: dL/dz (B x T x D) and the gradients of heads and unembedding,
         which have to be made anyway.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax import config, params, sharding
from mtp_jax.model import block, heads, lm


class Shared(NamedTuple):
  """What all heads read: gathered once, its gradient reduced once. A replicated
  unembedding is a head's own, and None here."""

  norm_D: Any
  unembed_DV: Any


class Weights(NamedTuple):
  """Parameters and activations that the heads are differentiated by."""

  modules: Any
  z_BTD: Any
  emb_BUD: Any  # of all tokens, for families that feed them; else None
  norm_D: Any
  unembed: Any  # at rest: (D, V), tied (V, D), or replicated (K, D, V)
  probe_K: Any


class Rows(NamedTuple):
  """What a window asks of K heads, and the weight of each of their tokens."""

  k_K: Any  # 1..K
  targets_KBT: Any
  valid_KBT: Any
  scale_K: Any  # weight_k / count_k
  ctx: block.Context


def targets(tokens_BU, position_BU, n: int):
  """Token t + k for k = 1..n, and whether it may be predicted from t.

  Valid iff position[t + k] == position[t] + k in the window's own positions:
  never across a document's end, nor from or to padding. U = T + n, so that each
  of the T queries has all its targets.

  Returns:
    (targets_KBT int32, valid_KBT bool), K = n.
  """
  T = tokens_BU.shape[1] - n
  at = [slice(k, k + T) for k in range(1, n + 1)]
  targets_KBT = jnp.stack([tokens_BU[:, s] for s in at])
  valid_KBT = jnp.stack(
    [position_BU[:, s] == position_BU[:, :T] + s.start for s in at]
  )
  return targets_KBT, valid_KBT


def counts(batch: dict, n: int, bytes_V):
  """Of a whole step, before any micro-batch runs: (count_K, bytes).

  Args:
    batch: tokens and position, (A, B, U) each.
    n: prediction heads.
    bytes_V: UTF-8 bytes that each token stands for.

  Returns:
    valid targets of each head (float32), and the bytes of head 1's.
  """
  of_micro_batch = jax.vmap(functools.partial(targets, n=n))
  targets_AKBT, valid_AKBT = of_micro_batch(batch['tokens'], batch['position'])
  count_K = jnp.sum(valid_AKBT, axis=(0, 2, 3))
  bytes_ABT = bytes_V.at[targets_AKBT[:, 0]].get(
    out_sharding=sharding.pspec(None, 'batch', None)
  )
  n_bytes = jnp.sum(bytes_ABT * valid_AKBT[:, 0])
  return count_K.astype(jnp.float32), n_bytes.astype(jnp.float32)


def weights(step, cfg: config.Config):
  """Weight of each head at a (traced) step, from --loss.weights. Shape (K,)."""
  starts, table = zip(*config.head_weights(cfg), strict=True)
  starts_P, table_PK = jnp.array(starts), jnp.array(table)
  return table_PK[jnp.sum(step >= starts_P) - 1]


def mtp_loss(
  model: lm.LM, probe_K, batch: dict, *, count_K, weight_K, n_active: int,
  cfg: config.Config,
):  # fmt: skip
  """The multi-head loss of one micro-batch.

  Args:
    model: parameters, as sharded at rest.
    probe_K: zeros. Their gradient is |dL/dz|^2 of each head, a sum over tokens;
      in a chain, of all that comes back to head k's input, its own loss and
      those of the heads that sit on it.
    batch: tokens_BU and position_BU, int32, U = T + K.
    count_K: each head's valid targets in the whole step, over all micro-batches
      and devices; ones to get plain sums.
    weight_K: the heads' weights.
    n_active: heads 1..n_active are computed at all.
    cfg: its schedule and chunk change memory and time, not the value.

  Returns:
    (total, sums). Totals and sums of micro-batches add up to those of the step;
    sums carry no gradient: loss_K (with z-loss, unweighted), z_loss_K and
    accuracy_K, each over count_K, and accepted_K, see `acceptance`. A head
    without a valid target has loss 0.
  """
  tokens_BU, position_BU = batch['tokens'], batch['position']
  T = tokens_BU.shape[1] - cfg.heads.n
  family, m = heads.family(cfg), n_active
  feeds = family.feeds_tokens and m > 1
  targets_KBT, valid_KBT = targets(tokens_BU, position_BU, cfg.heads.n)
  emb_BUD = lm.embed(model, tokens_BU if feeds else tokens_BU[:, :T], cfg)
  z_BTD, ctx = lm.hidden(model, emb_BUD[:, :T], position_BU[:, :T], cfg)
  # Heads add their gradients up in the dtype that these are held in.
  held_dtype = jnp.promote_types(z_BTD.dtype, cfg.loss.grad_dtype)
  z_BTD = z_BTD.astype(held_dtype)
  over_K = 1 / jnp.maximum(count_K, 1)[:m]
  rows = Rows(
    jnp.arange(1, m + 1), targets_KBT[:m], valid_KBT[:m],
    weight_K[:m] * over_K, ctx,
  )  # fmt: skip
  in_use = 0 if family.one_module else slice(heads.n_modules(cfg, m))
  unembed = model.embed if model.unembed is None else model.unembed
  if cfg.heads.unembedding == 'replicated':
    unembed = unembed[:m]
  weights = Weights(
    jax.tree.map(lambda w: w[in_use], model.heads), z_BTD,
    emb_BUD.astype(held_dtype) if feeds else None, model.norm, unembed,
    probe_K[:m],
  )  # fmt: skip
  with jax.named_scope('heads'):
    total, stats = SCHEDULES[cfg.loss.schedule](weights, rows, cfg)
  stats = jax.lax.stop_gradient(stats)
  return total, dict(
    loss_K=stats.loss * over_K,
    z_loss_K=stats.z_loss * over_K,
    accuracy_K=stats.correct * over_K,
    accepted_K=acceptance(stats.argmax_BT, jnp.all(valid_KBT, axis=0)),
  )


def acceptance(argmax_KBT, valid_BT):
  """How far head 1 would accept the other heads' drafts, teacher-forced.

  Draft k at t is head k's argmax for token t + k; it is accepted if head 1's
  argmax at t + k - 1, reading the true text, is the same token and drafts
  2..k - 1 at t were accepted. An estimate: a decoder reads its own text.

  Args:
    argmax_KBT: each head's best token.
    valid_BT: positions whose K targets all lie in their document.

  Returns:
    (K,) float32: the positions asked, then those where draft 2, 3, … K was
    accepted.
  """
  K, _, T = argmax_KBT.shape
  Q = T - K + 1  # positions whose drafts are all checked within the window
  alive_BQ = valid_BT[:, :Q]
  accepted = []
  for k in range(K):
    alive_BQ &= argmax_KBT[k, :, :Q] == argmax_KBT[0, :, k : k + Q]
    accepted.append(jnp.sum(alive_BQ, dtype=jnp.float32))
  return jnp.stack(accepted)


class Stats(NamedTuple):
  """Sums over the valid tokens of one head; stacked by the scan over heads."""

  loss: Any
  z_loss: Any
  correct: Any
  argmax_BT: Any


def _cross_entropy(h_BCD, unembed_DV, target_BC, valid_BC, cfg):
  """(sum of valid losses, Stats), for as many positions as are given.

  The label's logit is a masked sum, not a lookup: the vocabulary may be sharded
  and is never gathered. Log-sum-exp and sums in float32.
  """
  logits_BCV = jnp.einsum(
    'BCD,DV->BCV', h_BCD, unembed_DV.astype(h_BCD.dtype),
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
  ids_11V = jnp.arange(logits_BCV.shape[-1])[None, None, :]
  label_BC = jnp.sum(
    jnp.where(ids_11V == target_BC[:, :, None], logits_BCV, 0), axis=-1
  )
  z_loss = cfg.loss.z_loss * jnp.sum(valid_BC * lse_BC**2)
  loss = jnp.sum(valid_BC * (lse_BC - label_BC)) + z_loss
  argmax_BC = jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32)
  correct = jnp.sum(valid_BC * (argmax_BC == target_BC), dtype=jnp.float32)
  return loss, Stats(loss, z_loss, correct, argmax_BC)


def _in_chunks(cfg, *xs_BT):
  """Each (B, T, …) -> (T/C, B, C, …)."""
  T = xs_BT[0].shape[1]
  C = cfg.loss.chunk or T
  return tuple(
    x.reshape(x.shape[0], T // C, C, *x.shape[2:]).swapaxes(0, 1) for x in xs_BT
  )


def _out_of_chunks(x_XBC):
  """(T/C, B, C, …) -> (B, T, …)."""
  x_BXC = x_XBC.swapaxes(0, 1)
  return x_BXC.reshape(x_BXC.shape[0], -1, *x_BXC.shape[3:])


def _total_over_chunks(stats: Stats) -> Stats:
  loss, z_loss, correct, argmax_XBC = stats
  return Stats(
    jnp.sum(loss), jnp.sum(z_loss), jnp.sum(correct), _out_of_chunks(argmax_XBC)
  )


def _gather_shared(norm_D, unembed, cfg) -> Shared:
  specs = lm.specs(cfg)
  return Shared(params.gather(norm_D, specs.norm, cfg), {
    'shared': lambda: params.gather(unembed, specs.unembed, cfg),
    'tied': lambda: params.gather(unembed, specs.embed, cfg).T,
    'replicated': lambda: None,
  }[cfg.heads.unembedding]())  # fmt: skip


def _gather_own(unembed_DV, cfg):
  """One head's unembedding, where each has one."""
  axes = ('embed', 'vocab')
  return sharding.gather(
    unembed_DV, axes, cfg.model.compute_dtype, cfg.loss.grad_dtype
  )


@jax.custom_vjp
def _tap(z_BTD, probe):
  """z; backwards, the probe's gradient is the squared norm of z's."""
  del probe
  return z_BTD


def _tap_bwd(_, dz_BTD):
  return dz_BTD, jnp.sum(dz_BTD.astype(jnp.float32) ** 2)


_tap.defvjp(lambda z_BTD, probe: (z_BTD, None), _tap_bwd)


def _hidden(step, module, w: Weights, norm_D, carry_BTD, k, probe, ctx, cfg):
  """Head k's (carry, h); the probe measures what flows back to its input."""
  family, dtype = heads.family(cfg), cfg.model.compute_dtype
  z_BTD = w.z_BTD.astype(dtype)
  if family.dependent:
    carry_BTD = _tap(carry_BTD, probe)
    z_BTD = carry_BTD if step is heads.identity else z_BTD
  else:
    z_BTD = _tap(z_BTD, probe)
  next_emb_BTD = None
  if family.feeds_tokens and step is not heads.identity:
    next_emb_BTD = lm.next_embeddings(w.emb_BUD, k, ctx).astype(dtype)
  inputs = heads.Inputs(norm_D, z_BTD, carry_BTD, next_emb_BTD)
  return step(module, inputs, ctx, cfg)


def _remat(w: Weights, rows: Rows, cfg):
  shared = _gather_shared(w.norm_D, w.unembed, cfg)
  own = w.unembed if cfg.heads.unembedding == 'replicated' else None

  @functools.partial(jax.checkpoint, static_argnums=0)
  def head(step, carry_BTD, module, of_head):
    k, probe, target_BT, valid_BT, own_DV = of_head
    carry_BTD, h_BTD = _hidden(
      step, module, w, shared.norm_D, carry_BTD, k, probe, rows.ctx, cfg
    )
    if own_DV is None:
      unembed_DV = shared.unembed_DV
    else:
      unembed_DV = _gather_own(own_DV, cfg)

    @jax.checkpoint
    def chunk(_, xs):
      h_BCD, target_BC, valid_BC = xs
      return None, _cross_entropy(h_BCD, unembed_DV, target_BC, valid_BC, cfg)

    with jax.named_scope('ce'):
      _, (loss_X, stats) = jax.lax.scan(
        chunk, None, _in_chunks(cfg, h_BTD, target_BT, valid_BT)
      )
    out = jnp.sum(loss_X), _total_over_chunks(stats)
    return carry_BTD, (out, None)

  of_heads = (rows.k_K, w.probe_K, rows.targets_KBT, rows.valid_KBT, own)
  z_BTD = w.z_BTD.astype(cfg.model.compute_dtype)
  _, ((loss_K, stats), _) = heads.walk(head, z_BTD, w.modules, of_heads, cfg)
  return jnp.sum(rows.scale_K * loss_K), stats


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _eager(w: Weights, rows: Rows, cfg):
  # Undifferentiated, as in an evaluation, there is no backward to hurry.
  return _remat(w, rows, cfg)


def _cross_entropy_grads(h_BTD, unembed_DV, dunembed_DV, of_head, cfg):
  """One head's loss, and the gradients of scale x loss, chunk by chunk.

  Returns:
    (dunembed_DV with this head's added, dh_BTD, loss, Stats).
  """
  target_BT, valid_BT, scale = of_head

  def chunk(dunembed_DV, xs):
    h_BCD, target_BC, valid_BC = xs

    def scaled(h_BCD, unembed_DV):
      loss, stats = _cross_entropy(h_BCD, unembed_DV, target_BC, valid_BC, cfg)
      return scale * loss, stats

    (loss, stats), (dh_BCD, d_DV) = jax.value_and_grad(
      scaled, argnums=(0, 1), has_aux=True
    )(h_BCD, unembed_DV)
    return dunembed_DV + d_DV, (loss, stats, dh_BCD)

  with jax.named_scope('ce'):
    dunembed_DV, (loss_X, stats, dh_XBCD) = jax.lax.scan(
      chunk, dunembed_DV, _in_chunks(cfg, h_BTD, target_BT, valid_BT)
    )
  dh_BTD = _out_of_chunks(dh_XBCD)
  return dunembed_DV, dh_BTD, jnp.sum(loss_X), _total_over_chunks(stats)


def _unembedded(h_BTD, own_DV, dshared_DV, shared: Shared, of_head, cfg):
  """`_cross_entropy_grads` under the shared unembedding, whose gradient is
  handed on, or the head's own, whose gradient is complete."""
  if own_DV is None:
    dshared_DV, *out = _cross_entropy_grads(
      h_BTD, shared.unembed_DV, dshared_DV, of_head, cfg
    )
    return dshared_DV, None, *out
  unembed_DV, scatter = jax.vjp(lambda u: _gather_own(u, cfg), own_DV)
  zeros_DV = sharding.zeros_cotangent(unembed_DV)
  d_DV, *out = _cross_entropy_grads(h_BTD, unembed_DV, zeros_DV, of_head, cfg)
  return dshared_DV, *scatter(d_DV), *out


def _eager_fwd(w: Weights, rows: Rows, cfg):
  shared, scatter = jax.vjp(
    lambda norm_D, unembed: _gather_shared(norm_D, unembed, cfg),
    w.norm_D, w.unembed,
  )  # fmt: skip
  own = w.unembed if cfg.heads.unembedding == 'replicated' else None
  of_heads = rows.targets_KBT, rows.valid_KBT, rows.scale_K
  run = _eager_chain if heads.family(cfg).dependent else _eager_each
  dw, dshared, down, loss_K, stats = run(w, shared, own, of_heads, rows, cfg)
  dnorm_D, dunembed = scatter(dshared)
  if own is not None:
    dunembed = down
  grads = dw._replace(norm_D=dnorm_D, unembed=dunembed)
  grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, w)
  return (jnp.sum(loss_K), stats), grads


def _eager_each(w, shared, own, of_heads, rows, cfg):
  """Independent heads: one scan, each forward and backward at once."""

  def head(step, carry, module, of_head):
    dz_BTD, dshared = carry
    k, probe, own_DV, of_ce = of_head

    def hidden(module, z_BTD, norm_D, probe):
      here = w._replace(z_BTD=z_BTD)
      return _hidden(
        step, module, here, norm_D, z_BTD, k, probe, rows.ctx, cfg
      )[1]

    h_BTD, pull = jax.vjp(hidden, module, w.z_BTD, shared.norm_D, probe)
    dunembed_DV, down_DV, dh_BTD, loss, stats = _unembedded(
      h_BTD, own_DV, dshared.unembed_DV, shared, of_ce, cfg
    )
    dmodule, d_BTD, dnorm_D, norm2 = pull(dh_BTD)
    carry = (
      dz_BTD + d_BTD.astype(dz_BTD.dtype),
      Shared(dshared.norm_D + dnorm_D, dunembed_DV),
    )
    return carry, ((loss, stats, norm2, down_DV), dmodule)

  zeros = (
    sharding.zeros_cotangent(w.z_BTD),
    jax.tree.map(sharding.zeros_cotangent, shared),
  )
  (dz_BTD, dshared), ((loss_K, stats, norm2_K, down), dmodules) = heads.walk(
    head, zeros, w.modules, (rows.k_K, w.probe_K, own, of_heads), cfg
  )
  dw = w._replace(modules=dmodules, z_BTD=dz_BTD, probe_K=norm2_K)
  return dw, dshared, down, loss_K, stats


def _eager_chain(w, shared, own, of_heads, rows, cfg):
  """Dependent heads: forward through the chain, keeping what each hands on;
  every head's cross-entropy forward and backward at once, keeping dh_k; then
  the chain backward, each block recomputed. Kept: 3 K B T D numbers."""

  def chain(modules, z_BTD, emb_BUD, norm_D, probe_K):
    here = w._replace(z_BTD=z_BTD, emb_BUD=emb_BUD)

    @functools.partial(jax.checkpoint, static_argnums=0)
    def head(step, carry_BTD, module, of_head):
      k, probe = of_head
      carry_BTD, h_BTD = _hidden(
        step, module, here, norm_D, carry_BTD, k, probe, rows.ctx, cfg
      )
      return carry_BTD, (h_BTD, None)

    carry_BTD = z_BTD.astype(cfg.model.compute_dtype)
    per_head = (rows.k_K, probe_K)
    return heads.walk(head, carry_BTD, modules, per_head, cfg)[1][0]

  def unembed(dunembed_DV, xs):
    h_BTD, own_DV, of_head = xs
    dunembed_DV, *out = _unembedded(
      h_BTD, own_DV, dunembed_DV, shared, of_head, cfg
    )
    return dunembed_DV, out

  h_KBTD, pull = jax.vjp(
    chain, w.modules, w.z_BTD, w.emb_BUD, shared.norm_D, w.probe_K
  )
  zeros = jax.tree.map(sharding.zeros_cotangent, shared.unembed_DV)
  dunembed_DV, (down, dh_KBTD, loss_K, stats) = jax.lax.scan(
    unembed, zeros, (h_KBTD, own, of_heads)
  )
  dmodules, dz_BTD, demb_BUD, dnorm_D, norm2_K = pull(dh_KBTD)
  dw = w._replace(
    modules=dmodules, z_BTD=dz_BTD, emb_BUD=demb_BUD, probe_K=norm2_K
  )
  return dw, Shared(dnorm_D, dunembed_DV), down, loss_K, stats


def _eager_bwd(cfg, grads: Weights, cotangents):
  del cfg
  dtotal, _ = cotangents
  scaled = jax.tree.map(lambda g: (dtotal * g).astype(g.dtype), grads)
  return scaled._replace(probe_K=dtotal * scaled.probe_K), None


_eager.defvjp(_eager_fwd, _eager_bwd)

SCHEDULES = {'remat': _remat, 'eager': _eager}
