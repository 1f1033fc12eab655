"""The device mesh and the one table from logical axes to mesh axes.

Floor 1. Mesh axes are explicit: an array's sharding is part of its type, so a
missing or wrong one is an error when the program is traced. `gather` is the
only place where a parameter stops being sharded over the batch axes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax.config import fields, schema

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')  # every axis that splits the batch

# Logical axis of an array -> mesh axis. One rule a logical axis; None means
# that no device holds less than all of it.
RULES = {
  'batch': BATCH,
  'embed': 'fsdp',
  'attn_heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'stack': ('fsdp', 'tensor'),  # whole matrices, of one layer or of a few
  None: None,
}


EXPLICIT = (AxisType.Explicit,) * len(AXES)


def make_mesh(cfg: schema.Config, devices=None) -> Mesh:
  """Returns the mesh of --mesh.* over all devices, or over some.

  Raises:
    ConfigError: the mesh does not divide the devices or the model, or an attention
      kernel is not of this platform. `check_batch` says whether it divides a batch.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(cfg, len(devices))
  _check_platform(cfg, devices[0].platform)
  return Mesh(_arranged(sizes, devices), AXES, axis_types=EXPLICIT)


def context_mesh() -> Mesh:
  """Returns the mesh of the context, or else one of the first device alone."""
  mesh = jax.sharding.get_mesh()
  if not mesh.empty:
    return mesh
  one = schema.Config(mesh=schema.MeshConfig(data=1, fsdp=1, tensor=1))
  return make_mesh(one, jax.devices()[:1])


def abstract_mesh(cfg: schema.Config, n_devices: int) -> AbstractMesh:
  """Returns the same mesh without devices: enough for shardings and bytes."""
  sizes = mesh_sizes(cfg, n_devices)
  return AbstractMesh(tuple(sizes.values()), AXES, axis_types=EXPLICIT)


def mesh_sizes(cfg: schema.Config, n_devices: int) -> dict[str, int]:
  """Returns the devices along each axis, -1 filled in; ConfigError unless they divide
  the devices and the model."""
  sizes = {axis: getattr(cfg.mesh, axis) for axis in AXES}
  free = [axis for axis in AXES if sizes[axis] == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if n_devices % fixed or (not free and fixed != n_devices):
    name = max(AXES, key=lambda axis: sizes[axis])
    raise fields.ConfigError(
      f'mesh.{name}',
      sizes[name],
      f'{" x ".join(f"{a}={s}" for a, s in sizes.items())} does not fit {n_devices} devices',
    )
  for axis in free:
    sizes[axis] = n_devices // fixed
  _check_divisible(cfg, sizes)
  return sizes


def _arranged(sizes: dict[str, int], devices) -> np.ndarray:
  """Devices in the shape of the mesh: on a TPU by their places in the torus,
  slices along `data`, whose gradients alone cross the network.

  Elsewhere jax.devices() has one order on every process, by process: the last
  axes, which talk most, stay within one.
  """
  shape = tuple(sizes.values())
  if devices[0].platform != 'tpu':
    return np.asarray(devices).reshape(shape)
  slices = len({getattr(d, 'slice_index', None) for d in devices})
  if slices > 1:
    if sizes['data'] % slices:
      raise fields.ConfigError('mesh.data', sizes['data'], f'must be a multiple of {slices} slices')
    inside = (sizes['data'] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(
      inside, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def check_batch(cfg: schema.Config, sizes) -> None:
  """Raises ConfigError unless a mesh (its devices by axis) divides a micro-batch."""
  rows = cfg.data.batch_size // cfg.train.grad_accum_steps
  n_batch = math.prod(sizes[axis] for axis in BATCH)
  if rows % n_batch:
    raise fields.ConfigError(
      'data.batch_size',
      cfg.data.batch_size,
      f'must be a multiple of mesh data x fsdp = {n_batch} times'
      f' --train.grad_accum_steps={cfg.train.grad_accum_steps}',
    )


def _check_divisible(cfg, sizes):
  m = cfg.model
  for name, size, axis in (
    ('model.d_model', m.d_model, 'fsdp'),
    ('model.n_kv_heads', m.kv_heads, 'tensor'),
    ('model.d_ff', m.ff_width, 'tensor'),
    ('model.vocab_size', m.vocab_size, 'tensor'),
  ):
    if size % sizes[axis]:
      raise fields.ConfigError(name, size, f'must be a multiple of mesh {axis}={sizes[axis]}')


def _check_platform(cfg, platform):
  kernel = cfg.model.attention
  wanted = schema.KERNELS.get(kernel, platform)
  if platform != wanted:
    raise fields.ConfigError(
      'model.attention',
      kernel,
      f'is a kernel for {wanted}, and these devices are {platform}; auto takes what they have',
    )


def pspec(*axes) -> P:
  """Logical axes, one a dimension -> PartitionSpec."""
  return P(*(RULES[axis] for axis in axes))


def whole(*axes) -> P:
  """`pspec`, but for the batch axes: of a parameter as one device uses it."""
  return P(*(None if RULES[axis] in BATCH else RULES[axis] for axis in axes))


def by_rows(f, *rowwise, same=()):
  """f(*rowwise, *same) on each device's own rows.

  All arrays of `rowwise` and of the result have rows first and are whole in
  every other dimension; those of `same` are the same on all devices.
  """
  rows = pspec('batch')
  return jax.shard_map(
    f, in_specs=(rows,) * len(rowwise) + (P(),) * len(same), out_specs=rows, check_vma=False
  )(*rowwise, *same)


def reshape(x, shape, *axes):
  """x in another shape, whose first dimensions have these logical axes.

  JAX finds that out for itself unless dimensions have size 1, a single row or a
  single key/value head: then it may take another of them for the sharded one.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x.reshape(shape)
  spec = pspec(*axes, *[None] * (len(shape) - len(axes)))
  return jnp.reshape(x, shape, out_sharding=spec)


def gather(w, axes, compute_dtype, grad_dtype):
  """A parameter as one device uses it: whole over the batch axes.

  Moved in `compute_dtype`, and held in a dtype that loses neither that nor
  `grad_dtype`, so that gradients are summed in it wherever w is used; the user
  casts it to compute_dtype. `reduced` keeps the gradient a sum not yet taken
  over devices ("unreduced") through any loop; it is taken once a gather, here,
  in `grad_dtype` (JAX, explicit sharding,
  https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html).

  A parameter that no batch axis shards, i.e. a norm, has nothing to gather (and
  an elementwise product takes no `reduced` operand): it is used as it is.
  """
  if not any(RULES[axis] in BATCH for axis in axes):
    return w
  gathered = P(*whole(*axes), reduced=set(BATCH))
  at_rest, param_dtype = jax.typeof(w).sharding.spec, w.dtype
  held_dtype = jnp.promote_types(compute_dtype, grad_dtype)

  @jax.custom_vjp
  def use(w):
    return jax.reshard(w.astype(compute_dtype), gathered).astype(held_dtype)

  def use_bwd(_, dw):
    # The plain transpose would cast to compute_dtype first, then reduce. Where
    # XLA reduces whole and slices, the barrier has it slice at once: fused into
    # the optimizer, the slice would keep the whole gradient alive until then.
    dw = _reduced(dw.astype(grad_dtype), at_rest).astype(param_dtype)
    return (jax.lax.optimization_barrier(dw),)

  use.defvjp(lambda w: (use(w), None), use_bwd)
  return use(w)


def _reduced(dw, at_rest: P):
  """A gradient that is not yet summed over the batch axes, summed and sharded.

  First over those that shard it, of which each device needs its shard alone (a
  reduce-scatter), then the shards over the others. In one step XLA reduces the
  whole array over all devices: at 2 x 8 that sends nearly twice as much.
  """
  sharded = {axis for part in at_rest for axis in _axes(part)}
  others = frozenset(BATCH) - sharded
  dw = jax.reshard(dw, P(*at_rest, unreduced=others))
  return jax.reshard(dw, at_rest)


def _axes(part) -> tuple[str, ...]:
  """Mesh axes of one entry of a PartitionSpec."""
  return () if part is None else (part,) if isinstance(part, str) else part


def zeros_cotangent(w):
  """Zeros of the type that a gradient of the gathered array w has."""
  spec = jax.typeof(w).sharding.spec
  return jnp.zeros(w.shape, w.dtype, out_sharding=P(*spec.partitions, unreduced=spec.reduced))


def local_rows(mesh: Mesh, n_rows: int) -> np.ndarray:
  """Rows of a batch that this process's devices hold, rising.

  Where a `tensor` axis spans processes they hold, hence read, the same rows.
  """
  held = NamedSharding(mesh, pspec('batch')).addressable_devices_indices_map((n_rows,))
  rows_B = np.arange(n_rows)
  return np.unique(np.concatenate([rows_B[i] for i in held.values()]))


def put_batch(mesh: Mesh, batch: dict) -> dict:
  """The rows (A, b, U) of `local_rows` -> global (A, B, U) arrays."""
  sharding = NamedSharding(mesh, pspec(None, 'batch', None))
  n_shards = math.prod(mesh.shape[axis] for axis in BATCH)
  mine = local_rows(mesh, n_shards).tolist()

  def place(x):
    rows = x.shape[1] // len(mine)  # of a shard

    def shard(index):
      first = rows * mine.index((index[1].start or 0) // rows)
      return x[:, first : first + rows]

    shape = (x.shape[0], rows * n_shards, x.shape[2])
    return jax.make_array_from_callback(shape, sharding, shard)

  with jax.transfer_guard('allow'):  # this copy is meant
    return {name: place(x) for name, x in batch.items()}
