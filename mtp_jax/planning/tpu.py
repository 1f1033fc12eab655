"""TPUs that need not be present: their slices, and libtpu, which compiles for them."""

import importlib.util
import math
import re
import signal
import threading
from typing import Any, NamedTuple

from mtp_jax.config import fields
from mtp_jax.parallel import chips

NO_COMPILER = (
  "the TPU compiler is not installed: pip install 'mtp_jax[tpu]';"
  ' below is the sharding-only estimate, without activations'
)


class Tpu(NamedTuple):
  """A generation of TPU: its devices in jax, its slices, and what libtpu describes its chips by.

  Sources as of parallel/chips.py.
  """

  device_kind: str
  dims: int  # of a slice
  chips: int  # of a pod
  per_chip: int = 1  # devices
  options: dict[str, str] = {}


TPUS = {  # of --plan.topology
  # As jax runs it; libtpu's own default has a device for each of two cores.
  'v4': Tpu('TPU v4', dims=3, chips=4096, options=dict(chip_config_name='megacore')),
  'v5e': Tpu('TPU v5 lite', dims=2, chips=256),
  'v5p': Tpu('TPU v5', dims=3, chips=8960),
  'v6e': Tpu('TPU v6 lite', dims=2, chips=256),
  'tpu7x': Tpu('TPU7x', dims=3, chips=9216, per_chip=2),
}


class Topology(NamedTuple):
  """Equal slices of TPUs, connected by a network."""

  text: str  # --plan.topology
  tpu: Tpu
  chips: int  # of a slice
  slices: int
  per_node = 0  # GPUs

  @property
  def device_kind(self) -> str:
    return self.tpu.device_kind

  @property
  def devices(self) -> int:
    return self.slices * self.chips * self.tpu.per_chip


def topology(text: str, slices: int) -> Topology | None:
  """Parses --plan.topology; None if it does not name a TPU.

  Raises:
    ConfigError: other dimensions than a slice of this TPU has, or more chips than a pod.
      libtpu takes v5e:2x2x2 and v4:2x2, and divides by zero in v4:0x2x1.
  """
  name, _, shape = text.partition(':')
  if name not in TPUS:
    return None
  tpu = TPUS[name]
  found = re.fullmatch('x'.join([r'([1-9]\d{0,3})'] * tpu.dims), shape)
  sizes = [int(size) for size in found.groups()] if found else [0]
  # Of libtpu's hosts, which have 2 x 2 chips, or the chips of the slice along a dimension of 1.
  is_whole = all(size == 1 or size % 2 == 0 for size in sizes[:2])
  if not (is_whole and 1 <= math.prod(sizes) <= tpu.chips):
    one = '4x4' if tpu.dims == 2 else '2x2x4'
    raise fields.ConfigError(
      'plan.topology',
      text,
      f'a slice has {tpu.dims} dimensions in chips, e.g. {name}:{one}, the first two 1 or even; at'
      f' most {tpu.chips:,} chips',
    )
  return Topology(text, tpu, math.prod(sizes), slices)


def has_compiler() -> bool:
  return importlib.util.find_spec('libtpu') is not None


def devices(at: Topology) -> list:
  """Returns the devices of a topology, to compile for. Needs `has_compiler`."""
  chips.answer_libtpu()
  from jax.experimental import topologies

  options: dict[str, Any] = dict(at.tpu.options)
  if at.slices > 1:
    options['num_slices'] = at.slices
  handler = signal.getsignal(signal.SIGTERM)
  try:
    return topologies.get_topology_desc(at.text, platform='tpu', **options).devices
  except Exception as error:  # of various types
    raise fields.ConfigError(
      'plan.topology', at.text, f'the TPU compiler reports: {str(error).splitlines()[0][:120]}'
    ) from error
  finally:
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, handler)  # libtpu's prints a stack trace
