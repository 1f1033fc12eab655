"""RoPE in config.json: `rope_parameters` of transformers 5, one or one per type of layer,
and `rope_theta`, `rope_scaling` and `rope_local_base_freq` of transformers 4."""

import math
from typing import Any

from mtp_jax.config import schema

# Fields of each type, and whether config.json must have them.
KINDS = {
  'default': {},
  'linear': {'factor': True},
  'llama3': {
    'factor': True,
    'low_freq_factor': True,
    'high_freq_factor': True,
    'original_max_position_embeddings': True,
  },
  'yarn': {
    'factor': True,
    'original_max_position_embeddings': False,
    'beta_fast': False,
    'beta_slow': False,
    'attention_factor': False,
    'mscale': False,
    'mscale_all_dim': False,
    'truncate': False,
  },
}
BY_TYPE = ('full_attention', 'sliding_attention')
NESTED = 'Gemma3', 'Olmo3'  # prefixes of families with RoPE of each type of layer


class Unsupported(ValueError):
  """A field of config.json, its value, and what is supported."""


def read(about: dict, sliding: bool, dialect) -> dict[str, Any]:
  """Returns the fields of --model.* of RoPE.

  sliding: whether any layer has a sliding window; RoPE of those is not scaled here.
  """
  given = about.get('rope_parameters') or about.get('rope_scaling') or {}
  by_type = given if any(name in given for name in BY_TYPE) else {}
  full = by_type.get('full_attention', {}) if by_type else given
  local = by_type.get('sliding_attention', {})
  theta = float(_first(full.get('rope_theta'), about.get('rope_theta'), dialect.theta))
  values: dict[str, Any] = {'rope_theta': theta}
  if sliding:
    of_family = theta if dialect.sliding_theta is None else dialect.sliding_theta
    found = _first(local.get('rope_theta'), about.get('rope_local_base_freq'), of_family)
    values['sliding_rope_theta'] = 0.0 if found == theta else float(found)
  if _kind(local) != 'default':
    raise Unsupported(f'rope_type={_kind(local)!r} of sliding layers; only default')
  fraction = float(
    _first(full.get('partial_rotary_factor'), about.get('partial_rotary_factor'), dialect.rotary)
  )
  if fraction != 1 and dialect.rotary == 1:
    raise Unsupported(f'partial_rotary_factor={fraction} in config.json; only 1.0')
  values['rope_fraction'] = fraction
  scaled = _scaling(full, about, dialect)
  one_for_all = dialect.sliding_theta is None and dialect.prefix != 'Olmo3'
  if scaled and sliding and one_for_all:
    raise Unsupported(
      f'rope_type={_kind(full)!r} with sliding layers, which are scaled as well; only default'
    )
  return values | scaled


def _first(*values):
  return next(x for x in values if x is not None)


def _kind(parameters: dict) -> str:
  return parameters.get('rope_type', parameters.get('type', 'default'))


def _scaling(given: dict, about: dict, dialect) -> dict[str, Any]:
  kind = _kind(given)
  if kind not in KINDS:
    raise Unsupported(f'rope_type={kind!r} in config.json; only {", ".join(KINDS)}')
  fields = KINDS[kind]
  known = {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor', *fields}
  for name, value in given.items():
    if name not in known and value is not None:
      raise Unsupported(f'{name}={value!r} of RoPE of type {kind} in config.json: not known')
  for name, needed in fields.items():
    if needed and given.get(name) is None:
      raise Unsupported(f'config.json: RoPE of type {kind} has no {name}')
  if kind == 'default' or given['factor'] == 1:
    return {}
  context = given.get('original_max_position_embeddings') or about.get('max_position_embeddings')
  context = int(context or 2048)
  values: dict[str, Any] = dict(rope_scaling=kind, rope_factor=float(given['factor']))
  if kind == 'llama3':
    values |= dict(
      rope_low_freq=float(given['low_freq_factor']),
      rope_high_freq=float(given['high_freq_factor']),
      original_max_position_embeddings=context,
    )
  if kind == 'yarn':
    values |= dict(
      rope_beta_fast=float(given.get('beta_fast') or 32),
      rope_beta_slow=float(given.get('beta_slow') or 1),
      # Transformers does not find it in the parameters of one type of layer.
      rope_truncate=dialect.prefix in NESTED or given.get('truncate', True),
      original_max_position_embeddings=context,
      rope_attention_factor=_attention_factor(given),
    )
  return values


def _attention_factor(given: dict) -> float:
  if given.get('attention_factor') is not None:
    return float(given['attention_factor'])
  one, all_dim = given.get('mscale'), given.get('mscale_all_dim')
  if not (one and all_dim):
    return 0.0

  def of(mscale):
    return 0.1 * mscale * math.log(given['factor']) + 1

  return of(one) / of(all_dim)


def write(m: schema.ModelConfig, types: list[str], dialect) -> dict[str, Any]:
  """Returns the fields of config.json, those of both versions of transformers."""
  full: dict[str, Any] = dict(rope_type='default', rope_theta=m.rope_theta)
  if m.rope_factor > 1:
    full |= dict(rope_type=m.rope_scaling, factor=m.rope_factor)
    if m.rope_scaling != 'linear':
      full['original_max_position_embeddings'] = m.original_max_position_embeddings
    if m.rope_scaling == 'llama3':
      full |= dict(low_freq_factor=m.rope_low_freq, high_freq_factor=m.rope_high_freq)
    if m.rope_scaling == 'yarn':
      full |= dict(beta_fast=m.rope_beta_fast, beta_slow=m.rope_beta_slow)
      full |= dict(truncate=m.rope_truncate)
      if m.rope_attention_factor:
        full['attention_factor'] = m.rope_attention_factor
  partial = (
    {} if m.rope_fraction == 1 == dialect.rotary else {'partial_rotary_factor': m.rope_fraction}
  )
  sliding_theta = m.sliding_rope_theta or m.rope_theta
  before: dict[str, Any] = dict(rope_theta=m.rope_theta, **partial)
  if m.rope_factor > 1:
    before['rope_scaling'] = full
  if dialect.prefix in NESTED:
    local = dict(rope_type='default', rope_theta=sliding_theta)
    if dialect.sliding_theta is not None:
      before['rope_local_base_freq'] = sliding_theta
    return before | dict(rope_parameters=dict(full_attention=full, sliding_attention=local))
  return before | dict(rope_parameters=full | partial)
