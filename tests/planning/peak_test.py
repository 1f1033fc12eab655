"""Temporaries at the peak, of programs whose peak is computed by hand and of compiled ones."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mtp_jax.planning import hlo, peak
from tests.support import runs

KIB = 2**10


def _found(text: str) -> list[tuple[str, float]]:
  """Returns (name, KiB) of the buffers at the peak, by name."""
  return sorted((b.name, b.bytes / KIB) for b in peak.of_program(text).buffers)


@pytest.mark.parametrize(
  'dtype, dims, layout, size',
  [
    ('f32', (32, 64), '', 32 * 64 * 4),
    ('f32', (32, 64), '{1,0}', 32 * 64 * 4),
    ('f32', (32, 64), '{1,0:T(8,128)}', 32 * 128 * 4),
    ('f32', (32, 64), '{0,1:T(8,128)}', 64 * 128 * 4),  # 32 is the minor one
    ('f32', (3, 5, 130), '{2,1,0:T(8,128)}', 3 * 8 * 256 * 4),
    ('bf16', (3, 5, 130), '{2,1,0:T(8,128)(2,1)}', 3 * 8 * 256 * 2),
    ('bf16', (1, 128), '{1,0:T(1,128)(2,1)}', 2 * 128 * 2),  # pairs of rows
    ('f32', (100,), '{0:T(1024)}', 1024 * 4),
    ('f32', (100,), '{0:T(1,128)}', 128 * 4),  # of a scalar's or vector's rank 2
    ('s32', (), '{:T(128)}', 128 * 4),
    ('s4', (16, 2), '{1,0}', 16),
    ('pred', (8, 128), '{1,0:T(8,128)(4,1)}', 1024),
    ('token', (), '', 0),
  ],
)
def test_bytes_have_layout_padding(dtype, dims, layout, size):
  assert peak.padded_bytes(hlo.Array(dtype, dims, False, layout)) == size


# f32[256] is 1 KiB.
STRAIGHT = """\
HloModule straight, is_scheduled=true

ENTRY %main (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  %k = f32[256]{0} constant({...})
  %a = f32[256]{0} custom-call(%p, %k), custom_call_target="f", metadata={op_name="jit(step)/jvp(trunk)/qkv/f"}
  %b = f32[512]{0} custom-call(%a), custom_call_target="f", metadata={op_name="jit(step)/jvp(trunk)/mlp/f"}
  %v = f32[2,256]{1,0} bitcast(%b)
  %c = f32[256]{0} custom-call(%a), custom_call_target="f"
  %d = f32[256]{0} custom-call(%v), custom_call_target="f"
  ROOT %e = f32[256]{0} custom-call(%c, %d), custom_call_target="f"
}
"""  # noqa: E501


def test_buffer_is_live_from_its_definition_to_its_last_use():
  # At %c a (1), b (2) and c (1); at %d b, c and d; the result is no temporary.
  assert _found(STRAIGHT) == [('a', 1), ('b', 2), ('c', 1)]
  found = peak.of_program(STRAIGHT)
  assert found.bytes == 4 * KIB
  assert found.largest()[0] == dict(shape='f32[512]', bytes=2 * KIB, scope='forward trunk/mlp/f')
  # An operand names what has no name of its own.
  assert found.buffers[2].scope == 'forward trunk/qkv/f'
  lines = peak.lines(found, 2**20)
  assert lines[1].endswith(' 0.00 MiB; the compiler states 1.00 MiB')
  assert len(lines) == 3 + 3


def test_arguments_constants_and_results_are_no_temporaries():
  text = STRAIGHT.replace('custom-call(%c, %d)', 'custom-call(%p, %p)')
  text = text.replace('custom-call(%a), custom_call_target="f"', 'custom-call(%p)', 3)
  assert _found(text.replace('(%v)', '(%k)')) == [('b', 2)]


# A loop whose state is an accumulator, updated in place, an argument that it reads, and a
# stack of rows, of which an iteration writes one.
LOOP = """\
HloModule loop, is_scheduled=true

%write (p0: f32[4,256], p1: f32[256], p2: s32[]) -> f32[4,256] {
  %p0 = f32[4,256]{1,0} parameter(0)
  %p1 = f32[256]{0} parameter(1)
  %row = f32[1,256]{1,0} bitcast(%p1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = f32[4,256]{1,0} dynamic-update-slice(%p0, %row, %p2, %zero)
}

%body (s: (s32[], f32[512], f32[4,256])) -> (s32[], f32[512], f32[4,256]) {
  %s = (s32[], f32[512]{0}, f32[4,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %sum = f32[512]{0} get-tuple-element(%s), index=1
  %rows = f32[4,256]{1,0} get-tuple-element(%s), index=2
  %x = f32[1024]{0} custom-call(%sum), custom_call_target="f", metadata={op_name="jit(step)/transpose(jvp(heads))/ce/f"}
  %row = f32[256]{0} custom-call(%x), custom_call_target="f"
  %new = f32[512]{0} custom-call(%sum, %x), custom_call_target="f"
  %written = f32[4,256]{1,0} fusion(%rows, %row, %i), kind=kLoop, calls=%write
  ROOT %t = (s32[], f32[512]{0}, f32[4,256]{1,0}) tuple(%i, %new, %written)
}

%condition (s: (s32[], f32[512], f32[4,256])) -> pred[] {
  %s = (s32[], f32[512]{0}, f32[4,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(4)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  %zero = s32[] constant(0)
  %held = f32[768]{0} custom-call(%p), custom_call_target="f"
  %acc = f32[512]{0} broadcast(%zero), dimensions={}
  %stack = f32[4,256]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %t = (s32[], f32[512]{0}, f32[4,256]{1,0}) tuple(%zero, %acc, %stack)
  %loop = (s32[], f32[512]{0}, f32[4,256]{1,0}) while(%t), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp(trunk)/while"}
  %rows = f32[4,256]{1,0} get-tuple-element(%loop), index=2
  %u = f32[256]{0} custom-call(%rows, %held), custom_call_target="f"
  ROOT %out = f32[256]{0} custom-call(%u), custom_call_target="f"
}
"""  # noqa: E501


def test_loop_adds_the_temporaries_of_its_body_to_what_is_live_around_it():
  # Around it: held 3, its state 2 + 4. In an iteration x 4 and row 1; new is the accumulator.
  found = peak.of_program(LOOP)
  assert _found(LOOP) == [('acc', 2), ('held', 3), ('row', 1), ('stack', 4), ('x', 4)]
  scopes = {b.name: b.scope for b in found.buffers}
  assert scopes['x'] == 'backward heads/ce/f'
  assert scopes['stack'] == 'forward trunk'  # of the loop that reads it


@pytest.mark.parametrize(
  'update',
  [
    'fusion(%stack, %acc, %zero), kind=kLoop, calls=%write',
    'dynamic-update-slice(%stack, %acc, %zero)',
    'custom-call(%stack, %acc), custom_call_target="f", output_to_operand_aliasing={{}: (0, {})}',
  ],
)
def test_slice_is_updated_in_place(update):
  line = next(line for line in LOOP.splitlines() if '%loop =' in line)
  text = LOOP.replace(line, f'  %loop = f32[4,256]{{1,0}} {update}')
  text = text.replace('get-tuple-element(%loop), index=2', 'bitcast(%loop)')
  assert _found(text) == [('acc', 2), ('held', 3), ('stack', 4)]
  apart = text.replace(update, 'custom-call(%stack, %acc), custom_call_target="f"')
  assert _found(apart) == [('acc', 2), ('held', 3), ('loop', 4), ('stack', 4)]


TPU = """\
HloModule tpu, is_scheduled=true

ENTRY %main (p: f32[32,64]) -> f32[32,64] {
  %p = f32[32,64]{1,0:T(8,128)} parameter(0)
  %a = f32[32,64]{1,0:T(8,128)} custom-call(%p), custom_call_target="f"
  %fast = f32[32,64]{1,0:T(8,128)S(1)} custom-call(%a), custom_call_target="f"
  %start = (f32[32,64]{1,0:T(8,128)S(1)}, f32[32,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %out = (f32[32,64]{1,0:T(8,128)}, f32[32,64]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%fast)
  %done = f32[32,64]{1,0:T(8,128)S(1)} copy-done(%start)
  %back = f32[32,64]{1,0:T(8,128)} copy-done(%out)
  %sum = f32[32,64]{1,0:T(8,128)} add(%back, %done), backend_config={"aliasing_operands":{"lists":[{"indices":["0","2"]}]}}
  ROOT %r = f32[32,64]{1,0:T(8,128)} custom-call(%sum), custom_call_target="f"
}
"""  # noqa: E501


def test_vmem_takes_none_and_rows_are_padded():
  # 32 rows of 128 floats. A copy to VMEM reads a until it is done; one from VMEM writes as soon
  # as it starts. The sum takes the place of its first operand, as stated.
  assert _found(TPU) == [('a', 16), ('out', 16)]
  unstated = TPU.replace('"indices":["0","2"]', '')
  assert _found(unstated) == [('a', 16), ('out', 16)]
  alone = TPU.replace('(%a)\n', '(%p)\n')
  assert peak.of_program(alone).bytes == 16 * KIB
  assert _found(unstated.replace('(%a)\n', '(%p)\n')) == [('out', 16), ('sum', 16)]


def test_spaces_of_other_devices_are_memory_except_that_of_the_host():
  text = TPU.replace(':T(8,128)', ':').replace('S(2)', '').replace('{:}', '').replace(':}', '}')
  assert ('fast', 8) in _found(text)  # of collectives, on a GPU
  assert ('fast', 8) not in _found(text.replace('S(1)', 'S(5)'))


def test_async_collectives_and_conditionals():
  text = """\
HloModule f, is_scheduled=true

%then (q: f32[256]) -> f32[256] {
  %q = f32[256]{0} parameter(0)
  %w = f32[1024]{0} custom-call(%q), custom_call_target="f"
  ROOT %z = f32[256]{0} custom-call(%w), custom_call_target="f"
}

%else (q: f32[256]) -> f32[256] {
  %q = f32[256]{0} parameter(0)
  ROOT %z = f32[256]{0} negate(%q)
}

ENTRY %main (p: f32[256], c: pred[]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  %c = pred[] parameter(1)
  %a = f32[256]{0} custom-call(%p), custom_call_target="f"
  %start = ((f32[256]{0}), (f32[2048]{0})) all-gather-start(%a), replica_groups={{0,1}}, dimensions={0}
  %done = f32[2048]{0} all-gather-done(%start)
  %b = f32[256]{0} custom-call(%done), custom_call_target="f"
  %if = f32[256]{0} conditional(%c, %b, %b), true_computation=%then, false_computation=%else
  ROOT %r = f32[256]{0} custom-call(%if, %a), custom_call_target="f"
}
"""  # noqa: E501
  assert _found(text) == [('a', 1), ('b', 1), ('start', 8)]
  # Of the dearer branch: w, whose result is the conditional's.
  small = text.replace('f32[2048]', 'f32[512]')
  assert _found(small) == [('a', 1), ('b', 1), ('if', 1), ('w', 4)]


TOLERANCE = 0.1  # of what the compiler allocates


SPARSECORE = """\
HloModule offloaded, is_scheduled=true

%gather (q: f32[512]) -> f32[1024] {
  %q = f32[512]{0} parameter(0)
  ROOT %all-gather.1 = f32[1024]{0} all-gather(%q), replica_groups={{0,1}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[256]) -> f32[256] {
  %p = f32[256]{0:T(256)} parameter(0)
  %start = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%gather
  %a = f32[512]{0:T(256)} custom-call(%p), custom_call_target="f"
  %update = ((f32[512]{0:T(256)}), f32[1024]{0:T(256)}) call-update(%start, %a)
  %all = f32[1024]{0:T(256)} call-done(%update)
  ROOT %c = f32[256]{0:T(256)} custom-call(%all), custom_call_target="f"
}
"""  # noqa: E501


def test_async_call_of_a_sparsecore_has_one_operand_and_one_result():
  """The operand comes with the update, whose type has both."""
  assert _found(SPARSECORE) == [('a', 2.0), ('update', 4.0)]


def _step(w, x):
  """A step with a loop over layers, whose activations are saved for the backward pass."""

  def loss(w):
    def layer(x, w):
      return x + jnp.tanh(x @ w['up']) @ w['down'], None

    return jnp.sum(jnp.square(jax.lax.scan(layer, x, w)[0]))

  return jax.tree.map(lambda w, g: w - 0.1 * g, w, jax.grad(loss)(w))


def _compiled(sharding=None):
  shapes = dict(up=(6, 256, 512), down=(6, 512, 256))
  args = {k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for k, s in shapes.items()}
  x = jax.ShapeDtypeStruct((8192, 256), jnp.float32, sharding=sharding)
  return jax.jit(_step, donate_argnums=0).lower(args, x).compile()


def test_estimate_is_near_what_the_cpu_compiler_allocates():
  compiled = _compiled()
  allocated = compiled.memory_analysis().temp_size_in_bytes
  found = peak.of_program(compiled.as_text())
  assert found.bytes == pytest.approx(allocated, rel=TOLERANCE)
  # The activations of six layers, 2 x 8 MiB x 512 / 256, are the largest.
  assert found.buffers[0].bytes == 6 * 8192 * 512 * 4


PROGRAM = """\
import json
import jax
from jax.experimental import topologies
from mtp_jax.parallel import chips
from mtp_jax.planning import ahead, peak
from tests.planning import peak_test
chips.answer_libtpu()
described = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')
compiled = peak_test._compiled(jax.sharding.SingleDeviceSharding(described.devices[0]))
found = peak.of_program(compiled.as_text())
print(json.dumps([found.bytes, ahead.temp_bytes(compiled.memory_analysis(), 'tpu')]))
"""


def test_estimate_is_near_what_the_tpu_compiler_allocates():
  pytest.importorskip('libtpu')
  unset = 'XLA_FLAGS', 'JAX_PLATFORMS'
  environment = {k: v for k, v in os.environ.items() if k not in unset}
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    cwd=runs.ROOT,
    env=environment | dict(JAX_PLATFORMS='cpu', PYTHONPATH=runs.ROOT),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  estimate, allocated = json.loads(done.stdout.splitlines()[-1])
  if allocated is None:
    pytest.skip('this jax does not have the figure')
  assert estimate == pytest.approx(allocated, rel=TOLERANCE)
