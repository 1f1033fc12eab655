"""Model families of transformers: small ones for tests, with the options that matter.

  python -m tests.support.families       writes tests/interop/literal.json, with transformers 5

literal.json has, of each family, a config.json and the logits of weights by formula, for
the tests that run without transformers.
"""

import json
import pathlib
import zlib

import numpy as np

PATH = pathlib.Path(__file__).parents[1] / 'interop/literal.json'
IDS = [3, 17, 5, 22, 9, 30, 3, 17, 11, 2, 28, 14]
SIZES = dict(
  vocab_size=32,
  hidden_size=16,
  intermediate_size=20,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
)


SHAPE = dict(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  pad_token_id=None,
  bos_token_id=1,
  eos_token_id=2,
)
YARN = dict(
  rope_type='yarn',
  rope_theta=1000.0,
  factor=4.0,
  original_max_position_embeddings=32,
  beta_fast=4.0,
  beta_slow=1.0,
)
FAMILIES = {
  'llama': dict(attention_bias=True, mlp_bias=True, head_dim=8),
  'mistral': dict(sliding_window=5, head_dim=8),
  'qwen2': dict(rope_parameters=YARN),
  'qwen3': dict(head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=2),
  'olmo2': dict(),
  'olmo3': dict(
    sliding_window=6,
    rope_parameters=dict(
      full_attention=YARN, sliding_attention=dict(rope_type='default', rope_theta=1000.0)
    ),
  ),
  'gemma2': dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=5),
  'gemma3_text': dict(
    head_dim=8,
    sliding_window=5,
    query_pre_attn_scalar=8,
    layer_types=['sliding_attention'] * 2 + ['full_attention', 'sliding_attention'],
    rope_parameters=dict(
      full_attention=dict(rope_type='linear', factor=8.0, rope_theta=1000.0),
      sliding_attention=dict(rope_type='default', rope_theta=50.0),
    ),
  ),
  'smollm3': dict(no_rope_layers=[1, 0, 1, 0]),
  'glm4': dict(head_dim=8),
}


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Returns an array of each name and shape: normal, scaled by the fan-in; norms about 1."""

  def one(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape)
    return (x / np.sqrt(shape[1]) if len(shape) == 2 else 1 + 0.3 * x).astype(np.float32)

  return {name: one(name, shape) for name, shape in shapes.items()}


def main() -> None:
  import torch
  import transformers

  from mtp_jax.interop import dialects

  found = {}
  for kind, changes in FAMILIES.items():
    prefix = dialects.DIALECTS[kind].prefix
    suffix = f'{dialects.DIALECTS[kind].text}Config'
    values = SHAPE | changes | SIZES | dict(head_dim=8)
    config = getattr(transformers, prefix + suffix)(**values)
    config._attn_implementation = 'eager'
    model = getattr(transformers, f'{prefix}ForCausalLM')(config).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('lm_head')}
    if not config.tie_word_embeddings:
      state['lm_head.weight'] = model.lm_head.weight
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    model.load_state_dict({k: torch.tensor(v) for k, v in weights(shapes).items()}, strict=False)
    model.tie_weights()
    with torch.no_grad():
      logits = model(torch.tensor([IDS])).logits[0].numpy()
    found[kind] = dict(
      config=json.loads(config.to_json_string(use_diff=False)),
      shapes=shapes,
      logits=[[round(float(x), 5) for x in row] for row in logits],
    )
    found[kind]['config'] |= dict(architectures=[f'{prefix}ForCausalLM'])
  lines = [f' {json.dumps(kind)}: {json.dumps(of)}' for kind, of in found.items()]
  PATH.write_text('{\n' + ',\n'.join(lines) + '\n}\n')


if __name__ == '__main__':
  main()
