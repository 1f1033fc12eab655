"""Which files of a folder an import reads, and what it refuses in them."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest

from mtp_jax import config
from mtp_jax.interop import files, folder
from tests import tiny

HEAD, EMBEDDING = folder.HEAD, folder.EMBEDDING


@pytest.fixture
def llama(tmp_path):
  """(path of a folder as others write one, its model, Config, tensors)."""
  c = tiny.cfg(
    heads__family='parallel', heads__n=1, model__n_layers=3,
    model__vocab_size=264, data__tokenizer='bytes', data__seq_len=64,
  )  # fmt: skip
  model, path = tiny.model(c, tiny.mesh(c)), tmp_path / 'in'
  folder.export(model, c, None, str(path), dtype='float32', about='a test')
  os.remove(path / folder.OURS)
  found = files.read(str(path / files.WHOLE), 'import.path')
  arrays = {name: np.array(x.read()) for name, x in found.items()}
  return path, model, c, arrays


def _read(path):
  cfg, _ = folder.find(str(path), {})
  return folder.read(str(path), cfg, tiny.mesh(tiny.cfg()))


def _same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _refused(call, *args) -> str:
  with pytest.raises(config.ConfigError) as error:
    call(*args)
  assert '\n' not in str(error.value)
  return str(error.value)


def _sharded(path, arrays, more=()):
  """Two shards and their index, instead of one file."""
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


def test_the_index_says_which_file_a_tensor_is_from(llama):
  path, model, _, arrays = llama
  first = min(arrays)
  _sharded(path, arrays, {first: 'extra.safetensors'})
  # The shard that has it as well has another value, which must not win.
  files.write(str(path / 'extra.safetensors'), {first: arrays[first]})
  shard = path / 'model-00001-of-00002.safetensors'
  kept = {k: np.array(x.read()) for k, x in files.read(str(shard), 'x').items()}
  files.write(str(shard), kept | {first: arrays[first] + 1})
  for name in ('model-00003-of-00003', 'adapter_model', 'consolidated'):
    files.write(str(path / f'{name}.safetensors'), _stale(arrays))
  files.write(str(path / 'optimizer.safetensors'), {'m': np.ones(3)})
  _same(_read(path), model)


def test_without_an_index_model_safetensors_alone_is_read(llama):
  path, model, _, arrays = llama
  for name in ('a', 'model-00001-of-00002', 'z'):
    files.write(str(path / f'{name}.safetensors'), _stale(arrays))
  _same(_read(path), model)
  os.remove(path / files.WHOLE)
  assert 'has 3 .safetensors files, but no model.safetensors.index.json' in (
    _refused(_read, path)
  )


@pytest.mark.parametrize(
  'weight_map',
  [None, [], {}, 'x', {'a': 1}, {'a': '../b.safetensors'}],
)
def test_an_index_that_says_nothing_is_refused(llama, weight_map):
  path, *_ = llama
  (path / files.INDEX).write_text(json.dumps(dict(weight_map=weight_map)))
  line = _refused(_read, path)
  assert 'index.json' in line and 'weight_map' in line


def test_a_tensor_that_its_file_does_not_have_is_named(llama):
  path, _, _, arrays = llama
  _sharded(path, arrays, {min(arrays): 'model-00002-of-00002.safetensors'})
  said = f'00002-of-00002.safetensors has no {min(arrays)}; the index'
  assert said in _refused(_read, path)


def test_a_tied_config_with_another_head_is_refused(llama):
  path, _, _, arrays = llama
  about = json.loads((path / 'config.json').read_text())
  about['tie_word_embeddings'] = True
  (path / 'config.json').write_text(json.dumps(about))
  line = _refused(_read, path)
  assert f'{HEAD} differs from {EMBEDDING}' in line
  files.write(
    str(path / files.WHOLE), arrays | {HEAD: arrays[EMBEDDING].copy()}
  )
  assert _read(path).unembed is None


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers_are_refused(llama, value, dtype):
  path, _, _, arrays = llama
  name = 'model.layers.1.mlp.down_proj.weight'
  bad = arrays[name].copy()
  bad[3, 2] = value
  same = {k: x.astype(dtype) for k, x in (arrays | {name: bad}).items()}
  files.write(str(path / files.WHOLE), same)
  assert f'{name} in model.safetensors has numbers' in _refused(_read, path)


@pytest.mark.parametrize(
  'offsets, said',
  [
    ([[0, 8], [4, 12]], 'a and b overlap'),
    ([[0, 8], [0, 8]], 'a and b overlap'),
    ([[0, 8], [-8, 0]], 'b lies at bytes -8 to 0'),
    ([[0, 8], [16, 8]], 'b lies at bytes 16 to 8'),
    ([[0, 8], [8, 24]], 'b has 16 bytes'),
    ([[0, 8], [16, 24]], 'is cut off: b ends'),
    ([[0, 8], [8.0, 16]], 'b.data_offsets[0]=8.0: must be an integer'),
    ([[0, 8], [8]], 'b has a damaged description'),
  ],
)
def test_offsets_that_cannot_be_are_refused(tmp_path, offsets, said):
  header = json.dumps(
    {
      name: dict(dtype='F32', shape=[2], data_offsets=at)
      for name, at in zip('ab', offsets, strict=True)
    }
  ).encode()
  path = tmp_path / 'x.safetensors'
  path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(16))
  line = _refused(files.read, str(path), 'import.path')
  assert line.startswith(f'--import.path={path}: ') and said in line


@pytest.mark.parametrize('field', ['num_hidden_layers', 'prediction_heads'])
def test_more_layers_than_anyone_has_are_refused_at_once(llama, field):
  path, *_ = llama
  about = json.loads((path / 'config.json').read_text())
  (path / 'config.json').write_text(json.dumps(about | {field: 10**24}))
  line = _refused(_read, path)
  assert f'{field}={10**24} in config.json; at most 10,000' in line
