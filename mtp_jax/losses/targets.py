"""Targets, their validity and counts, head weights, and teacher-forced acceptance."""

import functools

import jax
import jax.numpy as jnp

from mtp_jax.config import schedule, schema
from mtp_jax.parallel import sharding


def weights(step, cfg: schema.Config):
  """Returns the weight of each head, (K,), at a (traced) step, from --loss.weights."""
  starts, table = zip(*schedule.head_weights(cfg), strict=True)
  starts_P, table_PK = jnp.array(starts), jnp.array(table)
  return table_PK[jnp.sum(step >= starts_P) - 1]


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


def counts(batch: dict, cfg: schema.Config, bytes_V):
  """Counts the targets of a whole step, before its first micro-batch.

  Args:
    batch: arrays (A, B, U).
    cfg: the Config.
    bytes_V: UTF-8 bytes of each token.

  Returns:
    (count_K, bytes): valid targets of each head, and the bytes of head 1's; float32.
  """
  of_micro_batch = jax.vmap(functools.partial(targets, cfg=cfg))
  targets_AKBT, valid_AKBT = of_micro_batch(batch)
  count_K = jnp.sum(valid_AKBT, axis=(0, 2, 3))
  bytes_ABT = bytes_V.at[targets_AKBT[:, 0]].get(out_sharding=sharding.pspec(None, 'batch', None))
  n_bytes = jnp.sum(bytes_ABT * valid_AKBT[:, 0])
  return count_K.astype(jnp.float32), n_bytes.astype(jnp.float32)


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
