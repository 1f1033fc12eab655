"""The temporaries that a compiled program holds at its peak, from HLO text.

An estimate: the text has the order of the instructions, but not where the compiler places
their results. A buffer is live from the instruction that writes it to the last one that reads
it, in the order of the schedule. Not counted, as they are not temporaries: arguments,
constants and results of the program. Holes between buffers, of which the text has nothing, are
missing from the sum; the compiler's own figure has them.

What shares a buffer: views (bitcast, tuple, get-tuple-element, the ends of async operations),
the state of a loop through all of its trips, an update of a slice in place, and the result of
an instruction with an operand that it reads last, where the compiler states so or where both
have the same layout. The temporaries of a loop's body are added to what is live around it.

Sizes are those of layouts: a TPU stores the two minor dimensions in tiles, T(8,128), so that
f32[32000,64]{1,0:T(8,128)} takes twice its elements. An array in S(1) of a TPU is in its
on-chip memory, and takes none of the device's.
"""

import math
import re
from typing import NamedTuple

from mtp_jax.planning import hlo, profile

SHOWN = 20  # buffers
HOST = 'S(5)'
VIEWS = frozenset('bitcast opt-barrier add-dependency domain async-update'.split())
TILE = re.compile(r'T((?:\([\d,]+\))+)')
ALIASES = re.compile(r'\{([\d,\s]*)\}:\s*\((\d+),\s*\{([\d,\s]*)\}')
# Of a fusion that computes element by element, and of what else may write over an operand.
IN_PLACE = frozenset(
  """
  add subtract multiply divide maximum minimum and or xor not negate select clamp exponential
  log sqrt rsqrt tanh power abs sign floor convert dynamic-update-slice scatter all-reduce sort
  """.split()
)


class Buffer(NamedTuple):
  """An array in a device's memory."""

  bytes: float  # with layout padding
  dtype: str
  dims: tuple[int, ...]
  name: str  # of the instruction that writes it first
  scope: str  # as in profile.scope_of


class Peak(NamedTuple):
  """What is live where most is."""

  buffers: tuple[Buffer, ...]  # the largest first

  @property
  def bytes(self) -> float:
    return sum(b.bytes for b in self.buffers)

  def largest(self) -> list[dict]:
    """Returns the SHOWN largest buffers as JSON-able values."""
    return [
      dict(shape=f'{b.dtype}[{",".join(map(str, b.dims))}]', bytes=b.bytes, scope=b.scope)
      for b in self.buffers[:SHOWN]
    ]


def of_program(text: str) -> Peak:
  """Returns the temporaries at the peak of the text of a compiled, scheduled program."""
  computations, entry = hlo.parse(text)
  return _Program(computations, ':T(' in text).peak(entry)


def lines(peak: Peak, temp_bytes: float | None) -> list[str]:
  """Returns the largest buffers as text, and their sum beside what the compiler allocates."""
  beside = '' if temp_bytes is None else f'; the compiler states {_mib(temp_bytes)} MiB'
  out = ['', f'temporaries at the peak, estimated from the program: {_mib(peak.bytes)} MiB{beside}']
  out += ['       MiB  array                         scope']
  for row in peak.largest():
    out += [f'{_mib(row["bytes"]):>10}  {row["shape"]:28}  {profile.shown(row["scope"])}']
  if more := peak.buffers[SHOWN:]:
    out += [f'{_mib(sum(b.bytes for b in more)):>10}  {len(more)} others']
  return out


def _mib(n: float) -> str:
  return f'{n / 2**20:,.2f}'


def padded_bytes(array: hlo.Array) -> float:
  """Returns the bytes of an array in its layout, {order of dimensions:tiles}."""
  order, _, rest = array.layout.strip('{}').partition(':')
  minor_first = [int(d) for d in order.split(',') if d] or list(range(len(array.dims)))[::-1]
  dims = [array.dims[d] for d in reversed(minor_first)] or [1]
  found = TILE.search(rest)
  for tile in re.findall(r'\(([\d,]+)\)', found[1]) if found else ():
    sizes = [int(n) for n in tile.split(',')]
    dims = [1] * (len(sizes) - len(dims)) + dims
    n = len(dims) - len(sizes)
    dims = dims[:n] + [-(-d // t) for d, t in zip(dims[n:], sizes, strict=True)] + sizes
  return hlo.BYTES.get(array.dtype, 4) * math.prod(dims)


# The buffers that the arrays of a result may be in: an array of a loop's state, or of an
# argument, is in none of this computation's.
Slots = list[frozenset[int]]
NONE = frozenset[int]()


class _Live:
  """The buffers of one computation: what each is, and from which to which instruction."""

  def __init__(self):
    self.slots: dict[str, Slots] = {}
    self.buffers: list[Buffer] = []
    self.begin: list[int] = []
    self.end: list[int] = []

  def add(self, buffer: Buffer, at: int) -> frozenset[int]:
    self.buffers.append(buffer)
    self.begin.append(at)
    self.end.append(at)
    return frozenset([len(self.buffers) - 1])

  def used(self, names, at: int) -> None:
    for b in _any(s for name in names for s in self.slots.get(name, ())):
      self.end[b] = at

  def of(self, at: int) -> list[Buffer]:
    """Returns the buffers live at an instruction."""
    times = zip(self.buffers, self.begin, self.end, strict=True)
    return [b for b, begin, end in times if begin <= at <= end]


class _Program:
  def __init__(self, computations: dict[str, list[hlo.Instruction]], is_tpu: bool):
    self.computations = computations
    self.is_tpu = is_tpu
    self.peaks: dict[str, Peak] = {}

  def peak(self, name: str) -> Peak:
    """Returns the peak of a computation, without its parameters and results, which are its
    caller's."""
    if name not in self.peaks:
      self.peaks[name] = self._peak(self.computations.get(name, []))
    return self.peaks[name]

  def _peak(self, instructions: list[hlo.Instruction]) -> Peak:
    live, here = _Live(), {i.name: i for i in instructions}
    scopes, inner = _scopes(instructions), {}
    for at, i in enumerate(instructions):
      if i.opcode not in ('get-tuple-element', 'tuple'):  # read no element
        live.used(i.operands, at)
      live.slots[i.name] = self._slots(i, at, here, live, scopes)
      if i.opcode in ('while', 'call', 'conditional'):
        body = i.attribute(r'body=%?([\w.\-]+)')
        peaks = [self.peak(name) for name in ([body] if body else hlo.called(i))]
        inner[at] = max(peaks, key=lambda p: p.bytes, default=Peak(()))
    for at, i in enumerate(instructions):
      self._share(i, at, here, live)
    root = next((i for i in instructions if i.root), None)
    for b in _any(live.slots[root.name]) if root else ():
      live.end[b] = -1  # the caller's
    sums = [0.0] * (len(instructions) + 1)
    for buffer, begin, end in zip(live.buffers, live.begin, live.end, strict=True):
      if end >= begin:
        sums[begin] += buffer.bytes
        sums[end + 1] -= buffer.bytes
    best, most, now = 0, -1.0, 0.0
    for at in range(len(instructions)):
      now += sums[at]
      whole = now + (inner[at].bytes if at in inner else 0)
      if whole > most:
        best, most = at, whole
    found = [*live.of(best), *(inner[best].buffers if best in inner else ())]
    return Peak(tuple(sorted(found, key=lambda b: -b.bytes)))

  def _slots(self, i: hlo.Instruction, at: int, here, live: _Live, scopes) -> Slots:
    """Returns the buffers of the arrays of a result, and adds those that it writes first."""
    given = [s for o in i.operands for s in live.slots.get(o, ())]
    n = len(i.arrays)
    if i.opcode in ('parameter', 'constant', 'partition-id', 'replica-id', 'after-all'):
      return [NONE] * n
    if i.opcode == 'get-tuple-element':
      return _element(i, here, given)
    if i.opcode in ('tuple', 'while') or i.opcode in VIEWS or 'ConcatBitcast"' in i.rest:
      return given if len(given) == n else [_any(given)] * n
    if i.opcode.endswith('-done'):
      return _finished(i, here, given)
    aliased: dict[int, frozenset[int]] = _stated(i, here, live)
    if i.opcode == 'copy-start':  # destination, source, context
      aliased[1] = _any(given[:1])
    elif i.opcode == 'call-update':  # its operands but the start, then its results
      given = [s for o in i.operands[1:] for s in live.slots.get(o, ())]
      aliased |= dict(enumerate(given))
    elif i.opcode.endswith('-start') and n > len(given):
      aliased |= dict(enumerate(given))
    updated = self._updated(i)
    if updated is not None and updated < len(i.operands):
      aliased.setdefault(0, _any(live.slots.get(i.operands[updated], ())))
    return [
      aliased[k] if k in aliased else self._new(i, array, at, live, scopes)
      for k, array in enumerate(i.arrays)
    ]

  def _new(self, i, array: hlo.Array, at: int, live: _Live, scopes) -> frozenset[int]:
    space = re.search(r'S\(\d+\)', array.layout)
    if space and (self.is_tpu or space[0] == HOST):
      return NONE
    size = padded_bytes(array)
    if not size:
      return NONE
    scope = profile.scope_of(scopes[i.name])
    return live.add(Buffer(size, array.dtype, array.dims, i.name, scope), at)

  def _updated(self, i: hlo.Instruction) -> int | None:
    """Returns the operand that an instruction updates in place, if it updates a slice."""
    if i.opcode == 'dynamic-update-slice':
      return 0
    if i.opcode != 'fusion' or len(i.arrays) != 1:
      return None
    body = {x.name: x for name in hlo.called(i) for x in self.computations.get(name, ())}
    x = next((x for x in body.values() if x.root), None)
    is_update = False
    while x is not None and x.opcode in ('bitcast', 'dynamic-update-slice'):
      is_update |= x.opcode == 'dynamic-update-slice'
      x = body.get(x.operands[0])
    return int(x.operands[0]) if is_update and x and x.opcode == 'parameter' else None

  def _share(self, i: hlo.Instruction, at: int, here, live: _Live) -> None:
    """Ends an operand that an instruction reads last where a result takes its buffer."""
    stated = re.findall(r'"indices":\["(\d+)","(\d+)"\]', i.rest)
    pairs = [(int(a), int(b) - len(i.operands)) for a, b in stated]
    if not self.is_tpu and (i.opcode in IN_PLACE or 'kind=kLoop' in i.rest):
      pairs = [(a, b) for b in range(len(i.arrays)) for a in range(len(i.operands))]
    taken = set()
    for a, b in pairs:
      if not (0 <= b < len(i.arrays) and a < len(i.operands)) or b in taken:
        continue
      operand = here.get(i.operands[a])
      if operand is None or len(operand.arrays) != 1:
        continue
      before, after = live.slots[operand.name][0], live.slots[i.name][b]
      sizes = [padded_bytes(x) for x in (operand.arrays[0], i.arrays[b])]
      if len(before) == len(after) == 1 and before != after and sizes[0] == sizes[1]:
        (old,) = before
        if live.end[old] == at and live.begin[old] < at:
          live.end[old] = at - 1
          taken.add(b)


def _any(slots) -> frozenset[int]:
  return frozenset().union(*slots)


def _element(i: hlo.Instruction, here, given: Slots) -> Slots:
  """Returns the slots of a get-tuple-element, whose operand may have nested tuples."""
  k, n = int(i.attribute(r'index=(\d+)') or 0), len(i.arrays)
  operand = here.get(i.operands[0])
  if n == 1 and operand is not None and len(operand.arrays) == len(given) > k:
    if i.arrays[0].dims == operand.arrays[k].dims:
      return [given[k]]
  return [_any(given)] * n


def _finished(i: hlo.Instruction, here, given: Slots) -> Slots:
  """Returns the slots of the end of an async operation, whose operand is its start."""
  start = here.get(i.operands[0])
  if start is None or len(start.arrays) != len(given):
    return [_any(given)] * len(i.arrays)
  if i.opcode == 'copy-done':
    return given[:1]
  operands = start.operands[1:] if start.opcode == 'call-update' else start.operands
  before = sum(len(here[o].arrays) for o in operands if o in here)
  own = list(zip(start.arrays, given, strict=True))[before if len(given) > before else 0 :]
  found = []
  for array in i.arrays:
    k = next((k for k, (a, _) in enumerate(own) if a[:2] == array[:2]), None)
    found.append(_any(given) if k is None else own.pop(k)[1])
  return found


def _stated(i: hlo.Instruction, here, live: _Live) -> dict[int, frozenset[int]]:
  """Returns result -> buffers, of results that the text states to be an operand's."""
  text = re.search(r'output_to_operand_aliasing=\{(.*?\))\s*\}', i.rest)
  found = {}
  for out, operand, within in ALIASES.findall(text[1]) if text else ():
    if int(operand) < len(i.operands):
      slots = live.slots.get(i.operands[int(operand)], [NONE])
      k = int(within.split(',')[0] or 0) if len(slots) > 1 else 0
      found[int(out.split(',')[0] or 0)] = slots[k] if k < len(slots) else _any(slots)
  return found


def _scopes(instructions: list[hlo.Instruction]) -> dict[str, str]:
  """Returns the name stack of each instruction: its own, else an operand's, else that of the
  first instruction that reads it, such as a loop of what it writes."""
  names: dict[str, str] = {}
  for i in instructions:
    own = i.attribute(r'op_name="([^"]*)"') or ''
    if re.fullmatch(r'[\w\-]+\.\d+', own):  # the compiler's
      own = ''
    of_operands = () if i.opcode == 'tuple' else i.operands
    names[i.name] = own or next((names[o] for o in of_operands if names.get(o)), '')
  unnamed = {name for name, found in names.items() if not found}
  for i in reversed(instructions):
    for o in unnamed.intersection(i.operands) if names[i.name] else ():
      names[o] = names[i.name]
  return names
