"""Tiny configs, models and batches that the tests share."""

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import schema, validate
from mtp_jax.losses import multi_token, targets
from mtp_jax.model import block, heads, layers, lm, params
from mtp_jax.parallel import sharding
from mtp_jax.train import step as step_lib
from tests.support import oracle

BASE = {
  'model.d_model': 16,
  'model.n_layers': 6,
  'model.n_attn_heads': 4,
  'model.n_kv_heads': 2,
  'model.d_ff': 24,
  'model.vocab_size': 32,
  'model.compute_dtype': 'float32',
  'model.remat': 'none',
  'data.seq_len': 16,
  'data.batch_size': 8,
  'optim.warmup_steps': 2,
  'mesh.fsdp': 1,
  'train.compilation_cache': '',
}


def cfg(**changes) -> schema.CommandConfig:
  """Returns a validated Config; `heads__n=2` means heads.n."""
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  return validate.validate(schema.replace(schema.CommandConfig(), **BASE | changes))


def sibling(c: schema.Config) -> schema.Config:
  """An experiment at the size of a test: equal ones train the same program.

  Width, depth, vocabulary, context, batch and steps shrink. What is computed
  with them stays: heads and their family, loss, dtypes, optimizer, the share of
  the warm-up in the steps (rounded up), the micro-batches.
  """
  steps, accumulate = 10, c.train.grad_accum_steps
  warmup_steps = math.ceil(steps * c.optim.warmup_steps / c.train.steps)
  kept = {name: schema.get(c, name) for name in schema.fixed()}
  small = {
    'model.d_model': 16,
    'model.n_layers': 2 + (c.heads.n if c.heads.block_first else 0),
    'model.n_attn_heads': 4,
    'model.n_kv_heads': 2 if c.model.kv_heads < c.model.n_attn_heads else 0,
    'model.d_ff': 24,
    'model.vocab_size': 32,
    'data.tokenizer': 'bytes',
    'data.seq_len': max(16, 2 * c.heads.n),
    'data.batch_size': 8 * accumulate,
    'optim.warmup_steps': warmup_steps,
    'train.steps': steps,
    'mesh.fsdp': 1,
  }
  return validate.validate(schema.replace(schema.CommandConfig(), **kept | small))


def mesh(c: schema.Config):
  """The mesh of c over as many devices as it names."""
  size = c.mesh.data * c.mesh.fsdp * c.mesh.tensor
  return sharding.make_mesh(c, jax.devices()[:size])


def model(c: schema.Config, m) -> lm.LM:
  """Initial parameters on mesh m, norms moved off 1 so that they count."""
  specs = lm.specs(c)
  abstract = params.abstract(specs, c.model.param_dtype, m)
  return jax.tree.map(
    lambda w, a: jax.device_put(w, a.sharding),
    _values(c.model, c.heads, c.loss.token_order_weight),
    abstract,
  )


@functools.cache
def _values(model: schema.ModelConfig, head: schema.HeadsConfig, order_weight: float):
  """By NumPy: to compile params.init takes seconds, for each shape anew."""
  c = dataclasses.replace(cfg(loss__token_order_weight=order_weight), model=model, heads=head)

  def leaf(path, spec):
    size = math.prod(spec.shape)
    if spec.decay:
      name = jax.tree_util.keystr(path)
      rng = np.random.default_rng(zlib.crc32(name.encode()))
      w = np.clip(rng.normal(size=size), -2, 2) * (spec.std or 0.5)
    else:
      w = 1 + 0.3 * np.sin(np.arange(size))
    return w.reshape(spec.shape).astype(jnp.dtype(model.param_dtype))

  return jax.tree_util.tree_map_with_path(leaf, lm.specs(c))


def flat(tree) -> dict[str, np.ndarray]:
  """'trunk.q' -> array, as the oracle takes parameters."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(
      jax.device_get(x), np.float64
    )
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def batch(c: schema.Config, *, packed=True, seed=0) -> dict[str, np.ndarray]:
  """Random rows (A, B / A, U); packed ones hold several documents."""
  rng = np.random.default_rng(seed)
  A = c.train.grad_accum_steps
  U = c.data.seq_len + c.span
  tokens_BU = rng.integers(0, c.model.vocab_size, (c.data.batch_size, U))
  start_BU = rng.random(tokens_BU.shape) < (0.15 if packed else 0)
  start_BU[:, 0] = True
  index_U = np.arange(U)
  position_BU = index_U - np.maximum.accumulate(np.where(start_BU, index_U, 0), axis=1)
  return {
    'tokens': tokens_BU.astype(np.int32).reshape(A, -1, U),
    'position': position_BU.astype(np.int32).reshape(A, -1, U),
  }


@functools.partial(jax.jit, static_argnames=('c', 'n_active'))
def _value_and_grad(w, rows, step=None, teacher=None, *, c, n_active):
  counts = targets.counts(rows, c, n_active)
  grad = jax.value_and_grad(multi_token.mtp_loss, argnums=(0, 1), has_aux=True)

  def micro_batch(rows):
    return grad(
      w,
      jnp.zeros(c.heads.n),
      rows,
      counts=counts,
      weight_K=targets.weights(0, c),
      n_active=n_active,
      cfg=c,
      step=step,
      teacher=teacher,
    )

  return step_lib.sum_micro_batches(micro_batch, rows, c)


def means(sums: dict, count_K) -> dict:
  """Returns the sums of `mtp_loss` as means over valid targets; 0 without any."""
  over_K = 1 / np.maximum(count_K, 1)[: len(sums['loss_sum_K'])]
  out = dict(
    loss_K=sums['loss_sum_K'] * over_K,
    z_loss_K=sums['z_loss_sum_K'] * over_K,
    accuracy_K=sums['correct_K'] * over_K,
  )
  if 'token_order_loss_sum' in sums:
    out['token_order_loss'] = sums['token_order_loss_sum'] * over_K[0]
  return sums | out


def value_and_grad(c: schema.Config, rows, w=None, n_active=None, step=None, *, teacher=None):
  """((total, sums and means), (parameter gradients, |dL/dz|^2 by head)), on the
  host."""
  m = mesh(c)
  w = model(c, m) if w is None else w
  with jax.set_mesh(m):
    step = None if step is None else jnp.int32(step)
    placed = sharding.put_batch(m, rows)
    out = _value_and_grad(w, placed, step, teacher, c=c, n_active=n_active or c.heads.n)
  (total, sums), grads = jax.device_get(out)
  valid_AKBT = [
    targets.targets(dict(zip(rows, of, strict=True)), c)[1]
    for of in zip(*rows.values(), strict=True)
  ]
  return (total, means(sums, np.sum(valid_AKBT, axis=(0, 2, 3)))), grads


def oracle_losses(c: schema.Config, rows) -> dict:
  """Of `model` in float64; rows (…, U)."""
  tokens_BU, position_BU = (
    rows[name].reshape(-1, rows[name].shape[-1]) for name in ('tokens', 'position')
  )
  w, shape = flat(model(c, mesh(c))), oracle.Shape(c.heads.family, c.heads.n)
  logits_KBTV = oracle.forward(w, tokens_BU, position_BU, shape)
  return oracle.losses(logits_KBTV, tokens_BU, position_BU, shape)


def equations(jaxpr):
  """All equations of a jaxpr, those of nested ones too."""
  for eqn in jaxpr.eqns:
    yield eqn
    for sub in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from equations(sub)


def reductions(jaxpr) -> list:
  """dtypes in which unreduced arrays are reduced."""
  return [
    eqn.invars[0].aval.dtype
    for eqn in equations(jaxpr)
    if eqn.primitive.name == 'reshard' and eqn.invars[0].aval.sharding.spec.unreduced
  ]


def dense_logits(w: lm.LM, tokens_BU, position_BU, c: schema.Config):
  """Computes all heads' logits (K, B, T, V), layers and heads unrolled."""
  emb_BUD = layers.embed(w.embed, tokens_BU) * (c.model.embedding_scale or 1.0)
  return logits_of_embeddings(w, emb_BUD, position_BU, c)


def logits_of_embeddings(w: lm.LM, emb_BUD, position_BU, c: schema.Config):
  logits = []
  for k, h_BTD in enumerate(_hidden(w, emb_BUD, position_BU, c)):
    unembed_DV = {
      'shared': lambda: w.unembed,
      'tied': lambda: w.embed.T,
      'replicated': lambda: w.unembed[k],  # noqa: B023
    }[c.heads.unembedding]()
    logits.append(jnp.einsum('BTD,DV->BTV', h_BTD, unembed_DV))
  return jnp.stack(logits)


def _hidden(w: lm.LM, emb_BUD, position_BU, c: schema.Config):
  """Computes each head's hidden state."""
  K, family = c.heads.n, heads.family(c.heads)
  T = emb_BUD.shape[1] - c.span
  ctx = block.context(position_BU[:, :T], c)
  z_BTD = emb_BUD[:, :T]
  for i in range(heads.trunk_layers(c)):
    layer = jax.tree.map(lambda p: p[i], w.trunk)  # noqa: B023
    z_BTD = block.block(layer, z_BTD, ctx, c, heads.types_of_trunk(c)[i])
  carry_BTD, h = z_BTD, {}
  for k in range(K, 0, -1) if family.reverse else range(1, K + 1):
    i = k - 1 if c.heads.block_first else 0 if family.shared_module else k - 2
    module = None
    if c.heads.block_first or k > 1:
      module = jax.tree.map(lambda p: p[i], w.heads)  # noqa: B023
    fed = c.heads.offsets[k - 2] if k > 1 else 0
    inputs = heads.Inputs(w.norm, z_BTD, carry_BTD, emb_BUD[:, fed : fed + T])
    carry_BTD, h[k] = heads.step(module, k, inputs, ctx, c)
  return [h[k] for k in range(1, K + 1)]


def dense_loss(w: lm.LM, rows, c: schema.Config):
  """Computes the loss with all logits in memory: no scan, remat or chunks."""
  tokens_BU, position_BU = (
    rows[name].reshape(-1, rows[name].shape[-1]) for name in ('tokens', 'position')
  )
  flat = dict(tokens=tokens_BU, position=position_BU)
  targets_KBT, valid_KBT = targets.targets(flat, c)
  logits_KBTV = dense_logits(w, tokens_BU, position_BU, c)
  lse_KBT = jax.nn.logsumexp(logits_KBTV, axis=-1)
  onehot_KBTV = jax.nn.one_hot(targets_KBT, c.model.vocab_size)
  label_KBT = jnp.sum(onehot_KBTV * logits_KBTV, axis=-1)
  nll_KBT = lse_KBT - label_KBT + c.loss.z_loss * lse_KBT**2
  count_K = jnp.maximum(jnp.sum(valid_KBT, axis=(1, 2)), 1)
  loss_K = jnp.sum(jnp.where(valid_KBT, nll_KBT, 0), axis=(1, 2)) / count_K
  total = jnp.sum(targets.weights(0, c) * loss_K)
  if c.loss.token_order_weight:
    total += c.loss.token_order_weight * _dense_order(w, flat, c) / count_K[0]
  return total, loss_K


def _dense_order(w: lm.LM, flat, c: schema.Config):
  """ListNet's cross-entropy against scores written out over the vocabulary."""
  tokens_BU, position_BU = flat['tokens'], flat['position']
  T, W, V = c.data.seq_len, c.loss.token_order_window, c.model.vocab_size
  score_BTV = jnp.full((tokens_BU.shape[0], T, V), -jnp.inf)
  for d in range(W, 0, -1):  # the nearest occurrence is written last
    valid_BT1 = (position_BU[:, d : d + T] == position_BU[:, :T] + d)[..., None]
    here_BTV = tokens_BU[:, d : d + T, None] == jnp.arange(V)[None, None]
    score_BTV = jnp.where(valid_BT1 & here_BTV, W - d, score_BTV)
  any_BT1 = jnp.isfinite(score_BTV.max(-1, keepdims=True))
  p_BTV = jax.nn.softmax(jnp.where(any_BT1, score_BTV, 0.0))
  h_BTD = _hidden(w, layers.embed(w.embed, tokens_BU), position_BU, c)[0]
  log_q_BTV = jax.nn.log_softmax(jnp.einsum('BTD,VD->BTV', h_BTD, w.order))
  return -jnp.sum(jnp.where(any_BT1, p_BTV * log_q_BTV, 0))
