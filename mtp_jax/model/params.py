"""A parameter is described before it exists.

Floor 1. The same tree of Spec leaves gives initial values, abstract shapes,
shardings, counts, bytes per device, and what decays or is orthogonalised.
"""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mtp_jax.config import schema
from mtp_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Spec:
  """One parameter: shape, logical axis of each dimension, initial values."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  std: float | None  # of a truncated normal; None = ones
  # (dimensions it reads, dimensions it writes), the last ones of the shape, of
  # a matrix from hidden states to hidden states; None: an embedding, an
  # unembedding, a norm.
  hidden: tuple[int, int] | None = None

  @property
  def decay(self) -> bool:
    """Matrices decay, norms do not; stacking does not change which it is."""
    return self.std is not None


def stack(n: int, specs):
  """The specs of n equal modules, stacked on a new leading axis."""
  return jax.tree.map(
    lambda s: dataclasses.replace(s, shape=(n, *s.shape), axes=(None, *s.axes)), specs
  )


def init(key, specs, dtype):
  """Initial values; each depends on the key and on its own path only.

  Matrices: normal cut at two standard deviations and rescaled to `std`, as
  jax.nn.initializers do. Under jit each leaf is made in its shards.
  """

  def leaf(path, spec):
    out_sharding = sharding.pspec(*spec.axes)
    if spec.std is None:
      return jnp.ones(spec.shape, dtype, out_sharding=out_sharding)
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


def abstract(specs, dtype, mesh: Mesh):
  """ShapeDtypeStructs with shardings: all that a compiler needs."""
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(
      s.shape, dtype, sharding=NamedSharding(mesh, sharding.pspec(*s.axes))
    ),
    specs,
  )


def gather(tree, specs, cfg: schema.Config):
  """`sharding.gather` for each leaf of a tree."""
  compute, grad = cfg.model.compute_dtype, cfg.loss.grad_dtype
  return jax.tree.map(lambda w, s: sharding.gather(w, s.axes, compute, grad), tree, specs)


def gather_cast(tree, specs, cfg: schema.Config):
  """Gathered matrices in the compute dtype; norms as they are, since an update
  of one is often below the spacing of bfloat16."""
  return jax.tree.map(
    lambda w, s: w.astype(cfg.model.compute_dtype) if s.decay else w,
    gather(tree, specs, cfg),
    specs,
  )


def count(specs) -> int:
  return sum(math.prod(s.shape) for s in jax.tree.leaves(specs))


def bytes_per_device(tree) -> int:
  """Bytes that one device holds of abstract or real arrays."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
