"""Sampling: logit filters, draws, and the acceptance of drafts.

A draw depends only on the row's seed and the index of the token in its row, not on
other rows, nor on the number of tokens per forward pass.

Verification is lossless: a greedy draft is accepted if it is head 1's argmax (Stern
et al. 2018, https://arxiv.org/abs/1811.03115); a sampled one with probability
min(1, p / q), p and q of head 1 and of the head that drafted, else the token is
drawn from max(p - q, 0), normalised, so that each token has head 1's distribution
(Leviathan et al. 2023, https://arxiv.org/abs/2211.17192). Where the number of drafts is
measured, a sampled draft is accepted if it equals the token that head 1 draws with the
same random numbers (Gumbel coupling, Daliri et al. 2024,
https://arxiv.org/abs/2408.07978): fewer are accepted, and the text is that of plain
decoding, whatever was drafted.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import schema

ACCEPT, DRAW, DRAFT = range(3)  # purposes of random numbers


class Sampling(NamedTuple):
  """Sampling options of --decode.*: traced numbers, so that another value does not
  recompile, or None for an unused filter."""

  temperature: Any
  top_k: Any
  top_p: Any
  min_p: Any


def sampling(cfg: schema.CommandConfig) -> Sampling | None:
  """Returns the Sampling of --decode.*; None = greedy."""
  d, vocab_size = cfg.decode, cfg.model.vocab_size
  if not d.temperature:
    return None
  return Sampling(
    d.temperature,
    min(d.top_k, vocab_size) or None,
    d.top_p if d.top_p < 1 else None,
    d.min_p or None,
  )


def probabilities(logits, s: Sampling):
  """Computes softmax(logits / temperature) over the tokens that all filters keep.

  Filters apply in order: the top_k most likely; of these, renormalised, the fewest
  most likely with total probability top_p; of those, the ones with at least min_p
  of the largest probability. Ties are kept or dropped together. Float32, over the
  last axis.
  """
  logits = logits.astype(jnp.float32)
  top = jnp.max(logits, axis=-1, keepdims=True)
  logits = (logits - top) / s.temperature  # no overflow at low temperatures
  if s.top_k is not None or s.top_p is not None:
    ranked = -jnp.sort(-logits, axis=-1)
  if s.top_k is not None:
    k = jnp.minimum(s.top_k, logits.shape[-1])
    least = jnp.take(ranked, k - 1, axis=-1)[..., None]
    logits = jnp.where(logits < least, -jnp.inf, logits)
    ranked = jnp.where(ranked < least, -jnp.inf, ranked)
  if s.top_p is not None:
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    least = jnp.min(jnp.where(before < s.top_p, ranked, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  p = jax.nn.softmax(logits, axis=-1)
  if s.min_p is not None:
    p = jnp.where(p < s.min_p * jnp.max(p, axis=-1, keepdims=True), 0, p)
    p = p / jnp.sum(p, axis=-1, keepdims=True)
  return p


def _random(f, seed_B, index_BT, purpose: int):
  """Computes f(key) for each token of each row."""

  def one(seed, index):
    key = jax.random.fold_in(jax.random.key(seed), index)
    return f(jax.random.fold_in(key, purpose))

  return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seed_B, index_BT)


def draw(p_BTV, seed_B, index_BT, purpose: int):
  """Draws a token from each distribution, which need not be normalised."""
  shape = p_BTV.shape[-1:]
  noise_BTV = _random(lambda key: jax.random.gumbel(key, shape), seed_B, index_BT, purpose)
  return jnp.argmax(jnp.log(p_BTV) + noise_BTV, axis=-1).astype(jnp.int32)


def tokens(logits_BTV, seed_B, index_BT, s: Sampling | None):
  """Returns the token that plain decoding emits at each index, by head 1's logits: their
  argmax, or a draw."""
  if s is None:
    return jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
  return draw(probabilities(logits_BTV, s), seed_B, index_BT, DRAW)


def accept_equal(tokens_BM, best_BM, allowed_B, levels):
  """Accepts the longest path of drafts that equal head 1's tokens.

  Args:
    tokens_BM: tokens of the window, its root the last known one.
    best_BM: head 1's token after each of them.
    allowed_B: deepest level that may be accepted.
    levels: (slots, their parents) of each level below the root.

  Returns:
    (number of accepted drafts (B,), path_BW: the slot at each level, emitted_BW:
    head 1's token after each of these).
  """
  B = tokens_BM.shape[0]
  is_accepted = {0: jnp.ones(B, bool)}
  path, n_accepted = [jnp.zeros(B, jnp.int32)], jnp.zeros(B, jnp.int32)
  for level, (slots, parents) in enumerate(levels, 1):
    for slot, parent in zip(slots, parents, strict=True):
      is_accepted[slot] = (
        is_accepted[parent] & (tokens_BM[:, slot] == best_BM[:, parent]) & (level <= allowed_B)
      )
    is_accepted_BX = jnp.stack([is_accepted[slot] for slot in slots], axis=1)
    # Siblings are different tokens: at most one per level is accepted.
    path.append(jnp.array(slots, jnp.int32)[jnp.argmax(is_accepted_BX, axis=1)])
    n_accepted += jnp.any(is_accepted_BX, axis=1)
  path_BW = jnp.stack(path, axis=1)
  return n_accepted, path_BW, jnp.take_along_axis(best_BM, path_BW, axis=1)


def accept_sampled(tokens_BW, logits_BWV, q_BJV, allowed_B, *, seed_B, index_BW, s):
  """Accepts drafts of a chain by rejection sampling.

  Args:
    tokens_BW: the last known token, then the drafts.
    logits_BWV: head 1's logits after each of them.
    q_BJV: the distribution that each draft was drawn from; J = W - 1.
    allowed_B: maximum number of accepted drafts; further ones are ignored.
    seed_B: seed of each row.
    index_BW: index, in its row, of the token after each.
    s: the Sampling.

  Returns:
    (number of accepted drafts (B,), emitted_BW: these, then a token of head 1).
  """
  p_BWV = probabilities(logits_BWV, s)
  W = tokens_BW.shape[1]
  J = W - 1
  if not J:
    return jnp.zeros_like(allowed_B), draw(p_BWV, seed_B, index_BW, DRAW)
  drafts_BJ1 = tokens_BW[:, 1:, None]
  p_BJ = jnp.take_along_axis(p_BWV[:, :J], drafts_BJ1, axis=2)[:, :, 0]
  q_BJ = jnp.take_along_axis(q_BJV, drafts_BJ1, axis=2)[:, :, 0]
  u_BJ = _random(jax.random.uniform, seed_B, index_BW[:, :J], ACCEPT)
  is_accepted_BJ = (u_BJ * q_BJ < p_BJ) & (jnp.arange(J)[None] < allowed_B[:, None])
  n_B = jnp.sum(jnp.cumprod(is_accepted_BJ, axis=1), axis=1, dtype=jnp.int32)

  def at(x_BTV, i_B):
    return jnp.take_along_axis(x_BTV, i_B[:, None, None], axis=1)[:, 0]

  p_BV = at(p_BWV, n_B)
  rest_BV = jnp.maximum(p_BV - at(q_BJV, jnp.minimum(n_B, J - 1)), 0)
  # Where p = q the residual may round to 0; then p is equivalent.
  rejected_B1 = ((n_B < allowed_B) & jnp.any(rest_BV > 0, axis=1))[:, None]
  last_index_B = jnp.take_along_axis(index_BW, n_B[:, None], axis=1)
  last_B1 = draw(jnp.where(rejected_B1, rest_BV, p_BV)[:, None], seed_B, last_index_B, DRAW)
  drafts_BW = jnp.pad(tokens_BW[:, 1:], ((0, 0), (0, 1)))
  return n_B, jnp.where(jnp.arange(W)[None] < n_B[:, None], drafts_BW, last_B1)
