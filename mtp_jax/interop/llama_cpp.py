"""GGUF files of llama.cpp: written and read (https://github.com/ggml-org/llama.cpp)."""

import math
import os
import pathlib
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from mtp_jax.config import schema
from mtp_jax.interop import architectures, config_json, files, llama_cpp_vocabulary, mapping
from mtp_jax.io import paths
from mtp_jax.model import heads as heads_lib
from mtp_jax.model import layers

TENSORS = 'model.gguf'
# The architecture of files with modules.
MIMO2 = architectures.Architecture('mimo2', fused={'attn_qkv': ('attn_q', 'attn_k', 'attn_v')})
# Scaling of RoPE frequencies: not a parameter, computed from the flags.
FREQUENCIES = 'rope_freqs.weight'


def _fused(arch: architectures.Architecture, name: str) -> tuple[str, int]:
  """Returns (the tensor that contains a name, how many it contains)."""
  layer, _, last = name.removesuffix('.weight').rpartition('.')
  for whole, parts in arch.fused.items():
    if last in parts:
      return f'{layer}.{whole}.weight', len(parts)
  return name, 1


def dtype_of(shape: tuple[int, ...], dtype: str) -> np.dtype:
  """Returns the dtype in the file; llama.cpp requires norms in float32."""
  return np.dtype(np.float32 if len(shape) == 1 else dtype)


# Export.


def write(
  path: str,
  cfg: schema.CommandConfig,
  tokenizer,
  *,
  about: str,
  shapes: dict[str, tuple[tuple[int, ...], np.dtype]],
  arrays: Iterable[tuple[str, np.ndarray]],
) -> None:
  """Writes a GGUF file, one tensor at a time.

  Args:
    path: path of the file.
    cfg: config of the model.
    tokenizer: a Tokenizer that passed `check`, or None.
    about: name of the model in the file.
    shapes: shape and dtype of each tensor, by the names of mapping.py.
    arrays: the tensors, in the same order.
  """
  import gguf

  arch = _architecture(cfg)
  whole: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
  for name, (shape, dtype) in shapes.items():
    name, several = _fused(arch, name)
    if several > 1 and name in whole:
      shape = (whole[name][0][0] + shape[0], *shape[1:])
    whole[name] = shape, dtype
  stretched = _frequencies(cfg)
  writer = gguf.GGUFWriter(None, arch.name)
  metadata = _sizes(cfg, about) | llama_cpp_vocabulary.vocabulary(tokenizer, cfg)
  for key, value in metadata.items():
    _add(writer, key, value)
  kinds = gguf.GGMLQuantizationType
  for name, (shape, dtype) in whole.items():
    writer.add_tensor_info(
      name,
      shape,
      dtype,
      math.prod(shape) * dtype.itemsize,
      kinds[{'float32': 'F32', 'bfloat16': 'BF16'}[dtype.name]],
    )
  if stretched is not None:
    writer.add_tensor_info(FREQUENCIES, stretched.shape, stretched.dtype, stretched.nbytes)
  writer.write_header_to_file(pathlib.Path(path))
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  writer.close()
  # Without the library's tofile, which loses the cause of disk errors.
  pad = writer.data_alignment
  try:
    with open(path, 'ab') as file:
      file.write(bytes(-file.tell() % pad))
      for array in _joined(arch, arrays, stretched):
        file.write(np.ascontiguousarray(array).view(np.uint8).data)
        file.write(bytes(-array.nbytes % pad))
  except OSError as error:
    raise OSError(error.errno, error.strerror, path) from error


def _joined(arch, arrays, stretched):
  held: list[np.ndarray] = []
  for name, array in arrays:
    several = _fused(arch, name)[1]
    if several == 1:
      yield array
      continue
    held.append(array)  # the parts are consecutive
    if len(held) == several:
      yield np.concatenate(held)
      held = []
  if stretched is not None:
    yield stretched


def _frequencies(cfg: schema.CommandConfig) -> np.ndarray | None:
  """Returns the factor by which --model.rope_factor lengthens each wavelength."""
  if cfg.model.rope_factor == 1 or cfg.model.rope_scaling != 'llama3':
    return None  # not scaled, or by a field
  plain = schema.replace(cfg, **{'model.rope_factor': 1.0})
  ratio = layers.rope_rates(plain.model) / layers.rope_rates(cfg.model)
  return np.asarray(ratio, np.float32)


FORMS = ('gguf', 'gguf_mtp')


def _architecture(cfg: schema.CommandConfig) -> architectures.Architecture:
  if mapping.of(cfg) == 'gguf_mtp':
    return MIMO2
  return architectures.ARCHITECTURES[config_json.of(cfg)]


def _sizes(cfg: schema.CommandConfig, about: str) -> dict:
  m, form = cfg.model, mapping.of(cfg)
  arch, context = _architecture(cfg).name, m.max_position_embeddings or cfg.data.seq_len
  modules = heads_lib.n_modules(cfg.heads, cfg.heads.n) if form == 'gguf_mtp' else 0
  n = mapping.layers_in_all(cfg)
  sizes = {
    'context_length': context,
    'embedding_length': m.d_model,
    'block_count': n + modules,
    'feed_forward_length': m.ff_width,
    'attention.head_count': m.n_attn_heads,
    'attention.head_count_kv': m.kv_heads,
    'attention.key_length': m.head_width,
    'attention.value_length': m.head_width,
    'attention.layer_norm_rms_epsilon': m.norm_eps,
    'rope.dimension_count': m.rotary_width,
    'rope.freq_base': m.rope_theta,
    'vocab_size': m.vocab_size,
  }
  if m.window:
    sizes |= {
      'attention.sliding_window': m.window,
      'rope.freq_base_swa': m.sliding_rope_theta or m.rope_theta,
    }
  if m.rope_factor > 1 and m.rope_scaling == 'linear':
    sizes |= {'rope.scaling.type': 'linear', 'rope.scaling.factor': m.rope_factor}
  if m.rope_factor > 1 and m.rope_scaling == 'yarn':
    sizes |= {
      'rope.scaling.type': 'yarn',
      'rope.scaling.factor': m.rope_factor,
      'rope.scaling.original_context_length': m.original_max_position_embeddings,
      'rope.scaling.yarn_beta_fast': m.rope_beta_fast,
      'rope.scaling.yarn_beta_slow': m.rope_beta_slow,
      # Beside the factor that llama.cpp computes of rope.scaling.factor.
      'rope.scaling.attn_factor': layers.rope_temperature(m) / (0.1 * math.log(m.rope_factor) + 1),
    }
  if m.attn_softcap:
    sizes['attn_logit_softcapping'] = m.attn_softcap
  if m.logits_softcap:
    sizes['final_logit_softcapping'] = m.logits_softcap
  if modules:
    sizes |= {
      'nextn_predict_layers': modules,
      'expert_feed_forward_length': 0,
      'rope.freq_base_swa': m.rope_theta,
      # mimo2 requires some layers with a sliding window: one of the trunk and the
      # modules, with a window of the whole context.
      'attention.sliding_window': context,
      'attention.sliding_window_pattern': [True] + [False] * (n - 1) + [True] * modules,
    }
  return {'general.name': about, **{f'{arch}.{key}': value for key, value in sizes.items()}}


def _add(writer, key: str, value) -> None:
  add = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
    list: writer.add_array,
  }
  add[type(value)](key, value)


# Import.

# Without the library, which trusts every length in a file
# (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY, UINT32 = 8, 9, 4
DTYPES = {0: np.dtype(np.float32), 30: np.dtype(ml_dtypes.bfloat16)}
ALIGNMENT = 'general.alignment'


class _Header:
  """Reads a file sequentially; raises ValueError at its end."""

  def __init__(self, data: np.ndarray):
    self.data, self.at = data, 0

  def take(self, n: int) -> bytes:
    if n > len(self.data) - self.at:
      raise ValueError('it is truncated or corrupt')
    self.at += n
    return self.data[self.at - n : self.at].tobytes()

  def number(self, n: int) -> int:
    return int.from_bytes(self.take(n), 'little')

  def text(self) -> str:
    return self.take(self.number(8)).decode()

  def skip(self, kind: int) -> None:
    if kind == STRING:
      self.take(self.number(8))
    elif kind == ARRAY:
      of, n = self.number(4), self.number(8)
      if of in SIZES:
        self.take(n * SIZES[of])
      elif of == STRING:
        for _ in range(n):
          self.take(self.number(8))
      else:
        raise ValueError(f'it has arrays of type {of}')
    elif kind in SIZES:
      self.take(SIZES[kind])
    else:
      raise ValueError(f'it has values of type {kind}')


def _tensors(path: str) -> dict[str, files.Tensor]:
  """Returns the tensors of a file; raises ValueError if it is invalid."""
  if os.path.getsize(path) == 0:
    raise ValueError('it is empty')
  header = _Header(np.memmap(path, np.uint8, 'r'))
  if header.take(4) != b'GGUF' or header.number(4) not in (2, 3):
    raise ValueError('it has no header of GGUF version 2 or 3')
  n_tensors, n_values = header.number(8), header.number(8)
  alignment = 32
  for _ in range(n_values):
    name, kind = header.text(), header.number(4)
    if name == ALIGNMENT and kind == UINT32:
      alignment = max(header.number(4), 1)
    else:
      header.skip(kind)
  abouts = []
  for _ in range(n_tensors):
    name, n = header.text(), header.number(4)
    if n > 4:
      raise ValueError(f'{name} has {n} dimensions')
    shape = tuple(header.number(8) for _ in range(n))[::-1]
    kind, offset = header.number(4), header.number(8)
    if kind not in DTYPES:
      raise ValueError(f'{name} has type {kind}; only F32 and BF16 are supported')
    abouts.append((name, shape, DTYPES[kind], offset))
  data = -(-header.at // alignment) * alignment
  found = {}
  for name, shape, dtype, offset in abouts:
    end = data + offset + math.prod(shape) * dtype.itemsize
    if end > len(header.data):
      raise ValueError(f'it is truncated within {name}')
    found[name] = files.Tensor(path, name, dtype, shape, data + offset)
  return found


def read(folder: str, cfg: schema.CommandConfig) -> dict[str, files.Tensor]:
  """Returns the tensors of a folder's file, by the names of mapping.py.

  Raises:
    ConfigError: it is missing, corrupt, or has unsupported types.
  """
  path, arch = os.path.join(folder, TENSORS), _architecture(cfg)
  try:
    whole = _tensors(path)
  except OSError as error:
    raise paths.InputError(path, f'cannot be read: {error.strerror}') from error
  except ValueError as error:
    raise paths.InputError(path, f'is not a valid GGUF file: {error}') from error
  whole.pop(FREQUENCIES, None)
  found = {}
  for name, tensor in whole.items():
    last = name.removesuffix('.weight').rpartition('.')[2]
    found |= _apart(cfg, arch.fused[last], tensor) if last in arch.fused else {name: tensor}
  return found


def _apart(cfg, parts: tuple[str, ...], whole: files.Tensor) -> dict[str, files.Tensor]:
  """Splits a tensor into those that it holds, if it has their shape."""
  m, at, found = cfg.model, whole.offset, {}
  rows = {
    'attn_q': m.n_attn_heads * m.head_width,
    'attn_k': m.kv_heads * m.head_width,
    'attn_v': m.kv_heads * m.head_width,
    'ffn_gate': m.ff_width,
    'ffn_up': m.ff_width,
  }
  if whole.shape != (sum(rows[part] for part in parts), m.d_model):
    return {whole.name: whole}
  layer = whole.name.removesuffix('.weight').rpartition('.')[0]
  for part in parts:
    name, shape = f'{layer}.{part}.weight', (rows[part], m.d_model)
    found[name] = whole._replace(name=name, shape=shape, offset=at)
    at += math.prod(shape) * whole.dtype.itemsize
  return found
