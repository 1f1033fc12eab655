"""A ledger of the communication and memory traffic of a compiled program, from HLO text.

HLO text shows an operation in a loop once. `ledger` walks the program from its
entry, multiplies by the trip count of each loop, and sums

  collectives  bytes that a device sends over its links, with ring algorithms;
  memory       bytes read from and written to memory per instruction, with a
               fusion as one instruction, and slices counted by their size.

Four peculiarities of TPU programs are handled: an async collective is spread
over several fusions, which share a chain id; or a SparseCore runs it, an async call; a
reduce-scatter is an all-reduce inside a computation of that name; arrays in memory
space S(1), the on-chip VMEM, cause no memory traffic. And three of GPU programs: async
fusions; products as calls of cuBLAS; collectives between nodes, known by their replica
groups alone.
"""

import functools
import re
from typing import NamedTuple

from mtp_jax.planning import groups, products, traffic

BYTES = {
  **dict.fromkeys('pred s8 u8 f8e4m3fn f8e5m2'.split(), 1),
  **dict.fromkeys('s4 u4'.split(), 0.5),
  **dict.fromkeys('s16 u16 bf16 f16'.split(), 2),
  **dict.fromkeys('s32 u32 f32'.split(), 4),
  **dict.fromkeys('s64 u64 f64 c64'.split(), 8),
  **dict.fromkeys('c128'.split(), 16),
  **dict.fromkeys('token'.split(), 0),
}
COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'send',
)
# Without work or traffic of their own.
FREE = frozenset(
  """
  parameter constant tuple get-tuple-element bitcast while conditional call after-all
  partition-id replica-id send send-done recv recv-done opt-barrier add-dependency
  async-start async-update async-done call-start call-update call-done copy-done slice-done
  """.split()
)
UNKNOWN = 2**63 - 1  # cycles, of an operation that a SparseCore runs
NOTHING = 0.05  # relative cost below which a branch counts as empty
ARRAY = re.compile(r'(\w+)\[([\d,]*)\](\{[^}]*\})?')
HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*)')
OPERAND = re.compile(r'%([\w.\-]+)')


class Array(NamedTuple):
  dtype: str
  dims: tuple[int, ...]
  on_chip: bool
  layout: str = ''  # {…} of the text: order, tiles, memory space

  @property
  def bytes(self) -> float:
    return BYTES.get(self.dtype, 4) * functools.reduce(lambda a, b: a * b, self.dims, 1)


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  root: bool
  arrays: tuple[Array, ...]  # its results
  opcode: str
  operands: tuple[str, ...]
  rest: str  # attributes, as text

  @property
  def result_bytes(self) -> float:
    return sum(a.bytes for a in self.arrays)

  def attribute(self, pattern: str) -> str | None:
    found = re.search(pattern, self.rest)
    return found[1] if found else None


class Collective(NamedTuple):
  """A collective operation and how often a step runs it."""

  kind: str
  arrays: tuple[Array, ...]  # full arrays: the output of an all-gather
  group: int  # devices per replica group
  times: int
  op_name: str  # jax's name stack of its origin
  loops: tuple[str, ...]  # enclosing loops, as op names
  chain: str | None = None  # id shared by the fusions of an async collective
  network: float = 0.0  # share of its bytes that leave a slice or node
  members: tuple[tuple[int, ...], ...] = ()  # devices of each group, where nodes are known

  @property
  def bytes(self) -> float:
    """Bytes of the full arrays, for one execution."""
    return sum(a.bytes for a in self.arrays)

  @property
  def sent_bytes(self) -> float:
    """Bytes that one device sends per step."""
    share = (self.group - 1) / self.group if self.group else 1.0
    factor = {'all-reduce': 2 * share, 'collective-permute': 1.0, 'send': 1.0}.get(self.kind, share)
    return factor * self.bytes * self.times


class Operation(NamedTuple):
  """An instruction that does work, and how often a step runs it; the rest is of one
  execution."""

  name: str
  op_name: str  # jax's name stack of its origin
  times: int
  memory_bytes: float  # read and written
  flops: float = 0.0  # of matrix products
  cycles: int = 0  # the TPU compiler's estimate; 0 = none, as of a kernel


class Ledger(NamedTuple):
  """What a device does in a step."""

  collectives: tuple[Collective, ...]
  operations: tuple[Operation, ...]
  # Conditionals and loops without a known trip count, per step: a GPU's host waits for the
  # predicate of each.
  host_syncs: int = 0

  @property
  def memory_bytes(self) -> float:
    """Bytes read and written per step."""
    return sum(o.times * o.memory_bytes for o in self.operations)

  @property
  def cycles(self) -> int:
    """The compiler's estimate of a step, without kernels (custom calls)."""
    return sum(o.times * o.cycles for o in self.operations)

  @property
  def cost(self) -> float:
    """Cost for comparing the branches of a conditional."""
    return self.memory_bytes + sum(c.sent_bytes for c in self.collectives)

  def by_kind(self) -> dict[str, dict]:
    """Returns kind -> operations, and bytes sent per device, per step."""
    kinds = {}
    for c in self.collectives:
      row = kinds.setdefault(c.kind, dict(count=0, sent_bytes=0.0))
      row['count'] += c.times
      row['sent_bytes'] += c.sent_bytes
    return dict(sorted(kinds.items()))

  def sent_bytes(self, *, network: bool, kind: str = '') -> float:
    """Returns the bytes sent over links within a slice or node, or over the network
    between them, by collectives of a kind or of all kinds. Between slices XLA uses send
    and receive only."""
    return sum(
      c.sent_bytes * (c.network if network else 1 - c.network)
      for c in self.collectives
      if not kind or c.kind == kind
    )


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns (computation name -> its instructions, name of the entry)."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if current is None:
      header = HEADER.match(line)
      if header:
        current = computations.setdefault(header[2], [])
        entry = header[2] if header[1] else entry
    elif line == '}' or line.startswith('}, execution_thread='):
      current = None
    elif instruction := _instruction(line):
      current.append(instruction)
    elif current:  # attributes of a kernel may span several lines
      current[-1] = current[-1]._replace(rest=current[-1].rest + line)
  return computations, entry


def _instruction(line: str) -> Instruction | None:
  found = INSTRUCTION.match(line)
  if not found:
    return None
  root, name, rest = found.groups()
  type_end = _closing(rest, 0) if rest.startswith('(') else rest.find(' ')
  opcode, _, rest_of = rest[type_end:].lstrip().partition('(')
  end = _closing('(' + rest_of, 0) - 1
  inside, attributes = rest_of[: end - 1], rest_of[end:]
  return Instruction(
    name,
    bool(root),
    _arrays(rest[:type_end]),
    opcode,
    # A constant or parameter has its value or number here.
    tuple(OPERAND.findall(inside)) or ((inside,) if inside else ()),
    attributes,
  )


def _closing(text: str, start: int) -> int:
  """Returns the index just past the parenthesis that closes the one at start."""
  depth = 0
  for i in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[i], 0)
    if not depth:
      return i + 1
  return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
  return tuple(
    Array(dtype, tuple(map(int, filter(None, dims.split(',')))), 'S(1)' in at, at)
    for dtype, dims, at in ARRAY.findall(text)
  )


def ledger(text: str, per_node: int = 0) -> Ledger:
  """Returns the ledger of the text of a compiled program.

  per_node: devices per node, which are numbered in order; 0 = on a TPU, where only sends
    leave a slice.

  Of a conditional it takes the most expensive branch, but only once per loop if
  another branch costs next to nothing (as for work of head 1 only).

  Raises:
    ValueError: the trips of a loop, or what runs a collective, are unknown.
  """
  computations, entry = parse(text)
  run = set()

  def inside(i, times, trips, loops, fused) -> list[Ledger]:
    """Returns the ledgers of the computations that an instruction runs."""
    if i.opcode == 'while':
      n = trip_count(i, computations)
      loops = (*loops, i.attribute(r'op_name="([^"]*)"') or i.name)
      body = i.attribute(r'body=%?([\w.\-]+)')
      return [walk(body, times * n, n, loops, False)]
    fused |= i.opcode == 'fusion'
    parts = [walk(c, times, trips, loops, fused) for c in called(i)]
    if i.opcode != 'conditional':
      return parts
    cost = [part.cost for part in parts]
    dearest = called(i)[cost.index(max(cost))]
    if min(cost) < NOTHING * max(cost):
      times //= trips
    return [walk(dearest, times, trips, loops, fused)]

  def walk(name, times, trips, loops, fused) -> Ledger:
    found, operations, syncs = {}, [], 0
    run.add(name)
    here = {i.name: i for i in computations.get(name, ())}
    for i in here.values():
      i = _started_fusion(i, here)
      syncs += times * _waits(i, computations)
      parts = inside(i, times, trips, loops, fused)
      collective = _collective(i, here, name, times, loops)
      if collective:
        if per_node:
          collective = collective._replace(
            network=groups.network_share(i.rest, per_node), members=groups.members(i.rest)
          )
        parts.append(Ledger((collective,), ()))
      if not fused:
        operation = _operation(i, times, here, computations)
        parts.append(Ledger((), (operation,) if operation else ()))
      for part in parts:
        operations += part.operations
        syncs += part.host_syncs
        for c in part.collectives:
          # Of a chain, which spans several fusions, count the first only.
          found.setdefault((c.chain, c.loops) if c.chain else len(found), c)
    return Ledger(tuple(found.values()), tuple(operations), syncs)

  found = walk(entry, 1, 1, (), False)
  for name, instructions in computations.items():
    if name not in run and any(map(_kind, instructions)):
      raise ValueError(f'{name} has a collective, and no known instruction runs it')
  return found


def _started_fusion(i: Instruction, here) -> Instruction:
  """Returns an async fusion, whose results are its operands and then its own, as a fusion."""
  if i.opcode != 'fusion-start':
    return i
  given = sum(len(here[o].arrays) for o in i.operands)
  return i._replace(opcode='fusion', arrays=i.arrays[given:])


def _waits(i: Instruction, computations) -> int:
  """Returns how often a GPU's host waits for the predicate of an instruction."""
  if i.opcode == 'while' and 'known_trip_count' not in i.rest:
    return trip_count(i, computations)
  return int(i.opcode == 'conditional')


def trip_count(loop: Instruction, computations) -> int:
  """Returns the trip count of a while loop: as annotated by XLA, or the constant in
  its condition.

  Raises:
    ValueError: neither is present; loops of jax.lax.scan always have one.
  """
  known = loop.attribute(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
  if known:
    return int(known)
  condition = loop.attribute(r'condition=%?([\w.\-]+)')
  constants, compared = [], False
  waiting = [condition]
  while waiting:
    for i in computations.get(waiting.pop(), ()):
      if i.opcode == 'constant' and i.arrays[0].dtype in ('s32', 'u32', 's64'):
        constants += [int(i.operands[0])]
      compared |= i.opcode == 'compare' and 'direction=LT' in i.rest
      waiting += called(i)
  if not compared or len(constants) != 1:
    raise ValueError(f'loop {loop.name}: its condition counts to no constant')
  return constants[0]


def called(i: Instruction) -> list[str]:
  """Returns the computations that an instruction runs once."""
  if i.opcode in ('fusion', 'call', 'call-start', 'async-start', 'custom-call'):
    several = i.attribute(r'called_computations=\{([^}]*)\}') or ''
    found = re.findall(r'(?:calls|to_apply)=%?([\w.\-]+)', i.rest)
    return found + re.findall(r'[\w.\-]+', several)
  if i.opcode == 'conditional':
    branches = i.attribute(r'branch_computations=\{([^}]*)\}')
    if branches:
      return OPERAND.findall(branches)
    return re.findall(r'(?:true|false)_computation=%?([\w.\-]+)', i.rest)
  return []


def _kind(i: Instruction) -> str | None:
  """Returns the kind of a collective; None of another instruction."""
  kind = i.opcode.removesuffix('-start')
  return kind if kind in COLLECTIVES else None


def _collective(i, here, computation, times, loops) -> Collective | None:
  kind = _kind(i)
  if kind is None:
    return None
  arrays, group = i.arrays, groups.size(i.rest, i.name)
  given = tuple(a for name in i.operands for a in here[name].arrays)
  if kind in ('send', 'reduce-scatter'):  # the full array is the input
    arrays = given
  elif i.opcode.endswith('-start'):  # its result includes its input
    arrays = given
    if kind == 'all-gather':
      arrays = tuple(a._replace(dims=(group, *a.dims)) for a in given)
  elif computation.startswith('all-reduce-scatter'):
    kind = 'reduce-scatter'
  return Collective(
    kind,
    arrays,
    group,
    times,
    i.attribute(r'op_name="([^"]*)"') or '',
    loops,
    i.attribute(r'chain_id="(\d+)"'),
    float(kind == 'send'),
  )


def _operation(i: Instruction, times: int, here, computations) -> Operation | None:
  """Returns what an instruction outside of fusions does; None if that is nothing."""
  moved = _traffic(i, here, computations)
  cycles = int(i.attribute(r'"estimated_cycles":"(\d+)"') or 0)
  cycles = 0 if cycles == UNKNOWN else cycles
  flops = _flops(i, here, computations)
  if not (moved or cycles or flops):
    return None
  origin = i.attribute(r'op_name="([^"]*)"') or ''
  return Operation(i.name, origin, times, moved, flops, cycles)


def _flops(i: Instruction, here, computations) -> float:
  """Returns the FLOPs of the matrix products in an instruction, those of a fusion too."""
  if i.opcode == 'fusion':
    total = 0.0
    for name in called(i):
      body = {x.name: x for x in computations.get(name, ())}
      total += sum(_flops(x, body, computations) for x in body.values())
    return total
  return products.flops(i, here)


def _traffic(i: Instruction, here, computations) -> float:
  """Returns the bytes that an instruction reads from and writes to memory."""
  if i.opcode in FREE or i.opcode.endswith('-done'):
    return 0.0
  if i.opcode in ('copy-start', 'slice-start'):  # between HBM and VMEM
    moved = i.arrays[0 if i.opcode == 'copy-start' else 1]
    ends = [moved, *(a for o in i.operands for a in here[o].arrays)]
    return moved.bytes * sum(not a.on_chip for a in ends)
  read = [traffic.off_chip(here[o].arrays) for o in i.operands if o in here]
  written = traffic.off_chip(a for a in i.arrays if not products.is_workspace(a, i))
  if i.opcode.endswith('-start'):  # its result includes its input
    written -= sum(read)
  if i.opcode == 'dynamic-slice' or i.opcode == 'gather':
    return 2 * written if read and read[0] else written
  if i.opcode == 'dynamic-update-slice':
    return 2 * read[1]
  if i.opcode == 'fusion':
    return traffic.of_fusion(i, here, computations.get(called(i)[0], ()))
  return sum(read) + written
