"""TODO of mtp_jax.optim."""

import math

import jax
import jax.numpy as jnp
import optax

from mtp_jax.config import schema
from mtp_jax.parallel import sharding


def muon(o: schema.OptimConfig, specs, hidden) -> optax.GradientTransformation:
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
