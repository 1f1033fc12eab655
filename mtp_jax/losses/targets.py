"""TODO of mtp_jax.losses.schedule."""

import functools

import jax
import jax.numpy as jnp

from mtp_jax.config import schedule, schema
from mtp_jax.parallel import sharding


def weights(step, cfg: schema.Config):
  """Weight of each head at a (traced) step, from --loss.weights. Shape (K,)."""
  starts, table = zip(*schedule.head_weights(cfg), strict=True)
  starts_P, table_PK = jnp.array(starts), jnp.array(table)
  return table_PK[jnp.sum(step >= starts_P) - 1]


def targets(rows: dict, cfg: schema.Config):
  """Token t + o_k for each head k, and whether it may be predicted from t.

  Valid iff position[t + o] == position[t] + o in the window's own positions:
  never across a document's end, nor from or to padding; and iff it is scored.

  Returns:
    (targets_KBT int32, valid_KBT bool).
  """
  T = rows['tokens'].shape[1] - cfg.span
  pairs = [ahead(rows, offset, T) for offset in cfg.heads.offsets]
  return tuple(map(jnp.stack, zip(*pairs, strict=True)))


def ahead(rows, offset: int, T: int):
  """Token t + offset, and whether it is a target of t."""
  there = slice(offset, offset + T)
  position_BU = rows['position']
  valid_BT = position_BU[:, there] == position_BU[:, :T] + offset
  if 'loss_mask' in rows:
    valid_BT &= rows['loss_mask'][:, there]
  return rows['tokens'][:, there], valid_BT


def counts(batch: dict, cfg: schema.Config, bytes_V):
  """Of a whole step, before any micro-batch runs: (count_K, bytes).

  Args:
    batch: arrays (A, B, U).
    cfg: its heads.
    bytes_V: UTF-8 bytes that each token stands for.

  Returns:
    valid targets of each head (float32), and the bytes of head 1's.
  """
  of_micro_batch = jax.vmap(functools.partial(targets, cfg=cfg))
  targets_AKBT, valid_AKBT = of_micro_batch(batch)
  count_K = jnp.sum(valid_AKBT, axis=(0, 2, 3))
  bytes_ABT = bytes_V.at[targets_AKBT[:, 0]].get(out_sharding=sharding.pspec(None, 'batch', None))
  n_bytes = jnp.sum(bytes_ABT * valid_AKBT[:, 0])
  return count_K.astype(jnp.float32), n_bytes.astype(jnp.float32)


def acceptance(argmax_KBT, valid_BT, stride: int = 1):
  """How far head 1 would accept the other heads' drafts, teacher-forced.

  The draft of token t + j is that of the nearest head that predicts it from t
  or, where heads leap, from up to stride - 1 tokens before: those read less and
  were run before. It is accepted if head 1's argmax at t + j - 1, reading the
  true text, is the same token and the drafts before it were accepted. An
  estimate: a decoder reads its own text.

  Args:
    argmax_KBT: each head's best token.
    valid_BT: positions whose targets all lie in their document.
    stride: of the heads.

  Returns:
    (1 + stride (K - 1),) float32: the positions asked, then those where the
    drafts of t + 2, t + 3, … were accepted.
  """
  K, _, T = argmax_KBT.shape
  J = 1 + stride * (K - 1)
  back = stride - 1  # the first query asked, so that all drafts are in here
  Q = T - J + 1 - back  # and the last: all drafts are checked within the window
  alive_BQ = valid_BT[:, :Q] & valid_BT[:, back : back + Q]
  accepted = []
  for j in range(1, J + 1):
    k = -(-(j - 1) // stride)
    made = back - (stride * k - (j - 1))
    draft_BQ = argmax_KBT[k, :, made : made + Q]
    checked = back + j - 1
    alive_BQ &= draft_BQ == argmax_KBT[0, :, checked : checked + Q]
    accepted.append(jnp.sum(alive_BQ, dtype=jnp.float32))
  return jnp.stack(accepted)
