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
from mtp_jax.decode import adaptive, auto, sample, setup, window
from mtp_jax.decode import batch as batch_lib
from mtp_jax.decode import state as state_lib
from mtp_jax.decode import weights as weights_lib
from mtp_jax.io import paths
from mtp_jax.parallel import sharding

SLOTS = 64  # cache lengths are multiples, so that several lengths share a program
NO_LIMIT = adaptive.NO_LIMIT


class Decoded(NamedTuple):
  """New tokens of some prompts, in their order, with counts and times."""

  tokens: list[np.ndarray]  # new tokens per row, a stop token included
  forwards: np.ndarray  # forward passes per row
  proposed_J: np.ndarray  # drafts verified at each position, over all rows
  accepted_J: np.ndarray
  prefill_s: float
  decode_s: float
  compile_s: float
  auto: adaptive.Report | None = None  # what was chosen; None = a fixed number of drafts

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
    auto=adaptive.merged([part.auto for part in parts]),
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
    cfg, active = _with_reuse(cfg, active)
    self.cfg, self.mesh, self.active = cfg, mesh, active
    self._widest = self._with_confidence(setup.setup(cfg, active, widths(cfg, active)))
    with jax.set_mesh(mesh):
      self._weights = _weights(model, s=self._widest)
    # By the shape of a batch:
    self._compiled: dict[Any, set] = {}  # Setups whose programs have run
    self._times: dict[Any, adaptive.Times] = {}
    self._accepted: dict[Any, adaptive.Accepted] = {}  # by shape and sampling
    self._seen: dict[Any, int] = {}  # new tokens per row so far

  def with_sampling(self, **decode) -> 'Decoder':
    """Returns a Decoder of the same weights and programs under other --decode.*
    fields that affect sampling: max_new_tokens, temperature, top_p …"""
    other = copy.copy(self)
    changes = {f'decode.{name}': value for name, value in decode.items()}
    other.cfg = schema.replace(self.cfg, **changes)
    other._widest = other._with_confidence(self._widest)
    return other

  def _with_confidence(self, s: setup.Setup) -> setup.Setup:
    return s._replace(min_confidence=self.cfg.decode.min_confidence * (s.window > 1))

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
    widths: tuple[int, ...] | str | None = None,
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
      widths: candidates of heads 2, 3 …; 'auto' = a measured number of drafts; None =
        those of --decode.num_draft_tokens and tree, of all heads where that is auto, so
        that counters do not depend on a clock.
      rows: batch size to pad to with finished rows, so that a last batch uses the
        same program.
      cache: maximum tokens per row; 0 = longest prompt + max_new_tokens.
      seeds: one per row; None = counting from --decode.seed.
      stop_ids: tokens that end a row.
      max_accept: maximum number of accepted drafts per forward pass; 0 = one token
        per forward pass.
      each: called with the new tokens of all rows every --decode.stream_every forward
        passes, or more often; may return, per row, whether it ends.

    Raises:
      ConfigError: a prompt does not fit the cache, or is empty.
    """
    d = self.cfg.decode
    s, is_auto = self._widest, isinstance(widths, str)  # 'auto'
    if isinstance(widths, str):
      s = batch_lib.with_drafts(s, len(self.widths))
    elif widths is not None:
      s = s._replace(tree=setup.tree(widths))
    s = s._replace(stop_ids=tuple(sorted(stop_ids)))
    longest = max(map(len, prompts))
    cache = cache or cache_length(prompts, self.cfg)
    check(prompts, cache, self.cfg)
    seeds = range(d.seed, d.seed + len(prompts)) if seeds is None else seeds
    C = min(d.prefill_chunk_size, 1 << max(longest - 2, 0).bit_length())
    chunks = range(0, longest - 1, C)
    # A chain needs no slots beyond its row's end, except in a ring.
    spare = s.slots - 1 if not is_auto or batch_lib.has_window(s) else 0
    slots = max(cache + spare, len(chunks) * C)
    slots = -(-slots // SLOTS) * SLOTS
    B = max(rows, len(prompts))
    B = -(-B // self._batch_shards) * self._batch_shards
    self._check_memory(B, slots, cache, s)
    sampling, most = sample.sampling(self.cfg), s.window - 1
    report = adaptive.Report(most, {}, {}, {}) if is_auto else None
    if is_auto and not self._is_measured((B, slots, s), d.max_new_tokens):
      s, is_auto = batch_lib.with_drafts(s, 0), False
    shape = (B, slots, C, bool(chunks), sampling is None, is_auto, s)
    if shape in self._times and not self._times[shape].can_pay(most):
      s = batch_lib.with_drafts(s, 0)  # no cache of heads
    with jax.set_mesh(self.mesh):
      state, caches = self._start(
        prompts,
        seeds,
        cache,
        B=B,
        slots=slots,
        # Rejection sampling needs the distributions of drafts; its text depends on their
        # number.
        sampling=None if is_auto else sampling,
        s=s,
      )
      batch = batch_lib.Batch(
        self._weights, state, caches, sampling=sampling, max_accept=max_accept, s=s
      )
      begin = time.perf_counter()
      if is_auto and shape not in self._times:
        self._times[shape] = auto.measure(batch, most)
        if not self._times[shape].can_pay(most):
          batch.change(0)
      compile_s, run = 0.0, batch
      compiled = self._compiled.setdefault(shape, set())
      if batch.s not in compiled:
        # Warm-up calls, which the calls below repeat with the same effect.
        batch.prefill(chunks[:1], C)
        batch.forward(0)
        compiled.add(batch.s)
        compile_s = time.perf_counter() - begin
      begin = time.perf_counter()
      batch.prefill(chunks, C)
      prefill_s, decode_s = time.perf_counter() - begin, 0.0
      if is_auto:
        kind = shape, sampling, max_accept
        accepted = self._accepted.setdefault(kind, adaptive.Accepted(most))
        policy = adaptive.Policy(self._times[shape], most, B, accepted)
        read_s = prefill_s / max(len(chunks) * C, 1)
        run = auto.Auto(batch, policy, read_s=read_s, compiled=compiled)
      done = False
      while not done:
        counts, seconds = run.forward(d.stream_every if each else NO_LIMIT)
        decode_s += seconds
        done = bool(np.all(counts.done_B))
        if each:
          ended = each(_new_tokens(batch.state, prompts))
          if ended is not None:
            ended_B = np.pad(ended, (0, B - len(prompts)), constant_values=True)
            batch.end(self._rows(ended_B))
            done = bool(np.all(batch.counts().done_B))
    if isinstance(run, auto.Auto):
      report, compile_s = run.policy.report(), compile_s + run.compile_s
    proposed_J, accepted_J = counts.proposed_BJ.sum(0), counts.accepted_BJ.sum(0)
    unused = most - len(proposed_J)
    return Decoded(
      _new_tokens(batch.state, prompts),
      counts.forwards_B[: len(prompts)],
      np.pad(proposed_J, (0, unused)),
      np.pad(accepted_J, (0, unused)),
      prefill_s,
      decode_s,
      compile_s,
      report,
    )

  def _is_measured(self, shape, new_tokens: int) -> bool:
    """Returns whether batches of a shape are long enough, or have been by now, to measure
    what drafts cost."""
    self._seen[shape] = self._seen.get(shape, 0) + new_tokens
    return len(self.widths) > 0 and self._seen[shape] >= adaptive.MIN_NEW_TOKENS

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
      rejection=sampling is not None,
      slots=slots,
      dtype=self._cache_dtype,
      s=s,
    )


def _begin(tokens_BS, length_B, limit_B, seed_B, *, rejection, slots, dtype, s):
  return (
    state_lib.start(tokens_BS, length_B, limit_B, seed_B, rejection=rejection, s=s),
    state_lib.empty(tokens_BS.shape[0], slots, dtype, s),
  )


_weights = jax.jit(weights_lib.weights, static_argnames='s')
_start = jax.jit(_begin, static_argnames=('rejection', 'slots', 'dtype', 's'))


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


def requested(cfg: schema.CommandConfig, active: int) -> tuple[int, ...] | str:
  """Returns what to decode with: as `widths`, or 'auto' if the number of drafts is
  measured."""
  of = widths(cfg, active)
  is_auto = cfg.decode.num_draft_tokens == adaptive.AUTO and not cfg.decode.tree
  return adaptive.AUTO if is_auto else of


def _with_reuse(cfg: schema.CommandConfig, active: int) -> tuple[schema.CommandConfig, int]:
  """Returns (cfg, active) with as many heads as --decode.num_draft_tokens or tree request
  of a shared module, which drafts deeper than it was trained by being applied again."""
  wanted = 1 + len(widths(cfg, active))
  if wanted <= active:
    return cfg, active
  return schema.replace(cfg, **{'heads.n': wanted}), wanted


def widths(cfg: schema.CommandConfig, active: int) -> tuple[int, ...]:
  """Returns the candidates of heads 2..W that --decode.num_draft_tokens and
  --decode.tree request at most: those of all heads for auto.

  Raises:
    ConfigError: more heads than trained.
  """
  d = cfg.decode
  if d.num_draft_tokens in ('all', adaptive.AUTO) and not d.tree:
    # Strided heads leave gaps between their drafts.
    return (1,) * (active - 1) if cfg.heads.stride == 1 else ()
  proposed = parse.parse_numbers(d.tree) or (1,) * int(d.num_draft_tokens)
  reuses = active > 1 and cfg.heads.most_drafts > cfg.heads.n - 1
  if len(proposed) + 1 > active and not reuses:
    raise fields.ConfigError(
      'decode.tree' if d.tree else 'decode.num_draft_tokens',
      d.tree or d.num_draft_tokens,
      f'needs {len(proposed) + 1} heads; {active} trained',
    )
  return proposed
