"""Pure functions of parameters, arrays and a Config, for use without flags or a run
directory; exported by `mtp_jax`.

A function uses the mesh of the context (`with mtp.mesh(cfg):`), else that of its
parameters. `init` creates parameters on one device without a context.
"""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import draft_vocab, schedule, schema, validate
from mtp_jax.losses import metrics as metrics_lib
from mtp_jax.losses import multi_token, targets
from mtp_jax.model import lm
from mtp_jax.model import params as params_lib
from mtp_jax.parallel import chips, sharding
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib

chips.silence_compilers()


def mesh(cfg: schema.Config, devices=None):
  """Returns a context manager that sets the device mesh of cfg.mesh.

  Args:
    cfg: its mesh section has the number of devices along each axis.
    devices: devices to use; None = all.

  Raises:
    ConfigError: the mesh does not divide the devices or the model.
  """
  return jax.set_mesh(sharding.make_mesh(cfg, devices))


def _has_mesh() -> bool:
  return not jax.sharding.get_abstract_mesh().empty


def _of_parameters(function):
  """Decorates with jit, cfg being static, on the mesh of the context or else of the
  parameters, which are the first argument."""

  def traced(parameters, *args, cfg, **kwargs):
    if _has_mesh():
      return function(parameters, *args, cfg=cfg, **kwargs)
    of_leaf = jax.typeof(jax.tree.leaves(parameters)[0]).sharding.mesh
    if of_leaf.empty:
      raise ValueError(
        'parameters have no mesh: create them with mtp.init or mtp.load, or call this'
        ' inside `with mtp.mesh(cfg):`'
      )
    with jax.sharding.use_abstract_mesh(of_leaf):
      return function(parameters, *args, cfg=cfg, **kwargs)

  compiled = jax.jit(traced, static_argnames=('cfg', 'step'))
  signature = inspect.signature(function)

  @functools.wraps(function)
  def call(*args, **kwargs):
    # By name, so that cfg is static however it is passed; too many arguments raise.
    parameters, *rest = signature.bind(*args, **kwargs).arguments.items()
    return compiled(parameters[1], **dict(rest))

  return call


def _by_rows(x):
  """Shards an array with rows first like activations."""
  return jax.reshard(x, sharding.pspec('batch', *(None,) * (x.ndim - 1)))


def init(cfg: schema.Config, key) -> lm.LM:
  """Returns initial parameters, created sharded on the mesh of the context, or else on
  one device.

  Truncated normal with standard deviation fan_in^-1/2, output projections times
  (2 L)^-1/2. Each array depends on the key and its own name only.

  Args:
    cfg: its model, heads and loss sections.
    key: of `jax.random.key`.

  Raises:
    ConfigError: a field of cfg is invalid.
  """
  validate.validate(cfg)
  draft_vocab.check_ids(cfg)

  def make(key):
    return params_lib.init(key, lm.specs(cfg), cfg.model.param_dtype)

  with jax.set_mesh(sharding.context_mesh()):
    return jax.jit(make)(key)


@_of_parameters
def forward(params: lm.LM, tokens_BT, cfg: schema.Config):
  """Returns every head's hidden states h_KBTD, in the compute dtype.

  Args:
    params: of `init` or `load`.
    tokens_BT: int32 token ids, each row one document from its start.
    cfg: static.

  A head that reads the next token (sequential, recursive) reads zeros where that
  token lies beyond T: at its last k - 1 positions.
  """
  return lm.forward(params, _by_rows(jnp.asarray(tokens_BT)), cfg)


@_of_parameters
def logits(params: lm.LM, tokens_BT, cfg: schema.Config):
  """Returns every head's logits_KBTV in float32; [k - 1, b, t] are those of token
  t + k. Arguments as of `forward`."""
  return lm.logits(params, _by_rows(jnp.asarray(tokens_BT)), cfg)


def _with_positions(batch: dict) -> dict:
  """Returns a batch with positions; by default each row is one document."""
  batch = {name: _by_rows(jnp.asarray(x)) for name, x in batch.items()}
  if 'position' not in batch:
    position_U = jnp.arange(batch['tokens'].shape[-1], dtype=jnp.int32)
    batch['position'] = _by_rows(jnp.broadcast_to(position_U, batch['tokens'].shape))
  return batch


@_of_parameters
def loss(params: lm.LM, batch: dict, cfg: schema.Config, step: int = 0):
  """Computes the multi-head loss (Gloeckle et al. 2024,
  https://arxiv.org/abs/2404.19737), differentiable by params.

  Args:
    params: of `init` or `load`.
    batch: tokens (B, U) int32, U = T + cfg.span: T queries and the targets beyond the
      last one; optionally position (B, U) int32, 0 where a document starts, and
      loss_mask (B, U) bool.
    cfg: static.
    step: optimizer step, for --loss.weights and --loss.curriculum.

  Returns:
    (loss, metrics): a float32 scalar, and sums over the batch: count_K valid targets
    of each active head, loss_sum_K in nats, correct_K, and accepted_K of
    `losses.targets.acceptance`. A mean is a sum over its count.
  """
  batch = _with_positions(batch)
  n_active = schedule.active_heads(cfg, step)
  counts = targets.counts(jax.tree.map(lambda x: x[None], batch), cfg, n_active)
  total, sums = multi_token.mtp_loss(
    params,
    jnp.zeros(cfg.heads.n),
    batch,
    counts=counts,
    weight_K=targets.weights(jnp.asarray(step), cfg),
    n_active=n_active,
    cfg=cfg,
    step=jnp.asarray(step),
  )
  return total, sums | dict(count_K=counts.target_K)


def init_state(cfg: schema.Config, key=None) -> state_lib.State:
  """Returns the training state of step 0: parameters, optimizer state, counters.

  Args:
    cfg: the Config.
    key: of `jax.random.key`; None = from cfg.train.seed.
  """
  validate.validate(cfg)
  draft_vocab.check_ids(cfg)
  key = jax.random.key(cfg.train.seed) if key is None else key
  with jax.set_mesh(sharding.context_mesh()):
    return state_lib.init_program(cfg, None)(key, None)


def train_step(state: state_lib.State, batch: dict, cfg: schema.Config):
  """Takes one optimizer step, under jit; the state is donated.

  Args:
    state: of `init_state`.
    batch: as of `loss`; its B rows are split over cfg.train.grad_accum_steps
      micro-batches.
    cfg: static.

  Returns:
    (state, metrics): metrics of this step as floats by name, e.g. loss_1 … loss_n in
    nats; None for a mean over nothing.
  """
  step = int(state.step)
  n_active = schedule.active_heads(cfg, step)
  own_mesh = jax.tree.leaves(state)[0].sharding.mesh
  with contextlib.nullcontext() if _has_mesh() else jax.set_mesh(own_mesh):
    state, sums = _train_step(state, batch, n_active=n_active, cfg=cfg)
  return state, metrics_lib.scalars(jax.device_get(sums))


@functools.partial(jax.jit, static_argnames=('n_active', 'cfg'), donate_argnames='state')
def _train_step(state, batch, *, n_active: int, cfg):
  A = cfg.train.grad_accum_steps
  batch = _with_positions(batch)
  spec = sharding.pspec(None, 'batch', None)
  batch = {
    name: jax.reshard(x.reshape(A, -1, *x.shape[1:], out_sharding=spec), spec)
    for name, x in batch.items()
  }
  bytes_V = jnp.ones(cfg.model.vocab_size, jnp.int32)  # no tokenizer: one byte per token
  return step_lib.train_step(state, batch, bytes_V, n_active=n_active, cfg=cfg)


def generate(
  params: lm.LM, prompts, cfg: schema.Config, *, max_new_tokens: int = 64, **decode
) -> list[np.ndarray]:
  """Generates continuations of prompts, drafting with the model's own heads.

  Args:
    params: of `init` or `load`.
    prompts: token ids of each.
    cfg: the Config.
    max_new_tokens: per prompt.
    **decode: further fields of DecodeConfig: num_draft_tokens, temperature, top_p …

  Returns:
    The new tokens of each prompt; with temperature 0 those of plain greedy decoding.
  """
  from mtp_jax.api import runs

  model = runs.Model(params, cfg)
  return model.decode(prompts, max_new_tokens=max_new_tokens, **decode).tokens
