"""The training state: what a step updates and a checkpoint stores."""

from typing import Any, Generic

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from mtp_jax.config import schema
from mtp_jax.model import lm
from mtp_jax.model import params as params_lib
from mtp_jax.optim import update
from mtp_jax.train import init_from


class State(flax.struct.PyTreeNode, Generic[params_lib.Leaf]):
  """Parameters, optimizer state, and three int32 counters.

  step counts optimizer steps, skipped ones included, so that step x batch_size
  is the position in the data; skipped counts the non-finite steps, and
  skipped_in_a_row those since the last finite one.
  """

  params: lm.LM[params_lib.Leaf]
  opt_state: Any
  step: params_lib.Leaf
  skipped: params_lib.Leaf
  skipped_in_a_row: params_lib.Leaf


def init(cfg: schema.Config, mesh: Mesh, other: tuple[lm.LM, schema.Config] | None = None) -> State:
  """Returns the state of step 0, initialized sharded, never on one device.

  other: parameters to initialize from and their config; see init_from.py.
  """

  with jax.set_mesh(mesh):
    key = jax.random.key(cfg.train.seed)
    old, was = other or (None, None)
    return init_program(cfg, was)(key, old)


def init_program(cfg: schema.Config, was: schema.Config | None):
  """Returns the jitted (key, old parameters or None) -> State; `was` is the config
  of the old parameters. Call it under jax.set_mesh."""

  def make(key, old):
    model = params_lib.init(key, lm.specs(cfg), cfg.model.param_dtype)
    if was:
      model = init_from.parameters(model, old, was, cfg)
    zero = jnp.zeros((), jnp.int32)
    return State(model, update.init(cfg, model), zero, zero, zero)

  return jax.jit(make)


def abstract(cfg: schema.Config, mesh: Mesh | AbstractMesh) -> State[jax.ShapeDtypeStruct]:
  """Returns the state's shapes, dtypes and shardings without allocating it."""
  real = isinstance(mesh, Mesh)
  with jax.set_mesh(mesh) if real else jax.sharding.use_abstract_mesh(mesh):
    model = params_lib.abstract(lm.specs(cfg), cfg.model.param_dtype, mesh)
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
