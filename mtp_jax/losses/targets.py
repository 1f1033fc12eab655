"""Targets, their validity and counts, head weights, and teacher-forced acceptance."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import draft_vocab, schedule, schema
from mtp_jax.parallel import sharding


class Counts(NamedTuple):
  """Divisors of the loss of a whole step, over all micro-batches and devices; float32."""

  target_K: Any  # valid targets of each head
  draft_K: Any  # drafts that are compared with head 1; see `drafts`


def weights(step, cfg: schema.Config):
  """Returns the weight of each head, (K,), at a (traced) step, from --loss.weights."""
  phases = schedule.parse_weights(cfg.loss.weights, cfg.heads.n)
  # Each Phase is constant, or the line from its weights to the next one's.
  after = [*phases[1:], phases[-1]]
  starts_P = jnp.array([p.start for p in phases])
  length_P = jnp.array([max(b.start - a.start, 1) for a, b in zip(phases, after, strict=True)])
  from_PK = jnp.array([p.weights for p in phases])
  to_PK = jnp.array([(b if a.is_linear else a).weights for a, b in zip(phases, after, strict=True)])
  at = jnp.sum(step >= starts_P) - 1
  share = (step - starts_P[at]) / length_P[at]
  moved_K = from_PK[at] + share * (to_PK[at] - from_PK[at])
  is_linear_P = jnp.array([p.is_linear for p in phases])
  return jnp.where(is_linear_P[at], moved_K, from_PK[at])


def targets(rows: dict, cfg: schema.Config):
  """Returns token t + o_k for each head k, and whether it is a target of t.

  Valid iff position[t + o] == position[t] + o in the window's positions (never
  across a document's end, nor from or to padding) and the loss mask has it.

  Returns:
    (targets_KBT int32, valid_KBT bool).
  """
  T = rows['tokens'].shape[1] - cfg.span
  pairs = [ahead(rows, offset, T) for offset in cfg.heads.offsets]
  return tuple(map(jnp.stack, zip(*pairs, strict=True)))


def ahead(rows, offset: int, T: int):
  """Returns (token t + offset, whether it is a target of t)."""
  there = slice(offset, offset + T)
  position_BU = rows['position']
  valid_BT = position_BU[:, there] == position_BU[:, :T] + offset
  if 'loss_mask' in rows:
    valid_BT &= rows['loss_mask'][:, there]
  return rows['tokens'][:, there], valid_BT


def predicted(targets_KBT, valid_KBT, cfg: schema.Config):
  """Returns which valid targets a head has a logit of, (K, B, T): with --heads.draft_vocab
  tokens outside of it are no targets of heads >= 2."""
  ids_X = draft_vocab.of(cfg)
  if ids_X is None:
    return valid_KBT
  is_drafted_V = jnp.zeros(cfg.model.vocab_size, bool).at[ids_X].set(True)
  is_drafted_KBT = is_drafted_V.at[targets_KBT].get(
    out_sharding=sharding.pspec(None, 'batch', None)
  )
  is_head_1_K11 = (jnp.arange(targets_KBT.shape[0]) == 0)[:, None, None]
  return valid_KBT & (is_head_1_K11 | is_drafted_KBT)


def compared(valid_KBT, cfg: schema.Config):
  """Returns whether head k's draft at t is compared with head 1 as it verifies it, (K, B, T).

  Head 1 does so at query t + o_k - 1, which must lie in the window (before T) and have a
  target of its own in the same document: after a document's last token, where head 1 is
  not trained, nothing is drafted. Head 1 has no drafts.
  """
  K, _, T = valid_KBT.shape
  offset_K = jnp.array(cfg.heads.offsets[:K])
  within_KT = jnp.arange(T)[None] + offset_K[:, None] <= T
  return valid_KBT & (within_KT & (offset_K > 1)[:, None])[:, None]


def drafts(valid_KBT, cfg: schema.Config):
  """Returns the drafts that --loss.head_loss is computed from, (K, B, T): those that are
  `compared`, with e2e_tv those of queries whose drafts all are."""
  compared_KBT = compared(valid_KBT, cfg)
  if cfg.loss.head_loss == 'e2e_tv':
    compared_KBT &= jnp.all(compared_KBT[1:], axis=0)[None]
  return compared_KBT


def counts(batch: dict, cfg: schema.Config, n_active: int) -> Counts:
  """Counts the targets and drafts of heads 1..n_active in a whole step, before its first
  micro-batch; batch: arrays (A, B, U)."""

  def of_micro_batch(rows):
    targets_KBT, valid_KBT = (x_KBT[:n_active] for x_KBT in targets(rows, cfg))
    predicted_KBT = predicted(targets_KBT, valid_KBT, cfg)
    return Counts(
      *(jnp.sum(x_KBT, axis=(1, 2)) for x_KBT in (predicted_KBT, drafts(valid_KBT, cfg)))
    )

  summed = jax.tree.map(lambda of_A: jnp.sum(of_A, axis=0), jax.vmap(of_micro_batch)(batch))
  return jax.tree.map(lambda n: n.astype(jnp.float32), summed)


def target_bytes(batch: dict, cfg: schema.Config, bytes_V):
  """Returns the UTF-8 bytes of head 1's valid targets in a whole step; bytes_V: those of
  each token."""
  T = batch['tokens'].shape[-1] - cfg.span
  next_ABT, valid_ABT = jax.vmap(lambda rows: ahead(rows, 1, T))(batch)
  bytes_ABT = bytes_V.at[next_ABT].get(out_sharding=sharding.pspec(None, 'batch', None))
  return jnp.sum(bytes_ABT * valid_ABT).astype(jnp.float32)


def acceptance(argmax_KBT, valid_BT, stride: int = 1):
  """Counts the drafts of heads 2..K that head 1 would accept, teacher-forced.

  The draft of token t + j is the argmax of the nearest head that predicts it from t
  or, with strided heads, from up to stride - 1 tokens before, which a decoder has
  computed already. It is accepted if it equals head 1's argmax at t + j - 1, on the
  true text, and the drafts before it were accepted. An estimate: a decoder reads its
  own text.

  Args:
    argmax_KBT: argmax of each head.
    valid_BT: positions whose targets are all within their document.
    stride: of the heads.

  Returns:
    (1 + stride (K - 1),) float32: the number of evaluated positions, then of those
    where the drafts of t + 2, t + 3, … were accepted.
  """
  K, _, T = argmax_KBT.shape
  J = 1 + stride * (K - 1)
  back = stride - 1  # the first query, so that all drafts lie in the window
  Q = T - J + 1 - back  # number of queries, so that all drafts are verified in it
  is_accepted_BQ = valid_BT[:, :Q] & valid_BT[:, back : back + Q]
  accepted = []
  for j in range(1, J + 1):
    k = -(-(j - 1) // stride)
    made = back - (stride * k - (j - 1))
    draft_BQ = argmax_KBT[k, :, made : made + Q]
    checked = back + j - 1
    is_accepted_BQ &= draft_BQ == argmax_KBT[0, :, checked : checked + Q]
    accepted.append(jnp.sum(is_accepted_BQ, dtype=jnp.float32))
  return jnp.stack(accepted)
