"""Differences between versions of Python and of the libraries.

Tested: Python 3.11 with jax 0.10.2 (the last one for it), 3.13 with jax 0.12;
loss, step, decoding and bench on 3.12 with jax 0.11.2 (as on GPU machines).
An entry is deleted with the support of the version that needs it.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator


def _release(package: str) -> tuple[int, ...]:
  """(major, minor) of an installed package."""
  version = importlib.metadata.version(package)
  return tuple(int(part) for part in version.split('.')[:2])


# XLA flags for programs that are compiled often and run for milliseconds: tests.
# jaxlib 0.11 has dropped one of them with what it turned off, and ends a process that
# names a flag which it does not know; there the other makes no difference.
FAST_COMPILE_FLAGS = (
  '--xla_backend_optimization_level=0',
  *(
    ('--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1')
    if _release('jaxlib') < (0, 11)
    else ()
  ),
)


@contextlib.contextmanager
def lowering_for_h100() -> Iterator[None]:
  """Allows Triton kernels to be lowered on a machine without a GPU.

  jax 0.11 lowers a kernel for one kind of GPU and reads it from the devices or an
  abstract mesh; under the latter cuDNN attention in the same program cannot be
  lowered. jax 0.10 does not need it.
  """
  if _release('jax') < (0, 11):
    yield
    return
  from jax._src.pallas.triton import gpu_info  # pyright: ignore[reportAttributeAccessIssue]

  original = gpu_info.get_gpu_info
  h100 = gpu_info.get_gpu_info_from_version(gpu_info.GpuVersion.H100)
  gpu_info.get_gpu_info = lambda: h100
  try:
    yield
  finally:
    gpu_info.get_gpu_info = original
