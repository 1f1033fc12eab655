"""NVIDIA GPUs that need not be present: topologies, what XLA's compiler reads of a GPU, and
the memory that a process needs beside its program.

JAX allocates a share of a GPU's memory at its start, and programs live in it. The rest is
for what libraries allocate by themselves; `reserves` states it.
"""

import importlib.util
import os
import re
from typing import Any, NamedTuple

from mtp_jax.config import fields
from mtp_jax.io import paths
from mtp_jax.parallel import chips

MIB = 2**20
GPUS_PER_NODE = 8  # at most
NODES = 4096  # at most
JAX_FRACTION = 0.75
# What launch/xla_flags.sh and launch/Dockerfile.cuda set in its place. The rest holds
# the reserves of three communicators (fsdp, data, all devices) on each of GPUS with a
# quarter to spare.
MEMORY_FRACTION = 0.92
# JAX reads either, and refuses both
# (https://docs.jax.dev/en/latest/gpu_memory_allocation.html).
FRACTION_VARIABLES = ('XLA_PYTHON_CLIENT_MEM_FRACTION', 'XLA_CLIENT_MEM_FRACTION')
# Without a GPU no algorithm can be measured, and Triton's products would have their default
# tiles. XLA_FLAGS may have them otherwise.
COMPILER_OPTIONS = dict(xla_gpu_autotune_level=0, xla_gpu_enable_triton_gemm=False)
# Of launch/xla_flags.sh: a pipelined step needs other memory. As options of a compilation jax
# 0.12 takes not all of them.
LAUNCH_FLAGS = (
  'xla_gpu_enable_latency_hiding_scheduler',
  'xla_gpu_enable_highest_priority_async_stream',
  'xla_gpu_enable_pipelined_all_gather',
  'xla_gpu_enable_pipelined_reduce_scatter',
  'xla_gpu_enable_pipelined_all_reduce',
)
NO_COMPILER = (
  "the compiler for NVIDIA GPUs is not installed: pip install 'mtp_jax[plan]';"
  ' below is the sharding-only estimate, without activations'
)
# The context of a process takes some 0.3 GiB, and kernels are loaded into it as they are used:
# https://github.com/pytorch/pytorch/issues/107667, https://github.com/ollama/ollama/pull/12102.
CONTEXT_BYTES = 512 * MIB
# Of NCCL 2.30 (https://github.com/NVIDIA/nccl): src/init.cc has the buffers of a connection
# for its protocols Simple, LL and LL128, src/transport/nvls.cc those of NVLink SHARP.
CONNECTION_BYTES = 4 * MIB + 8 * 512 * 8 * 16 + 120 * 640 * 8 * 8
CHANNELS = 24  # of a communicator on eight GPUs with NVSwitch; 16 to 24 are reported
CONNECTIONS = 3  # of a channel: ring, tree up, tree down
NVLS_BYTES = 2 * 8 * 128 * 1024  # of a channel and GPU of the node


class Gpu(NamedTuple):
  """What XLA's compiler reads of a GPU; memory and bandwidth are in parallel/chips.py.

  Of NVIDIA's whitepapers on A100, H100 and Blackwell, of the table of compute capabilities
  in the CUDA programming guide, and of openxla/xla, xla/backends/gpu/target_config/specs.
  """

  device_kind: str  # as jax has it
  capability: tuple[int, int]
  cores: int  # streaming multiprocessors
  fp32_per_core: int
  clock_ghz: float
  l2_mib: float
  shared_kib: int  # shared memory per core; a block may have 1 less
  nvls_channels: int  # of NCCL; 0 = no NVLink SHARP


GPUS = {  # of --plan.topology
  'a100-40g': Gpu('NVIDIA A100-SXM4-40GB', (8, 0), 108, 64, 1.41, 40, 164, 0),
  'a100': Gpu('NVIDIA A100-SXM4-80GB', (8, 0), 108, 64, 1.41, 40, 164, 0),
  'h100': Gpu('NVIDIA H100 80GB HBM3', (9, 0), 132, 128, 1.98, 50, 228, 16),
  'h200': Gpu('NVIDIA H200', (9, 0), 132, 128, 1.98, 50, 228, 16),
  'b200': Gpu('NVIDIA B200', (10, 0), 148, 128, 1.965, 126.5, 228, 32),
}


class Topology(NamedTuple):
  """Equal nodes of GPUs, connected by a network."""

  gpu: Gpu
  nodes: int
  per_node: int

  @property
  def device_kind(self) -> str:
    return self.gpu.device_kind

  @property
  def devices(self) -> int:
    return self.nodes * self.per_node


def topology(text: str) -> Topology | None:
  """Parses --plan.topology; None if it does not name a GPU.

  Raises:
    ConfigError: of a GPU, but neither GPU:N nor GPU:NODESxN.
  """
  name, _, shape = text.partition(':')
  if name not in GPUS:
    return None
  found = re.fullmatch(r'(?:([1-9]\d{0,3})x)?([1-9])', shape)
  nodes, per_node = (int(found[1] or 1), int(found[2])) if found else (0, 0)
  if not (1 <= nodes <= NODES and 1 <= per_node <= GPUS_PER_NODE):
    raise fields.ConfigError(
      'plan.topology',
      text,
      f'{name}:8, or 2 nodes as {name}:2x8; nodes of 1 to {GPUS_PER_NODE} GPUs, 1 to {NODES} nodes',
    )
  return Topology(GPUS[name], nodes, per_node)


def is_gpu(device_kind: str) -> bool:
  """Whether a device_kind of jax is an NVIDIA GPU."""
  return device_kind.startswith('NVIDIA')


def has_compiler() -> bool:
  """Whether the wheels of the extra [plan], or [cuda], are installed."""
  if importlib.util.find_spec('jax_cuda13_plugin') is None:
    return False
  nvidia = importlib.util.find_spec('nvidia')  # a namespace of several wheels
  roots = nvidia.submodule_search_locations if nvidia else ()
  return any(os.path.exists(os.path.join(root, 'cu13', 'bin', 'ptxas')) for root in roots or ())


def devices(at: Topology) -> list:
  """Returns the devices of a topology, to compile for with LAUNCH_FLAGS. Needs `has_compiler`,
  and jax's platform to be the CPU."""
  set_launch_flags()
  from jax.experimental import topologies

  # The first axis is for slices, which jax does not tell apart by process.
  shape = f'1x{at.nodes}x{at.per_node}'
  described = topologies.get_topology_desc(
    platform='cuda', target_config=target_config(at.gpu), topology=shape
  )
  return list(described.devices)


def target_config(gpu: Gpu) -> str:
  """Returns XLA's GpuTargetConfigProto of a GPU, as text."""
  chip = chips.chip(gpu.device_kind)
  assert chip
  major, minor = gpu.capability
  # sm_90a and sm_100a have the instructions of tensor cores that sm_90 and sm_100 lack.
  extension = 'ACCELERATED_FEATURES' if major >= 9 else 'NONE'
  limits = dict(
    threads_per_block_limit=1024,
    threads_per_warp=32,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=(gpu.shared_kib - 1) * 1024,
    shared_memory_per_core=gpu.shared_kib * 1024,
    threads_per_core_limit=2048,
    core_count=gpu.cores,
    fpus_per_core=gpu.fp32_per_core,
    block_dim_limit_x=2**31 - 1,
    block_dim_limit_y=2**16 - 1,
    block_dim_limit_z=2**16 - 1,
    memory_bandwidth=int(chip.hbm_bytes_per_s),
    l2_cache_size=int(gpu.l2_mib * MIB),
    clock_rate_ghz=gpu.clock_ghz,
    device_memory_size=int(chip.hbm_bytes),
    registers_per_core_limit=2**16,
    registers_per_block_limit=2**16,
  )
  return '\n'.join(
    [
      'gpu_device_info {',
      *(f'  {name}: {value}' for name, value in limits.items()),
      '  cuda_compute_capability {',
      f'    major: {major} minor: {minor} feature_extension: {extension}',
      '  }',
      '}',
      'platform_name: "CUDA"',
      'dnn_version_info { major: 9 minor: 10 }',
      'runtime_version { major: 13 }',
      f'device_description_str: "{gpu.device_kind}"',
    ]
  )


def compiler_options() -> dict[str, Any]:
  """Returns COMPILER_OPTIONS except those that XLA_FLAGS has."""
  return {name: value for name, value in COMPILER_OPTIONS.items() if not _is_given(name)}


def set_launch_flags() -> None:
  """Adds LAUNCH_FLAGS to XLA_FLAGS, except those that it has. jax reads it once."""
  added = [f'--{name}=true' for name in LAUNCH_FLAGS if not _is_given(name)]
  os.environ['XLA_FLAGS'] = ' '.join([*added, os.environ.get('XLA_FLAGS', '')]).strip()


def _is_given(name: str) -> bool:
  flags = os.environ.get('XLA_FLAGS', '').split()
  return f'--{name}' in (flag.partition('=')[0] for flag in flags)


def memory_fraction(is_launched: bool) -> float:
  """Returns the share of a GPU's memory that JAX allocates: of the environment, or else what
  the launch scripts set, or JAX's own of a process that they have not started.

  Raises:
    InputError: the variable is no share.
  """
  for name in FRACTION_VARIABLES:
    text = os.environ.get(name)
    if not text:
      continue
    try:
      share = float(text)
    except ValueError:
      share = 0.0
    if not 0 < share <= 1:
      raise paths.InputError(f'{name}={text}', 'must be a number above 0 and at most 1')
    return share
  return MEMORY_FRACTION if is_launched else JAX_FRACTION


def reserves(device_kind: str, per_node: int, communicators: int) -> dict[str, float]:
  """Returns the bytes that a process needs beside its program, by purpose.

  A step that computes without cuDNN needs none for it. XLA's temporaries include the
  workspaces of its calls of cuBLAS, but not the one that a handle allocates when it is
  created (cuBLAS documentation, cublasSetWorkspace).

  Args:
    device_kind: of a GPU.
    per_node: GPUs of a node.
    communicators: different sets of replica groups among its collectives.
  """
  gpu = next((g for g in GPUS.values() if g.device_kind == device_kind), None)
  is_hopper = gpu is None or gpu.capability >= (9, 0)  # or newer
  of_nvls = gpu.nvls_channels * per_node * NVLS_BYTES if gpu else 0
  of_communicator = CHANNELS * CONNECTIONS * CONNECTION_BYTES + of_nvls
  return {
    'CUDA context': CONTEXT_BYTES,
    'cuBLAS workspace': (32 if is_hopper else 4) * MIB,
    'NCCL buffers': communicators * of_communicator,
  }
