"""Benchmarks decoding: speed-up by drafts, acceptance rates, memory bandwidth."""

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.bench import timing
from mtp_jax.config import fields, parse, schema
from mtp_jax.decode import adaptive
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import load as load_lib
from mtp_jax.decode import summary as summary_lib
from mtp_jax.evals import acceptance
from mtp_jax.parallel import sharding

SHORT_S = 0.02  # shorter measurements are noise


# Comparing.


def compare(
  opened: load_lib.LoadedModel, ids: list[np.ndarray]
) -> tuple[decoder_lib.Decoded, list[str], dict]:
  """Measures decoding with head 1 only and with the drafts of --decode.*, alternating.

  Args:
    opened: the model.
    ids: token ids of each prompt.

  Returns:
    (the result with drafts, lines of a report, its values).
  """
  cfg, decode = opened.cfg, opened.decoder
  stop_ids = summary_lib.stop_ids(cfg, opened)
  widths = decoder_lib.requested(cfg, decode.active)
  plain, drafted, ratios = _alternating(opened, [(), widths], ids, stop_ids)
  speed_up = ratios[1]
  per_forward = drafted.tokens_per_forward / plain.tokens_per_forward
  lines = [
    f'{opened.name}: {len(ids)} prompts, {drafted.n_tokens:,} tokens,'
    f' {_heads(widths, decode)} compared with head 1 only, rounds:'
    f' {cfg.bench.rounds}' + summary_lib.sampled(cfg),
    f'speed-up {timing.shown(speed_up)}, tokens per forward pass {per_forward:.2f},'
    f' efficiency {speed_up["median"] / per_forward:.2f}',
    *summary_lib.acceptance_lines(drafted),
    *summary_lib.auto_lines(drafted),
  ]
  values = dict(
    speed_up=speed_up,
    tokens_per_forward=per_forward,
    efficiency=speed_up['median'] / per_forward,
    plain=summary_lib.summary(plain),
    drafted=summary_lib.summary(drafted),
  )
  if plain.decode_s < SHORT_S:
    lines.append(
      f'decoding with head 1 took {1e3 * plain.decode_s:.0f} ms: too short for a'
      ' ratio; increase --decode.max_new_tokens'
    )
  if cfg.decode.temperature:
    return drafted, [*lines, 'sampled: equal in distribution, not in text'], values
  diverged = _divergences(opened, ids, plain, drafted)
  lines += [
    f'row {p["row"]} diverges at generated token {p["at"]}, where the top two'
    f' logits of head 1 are {p["margin"]:.1e} apart: programs of different'
    ' width round differently'
    for p in diverged
  ]
  if not diverged:
    lines.append(f'identical, all {len(ids)} rows')
  return drafted, lines, values | dict(identical=not diverged, divergences=diverged)


def _heads(widths, decode) -> str:
  number = f'{len(decode.widths) + 1} heads'
  return f'up to {number} (--decode.num_draft_tokens=auto)' if widths == adaptive.AUTO else number


def _alternating(opened: load_lib.LoadedModel, variants: list, ids, stop_ids, rows: int = 0):
  """Returns each variant's Decoded (of the last round, with median times) and their
  speed-ups over the first variant; `rows` prompts per batch, 0 = all."""
  rows, rounds = rows or len(ids), opened.cfg.bench.rounds
  seed = opened.cfg.decode.seed

  def decode(widths):
    return decoder_lib.joined(
      [
        opened.decoder(
          ids[i : i + rows],
          widths=widths,
          rows=rows,
          stop_ids=stop_ids,
          seeds=range(seed + i, seed + i + rows),
        )
        for i in range(0, len(ids), rows)
      ]
    )

  last, times = {}, {v: [] for v in variants}
  prefills = {v: [] for v in variants}
  for r in range(rounds + 1):
    for widths in variants if r % 2 else variants[::-1]:
      last[widths] = decode(widths)
      if r:  # the first round is a warm-up
        times[widths].append(last[widths].decode_s)
        prefills[widths].append(last[widths].prefill_s)
  found = [
    last[v]._replace(decode_s=statistics.median(times[v]), prefill_s=statistics.median(prefills[v]))
    for v in variants
  ]
  tokens = [d.n_tokens for d in found]
  ratios = [
    timing.ratio(times[variants[0]], times[v], tokens[0] / n)
    for v, n in zip(variants, tokens, strict=True)
  ]
  return *found, ratios


def _divergences(opened: load_lib.LoadedModel, ids, plain, drafted) -> list[dict]:
  """Returns where the texts of a row diverge, and the margin of head 1's top two."""
  diverged = []
  for row, (prompt, a, b) in enumerate(zip(ids, plain.tokens, drafted.tokens, strict=True)):
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    if not len(differ) and len(a) == len(b):
      continue
    at = int(differ[0]) if len(differ) else n
    logits_V = opened.decoder.next_logits(np.concatenate([prompt, a[:at]]))
    best, second = np.sort(logits_V)[::-1][:2].tolist()
    diverged.append(dict(row=row, at=at, margin=best - second))
  return diverged


# The bench.


def measure(opened: load_lib.LoadedModel) -> tuple[list[str], dict]:
  """Measures numbers of draft tokens by batch size, alternating, on the same prompts
  from held-out documents."""
  cfg, decode = opened.cfg, opened.decoder
  b, n = cfg.bench, len(decode.widths) + 1
  drafts, with_auto = parse.parse_drafts(b.num_draft_tokens)
  if not b.num_draft_tokens:
    drafts = tuple(range(n))
  if max(drafts, default=0) >= n:
    raise fields.ConfigError(
      'bench.num_draft_tokens', b.num_draft_tokens, f'at most {n - 1}: {n} heads are in use'
    )
  variants: list[tuple[int, ...] | str] = [(1,) * J for J in (0, *(J for J in drafts if J))]
  if not all(width == 1 for width in decode.widths):
    variants.append(decode.widths)  # --decode.tree
  if with_auto:
    variants.append(adaptive.AUTO)
  bandwidth = _bandwidth(opened.mesh)
  table = []
  for B in parse.parse_numbers(b.batches):
    ids = acceptance.pieces(cfg, max(B, b.num_prompts))
    *found, ratios = _alternating(opened, variants, ids, (), B)
    for widths, decoded, speed_up in zip(variants, found, ratios, strict=True):
      # A batch ends with its slowest row.
      each = [decoded.forwards[i : i + B] for i in range(0, len(ids), B)]
      passes = sum(int(forwards.max()) for forwards in each)
      held = sum(len(forwards) * int(forwards.max()) for forwards in each)
      is_auto = isinstance(widths, str)
      used = (1,) * decoded.auto.num_draft_tokens if isinstance(widths, str) else widths
      read = decode.read_bytes(used)
      table.append(
        dict(
          batch=B,
          pieces=len(ids),
          heads=len(used) + 1,
          widths=used,
          is_auto=is_auto,
          speed_up=speed_up,
          efficiency=speed_up['median'] * held / decoded.n_tokens,
          bound=decode.read_bytes(()) / read,
          read_bytes=read,
          pass_s=decoded.decode_s / passes,
          over_floor=decoded.decode_s / passes * bandwidth / read,
          **summary_lib.summary(decoded),
        )
      )
  columns = {
    'batch': lambda r: str(r['batch']),
    'heads': lambda r: (
      str(r['heads']) + ' tree' * any(width > 1 for width in r['widths']) + ' auto' * r['is_auto']
    ),
    'tokens per forward': lambda r: f'{r["tokens_per_forward"]:.2f}',
    'speed-up': lambda r: timing.shown(r['speed_up']),
    'efficiency': lambda r: f'{r["efficiency"]:.2f}',
    'bound': lambda r: f'{r["bound"]:.2f}',
    'ms per forward': lambda r: f'{1e3 * r["pass_s"]:.2f}',
    'over weights / bandwidth': lambda r: f'{r["over_floor"]:.1f}',
    'tokens/s': lambda r: f'{r["tokens_per_s"]:,.0f}',
    'acceptance': lambda r: ' '.join('-' if a is None else f'{a:.2f}' for a in r['acceptance']),
  }
  return [
    f'{opened.name}: at least {b.num_prompts} prompts of {b.prompt_len} tokens, one per'
    f' row, {cfg.decode.max_new_tokens} new tokens' + summary_lib.sampled(cfg),
    *timing.table(table, columns),
    *(f'batch {r["batch"]}: {r["auto"]["reason"]}' for r in table if r['is_auto']),
    f'memory bandwidth {bandwidth / 1e9:.1f} GB/s (a sum over 512 MiB); bound:'
    ' weight bytes per forward pass with head 1 only over those with all heads;'
    ' efficiency: speed-up over tokens per row and forward pass, until the last row ends',
  ], dict(rows=table, bandwidth=bandwidth, checkpoint=opened.name, config=dataclasses.asdict(cfg))


def _bandwidth(mesh) -> float:
  """Measures the bytes per second that one idle device reads."""
  one = sharding.make_mesh(schema.Config(), mesh.devices.flat[:1])
  with jax.set_mesh(one):
    x = jax.jit(lambda: jnp.ones(2**27, jnp.float32))()
    total = jax.jit(jnp.sum)
    seconds = [timing.seconds(lambda: total(x)) for _ in range(8)]
  return x.nbytes / min(seconds)
