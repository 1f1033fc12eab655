"""Programs for accelerators, made where there is none.

For CUDA they are lowered only. For a TPU, libtpu compiles them; it reads its
settings when it is loaded, hence a process of its own, with VARIABLES.
"""

import re

import jax
from jax.experimental import topologies

from mtp_jax.config import schema
from mtp_jax.parallel import chips, sharding, versions
from mtp_jax.train import step

VARIABLES = dict(
  JAX_PLATFORMS='cpu',
  XLA_FLAGS='',  # those of the tests are for CPU
  JAX_ENABLE_COMPILATION_CACHE='false',  # these programs cannot be loaded
)


def tpu_step(c: schema.Config, topology: str = 'v5e:2x2') -> str:
  """The training step, compiled for the chips of a topology, as HLO."""
  chips.answer_libtpu()
  described = topologies.get_topology_desc(platform='tpu', topology_name=topology)
  mesh = sharding.make_mesh(c, described.devices)
  with jax.set_mesh(mesh):
    return step.trace(c, mesh, c.heads.n).lower().compile().as_text()


def cuda_step(c: schema.Config, mesh) -> str:
  """The training step, lowered for as many GPUs as mesh has, as StableHLO."""
  with jax.set_mesh(mesh), versions.lowering_for_h100():
    traced = step.trace(c, mesh, c.heads.n)
    return traced.lower(lowering_platforms=('cuda',)).as_text()


def squares(text: str, T: int) -> list[str]:
  """Shapes of a program's arrays in which T is a dimension twice: f32[2,T,T]
  as HLO writes them, tensor<2xTxTxf32> as StableHLO does."""
  shapes = re.findall(r'\w+\[[\d,]+\]|tensor<[\dx]+\w+>', text)
  return sorted({s for s in shapes if re.findall(r'\d+', s).count(str(T)) >= 2})
