"""Files that an import reads, and errors in them."""

import base64
import errno
import json
import os
import resource

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers as hf

from mtp_jax.cli import main
from mtp_jax.config import fields
from mtp_jax.data import tokenizers
from mtp_jax.interop import files, hf_folder, llama_cpp, tokens
from mtp_jax.io import paths
from tests.support import tiny

HEAD, EMBEDDING = hf_folder.HEAD, hf_folder.EMBEDDING


@pytest.fixture
def llama(tmp_path):
  """Returns (path of a third-party folder, its model, Config, tensors)."""
  c = tiny.cfg(
    heads__family='parallel',
    heads__n=1,
    model__n_layers=3,
    model__vocab_size=264,
    data__tokenizer='bytes',
    data__seq_len=64,
  )
  model, path = tiny.model(c, tiny.mesh(c)), tmp_path / 'in'
  hf_folder.export(model, c, None, str(path), dtype='float32', about='a test')
  os.remove(path / hf_folder.OURS)
  found = files.read(str(path / files.WHOLE))
  arrays = {name: np.array(x.read()) for name, x in found.items()}
  return path, model, c, arrays


@pytest.mark.parametrize(
  'write',
  [
    files.write,
    pytest.param(files.write_torch, marks=pytest.mark.parity),
    lambda path, arrays: llama_cpp.write(
      path,
      tiny.cfg(export__format='gguf'),
      None,
      about='a test',
      shapes={name: (x.shape, np.dtype(np.float32)) for name, x in arrays.items()},
      arrays=((name, x.astype(np.float32)) for name, x in arrays.items()),
    ),
  ],
)
def test_full_disk_error_names_the_file(tmp_path, write):
  path = str(tmp_path / 'a')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
  try:
    with pytest.raises(OSError) as error:
      write(path, {'a': np.zeros(10_000)})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert (error.value.errno, error.value.filename) == (errno.EFBIG, path)


def _read(path, param_dtype='float32'):
  cfg, _ = hf_folder.find(str(path), {'model.param_dtype': param_dtype})
  return hf_folder.read(str(path), cfg, tiny.mesh(tiny.cfg()))


def _same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _refused(call, *args) -> str:
  with pytest.raises(paths.InputError) as error:
    call(*args)
  assert '\n' not in str(error.value)
  return str(error.value)


def _sharded(path, arrays, more=()):
  """Replaces the file by two shards and an index."""
  os.remove(path / files.WHOLE)
  names, file_of = sorted(arrays), {}
  for i, part in enumerate((names[::2], names[1::2]), 1):
    file = f'model-{i:05d}-of-00002.safetensors'
    files.write(str(path / file), {name: arrays[name] for name in part})
    file_of |= dict.fromkeys(part, file)
  file_of |= dict(more)
  (path / files.INDEX).write_text(json.dumps(dict(weight_map=file_of)))


def _stale(arrays):
  return {name: np.full_like(x, 7) for name, x in arrays.items()}


def test_tensors_are_read_from_files_of_the_index(llama):
  path, model, _, arrays = llama
  first = min(arrays)
  _sharded(path, arrays, {first: 'extra.safetensors'})
  # The shard that also has it has another value, which must be ignored.
  files.write(str(path / 'extra.safetensors'), {first: arrays[first]})
  shard = path / 'model-00001-of-00002.safetensors'
  kept = {k: np.array(x.read()) for k, x in files.read(str(shard)).items()}
  files.write(str(shard), kept | {first: arrays[first] + 1})
  for name in ('model-00003-of-00003', 'adapter_model', 'consolidated'):
    files.write(str(path / f'{name}.safetensors'), _stale(arrays))
  files.write(str(path / 'optimizer.safetensors'), {'m': np.ones(3)})
  _same(_read(path), model)


def test_without_index_only_model_safetensors_is_read(llama):
  path, model, _, arrays = llama
  for name in ('a', 'model-00001-of-00002', 'z'):
    files.write(str(path / f'{name}.safetensors'), _stale(arrays))
  _same(_read(path), model)
  os.remove(path / files.WHOLE)
  assert 'has 3 .safetensors files, but no model.safetensors.index.json' in (_refused(_read, path))


@pytest.mark.parametrize('weight_map', [None, [], {}, 'x', {'a': 1}, {'a': '../b.safetensors'}])
def test_index_without_weight_map_raises(llama, weight_map):
  path, *_ = llama
  (path / files.INDEX).write_text(json.dumps(dict(weight_map=weight_map)))
  line = _refused(_read, path)
  assert 'index.json' in line and 'weight_map' in line


def test_index_entry_missing_from_its_file_raises(llama):
  path, _, _, arrays = llama
  _sharded(path, arrays, {min(arrays): 'model-00002-of-00002.safetensors'})
  problem = f'00002-of-00002.safetensors has no {min(arrays)}, which is in the index'
  assert problem in _refused(_read, path)


def test_tied_config_with_different_lm_head_raises(llama):
  path, _, _, arrays = llama
  about = json.loads((path / 'config.json').read_text())
  about['tie_word_embeddings'] = True
  (path / 'config.json').write_text(json.dumps(about))
  line = _refused(_read, path)
  assert f'{HEAD} differs from {EMBEDDING}' in line
  files.write(str(path / files.WHOLE), arrays | {HEAD: arrays[EMBEDDING].copy()})
  assert _read(path).unembed is None


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_non_finite_weights_raise(llama, value, dtype):
  path, _, _, arrays = llama
  name = 'model.layers.1.mlp.down_proj.weight'
  bad = arrays[name].copy()
  bad[3, 2] = value
  same = {k: x.astype(dtype) for k, x in (arrays | {name: bad}).items()}
  files.write(str(path / files.WHOLE), same)
  for param_dtype in fields.DTYPES:
    line = _refused(_read, path, param_dtype)
    assert f'{name} in model.safetensors has values that are' in line


@pytest.mark.parametrize(
  'offsets, problem',
  [
    ([[0, 8], [4, 12]], 'a and b overlap'),
    ([[0, 8], [0, 8]], 'a and b overlap'),
    ([[0, 8], [-8, 0]], 'b is at bytes -8 to 0'),
    ([[0, 8], [16, 8]], 'b is at bytes 16 to 8'),
    ([[0, 8], [8, 24]], 'b has 16 bytes'),
    ([[0, 8], [16, 24]], 'is truncated: b ends'),
    ([[0, 8], [8.0, 16]], 'b.data_offsets[0]=8.0: must be an integer'),
    ([[0, 8], [8]], 'b has a corrupt entry'),
  ],
)
def test_invalid_safetensors_offsets_raise(tmp_path, offsets, problem):
  header = json.dumps(
    {
      name: dict(dtype='F32', shape=[2], data_offsets=at)
      for name, at in zip('ab', offsets, strict=True)
    }
  ).encode()
  path = tmp_path / 'x.safetensors'
  path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(16))
  line = _refused(files.read, str(path))
  assert line.startswith(f'{path}: ') and problem in line


@pytest.mark.parametrize('field', ['num_hidden_layers', 'prediction_heads'])
def test_implausible_number_of_layers_raises(llama, field):
  path, *_ = llama
  about = json.loads((path / 'config.json').read_text())
  (path / 'config.json').write_text(json.dumps(about | {field: 10**24}))
  line = _refused(_read, path)
  assert f'{field}={10**24} in config.json; at most 10,000' in line


# Tokenizers that do not fit the model.


def _import(path, run, capsys, *more):
  """Returns (exit status, stdout, stderr)."""
  status = main.main(
    [
      'import',
      f'--import.path={path}',
      f'--train.workdir={run}',
      '--mesh.fsdp=-1',
      '--train.compilation_cache=',
      *more,
    ]
  )
  return status, *capsys.readouterr()


def _tokenizer(path, rows, added=()):
  """A tokenizer with word ids 0 to rows - 1, followed by added tokens."""
  words = ['<s>', '</s>', '?', 'a', *map(str, range(4, rows - 1)), 'b']
  vocab = {word: i for i, word in enumerate(words)}
  fast = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token='?'))
  fast.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  fast.add_special_tokens(['<s>', '</s>'])
  fast.save(str(path / 'tokenizer.json'))
  about = json.loads((path / 'tokenizer.json').read_text())
  about['added_tokens'] += [
    about['added_tokens'][0] | dict(id=rows + i, content=name) for i, name in enumerate(added)
  ]
  (path / 'tokenizer.json').write_text(json.dumps(about))


def test_added_tokens_beyond_vocab_size_are_dropped(llama, tmp_path, capsys):
  path, *_ = llama
  _tokenizer(path, 264, ['[PAD]'])
  status, out, _ = _import(path, tmp_path / 'run', capsys)
  assert status == 0 and 'without the tokens [PAD]' in out
  back = tokenizers.load(str(tmp_path / 'run/tokenizer'))
  assert back.vocab_size == 264 and back.encode('a b').tolist() == [3, 263]


def test_unfit_tokenizer_raises_or_is_skipped(llama, tmp_path, capsys):
  path, *_ = llama
  for write, problem in (
    (lambda: _tokenizer(path, 265), 'has 265 tokens, the model 264'),
    (lambda: (path / 'tokenizer.json').write_text('{}'), 'is not a tokenizer.json'),
    (  # the library panics, with a BaseException
      lambda: (path / 'tokenizer.json').write_text(
        json.dumps(
          dict(
            version='1.0',
            added_tokens=[],
            model=dict(
              type='BPE',
              continuing_subword_prefix='##',
              merges=[['a', 'b']],
              vocab=dict(a=0, b=1, ab=2),
            ),
          )
        )
      ),
      'is not a tokenizer.json',
    ),
    (
      lambda: (
        _tokenizer(path, 264),
        (path / 'generation_config.json').write_text('{"eos_token_id": 264}'),
      ),
      'has the end token 264, the model has 264 tokens',
    ),
  ):
    write()
    status, _, error = _import(path, tmp_path / 'run', capsys)
    assert status == 2 and error.count('\n') == 1
    assert f'its tokenizer hf:{path}/tokenizer.json' in error and problem in error
    assert '--import.tokenizer=skip' in error
    assert not (tmp_path / 'run').exists()
  status, out, _ = _import(path, tmp_path / 'run', capsys, '--import.tokenizer=skip')
  assert status == 0 and 'without its tokenizer: ids only' in out
  assert not (tmp_path / 'run/tokenizer').exists()


def test_all_end_tokens_are_imported_and_exported(llama, tmp_path, capsys):
  path, _, c, _ = llama
  _tokenizer(path, 264)
  about = json.loads((path / 'config.json').read_text())
  about |= dict(bos_token_id=0, eos_token_id=[1, 200])
  (path / 'config.json').write_text(json.dumps(about))
  (path / 'generation_config.json').unlink()
  assert _import(path, tmp_path / 'run', capsys)[0] == 0
  assert (
    main.main(
      [
        'export',
        f'{tmp_path}/run',
        f'--export.out={tmp_path}/out',
        '--mesh.fsdp=-1',
        '--train.compilation_cache=',
      ]
    )
    == 0
  )
  for name in ('config.json', 'generation_config.json'):
    about = json.loads((tmp_path / 'out' / name).read_text())
    assert about['eos_token_id'] == [1, 200]


def test_tiktoken_model_is_distinguished_from_sentencepiece(tmp_path):
  lines = (b'%s %d' % (base64.b64encode(bytes([i])), i) for i in range(256))
  (tmp_path / tokens.MODEL).write_bytes(b'\n'.join(lines))
  found = tokens.read(str(tmp_path), None)
  assert found.vocab_size == 512 and found.stop_ids == (257, 265)
  assert found.encode('é').tolist() == list('é'.encode())
