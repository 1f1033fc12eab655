"""Blocks of published models, as flags and as the oracle computes them."""

from typing import Any, NamedTuple

from tests.support import oracle

L = oracle.Layer


class Row(NamedTuple):
  """Options of --model.* and --heads.*, and the oracle's of the same."""

  flags: dict[str, Any]
  block: oracle.Block
  family: str = 'parallel'
  trunk_state: str = 'post_norm'

  def shape(self, n: int, **more) -> oracle.Shape:
    return oracle.Shape(self.family, n, block=self.block, trunk_state=self.trunk_state, **more)


def _linear(theta, width, factor):
  return tuple(theta ** (-2 * i / width) / factor for i in range(width // 2))


# beta_fast 4 and beta_slow .5 of 64 positions, base 100, width 8: dimensions .81 and 2.62,
# rounded 0 and 3, so that pairs 0 to 3 keep 1, 2/3, 1/3 and 0 of their rate.
_YARN = tuple(
  100 ** (-2 * i / 8) * (kept + (1 - kept) / 4) for i, kept in enumerate((1, 2 / 3, 1 / 3, 0))
)

ROWS = {
  'qwen2': Row(dict(model__qkv_bias=True), oracle.Block(), 'causal'),
  'qwen3': Row(dict(model__qk_norm='head', model__d_head=6), oracle.Block(), 'sequential'),
  'olmo2': Row(
    dict(model__qk_norm='full', model__norm_placement='after', heads__trunk_state='pre_norm'),
    oracle.Block(),
    'sequential',
    trunk_state='pre_norm',
  ),
  'olmo3': Row(
    dict(
      model__qk_norm='full',
      model__norm_placement='after',
      model__window=5,
      model__layer_types='sliding*2,full',
      model__d_head=8,
      model__rope_theta=100,
      model__rope_factor=4,
      model__rope_scaling='yarn',
      model__rope_beta_fast=4,
      model__rope_beta_slow=0.5,
      model__original_max_position_embeddings=64,
      model__rope_attention_factor=1.1,
      heads__layer_type='full',
      heads__trunk_state='pre_norm_first',
    ),
    oracle.Block(
      layers=(L(5, 100), L(5, 100), L(0, 100, _YARN, 1.1)), head_layer=L(0, 100, _YARN, 1.1)
    ),
    'recursive',
    trunk_state='pre_norm_first',
  ),
  'gemma2': Row(
    dict(
      model__norm_placement='both',
      model__norm_offset=True,
      model__window=4,
      model__layer_types='sliding,full',
      model__attn_softcap=3,
      model__logits_softcap=2,
      model__attn_scale=0.3,
      model__embedding_scale=4,
      model__activation='gelu_tanh',
    ),
    oracle.Block(
      layers=(L(4), L()),
      one_plus=True,
      score_cap=3,
      logits_cap=2,
      scale=0.3,
      embedding_scale=4,
      activation='gelu_tanh',
    ),
    'anticausal',
  ),
  'gemma3': Row(
    dict(
      model__norm_placement='both',
      model__norm_offset=True,
      model__qk_norm='head',
      model__qk_norm_eps=1e-2,
      model__window=3,
      model__layer_types='full,sliding*2',
      model__rope_theta=1000,
      model__sliding_rope_theta=50,
      model__rope_factor=8,
      model__rope_scaling='linear',
      model__activation='gelu',
    ),
    oracle.Block(
      layers=(L(0, 1000, _linear(1000, 4, 8)), L(3, 50), L(3, 50)),
      one_plus=True,
      qk_eps=1e-2,
      activation='gelu',
    ),
  ),
  'smollm3': Row(
    dict(model__layer_types='full,nope', heads__layer_type='sliding', heads__window=6),
    oracle.Block(layers=(L(), L(theta=0)), head_layer=L(6)),
  ),
  'glm4': Row(
    dict(model__rope_fraction=0.5, model__norm_placement='both', model__qkv_bias=True),
    oracle.Block(rotated=0.5),
    'residual',
  ),
  'gpt-oss': Row(
    dict(
      model__attn_sink=True,
      model__qkv_bias=True,
      model__o_bias=True,
      model__mlp_bias=True,
      model__window=4,
    ),
    oracle.Block(layers=(L(4),)),
    'sequential',
  ),
  'granite, gated': Row(
    dict(model__attn_gate=True, model__residual_scale=0.4, model__logits_scale=0.5),
    oracle.Block(residual_scale=0.4, logits_scale=0.5),
  ),
}
