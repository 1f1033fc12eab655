"""The format of https://github.com/vllm-project/speculators: names, values, description.

The library itself reads it in tests/engines: its releases pin an older transformers than
the parity tests need, so that no environment holds both.
"""

import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mtp_jax.cli import main
from mtp_jax.config import fields as fields_lib
from mtp_jax.config import schema
from mtp_jax.interop import hf, hf_folder
from tests.support import tiny


def _export(out, family='recursive', n=3, **changes):
  c = tiny.cfg(
    export__format=changes.pop('export__format', 'speculators'),
    heads__family=family,
    heads__n=n,
    model__qk_norm='head',
    model__n_layers=2,
    **changes,
  )
  model = tiny.model(c, tiny.mesh(c))
  hf_folder.export(model, c, None, str(out), dtype='float32', about='a test')
  return c, jax.device_get(model)


@pytest.mark.parametrize('family, n', [('recursive', 4), ('recursive', 2), ('sequential', 2)])
def test_module_beside_its_verifier(family, n, tmp_path):
  c, model = _export(tmp_path / 'out', family, n)
  found = load_file(tmp_path / 'out/speculator/model.safetensors')
  D = c.model.d_model
  p = 'mtp_layers.0.'
  # The library joins [embedding; hidden state].
  proj = model.heads.proj[0]
  want = {
    'input_proj': np.concatenate([proj[D:], proj[:D]]).T,
    'hidden_layernorm': model.heads.hidden_norm[0],
    'token_layernorm': model.heads.embed_norm[0],
    'final_layernorm': model.heads.final_norm[0],
    'input_layernorm': model.heads.block.attn_norm[0],
    'self_attn.q_norm': model.heads.block.q_norm[0],
    'self_attn.o_proj': model.heads.block.o[0].reshape(-1, D).T,
    'mlp.gate_proj': model.heads.block.gate[0].T,
    'mlp.down_proj': model.heads.block.down[0].T,
  }
  for name, x in want.items():
    np.testing.assert_array_equal(found[f'{p}{name}.weight'], x)
  about = json.loads((tmp_path / 'out/speculator/config.json').read_text())
  base = json.loads((tmp_path / 'out/config.json').read_text())
  layer = about.pop('transformer_layer_config')
  assert layer == base and layer['model_type'] == 'qwen3' and layer['num_hidden_layers'] == 2
  greedy = {'speculative_tokens': n - 1, 'verifier_accept_k': 1, 'accept_tolerance': 0.0}
  assert about == {
    'architectures': ['MTPDraftModel'],
    'speculators_model_type': 'mtp',
    'speculators_version': '0.9.0',
    'num_nextn_predict_layers': 1,
    'speculators_config': {
      'algorithm': 'mtp',
      'proposal_methods': [{'proposal_type': 'greedy', **greedy}],
      'default_proposal_method': 'greedy',
      'verifier': {'name_or_path': str(tmp_path / 'out'), 'architectures': ['Qwen3ForCausalLM']},
    },
    'dtype': 'float32',
  }


@pytest.mark.parametrize('family, n', [('recursive', 4), ('recursive', 2)])
def test_import_without_mtp_jax_json(family, n, tmp_path):
  c, model = _export(tmp_path / 'out', family, n)
  os.remove(tmp_path / 'out' / hf_folder.OURS)
  cfg, ours = hf_folder.find(str(tmp_path / 'out'), {})
  assert not ours and (cfg.heads.n, cfg.heads.family) == (n, family)
  back = hf_folder.read(str(tmp_path / 'out'), cfg, tiny.mesh(c))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), model)


@pytest.mark.parametrize(
  'changes, problem',
  [
    (dict(transformer_layer_config={'rms_norm_eps': 5e-3}), 'differ in --model.norm_eps'),
    (dict(transformer_layer_config={'hidden_size': '16'}), 'hidden_size="16": must be'),
    (dict(transformer_layer_config={'ramp': 3}), 'ramp=3 in config.json: not known'),
    (dict(speculators_config={'proposal_methods': [{'speculative_tokens': 0}]}), 'must be'),
  ],
)
def test_other_modules_raise(changes, problem, tmp_path):
  _export(tmp_path / 'out')
  os.remove(tmp_path / 'out' / hf_folder.OURS)
  path = tmp_path / 'out' / hf.SPECULATOR
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(fields_lib.ConfigError, match=problem) as error:
    hf_folder.find(str(tmp_path / 'out'), {})
  assert hf.SPECULATOR in str(error.value) and '\n' not in str(error.value)


def test_speculators_of_other_kinds_are_left_alone(tmp_path):
  """Only the model that verifies is imported."""
  _export(tmp_path / 'out')
  os.remove(tmp_path / 'out' / hf_folder.OURS)
  path = tmp_path / 'out' / hf.SPECULATOR
  path.write_text(json.dumps(json.loads(path.read_text()) | dict(speculators_model_type='eagle3')))
  cfg, _ = hf_folder.find(str(tmp_path / 'out'), {})
  assert cfg.heads.n == 1 and cfg.export.format == 'hf'


def test_verifier_is_named(tmp_path):
  _export(tmp_path / 'out', export__verifier='someone/base')
  about = json.loads((tmp_path / 'out' / hf.SPECULATOR).read_text())
  assert about['speculators_config']['verifier']['name_or_path'] == 'someone/base'
  with pytest.raises(fields_lib.ConfigError, match='is of --export.format=speculators only'):
    _export(tmp_path / 'no', export__format='hf', export__verifier='someone/base')


def test_unfit_model_exits_with_2_on_one_line(tmp_path, capsys):
  from mtp_jax.checkpoint import saver

  run = str(tmp_path / 'run')
  c = schema.replace(
    tiny.cfg(heads__family='recursive', heads__n=3, model__n_layers=2), **{'train.workdir': run}
  )
  saver.save_params(tiny.model(c, tiny.mesh(c)), c, None, run)
  status = main.main(
    [
      *('export', run, f'--export.out={tmp_path / "out"}', '--export.format=speculators'),
      *('--mesh.fsdp=-1', '--train.compilation_cache='),
    ]
  )
  error = capsys.readouterr().err
  assert status == 2 and error.count('\n') == 1 and not (tmp_path / 'out').exists()
  assert '--export.format=speculators: is of qwen3; this model is of llama' in error
