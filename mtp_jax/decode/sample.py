"""From logits to tokens: filters, draws, and which drafts stand. Floor 3.

A draw depends on the row's seed and on the index of the token in its row alone,
not on the other rows, nor on how many tokens a forward pass gave.

Drafts are verified without loss: greedy ones stand if head 1 would have said
the same (Stern et al. 2018, https://arxiv.org/abs/1811.03115); sampled ones
stand with probability min(1, p / q), p and q of head 1 and of the head that
drafted, else the token comes from max(p - q, 0), normalised, so that each token
has head 1's distribution (Leviathan et al. 2023,
https://arxiv.org/abs/2211.17192).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import schema

ACCEPT, DRAW, DRAFT = range(3)  # what a random number is for


class Sampling(NamedTuple):
  """Of --decode.*: numbers, so that another value compiles nothing anew, or
  None for a filter that is not used."""

  temperature: Any
  top_k: Any
  top_p: Any
  min_p: Any


def sampling(cfg: schema.Config) -> Sampling | None:
  """None = greedy."""
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
  """softmax(logits / temperature) of the tokens that all filters keep.

  Filters follow each other: the top_k most likely; of these, renormalised, the
  fewest most likely that have top_p together; of those, the ones with at least
  min_p of the likeliest one's probability. Equals stay together. Float32, over
  the last axis.
  """
  logits = logits.astype(jnp.float32)
  top = jnp.max(logits, axis=-1, keepdims=True)
  logits = (logits - top) / s.temperature  # no overflow, however low
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
  """f(key) for each token of each row."""

  def one(seed, index):
    key = jax.random.fold_in(jax.random.key(seed), index)
    return f(jax.random.fold_in(key, purpose))

  return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seed_B, index_BT)


def draw(p_BTV, seed_B, index_BT, purpose: int):
  """A token of each distribution, which need not sum to 1."""
  shape = p_BTV.shape[-1:]
  noise_BTV = _random(lambda key: jax.random.gumbel(key, shape), seed_B, index_BT, purpose)
  return jnp.argmax(jnp.log(p_BTV) + noise_BTV, axis=-1).astype(jnp.int32)


def accept_greedy(tokens_BM, logits_BMV, allowed_B, levels):
  """The longest path of drafts that head 1 would have said itself.

  Args:
    tokens_BM: the tokens of the window, its root the last known one.
    logits_BMV: head 1's after each of them.
    allowed_B: deepest level that may be accepted.
    levels: (slots, their parents) of each level below the root.

  Returns:
    (drafts accepted_B, path_BW: the slot at each level, emitted_BW: what head 1
    says after each of these).
  """
  best_BM = jnp.argmax(logits_BMV, axis=-1).astype(jnp.int32)
  B = tokens_BM.shape[0]
  stands = {0: jnp.ones(B, bool)}
  path, n_accepted = [jnp.zeros(B, jnp.int32)], jnp.zeros(B, jnp.int32)
  for level, (slots, parents) in enumerate(levels, 1):
    for slot, parent in zip(slots, parents, strict=True):
      stands[slot] = (
        stands[parent] & (tokens_BM[:, slot] == best_BM[:, parent]) & (level <= allowed_B)
      )
    stands_BX = jnp.stack([stands[slot] for slot in slots], axis=1)
    # Siblings are different tokens: at most one of a level stands.
    path.append(jnp.array(slots, jnp.int32)[jnp.argmax(stands_BX, axis=1)])
    n_accepted += jnp.any(stands_BX, axis=1)
  path_BW = jnp.stack(path, axis=1)
  return n_accepted, path_BW, jnp.take_along_axis(best_BM, path_BW, axis=1)


def accept_sampled(tokens_BW, logits_BWV, q_BJV, allowed_B, seed_B, index_BW, s):
  """Rejection sampling along a chain of drafts.

  Args:
    tokens_BW: the last known token, then the drafts.
    logits_BWV: head 1's after each of them.
    q_BJV: the distribution that each draft was drawn from; J = W - 1.
    allowed_B: drafts that may be accepted; further ones count as not made.
    seed_B: of the rows.
    index_BW: the index, in its row, of the token that comes after each.
    s: the Sampling.

  Returns:
    (drafts accepted_B, emitted_BW: these, then a token of head 1).
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
  stands_BJ = (u_BJ * q_BJ < p_BJ) & (jnp.arange(J)[None] < allowed_B[:, None])
  n_B = jnp.sum(jnp.cumprod(stands_BJ, axis=1), axis=1, dtype=jnp.int32)

  def at(x_BTV, i_B):
    return jnp.take_along_axis(x_BTV, i_B[:, None, None], axis=1)[:, 0]

  p_BV = at(p_BWV, n_B)
  rest_BV = jnp.maximum(p_BV - at(q_BJV, jnp.minimum(n_B, J - 1)), 0)
  # All of it may round to 0, where p = q; then p is as good.
  rejected_B1 = ((n_B < allowed_B) & jnp.any(rest_BV > 0, axis=1))[:, None]
  last_index_B = jnp.take_along_axis(index_BW, n_B[:, None], axis=1)
  last_B1 = draw(jnp.where(rejected_B1, rest_BV, p_BV)[:, None], seed_B, last_index_B, DRAW)
  drafts_BW = jnp.pad(tokens_BW[:, 1:], ((0, 0), (0, 1)))
  return n_B, jnp.where(jnp.arange(W)[None] < n_B[:, None], drafts_BW, last_B1)
