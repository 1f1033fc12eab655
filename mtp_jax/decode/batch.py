"""A batch in decoding: its state and caches on the devices, and the program in use.

With --decode.num_draft_tokens=auto programs of several numbers of drafts take turns on
one state. Keys and values of the layers that verify are the same in all of them. Those
of heads that did not draft for a while are read again before they do.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import layer_types
from mtp_jax.decode import setup as setup_lib
from mtp_jax.decode import speculative
from mtp_jax.decode import state as state_lib
from mtp_jax.decode import weights as weights_lib
from mtp_jax.parallel import sharding

CATCH_UP = 64  # tokens per prefill step of heads; divides the slots of a cache


class Counts(NamedTuple):
  """Counters of the rows, on the host."""

  done_B: Any
  length_B: Any
  forwards_B: Any
  proposed_BJ: Any
  accepted_BJ: Any


class Batch:
  """Rows being decoded; call its methods under the Decoder's mesh."""

  def __init__(self, weights, state, caches, *, sampling, max_accept: int, s: setup_lib.Setup):
    """Takes over state and caches, which its programs donate.

    Args:
      weights: of all heads in use.
      state: of state_lib.start for s.
      caches: of state_lib.empty for s.
      sampling: sample.Sampling, or None for greedy.
      max_accept: maximum number of accepted drafts per forward pass.
      s: the Setup with the most drafts.
    """
    self.widest = self.s = s
    self.state, self._weights = state, weights
    self._caches: Any = caches
    self._sampling, self._max_accept = sampling, max_accept
    self._counts: Counts | None = None  # of the state, once they are on the host
    self._read = 0  # positions that all heads have read, of every live row

  def prefill(self, chunks, C: int) -> None:
    """Reads the prompts without their last tokens, in chunks of C from these positions."""
    for first in chunks:
      self._run(speculative.prefill, first, C=C)
    jax.block_until_ready((self.state, self._caches))

  def forward(self, max_forwards: int) -> tuple[Counts, float]:
    """Decodes until all rows are done, in at most so many forward passes; returns the
    counters, of proposed and accepted drafts since the last change, and the seconds."""
    begin = time.perf_counter()
    self._run(
      speculative.run,
      max_forwards=max_forwards,
      max_accept=self._max_accept,
      sampling=self._sampling,
    )
    return self.counts(), time.perf_counter() - begin

  def counts(self) -> Counts:
    """Returns the counters, read from the devices once per state."""
    if self._counts is None:
      of = tuple(getattr(self.state, name) for name in Counts._fields)
      self._counts = Counts(*jax.device_get(of))
    return self._counts

  def _run(self, program, *args, **kwargs) -> None:
    """Runs a program on state and caches, which it returns."""
    n = len(state_lib.cached_layers(self.s)[1])
    used = self._caches._replace(heads=self._caches.heads[:n])
    unused = self._caches.heads[n:]
    weights, self._counts = weights_lib.in_use(self._weights, self.s), None
    self.state, used = program(weights, self.state, used, *args, s=self.s, **kwargs)
    self._caches = used._replace(heads=used.heads + unused)

  # Another number of drafts.

  def change(self, num_drafts: int) -> None:
    """Changes the number of draft tokens; heads that start to draft read what they lack."""
    if num_drafts == len(self.s.tree.widths):
      return
    s, old = with_drafts(self.s, num_drafts), self.s
    if old == self.widest:
      self._read = self.lacking()[0]
    self.state, self._counts = resized(self.state, old=old, s=s), None
    self.s = s
    # Keys and values that heads share are head 2's.
    has_all = s.cfg.heads.share_keys_values and old.window > 1
    if s.window > old.window and not has_all:
      self._catch_up()

  def lacking(self) -> tuple[int, int]:
    """Returns the positions from which on, and up to which, heads lack keys and values,
    over live rows."""
    now = self.counts()
    known_B = now.length_B[~now.done_B] - 1
    if not len(known_B):
      return 0, 0
    first = int(known_B.min()) if self.s == self.widest else self._read
    return first, int(known_B.max())

  @property
  def must_read(self) -> bool:
    """Whether heads have keys and values of their own."""
    return bool(self._caches.heads)

  @property
  def can_read(self) -> bool:
    """Whether heads can read again; not once a ring of the trunk has moved on."""
    return not self.must_read or not has_window(self.widest)

  def _catch_up(self) -> None:
    if not self.must_read or not self.can_read:
      return
    first, end = self.lacking()
    slots = state_lib.cache_length(self.state, self.s)
    for chunk in catch_up_chunks(max(first - self.s.num_reread, 0), end, slots):
      self._run(speculative.prefill, chunk, C=CATCH_UP)

  def scratch(self, num_drafts: int) -> 'Batch':
    """Returns a batch to time programs with: a copy of the state, which accepts no draft,
    and no caches. Use `lend` around its calls."""
    found = Batch(
      self._weights, _copied(self.state), None, sampling=self._sampling, max_accept=0, s=self.s
    )
    if num_drafts != len(self.s.tree.widths):
      s = with_drafts(self.s, num_drafts)
      found.state, found.s = resized(found.state, old=found.s, s=s), s
    return found

  def lend(self, other: 'Batch', max_forwards: int) -> tuple[Counts, float]:
    """Returns other.forward(max_forwards) with the caches of this batch, before its
    prefill: what is written there is written again before it is read."""
    other._caches, self._caches = self._caches, None
    found = other.forward(max_forwards)
    self._caches, other._caches = other._caches, None
    return found

  def end(self, ended_B) -> None:
    """Ends rows; ended_B is on the devices."""
    self.state, self._counts = _end(self.state, ended_B), None


def catch_up_chunks(first: int, end: int, slots: int) -> list[int]:
  """Returns the first positions of steps of CATCH_UP tokens that cover [first, end) and
  stay inside the slots, a multiple of it."""
  return list(range(first // CATCH_UP * CATCH_UP, min(end, slots), CATCH_UP))


def has_window(s: setup_lib.Setup) -> bool:
  """Returns whether a layer has a sliding window, whose cache is a ring."""
  return any(t.window for t in layer_types.distinct(s.cfg))


def with_drafts(s: setup_lib.Setup, num_drafts: int) -> setup_lib.Setup:
  """Returns the Setup of a chain of so many drafts."""
  return s._replace(tree=setup_lib.tree((1,) * num_drafts))


@jax.jit
def _end(state, ended_B):
  return state._replace(done_B=state.done_B | ended_B)


@jax.jit
def _copied(state):
  return jax.tree.map(jnp.copy, state)


@functools.partial(jax.jit, static_argnames=('old', 's'))
def resized(state: state_lib.State, *, old: setup_lib.Setup, s: setup_lib.Setup):
  """Returns the state for another number of drafts, of chains without distributions.

  Fewer keep the first drafts; more begin with a forward pass without drafts. Counters
  of drafts restart.
  """
  S, J, R = state_lib.cache_length(state, old), s.window - 1, s.num_reread

  def to(x_BX, n: int):
    return jnp.pad(x_BX[:, :n], ((0, 0), (0, max(n - x_BX.shape[1], 0))))

  def rows(state):
    B, D = state.tokens_BS.shape[0], s.cfg.model.d_model
    tail_BRD = None
    if R:
      tail_BRD = jnp.zeros((B, R, D), s.cfg.model.compute_dtype)
      if old.num_reread >= R:
        tail_BRD = state.tail_BRD[:, old.num_reread - R :]
    none_BJ = jnp.zeros((B, J), jnp.int32)
    return state._replace(
      tokens_BS=to(state.tokens_BS, S + s.window),
      n_drafts_B=jnp.minimum(state.n_drafts_B, J) * (s.window <= old.window),
      candidates_BJX=jnp.zeros((B, J, 1), jnp.int32)
      .at[:, : old.window - 1]
      .set(state.candidates_BJX[:, :J]),
      tail_BRD=tail_BRD,
      proposed_BJ=none_BJ,
      accepted_BJ=none_BJ,
    )

  return sharding.by_rows(rows, state)
