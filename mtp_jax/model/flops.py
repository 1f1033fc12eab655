"""FLOPs per training token by formula, and FLOPs of a traced program."""

import math
import re
from typing import NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp

from mtp_jax.config import draft_vocab, layer_types, schema
from mtp_jax.model import heads as heads_lib
from mtp_jax.model import lm, params


def flops_per_token(
  cfg: schema.Config, n_active: int, causal: bool = True, teacher: schema.Config | None = None
) -> float:
  """Returns the model FLOPs per training token: forward, and twice that backward.

  Two per weight of a matrix product (the unembedding once per head and once for
  token order prediction, the embedding excluded) and 4 N H per layer and attended
  key, T / 2 keys on average, fewer in a sliding layer; T with causal=False, the
  convention of Chowdhery et al. 2022 (https://arxiv.org/abs/2204.02311, appendix B) and
  the cost of a program that masks scores instead of skipping them. Frozen weights have
  no gradient, and a frozen trunk has no backward pass. Recomputation is excluded.

  teacher: the Config of the teacher.Model of --loss.teacher, which runs forward.
  """
  of = forward(cfg, n_active, causal, teacher)
  h = cfg.heads
  own = h.unembedding == 'replicated'
  trunk_moves = cfg.train.freeze != 'trunk'
  heads_move = cfg.train.freeze != 'heads'
  unembed_1 = heads_move if own else trunk_moves
  unembed_others = heads_move if own else trunk_moves and not h.isolated
  return (
    (3 if trunk_moves else 1) * of.trunk
    + (2 + heads_move) * of.heads
    + (2 + unembed_1) * of.unembedding
    + (2 + unembed_others) * of.drafts
    + (2 + heads_move) * (of.order + of.markov)
    + of.teacher
    + of.teacher_trunk
  )


class Forward(NamedTuple):
  """FLOPs per token of a forward pass."""

  trunk: float
  heads: float  # their modules
  unembedding: float  # of head 1
  drafts: float  # the unembeddings of all heads >= 2
  markov: float  # of all heads >= 2
  order: float  # the unembedding of token order prediction
  teacher: float  # the teacher's logits, per head that is compared with it
  teacher_trunk: float  # of another model than head 1


def forward(
  cfg: schema.Config, n_active: int, causal: bool = True, teacher: schema.Config | None = None
) -> Forward:
  """Returns the FLOPs per token of a forward pass with heads 1..n_active."""
  m, T = cfg.model, cfg.data.seq_len
  types = layer_types.distinct(cfg)
  family = heads_lib.family(cfg.heads)
  keys = [_mean_keys(T, t.window) if causal else T for t in types]
  attention = [4 * of_type * m.n_attn_heads * m.head_width for of_type in keys]
  trunk = 2 * _matrices(lm.specs(cfg).trunk)
  trunk += sum(attention[i] for i in heads_lib.types_of_trunk(cfg))
  # Head 1 of an identity-first family has no module.
  of_heads = heads_lib.types_of_heads(cfg)[not cfg.heads.block_first : n_active]
  modules = 2 * len(of_heads) * _matrices(family.specs(m))
  modules += sum(attention[i] for i in of_heads) * family.has_block
  if cfg.heads.share_keys_values:
    modules -= max(len(of_heads) - 1, 0) * _keys_values(m)
  unembedding = 2 * m.d_model * m.vocab_size
  n_compared = cfg.loss.compares * (n_active - 1)
  width = teacher.model.d_model if teacher else m.d_model
  return Forward(
    trunk,
    modules,
    unembedding,
    (n_active - 1) * 2 * m.d_model * draft_vocab.size(cfg),
    (n_active - 1) * 2 * cfg.heads.markov_rank * draft_vocab.size(cfg),
    (cfg.loss.token_order_weight > 0) * unembedding,
    n_compared * (not cfg.loss.reads_stored_teacher) * 2 * width * m.vocab_size,
    forward(teacher, 1, causal).trunk if teacher and n_compared else 0.0,
  )


def _keys_values(m: schema.ModelConfig) -> int:
  return 2 * 2 * m.d_model * m.kv_heads * m.head_width


def executed(
  cfg: schema.Config, n_active: int, causal: bool = True, teacher: schema.Config | None = None
) -> float:
  """Returns the FLOPs per training token with recomputation: of the trunk's layers by
  --model.remat=block, and of heads by --loss.backward; nothing frozen."""
  of = forward(cfg, n_active, causal, teacher)
  is_remat = cfg.loss.backward == 'remat'
  compares = cfg.loss.compares and n_active > 1
  is_kept = heads_lib.is_kept(cfg, n_active)
  again = (is_remat and not is_kept) or compares or heads_lib.family(cfg.heads).is_chained
  # e2e_tv: acceptance rates first.
  logits = 4 if is_remat or (compares and cfg.loss.head_loss == 'e2e_tv') else 3
  # Keys and values that are shared are computed once, of an input that is computed for them.
  apart = 3 * 4 * cfg.model.d_model**2 - again * _keys_values(cfg.model)
  moves = not cfg.heads.isolated or cfg.heads.unembedding == 'replicated'
  return (
    (3 + (cfg.model.remat == 'block')) * of.trunk
    + (3 + again) * of.heads
    + (cfg.heads.share_keys_values and n_active > 1) * apart
    + (3 + is_remat) * (of.unembedding + of.order)
    + (logits - (not moves)) * of.drafts
    + logits * of.markov
    + (logits - 2) * of.teacher
    + of.teacher_trunk
  )


def _mean_keys(T: int, window: int) -> float:
  """Returns the keys that a position attends to on average, by the convention of T / 2."""
  w = min(window or T, T)
  return w - w * w / (2 * T)


def window_shares(cfg: schema.Config) -> dict[str, tuple[float, ...]]:
  """Returns the share of layers of each window, ascending, in trunk and heads, as
  `of_program` takes."""
  windows = [t.window for t in layer_types.distinct(cfg)]
  shares = {}
  for part, types in (
    ('trunk', heads_lib.types_of_trunk(cfg)),
    ('heads', heads_lib.types_of_heads(cfg)),
  ):
    here = [windows[i] for i in types]
    shares[part] = tuple(here.count(w) / max(len(here), 1) for w in sorted(set(windows)))
  return shares


def _matrices(specs) -> int:
  return params.count([s for s in jax.tree.leaves(specs) if s.decay])


# Matrix products of T x T x H per query head of a kernel, half of each above the
# diagonal and skipped; by a part of the kernel's name.
KERNELS = {
  'splash_mha_fwd': 2,
  'splash_mha_dq': 3,
  'splash_mha_dkv': 4,
  'flash_forward': 2,
  'flash_dq': 3,
  'flash_dkv': 4,
}


def of_program(
  jaxpr,
  seq_len: int,
  shares: dict[str, tuple[float, ...]] | None = None,
  *,
  kernels_only: bool = False,
) -> float:
  """Returns the FLOPs of the matrix products of a traced program, per device.

  Executed FLOPs, including recomputation and work repeated on several devices:
  shapes are those of shards. A loop counts once per trip; a conditional as its most
  expensive branch, but once per loop where another branch has no product (work of
  head 1 alone), and by `shares` where it selects a window; attention kernels by their
  products per query head, where an array selects the window by `shares` too. Elementwise
  work is excluded.

  shares: `window_shares` of the model. kernels_only: without products outside of kernels.
  """
  return _of_jaxpr(jaxpr, _Within(seq_len, shares or {}, kernels_only))


class _Within(NamedTuple):
  """What encloses a part of a program."""

  seq_len: int
  shares: dict[str, tuple[float, ...]]
  kernels_only: bool = False
  part: str = 'trunk'  # or heads
  trips: int = 1  # of the loop
  windows: tuple[int, ...] = (0,)  # of the attention; several if selected by an array

  @property
  def mean_keys(self) -> float:
    """Keys of a query, on average over positions, and by `shares` over windows."""
    keys = [_mean_keys(self.seq_len, window) for window in self.windows]
    shares = self.shares.get(self.part, ())
    if len(shares) != len(keys):
      return max(keys)
    return sum(share * n for share, n in zip(shares, keys, strict=True))


def _of_jaxpr(jaxpr, here: _Within) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    scope = str(eqn.source_info.name_stack)
    found, parts = WINDOW.search(scope), PART.findall(scope)
    within = here._replace(part=parts[-1]) if parts else here
    within = within._replace(windows=tuple(map(int, found[1].split('_')))) if found else within
    if name == 'dot_general':
      total += 0 if here.kernels_only else _dot(eqn)
    elif name == 'pallas_call' or name.startswith('dot_product_attention'):
      total += _kernel(eqn, within.mean_keys)
    elif name == 'cond':
      branches = [branch.jaxpr for branch in eqn.params['branches']]
      choices = [_of_jaxpr(branch, within) for branch in branches]
      shares = here.shares.get(within.part, ())
      if len(shares) == len(choices) and all(map(_has_window, branches)):
        total += sum(share * of for share, of in zip(shares, choices, strict=True))
      else:
        total += max(choices) / (1 if min(choices) else here.trips)
    else:
      times = eqn.params['length'] if name == 'scan' else 1
      within = within._replace(trips=times) if name == 'scan' else within
      total += times * sum(
        _of_jaxpr(inner, within) for inner in jax.extend.core.jaxprs_in_params(eqn.params)
      )
  return total


WINDOW = re.compile(r'attend_window_(\d+(?:_\d+)*)')  # a name scope of attention.py
PART = re.compile(r'\b(trunk|heads)\b')  # name scopes of lm.py and the losses


def _has_window(jaxpr) -> bool:
  return any(WINDOW.search(str(eqn.source_info.name_stack)) for eqn in jaxpr.eqns)


def _shard(aval) -> list[int]:
  """Returns the shape of a device's shard."""
  mesh, partitions = aval.sharding.mesh, aval.sharding.spec.partitions
  shape = list(aval.shape)
  for i, axes in enumerate(partitions):
    for axis in (axes,) if isinstance(axes, str) else axes or ():
      shape[i] //= mesh.shape[axis]
  return shape


def _dot(eqn) -> float:
  (contracted, _), _ = eqn.params['dimension_numbers']
  left = _shard(eqn.invars[0].aval)
  return 2.0 * math.prod(_shard(eqn.outvars[0].aval)) * math.prod(left[i] for i in contracted)


def _kernel(eqn, keys: float) -> float:
  name = eqn.params.get('name') or getattr(
    eqn.params.get('name_and_src_info'), 'name', eqn.primitive.name
  )
  known = [products for key, products in KERNELS.items() if key in name]
  if not known:
    raise ValueError(f'kernel {name}: unknown FLOPs')
  query = next(
    v.aval
    for v in eqn.invars
    if len(v.aval.shape) >= 3 and jnp.issubdtype(v.aval.dtype, jnp.floating)
  )
  return known[0] * 2.0 * math.prod(query.shape) * keys
