"""The memory traffic of a fusion, from HLO text: what it reads of its operands, and writes."""


def off_chip(arrays) -> float:
  """Returns the bytes of those arrays that are in memory, not in a TPU's VMEM."""
  return sum(a.bytes for a in arrays if not a.on_chip)


def of_fusion(i, here, body) -> float:
  """Returns the bytes of operands and results; for those that are only sliced, or
  only updated in a slice, those of the slice."""
  inside = {x.name: x for x in body}
  users = {}
  for x in body:
    for o in x.operands:
      users.setdefault(o, []).append(x)
  total = 0.0
  for x in body:
    if x.opcode != 'parameter':
      continue
    number = int(x.operands[0])
    if number >= len(i.operands) or i.operands[number] not in here:
      continue
    size = off_chip(here[i.operands[number]].arrays)
    if size:
      total += _touched(x, users, inside, size)
  root = next((x for x in body if x.root), None)
  outs = [root] if root is not None else []
  if root is not None and root.opcode == 'tuple':
    outs = [inside[o] for o in root.operands if o in inside]
  for array, out in zip(i.arrays, outs, strict=False):
    if array.on_chip:
      continue
    while out.opcode == 'bitcast' and out.operands[0] in inside:
      out = inside[out.operands[0]]
    updates = out.opcode == 'dynamic-update-slice'
    total += inside[out.operands[1]].result_bytes if updates else array.bytes
  return total


def _touched(parameter, users, inside, size) -> float:
  """Returns the bytes that a fusion reads of an operand."""
  total, waiting = 0.0, [parameter]
  while waiting:
    x = waiting.pop()
    for user in users.get(x.name, ()):
      if user.opcode == 'bitcast':
        waiting.append(user)
      elif user.opcode in ('dynamic-slice', 'slice', 'gather'):
        total += user.result_bytes
      elif user.opcode == 'dynamic-update-slice' and user.operands[0] == x.name:
        total += inside[user.operands[1]].result_bytes
      else:
        return size
  return min(total, size)
