"""config.json of Hugging Face's Llama and of formats derived from it."""

import json

from mtp_jax.config import fields, schema, validate
from mtp_jax.interop import mapping
from mtp_jax.io import jsonl
from mtp_jax.model import heads as heads_lib

# Export.


def describe(cfg: schema.CommandConfig, tokenizer, dtype, about) -> dict[str, str]:
  """Returns the text files of an export, by name."""
  form = cfg.export.format
  if form == 'gguf':
    return {'README.md': _card(cfg, about)}
  values = _llama(cfg, tokenizer, dtype) | KINDS.get(form, lambda _: {})(cfg)
  texts = {
    'config.json': json.dumps(values, indent=2),
    'generation_config.json': json.dumps(_ends(tokenizer), indent=2),
    'README.md': _card(cfg, about),
  }
  if form in CODE:
    name, code = CODE[form]
    texts[name] = code
  if form == 'medusa':
    texts['medusa/config.json'] = json.dumps(_medusa(cfg, dtype), indent=2)
  return texts


def _llama(cfg: schema.CommandConfig, tokenizer, dtype: str) -> dict:
  """Returns config.json of trunk and head 1."""
  m = cfg.model
  rope = dict(rope_type='default', rope_theta=m.rope_theta)
  if m.rope_factor > 1:
    rope |= dict(
      rope_type='llama3',
      factor=m.rope_factor,
      low_freq_factor=m.rope_low_freq,
      high_freq_factor=m.rope_high_freq,
      original_max_position_embeddings=m.original_max_position_embeddings,
    )
  return dict(
    architectures=['LlamaForCausalLM'],
    model_type='llama',
    attention_bias=False,
    attention_dropout=0.0,
    mlp_bias=False,
    hidden_act='silu',
    hidden_size=m.d_model,
    intermediate_size=m.ff_width,
    num_hidden_layers=mapping.layers_in_all(cfg),
    num_attention_heads=m.n_attn_heads,
    num_key_value_heads=m.kv_heads,
    head_dim=m.head_width,
    max_position_embeddings=cfg.model.max_position_embeddings or cfg.data.seq_len,
    rms_norm_eps=m.norm_eps,
    rope_parameters=rope,
    # For transformers before version 5.
    rope_theta=m.rope_theta,
    **(dict(rope_scaling=rope) if m.rope_factor > 1 else {}),
    tie_word_embeddings=cfg.heads.unembedding == 'tied',
    vocab_size=m.vocab_size,
    dtype=dtype,
    torch_dtype=dtype,
    **_ends(tokenizer),
  )


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
  'transformers_mtp': lambda cfg: dict(
    architectures=['LlamaMtpForCausalLM'],
    model_type='llama_mtp',
    auto_map={
      'AutoConfig': 'llama_mtp.LlamaMtpConfig',
      'AutoModel': 'llama_mtp.LlamaMtpModel',
      'AutoModelForCausalLM': 'llama_mtp.LlamaMtpForCausalLM',
    },
    num_mtp_layers=cfg.heads.n - 1,
    tie_last_hidden_states=False,  # trained on states before the final norm
  ),
}

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
CODE = {'mimo': ('mimo.py', MIMO), 'transformers_mtp': ('llama_mtp.py', LLAMA_MTP)}


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
    f'A Llama with {mapping.layers_in_all(cfg)} layers, the trunk and next-token'
    ' head of a model that was trained to predict'
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
  'mimo': [
    'The layout is that of MiMo: `--trust-remote-code` for its configuration.'
    ' Serving engines pass the hidden state after the final norm to the first'
    ' module, which was trained on the state before the norm, so that they accept'
    ' fewer drafts than mtp_jax.',
    '',
  ],
  'medusa': [
    'As the draft model of a serving engine: the folder medusa/, with'
    ' num_speculative_tokens the number of its heads.',
    '',
  ],
  'mtp_llama': ["The layout is that of Fast-LLM's mtp_llama, whose modeling code runs it.", ''],
}

# Import.

SIZE = range(1, 2**31)
ROPE = {
  **dict.fromkeys(('rope_theta?', 'factor?', 'low_freq_factor?', 'high_freq_factor?'), float),
  **dict.fromkeys(('rope_type?', 'type?'), str),
  'original_max_position_embeddings?': SIZE,
  ...: object,
}
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
    ),
    (SIZE, None),
  ),
  **dict.fromkeys(('rope_parameters?', 'rope_scaling?'), (ROPE, None)),
  **dict.fromkeys(('dtype?', 'torch_dtype?'), (str, None)),
  'rms_norm_eps?': (float, None),
  'rope_theta?': (float, None),
  'tie_word_embeddings?': (bool, None),
  ...: object,
}
# By model_type: the format, and whether its further heads are layers.
READ = {
  'llama': ('hf', True),
  'mtp_llama': ('mtp_llama', True),
  'llama_mtp': ('transformers_mtp', False),
}
# Fields of a config.json that must have this value, if present.
FIXED = {
  'hidden_act': 'silu',
  'attention_bias': False,
  'mlp_bias': False,
  'quantization_config': None,
  'partial_rotary_factor': 1.0,
}


def _error(folder: str, problem: str) -> fields.ConfigError:
  return fields.ConfigError('import.path', folder, problem)


def read(folder: str, about: dict, given: dict) -> schema.CommandConfig:
  """Converts a third-party config.json to a Config."""
  kind = about.get('model_type', 'llama')
  if kind not in READ:
    raise _error(folder, f'model_type={kind!r} in config.json; only {", ".join(map(repr, READ))}')
  form, block_first = READ[kind]
  if kind == 'llama_mtp' and about.get('tie_last_hidden_states', True):
    raise _error(
      folder,
      'tie_last_hidden_states is not false in config.json: its modules'
      ' read states after the final norm, not before it',
    )
  for field, expected in FIXED.items():
    if about.get(field, expected) != expected:
      raise _error(folder, f'{field}={about[field]!r} in config.json; only {expected!r}')
  try:
    jsonl.check(about, ABOUT)
  except ValueError as error:
    raise _error(folder, f'config.json: {error}') from error
  about = {name: value for name, value in about.items() if value is not None}
  n = {
    'hf': 1,
    'mtp_llama': about.get('prediction_heads', 1),
    'transformers_mtp': about.get('num_mtp_layers', 0) + 1,
  }[form]
  heads, d_model = about['num_attention_heads'], about['hidden_size']
  head_dim = about.get('head_dim') or d_model // heads
  values = {
    'model.d_model': d_model,
    'model.n_layers': about['num_hidden_layers'] + block_first * (n - 1),
    'model.n_attn_heads': heads,
    'model.n_kv_heads': about.get('num_key_value_heads') or heads,
    'model.d_head': 0 if head_dim * heads == d_model else head_dim,
    'model.d_ff': about['intermediate_size'],
    'model.vocab_size': about['vocab_size'],
    'model.norm_eps': about.get('rms_norm_eps', 1e-6),
    'heads.n': n,
    'heads.family': 'parallel' if block_first else 'sequential',
    'heads.unembedding': ('tied' if about.get('tie_word_embeddings', False) else 'shared'),
    'model.max_position_embeddings': about.get('max_position_embeddings', 2048),
    'data.seq_len': about.get('max_position_embeddings', 2048),
    # The dtype of the weights, unless a flag sets another.
    'model.compute_dtype': ('float32' if _dtype(about) == 'float32' else 'bfloat16'),
    'export.format': form,
    **_rope(folder, about),
    **given,
  }
  return validate.validate(schema.replace(schema.CommandConfig(), **values))


def _dtype(about: dict) -> str:
  return about.get('dtype') or about.get('torch_dtype') or 'float32'


def _rope(folder: str, about: dict) -> dict:
  """Reads rope_parameters, or the older rope_theta and rope_scaling."""
  rope = about.get('rope_parameters') or about.get('rope_scaling') or {}
  theta = rope.get('rope_theta', about.get('rope_theta', 10_000.0))
  kind = rope.get('rope_type', rope.get('type', 'default'))
  values = {'model.rope_theta': float(theta)}
  if kind == 'default':
    return values
  if kind != 'llama3':
    raise _error(folder, f'rope_type={kind!r} in config.json; only default and llama3')
  expected = 'factor', 'low_freq_factor', 'high_freq_factor'
  for field in (*expected, 'original_max_position_embeddings'):
    if field not in rope:
      raise _error(folder, f'config.json: RoPE of type llama3 has no {field}')
  return values | {
    'model.rope_factor': float(rope['factor']),
    'model.rope_low_freq': float(rope['low_freq_factor']),
    'model.rope_high_freq': float(rope['high_freq_factor']),
    'model.original_max_position_embeddings': int(rope['original_max_position_embeddings']),
  }
