"""Checkpoints in Hugging Face's Llama form, out and in. Floor 4.

Out: trunk and head 1 are a plain LlamaForCausalLM; the further heads lie beside
it in mtp_heads.safetensors, under the names that mapping.py lists, and
mtp_jax.json says what the whole is, so that it can be read back bit for bit.
In: that, or any Llama: its last layer becomes head 1.
"""

import dataclasses
import json
import os
import shutil
from typing import Any

import jax
import numpy as np

from mtp_jax import config, params, validate
from mtp_jax.data import tokenizers
from mtp_jax.interop import files, mapping, tokens
from mtp_jax.model import lm

OURS, EXTRA = 'mtp_jax.json', 'mtp_heads.safetensors'
INDEX = 'model.safetensors.index.json'


# Out.


def export(
  model: lm.LM, cfg: config.Config, tokenizer, out: str, *, dtype: str,
  shard_bytes: float, about: str,
) -> list[str]:  # fmt: skip
  """Writes a folder, complete or not at all, and reads it again.

  Args:
    model: parameters; gathered a tensor at a time.
    cfg: what they are.
    tokenizer: a Tokenizer, or None.
    out: the folder, which must not exist.
    dtype: of the tensors.
    shard_bytes: of a file, at most, unless a tensor is larger.
    about: what the model card says it is.

  Returns:
    lines that say what was written.
  """
  tmp = f'{out}.tmp-{os.getpid()}'
  shutil.rmtree(tmp, ignore_errors=True)
  os.makedirs(tmp)
  try:
    wanted = _write_tensors(model, cfg, tmp, dtype, shard_bytes)
    _check(tmp, wanted)
    texts = {
      'config.json': json.dumps(to_llama(cfg, tokenizer, dtype), indent=2),
      'generation_config.json': json.dumps(_ends(tokenizer), indent=2),
      OURS: config.to_json(cfg),
      'README.md': _card(cfg, about),
    }
    written = {name: text.encode() for name, text in texts.items()}
    if tokenizer is not None:
      written |= tokens.files_of(tokenizer)
    for name, data in written.items():
      with open(os.path.join(tmp, name), 'wb') as file:
        file.write(data)
    os.rename(tmp, out)
  finally:
    shutil.rmtree(tmp, ignore_errors=True)
  extra = sum(place.extra for place in mapping.tensors(cfg).values())
  return [
    f'{out}: {len(wanted) - extra} tensors of a Llama of'
    f' {mapping.layers_in_all(cfg)} layers in {dtype}, {extra} of further heads'
    f' in {EXTRA}; all read again and equal',
  ]


def _write_tensors(model, cfg, folder, dtype, shard_bytes) -> dict[str, str]:
  """Digest of each tensor written."""
  leaves, digests, held = mapping.leaves(model), {}, 0
  shards: list[list[str]] = []
  batch: dict[str, np.ndarray] = {}
  weight_map: dict[str, int] = {}

  def flush():
    nonlocal batch, held
    if batch:
      shards.append(list(batch))
      files.write(_shard(folder, len(shards)), batch)
    batch, held = {}, 0

  extra = {}
  for name, place in mapping.tensors(cfg).items():
    leaf = leaves[place.path]
    ours = leaf if place.index is None else leaf[place.index]
    array = place.form.out(np.asarray(jax.device_get(ours)), cfg)
    array = np.ascontiguousarray(array.astype(np.dtype(dtype)))
    digests[name] = files.digest(array)
    if place.extra:
      extra[name] = array
      continue
    if held + array.nbytes > shard_bytes:
      flush()
    batch[name] = array
    held += array.nbytes
    weight_map[name] = len(shards) + 1
  flush()
  if extra:
    files.write(os.path.join(folder, EXTRA), extra)
  _name_shards(folder, len(shards), weight_map)
  return digests


def _shard(folder: str, number: int) -> str:
  return os.path.join(folder, f'part-{number}')


def _name_shards(folder, n: int, weight_map) -> None:
  """As transformers names them, once it is known how many there are."""
  if n == 1:
    os.rename(_shard(folder, 1), os.path.join(folder, 'model.safetensors'))
    return
  names = {i: f'model-{i:05d}-of-{n:05d}.safetensors' for i in range(1, n + 1)}
  total = 0
  for i, name in names.items():
    path = os.path.join(folder, name)
    os.rename(_shard(folder, i), path)
    total += os.path.getsize(path)
  index = dict(
    metadata=dict(total_size=total),
    weight_map={name: names[i] for name, i in weight_map.items()},
  )
  with open(os.path.join(folder, INDEX), 'w', encoding='utf-8') as file:
    json.dump(index, file, indent=2)


def _check(folder: str, wanted: dict[str, str]) -> None:
  """What was written, read again: the same keys, the same bytes."""
  found = files.read_folder(folder, 'export.out')
  if found.keys() != wanted.keys():
    odd = sorted(found.keys() ^ wanted.keys())
    raise config.ConfigError(
      'export.out', folder, f'missing or surplus after writing: {odd[0]}'
    )
  for name, tensor in found.items():
    if files.digest(np.array(tensor.read())) != wanted[name]:
      raise config.ConfigError(
        'export.out', folder, f'{name} is not what was written'
      )


def to_llama(cfg: config.Config, tokenizer, dtype: str) -> dict:
  """config.json of trunk and head 1."""
  m = cfg.model
  rope = dict(rope_type='default', rope_theta=m.rope_theta)
  if m.rope_factor > 1:
    rope |= dict(
      rope_type='llama3', factor=m.rope_factor,
      low_freq_factor=m.rope_low_freq, high_freq_factor=m.rope_high_freq,
      original_max_position_embeddings=m.rope_context,
    )  # fmt: skip
  return dict(
    architectures=['LlamaForCausalLM'],
    model_type='llama',
    attention_bias=False,
    attention_dropout=0.0,
    mlp_bias=False,
    hidden_act='silu',
    hidden_size=m.d_model,
    intermediate_size=m.ff_width,
    num_hidden_layers=mapping.layers_in_all(cfg),
    num_attention_heads=m.n_attn_heads,
    num_key_value_heads=m.kv_heads,
    head_dim=m.head_width,
    max_position_embeddings=cfg.data.seq_len,
    rms_norm_eps=m.norm_eps,
    rope_parameters=rope,
    # As transformers before 5 read them.
    rope_theta=m.rope_theta,
    rope_scaling=rope if m.rope_factor > 1 else None,
    tie_word_embeddings=cfg.heads.unembedding == 'tied',
    vocab_size=m.vocab_size,
    dtype=dtype,
    torch_dtype=dtype,
    **_ends(tokenizer),
  )


def _ends(tokenizer) -> dict:
  if tokenizer is None:
    return {}
  return dict(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos)


def _card(cfg: config.Config, about: str) -> str:
  extra = [k for k, p in mapping.tensors(cfg).items() if p.extra]
  lines = [
    '---', 'library_name: transformers', 'tags: [multi-token-prediction]',
    '---', '', f'# {about}', '',
    f'A Llama of {mapping.layers_in_all(cfg)} layers, the trunk and next-token'
    ' head of a model that was trained to predict'
    f' {cfg.heads.n} tokens at once ({cfg.heads.family} heads; Gloeckle et al.'
    ' 2024, https://arxiv.org/abs/2404.19737). Written by mtp_jax.', '',
  ]  # fmt: skip
  if extra:
    lines += [
      f'Its {len(extra)} further tensors, the heads that predict later tokens,'
      f' are in {EXTRA}; {OURS} says how they are put together.',
      '',
    ]
  return '\n'.join(lines)


# In.

# Fields of a config.json that must have this value, if they are there.
FIXED = {
  'model_type': 'llama', 'hidden_act': 'silu', 'attention_bias': False,
  'mlp_bias': False,
}  # fmt: skip


def find(folder: str, given: dict) -> tuple[config.Config, bool]:
  """(Config of a folder's model, whether mtp_jax wrote it).

  given: flags, of which --heads.family says whether the last layer becomes
  head 1 or stays in the trunk.

  Raises:
    ConfigError: no config.json, or an architecture that is none of ours, by the
      field that says so.
  """

  def load(name):
    try:
      with open(os.path.join(folder, name), encoding='utf-8') as file:
        return file.read()
    except OSError as error:
      raise _error(
        folder, f'{name} cannot be read: {error.strerror}'
      ) from error

  if os.path.exists(os.path.join(folder, OURS)):
    ours = config.from_json(load(OURS))
    return dataclasses.replace(ours, processes=config.Processes()), True
  try:
    about = json.loads(load('config.json'))
  except ValueError as error:
    raise _error(folder, 'config.json is no JSON') from error
  return from_llama(folder, about, given), False


def _error(folder: str, problem: str) -> config.ConfigError:
  return config.ConfigError('import.path', folder, problem)


def from_llama(folder: str, about: dict, given: dict) -> config.Config:
  for field, wanted in FIXED.items():
    if about.get(field, wanted) != wanted:
      raise _error(
        folder, f'{field}={about[field]!r} in config.json; only {wanted!r}'
      )
  missing = [
    field for field in (
      'hidden_size', 'num_hidden_layers', 'num_attention_heads',
      'intermediate_size', 'vocab_size',
    ) if field not in about
  ]  # fmt: skip
  if missing:
    raise _error(folder, f'config.json has no {missing[0]}')
  heads, d_model = about['num_attention_heads'], about['hidden_size']
  head_dim = about.get('head_dim') or d_model // heads
  values = {
    'model.d_model': d_model,
    'model.n_layers': about['num_hidden_layers'],
    'model.n_attn_heads': heads,
    'model.n_kv_heads': about.get('num_key_value_heads') or heads,
    'model.d_head': 0 if head_dim * heads == d_model else head_dim,
    'model.d_ff': about['intermediate_size'],
    'model.vocab_size': about['vocab_size'],
    'model.norm_eps': about.get('rms_norm_eps', 1e-6),
    'heads.n': 1,
    'heads.unembedding': (
      'tied' if about.get('tie_word_embeddings', False) else 'shared'
    ),
    'data.seq_len': about.get('max_position_embeddings', 2048),
    **_rope(folder, about),
    **given,
  }
  return validate.validate(config.replace(config.Config(), **values))


def _rope(folder: str, about: dict) -> dict:
  """Of rope_parameters, or of rope_theta and rope_scaling before them."""
  rope = about.get('rope_parameters') or about.get('rope_scaling') or {}
  theta = rope.get('rope_theta', about.get('rope_theta', 10_000.0))
  kind = rope.get('rope_type', rope.get('type', 'default'))
  values = {'model.rope_theta': float(theta)}
  if kind == 'default':
    return values
  if kind != 'llama3':
    raise _error(
      folder, f'rope_type={kind!r} in config.json; only default and llama3'
    )
  return values | {
    'model.rope_factor': float(rope['factor']),
    'model.rope_low_freq': float(rope['low_freq_factor']),
    'model.rope_high_freq': float(rope['high_freq_factor']),
    'model.rope_context': int(rope['original_max_position_embeddings']),
  }


def tokenizer_of(folder: str) -> tokenizers.Tokenizer | None:
  names = (tokens.MODEL, 'tokenizer.json', tokenizers.ENDS)
  found = {}
  for name in names:
    path = os.path.join(folder, name)
    if os.path.exists(path):
      with open(path, 'rb') as file:
        found[name] = file.read()
  return tokens.read(found)


def read(folder: str, cfg: config.Config, mesh) -> lm.LM:
  """The parameters, a leaf at a time, straight to the shards of each device.

  Raises:
    ConfigError: a tensor is missing, left over, or of another shape.
  """
  found = files.read_folder(folder, 'import.path')
  abstract = params.abstract(lm.specs(cfg), cfg.model.param_dtype, mesh)
  leaves = mapping.leaves(abstract)
  wanted = mapping.tensors(cfg)
  if cfg.heads.unembedding == 'tied':
    found.pop('lm_head.weight', None)  # some write the embedding twice
  found = {
    name: x for name, x in found.items()
    if not name.endswith('rotary_emb.inv_freq')
  }  # fmt: skip
  for odd, said in (
    (wanted.keys() - found.keys(), 'is missing'),
    (found.keys() - wanted.keys(), 'has no place in this model'),
  ):
    if odd:
      raise _error(folder, f'{min(odd)} {said}')
  names: dict[str, dict] = {}
  for name, place in wanted.items():
    leaf = leaves[place.path]
    shape = leaf.shape if place.index is None else leaf.shape[1:]
    if found[name].shape != place.form.shape(shape):
      raise _error(
        folder,
        f'{name} has shape {found[name].shape}, the model'
        f' {place.form.shape(shape)}',
      )
    names.setdefault(place.path, {})[place.index] = name

  def leaf(path, target):
    of_index = names[jax.tree_util.keystr(path, simple=True, separator='.')]

    def shard(index):
      return _shard_of(index, target, of_index, found, wanted, cfg)

    return jax.make_array_from_callback(target.shape, target.sharding, shard)

  return jax.tree_util.tree_map_with_path(leaf, abstract)


def _shard_of(index, target, of_index, found, wanted, cfg) -> Any:
  """One device's part of a leaf, its tensors read one after the other."""

  def ours(name):
    return wanted[name].form.back(found[name].read(), cfg)

  if None in of_index:
    part = ours(of_index[None])[index]
    return np.ascontiguousarray(part.astype(target.dtype))
  first, *rest = index
  rows = range(target.shape[0])[first]
  return np.stack(
    [ours(of_index[i])[tuple(rest)].astype(target.dtype) for i in rows]
  )
