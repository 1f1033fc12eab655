"""The Decoder: prompts to new tokens, the host side of the decoding loop."""

import copy
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import commands, fields, parse, schema
from mtp_jax.decode import sample, setup, speculative, window
from mtp_jax.decode import state as state_lib
from mtp_jax.decode import weights as weights_lib
from mtp_jax.io import paths
from mtp_jax.parallel import sharding

SLOTS = 64  # cache lengths are multiples, so that several lengths share a program
NO_LIMIT = 2**31 - 1


class Decoded(NamedTuple):
  """New tokens of some prompts, in their order, with counts and times."""

  tokens: list[np.ndarray]  # new tokens per row, a stop token included
  forwards: np.ndarray  # forward passes per row
  proposed_J: np.ndarray  # drafts verified at each position, over all rows
  accepted_J: np.ndarray
  prefill_s: float
  decode_s: float
  compile_s: float

  @property
  def n_tokens(self) -> int:
    return sum(map(len, self.tokens))

  @property
  def tokens_per_forward(self) -> float:
    return self.n_tokens / max(int(self.forwards.sum()), 1)

  @property
  def acceptance_J(self) -> list[float | None]:
    """Acceptance rate of each draft, given that those before it were accepted;
    None where none was proposed."""
    pairs = zip(self.accepted_J, self.proposed_J, strict=True)
    return [float(accepted / n) if n else None for accepted, n in pairs]


def joined(parts: Sequence[Decoded]) -> Decoded:
  """Concatenates the results of consecutive batches."""
  names = ('proposed_J', 'accepted_J', 'prefill_s', 'decode_s', 'compile_s')
  sums: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in names}
  return Decoded(
    [tokens for part in parts for tokens in part.tokens],
    np.concatenate([part.forwards for part in parts]),
    **sums,
  )


class Decoder:
  """A model ready to decode: its weights cast and placed for reading."""

  def __init__(self, model, cfg: schema.CommandConfig, mesh, active: int):
    """Casts and places the parameters.

    Args:
      model: lm.LM parameters.
      cfg: its decode section holds the options.
      mesh: devices.
      active: number of trained heads.

    Raises:
      ConfigError: cfg.decode needs more heads than trained.
    """
    self.cfg, self.mesh, self.active = cfg, mesh, active
    self._widest = setup.setup(cfg, active, widths(cfg, active))
    with jax.set_mesh(mesh):
      self._weights = _weights(model, s=self._widest)
    self._compiled = set()  # shapes that have run

  def with_sampling(self, **decode) -> 'Decoder':
    """Returns a Decoder of the same weights and programs under other --decode.*
    fields that affect sampling: max_new_tokens, temperature, top_p …"""
    other = copy.copy(self)
    changes = {f'decode.{name}': value for name, value in decode.items()}
    other.cfg = schema.replace(self.cfg, **changes)
    return other

  @property
  def widths(self) -> tuple[int, ...]:
    return self._widest.tree.widths

  def read_bytes(self, widths: tuple[int, ...]) -> int:
    """Returns the bytes of weights that a forward pass reads with so many heads."""
    s = self._widest._replace(tree=setup.tree(widths))
    return weights_lib.read_bytes(weights_lib.in_use(self._weights, s), s)

  def __call__(
    self,
    prompts: Sequence[np.ndarray],
    *,
    widths: tuple[int, ...] | None = None,
    rows: int = 0,
    cache: int = 0,
    seeds: Sequence[int] | None = None,
    stop_ids: tuple[int, ...] = (),
    max_accept: int = NO_LIMIT,
    each: Callable[[list[np.ndarray]], np.ndarray | None] | None = None,
  ) -> Decoded:
    """Decodes all prompts at once.

    Args:
      prompts: token ids, at least one per prompt.
      widths: candidates of heads 2, 3 …; None = those of --decode.num_draft_tokens and
        tree.
      rows: batch size to pad to with finished rows, so that a last batch uses the
        same program.
      cache: maximum tokens per row; 0 = longest prompt + max_new_tokens.
      seeds: one per row; None = counting from --decode.seed.
      stop_ids: tokens that end a row.
      max_accept: maximum number of accepted drafts per forward pass; 0 = one token
        per forward pass.
      each: called with the new tokens of all rows every --decode.stream_every forward
        passes; may return, per row, whether it ends.

    Raises:
      ConfigError: a prompt does not fit the cache, or is empty.
    """
    d, s = self.cfg.decode, self._widest
    if widths is not None:
      s = s._replace(tree=setup.tree(widths))
    s = s._replace(stop_ids=tuple(sorted(stop_ids)))
    longest = max(map(len, prompts))
    cache = cache or cache_length(prompts, self.cfg)
    check(prompts, cache, self.cfg)
    seeds = range(d.seed, d.seed + len(prompts)) if seeds is None else seeds
    C = min(d.prefill_chunk_size, 1 << max(longest - 2, 0).bit_length())
    chunks = range(0, longest - 1, C)
    slots = max(cache + s.slots - 1, len(chunks) * C)
    slots = -(-slots // SLOTS) * SLOTS
    B = max(rows, len(prompts))
    B = -(-B // self._batch_shards) * self._batch_shards
    self._check_memory(B, slots, cache, s)
    sampling = sample.sampling(self.cfg)
    weights = weights_lib.in_use(self._weights, s)
    with jax.set_mesh(self.mesh):
      state, caches = self._start(prompts, seeds, cache, B=B, slots=slots, sampling=sampling, s=s)
      prefill_s, decode_s, compile_s = 0.0, 0.0, 0.0
      begin = time.perf_counter()
      shape = (B, slots, C, bool(chunks), sampling is None, s)
      if shape not in self._compiled:
        # Warm-up calls, which the calls below repeat with the same effect.
        if chunks:
          state, caches = speculative.prefill(weights, state, caches, 0, C=C, s=s)
        state, caches = speculative.run(
          weights, state, caches, max_forwards=0, max_accept=max_accept, sampling=sampling, s=s
        )
        jax.block_until_ready(state)
        self._compiled.add(shape)
        compile_s = time.perf_counter() - begin
      begin = time.perf_counter()
      for first in chunks:
        state, caches = speculative.prefill(weights, state, caches, first, C=C, s=s)
      jax.block_until_ready((state, caches))
      prefill_s = time.perf_counter() - begin
      done = False
      while not done:
        begin = time.perf_counter()
        state, caches = speculative.run(
          weights,
          state,
          caches,
          max_forwards=d.stream_every if each else NO_LIMIT,
          max_accept=max_accept,
          sampling=sampling,
          s=s,
        )
        done = bool(np.all(jax.device_get(state.done_B)))
        decode_s += time.perf_counter() - begin
        if each:
          ended = each(_new_tokens(state, prompts))
          if ended is not None:
            ended_B = np.pad(ended, (0, B - len(prompts)), constant_values=True)
            state = _end(state, self._rows(ended_B))
            done = bool(np.all(jax.device_get(state.done_B)))
      forwards_B, proposed_BJ, accepted_BJ = jax.device_get(
        (state.forwards_B, state.proposed_BJ, state.accepted_BJ)
      )
      return Decoded(
        _new_tokens(state, prompts),
        forwards_B[: len(prompts)],
        proposed_BJ.sum(0),
        accepted_BJ.sum(0),
        prefill_s,
        decode_s,
        compile_s,
      )

  def next_logits(self, ids: np.ndarray) -> np.ndarray:
    """Returns head 1's logits after some tokens, by one forward pass over all."""
    s = self._widest._replace(tree=setup.tree(()))
    T = -(-len(ids) // SLOTS) * SLOTS
    tokens_BT = np.zeros((self._batch_shards, T), np.int32)
    tokens_BT[:, : len(ids)] = ids
    length_B = np.full(self._batch_shards, len(ids), np.int32)
    with jax.set_mesh(self.mesh):
      logits_BV = _next_logits(
        weights_lib.in_use(self._weights, s), *self._rows((tokens_BT, length_B)), s=s
      )
    return np.asarray(jax.device_get(logits_BV))[0]

  def _rows(self, arrays):
    """Places host arrays on the devices, sharded by rows."""
    rows = jax.NamedSharding(self.mesh, sharding.pspec('batch'))
    return jax.device_put(arrays, rows)

  @property
  def _batch_shards(self) -> int:
    return int(np.prod([self.mesh.shape[axis] for axis in sharding.BATCH]))

  def _check_memory(self, B: int, slots: int, cache: int, s) -> None:
    """Raises ConfigError if the key/value cache alone exceeds a device's memory."""
    m, device = self.cfg.model, self.mesh.devices.flat[0]
    positions = sum(map(sum, state_lib.slots(slots, s)))
    itemsize = np.dtype(jnp.dtype(self._cache_dtype)).itemsize
    n_bytes = 2 * positions * m.kv_heads * m.head_width * B * itemsize
    n_bytes /= self._batch_shards * self.mesh.shape['tensor']
    stats = device.memory_stats() or {}
    limit = stats.get('bytes_limit') or (os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    if n_bytes > limit:
      raise fields.ConfigError(
        'decode.cache_length',
        cache,
        f'keys and values of {B} rows are {n_bytes / 2**30:,.0f} GiB per device,'
        f' which has {limit / 2**30:,.0f}; reduce --decode.cache_length, max_new_tokens'
        ' or batch_size',
      )

  @property
  def _cache_dtype(self) -> str:
    dtype = self.cfg.decode.cache_dtype
    return self.cfg.model.compute_dtype if dtype == 'compute' else dtype

  def _start(self, prompts, seeds, cache, *, B, slots, sampling, s):
    tokens_BS = np.zeros((B, slots + s.window), np.int32)
    length_B, limit_B = np.ones(B, np.int32), np.ones(B, np.int32)
    seed_B = np.zeros(B, np.int32)
    for b, prompt in enumerate(prompts):
      tokens_BS[b, : len(prompt)] = prompt
      length_B[b] = len(prompt)
      limit_B[b] = min(len(prompt) + self.cfg.decode.max_new_tokens, cache)
      seed_B[b] = seeds[b] % 2**31
    return _start(
      *self._rows((tokens_BS, length_B, limit_B, seed_B)),
      sampled=sampling is not None,
      slots=slots,
      dtype=self._cache_dtype,
      s=s,
    )


def _begin(tokens_BS, length_B, limit_B, seed_B, *, sampled, slots, dtype, s):
  return (
    state_lib.start(tokens_BS, length_B, limit_B, seed_B, sampled=sampled, s=s),
    state_lib.empty(tokens_BS.shape[0], slots, dtype, s),
  )


_weights = jax.jit(weights_lib.weights, static_argnames='s')
_start = jax.jit(_begin, static_argnames=('sampled', 'slots', 'dtype', 's'))


@jax.jit
def _end(state, ended_B):
  return state._replace(done_B=state.done_B | ended_B)


_next_logits = jax.jit(window.next_logits, static_argnames='s')


def _new_tokens(state, prompts) -> list[np.ndarray]:
  tokens_BS, length_B = jax.device_get((state.tokens_BS, state.length_B))
  return [tokens_BS[b, len(prompt) : length_B[b]] for b, prompt in enumerate(prompts)]


def cache_length(prompts: Sequence[np.ndarray], cfg: schema.CommandConfig) -> int:
  """Returns the length of the key/value cache for these prompts, in tokens."""
  d = cfg.decode
  return d.cache_length or max(map(len, prompts)) + d.max_new_tokens


def check(
  prompts: Sequence[np.ndarray], cache: int, cfg: schema.CommandConfig, names: Sequence[str] = ()
) -> None:
  """Raises InputError, with its name, for the first prompt that cannot be decoded."""
  vocab_size = cfg.model.vocab_size
  names = names or [f'prompt {i}' for i in range(len(prompts))]
  for name, prompt in zip(names, prompts, strict=True):
    if not len(prompt):
      raise paths.InputError(name, 'has no token')
    if cache > commands.MOST_POSITIONS:
      raise paths.InputError(
        name,
        f'has {len(prompt):,} tokens; with --decode.max_new_tokens='
        f'{cfg.decode.max_new_tokens} more than {commands.MOST_POSITIONS:,}, the maximum'
        ' length of a row',
      )
    wrong = [int(t) for t in prompt if not 0 <= t < vocab_size]
    if wrong:
      raise paths.InputError(
        name, f'has {wrong[0]}; ids are 0 to --model.vocab_size - 1 = {vocab_size - 1}'
      )
    if len(prompt) >= cache:
      raise fields.ConfigError(
        'decode.cache_length', cache, f'{name} has {len(prompt)} tokens; no room for a new one'
      )


def widths(cfg: schema.CommandConfig, active: int) -> tuple[int, ...]:
  """Returns the candidates of heads 2..W that --decode.num_draft_tokens and
  --decode.tree request.

  Raises:
    ConfigError: more heads than trained.
  """
  d = cfg.decode
  if d.num_draft_tokens == 'all' and not d.tree:
    # Strided heads leave gaps between their drafts.
    return (1,) * (active - 1) if cfg.heads.stride == 1 else ()
  proposed = parse.parse_numbers(d.tree) or (1,) * int(d.num_draft_tokens)
  if len(proposed) + 1 > active:
    raise fields.ConfigError(
      'decode.tree' if d.tree else 'decode.num_draft_tokens',
      d.tree or d.num_draft_tokens,
      f'needs {len(proposed) + 1} heads; {active} trained',
    )
  return proposed
