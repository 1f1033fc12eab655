"""Opening a checkpoint for decoding: its config, tokenizer and parameters."""

from typing import Any, NamedTuple

from mtp_jax.checkpoint import metadata, restore
from mtp_jax.config import draft_vocab, fields, parse, schedule, schema, validate
from mtp_jax.data import store as store_lib
from mtp_jax.data import tokenizers
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.io import paths
from mtp_jax.parallel import distributed, sharding


def open_checkpoint(
  path: str, given: dict[str, object], elsewhere: dict | None = None
) -> tuple[str, int, schema.Config, schema.CommandConfig]:
  """Opens and verifies a checkpoint.

  Flags may change how something is computed, not what the parameters are.

  Args:
    path: a run directory, or one of its checkpoints/STEP.
    given: flags of the command line, by name.
    elsewhere: fields that replace those of the saved Config.

  Returns:
    (workdir, step, its Config, its Config with the given flags).

  Raises:
    InputError: no checkpoint, a corrupt one, a flag that contradicts it.
  """
  workdir, step = restore.find(path)
  if distributed.is_primary():
    restore.verify(workdir, step)
  saved = metadata.read(workdir, step).cfg
  base = schema.command_config(saved)
  cfg = validate.configured(given, schema.replace(base, **elsewhere or {}))
  other_tree = bool(saved.loss.token_order_weight) != bool(cfg.loss.token_order_weight)
  for name, was, now in schema.changed(saved, cfg):
    if restore.is_of_model(name) or (name == 'loss.token_order_weight' and other_tree):
      if name == draft_vocab.FLAG:
        was, now = map(draft_vocab.shown, (was, now))
      raise fields.ConfigError(name, now, f'the checkpoint {path} was trained with {was}')
  return workdir, step, saved, cfg


class CheckpointInfo(NamedTuple):
  """A checkpoint whose parameters are not read yet."""

  workdir: str
  step: int
  cfg: schema.CommandConfig
  active: int  # number of trained heads
  tokenizer: tokenizers.Tokenizer | None  # None if only ids are decoded


class LoadedModel(NamedTuple):
  """A checkpoint, ready to decode."""

  name: str
  cfg: schema.CommandConfig
  mesh: Any
  decoder: decoder_lib.Decoder
  tokenizer: tokenizers.Tokenizer | None


def find(path: str, given: dict[str, object], only_ids: bool = False) -> CheckpointInfo:
  """Returns a checkpoint's CheckpointInfo, its flags and tokenizer checked.

  Args:
    path: a run directory, or one of its checkpoints/STEP.
    given: flags of the command line, by name.
    only_ids: whether no tokenizer is needed.

  Raises:
    InputError: see `open_checkpoint`; or there is no tokenizer.
  """
  return of_opened(given, open_checkpoint(paths.absolute(path), given), only_ids)


def of_opened(given: dict[str, object], opened, only_ids: bool) -> CheckpointInfo:
  """Returns the CheckpointInfo of an `open_checkpoint` result."""
  workdir, step, saved, cfg = opened
  active = schedule.trained_heads(cfg, step)
  decoder_lib.widths(cfg, active)
  tokenizer = None
  if not only_ids:
    tokenizer = tokenizer_of(given, saved, workdir)
    if tokenizer is None:
      raise paths.InputError(
        workdir, 'was imported without a tokenizer; give --prompt_ids, or --data.tokenizer'
      )
    check_rows(tokenizer, cfg)
  return CheckpointInfo(workdir, step, cfg, active, tokenizer)


def load(found: CheckpointInfo) -> LoadedModel:
  """Loads the parameters, without optimizer state, into a Decoder."""
  cfg, mesh = found.cfg, sharding.make_mesh(found.cfg)
  model = restore.restore_model(found.workdir, found.step, cfg, mesh)
  return LoadedModel(
    f'{found.workdir}, step {found.step}',
    cfg,
    mesh,
    decoder_lib.Decoder(model, cfg, mesh, found.active),
    found.tokenizer,
  )


def check_rows(tokenizer, cfg: schema.CommandConfig) -> None:
  """Raises ConfigError if a tokenizer has more tokens than the model's vocabulary."""
  if tokenizer.vocab_size > cfg.model.vocab_size:
    raise fields.ConfigError(
      'data.tokenizer',
      tokenizer.name,
      f'has {tokenizer.vocab_size} tokens, the model has --model.vocab_size={cfg.model.vocab_size}',
    )


def tokenizer_of(given, saved: schema.Config, workdir: str):
  """Loads the run's tokenizer from its workdir or store; a given one must match it.
  Returns None for an import without a tokenizer."""
  recorded, name = saved.data.tokenizer, given.get('data.tokenizer')
  folder = paths.as_path(workdir) / 'tokenizer'
  if name and name != recorded:
    found = tokenizers.get(name)
  elif folder.is_dir():
    found = tokenizers.load(str(folder))
  elif recorded in ('', 'bytes'):
    return tokenizers.get('bytes') if recorded else None
  else:
    path = given.get('data.store', saved.data.store)
    first = parse.parse_stores(path)[0].path if path else ''
    found = store_lib.tokenizer_of(store_lib.open_store(first, verify=False))
  if recorded and not tokenizers.matches(found, recorded):
    raise fields.ConfigError(
      'data.tokenizer',
      name or found.name,
      f'is {tokenizers.recorded_name(found)}; the checkpoint was trained with {recorded}',
    )
  return found
