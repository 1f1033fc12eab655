"""The types of attention layers: window and RoPE of each layer and head.

Layers of different types are stacked and scanned like equal ones: a type is an index, by
which a layer selects its RoPE table and its mask, so that neither compile time nor memory
grows with depth.
"""

import functools
from typing import NamedTuple

from mtp_jax.config import schema


class LayerType(NamedTuple):
  """What differs between the attention of two layers."""

  window: int  # positions attended to, its own among them; 0 = all before
  theta: float  # base of RoPE; 0 = no RoPE
  scaled: bool  # whether --model.rope_factor applies


def named(m: schema.ModelConfig, name: str, window: int = 0) -> LayerType:
  """Returns the type of a name of schema.LAYER_TYPES; window: instead of --model.window."""
  if name == 'sliding':
    return LayerType(window or m.window, m.sliding_rope_theta or m.rope_theta, False)
  return LayerType(0, 0.0 if name == 'nope' else m.rope_theta, name == 'full')


def name_of_layer(m: schema.ModelConfig, i: int) -> str:
  """Returns the name of the type of layer i of the next token (trunk, then head 1), from 0."""
  return m.pattern[i % len(m.pattern)]


def of_layer(m: schema.ModelConfig, i: int) -> LayerType:
  return named(m, name_of_layer(m, i))


def of_heads(cfg: schema.Config) -> LayerType | None:
  """Returns the type that --heads.layer_type gives the blocks of heads >= 2, if any."""
  h = cfg.heads
  return None if h.layer_type == 'last' else named(cfg.model, h.layer_type, h.window)


@functools.lru_cache(maxsize=256)
def distinct(cfg: schema.Config) -> tuple[LayerType, ...]:
  """Returns the types of a model; layers and heads have an index in it."""
  found = [named(cfg.model, name) for name in cfg.model.pattern]
  own = of_heads(cfg)
  return tuple(dict.fromkeys([*found, own] if own else found))


def all_full(cfg: schema.Config) -> bool:
  """Whether every layer and head sees all of its document, with RoPE."""
  return all(t.theta and not t.window for t in distinct(cfg))
