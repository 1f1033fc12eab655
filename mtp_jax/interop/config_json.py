"""config.json of a model family of transformers to a Config, and back.

A Config is of the first family of dialects.py whose config.json, written and read again,
gives the same model.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from mtp_jax.config import layer_types, schema
from mtp_jax.interop import dialects, rope
from mtp_jax.io import jsonl
from mtp_jax.model import heads as heads_lib


def read(kind: str, about: dict) -> dict[str, Any]:
  """Returns the fields of a Config of a config.json, whose types are checked.

  Args:
    kind: of dialects.DIALECTS.
    about: config.json.

  Raises:
    rope.Unsupported: a field that changes the function has an unsupported value, or is
      not known.
  """
  d = dialects.DIALECTS[kind]
  check_known(
    about, {f.name for f in d.fields} | d.fixed.keys() | (dialects.TYPES if d.types else set())
  )
  for name, allowed in d.fixed.items():
    if about.get(name) not in allowed:
      raise rope.Unsupported(f'{name}={about[name]!r} in config.json; only {allowed[-1]!r}')
  heads, d_model, n = (
    about[name] for name in ('num_attention_heads', 'hidden_size', 'num_hidden_layers')
  )
  d_head = about.get('head_dim') or d.d_head or d_model // heads
  if not d_head:
    raise rope.Unsupported(
      f'num_attention_heads={heads} in config.json; at most hidden_size={d_model}'
    )
  kv_heads = about.get('num_key_value_heads') or (heads if d.kv_heads is None else d.kv_heads)
  if 'num_key_value_heads' in about and about['num_key_value_heads'] is None:
    kv_heads = heads
  values = {
    'd_model': d_model,
    'n_attn_heads': heads,
    'n_kv_heads': kv_heads,
    'd_head': 0 if d_head * heads == d_model else d_head,
    'd_ff': about['intermediate_size'],
    'vocab_size': about['vocab_size'],
    'norm_eps': about.get('rms_norm_eps') or d.eps,
    **d.options,
  }
  for field in d.fields:
    try:
      values[field.ours] = field.of(about)
    except rope.Unsupported as error:
      raise rope.Unsupported(f'{field.name}={error}') from None
  if d.scaled_embeddings:
    values['embedding_scale'] = math.sqrt(d_model)
  if values.get('attn_scale') == d_head**-0.5:
    values['attn_scale'] = 0.0
  types = d.types(about, n) if d.types else ['full'] * n
  if len(types) != n:
    raise rope.Unsupported(f'layer_types has {len(types)} entries; num_hidden_layers={n}')
  values |= _pattern(types, about, d)
  values |= rope.read(about, 'sliding' in types, d)
  return {f'model.{name}': value for name, value in values.items()}


def check_known(about: dict, known: set[str]) -> None:
  """Raises rope.Unsupported for a field that is neither read nor without effect, unless
  it is null."""
  known = known | dialects.COMMON | dialects.IGNORED
  for name, value in about.items():
    if name not in known and value is not None:
      shown = jsonl.one_line(value, 60)
      raise rope.Unsupported(
        f'{name}={shown} in config.json: not known, and it may change the model'
      )


def _pattern(types: Sequence[str], about: dict, d: dialects.Dialect) -> dict[str, Any]:
  """Returns window and the shortest layer_types that repeat to these."""
  if set(types) == {'full'}:
    return {}
  window = {}
  if 'sliding' in types:
    window = {'window': about.get('sliding_window') or d.sliding_window}
  if set(types) == {'sliding'}:
    return window
  n = len(types)
  period = next(p for p in range(1, n + 1) if all(types[i] == types[i % p] for i in range(n)))
  runs: list[tuple[str, int]] = []
  for name in types[:period]:
    if runs and runs[-1][0] == name:
      runs[-1] = name, runs[-1][1] + 1
    else:
      runs.append((name, 1))
  text = ','.join(name if times == 1 else f'{name}*{times}' for name, times in runs)
  return window | {'layer_types': text}


def write(kind: str, cfg: schema.Config) -> dict[str, Any]:
  """Returns config.json of trunk and head 1 in a family, without token ids and dtype."""
  d, m = dialects.DIALECTS[kind], cfg.model
  n = len(heads_lib.next_token_layers(cfg))
  values: dict[str, Any] = dict(
    architectures=[f'{d.prefix}ForCausalLM'],
    model_type=kind,
    attention_dropout=0.0,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    hidden_size=m.d_model,
    intermediate_size=m.ff_width,
    num_hidden_layers=n,
    num_attention_heads=m.n_attn_heads,
    num_key_value_heads=m.kv_heads,
    head_dim=m.head_width,
    max_position_embeddings=m.max_position_embeddings or cfg.data.seq_len,
    rms_norm_eps=m.norm_eps,
    tie_word_embeddings=cfg.heads.unembedding == 'tied',
    vocab_size=m.vocab_size,
  )
  for field in d.fields:
    value = getattr(m, field.ours)
    if field is dialects.SCALE:
      value = m.score_scale
    values[field.name] = field.write(value)
  types = [layer_types.name_of_layer(m, i) for i in range(n)]
  if d.types:
    values |= _types_of(kind, types, m)
  values |= rope.write(m, types, d)
  return {name: x for name, x in values.items() if x is not None or name in KEPT_NONE}


# Written as null: their absence is another value. Token ids of a family's own models may
# lie beyond the vocabulary.
KEPT_NONE = (
  *('sliding_window', 'attn_logit_softcapping', 'final_logit_softcapping'),
  *('bos_token_id', 'eos_token_id', 'pad_token_id'),
)


def _types_of(kind: str, types: list[str], m: schema.ModelConfig) -> dict[str, Any]:
  """Returns the fields of config.json that say what type each layer is."""
  if kind == 'smollm3':
    return dict(no_rope_layers=[int(name != 'nope') for name in types], use_sliding_window=False)
  sliding = 'sliding' in types
  found: dict[str, Any] = dict(sliding_window=m.window if sliding else None)
  if kind == 'mistral':
    return found
  names = {ours: name for name, ours in dialects.HF_TYPES.items()}
  found['layer_types'] = [names.get(name, 'full_attention') for name in types]
  if kind in ('qwen2', 'qwen3'):
    found['use_sliding_window'] = sliding
    found['max_window_layers'] = types.index('sliding') if sliding else len(types)
  elif not sliding:
    found['sliding_window'] = 4096  # required, and without effect
  return found


# Fields of --model.* that config.json does not have.
OURS = frozenset(
  """
  n_layers max_position_embeddings param_dtype compute_dtype remat attention
  """.split()
)


def differing(kind: str, cfg: schema.Config) -> list[str]:
  """Returns the fields of --model.* that a family cannot hold: those that differ after
  config.json is written and read again."""
  try:
    values = read(kind, write(kind, cfg))
  except rope.Unsupported:
    return ['layer_types']
  again = schema.replace(cfg, **{f'model.{n}': x for n, x in DEFAULTS.items()} | values).model
  n = len(heads_lib.next_token_layers(cfg))
  return [name for name in DEFAULTS if _effect(name, again, n) != _effect(name, cfg.model, n)]


DEFAULTS = {
  name.removeprefix('model.'): field.default
  for name, field in schema.fields(schema.Config).items()
  if name.startswith('model.') and name.removeprefix('model.') not in OURS
}


def _effect(name: str, m: schema.ModelConfig, n: int):
  """Returns a value that is equal where the effect is, on n layers of the next token."""
  types = [layer_types.name_of_layer(m, i) for i in range(n)]
  sliding = 'sliding' in types
  yarn = m.rope_factor > 1 and m.rope_scaling == 'yarn'
  llama3 = m.rope_factor > 1 and m.rope_scaling == 'llama3'
  if name in ('rope_beta_fast', 'rope_beta_slow', 'rope_truncate'):
    return getattr(m, name) if yarn else None
  if name in ('rope_low_freq', 'rope_high_freq'):
    return getattr(m, name) if llama3 else None
  if name == 'original_max_position_embeddings':
    return getattr(m, name) if yarn or llama3 else None
  match name:
    case 'n_kv_heads':
      return m.kv_heads
    case 'd_head':
      return m.head_width
    case 'd_ff':
      return m.ff_width
    case 'attn_scale':
      return round(m.score_scale, 12)
    case 'embedding_scale':
      return round(m.embedding_scale, 6)
    case 'qk_norm_eps':
      return m.qk_norm_eps or m.norm_eps
    case 'rope_scaling':
      return m.rope_scaling if m.rope_factor > 1 else ''
    case 'rope_attention_factor':
      return m.rope_attention_factor if yarn else None
    case 'sliding_rope_theta':
      return (m.sliding_rope_theta or m.rope_theta) if sliding else None
    case 'rope_theta':
      return m.rope_theta if set(types) != {'sliding'} else None
    case 'window':
      return m.window if sliding else 0
    case 'layer_types':
      return types
  return getattr(m, name)


@functools.lru_cache(maxsize=64)
def of(cfg: schema.Config) -> str:
  """Returns the first family that holds the model; '' if none does."""
  return next((kind for kind in dialects.DIALECTS if not differing(kind, cfg)), '')


def unfit(cfg: schema.Config) -> str:
  """Returns why no family holds a model; '' if one does."""
  if of(cfg):
    return ''
  missing = {kind: differing(kind, cfg) for kind in dialects.DIALECTS}
  kind = min(missing, key=lambda kind: len(missing[kind]))
  shown = ', '.join(f'--model.{name}={getattr(cfg.model, name)}' for name in missing[kind])
  return f'no model family of transformers has these options; {kind} lacks {shown}'


def prefix(cfg: schema.Config) -> str:
  """Returns the prefix of the classes of the model's family, e.g. Llama."""
  return dialects.DIALECTS[of(cfg)].prefix


def unfit_types(cfg: schema.CommandConfig, form: str) -> str:
  """Returns why a format cannot state the types of a model's layers; '' if it can."""
  m = cfg.model
  if form in ('meta', 'mtp_llama', 'mimo', 'speculators') and not layer_types.all_full(cfg):
    return 'has full attention with RoPE in every layer; this model has layers of other types'
  if form == 'mimo' and (m.o_bias or m.mlp_bias):
    return 'has no tensor for --model.o_bias or --model.mlp_bias'
  if form == 'meta' and m.activation != 'silu':
    return f'has no field for --model.activation={m.activation}'
  if form == 'meta' and (m.qkv_bias or m.o_bias or m.mlp_bias):
    return 'has no tensors for biases'
  if form != 'transformers_mtp':
    return ''
  of_modules = heads_lib.types_of_heads(cfg)[-1]
  of_module = layer_types.distinct(cfg)[of_modules]
  if not of_module.theta:
    return 'requires modules with RoPE: --heads.layer_type=full'
  if of(cfg) == 'mistral':
    return 'requires modules without a window: --heads.layer_type=full' if of_module.window else ''
  if of_modules not in heads_lib.types_of_trunk(cfg):
    return f'requires modules of a layer type of the trunk, not {cfg.heads.layer_type}'
  return ''
