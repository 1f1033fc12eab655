"""Model families of transformers: imported, exported, and drawn from by both."""

import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest

from mtp_jax.config import fields, schema
from mtp_jax.decode import decoder
from mtp_jax.interop import config_json, dialects, files, hf, hf_folder
from mtp_jax.model import lm, params
from mtp_jax.parallel import sharding
from tests.support import families, tiny

# Odd shapes: each family has the first; the slow tests have all.
SHAPES = {
  'grouped': {},
  'own d_head': dict(head_dim=12),
  'tied': dict(tie_word_embeddings=True),
  'untied, one key head': dict(tie_word_embeddings=False, num_key_value_heads=1),
  'odd widths': dict(
    hidden_size=36,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=4,
    intermediate_size=29,
    vocab_size=51,
  ),
  'as many key heads, deep': dict(num_key_value_heads=4, num_hidden_layers=7),
}


def _theirs(kind: str, folder, **changes):
  """Saves a random model of transformers, with weights that all matter; returns it."""
  import torch
  import transformers

  name = dialects.DIALECTS[kind].prefix
  suffix = f'{dialects.DIALECTS[kind].text}Config'
  values = families.SHAPE | families.FAMILIES[kind] | changes
  if 'layer_types' in values:
    n = values['num_hidden_layers']
    values['layer_types'] = (values['layer_types'] * 3)[:n]
  if 'no_rope_layers' in values:
    values['no_rope_layers'] = (values['no_rope_layers'] * 3)[: values['num_hidden_layers']]
  config = getattr(transformers, name + suffix)(**values)
  config._attn_implementation = 'eager'
  torch.manual_seed(0)
  model = getattr(transformers, f'{name}ForCausalLM')(config).eval()
  with torch.no_grad():
    for w in model.parameters():
      w += 0.1 * torch.randn(w.shape)
  model.save_pretrained(folder)
  return model


def _loaded(kind: str, folder):
  import transformers

  name = f'{dialects.DIALECTS[kind].prefix}ForCausalLM'
  return getattr(transformers, name).from_pretrained(folder, attn_implementation='eager').eval()


def _logits(model, ids) -> np.ndarray:
  import torch

  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0].float().numpy()


def _greedy(model, prompt, n: int) -> list[int]:
  import torch

  ids = list(prompt)
  out = model.generate(
    torch.tensor([ids]), max_new_tokens=n, min_new_tokens=n, do_sample=False, eos_token_id=None
  )
  return out[0, len(ids) :].tolist()


def _imported(folder):
  cfg, ours = hf_folder.find(str(folder), {'model.compute_dtype': 'float32'})
  mesh = tiny.mesh(tiny.cfg())
  return cfg, hf_folder.read(str(folder), cfg, mesh), mesh


def _ours(cfg, model, ids, mesh) -> np.ndarray:
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, sharding.pspec('batch'))
    tokens_BT = jax.device_put(np.array([ids], np.int32), rows)
    return np.asarray(jax.jit(lm.logits, static_argnums=2)(model, tokens_BT, cfg)[0, 0])


IDS = np.random.default_rng(0).integers(3, 50, 24).tolist()


@pytest.mark.parity
@pytest.mark.parametrize(
  'shape', [s if s == 'grouped' else pytest.param(s, marks=pytest.mark.slow) for s in SHAPES]
)
@pytest.mark.parametrize('kind', families.FAMILIES)
def test_logits_and_greedy_text_equal_transformers(kind, shape, tmp_path):
  """Of the import, and of transformers with the export; what is imported from that is
  the same, bit for bit."""
  theirs = _theirs(kind, tmp_path / 'theirs', **SHAPES[shape])
  cfg, model, mesh = _imported(tmp_path / 'theirs')
  found, want = _ours(cfg, model, IDS, mesh), _logits(theirs, IDS)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
  assert config_json.of(cfg) == kind
  n = 20 if shape == 'grouped' else 200
  prompt = IDS[:7]
  with_flags = schema.replace(cfg, **{'decode.max_new_tokens': n, 'decode.prefill_chunk_size': 4})
  decoded = decoder.Decoder(model, with_flags, mesh, 1)([np.array(prompt)])
  assert decoded.tokens[0].tolist() == _greedy(theirs, prompt, n)
  out = str(tmp_path / 'out')
  hf_folder.export(model, cfg, None, out, dtype='float32', about='test')
  again = _loaded(kind, out)
  np.testing.assert_array_equal(_logits(again, IDS), want)
  os.remove(os.path.join(out, hf_folder.OURS))  # as if by another program
  cfg_again, model_again, _ = _imported(out)
  assert not config_json.differing(kind, cfg_again)
  assert cfg_again.model == cfg.model and cfg_again.heads == cfg.heads
  jax.tree.map(np.testing.assert_array_equal, model_again, model)


PUBLISHED = json.loads((pathlib.Path(__file__).parent / 'published.json').read_text())
# What the published file says of the block, beside its widths.
SAYS = {
  'llama': dict(rope_factor=32, rope_scaling='llama3', rope_theta=5e5, layer_types='', window=0),
  'mistral': dict(window=4096, layer_types='', qkv_bias=False),
  'qwen2': dict(window=0, qkv_bias=True, o_bias=False, rope_theta=1e6),
  'qwen3': dict(qk_norm='head', d_head=128, window=0, qkv_bias=False),
  'olmo2': dict(qk_norm='full', norm_placement='after', rope_theta=5e5, norm_eps=1e-6),
  'olmo3': dict(
    window=4096,
    layer_types='sliding*3,full',
    rope_scaling='yarn',
    rope_factor=8,
    sliding_rope_theta=0,
    original_max_position_embeddings=8192,
  ),
  'gemma2': dict(
    window=4096,
    layer_types='sliding,full',
    attn_softcap=50,
    logits_softcap=30,
    activation='gelu_tanh',
    embedding_scale=48,
    attn_scale=0,
    norm_offset=True,
    norm_placement='both',
  ),
  'gemma3_text': dict(
    window=512,
    layer_types='sliding*5,full',
    rope_theta=1e6,
    sliding_rope_theta=1e4,
    rope_factor=1,
    attn_softcap=0,
    qk_norm='head',
  ),
  'smollm3': dict(layer_types='full*3,nope', rope_theta=5e6, window=0),
  'glm4': dict(rope_fraction=0.5, qkv_bias=True, norm_placement='both', o_bias=False),
  'mimo': dict(qkv_bias=True, rope_theta=640_000, window=0),
}


@pytest.mark.parametrize('kind', PUBLISHED)
def test_published_config_json(kind):
  """Files of transformers 4, as on the hub, literally; the number of parameters is that
  of the model's card."""
  published = PUBLISHED[kind]
  cfg = hf.read('folder', published['config'], {})
  assert params.count(lm.specs(cfg)) == published['parameters']
  assert {name: getattr(cfg.model, name) for name in SAYS[kind]} == SAYS[kind]
  assert cfg.model.n_layers == published['config']['num_hidden_layers']
  if kind == 'mimo':
    assert (cfg.heads.n, cfg.heads.family, cfg.heads.trunk_state) == (2, 'sequential', 'post_norm')
    assert config_json.of(cfg) == 'qwen2' and cfg.export.format == 'mimo'
  else:
    assert cfg.heads.n == 1 and config_json.of(cfg) == kind
    dtype = {'dtype': cfg.model.compute_dtype}
    again = hf.read('folder', config_json.write(kind, cfg) | dtype, {})
    assert again.model == cfg.model and again.heads == cfg.heads


LITERAL = json.loads((pathlib.Path(__file__).parent / 'literal.json').read_text())


@pytest.mark.parametrize('kind', LITERAL)
def test_literal_logits(kind, tmp_path):
  """Of a tiny model of each family, as transformers computed them; see support/families.py."""
  of = LITERAL[kind]
  shapes = {name: tuple(shape) for name, shape in of['shapes'].items()}
  files.write(str(tmp_path / files.WHOLE), families.weights(shapes))
  (tmp_path / 'config.json').write_text(json.dumps(of['config']))
  cfg, model, mesh = _imported(tmp_path)
  assert config_json.of(cfg) == kind
  found = _ours(cfg, model, families.IDS, mesh)
  np.testing.assert_allclose(found, of['logits'], rtol=2e-4, atol=2e-4)


def test_options_that_no_family_has_are_refused_by_name():
  gated = tiny.cfg(model__attn_gate=True, model__qk_norm='head')
  assert config_json.unfit(gated) == (
    'no model family of transformers has these options; qwen3 lacks --model.attn_gate=True'
  )
  odd = tiny.cfg(model__norm_placement='after', model__qk_norm='head')
  assert config_json.unfit(odd).startswith('no model family of transformers has these options')
  assert config_json.unfit(tiny.cfg()) == ''


@pytest.mark.parametrize('scale, problem', [(0, 'must be above 0'), (-4, 'must be above 0')])
def test_scale_of_queries_must_be_positive(scale, problem):
  config = PUBLISHED['gemma2']['config'] | dict(query_pre_attn_scalar=scale)
  with pytest.raises(fields.ConfigError, match=f'query_pre_attn_scalar={scale}; {problem}'):
    hf.read('folder', config, {})


@pytest.mark.parametrize(
  'changes, problem',
  [
    (dict(model_type=['llama']), 'config.json: model_type=["llama"]: must be text'),
    (dict(model_type=None), 'config.json: model_type=null: must be text'),
    (dict(num_attention_heads=2**20, head_dim=None), 'num_attention_heads=1048576 in config.json'),
    (dict(layer_types=['full_attention'] * 3), 'layer_types has 3 entries; num_hidden_layers=32'),
    (dict(layer_types=['chunked_attention'] * 32), "layer_types has 'chunked_attention'"),
  ],
)
def test_wrong_fields_of_config_json_are_named(changes, problem):
  config = PUBLISHED['olmo3']['config'] | changes
  with pytest.raises(fields.ConfigError, match=re.escape(problem)):
    hf.read('folder', config, {})


@pytest.mark.parametrize(
  'changes, problem',
  [
    (dict(layer_types=['full_attention'] * 2), 'layer_types has 2 entries; num_hidden_layers=28'),
    (dict(layer_types=['linear_attention'] * 28), "layer_types has 'linear_attention'"),
    (dict(layer_types=['sliding_attention'] * 28), 'layer_types has sliding_attention, and use_s'),
    (dict(torch_dtype='float8'), "dtype='float8' in config.json; only float32, bfloat16"),
    (dict(heads={}, model={}), 'is a run of mtp_jax already'),
  ],
)
def test_wrong_fields_of_a_qwen_are_named(changes, problem):
  config = PUBLISHED['qwen3']['config'] | changes
  with pytest.raises(fields.ConfigError, match=re.escape(problem)):
    hf.read('folder', config, {})


def test_a_config_without_a_model_type_says_so():
  config = {k: v for k, v in PUBLISHED['olmo3']['config'].items() if k != 'model_type'}
  with pytest.raises(fields.ConfigError, match='it has no model_type, and is read as a Llama'):
    hf.read('folder', config, {})


@pytest.mark.parametrize('kind', PUBLISHED)
def test_null_is_absent(kind):
  """Of every field of config.json but those that may be null, and the required ones."""
  config = PUBLISHED[kind]['config']
  for name in (*config, 'rope_local_base_freq', 'max_window_layers', 'no_rope_layer_interval'):
    needed = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size')
    meant = ('sliding_window', 'num_key_value_heads', 'model_type', 'no_rope_layers')
    if name in (*needed, *meant, 'vocab_size') or 'softcapping' in name:
      continue
    without = {key: value for key, value in config.items() if key != name}
    null, absent = (hf.read('folder', c, {}) for c in (without | {name: None}, without))
    assert null == absent, name
