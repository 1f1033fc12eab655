"""One table of our parameters and their names in other programs.

rows.py names each parameter in each checkpoint format, with the transform between
the arrays; `FORMS` has the names of layers and heads per format. `tensors` expands
that for a Config: every tensor of a checkpoint, and its place in our pytree. Export
uses it in one direction, import in the other, so that a key is in neither or in both.

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
  speculators
             one sequential module as https://github.com/vllm-project/speculators
             reads it, in a folder beside the model that verifies (0.9.0)
"""

from collections.abc import Callable
from typing import NamedTuple

from mtp_jax.config import layer_types, schema
from mtp_jax.interop import architectures, config_json, dialects, rows, transforms
from mtp_jax.model import block
from mtp_jax.model import heads as heads_lib


class Place(NamedTuple):
  """The place of a tensor of a file in our pytree."""

  path: str  # of the leaf, e.g. trunk.q
  index: int | None  # on the leading axis of stacked leaves
  form: transforms.Form
  extra: bool = False  # not part of a next-token Llama
  copy: bool = False  # a copy of another tensor, which must agree


def _norm_of_each_head(cfg, found):
  return {
    f'model.mtp_norms.{j}.weight': Place('norm', None, transforms.SAME, True, True)
    for j in range(1, cfg.heads.n)
  }


def _no_biases(cfg, found):
  if cfg.model.qkv_bias:
    return {}
  ends = tuple(f'self_attn.{x}_proj.weight' for x in 'qkv')
  return {
    name.removesuffix('weight') + 'bias': place._replace(form=transforms.NO_BIAS, copy=True)
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
  row = rows.TIED if cfg.heads.unembedding == 'tied' else rows.UNEMBED
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
FORMS['speculators'] = Layout(
  ('sequential', 'recursive'), 'speculator/mtp_layers.{j}.', file='speculator/model.safetensors'
)
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


def _of_ours_alone(cfg: schema.CommandConfig) -> str:
  """Returns what only hf can represent."""
  if cfg.loss.token_order_weight:
    return 'has no tensor for the unembedding of --loss.token_order_weight'
  if cfg.heads.share_keys_values:
    return 'has keys and values of its own in each step, see --heads.share_keys_values'
  rank = cfg.heads.markov_rank
  return f'has no tensors for a Markov head (--heads.markov_rank={rank})' if rank else ''


def undrafted(cfg: schema.CommandConfig) -> str:
  """Returns why llama.cpp cannot draft with a model's further heads; '' if it can."""
  h = cfg.heads
  if h.n == 1:
    return 'there are none'
  if config_json.of(cfg) != 'llama' or cfg.model.qkv_bias or cfg.model.mlp_bias:
    return 'its architecture with modules holds Llamas without biases'
  if h.family not in FORMS['gguf_mtp'].families:
    return f'it supports sequential and recursive modules; these are {h.family}'
  if h.stride > 1:
    return f'it does not support strided heads (--heads.stride={h.stride})'
  if not layer_types.all_full(cfg):
    return f'its modules have full attention, not --heads.layer_type={h.layer_type}'
  modules = heads_lib.n_modules(cfg.heads, h.n)
  if h.unembedding == 'replicated' and modules < h.n - 1:
    return 'a module has one unembedding there; this one has one per step'
  if problem := _of_ours_alone(cfg):
    return f'it {problem}'
  if cfg.model.rope_factor > 1:
    return f'its modules have no scaled RoPE (--model.rope_factor={cfg.model.rope_factor:g})'
  return ''


# Formats of a few model families; the others are of all.
DIALECTS_OF = {
  'meta': ('llama',),
  'mtp_llama': ('llama',),
  'mimo': ('llama', 'qwen2'),
  'medusa': ('llama', 'mistral', 'qwen2', 'qwen3'),
  'speculators': ('qwen3',),  # its other families have layers that ours do not
}


ONE_MODULE = ('mimo', 'speculators')


def unfit(cfg: schema.CommandConfig, form: str) -> str:
  """Returns why a format cannot represent a model; '' if it can."""
  f, h = FORMS[form], cfg.heads
  if problem := config_json.unfit(cfg):
    return problem
  kind = config_json.of(cfg)
  if kind not in DIALECTS_OF.get(form, (kind,)):
    return f'is of {" and ".join(DIALECTS_OF[form])}; this model is of {kind}'
  if form == 'gguf':
    return architectures.unfit(cfg, kind, layers_in_all(cfg))
  if form == 'hf':
    return ''
  if h.family not in f.families and not (h.n == 1 and 'parallel' in f.families):
    return f'supports {" and ".join(f.families)} heads; these are {h.family}'
  if form == 'medusa' and h.n == 1:
    return 'requires further heads; this model has one'
  if h.unembedding == 'replicated' and not f.replicated:
    return 'has one unembedding; here each head has its own'
  if form in ('transformers_mtp', *ONE_MODULE) and h.n == 1:
    return 'requires further modules; this model has one head'
  if problem := config_json.unfit_types(cfg, form):
    return problem
  if form in ONE_MODULE and (several := heads_lib.n_modules(cfg.heads, h.n)) > 1:
    return f'supports one module, this model has {several}; transformers_mtp and gguf support all'
  if problem := _of_ours_alone(cfg):
    return problem
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

  dialect = dialects.DIALECTS[config_json.of(cfg) or 'llama']
  of_block = block.specs(cfg.model)

  def put(row, prefix='', path='', index=None, extra=False):
    name, transform = row.of((extra and layout.heads_like) or form)
    found[f'{prefix}{name}.weight'] = Place(path + row.ours, index, transform, extra)

  def put_layer(prefix, path, index, extra=False):
    for row in rows.LAYER:
      if getattr(of_block, row.ours) is not None:
        name, transform = row.in_layer((extra and layout.heads_like) or form, dialect)
        found[prefix + name] = Place(path + row.ours, index, transform, extra)

  put(rows.EMBED)
  for i, (path, index) in enumerate(heads_lib.next_token_layers(cfg)):
    put_layer(layout.layer.format(i=i), path, index)
  put(rows.NORM)
  if form == 'gguf' and architectures.ARCHITECTURES[dialect.kind].plus_one:
    name = f'{rows.NORM.names["gguf"]}.weight'
    found[name] = found[name]._replace(form=transforms.PLUS_ONE)
  if unembedding == 'tied' and form == 'meta':
    found['output.weight'] = _unembedding(cfg)._replace(copy=True)
  elif unembedding != 'tied':
    put(rows.UNEMBED, index=0 if unembedding == 'replicated' else None)
  for k in range(2, n + 1):
    if unembedding == 'replicated':
      l = layers_in_all(cfg) + k - 2
      name = layout.replicated.format(k=k, j=k - 2, l=l)
      found[name] = Place('unembed', k - 1, rows.UNEMBED.form, True)
    prefix = _prefix(form, cfg, k - 2)
    if cfg.heads.block_first:
      if not f.reverse:
        put_layer(prefix, 'heads.', k - 1, extra=True)
      continue
    if f.shared_module and k > 2:
      continue
    for row in rows.MODULE[cfg.heads.family]:
      put(row, prefix, 'heads.', k - 2, extra=True)
    if f.has_block:
      put_layer(prefix, 'heads.block.', k - 2, extra=True)
  if cfg.loss.token_order_weight:
    put(rows.ORDER, extra=True)
  for row in (rows.OF_TOKENS, rows.OF_DRAFTS) if cfg.heads.markov_rank and n > 1 else ():
    put(row, extra=True)
  if cfg.heads.confidence and n > 1:
    put(rows.CONFIDENCE, extra=True)
  return found | layout.more(cfg, found)


def layers_in_all(cfg: schema.CommandConfig) -> int:
  """Returns the number of layers of the Llama of trunk and head 1."""
  return len(heads_lib.next_token_layers(cfg))
