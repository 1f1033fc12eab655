"""The model families of Hugging Face transformers, one entry per `model_type`.

Options of --model.* that every model of a family has are `options`; others come from
fields of config.json, each with the value that the family's own code takes where it is
absent. Published files are of transformers 4 (`rope_theta`, `rope_scaling`,
`sliding_window_pattern`); newer ones have `rope_parameters` and `layer_types`: both are
read, and both are written (config_json.py). Every field of a file that is imported must
be known: `IGNORED` lists those that do not change the function.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mtp_jax.interop import rope


class Field(NamedTuple):
  """A field of config.json that is one of --model.*."""

  name: str
  ours: str
  default: Any  # of config.json, where it is absent, or null unless that is a value
  read: Callable[[Any], Any] = lambda x: x
  write: Callable[[Any], Any] = lambda x: x
  nullable: bool = False

  def of(self, about: dict):
    """Returns the value of ours that a config.json has."""
    x = about.get(self.name, self.default)
    return self.read(self.default if x is None and not self.nullable else x)


def _zero_if_none(x):
  return 0.0 if x is None else float(x)


def _none_if_zero(x):
  return x or None


def _bool(name: str, *ours: str, default: bool = False) -> tuple[Field, ...]:
  return tuple(Field(name, of, default) for of in ours)


def _cap(name: str, ours: str, default: float | None) -> Field:
  return Field(name, ours, default, _zero_if_none, _none_if_zero, nullable=True)


_CAPS = (
  _cap('attn_logit_softcapping', 'attn_softcap', 50.0),
  _cap('final_logit_softcapping', 'logits_softcap', 30.0),
)


ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh'}


def _activation(x):
  if x not in ACTIVATIONS:
    raise rope.Unsupported(f'{x!r}; only {", ".join(map(repr, ACTIVATIONS))}')
  return ACTIVATIONS[x]


def _activation_name(x):
  return {ours: name for name, ours in ACTIVATIONS.items() if name != 'swish'}[x]


def _act(name: str, default: str) -> Field:
  return Field(name, 'activation', default, _activation, _activation_name)


def _root(x):
  if x <= 0:
    raise rope.Unsupported(f'{x}; must be above 0')
  return float(x) ** -0.5


_BIASES = _bool('attention_bias', 'qkv_bias', 'o_bias')
SCALE = Field(
  # An integer there: another scale is not held.
  'query_pre_attn_scalar',
  'attn_scale',
  256,
  _root,
  lambda x: round(x**-2),
)


class Dialect(NamedTuple):
  """A family of transformers."""

  kind: str  # model_type
  prefix: str  # of its classes: PREFIXForCausalLM
  text: str = ''  # between prefix and Config, Model
  options: dict[str, Any] = {}
  fields: tuple[Field, ...] = (*_BIASES, *_bool('mlp_bias', 'mlp_bias'), _act('hidden_act', 'silu'))
  types: Callable[[dict, int], Sequence[str]] | None = None  # layers -> of schema.LAYER_TYPES
  sliding_window: int = 4096  # where types has sliding layers and config.json no width
  theta: float = 10_000.0
  sliding_theta: float | None = None  # of families whose sliding layers have their own
  d_head: int | None = None  # None = hidden_size / num_attention_heads
  kv_heads: int | None = None  # None = as many as query heads
  rotary: float = 1.0
  tied: bool = False
  eps: float = 1e-6
  scaled_embeddings: bool = False  # by the root of d_model
  names: dict[str, str] = {}  # of layers' tensors, where they are not Llama's
  fused: dict[str, tuple[str, ...]] = {}  # a tensor in the file, and ours that it joins
  rope_in_pairs: bool = False  # RoPE rotates 2i and 2i + 1
  fixed: dict[str, tuple] = {}  # further fields of config.json, and allowed values


def _every(n: int, period: int, otherwise: str, at_period: str) -> list[str]:
  return [at_period if (i + 1) % period == 0 else otherwise for i in range(n)]


HF_TYPES = {'full_attention': 'full', 'sliding_attention': 'sliding'}
HF_NAMES = tuple(HF_TYPES)  # without a window, and with one


def _named(about: dict) -> list[str] | None:
  """Returns layer_types of config.json in our names."""
  found = about.get('layer_types')
  if found is None:
    return None
  odd = [x for x in found if x not in HF_TYPES]
  if odd:
    raise rope.Unsupported(f'layer_types has {odd[0]!r}; only {", ".join(map(repr, HF_TYPES))}')
  return [HF_TYPES[x] for x in found]


def _qwen_types(about: dict, n: int) -> Sequence[str]:
  """The upper layers, where use_sliding_window is set."""
  if not about.get('use_sliding_window') or about.get('sliding_window', 4096) is None:
    named = _named(about) or ['full'] * n
    if 'sliding' in named:
      raise rope.Unsupported('layer_types has sliding_attention, and use_sliding_window is not set')
    return named
  first = about.get('max_window_layers')
  first = 28 if first is None else first
  return _named(about) or ['sliding' if i >= first else 'full' for i in range(n)]


def _mistral_types(about: dict, n: int) -> Sequence[str]:
  window = about.get('sliding_window', 4096)
  return _named(about) or ['full' if window is None else 'sliding'] * n


def _olmo3_types(about: dict, n: int) -> Sequence[str]:
  return _named(about) or _every(n, 4, 'sliding', 'full')


def _gemma2_types(about: dict, n: int) -> Sequence[str]:
  return _named(about) or _every(n, 2, 'sliding', 'full')


def _gemma3_types(about: dict, n: int) -> Sequence[str]:
  period = about.get('sliding_window_pattern') or about.get('_sliding_window_pattern') or 6
  return _named(about) or _every(n, period, 'sliding', 'full')


def _smollm3_types(about: dict, n: int) -> Sequence[str]:
  if about.get('use_sliding_window') and about.get('sliding_window'):
    raise rope.Unsupported('use_sliding_window=True; only False')
  with_rope = about.get('no_rope_layers')
  if with_rope is None:
    return _every(n, about.get('no_rope_layer_interval') or 4, 'full', 'nope')
  return ['full' if x else 'nope' for x in with_rope]


_OUT_NORMS = {
  'attn_out_norm': 'post_attention_layernorm',
  'mlp_out_norm': 'post_feedforward_layernorm',
}
_AFTER = dict(norm_placement='after', qk_norm='full')
_GEMMA = dict(norm_placement='both', norm_offset=True)
_GEMMA_NAMES = _OUT_NORMS | {'mlp_norm': 'pre_feedforward_layernorm'}
_GEMMA_FIXED = {
  'use_bidirectional_attention': (None, False),
  'hidden_act': (None, 'gelu_pytorch_tanh'),  # beside hidden_activation, which is read
}

DIALECTS = {
  'llama': Dialect('llama', 'Llama'),
  'mistral': Dialect(
    'mistral', 'Mistral', fields=(_act('hidden_act', 'silu'),), types=_mistral_types, kv_heads=8
  ),
  'qwen2': Dialect(
    'qwen2',
    'Qwen2',
    options=dict(qkv_bias=True),
    fields=(_act('hidden_act', 'silu'),),
    types=_qwen_types,
    kv_heads=32,
    fixed={'use_mrope': (None, False), 'attention_bias': (None, True)},
  ),
  'qwen3': Dialect(
    'qwen3',
    'Qwen3',
    options=dict(qk_norm='head'),
    fields=(*_BIASES, _act('hidden_act', 'silu')),
    types=_qwen_types,
    kv_heads=32,
    d_head=128,
  ),
  'olmo2': Dialect(
    'olmo2',
    'Olmo2',
    options=_AFTER,
    fields=(*_BIASES, _act('hidden_act', 'silu')),
    eps=1e-5,
    names=_OUT_NORMS,
  ),
  'olmo3': Dialect(
    'olmo3',
    'Olmo3',
    options=_AFTER,
    fields=(*_BIASES, _act('hidden_act', 'silu')),
    types=_olmo3_types,
    theta=500_000.0,
    eps=1e-5,
    names=_OUT_NORMS,
  ),
  'gemma2': Dialect(
    'gemma2',
    'Gemma2',
    options=_GEMMA,
    fields=(*_BIASES, _act('hidden_activation', 'gelu_pytorch_tanh'), SCALE, *_CAPS),
    types=_gemma2_types,
    d_head=256,
    kv_heads=4,
    tied=True,
    scaled_embeddings=True,
    names=_GEMMA_NAMES,
    fixed=_GEMMA_FIXED,
  ),
  'gemma3_text': Dialect(
    'gemma3_text',
    'Gemma3',
    text='Text',
    options=_GEMMA | dict(qk_norm='head'),
    # Transformers does not pass a cap of scores on.
    fields=(
      *_BIASES,
      _act('hidden_activation', 'gelu_pytorch_tanh'),
      SCALE,
      _cap('final_logit_softcapping', 'logits_softcap', None),
    ),
    types=_gemma3_types,
    theta=1_000_000.0,
    sliding_theta=10_000.0,
    d_head=256,
    kv_heads=4,
    tied=True,
    scaled_embeddings=True,
    names=_GEMMA_NAMES,
    fixed=_GEMMA_FIXED | {'attn_logit_softcapping': (None,)},
  ),
  'smollm3': Dialect(
    'smollm3', 'SmolLM3', types=_smollm3_types, theta=2_000_000.0, kv_heads=4, tied=True
  ),
  'glm4': Dialect(
    'glm4',
    'Glm4',
    options=dict(norm_placement='both'),
    fields=(*_bool('attention_bias', 'qkv_bias', default=True), _act('hidden_act', 'silu')),
    d_head=128,
    kv_heads=2,
    rotary=0.5,
    eps=1.5625e-07,
    names={'attn_out_norm': 'post_self_attn_layernorm', 'mlp_out_norm': 'post_mlp_layernorm'},
    fused={'mlp.gate_up_proj': ('mlp.gate_proj', 'mlp.up_proj')},
    rope_in_pairs=True,
  ),
}

# Fields of config.json that do not change the function: dtypes and dropout of training,
# token ids (the tokenizer has them), caches, generation defaults, classes and versions.
IGNORED = frozenset(
  """
  _attn_implementation_autoset _name_or_path add_cross_attention architectures
  attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens
  bos_token_id cache_implementation chunk_size_feed_forward cls_token_id
  cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
  early_stopping encoder_no_repeat_ngram_size eos_token_id
  exponential_decay_length_penalty finetuning_task forced_bos_token_id
  forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id
  length_penalty max_length min_length model_type name_or_path no_repeat_ngram_size
  num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
  output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
  remove_invalid_values repetition_penalty return_dict return_dict_in_generate
  sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
  tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
  transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16
  use_cache
  """.split()
)
# Fields that every family reads.
COMMON = frozenset(
  """
  head_dim hidden_size intermediate_size max_position_embeddings num_attention_heads
  num_hidden_layers num_key_value_heads partial_rotary_factor rms_norm_eps
  rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size
  """.split()
)
# Fields of the families with layers of several types.
TYPES = frozenset(
  """
  _sliding_window_pattern layer_types max_window_layers no_rope_layer_interval no_rope_layers
  rope_local_base_freq sliding_window sliding_window_pattern use_sliding_window
  """.split()
)
