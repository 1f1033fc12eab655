"""Warm start: the initial parameters of a run from those of another model.

Trunk and head 1 are a plain Transformer in both models and are copied layer by
layer, whatever the other heads are; an imported Llama has no other heads. Heads
of the same family and stride are copied; missing ones are initialized.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config import draft_vocab, fields, schema
from mtp_jax.model import block, heads, lm, next_token, params

# Fields of the model that may differ.
FREE = ('model.n_layers', 'model.param_dtype', 'model.compute_dtype', 'model.remat')


def check(was: schema.Config, cfg: schema.Config, path: str) -> None:
  """Raises ConfigError unless a run of cfg can be initialized from the model of
  `was`, in `path`."""
  for name, old, new in schema.changed(was, cfg):
    if name.startswith('model.') and name not in FREE:
      raise fields.ConfigError(
        name, new, f'the parameters of {path}, which it is initialized from, have {old}'
      )
  if cfg.heads.unembedding == 'tied' and was.heads.unembedding != 'tied':
    raise fields.ConfigError(
      'heads.unembedding', 'tied', f'embedding and unembedding of {path} are two arrays'
    )
  layers = len(heads.next_token_layers(was))
  more = cfg.heads.n - 1 if _beside_head_1(cfg) else 0
  if cfg.model.n_layers != layers + more:
    raise fields.ConfigError(
      'model.n_layers',
      cfg.model.n_layers,
      f'trunk and head 1 of {path} are {layers} layers; with --heads.n='
      f'{cfg.heads.n} of {cfg.heads.family} that is {layers + more}',
    )


def _beside_head_1(cfg: schema.Config) -> bool:
  """Whether heads 2..n are layers beside head 1. An anticausal chain is below
  head 1, hence part of what computes the next token."""
  return cfg.heads.block_first and not heads.family(cfg.heads).reverse


def kept(was: schema.Config, cfg: schema.Config) -> int:
  """Returns the number of heads, from head 1 on, whose parameters are kept; their function is,
  but for shared keys and values. All heads of `was` must have trained."""
  families = was.heads.family, cfg.heads.family
  names = ['stride', 'layer_type', 'window']
  if heads.family(cfg.heads).normed_chain:
    names.append('trunk_state')
  if any(getattr(was.heads, name) != getattr(cfg.heads, name) for name in names):
    return 1
  if families == ('recursive', 'sequential'):
    return min(was.heads.n, cfg.heads.n)
  return min(was.heads.n, cfg.heads.n) if families[0] == families[1] else 1


def described(was: schema.Config, cfg: schema.Config) -> str:
  """Describes for the log which heads are copied, new and dropped."""
  n, first = cfg.heads.n, kept(was, cfg)
  parts = [f'{_numbers(1, first)} unchanged']
  if first > 1 and was.heads.unembedding == 'replicated' != cfg.heads.unembedding:
    parts = [f"head 1 unchanged; {_numbers(2, first)} with head 1's unembedding"]
  if first > 2 and was.heads.share_keys_values != cfg.heads.share_keys_values:
    of_others = 'with' if cfg.heads.share_keys_values else 'without'
    parts = [f'heads 1 to 2 unchanged; {_numbers(3, first)} {of_others} shared keys and values']
  if n > first:
    new = 'copied from head 1' if cfg.train.head_init == 'copy' else 'randomly initialized'
    new = 'from layers of the trunk' if heads.family(cfg.heads).reverse else new
    if heads.family(cfg.heads).shared_module and first > 1:
      new = 'with the shared module'
    parts.append(f'{_numbers(first + 1, n)} new, {new}')
  if was.heads.n > n:
    parts.append(f'{_numbers(n + 1, was.heads.n)} dropped')
  if first > 1 and not _same_markov(was, cfg):
    parts.append(f'Markov head {"new" if cfg.heads.markov_rank else "dropped"}')
  if first > 1 and was.heads.draft_vocab != cfg.heads.draft_vocab:
    parts.append(f'drafts of {draft_vocab.size(cfg):,} tokens, before of {draft_vocab.size(was):,}')
  if first > 1 and was.heads.confidence != cfg.heads.confidence:
    parts.append(f'confidence head {"new" if cfg.heads.confidence else "dropped"}')
  return '; '.join(parts)


def _numbers(first: int, last: int) -> str:
  return f'head {last}' if first == last else f'heads {first} to {last}'


def parameters(fresh: lm.LM, old: lm.LM, was: schema.Config, cfg: schema.Config) -> lm.LM:
  """Returns the initial parameters of cfg.

  Args:
    fresh: random initialization of cfg; unused parts are not computed under jit.
    old: parameters of `was`, possibly with more heads, in the dtype of cfg.
    was, cfg: configs that passed `check`.
  """
  old = next_token.trained_part(old, was)
  layers = next_token.layers(old, was)
  n_trunk, uses_order = heads.trunk_layers(cfg), cfg.loss.token_order_weight
  return lm.LM(
    embed=old.embed,
    trunk=jax.tree.map(lambda w: w[:n_trunk], layers),
    heads=_heads(fresh, old, layers, was, cfg),
    norm=old.norm,
    unembed=_unembed(fresh, old, was, cfg),
    order=old.order if uses_order and old.order is not None else fresh.order,
    markov=old.markov if _same_markov(was, cfg) else fresh.markov,
    confidence=old.confidence if _same_confidence(was, cfg) else fresh.confidence,
  )


def _same_markov(was: schema.Config, cfg: schema.Config) -> bool:
  """Whether the Markov head of `was` is that of cfg."""
  ranks = [c.heads.markov_rank * (c.heads.n > 1) for c in (was, cfg)]
  same_tokens = was.heads.draft_vocab == cfg.heads.draft_vocab or not ranks[0]
  return ranks[0] == ranks[1] and same_tokens and kept(was, cfg) > 1


def _same_confidence(was: schema.Config, cfg: schema.Config) -> bool:
  both = [c.heads.confidence and c.heads.n > 1 for c in (was, cfg)]
  return all(both) and kept(was, cfg) > 1


def _heads(fresh, old, layers, was, cfg):
  f, n = heads.family(cfg.heads), cfg.heads.n
  if fresh.heads is None:
    return None
  own = layers.q.shape[0] - heads.trunk_layers(cfg)
  if f.reverse:
    return jax.tree.map(lambda w: w[: -own - 1 : -1], layers)
  # Modules of heads 1..n, of heads 2..n, or one shared module.
  n_modules = heads.n_modules(cfg.heads, n)
  parts, done = [], 0
  if cfg.heads.block_first:
    parts, done = [jax.tree.map(lambda w: w[-1:], layers)], 1
  more = min(kept(was, cfg) - 1, n_modules - done)
  if more and heads.family(was.heads).shared_module:
    parts += [old.heads] * more
  elif more:
    parts.append(jax.tree.map(lambda w: w[done : done + more], old.heads))
  done += more
  if done < n_modules:
    rest = jax.tree.map(lambda w: w[done:], fresh.heads)
    if cfg.train.head_init == 'copy':
      rest = _as_head_1(rest, layers, old, cfg)
    parts.append(rest)
  return jax.tree.map(lambda *w: jnp.concatenate(w), *parts)


def _as_head_1(like, layers: block.Block, old: lm.LM, cfg) -> Any:
  """Returns stacked modules shaped like `like` that compute the function of head
  1. Modules that also read a token embedding approximate it: the layer of head 1
  on the hidden state, with zero weight on the embedding."""
  last = jax.tree.map(lambda w: w[-1], layers)
  eye_DD = jnp.eye(cfg.model.d_model)
  if isinstance(like, block.Block):
    one = last
  elif isinstance(like, heads.Sequential):
    spec = params.norm(cfg.model)
    ones_D = jnp.full(spec.shape, spec.fill)
    one = heads.Sequential(
      hidden_norm=ones_D,
      embed_norm=ones_D,
      proj=jnp.concatenate([eye_DD, jnp.zeros_like(eye_DD)]),
      block=last,
      final_norm=old.norm,
    )
  else:  # W z, or y + silu(W y)
    one = heads.Projection(
      proj=jnp.zeros_like(eye_DD) if cfg.heads.family == 'residual' else eye_DD
    )
  return jax.tree.map(_repeated, like, one)


def _repeated(like, one):
  """Broadcasts `one` to the shape, sharding and dtype of `like`."""
  place = jax.typeof(like).sharding.spec
  one = jax.reshard(one.astype(like.dtype), jax.P(*place[1:]))
  return jnp.broadcast_to(one, like.shape, out_sharding=place)


def _unembed(fresh, old, was, cfg):
  first_DV = {
    'shared': lambda: old.unembed,
    'replicated': lambda: old.unembed[0],
    'tied': lambda: old.embed.T,
  }[was.heads.unembedding]()
  if cfg.heads.unembedding == 'tied':
    return None
  if cfg.heads.unembedding == 'shared':
    return first_DV
  m, n = kept(was, cfg), cfg.heads.n
  if was.heads.unembedding == 'replicated':
    parts = [old.unembed[:m]]
  else:
    parts = [_repeated(fresh.unembed[:m], first_DV)]
  if m < n:
    rest = fresh.unembed[m:]
    copy = cfg.train.head_init == 'copy'
    parts.append(_repeated(rest, first_DV) if copy else rest)
  return jnp.concatenate(parts)
