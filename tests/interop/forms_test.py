"""Checkpoint formats: tensor names, and logits computed with plain PyTorch.

The forward passes here use only the exported folder: rotations in pairs (Meta) or
halves, and the definition of a head in each program's code.
"""

import json
import os
import shutil
import sys

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtp_jax.cli import main
from mtp_jax.config import fields as fields_lib
from mtp_jax.config import schema
from mtp_jax.data import tokenizers
from mtp_jax.interop import hf_folder, mapping, meta
from mtp_jax.model import params
from tests.support import parity, tiny

torch = parity.library('torch')
transformers = parity.library('transformers')

# Models that the formats support.
FITS = [
  ('meta', 'parallel', 'shared'),
  ('meta', 'parallel', 'tied'),
  ('mtp_llama', 'parallel', 'shared'),
  ('mtp_llama', 'parallel', 'tied'),
  ('mimo', 'recursive', 'shared'),
  ('mimo', 'recursive', 'tied'),
  ('transformers_mtp', 'sequential', 'tied'),
  ('transformers_mtp', 'recursive', 'shared'),
  ('gguf', 'sequential', 'shared'),
  ('gguf', 'sequential', 'replicated'),
  ('gguf', 'recursive', 'tied'),
  ('gguf', 'parallel', 'shared'),
  ('gguf', 'anticausal', 'tied'),
  ('gguf', 'linear', 'replicated'),
  ('medusa', 'residual', 'shared'),
  ('medusa', 'residual', 'tied'),
  ('medusa', 'residual', 'replicated'),
  ('speculators', 'recursive', 'shared'),
  ('speculators', 'recursive', 'tied'),
]
N = 3
# Options of the families that a format is of.
OPTIONS = {'speculators': dict(model__qk_norm='head')}


def _needs_torch(row):
  return row[0] == 'meta'  # consolidated.pth is PyTorch's


def _cfg(form, family, unembedding='shared', n=N, **changes):
  return tiny.cfg(
    export__format=form,
    heads__family=family,
    heads__n=n,
    heads__unembedding=unembedding,
    data__tokenizer='bytes',
    model__n_layers=2 + (n if schema.HEAD_FAMILIES[family] else 0),
    model__vocab_size=264,
    data__seq_len=64,
    **OPTIONS.get(form, {}) | changes,
  )


def _export(c, out, dtype='float32'):
  model = tiny.model(c, tiny.mesh(c))
  gguf = c.export.format == 'gguf'  # which does not support the bytes tokenizer
  tokenizer = None if gguf else tokenizers.get('bytes')
  hf_folder.export(model, c, tokenizer, str(out), dtype=dtype, about='a test')
  return model


def _given(form):
  return {'import.format': 'meta'} if form == 'meta' else {}


def _read(path, form, **given):
  cfg, ours = hf_folder.find(str(path), _given(form) | given)
  return cfg, ours, hf_folder.read(str(path), cfg, tiny.mesh(tiny.cfg()))


def _same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), b)


@pytest.mark.parametrize('form, family, unembedding', parity.marked(FITS, _needs_torch))
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_export_import_round_trip(form, family, unembedding, dtype, tmp_path):
  c = _cfg(form, family, unembedding, model__param_dtype=dtype, model__n_kv_heads=4)
  model = _export(c, tmp_path / 'out', dtype)
  cfg, ours, back = _read(tmp_path / 'out', form)
  assert ours and (cfg.model, cfg.heads) == (c.model, c.heads)
  _same(back, jax.device_get(model))


@pytest.mark.parametrize('form, family, unembedding', FITS)
def test_every_parameter_has_one_place_per_form(form, family, unembedding):
  c = _cfg(form, family, unembedding)
  leaves, of_path = params.by_path(tiny.model(c, tiny.mesh(c))), {}
  for place in mapping.tensors(c, mapping.of(c)).values():
    if not place.copy:
      of_path.setdefault(place.path, []).append(place.index)
  assert of_path.keys() == leaves.keys()
  for path, found in of_path.items():
    assert found == [None] or sorted(found) == list(range(leaves[path].shape[0])), path


LLAMA = [
  'input_layernorm',
  'self_attn.q_proj',
  'self_attn.k_proj',
  'self_attn.v_proj',
  'self_attn.o_proj',
  'post_attention_layernorm',
  'mlp.gate_proj',
  'mlp.up_proj',
  'mlp.down_proj',
]
QWEN3 = [*LLAMA, 'self_attn.q_norm', 'self_attn.k_norm']
META = [
  'attention_norm',
  'attention.wq',
  'attention.wk',
  'attention.wv',
  'attention.wo',
  'ffn_norm',
  'feed_forward.w1',
  'feed_forward.w2',
  'feed_forward.w3',
]
GGUF = [
  'attn_norm',
  'attn_q',
  'attn_k',
  'attn_v',
  'attn_output',
  'ffn_norm',
  'ffn_gate',
  'ffn_up',
  'ffn_down',
]
FUSED = ['attn_norm', 'attn_qkv']
BIASES = ['self_attn.q_proj.bias', 'self_attn.k_proj.bias', 'self_attn.v_proj.bias']


def _weights(prefixes, names):
  return {f'{p}{name}.weight' for p in prefixes for name in names}


def _biases(prefixes):
  return {p + name for p in prefixes for name in BIASES}


ENDS = {'model.embed_tokens.weight', 'lm_head.weight'}
TRUNK = ['model.layers.0.', 'model.layers.1.']
# For three heads over a trunk of two layers, taken from each program.
KEYS = {
  ('hf', 'sequential'): _weights([*TRUNK, 'mtp_heads.2.', 'mtp_heads.3.'], LLAMA)
  | _weights(['mtp_heads.2.', 'mtp_heads.3.'], ['hidden_norm', 'embed_norm', 'proj', 'final_norm'])
  | ENDS
  | {'model.norm.weight'},
  ('hf', 'recursive'): _weights([*TRUNK, 'mtp_heads.shared.'], LLAMA)
  | _weights(['mtp_heads.shared.'], ['hidden_norm', 'embed_norm', 'proj', 'final_norm'])
  | ENDS
  | {'model.norm.weight'},
  ('hf', 'anticausal'): _weights(
    [*TRUNK, 'model.layers.2.', 'model.layers.3.', 'model.layers.4.'], LLAMA
  )
  | ENDS
  | {'model.norm.weight'},
  ('meta', 'parallel'): _weights(
    ['layers.0.', 'layers.1.', 'layers.2.', 'extra_heads.0.', 'extra_heads.1.'], META
  )
  | {'tok_embeddings.weight', 'norm.weight', 'output.weight'},
  ('mtp_llama', 'parallel'): _weights(
    [*TRUNK, 'model.layers.2.', 'model.mtp_heads.0.', 'model.mtp_heads.1.'], LLAMA
  )
  | _weights(['model.mtp_norms.'], '012')
  | ENDS,
  ('mimo', 'recursive'): _weights([*TRUNK, 'model.mtp_layers.0.'], LLAMA)
  | _weights(
    ['model.mtp_layers.0.'],
    ['token_layernorm', 'hidden_layernorm', 'input_proj', 'final_layernorm'],
  )
  | _biases([*TRUNK, 'model.mtp_layers.0.'])
  | ENDS
  | {'model.norm.weight'},
  **dict.fromkeys(
    [('transformers_mtp', 'recursive'), ('transformers_mtp', 'sequential')],
    _weights([*TRUNK, 'model.layers.2.', 'model.layers.3.'], LLAMA)
    | _weights(
      ['model.layers.2.', 'model.layers.3.'], ['enorm', 'hnorm', 'eh_proj', 'shared_head.norm']
    )
    | ENDS
    | {'model.norm.weight'},
  ),
  ('gguf', 'parallel'): _weights(['blk.0.', 'blk.1.', 'blk.2.'], GGUF)
  | _weights([''], ['token_embd', 'output_norm', 'output'])
  | _weights(['mtp_heads.2.', 'mtp_heads.3.'], LLAMA),
  ('gguf', 'sequential'): _weights(['blk.0.', 'blk.1.', 'blk.2.', 'blk.3.'], [*FUSED, *GGUF[4:]])
  | _weights(['blk.2.nextn.', 'blk.3.nextn.'], ['eh_proj', 'enorm', 'hnorm', 'shared_head_norm'])
  | _weights([''], ['token_embd', 'output_norm', 'output']),
  ('medusa', 'residual'): _weights(TRUNK, LLAMA)
  | ENDS
  | {
    'model.norm.weight',
    'medusa/blocks.0.layers.0.weight',
    'medusa/blocks.1.layers.0.weight',
    'medusa/lm_head.weight',
  },
  ('speculators', 'recursive'): _weights([*TRUNK, 'speculator/mtp_layers.0.'], QWEN3)
  | _weights(
    ['speculator/mtp_layers.0.'],
    ['token_layernorm', 'hidden_layernorm', 'input_proj', 'final_layernorm'],
  )
  | ENDS
  | {'model.norm.weight'},
}


def _tensors(out):
  if (out / 'consolidated.pth').exists():
    return {name: x.numpy() for name, x in torch.load(out / 'consolidated.pth').items()}
  found = {}
  if (out / 'model.gguf').exists():
    reader = gguf.GGUFReader(out / 'model.gguf')
    found = {x.name: np.array(x.data) for x in reader.tensors}
  for path in sorted(out.glob('**/*.safetensors')):
    inside = path.relative_to(out).parent.as_posix()
    prefix = '' if inside == '.' else f'{inside}/'
    found |= {prefix + name: x for name, x in load_file(path).items()}
  return found


@pytest.mark.parametrize('form, family', parity.marked([*KEYS], _needs_torch))
def test_tensor_names_match_the_program(form, family, tmp_path):
  c = _cfg(form, family)
  _export(c, tmp_path / 'out')
  assert set(_tensors(tmp_path / 'out')) == KEYS[form, family]


@pytest.mark.parity
def test_description_files_have_the_programs_fields(tmp_path):
  found = {}
  for form, family, _ in FITS:
    if form not in found and form != 'gguf':
      c = _cfg(form, family)
      _export(c, tmp_path / form)
      name = 'params.json' if form == 'meta' else 'config.json'
      found[form] = json.loads((tmp_path / form / name).read_text())
  assert found['meta'] == dict(
    dim=16,
    n_layers=5,
    n_heads=4,
    n_kv_heads=2,
    multiple_of=1,
    ffn_dim_multiplier=pytest.approx(24.5 / 42),
    norm_eps=1e-5,
    rope_theta=10_000.0,
    n_future_tokens=3,
    vocab_size=264,
  )
  assert found['mtp_llama']['model_type'] == 'mtp_llama'
  assert found['mtp_llama']['prediction_heads'] == 3
  assert found['mtp_llama']['num_hidden_layers'] == 3
  assert found['mimo']['num_nextn_predict_layers'] == 1
  assert found['transformers_mtp']['num_mtp_layers'] == 2
  for form in 'mimo', 'transformers_mtp':
    assert found[form]['num_hidden_layers'] == 2
  medusa = json.loads((tmp_path / 'medusa/medusa/config.json').read_text())
  assert medusa['num_heads'] == 2 and medusa['num_hidden_layers'] == 1
  assert medusa['original_lm_head'] and medusa['truncated_vocab_size'] == 264
  _export(_cfg('medusa', 'residual', 'replicated'), tmp_path / 'own')
  own = json.loads((tmp_path / 'own/medusa/config.json').read_text())
  assert not own['original_lm_head']


# A Llama layer in PyTorch, with arrays by name.


def _norm(x, w, eps=1e-5):
  return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def _halves(x, theta=10_000.0):
  """Rotates i and i + H/2 of x (B, N, T, H) together."""
  T, H = x.shape[-2:]
  angle = torch.arange(T)[:, None] / theta ** (torch.arange(0, H, 2) / H)
  cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
  turned = torch.cat([-x[..., H // 2 :], x[..., : H // 2]], -1)
  return x * cos + turned * sin


def _pairs(x, theta=10_000.0):
  """Rotates 2i and 2i + 1 together, as complex numbers."""
  T, H = x.shape[-2:]
  angle = torch.arange(T)[:, None] / theta ** (torch.arange(0, H, 2) / H)
  z = torch.view_as_complex(x.reshape(*x.shape[:-1], H // 2, 2).contiguous())
  z = z * torch.polar(torch.ones_like(angle), angle)
  return torch.view_as_real(z).reshape(x.shape)


def _layer(w, prefix, x, names=LLAMA, turn=_halves):
  n1, q, k, v, o, n2, gate, up, down = (prefix + n + '.weight' for n in names)
  B, T, D = x.shape
  y = _norm(x, w[n1])

  def split(name):
    z = y @ w[name].T + w.get(name.removesuffix('weight') + 'bias', 0)
    return z.reshape(B, T, -1, 4).transpose(1, 2)

  q, k, v = turn(split(q)), turn(split(k)), split(v)
  k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
  score = (q @ k.transpose(2, 3)) / 2
  score = score.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
  a = (score.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D)
  x = x + a @ w[o].T
  y = _norm(x, w[n2])
  mlp = torch.nn.functional.silu(y @ w[gate].T) * (y @ w[up].T)
  return x + mlp @ w[down].T


META_ORDER = [*META[:7], META[8], META[7]]  # gate w1, up w3, down w2


def _run_meta(w, ids, about):
  """Returns logits of all heads (K, B, T, V), as in Meta's release."""
  del about
  x = w['tok_embeddings.weight'][ids]
  for i in range(2):
    x = _layer(w, f'layers.{i}.', x, META_ORDER, _pairs)
  heads = ['layers.2.', 'extra_heads.0.', 'extra_heads.1.']
  h = torch.stack([_layer(w, p, x, META_ORDER, _pairs) for p in heads])
  return _norm(h, w['norm.weight']) @ w['output.weight'].T


def _run_mtp_llama(w, ids, about):
  x = w['model.embed_tokens.weight'][ids]
  n = about['num_hidden_layers']
  for i in range(n - 1):
    x = _layer(w, f'model.layers.{i}.', x)
  heads = [
    f'model.layers.{n - 1}.',
    *(f'model.mtp_heads.{j}.' for j in range(about['prediction_heads'] - 1)),
  ]
  return torch.stack(
    [
      _norm(_layer(w, p, x), w[f'model.mtp_norms.{j}.weight']) @ w['lm_head.weight'].T
      for j, p in enumerate(heads)
    ]
  )


def _trunk(w, ids, about):
  x = w['model.embed_tokens.weight'][ids]
  for i in range(about['num_hidden_layers']):
    x = _layer(w, f'model.layers.{i}.', x)
  return x


def _shifted(emb, j):
  """Returns the embedding of the token j + 1 ahead, 0 at the first position."""
  ahead = torch.roll(emb, -(j + 1), 1)
  ahead[:, 0] = 0
  return ahead


def _run_mimo(w, ids, about):
  state, unembed = _norm(_trunk(w, ids, about), w['model.norm.weight']), w['lm_head.weight'].T
  emb = w['model.embed_tokens.weight'][ids]
  out = [state @ unembed]
  for j in range(N - 1):  # one module, applied repeatedly
    p = 'model.mtp_layers.0.'
    pair = torch.cat(
      [
        _norm(state, w[p + 'hidden_layernorm.weight']),
        _norm(_shifted(emb, j), w[p + 'token_layernorm.weight']),
      ],
      -1,
    )
    y = _layer(w, p, pair @ w[p + 'input_proj.weight'].T)
    state = _norm(y, w[p + 'final_layernorm.weight'])
    out.append(state @ unembed)
  return torch.stack(out)


def _run_transformers_mtp(w, ids, about):
  state = _norm(_trunk(w, ids, about), w['model.norm.weight'])
  assert about['tie_last_hidden_states']
  out = [state @ w['lm_head.weight'].T]
  emb = w['model.embed_tokens.weight'][ids]
  for j in range(about['num_mtp_layers']):
    p = f'model.layers.{about["num_hidden_layers"] + j}.'
    pair = torch.cat(
      [_norm(_shifted(emb, j), w[p + 'enorm.weight']), _norm(state, w[p + 'hnorm.weight'])], -1
    )
    y = _layer(w, p, pair @ w[p + 'eh_proj.weight'].T)
    state = _norm(y, w[p + 'shared_head.norm.weight'])
    out.append(state @ w['lm_head.weight'].T)
  return torch.stack(out)


def _run_medusa(w, ids, about):
  x = _norm(_trunk(w, ids, about), w['model.norm.weight'])
  out = [x @ w['lm_head.weight'].T]
  for j in range(2):
    y = x @ w[f'medusa/blocks.{j}.layers.0.weight'].T
    h = x + torch.nn.functional.silu(y)
    own = f'medusa/lm_heads.{j}.weight'
    out.append(h @ w[own if own in w else 'medusa/lm_head.weight'].T)
  return torch.stack(out)


RUN = {
  'meta': ('parallel', _run_meta),
  'mtp_llama': ('parallel', _run_mtp_llama),
  'mimo': ('recursive', _run_mimo),
  'transformers_mtp': ('sequential', _run_transformers_mtp),
  'medusa': ('residual', _run_medusa),
}


@pytest.mark.parity
@pytest.mark.parametrize(
  'form, unembedding', [*((form, 'shared') for form in RUN), ('medusa', 'replicated')]
)
def test_plain_torch_logits_match(form, unembedding, tmp_path):
  family, run = RUN[form]
  c = _cfg(form, family, unembedding)
  model = _export(c, tmp_path / 'out')
  name = 'params.json' if form == 'meta' else 'config.json'
  about = json.loads((tmp_path / 'out' / name).read_text())
  ids = np.random.default_rng(0).integers(0, 264, (2, 40))
  tensors = {name: torch.tensor(x) for name, x in _tensors(tmp_path / 'out').items()}
  theirs = run(tensors, torch.tensor(ids), about)
  position = np.tile(np.arange(40), (2, 1))
  with jax.set_mesh(tiny.mesh(c)):
    ours = jax.device_get(tiny.dense_logits(model, ids, position, c))
  T = 40 - c.span  # the last positions have no token ahead
  assert ours.shape[0] == N and np.std(ours) > 0.1
  np.testing.assert_allclose(ours[:, :, :T], theirs[:, :, :T], atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(
  'form, family, kind',
  [
    ('mimo', 'recursive', 'MiMoForCausalLM'),
    ('medusa', 'residual', 'LlamaForCausalLM'),
    ('transformers_mtp', 'recursive', 'LlamaMtpForCausalLM'),
  ],
)
def test_transformers_logits_match_head_1(form, family, kind, tmp_path, monkeypatch):
  monkeypatch.setattr(transformers.dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path / 'c'))
  c = _cfg(form, family)
  model = _export(c, tmp_path / 'out')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', dtype=torch.float32, trust_remote_code=form != 'medusa'
  )
  assert type(theirs).__name__ == kind
  ids = np.random.default_rng(0).integers(0, 264, (2, 40))
  with torch.no_grad():
    logits = theirs(torch.tensor(ids)).logits.numpy()
  position = np.tile(np.arange(40), (2, 1))
  window = np.pad(ids, ((0, 0), (0, c.span)))
  position = np.tile(np.arange(window.shape[1]), (2, 1))
  with jax.set_mesh(tiny.mesh(c)):
    ours = jax.device_get(tiny.dense_logits(model, window, position, c))[0]
  np.testing.assert_allclose(ours[:, :40], logits, atol=1e-4)


# Third-party checkpoints.


@pytest.mark.parametrize('form', [pytest.param('meta', marks=pytest.mark.parity), 'mtp_llama'])
def test_third_party_checkpoints_are_imported(form, tmp_path):
  c = _cfg(form, 'parallel', model__norm_eps=1e-6, model__rope_theta=500_000.0)
  model = _export(c, tmp_path / 'in')
  os.remove(tmp_path / 'in' / hf_folder.OURS)
  cfg, ours, back = _read(tmp_path / 'in', form)
  assert not ours and cfg.heads.n == N and cfg.model.n_layers == 2 + N
  assert (cfg.model.norm_eps, cfg.model.rope_theta) == (1e-6, 500_000.0)
  _same(back, jax.device_get(model))


@pytest.mark.parity
def test_llama_2_params_without_vocab_size(tmp_path):
  c = _cfg('meta', 'parallel', n=1, model__d_ff=0, model__n_kv_heads=0)
  model = _export(c, tmp_path / 'in')
  out = tmp_path / 'in'
  os.remove(out / hf_folder.OURS)
  about = json.loads((out / 'params.json').read_text())
  assert (about['multiple_of'], about['ffn_dim_multiplier']) == (256, None)
  kept = dict(dim=16, n_layers=3, n_heads=4, multiple_of=256, norm_eps=1e-5, vocab_size=-1)
  (out / 'params.json').write_text(json.dumps(kept))
  tensors = torch.load(out / 'consolidated.pth')
  torch.save(tensors | {'rope.freqs': torch.ones(2)}, out / 'consolidated.pth')
  cfg, _, back = _read(out, 'meta')
  assert cfg.model.vocab_size == 264 and cfg.model.n_kv_heads == 4
  _same(back, jax.device_get(model))


def test_meta_width_fields_represent_any_d_ff():
  for dim in 16, 18, 1024, 4096, 5120:
    for d_ff in (8, 24, 1000, 11008, 13824, 16384):
      fields = meta._multiples(dim, d_ff)
      assert meta.width(dim, fields['multiple_of'], fields['ffn_dim_multiplier']) == d_ff
  # Llama 2 70B and Llama 3 8B.
  assert meta.width(8192, 4096, 1.3) == 28672
  assert meta.width(4096, 1024, 1.3) == 14336


# Unsupported models.


@pytest.mark.parametrize(
  'form, family, changes, problem',
  [
    ('meta', 'causal', {}, 'parallel heads; these are causal'),
    ('mimo', 'parallel', {}, 'sequential and recursive heads; these are'),
    ('medusa', 'linear', {}, 'residual heads; these are linear'),
    (
      'mtp_llama',
      'parallel',
      dict(unembedding='replicated'),
      'has one unembedding; here each head has its own',
    ),
    ('meta', 'parallel', dict(model__d_head=6), '--model.d_head=6'),
    ('meta', 'parallel', dict(model__rope_factor=2.0), '--model.rope_factor=2'),
    # vLLM would load it, and silently generate a different text.
    ('mimo', 'recursive', dict(model__d_head=6), 'not --model.d_head=6'),
    ('mimo', 'sequential', {}, 'this model has 2; transformers_mtp and gguf'),
    ('transformers_mtp', 'sequential', dict(n=1), 'this model has one head'),
    ('mimo', 'recursive', dict(n=1), 'this model has one head'),
    ('medusa', 'residual', dict(n=1), 'this model has one'),
    (
      'transformers_mtp',
      'sequential',
      dict(loss__token_order_weight=1.0),
      '--loss.token_order_weight',
    ),
    ('medusa', 'residual', dict(heads__stride=2), '--heads.stride=2'),
    ('medusa', 'residual', dict(heads__markov_rank=4), '--heads.markov_rank=4'),
    ('speculators', 'parallel', {}, 'sequential and recursive heads; these are parallel'),
    ('speculators', 'sequential', {}, 'supports one module, this model has 2'),
    ('speculators', 'recursive', dict(n=1), 'this model has one head'),
    ('speculators', 'recursive', dict(model__qk_norm='none'), 'of qwen3; this model is of llama'),
    ('speculators', 'recursive', dict(unembedding='replicated'), 'has one unembedding'),
    ('speculators', 'recursive', dict(heads__stride=2), '--heads.stride=2'),
    (
      'speculators',
      'recursive',
      dict(heads__layer_type='sliding', heads__window=8),
      'full attention with RoPE in every layer',
    ),
  ],
)
def test_models_unsupported_by_a_form_raise(form, family, changes, problem, tmp_path):
  c = _cfg(form, family, **changes)
  with pytest.raises(fields_lib.ConfigError, match=problem) as error:
    _export(c, tmp_path / 'out')
  assert str(error.value).startswith(f'--export.format={form}: ')
  assert not os.listdir(tmp_path)


def _import(path, tmp_path, *args):
  return main.main(
    [
      'import',
      f'--import.path={path}',
      f'--train.workdir={tmp_path / "run"}',
      '--mesh.fsdp=-1',
      '--train.compilation_cache=',
      *args,
    ]
  )


@pytest.mark.parametrize(
  'form, name, problem',
  [
    ('mimo', 'model.layers.1.self_attn.k_proj.bias', 'must be 0'),
    ('mtp_llama', 'model.mtp_norms.1.weight', 'to model.mtp_norms.0.weight'),
    ('transformers_mtp', 'model.layers.3.hnorm.weight', 'to model.layers.2.'),
    ('medusa', 'medusa/lm_head.weight', 'must be equal to lm_head.weight'),
  ],
)
def test_copy_that_differs_raises(form, name, problem, tmp_path, capsys):
  one = 'recursive' if form == 'transformers_mtp' else RUN[form][0]
  _export(_cfg(form, one), tmp_path / 'in')
  path = tmp_path / 'in' / os.path.dirname(name) / 'model.safetensors'
  tensors = load_file(path)
  tensors[os.path.basename(name)][3] += 1
  save_file(tensors, path)
  assert _import(tmp_path / 'in', tmp_path) == 2
  error = capsys.readouterr().err
  assert name in error and problem in error and error.count('\n') == 1, error
  assert not (tmp_path / 'run').exists()


def _meta_folder(path, **changes):
  _export(_cfg('meta', 'parallel'), path)
  os.remove(path / hf_folder.OURS)
  about = json.loads((path / 'params.json').read_text()) | changes
  (path / 'params.json').write_text(json.dumps(about))


@pytest.mark.parity
@pytest.mark.parametrize(
  'changes, problem',
  [
    (dict(use_scaled_rope=True), 'use_scaled_rope=True in params.json'),
    (dict(dim='16'), 'params.json: dim="16": must be an integer from 1'),
    (dict(n_future_tokens=2), 'layers.3.attention.wk.weight is missing'),
    (dict(multiple_of=32), 'has shape (24, 16), the model (32, 16)'),
    (dict(n_heads=3), '--model.d_model=16: must be a multiple of'),
  ],
)
def test_bad_meta_params_raise(changes, problem, tmp_path, capsys):
  _meta_folder(tmp_path / 'in', **changes)
  assert _import(tmp_path / 'in', tmp_path, '--import.format=meta') == 2
  error = capsys.readouterr().err
  assert problem in error and error.count('\n') == 1, error
  assert not (tmp_path / 'run').exists()


@pytest.mark.parity
def test_truncated_pth_raises(tmp_path, capsys):
  _meta_folder(tmp_path / 'in')
  path = tmp_path / 'in' / 'consolidated.pth'
  whole = path.read_bytes()
  for size in len(whole) // 2, 10, 0:
    path.write_bytes(whole[:size])
    assert _import(tmp_path / 'in', tmp_path, '--import.format=meta') == 2
    error = capsys.readouterr().err
    assert 'not a tensor file of PyTorch' in error, error
    assert error.count('\n') == 1 and not (tmp_path / 'run').exists()
  path.unlink()
  assert _import(tmp_path / 'in', tmp_path, '--import.format=meta') == 2
  assert 'no such file' in capsys.readouterr().err


@pytest.mark.parity
def test_sharded_meta_checkpoint_raises(tmp_path, capsys):
  _meta_folder(tmp_path / 'in')
  os.rename(tmp_path / 'in/consolidated.pth', tmp_path / 'in' / meta.FIRST)
  assert len(_read(tmp_path / 'in', 'meta')[0:2]) == 2
  (tmp_path / 'in/consolidated.01.pth').touch()
  assert _import(tmp_path / 'in', tmp_path, '--import.format=meta') == 2
  assert 'is sharded over 2 files by attention heads' in capsys.readouterr().err


@pytest.mark.parity
@pytest.mark.parametrize(
  'change, problem',
  [
    (lambda w: w | {'norm.weight': w['norm.weight'].char()}, 'int8'),
    (lambda w: {'model': w}, 'model is dict'),
  ],
)
def test_pth_without_float_tensors_raises(change, problem, tmp_path, capsys):
  _meta_folder(tmp_path / 'in')
  path = tmp_path / 'in/consolidated.pth'
  torch.save(change(torch.load(path)), path)
  assert _import(tmp_path / 'in', tmp_path, '--import.format=meta') == 2
  error = capsys.readouterr().err
  assert problem in error and 'only floating-point tensors' in error


@pytest.mark.parity
def test_wrong_import_format_suggests_the_other(tmp_path, capsys):
  _meta_folder(tmp_path / 'in')
  assert _import(tmp_path / 'in', tmp_path) == 2
  assert 'use --import.format=meta for this folder' in capsys.readouterr().err
  shutil.rmtree(tmp_path / 'in')
  _export(_cfg('hf', 'parallel'), tmp_path / 'in')
  assert _import(tmp_path / 'in', tmp_path, '--import.format=meta') == 2
  assert 'use --import.format=hf for this folder' in capsys.readouterr().err


@pytest.mark.parametrize(
  'command, form, missing, extra',
  [
    ('export', 'hf', 'safetensors', 'hf'),
    ('export', 'meta', 'torch', 'meta'),
    ('export', 'mimo', 'tokenizers', 'hf'),
    ('import', 'meta', 'torch', 'meta'),
    ('export', 'gguf', 'gguf', 'gguf'),
  ],
)
def test_missing_extra_is_named(command, form, missing, extra, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, missing, None)  # importing it raises
  (tmp_path / 'in').mkdir()
  args = {
    'import': [f'--import.path={tmp_path / "in"}', f'--train.workdir={tmp_path / "out"}'],
    'export': [f'{tmp_path / "in"}', f'--export.out={tmp_path / "out"}'],
  }[command]
  assert (
    main.main([command, *args, f'--{command}.format={form}', '--train.compilation_cache=']) == 2
  )
  assert capsys.readouterr().err == (f'mtp: {missing}: is needed: pip install "mtp_jax[{extra}]"\n')
  assert not (tmp_path / 'out').exists()
