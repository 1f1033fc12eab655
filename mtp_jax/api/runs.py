"""Runs and checkpoints from Python: load, generate, save, plan."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from mtp_jax.checkpoint import restore, saver
from mtp_jax.config import commands, schedule, schema, validate
from mtp_jax.data import tokenizers
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import load as load_lib
from mtp_jax.io import paths
from mtp_jax.model import lm
from mtp_jax.parallel import chips, sharding
from mtp_jax.planning import ahead

chips.silence_compilers()


class Generated(NamedTuple):
  """The result of `Model.generate`."""

  text: str  # prompt and continuation
  tokens: np.ndarray  # new tokens
  forwards: int  # forward passes after prefill


class Model:
  """Parameters, ready to decode.

  Attributes:
    params: lm.LM.
    cfg: the Config that they were trained with.
    tokenizer: data.tokenizers.Tokenizer; None = token ids only.
    step: optimizer step of the checkpoint.
  """

  def __init__(
    self,
    params: lm.LM,
    cfg: schema.Config,
    tokenizer: tokenizers.Tokenizer | None = None,
    step: int = 0,
    active: int | None = None,
  ):
    self.params, self.cfg, self.tokenizer, self.step = params, cfg, tokenizer, step
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    self._decoder = decoder_lib.Decoder(
      params, schema.command_config(cfg), mesh, active or cfg.heads.n
    )

  def decode(self, prompts, **decode: Any) -> decoder_lib.Decoded:
    """Generates continuations of prompts (token ids) in one batch.

    Args:
      prompts: token ids of each, at least one.
      **decode: fields of DecodeConfig, e.g. max_new_tokens, num_draft_tokens (an int
        'all' or 'auto'), temperature, seed; stop_ids, the ids that end a text.

    Raises:
      InputError: a prompt or a field is invalid.
    """
    stop_ids = tuple(decode.pop('stop_ids', ()))
    if 'num_draft_tokens' in decode:
      decode['num_draft_tokens'] = str(decode['num_draft_tokens'])
    section = commands.DecodeConfig(**decode)
    cfg = dataclasses.replace(schema.command_config(self.cfg), decode=section)
    validate.validate(cfg)
    widths = decoder_lib.requested(cfg, self._decoder.active)
    ids = [np.asarray(prompt, np.int64) for prompt in prompts]
    of = self._decoder.with_sampling(**dataclasses.asdict(section))
    return of(ids, widths=widths, stop_ids=stop_ids)

  def generate(self, prompt: str, **decode: Any) -> Generated:
    """Continues a text; arguments as of `decode`.

    Raises:
      ValueError: the model has no tokenizer.
    """
    if self.tokenizer is None:
      raise ValueError('the model has no tokenizer: decode token ids with Model.decode')
    ids = [*self.tokenizer.start, *self.tokenizer.encode(prompt)]
    found = self.decode([ids], stop_ids=self.tokenizer.stop_ids, **decode)
    tokens = found.tokens[0]
    return Generated(self.tokenizer.decode([*ids, *tokens]), tokens, int(found.forwards[0]))


def load(path: str) -> Model:
  """Loads a checkpoint: a run directory, or one of its checkpoints/STEP.

  Raises:
    InputError: there is no checkpoint, or it is corrupt.
  """
  workdir, step, saved, cfg = load_lib.open_checkpoint(paths.absolute(str(path)), {})
  tokenizer = load_lib.tokenizer_of({}, saved, workdir)
  params = restore.restore_model(workdir, step, cfg, sharding.context_mesh())
  return Model(params, cfg, tokenizer, step, schedule.trained_heads(cfg, step))


def save(params: lm.LM, cfg: schema.Config, path: str, tokenizer: str = '') -> None:
  """Saves parameters as step 0 of a new run directory, which `mtp` commands and `load`
  read, and which a run can be initialized from.

  Args:
    params: of `init`, `load` or a state.
    cfg: the Config of the parameters.
    path: directory to write; must not exist.
    tokenizer: as --data.tokenizer; '' = none.

  Raises:
    InputError: the directory exists.
  """
  path = paths.absolute(str(path))
  if paths.as_path(path).exists():
    raise paths.InputError(path, 'exists; give another directory')
  found = tokenizers.get(tokenizer) if tokenizer else None
  recorded = tokenizers.recorded_name(found) if found else ''
  cfg = schema.replace(cfg, **{'data.tokenizer': recorded, 'train.workdir': path})
  with paths.new_folder(path) as tmp:
    saver.save_params(params, cfg, found, tmp)


def plan(cfg: schema.Config, topology: str = '') -> ahead.Plan:
  """Compiles the train step ahead of time and returns its memory, FLOPs, traffic and
  time per device.

  Args:
    cfg: the Config.
    topology: a TPU slice such as v5e:4x4, or GPUs such as h100:8, which needs
      JAX_PLATFORMS=cpu; '' = the devices here. The launch scripts' XLA flags are added to
      XLA_FLAGS, which jax reads once, when it is first used.
  """
  given: dict[str, object] = {'plan.topology': topology} if topology else {}
  return ahead.plan(validate.configured(given, schema.command_config(cfg)))
