"""Losses that train heads >= 2 to be accepted, and the acceptance rates they maximise.

Head k drafts token t + o_k from q, its distribution at query t; head 1 verifies it
with p, its own distribution at query t + o_k - 1. Rejection sampling accepts in
expectation (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192)

  alpha = sum_v min(p_v, q_v) = 1 - |p - q|_1 / 2 .

p has no gradient. With --loss.teacher it is the next-token distribution of another, frozen
model at the same query (teacher.py); alpha is then a measure of the loss, and not what
head 1 accepts. By --loss.head_loss, the loss of one position is

  kl         KL(p || q)
  tv         1 - alpha
  lk         -log max(alpha, FLOOR)                          (arXiv 2602.23881)
  lk_hybrid  l KL(p || q) + (1 - l) (1 - alpha), with l = exp(-eta alpha)  (the same)
  e2e_tv     1 - (1 / G) sum_j prod_{i <= j} alpha_i over the G drafts in a row of a
             query (arXiv 2606.12370)

and gradients reach q alone. Two chunks of logits are in memory at a time: the head's,
and the teacher's, which are computed from head 1's hidden states, moved by o_k - 1.
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import schema
from mtp_jax.losses import cross_entropy
from mtp_jax.parallel import sharding

FLOOR = 1e-5  # of alpha in lk: no gradient below


class Teacher(flax.struct.PyTreeNode):
  """What drafts are compared with: the hidden states and unembedding of head 1, or of the
  head 1 of another model."""

  h_BTD: Any
  unembed_DV: Any
  model: schema.ModelConfig = flax.struct.field(pytree_node=False)  # whose logits these are


class Stored(NamedTuple):
  """The most probable next tokens of a teacher at each query, as a store has them."""

  ids_BTP: Any
  logp_BTP1: Any  # float16: of each, then of all other tokens together


class Drafts(NamedTuple):
  """What a head's drafts are compared by; with a leading K axis, those of all heads."""

  shift: Any  # o_k - 1, from the query to the one that verifies
  valid_BT: Any  # of `targets.drafts`
  scale: Any  # weight_k x share of the loss / number of drafts
  over_count: Any  # 1 / number of drafts
  # Derivative of the loss by alpha, of e2e_tv's gradients; else None.
  slope_BT: Any = None


class Found(NamedTuple):
  """Of the drafts of one head; zeros for head 1."""

  loss: Any  # sum over valid drafts
  alpha_BT: Any
  confidence_loss: Any = None  # sum over valid drafts; None without --heads.confidence


def no_drafts(h_BTD) -> Found:
  """Returns the Found of head 1, which has none."""
  zeros_BT = jnp.zeros_like(h_BTD[:, :, 0], jnp.float32)
  return Found(jnp.zeros(()), zeros_BT)


def shifted(teacher: Teacher | Stored, shift):
  """Returns the teacher's hidden states, or the Stored, at t + shift; zeros beyond the
  window."""

  def of(x_BTD):
    T = x_BTD.shape[1]
    padded_BUD = jnp.pad(x_BTD, ((0, 0), (0, T), (0, 0)))
    return jax.lax.dynamic_slice_in_dim(padded_BUD, shift, T, axis=1)

  return Stored(*map(of, teacher)) if isinstance(teacher, Stored) else of(teacher.h_BTD)


def _order(logits_BCV):
  """Returns int32 in the order of float32."""
  bits = jax.lax.bitcast_convert_type(logits_BCV, jnp.int32)
  return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)


def _least(keys_BCV, is_kept):
  """Returns the smallest key (B, C) above all keys at which is_kept, which holds from
  some key on, fails. 32 reads of the keys, and sums over the vocabulary alone: it may be
  sharded, where a sort would gather it."""

  def halve(_, bounds):
    low_BC, high_BC = bounds  # fails at low, holds at high
    # Without overflow of the sum.
    middle_BC = (low_BC >> 1) + (high_BC >> 1) + (low_BC & high_BC & 1)
    holds_BC = is_kept(middle_BC)
    return jnp.where(holds_BC, low_BC, middle_BC), jnp.where(holds_BC, middle_BC, high_BC)

  top_BC = jnp.max(keys_BCV, axis=-1)
  low_BC = jnp.full_like(top_BC, -(2**31))
  least_BC = jax.lax.fori_loop(0, 32, halve, (low_BC, top_BC))[1]
  return checkpoint_name(least_BC, cross_entropy.OF_POSITION)


def kept(logits_BCV, l: schema.LossConfig):
  """Returns the tokens that --loss.top_k, top_p and min_p keep, (B, C, V) bool, in the
  order and with the ties of `decode.sample.probabilities`."""
  keys_BCV = _order(logits_BCV)
  top_BC = jnp.max(logits_BCV, axis=-1)
  mass_BCV = jnp.exp(logits_BCV - top_BC[:, :, None])
  kept_BCV = jnp.ones_like(mass_BCV, bool)
  if l.top_k:
    # The k-th largest: the least key above which fewer than k tokens lie.
    least_BC = _least(
      keys_BCV, lambda key_BC: jnp.sum(keys_BCV > key_BC[:, :, None], axis=-1) < l.top_k
    )
    kept_BCV &= keys_BCV >= least_BC[:, :, None]
  if l.top_p < 1:
    mass_BCV = jnp.where(kept_BCV, mass_BCV, 0)
    enough_BC = l.top_p * jnp.sum(mass_BCV, axis=-1)

    def is_kept(key_BC):
      above_BCV = jnp.where(keys_BCV > key_BC[:, :, None], mass_BCV, 0)
      return jnp.sum(above_BCV, axis=-1) < enough_BC

    kept_BCV &= keys_BCV >= _least(keys_BCV, is_kept)[:, :, None]
  return kept_BCV & (mass_BCV >= l.min_p)


class _Distribution(NamedTuple):
  p_BCV: Any  # after temperature and filters
  log_BCV: Any  # log of the distribution before filters


def _distribution(logits_BCV, lse_BC, l: schema.LossConfig) -> _Distribution:
  found_BCV = jax.lax.stop_gradient(logits_BCV)
  log_BCV = logits_BCV - lse_BC[:, :, None]
  p_BCV = jnp.exp(log_BCV)
  if l.filters:
    p_BCV = jnp.where(kept(found_BCV, l), p_BCV, 0)
    p_BCV /= jnp.sum(p_BCV, axis=-1, keepdims=True)
  return _Distribution(p_BCV, log_BCV)


def _tempered(logits_BCV, lse_BC, l: schema.LossConfig):
  """Returns (logits / temperature, their log-sum-exp); lse_BC: that of the logits."""
  if l.temperature != 1:
    logits_BCV /= l.temperature
    lse_BC = None
  if lse_BC is None:
    top_BC = jnp.max(jax.lax.stop_gradient(logits_BCV), axis=-1)
    lse_BC = cross_entropy.log_sum_exp(logits_BCV, top_BC)
  return logits_BCV, lse_BC


def probability(of: cross_entropy.Logits, target_BC, l: schema.LossConfig):
  """Returns the probability of the target, after temperature and filters, (B, C)."""
  p_BCV = _distribution(*_tempered(of.logits_BCV, of.lse_BC, l), l).p_BCV
  return jnp.sum(jnp.where(of.ids_11V == target_BC[:, :, None], p_BCV, 0), axis=-1)


def of_chunk(of: cross_entropy.Logits, teacher_BCV, l: schema.LossConfig, ids_X=None):
  """Compares a chunk's Logits with its teacher's.

  Filters apply to p in every loss and to q in alpha: without them q has a finite
  divergence from any p. With a draft vocabulary q is 0 outside of it, and kl the mass m of p
  in it times KL(p / m || q): what cross-entropy is in expectation, of a token drawn from p
  that is a target if it is in it.

  Args:
    of: the head's Logits.
    teacher_BCV: head 1's, of all tokens.
    l: the loss.
    ids_X: the tokens of the head's logits; None = all.

  Returns:
    (alpha_BC, the loss of each position (B, C)); the latter is 0 for ce and for e2e_tv,
    where the drafts of a query depend on each other.
  """
  of_q = _tempered(of.logits_BCV, of.lse_BC, l)
  of_p = _tempered(jax.lax.stop_gradient(teacher_BCV), None, l)
  return _compared(of_q, of_p, l=l, ids_X=ids_X)


ABSENT = -1e30  # log-probability of a token that is not stored; finite, as differences are taken


def of_stored(of: cross_entropy.Logits, stored: Stored, cfg: schema.Config, ids_X=None):
  """`of_chunk` of a teacher of which only the P most probable tokens are known.

  All others have p = 0 in min(p, q); in KL they are one bucket, with the probability that
  p and q have for all of them: KL(p || q) >= sum_P p log(p / q) + p_rest log(p_rest / q_rest).
  With --loss.top_k <= P nothing is missing. What float16 rounded sums to 1 again. With a draft
  vocabulary, ids_X, there is no such bucket: most of it may lie outside.
  """
  l = cfg.loss
  logp_BCP1 = stored.logp_BTP1.astype(jnp.float32)
  logp_BCP1 -= jax.nn.logsumexp(logp_BCP1, axis=-1, keepdims=True)
  log_BCV = _spread(stored.ids_BTP, logp_BCP1[:, :, :-1], cfg.model.vocab_size)
  of_q = _tempered(of.logits_BCV, of.lse_BC, l)
  if l.filters:
    return _compared(of_q, _tempered(log_BCV, None, l), l=l, ids_X=ids_X)
  rest_BC = jnp.maximum(logp_BCP1[:, :, -1], ABSENT)
  of_p = log_BCV, jnp.zeros_like(rest_BC)
  return _compared(of_q, of_p, None if ids_X is not None else rest_BC, l=l, ids_X=ids_X)


def _spread(ids_BCP, logp_BCP, V: int):
  """Returns log-probabilities by token, (B, C, V), ABSENT where there is none. Each device
  writes those of its shard of the vocabulary: logits and probabilities are never gathered."""
  mesh = jax.sharding.get_abstract_mesh()

  def write(ids_BCP, logp_BCP, first=0, width=V):
    B, C, _ = ids_BCP.shape
    at_BCP = jnp.where(ids_BCP >= first, ids_BCP - first, width)  # dropped, as all beyond
    rows, columns = jnp.arange(B)[:, None, None], jnp.arange(C)[None, :, None]
    empty_BCV = jnp.full((B, C, width), ABSENT, logp_BCP.dtype)
    return empty_BCV.at[rows, columns, at_BCP].set(logp_BCP, mode='drop')

  if mesh.empty:
    return write(ids_BCP, logp_BCP)
  rows, by_token = sharding.pspec('batch', None, None), sharding.pspec('batch', None, 'vocab')
  width = V // mesh.shape[sharding.RULES['vocab']]

  def on_device(ids_BCP, logp_BCP):
    first = jax.lax.axis_index(sharding.RULES['vocab']) * width
    return write(ids_BCP, logp_BCP, first, width)

  on_rows = (jax.reshard(x, rows) for x in (ids_BCP, logp_BCP))
  return jax.shard_map(on_device, in_specs=(rows, rows), out_specs=by_token, check_vma=False)(
    *on_rows
  )


def _compared(of_q, of_p, log_rest_BC=None, *, l: schema.LossConfig, ids_X):
  # Checkpointed: neither p nor q is in memory between the forward and backward pass.
  compare = functools.partial(_of_distributions, l=l, ids_X=ids_X)
  checkpointed = jax.checkpoint(compare, policy=cross_entropy.KEEP, prevent_cse=False)
  return checkpointed(of_q, of_p, log_rest_BC)


def _of_distributions(of_q, of_p, log_rest_BC, *, l: schema.LossConfig, ids_X):
  q, p = (_distribution(logits_BCV, lse_BC, l) for logits_BCV, lse_BC in (of_q, of_p))
  if ids_X is not None:
    columns = jax.typeof(q.p_BCV).sharding.spec
    p = _Distribution(*(x_BCV.at[:, :, ids_X].get(out_sharding=columns) for x_BCV in p))
  # jnp.minimum would halve the gradient where p = q.
  least_BCV = jnp.where(q.p_BCV <= p.p_BCV, q.p_BCV, p.p_BCV)
  alpha_BC = checkpoint_name(jnp.sum(least_BCV, axis=-1), cross_entropy.OF_POSITION)

  def kl_BC():
    log_p_BCV = jnp.log(jnp.where(p.p_BCV > 0, p.p_BCV, 1)) if l.filters else p.log_BCV
    known_BC = jnp.sum(jnp.where(p.p_BCV > 0, p.p_BCV * (log_p_BCV - q.log_BCV), 0), axis=-1)
    if ids_X is not None:
      # -m log m, by which the divergence of p / m is larger; without a gradient.
      return known_BC + jax.scipy.special.entr(jnp.sum(p.p_BCV, axis=-1))
    return known_BC if log_rest_BC is None else known_BC + rest_BC()

  def rest_BC():
    # A sum of what is not stored: 1 - the sum of the others would cancel.
    q_BC = jnp.sum(jnp.where(of_p[0] > ABSENT / 2, 0, jnp.exp(q.log_BCV)), axis=-1)
    return jnp.exp(log_rest_BC) * (log_rest_BC - jnp.log(jnp.maximum(q_BC, 1e-30)))

  def hybrid_BC():
    share_BC = jnp.exp(-l.lk_eta * jax.lax.stop_gradient(alpha_BC))
    return share_BC * kl_BC() + (1 - share_BC) * (1 - alpha_BC)

  loss_BC = {
    'kl': kl_BC,
    'tv': lambda: 1 - alpha_BC,
    'lk': lambda: -jnp.log(jnp.maximum(alpha_BC, FLOOR)),
    'lk_hybrid': hybrid_BC,
  }.get(l.head_loss, lambda: jnp.zeros_like(alpha_BC))()
  return alpha_BC, loss_BC


def products(alpha_KBT):
  """Returns prod_{2 <= i <= k} alpha_i, (K, B, T): 1 for head 1."""
  is_draft_K11 = jnp.arange(alpha_KBT.shape[0])[:, None, None] > 0
  return jnp.cumprod(jnp.where(is_draft_K11, alpha_KBT, 1), axis=0)


def in_a_row(alpha_KBT, valid_KBT):
  """Computes e2e_tv of each head: the sum over valid queries of
  (1 - prod_{i <= k} alpha_i) / G, of which the loss is the sum over the G heads >= 2;
  (K,), 0 for head 1."""
  n_drafts = max(alpha_KBT.shape[0] - 1, 1)
  return jnp.sum(valid_KBT * (1 - products(alpha_KBT)), axis=(1, 2)) / n_drafts
