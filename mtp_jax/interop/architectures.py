"""llama.cpp's architectures: which plain model families it runs, and what it fixes.

Read in https://github.com/ggml-org/llama.cpp, src/llama-model.cpp, October 2026.
"""

from typing import NamedTuple

from mtp_jax.config import schema


class Architecture(NamedTuple):
  """An architecture of llama.cpp that holds a model family."""

  name: str
  in_pairs: bool = False  # RoPE rotates 2i and 2i + 1
  pattern: tuple[str, ...] = ('full',)  # of layer types, which the file cannot state
  scalings: tuple[str, ...] = ()  # of --model.rope_scaling
  plus_one: bool = False  # norms are 1 + w in the file
  fused: dict[str, tuple[str, ...]] = {}  # tensors that hold several, joined in this order


ARCHITECTURES = {
  'llama': Architecture('llama', in_pairs=True, scalings=('llama3', 'linear')),
  'qwen2': Architecture('qwen2', scalings=('linear',)),
  'qwen3': Architecture('qwen3', scalings=('linear',)),
  'olmo2': Architecture('olmo2', scalings=('linear',)),
  # Its sliding layers have no scaled RoPE, as here.
  'olmo3': Architecture('olmo2', pattern=(*['sliding'] * 3, 'full'), scalings=('yarn',)),
  'glm4': Architecture('glm4', in_pairs=True, fused={'ffn_up': ('ffn_gate', 'ffn_up')}),
  'gemma2': Architecture('gemma2', pattern=('sliding', 'full'), plus_one=True),
  'gemma3_text': Architecture(
    'gemma3', pattern=(*['sliding'] * 5, 'full'), scalings=('linear',), plus_one=True
  ),
  'smollm3': Architecture('smollm3', in_pairs=True, pattern=(*['full'] * 3, 'nope')),
}


# Layers of the model whose scores llama.cpp scales by (d_model / n_attn_heads)^-1/2.
LARGEST = {'gemma2': 46, 'gemma3': 62}


def unfit(cfg: schema.Config, kind: str, n_layers: int) -> str:
  """Returns why llama.cpp does not run a model of a family, with this number of layers in
  the file; '' if it does."""
  if kind not in ARCHITECTURES:
    return f'holds {", ".join(ARCHITECTURES)}; this model is of {kind}'
  m, a = cfg.model, ARCHITECTURES[kind]
  if m.pattern != a.pattern:
    return f'llama.cpp has layers {",".join(a.pattern)} in {a.name}, not {",".join(m.pattern)}'
  if m.rope_factor > 1 and m.rope_scaling not in a.scalings:
    return f'--model.rope_scaling={m.rope_scaling} is not supported in {a.name}'
  caps = m.attn_softcap, m.logits_softcap
  if a.name == 'gemma2' and not all(caps):  # without a field it caps at 50 and 30
    return 'llama.cpp caps scores and logits of gemma2; this model does not cap both'
  if a.name == 'gemma3' and m.attn_softcap:
    return f'llama.cpp does not cap scores in gemma3 (--model.attn_softcap={m.attn_softcap:g})'
  if a.name == 'olmo2' and m.n_attn_heads * m.head_width != m.d_model:
    return f'llama.cpp has no field for --model.d_head={m.d_head} in {a.name}'
  width = m.head_width
  if LARGEST.get(a.name) == n_layers:
    width = m.d_model // m.n_attn_heads
  if abs(m.score_scale - width**-0.5) > 1e-9:
    return f'llama.cpp has no field for --model.attn_scale={m.attn_scale}'
  if m.activation != ('gelu_tanh' if a.plus_one else 'silu'):
    return f'llama.cpp has another activation in {a.name} than {m.activation}'
  if m.qk_norm_eps not in (0, m.norm_eps):
    return f'llama.cpp has no field for --model.qk_norm_eps={m.qk_norm_eps}'
  return ''
