"""Parameters as decoding reads them, and their bytes per forward pass."""

from typing import Any, NamedTuple

import jax

from mtp_jax.config import draft_vocab
from mtp_jax.decode import setup as setup_lib
from mtp_jax.model import heads, lm, params
from mtp_jax.parallel import sharding


class Weights(NamedTuple):
  """Parameters as decoding reads them: in the compute dtype (norms unchanged),
  gathered over the batch axes, unstacked, only those in use."""

  embed: Any
  stem: tuple  # layers of verification: the trunk's, then those of heads
  heads: tuple  # modules of the heads after them
  norm: Any
  unembed: tuple  # of heads 1, 2 …, or one shared by all
  draft_unembed: Any  # (D, X) of heads >= 2 with a draft vocabulary, or None
  markov: Any  # of heads >= 2, or None
  confidence: Any  # of heads >= 2, or None


def weights(model: lm.LM, s: setup_lib.Setup) -> Weights:
  """Returns the Weights of a model; call it under jit. A shared module appears once."""
  cfg, f = s.cfg, heads.family(s.cfg.heads)

  def use(w, spec):
    w = w.astype(cfg.model.compute_dtype) if spec.decay else w
    return jax.reshard(w, sharding.whole(*spec.axes))

  model = model.replace(order=None)
  model = jax.tree.map(use, model, lm.specs(cfg).replace(order=None))

  def at(i, stack):
    return jax.tree.map(lambda w: w[i], stack)

  stem = [at(i, model.trunk) for i in range(heads.trunk_layers(cfg))]
  further = range(2, s.window + 1)
  if f.reverse:
    stem += [at(k - 1, model.heads) for k in range(s.active, 0, -1)]
    modules = []
  elif cfg.heads.block_first:
    stem.append(at(0, model.heads))
    modules = [at(k - 1, model.heads) for k in further]
  else:
    n_modules = heads.n_modules(cfg.heads, s.window)
    modules = [at(i, model.heads) for i in range(n_modules)]
  return Weights(
    model.embed,
    tuple(stem),
    tuple(modules),
    model.norm,
    {
      'shared': lambda: (model.unembed,),
      'tied': lambda: (),
      'replicated': lambda: tuple(at(k, model.unembed) for k in range(s.window)),
    }[cfg.heads.unembedding](),
    _draft_unembed(model, s),
    model.markov if s.window > 1 else None,
    model.confidence if s.window > 1 else None,
  )


def _draft_unembed(model: lm.LM, s: setup_lib.Setup):
  ids_X = draft_vocab.of(s.cfg)
  if ids_X is None or s.window == 1:
    return None
  unembed = model.embed if model.unembed is None else model.unembed
  return lm.draft_unembed(unembed, ids_X, s.cfg, sharding.whole('embed', 'vocab'))


def in_use(w: Weights, s: setup_lib.Setup) -> Weights:
  """Returns the weights of a Setup with fewer heads, without copies."""
  return w._replace(
    heads=w.heads[: s.window - 1],
    unembed=w.unembed[: s.window],
    draft_unembed=w.draft_unembed if s.window > 1 else None,
    markov=w.markov if s.window > 1 else None,
    confidence=w.confidence if s.window > 1 else None,
  )


def read_bytes(w: Weights, s: setup_lib.Setup) -> int:
  """Returns the bytes of weights that a device reads per forward pass: a shared
  module once per head; a shared unembedding for head 1 and once for the drafts of
  all other heads, or once per head where they draft sequentially."""
  f, unembedding = heads.family(s.cfg.heads), s.cfg.heads.unembedding
  modules = w.heads * (s.window - 1) if f.shared_module else w.heads
  table = w.unembed or (w.embed,)
  n_drafting = (s.window > 1) * (s.window - 1 if f.uses_next_token else 1)
  if w.draft_unembed is not None:
    table += (w.draft_unembed,) * n_drafting
  elif unembedding != 'replicated':
    table *= 1 + n_drafting
  if w.markov is not None:
    table += (w.markov.unembed,) * (s.window - 1)
  return params.bytes_per_device((w.stem, modules, w.norm, table))
