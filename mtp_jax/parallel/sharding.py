"""The device mesh and the one table from logical axes to mesh axes.

Mesh axes are explicit: an array's sharding is part of its type, so a missing or
wrong one raises at trace time. `gather` is the only place where a parameter stops
being sharded over the batch axes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax.config import draft_vocab, fields, schema

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')  # every axis that splits the batch

# Logical axis of an array -> mesh axis. One rule per logical axis; None is
# replicated.
RULES = {
  'batch': BATCH,
  'embed': 'fsdp',
  'attn_heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'stack': ('fsdp', 'tensor'),  # whole matrices, of one or several layers
  None: None,
}


EXPLICIT = (AxisType.Explicit,) * len(AXES)


def make_mesh(cfg: schema.Config, devices=None) -> Mesh:
  """Returns the mesh of --mesh.* over all devices, or over some.

  Raises:
    ConfigError: the mesh does not divide the devices or the model, or an attention
      kernel is not of this platform. `check_batch` checks that it divides a batch.
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
      f'{" x ".join(f"{a}={s}" for a, s in sizes.items())} does not fit {n_devices} devices:'
      f' the product must {"divide" if free else "be"} {n_devices}',
    )
  for axis in free:
    sizes[axis] = n_devices // fixed
  _check_divisible(cfg, sizes)
  return sizes


def _arranged(sizes: dict[str, int], devices) -> np.ndarray:
  """Returns the devices in the shape of the mesh: on a TPU by their coordinates in
  the torus, slices along `data`, so that only gradients cross the network.

  Elsewhere jax.devices() is ordered by process, identically on every process: the
  last axes, which communicate most, stay within one.
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
    ('heads.markov_rank', cfg.heads.markov_rank, 'fsdp'),
    ('model.n_kv_heads', m.kv_heads, 'tensor'),
    ('model.d_ff', m.ff_width, 'tensor'),
    ('model.vocab_size', m.vocab_size, 'tensor'),
    ('heads.draft_vocab', draft_vocab.size(cfg), 'tensor'),
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
      f'is a kernel for {wanted}, but the devices are {platform}; auto selects a suitable one',
    )


def pspec(*axes) -> P:
  """Returns the PartitionSpec of logical axes, one per dimension."""
  return P(*(RULES[axis] for axis in axes))


def whole(*axes) -> P:
  """Returns `pspec` without the batch axes: a parameter as gathered for compute."""
  return P(*(None if RULES[axis] in BATCH else RULES[axis] for axis in axes))


def by_rows(f, *rowwise, same=()):
  """Computes f(*rowwise, *same) on each device's own rows (shard_map).

  Arrays of `rowwise` and of the result have rows first and are unsharded in every
  other dimension; those of `same` are replicated.
  """
  rows = pspec('batch')
  # Of a single row JAX may not have inferred the sharding.
  rowwise = jax.tree.map(lambda x: jax.reshard(x, rows), rowwise)
  return jax.shard_map(
    f, in_specs=(rows,) * len(rowwise) + (P(),) * len(same), out_specs=rows, check_vma=False
  )(*rowwise, *same)


def reshape(x, shape, *axes):
  """Reshapes x; the first dimensions of the new shape have these logical axes.

  JAX infers them unless dimensions have size 1 (a single row, a single key/value
  head), where it may choose another dimension as the sharded one.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x.reshape(shape)
  spec = pspec(*axes, *[None] * (len(shape) - len(axes)))
  return jnp.reshape(x, shape, out_sharding=spec)


def spec(x) -> tuple:
  """Returns the mesh axes of each dimension of x."""
  return tuple(jax.typeof(x).sharding.spec.partitions)


def as_matrix(x, n: int):
  """Returns x with its first n dimensions as one, and the others as one; None where a dimension
  that is not the first of these is sharded, so that it would have to move."""
  axes = spec(x)
  if any(axes[1:n]) or any(axes[n + 1 :]):
    return None
  shape = math.prod(x.shape[:n]), math.prod(x.shape[n:])
  reduced = jax.typeof(x).sharding.spec.reduced
  return jnp.reshape(x, shape, out_sharding=P(axes[0], axes[n], reduced=reduced))


def gather(w, axes, compute_dtype, grad_dtype):
  """All-gathers a parameter over the batch axes, for compute.

  It is moved in `compute_dtype` and held in a dtype that represents both that and
  `grad_dtype`, so that gradients are accumulated in it wherever w is used; the
  caller casts it to compute_dtype. `reduced` keeps the gradient unreduced over
  devices through any loop; it is reduced once per gather, here, in `grad_dtype`
  (JAX, explicit sharding,
  https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html).

  A parameter that no batch axis shards, i.e. a norm, is returned unchanged (and an
  elementwise product supports no `reduced` operand).
  """
  if not any(RULES[axis] in BATCH for axis in axes):
    return w
  gathered = P(*whole(*axes), reduced=frozenset(BATCH))
  at_rest, param_dtype = jax.typeof(w).sharding.spec, w.dtype
  held_dtype = jnp.promote_types(compute_dtype, grad_dtype)

  @jax.custom_vjp
  def use(w):
    if w.ndim == 2 and jnp.dtype(compute_dtype) == jnp.bfloat16:
      # Or XLA casts a stack of layers before the loop over them, and keeps it. Of q, k, v and o,
      # which a TPU reads in another order, it would keep copies in float32 instead.
      w = jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)
    return jax.reshard(w.astype(compute_dtype), gathered).astype(held_dtype)

  def use_bwd(_, dw):
    # The plain transpose would cast to compute_dtype first, then reduce. Where XLA
    # all-reduces and slices, the barrier makes it slice at once: fused into the
    # optimizer, the slice would keep the unsharded gradient in memory until then.
    dw = dw.astype(grad_dtype)
    if axes[0] == 'embed' and dw.ndim == 3 and dw.shape[-1] < schema.TILE:
      dw = _embed_last(dw)
    dw = _reduced(dw, at_rest).astype(param_dtype)
    return (jax.lax.optimization_barrier(dw),)

  use.defvjp(lambda w: (use(w), None), use_bwd)
  return use(w)


def _embed_last(dw):
  """Returns dw (D, heads, width), of q, k or v with narrow heads. On a TPU it is computed with
  D along the lanes, or half of the matrix unit would be empty: XLA keeps the order of
  dimensions at a barrier."""
  if platform() != 'tpu':
    return dw
  return jnp.moveaxis(jax.lax.optimization_barrier(jnp.moveaxis(dw, 0, -1)), -1, 0)


def _reduced(dw, at_rest: P):
  """Reduces an unreduced gradient over the batch axes, and shards it.

  First a reduce-scatter over the axes that shard it, then an all-reduce of the
  shards over the others. In one step XLA all-reduces the whole array over all
  devices, nearly twice the traffic at 2 x 8.
  """
  sharded = {axis for part in at_rest for axis in _axes(part)}
  others = frozenset(BATCH) - sharded
  dw = jax.reshard(dw, P(*at_rest, unreduced=others))
  return jax.reshard(dw, at_rest)


def _axes(part) -> tuple[str, ...]:
  """Returns the mesh axes of one entry of a PartitionSpec."""
  return () if part is None else (part,) if isinstance(part, str) else part


def zeros_cotangent(w):
  """Returns zeros of the cotangent type (`unreduced`) of the gathered array w."""
  spec = jax.typeof(w).sharding.spec
  return jnp.zeros(w.shape, w.dtype, out_sharding=P(*spec.partitions, unreduced=spec.reduced))


def local_rows(mesh: Mesh, n_rows: int) -> np.ndarray:
  """Returns the rows of a batch that this process's devices hold, ascending.

  Processes that share a `tensor` axis hold, and read, the same rows.
  """
  held = NamedSharding(mesh, pspec('batch')).addressable_devices_indices_map((n_rows,))
  rows_B = np.arange(n_rows)
  return np.unique(np.concatenate([rows_B[i] for i in held.values()]))


def put_batch(mesh: Mesh, batch: dict) -> dict:
  """Returns global (A, B, U, …) arrays from the rows (A, b, U, …) of `local_rows`."""
  n_shards = math.prod(mesh.shape[axis] for axis in BATCH)
  mine = local_rows(mesh, n_shards).tolist()

  def place(x):
    rows = x.shape[1] // len(mine)  # per shard

    def shard(index):
      first = rows * mine.index((index[1].start or 0) // rows)
      return x[:, first : first + rows]

    shape = (x.shape[0], rows * n_shards, *x.shape[2:])
    sharding = NamedSharding(mesh, pspec(None, 'batch', *(None,) * (x.ndim - 2)))
    return jax.make_array_from_callback(shape, sharding, shard)

  with jax.transfer_guard('allow'):  # an intended copy
    return {name: place(x) for name, x in batch.items()}


def platform() -> str:
  """Returns the platform of the current mesh's devices, as tpu; '' without a mesh."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else ''


def device_kind() -> str:
  """Returns the kind of the current mesh's devices, as NVIDIA H200; '' without a mesh."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device else ''
