"""Updates of an optimizer, on the host."""

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.model import lm
from mtp_jax.optim import update as update_lib
from mtp_jax.train import state as state_lib
from tests.support import tiny


def start(c):
  """(params, opt_state) of step 0, on the host."""
  state = state_lib.init(c, tiny.mesh(c))
  return jax.device_get((state.params, state.opt_state))


def gradients(c, seed):
  """Normal numbers of the parameters' shapes, on the host."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), lm.specs(c))


def updated(c, start, gradients, n_active=None):
  """(params, opt_state) on the host after one more update each time."""
  m = tiny.mesh(c)
  abstract = state_lib.abstract(c, m)
  abstract = abstract.params, abstract.opt_state

  def place(tree, like):
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), tree, like)

  with jax.set_mesh(m):
    m = n_active or c.heads.n
    update = jax.jit(lambda w, s, g, i: update_lib.update(w, s, g, step=i, n_active=m, cfg=c))
    now, states = place(start, abstract), []
    for i, grads in enumerate(gradients):
      now = update(*now, place(grads, abstract[0]), jnp.int32(i))
      for x, a in zip(*map(jax.tree.leaves, (now, abstract)), strict=True):
        assert (x.dtype, x.sharding) == (a.dtype, a.sharding)
      states.append(jax.device_get(now))
  return states
