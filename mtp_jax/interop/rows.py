"""The names of each parameter in each checkpoint format, and the transform between arrays.

A name is that of Hugging Face's Llama or, of a head, ours (mapping.py), unless a row has
another one for the format.
"""

from typing import Any, NamedTuple

from mtp_jax.interop import architectures, dialects, transforms


class Row(NamedTuple):
  """A parameter: our name, its transform, and its name per format, by default as
  in hf; (name, transforms.Form) if the transform differs too."""

  ours: str
  form: transforms.Form
  names: dict[str, Any]
  suffix: str = '.weight'

  def of(self, form: str) -> tuple[str, transforms.Form]:
    forms = (form, LIKE.get(form), 'hf')
    name = next(self.names[x] for x in forms if x in self.names)
    return (name, self.form) if isinstance(name, str) else name

  def in_layer(self, form: str, dialect: dialects.Dialect) -> tuple[str, transforms.Form]:
    """Returns name and transform in a layer; the forms that have no names of their own
    have those of the model's family."""
    name, transform = self.of(form)
    if name == self.names['hf']:
      name = dialect.names.get(self.ours, name)
      if dialect.rope_in_pairs and self.ours in ROTATED:
        transform = transforms.IN_PAIRS[transform]
    if form == 'gguf':
      a = architectures.ARCHITECTURES[dialect.kind]
      if a.in_pairs and self.ours in ROTATED:
        transform = transforms.IN_PAIRS[transform]
      if a.plus_one and self.ours.endswith('norm'):
        transform = transforms.PLUS_ONE
    return name + self.suffix, transform


LIKE = {'gguf_mtp': 'gguf', 'speculators': 'mimo'}  # formats that share most names

ROTATED = ('q', 'k', 'q_bias', 'k_bias')


def _row(ours: str, form: transforms.Form, **names) -> Row:
  return Row(ours, form, names)


def _bias(ours: str, form: transforms.Form, **names) -> Row:
  return Row(ours, form, names, suffix='.bias')


LAYER = (
  _row('attn_norm', transforms.SAME, hf='input_layernorm', meta='attention_norm', gguf='attn_norm'),
  _row(
    'q',
    transforms.HEADS_IN,
    hf='self_attn.q_proj',
    meta=('attention.wq', transforms.HEADS_IN_PAIRS),
    gguf='attn_q',
  ),
  _row(
    'k',
    transforms.HEADS_IN,
    hf='self_attn.k_proj',
    meta=('attention.wk', transforms.HEADS_IN_PAIRS),
    gguf='attn_k',
  ),
  _row('v', transforms.HEADS_IN, hf='self_attn.v_proj', meta='attention.wv', gguf='attn_v'),
  _row('o', transforms.HEADS_OUT, hf='self_attn.o_proj', meta='attention.wo', gguf='attn_output'),
  _row(
    'mlp_norm', transforms.SAME, hf='post_attention_layernorm', meta='ffn_norm', gguf='ffn_norm'
  ),
  _row('gate', transforms.TRANSPOSED, hf='mlp.gate_proj', meta='feed_forward.w1', gguf='ffn_gate'),
  _row('up', transforms.TRANSPOSED, hf='mlp.up_proj', meta='feed_forward.w3', gguf='ffn_up'),
  _row('down', transforms.TRANSPOSED, hf='mlp.down_proj', meta='feed_forward.w2', gguf='ffn_down'),
  # Where the block has them: see dialects.py for the names in other families.
  _row('attn_out_norm', transforms.SAME, hf='post_attention_layernorm', gguf='post_attention_norm'),
  _row('mlp_out_norm', transforms.SAME, hf='post_feedforward_layernorm', gguf='post_ffw_norm'),
  _row('q_norm', transforms.NORM_OF_HEADS, hf='self_attn.q_norm', gguf='attn_q_norm'),
  _row('k_norm', transforms.NORM_OF_HEADS, hf='self_attn.k_norm', gguf='attn_k_norm'),
  _bias('q_bias', transforms.FLAT, hf='self_attn.q_proj', gguf='attn_q'),
  _bias('k_bias', transforms.FLAT, hf='self_attn.k_proj', gguf='attn_k'),
  _bias('v_bias', transforms.FLAT, hf='self_attn.v_proj', gguf='attn_v'),
  _bias('o_bias', transforms.SAME, hf='self_attn.o_proj', gguf='attn_output'),
  _bias('gate_bias', transforms.SAME, hf='mlp.gate_proj', gguf='ffn_gate'),
  _bias('up_bias', transforms.SAME, hf='mlp.up_proj', gguf='ffn_up'),
  _bias('down_bias', transforms.SAME, hf='mlp.down_proj', gguf='ffn_down'),
)
EMBED = _row(
  'embed', transforms.SAME, hf='model.embed_tokens', meta='tok_embeddings', gguf='token_embd'
)
NORM = _row(
  'norm',
  transforms.SAME,
  hf='model.norm',
  meta='norm',
  mtp_llama='model.mtp_norms.0',
  gguf='output_norm',
)
UNEMBED = _row('unembed', transforms.TRANSPOSED, hf='lm_head', meta='output', gguf='output')
TIED = _row('embed', transforms.SAME, hf='lm_head', meta='output', gguf='output')
ORDER = _row('order', transforms.SAME, hf='mtp_order')
OF_TOKENS = _row('markov.embed', transforms.SAME, hf='mtp_markov.embed')
OF_DRAFTS = _row('markov.unembed', transforms.TRANSPOSED, hf='mtp_markov.unembed')
CONFIDENCE = _row('confidence', transforms.SAME, hf='mtp_confidence')
# Parameters of a head's module, in addition to its layer or instead of one.
MODULE = {
  'linear': (_row('proj', transforms.TRANSPOSED, hf='proj'),),
  'residual': (_row('proj', transforms.TRANSPOSED, hf='proj', medusa='layers.0'),),
  'sequential': (
    _row(
      'hidden_norm',
      transforms.SAME,
      hf='hidden_norm',
      mimo='hidden_layernorm',
      transformers_mtp='hnorm',
      gguf_mtp='nextn.hnorm',
    ),
    _row(
      'embed_norm',
      transforms.SAME,
      hf='embed_norm',
      mimo='token_layernorm',
      transformers_mtp='enorm',
      gguf_mtp='nextn.enorm',
    ),
    _row(
      'proj',
      transforms.TRANSPOSED,
      hf='proj',
      mimo='input_proj',
      speculators=('input_proj', transforms.EMBEDDING_FIRST),
      transformers_mtp=('eh_proj', transforms.EMBEDDING_FIRST),
      gguf_mtp=('nextn.eh_proj', transforms.EMBEDDING_FIRST),
    ),
    _row(
      'final_norm',
      transforms.SAME,
      hf='final_norm',
      mimo='final_layernorm',
      transformers_mtp='shared_head.norm',
      gguf_mtp='nextn.shared_head_norm',
    ),
  ),
}
MODULE['recursive'] = MODULE['sequential']
