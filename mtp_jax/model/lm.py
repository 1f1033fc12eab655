"""The language model: its parameters, and tokens to hidden states and logits."""

import dataclasses
import functools
from typing import Any, Generic, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import draft_vocab, schema
from mtp_jax.model import block, confidence, heads, layers, markov, params, trunk


class LM(flax.struct.PyTreeNode, Generic[params.Leaf]):
  """Parameters; field names are checkpoint paths."""

  embed: params.Leaf
  trunk: block.Block[params.Leaf]
  heads: Any  # the family's modules, stacked; None without any
  norm: params.Leaf
  unembed: Any  # one, one per head, or None
  order: Any  # second unembedding of head 1, for --loss.token_order_weight
  markov: Any = None  # markov.Markov of heads >= 2, for --heads.markov_rank
  confidence: Any = None  # a vector of heads >= 2, for --heads.confidence


def without_unused(tree):
  """Returns a pytree with each LM as a dict without the fields that were added later and are
  not in use, as checkpoints have it: those of before the fields can be read."""

  def fields_of(x):
    if not isinstance(x, LM):
      return x
    unused = {name for name in ('markov', 'confidence') if getattr(x, name) is None}
    if not unused:
      return x
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.name not in unused}

  return jax.tree.map(fields_of, tree, is_leaf=lambda x: isinstance(x, LM))


def with_unused(tree, like):
  """Returns `without_unused` undone; like: a pytree of the result's structure."""
  return jax.tree.map(
    lambda of, x: LM(**x) if isinstance(of, LM) and isinstance(x, dict) else x,
    like,
    tree,
    is_leaf=lambda x: isinstance(x, LM),
  )


class Embedding(Protocol):
  """What `embed` reads: an LM, or what decoding keeps of one."""

  @property
  def embed(self) -> Any: ...


def specs(cfg: schema.Config) -> LM[params.Spec]:
  heads.check(cfg)
  D, V = cfg.model.d_model, cfg.model.vocab_size
  S = params.Spec
  table = S((V, D), ('vocab', 'embed'), D**-0.5)
  unembed = S((D, V), ('embed', 'vocab'), D**-0.5)
  return LM(
    embed=table,
    trunk=params.stack(heads.trunk_layers(cfg), block.specs(cfg.model)),
    heads=heads.specs(cfg),
    norm=params.norm(cfg.model),
    unembed={'shared': unembed, 'replicated': params.stack(cfg.heads.n, unembed), 'tied': None}[
      cfg.heads.unembedding
    ],
    order=table if cfg.loss.token_order_weight else None,
    markov=markov.specs(cfg),
    confidence=confidence.specs(cfg),
  )


def embed(lm: Embedding, tokens_BU, cfg: schema.Config):
  """Returns the embeddings of all tokens of a window, in the compute dtype."""
  with jax.named_scope('embed'):
    table_VD = params.gather(lm.embed, specs(cfg).embed, cfg)
    x_BUD = layers.embed(table_VD, tokens_BU)
    x_BUD = x_BUD.astype(cfg.model.compute_dtype)
    scale = cfg.model.embedding_scale
    return x_BUD if scale == 1 else scale * x_BUD


def trunk_output(model: LM[jax.Array], x_BTD, position_BT, cfg: schema.Config):
  """Returns (z_BTD, ctx): the trunk's output of embeddings, and the Context that
  every later layer reads."""
  ctx = block.context(position_BT, cfg)
  return trunk.trunk(model.trunk, x_BTD, ctx, cfg, heads.types_of_trunk(cfg)), ctx


def next_embeddings(emb_BUD, k, T: int, stride: int):
  """Returns the embeddings (B, T, D) that head k reads, a slice of a window's."""
  start = heads.next_token_offset(k, stride)
  return jax.lax.dynamic_slice_in_dim(emb_BUD, start, T, axis=1)


def head_step(
  module,
  k,
  x: heads.Inputs,
  ctx: block.Context,
  cfg: schema.Config,
  *,
  feed,
  apply_block=block.block,
):
  """Computes head k: feed, block input, block, block output. The only body of
  every scan over heads: loss, scores, decoder and `forward`.

  Args:
    module: its parameters; None for an identity head.
    k: the head's number, from 1; may be traced.
    x: its Inputs, without the next token's embedding.
    ctx: Context of the window.
    cfg: the Config.
    feed: k -> next_emb_BTD, called where the family uses the next token.
    apply_block: in place of `block.block`, see `heads.step`.

  Returns:
    (carry_BTD, h_BTD): the input of the next head in the scan, and this head's
    hidden state, normed for the unembedding.
  """
  if module is None:
    if heads.family(cfg.heads).is_chained:
      x = x._replace(z_BTD=x.carry_BTD)  # equal values; gradients of the chain join here
  elif heads.family(cfg.heads).uses_next_token:
    x = x._replace(next_emb_BTD=feed(k))
  return heads.step(module, k, x, ctx, cfg, apply_block=apply_block)


def block_of_heads(module, x: heads.Inputs, ctx: block.Context, cfg: schema.Config, *, feed):
  """Returns the apply_block of `head_step`, the same for all heads; with
  --heads.share_keys_values it attends to what head 2 does.

  Args:
    module: of the heads, shared.
    x: the Inputs of head 1.
    ctx, cfg, feed: as of `head_step`.
  """
  if not cfg.heads.share_keys_values:
    return block.block
  carry_BTD, _ = heads.step(None, 1, x, ctx, cfg)
  x = x._replace(carry_BTD=carry_BTD, next_emb_BTD=feed(2))
  return functools.partial(block.block, of_others=heads.keys_values(module, x, ctx, cfg))


def forward(model: LM[jax.Array], tokens_BT, cfg: schema.Config):
  """Computes every head's hidden state.

  Args:
    model: parameters.
    tokens_BT: token ids, each row one document from its start.
    cfg: the Config.

  Returns:
    h_KBTD, normed for the unembedding, in the compute dtype. A head that reads the
    next token reads zeros where that token lies beyond T: its last `offset`
    positions differ from those of a longer row.
  """
  B, T = tokens_BT.shape
  n = cfg.heads.n
  position_BT = jax.lax.broadcasted_iota(tokens_BT.dtype, (B, T), 1)
  position_BT = jax.reshard(position_BT, jax.typeof(tokens_BT).sharding.spec)
  emb_BTD = embed(model, tokens_BT, cfg)
  z_BTD, ctx = trunk_output(model, emb_BTD, position_BT, cfg)
  emb_BUD = jnp.pad(emb_BTD, ((0, 0), (0, cfg.heads.offsets[-1]), (0, 0)))
  norm_D = params.gather(model.norm, specs(cfg).norm, cfg)

  modules, apply_block = heads.active_modules(model.heads, n, cfg.heads), block.block
  x_1 = heads.Inputs(norm_D=norm_D, z_BTD=z_BTD, carry_BTD=z_BTD)

  def feed(k):
    return next_embeddings(emb_BUD, k, T, cfg.heads.stride)

  if n > 1:
    apply_block = block_of_heads(modules, x_1, ctx, cfg, feed=feed)

  def head(carry_BTD, module, k, is_head_1):
    del is_head_1
    x = x_1._replace(carry_BTD=carry_BTD)
    carry_BTD, h_BTD = head_step(module, k, x, ctx, cfg, feed=feed, apply_block=apply_block)
    return carry_BTD, (h_BTD, None)

  _, (h_KBTD, _) = heads.scan_heads(head, z_BTD, modules, jnp.arange(1, n + 1), cfg.heads)
  return h_KBTD


def logits(model: LM[jax.Array], tokens_BT, cfg: schema.Config):
  """Computes every head's logits (K, B, T, V) in float32; head k predicts the token
  `cfg.heads.offsets[k - 1]` after position t.

  All heads' logits are in memory at the same time, which training never needs;
  see `forward` for the arguments and for the last positions, where a Markov head reads
  token 0.
  """
  h_KBTD = forward(model, tokens_BT, cfg)
  of = {'shared': model.unembed, 'tied': model.embed, 'replicated': model.unembed}
  spec = specs(cfg)
  w = of[cfg.heads.unembedding]
  if cfg.heads.unembedding == 'tied':
    unembed = params.gather(w, spec.embed, cfg).T
  else:
    unembed = params.gather(w, spec.unembed, cfg)
  product = 'KBTD,KDV->KBTV' if cfg.heads.unembedding == 'replicated' else 'KBTD,DV->KBTV'
  logits_KBTV = jnp.einsum(
    product, h_KBTD, unembed.astype(h_KBTD.dtype), preferred_element_type=jnp.float32
  )
  logits_KBTV, ids_X = layers.shaped(logits_KBTV, cfg.model), draft_vocab.of(cfg)
  if ids_X is None and model.markov is None:
    return logits_KBTV
  drafted = [logits_KBTV[0]]
  for k in range(2, cfg.heads.n + 1):
    logits_BTX = logits_KBTV[k - 1]
    if ids_X is not None:
      of_all = jax.typeof(logits_BTX).sharding.spec
      logits_BTX = logits_BTX.at[:, :, ids_X].get(out_sharding=of_all)
    if model.markov is not None:
      T, of = tokens_BT.shape[1], params.gather(model.markov, spec.markov, cfg)
      tokens_BU = jnp.pad(tokens_BT, ((0, 0), (0, cfg.heads.n)))
      logits_BTX += markov.bias(markov.rows(of.embed, tokens_BU, k, T, cfg), of.unembed)
    drafted.append(of_all_tokens(logits_BTX, cfg))
  return jnp.stack(drafted)


def draft_unembed(unembed, ids_X, cfg: schema.Config, out_sharding):
  """Returns the columns (D, X) of a draft vocabulary, of an unembedding (D, V) or tied (V, D)."""
  unembed_DV = unembed.T if cfg.heads.unembedding == 'tied' else unembed
  return unembed_DV.at[:, ids_X].get(out_sharding=out_sharding)


def of_all_tokens(logits_BTX, cfg: schema.Config):
  """Returns a further head's logits of all tokens: -inf outside of --heads.draft_vocab."""
  ids_X = draft_vocab.of(cfg)
  if ids_X is None:
    return logits_BTX
  index_V = np.full(cfg.model.vocab_size, len(ids_X))
  index_V[ids_X] = np.arange(len(ids_X))
  return logits_BTX.at[:, :, index_V].get(
    mode='fill', fill_value=-jnp.inf, out_sharding=jax.typeof(logits_BTX).sharding.spec
  )
