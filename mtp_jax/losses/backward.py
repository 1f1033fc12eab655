"""Two backward strategies of the multi-head loss, with equal values and gradients.

  remat        one `lax.scan` over heads of a checkpointed body: the backward pass
               recomputes each head's logits and its block (but that of a single wide head).
               In memory between the two scans: z, and in a chain what each head hands on.
  interleaved  each head runs forward and backward at once, in the forward pass of a
               custom_vjp, and adds into dL/dz, so that nothing is computed twice but
               the blocks of a chain. In memory until the trunk's backward pass: dL/dz
               (B x T x D) and the gradients of heads and unembedding, which are needed
               anyway; while a chain runs, 2 K B T D numbers of the compute dtype (3 if wide).

Neither ever holds the logits of two heads. Losses that compare drafts with head 1
(acceptance.py) need its hidden state first: there, and with an external teacher, both
strategies compute the hidden states of all heads (B x T x D each in memory), then each
head's loss, interleaved forward and backward at once; blocks are recomputed in the backward
pass.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import schema
from mtp_jax.losses import acceptance, cross_entropy, head_loss, mixing
from mtp_jax.model import block, heads, layers, lm
from mtp_jax.parallel import sharding


class DiffInputs(NamedTuple):
  """Parameters and activations that the heads' loss is differentiated by."""

  modules: Any
  z_BTD: Any
  emb_BUD: Any  # of all tokens, for families that read the next one; else None
  norm_D: Any
  unembed: Any  # at rest: (D, V), tied (V, D), or replicated (K, D, V)
  order_VD: Any  # None without token order prediction
  markov: Any  # None without a Markov head
  confidence_D: Any  # None without --heads.confidence
  probe_K: Any


class NondiffInputs(NamedTuple):
  """The targets and weights of K heads; not differentiated."""

  k_K: Any  # 1..K
  targets_KBT: Any
  valid_KBT: Any
  scale_K: Any  # weight_k / count_k
  window: head_loss.Window
  drafts_K: acceptance.Drafts | None = None  # where heads are compared with a teacher
  teacher: acceptance.Teacher | acceptance.Stored | None = None  # None: head 1


def _gather(w: DiffInputs, cfg) -> head_loss.SharedWeights:
  shared = head_loss.gather_shared(w.norm_D, w.unembed, w.order_VD, w.markov, cfg)
  return shared._replace(confidence_D=w.confidence_D)  # on each device


def _per_head(w: DiffInputs, inputs: NondiffInputs, cfg) -> head_loss.HeadBatch:
  """Returns the HeadBatch of all heads, stacked."""
  return head_loss.HeadBatch(
    k=inputs.k_K,
    target_BT=inputs.targets_KBT,
    valid_BT=inputs.valid_KBT,
    scale=inputs.scale_K,
    probe=w.probe_K,
    unembed_DV=w.unembed if cfg.heads.unembedding == 'replicated' else None,
    drafts=inputs.drafts_K,
  )


@jax.custom_vjp
def _probe_grad_norm(z_BTD, probe):
  """Identity on z; in the backward pass, the probe's gradient is the squared norm of
  z's gradient."""
  del probe
  return z_BTD


def _probe_grad_norm_bwd(_, dz_BTD):
  return dz_BTD, jnp.sum(dz_BTD.astype(jnp.float32) ** 2)


_probe_grad_norm.defvjp(lambda z_BTD, probe: (z_BTD, None), _probe_grad_norm_bwd)


def _scan_heads(visit, carry, modules, per_head: head_loss.HeadBatch, cfg):
  """`heads.scan_heads`, head 1 apart where its loss or gradients differ."""
  apart = head_loss.needs_head_1_apart(cfg)
  return heads.scan_heads(visit, carry, modules, per_head, cfg.heads, apart=apart)


def _read_by_head(w: DiffInputs, carry_BTD, is_head_1, cfg):
  """Returns (heads.Inputs, feed as of `lm.head_step`) of a head."""
  dtype = cfg.model.compute_dtype
  z_BTD, emb_BUD, norm_D = w.z_BTD.astype(dtype), w.emb_BUD, w.norm_D
  if cfg.heads.isolated and not is_head_1:
    z_BTD, emb_BUD, norm_D = jax.lax.stop_gradient((z_BTD, emb_BUD, norm_D))

  def feed(k):
    return lm.next_embeddings(emb_BUD, k, z_BTD.shape[1], cfg.heads.stride).astype(dtype)

  return heads.Inputs(norm_D=norm_D, z_BTD=z_BTD, carry_BTD=carry_BTD), feed


def _block(w: DiffInputs, inputs: NondiffInputs, cfg):
  """Returns the block of all heads, see `lm.block_of_heads`."""
  if inputs.k_K.shape[0] == 1:
    return block.block
  x, feed = _read_by_head(w, None, False, cfg)
  x = x._replace(carry_BTD=x.z_BTD)
  return lm.block_of_heads(w.modules, x, inputs.window.ctx, cfg, feed=feed)


def hidden(
  module,
  head: head_loss.HeadBatch,
  carry_BTD,
  w: DiffInputs,
  *,
  is_head_1,
  window,
  cfg,
  apply_block=block.block,
):
  """Computes one head's (carry_BTD, h_BTD); its probe measures the gradient that
  flows back to its input. w.norm_D is gathered; is_head_1 as of `heads.scan_heads`."""
  before_BTD = carry_BTD
  x, feed = _read_by_head(w, carry_BTD, is_head_1, cfg)
  if heads.family(cfg.heads).is_chained:
    x = x._replace(carry_BTD=_probe_grad_norm(carry_BTD, head.probe))
  else:
    x = x._replace(z_BTD=_probe_grad_norm(x.z_BTD, head.probe))
  carry_BTD, h_BTD = lm.head_step(
    module, head.k, x, window.ctx, cfg, feed=feed, apply_block=apply_block
  )
  if window.step is not None and not is_head_1:
    # Of k states, the trunk's and those of modules 2..k, each is kept with probability 1 / k.
    takes_BT1 = mixing.draws(window, head.k, h_BTD.shape[1])[:, :, None] < 1 / head.k
    carry_BTD = jnp.where(takes_BT1, carry_BTD, before_BTD)
  if cfg.heads.isolated and is_head_1:  # what a chain hands on to head 2
    carry_BTD = jax.lax.stop_gradient(carry_BTD)
  return carry_BTD, h_BTD


def remat(w: DiffInputs, inputs: NondiffInputs, cfg: schema.Config, detail=None):
  """Computes (total, HeadStats stacked over heads); `detail` as of `head_loss.of`."""
  shared = _gather(w, cfg)
  w = w._replace(norm_D=shared.norm_D)
  if inputs.drafts_K is not None:
    return _remat_compared(w, shared, inputs, cfg, detail)
  loss = head_loss.of(inputs.window, cfg, detail)

  n_active, apply_block = inputs.k_K.shape[0], _block(w, inputs, cfg)

  def visit(carry_BTD, module, head, is_head_1):
    state = functools.partial(
      hidden, is_head_1=is_head_1, window=inputs.window, cfg=cfg, apply_block=apply_block
    )
    if n_active == 1 and not heads.is_kept(cfg, 1):
      state = jax.checkpoint(state)  # its loss is not computed again
    carry_BTD, h_BTD = state(module, head, carry_BTD, w)
    value, stats = loss.value(h_BTD, shared, head, is_head_1)
    return carry_BTD, ((value, stats), None)

  if n_active > 1:
    visit = jax.checkpoint(visit, policy=cross_entropy.KEEP, static_argnums=(3,))
  z_BTD = w.z_BTD.astype(cfg.model.compute_dtype)
  per_head = _per_head(w, inputs, cfg)
  _, ((value_K, stats), _) = _scan_heads(visit, z_BTD, w.modules, per_head, cfg)
  return jnp.sum(value_K), stats


def _kept_of_chain(cfg):
  """Returns what is kept of each block, as a policy: of a wide one its output, which costs no
  memory, since the peak is in the trunk's backward pass, and saves a product."""
  if cfg.model.d_model < block.WIDE:
    return None
  return jax.checkpoint_policies.save_only_these_names(heads.BLOCK_OUTPUT, layers.MEAN_SQUARE)


def _hidden_states(w: DiffInputs, inputs: NondiffInputs, cfg: schema.Config):
  """Computes h_KBTD of all heads; the backward pass recomputes their blocks."""

  of_all = dict(window=inputs.window, cfg=cfg, apply_block=_block(w, inputs, cfg))

  def visit(carry_BTD, module, head, is_head_1):
    carry_BTD, h_BTD = hidden(module, head, carry_BTD, w, is_head_1=is_head_1, **of_all)
    return carry_BTD, (h_BTD, None)

  per_head = head_loss.HeadBatch(
    k=inputs.k_K, target_BT=None, valid_BT=None, scale=None, probe=w.probe_K
  )
  visit = jax.checkpoint(visit, policy=_kept_of_chain(cfg), static_argnums=(3,))
  z_BTD = w.z_BTD.astype(cfg.model.compute_dtype)
  return _scan_heads(visit, z_BTD, w.modules, per_head, cfg)[1][0]


def _scan_losses(visit, carry, per_head: head_loss.HeadBatch, h_KBTD):
  """Scans over heads, head 1 apart: visit(carry, head, h_BTD, is_head_1) -> (carry, out)."""
  xs = per_head, h_KBTD
  carry, first = visit(carry, *jax.tree.map(lambda x: x[0], xs), True)
  carry, rest = jax.lax.scan(
    lambda carry, xs: visit(carry, *xs, False), carry, jax.tree.map(lambda x: x[1:], xs)
  )
  return carry, jax.tree.map(heads.prepend, first, rest)


def _teacher(w: DiffInputs, shared: head_loss.SharedWeights, h_KBTD, inputs, cfg):
  if inputs.teacher is not None:
    return inputs.teacher
  unembed_DV = shared.unembed_DV
  if unembed_DV is None:  # each head has its own
    unembed_DV = head_loss.gather_own(w.unembed[0], cfg)
  return acceptance.Teacher(h_KBTD[0], unembed_DV, cfg.model)


def _with_drafts_in_a_row(total, stats: head_loss.HeadStats, drafts: acceptance.Drafts):
  """Adds e2e_tv, a loss of all drafts of a query."""
  assert stats.drafts is not None
  loss_K = acceptance.in_a_row(stats.drafts.alpha_BT, drafts.valid_BT)
  stats = stats._replace(drafts=stats.drafts._replace(loss=loss_K))
  return total + jnp.sum(drafts.scale * loss_K), stats


def _remat_compared(w: DiffInputs, shared, inputs: NondiffInputs, cfg, detail):
  """`remat` of heads that are compared with a teacher."""
  assert inputs.drafts_K is not None
  h_KBTD = _hidden_states(w, inputs, cfg)
  loss = head_loss.of(inputs.window, cfg, detail, _teacher(w, shared, h_KBTD, inputs, cfg))

  def visit(_, head, h_BTD, is_head_1):
    return None, loss.value(h_BTD, shared, head, is_head_1)

  _, (value_K, stats) = _scan_losses(visit, None, _per_head(w, inputs, cfg), h_KBTD)
  total = jnp.sum(value_K)
  if cfg.loss.head_loss == 'e2e_tv':
    return _with_drafts_in_a_row(total, stats, inputs.drafts_K)
  return total, stats


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _interleaved(w: DiffInputs, inputs: NondiffInputs, cfg: schema.Config):
  # Undifferentiated, as in an evaluation, there is no backward to interleave.
  return remat(w, inputs, cfg)


def _interleaved_fwd(w: DiffInputs, inputs: NondiffInputs, cfg):
  gather = functools.partial(head_loss.gather_shared, cfg=cfg)
  shared, gather_vjp = jax.vjp(gather, w.norm_D, w.unembed, w.order_VD, w.markov)
  shared = shared._replace(confidence_D=w.confidence_D)

  def reduced(grads: DiffInputs, dshared: head_loss.SharedWeights, own) -> DiffInputs:
    dnorm_D, dunembed, dorder_VD, dmarkov = gather_vjp(dshared._replace(confidence_D=None))
    if cfg.heads.unembedding == 'replicated':
      dunembed = own
    grads = grads._replace(norm_D=dnorm_D, unembed=dunembed, order_VD=dorder_VD, markov=dmarkov)
    return grads._replace(confidence_D=dshared.confidence_D)

  both_ways = _chained if heads.family(cfg.heads).is_chained else _independent
  if inputs.drafts_K is not None:
    both_ways = _compared
  grads, out = both_ways(w._replace(norm_D=shared.norm_D), shared, reduced, inputs, cfg)
  return out, jax.tree.map(lambda g, x: g.astype(x.dtype), grads, w)


def _independent(w: DiffInputs, shared, reduced, inputs: NondiffInputs, cfg):
  """Runs forward and backward of each head within one scan."""
  loss = head_loss.of(inputs.window, cfg)

  def visit(carry, module, head, is_head_1):
    dread, dshared = carry  # gradients of the activations that heads read

    def head_hidden(module, z_BTD, emb_BUD, norm_D, probe):
      here = w._replace(z_BTD=z_BTD, emb_BUD=emb_BUD, norm_D=norm_D)
      head_here = head._replace(probe=probe)
      return hidden(
        module, head_here, z_BTD, here, is_head_1=is_head_1, window=inputs.window, cfg=cfg
      )[1]

    h_BTD, pull = jax.vjp(head_hidden, module, w.z_BTD, w.emb_BUD, shared.norm_D, head.probe)
    dshared, grads, value, stats = loss.value_and_grad(h_BTD, shared, dshared, head, is_head_1)
    dmodule, *d, dnorm_D, dprobe = pull(grads.h_BTD)
    dshared = dshared._replace(norm_D=dshared.norm_D + dnorm_D)
    dread = jax.tree.map(lambda total, d: total + d.astype(total.dtype), dread, (*d,))
    return (dread, dshared), ((value, stats, dprobe, grads.unembed_DV), dmodule)

  zeros = jax.tree.map(sharding.zeros_cotangent, ((w.z_BTD, w.emb_BUD), shared))
  ((dz_BTD, demb_BUD), dshared), (outs, dmodules) = _scan_heads(
    visit, zeros, w.modules, _per_head(w, inputs, cfg), cfg
  )
  value_K, stats, dprobe_K, own = outs
  if heads.family(cfg.heads).shared_module and inputs.k_K.shape[0] > 1:
    dmodules = jax.tree.map(lambda d: jnp.sum(d, axis=0), dmodules)
  grads = w._replace(modules=dmodules, z_BTD=dz_BTD, emb_BUD=demb_BUD, probe_K=dprobe_K)
  return reduced(grads, dshared, own), (jnp.sum(value_K), stats)


def _chained(w: DiffInputs, shared, reduced, inputs: NondiffInputs, cfg):
  """Runs the chain forward with each head's loss forward and backward, then the
  chain backward, recomputing its blocks only. In memory between the two: each
  head's input and dL/dh_k, and what is kept of its block."""
  loss = head_loss.of(inputs.window, cfg)

  def chain(modules, z_BTD, emb_BUD, norm_D, probe_K):
    here = w._replace(modules=modules, z_BTD=z_BTD, emb_BUD=emb_BUD, norm_D=norm_D, probe_K=probe_K)
    of_all = dict(window=inputs.window, cfg=cfg, apply_block=_block(here, inputs, cfg))

    def visit(carry, module, head, is_head_1):
      carry_BTD, dshared = carry
      number = head._replace(target_BT=None, valid_BT=None, scale=None, unembed_DV=None)
      state = functools.partial(hidden, is_head_1=is_head_1, **of_all)
      checkpointed = jax.checkpoint(state, policy=_kept_of_chain(cfg))
      carry_BTD, h_BTD = checkpointed(module, number, carry_BTD, here)
      dshared, grads, value, stats = loss.value_and_grad(
        jax.lax.stop_gradient(h_BTD), shared, dshared, head, is_head_1
      )
      # A surrogate loss whose gradient by h is dL/dh.
      surrogate = jnp.sum(h_BTD * grads.h_BTD, dtype=jnp.float32)
      return (carry_BTD, dshared), ((surrogate, value, stats, grads.unembed_DV), None)

    carry_BTD = z_BTD.astype(cfg.model.compute_dtype)
    zeros = jax.tree.map(sharding.zeros_cotangent, shared._replace(norm_D=None))
    (_, dshared), ((surrogate_K, value_K, stats, own), _) = _scan_heads(
      visit, (carry_BTD, zeros), modules, _per_head(here, inputs, cfg), cfg
    )
    return jnp.sum(surrogate_K), (dshared, value_K, stats, own)

  surrogate, pull, (dshared, value_K, stats, own) = jax.vjp(
    chain, w.modules, w.z_BTD, w.emb_BUD, shared.norm_D, w.probe_K, has_aux=True
  )
  grads = reduced(w, dshared._replace(norm_D=jnp.zeros_like(w.norm_D)), own)
  if sharding.platform() == 'tpu':
    # Or the unembedding's gradient would wait for the backward pass of the blocks, unsharded on
    # each device. A GPU reduces it beside them.
    pull, grads = jax.lax.optimization_barrier((pull, grads))
  dmodules, dz_BTD, demb_BUD, dnorm_D, dprobe_K = pull(jnp.ones_like(surrogate))
  grads = grads._replace(modules=dmodules, z_BTD=dz_BTD, emb_BUD=demb_BUD, probe_K=dprobe_K)
  return grads._replace(norm_D=dnorm_D), (jnp.sum(value_K), stats)


def _compared(w: DiffInputs, shared, reduced, inputs: NondiffInputs, cfg):
  """Computes all hidden states, then each head's loss forward and backward, then the
  heads' backward pass, recomputing their blocks only. For e2e_tv acceptance rates come
  first, as the gradient by one draft depends on the others."""

  def states(modules, z_BTD, emb_BUD, norm_D, probe_K):
    here = w._replace(modules=modules, z_BTD=z_BTD, emb_BUD=emb_BUD, norm_D=norm_D, probe_K=probe_K)
    return _hidden_states(here, inputs, cfg)

  h_KBTD, pull = jax.vjp(states, w.modules, w.z_BTD, w.emb_BUD, shared.norm_D, w.probe_K)
  loss = head_loss.of(inputs.window, cfg, teacher=_teacher(w, shared, h_KBTD, inputs, cfg))
  per_head, drafts = _per_head(w, inputs, cfg), inputs.drafts_K
  assert drafts is not None
  if cfg.loss.head_loss == 'e2e_tv':

    def acceptance_rates(_, head, h_BTD, is_head_1):
      if is_head_1:
        return None, acceptance.no_drafts(h_BTD).alpha_BT
      _, stats = loss.value(h_BTD, shared, head, is_head_1)
      assert stats.drafts is not None
      return None, stats.drafts.alpha_BT

    _, alpha_KBT = _scan_losses(acceptance_rates, None, per_head, h_KBTD)

    def in_a_row(alpha_KBT):
      return jnp.sum(drafts.scale * acceptance.in_a_row(alpha_KBT, drafts.valid_BT))

    per_head = per_head._replace(drafts=drafts._replace(slope_BT=jax.grad(in_a_row)(alpha_KBT)))

  def visit(dshared, head, h_BTD, is_head_1):
    dshared, grads, value, stats = loss.value_and_grad(h_BTD, shared, dshared, head, is_head_1)
    return dshared, (grads, value, stats)

  zeros = jax.tree.map(sharding.zeros_cotangent, shared._replace(norm_D=None))
  dshared, (grads_K, value_K, stats) = _scan_losses(visit, zeros, per_head, h_KBTD)
  dmodules, dz_BTD, demb_BUD, dnorm_D, dprobe_K = pull(grads_K.h_BTD)
  grads = w._replace(modules=dmodules, z_BTD=dz_BTD, emb_BUD=demb_BUD, probe_K=dprobe_K)
  grads = reduced(grads, dshared._replace(norm_D=dnorm_D), grads_K.unembed_DV)
  out = jnp.sum(value_K), stats
  if cfg.loss.head_loss == 'e2e_tv':
    out = _with_drafts_in_a_row(*out, drafts)
  return grads, out


def _interleaved_bwd(cfg, grads: DiffInputs, cotangents):
  del cfg
  dtotal, _ = cotangents
  scaled = jax.tree.map(lambda g: (dtotal * g).astype(g.dtype), grads)
  # Squared norms scale with the square.
  return scaled._replace(probe_K=dtotal * scaled.probe_K), None


_interleaved.defvjp(_interleaved_fwd, _interleaved_bwd)

# (w, inputs, cfg) -> (total, HeadStats stacked over heads).
STRATEGIES = {'remat': remat, 'interleaved': _interleaved}


def run(w: DiffInputs, inputs: NondiffInputs, cfg: schema.Config):
  """Computes (total, HeadStats stacked over heads) by --loss.backward."""
  # All head gradients before the trunk's. Otherwise XLA runs the trunk's backward pass first and
  # reduces the unembedding's gradient after it: until then unsharded on each device, half a GiB
  # at 7B.
  return STRATEGIES[cfg.loss.backward](layers.gradient_in_memory(w), inputs, cfg)
