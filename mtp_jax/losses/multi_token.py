"""The multi-head loss of Gloeckle et al. 2024 (https://arxiv.org/abs/2404.19737),
section 2: head k predicts token t + k from the shared trunk's output z_t, and

  total = sum_k weight_k  sum_t valid_kt (nll_kt + zloss_kt) / count_k
          + token_order_weight  sum_t valid_1t order_t / count_1
          + sum_{k >= 2} the loss of the confidence head, see model/confidence.py ,

targets, counts and weights as in targets.py; z-loss and token order prediction (on head
1's hidden state) are off by default. With --loss.head_loss heads >= 2 are trained to be
accepted instead of to predict the text, see acceptance.py.

See targets.py (targets and counts), backward.py (the scan over heads, and its memory),
head_loss.py and cross_entropy.py (the loss of one head). Logits, B x T x V per head,
are by far the largest arrays: neither strategy ever holds those of two heads, nor of
more positions than one chunk.
"""

import jax
import jax.numpy as jnp

from mtp_jax.config import fields, schema
from mtp_jax.losses import acceptance, backward, head_loss, targets, token_order
from mtp_jax.losses import teacher as teacher_lib
from mtp_jax.model import heads, lm


def mtp_loss(
  model: lm.LM,
  probe_K,
  batch: dict,
  *,
  counts: targets.Counts,
  weight_K,
  n_active: int,
  cfg: schema.Config,
  step=None,
  teacher: teacher_lib.Model | None = None,
):
  """Computes the multi-head loss of one micro-batch.

  Args:
    model: parameters, as sharded at rest.
    probe_K: zeros, for a diagnostic. A custom_vjp makes the gradient by probe_k the
      squared norm, over all tokens, of the gradient at head k's input: of its own loss,
      and in a chain of the losses of the heads after it too; but not of what flows through
      keys and values that steps share.
    batch: tokens_BU and position_BU, int32, U = T + span; loss_mask_BU, bool,
      where there is a mask; with a stored teacher teacher_ids_BTP and teacher_logp_BTP1.
    counts: each head's valid targets and drafts in the whole step, over all
      micro-batches and devices.
    weight_K: the heads' weights.
    n_active: heads 1..n_active are computed.
    cfg: --loss.backward and --loss.chunk_size change memory and time, not the value.
    step: the optimizer step, by which --heads.mix_hidden_states draws; None = no mixing.
    teacher: that of --loss.teacher; it has no gradient.

  Returns:
    (total, sums). Totals and sums of micro-batches add up to those of the step;
    sums carry no gradient: loss_sum_K (nats with z-loss, unweighted),
    z_loss_sum_K and correct_K over each head's valid targets,
    token_order_loss_sum over head 1's, and accepted_K, see `targets.acceptance`; where
    drafts are compared with head 1, also those of `_draft_sums`, and with another
    teacher those of `_teacher_sums`.
    A head without a valid target adds 0 to the total; means are computed on the
    host, where a mean over nothing is None rather than 0.
  """
  if cfg.loss.teacher and n_active > 1 and teacher is None and 'teacher_ids' not in batch:
    raise fields.ConfigError(
      'loss.teacher', cfg.loss.teacher, 'neither its parameters nor its probabilities are given'
    )
  weights, ctx = _heads_input(model, probe_K, batch, n_active, cfg)
  compare = cfg.loss.compares
  inputs = nondiff_inputs(batch, ctx, counts, weight_K, compare=compare, cfg=cfg, teacher=teacher)
  if cfg.heads.mix_hidden_states:
    inputs = inputs._replace(window=inputs.window._replace(step=step))
  with jax.named_scope('heads'):
    total, stats = backward.run(weights, inputs, cfg)
  of_teacher = None
  if inputs.teacher is not None:
    stats, of_teacher = stats._replace(drafts=None), stats.drafts
  return total, jax.lax.stop_gradient(_sums(stats, batch, cfg, of_teacher))


def evaluate(
  model: lm.LM,
  batch: dict,
  *,
  n_active: int,
  cfg: schema.Config,
  detail=None,
  teacher: teacher_lib.Model | None = None,
):
  """Computes the sums of `mtp_loss` without a backward pass, drafts compared with head 1
  for every --loss.head_loss, as it verifies them, and with the teacher if there is one.

  Args:
    model, batch, n_active, cfg, teacher: as of `mtp_loss`.
    detail: called with each chunk's (cross_entropy.Logits, target_BC); its results,
      (B, C), are joined over T and stacked over K.

  Returns:
    (sums, head_loss.HeadStats of the active heads with detail_KBT, `targets.predicted` of all n
    heads).
  """
  one_K = jnp.ones(cfg.heads.n)  # means are formed on the host
  weights, ctx = _heads_input(model, jnp.zeros_like(one_K), batch, n_active, cfg)
  counts = targets.Counts(one_K[:n_active], one_K[:n_active])
  inputs = nondiff_inputs(batch, ctx, counts, one_K, compare=True, cfg=cfg, teacher=teacher)
  of_teacher = None
  with jax.named_scope('heads'):
    _, stats = backward.remat(weights, inputs._replace(teacher=None), cfg, detail)
    if inputs.teacher is not None:
      of_teacher = backward.remat(weights, inputs, cfg)[1].drafts
  targets_KBT, valid_KBT = targets.targets(batch, cfg)
  predicted_KBT = targets.predicted(targets_KBT, valid_KBT, cfg)
  return _sums(stats, batch, cfg, of_teacher), stats, predicted_KBT


def nondiff_inputs(
  batch: dict,
  ctx,
  counts: targets.Counts,
  weight_K,
  *,
  compare: bool,
  cfg: schema.Config,
  teacher: teacher_lib.Model | None = None,
) -> backward.NondiffInputs:
  """Returns the targets, drafts and scales of heads 1..n_active, of a micro-batch.

  Args:
    batch: as of `mtp_loss`.
    ctx: block.Context of the window.
    counts: of the active heads.
    weight_K: weights of all heads.
    compare: whether drafts are compared with a teacher.
    cfg: the Config.
    teacher: None = that of the batch, or else head 1.
  """
  n_active = counts.target_K.shape[0]
  targets_KBT, valid_KBT = (x_KBT[:n_active] for x_KBT in targets.targets(batch, cfg))
  weight_K = weight_K[:n_active]
  over_K = 1 / jnp.maximum(counts.target_K, 1)
  drafts_K = of_teacher = None
  if compare and n_active > 1:
    if teacher is not None:
      of_teacher = teacher_lib.read(teacher, batch, targets_KBT.shape[2])
    elif 'teacher_ids' in batch:
      of_teacher = acceptance.Stored(batch['teacher_ids'], batch['teacher_logp'])
    over_count_K = 1 / jnp.maximum(counts.draft_K, 1)
    drafts_K = acceptance.Drafts(
      shift=jnp.array(cfg.heads.offsets[:n_active]) - 1,
      valid_BT=targets.drafts(valid_KBT, cfg),
      scale=weight_K * (1 - cfg.loss.head_ce_share) * over_count_K,
      over_count=over_count_K,
    )
  ordered = bool(cfg.loss.token_order_weight)
  return backward.NondiffInputs(
    k_K=jnp.arange(1, n_active + 1),
    targets_KBT=targets_KBT,
    valid_KBT=targets.predicted(targets_KBT, valid_KBT, cfg),
    scale_K=weight_K * over_K,
    window=head_loss.Window(
      ctx=ctx,
      tokens_BU=batch['tokens'],
      order_WBT=token_order.token_order_targets(batch, cfg) if ordered else None,
      order_scale=cfg.loss.token_order_weight * over_K[0],
    ),
    drafts_K=drafts_K,
    teacher=of_teacher,
  )


def _heads_input(model: lm.LM, probe_K, batch, n_active: int, cfg):
  """Runs the trunk; returns (backward.DiffInputs of heads 1..n_active, ctx)."""
  model = _wide_where_shared(model, cfg)
  z_BTD, emb_BUD, ctx = _trunk(model, batch, n_active, cfg)
  unembed = model.embed if model.unembed is None else model.unembed
  weights = backward.DiffInputs(
    modules=heads.active_modules(model.heads, n_active, cfg.heads),
    z_BTD=z_BTD,
    emb_BUD=emb_BUD,
    norm_D=model.norm,
    unembed=unembed[:n_active] if cfg.heads.unembedding == 'replicated' else unembed,
    order_VD=model.order,
    markov=model.markov if n_active > 1 else None,
    confidence_D=model.confidence if n_active > 1 else None,
    probe_K=probe_K[:n_active],
  )
  return weights, ctx


def _sums(stats: head_loss.HeadStats, batch: dict, cfg: schema.Config, of_teacher=None) -> dict:
  """Returns the sums of `mtp_loss`; every leaf of `stats` has a leading K. stats.drafts: of
  the comparison with head 1; of_teacher: of that with another model."""
  _, valid_KBT = targets.targets(batch, cfg)
  sums = dict(
    loss_sum_K=stats.xent.loss,
    z_loss_sum_K=stats.xent.z_loss,
    correct_K=stats.xent.correct,
    accepted_K=targets.acceptance(
      stats.xent.argmax_BT, jnp.all(valid_KBT, axis=0), cfg.heads.stride
    ),
  )
  if cfg.loss.token_order_weight:
    sums['token_order_loss_sum'] = jnp.sum(stats.order_loss)
  if stats.drafts is not None:
    sums |= _draft_sums(stats.drafts, valid_KBT[: stats.order_loss.shape[0]], cfg)
  compared = of_teacher or stats.drafts
  if cfg.heads.confidence and compared is not None:
    sums['confidence_loss_sum_K'] = compared.confidence_loss
  if of_teacher is not None:
    sums |= _teacher_sums(of_teacher, valid_KBT[: stats.order_loss.shape[0]], cfg)
  return sums


def _draft_sums(found: acceptance.Found, valid_KBT, cfg: schema.Config) -> dict:
  """Returns sums over drafts of the active heads: alpha_sum_K (acceptance rates) and their
  number alpha_count_K, draft_loss_sum_K and its number draft_count_K and, but for strided
  heads, alpha_in_a_row_K, over queries with a draft of each head: their number, then sums of
  alpha_2, alpha_2 alpha_3, …"""
  compared_KBT = targets.compared(valid_KBT, cfg)
  alpha_KBT = found.alpha_BT
  sums = dict(
    draft_count_K=jnp.sum(targets.drafts(valid_KBT, cfg), axis=(1, 2), dtype=jnp.float32),
    draft_loss_sum_K=found.loss,
    alpha_count_K=jnp.sum(compared_KBT, axis=(1, 2), dtype=jnp.float32),
    alpha_sum_K=jnp.sum(compared_KBT * alpha_KBT, axis=(1, 2)),
  )
  if cfg.heads.stride == 1:
    complete_BT = jnp.all(compared_KBT[1:], axis=0)
    products_KBT = complete_BT[None] * acceptance.products(alpha_KBT)
    sums['alpha_in_a_row_K'] = jnp.sum(products_KBT, axis=(1, 2))
  return sums


def _teacher_sums(found: acceptance.Found, valid_KBT, cfg: schema.Config) -> dict:
  """Returns sums over drafts that are compared with --loss.teacher: the loss, and
  teacher_alpha_sum_K of sum min(p, q), which is no acceptance rate, as head 1 verifies."""
  compared_KBT = targets.compared(valid_KBT, cfg)
  return dict(
    draft_count_K=jnp.sum(targets.drafts(valid_KBT, cfg), axis=(1, 2), dtype=jnp.float32),
    draft_loss_sum_K=found.loss,
    alpha_count_K=jnp.sum(compared_KBT, axis=(1, 2), dtype=jnp.float32),
    teacher_alpha_sum_K=jnp.sum(compared_KBT * found.alpha_BT, axis=(1, 2)),
  )


def _trunk(model: lm.LM, batch: dict, n_active: int, cfg: schema.Config):
  """Returns (z_BTD, emb_BUD of the window or None, ctx: positions, segments, RoPE). A
  cotangent has its primal's dtype: z and emb are cast to that in which their gradients
  are accumulated over heads."""
  tokens_BU, position_BU = batch['tokens'], batch['position']
  T = tokens_BU.shape[1] - cfg.span
  feeds = heads.family(cfg.heads).uses_next_token and n_active > 1
  emb_BUD = lm.embed(model, tokens_BU if feeds else tokens_BU[:, :T], cfg)
  z_BTD, ctx = lm.trunk_output(model, emb_BUD[:, :T], position_BU[:, :T], cfg)
  held_dtype = jnp.promote_types(z_BTD.dtype, cfg.loss.grad_dtype)
  return z_BTD.astype(held_dtype), emb_BUD.astype(held_dtype) if feeds else None, ctx


def _wide_where_shared(model: lm.LM, cfg) -> lm.LM:
  """Casts parameters that several heads use to the dtype in which their gradients are
  accumulated; the identity unless parameters are narrower than grad_dtype. An untied
  unembedding is not cast: its gather accumulates in grad_dtype."""
  wide = jnp.promote_types(cfg.model.param_dtype, cfg.loss.grad_dtype)

  def cast(tree):
    return jax.tree.map(lambda w: w.astype(wide), tree)

  model = model.replace(norm=cast(model.norm))
  if cfg.heads.unembedding == 'tied':
    model = model.replace(embed=cast(model.embed))
  if heads.family(cfg.heads).shared_module:
    model = model.replace(heads=cast(model.heads))
  return model
