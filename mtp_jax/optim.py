"""The update rule, its learning rate, and what does not take part. Floor 3."""

import jax
import jax.numpy as jnp
import optax

from mtp_jax import config
from mtp_jax.model import heads, lm


def learning_rate(cfg: config.Config) -> optax.Schedule:
  """Linear from 0 over warmup_steps to lr, then --optim.schedule."""
  o, steps = cfg.optim, cfg.train.steps
  left = steps - o.warmup_steps
  after = {
    'cosine': lambda: optax.cosine_decay_schedule(o.lr, left, o.end_ratio),
    'wsd': lambda: optax.join_schedules(
      [
        optax.constant_schedule(o.lr),
        optax.linear_schedule(o.lr, o.lr * o.end_ratio, o.decay_steps),
      ],
      [left - o.decay_steps],
    ),
    'constant': lambda: optax.constant_schedule(o.lr),
  }[o.schedule]()
  warmup = optax.linear_schedule(0.0, o.lr, o.warmup_steps)
  return optax.join_schedules([warmup, after], [o.warmup_steps])


def transform(cfg: config.Config) -> optax.GradientTransformation:
  """Gradients -> a direction; the step multiplies it by -learning_rate.

  Clip by global norm, Adam, then decoupled decay of every matrix (Loshchilov &
  Hutter 2019, https://arxiv.org/abs/1711.05101). What decays is read from the
  Spec: a stack of norms is not a matrix.
  """
  o = cfg.optim
  decays = jax.tree.map(lambda spec: spec.decay, lm.specs(cfg))
  return optax.chain(
    optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
    optax.scale_by_adam(o.b1, o.b2, o.eps, mu_dtype=o.moment_dtype),
    optax.add_decayed_weights(o.weight_decay, mask=decays),
  )


def init(cfg: config.Config, params):
  """State of `transform`; moments are float32 or moment_dtype even where the
  parameters are bfloat16, in which a second moment would stop decaying."""
  return transform(cfg).init(
    jax.tree.map(lambda w: w.astype(jnp.float32), params)
  )


def keep_inactive_heads(new, old, n_active: int, cfg: config.Config):
  """`new`, with what belongs to heads n_active + 1..n taken from `old`.

  For parameters and optimizer state alike: an inactive head has no moment
  update and no decay.
  """
  in_use = {'heads': heads.n_modules(cfg, n_active)}
  if cfg.heads.unembedding == 'replicated':
    in_use['unembed'] = n_active

  def leaf(path, new, old):
    names = {getattr(key, 'name', None) for key in path}
    for name in names & in_use.keys():
      active_K = jnp.arange(new.shape[0]) < in_use[name]
      return jnp.where(active_K.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return new

  if n_active == cfg.heads.n:
    return new
  return jax.tree_util.tree_map_with_path(leaf, new, old)
