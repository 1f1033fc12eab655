"""Export to Hugging Face's format and import, compared with transformers."""

import dataclasses
import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from mtp_jax.checkpoint import metadata, restore, saver
from mtp_jax.cli import main
from mtp_jax.config import draft_vocab, schema
from mtp_jax.data import tokenizers
from mtp_jax.interop import files, hf_folder, mapping
from mtp_jax.io import paths
from mtp_jax.model import heads, lm, params
from tests import faults
from tests.support import parity, runs, tiny
from tests.support.decoding import FAMILIES

torch = parity.library('torch')
transformers = parity.library('transformers')

STORIES = os.path.join(os.path.dirname(runs.ROOT), 'shared/data/stories260k')
BASE = dict(model__vocab_size=264, data__tokenizer='bytes', data__seq_len=64)


NO_CACHE = '--train.compilation_cache='


def _cfg(family='parallel', n=3, **changes):
  layers = 2 + (n if schema.HEAD_FAMILIES[family] else 0)
  return tiny.cfg(heads__family=family, heads__n=n, model__n_layers=layers, **BASE | changes)


def _export(c, model, out, dtype='float32'):
  tokenizer = tokenizers.get('bytes')
  return hf_folder.export(model, c, tokenizer, str(out), dtype=dtype, about='a test')


def _same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _workdir(c, path):
  """Writes a workdir with the parameters of tiny.model."""
  c = schema.replace(c, **{'train.workdir': str(path)})
  model = tiny.model(c, tiny.mesh(c))
  saver.save_params(model, c, tokenizers.get('bytes'), c.train.workdir)
  return model


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('unembedding', ['shared', 'replicated', 'tied'])
def test_export_import_round_trip(family, unembedding, tmp_path):
  rank = 0 if heads.FAMILIES[family].uses_next_token or unembedding == 'tied' else 4
  drafted = np.arange(3, 264, 4)
  is_recursive = family == 'recursive' and unembedding != 'replicated'
  c = _cfg(
    family,
    heads__unembedding=unembedding,
    heads__markov_rank=rank,
    heads__draft_vocab='' if unembedding == 'replicated' else draft_vocab.recorded(drafted, 264),
    heads__share_keys_values=is_recursive,
    heads__confidence=is_recursive,
    loss__head_loss='kl' if is_recursive else 'ce',
  )
  model = tiny.model(c, tiny.mesh(c))
  _export(c, model, tmp_path / 'out')
  if unembedding != 'replicated' and family != 'anticausal':
    of_heads = files.read(str(tmp_path / 'out' / mapping.FORMS['hf'].file))
    assert np.array_equal(of_heads['d2t'].read() + np.arange(len(drafted)), drafted)
  cfg, ours = hf_folder.find(str(tmp_path / 'out'), {})
  assert ours and (cfg.model, cfg.heads) == (c.model, c.heads)
  back = hf_folder.read(str(tmp_path / 'out'), cfg, tiny.mesh(c))
  _same(back, model)


def test_sharded_export_round_trip_with_options(tmp_path):
  c = _cfg(
    'recursive',
    n=4,
    loss__token_order_weight=1.0,
    model__d_head=6,
    model__param_dtype='bfloat16',
    model__rope_factor=8.0,
    export__max_shard_gib=4000 / 2**30,
  )
  model = tiny.model(c, tiny.mesh(c))
  _export(c, model, tmp_path / 'out', 'bfloat16')
  shards = [x for x in os.listdir(tmp_path / 'out') if '-of-' in x]
  assert len(shards) > 3
  mesh_cfg = schema.replace(c, **{'mesh.fsdp': 2, 'mesh.tensor': 2})
  mesh = tiny.mesh(mesh_cfg)
  back = hf_folder.read(str(tmp_path / 'out'), c, mesh)
  _same(jax.device_get(back), jax.device_get(model))
  expected = params.abstract(lm.specs(c), 'bfloat16', mesh)
  assert back.trunk.q.sharding == expected.trunk.q.sharding


def test_every_parameter_has_a_place():
  for family in FAMILIES:
    for unembedding in ('shared', 'replicated', 'tied'):
      rank = 0 if heads.FAMILIES[family].uses_next_token else 4
      c = _cfg(
        family,
        heads__unembedding=unembedding,
        heads__markov_rank=rank,
        heads__share_keys_values=family == 'recursive',
        heads__confidence=family == 'recursive' and unembedding != 'replicated',
        loss__head_loss='kl',
        loss__token_order_weight=1.0,
      )
      leaves = params.by_path(lm.specs(c))
      of_path = {}
      for place in mapping.tensors(c).values():
        of_path.setdefault(place.path, []).append(place.index)
      assert of_path.keys() == leaves.keys()
      for path, found in of_path.items():
        if None not in found:
          assert sorted(found) == list(range(leaves[path].shape[0])), path


@pytest.mark.parity
@pytest.mark.parametrize(
  'changes',
  [
    dict(),
    dict(heads__unembedding='tied', model__n_kv_heads=1),
    dict(model__d_head=6, model__d_ff=20, model__norm_eps=1e-6),
    dict(model__rope_factor=8.0, model__original_max_position_embeddings=32, n=1),
    dict(family='anticausal', n=3),
    dict(family='sequential', n=2, model__n_kv_heads=4),
    dict(family='residual', n=3, model__rope_theta=500_000.0),
    dict(export__max_shard_gib=4000 / 2**30),
  ],
)
def test_transformers_logits_and_text_match(changes, tmp_path):
  c = _cfg(**{'decode__max_new_tokens': 200, 'data__seq_len': 256, **changes})
  model = _workdir(c, tmp_path / 'run')
  out = tmp_path / 'out'
  assert (
    main.main(
      [
        'export',
        '--mesh.fsdp=-1',
        NO_CACHE,
        f'{tmp_path / "run"}',
        f'--export.out={out}',
        f'--export.max_shard_gib={c.export.max_shard_gib}',
      ]
    )
    == 0
  )
  # An engine must not load mtp_heads.safetensors as a part of the Llama.
  index, has_more = out / files.INDEX, (out / 'mtp_heads.safetensors').exists()
  assert index.exists() == (c.export.max_shard_gib < 1 or has_more)
  if index.exists():
    named = json.loads(index.read_text())['weight_map']
    assert not [name for name in named if 'mtp' in name]
    assert 'mtp_heads.safetensors' not in named.values()
  llama = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
  assert type(llama).__name__ == 'LlamaForCausalLM'
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 264, (2, 50))
  with torch.no_grad():
    theirs = llama(torch.tensor(ids)).logits.numpy()
  window = np.pad(ids, ((0, 0), (0, c.span)))
  position = np.tile(np.arange(window.shape[1]), (2, 1))
  with jax.set_mesh(tiny.mesh(c)):
    ours = jax.device_get(tiny.dense_logits(model, window, position, c))[0]
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  from mtp_jax.decode import decoder

  made = decoder.Decoder(model, c, tiny.mesh(c), c.heads.n)
  [text] = made([ids[0]]).tokens
  with torch.no_grad():
    generated = llama.generate(
      torch.tensor(ids[:1]),
      attention_mask=torch.ones((1, 50)),
      max_new_tokens=200,
      do_sample=False,
      eos_token_id=None,
      pad_token_id=0,
    )
  assert text.tolist() == generated[0, 50:].tolist()


@pytest.mark.skipif(not os.path.isdir(STORIES), reason='requires shared/data')
def test_imported_llama_generates_the_original_text(tmp_path, capsys):
  run = tmp_path / 'run'
  assert (
    main.main(
      [
        'import',
        f'--import.path={STORIES}',
        f'--train.workdir={run}',
        '--model.compute_dtype=float32',
        '--mesh.fsdp=-1',
        NO_CACHE,
      ]
    )
    == 0
  )
  with open(os.path.join(STORIES, 'expected.json')) as file:
    expected = json.load(file)
  capsys.readouterr()
  assert (
    main.main(
      [
        'generate',
        f'{run}',
        '--mesh.fsdp=-1',
        NO_CACHE,
        f'--prompt_ids={",".join(map(str, expected["prompt_ids"]))}',
        f'--decode.max_new_tokens={len(expected["greedy_ids"])}',
      ]
    )
    == 0
  )
  line = capsys.readouterr().out.splitlines()[0]
  assert line == ','.join(map(str, expected['greedy_ids']))


def _llama(path, **changes):
  """Writes a folder of a random Llama, as of a third-party tool."""
  c = _cfg('parallel', n=1)
  model = tiny.model(c, tiny.mesh(c))
  _export(c, model, path)
  os.remove(path / hf_folder.OURS)
  about = json.loads((path / 'config.json').read_text()) | changes
  (path / 'config.json').write_text(json.dumps(about))
  return c, model


def test_imported_llama_uses_its_last_layer_as_head_1(tmp_path):
  c, model = _llama(tmp_path / 'in')
  cfg, ours = hf_folder.find(str(tmp_path / 'in'), {})
  assert not ours and cfg.heads.n == 1 and cfg.model.n_layers == 3
  _same(hf_folder.read(str(tmp_path / 'in'), cfg, tiny.mesh(c)), model)
  whole, _ = hf_folder.find(str(tmp_path / 'in'), {'heads.family': 'linear'})
  back = hf_folder.read(str(tmp_path / 'in'), whole, tiny.mesh(c))
  assert back.heads is None and back.trunk.q.shape[0] == 3
  np.testing.assert_array_equal(back.trunk.q[2], model.heads.q[0])


@pytest.mark.parametrize(
  'changes, problem',
  [
    (dict(model_type='mamba'), "model_type='mamba' in config.json; only 'llama', 'mistral', "),
    (dict(hidden_act='relu'), "hidden_act='relu'; only 'silu', "),
    (dict(quantization_config={'bits': 4}), "quantization_config={'bits': 4} in config.json: not"),
    (dict(rotary_dim=8), 'rotary_dim=8 in config.json: not known, and it may change the model'),
    (dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
    (dict(hidden_size='x'), 'hidden_size="x": must be an integer from 1'),
    (dict(attention_bias=True), 'self_attn.k_proj.bias is missing'),
    (dict(rope_theta=None, attention_bias=None, vocab_size=200), 'has 258 tokens'),  # = absent
    (dict(attention_bias=3), 'attention_bias=3: must be true or false'),
    (
      dict(rope_parameters=dict(rope_type='dynamic', factor=2)),
      "rope_type='dynamic' in config.json; only default, linear, llama3, yarn",
    ),
    (dict(rope_parameters=dict(rope_type='yarn')), 'RoPE of type yarn has no factor'),
    (
      dict(rope_parameters=dict(rope_type='yarn', factor=2, ramp=3)),
      'ramp=3 of RoPE of type yarn in config.json: not known',
    ),
    (dict(intermediate_size=48), 'has shape (24, 16), the model (48, 16)'),
    (dict(num_hidden_layers=4), 'model.layers.3.input_layernorm.weight is'),
    (dict(num_hidden_layers=2), 'model.layers.2.'),
    (dict(vocab_size=200), 'has 258 tokens, the model 200; --import.tokenizer=skip'),
  ],
)
def test_unsupported_config_json_raises(changes, problem, tmp_path, capsys):
  _llama(tmp_path / 'in', **changes)
  run = tmp_path / 'run'
  assert (
    main.main(
      [
        'import',
        f'--import.path={tmp_path / "in"}',
        f'--train.workdir={run}',
        '--mesh.fsdp=-1',
        NO_CACHE,
      ]
    )
    == 2
  )
  error = capsys.readouterr().err
  assert problem in error and error.count('\n') == 1, error
  assert not run.exists()


def test_truncated_safetensors_raises(tmp_path, capsys):
  _llama(tmp_path / 'in')
  path = tmp_path / 'in' / 'model.safetensors'
  whole = path.read_bytes()
  for size, problem in ((len(whole) - 9, 'is truncated'), (20, 'not a safetensors')):
    path.write_bytes(whole[:size])
    assert (
      main.main(
        [
          'import',
          f'--import.path={tmp_path / "in"}',
          '--mesh.fsdp=-1',
          NO_CACHE,
          f'--train.workdir={tmp_path / "run"}',
        ]
      )
      == 2
    )
    assert problem in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_export_does_not_overwrite_a_folder(tmp_path, capsys):
  c = _cfg()
  _workdir(c, tmp_path / 'run')
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'mine').write_text('x')
  assert (
    main.main(
      [
        'export',
        '--mesh.fsdp=-1',
        NO_CACHE,
        f'{tmp_path / "run"}',
        f'--export.out={tmp_path / "out"}',
      ]
    )
    == 2
  )
  assert 'is not empty; choose another directory' in capsys.readouterr().err
  assert os.listdir(tmp_path / 'out') == ['mine']


def test_export_verifies_written_tensors(tmp_path, monkeypatch):
  c = _cfg()
  model = tiny.model(c, tiny.mesh(c))
  write = files.write

  def corrupt(path, arrays):
    first = min(arrays)
    write(path, arrays | {first: arrays[first] + 1})

  monkeypatch.setattr(files, 'write', corrupt)
  with pytest.raises(paths.InputError, match='differs from what was written'):
    _export(c, model, tmp_path / 'out')
  assert not os.listdir(tmp_path)


def test_export_verifies_written_keys(tmp_path, monkeypatch):
  c = _cfg()
  model = tiny.model(c, tiny.mesh(c))
  write = files.write

  def more(path, arrays):
    write(path, arrays | {'unexpected.weight': np.zeros(3, np.float32)})

  def fewer(path, arrays):
    write(path, {k: v for k, v in arrays.items() if k != min(arrays)})

  for wrong in more, fewer:
    monkeypatch.setattr(files, 'write', wrong)
    with pytest.raises(paths.InputError, match='missing or unexpected|in the index'):
      _export(c, model, tmp_path / 'out')
    assert not os.listdir(tmp_path)


def test_training_starts_from_imported_parameters(store, tmp_path, capsys):
  # With the step of `undisturbed`, to share its compilation; the first learning rate is 0.
  sizes = dict(model__n_attn_heads=2, model__n_kv_heads=0, model__d_ff=32)
  c = _cfg(n=2, data__seq_len=16, **sizes)
  c = schema.replace(c, **{'model.n_layers': 3})
  exported = _workdir(c, tmp_path / 'first')
  assert (
    main.main(
      [
        'export',
        '--mesh.fsdp=-1',
        NO_CACHE,
        f'{tmp_path / "first"}',
        f'--export.out={tmp_path / "out"}',
      ]
    )
    == 0
  )
  run = tmp_path / 'run'
  assert (
    main.main(
      [
        'import',
        f'--import.path={tmp_path / "out"}',
        '--mesh.fsdp=-1',
        NO_CACHE,
        f'--train.workdir={run}',
      ]
    )
    == 0
  )
  capsys.readouterr()
  assert runs.train(store, run, model__d_ff=24) == 2
  assert f'parameters of {run}, which it is initialized from, have 32' in (capsys.readouterr().err)
  kept = dict(train__checkpoint_every=1, train__max_to_keep=6)
  assert runs.train(store, run, **kept) == 0
  first = runs.restored(run, 1).params
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), first, jax.device_get(exported)
  )


def test_store_with_different_tokenizer_raises_after_import(store, tmp_path, capsys):
  _llama(tmp_path / 'in')  # its bytes tokenizer is a tokenizer.json, which differs
  run = tmp_path / 'run'
  assert (
    main.main(
      [
        'import',
        f'--import.path={tmp_path / "in"}',
        '--mesh.fsdp=-1',
        NO_CACHE,
        f'--train.workdir={run}',
      ]
    )
    == 0
  )
  assert (
    runs.train(
      store,
      run,
      model__n_layers=3,
      model__n_attn_heads=4,
      model__n_kv_heads=2,
      model__d_ff=24,
      model__vocab_size=264,
      heads__n=1,
    )
    == 2
  )
  error = capsys.readouterr().err
  assert f'its tokenizer is bytes; that of the model in {run} is hf#' in error


def _train_flags(c, **changes):
  """Returns the flags of a run with a model like _cfg's."""
  m = c.model
  return (
    dict(
      model__n_layers=m.n_layers,
      model__n_attn_heads=m.n_attn_heads,
      model__n_kv_heads=m.n_kv_heads,
      model__d_ff=m.d_ff,
      model__vocab_size=m.vocab_size,
      optim__warmup_steps=1,
    )
    | changes
  )


def _greedy(path):
  llama = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
  ids = torch.tensor([[5, 7, 99, 12]])
  with torch.no_grad():
    return llama.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=40,
      do_sample=False,
      eos_token_id=None,
      pad_token_id=0,
    )[0].tolist()


@pytest.mark.parity
def test_llama_import_head_training_and_export(store, tmp_path, capsys):
  """20 steps of two heads on a frozen trunk: transformers generates the same text
  as before, and so does `mtp generate` with the heads."""
  c, _ = _llama(tmp_path / 'in')
  os.remove(tmp_path / 'in/tokenizer.json')  # the store has our bytes tokenizer
  run, trained, out = (tmp_path / x for x in ('run', 'trained', 'out'))
  here = ['--mesh.fsdp=-1', NO_CACHE]
  assert (
    main.main(
      [
        'import',
        f'--import.path={tmp_path / "in"}',
        f'--train.workdir={run}',
        '--heads.family=sequential',
        *here,
      ]
    )
    == 0
  )
  assert (
    runs.train(
      store,
      trained,
      **_train_flags(c),
      train__init_from=run,
      train__freeze='trunk',
      heads__family='sequential',
      heads__n=3,
      train__steps=20,
    )
    == 0
  )
  assert 'head 1 unchanged; heads 2 to 3 new, copied from head 1' in (capsys.readouterr().out)
  assert main.main(['export', f'{trained}', f'--export.out={out}', *here]) == 0
  expected = _greedy(tmp_path / 'in')
  assert _greedy(out) == expected
  capsys.readouterr()
  assert (
    main.main(
      ['generate', f'{trained}', '--prompt_ids=5,7,99,12', '--decode.max_new_tokens=40', *here]
    )
    == 0
  )
  line = capsys.readouterr().out.splitlines()[0]
  made = [int(x) for x in line.split(',')]
  assert made == expected[4 : 4 + len(made)] and len(made) >= 10


# config.json alone, without mtp_jax.json.


@pytest.mark.parametrize('unembedding', ['shared', 'tied'])
def test_third_party_config_json_fields(unembedding, tmp_path):
  c = _cfg(
    n=1,
    heads__unembedding=unembedding,
    model__norm_eps=1e-6,
    model__rope_theta=500_000.0,
    model__rope_factor=8.0,
    model__rope_low_freq=2.0,
    model__rope_high_freq=5.0,
    model__original_max_position_embeddings=32,
    model__d_head=6,
    model__max_position_embeddings=512,
  )
  _export(c, tiny.model(c, tiny.mesh(c)), tmp_path / 'in')
  about = json.loads((tmp_path / 'in/config.json').read_text())
  assert (about['bos_token_id'], about['eos_token_id']) == (256, 257)
  os.remove(tmp_path / 'in' / hf_folder.OURS)
  cfg, ours = hf_folder.find(str(tmp_path / 'in'), {})
  assert not ours and cfg.heads.unembedding == unembedding
  expected = dataclasses.replace(c.model, remat=cfg.model.remat, compute_dtype='float32')
  assert cfg.model == expected and cfg.data.seq_len == 512


def test_imported_compute_dtype(tmp_path):
  _llama(tmp_path / 'in', dtype='bfloat16')
  cfg, _ = hf_folder.find(str(tmp_path / 'in'), {})
  assert cfg.model.compute_dtype == 'bfloat16'
  given = {'model.compute_dtype': 'float32'}
  assert hf_folder.find(str(tmp_path / 'in'), given)[0].model.compute_dtype == ('float32')


def test_rotary_buffers_are_ignored(tmp_path):
  c, model = _llama(tmp_path / 'in')
  path = str(tmp_path / 'in/model.safetensors')
  arrays = {k: np.array(x.read()) for k, x in files.read(path).items()}
  odd = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  files.write(path, arrays | {odd: np.ones(2, np.float32)})
  cfg, _ = hf_folder.find(str(tmp_path / 'in'), {})
  _same(hf_folder.read(str(tmp_path / 'in'), cfg, tiny.mesh(c)), model)


def test_index_excludes_further_heads(tmp_path):
  """Otherwise vLLM would load the further heads as a part of the Llama."""
  c = _cfg('sequential')
  _export(c, tiny.model(c, tiny.mesh(c)), tmp_path / 'in')
  named = json.loads((tmp_path / 'in' / files.INDEX).read_text())['weight_map']
  expected = {k for k, place in mapping.tensors(c).items() if not place.extra}
  assert named == dict.fromkeys(expected, files.WHOLE)


def test_missing_file_of_the_index_raises(tmp_path):
  c = _cfg(export__max_shard_gib=4000 / 2**30)
  _export(c, tiny.model(c, tiny.mesh(c)), tmp_path / 'in')
  name = min(x for x in os.listdir(tmp_path / 'in') if '-of-' in x)
  os.remove(tmp_path / 'in' / name)
  with pytest.raises(paths.InputError, match=f'{name} is missing'):
    hf_folder.read(str(tmp_path / 'in'), c, tiny.mesh(c))
  index = json.loads((tmp_path / 'in' / files.INDEX).read_text())
  size = sum(np.prod(x.shape) * 4 for x in jax.tree.leaves(tiny.model(c, tiny.mesh(c))))
  extra = files.read(str(tmp_path / 'in/mtp_heads.safetensors')).values()
  size -= sum(np.prod(x.shape) * 4 for x in extra)
  assert index['metadata']['total_size'] == size


def test_wrong_tensor_size_raises(tmp_path):
  _llama(tmp_path / 'in')
  path = tmp_path / 'in' / 'model.safetensors'
  whole = path.read_bytes()
  assert whole.count(b'[264,16]') == 2
  path.write_bytes(whole.replace(b'[264,16]', b'[264,15]'))
  with pytest.raises(paths.InputError, match=r'not the size of \(264, 15\)'):
    files.read(str(path))


def _command(command, from_, to, *more):
  args = {
    'import': [f'--import.path={from_}', f'--train.workdir={to}'],
    'export': [str(from_), f'--export.out={to}'],
  }[command]
  return main.main([command, *args, '--mesh.fsdp=-1', NO_CACHE, *more])


def test_export_dtype(tmp_path):
  c = _cfg()
  _workdir(c, tmp_path / 'run')
  out = tmp_path / 'out'
  assert _command('export', tmp_path / 'run', out, '--export.dtype=bfloat16') == 0
  found = files.read_folder(str(out)).values()
  assert {x.dtype.name for x in found} == {'bfloat16'}
  assert json.loads((out / 'config.json').read_text())['dtype'] == 'bfloat16'


def test_import_and_export_without_tokenizer(tmp_path, capsys):
  _llama(tmp_path / 'in')
  os.remove(tmp_path / 'in/tokenizer.json')
  run, out = tmp_path / 'run', tmp_path / 'out'
  assert _command('import', tmp_path / 'in', run) == 0
  assert 'no tokenizer found: ids only' in capsys.readouterr().out
  assert (run / 'run.flags').exists()
  assert _command('export', run, out) == 0
  assert not [x for x in os.listdir(out) if 'tokenizer' in x]
  about = json.loads((out / 'config.json').read_text())
  assert about['bos_token_id'] is None
  capsys.readouterr()
  assert main.main(['generate', f'{run}', '--prompt=a', '--mesh.fsdp=-1', NO_CACHE]) == 2
  assert 'imported without a tokenizer; give --prompt_ids' in (capsys.readouterr().err)


def test_interrupted_import_leaves_no_files(tmp_path, monkeypatch):
  _llama(tmp_path / 'in')

  def killed(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(saver, 'save', killed)
  assert _command('import', tmp_path / 'in', tmp_path / 'run') == 130
  assert os.listdir(tmp_path) == ['in']


@pytest.mark.parametrize('name', ['a[1]', 'b*'])
def test_import_into_a_glob_pattern_raises(name, tmp_path, capsys):
  _llama(tmp_path / 'in')
  assert _command('import', tmp_path / 'in', tmp_path / name) == 2
  error = capsys.readouterr().err
  assert f'--train.workdir={tmp_path / name}: no path of checkpoints' in error
  assert error.count('\n') == 1 and os.listdir(tmp_path) == ['in']


def test_export_format_is_not_inherited_from_import(tmp_path):
  """The import format does not become the default export format."""
  c = _cfg('recursive', export__format='mimo')
  _export(c, tiny.model(c, tiny.mesh(c)), tmp_path / 'in')
  assert _command('import', tmp_path / 'in', tmp_path / 'run') == 0
  assert _command('export', tmp_path / 'run', tmp_path / 'out') == 0
  assert (tmp_path / 'out/mtp_heads.safetensors').exists()
  text = (tmp_path / 'out' / hf_folder.OURS).read_text()
  assert str(tmp_path) not in text  # no local paths


@pytest.mark.parametrize(
  'more, problem',
  [
    (['--import.format=gguf'], '--import.format=gguf: one of hf, meta'),
    (['--heads.family=causal'], '--heads.family=causal: mtp_jax.json has'),
    (['--heads.n=3'], '--heads.n=3: is set by the imported model'),
  ],
)
def test_contradicting_import_flags_raise(more, problem, tmp_path, capsys):
  c = _cfg('parallel')
  _export(c, tiny.model(c, tiny.mesh(c)), tmp_path / 'in')
  assert _command('import', tmp_path / 'in', tmp_path / 'run', *more) == 2
  error = capsys.readouterr().err
  assert problem in error and error.count('\n') == 1, error
  assert not (tmp_path / 'run').exists()


@pytest.mark.parity
def test_unsupported_export_raises_before_writing(tmp_path, capsys):
  c = _cfg('linear')
  _workdir(c, tmp_path / 'run')
  (tmp_path / 'out').mkdir()
  assert _command('export', tmp_path / 'run', tmp_path / 'out', '--export.format=meta') == 2
  assert 'these are linear' in capsys.readouterr().err
  assert (tmp_path / 'out').is_dir()


def test_export_during_training(store, tmp_path):
  run, out = tmp_path / 'run', tmp_path / 'out'
  args = runs.args(
    store, str(run), train__steps=60, train__checkpoint_every=3, train__max_to_keep=30
  )
  process = runs.process(['-c', faults.SLOWLY, 'train', *args])
  limit = time.monotonic() + 120
  while not restore.steps(str(run)) and time.monotonic() < limit:
    time.sleep(0.1)
  assert _command('export', run, out) == 0
  assert process.poll() is None  # and the export did not take its lock
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75
  assert len(files.read_folder(str(out))) > 20


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
  """A cache of the hub with the model someone/tiny, and no network."""
  from huggingface_hub import constants

  cache = tmp_path / 'hub'
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  revision = '0123456789abcdef0123456789abcdef01234567'
  of_model = cache / 'models--someone--tiny'
  _, model = _llama(of_model / 'snapshots' / revision)
  (of_model / 'refs').mkdir()
  for name in ('main', 'v1'):
    (of_model / 'refs' / name).write_text(revision)
  return model


@pytest.mark.parametrize('name', ['hf:someone/tiny', 'hf:someone/tiny@v1'])
def test_import_from_the_cache_of_the_hub(name, offline_hub, tmp_path, capsys):
  run = tmp_path / 'run'
  command = ['import', f'--import.path={name}', f'--train.workdir={run}', NO_CACHE]
  assert main.main([*command, '--mesh.fsdp=-1']) == 0, capsys.readouterr().err
  cfg = metadata.read(str(run), 0).cfg
  _same(restore.restore_model(str(run), 0, cfg, tiny.mesh(tiny.cfg())), offline_hub)


@pytest.mark.parametrize(
  'name, problem',
  [
    ('hf:someone/other', 'is not in the cache of the hub, and the hub cannot be reached'),
    ('hf:someone/tiny@v2', 'is not in the cache of the hub, and the hub cannot be reached'),
    ('hf:tiny', 'must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION'),
    ('hf:../x/y', 'must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION'),
  ],
)
def test_missing_models_of_the_hub_are_one_line_errors(
  name, problem, offline_hub, tmp_path, capsys
):
  run = tmp_path / 'run'
  assert main.main(['import', f'--import.path={name}', f'--train.workdir={run}', NO_CACHE]) == 2
  error = capsys.readouterr().err
  assert error == f'mtp: {name}: {problem}\n' and not run.exists()
