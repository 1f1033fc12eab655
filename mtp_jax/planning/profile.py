"""Where a TPU program spends its time, by the compiler's estimate of cycles.

The estimate is of each instruction outside of kernels (custom calls), times the trips of its
loops. It is the compiler's own cost model, so that two programs can be compared without a
device.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.io import jsonl
from mtp_jax.parallel import chips
from mtp_jax.planning import hlo

KERNEL_EFFICIENCY = 0.5  # of attention kernels, relative to the peak
PRODUCT = 8192  # rows and columns of the product that calibrates the clock
NEAR = 0.9, 1.25  # seconds of that product relative to those at the published peak
# What transformations and loops add to a name stack.
WRAPPERS = re.compile(r'jit\([^)]*\)|while|body|cond|closed_call|checkpoint|eval_jaxpr|\d+')
REMAT = 'rematted_computation'
SHOWN = 25  # scopes


class Row(NamedTuple):
  """The operations of one scope, per step and device."""

  scope: str
  cycles: int
  flops: float
  memory_bytes: float

  def floor_s(self, chip: chips.Chip) -> float:
    """Seconds at the peaks of the chip."""
    return max(self.flops / chip.flops_per_s, self.memory_bytes / chip.hbm_bytes_per_s)


def by_scope(ledger: hlo.Ledger) -> list[Row]:
  """Returns a row per scope, the one with most cycles first."""
  rows: dict[str, Row] = {}
  for o in ledger.operations:
    scope = scope_of(o.op_name)
    r = rows.get(scope, Row(scope, 0, 0.0, 0.0))
    rows[scope] = Row(
      scope,
      r.cycles + o.times * o.cycles,
      r.flops + o.times * o.flops,
      r.memory_bytes + o.times * o.memory_bytes,
    )
  return sorted(rows.values(), key=lambda r: -r.cycles)


def lines(ledger: hlo.Ledger, chip: chips.Chip, clock: float | None) -> list[str]:
  """Returns the scopes with most cycles as text, and what part of them the peaks would take.

  clock: Hz, if it is known.
  """
  out = ['', '  M cycles  share  of the floor  scope']
  for row in by_scope(ledger)[:SHOWN]:
    floor = f'{row.floor_s(chip) * clock / row.cycles:.0%}' if clock and row.cycles else ''
    share = row.cycles / ledger.cycles
    out += [f'{row.cycles / 1e6:10.2f} {share:6.1%} {floor:>13}  {shown(row.scope)}']
  return out


def shown(scope: str) -> str:
  """Returns a scope for a line of text; one of merged collectives has all of their names."""
  return jsonl.one_line(scope, 120)


def scope_of(op_name: str) -> str:
  """Returns the name scopes and the primitive of a name stack, with the pass in front."""
  backward, again = 'transpose(' in op_name, REMAT in op_name
  parts = [re.sub(r'\w+\(|\)', '', part) for part in op_name.split('/') if part != REMAT]
  # Without the compiler's numbers, as in broadcast.215, which differ between programs.
  parts = [re.sub(r'^([\w-]+)\.\d+$', r'\1', part) for part in parts]
  kept = [p for p in parts if p and not WRAPPERS.fullmatch(p)]
  name = '/'.join(p for p in kept if p != 'step')
  return f'{"recomputed" if again else "backward" if backward else "forward"} {name or "other"}'


def clock(devices: list) -> float | None:
  """Returns the clock of a TPU, in Hz; None unless a compiled bfloat16 product of 8192^3
  takes about as long as at the published peak by it."""
  chip = chips.chip(devices[0].device_kind)
  hertz = chips.CLOCKS.get(devices[0].device_kind)
  if chip is None or hertz is None:
    return None
  at = jax.sharding.SingleDeviceSharding(devices[0])
  a = jax.ShapeDtypeStruct((PRODUCT, PRODUCT), jnp.bfloat16, sharding=at)
  try:
    text = jax.jit(lambda a, b: a @ b).lower(a, a).compile().as_text() or ''
    cycles = hlo.ledger(text).cycles
  except (jax.errors.JaxRuntimeError, ValueError):  # as ahead._ledger
    return None
  ratio = cycles / hertz / (2 * PRODUCT**3 / chip.flops_per_s)
  return hertz if NEAR[0] < ratio < NEAR[1] else None
