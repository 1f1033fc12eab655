"""Exports with modules: drafts of a reference implementation and of engines.

tests/support/handover.py computes drafts from the exported files only; transformers
and llama.cpp run them (extra [parity]). tests/engines uses trained models and vLLM.
"""

import io
import json
import os
import shlex
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from mtp_jax.checkpoint import saver
from mtp_jax.cli import main
from mtp_jax.config import schema
from mtp_jax.data import ranks, tokenizers
from mtp_jax.decode import decoder
from mtp_jax.interop import (
  engines,
  hand_over,
  hf_folder,
  llama_cpp,
  llama_cpp_vocabulary,
  mapping,
  tokens,
)
from mtp_jax.io import paths
from mtp_jax.losses import targets
from mtp_jax.model import lm
from tests.support import handover, parity, runs, tiny

torch = parity.library('torch')
transformers = parity.library('transformers')
N, V, CONTEXT = 4, 400, 128
CODE = open(json.__file__, encoding='utf-8').read()
ROWS = [
  (form, family)
  for form in ('transformers_mtp', 'gguf', 'mimo')
  for family in ('sequential', 'recursive')
  if (form, family) != ('mimo', 'sequential')
]


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  """A SentencePiece model as mtp prepare trains one."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CODE.split('\n')),
    model_writer=model,
    vocab_size=V,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  path = tmp_path_factory.mktemp('pieces') / 'code.model'
  path.write_bytes(model.getvalue())
  return tokenizers.get(f'sentencepiece:{path}')


def _cfg(form, family, **changes):
  layers = N + 1 if schema.HEAD_FAMILIES[family] else 1
  return tiny.cfg(
    export__format=form,
    heads__family=family,
    heads__n=N,
    model__n_layers=layers,
    model__d_model=32,
    model__n_attn_heads=2,
    model__n_kv_heads=1,
    model__d_ff=48,
    model__vocab_size=V,
    model__max_position_embeddings=CONTEXT,
    data__seq_len=CONTEXT,
    **changes,
  )


def _agreeing(c):
  """A model whose modules often draft what head 1 predicts: each has the trunk's
  layer and reads the embedding, and a little of the previous state."""
  model = tiny.model(c, tiny.mesh(c))
  rng = np.random.default_rng(0)
  heads, D = model.heads, c.model.d_model
  reads = np.concatenate([0.3 * rng.standard_normal((D, D)) / np.sqrt(D), np.eye(D)])
  if c.heads.unembedding == 'replicated':
    same = jnp.broadcast_to(model.unembed[:1], model.unembed.shape)
    model = model.replace(unembed=same)
  model = model.replace(
    embed=jnp.asarray(rng.standard_normal((V, D)), jnp.float32),
    heads=heads.replace(
      proj=jnp.broadcast_to(jnp.asarray(reads, jnp.float32), heads.proj.shape),
      block=jax.tree.map(
        lambda mine, trunk: jnp.broadcast_to(trunk[:1], mine.shape), heads.block, model.trunk
      ),
    ),
  )
  return model


def _export(form, family, out, pieces, **changes):
  c = _cfg(form, family, **changes)
  with jax.set_mesh(tiny.mesh(c)):
    model = _agreeing(c)
  hf_folder.export(model, c, pieces, str(out), dtype='float32', about='a test')
  return c, model


def _of(out, form):
  if form == 'gguf':
    return handover.of_gguf(str(out / 'model.gguf'))
  return handover.of_folder(str(out))


QWEN3 = dict(model__qk_norm='head', model__norm_eps=1e-6)
GEMMA3 = dict(
  model__norm_placement='both',
  model__norm_offset=True,
  model__qk_norm='head',
  model__embedding_scale=32**0.5,
  model__activation='gelu_tanh',
  model__window=9,
  model__layer_types='sliding*5,full',
  model__rope_theta=1e6,
  model__sliding_rope_theta=1e4,
  heads__unembedding='tied',
)
# Modules with a window too.
GEMMA3_SLIDING = GEMMA3 | dict(heads__layer_type='sliding', model__norm_eps=1e-6)
MIMO = dict(model__qkv_bias=True)
BLOCKS = [
  *(pytest.param(*row, {}, id='-'.join(row)) for row in ROWS),
  pytest.param('transformers_mtp', 'sequential', QWEN3, id='transformers_mtp-qwen3'),
  pytest.param('transformers_mtp', 'recursive', GEMMA3_SLIDING, id='transformers_mtp-gemma3'),
  pytest.param('mimo', 'recursive', MIMO, id='mimo-qwen2'),
  pytest.param('speculators', 'recursive', QWEN3, id='speculators-qwen3'),
]


@pytest.mark.parametrize('form, family, changes', BLOCKS)
def test_exported_modules_draft_like_the_model(form, family, changes, tmp_path, pieces):
  """Acceptance on 256 tokens: with our hand-over of states it equals the training
  estimate; with an engine's it may differ slightly."""
  # As the engine hands states over, and as llama.cpp does.
  state = 'pre_norm' if form == 'gguf' else 'post_norm'
  c, model = _export(form, family, tmp_path / 'out', pieces, heads__trunk_state=state, **changes)
  ids = pieces.encode(CODE[1000:])[:256]
  found = handover.accepted(_of(tmp_path / 'out', form), ids, state, N - 1)
  window = np.pad(ids, (0, c.span))[None]
  with jax.set_mesh(tiny.mesh(c)):
    logits = tiny.dense_logits(model, window, np.arange(window.shape[1])[None], c)
  proposed, *accepted = targets.acceptance(jnp.argmax(logits, -1), jnp.ones((1, 256), bool))
  assert proposed == 256 - N + 1
  np.testing.assert_allclose(found, np.asarray(accepted) / float(proposed), atol=1e-9)
  engine = {'gguf': 'llama_cpp', 'mimo': 'vllm'}.get(form, 'transformers')
  there = handover.accepted(_of(tmp_path / 'out', form), ids, engine, N - 1)
  assert 0.2 < found[0] < 1 and abs(there[0] - found[0]) < 0.01


@pytest.mark.parametrize(
  'family, changes',
  [
    ('parallel', dict(heads__unembedding='tied')),
    ('sequential', dict(model__rope_factor=8.0, model__original_max_position_embeddings=32)),
  ],
)
def test_plain_gguf_logits_match(family, changes, tmp_path, pieces):
  c = _cfg('gguf', family, **changes)
  model = tiny.model(c, tiny.mesh(c))
  hf_folder.export(model, c, pieces, str(tmp_path / 'out'), dtype='float32', about='a test')
  m = handover.of_gguf(str(tmp_path / 'out' / llama_cpp.TENSORS))
  assert not m.modules and m.sizes.pairs
  ids = pieces.encode(CODE[1000:])[:256]
  window = np.pad(ids, (0, c.span))[None]
  with jax.set_mesh(tiny.mesh(c)):
    ours = tiny.dense_logits(model, window, np.arange(window.shape[1])[None], c)[0, 0]
  by_hand = handover._norm(handover.trunk(m, ids), m.norm, m.sizes)
  np.testing.assert_allclose(ours, by_hand @ m.unembed.T, atol=1e-4)


PROMPTS = ('def load(', 'class JSON', '\n    """', 'raise ')


def _greedy(m, prompt, new):
  """Returns the greedy text of head 1, by the reference."""
  ids = list(prompt)
  for _ in range(new):
    ids.append(int(handover.next_tokens(m, np.array(ids))[-1]))
  return ids


def _generate(model, prompt: list[int]) -> list[int]:
  """Returns the prompt and 24 greedy tokens that transformers drafts with the modules."""
  return model.generate(
    torch.tensor([prompt]),
    use_mtp=True,
    max_new_tokens=24,
    do_sample=False,
    attention_mask=torch.ones(1, len(prompt), dtype=int),
    eos_token_id=None,
    pad_token_id=0,
  )[0].tolist()


@pytest.mark.parity
@pytest.mark.parametrize(
  'family, changes',
  [
    ('sequential', dict(model__rope_factor=8.0, model__original_max_position_embeddings=32)),
    ('sequential', dict(heads__unembedding='tied', model__d_head=24)),
    ('recursive', {}),
    ('sequential', QWEN3),
    ('recursive', GEMMA3_SLIDING),
  ],
)
def test_transformers_drafts_with_every_module(family, changes, tmp_path, pieces, monkeypatch):
  monkeypatch.setattr(transformers.dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path / 'c'))
  out = tmp_path / 'out'
  _export('transformers_mtp', family, out, pieces, **changes)
  m = handover.of_folder(str(out))
  model = transformers.AutoModelForCausalLM.from_pretrained(
    out, dtype=torch.float32, trust_remote_code=True
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
  forwards, saved = [], 0
  model.register_forward_pre_hook(lambda *_: forwards.append(1))
  for text in PROMPTS:
    prompt = [pieces.bos, *pieces.encode(text).tolist()]
    assert tokenizer(text).input_ids == prompt
    forwards.clear()
    found = _generate(model, prompt)
    assert found == _greedy(m, prompt, 24)
    expected = handover.passes(m, found, len(prompt), 'transformers', N - 1)
    assert len(forwards) == expected
    saved += 24 - expected
  assert saved > 10


def _llama_cpp(tmp_path, out, prompts, new, steps, texts) -> dict:
  request = dict(
    folder=str(out), prompts=prompts, new=new, steps=steps, context=CONTEXT, texts=texts
  )
  (tmp_path / 'request').write_text(json.dumps(request))
  driver = os.path.join(runs.ROOT, 'tests/engines/run_llama_cpp.py')
  subprocess.run(
    [sys.executable, driver, tmp_path / 'request', tmp_path / 'result'],
    check=True,
    capture_output=True,
    timeout=100,
  )
  return json.loads((tmp_path / 'result').read_text())


@pytest.mark.parity
@pytest.mark.parametrize(
  'family, changes',
  [
    ('sequential', {}),
    ('recursive', dict(heads__unembedding='tied')),
    ('sequential', dict(heads__unembedding='replicated')),
    ('sequential', dict(model__d_head=24)),
    ('sequential', dict(model__rope_factor=8.0, model__original_max_position_embeddings=32)),
  ],
)
def test_llama_cpp_drafts_with_every_module(family, changes, tmp_path, pieces):
  out = tmp_path / 'out'
  c, _ = _export('gguf', family, out, pieces, **changes)
  m = handover.of_gguf(str(out / 'model.gguf'))
  steps = len(m.modules) and N - 1
  assert bool(steps) == (c.model.rope_factor == 1)
  prompts = [[pieces.bos, *pieces.encode(text).tolist()] for text in PROMPTS]
  found = _llama_cpp(tmp_path, out, prompts, 24, steps, PROMPTS)
  assert found['cut'] == prompts
  for prompt, ids in zip(prompts, found['ids'], strict=True):
    assert [*prompt, *ids] == _greedy(m, prompt, 24)
  if steps:
    expected = [
      handover.passes(m, [*prompt, *ids], len(prompt), 'llama_cpp', steps)
      for prompt, ids in zip(prompts, found['ids'], strict=True)
    ]
    assert found['passes'] == expected and sum(expected) < 4 * 24 - 10


OF_FAMILIES = {
  'mistral as llama': dict(model__n_layers=3),
  'qwen2': MIMO | dict(model__n_layers=3),
  'qwen3': dict(model__qk_norm='head', model__d_head=24, model__n_layers=3),
  'olmo2': dict(model__qk_norm='full', model__norm_placement='after', model__n_layers=3),
  'gemma2': dict(
    model__norm_placement='both',
    model__norm_offset=True,
    model__embedding_scale=32**0.5,
    model__activation='gelu_tanh',
    model__attn_softcap=5.0,
    model__logits_softcap=3.0,
    model__window=8,
    model__layer_types='sliding,full',
    model__n_layers=4,
    heads__unembedding='tied',
  ),
  'gemma3': GEMMA3
  | dict(model__window=8, model__rope_factor=4.0, model__rope_scaling='linear', model__n_layers=7),
  'smollm3': dict(model__layer_types='full*3,nope', model__n_layers=5),
  'olmo3': dict(
    model__qk_norm='full',
    model__norm_placement='after',
    model__window=8,
    model__layer_types='sliding*3,full',
    model__rope_factor=4.0,
    model__rope_scaling='yarn',
    model__rope_attention_factor=1.3,
    model__original_max_position_embeddings=32,
    model__n_layers=5,
  ),
  'glm4': dict(
    model__norm_placement='both', model__qkv_bias=True, model__rope_fraction=0.5, model__n_layers=3
  ),
}


def _gguf_of_family(name, out, pieces):
  """Returns (Config, mesh, model), after its export."""
  c = schema.replace(
    _cfg('gguf', 'linear'), **{'heads.n': 1, 'loss.weights': '0:1'} | _flags(OF_FAMILIES[name])
  )
  mesh = tiny.mesh(c)
  model = tiny.model(c, mesh)
  hf_folder.export(model, c, pieces, str(out), dtype='float32', about='a test')
  return c, mesh, model


@pytest.mark.parametrize('name', OF_FAMILIES)
def test_gguf_of_model_families_is_imported_as_the_same_model(name, tmp_path, pieces):
  c, mesh, model = _gguf_of_family(name, tmp_path / 'out', pieces)
  cfg, _ = hf_folder.find(str(tmp_path / 'out'), {})
  again = hf_folder.read(str(tmp_path / 'out'), cfg, mesh)
  atol = 2e-7 if c.model.norm_offset else 0  # 1 + w is rounded
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), again, model)


def test_gguf_of_olmo_3_and_glm_4_as_llama_cpp_reads_them(tmp_path, pieces):
  _gguf_of_family('olmo3', tmp_path / 'olmo3', pieces)
  reader = gguf.GGUFReader(tmp_path / 'olmo3/model.gguf')
  says = {name.partition('.')[2]: field.contents() for name, field in reader.fields.items()}
  assert says['architecture'] == 'olmo2' and says['attention.sliding_window'] == 8
  scaling = {x.removeprefix('rope.scaling.'): says[x] for x in says if 'rope.scaling' in x}
  # 1.3 in all, of which llama.cpp computes 0.1 ln 4 + 1 = 1.1386.
  assert scaling.pop('attn_factor') == pytest.approx(1.3 / 1.138629, rel=1e-5)
  assert scaling == dict(
    type='yarn', factor=4, original_context_length=32, yarn_beta_fast=32, yarn_beta_slow=1
  )
  c, _, model = _gguf_of_family('glm4', tmp_path / 'glm4', pieces)
  reader = gguf.GGUFReader(tmp_path / 'glm4/model.gguf')
  (fused,) = (x for x in reader.tensors if x.name == 'blk.0.ffn_up.weight')
  assert not any('ffn_gate' in x.name for x in reader.tensors)
  layer = jax.tree.map(lambda x: np.asarray(x[0]), model.trunk)
  np.testing.assert_array_equal(fused.data, np.concatenate([layer.gate.T, layer.up.T]))
  assert reader.fields['glm4.rope.dimension_count'].contents() == c.model.head_width // 2


@pytest.mark.parity
@pytest.mark.parametrize('name', OF_FAMILIES)
def test_llama_cpp_runs_model_families(name, tmp_path, pieces):
  c, mesh, model = _gguf_of_family(name, tmp_path / 'out', pieces)
  prompts = [[pieces.bos, *pieces.encode(text).tolist()] for text in PROMPTS[:2]]
  found = _llama_cpp(tmp_path, tmp_path / 'out', prompts, 24, 0, PROMPTS[:2])
  limited = schema.replace(c, **{'decode.max_new_tokens': 24})
  decode = decoder.Decoder(model, limited, mesh, 1)
  ours = decode([np.array(p) for p in prompts]).tokens
  # ggml's GELU is a table in half precision; the driver bans the end token.
  tie = 0.02 if c.model.activation == 'gelu_tanh' else 0.0
  compared = 0
  for prompt, theirs, mine in zip(prompts, found['ids'], ours, strict=True):
    same = next((i for i in range(24) if theirs[i] != mine[i]), 24)
    compared += same
    if same < 24 and mine[same] != pieces.eos:
      logits_V = decode.next_logits(np.array([*prompt, *theirs[:same]]))
      assert logits_V[mine[same]] - logits_V[theirs[same]] < tie
  assert compared > 20


# Whose modules Transformers computes with full attention and RoPE.
MODULES = {
  'smollm3': OF_FAMILIES['smollm3'] | dict(heads__layer_type='full'),
  'mistral': dict(model__window=16, heads__layer_type='full'),
}


@pytest.mark.parity
@pytest.mark.parametrize('name', ['qwen3', 'olmo2', 'gemma3', 'smollm3', 'mistral'])
def test_transformers_drafts_in_other_families(name, tmp_path, pieces, monkeypatch):
  """The same tokens as here, in fewer forward passes than tokens; not in as many as here,
  since Transformers reads the first position's embedding and we do not."""
  monkeypatch.setattr(transformers.dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path / 'c'))
  out = tmp_path / 'out'
  changes = _without_depth((OF_FAMILIES | MODULES)[name])
  c, model = _export('transformers_mtp', 'sequential', out, pieces, **changes)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    out, dtype=torch.float32, trust_remote_code=True
  )
  forwards = []
  theirs.register_forward_pre_hook(lambda *_: forwards.append(1))
  limited = schema.replace(c, **{'decode.max_new_tokens': 24})
  decode = decoder.Decoder(model, limited, tiny.mesh(c), N)
  for text in PROMPTS[:2]:
    prompt = [pieces.bos, *pieces.encode(text).tolist()]
    forwards.clear()
    found = _generate(theirs, prompt)
    decoded = decode([np.array(prompt)])
    assert found == [*prompt, *decoded.tokens[0].tolist()]
    assert len(forwards) < 23 and decoded.forwards[0] < 23


def _without_depth(changes):
  """The options of a family, for a `_cfg`, which has its own number of layers."""
  return {name: value for name, value in changes.items() if name != 'model__n_layers'}


def _flags(changes):
  return {name.replace('__', '.'): value for name, value in changes.items()}


def test_modules_of_a_type_that_no_layer_has_are_refused():
  """Transformers makes RoPE tables of the trunk's types only."""
  changes = _without_depth(OF_FAMILIES['gemma3'])
  c = _cfg('transformers_mtp', 'sequential', heads__layer_type='full', **changes)
  assert 'requires modules of a layer type of the trunk, not full' in mapping.unfit(
    c, 'transformers_mtp'
  )


@pytest.mark.parametrize(
  'changes, problem',
  [
    (dict(model__window=16), 'holds llama, qwen2, '),
    (
      OF_FAMILIES['olmo3'] | dict(model__rope_truncate=False),
      'no model family of transformers has these options',
    ),
    (OF_FAMILIES['olmo2'] | dict(model__d_head=24), 'no field for --model.d_head=24 in olmo2'),
    (OF_FAMILIES['gemma2'] | dict(model__attn_softcap=0.0), 'caps scores and logits of gemma2'),
    (OF_FAMILIES['gemma2'] | dict(model__logits_softcap=0.0), 'caps scores and logits of gemma2'),
    (
      OF_FAMILIES['gemma2'] | dict(model__n_layers=46, model__d_head=24),
      'has no field for --model.attn_scale',
    ),
    (
      dict(model__qkv_bias=True, model__window=16),
      'llama.cpp has layers full in qwen2, not sliding',
    ),
    (OF_FAMILIES['gemma3'] | dict(model__layer_types='sliding,full'), 'not sliding,full'),
    (
      dict(model__qk_norm='head', model__rope_factor=2.0, model__rope_scaling='yarn'),
      '--model.rope_scaling=yarn is not supported in qwen3',
    ),
  ],
)
def test_what_llama_cpp_does_not_run_is_refused(changes, problem):
  c = schema.replace(_cfg('gguf', 'linear'), **{'heads.n': 1} | _flags(changes))
  assert problem in mapping.unfit(c, 'gguf')


@pytest.mark.parametrize(
  'form, changes, problem',
  [
    (
      'transformers_mtp',
      OF_FAMILIES['smollm3'] | dict(heads__layer_type='nope'),
      'requires modules with RoPE: --heads.layer',
    ),
    ('transformers_mtp', dict(model__window=16), 'requires modules without a window: --heads'),
    ('transformers_mtp', MODULES['mistral'], ''),
    ('transformers_mtp', MODULES['smollm3'], ''),
    ('mimo', dict(model__qkv_bias=True, model__o_bias=True), 'no tensor for --model.o_bias'),
    ('mimo', dict(model__mlp_bias=True), 'no tensor for --model.o_bias or --model.mlp_bias'),
    ('mimo', dict(model__qkv_bias=True, model__window=16), 'has full attention with RoPE in every'),
    ('mimo', dict(heads__layer_type='nope'), 'has full attention with RoPE in every layer'),
  ],
)
def test_what_modules_cannot_state_is_refused(form, changes, problem):
  """The numbers that an engine would compute instead are wrong without an error."""
  changes = _without_depth(changes)
  family = 'recursive' if form == 'mimo' else 'sequential'
  found = mapping.unfit(_cfg(form, family, **changes), form)
  assert problem in found and bool(problem) == bool(found)


@pytest.mark.parametrize(
  'changes, problem',
  [
    (dict(model__activation='gelu'), 'has no field for --model.activation=gelu'),
    (dict(model__mlp_bias=True), 'has no tensors for biases'),
    (dict(heads__layer_type='nope'), 'has full attention with RoPE in every layer'),
  ],
)
def test_what_metas_format_cannot_state_is_refused(changes, problem):
  assert problem in mapping.unfit(_cfg('meta', 'parallel', **changes), 'meta')


def test_a_tokenizer_that_transformers_takes_for_qwens_is_named(pieces):
  assert 'PreTrainedTokenizerFast' in tokens.warning('qwen2', 'hf', pieces)
  own = pieces._replace(files={tokens.JSON: b'{}'})  # imported with the model
  assert not tokens.warning('qwen2', 'hf', own) and not tokens.warning('qwen3', 'hf', pieces)
  assert not tokens.warning('qwen2', 'mimo', pieces) and not tokens.warning('qwen2', 'hf', None)


def test_llama_cpp_drafts_with_full_modules_only():
  c = _cfg('gguf', 'sequential', heads__layer_type='sliding', heads__window=8)
  assert 'its modules have full attention, not --heads.layer_type' in mapping.undrafted(c)
  assert mapping.of(c) == 'gguf' and mapping.of(_cfg('gguf', 'sequential')) == 'gguf_mtp'


def test_export_with_too_large_tokenizer_raises(tmp_path, pieces, capsys):
  c = schema.replace(tiny.cfg(model__vocab_size=264), **{'train.workdir': str(tmp_path / 'run')})
  model = tiny.model(c, tiny.mesh(c))
  saver.save_params(model, c, None, c.train.workdir)
  assert (
    main.main(
      [
        'export',
        f'{tmp_path / "run"}',
        '--mesh.fsdp=-1',
        f'--export.out={tmp_path / "out"}',
        f'--data.tokenizer={pieces.name}',
        '--train.compilation_cache=',
      ]
    )
    == 2
  )
  error = capsys.readouterr().err
  assert f'has {V} tokens, the model has --model.vocab_size=264' in error, error
  assert error.count('\n') == 1 and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('state', ['post_norm', 'pre_norm', 'pre_norm_first'])
def test_state_that_modules_read_is_exported_and_imported(state, tmp_path, pieces):
  out = tmp_path / 'out'
  _export('transformers_mtp', 'sequential', out, pieces, heads__trunk_state=state)
  os.remove(out / hf_folder.OURS)
  about = json.loads((out / 'config.json').read_text())
  assert about['tie_last_hidden_states'] == (state == 'post_norm')
  # Transformers has no modules that hand on what is before their norm.
  read = 'pre_norm_first' if state == 'pre_norm' else state
  assert hf_folder.find(str(out), {})[0].heads.trunk_state == read
  if state == 'post_norm':  # true where it is absent
    del about['tie_last_hidden_states']
    (out / 'config.json').write_text(json.dumps(about))
    assert hf_folder.find(str(out), {})[0].heads.trunk_state == state


@pytest.mark.parametrize(
  'form, n, state, there',
  [
    ('transformers_mtp', 4, 'post_norm', 'post_norm'),
    ('transformers_mtp', 4, 'pre_norm', 'pre_norm_first'),
    ('transformers_mtp', 2, 'pre_norm', 'pre_norm'),
    ('gguf', 4, 'post_norm', 'pre_norm'),
    ('gguf', 2, 'pre_norm_first', 'pre_norm_first'),
    ('mimo', 2, 'pre_norm', 'post_norm'),
    ('mimo', 2, 'post_norm', 'post_norm'),
    ('speculators', 4, 'post_norm', 'post_norm'),
    ('speculators', 4, 'pre_norm', 'pre_norm_first'),
    ('hf', 4, 'pre_norm', 'pre_norm'),
  ],
)
def test_state_that_an_engine_hands_over(form, n, state, there):
  c = schema.replace(_cfg(form, 'recursive', heads__trunk_state=state), **{'heads.n': n})
  assert hand_over.of_engine(c) == there


def test_acceptance_that_an_engine_will_get(tmp_path, pieces):
  """Equals that of the files by hand, and the export says it in one line."""
  c, model = _export('gguf', 'sequential', tmp_path / 'out', pieces)
  text = pieces.encode(CODE[1000:])[:128].reshape(2, 64).astype(np.int32)
  by_hand = handover.of_gguf(str(tmp_path / 'out/model.gguf'))
  mesh, found = tiny.mesh(c), {}
  for state in ('post_norm', 'pre_norm', 'pre_norm_first'):
    found[state] = hand_over.accepted(model, text, c, state, mesh)
    want = [handover.accepted(by_hand, row[: 64 - c.span], state, N - 1) for row in text]
    np.testing.assert_allclose(found[state], np.mean(want, 0), atol=1e-6)
  assert len({tuple(rates) for rates in found.values()}) > 1
  line = hand_over.warning(model, c, pieces, mesh)
  assert line.startswith('llama.cpp will accept fewer drafts, the text is the same: ')
  assert '--heads.trunk_state=pre_norm, and were trained on post_norm' in line
  native = schema.replace(c, **{'heads.trunk_state': 'pre_norm'})
  assert hand_over.warning(model, native, pieces, mesh) == ''


def test_gguf_unused_ids_get_unique_names(tmp_path):
  tokenizer = _json(tmp_path, '')
  about = json.loads(tokenizer.files['tokenizer.json'])
  about['added_tokens'].append(about['added_tokens'][0] | dict(id=380, content='[unused 390]'))
  files = {'tokenizer.json': json.dumps(about).encode()}
  tokenizer = tokenizers.of_files('hf:x', tokenizer.files | files)
  c = _cfg('gguf', 'sequential')
  names = llama_cpp_vocabulary.vocabulary(tokenizer, c)['tokenizer.ggml.tokens']
  assert len(set(names)) == len(names) == V and '' not in names
  assert names[380] == '[unused 390]' != names[390]


def test_gguf_form_of_recursive_replicated_heads():
  for n, form in (2, 'gguf_mtp'), (3, 'gguf'):
    c = tiny.cfg(
      export__format='gguf', heads__family='recursive', heads__n=n, heads__unembedding='replicated'
    )
    assert mapping.of(c) == form
    places = mapping.tensors(c, form)
    blocks = {name.split('.')[1] for name in places if name[:4] == 'blk.'}
    assert len(blocks) == mapping.layers_in_all(c) + (form == 'gguf_mtp')


def test_run_by_returns_engine_command_lines():
  out = '/tmp/a b'
  for form, expected in (
    ('hf', "vllm serve '/tmp/a b'"),
    ('gguf', "llama-server -m '/tmp/a b/model.gguf'"),
    (
      'gguf_mtp',
      "llama-server -m '/tmp/a b/model.gguf' --spec-type draft-mtp --spec-draft-n-max 3",
    ),
    (
      'mimo',
      "vllm serve '/tmp/a b' --trust-remote-code --speculative-config"
      ' \'{"method": "mtp", "num_speculative_tokens": 3}\'',
    ),
    ('meta', ''),
  ):
    assert engines.run_by(form, out, 3) == expected
  *_, about = shlex.split(engines.run_by('medusa', out, 3))
  assert json.loads(about)['model'] == '/tmp/a b/medusa'
  *python, code, path = shlex.split(engines.run_by('transformers_mtp', out, 3))
  assert python == ['python', '-c'] and path == out
  compile(code, 'code', 'exec')


# Tokenizers that llama.cpp would read differently.


@pytest.mark.parametrize(
  'settings, problem',
  [
    (dict(model_type='unigram'), 'by merges'),
    (dict(normalization_rule_name='nmt_nfkc'), 'it normalizes texts'),
    (dict(remove_extra_whitespaces=True), 'it removes spaces'),
    (dict(byte_fallback=False), 'no byte pieces'),
    (dict(user_defined_symbols=['<x>']), 'it has user-defined symbols'),
  ],
)
def test_unsupported_sentencepiece_for_gguf_raises(settings, problem, tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CODE.split('\n')),
    model_writer=model,
    minloglevel=2,
    **dict(
      vocab_size=V,
      model_type='bpe',
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
    )
    | settings,
  )
  path = tmp_path / 'code.model'
  path.write_bytes(model.getvalue())
  tokenizer = tokenizers.get(f'sentencepiece:{path}')
  c = _cfg('gguf', 'sequential')
  with pytest.raises(paths.InputError, match=problem) as error:
    hf_folder.check(c, tokenizer)
  assert str(error.value).startswith('--export.format=gguf: does not support')
  with pytest.raises(paths.InputError, match='does not support --data.tokenizer=bytes'):
    hf_folder.check(c, tokenizers.get('bytes'))


def test_gguf_pieces_that_join_to_a_special_token_raise(pieces):
  proto = tokens.model_proto(pieces.files[tokenizers.PIECES])
  for text, problem in ('</s', "to the special '</s>'"), ('</', ''):
    more = type(proto)()
    more.CopyFrom(proto)
    for piece in text, '>':
      if piece not in {x.piece for x in proto.pieces}:
        more.pieces.add(piece=piece, score=-1.0, type=llama_cpp_vocabulary.NORMAL)
    files = {tokenizers.PIECES: more.SerializeToString()}
    why = llama_cpp_vocabulary.check(tokenizers.of_files('sentencepiece:x', files))
    assert (problem in why) if problem else not why, why


def _json(path, words, **model):
  """A byte-level tokenizer.json that splits words by a regular expression, or as
  GPT-2 does."""
  import tokenizers as hf

  level = hf.pre_tokenizers.ByteLevel
  before = level(add_prefix_space=False)
  if words:
    before = hf.pre_tokenizers.Sequence(
      [
        hf.pre_tokenizers.Split(hf.Regex(words), 'isolated'),
        level(add_prefix_space=False, use_regex=False),
      ]
    )
  fast = hf.Tokenizer(hf.models.BPE(**model))
  fast.pre_tokenizer = before
  fast.decoder = hf.decoders.ByteLevel()
  fast.train_from_iterator(
    CODE.split('\n'),
    hf.trainers.BpeTrainer(
      vocab_size=V - 20,
      special_tokens=['<|endoftext|>'],
      show_progress=False,
      initial_alphabet=level.alphabet(),
    ),
  )
  fast.save(str(path / 'tokenizer.json'))
  return tokenizers.get(f'hf:{path / "tokenizer.json"}')


WORDS = [
  ('gpt-2', '', False),
  ('llama-bpe', ranks.WORDS, True),
  ('dbrx', ranks.WORDS, False),
  ('qwen2', llama_cpp_vocabulary.QWEN2, False),
]


@pytest.mark.parametrize('name, words, whole', WORDS)
def test_gguf_pre_tokenizer_names(name, words, whole, tmp_path):
  c = _cfg('gguf', 'sequential')
  tokenizer = _json(tmp_path, words, ignore_merges=whole)
  hf_folder.check(c, tokenizer)
  metadata = llama_cpp_vocabulary.vocabulary(tokenizer, c)
  assert metadata['tokenizer.ggml.pre'] == name
  names = metadata['tokenizer.ggml.tokens']
  kinds = metadata['tokenizer.ggml.token_type']
  assert len(names) == len(kinds) == V
  assert names[tokenizer.bos] == '<|endoftext|>'
  assert kinds[tokenizer.bos] == llama_cpp_vocabulary.CONTROL
  assert kinds[-1] == llama_cpp_vocabulary.UNUSED
  assert not metadata['tokenizer.ggml.add_bos_token']  # nor does transformers


@pytest.mark.parity
@pytest.mark.parametrize('name, words, whole', WORDS)
def test_llama_cpp_tokenizes_identically(name, words, whole, tmp_path):
  tokenizer = _json(tmp_path, words, ignore_merges=whole)
  out = tmp_path / 'out'
  _export('gguf', 'sequential', out, tokenizer)
  texts = [
    CODE[:2000],
    'Größe 東京 🙂 \u2028',
    "it's 12345, ISN'T it?  a  b\t\n\n  c ",
    ' x',
    '\n',
    '',
  ]
  found = _llama_cpp(tmp_path, out, [[tokenizer.bos]], 1, 0, texts)
  assert found['cut'] == [tokenizer.encode(text).tolist() for text in texts]


def test_unsupported_tokenizer_json_for_gguf_raises(tmp_path):
  c = _cfg('gguf', 'sequential')
  tokenizer = _json(tmp_path, '')

  def changed(change):
    about = json.loads(tokenizer.files['tokenizer.json'])
    change(about)
    files = {'tokenizer.json': json.dumps(about).encode()}
    return tokenizers.of_files('hf:x', tokenizer.files | files)

  for other, problem in (
    (_json(tmp_path, r'\s+'), 'its pre-tokenizer is none of'),
    (
      changed(lambda x: x['pre_tokenizer'].update(add_prefix_space=True)),
      'its pre-tokenizer is none of',
    ),
    (
      changed(lambda x: x['added_tokens'][0].update(lstrip=True)),
      'depends on the spaces around it',
    ),
    (changed(lambda x: x.update(normalizer={'type': 'NFC'})), 'it normalizes texts'),
    (tokenizer._replace(more_eos=(1, 2, 3)), 'it has 4 end tokens'),
    (tokenizer._replace(more_eos=(5000,)), 'its end token 5000 is out of range'),
    (
      changed(
        lambda x: x['added_tokens'].append(
          x['added_tokens'][0] | dict(id=380, content='<|end|>', special=False)
        )
      ),
      'is not special, but is to llama.cpp',
    ),
    (
      changed(
        lambda x: (
          x['model'].update(ignore_merges=True),
          x.update(
            pre_tokenizer=json.loads(_json(tmp_path, ranks.WORDS).files['tokenizer.json'])[
              'pre_tokenizer'
            ]
          ),
          x['added_tokens'].append(x['added_tokens'][0] | dict(id=380, content='system')),
        )
      ),
      "find its token 'system' in plain text",
    ),
    (
      changed(
        lambda x: x.update(
          post_processor=dict(
            type='TemplateProcessing',
            single=[
              {'Sequence': dict(id='A', type_id=0)},
              {'SpecialToken': dict(id='<|endoftext|>', type_id=0)},
            ],
            pair=[{'Sequence': dict(id='A', type_id=0)}, {'Sequence': dict(id='B', type_id=0)}],
            special_tokens={
              '<|endoftext|>': dict(id='<|endoftext|>', ids=[0], tokens=['<|endoftext|>'])
            },
          )
        )
      ),
      'it encodes x as .*, not',
    ),
    (changed(lambda x: x['model'].update(dropout=0.5)), 'does not support dropout=0.5'),
    (
      changed(lambda x: x['model'].update(end_of_word_suffix='</w>')),
      'does not support end_of_word_suffix',
    ),
    (
      changed(lambda x: x['pre_tokenizer'].update(dict(type='Sequence', pretokenizers=[]))),
      'its pre-tokenizer is none of',
    ),
    (
      changed(
        lambda x: x['added_tokens'].append(
          x['added_tokens'][0] | dict(id=380, content='t|>x', special=False)
        )
      ),
      'may overlap in a text',
    ),
  ):
    with pytest.raises(paths.InputError, match=problem):
      hf_folder.check(c, other)


def test_equal_modules_are_imported_as_recursive(tmp_path, pieces):
  """Without mtp_jax.json, from the files that Transformers reads."""
  for family in 'sequential', 'recursive':
    out = tmp_path / family
    c, model = _export('transformers_mtp', family, out, pieces)
    os.remove(out / hf_folder.OURS)
    if family == 'sequential':  # tiny's modules differ, _agreeing's do not
      with jax.set_mesh(tiny.mesh(c)):
        model = tiny.model(c, tiny.mesh(c))
      hf_folder.export(model, c, pieces, str(tmp_path / 'new'), dtype='float32', about='a test')
      out = tmp_path / 'new'
      os.remove(out / hf_folder.OURS)
    cfg, ours = hf_folder.find(str(out), {})
    assert not ours and cfg.heads.family == family and cfg.heads.n == N
    back = hf_folder.read(str(out), cfg, tiny.mesh(c))
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(model))
    assert lm.specs(cfg).heads is not None


@pytest.mark.parametrize(
  'damage, problem',
  [
    (lambda data: b'', 'it is empty'),
    (lambda data: b'GGML' + data[4:], 'no header of GGUF version 2 or 3'),
    (lambda data: data[:100], 'it is truncated or corrupt'),
    (lambda data: data[: len(data) // 2], 'it is truncated within'),
    (lambda data: data[:8] + b'\xff' * 16 + data[24:], 'truncated or corrupt'),
    (lambda data: data.replace(b'output.weight', b'outputXweight'), 'missing'),
    (lambda data: data.replace(b'attn_qkv', b'attn_xkv'), 'attn_k.weight is'),
  ],
)
def test_corrupt_gguf_raises_on_one_line(damage, problem, tmp_path, capsys):
  _export('gguf', 'sequential', tmp_path / 'in', None)
  path = tmp_path / 'in' / llama_cpp.TENSORS
  path.write_bytes(damage(path.read_bytes()))
  assert (
    main.main(
      [
        'import',
        f'--import.path={tmp_path / "in"}',
        '--mesh.fsdp=-1',
        f'--train.workdir={tmp_path / "run"}',
        '--train.compilation_cache=',
      ]
    )
    == 2
  )
  error = capsys.readouterr().err
  assert problem in error and error.count('\n') == 1, error
  assert not (tmp_path / 'run').exists()
