"""Decoding with the model's own heads as the draft of what follows. Floor 3.

One forward pass reads W tokens of a row: the last known one, and the W - 1 that
heads 2..W drafted after the pass before. Head 1 says at each of them what comes
next; drafts stand as far as it agrees, and it adds one token of its own
(blockwise parallel decoding, Stern et al. 2018,
https://arxiv.org/abs/1811.03115; with the model's own heads Gloeckle et al.
2024, https://arxiv.org/abs/2404.19737, section 3.2). At the last that stands
heads 2..W then draft anew. Each row goes at its own pace. W = 1 is plain
decoding, by the same program.

The text is what head 1 alone would have written, whatever the other heads say:
the same tokens if greedy, the same distribution if sampled.

What is computed where, of a window of W tokens:

  trunk, head 1          everywhere (verification)
  parallel heads         keys and values everywhere, the rest at one position
  causal heads           everywhere but the last one's queries, MLP and logits
  anticausal heads       everywhere, since head 1 sits on them; logits at one
  linear, residual       at one position
  sequential, recursive  everywhere, and again at the W - 2 positions before:
                         what module k wrote at the last k - 2 positions read
                         drafts that may have fallen

Logits of heads 2..W are those of one position in every family.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import config, params, sharding
from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import sample
from mtp_jax.model import block, heads, layers, lm


class Tree(NamedTuple):
  """The window's tokens: slot 0 is the last known one, the others drafts."""

  depth_M: tuple[int, ...]  # tokens after the root
  rank_M: tuple[int, ...]  # among its head's candidates
  levels: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # slots, parents
  widths: tuple[int, ...]  # candidates of heads 2, 3, …

  @property
  def is_chain(self) -> bool:
    return all(width == 1 for width in self.widths)


def tree(widths: tuple[int, ...]) -> Tree:
  """Each candidate of a head under each of the head before it (Cai et al. 2024,
  https://arxiv.org/abs/2401.10774); of width 1 throughout, a chain."""
  depth, rank, levels, above = [0], [0], [], (0,)
  for level, width in enumerate(widths, 1):
    slots = tuple(range(len(depth), len(depth) + len(above) * width))
    parents = tuple(parent for parent in above for _ in range(width))
    levels.append((slots, parents))
    depth += [level] * len(slots)
    rank += list(range(width)) * len(above)
    above = slots
  return Tree(tuple(depth), tuple(rank), tuple(levels), tuple(widths))


class Setup(NamedTuple):
  """What a program is compiled for; hashable."""

  cfg: config.Config  # model and heads; the rest is as by default
  active: int  # heads that trained
  tree: Tree  # as deep as there are drafts: W - 1
  stop_ids: tuple[int, ...]

  @property
  def window(self) -> int:
    """W, heads in use."""
    return len(self.tree.widths) + 1

  @property
  def slots(self) -> int:
    """M, tokens of a forward pass: W unless drafts form a tree."""
    return len(self.tree.depth_M)

  @property
  def again(self) -> int:
    """R, positions that token-feeding heads read again."""
    return max(self.window - 2, 0) * heads.family(self.cfg).feeds_tokens


def setup(cfg: config.Config, active: int, widths: tuple[int, ...], stop_ids=()) -> Setup:
  only = config.Config(model=cfg.model, heads=cfg.heads)
  only = config.replace(only, **{'loss.grad_dtype': cfg.model.compute_dtype})
  return Setup(only, active, tree(widths), tuple(stop_ids))


class Weights(NamedTuple):
  """Parameters as decoding reads them: in the compute dtype (norms as they
  are), whole over the batch axes, layers apart, those in use only."""

  embed: Any
  stem: tuple  # layers that verification needs: the trunk's, then heads'
  heads: tuple  # modules of the heads after them
  norm: Any
  unembed: tuple  # of head 1, 2 …, or one for all


def weights(model: lm.LM, s: Setup) -> Weights:
  """Under jit. A module that serves all heads is there once."""
  cfg, f = s.cfg, heads.family(s.cfg)

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
    n_modules = heads.n_modules(cfg, s.window)
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
  )


def in_use(w: Weights, s: Setup) -> Weights:
  """Those of fewer heads than w was made for; nothing is copied."""
  return w._replace(heads=w.heads[: s.window - 1], unembed=w.unembed[: s.window])


def read_bytes(w: Weights, s: Setup) -> int:
  """Bytes of weights that a device reads in a forward pass: a module as often
  as it serves a head; a shared unembedding for head 1 and once more for the
  drafts of all further heads, or for each where one drafts after the other."""
  f, unembedding = heads.family(s.cfg), s.cfg.heads.unembedding
  modules = w.heads * (s.window - 1) if f.one_module else w.heads
  table = w.unembed or (w.embed,)
  reads = 1 + (s.window > 1) * (s.window - 1 if f.feeds_tokens else 1)
  if unembedding != 'replicated':
    table = table * reads
  return params.bytes_per_device((w.stem, modules, w.norm, table))


class State(NamedTuple):
  """Of each row: what is known, what is drafted, how it went."""

  tokens_BS: Any  # the known ones; beyond them, what is drafted
  length_B: Any  # known tokens; all but the last are in the cache
  limit_B: Any  # the length at which a row ends
  done_B: Any
  seed_B: Any
  drafted_B: Any  # whether there are drafts yet
  candidates_BJX: Any  # of heads 2..W, best first
  q_BJV: Any  # what they were drawn from; None if greedy
  tail_BRD: Any  # z of the R positions before the window; None without
  forwards_B: Any
  asked_BJ: Any  # drafts that were compared, those before them having stood
  accepted_BJ: Any


class Caches(NamedTuple):
  stem: tuple[cache_lib.Layer, ...]
  heads: tuple[cache_lib.Layer, ...]


def start(tokens_BS, length_B, limit_B, seed_B, sampled: bool, s: Setup):
  """The State before anything was read. Under jit, arguments by rows.

  tokens_BS needs room for a window beyond the longest limit.
  """
  J, V = s.window - 1, s.cfg.model.vocab_size
  width = max(s.tree.widths, default=1)

  def rows(tokens_BS, length_B, limit_B, seed_B):
    B = tokens_BS.shape[0]

    def zeros(*shape, dtype=jnp.int32):
      return jnp.zeros((B, *shape), dtype)

    return State(
      tokens_BS,
      length_B,
      limit_B,
      length_B >= limit_B,
      seed_B,
      zeros(dtype=bool),
      zeros(J, width),
      zeros(J, V, dtype=jnp.float32) if sampled else None,
      zeros(s.again, s.cfg.model.d_model, dtype=s.cfg.model.compute_dtype) if s.again else None,
      zeros(),
      zeros(J),
      zeros(J),
    )

  return sharding.by_rows(rows, tokens_BS, length_B, limit_B, seed_B)


def cached_layers(s: Setup) -> tuple[int, int]:
  """That have keys and values: of the stem, of the heads after it."""
  f = heads.family(s.cfg)
  stem = heads.trunk_layers(s.cfg)
  if s.cfg.heads.block_first:
    stem += s.active if f.reverse else 1
  return stem, 0 if f.reverse or not f.has_block else s.window - 1


def empty(B: int, S: int, dtype, s: Setup) -> Caches:
  """Of S slots. Under jit; S needs room for M - 1 beyond the longest row."""
  stem, further = cached_layers(s)
  return Caches(
    cache_lib.empty(stem, B, S, s.cfg, dtype), cache_lib.empty(further, B, S, s.cfg, dtype)
  )


# Layers over a window.


class Window(NamedTuple):
  """Positions of each row that are computed at once."""

  ctx: block.Context
  slot: Any  # (B, T), or that of the first, where all rows have the same
  seen_BTS: Any


class Asked(NamedTuple):
  """The one position of a window whose outcome is of interest."""

  at_B: Any
  window: Window


def _take(x_BTD, at_B):
  """(B, 1, D)."""

  def rows(x_BTD, at_B):
    return jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)

  return sharding.by_rows(rows, x_BTD, at_B)


def _layer(layer, x_BTD, kv, here: Window, cfg, asked: Asked | None = None):
  """A layer over a window, whose keys and values are cached; the rest of it,
  if so asked, at one position."""
  w = params.gather_cast(layer, block.specs(cfg), cfg)
  y_BTD = layers.rms_norm(x_BTD, w.attn_norm, cfg.model.norm_eps)
  kv = cache_lib.write(kv, *block.keys_values(w, y_BTD, here.ctx), here.slot)
  if asked is not None:
    x_BTD, y_BTD = _take(x_BTD, asked.at_B), _take(y_BTD, asked.at_B)
    here = asked.window
  q_BTNH = block.queries(w, y_BTD, here.ctx)
  a_BTNH = cache_lib.attend(q_BTNH, kv, here.seen_BTS)
  return block.add_mlp(w, block.add_attended(w, x_BTD, a_BTNH), cfg), kv


def _stem(w: Weights, tokens_BT, caches: Caches, here: Window, s: Setup):
  """What each layer gives that verification needs, and the caches."""
  x_BTD, states, written = lm.embed(w, tokens_BT, s.cfg), [], []
  for layer, kv in zip(w.stem, caches.stem, strict=True):
    x_BTD, kv = _layer(layer, x_BTD, kv, here, s.cfg)
    states.append(x_BTD)
    written.append(kv)
  return states, caches._replace(stem=tuple(written))


def _z(states, s: Setup):
  return states[heads.trunk_layers(s.cfg) - 1]


def _head(w, k, z_BTD, carry_BTD, next_BT, kv, here, asked, s: Setup):
  """Head k >= 2 over a window: (carry_BTD, its h_B1D where asked, its cache).

  next_BT: the token that head k - 1 predicts at each position, for families
  that feed them.
  """
  cfg, f = s.cfg, heads.family(s.cfg)
  module = w.heads[0 if f.one_module else k - 2]
  next_emb_BTD = lm.embed(w, next_BT, cfg) if f.feeds_tokens else None
  x = heads.Inputs(w.norm, z_BTD, carry_BTD, next_emb_BTD)
  if not f.has_block:
    x = x._replace(z_BTD=_take(z_BTD, asked.at_B))
    return *f.leave(module, f.enter(module, x, None, cfg), x, cfg), None
  at_once = k == s.window or not f.dependent
  y_BTD, kv = _layer(
    heads.layer(module),
    f.enter(module, x, here.ctx, cfg),
    kv,
    here,
    cfg,
    asked if at_once else None,
  )
  carry_BTD, h_BTD = f.leave(module, y_BTD, x, cfg)
  if asked is not None and not at_once:
    h_BTD = _take(h_BTD, asked.at_B)
  return carry_BTD, h_BTD, kv


def _logits(w: Weights, h_BTD, k: int, cfg):
  """Of head k, in float32, whole over the vocabulary."""
  if cfg.heads.unembedding == 'tied':
    unembed, product = w.embed, 'BTD,VD->BTV'
  else:
    one = k - 1 if cfg.heads.unembedding == 'replicated' else 0
    unembed, product = w.unembed[one], 'BTD,DV->BTV'
  with jax.named_scope('unembed'):
    logits_BTV = jnp.einsum(product, h_BTD, unembed, preferred_element_type=jnp.float32)
  return jax.reshard(logits_BTV, sharding.pspec('batch', None, None))


def _all_logits(w: Weights, hidden: list, cfg):
  """Of heads 2..W, one position each: (B, W - 1, V)."""
  if cfg.heads.unembedding == 'replicated':
    logits = [_logits(w, h_B1D, k, cfg) for k, h_B1D in enumerate(hidden, 2)]
    return jnp.concatenate(logits, axis=1)
  return _logits(w, jnp.concatenate(hidden, axis=1), 2, cfg)


def next_logits(w: Weights, tokens_BT, length_B, s: Setup):
  """Head 1's after each row's last token, by a pass over the whole row."""

  def rows(tokens_BT):
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

  position_BT = sharding.by_rows(rows, tokens_BT)
  here = _window(position_BT, 0, tokens_BT.shape[1], s.cfg)
  caches = empty(*tokens_BT.shape, s.cfg.model.compute_dtype, s)
  states, _ = _stem(w, tokens_BT, caches, here, s)
  h_BTD = heads.norm(_take(states[-1], length_B - 1), w.norm, s.cfg)
  return _logits(w, h_BTD, 1, s.cfg)[:, 0]


# Reading the prompt.


def _window(position_BT, slot, S: int, cfg) -> Window:
  """Positions that see all before them."""

  def rows(position_BT):
    return jnp.arange(S)[None, None] <= position_BT[:, :, None]

  return Window(block.context(position_BT, cfg), slot, sharding.by_rows(rows, position_BT))


@functools.partial(jax.jit, static_argnames=('C', 's'), donate_argnames=('state', 'caches'))
def prefill(w: Weights, state: State, caches: Caches, first, *, C: int, s: Setup):
  """Reads C tokens of all rows, from position `first` on; a prompt but for its
  last token, which the first window reads.

  A row may be shorter: what is written beyond its length is not seen, and is
  overwritten. Returns (state, caches).
  """
  f, cfg = heads.family(s.cfg), s.cfg
  S = caches.stem[0].k_BGSH.shape[2]

  def tokens(tokens_BS, ahead):
    return jax.lax.dynamic_slice_in_dim(tokens_BS, ahead, C, axis=1)

  def read(k):
    return sharding.by_rows(tokens, state.tokens_BS, same=(first + k,))

  def positions(length_B, first):
    return jnp.broadcast_to(first + jnp.arange(C), (length_B.shape[0], C))

  position_BC = sharding.by_rows(positions, state.length_B, same=(first,))
  here = _window(position_BC, first, S, cfg)
  states, caches = _stem(w, read(0), caches, here, s)
  z_BCD = _z(states, s)
  carry_BCD, written = states[-1], []
  for k, kv in enumerate(caches.heads, 2):
    carry_BCD, _, kv = _head(w, k, z_BCD, carry_BCD, read(k - 1), kv, here, None, s)
    written.append(kv)
  if f.feeds_tokens and s.again:
    state = state._replace(
      tail_BRD=sharding.by_rows(_tail, state.tail_BRD, z_BCD, state.length_B, same=(first,))
    )
  return state, caches._replace(heads=tuple(written))


def _tail(tail_BRD, z_BCD, length_B, first):
  """z of the positions before a row's last token, as far as they are here."""
  R, C = tail_BRD.shape[1], z_BCD.shape[1]
  at_BR = length_B[:, None] - 1 - R + jnp.arange(R)[None] - first
  here_BRD = jnp.take_along_axis(z_BCD, jnp.clip(at_BR, 0, C - 1)[:, :, None], axis=1)
  inside_BR1 = ((at_BR >= 0) & (at_BR < C))[:, :, None]
  return jnp.where(inside_BR1, here_BRD, tail_BRD)


# One pass, and the loop.


@functools.partial(jax.jit, static_argnames=('s',), donate_argnames=('state', 'caches'))
def run(w: Weights, state: State, caches: Caches, max_forwards, max_accept, sampling, *, s: Setup):
  """Decodes until all rows are done, at most so many forward passes.

  Args:
    w: the Weights.
    state: donated, as are the caches.
    caches: of the prompts but for their last tokens.
    max_forwards: then it comes back, to go on in another call.
    max_accept: drafts of a pass that may be accepted. With 0 the same program
      decodes one token a pass.
    sampling: sample.Sampling, or None for greedy.
    s: what it is compiled for.

  Returns:
    (state, caches).
  """

  def more(carry):
    state, _, i = carry
    return (i < max_forwards) & ~jnp.all(state.done_B)

  def forward(carry):
    state, caches, i = carry
    return *_forward(w, state, caches, max_accept, sampling, s), i + 1

  state, caches, _ = jax.lax.while_loop(more, forward, (state, caches, jnp.int32(0)))
  return state, caches


def _forward(w, state: State, caches: Caches, max_accept, sampling, s: Setup):
  cfg = s.cfg
  S = caches.stem[0].k_BGSH.shape[2]
  tokens_BM, position_BM, slot_BM, seen_BMS = sharding.by_rows(
    functools.partial(_read_window, S=S, tree=s.tree), state
  )
  here = Window(block.context(position_BM, cfg), slot_BM, seen_BMS)
  with jax.named_scope('stem'):
    states, caches = _stem(w, tokens_BM, caches, here, s)
    h_BMD = heads.norm(states[-1], w.norm, cfg)
    logits_BMV = _logits(w, h_BMD, 1, cfg)
  with jax.named_scope('verify'):
    root_B = state.length_B - 1
    state, n_accepted_B, path_BW = sharding.by_rows(
      functools.partial(_verify, s=s), state, tokens_BM, logits_BMV, same=(max_accept, sampling)
    )
  if s.window == 1:
    return state, caches
  if not s.tree.is_chain:
    states, caches = _keep_path(states, caches, root_B, path_BW)
  with jax.named_scope('draft'):
    return _draft(w, states, state, caches, root_B, n_accepted_B, sampling, s)


def _read_window(state: State, S: int, tree: Tree):
  """(tokens_BM, position_BM, slot_BM, seen_BMS) of each row's next window."""
  M = len(tree.depth_M)
  root_B1 = state.length_B[:, None] - 1
  known_B1 = jnp.take_along_axis(state.tokens_BS, root_B1, axis=1)
  of_draft = np.array(tree.depth_M[1:], int) - 1, np.array(tree.rank_M[1:], int)
  drafts_BX = state.candidates_BJX[:, *of_draft] if M > 1 else known_B1[:, :0]
  position_BM = root_B1 + jnp.array(tree.depth_M)[None]
  slot_BM = root_B1 + jnp.arange(M)[None]
  slot_11S = jnp.arange(S)[None, None]
  if tree.is_chain:
    seen_BMS = slot_11S <= position_BM[:, :, None]
  else:
    mask_MM = np.eye(M, dtype=bool)  # a token sees those above it, and itself
    for slots, parents in tree.levels:
      mask_MM[np.array(slots)] |= mask_MM[np.array(parents)]
    at_BS = jnp.arange(S)[None] - root_B1
    above_BSM = jnp.array(mask_MM.T)[jnp.clip(at_BS, 0, M - 1)]
    inside_BS1 = ((at_BS >= 0) & (at_BS < M))[:, :, None]
    seen_BSM = (at_BS < 0)[:, :, None] | (inside_BS1 & above_BSM)
    seen_BMS = seen_BSM.swapaxes(1, 2)
  tokens_BM = jnp.concatenate([known_B1, drafts_BX], axis=1)
  return tokens_BM, position_BM, slot_BM, seen_BMS


def _verify(state: State, tokens_BM, logits_BMV, max_accept, sampling, s):
  """(state with what is new, drafts accepted_B, path_BW)."""
  W, J = s.window, s.window - 1
  tokens_BS, length_B, live_B = state.tokens_BS, state.length_B, ~state.done_B
  allowed_B = jnp.where(state.drafted_B & live_B, jnp.minimum(max_accept, J), 0)
  index_1W = jnp.arange(W)[None]
  if sampling is None:
    n_B, path_BW, emitted_BW = sample.accept_greedy(tokens_BM, logits_BMV, allowed_B, s.tree.levels)
  else:
    n_B, emitted_BW = sample.accept_sampled(
      tokens_BM,
      logits_BMV,
      state.q_BJV,
      allowed_B,
      state.seed_B,
      length_B[:, None] + index_1W,
      sampling,
    )
    path_BW = jnp.broadcast_to(index_1W, emitted_BW.shape)
  new_B = jnp.minimum(n_B + 1, state.limit_B - length_B)
  stops_BW = jnp.zeros(emitted_BW.shape, bool)
  for stop_id in s.stop_ids:
    stops_BW |= emitted_BW == stop_id
  stops_BW &= index_1W < new_B[:, None]
  stopped_B = jnp.any(stops_BW, axis=1)
  new_B = jnp.where(stopped_B, 1 + jnp.argmax(stops_BW, axis=1), new_B)
  new_B = jnp.where(live_B, new_B, 0)
  at_BW = jnp.where(index_1W < new_B[:, None], length_B[:, None] + index_1W, tokens_BS.shape[1])
  b_B1 = jnp.arange(tokens_BS.shape[0])[:, None]
  draft_1J = 1 + jnp.arange(J)[None]
  asked_BJ = (draft_1J <= allowed_B[:, None]) & (draft_1J <= jnp.minimum(n_B + 1, new_B)[:, None])
  return (
    state._replace(
      tokens_BS=tokens_BS.at[b_B1, at_BW].set(emitted_BW, mode='drop'),
      length_B=length_B + new_B,
      done_B=~live_B | stopped_B | (length_B + new_B >= state.limit_B),
      drafted_B=jnp.ones_like(live_B),
      forwards_B=state.forwards_B + live_B,
      asked_BJ=state.asked_BJ + asked_BJ,
      accepted_BJ=state.accepted_BJ + (asked_BJ & (draft_1J <= n_B[:, None])),
    ),
    n_B,
    path_BW,
  )


def _keep_path(states, caches: Caches, root_B, path_BW):
  """The accepted path of a tree, as if it had been a chain all along."""

  def slots(root_B, path_BW):
    W = path_BW.shape[1]
    return root_B[:, None] + path_BW, root_B[:, None] + jnp.arange(W)[None]

  def along(x_BMD, path_BW):
    return jnp.take_along_axis(x_BMD, path_BW[:, :, None], axis=1)

  from_BW, to_BW = sharding.by_rows(slots, root_B, path_BW)
  stem = tuple(cache_lib.move(kv, from_BW, to_BW) for kv in caches.stem)
  states = [sharding.by_rows(along, x, path_BW) for x in states]
  return states, caches._replace(stem=stem)


def _draft(w, states, state: State, caches, root_B, n_accepted_B, sampling, s: Setup):
  """Heads 2..W read the window and draft after its last token that stands."""
  cfg, f, W, R = s.cfg, heads.family(s.cfg), s.window, s.again
  S = caches.stem[0].k_BGSH.shape[2]

  def positions(root_B, n_B):
    position_BT = root_B[:, None] - R + jnp.arange(R + W)[None]
    return position_BT, (root_B + n_B)[:, None], n_B + R

  position_BT, last_B1, at_B = sharding.by_rows(positions, root_B, n_accepted_B)
  here = _window(position_BT, position_BT, S, cfg)
  asked = Asked(at_B, _window(last_B1, last_B1, S, cfg))
  z_BTD, carry_BTD = _z(states, s), states[-1]
  if R:
    z_BTD = carry_BTD = sharding.by_rows(
      lambda *x: jnp.concatenate(x, axis=1), state.tail_BRD, z_BTD
    )
    state = state._replace(
      tail_BRD=sharding.by_rows(
        lambda x_BTD, n_B: jnp.take_along_axis(
          x_BTD, (1 + n_B[:, None] + jnp.arange(R)[None])[:, :, None], axis=1
        ),
        z_BTD,
        n_accepted_B,
      )
    )

  def propose(state, logits_BKV, first):
    return sharding.by_rows(
      functools.partial(_propose, first=first, s=s), state, logits_BKV, last_B1, same=(sampling,)
    )

  hidden, written = [], []
  for k in range(2, W + 1):
    if f.reverse:
      raw_B1D = _take(states[len(states) - k], at_B)
      h_B1D = heads.norm(raw_B1D, w.norm, cfg)
    else:
      next_BT = None
      if f.feeds_tokens:
        next_BT = sharding.by_rows(functools.partial(_ahead, k=k), state.tokens_BS, position_BT)
      kv = caches.heads[k - 2] if f.has_block else None
      carry_BTD, h_B1D, kv = _head(w, k, z_BTD, carry_BTD, next_BT, kv, here, asked, s)
      written.append(kv)
    if f.feeds_tokens:
      state = propose(state, _logits(w, h_B1D, k, cfg), k)
    hidden.append(h_B1D)
  if not f.feeds_tokens:
    state = propose(state, _all_logits(w, hidden, cfg), 2)
  if caches.heads:
    caches = caches._replace(heads=tuple(written))
  return state, caches


def _ahead(tokens_BS, position_BT, k: int):
  """What head k is fed: the token of head k - 1 at each position."""
  at_BT = jnp.maximum(position_BT + k - 1, 0)
  return jnp.take_along_axis(tokens_BS, at_BT, axis=1)


def _propose(state: State, logits_BKV, last_B1, sampling, first: int, s: Setup):
  """Drafts of heads first, first + 1 …; the best of each is put behind the
  known tokens, where a head that feeds tokens finds it."""
  K = logits_BKV.shape[1]
  at_BK = last_B1 + first + jnp.arange(K)[None]
  of_heads = slice(first - 2, first - 2 + K)
  q_BJV, candidates_BJX = state.q_BJV, state.candidates_BJX
  X = candidates_BJX.shape[2]
  if sampling is not None:
    q_BKV = sample.probabilities(logits_BKV, sampling)
    new_BKX = sample.draw(q_BKV, state.seed_B, at_BK, sample.DRAFT)[:, :, None]
    q_BJV = q_BJV.at[:, of_heads].set(q_BKV)
  elif X == 1:
    new_BKX = jnp.argmax(logits_BKV, axis=-1, keepdims=True).astype(jnp.int32)
  else:
    _, new_BKX = jax.lax.top_k(logits_BKV, X)
  b_B1 = jnp.arange(logits_BKV.shape[0])[:, None]
  return state._replace(
    tokens_BS=state.tokens_BS.at[b_B1, at_BK].set(new_BKX[:, :, 0], mode='drop'),
    candidates_BJX=candidates_BJX.at[:, of_heads].set(new_BKX),
    q_BJV=q_BJV,
  )
