"""The update rules, their learning rates, and what does not take part.

Floor 3. Two groups of parameters have a learning rate of their own: the trunk
(all that a plain next-token model of this shape has: embedding, layers, final
norm, an unembedding that the heads share) and the heads (their modules, and
unembeddings of their own, that of token order prediction too).
"""

import math
import zlib

import jax
import jax.numpy as jnp
import optax

from mtp_jax import config, sharding
from mtp_jax.model import heads, lm


def learning_rate(cfg: config.Config) -> optax.Schedule:
  """Linear from 0 over warmup_steps to lr, then --optim.schedule, at whose end
  the last step is: it takes end_ratio x lr."""
  o, steps = cfg.optim, cfg.train.steps
  end, last = o.lr * o.end_ratio, steps - o.warmup_steps - 1
  after = {
    'cosine': lambda: (
      optax.cosine_decay_schedule(o.lr, last, o.end_ratio) if last else optax.constant_schedule(end)
    ),
    'wsd': lambda: optax.join_schedules(
      [optax.constant_schedule(o.lr), optax.linear_schedule(o.lr, end, o.decay_steps)],
      [last - o.decay_steps],
    ),
    'constant': lambda: optax.constant_schedule(o.lr),
  }[o.schedule]()
  warmup = optax.linear_schedule(0.0, o.lr, o.warmup_steps)
  return optax.join_schedules([warmup, after], [o.warmup_steps])


def transform(cfg: config.Config) -> optax.GradientTransformation:
  """Gradients -> a direction, of which `update` takes learning-rate many.

  Clip by global norm; Adam, or Muon where the Spec says that a matrix is hidden
  and Adam elsewhere; then decoupled decay of every matrix (Loshchilov & Hutter
  2019, https://arxiv.org/abs/1711.05101). What is hidden and what decays is
  read from the Spec: a stack of norms is not a matrix.
  """
  o, specs = cfg.optim, lm.specs(cfg)
  trains = jax.tree.map(bool, learning_rates(cfg))
  rule = optax.scale_by_adam(o.b1, o.b2, o.eps, mu_dtype=o.moment_dtype)
  if o.name == 'muon':
    hidden = jax.tree.map(lambda s, t: t and s.hidden is not None, specs, trains)
    others = jax.tree.map(lambda s, t: t and s.hidden is None, specs, trains)
    rule = optax.chain(optax.masked(rule, others), optax.masked(_muon(o, specs, hidden), hidden))
  elif not all(jax.tree.leaves(trains)):
    rule = optax.masked(rule, trains)  # no moments of what is frozen
  return optax.chain(
    optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
    rule,
    optax.add_decayed_weights(o.weight_decay, mask=jax.tree.map(lambda spec: spec.decay, specs)),
  )


def _muon(o: config.Optim, specs, hidden) -> optax.GradientTransformation:
  """Nesterov's momentum, each matrix of it made semi-orthogonal (Jordan et al.
  2024, https://kellerjordan.github.io/posts/muon), times 0.2 sqrt(max(rows,
  columns)).

  The factor is that of Liu et al. 2025, https://arxiv.org/abs/2502.16982: a
  semi-orthogonal matrix has the root mean square max(rows, columns)^-1/2, an
  update of AdamW empirically 0.2 to 0.4, whatever the shape. So learning rate
  and decay of AdamW serve both groups. (Jordan's sqrt(max(1, rows/columns))
  needs a learning rate of its own, and another one at another width.)
  """
  # As optax.masked hands over a tree: without what is masked.
  specs = jax.tree.map(lambda s, h: s if h else optax.MaskedNode(), specs, hidden)
  momentum = optax.trace(o.momentum, nesterov=True, accumulator_dtype=o.moment_dtype)

  def update(grads, state, params=None):
    del params
    moved, state = momentum.update(grads, state)
    return jax.tree.map(_orthogonal, moved, grads, specs), state

  return optax.GradientTransformation(momentum.init, update)


def _orthogonal(x, grad, spec):
  """A stack of matrices (L, read …, written …) -> 0.2 sqrt(max) U V^T of each.

  A matrix without any gradient (a head of weight 0) rests: momentum fades away,
  but its direction would go on at full length.

  optax.contrib.scale_by_muon leaves a sharded product to the compiler, which
  then gathers every matrix in every iteration. Here each device gets whole
  matrices, by all-to-all there and back; a stack that the devices do not divide
  is filled up with zeros, which takes no longer than the fullest device does.
  """
  n_in, n_out = spec.hidden
  rows, columns = (math.prod(x.shape[1 : 1 + n_in]), math.prod(x.shape[1 + n_in :]))
  L, places = x.shape[0], _places(jax.typeof(x).sharding.spec)
  mesh = jax.sharding.get_abstract_mesh()
  devices = math.prod(mesh.shape[axis] for axis in sharding.RULES['stack'])
  x = jnp.pad(x, [(0, -L % devices), *[(0, 0)] * (n_in + n_out)])
  for place in places[1:]:
    x = jax.reshard(x, place)
  x = newton_schulz(x.reshape(-1, rows, columns)).reshape(x.shape)
  for place in places[-2::-1]:
    x = jax.reshard(x, place)
  rests = jnp.all(grad == 0, axis=tuple(range(1, grad.ndim)), keepdims=True)
  return 0.2 * max(rows, columns) ** 0.5 * jnp.where(rests, 0, x[:L])


def _places(at_rest) -> list[jax.P]:
  """From a stack at rest to whole matrices: one mesh axis at a time moves to
  the stacked dimension, which XLA knows as an all-to-all; not so two."""
  places = [jax.P(None, *at_rest[1:])]
  axes = sharding.RULES['stack']
  for i, axis in enumerate(axes, 1):
    rest = (None if a == axis else a for a in places[-1][1:])
    places.append(jax.P(axes[:i], *rest))
  return places


def newton_schulz(x_LRC):
  """Matrices with singular values s -> with the same vectors and p(p(…(s))):
  five times Jordan's p(s) = 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which brings
  what is between .01 and 1 of the Frobenius norm to between .68 and 1.14."""
  flip = x_LRC.shape[1] > x_LRC.shape[2]  # the smaller of the two squares
  x = x_LRC.swapaxes(1, 2) if flip else x_LRC
  largest = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)
  x /= jnp.where(largest > 0, largest, 1)  # else squares of the tiny are 0
  norm = jnp.sqrt(jnp.sum(x**2, axis=(1, 2), keepdims=True))
  x /= jnp.maximum(norm, 1)  # zeros stay zeros

  def step(_, x):
    gram = jnp.einsum('LRC,LSC->LRS', x, x)
    p = -4.7750 * gram + 2.0315 * jnp.einsum('LRS,LST->LRT', gram, gram)
    return 3.4445 * x + jnp.einsum('LRS,LSC->LRC', p, x)

  x = jax.lax.fori_loop(0, 5, step, x)
  return x.swapaxes(1, 2) if flip else x


def init(cfg: config.Config, params):
  """State of `transform`; moments are float32 or moment_dtype even where the
  parameters are bfloat16, in which a second moment would stop decaying."""
  return transform(cfg).init(_float32(params))


def _float32(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def learning_rates(cfg: config.Config) -> lm.LM:
  """Each parameter's learning rate over that of --optim.lr; 0 is frozen."""
  frozen = cfg.train.freeze
  trunk = 0 if frozen == 'trunk' else cfg.optim.trunk_lr
  head = 0 if frozen == 'heads' else cfg.optim.heads_lr
  own = cfg.heads.unembedding == 'replicated'
  groups = lm.LM(
    embed=trunk, trunk=trunk, heads=head, norm=trunk, unembed=head if own else trunk, order=head
  )
  return jax.tree.map(
    lambda rate, specs: jax.tree.map(lambda _: rate, specs), groups, lm.specs(cfg)
  )


def freeze(params, cfg: config.Config):
  """The parameters, those of a frozen group without a gradient: none is made,
  so that none counts in the norm that clips."""
  return jax.tree.map(
    lambda w, rate: w if rate else jax.lax.stop_gradient(w), params, learning_rates(cfg)
  )


def update(params, opt_state, grads, step, n_active: int, cfg: config.Config):
  """One step: w - learning rate x direction, in float32.

  A bfloat16 parameter has no float32 copy, and an update is mostly far below
  its spacing: the sum is rounded at random, with an expectation of itself
  (Zamirai et al. 2020, https://arxiv.org/abs/2010.06192), by a key of seed,
  step and path alone.

  Args:
    params, opt_state: of `init`.
    grads: in float32.
    step: optimizer steps so far.
    n_active: heads that trained; the others keep parameters and moments.
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
    return round_at_random(new, jax.random.fold_in(key, zlib.crc32(name.encode())))

  new = jax.tree_util.tree_map_with_path(leaf, params, direction, learning_rates(cfg))
  return _keep_inactive_heads((new, new_state), (params, opt_state), n_active, cfg)


def round_at_random(x, key):
  """float32 -> bfloat16: to one of its two neighbours, with the probability of
  the nearness to it. x that is a bfloat16 stays; so do infinities and NaN."""
  noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=jax.typeof(x).sharding)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _keep_inactive_heads(new, old, n_active: int, cfg: config.Config):
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
