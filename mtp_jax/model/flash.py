"""Attention for NVIDIA GPUs: a Pallas kernel over an interval of keys for each query.

FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691). A query sees the keys from the
start of its document, or of its window, to itself. Those starts rise along a row, so that one
array of T numbers holds documents and windows, and whole blocks of keys before them are
skipped as those after the query are. Key heads are shared by query heads without a copy.

Letters: R query heads per key head; blocks of Q queries and S keys.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mtp_jax.parallel import sharding

LOG2E = math.log2(math.e)  # scores are kept in base 2, for exp2
NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: differences of it are


class Options(NamedTuple):
  """scale and softcap of scores (0 = no cap); interpret: run without a GPU."""

  scale: float
  softcap: float
  interpret: bool


class Tile(NamedTuple):
  """Queries and keys of a block, and how Triton runs it."""

  q: int
  k: int
  warps: int
  stages: int


def _tiles(H: int, dtype) -> tuple[Tile, Tile, Tile]:
  """Returns the tiles of the forward pass, of dq, and of dk and dv. All of them fit an
  A100's shared memory."""
  row = pl.next_power_of_2(H) * jnp.dtype(dtype).itemsize  # bytes
  warps = 4 if row <= 128 else 8
  if row <= 128:
    # Products of an A100 have their operands in registers: of 64 keys some would be spilled.
    keys = 32 if 'A100' in sharding.device_kind() else 64
    return Tile(128, keys, warps, 3), Tile(128, 32, warps, 3), Tile(32, 64, warps, 3)
  if row <= 256:
    return Tile(128, 64, warps, 2), Tile(64, 32, warps, 2), Tile(32, 64, warps, 2)
  if row <= 512:
    return Tile(64, 32, warps, 2), Tile(32, 32, warps, 2), Tile(32, 32, warps, 2)
  return Tile(32, 32, warps, 1), Tile(16, 16, warps, 1), Tile(16, 16, warps, 1)


def begins(segment_BT, window):
  """Returns the first key (B, T) that each query sees; window: 0 = all of its document; may
  be traced."""
  at_1T = jnp.arange(segment_BT.shape[1], dtype=jnp.int32)[None]
  is_new_BT = segment_BT != jnp.roll(segment_BT, 1, axis=1)
  begin_BT = lax.cummax(jnp.where(is_new_BT, at_1T, 0), axis=1)
  return jnp.where(window > 0, jnp.maximum(begin_BT, at_1T - window + 1), begin_BT)


def _ends(begin_BT):
  """Returns the last query (B, T) that sees each key."""
  at_T = jnp.arange(begin_BT.shape[1], dtype=jnp.int32)
  n_BT = jax.vmap(lambda begin_T: jnp.searchsorted(begin_T, at_T, side='right'))(begin_BT)
  return n_BT.astype(jnp.int32) - 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BTNH, k_BTGH, v_BTGH, begin_BT, options: Options):
  """Computes softmax(scale q k^T) v over the keys begin_BT[b, t] .. t.

  Args:
    q_BTNH, k_BTGH, v_BTGH: query head n reads key head n // (N / G).
    begin_BT: `begins`; it must not fall along a row.
    options: the Options.

  Returns:
    (output (B, T, N, H), logarithms (B, N, T) of the softmax's denominators).
  """
  B, T, N, H = q_BTNH.shape
  tile, _, _ = _tiles(H, q_BTNH.dtype)
  queries, keys, begin, per_query = _by_queries(tile, k_BTGH, N // k_BTGH.shape[2])
  return _call(
    functools.partial(_forward, tile=tile, H=H, options=options),
    grid=(T // tile.q, B, N),
    in_specs=[queries, keys, keys, begin],
    out_specs=[queries, per_query],
    out=[q_BTNH, jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
  )(q_BTNH, k_BTGH, v_BTGH, begin_BT)


def _by_queries(tile: Tile, k_BTGH, R: int):
  """Returns the blocks of queries, keys, begins and logarithms that a program of a grid of
  (blocks of queries, B, N) reads."""
  _, T, _, H = k_BTGH.shape
  width = pl.next_power_of_2(H)
  return (
    pl.BlockSpec((None, tile.q, None, width), lambda i, b, n: (b, i, n, 0)),
    pl.BlockSpec((None, T, None, width), lambda i, b, n: (b, 0, n // R, 0)),
    pl.BlockSpec((None, tile.q), lambda i, b, n: (b, i)),
    pl.BlockSpec((None, None, tile.q), lambda i, b, n: (b, n, i)),
  )


def _call(kernel, out, **specs):
  """Returns the call of a kernel, a partial of a function here, with results like `out`."""
  tile: Tile = kernel.keywords['tile']
  return pl.pallas_call(
    kernel,
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out],
    compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    interpret=kernel.keywords['options'].interpret,
    name=f'flash{kernel.func.__name__}',
    **specs,
  )


def _blocks(seen, whole, body, carry):
  """Runs body(is_masked, block, carry) over the blocks of the interval `seen`, of which
  those of the interval `whole` need no mask."""
  (first, last), (full_first, full_last) = seen, whole
  full_first = jnp.clip(full_first, first, last)
  full_last = jnp.clip(full_last, full_first, last)
  for begin, end, is_masked in (
    (first, full_first, True),
    (full_first, full_last, False),
    (full_last, last, True),
  ):
    carry = lax.fori_loop(begin, end, functools.partial(body, is_masked), carry)
  return carry


def _blocks_of_keys(begin_ref, tile: Tile, body, carry):
  """`_blocks` of the keys that a block of queries sees."""
  at = pl.program_id(0) * tile.q
  earliest, latest = begin_ref[0], begin_ref[tile.q - 1]
  seen = lax.div(earliest, tile.k), lax.div(at + tile.q + tile.k - 1, tile.k)
  whole = lax.div(latest + tile.k - 1, tile.k), lax.div(at + 1, tile.k)
  return _blocks(seen, whole, body, carry)


def _rows(ref, at, n: int, H: int, head=None):
  """Loads n rows of a block, with zeros beyond the head's width."""
  rows = pl.ds(at, n)
  ref = ref.at[rows, :] if head is None else ref.at[rows, head, :]
  return triton.load(ref, mask=(jnp.arange(ref.shape[-1]) < H)[None, :], other=0.0)


def _scores(a, b, options: Options):
  """Returns capped scores of a's rows and b's, in base 2."""
  scores = triton.dot(a, b.T) * options.scale
  if options.softcap:
    scores = options.softcap * jnp.tanh(scores / options.softcap)
  return scores * LOG2E


def _through_cap(grads, scores, options: Options):
  """Returns gradients of scores as those of the products, but for options.scale."""
  if not options.softcap:
    return grads
  return grads * (1 - (scores / (options.softcap * LOG2E)) ** 2)


def _seen(begin_Q, at_q, at_k, tile: Tile):
  k_S = at_k + jnp.arange(tile.k)
  q_Q = at_q + jnp.arange(tile.q)
  return (begin_Q[:, None] <= k_S[None, :]) & (k_S[None, :] <= q_Q[:, None])


def _forward(*refs, tile, H, options):
  q_ref, k_ref, v_ref, begin_ref, out_ref, lse_ref = refs
  at = pl.program_id(0) * tile.q
  q_QH, begin_Q = _rows(q_ref, 0, tile.q, H), begin_ref[...]

  def body(is_masked, j, carry):
    out_QH, top_Q, sum_Q = carry
    scores_QS = _scores(q_QH, _rows(k_ref, j * tile.k, tile.k, H), options)
    if is_masked:
      scores_QS = jnp.where(_seen(begin_Q, at, j * tile.k, tile), scores_QS, NEVER)
    new_Q = jnp.maximum(top_Q, jnp.max(scores_QS, axis=-1))
    # What a query without a key so far has summed is multiplied by 0 when one comes.
    exp_QS, decay_Q = jnp.exp2(scores_QS - new_Q[:, None]), jnp.exp2(top_Q - new_Q)
    v_SH = _rows(v_ref, j * tile.k, tile.k, H)
    out_QH = out_QH * decay_Q[:, None] + triton.dot(exp_QS.astype(v_SH.dtype), v_SH)
    return out_QH, new_Q, sum_Q * decay_Q + jnp.sum(exp_QS, axis=-1)

  start = jnp.zeros(q_QH.shape, jnp.float32), jnp.full(tile.q, NEVER), jnp.zeros(tile.q)
  out_QH, top_Q, sum_Q = _blocks_of_keys(begin_ref, tile, body, start)
  _write(out_ref, out_QH / sum_Q[:, None], H)
  lse_ref[...] = (top_Q + jnp.log2(sum_Q)) / LOG2E


def _write(ref, rows, H: int):
  mask = (jnp.arange(ref.shape[-1]) < H)[None, :]
  triton.store(ref.at[:, :], rows.astype(ref.dtype), mask=mask)


def _attend_fwd(q_BTNH, k_BTGH, v_BTGH, begin_BT, options: Options):
  found: Any = attend(q_BTNH, k_BTGH, v_BTGH, begin_BT, options)
  out_BTNH, lse_BNT = found
  return found, (q_BTNH, k_BTGH, v_BTGH, begin_BT, out_BTNH, lse_BNT)


def _attend_bwd(options: Options, saved, grads):
  q_BTNH, k_BTGH, v_BTGH, begin_BT, out_BTNH, lse_BNT = saved
  dout_BTNH, dlse_BNT = grads
  B, T, N, H = q_BTNH.shape
  G, width = k_BTGH.shape[2], pl.next_power_of_2(H)
  R = N // G
  # d score = p (dout . v - dout . out + dlse)
  dot_BNT = jnp.einsum('BTNH,BTNH->BNT', out_BTNH, dout_BTNH, preferred_element_type=jnp.float32)
  shift_BNT = dot_BNT - dlse_BNT
  _, tile, tile_kv = _tiles(H, q_BTNH.dtype)

  queries, keys, begin, per_query = _by_queries(tile, k_BTGH, R)
  (dq_BTNH,) = _call(
    functools.partial(_dq, tile=tile, H=H, options=options),
    grid=(T // tile.q, B, N),
    in_specs=[queries, keys, keys, begin, queries, per_query, per_query],
    out_specs=[queries],
    out=[q_BTNH],
  )(q_BTNH, k_BTGH, v_BTGH, begin_BT, dout_BTNH, lse_BNT, shift_BNT)

  queries = pl.BlockSpec((None, T, R, width), lambda j, b, g: (b, 0, g, 0))
  keys = pl.BlockSpec((None, tile_kv.k, None, width), lambda j, b, g: (b, j, g, 0))
  per_query = pl.BlockSpec((None, R, T), lambda j, b, g: (b, g, 0))
  end = pl.BlockSpec((None, tile_kv.k), lambda j, b, g: (b, j))
  dk_BTGH, dv_BTGH = _call(
    functools.partial(_dkv, tile=tile_kv, H=H, R=R, options=options),
    grid=(T // tile_kv.k, B, G),
    in_specs=[queries, keys, keys, end, queries, per_query, per_query],
    out_specs=[keys, keys],
    out=[k_BTGH, v_BTGH],
  )(q_BTNH, k_BTGH, v_BTGH, _ends(begin_BT), dout_BTNH, lse_BNT, shift_BNT)
  return dq_BTNH, dk_BTGH, dv_BTGH, None


attend.defvjp(_attend_fwd, _attend_bwd)


def _dq(*refs, tile, H, options):
  q_ref, k_ref, v_ref, begin_ref, dout_ref, lse_ref, shift_ref, dq_ref = refs
  at = pl.program_id(0) * tile.q
  q_QH, dout_QH = (_rows(ref, 0, tile.q, H) for ref in (q_ref, dout_ref))
  begin_Q, lse_Q, shift_Q = begin_ref[...], lse_ref[...] * LOG2E, shift_ref[...]

  def body(is_masked, j, dq_QH):
    k_SH, v_SH = (_rows(ref, j * tile.k, tile.k, H) for ref in (k_ref, v_ref))
    scores_QS = _scores(q_QH, k_SH, options)
    p_QS = jnp.exp2(scores_QS - lse_Q[:, None])
    if is_masked:
      p_QS = jnp.where(_seen(begin_Q, at, j * tile.k, tile), p_QS, 0.0)
    d_QS = p_QS * (triton.dot(dout_QH, v_SH.T) - shift_Q[:, None])
    d_QS = _through_cap(d_QS, scores_QS, options)
    return dq_QH + triton.dot(d_QS.astype(k_SH.dtype), k_SH)

  dq_QH = _blocks_of_keys(begin_ref, tile, body, jnp.zeros(q_QH.shape, jnp.float32))
  _write(dq_ref, dq_QH * options.scale, H)


def _dkv(*refs, tile, H, R, options):
  q_ref, k_ref, v_ref, end_ref, dout_ref, lse_ref, shift_ref, dk_ref, dv_ref = refs
  at = pl.program_id(0) * tile.k
  k_SH, v_SH = (_rows(ref, 0, tile.k, H) for ref in (k_ref, v_ref))
  end_S, at_S = end_ref[...], at + jnp.arange(tile.k)
  earliest, latest = end_ref[0], end_ref[tile.k - 1]

  def of_head(r, carry):
    def body(is_masked, i, carry):
      dk_SH, dv_SH = carry
      rows = pl.ds(i * tile.q, tile.q)
      q_QH, dout_QH = (_rows(ref, i * tile.q, tile.q, H, r) for ref in (q_ref, dout_ref))
      scores_SQ = _scores(k_SH, q_QH, options)
      p_SQ = jnp.exp2(scores_SQ - lse_ref[r, rows][None, :] * LOG2E)
      if is_masked:
        at_Q = i * tile.q + jnp.arange(tile.q)
        seen_SQ = (at_S[:, None] <= at_Q[None, :]) & (at_Q[None, :] <= end_S[:, None])
        p_SQ = jnp.where(seen_SQ, p_SQ, 0.0)
      dv_SH += triton.dot(p_SQ.astype(dout_QH.dtype), dout_QH)
      d_SQ = p_SQ * (triton.dot(v_SH, dout_QH.T) - shift_ref[r, rows][None, :])
      d_SQ = _through_cap(d_SQ, scores_SQ, options)
      return dk_SH + triton.dot(d_SQ.astype(q_QH.dtype), q_QH), dv_SH

    seen = lax.div(at, tile.q), lax.div(latest + tile.q, tile.q)
    whole = lax.div(at + tile.k + tile.q - 2, tile.q), lax.div(earliest + 1, tile.q)
    return _blocks(seen, whole, body, carry)

  zeros = jnp.zeros(k_SH.shape, jnp.float32)
  dk_SH, dv_SH = lax.fori_loop(0, R, of_head, (zeros, zeros))
  _write(dk_ref, dk_SH * options.scale, H)
  _write(dv_ref, dv_SH, H)
