"""Cross-entropy of one head, a chunk of positions at a time: logits, B x C x V, are
in memory for one chunk only, forward and backward."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import schema
from mtp_jax.model import layers
from mtp_jax.parallel import sharding

# Per device and chunk, unless --loss.chunk_size is given. Each chunk adds to the gradient
# of the unembedding, which is slow for few tokens.
LOGITS_BYTES, TOKENS = 2**27, 1024
# Values of each position, as the log-sum-exp, which the backward pass does not recompute
# along with the logits.
OF_POSITION = 'of_position'
KEEP = jax.checkpoint_policies.save_only_these_names(OF_POSITION)


class Stats(NamedTuple):
  """Sums over the valid tokens of one head; stacked by the scan over heads."""

  loss: Any
  z_loss: Any
  correct: Any
  argmax_BT: Any


class Logits(NamedTuple):
  """A chunk's logits in float32, and what is computed from them."""

  logits_BCV: Any
  ids_11V: Any  # the token of each
  lse_BC: Any  # log-sum-exp
  label_BC: Any  # logit of the target
  top_BC: Any  # maximum, without a gradient
  argmax_BC: Any  # the first one on ties


@jax.custom_jvp
def _lse(logits_BCV, lse_BC):
  """Returns lse_BC, known to be the log-sum-exp of the logits, with its gradient."""
  del logits_BCV
  return lse_BC


@_lse.defjvp
def _lse_jvp(primals, tangents):
  logits_BCV, lse_BC = primals
  # Of `_lse`, for second derivatives.
  softmax_BCV = jnp.exp(logits_BCV - _lse(logits_BCV, lse_BC)[:, :, None])
  return lse_BC, jnp.sum(softmax_BCV * tangents[0], axis=-1)


def scores(h_BCD, unembed_DV, m: schema.ModelConfig):
  """Computes the logits of a chunk in float32."""
  logits_BCV = layers.product(
    'BCD,DV->BCV', h_BCD, unembed_DV.astype(h_BCD.dtype), preferred_element_type=jnp.float32
  )
  return layers.shaped(logits_BCV, m)


def log_sum_exp(logits_BCV, top_BC):
  """Computes the log-sum-exp of logits, of which top_BC is the maximum; it is kept for
  the backward pass."""
  found_BCV = jax.lax.stop_gradient(logits_BCV)
  shift_BC = jnp.where(jnp.isfinite(top_BC), top_BC, 0)  # inf - inf is no number
  sum_BC = jnp.sum(jnp.exp(found_BCV - shift_BC[:, :, None]), axis=-1)
  return _lse(logits_BCV, checkpoint_name(shift_BC + jnp.log(sum_BC), OF_POSITION))


def logits(h_BCD, unembed_DV, target_BC, m: schema.ModelConfig) -> Logits:
  """Computes the Logits of a chunk."""
  return of_scores(scores(h_BCD, unembed_DV, m), target_BC)


def of_scores(logits_BCV, target_BC, ids_V=None) -> Logits:
  """Computes the Logits of a chunk from its scores. The label's logit is a masked sum, not
  a lookup: the vocabulary may be sharded and is never gathered.

  ids_V: the token of each logit, ascending; None = all tokens.
  """
  found_BCV = jax.lax.stop_gradient(logits_BCV)
  top_BC = jnp.max(found_BCV, axis=-1)
  # Three sums over the vocabulary of one type: XLA reads the logits once for all. Ids are
  # exact in float32, and their minimum takes half the time of jnp.argmax on a CPU.
  V = logits_BCV.shape[-1]
  ids_11V = (jnp.arange(V) if ids_V is None else jnp.array(ids_V))[None, None, :]
  last = V - 1 if ids_V is None else ids_V[-1]
  # Of this chunk, or JAX computes them for each position before a loop that it differentiates.
  if sharding.platform() == 'tpu':
    # So all ids remain an iota: read from memory, they slow the products of logits.
    zero, _ = jax.lax.optimization_barrier((jnp.int32(0), top_BC))
    ids_11V = zero + ids_11V
  else:
    ids_11V, _ = jax.lax.optimization_barrier((ids_11V, top_BC))
  lse_BC = log_sum_exp(logits_BCV, top_BC)
  label_BC = jnp.sum(jnp.where(ids_11V == target_BC[:, :, None], logits_BCV, 0), axis=-1)
  ids_of_top_BCV = jnp.where(found_BCV == top_BC[:, :, None], ids_11V.astype(jnp.float32), last)
  argmax_BC = jnp.min(ids_of_top_BCV, axis=-1).astype(jnp.int32)
  return Logits(logits_BCV, ids_11V, lse_BC, label_BC, top_BC, argmax_BC)


def stats(of: Logits, target_BC, valid_BC, cfg: schema.Config) -> Stats:
  """Returns the Stats of a chunk's Logits."""
  z_loss = cfg.loss.z_loss * jnp.sum(valid_BC * of.lse_BC**2)
  loss = jnp.sum(valid_BC * (of.lse_BC - of.label_BC)) + z_loss
  correct = jnp.sum(valid_BC * (of.argmax_BC == target_BC), dtype=jnp.float32)
  return Stats(loss, z_loss, correct, of.argmax_BC)


def softmax_xent(h_BCD, unembed_DV, target_BC, valid_BC, cfg):
  """Returns (sum of the losses of valid positions, Stats)."""
  found = stats(logits(h_BCD, unembed_DV, target_BC, cfg.model), target_BC, valid_BC, cfg)
  return found.loss, found


def chunk_size(B: int, T: int, cfg: schema.Config) -> int:
  """Returns C, the number of positions per chunk.

  --loss.chunk_size, or else the largest divisor of T whose B x C x V logits per
  device fit LOGITS_BYTES or have at most TOKENS positions, at least 128 per row: smaller
  products underuse matrix units.
  """
  if cfg.loss.chunk_size:
    return cfg.loss.chunk_size
  size = dict(jax.sharding.get_abstract_mesh().shape)
  batch = math.prod(size.get(axis, 1) for axis in sharding.BATCH)
  rows = B / batch
  of_position = 4 * rows * cfg.model.vocab_size / size.get('tensor', 1)
  divisors = [c for c in range(1, T + 1) if T % c == 0 and c >= min(T, 128)]
  fit = [c for c in divisors if c * of_position <= LOGITS_BYTES or c * rows <= TOKENS]
  return max(fit, default=divisors[0])


def _in_chunks(cfg, xs):
  """Reshapes each (B, T, …) of a pytree to (T/C, B, C, …)."""
  B, T = jax.tree.leaves(xs)[0].shape[:2]
  C = chunk_size(B, T, cfg)
  return jax.tree.map(
    lambda x: sharding.reshape(x, (B, T // C, C, *x.shape[2:]), 'batch').swapaxes(0, 1), xs
  )


def out_of_chunks(x_XBC):
  """Reshapes (T/C, B, C, …) to (B, T, …)."""
  X, B, C, *rest = x_XBC.shape
  return sharding.reshape(x_XBC.swapaxes(0, 1), (B, X * C, *rest), 'batch')


def sum_chunks(f, h_BTD, unembed, of_tokens, cfg):
  """Returns (sum of losses, the rest of each chunk); the backward pass recomputes
  logits.

  f(h_BCD, unembed, *of_tokens in chunks, cfg) -> (loss, rest). h_BTD and unembed may be
  pytrees.
  """

  @functools.partial(jax.checkpoint, policy=KEEP)
  def one(_, xs):
    h_BCD, *of_chunk = xs
    return None, f(h_BCD, unembed, *of_chunk, cfg)

  _, (loss_X, rest) = jax.lax.scan(one, None, _in_chunks(cfg, (h_BTD, *of_tokens)))
  return jnp.sum(loss_X), rest


def grad_chunks(f, h_BTD, weights, of_tokens, scale, *, cfg):
  """Computes `sum_chunks` and the gradients of scale x loss in one forward pass.

  Args:
    f, h_BTD, of_tokens, cfg: as of `sum_chunks`.
    weights: (unembed, its accumulated gradient), pytrees; a leaf that is None has none.
    scale: factor of the loss that is differentiated.

  Returns:
    (gradient of unembed with this one's added, dh_BTD, loss, the rest of each chunk).
  """
  unembed, dunembed = weights

  def one(dunembed, xs):
    h_BCD, *of_chunk = xs

    def scaled(h_BCD, unembed):
      loss, rest = f(h_BCD, unembed, *of_chunk, cfg)
      return scale * loss, (loss, rest)

    (_, out), (dh_BCD, d) = jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(h_BCD, unembed)
    return jax.tree.map(jnp.add, dunembed, d), (*out, dh_BCD)

  dunembed, (loss_X, rest, dh_XBCD) = jax.lax.scan(
    one, dunembed, _in_chunks(cfg, (h_BTD, *of_tokens))
  )
  return dunembed, jax.tree.map(out_of_chunks, dh_XBCD), jnp.sum(loss_X), rest


def total(of_chunks: Stats) -> Stats:
  """Returns the Stats of all chunks."""
  loss, z_loss, correct, argmax_XBC = of_chunks
  return Stats(jnp.sum(loss), jnp.sum(z_loss), jnp.sum(correct), out_of_chunks(argmax_XBC))
