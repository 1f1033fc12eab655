"""What differs between versions of Python and of the libraries. Floor 0.

Tested: Python 3.11 with jax 0.10.2 (the last one for it), 3.13 with jax 0.12;
loss, step, decoding and bench on 3.12 with jax 0.11.2 (as on GPU machines).
An entry goes when the version that needs it does.
"""

import contextlib
import importlib.metadata
import warnings
from collections.abc import Iterator


def _release(package: str) -> tuple[int, ...]:
  """(major, minor) of an installed package."""
  version = importlib.metadata.version(package)
  return tuple(int(part) for part in version.split('.')[:2])


# XLA flags for programs that are compiled often and run for milliseconds.
# jaxlib 0.11 has dropped the second one with what it turned off, and ends a
# process that names a flag which it does not know.
FAST_COMPILE_FLAGS = ('--xla_backend_optimization_level=0',) + (
  ('--xla_cpu_use_fusion_emitters=false',) * (_release('jaxlib') < (0, 11))
)


@contextlib.contextmanager
def pallas_triton() -> Iterator[None]:
  """Silences the deprecation of JAX's Pallas Triton attention (jax >= 0.11).

  tokamax, which is named as its successor, is on no machine of CUDA images and
  takes no segment ids on every GPU; the kernel works unchanged until then.
  """
  with warnings.catch_warnings():
    warnings.filterwarnings(
      'ignore', '.*pallas.ops.gpu.attention is deprecated', DeprecationWarning
    )
    yield


@contextlib.contextmanager
def lowering_for_h100() -> Iterator[None]:
  """Lets Triton kernels be lowered on a machine without a GPU.

  jax 0.11 lowers a kernel for one kind of GPU and looks for it among the
  devices, or in an abstract mesh, with which cuDNN's attention in the same
  program cannot be lowered; jax 0.10 needs to know nothing.
  """
  if _release('jax') < (0, 11):
    yield
    return
  from jax._src.pallas.triton import gpu_info

  looks = gpu_info.get_gpu_info
  h100 = gpu_info.get_gpu_info_from_version(gpu_info.GpuVersion.H100)
  gpu_info.get_gpu_info = lambda: h100
  try:
    yield
  finally:
    gpu_info.get_gpu_info = looks
