"""GGUF, the file format of llama.cpp.

The names of tensors are in mapping.py; this module owns their layout in the file
and its metadata: the sizes, and the vocabulary, with which llama.cpp tokenizes
text itself. Two architectures are written: `llama`, and `mimo2` (MiMo V2,
https://github.com/ggml-org/llama.cpp/blob/master/src/models/mimo2.cpp), whose
modules equal ours: each reads the token's embedding and the hidden state before
the final norm, and passes on its own before its norm.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from mtp_jax.config import schema
from mtp_jax.data import ranks, tokenizers
from mtp_jax.interop import files, mapping, tokens
from mtp_jax.io import paths
from mtp_jax.model import heads as heads_lib
from mtp_jax.model import layers

TENSORS = 'model.gguf'
# Queries, keys and values are one tensor in files with modules.
APART, FUSED = ('attn_q', 'attn_k', 'attn_v'), 'attn_qkv'
# Scaling of RoPE frequencies: not a parameter, computed from the flags.
FREQUENCIES = 'rope_freqs.weight'


def _fused(form: str, name: str) -> tuple[str, bool]:
  """Returns (the tensor that contains a name, whether it contains others too)."""
  layer, _, last = name.removesuffix('.weight').rpartition('.')
  if form != 'gguf_mtp' or last not in APART:
    return name, False
  return f'{layer}.{FUSED}.weight', True


def dtype_of(shape: tuple[int, ...], dtype: str) -> np.dtype:
  """Returns the dtype in the file; llama.cpp requires norms in float32."""
  return np.dtype(np.float32 if len(shape) == 1 else dtype)


# Export.


def write(
  path: str,
  cfg: schema.Config,
  tokenizer,
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

  form = mapping.of(cfg)
  whole: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
  for name, (shape, dtype) in shapes.items():
    name, several = _fused(form, name)
    if several and name in whole:
      shape = (whole[name][0][0] + shape[0], *shape[1:])
    whole[name] = shape, dtype
  stretched = _frequencies(cfg)
  writer = gguf.GGUFWriter(None, ARCHITECTURES[form])
  metadata = _sizes(cfg, about) | vocabulary(tokenizer, cfg)
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
      for array in _joined(form, arrays, stretched):
        file.write(np.ascontiguousarray(array).view(np.uint8).data)
        file.write(bytes(-array.nbytes % pad))
  except OSError as error:
    raise OSError(error.errno, error.strerror, path) from error


def _joined(form, arrays, stretched):
  held: list[np.ndarray] = []
  for name, array in arrays:
    if not _fused(form, name)[1]:
      yield array
      continue
    held.append(array)  # q, k and v are consecutive
    if len(held) == len(APART):
      yield np.concatenate(held)
      held = []
  if stretched is not None:
    yield stretched


def _frequencies(cfg: schema.Config) -> np.ndarray | None:
  """Returns the factor by which --model.rope_factor lengthens each wavelength."""
  if cfg.model.rope_factor == 1:
    return None
  plain = schema.replace(cfg, **{'model.rope_factor': 1.0})
  ratio = layers.rope_rates(plain.model) / layers.rope_rates(cfg.model)
  return np.asarray(ratio, np.float32)


ARCHITECTURES = {'gguf': 'llama', 'gguf_mtp': 'mimo2'}


def _sizes(cfg: schema.Config, about: str) -> dict:
  m, form = cfg.model, mapping.of(cfg)
  arch, context = ARCHITECTURES[form], m.max_position_embeddings or cfg.data.seq_len
  modules = heads_lib.n_modules(cfg, cfg.heads.n) if form == 'gguf_mtp' else 0
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
    'rope.dimension_count': m.head_width,
    'rope.freq_base': m.rope_theta,
    'vocab_size': m.vocab_size,
  }
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


# The vocabulary.

# Token types, as SentencePiece numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def check(tokenizer) -> str:
  """Returns why llama.cpp would tokenize texts differently; '' if it does not."""
  if tokenizer is None:
    return ''
  if not {tokenizers.PIECES, tokens.JSON} & tokenizer.files.keys():
    return (
      'does not support --data.tokenizer=bytes: llama.cpp has SentencePiece models'
      ' and byte-level BPE'
    )
  unfit = _unfit_pieces if tokenizers.PIECES in tokenizer.files else _unfit_json
  why = unfit(tokenizer)
  ends = len(tokenizer.stop_ids)
  if not why and ends > 1 + len(ENDS):
    why = f'it has {ends} end tokens, llama.cpp supports {1 + len(ENDS)}'
  if not why and max(tokenizer.stop_ids) >= tokenizer.vocab_size:
    why = f'its end token {max(tokenizer.stop_ids)} is out of range'
  return f'does not support the tokenizer {tokenizer.name}: {why}' if why else ''


ENDS = ('eot', 'eom')  # names of further end tokens


def _unfit_pieces(tokenizer) -> str:
  proto = tokens.model_proto(tokenizer.files[tokenizers.PIECES])
  spec, about = proto.normalizer_spec, proto.trainer_spec
  if about.model_type != about.BPE:
    return 'llama.cpp tokenizes by merges (BPE), not by likelihood (unigram)'
  if spec.precompiled_charsmap:
    return f'it normalizes texts ({spec.name}), which llama.cpp does not'
  if spec.remove_extra_whitespaces:
    return 'it removes spaces, which llama.cpp does not'
  if about.treat_whitespace_as_suffix or not spec.escape_whitespaces:
    return 'it marks spaces differently than llama.cpp'
  if not about.byte_fallback:
    return 'it has no byte pieces, which llama.cpp falls back on'
  kinds = {piece.type for piece in proto.pieces}
  if UNUSED in kinds:
    return 'it has unused pieces, which llama.cpp would use'
  if USER_DEFINED in kinds:
    return 'it has user-defined symbols, which llama.cpp matches in another order'
  names = {piece.piece for piece in proto.pieces}
  for piece in proto.pieces:  # llama.cpp ignores its type
    if piece.type not in (CONTROL, UNKNOWN, BYTE):
      continue
    x = piece.piece
    for parts in ((x[:i], x[i:]) for i in range(1, len(x))):
      if names.issuperset(parts):
        return f'llama.cpp would join its pieces {parts} to the special {x!r}'
  return ''


# llama.cpp's names of pre-tokenizers, by the regular expression of a
# tokenizer.json, and whether a word that is a token is never split.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
QWEN2 = ranks.WORDS.replace(r'\p{N}{1,3}', r'\p{N}')
WORDS = {
  ('', False): 'gpt-2',
  (GPT2 + r'|\s+', False): 'gpt-2',
  (ranks.WORDS, True): 'llama-bpe',
  (ranks.WORDS, False): 'dbrx',
  (QWEN2, False): 'qwen2',
}


def _unfit_json(tokenizer) -> str:
  import tokenizers as library

  about = json.loads(tokenizer.files[tokens.JSON])
  model = about['model']
  if model.get('type', 'BPE') != 'BPE' or model.get('byte_fallback'):
    return 'llama.cpp supports only byte-level BPE of a tokenizer.json'
  for field in 'dropout', 'continuing_subword_prefix', 'end_of_word_suffix':
    if model.get(field):
      return f'llama.cpp does not support {field}={model[field]!r}'
  if about.get('normalizer'):
    return 'it normalizes texts, which llama.cpp does not'
  if _words(about) is None:
    return (
      'its pre-tokenizer is none of the supported ones'
      f' ({", ".join(dict.fromkeys(WORDS.values()))})'
    )
  fast = library.Tokenizer.from_buffer(tokenizer.files[tokens.JSON])
  added = about.get('added_tokens') or ()
  for token in added:
    name = token['content']
    if any(token.get(x) for x in ('single_word', 'lstrip', 'rstrip')):
      return f'its token {name!r} depends on the spaces around it'
    if not token.get('special') and name in NAMED:
      return f'its token {name!r} is not special, but is to llama.cpp'
    whole = model.get('ignore_merges') and name not in model['vocab']
    if whole and len(fast.pre_tokenizer.pre_tokenize_str(name)) == 1:
      return f'llama.cpp would find its token {name!r} in plain text'
  overlap = _overlap([token['content'] for token in added])
  if overlap:
    return f'its tokens {" and ".join(overlap)} may overlap in a text'
  letter, whole = tokenizers.of_a_letter(tokenizer)
  if whole not in (letter, [tokenizer.bos, *letter]):
    return f'it encodes x as {whole}, not as {letter} or BOS and {letter}'
  return ''


# Names of tokens that llama.cpp treats as special in any file.
NAMED = frozenset(
  (
    '</s> <eos> <EOT> _<EOT> [EOS] [EOT] [PAD] <PAD> <PRE> <SUF> <MID> <REPO>'
    ' <end_of_turn> <end_of_utterance> <turn|> <|endoftext|> <|end_of_text|>'
    ' <|end|> <|eot_id|> <|eom_id|> <|im_end|> <|return|> <|call|> <|calls|>'
    ' <|flush|> <|start|> <|message|> <|channel|> <|constrain|> <|tool_response>'
    ' <|prefix|> <|suffix|> <|middle|> <|code_prefix|> <|code_suffix|>'
    ' <|code_middle|> <|fim_prefix|> <|fim_suffix|> <|fim_middle|> <|fim_pad|>'
    ' <|fim_repo|> <|repo_name|> <|file_sep|> <fim-prefix> <fim-suffix>'
    ' <fim-middle> <fim-pad> <fim-repo> <fim_prefix> <fim_suffix> <fim_middle>'
    ' <fim_pad> <reponame> [e~['
  ).split()
) | {'<｜end▁of▁sentence｜>', '<｜fim▁begin｜>', '<｜fim▁end｜>', '<｜fim▁hole｜>'}


def _overlap(contents: list[str]) -> tuple[str, str] | None:
  """Returns two tokens of which one may start within the other: programs differ in
  which of them they match first."""
  ends = {(x[i:]): x for x in contents for i in range(1, len(x))}
  for x in contents:
    for i in range(1, len(x)):
      if x[:i] in ends:
        return repr(ends[x[:i]]), repr(x)
  return None


def _words(about: dict) -> str | None:
  """Returns llama.cpp's name for the pre-tokenizer of a tokenizer.json, or None."""
  before = about.get('pre_tokenizer') or {}
  steps = before.get('pretokenizers', [before]) or [{}]
  *splits, level = steps
  if level.get('type') != 'ByteLevel' or level.get('add_prefix_space', True):
    return None
  expression = ''
  if splits:
    (split,) = splits if len(splits) == 1 else (None,)
    if not split or split.get('type') != 'Split' or split.get('invert'):
      return None
    if split.get('behavior') != 'Isolated' or level.get('use_regex', True):
      return None
    expression = split['pattern'].get('Regex', None)
  elif not level.get('use_regex', True):
    return None
  whole = bool(about['model'].get('ignore_merges'))
  return WORDS.get((expression, whole))


def vocabulary(tokenizer, cfg: schema.Config) -> dict:
  """Returns the metadata of a tokenizer that passed `check`, or of None; rows of the
  model without a token become unused tokens."""
  if tokenizer is None:
    return {'tokenizer.ggml.model': 'none'}
  if tokenizers.PIECES in tokenizer.files:
    found = _of_pieces(tokenizer)
  else:
    found = _of_json(tokenizer)
  names = found['tokens']
  names += [''] * (cfg.model.vocab_size - len(names))
  taken = set(names)
  for i, name in enumerate(names):
    if not name:  # ids without a token; names must be unique
      free = f'[unused {i}]'
      while free in taken:
        free += '_'
      names[i] = free
      taken.add(free)
  more = len(names) - len(found['token_type'])
  found['token_type'] += [UNUSED] * more
  if 'scores' in found:
    found['scores'] += [0.0] * more
  return {f'tokenizer.ggml.{key}': value for key, value in found.items()} | {
    'tokenizer.ggml.bos_token_id': tokenizer.bos,
    'tokenizer.ggml.eos_token_id': tokenizer.eos,
    'tokenizer.ggml.add_bos_token': tokenizers.begins(tokenizer),
    'tokenizer.ggml.add_eos_token': False,
    **{
      f'tokenizer.ggml.{key}_token_id': token
      for key, token in zip(ENDS, tokenizer.more_eos, strict=False)
    },
  }


def _of_pieces(tokenizer) -> dict:
  proto = tokens.model_proto(tokenizer.files[tokenizers.PIECES])
  pieces = proto.pieces
  return {
    'model': 'llama',
    'pre': 'default',
    'tokens': [piece.piece for piece in pieces],
    'scores': [float(piece.score) for piece in pieces],
    'token_type': (kinds := [int(piece.type) for piece in pieces]),
    'unknown_token_id': kinds.index(UNKNOWN),
    'add_space_prefix': proto.normalizer_spec.add_dummy_prefix,
  }


def _of_json(tokenizer) -> dict:
  about = json.loads(tokenizer.files[tokens.JSON])
  model = about['model']
  found = [''] * tokenizer.vocab_size
  kinds = [UNUSED] * len(found)
  for token, i in model['vocab'].items():
    found[i], kinds[i] = token, NORMAL
  for added in about.get('added_tokens') or ():
    i = added['id']
    found[i] = added['content']
    kinds[i] = CONTROL if added.get('special') else USER_DEFINED
  merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
  return {
    'model': 'gpt2',
    'pre': _words(about),
    'tokens': found,
    'token_type': kinds,
    # llama.cpp rejects an empty list; this merge has no effect.
    'merges': merges or ['\u0120 \u0120'],
  }


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


def read(folder: str, cfg: schema.Config) -> dict[str, files.Tensor]:
  """Returns the tensors of a folder's file, by the names of mapping.py.

  Raises:
    ConfigError: it is missing, corrupt, or has unsupported types.
  """
  path, form = os.path.join(folder, TENSORS), mapping.of(cfg)
  try:
    whole = _tensors(path)
  except OSError as error:
    raise paths.InputError(path, f'cannot be read: {error.strerror}') from error
  except ValueError as error:
    raise paths.InputError(path, f'is not a valid GGUF file: {error}') from error
  whole.pop(FREQUENCIES, None)
  found = {}
  for name, tensor in whole.items():
    last = name.rpartition('.')[0].rpartition('.')[2]
    fused = form == 'gguf_mtp' and last == FUSED
    found |= _apart(cfg, tensor) if fused else {name: tensor}
  return found


def _apart(cfg, whole: files.Tensor) -> dict[str, files.Tensor]:
  """Splits a tensor into queries, keys and values, if it has their shape."""
  m, at, found = cfg.model, whole.offset, {}
  heads = m.n_attn_heads, m.kv_heads, m.kv_heads
  if whole.shape != (sum(heads) * m.head_width, m.d_model):
    return {whole.name: whole}
  for name, n in zip(APART, heads, strict=True):
    name = whole.name.replace(FUSED, name)
    shape = (n * m.head_width, m.d_model)
    found[name] = whole._replace(name=name, shape=shape, offset=at)
    at += math.prod(shape) * whole.dtype.itemsize
  return found
