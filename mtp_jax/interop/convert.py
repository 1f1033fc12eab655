"""`mtp export` and `mtp import`: a checkpoint to another format, and back."""

import os

from mtp_jax.checkpoint import restore, saver
from mtp_jax.config import fields, schema, validate
from mtp_jax.data import tokenizers
from mtp_jax.decode import load
from mtp_jax.interop import config_json, files, hand_over, hf_folder, hub, mapping, tokens
from mtp_jax.io import paths
from mtp_jax.model import lm, next_token, params
from mtp_jax.parallel import sharding


def _absent(path: str) -> str:
  """Returns the absolute path of a new directory; raises InputError."""
  path = paths.absolute(path)
  target = paths.as_path(path)
  if target.exists() and not (target.is_dir() and not list(target.iterdir())):
    raise paths.InputError(path, 'is not empty; choose another directory')
  if paths.scheme(path):
    return path
  parent = os.path.dirname(path)
  if not os.path.isdir(parent):
    raise paths.InputError(path, f'no such directory: {parent}')
  return path


def _required(given: dict[str, object], flag: str) -> str:
  path = str(given.get(flag, ''))
  if not path:
    raise fields.ConfigError(flag, '', 'must be a directory')
  return path


HF = 'safetensors'
# For formats that need other libraries than safetensors: these libraries, and the
# extra that installs them.
LIBRARIES = {'meta': (('torch',), 'meta'), 'gguf': (('gguf', HF), 'gguf')}


def export(path: str, given: dict[str, object]) -> list[str]:
  """Exports a checkpoint to --export.out; returns the lines of a report."""
  out = _absent(_required(given, 'export.out'))
  form = str(given.get('export.format', 'hf'))
  if form not in mapping.FORMS:
    validate.configured(given)  # raises with the list of formats
  libraries, extra = LIBRARIES.get(form, ((HF,), 'hf'))
  for library in (*libraries, 'tokenizers'):
    files.need(library, extra)
  workdir, step, saved, cfg = load.open_checkpoint(paths.absolute(path), given)
  tokenizer = load.tokenizer_of(given, saved, workdir)
  if tokenizer is not None:
    load.check_rows(tokenizer, cfg)
  hf_folder.check(cfg, tokenizer)
  mesh = sharding.make_mesh(cfg)
  model = restore.restore_model(workdir, step, cfg, mesh)
  dtype = cfg.export.dtype
  lines = hf_folder.export(
    model,
    cfg,
    tokenizer,
    out,
    dtype=cfg.model.param_dtype if dtype == 'param' else dtype,
    about=f'{os.path.basename(workdir)}, step {step}',
  )
  if handed := hand_over.warning(model, cfg, tokenizer, mesh):
    lines.insert(1, handed)
  if cfg.heads.draft_vocab and cfg.heads.n > 1 and mapping.of(cfg) != 'hf':
    lines.insert(1, hand_over.of_all_tokens(cfg))
  if cut := tokens.warning(config_json.of(cfg), mapping.of(cfg), tokenizer):
    lines.insert(1, cut)
  trained = next_token.trained_heads(cfg, step)
  if trained < cfg.heads.n:
    lines.append(
      f'heads {trained + 1} to {cfg.heads.n} are not trained yet'
      f' (--loss.curriculum={cfg.loss.curriculum})'
    )
  return lines


# Flags that an import accepts.
ALLOWED = (
  'model.param_dtype',
  'model.compute_dtype',
  'model.remat',
  'model.attention',
  'heads.family',
  'data.seq_len',
  'data.batch_size',
  'mesh.',
  'train.',
  'import.',
)


def import_(given: dict[str, object]) -> list[str]:
  """Imports --import.path into --train.workdir; returns the lines of a report."""
  given_path = _required(given, 'import.path')
  path = given_path if hub.is_name(given_path) else paths.absolute(given_path)
  if hub.is_name(path):
    pass  # fetched once the flags are checked
  elif paths.scheme(path):
    raise paths.InputError(path, 'must be local; copy it to a local disk')
  elif not os.path.isdir(path):
    raise paths.InputError(path, 'is not a directory')
  for name, value in given.items():
    if not name.startswith(ALLOWED) or name == 'train.init_from':
      raise fields.ConfigError(name, value, 'is set by the imported model')
  workdir = _absent(_required(given, 'train.workdir'))
  saver.check_workdir(workdir)
  form = given.get('import.format', 'hf')
  if form not in hf_folder.DESCRIPTIONS:
    validate.configured(given)  # raises with the list of formats
  if form == 'meta':
    files.need('torch', 'meta')
  if hub.is_name(path):
    path = hub.fetch(path)
  cfg, ours = hf_folder.find(path, given)
  if cfg.export.format == 'meta':
    files.need('torch', 'meta')
  if ours:
    cfg = validate.configured(given, cfg)
  tokenizer, dropped = _tokenizer(path, cfg, ours)
  recorded = tokenizers.recorded_name(tokenizer) if tokenizer else ''
  cfg = schema.replace(
    cfg, **{'data.tokenizer': recorded, 'data.store': '', 'train.workdir': workdir}
  )
  model = hf_folder.read(path, cfg, sharding.make_mesh(cfg))
  if paths.scheme(workdir):  # the checkpoint is marked when it is complete
    saver.save_params(model, cfg, tokenizer, workdir)
  else:
    # Atomically, or a run would start from an incomplete checkpoint.
    with paths.new_folder(workdir) as tmp:
      saver.save_params(model, cfg, tokenizer, tmp)
  m = cfg.model
  return [
    f'{workdir}: {params.count(lm.specs(cfg)):,} parameters, {m.n_layers}'
    f' layers, {cfg.heads.n} head{"s" * (cfg.heads.n > 1)}'
    f' ({cfg.heads.family})'
    + ('' if tokenizer else _WITHOUT[cfg.import_.tokenizer])
    + (f'; without the tokens {", ".join(dropped)}' if dropped else '')
  ]


_WITHOUT = {'read': '; no tokenizer found: ids only', 'skip': '; without its tokenizer: ids only'}


def _tokenizer(path: str, cfg: schema.CommandConfig, ours: bool):
  """Returns (the tokenizer of a folder or None, added tokens dropped to make it fit).

  Raises:
    ConfigError: the tokenizer cannot be read or does not fit.
  """
  if cfg.import_.tokenizer == 'skip':
    return None, []

  def unfit(problem):
    return paths.InputError(
      path, f'{problem}; --import.tokenizer=skip imports the weights without it'
    )

  rows = cfg.model.vocab_size
  try:
    found = tokens.read(path, cfg.data.tokenizer if ours else None)
    if found is None:
      return None, []
    fitted, dropped = tokens.fitted(found, rows)
  except paths.InputError as error:
    name, problem = error.args[-2:]
    raise unfit(f'its tokenizer {name} {problem}') from error
  if fitted.vocab_size > rows:
    raise unfit(f'its tokenizer {found.name} has {found.vocab_size} tokens, the model {rows}')
  beyond = [i for i in fitted.stop_ids if i >= rows]
  if beyond:
    raise unfit(
      f'its tokenizer {found.name} has the end token {beyond[0]}, the model has {rows} tokens'
    )
  return fitted, dropped
