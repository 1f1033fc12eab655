"""Per-token scores of each head, for evaluations that need more than sums.

One pass over heads as in losses/, without gradients; logits are live for one
head and one chunk of positions at a time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import schema
from mtp_jax.losses import cross_entropy, head_loss, targets
from mtp_jax.model import heads, lm
from mtp_jax.parallel import sharding


class Scores(NamedTuple):
  """Scores of the target of each head at each position; all (K, B, T)."""

  nats: Any  # -log probability, without z-loss
  rank: Any  # number of more probable tokens; ties are ranked by id
  top: Any  # probability of the top token
  argmax: Any
  valid: Any  # whether there is a target


def scores(model: lm.LM, batch: dict, *, n_active: int, cfg) -> Scores:
  """Computes the scores of one batch, under jit; its arrays (B, T + span), T = seq_len."""
  tokens_BU, position_BU = batch['tokens'], batch['position']
  T, m = tokens_BU.shape[1] - cfg.span, n_active
  feeds = heads.family(cfg).uses_next_token and m > 1
  targets_KBT, valid_KBT = targets.targets(batch, cfg)
  emb_BUD = lm.embed(model, tokens_BU if feeds else tokens_BU[:, :T], cfg)
  z_BTD, ctx = lm.trunk_output(model, emb_BUD[:, :T], position_BU[:, :T], cfg)
  unembed = model.embed if model.unembed is None else model.unembed
  shared = head_loss.gather_shared(model.norm, unembed, None, cfg)
  own = unembed[:m] if cfg.heads.unembedding == 'replicated' else None

  def visit(carry_BTD, module, head):
    k, target_BT, own_DV = head
    x = heads.Inputs(norm_D=shared.norm_D, z_BTD=z_BTD, carry_BTD=carry_BTD)
    carry_BTD, h_BTD = lm.head_step(
      module, k, x, ctx, cfg, feed=lambda k: lm.next_embeddings(emb_BUD, k, T, cfg)
    )
    unembed_DV = shared.unembed_DV if own_DV is None else head_loss.gather_own(own_DV, cfg)
    _, found = cross_entropy.sum_chunks(_of_targets, h_BTD, unembed_DV, (target_BT,), cfg)
    return carry_BTD, (jax.tree.map(cross_entropy.out_of_chunks, found), None)

  modules = heads.active_modules(model.heads, m, cfg)
  per_head = (jnp.arange(1, m + 1), targets_KBT[:m], own)
  _, (found, _) = heads.scan_heads(visit, z_BTD, modules, per_head, cfg)
  return Scores(*found, valid=valid_KBT[:m])


def _of_targets(h_BCD, unembed_DV, target_BC, cfg):
  """Returns (0, Scores without `valid`) of a chunk; the vocabulary may be sharded."""
  del cfg
  of = cross_entropy.logits(h_BCD, unembed_DV, target_BC)
  label_BC1 = of.label_BC[:, :, None]
  before_BCV = (of.logits_BCV > label_BC1) | (
    (of.logits_BCV == label_BC1) & (of.ids_11V < target_BC[:, :, None])
  )
  return jnp.zeros(()), (
    of.lse_BC - of.label_BC,
    jnp.sum(before_BCV, axis=-1),
    jnp.exp(of.top_BC - of.lse_BC),
    of.argmax_BC,
  )


_scores = jax.jit(scores, static_argnames=('n_active', 'cfg'))


def of_batch(model, batch: dict, mesh, cfg, n_active: int) -> Scores:
  """Computes the scores of host arrays (B, T + span), for any T; returns host arrays."""
  T = batch['tokens'].shape[1] - cfg.span
  cfg = schema.replace(cfg, **{'data.seq_len': T, 'loss.chunk_size': 0})
  batch = {name: x[None] for name, x in batch.items()}
  with jax.set_mesh(mesh):
    batch = sharding.put_batch(mesh, batch)
    batch = jax.tree.map(lambda x: x[0], batch)
    found = _scores(model, batch, n_active=n_active, cfg=cfg)
    return jax.tree.map(np.asarray, jax.device_get(found))


STEP = 64  # rows are padded to a multiple of this many tokens, to limit compilations


def of_rows(
  model, rows: Sequence[np.ndarray], mesh, cfg, n_active: int, batch_size: int
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
