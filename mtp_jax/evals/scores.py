"""What each head says of each token: for all that needs more than sums.

Floor 4. One pass over heads as in loss.py, without gradients; logits are alive
for one head and one chunk of positions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import schema
from mtp_jax.losses import cross_entropy, multi_token, targets
from mtp_jax.model import heads, lm
from mtp_jax.parallel import sharding


class Scores(NamedTuple):
  """Of the target of each head at each position; all (K, B, T)."""

  nats: Any  # -log probability, without z-loss
  rank: Any  # tokens that are likelier; of equals, the ones before it
  top: Any  # probability of the best token
  argmax: Any
  valid: Any  # whether it is a target at all


def scores(model: lm.LM, batch: dict, *, n_active: int, cfg) -> Scores:
  """Scores of one batch under jit; its arrays (B, T + span), T = seq_len."""
  tokens_BU, position_BU = batch['tokens'], batch['position']
  T, m = tokens_BU.shape[1] - cfg.span, n_active
  f = heads.family(cfg)
  feeds = f.feeds_tokens and m > 1
  targets_KBT, valid_KBT = targets.targets(batch, cfg)
  emb_BUD = lm.embed(model, tokens_BU if feeds else tokens_BU[:, :T], cfg)
  z_BTD, ctx = lm.hidden(model, emb_BUD[:, :T], position_BU[:, :T], cfg)
  unembed = model.embed if model.unembed is None else model.unembed
  shared = multi_token.gather_shared(model.norm, unembed, None, cfg)
  own = unembed[:m] if cfg.heads.unembedding == 'replicated' else None

  def head(step, carry_BTD, module, of_head):
    k, target_BT, own_DV = of_head
    next_emb_BTD = None
    if feeds and step is not heads.identity:
      next_emb_BTD = lm.next_embeddings(emb_BUD, k, ctx, cfg)
    z = carry_BTD if f.dependent and step is heads.identity else z_BTD
    inputs = heads.Inputs(shared.norm_D, z, carry_BTD, next_emb_BTD)
    carry_BTD, h_BTD = step(module, inputs, ctx, cfg)
    unembed_DV = shared.unembed_DV if own_DV is None else multi_token.gather_own(own_DV, cfg)
    _, found = cross_entropy.sum_chunks(_of_targets, h_BTD, unembed_DV, (target_BT,), cfg)
    return carry_BTD, (jax.tree.map(cross_entropy.out_of_chunks, found), None)

  in_use = 0 if f.one_module else slice(heads.n_modules(cfg, m))
  _, (found, _) = heads.scan_heads(
    head,
    z_BTD,
    jax.tree.map(lambda w: w[in_use], model.heads),
    (jnp.arange(1, m + 1), targets_KBT[:m], own),
    cfg,
  )
  return Scores(*found, valid_KBT[:m])


def _of_targets(h_BCD, unembed_DV, target_BC, cfg):
  """(0, Scores but for `valid`) of a chunk; the vocabulary may be sharded."""
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
  """Scores on the host, of arrays (B, T + span) of the host; T of any size."""
  T = batch['tokens'].shape[1] - cfg.span
  cfg = schema.replace(cfg, **{'data.seq_len': T, 'loss.chunk_size': 0})
  batch = {name: x[None] for name, x in batch.items()}
  with jax.set_mesh(mesh):
    batch = sharding.put_batch(mesh, batch)
    batch = jax.tree.map(lambda x: x[0], batch)
    found = _scores(model, batch, n_active=n_active, cfg=cfg)
    return jax.tree.map(np.asarray, jax.device_get(found))


STEP = 64  # tokens: rows are padded to a multiple, so that they share programs


def of_rows(
  model, rows: Sequence[np.ndarray], mesh, cfg, n_active: int, batch_size: int
) -> list[Scores]:
  """Scores of rows of token ids, each a document by itself, of any lengths.

  A row of U tokens has U - 1 positions; arrays of the result are (K, U - 1),
  its targets beyond the row's end not valid.
  """
  order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  B = -(-min(batch_size, len(rows)) // shards) * shards
  found = [None] * len(rows)
  for first in range(0, len(rows), B):
    batch = order[first : first + B]
    T = -(-max(len(rows[batch[0]]) - 1, 1) // STEP) * STEP
    tokens_BU = np.zeros((B, T + cfg.span), np.int32)
    position_BU = np.zeros_like(tokens_BU)  # padding: nobody's target
    for b, i in enumerate(batch):
      tokens_BU[b, : len(rows[i])] = rows[i]
      position_BU[b, : len(rows[i])] = np.arange(len(rows[i]))
    of = of_batch(model, dict(tokens=tokens_BU, position=position_BU), mesh, cfg, n_active)
    for b, i in enumerate(batch):
      end = len(rows[i]) - 1
      found[i] = Scores(*(x[:, b, :end] for x in of))
  return found
