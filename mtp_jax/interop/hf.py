"""config.json of Hugging Face's Llama and of formats derived from it."""

import json
import os

from mtp_jax.config import fields, layer_types, schema, validate
from mtp_jax.interop import config_json, dialects, mapping, rope
from mtp_jax.io import jsonl
from mtp_jax.model import heads as heads_lib

# Export.


def describe(cfg: schema.CommandConfig, tokenizer, dtype, about) -> dict[str, str]:
  """Returns the text files of an export, by name."""
  form = cfg.export.format
  if form == 'gguf':
    return {'README.md': _card(cfg, about)}
  values = config_json.write(config_json.of(cfg), cfg) | KINDS.get(form, lambda _: {})(cfg)
  values |= dict(dtype=dtype, torch_dtype=dtype) | _ends(tokenizer)
  texts = {
    'config.json': json.dumps(values, indent=2),
    'generation_config.json': json.dumps(_ends(tokenizer), indent=2),
    'README.md': _card(cfg, about),
  }
  if form in CODE:
    name, code = CODE[form]
    texts[name.format(kind=config_json.prefix(cfg).lower())] = _code_of(code, cfg)
  if form == 'medusa':
    texts['medusa/config.json'] = json.dumps(_medusa(cfg, dtype), indent=2)
  if form == 'speculators':
    texts['speculator/config.json'] = json.dumps(_speculator(values, cfg), indent=2)
  return texts


def _code_of(code: str, cfg: schema.CommandConfig) -> str:
  """Returns the code of a Llama as that of the model's family."""
  d = dialects.DIALECTS[config_json.of(cfg)]
  for of_llama, name in (
    ('LlamaConfig', f'{d.prefix}{d.text}Config'),
    ('LlamaModel', f'{d.prefix}{d.text}Model'),
    ("'llama_mtp'", f"'{d.kind}_mtp'"),
    ('Llama', d.prefix),
  ):
    code = code.replace(of_llama, name)
  return code


def _ends(tokenizer) -> dict:
  if tokenizer is None:
    return {}
  several = len(tokenizer.stop_ids) > 1
  return dict(
    bos_token_id=tokenizer.bos, eos_token_id=list(tokenizer.stop_ids) if several else tokenizer.eos
  )


def _modules(cfg: schema.CommandConfig) -> int:
  return heads_lib.n_modules(cfg.heads, cfg.heads.n)


# Fields of config.json that a format adds or changes.
KINDS = {
  'mtp_llama': lambda cfg: dict(
    architectures=['MTPLlamaForCausalLM'], model_type='mtp_llama', prediction_heads=cfg.heads.n
  ),
  'mimo': lambda cfg: dict(
    architectures=['MiMoForCausalLM'],
    model_type='mimo',
    auto_map={'AutoConfig': 'mimo.MiMoConfig', 'AutoModelForCausalLM': 'mimo.MiMoForCausalLM'},
    attention_bias=True,
    use_sliding_window=False,
    num_nextn_predict_layers=_modules(cfg),
  ),
  'transformers_mtp': lambda cfg: _mtp(cfg),
}


def _mtp(cfg: schema.CommandConfig) -> dict:
  """Returns the fields of the Transformers MTP standard."""
  prefix, kind = config_json.prefix(cfg), config_json.of(cfg)
  module = f'{prefix.lower()}_mtp.{prefix}Mtp'
  types = layer_types.distinct(cfg)
  found = dict(
    architectures=[f'{prefix}MtpForCausalLM'],
    model_type=f'{kind}_mtp',
    auto_map={
      'AutoConfig': f'{module}Config',
      'AutoModel': f'{module}Model',
      'AutoModelForCausalLM': f'{module}ForCausalLM',
    },
    num_mtp_layers=cfg.heads.n - 1,
    tie_last_hidden_states=cfg.heads.trunk_state == 'post_norm',
  )
  if dialects.DIALECTS[kind].types:
    name = (
      'sliding_attention' if types[heads_lib.types_of_heads(cfg)[-1]].window else 'full_attention'
    )
    found['mtp_layer_types'] = [name] * (cfg.heads.n - 1)
  return found


# MiMo is Qwen 2 with a module that transformers does not run.
MIMO = '''"""MiMo's configuration and next-token model (trust_remote_code)."""

from transformers import Qwen2Config, Qwen2ForCausalLM


class MiMoConfig(Qwen2Config):
  model_type = 'mimo'


class MiMoForCausalLM(Qwen2ForCausalLM):
  config_class = MiMoConfig
  _keys_to_ignore_on_load_unexpected = [r'model\\.mtp_layers\\.']
'''
# The layers after the last one are not in the Llama, which ignores them:
# generate(use_mtp=True) loads them itself.
LLAMA_MTP = '''"""A Llama whose layers after the last predict further tokens.

Transformers drafts with them in generate(use_mtp=True).
"""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class LlamaMtpConfig(LlamaConfig):
  model_type = 'llama_mtp'


class _Ignores:
  config_class = LlamaMtpConfig

  def __init__(self, config):
    super().__init__(config)
    first = config.num_hidden_layers
    self._keys_to_ignore_on_load_unexpected = {
      rf'layers\\.{first + i}\\.' for i in range(config.num_mtp_layers)
    }


class LlamaMtpModel(_Ignores, LlamaModel):
  pass


class LlamaMtpForCausalLM(_Ignores, LlamaForCausalLM):
  pass
'''
CODE = {'mimo': ('mimo.py', MIMO), 'transformers_mtp': ('{kind}_mtp.py', LLAMA_MTP)}


def _medusa(cfg: schema.CommandConfig, dtype: str) -> dict:
  """Returns config.json of the heads only."""
  m = cfg.model
  return dict(
    architectures=['MedusaModel'],
    model_type='medusa',
    hidden_size=m.d_model,
    vocab_size=m.vocab_size,
    truncated_vocab_size=m.vocab_size,
    num_heads=cfg.heads.n - 1,
    num_hidden_layers=1,
    original_lm_head=cfg.heads.unembedding != 'replicated',
    medusa_fc_bias=False,
    dtype=dtype,
    torch_dtype=dtype,
  )


def _speculator(values: dict, cfg: schema.CommandConfig) -> dict:
  """Returns config.json of the module only, as MTPSpeculatorConfig of speculators 0.9.0.

  values: config.json of the model that verifies, of which the library takes embedding
    and unembedding.
  """
  greedy = dict(
    proposal_type='greedy',
    speculative_tokens=cfg.heads.n - 1,
    verifier_accept_k=1,
    accept_tolerance=0.0,
  )
  verifier = dict(name_or_path=cfg.export.verifier, architectures=values['architectures'])
  return dict(
    architectures=['MTPDraftModel'],
    speculators_model_type='mtp',
    speculators_version='0.9.0',
    speculators_config=dict(
      algorithm='mtp',
      proposal_methods=[greedy],
      default_proposal_method='greedy',
      verifier=verifier,
    ),
    num_nextn_predict_layers=1,
    transformer_layer_config=values,
    dtype=values['dtype'],
  )


def _card(cfg: schema.CommandConfig, about: str) -> str:
  form = mapping.of(cfg)
  extra = [k for k, p in mapping.tensors(cfg, form).items() if p.extra]
  lines = [
    '---',
    'library_name: transformers',
    'tags: [multi-token-prediction]',
    '---',
    '',
    f'# {about}',
    '',
    f'A {config_json.prefix(cfg)} with {mapping.layers_in_all(cfg)} layers, the trunk and'
    ' next-token head of a model that was trained to predict'
    f' {cfg.heads.n} tokens at once ({cfg.heads.family} heads; Gloeckle et al.'
    ' 2024, https://arxiv.org/abs/2404.19737). Written by mtp_jax; mtp_jax.json'
    ' has the configuration of the whole model.',
    '',
  ]
  if extra:
    where = mapping.FORMS[form].file or 'the same files'
    lines += [
      f'Its {len(extra)} further tensors, those of the heads that predict later'
      f' tokens, are in {where}.',
      '',
    ]
  return '\n'.join([*lines, *USE.get(form, [])])


USE = {
  'mimo': ['The layout is that of MiMo: `--trust-remote-code` for its configuration.', ''],
  'medusa': [
    'As the draft model of a serving engine: the folder medusa/, with'
    ' num_speculative_tokens the number of its heads.',
    '',
  ],
  'speculators': [
    'The folder speculator/ is read by SpeculatorModel.from_pretrained of the library'
    ' speculators, whose trainer continues its training.',
    '',
  ],
  'mtp_llama': ["The layout is that of Fast-LLM's mtp_llama, whose modeling code runs it.", ''],
}

# Import.

SIZE = range(1, 2**31)
NUMBER = (float, None)
_ROPE_OF_TYPE = {
  **dict.fromkeys(
    (
      *('rope_theta?', 'factor?', 'low_freq_factor?', 'high_freq_factor?', 'beta_fast?'),
      *('beta_slow?', 'attention_factor?', 'mscale?', 'mscale_all_dim?'),
      'partial_rotary_factor?',
    ),
    NUMBER,
  ),
  **dict.fromkeys(('rope_type?', 'type?'), str),
  'truncate?': bool,
  'original_max_position_embeddings?': (SIZE, None),
  ...: object,
}
ROPE = {**dict.fromkeys(('full_attention?', 'sliding_attention?'), _ROPE_OF_TYPE), **_ROPE_OF_TYPE}
# The fields of a config.json that are used.
ABOUT = {
  **dict.fromkeys(
    ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size', 'vocab_size'),
    SIZE,
  ),
  **dict.fromkeys(
    (
      'num_key_value_heads?',
      'head_dim?',
      'max_position_embeddings?',
      'prediction_heads?',
      'num_mtp_layers?',
      'num_nextn_predict_layers?',
      'sliding_window?',
      'sliding_window_pattern?',
      '_sliding_window_pattern?',
      'no_rope_layer_interval?',
    ),
    (SIZE, None),
  ),
  'max_window_layers?': (range(2**31), None),
  **dict.fromkeys(('rope_parameters?', 'rope_scaling?'), (ROPE, None)),
  **dict.fromkeys(('dtype?', 'torch_dtype?', 'hidden_act?', 'hidden_activation?'), (str, None)),
  **dict.fromkeys(
    (
      *('rms_norm_eps?', 'rope_theta?', 'rope_local_base_freq?', 'partial_rotary_factor?'),
      *('query_pre_attn_scalar?', 'attn_logit_softcapping?', 'final_logit_softcapping?'),
    ),
    NUMBER,
  ),
  **dict.fromkeys(
    (
      *('tie_word_embeddings?', 'attention_bias?', 'mlp_bias?', 'use_sliding_window?'),
      *('use_bidirectional_attention?', 'tie_last_hidden_states?'),
    ),
    (bool, None),
  ),
  **dict.fromkeys(('layer_types?', 'mtp_layer_types?'), ([str], None)),
  'no_rope_layers?': ([range(2)], None),
  ...: object,
}
# Kinds of config.json that are not a family of dialects.py: the format, and its family.
OF_FORMS = {
  'mtp_llama': ('mtp_llama', 'llama'),
  'mimo': ('mimo', 'qwen2'),
  **{f'{kind}_mtp': ('transformers_mtp', kind) for kind in dialects.DIALECTS},
}
# Fields of these formats.
OF_MODULES = {
  *('prediction_heads', 'num_mtp_layers', 'num_nextn_predict_layers'),
  *('tie_last_hidden_states', 'mtp_layer_types'),
}


def _error(folder: str, problem: str) -> fields.ConfigError:
  return fields.ConfigError('import.path', folder, problem)


SPECULATOR = os.path.join('speculator', 'config.json')
OF_SPECULATOR = {
  'speculators_model_type?': object,
  'speculators_config?': {
    'proposal_methods': [{'speculative_tokens': SIZE, ...: object}],
    ...: object,
  },
  'transformer_layer_config?': {...: object},
  ...: object,
}


def _speculator_beside(folder: str, about: dict, values: dict) -> int:
  """Returns the number of drafts of a folder's module of the format speculators; 0 if
  it has none.

  Args:
    folder: of the model that verifies, a Qwen 3.
    about: its config.json; the library leaves out fields that have transformers' default.
    values: the fields of a Config of it, which must be the module's too.
  """
  try:
    with open(os.path.join(folder, SPECULATOR), 'rb') as file:
      found = jsonl.loads(file.read(), OF_SPECULATOR)
    methods = found.get('speculators_config', {}).get('proposal_methods')
    if found.get('speculators_model_type') != 'mtp' or not methods:
      return 0
    layer = found.get('transformer_layer_config', {})
    jsonl.check(about | layer, ABOUT)
  except OSError:
    return 0
  except ValueError as error:
    raise _error(folder, f'{SPECULATOR}: {error}') from error
  try:
    of_module = config_json.read('qwen3', about | layer)
  except rope.Unsupported as error:
    raise _error(folder, f'{error}, in {SPECULATOR}') from error
  if odd := [name for name in values if values[name] != of_module.get(name)]:
    raise _error(folder, f'{SPECULATOR} and config.json differ in --{odd[0]}')
  return methods[0]['speculative_tokens']


def read(folder: str, about: dict, given: dict) -> schema.CommandConfig:
  """Converts a third-party config.json to a Config."""
  try:
    jsonl.check(about.get('model_type', ''), str, 'model_type')
    model_type = about.get('model_type', 'llama')
    form, kind = OF_FORMS.get(model_type, ('hf', model_type))
    if kind not in dialects.DIALECTS:
      known = ', '.join(map(repr, (*dialects.DIALECTS, *OF_FORMS)))
      raise _error(folder, f'model_type={model_type!r} in config.json; only {known}')
    if 'heads' in about and 'model' in about:
      raise _error(
        folder, 'is a run of mtp_jax already; mtp train --train.init_from starts from it'
      )
    jsonl.check(about, ABOUT)
  except fields.ConfigError:
    raise
  except ValueError as error:
    raise _error(folder, f'config.json: {error}') from error
  of_modules = {name: about[name] for name in OF_MODULES & about.keys() if form != 'hf'}
  about = {name: x for name, x in about.items() if name not in of_modules}
  try:
    values = config_json.read(kind, about)
  except rope.Unsupported as error:
    missing = '' if 'model_type' in about else '; it has no model_type, and is read as a Llama'
    raise _error(folder, f'{error}{missing}') from error
  if _dtype(about) not in DTYPES:
    raise _error(folder, f'dtype={_dtype(about)!r} in config.json; only {", ".join(DTYPES)}')
  drafts = _speculator_beside(folder, about, values) if (form, kind) == ('hf', 'qwen3') else 0
  form = 'speculators' if drafts else form
  n = {
    'hf': 1,
    'speculators': drafts + 1,
    'mtp_llama': of_modules.get('prediction_heads') or 1,
    'transformers_mtp': (of_modules.get('num_mtp_layers') or 0) + 1,
    'mimo': (of_modules.get('num_nextn_predict_layers') or 0) + 1,
  }[form]
  block_first, d = form in ('hf', 'mtp_llama'), dialects.DIALECTS[kind]
  tied = about.get('tie_word_embeddings')
  context = about.get('max_position_embeddings') or 2048
  values |= {
    'model.n_layers': about['num_hidden_layers'] + block_first * (n - 1),
    'model.max_position_embeddings': context,
    'heads.n': n,
    'heads.family': 'parallel' if block_first else 'recursive' if drafts else 'sequential',
    'heads.unembedding': 'tied' if (d.tied if tied is None else tied) else 'shared',
    'data.seq_len': context,
    # The dtypes of the weights, unless a flag sets others.
    'model.param_dtype': 'bfloat16' if _dtype(about) == 'bfloat16' else 'float32',
    'model.compute_dtype': 'float32' if _dtype(about) == 'float32' else 'bfloat16',
    'export.format': form,
    **_of_modules(folder, of_modules, form),
    **given,
  }
  return validate.validate(schema.replace(schema.CommandConfig(), **values))


def _of_modules(folder: str, found: dict, form: str) -> dict:
  """Returns the fields of a Config of modules after the Transformers MTP standard."""
  if form != 'transformers_mtp':
    return {}
  tied = found.get('tie_last_hidden_states')
  # A single module's own state is not read.
  raw = 'pre_norm' if (found.get('num_mtp_layers') or 0) < 2 else 'pre_norm_first'
  values = {'heads.trunk_state': raw if tied is False else 'post_norm'}
  types = set(found.get('mtp_layer_types') or ())
  if len(types) > 1:
    raise _error(folder, 'mtp_layer_types in config.json has several types; only one')
  if types:
    (name,) = types
    if name not in dialects.HF_TYPES:
      raise _error(folder, f'mtp_layer_types has {name!r} in config.json')
    values['heads.layer_type'] = dialects.HF_TYPES[name]
  return values


DTYPES = 'float32', 'bfloat16', 'float16'


def _dtype(about: dict) -> str:
  return about.get('dtype') or about.get('torch_dtype') or 'float32'
