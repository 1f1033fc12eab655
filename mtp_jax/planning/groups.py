"""The devices of a collective, from HLO text: replica groups in three notations, and the
share of the traffic that leaves a node."""

import functools
import math
import re

import numpy as np

# Axes of a mesh; the order of devices may differ from 0, 1, 2, …
MESH = re.compile(
  r'replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\((.*?)\)\s*(?=\{))?'
  r'\s*\{([^}]*)\}'
)
AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")  # a full axis, or a part of one: 'a':(2)4
IOTA = re.compile(r'\[([\d,]+)\](?:T\(([\d,]+)\))?')
GROUPS = re.compile(r'replica_groups=\[([\d,]+)\]<=(\S+?)(?:,\s|$)')
LISTED = re.compile(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}')


def size(rest: str, name: str) -> int:
  """Returns the devices per replica group, in any of the three notations; 0 if an
  instruction has none.

  rest: the attributes of the instruction `name`.

  Raises:
    ValueError: an unknown notation.
  """
  mesh = MESH.search(rest)
  if mesh:
    sizes = _sizes(mesh[1])
    return math.prod(int(part or sizes[axis]) for axis, _, part in AXIS.findall(mesh[3]))
  iota = re.search(r'replica_groups=\[(\d+(?:,\d+)*)\]<=', rest)
  if iota:
    return int(iota[1].split(',')[-1])
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', rest)
  if not listed and 'replica_groups=' in rest:  # {} means all devices
    raise ValueError(f'unknown replica groups of {name}: {rest[:200]}')
  return len(listed[1].split(',')) if listed else 0


def network_share(rest: str, per_node: int) -> float:
  """Returns the part of a collective's bytes that cross the network between nodes.

  A ring visits the devices of one node after another: of its hops as many leave a node as
  it has nodes, if those are several. Of a collective-permute, the pairs across nodes.

  rest: the attributes of the instruction; per_node: devices per node, numbered in order.
  """
  shares = []
  for group in members(rest):
    nodes = len({device // per_node for device in group})
    hops = 2 if 'source_target_pairs=' in rest else len(group)
    shares += [nodes / hops if nodes > 1 else 0.0]
  return sum(shares) / len(shares) if shares else 0.0


def members(rest: str) -> tuple[tuple[int, ...], ...]:
  """Returns the devices of each group, or pair, of an instruction; () if it has none."""
  found = MESH.search(rest) or GROUPS.search(rest) or LISTED.search(rest)
  return _members(found[0]) if found else ()


@functools.cache
def _members(written: str) -> tuple[tuple[int, ...], ...]:
  if mesh := MESH.search(written):
    sizes, taken = _sizes(mesh[1]), {}
    for axis, before, part in AXIS.findall(mesh[3]):
      part, before = int(part or sizes[axis]), int(before or 1)
      taken[axis] = before, part, sizes[axis] // (before * part)
    # Each axis as (major, grouped, minor).
    shape = [n for axis, size in sizes.items() for n in taken.get(axis, (size, 1, 1))]
    grouped = list(range(1, len(shape), 3))
    others = [d for d in range(len(shape)) if d not in grouped]
    ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(shape))
    rows = ids.reshape(shape).transpose(others + grouped)
    rows = rows.reshape(-1, math.prod(shape[d] for d in grouped))
  elif iota := GROUPS.search(written):
    rows = _iota(iota[2]).reshape(_numbers(iota[1]))
  else:
    listed = LISTED.search(written)
    assert listed
    rows = [_numbers(group) for group in re.findall(r'\{([\d,]+)\}', listed[1])]
  return tuple(tuple(sorted(int(device) for device in row)) for row in rows)


def _sizes(axes: str) -> dict[str, int]:
  return {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", axes)}


def _iota(written: str) -> np.ndarray:
  """Returns 0, 1, 2, … in a shape, transposed: [2,8]T(1,0)."""
  found = IOTA.search(written)
  if not found:
    raise ValueError(f'unknown order of devices: {written[:200]}')
  shape = _numbers(found[1])
  ids = np.arange(math.prod(shape)).reshape(shape)
  return ids.transpose(_numbers(found[2])) if found[2] else ids


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]
