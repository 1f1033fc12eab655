"""The ledger, on programs with known traffic."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax.parallel import sharding
from mtp_jax.planning import hlo, profile
from mtp_jax.train import step
from tests.support import ahead, runs, tiny

# Output of XLA:TPU: an async all-gather in three fusions of one chain, a
# reduce-scatter as a named computation, a loop condition with a constant, an
# array in VMEM, replica groups as a mesh, a list and an iota.
TPU = """\
HloModule jit_f, is_scheduled=true

%all-reduce-scatter.1 (input.1: f32[64,8]) -> f32[16,8] {
  %input.1 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[64,8]{1,0} all-reduce(%input.1), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice.1 = f32[16,8]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={16,8}
}

%start (p.0: bf16[4,8]) -> bf16[16,8] {
  %p.0 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%done (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%body (c: (s32[], bf16[4,8], f32[64,8])) -> (s32[], bf16[4,8], f32[64,8]) {
  %c = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[64,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %w = bf16[4,8]{1,0} get-tuple-element(%c), index=1
  %g = f32[64,8]{1,0} get-tuple-element(%c), index=2
  %fusion.1 = bf16[16,8]{1,0:T(8,128)S(1)} fusion(%w), kind=kCustom, calls=%start
  %fusion.2 = bf16[16,8]{1,0:T(8,128)S(1)} fusion(%w), kind=kCustom, calls=%done
  %kernel = f32[2]{0:S(1)} custom-call(%fusion.2), custom_call_target="tpu_custom_call", metadata={
"xprof_metadata":"{}"
}}, backend_config={}
  %fusion.3 = f32[16,8]{1,0:S(1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/inner/while/body/reshard"}
  ROOT %t = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[64,8]{1,0}) tuple(%i, %w, %g)
}

%condition (c.1: (s32[], bf16[4,8], f32[64,8])) -> pred[] {
  %c.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[64,8]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  %constant.5 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%j, %constant.5), direction=LT
}

ENTRY %main (x: bf16[4,8], y: f32[64,8]) -> f32[64,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[64,8]{1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %t.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[64,8]{1,0}) tuple(%zero, %x, %y)
  %while.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[64,8]{1,0}) while(%t.1), condition=%condition, body=%body, metadata={op_name="jit(f)/inner/while"}
  %y.1 = f32[64,8]{1,0} get-tuple-element(%while.1), index=2
  %sent = (f32[64,8]{1,0}, u32[], token[]) send(%y.1), channel_id=9, is_host_transfer=false
  ROOT %all-reduce.2 = f32[64,8]{1,0} all-reduce(%y.1), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
}
"""  # noqa: E501


def test_ledger_of_a_tpu_program():
  ledger = hlo.ledger(TPU)
  found = {(c.kind, c.group, c.times, c.bytes, c.loops): c.sent_bytes for c in ledger.collectives}
  loop = ('jit(f)/inner/while',)
  assert found == {
    ('all-gather', 4, 5, 256, loop): 5 * 256 * 3 / 4,
    ('reduce-scatter', 4, 5, 2048, loop): 5 * 2048 * 3 / 4,
    ('all-reduce', 4, 1, 2048, ()): 2 * 2048 * 3 / 4,
    ('send', 0, 1, 2048, ()): 2048,
  }
  assert ledger.sent_bytes(network=True) == 2048
  assert ledger.sent_bytes(network=False) == sum(found.values()) - 2048
  # In the loop: two fusions read w, one reads g; their outputs, and the operands of
  # the kernel, are in VMEM. At the end y is read and written.
  assert ledger.memory_bytes == 5 * (64 + 64 + 2048) + 2 * 2048


# The result of an async start includes its input; one branch of the conditional in
# the loop moves nothing.
STARTED = """\
%gather (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %gathered = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%p), replica_groups={{0,1}}
  ROOT %done = f32[8,4]{1,0} copy(%p)
}

%passed (q: f32[8,4]) -> f32[8,4] {
  ROOT %q = f32[8,4]{1,0} parameter(0)
}

%body (c: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %c = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%c), index=1
  %moved = ((f32[8,4]{1,0}), f32[8,4]{1,0}, u32[], u32[]) all-to-all-start(%x), replica_groups={{0,1,2,3}}
  %y = f32[8,4]{1,0} conditional(%i, %x, %x), branch_computations={%passed, %gather}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %y)
}

%condition (d: (s32[], f32[8,4])) -> pred[] {
  %d = (s32[], f32[8,4]{1,0}) parameter(0)
}

ENTRY %main (z: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %z = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %while = (s32[], f32[8,4]{1,0}) while(%z), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""  # noqa: E501


def test_ledger_of_async_operations_and_conditionals():
  ledger = hlo.ledger(STARTED)
  x = 8 * 4 * 4
  assert {(c.kind, c.times): c.sent_bytes for c in ledger.collectives} == {
    ('all-to-all', 6): 6 * x * 3 / 4,
    ('all-gather', 1): 2 * x / 2,
  }
  # Read and written: 2 x and two numbers by the all-to-all; 3 x by the gather, and
  # 2 x by the copy, in one of six iterations.
  assert ledger.memory_bytes == 6 * (2 * x + 8) + 3 * x + 2 * x


# Of XLA:TPU for TPU7x, whose SparseCores run collectives beside the program, and some gathers.
SPARSECORE = """\
HloModule jit_f, is_scheduled=true

%gather (p.0: bf16[4,8]) -> bf16[16,8] {
  %p.0 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p.0), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (w: bf16[4,8]) -> bf16[16,8] {
  %w = bf16[4,8]{1,0} parameter(0)
  %start = ((), (), (s32[1]{0:S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%gather
  %update = ((bf16[4,8]{1,0}), bf16[16,8]{1,0}) call-update(%start, %w)
  %all = bf16[16,8]{1,0} call-done(%update)
  ROOT %rows = bf16[16,8]{1,0} fusion(%all), kind=kCustom, calls=%gather_offload, backend_config={"estimated_cycles":"9223372036854775807"}
}
"""  # noqa: E501


def test_ledger_of_what_a_sparsecore_runs():
  found = hlo.ledger(SPARSECORE)
  # 3/4 of 16 x 8 x 2 bytes.
  assert found.by_kind() == {'all-gather': dict(count=1, sent_bytes=192.0)}
  assert found.cycles == 0  # unknown


def test_collective_that_nothing_runs_raises():
  """Or the plan would lack its bytes, in silence."""
  with pytest.raises(ValueError, match='gather has a collective'):
    hlo.ledger(SPARSECORE.replace('call-start', 'offload-start'))


def test_loop_without_trip_count_raises():
  endless = TPU.replace('%constant.5 = s32[]{:T(128)} constant(5)', '')
  with pytest.raises(ValueError, match='while.1'):
    hlo.ledger(endless)


def _mesh(n):
  return jax.make_mesh((n,), ('x',), axis_types=(AxisType.Auto,))


@functools.partial(jax.jit, static_argnames=('mesh', 'trips'))
def _program(x, *, mesh, trips):
  """Gathers 8 shards, sums and all-reduces, `trips` times."""

  def local(x):
    def body(total, _):
      whole = jax.lax.all_gather(x * total[0], 'x', tiled=True)
      return total + jax.lax.psum(whole[:4], 'x'), None

    return jax.lax.scan(body, jnp.ones(4), None, length=trips)[0]

  return jax.shard_map(local, mesh=mesh, in_specs=P('x'), out_specs=P(), check_vma=False)(x)


@pytest.mark.parametrize('trips', [3, 7])
def test_ledger_of_a_locally_compiled_program(trips):
  mesh = _mesh(8)
  x = jax.ShapeDtypeStruct((8 * 32,), jnp.float32, sharding=NamedSharding(mesh, P('x')))
  text = _program.lower(x, mesh=mesh, trips=trips).compile().as_text()
  kinds = hlo.ledger(text).by_kind()
  assert kinds['all-gather'] == dict(count=trips, sent_bytes=trips * 8 * 32 * 4 * 7 / 8)
  assert kinds['all-reduce'] == dict(count=trips, sent_bytes=trips * 2 * 16 * 7 / 8)


def _slices(x_LD, mesh=None):
  def body(total_D, x_D):
    return total_D + x_D * total_D, None

  return jax.lax.scan(body, jnp.ones(x_LD.shape[1:]), x_LD)[0]


def test_loop_over_slices_reads_the_array_once():
  L, D = 16, 4096
  x = jax.ShapeDtypeStruct((L, D), jnp.float32)
  ledger = hlo.ledger(jax.jit(_slices).lower(x).compile().as_text())
  # In each iteration a slice, the old and the new total, but not all of x.
  assert L * D * 4 <= ledger.memory_bytes <= 8 * L * D * 4


D, V = 48, 80


def _of_unembedding(text):
  """Returns the collectives of full D x V matrices: (gathers, reductions), each as
  (times, enclosing loops). XLA may reduce several in one operation."""
  found = [], []
  for c in hlo.ledger(text).collectives:
    whole = [a for a in c.arrays if sorted(a.dims)[-2:] == [D, V]]
    found[c.kind != 'all-gather'].extend([(c.times, len(c.loops))] * len(whole))
  return found


@pytest.mark.parametrize(
  'family, n, accumulate, schedule',
  [
    ('parallel', 1, 1, 'remat'),
    ('linear', 4, 2, 'remat'),
    ('parallel', 4, 2, 'interleaved'),
    ('linear', 8, 1, 'interleaved'),
  ],
)
def test_unembedding_is_communicated_once_per_micro_batch(family, n, accumulate, schedule):
  cfg = tiny.cfg(
    heads__family=family,
    heads__n=n,
    loss__backward=schedule,
    train__grad_accum_steps=accumulate,
    model__d_model=D,
    model__vocab_size=V,
    model__n_layers=n + 1,
    data__batch_size=8,
    mesh__fsdp=4,
  )
  mesh = tiny.mesh(cfg)
  with jax.set_mesh(mesh):
    text = step.trace(cfg, mesh, n).lower().compile().as_text()
  gathers, reductions = _of_unembedding(text)
  # One each for embedding and unembedding. Parameters are constant within a step:
  # XLA gathers them before the micro-batches.
  assert gathers == [(1, 0)] * 2
  # In no loop except that over micro-batches.
  assert reductions == [(accumulate, int(accumulate > 1))] * 2


def test_gradients_are_reduce_scattered_over_fsdp_then_all_reduced_over_data():
  """Never over both at once: XLA would reduce full arrays over all devices."""
  cfg = tiny.cfg(heads__n=2, mesh__data=2, mesh__fsdp=4)
  mesh = tiny.mesh(cfg)
  with jax.set_mesh(mesh):
    traced = step.trace(cfg, mesh, 2)
  found = {
    tuple(v.aval.sharding.spec.unreduced for v in (e.invars[0], e.outvars[0]))
    for e in tiny.equations(traced.jaxpr.jaxpr)
    if e.primitive.name == 'reshard' and e.invars[0].aval.sharding.spec.unreduced
  }
  both, data, none = (frozenset({'data', 'fsdp'}), frozenset({'data'}), frozenset())
  assert found == {(both, data), (data, none)}


SENT = """
import json, sys
from mtp_jax.planning import hlo, profile
from tests.support import ahead, tiny
text = ahead.tpu_step(tiny.cfg(
  heads__n=2, model__d_model=1024, model__vocab_size=2048, model__n_layers=3,
  data__batch_size=32, mesh__data=2, mesh__fsdp=8), 'v5e:4x4')
print(json.dumps([
  (c.kind, c.group, a.dims, c._replace(arrays=(a,)).sent_bytes)
  for c in hlo.ledger(text).collectives for a in c.arrays]))
"""


@pytest.mark.slow
def test_gradient_bytes_sent_on_2_x_8_mesh():
  """For the D x V gradients of embedding and unembedding: within 10% of 7/8 of an
  array over fsdp and 2 x 1/2 of a shard over data, each."""
  pytest.importorskip('libtpu')
  out = runs.printed(SENT, variables=ahead.VARIABLES)
  bytes_DV, sent = 4 * 1024 * 2048, 0.0
  for kind, _, dims, n in json.loads(out):
    if kind != 'all-gather' and math.prod(dims) in (2**21, 2**18):
      sent += n
  assert sent <= 1.1 * 2 * (7 / 8 + 1 / 8) * bytes_DV


# Replica groups in the output of XLA, for a TPU (v5e:4x4, data=2, fsdp=8) and for
# NVIDIA GPUs (two nodes of eight).
@pytest.mark.parametrize(
  'written, size',
  [
    ("mesh['data'=2,'fsdp'=8,'tensor'=1] {'data','fsdp'}", 16),
    ("mesh['data'=2,'fsdp'=8,'tensor'=1] {'fsdp'}, dimensions={0}", 8),
    (
      "mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], device_ids=([2,8]T(1,0))"
      " {'axis_0'}, use_global_device_ids=true",
      8,
    ),
    ("mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_0','axis_2'}", 16),
    ("mesh['a'=4,'b'=4], device_ids=([16]) {'a':(2)2,'b'}", 8),
    ("mesh['a'=4] {}, dimensions={0}", 1),
    ('[2,8]<=[16], dimensions={0}', 8),
    ('[8,2]<=[2,8]T(1,0), use_global_device_ids=true', 2),
    ('{{0,1,2,3},{4,5,6,7}}, to_apply=%add', 4),
  ],
)
def test_replica_groups_are_parsed_in_all_notations(written, size):
  text = f"""\
HloModule jit_f

ENTRY %main (x: f32[4,8]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  ROOT %r = f32[4,8]{{1,0}} all-reduce(%x), replica_groups={written}
}}
"""
  (found,) = hlo.ledger(text).collectives
  assert (found.group, found.sent_bytes) == (size, 2 * (size - 1) / size * 4 * 8 * 4)


@pytest.mark.parametrize('written', ['{}', "{'a'}", 'mesh[a]'])
def test_unknown_replica_groups_raise(written):
  text = f"""\
HloModule jit_f

ENTRY %main (x: f32[4,8]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  ROOT %r = f32[4,8]{{1,0}} all-reduce(%x), replica_groups={written}
}}
"""
  with pytest.raises(ValueError, match='unknown replica groups of r'):
    hlo.ledger(text)


def test_logits_are_never_gathered_over_a_sharded_vocabulary():
  cfg = tiny.cfg(model__d_model=D, model__vocab_size=V, mesh__tensor=2, mesh__fsdp=2)
  mesh = sharding.make_mesh(cfg, jax.devices()[:4])
  with jax.set_mesh(mesh):
    rows = sharding.put_batch(mesh, tiny.batch(cfg))
    loss = tiny._value_and_grad.lower(tiny.model(cfg, mesh), rows, c=cfg, n_active=cfg.heads.n)
    text = loss.compile().as_text()
  for c in hlo.ledger(text).collectives:
    for array in c.arrays:
      logits = V in array.dims and cfg.data.seq_len in array.dims
      assert not logits, (c.kind, array)


TPU_PRODUCTS = """\
HloModule step, is_scheduled=true

%fused (p0: bf16[64,32], p1: bf16[32,128]) -> bf16[64,128] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,128]{1,0} parameter(1)
  ROOT %c = bf16[64,128]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%body (t: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %t = (s32[], bf16[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%t), index=1
  %w = bf16[32,128]{1,0} constant({...})
  %f = bf16[64,128]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused,
      metadata={op_name="jit(step)/transpose(jvp(trunk))/while/body/rematted_computation/mlp/dot_general"},
      backend_config={"window_config":{"estimated_cycles":"700"}}
  ROOT %r = (s32[], bf16[64,32]{1,0}) tuple(%i, %x)
}

%cond (t: (s32[], bf16[64,32])) -> pred[] {
  %t = (s32[], bf16[64,32]{1,0}) parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %main (a: bf16[4,8,16], b: bf16[4,16,8], z: (s32[], bf16[64,32])) -> bf16[4,8,8] {
  %a = bf16[4,8,16]{2,1,0} parameter(0)
  %b = bf16[4,16,8]{2,1,0} parameter(1)
  %z = (s32[], bf16[64,32]{1,0}) parameter(2)
  %loop = (s32[], bf16[64,32]{1,0}) while(%z), condition=%cond, body=%body,
      backend_config={"known_trip_count":{"n":"3"}}
  ROOT %c2 = bf16[4,8,8]{2,1,0} convolution(%a, %b), window={size=4 pad=3_3},
      dim_labels=0bf_0io->0bf, metadata={op_name="jit(step)/jvp(heads)/ce/dot_general"},
      backend_config={"estimated_cycles":"50"}
}
"""


def test_cycles_and_flops_of_a_tpu_program_by_hand():
  found = hlo.ledger(TPU_PRODUCTS)
  assert found.cycles == 3 * 700 + 50
  of = {o.name: o for o in found.operations}
  assert of['f'].times == 3 and of['f'].flops == 2 * 64 * 128 * 32
  # A window of 4 over 4 places, 3 of padding at each end: four places see 4, 3, 2, 1 and so
  # on, ten pairs of the sixteen.
  assert of['c2'].flops == 2 * (8 * 8) * 16 * 10
  recomputed, forward = profile.by_scope(found)
  assert recomputed.scope == 'recomputed trunk/mlp/dot_general' and recomputed.cycles == 2100
  assert recomputed.flops == 3 * of['f'].flops
  assert forward.scope == 'forward heads/ce/dot_general' and forward.cycles == 50
