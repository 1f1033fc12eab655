"""Peak FLOP/s, memory and bandwidths of accelerators, for plans and MFU.

Standard library only. Sources: Google Cloud's pages on TPU v4, v5e, v5p, v6e and TPU7x
(https://cloud.google.com/tpu/docs/system-architecture-tpu-vm), NVIDIA's data
sheets of A100, H100, H200 and B200 (dense, SXM). Memory of TPU v4 and TPU7x is what libtpu
0.0.50.1 lets a program have.
"""

import glob
import os
from typing import NamedTuple


class Chip(NamedTuple):
  """Peaks of one device. Bandwidths are bytes per second in one direction."""

  flops_per_s: float  # dense, bfloat16
  hbm_bytes: float  # available to a program
  hbm_bytes_per_s: float
  link_bytes_per_s: float  # of all its links within its slice or node
  network_bytes_per_s: float  # its share of its host's network bandwidth


GIB = 2**30
CHIPS = {  # by the start of jax's device_kind
  'TPU v4': Chip(275e12, 30.75 * GIB, 1228e9, 300e9, 6.25e9),
  'TPU v5 lite': Chip(197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9),
  'TPU v5e': Chip(197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9),
  'TPU v5': Chip(459e12, 95 * GIB, 2765e9, 600e9, 6.25e9),
  'TPU v5p': Chip(459e12, 95 * GIB, 2765e9, 600e9, 6.25e9),
  'TPU v6 lite': Chip(918e12, 31.25 * GIB, 1640e9, 400e9, 12.5e9),
  'TPU v6e': Chip(918e12, 31.25 * GIB, 1640e9, 400e9, 12.5e9),
  # Half of a chip, which has two devices.
  'TPU7x': Chip(1153.5e12, 94.74 * GIB, 3690e9, 300e9, 6.25e9),
  'NVIDIA A100-SXM4-40GB': Chip(312e12, 39 * GIB, 1555e9, 300e9, 25e9),
  'NVIDIA A100-PCIE-40GB': Chip(312e12, 39 * GIB, 1555e9, 32e9, 25e9),
  'NVIDIA A100': Chip(312e12, 79 * GIB, 2039e9, 300e9, 25e9),
  'NVIDIA H100 PCIe': Chip(756e12, 79 * GIB, 2000e9, 64e9, 50e9),
  'NVIDIA H100 NVL': Chip(835e12, 93 * GIB, 3900e9, 300e9, 50e9),
  'NVIDIA H100': Chip(989e12, 79 * GIB, 3350e9, 450e9, 50e9),
  'NVIDIA H200': Chip(989e12, 139 * GIB, 4800e9, 450e9, 50e9),
  'NVIDIA B200': Chip(2250e12, 178 * GIB, 8000e9, 900e9, 50e9),
}


# Hz, by jax's device_kind, of chips whose compiler's estimates are calibrated by them
# (planning/profile.py): peak FLOP/s over the FLOPs per cycle of the matrix units.
CLOCKS = {
  'TPU v4': 1.05e9,
  'TPU v5 lite': 1.5e9,
  'TPU v5': 1.75e9,
  'TPU v6 lite': 1.75e9,
  'TPU7x': 2.2e9,
}


def chip(device_kind: str) -> Chip | None:
  """Returns the Chip of a jax device_kind; None if unknown, e.g. a CPU."""
  known = [kind for kind in CHIPS if device_kind.startswith(kind)]
  return CHIPS[max(known, key=len)] if known else None


def has_tpu() -> bool:
  """Whether this machine has a TPU."""
  return bool(glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'))


def answer_libtpu() -> None:
  """Sets the environment that libtpu expects of a TPU machine; where it is installed
  without a TPU it would otherwise print several warnings."""
  for name, value in (
    # Several processes may compile at once.
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('TPU_ACCELERATOR_TYPE', 'v5litepod-4'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('TPU_WORKER_ID', '0'),
  ):
    os.environ.setdefault(name, value)


def has_gpu() -> bool:
  """Whether this machine has an NVIDIA GPU, by the devices that jax looks for."""
  return any(map(os.path.exists, ('/dev/nvidia0', '/dev/nvidiactl', '/dev/dxg')))


def silence_compilers() -> None:
  """Sets the environment in which jax ignores compilers of devices that this machine lacks:
  libtpu, and the wheels of CUDA that `mtp plan` uses, which lack the libraries that jax
  otherwise looks for. Where the devices are, it is unchanged."""
  if not has_tpu():
    answer_libtpu()
  if not has_gpu():
    os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
