"""Per-token scores of each head, for evaluations that need more than sums.

The forward pass of the loss: logits are live for one head and one chunk of positions
at a time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import schema
from mtp_jax.losses import cross_entropy, multi_token
from mtp_jax.model import lm
from mtp_jax.parallel import sharding


class Scores(NamedTuple):
  """Scores of the target of each head at each position; all (K, B, T)."""

  nats: Any  # -log probability, without z-loss
  rank: Any  # number of more probable tokens; ties are ranked by id
  top: Any  # probability of the top token
  argmax: Any
  valid: Any  # whether there is a target


def scores(model: lm.LM, batch: dict, *, n_active: int, cfg) -> Scores:
  """Computes the scores of one batch, under jit; its arrays (B, T + span)."""
  _, stats, valid_KBT = multi_token.evaluate(
    model, batch, n_active=n_active, cfg=cfg, detail=of_target
  )
  return Scores(*stats.detail, valid=valid_KBT[:n_active])


def of_target(of: cross_entropy.Logits, target_BC):
  """Returns the fields of Scores but `valid`; the vocabulary may be sharded."""
  label_BC1 = of.label_BC[:, :, None]
  before_BCV = (of.logits_BCV > label_BC1) | (
    (of.logits_BCV == label_BC1) & (of.ids_11V < target_BC[:, :, None])
  )
  return (
    of.lse_BC - of.label_BC,
    jnp.sum(before_BCV, axis=-1),
    jnp.exp(of.top_BC - of.lse_BC),
    of.argmax_BC,
  )


_scores = jax.jit(scores, static_argnames=('n_active', 'cfg'))


def of_batch(model, batch: dict, mesh, cfg, n_active: int) -> Scores:
  """Computes the scores of host arrays (B, T + span), for any T; returns host arrays."""
  cfg = schema.replace(cfg, **{'loss.chunk_size': 0})  # it may not divide T
  batch = {name: x[None] for name, x in batch.items()}
  with jax.set_mesh(mesh):
    batch = sharding.put_batch(mesh, batch)
    batch = jax.tree.map(lambda x: x[0], batch)
    found = _scores(model, batch, n_active=n_active, cfg=cfg)
    return jax.tree.map(np.asarray, jax.device_get(found))


STEP = 64  # rows are padded to a multiple of this many tokens, to limit compilations


def of_rows(
  model, rows: Sequence[np.ndarray], mesh, cfg, *, n_active: int, batch_size: int
) -> list[Scores]:
  """Computes the scores of rows of token ids, each its own document, of any lengths.

  A row of U tokens has U - 1 positions; arrays of the result are (K, U - 1), with
  targets beyond the end of the row not valid.
  """
  order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  B = -(-min(batch_size, len(rows)) // shards) * shards
  found: list[Any] = [None] * len(rows)
  for first in range(0, len(rows), B):
    batch = order[first : first + B]
    T = -(-max(len(rows[batch[0]]) - 1, 1) // STEP) * STEP
    tokens_BU = np.zeros((B, T + cfg.span), np.int32)
    position_BU = np.zeros_like(tokens_BU)  # padding is no target
    for b, i in enumerate(batch):
      tokens_BU[b, : len(rows[i])] = rows[i]
      position_BU[b, : len(rows[i])] = np.arange(len(rows[i]))
    of = of_batch(model, dict(tokens=tokens_BU, position=position_BU), mesh, cfg, n_active)
    for b, i in enumerate(batch):
      end = len(rows[i]) - 1
      found[i] = Scores(*(x[:, b, :end] for x in of))
  return found
