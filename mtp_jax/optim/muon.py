"""Muon: orthogonalized momentum for the hidden matrices."""

import math

import jax
import jax.numpy as jnp
import optax

from mtp_jax.config import schema
from mtp_jax.parallel import sharding


def muon(o: schema.OptimConfig, specs, hidden) -> optax.GradientTransformation:
  """Returns Muon: Nesterov momentum, orthogonalized per matrix (Jordan et al. 2024,
  https://kellerjordan.github.io/posts/muon), times 0.2 sqrt(max(rows, columns)).

  The factor is that of Liu et al. 2025, https://arxiv.org/abs/2502.16982: a
  semi-orthogonal matrix has RMS max(rows, columns)^-1/2, an AdamW update
  empirically 0.2 to 0.4 at any shape, so that AdamW's learning rate and decay apply
  to both groups. (Jordan's sqrt(max(1, rows/columns)) needs a learning rate of its
  own, and another one at another width.)
  """
  # optax.masked passes trees with MaskedNode in place of masked leaves.
  specs = jax.tree.map(lambda s, h: s if h else optax.MaskedNode(), specs, hidden)
  momentum = optax.trace(o.momentum, nesterov=True, accumulator_dtype=o.moment_dtype)

  def update(updates, state, params=None):
    del params
    moved, state = momentum.update(updates, state)
    return jax.tree.map(_orthogonal, moved, updates, specs), state

  return optax.GradientTransformation(momentum.init, update)


def _orthogonal(x, grad, spec):
  """Returns 0.2 sqrt(max) U V^T of each matrix of a stack (L, inputs …, outputs …).

  A matrix with zero gradient (a head of weight 0) is not updated: its momentum
  decays, but orthogonalization would keep the update's norm.

  optax.contrib.scale_by_muon leaves sharded products to the compiler, which
  all-gathers every matrix in every iteration. Here an all-to-all gives each device
  whole matrices, and another one returns them; a stack that the devices do not
  divide is padded with zeros, at no cost over the fullest device.
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
  """Returns the shardings from a stack at rest to whole matrices: one mesh axis at a
  time moves to the stacked dimension, which XLA compiles to an all-to-all; it does
  not for two at once."""
  places = [jax.P(None, *at_rest[1:])]
  axes = sharding.RULES['stack']
  for i, axis in enumerate(axes, 1):
    rest = (None if a == axis else a for a in places[-1][1:])
    places.append(jax.P(axes[:i], *rest))
  return places


def newton_schulz(x_LRC):
  """Approximately orthogonalizes matrices: maps singular values s to p(p(…(s))),
  five iterations of Jordan's p(s) = 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which maps
  values between .01 and 1 of the Frobenius norm to between .68 and 1.14."""
  flip = x_LRC.shape[1] > x_LRC.shape[2]  # so that the Gram matrix is the smaller one
  x = x_LRC.swapaxes(1, 2) if flip else x_LRC
  largest = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)
  x /= jnp.where(largest > 0, largest, 1)  # or squares of tiny values underflow
  norm = jnp.sqrt(jnp.sum(x**2, axis=(1, 2), keepdims=True))
  x /= jnp.maximum(norm, 1)  # zeros stay zeros

  def step(_, x):
    gram = jnp.einsum('LRC,LSC->LRS', x, x)
    p = -4.7750 * gram + 2.0315 * jnp.einsum('LRS,LST->LRT', gram, gram)
    return 3.4445 * x + jnp.einsum('LRS,LSC->LRC', p, x)

  x = jax.lax.fori_loop(0, 5, step, x)
  return x.swapaxes(1, 2) if flip else x
