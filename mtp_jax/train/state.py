"""Everything that a step changes and a checkpoint keeps. Floor 4."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from mtp_jax.config import schema
from mtp_jax.model import lm, params
from mtp_jax.optim import update
from mtp_jax.train import init_from


@flax.struct.dataclass
class State:
  """params, optimizer state, and three int32 counters.

  step counts optimizer steps, skipped ones too, so that step x batch_size is
  the position in the data; skipped counts the non-finite steps, and
  skipped_in_a_row those since the last good one.
  """

  params: lm.LM
  opt_state: Any
  step: Any
  skipped: Any
  skipped_in_a_row: Any


def init(cfg: schema.Config, mesh: Mesh, other: tuple[lm.LM, schema.Config] | None = None) -> State:
  """The state of step 0, made in its shards: never whole on one device.

  other: parameters to begin with, and what they are; see begin.py.
  """

  with jax.set_mesh(mesh):
    key = jax.random.key(cfg.train.seed)
    old, was = other or (None, None)
    return init_program(cfg, was)(key, old)


def init_program(cfg: schema.Config, was: schema.Config | None):
  """(key, old parameters or None) -> State under jit; `was` is what they are.
  Call it under jax.set_mesh."""

  def make(key, old):
    model = params.init(key, lm.specs(cfg), cfg.model.param_dtype)
    if was:
      model = init_from.parameters(model, old, was, cfg)
    zero = jnp.zeros((), jnp.int32)
    return State(model, update.init(cfg, model), zero, zero, zero)

  return jax.jit(make)


def abstract(cfg: schema.Config, mesh: Mesh | AbstractMesh) -> State:
  """The state's shapes, dtypes and shardings, without making it."""
  real = isinstance(mesh, Mesh)
  with jax.set_mesh(mesh) if real else jax.sharding.use_abstract_mesh(mesh):
    model = params.abstract(lm.specs(cfg), cfg.model.param_dtype, mesh)
    opt_state = jax.eval_shape(lambda w: update.init(cfg, w), model)
    zero = jax.eval_shape(lambda: jnp.zeros((), jnp.int32))
    replicated = jax.sharding.NamedSharding(mesh, jax.P())

  def place(x):
    sharding = x.sharding
    if sharding is None or not sharding.spec:
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, sharding.spec)
    )

  return jax.tree.map(place, State(model, opt_state, zero, zero, zero))
