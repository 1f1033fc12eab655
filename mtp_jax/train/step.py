"""One optimizer step: a pure function of the state and a batch."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax.config import schema
from mtp_jax.losses import multi_token, targets
from mtp_jax.losses import teacher as teacher_lib
from mtp_jax.optim import update
from mtp_jax.parallel import sharding
from mtp_jax.train import state as state_lib


def train_step(
  state: state_lib.State,
  batch: dict,
  bytes_V,
  teacher: teacher_lib.Model | None = None,
  *,
  n_active: int,
  cfg: schema.Config,
):
  """Computes loss and gradients, and updates the parameters.

  Args:
    state: donated by the caller.
    batch: tokens and position (A, B, U) int32; A micro-batches, summed.
    bytes_V: UTF-8 bytes of each token, for bits per byte.
    teacher: that of --loss.teacher; None = head 1.
    n_active: number of heads that train (--loss.curriculum).
    cfg: static.

  Returns:
    (new state, metrics): scalars and (n_active,) arrays of this step, sums with
    their counts; `losses.metrics.scalars` computes the means. A step with a
    non-finite loss or gradient changes no parameter.
  """
  counts = targets.counts(batch, cfg, n_active)
  count_K = counts.target_K
  weight_K = targets.weights(state.step, cfg)

  def mtp_loss(params, probe_K, rows):
    return multi_token.mtp_loss(
      update.freeze(params, cfg),
      probe_K,
      rows,
      counts=counts,
      weight_K=weight_K,
      n_active=n_active,
      cfg=cfg,
      step=state.step,
      teacher=teacher,
    )

  def micro_batch(rows):
    return jax.value_and_grad(mtp_loss, argnums=(0, 1), has_aux=True)(
      state.params, jnp.zeros(cfg.heads.n), rows
    )

  (total, sums), (grads, norm2_K) = sum_micro_batches(micro_batch, batch, cfg)

  with jax.named_scope('update'):
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
    new = update.update(
      state.params, state.opt_state, grads, step=state.step, n_active=n_active, cfg=cfg
    )
    new = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), new, (state.params, state.opt_state)
    )
  bad = 1 - finite.astype(jnp.int32)
  metrics = sums | dict(
    total=total,
    head_grad_norm_K=jnp.sqrt(norm2_K[:n_active]),
    lr=update.learning_rate(cfg)(state.step),
    grad_norm=grad_norm,
    weight_K=weight_K[:n_active],
    count_K=count_K,
    bytes=targets.target_bytes(batch, cfg, bytes_V),
    skipped=state.skipped + bad,
    # Steps without a target neither extend nor reset the count.
    consecutive_nonfinite=jnp.where(
      jnp.any(count_K > 0), (state.skipped_in_a_row + bad) * bad, state.skipped_in_a_row
    ),
  )
  return state_lib.State(
    *new,
    step=state.step + 1,
    skipped=metrics['skipped'],
    skipped_in_a_row=metrics['consecutive_nonfinite'],
  ), metrics


def sum_micro_batches(micro_batch, batch, cfg):
  """Sums micro_batch over the A micro-batches, in grad_dtype even where parameters
  and gradients are bfloat16, whose precision is lost after eight terms."""
  first = jax.tree.map(lambda x: x[0], batch)
  if cfg.train.grad_accum_steps == 1:
    # For a scan of length 1 XLA:TPU compiles the whole forward pass twice.
    return micro_batch(first)

  def zeros_like(x):
    dtype = jnp.promote_types(x.dtype, cfg.loss.grad_dtype)
    # A scalar may have no sharding, as the sum of token order prediction.
    return jnp.zeros(x.shape, dtype, out_sharding=x.sharding and x.sharding.spec)

  zeros = jax.tree.map(zeros_like, jax.eval_shape(micro_batch, first))

  def add(summed, rows):
    out = micro_batch(rows)
    return jax.tree.map(lambda s, x: s + x.astype(s.dtype), summed, out), None

  return jax.lax.scan(add, zeros, batch)[0]


def compiled(cfg: schema.Config, n_active: int):
  """Returns the jitted step, its state donated. Call it under jax.set_mesh."""

  def step(state, batch, bytes_V, teacher=None):
    return train_step(state, batch, bytes_V, teacher, n_active=n_active, cfg=cfg)

  return jax.jit(step, donate_argnums=0)


def trace(
  cfg: schema.Config,
  mesh: Mesh,
  n_active: int,
  masked: bool = False,
  teacher: schema.Config | int | None = None,
):
  """Returns `compiled` traced for abstract inputs: lowering and compiling it needs
  neither data nor the mesh's devices. Call it under jax.set_mesh.

  masked: whether batches have a loss mask. teacher: the Config of the teacher.Model that is
  the last argument of the step; or, of a stored teacher, the number of tokens per position
  that batches have; None = neither.
  """
  rows_sharding = NamedSharding(mesh, sharding.pspec(None, 'batch', None))
  rows = (
    cfg.train.grad_accum_steps,
    cfg.data.batch_size // cfg.train.grad_accum_steps,
    cfg.data.seq_len + cfg.span,
  )
  dtypes = dict(tokens=jnp.int32, position=jnp.int32)
  if masked:
    dtypes['loss_mask'] = jnp.bool_
  batch = {
    name: jax.ShapeDtypeStruct(rows, dtype, sharding=rows_sharding)
    for name, dtype in dtypes.items()
  }
  if isinstance(teacher, int):
    by_token = NamedSharding(mesh, sharding.pspec(None, 'batch', None, None))
    queries = (*rows[:2], cfg.data.seq_len)
    batch |= dict(
      teacher_ids=jax.ShapeDtypeStruct((*queries, teacher), jnp.int32, sharding=by_token),
      teacher_logp=jax.ShapeDtypeStruct((*queries, teacher + 1), jnp.float16, sharding=by_token),
    )
  bytes_V = jax.ShapeDtypeStruct(
    (cfg.model.vocab_size,), jnp.int32, sharding=NamedSharding(mesh, P())
  )
  more = (teacher_lib.abstract(teacher, mesh),) if isinstance(teacher, schema.Config) else ()
  return compiled(cfg, n_active).trace(state_lib.abstract(cfg, mesh), batch, bytes_V, *more)
