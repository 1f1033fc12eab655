"""Folders of a checkpoint format: written and verified, found and read."""

import dataclasses
import json
import math
import os
from typing import Any, cast

import jax
import numpy as np

from mtp_jax.config import draft_vocab, fields, parse, schema, validate
from mtp_jax.interop import (
  config_json,
  dialects,
  engines,
  files,
  fused,
  hf,
  llama_cpp,
  llama_cpp_vocabulary,
  mapping,
  meta,
  tokens,
  transforms,
)
from mtp_jax.io import jsonl, paths
from mtp_jax.model import lm, params

OURS = 'mtp_jax.json'
MOST_LAYERS = 10_000  # limit of plausible models


# Export.


def check(cfg: schema.CommandConfig, tokenizer) -> None:
  """Raises ConfigError if the format cannot represent the model or tokenizer."""
  name = cfg.export.verifier
  if name and cfg.export.format != 'speculators':
    raise fields.ConfigError('export.verifier', name, 'is of --export.format=speculators only')
  unfit = mapping.unfit(cfg, cfg.export.format)
  if not unfit and cfg.export.format == 'gguf':
    unfit = llama_cpp_vocabulary.check(tokenizer)
  if unfit:
    raise fields.ConfigError('export.format', cfg.export.format, unfit)


def export(
  model: lm.LM, cfg: schema.CommandConfig, tokenizer, out: str, *, dtype: str, about: str
) -> list[str]:
  """Writes a folder atomically, and verifies it by reading it back.

  Args:
    model: parameters; gathered one tensor at a time.
    cfg: config of the model; cfg.export has the format.
    tokenizer: a Tokenizer, or None.
    out: the folder, which must not exist.
    dtype: dtype of the tensors.
    about: title of the model card.

  Returns:
    lines that describe what was written.

  Raises:
    ConfigError: the format cannot represent the model.
  """
  check(cfg, tokenizer)
  if cfg.export.format == 'speculators':
    cfg = schema.replace(cfg, **{'export.verifier': cfg.export.verifier or out})
  form = mapping.of(cfg)
  describe = meta.describe if form == 'meta' else hf.describe
  written = {name: text.encode() for name, text in describe(cfg, tokenizer, dtype, about).items()}
  written[OURS] = _definition(cfg).encode()
  if tokenizer is not None:
    written |= tokens.files_of(tokenizer)
  with paths.new_folder(out) as tmp:
    expected = _write_tensors(model, cfg, tokenizer, tmp, dtype=dtype, about=about)
    extra = sum(place.extra for place in mapping.tensors(cfg, form).values())
    _check(tmp, cfg, expected, extra > 0)
    for name, data in written.items():
      path = os.path.join(tmp, name)
      os.makedirs(os.path.dirname(path), exist_ok=True)
      with open(path, 'wb') as file:
        file.write(data)
  where = mapping.FORMS[form].file if extra else ''
  lines = [
    f'{out}: {len(expected) - extra} tensors of a {config_json.prefix(cfg)} with'
    f' {mapping.layers_in_all(cfg)} layers in {dtype}, {extra} of further heads'
    f'{f" in {where}" if where else ""}; all verified by reading them back'
  ]
  if form == 'gguf' and cfg.heads.n > 1:
    lines.append(f'llama.cpp cannot draft with these heads: {mapping.undrafted(cfg)}')
  command = engines.run_by(form, out, cfg.heads.n - 1)
  if command and tokenizer is not None:
    lines.append(f'run it: {command}')
  return lines


def _definition(cfg: schema.CommandConfig) -> str:
  """Returns OURS: the Config, without paths, and the format."""
  of_model = schema.Config(
    model=cfg.model,
    heads=cfg.heads,
    loss=cfg.loss,
    optim=cfg.optim,
    data=dataclasses.replace(cfg.data, store='', documents=''),
  )
  of_format = dict(export=dict(format=cfg.export.format))
  return json.dumps(json.loads(parse.to_json(of_model)) | of_format, indent=1)


def _defined(text: str) -> schema.CommandConfig:
  """Returns the Config of `_definition`, validated."""
  cfg = schema.command_config(parse.from_json(text))
  form = jsonl.loads(text, {'export?': {'format?': str, ...: object}, ...: object})
  values = {'export.format': form.get('export', {}).get('format', 'hf')}
  return validate.validate(schema.replace(cfg, **values))


def _write_tensors(model, cfg, tokenizer, folder, *, dtype, about) -> dict[str, str]:
  """Writes the tensors; returns the digest of each."""
  form, leaves, digests = mapping.of(cfg), params.by_path(model), {}
  extra_file = mapping.FORMS[form].file
  places = mapping.tensors(cfg, form)
  extra: dict[str, np.ndarray] = {}

  def dtype_of(shape):
    if form in llama_cpp.FORMS:
      return llama_cpp.dtype_of(shape, dtype)
    return np.dtype(dtype)

  def array_of(place):
    leaf = leaves[place.path]
    ours = leaf if place.index is None else leaf[place.index]
    array = place.form.out(np.asarray(jax.device_get(ours)), cfg)
    return np.ascontiguousarray(array.astype(dtype_of(array.shape)))

  def arrays():
    for name, place in places.items():
      array = array_of(place)
      digests[name] = files.digest(array)
      if place.extra and extra_file:
        extra[os.path.basename(name)] = array
      else:
        yield name, array

  beside = os.path.dirname(extra_file)
  if form == 'meta':
    files.write_torch(os.path.join(folder, meta.TENSORS), dict(arrays()))
  elif form in llama_cpp.FORMS:
    shapes = {
      name: place.form.shape(leaves[place.path].shape[place.index is not None :])
      for name, place in places.items()
      if not (place.extra and extra_file)
    }
    llama_cpp.write(
      os.path.join(folder, llama_cpp.TENSORS),
      cfg,
      tokenizer,
      about=about,
      shapes={name: (shape, dtype_of(shape)) for name, shape in shapes.items()},
      arrays=arrays(),
    )
  else:
    in_file = fused.joined(arrays(), dialects.DIALECTS[config_json.of(cfg)])
    shards = _write_shards(folder, in_file, cfg.export.max_shard_gib * 2**30)
    _name_shards(folder, shards, indexed=bool(extra) and not beside)
  if extra and form == 'hf' and (d2t := _d2t(cfg)) is not None:
    extra[files.D2T], digests[files.D2T] = d2t, files.digest(d2t)
  if extra:
    os.makedirs(os.path.join(folder, beside), exist_ok=True)
    files.write(os.path.join(folder, extra_file), extra)
  return digests


def _d2t(cfg) -> np.ndarray | None:
  """Returns the draft vocabulary as EAGLE-3 checkpoints have it, token id - index in it."""
  ids_X = draft_vocab.of(cfg)
  return None if ids_X is None else ids_X.astype(np.int64) - np.arange(len(ids_X))


def _write_shards(folder: str, arrays, limit: float) -> list[list[str]]:
  """Writes the arrays to files of at most `limit` bytes, as they come; returns the
  names in each file."""
  shards: list[list[str]] = []
  batch: dict[str, np.ndarray] = {}

  def flush():
    shards.append(list(batch))
    files.write(_shard(folder, len(shards)), batch)
    batch.clear()

  for name, array in arrays:
    if batch and sum(x.nbytes for x in batch.values()) + array.nbytes > limit:
      flush()
    batch[name] = array
  flush()
  return shards


def _shard(folder: str, number: int) -> str:
  return os.path.join(folder, f'part-{number}')


def _name_shards(folder: str, shards: list[list[str]], indexed: bool) -> None:
  """Renames the files as transformers does, given their number.

  indexed: writes an index even for one file. Without it, vLLM loads every file of
  the folder as a part of the Llama.
  """
  n = len(shards)
  if n == 1 and not indexed:
    os.rename(_shard(folder, 1), os.path.join(folder, files.WHOLE))
    return
  total, weight_map = 0, {}
  for i, names in enumerate(shards, 1):
    name = files.WHOLE if n == 1 else f'model-{i:05d}-of-{n:05d}.safetensors'
    path = os.path.join(folder, name)
    os.rename(_shard(folder, i), path)
    total += sum(math.prod(x.shape) * x.dtype.itemsize for x in files.read(path).values())
    weight_map |= dict.fromkeys(names, name)
  index = dict(metadata=dict(total_size=total), weight_map=weight_map)
  with open(os.path.join(folder, files.INDEX), 'w', encoding='utf-8') as file:
    json.dump(index, file, indent=2)


def _check(folder, cfg, expected: dict[str, str], extra: bool) -> None:
  """Reads the files back; raises InputError unless keys and bytes are equal."""
  found = _tensors_of(folder, cfg, extra)
  if found.keys() != expected.keys():
    odd = sorted(found.keys() ^ expected.keys())
    raise paths.InputError(folder, f'missing or unexpected after writing: {odd[0]}')
  for name, tensor in found.items():
    if files.digest(np.array(tensor.read())) != expected[name]:
      raise paths.InputError(folder, f'{name} differs from what was written')


def _tensors_of(
  folder: str, cfg: schema.CommandConfig, extra: bool
) -> dict[str, files.Tensor] | dict[str, files.Loaded]:
  """Returns the tensors of a folder; with extra, including those in the separate
  file of further heads, if the format has one."""
  form = mapping.of(cfg)
  if form == 'meta':
    return meta.tensors_of(folder)
  if form in llama_cpp.FORMS:
    found = llama_cpp.read(folder, cfg)
  else:
    found = fused.split(files.read_folder(folder), dialects.DIALECTS[config_json.of(cfg)])
  file = mapping.FORMS[form].file
  if extra and file:
    beside = os.path.dirname(file)
    more = files.read(os.path.join(folder, file))
    found |= {os.path.join(beside, name): x for name, x in more.items()}
  return found


# Import.


def find(folder: str, given: dict) -> tuple[schema.CommandConfig, bool]:
  """Returns (Config of a folder's model, whether mtp_jax wrote it). Its
  export.format is the format of the folder.

  given: flags; --heads.family decides whether the last layer becomes head 1 or
  stays in the trunk.

  Raises:
    ConfigError: no description, or an unsupported architecture (with the field).
  """
  expected = given.get('import.format', 'hf')

  def load(name):
    try:
      with open(os.path.join(folder, name), 'rb') as file:
        return jsonl.loads(file.read(), {...: object})
    except OSError as error:
      other = 'hf' if expected == 'meta' else 'meta'
      found_other = os.path.exists(os.path.join(folder, DESCRIPTIONS[other]))
      raise _error(
        folder,
        f'{name} cannot be read: {error.strerror}'
        + (f'; use --import.format={other} for this folder' if found_other else ''),
      ) from error
    except ValueError as error:
      raise _error(folder, f'{name}: {error}') from error

  made_here = os.path.exists(os.path.join(folder, OURS))
  if not made_here or expected == 'meta':
    about = load(DESCRIPTIONS[expected])
  if made_here:
    try:
      ours = _defined(json.dumps(load(OURS)))
    except ValueError as error:
      raise _error(folder, f'{OURS}: {error}') from error
    family = given.get('heads.family', ours.heads.family)
    if ours.heads.n > 1 and family != ours.heads.family:
      raise fields.ConfigError('heads.family', family, f'{OURS} has {ours.heads.family}')
    _check_layers(folder, OURS, 'n_layers', ours.model.n_layers)
    _check_layers(folder, OURS, 'heads.n', ours.heads.n)
    if unfit := mapping.unfit(ours, ours.export.format):
      raise _error(folder, f'{OURS}: {ours.export.format} {unfit}')
    return ours, True
  for field in LAYERS:
    _check_layers(folder, DESCRIPTIONS[expected], field, about.get(field))
  cfg = (meta if expected == 'meta' else hf).read(folder, about, given)
  if 'heads.family' not in given and _repeated(folder, cfg):
    cfg = schema.replace(cfg, **{'heads.family': 'recursive'})
  unfit = mapping.unfit(cfg, cfg.export.format)
  if unfit:
    raise _error(folder, f'{cfg.export.format} {unfit}')
  return cfg, False


LAYERS = (
  *('num_hidden_layers', 'prediction_heads', 'n_layers', 'n_future_tokens'),
  *('num_mtp_layers', 'num_nextn_predict_layers'),
)


def _repeated(folder: str, cfg: schema.CommandConfig) -> bool:
  """Whether all modules of a transformers_mtp folder are equal."""
  if cfg.export.format != 'transformers_mtp' or cfg.heads.n < 3:
    return False
  found = files.read_folder(folder)
  one = schema.replace(cfg, **{'heads.family': 'recursive'})
  places = mapping.tensors(one, 'transformers_mtp')
  first = {(p.path, p.index): k for k, p in places.items() if not p.copy}
  return all(
    name in found
    and first[place.path, place.index] in found
    and np.array_equal(found[name].read(), found[first[place.path, place.index]].read())
    for name, place in places.items()
    if place.copy
  )


def _check_layers(folder: str, file: str, field: str, value) -> None:
  """Raises InputError for an implausible size, before listing tensor names."""
  if isinstance(value, int) and value > MOST_LAYERS:
    raise _error(folder, f'{field}={value} in {file}; at most {MOST_LAYERS:,}')


DESCRIPTIONS = {'hf': 'config.json', 'meta': 'params.json'}


HEAD = 'lm_head.weight'
EMBEDDING = 'model.embed_tokens.weight'


def _error(folder: str, problem: str) -> paths.InputError:
  return paths.InputError(folder, problem)


def read(folder: str, cfg: schema.CommandConfig, mesh) -> lm.LM:
  """Loads the parameters, one leaf at a time, directly to the shards of each device.

  Raises:
    ConfigError: a tensor is missing, unexpected, of a wrong shape, or differs
      from the tensor of which it must be a copy.
  """
  expected = mapping.tensors(cfg, mapping.of(cfg))
  extra = any(place.extra for place in expected.values())
  found = _tensors_of(folder, cfg, extra)
  abstract = params.abstract(lm.specs(cfg), cfg.model.param_dtype, mesh)
  leaves = params.by_path(abstract)
  head = found.pop(HEAD, None) if cfg.heads.unembedding == 'tied' else None
  d2t, ours = found.pop(files.D2T, None), _d2t(cfg)
  if d2t is not None and (ours is None or not np.array_equal(d2t.read(), ours)):
    raise _error(folder, f'{files.D2T} is not the --heads.draft_vocab of its configuration')
  found = {
    name: x for name, x in found.items() if not name.endswith(('rotary_emb.inv_freq', 'rope.freqs'))
  }
  for odd, problem in (
    (expected.keys() - found.keys(), 'is missing'),
    (found.keys() - expected.keys(), 'is not part of this model'),
  ):
    if odd:
      raise _error(folder, f'{min(odd)} {problem}')
  names: dict[str, dict] = {}
  for name, place in expected.items():
    shape = leaves[place.path].shape
    shape = place.form.shape(shape if place.index is None else shape[1:])
    if found[name].shape != shape:
      raise _error(folder, f'{name} has shape {found[name].shape}, the model {shape}')
    if not place.copy:
      names.setdefault(place.path, {})[place.index] = name
  _check_copies(folder, cfg, found, expected, names)
  # Some programs write the embedding twice.
  if head and not np.array_equal(head.read(), found[EMBEDDING].read()):
    raise _error(
      folder,
      f'{HEAD} differs from {EMBEDDING}, although config.json has'
      ' tie_word_embeddings=true; set it to false to import both',
    )

  def leaf(path, target):
    of_index = names[jax.tree_util.keystr(path, simple=True, separator='.')]

    def shard(index):
      return _shard_of(
        folder, index, target, of_index=of_index, found=found, expected=expected, cfg=cfg
      )

    # Block, or its host copy would be live together with the next leaf's.
    return jax.block_until_ready(jax.make_array_from_callback(target.shape, target.sharding, shard))

  return jax.tree_util.tree_map_with_path(leaf, abstract)


def _check_copies(folder, cfg, found, expected, names) -> None:
  for name, place in expected.items():
    if not place.copy:
      continue
    first = names[place.path][place.index]
    ours = expected[first].form.back(found[first].read(), cfg)
    if not np.array_equal(place.form.out(ours, cfg), found[name].read()):
      raise _error(
        folder,
        f'{name} must be 0'
        if place.form is transforms.NO_BIAS
        else f'{name} must be equal to {first}',
      )


def _shard_of(folder, index, target, *, of_index, found, expected, cfg) -> Any:
  """Returns one device's shard of a leaf, reading its tensors one by one."""

  def ours(name, index):
    part = expected[name].form.back(found[name].read(), cfg)[index]
    with np.errstate(over='ignore'):  # overflows to inf
      part = part.astype(target.dtype)
    if not files.all_finite(part):
      raise _error(
        folder,
        f'{name} in {os.path.basename(found[name].path)} has values that are'
        f' NaN or infinite in {target.dtype.name}',
      )
    return part

  if None in of_index:
    return np.ascontiguousarray(ours(of_index[None], index))
  first, *rest = index
  rows = range(target.shape[0])[first]
  shape = target.sharding.shard_shape(target.shape)
  out = np.empty((len(rows), *shape[1:]), target.dtype)
  for row, i in zip(cast(Any, out), rows, strict=True):
    row[...] = ours(of_index[i], tuple(rest))
  return out
