"""parallel/sharding.py: the values of a gathered parameter."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.parallel import sharding
from tests.support import ahead, runs, tiny

# A tie to even, down and up; above a tie; the largest, infinity; subnormals, a zero.
SPECIAL = (
  *(0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000),
  *(0x00008000, 0x80000001, 0x80000000),
)


@pytest.mark.parametrize(
  'axes, shape',
  [(('embed', 'mlp'), (64, 64)), (('embed', 'attn_heads', None), (64, 8, 8))],
  ids=['matrix', 'heads'],
)
def test_a_weight_is_rounded_as_by_a_cast(axes, shape):
  bits = np.random.default_rng(0).integers(0, 2**32, size=shape, dtype=np.uint32)
  bits.flat[: len(SPECIAL)] = SPECIAL
  w = bits.view(np.float32)
  w = np.where(np.isnan(w), 0, w)
  mesh = tiny.mesh(tiny.cfg())
  with jax.set_mesh(mesh):
    at_rest = jax.device_put(w, jax.NamedSharding(mesh, sharding.pspec(*axes)))
    got = sharding.gather(at_rest, axes, 'bfloat16', 'float32').astype(jnp.bfloat16)
  np.testing.assert_array_equal(
    np.array(got).view(np.uint16), w.astype(jnp.bfloat16).view(np.uint16)
  )


TPU = """
import re
from tests.support import ahead, kernels, tiny
of = dict(model__n_layers=6, model__d_ff=192, data__seq_len=512, data__batch_size=4)
text = ahead.tpu_step(tiny.cfg(**kernels.STEP | of | dict(mesh__fsdp=4, mesh__tensor=1)))
print(*(dtype + '[4,16,192]' in text for dtype in ('f32', 'bf16')))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_a_tpu_casts_a_layer_at_a_time():
  """No stack of all layers in bfloat16 is in memory along with that in float32."""
  out = runs.printed(TPU, variables=ahead.VARIABLES)
  assert out.split() == ['True', 'False']
