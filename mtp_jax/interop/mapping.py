"""One table: our parameters, and what other programs call them. Floor 4.

`LAYER`, `MODULE` and the rows around them name each parameter, with the
transform between the arrays. `tensors` spells the table out for a Config: every
tensor of a checkpoint, and where in our pytree it is. Export walks it one way,
import the other, so that a key is in neither or in both.

In `hf`, trunk and head 1 bear Llama's names: the trunk's layers, then those of
the heads that head 1 sits on (an anticausal chain, from n down), then its own.
The further heads have names of ours, k from 2 on:

  mtp_heads.K.LAYER        the layer of head K, in Llama's names
  mtp_heads.K.proj         W_k of a linear or residual head; M_k, which reads
                           [hidden; embedding], of a sequential one
  mtp_heads.K.{hidden,embed,final}_norm  of a sequential module
  mtp_heads.shared.…       the one module of the recursive family
  mtp_heads.K.lm_head      an unembedding of its own
  mtp_order                the second unembedding of head 1 (token order)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mtp_jax import config
from mtp_jax.model import heads as heads_lib


class Form(NamedTuple):
  """How an array of ours becomes one of a file, and back. Both get the Config;
  attention matrices of a file are (out, in)."""

  out: Callable[[np.ndarray, config.Config], np.ndarray]
  back: Callable[[np.ndarray, config.Config], np.ndarray]
  shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # of the file, by ours


def _heads_out(w_DNH, cfg):
  D, N, H = w_DNH.shape
  return w_DNH.transpose(1, 2, 0).reshape(N * H, D)


def _heads_back(w_ED, cfg):
  H = cfg.model.head_width
  E, D = w_ED.shape
  return w_ED.reshape(E // H, H, D).transpose(2, 0, 1)


SAME = Form(lambda w, _: w, lambda w, _: w, lambda s: s)
TRANSPOSED = Form(lambda w, _: w.T, lambda w, _: w.T, lambda s: s[::-1])
HEADS_IN = Form(_heads_out, _heads_back, lambda s: (s[1] * s[2], s[0]))
HEADS_OUT = Form(
  lambda w_NHD, _: w_NHD.reshape(-1, w_NHD.shape[-1]).T,
  lambda w_DE, cfg: w_DE.T.reshape(-1, cfg.model.head_width, w_DE.shape[0]),
  lambda s: (s[2], s[0] * s[1]),
)


class Row(NamedTuple):
  """A parameter: its name in ours and in Hugging Face's Llama."""

  ours: str
  hf: str
  form: Form


LAYER = (
  Row('attn_norm', 'input_layernorm', SAME),
  Row('q', 'self_attn.q_proj', HEADS_IN),
  Row('k', 'self_attn.k_proj', HEADS_IN),
  Row('v', 'self_attn.v_proj', HEADS_IN),
  Row('o', 'self_attn.o_proj', HEADS_OUT),
  Row('mlp_norm', 'post_attention_layernorm', SAME),
  Row('gate', 'mlp.gate_proj', TRANSPOSED),
  Row('up', 'mlp.up_proj', TRANSPOSED),
  Row('down', 'mlp.down_proj', TRANSPOSED),
)  # fmt: skip
EMBED = Row('embed', 'model.embed_tokens', SAME)
NORM = Row('norm', 'model.norm', SAME)
UNEMBED = Row('unembed', 'lm_head', TRANSPOSED)
ORDER = Row('order', 'mtp_order', SAME)
# Of a head's module, around its layer or instead of one.
MODULE = {
  'linear': (Row('proj', 'proj', TRANSPOSED),),
  'residual': (Row('proj', 'proj', TRANSPOSED),),
  'sequential': (
    Row('hidden_norm', 'hidden_norm', SAME),
    Row('embed_norm', 'embed_norm', SAME),
    Row('proj', 'proj', TRANSPOSED),
    Row('final_norm', 'final_norm', SAME),
  ),
}
MODULE['recursive'] = MODULE['sequential']


class Place(NamedTuple):
  """Where a tensor of a file is in ours."""

  path: str  # of the leaf, e.g. trunk.q
  index: int | None  # on its leading axis, where leaves are stacked
  form: Form
  extra: bool = False  # of what a next-token Llama has not


def tensors(cfg: config.Config) -> dict[str, Place]:
  """Every tensor of a checkpoint in `hf`."""
  f, n = heads_lib.family(cfg), cfg.heads.n
  found = {}

  def put(row, prefix='', path='', index=None, extra=False):
    place = Place(path + row.ours, index, row.form, extra)
    found[f'{prefix}{row.hf}.weight'] = place

  def put_layer(prefix, path, index, extra=False):
    for row in LAYER:
      put(row, prefix, path, index, extra)

  put(EMBED)
  stack = [('trunk.', i) for i in range(heads_lib.trunk_layers(cfg))]
  if cfg.heads.block_first:
    # What head 1 sits on, then itself.
    stack += [('heads.', k - 1) for k in range(n if f.reverse else 1, 0, -1)]
  for i, (path, index) in enumerate(stack):
    put_layer(f'model.layers.{i}.', path, index)
  put(NORM)
  if cfg.heads.unembedding == 'shared':
    put(UNEMBED)
  if cfg.heads.unembedding == 'replicated':
    put(UNEMBED, index=0)
  for k in range(2, n + 1):
    prefix = f'mtp_heads.{k}.'
    if cfg.heads.unembedding == 'replicated':
      put(UNEMBED, prefix, index=k - 1, extra=True)
    if cfg.heads.block_first:
      if not f.reverse:
        put_layer(prefix, 'heads.', k - 1, extra=True)
      continue
    index = 0 if f.one_module else k - 2
    if f.one_module:
      prefix = 'mtp_heads.shared.'
    for row in MODULE[cfg.heads.family]:
      put(row, prefix, 'heads.', index, extra=True)
    if f.has_block:
      put_layer(prefix, 'heads.block.', index, extra=True)
  if cfg.loss.order_weight:
    put(ORDER, extra=True)
  return found


def layers_in_all(cfg: config.Config) -> int:
  """Of the Llama that trunk and head 1 are."""
  if not cfg.heads.block_first:
    return cfg.model.n_layers
  more = cfg.heads.n if heads_lib.family(cfg).reverse else 1
  return heads_lib.trunk_layers(cfg) + more


def leaves(tree: Any) -> dict[str, Any]:
  """'trunk.q' -> leaf."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
