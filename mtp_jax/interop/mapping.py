"""One table of our parameters and their names in other programs.

`LAYER`, `MODULE` and the rows around them name each parameter in each checkpoint
format, with the transform between the arrays; `FORMS` has the names of layers
and heads per format. `tensors` expands that for a Config: every tensor of a
checkpoint, and its place in our pytree. Export uses it in one direction, import
in the other, so that a key is in neither or in both.

Trunk and head 1 have Llama's names in all formats: the layers of the trunk, then
those of the heads that head 1 depends on (an anticausal chain, from n down), then
its own. In `hf` the further heads have our names, with K from 2:

  mtp_heads.K.LAYER        the layer of head K, in Llama's names
  mtp_heads.K.proj         W_k of a linear or residual head; M_k, which reads
                           [hidden; embedding], of a sequential one
  mtp_heads.K.{hidden,embed,final}_norm  of a sequential module
  mtp_heads.shared.…       the one module of the recursive family
  mtp_heads.K.lm_head      the head's own unembedding
  mtp_order                the second unembedding of head 1 (token order)

The other formats are those of the programs that read them:

  meta       Meta's release of the paper's models: consolidated.pth
  mtp_llama  ServiceNow's Fast-LLM, https://github.com/ServiceNow/Fast-LLM
  mimo       a dense model with one sequential module as vLLM and SGLang read
             MiMo (Xiaomi 2025, https://arxiv.org/abs/2505.07608)
  transformers_mtp
             sequential modules as layers after the last, under DeepSeek-V3's
             names (DeepSeek 2024, https://arxiv.org/abs/2412.19437), as
             Transformers' MtpModel reads them
  gguf       llama.cpp's file, https://github.com/ggml-org/llama.cpp: a Llama,
             the further heads beside it as in hf
  gguf_mtp   the same with sequential modules that llama.cpp runs; gguf becomes
             this wherever it can
  medusa     Medusa's heads as vLLM reads them, in a folder beside the Llama
             (Cai et al. 2024, https://arxiv.org/abs/2401.10774)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mtp_jax.config import schema
from mtp_jax.model import heads as heads_lib


class Form(NamedTuple):
  """The transform of an array of ours to one of a file, and back. Both get the
  Config; matrices in files are (out, in)."""

  out: Callable[[np.ndarray, schema.Config], np.ndarray]
  back: Callable[[np.ndarray, schema.Config], np.ndarray]
  shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # our shape -> the file's


def _heads_out(w_DNH, cfg):
  D, N, H = w_DNH.shape
  return w_DNH.transpose(1, 2, 0).reshape(N * H, D)


def _heads_back(w_ED, cfg):
  H = cfg.model.head_width
  E, D = w_ED.shape
  return w_ED.reshape(E // H, H, D).transpose(2, 0, 1)


def _pairs_out(w_DNH, cfg):
  """Reorders dimensions for RoPE, which rotates i and i + H/2 of a head together
  here and in Hugging Face's Llama, 2i and 2i + 1 in Meta's."""
  D, N, H = w_DNH.shape
  w_DNHP = w_DNH.reshape(D, N, 2, H // 2).swapaxes(2, 3)
  return _heads_out(w_DNHP.reshape(D, N, H), cfg)


def _pairs_back(w_ED, cfg):
  w_DNH = _heads_back(w_ED, cfg)
  D, N, H = w_DNH.shape
  return w_DNH.reshape(D, N, H // 2, 2).swapaxes(2, 3).reshape(D, N, H)


def _swapped(w_ED):
  """Swaps the two halves of the input dimension."""
  return np.concatenate(np.split(w_ED, 2)[::-1])


SAME = Form(lambda w, _: w, lambda w, _: w, lambda s: s)
TRANSPOSED = Form(lambda w, _: w.T, lambda w, _: w.T, lambda s: s[::-1])
HEADS_IN = Form(_heads_out, _heads_back, lambda s: (s[1] * s[2], s[0]))
HEADS_IN_PAIRS = Form(_pairs_out, _pairs_back, HEADS_IN.shape)
HEADS_OUT = Form(
  lambda w_NHD, _: w_NHD.reshape(-1, w_NHD.shape[-1]).T,
  lambda w_DE, cfg: w_DE.T.reshape(-1, cfg.model.head_width, w_DE.shape[0]),
  lambda s: (s[2], s[0] * s[1]),
)
EMBEDDING_FIRST = Form(lambda w, _: _swapped(w).T, lambda w, _: _swapped(w.T), TRANSPOSED.shape)


def _zeros_of(w_DNH, cfg):
  return np.zeros(w_DNH.shape[1] * w_DNH.shape[2], w_DNH.dtype)


# A bias, which our layers do not have: always zero, a copy in the sense of Place.
NO_BIAS = Form(_zeros_of, SAME.back, lambda s: (s[1] * s[2],))


class Row(NamedTuple):
  """A parameter: our name, its transform, and its name per format, by default as
  in hf; (name, Form) if the transform differs too."""

  ours: str
  form: Form
  names: dict[str, Any]

  def of(self, form: str) -> tuple[str, Form]:
    forms = (form, LIKE.get(form), 'hf')
    name = next(self.names[x] for x in forms if x in self.names)
    return (name, self.form) if isinstance(name, str) else name


LIKE = {'gguf_mtp': 'gguf'}  # formats that share most names with another one


def _row(ours: str, form: Form, **names) -> Row:
  return Row(ours, form, names)


LAYER = (
  _row('attn_norm', SAME, hf='input_layernorm', meta='attention_norm', gguf='attn_norm'),
  _row(
    'q',
    HEADS_IN,
    hf='self_attn.q_proj',
    meta=('attention.wq', HEADS_IN_PAIRS),
    gguf=('attn_q', HEADS_IN_PAIRS),
    gguf_mtp='attn_q',
  ),
  _row(
    'k',
    HEADS_IN,
    hf='self_attn.k_proj',
    meta=('attention.wk', HEADS_IN_PAIRS),
    gguf=('attn_k', HEADS_IN_PAIRS),
    gguf_mtp='attn_k',
  ),
  _row('v', HEADS_IN, hf='self_attn.v_proj', meta='attention.wv', gguf='attn_v'),
  _row('o', HEADS_OUT, hf='self_attn.o_proj', meta='attention.wo', gguf='attn_output'),
  _row('mlp_norm', SAME, hf='post_attention_layernorm', meta='ffn_norm', gguf='ffn_norm'),
  _row('gate', TRANSPOSED, hf='mlp.gate_proj', meta='feed_forward.w1', gguf='ffn_gate'),
  _row('up', TRANSPOSED, hf='mlp.up_proj', meta='feed_forward.w3', gguf='ffn_up'),
  _row('down', TRANSPOSED, hf='mlp.down_proj', meta='feed_forward.w2', gguf='ffn_down'),
)
EMBED = _row('embed', SAME, hf='model.embed_tokens', meta='tok_embeddings', gguf='token_embd')
NORM = _row(
  'norm', SAME, hf='model.norm', meta='norm', mtp_llama='model.mtp_norms.0', gguf='output_norm'
)
UNEMBED = _row('unembed', TRANSPOSED, hf='lm_head', meta='output', gguf='output')
TIED = _row('embed', SAME, hf='lm_head', meta='output', gguf='output')
ORDER = _row('order', SAME, hf='mtp_order')
# Parameters of a head's module, in addition to its layer or instead of one.
MODULE = {
  'linear': (_row('proj', TRANSPOSED, hf='proj'),),
  'residual': (_row('proj', TRANSPOSED, hf='proj', medusa='layers.0'),),
  'sequential': (
    _row(
      'hidden_norm',
      SAME,
      hf='hidden_norm',
      mimo='hidden_layernorm',
      transformers_mtp='hnorm',
      gguf_mtp='nextn.hnorm',
    ),
    _row(
      'embed_norm',
      SAME,
      hf='embed_norm',
      mimo='token_layernorm',
      transformers_mtp='enorm',
      gguf_mtp='nextn.enorm',
    ),
    _row(
      'proj',
      TRANSPOSED,
      hf='proj',
      mimo='input_proj',
      transformers_mtp=('eh_proj', EMBEDDING_FIRST),
      gguf_mtp=('nextn.eh_proj', EMBEDDING_FIRST),
    ),
    _row(
      'final_norm',
      SAME,
      hf='final_norm',
      mimo='final_layernorm',
      transformers_mtp='shared_head.norm',
      gguf_mtp='nextn.shared_head_norm',
    ),
  ),
}
MODULE['recursive'] = MODULE['sequential']


class Place(NamedTuple):
  """The place of a tensor of a file in our pytree."""

  path: str  # of the leaf, e.g. trunk.q
  index: int | None  # on the leading axis of stacked leaves
  form: Form
  extra: bool = False  # not part of a next-token Llama
  copy: bool = False  # a copy of another tensor, which must agree


def _norm_of_each_head(cfg, found):
  return {
    f'model.mtp_norms.{j}.weight': Place('norm', None, SAME, True, True)
    for j in range(1, cfg.heads.n)
  }


def _no_biases(cfg, found):
  ends = tuple(f'self_attn.{x}_proj.weight' for x in 'qkv')
  return {
    name.removesuffix('weight') + 'bias': place._replace(form=NO_BIAS, copy=True)
    for name, place in found.items()
    if name.endswith(ends)
  }


def _module_of_each_step(cfg, found):
  """Copies of the shared module of recursive heads: Transformers has one per step."""
  if not heads_lib.family(cfg.heads).shared_module:
    return {}
  first = _prefix('transformers_mtp', cfg, 0)
  return {
    _prefix('transformers_mtp', cfg, j) + name.removeprefix(first): place._replace(copy=True)
    for j in range(1, cfg.heads.n - 1)
    for name, place in found.items()
    if name.startswith(first)
  }


def _unembedding_of_llama_cpp(cfg, found):
  """A copy of a tied unembedding, which mimo2, the architecture with modules, requires."""
  if cfg.heads.unembedding != 'tied':
    return {}
  return {'output.weight': _unembedding(cfg)._replace(copy=True)}


def _unembedding_of_drafts(cfg, found):
  if cfg.heads.unembedding == 'replicated':
    return {}
  place = _unembedding(cfg)._replace(extra=True, copy=True)
  return {'medusa/lm_head.weight': place}


def _unembedding(cfg) -> Place:
  row = TIED if cfg.heads.unembedding == 'tied' else UNEMBED
  return Place(row.ours, None, row.form)


class Layout(NamedTuple):
  """The names of layers and heads in a checkpoint format, and the families it supports.

  In these names, i counts layers, k heads from 2, j heads from 0, and l continues
  after the last layer. heads_like: the format whose names the parameters of
  further heads have, if it is another one.
  """

  families: tuple[str, ...]
  head: str
  layer: str = 'model.layers.{i}.'
  shared_module: str = ''  # of the recursive family; '' = that of the first module
  replicated: str = ''  # a further head's own unembedding; '' = none
  file: str = ''  # the file of further heads; '' = with the rest
  more: Callable[..., dict[str, Place]] = lambda cfg, found: {}
  heads_like: str = ''


FORMS = {
  'hf': Layout(
    tuple(heads_lib.FAMILIES),
    'mtp_heads.{k}.',
    shared_module='mtp_heads.shared.',
    replicated='mtp_heads.{k}.lm_head.weight',
    file='mtp_heads.safetensors',
  ),
  'meta': Layout(('parallel',), 'extra_heads.{j}.', 'layers.{i}.'),
  'mtp_llama': Layout(('parallel',), 'model.mtp_heads.{j}.', more=_norm_of_each_head),
  'mimo': Layout(('sequential', 'recursive'), 'model.mtp_layers.{j}.', more=_no_biases),
  'transformers_mtp': Layout(
    ('sequential', 'recursive'), 'model.layers.{l}.', more=_module_of_each_step
  ),
  'gguf_mtp': Layout(
    ('sequential', 'recursive'),
    'blk.{l}.',
    'blk.{i}.',
    replicated='blk.{l}.nextn.shared_head_head.weight',
    more=_unembedding_of_llama_cpp,
  ),
  'medusa': Layout(
    ('residual',),
    'medusa/blocks.{j}.',
    file='medusa/model.safetensors',
    replicated='medusa/lm_heads.{j}.weight',
    more=_unembedding_of_drafts,
  ),
}
FORMS['gguf'] = FORMS['hf']._replace(layer='blk.{i}.', heads_like='hf')


def _prefix(form: str, cfg: schema.CommandConfig, j: int) -> str:
  """Returns the prefix of the module or layer of further head j + 2."""
  f = FORMS[form]
  if heads_lib.family(cfg.heads).shared_module and f.shared_module:
    return f.shared_module
  return f.head.format(j=j, k=j + 2, l=layers_in_all(cfg) + j)


def of(cfg: schema.CommandConfig) -> str:
  """Returns the format for this model: --export.format, or gguf_mtp."""
  form = cfg.export.format
  return 'gguf_mtp' if form == 'gguf' and not undrafted(cfg) else form


def undrafted(cfg: schema.CommandConfig) -> str:
  """Returns why llama.cpp cannot draft with a model's further heads; '' if it can."""
  h = cfg.heads
  if h.n == 1:
    return 'there are none'
  if h.family not in FORMS['gguf_mtp'].families:
    return f'it supports sequential and recursive modules; these are {h.family}'
  if h.stride > 1:
    return f'it does not support strided heads (--heads.stride={h.stride})'
  modules = heads_lib.n_modules(cfg.heads, h.n)
  if h.unembedding == 'replicated' and modules < h.n - 1:
    return 'a module has one unembedding there; this one has one per step'
  if cfg.loss.token_order_weight:
    return 'it has no tensor for the unembedding of --loss.token_order_weight'
  if cfg.model.rope_factor > 1:
    return (
      'its architecture with modules does not scale RoPE'
      f' (--model.rope_factor={cfg.model.rope_factor:g})'
    )
  return ''


def unfit(cfg: schema.CommandConfig, form: str) -> str:
  """Returns why a format cannot represent a model; '' if it can."""
  f, h = FORMS[form], cfg.heads
  if form in ('hf', 'gguf'):
    return ''
  if h.family not in f.families and not (h.n == 1 and 'parallel' in f.families):
    return f'supports {" and ".join(f.families)} heads; these are {h.family}'
  if form == 'medusa' and h.n == 1:
    return 'requires further heads; this model has one'
  if h.unembedding == 'replicated' and not f.replicated:
    return 'has one unembedding; here each head has its own'
  if form in ('transformers_mtp', 'mimo') and h.n == 1:
    return 'requires further modules; this model has one head'
  if form == 'mimo' and (several := heads_lib.n_modules(cfg.heads, h.n)) > 1:
    return f'supports one module, this model has {several}; transformers_mtp and gguf support all'
  if cfg.loss.token_order_weight:
    return 'has no tensor for the unembedding of --loss.token_order_weight'
  if h.stride > 1:
    return f'does not support strided heads (--heads.stride={h.stride})'
  m = cfg.model
  own_width = m.head_width * m.n_attn_heads != m.d_model
  if form == 'meta' and own_width:
    return f'has no field for --model.d_head={m.d_head}'
  if form == 'mimo' and own_width:
    return (
      f'requires d_head = d_model / n_attn_heads ='
      f' {m.d_model / m.n_attn_heads:g}, not --model.d_head={m.d_head}'
    )
  if form == 'meta' and m.rope_factor > 1:
    return f'has no field for --model.rope_factor={m.rope_factor:g}'
  return ''


def tensors(cfg: schema.CommandConfig, form: str = 'hf') -> dict[str, Place]:
  """Returns every tensor of a checkpoint in a format, by name, or by FOLDER/NAME if
  it is in a subfolder."""
  f, n, layout = heads_lib.family(cfg.heads), cfg.heads.n, FORMS[form]
  unembedding = cfg.heads.unembedding
  found = {}

  def put(row, prefix='', path='', index=None, extra=False):
    name, transform = row.of((extra and layout.heads_like) or form)
    found[f'{prefix}{name}.weight'] = Place(path + row.ours, index, transform, extra)

  def put_layer(prefix, path, index, extra=False):
    for row in LAYER:
      put(row, prefix, path, index, extra)

  put(EMBED)
  for i, (path, index) in enumerate(heads_lib.next_token_layers(cfg)):
    put_layer(layout.layer.format(i=i), path, index)
  put(NORM)
  if unembedding == 'tied' and form == 'meta':
    found['output.weight'] = _unembedding(cfg)._replace(copy=True)
  elif unembedding != 'tied':
    put(UNEMBED, index=0 if unembedding == 'replicated' else None)
  for k in range(2, n + 1):
    if unembedding == 'replicated':
      l = layers_in_all(cfg) + k - 2
      name = layout.replicated.format(k=k, j=k - 2, l=l)
      found[name] = Place('unembed', k - 1, UNEMBED.form, True)
    prefix = _prefix(form, cfg, k - 2)
    if cfg.heads.block_first:
      if not f.reverse:
        put_layer(prefix, 'heads.', k - 1, extra=True)
      continue
    if f.shared_module and k > 2:
      continue
    for row in MODULE[cfg.heads.family]:
      put(row, prefix, 'heads.', k - 2, extra=True)
    if f.has_block:
      put_layer(prefix, 'heads.block.', k - 2, extra=True)
  if cfg.loss.token_order_weight:
    put(ORDER, extra=True)
  return found | layout.more(cfg, found)


def layers_in_all(cfg: schema.CommandConfig) -> int:
  """Returns the number of layers of the Llama of trunk and head 1."""
  return len(heads_lib.next_token_layers(cfg))


def leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves by path, as 'trunk.q'."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
