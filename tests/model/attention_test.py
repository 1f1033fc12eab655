"""Attention kernels against the reference, and what they are compiled to."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import fields, schema
from mtp_jax.config import kernels as kernels_config
from mtp_jax.model import attention, flash
from mtp_jax.parallel import sharding
from tests.support import ahead, kernels, runs, tiny

INTERPRETED = {
  name: functools.partial(attention.KERNELS[name], interpret=True) for name in schema.KERNELS
}


def _of(kernel, window=0, **model):
  """Returns kernel(q, k, v, segments), of a window and options of the model."""

  def attend(q_BTNH, k_BSGH, v_BSGH, segment_BT):
    N, H = q_BTNH.shape[2:]
    m = schema.ModelConfig(d_model=N * H, n_attn_heads=N, **model)
    return kernel(attention.Operands(q_BTNH, k_BSGH, v_BSGH, segment_BT), window, m)

  return attend


REFERENCE = _of(attention.reference)
KERNELS = {name: _of(kernel) for name, kernel in INTERPRETED.items()}


def _arrays(B=2, T=128, N=4, R=1, H=16, dtype='float32', packed=True):
  """q, k, v, segments, and what the output is weighed with."""
  rng = np.random.default_rng(0)
  G = N // R
  q_BTNH, k_BTGH, v_BTGH, weight_BTNH = (
    jnp.array(rng.normal(size=(B, T, heads, H)), dtype) for heads in (N, G, G, N)
  )
  start_BT = rng.random((B, T)) < (0.04 if packed else 0)
  segment_BT = jnp.array(np.cumsum(start_BT, axis=1), jnp.int32)
  return (q_BTNH, k_BTGH, v_BTGH), segment_BT, weight_BTNH


def _outputs(attend, qkv, segment_BT, weight_BTNH):
  """The output, and gradients of q, k and v."""

  @jax.jit
  def f(qkv, segment_BT):
    out_BTNH, vjp = jax.vjp(lambda *qkv: attend(*qkv, segment_BT), *qkv)
    return out_BTNH, *vjp(weight_BTNH)

  return [np.asarray(x, np.float32) for x in f(qkv, segment_BT)]


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize(
  'shape',
  [
    dict(R=1, H=64),
    dict(R=2, H=24, T=256),  # two blocks of flash; a width that it pads
    dict(R=4, H=16, dtype='bfloat16'),
    dict(R=4, H=32, packed=False),
    dict(R=1, H=128, B=1, N=2, dtype='bfloat16', packed=False),
  ],
  ids=lambda shape: '-'.join(f'{k}{v}' for k, v in shape.items()),
)
def test_kernel_equals_reference(kernel, shape):
  args = _arrays(**shape)
  found = _outputs(KERNELS[kernel], *args)
  # Of bfloat16 inputs, against the reference in float32 throughout.
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), (args[0], args[2]))
  wanted = _outputs(REFERENCE, exact[0], args[1], exact[1])
  digits = 2e-2 if shape.get('dtype') == 'bfloat16' else 2e-5
  for got, want in zip(found, wanted, strict=True):
    assert got.shape == want.shape
    largest = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=digits, atol=digits * largest)


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('window, packed', [(0, True), (9, True), (100, False), (200, False)])
@pytest.mark.parametrize('cap', [0, 2])
def test_kernel_with_window_and_cap_equals_reference(kernel, window, packed, cap):
  """Windows below the length of documents, within a block of 128 and beyond it."""
  options = dict(window=window, attn_softcap=cap, attn_scale=0.5)
  args = _arrays(B=1, T=256, N=2, R=2, H=16, packed=packed)
  found = _outputs(_of(INTERPRETED[kernel], **options), *args)
  for got, want in zip(found, _outputs(_of(attention.reference, **options), *args), strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize('shape', [dict(H=64, N=3, R=3), dict(H=80), dict(H=256)])
@pytest.mark.parametrize('window', [0, 1, 129])
def test_flash_skips_blocks_that_no_query_sees(shape, window):
  """Tiles of every width; documents and windows that end within and at blocks."""
  qkv, _, weight_BTNH = _arrays(**dict(B=3, T=384, N=1) | shape)
  ends = [], [127, 128, 300], [256]
  segment_BT = jnp.array([np.isin(np.arange(384), at).cumsum() for at in ends], jnp.int32)
  found, wanted = (
    _outputs(_of(kernel, window=window), qkv, segment_BT, weight_BTNH)
    for kernel in (INTERPRETED['flash'], attention.reference)
  )
  for got, want in zip(found, wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * max(np.abs(want).max(), 1))


def test_flash_reads_no_key_that_its_query_does_not_see():
  """Where a block is skipped, not even a NaN in it matters."""
  qkv, _, weight_BTNH = _arrays(B=1, T=640, N=2, R=2, H=64)
  segment_BT = jnp.array((np.arange(640) >= 384)[None], jnp.int32)
  flash = _of(INTERPRETED['flash'], window=40)
  clean = _outputs(flash, qkv, segment_BT, weight_BTNH)
  bad = [x.at[:, :128].set(jnp.nan) for x in qkv[1:]]
  found = _outputs(flash, (qkv[0], *bad), segment_BT, weight_BTNH)
  for got, want in zip(found, clean, strict=True):
    np.testing.assert_array_equal(got[:, 256:], want[:, 256:])


def test_flash_with_the_tiles_of_an_a100_equals_reference(monkeypatch):
  qkv, segment_BT, weight_BTNH = _arrays(B=1, T=256, N=2, H=64)
  wanted = _outputs(REFERENCE, qkv, segment_BT, weight_BTNH)
  tiles = flash._tiles(64, jnp.bfloat16)
  monkeypatch.setattr(sharding, 'device_kind', lambda: 'NVIDIA A100-SXM4-80GB')
  assert flash._tiles(64, jnp.bfloat16) != tiles
  # Of bfloat16's tiles, with values of float32.
  monkeypatch.setattr(flash, '_tiles', lambda H, _, of=flash._tiles: of(H, jnp.bfloat16))
  found = _outputs(_of(INTERPRETED['flash']), qkv, segment_BT, weight_BTNH)
  for got, want in zip(found, wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize('window', [0, 20])
def test_flash_with_sinks_equals_reference(window):
  qkv, segment_BT, weight_BTNH = _arrays(B=1, T=128, N=4, R=2, H=16)
  sink_N = jnp.array([-1.0, 0.5, 3.0, 8.0])
  m = schema.ModelConfig(d_model=64, n_attn_heads=4, attn_sink=True)

  def outputs(kernel):
    def attend(*x):
      return kernel(attention.Operands(*x[:3], segment_BT, x[3]), window, m)

    out, vjp = jax.vjp(attend, *qkv, sink_N)
    return [out, *vjp(weight_BTNH)]

  for got, want in zip(outputs(INTERPRETED['flash']), outputs(attention.reference), strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize('T', [384, 512, 1024])
def test_splash_block_sizes(T):
  """384 takes blocks of 128, the others one and two of 512."""
  qkv, segment_BT, _ = _arrays(B=1, T=T, N=1, H=8)
  np.testing.assert_allclose(
    KERNELS['splash'](*qkv, segment_BT), REFERENCE(*qkv, segment_BT), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('sizes', [(2, 2, 2), (8, 1, 1)], ids=str)
def test_sharded_kernel_equals_reference(monkeypatch, kernel, sizes):
  shards = []

  def local(x, **kwargs):
    shards.append([a.shape for a in x[:4]])
    return INTERPRETED[kernel](x, **kwargs)

  monkeypatch.setitem(attention.KERNELS, kernel, local)
  data, fsdp, tensor = sizes
  B = 8 // tensor
  qkv, segment_BT, weight_BTNH = _arrays(B=B, R=2)
  wanted = _outputs(REFERENCE, qkv, segment_BT, weight_BTNH)
  c = tiny.cfg(data__seq_len=128, model__attention=kernel, model__d_model=64, data__batch_size=B)
  m = tiny.mesh(tiny.cfg(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor))
  with jax.set_mesh(m):
    q, kv = (sharding.pspec('batch', None, heads, None) for heads in ('attn_heads', 'kv_heads'))
    rows = sharding.pspec('batch', None)
    placed = jax.tree.map(
      lambda x, spec: jax.device_put(x, jax.NamedSharding(m, spec)),
      (qkv, segment_BT, weight_BTNH),
      ((q, kv, kv), rows, q),
    )
    found = _outputs(lambda *x: attention.attend(attention.Operands(*x), 0, c), *placed)
  for got, want in zip(found, wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  b = B // (data * fsdp)
  assert shards[0] == [(b, 128, 4 // tensor, 16), *2 * [(b, 128, 2 // tensor, 16)], (b, 128)]


# kernel, Config fields that it does not support
LIMITS = [
  ('splash', {'data__seq_len': 64}),
  ('splash', {'data__seq_len': 192}),
  ('flash', {'data__seq_len': 192}),
  ('flash', {'model__d_model': 32}),  # a head width of 8
  ('flash', {'model__d_model': 4 * 320}),
  ('splash', {'model__attn_sink': True}),
]


@pytest.mark.parametrize('kernel, changes', LIMITS, ids=str)
def test_unsupported_shapes_are_refused_and_auto_falls_back(monkeypatch, kernel, changes):
  monkeypatch.setattr(schema, 'KERNELS', {kernel: 'cpu'})
  fits = dict(data__seq_len=128, model__d_model=64)
  with jax.set_mesh(tiny.mesh(tiny.cfg())):
    assert attention.chosen(tiny.cfg(**fits).model, fits['data__seq_len']) == kernel
    other = tiny.cfg(**fits | changes)
    assert attention.chosen(other.model, other.data.seq_len) == 'reference'
  with pytest.raises(fields.ConfigError, match=f'^--model.attention={kernel}:'):
    tiny.cfg(**fits | changes, model__attention=kernel)
  assert tiny.cfg(**fits, model__attention=kernel)


def test_fallback_to_all_pairs_of_scores_is_stated():
  fits = dict(data__seq_len=128, model__d_model=64)
  c = tiny.cfg(**fits, model__window=64, model__layer_types='sliding,full', model__attn_sink=True)
  assert kernels_config.fallbacks(c, 'gpu') == kernels_config.fallbacks(c, 'cpu') == []
  scores = 'all pairs of scores (128 x 128 per head) are in memory, as the kernel splash does'
  assert kernels_config.fallbacks(c, 'tpu') == [
    f'attention of layers without a window: {scores} not support --model.attn_sink',
    f'attention of layers with a window of 64: {scores} not support --model.attn_sink',
  ]


def test_auto_without_a_platform_kernel_is_the_reference():
  c = tiny.cfg(data__seq_len=128, model__d_model=64)
  assert attention.chosen(c.model, 128) == 'reference'  # nor without a mesh
  with jax.set_mesh(tiny.mesh(c)):
    assert attention.chosen(c.model, 128) == 'reference'


@pytest.mark.parametrize(
  'kernel, T, calls',
  [('flash', 4096, {'triton'}), ('flash', 8192, {'triton'}), ('reference', 4096, set())],
)
def test_step_for_nvidia_has_no_t_by_t_array(kernel, T, calls):
  m = tiny.mesh(tiny.cfg(mesh__fsdp=2, mesh__tensor=2))
  text = ahead.cuda_step(kernels.step_cfg(kernel, T), m)
  assert {name for name in ('triton', 'fmha') if name in text} == calls
  assert not ahead.squares(text, T)
  assert bool(ahead.squares(text, T // attention.BLOCKS)) == (kernel == 'reference')


def test_layers_of_several_windows_select_no_branch_on_nvidia():
  """A conditional would make the host wait for the GPU, in every layer."""
  m = tiny.mesh(tiny.cfg(mesh__fsdp=2, mesh__tensor=2))
  c = kernels.step_cfg('flash', 512)
  c = schema.replace(c, **{'model.window': 128, 'model.layer_types': 'sliding,full'})
  text = ahead.cuda_step(c, m)
  assert 'triton' in text and not re.search('stablehlo.(case|if)', text)


@pytest.mark.parametrize('window', [0, 1, 9, 64])
def test_begin_of_a_traced_window_is_that_of_the_window(window):
  segment_BT = jnp.cumsum(jnp.arange(64)[None] % 23 == 0, axis=1)
  begin_BT = np.array(flash.begins(segment_BT, window))
  by_hand = [max(t - t % 23, t - window + 1 if window else 0) for t in range(64)]
  assert begin_BT.tolist() == [by_hand]
  np.testing.assert_array_equal(jax.jit(flash.begins)(segment_BT, window), begin_BT)


TPU = """
import sys
from mtp_jax.model import attention
from tests.support import ahead, kernels
kernel, T = sys.argv[1], int(sys.argv[2])
text = ahead.tpu_step(kernels.step_cfg(kernel, T))
found = [len(ahead.squares(text, n)) for n in (T, T // attention.BLOCKS)]
print('tpu_custom_call' in text, *found)
"""


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
@pytest.mark.parametrize(
  'kernel, T',
  [
    ('auto', 1024),  # two blocks; the longer, the longer it compiles
    pytest.param('splash', 8192, marks=pytest.mark.slow),
    pytest.param('reference', 4096, marks=pytest.mark.slow),
  ],
)
def test_step_for_tpu_has_no_t_by_t_array(kernel, T):
  out = runs.printed(TPU, kernel, str(T), variables=ahead.VARIABLES)
  called, squares, of_blocks = out.split()
  assert (called, squares) == (str(kernel != 'reference'), '0')
  if kernel == 'reference':
    assert int(of_blocks) > 0


@pytest.mark.parametrize('T, window', [(256, 0), (200, 70), (129, 1), (65, 0)])
def test_reference_in_blocks_equals_that_of_one_block(monkeypatch, T, window):
  """Value and gradients; packed rows, blocks that do not divide the row."""
  qkv, segment_BT, weight_BTNH = _arrays(T=T, R=2)
  found = _outputs(_of(attention.reference, window=window), qkv, segment_BT, weight_BTNH)
  monkeypatch.setattr(attention, 'QUERIES', T)
  wanted = _outputs(_of(attention.reference, window=window), qkv, segment_BT, weight_BTNH)
  for got, want in zip(found, wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_t_by_t_arrays_are_detected_in_hlo_and_stablehlo():
  text = 'f32[2,64,64]{2,1,0} bf16[64,4] tensor<64x1x64xbf16> tensor<64xi1>'
  assert ahead.squares(text, 64) == ['f32[2,64,64]', 'tensor<64x1x64xbf16>']
