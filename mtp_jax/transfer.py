"""`mtp export` and `mtp import`. Floor 5."""

import os

from mtp_jax import checkpoint, config, flags, generate, params, paths, sharding
from mtp_jax.data import tokenizers
from mtp_jax.interop import files, folder, mapping, tokens
from mtp_jax.model import lm
from mtp_jax.train import begin


def _absent(flag: str, path: str) -> str:
  if not path:
    raise config.ConfigError(flag, '', 'give a directory')
  path = paths.absolute(path, flag)
  there = paths.of(path)
  if there.exists() and not (there.is_dir() and not list(there.iterdir())):
    raise config.ConfigError(flag, path, 'is not empty; give another directory')
  if paths.scheme(path):
    return path
  parent = os.path.dirname(path)
  if not os.path.isdir(parent):
    raise config.ConfigError(flag, path, f'there is no {parent}')
  return path


HF = 'safetensors'
# Of the forms that safetensors does not write alone, the libraries that do, and
# the extra that installs them.
LIBRARIES = {'meta': (('torch',), 'meta'), 'gguf': (('gguf', HF), 'gguf')}


def export(parsed: flags.Parsed) -> list[str]:
  """Writes --export.out from --export.checkpoint."""
  path = parsed.given.get('export.checkpoint', '')
  if not path:
    raise config.ConfigError('export.checkpoint', '', 'give a workdir')
  out = _absent('export.out', parsed.given.get('export.out', ''))
  form = parsed.given.get('export.format', 'hf')
  if form not in mapping.FORMS:
    parsed.config()  # says which there are
  libraries, extra = LIBRARIES.get(form, ((HF,), 'hf'))
  for library in (*libraries, 'tokenizers'):
    files.need('export.format', form, library, extra)
  path = paths.absolute(path, 'export.checkpoint')
  workdir, step, saved, cfg = checkpoint.opened(path, 'export.checkpoint', parsed)
  tokenizer = generate.tokenizer_of(parsed, saved, workdir)
  if tokenizer is not None:
    generate.check_rows(tokenizer, cfg)
  folder.check(cfg, tokenizer)
  model = checkpoint.restore_model(
    workdir, step, cfg, sharding.serving_mesh(cfg), 'export.checkpoint'
  )
  dtype = cfg.export.dtype
  lines = folder.export(
    model,
    cfg,
    tokenizer,
    out,
    dtype=cfg.model.param_dtype if dtype == 'param' else dtype,
    about=f'{os.path.basename(workdir)}, step {step}',
  )
  trained = begin.trained_heads(cfg, step)
  if trained < cfg.heads.n:
    lines.append(
      f'heads {trained + 1} to {cfg.heads.n} have not trained yet'
      f' (--loss.curriculum={cfg.loss.curriculum})'
    )
  return lines


# What a flag may say of an imported model.
GIVEN = (
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


def import_(parsed: flags.Parsed) -> list[str]:
  """Writes --train.workdir from --import.path."""
  path = parsed.given.get('import.path', '')
  if not path:
    raise config.ConfigError('import.path', '', 'give a directory')
  path = paths.absolute(path, 'import.path')
  if paths.scheme(path):
    raise config.ConfigError('import.path', path, 'copy it to a disk of this machine')
  if not os.path.isdir(path):
    raise config.ConfigError('import.path', path, 'is no directory')
  for name, value in parsed.given.items():
    if not name.startswith(GIVEN) or name == 'train.init_from':
      raise config.ConfigError(name, value, 'an import takes that from what it reads')
  workdir = _absent('train.workdir', parsed.given.get('train.workdir', ''))
  checkpoint.check_workdir(workdir)
  form = parsed.given.get('import.format', 'hf')
  if form not in folder.DESCRIPTIONS:
    parsed.config()  # says which there are
  if form == 'meta':
    files.need('import.format', form, 'torch', 'meta')
  cfg, ours = folder.find(path, parsed.given)
  if cfg.export.format == 'meta':
    files.need('import.path', path, 'torch', 'meta')
  if ours:
    cfg = parsed.config(cfg)
  tokenizer, dropped = _tokenizer(path, cfg, ours)
  recorded = tokenizers.recorded_name(tokenizer) if tokenizer else ''
  cfg = config.replace(
    cfg, **{'data.tokenizer': recorded, 'data.store': '', 'train.workdir': workdir}
  )
  model = folder.read(path, cfg, sharding.serving_mesh(cfg))
  if paths.scheme(workdir):  # the checkpoint is marked when it is complete
    checkpoint.save_params(model, cfg, tokenizer, workdir)
  else:
    # At once, or a run would begin with half of it, that is with nothing.
    with paths.new_folder(workdir) as tmp:
      checkpoint.save_params(model, cfg, tokenizer, tmp)
  m = cfg.model
  return [
    f'{workdir}: {params.count(lm.specs(cfg)):,} parameters, {m.n_layers}'
    f' layers, {cfg.heads.n} head{"s" * (cfg.heads.n > 1)}'
    f' ({cfg.heads.family})'
    + ('' if tokenizer else _WITHOUT[cfg.import_.tokenizer])
    + (f'; without the tokens {", ".join(dropped)}' if dropped else '')
  ]


_WITHOUT = {
  'read': '; no tokenizer was there: ids only',
  'skip': '; without its tokenizer: ids only',
}


def _tokenizer(path: str, cfg: config.Config, ours: bool):
  """(the tokenizer of a folder or None, added tokens dropped to make it fit).

  Raises:
    ConfigError: there is one, but it cannot be read or does not fit.
  """
  if cfg.import_.tokenizer == 'skip':
    return None, []

  def unfit(problem):
    return config.ConfigError(
      'import.path', path, f'{problem}; --import.tokenizer=skip imports the weights without it'
    )

  rows = cfg.model.vocab_size
  try:
    found = tokens.read(path, cfg.data.tokenizer if ours else None)
    if found is None:
      return None, []
    fitted, dropped = tokens.fitted(found, rows)
  except config.ConfigError as error:
    _, name, problem = error.args
    raise unfit(f'its tokenizer {name} {problem}') from error
  if fitted.vocab_size > rows:
    raise unfit(f'its tokenizer {found.name} has {found.vocab_size} tokens, the model {rows}')
  beyond = [i for i in fitted.stop_ids if i >= rows]
  if beyond:
    raise unfit(
      f'its tokenizer {found.name} ends texts with {beyond[0]}, the model has {rows} tokens'
    )
  return fitted, dropped
