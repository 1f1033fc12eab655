"""Parameter specs: shape, logical axes and initializer of each parameter.

One tree of Spec leaves determines initial values, abstract shapes, shardings,
counts, bytes per device, and which parameters decay or are orthogonalised.
"""

import dataclasses
import math
import zlib
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from mtp_jax.config import schema
from mtp_jax.parallel import sharding

# What a tree of parameters holds: arrays, or a Spec or ShapeDtypeStruct of each.
Leaf = TypeVar('Leaf')


@dataclasses.dataclass(frozen=True)
class Spec:
  """One parameter: shape, logical axis of each dimension, initial values."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  std: float | None  # of a truncated normal; None = constant, `fill`
  # Numbers of trailing (input, output) dimensions of a matrix between hidden
  # states; None for embeddings, unembeddings and norms.
  hidden: tuple[int, int] | None = None
  fill: float = 1.0

  @property
  def decay(self) -> bool:
    """Whether weight decay applies: to matrices, stacked or not, but neither to norms
    nor to biases."""
    return self.std is not None


def norm(m: schema.ModelConfig, shape=None, axes=(None,)) -> Spec:
  """Returns the Spec of an RMSNorm's weight, (D,) by default."""
  return Spec(shape or (m.d_model,), axes, None, fill=0.0 if m.norm_offset else 1.0)


def bias(*shape, axes=(None,)) -> Spec:
  return Spec(shape, axes, None, fill=0.0)


def stack(n: int, specs):
  """Returns the specs of n equal modules, stacked on a new leading axis."""
  return jax.tree.map(
    lambda s: dataclasses.replace(s, shape=(n, *s.shape), axes=(None, *s.axes)), specs
  )


def init(key, specs, dtype):
  """Initializes parameters; each depends on the key and on its own path only.

  Matrices: a normal distribution truncated at two standard deviations and rescaled
  to `std`, as jax.nn.initializers do. Under jit each leaf is created sharded.
  """

  def leaf(path, spec):
    out_sharding = sharding.pspec(*spec.axes)
    if spec.std is None:
      return jnp.full(spec.shape, spec.fill, dtype, out_sharding=out_sharding)
    name = jax.tree_util.keystr(path)
    x = jax.random.truncated_normal(
      jax.random.fold_in(key, zlib.crc32(name.encode())),
      -2,
      2,
      spec.shape,
      jnp.float32,
      out_sharding=out_sharding,
    )
    return (spec.std / 0.87962566103423978 * x).astype(dtype)

  return jax.tree_util.tree_map_with_path(leaf, specs)


def abstract(specs, dtype, mesh: Mesh | AbstractMesh):
  """Returns ShapeDtypeStructs with shardings, for tracing and restoring."""
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(
      s.shape, dtype, sharding=NamedSharding(mesh, sharding.pspec(*s.axes))
    ),
    specs,
  )


def gather(tree, specs, cfg: schema.Config):
  """Gathers each leaf of a tree; see `sharding.gather`."""
  compute, grad = cfg.model.compute_dtype, cfg.loss.grad_dtype
  return jax.tree.map(lambda w, s: sharding.gather(w, s.axes, compute, grad), tree, specs)


def gather_cast(tree, specs, cfg: schema.Config):
  """Gathers a tree and casts matrices to the compute dtype, but neither norms nor
  biases, whose updates are often below the spacing of bfloat16."""
  return jax.tree.map(
    lambda w, s: w.astype(cfg.model.compute_dtype) if s.decay else w,
    gather(tree, specs, cfg),
    specs,
  )


def count(specs) -> int:
  return sum(math.prod(s.shape) for s in jax.tree.leaves(specs))


def bytes_per_device(tree) -> int:
  """Returns the bytes that one device holds of abstract or concrete arrays."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def by_path(tree) -> dict:
  """Returns the leaves by path, as 'trunk.q'."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
