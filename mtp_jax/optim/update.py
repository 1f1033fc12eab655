"""The optimizer: schedule, gradient transformation, and the parameter update."""

import zlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from mtp_jax.config import schema
from mtp_jax.model import heads, lm
from mtp_jax.optim import muon, rounding


def learning_rate(cfg: schema.Config) -> optax.Schedule:
  """Returns the schedule: linear warm-up from 0 to lr over warmup_steps, then
  --optim.schedule, which reaches min_lr_ratio x lr at the last step."""
  o, steps = cfg.optim, cfg.train.steps
  end, last = o.lr * o.min_lr_ratio, steps - o.warmup_steps - 1
  after = {
    'cosine': lambda: (
      optax.cosine_decay_schedule(o.lr, last, o.min_lr_ratio)
      if last
      else optax.constant_schedule(end)
    ),
    'wsd': lambda: optax.join_schedules(
      [optax.constant_schedule(o.lr), optax.linear_schedule(o.lr, end, o.decay_steps)],
      [last - o.decay_steps],
    ),
    'constant': lambda: optax.constant_schedule(o.lr),
  }[o.schedule]()
  warmup = optax.linear_schedule(0.0, o.lr, o.warmup_steps)
  return optax.join_schedules([warmup, after], [o.warmup_steps])


def transform(cfg: schema.Config) -> optax.GradientTransformation:
  """Returns the transformation of gradients to a direction, which `update` scales by
  the learning rate.

  Clipping by global norm; Adam, or Muon for hidden matrices and Adam elsewhere; then
  decoupled weight decay of every matrix (Loshchilov & Hutter 2019,
  https://arxiv.org/abs/1711.05101). Specs define which parameters are hidden and
  decay: a stack of norms is not a matrix.
  """
  o, specs = cfg.optim, lm.specs(cfg)
  trains = jax.tree.map(bool, learning_rates(cfg))
  rule = optax.scale_by_adam(o.b1, o.b2, o.eps, mu_dtype=o.moment_dtype)
  if o.name == 'muon':
    hidden = jax.tree.map(lambda s, t: t and s.hidden is not None, specs, trains)
    others = jax.tree.map(lambda s, t: t and s.hidden is None, specs, trains)
    rule = optax.chain(
      optax.masked(rule, others), optax.masked(muon.muon(o, specs, hidden), hidden)
    )
  elif not all(jax.tree.leaves(trains)):
    rule = optax.masked(rule, trains)  # no moments of frozen parameters
  clip = _clip_apart(cfg) if cfg.heads.isolated else optax.clip_by_global_norm(o.clip_norm)
  return optax.chain(
    clip if o.clip_norm else optax.identity(),
    rule,
    optax.add_decayed_weights(o.weight_decay, mask=jax.tree.map(lambda spec: spec.decay, specs)),
  )


def _clip_apart(cfg: schema.Config) -> optax.GradientTransformation:
  """Returns clipping by two global norms, of the parameters of heads >= 2 and of all
  others, so that a gradient of the former does not scale one of the latter."""

  h = cfg.heads

  def of_further_heads(path, x):
    """1 where an entry of a leaf is of heads >= 2, else 0."""
    field = path[0].name
    if field in ('markov', 'confidence'):
      return 1.0
    if not (field == 'heads' or (field == 'unembed' and h.unembedding == 'replicated')):
      return 0.0
    if field == 'heads' and not h.block_first:  # head 1 has no module
      return 1.0
    return (jnp.arange(x.shape[0]) > 0).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

  def update(updates, state, params=None):
    del params
    further = jax.tree_util.tree_map_with_path(of_further_heads, updates)

    def factor(share):
      norm = optax.tree.norm(jax.tree.map(lambda x, of: x * share(of), updates, further))
      return cfg.optim.clip_norm / jnp.maximum(norm, cfg.optim.clip_norm)

    of_heads, of_others = factor(lambda of: of), factor(lambda of: 1 - of)
    clipped = jax.tree.map(
      lambda x, of: x * (of * of_heads + (1 - of) * of_others), updates, further
    )
    return clipped, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def init(cfg: schema.Config, params):
  """Returns the state of `transform`. Moments are float32 or moment_dtype even for
  bfloat16 parameters: a bfloat16 second moment would stop decaying."""
  return transform(cfg).init(_float32(params))


def _float32(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def learning_rates(cfg: schema.Config) -> lm.LM:
  """Returns each parameter's learning-rate multiplier; 0 for frozen ones."""
  frozen = cfg.train.freeze
  trunk = 0 if frozen == 'trunk' else cfg.optim.trunk_lr_mult
  head = 0 if frozen == 'heads' else cfg.optim.heads_lr_mult
  own = cfg.heads.unembedding == 'replicated'
  groups = lm.LM(
    embed=trunk,
    trunk=cast(Any, trunk),  # one for the whole subtree
    heads=head,
    norm=trunk,
    unembed=head if own else trunk,
    order=head,
    markov=head,
    confidence=head,
  )
  return jax.tree.map(
    lambda rate, specs: jax.tree.map(lambda _: rate, specs), groups, lm.specs(cfg)
  )


def freeze(params, cfg: schema.Config):
  """Stops the gradients of frozen parameters, which are then neither computed nor
  part of the norm that is clipped."""
  return jax.tree.map(
    lambda w, rate: w if rate else jax.lax.stop_gradient(w), params, learning_rates(cfg)
  )


def update(params, opt_state, grads, *, step, n_active: int, cfg: schema.Config):
  """Computes w - learning rate x direction, in float32.

  A bfloat16 parameter has no float32 copy, and most updates are far below its
  spacing: stochastic rounding makes the sum unbiased (Zamirai et al. 2020,
  https://arxiv.org/abs/2010.06192), with a key of seed, step and path alone.

  Args:
    params: parameters.
    opt_state: of `init`.
    grads: in float32.
    step: number of optimizer steps so far.
    n_active: number of active heads; the others keep parameters and moments.
    cfg: static.

  Returns:
    (params, opt_state).
  """
  direction, new_state = transform(cfg).update(grads, opt_state, _float32(params))
  lr = learning_rate(cfg)(step)
  key = jax.random.fold_in(jax.random.key(cfg.train.seed), step)

  def leaf(path, w, d, rate):
    if not rate:
      return w
    new = w - (lr * rate) * d
    if w.dtype == jnp.float32:
      return new
    name = jax.tree_util.keystr(path)
    return rounding.stochastic_round(new, jax.random.fold_in(key, zlib.crc32(name.encode())))

  new = jax.tree_util.tree_map_with_path(leaf, params, direction, learning_rates(cfg))
  return _keep_inactive_heads((new, new_state), (params, opt_state), n_active, cfg)


def _keep_inactive_heads(new, old, n_active: int, cfg: schema.Config):
  """Returns `new`, with leaves of heads n_active + 1..n taken from `old`.

  Applies to parameters and optimizer state: an inactive head has neither moment
  updates nor weight decay.
  """
  in_use = {'heads': heads.n_modules(cfg.heads, n_active)}
  if cfg.heads.unembedding == 'replicated':
    in_use['unembed'] = n_active

  def leaf(path, new, old):
    names = {getattr(key, 'name', None) for key in path}
    if names & {'markov', 'confidence'}:  # of heads >= 2
      return new if n_active > 1 else old
    for name in in_use.keys() & names:
      active_K = jnp.arange(new.shape[0]) < in_use[name]
      return jnp.where(active_K.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return new

  if n_active == cfg.heads.n:
    return new
  return jax.tree_util.tree_map_with_path(leaf, new, old)
