"""Matrix products in HLO text: their FLOPs."""

import math
import re

CUBLAS = 'custom_call_target="__cublas$'  # a product of a GPU program


def is_workspace(array, i) -> bool:
  """Whether a result of an hlo.Instruction is the workspace of a cuBLAS call, whose
  traffic is unknown."""
  is_cublas = i.opcode == 'custom-call' and CUBLAS in i.rest
  return is_cublas and array.dtype == 's8' and len(array.dims) == 1


def flops(i, here) -> float:
  """Returns the FLOPs of an hlo.Instruction that is a product, else 0.

  here: the instructions of its computation, by name.
  """
  is_cublas = i.opcode == 'custom-call' and CUBLAS in i.rest
  if i.opcode not in ('dot', 'convolution') and not is_cublas:
    return 0.0
  lhs, rhs = (here[o].arrays[0].dims for o in i.operands[:2])
  results = math.prod(i.arrays[0].dims)
  if is_cublas:
    contracted = i.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ''
    return 2.0 * results * math.prod(lhs[int(d)] for d in re.findall(r'\d+', contracted))
  if i.opcode == 'dot':
    contracted = i.attribute(r'lhs_contracting_dims=\{([\d,]*)\}') or ''
    return 2.0 * results * math.prod(lhs[int(d)] for d in contracted.split(',') if d)
  labels = i.attribute(r'dim_labels=(\S+?)(?:,|$)') or ''
  of_lhs, of_rhs, of_out = re.split('_|->', labels)
  spatial = [label for label in of_out if label.isdigit()]
  pairs = results / math.prod(i.arrays[0].dims[of_out.index(label)] for label in spatial)
  for d, label in enumerate(spatial):
    n_in, n_kernel = lhs[of_lhs.index(label)], rhs[of_rhs.index(label)]
    n_out = i.arrays[0].dims[of_out.index(label)]
    pairs *= _pairs(i, d, n_in, n_kernel, n_out)
  return 2.0 * pairs * rhs[of_rhs.index('i')]


def _pairs(i, d: int, n_in: int, n_kernel: int, n_out: int) -> int:
  """Returns the products along one spatial dimension of a convolution. TPU programs have
  products with batch dimensions as convolutions in which most places are empty."""
  window: str = i.attribute(r'window=\{([^}]*)\}') or ''
  given: dict[str, str] = dict(re.findall(r'(\w+)=(\S+)', window))

  def of(name: str, default: str) -> str:
    return given[name].split('x')[d] if name in given else default

  low = int(of('pad', '0_0').split('_')[0])
  stride, hole, step = (int(of(name, '1')) for name in ('stride', 'lhs_dilate', 'rhs_dilate'))
  n = 0
  for out in range(n_out):
    for k in range(n_kernel):
      at = out * stride + k * step - low
      n += at % hole == 0 and 0 <= at // hole < n_in
  return n
