"""Plans for NVIDIA GPUs: topologies, reserves, the ledger of a GPU program, and, with the
wheels of the extra [plan], a compiled step."""

import json
import os
import subprocess
import sys

import pytest

from mtp_jax.cli import main
from mtp_jax.config import fields, schema
from mtp_jax.io import paths
from mtp_jax.parallel import chips
from mtp_jax.planning import ahead, analytic, groups, hlo, nvidia, report, tpu
from tests.support import runs, tiny

MIB = 2**20
SMALL = [f'--{name}={value}' for name, value in (tiny.BASE | {'mesh.fsdp': -1}).items()]
NEEDS_WHEELS = pytest.mark.skipif(not nvidia.has_compiler(), reason='[plan] is not installed')


@pytest.fixture(autouse=True)
def variables(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])  # restored afterwards
  for name in nvidia.FRACTION_VARIABLES:
    monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
  'text, nodes, per_node', [('h100:8', 1, 8), ('h100:2x8', 2, 8), ('a100-40g:1', 1, 1)]
)
def test_topologies(text, nodes, per_node):
  found = nvidia.topology(text)
  assert found == (nvidia.GPUS[text.partition(':')[0]], nodes, per_node)
  assert found.devices == nodes * per_node


def test_topologies_of_tpus_are_none_here():
  assert nvidia.topology('v5e:4x4') is None and nvidia.topology('') is None


@pytest.mark.parametrize(
  'text', ['h100:0', 'h100:3x', 'h100:2x16', 'h100:', 'h100', 'b200:9', 'h100:0x8', 'h100:5000x8']
)
def test_bad_topology_is_one_line(text, capsys):
  assert main.main(['plan', *SMALL, f'--plan.topology={text}']) == 2
  error = capsys.readouterr().err
  assert f'--plan.topology={text}: ' in error and 'nodes of 1 to 8 GPUs' in error
  assert error.count('\n') == 1


def test_unknown_chip_lists_gpus(monkeypatch, capsys):
  monkeypatch.setattr(tpu, 'has_compiler', lambda: False)
  assert main.main(['plan', *SMALL, '--plan.topology=h300:8']) == 2
  assert 'a100-40g or a100 or h100 or h200 or b200' in capsys.readouterr().err


def test_gpus_have_no_slices():
  cfg = tiny.cfg(plan__topology='h100:8', plan__slices=2)
  with pytest.raises(fields.ConfigError, match='--plan.slices=2: only TPUs have slices'):
    ahead.plan(cfg)


@pytest.mark.parametrize('gpu', nvidia.GPUS.values(), ids=nvidia.GPUS)
def test_gpus_are_those_of_the_table_of_chips(gpu):
  chip = chips.chip(gpu.device_kind)
  text = nvidia.target_config(gpu)
  assert f'device_memory_size: {int(chip.hbm_bytes)}\n' in text
  assert f'device_description_str: "{gpu.device_kind}"' in text
  # Dense bfloat16 products per cycle and core, of the whitepapers.
  per_cycle = {(8, 0): 1024, (9, 0): 2048, (10, 0): 4096}[gpu.capability]
  peak = 2 * per_cycle * gpu.cores * gpu.clock_ghz * 1e9
  assert chip.flops_per_s == pytest.approx(peak, rel=0.08)


# A connection of NCCL has 4 MiB, 0.5 MiB and 4.6875 MiB: 24 channels of 3 take 661.5 MiB.
# NVLink SHARP takes 2 MiB per channel and GPU of a node.
@pytest.mark.parametrize(
  'name, cublas, nccl',
  [('a100', 4, 661.5), ('h100', 32, 661.5 + 16 * 8 * 2), ('b200', 32, 661.5 + 32 * 8 * 2)],
)
def test_reserves(name, cublas, nccl):
  found = nvidia.reserves(nvidia.GPUS[name].device_kind, 8, 3)
  assert found == {
    'CUDA context': 512 * MIB,
    'cuBLAS workspace': cublas * MIB,
    'NCCL buffers': 3 * nccl * MIB,
  }
  assert nvidia.reserves(nvidia.GPUS[name].device_kind, 1, 0)['NCCL buffers'] == 0


@pytest.mark.parametrize('gpu', nvidia.GPUS.values(), ids=nvidia.GPUS)
def test_reserves_of_three_communicators_fit_beside_what_jax_allocates(gpu):
  cfg = schema.replace(schema.CommandConfig(), **{'plan.topology': 'h100:8'})
  beside = chips.chip(gpu.device_kind).hbm_bytes - ahead.usable_bytes(gpu.device_kind, cfg)
  assert 1.25 * sum(nvidia.reserves(gpu.device_kind, 8, 3).values()) < beside


@pytest.mark.parametrize('name', nvidia.FRACTION_VARIABLES)
def test_fraction_of_the_environment(name, monkeypatch):
  assert nvidia.memory_fraction(True) == nvidia.MEMORY_FRACTION
  assert nvidia.memory_fraction(False) == 0.75  # of this process, without launch scripts
  monkeypatch.setenv(name, '.5')
  assert nvidia.memory_fraction(True) == nvidia.memory_fraction(False) == 0.5
  assert ahead.usable_bytes('NVIDIA H100 80GB HBM3', schema.CommandConfig()) == 79 / 2 * 2**30
  assert ahead.usable_bytes('TPU v5 lite', schema.CommandConfig()) == 15.75 * 2**30
  for wrong in ('x', '0', '1.5', 'nan'):
    monkeypatch.setenv(name, wrong)
    with pytest.raises(paths.InputError, match=f'{name}={wrong}: must be a number'):
      nvidia.memory_fraction(True)


def test_compiler_options_and_flags_yield_to_xla_flags(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')
  assert nvidia.compiler_options() == nvidia.COMPILER_OPTIONS
  first, *others = (f'--{name}=true' for name in nvidia.LAUNCH_FLAGS)
  nvidia.set_launch_flags()
  assert os.environ['XLA_FLAGS'].split() == [first, *others]
  given = f'--xla_gpu_enable_triton_gemm=true {first.replace("true", "false")}'
  monkeypatch.setenv('XLA_FLAGS', given)
  assert nvidia.compiler_options() == dict(xla_gpu_autotune_level=0)
  nvidia.set_launch_flags()
  assert os.environ['XLA_FLAGS'].split() == [*others, *given.split()]


def _plan(total_bytes, **changes):
  """A plan for 8 H100 of one node, without a compiled program."""
  return ahead.Plan(
    tiny.cfg(plan__topology='h100:8', **changes),
    dict(data=1, fsdp=8, tensor=1),
    'NVIDIA H100 80GB HBM3',
    0,
    0,
    total_bytes,
    per_node=8,
  )


def test_fits_is_of_what_jax_allocates(monkeypatch):
  usable = 0.92 * 79 * 2**30
  assert _plan(usable - 1).fits is True and _plan(usable + 1).fits is False
  values = report.values_of(_plan(1.0))
  assert values['usable_bytes'] == usable and values['hbm_bytes'] == 79 * 2**30
  assert values['reserves']['NCCL buffers'] == 917.5 * MIB  # of fsdp
  text = '\n'.join(report.lines_of(_plan(1.0)))
  assert 'JAX allocates 0.92 of 79.00            72.68' in text
  assert 'reserve beside it: NCCL buffers         0.90' in text
  monkeypatch.setenv(nvidia.FRACTION_VARIABLES[0], '0.99')  # 0.79 GiB are left
  assert _plan(1.0).fits is False
  lines = report.lines_of(_plan(1.0))
  assert '  lower XLA_PYTHON_CLIENT_MEM_FRACTION: the reserves need more' in lines


def test_plan_without_wheels_is_sharding_only(monkeypatch, capsys):
  monkeypatch.setattr(nvidia, 'has_compiler', lambda: False)
  args = ['--plan.topology=h100:2x8', '--data.batch_size=16', '--plan.profile']
  assert main.main(['plan', *SMALL, *args]) == 4
  printed = capsys.readouterr().out
  assert "pip install 'mtp_jax[plan]'" in printed
  assert printed.startswith('h100:2x8, 2 nodes of 8: 16 x NVIDIA H100 80GB HBM3, mesh')
  assert '16 x NVIDIA H100 80GB HBM3, mesh data=1 x fsdp=16 x tensor=1' in printed
  assert 'the profile has no cycles: the compiler for NVIDIA GPUs estimates none' in printed


def test_plan_without_wheels_detects_too_large_state(monkeypatch):
  monkeypatch.setattr(nvidia, 'has_compiler', lambda: False)
  flags = ['--flagfile=experiments/size/13b.flags', '--plan.topology=a100-40g:1']
  assert main.main(['plan', *flags]) == 3


# Parts of a step compiled for two nodes of 8 H100 (data=2, fsdp=8), with the attributes
# that the ledger reads.
GPU = """\
HloModule jit_step, is_scheduled=true

%fused_dynamic_slice (param_0: f32[2,256], param_1: s32[]) -> f32[1,256] {
  %param_0 = f32[2,256]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %constant_263 = s32[] constant(0)
  ROOT %dynamic_slice.361 = f32[1,256]{1,0} dynamic-slice(%param_0, %param_1, %constant_263), dynamic_slice_sizes={1,256}
}

%body (c: (s32[], f32[2,256], bf16[32,768], bf16[512,256], f32[256,768])) -> (s32[], f32[2,256], bf16[32,768], bf16[512,256], f32[256,768]) {
  %c = (s32[], f32[2,256]{1,0}, bf16[32,768]{1,0}, bf16[512,256]{1,0}, f32[256,768]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %norms = f32[2,256]{1,0} get-tuple-element(%c), index=1
  %w = bf16[32,768]{1,0} get-tuple-element(%c), index=2
  %x = bf16[512,256]{1,0} get-tuple-element(%c), index=3
  %dw = f32[256,768]{1,0} get-tuple-element(%c), index=4
  %fusion-start.1 = ((f32[2,256]{1,0}, s32[]), f32[1,256]{1,0}, u32[]) fusion-start(%norms, %i), kind=kLoop, calls=%fused_dynamic_slice
  %fusion-done.1 = f32[1,256]{1,0} fusion-done(%fusion-start.1)
  %all-gather-start.3 = ((bf16[32,768]{1,0}), (bf16[256,768]{1,0})) all-gather-start(%w), channel_id=19, replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=1] {'fsdp'}, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/jvp(trunk)/while/body/eval_jaxpr/gather/convert_element_type"}
  %all-gather-done.3 = bf16[256,768]{1,0} all-gather-done(%all-gather-start.3)
  %custom-call.36 = (bf16[512,768]{1,0}, s8[4194304]{0}) custom-call(%x, %all-gather-done.3), custom_call_target="__cublas$lt$matmul", backend_config={"operation_queue_id":"0","gemm_backend_config":{"selected_algorithm":"0","beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
  %qkv = bf16[512,768]{1,0} get-tuple-element(%custom-call.36), index=0
  %pallas_call.56 = bf16[512,256]{1,0} custom-call(%qkv), custom_call_target="__gpu$xla.gpu.triton", api_version=API_VERSION_TYPED_FFI
  %reduce-scatter-start = ((f32[256,768]{1,0}), (f32[32,768]{1,0})) reduce-scatter-start(%dw), channel_id=92, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, use_global_device_ids=true, dimensions={0}, to_apply=%region_40.46
  %reduce-scatter-done = f32[32,768]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %all-reduce-start = ((f32[32,768]{1,0}), f32[32,768]{1,0}) all-reduce-start(%reduce-scatter-done), channel_id=2, replica_groups={{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}, use_global_device_ids=true, to_apply=%region_41.48
  %all-reduce-done = f32[32,768]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %t = (s32[], f32[2,256]{1,0}, bf16[32,768]{1,0}, bf16[512,256]{1,0}, f32[256,768]{1,0}) tuple(%i, %norms, %w, %pallas_call.56, %dw)
}

%condition (d: (s32[], f32[2,256], bf16[32,768], bf16[512,256], f32[256,768])) -> pred[] {
  %d = (s32[], f32[2,256]{1,0}, bf16[32,768]{1,0}, bf16[512,256]{1,0}, f32[256,768]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  %constant_2 = s32[] constant(2)
  ROOT %lt = pred[] compare(%j, %constant_2), direction=LT
}

ENTRY %main (p: (s32[], f32[2,256], bf16[32,768], bf16[512,256], f32[256,768]), n: s32[3]) -> s32[3] {
  %p = (s32[], f32[2,256]{1,0}, bf16[32,768]{1,0}, bf16[512,256]{1,0}, f32[256,768]{1,0}) parameter(0)
  %n = s32[3]{0} parameter(1)
  %while.283 = (s32[], f32[2,256]{1,0}, bf16[32,768]{1,0}, bf16[512,256]{1,0}, f32[256,768]{1,0}) while(%p), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp(trunk)/while"}, backend_config={"known_trip_count":{"n":"2"}}
  ROOT %all-reduce.5 = s32[3]{0} all-reduce(%n), channel_id=70, replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=1] {'data','fsdp'}, use_global_device_ids=true, to_apply=%region_0.0
}
"""  # noqa: E501


def test_ledger_of_a_gpu_program():
  found = hlo.ledger(GPU, per_node=8)
  w, dw, shard = 256 * 768 * 2, 256 * 768 * 4, 32 * 768 * 4  # bytes
  sent = {(c.kind, c.group, c.times): (c.sent_bytes, c.network) for c in found.collectives}
  assert sent == {
    ('all-gather', 8, 2): (2 * w * 7 / 8, 0.0),
    ('reduce-scatter', 8, 2): (2 * dw * 7 / 8, 0.0),
    ('all-reduce', 2, 2): (2 * 2 * shard / 2, 1.0),  # pairs across the nodes
    # Of the 16 hops of a ring, 2 leave a node.
    ('all-reduce', 16, 1): (2 * 12 * 15 / 16, 2 / 16),
  }
  between = 2 * shard + 22.5 / 8
  assert found.sent_bytes(network=True) == between
  assert found.sent_bytes(network=True, kind='all-gather') == 0
  whole = sum(n for n, _ in sent.values())
  assert found.sent_bytes(network=False) == whole - between
  assert len({c.members for c in found.collectives}) == 3
  # Without the workspace of cuBLAS: of f32[2,256] a row and its index are read, the row is
  # written; w gathered; the product's operands and result; the kernel's; the gradient
  # scattered, then reduced.
  x, qkv = 512 * 256 * 2, 512 * 768 * 2
  body = 2 * 1024 + 4 + (w / 8 + w) + (x + w + qkv) + (qkv + x) + (dw + shard) + 2 * shard
  assert found.memory_bytes == 2 * body + 2 * 12
  # 512 x 768 results of 256 products each.
  assert sum(o.times * o.flops for o in found.operations) == 2 * (2 * 512 * 768 * 256)
  assert found.host_syncs == 0


def test_host_waits_for_loops_without_trip_count_and_conditionals():
  endless = GPU.replace('"known_trip_count":{"n":"2"}', '')
  assert hlo.ledger(endless, per_node=8).host_syncs == 2
  line = '%fusion-done.1 = f32[1,256]{1,0} fusion-done(%fusion-start.1)'
  branch = '%b = f32[1,256]{1,0} conditional(%i, %i), branch_computations={%one, %two}'
  assert hlo.ledger(GPU.replace(line, f'{line}\n  {branch}'), 8).host_syncs == 2


@pytest.mark.parametrize(
  'written, first, share',
  [
    ("replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=1] {'fsdp'}", range(8), 0),
    ("replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=1] {'data'}", (0, 8), 1),
    ("replica_groups=mesh['data'=2,'fsdp'=8] {'data','fsdp'}", range(16), 1 / 8),
    ("replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}", range(8), 0),
    ("replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}", (0, 8), 1),
    ("replica_groups=mesh['a'=4,'b'=4] {'a':(1)2}", (0, 8), 1),
    ("replica_groups=mesh['a'=4,'b'=4] {'a':(2)2,'b'}", range(8), 0),
    ('replica_groups=[2,8]<=[16], dimensions={0}', range(8), 0),
    ('replica_groups=[8,2]<=[2,8]T(1,0), use_global_device_ids=true', (0, 8), 1),
    ('replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add', range(4), 0),
    ('source_target_pairs={{0,1},{7,8},{8,9},{15,0}}', (0, 1), 1 / 2),
    ('to_apply=%add', None, 0),
  ],
)
def test_members_of_replica_groups(written, first, share):
  found = groups.members(f'channel_id=1, {written}')
  assert found[:1] == (() if first is None else (tuple(first),))
  assert groups.network_share(f'channel_id=1, {written}', 8) == share


def test_report_has_what_stays_within_a_node_and_what_leaves_it():
  plan = _plan(1.0)._replace(
    cfg=tiny.cfg(plan__topology='h100:2x8'),
    mesh=dict(data=2, fsdp=8, tensor=1),
    executed_flops=1.0,
    ledger=hlo.ledger(GPU, per_node=8),
  )
  assert plan.nodes == 2 and plan.reserves['NCCL buffers'] == 3 * 917.5 * MIB
  values = report.values_of(plan)
  chip, between = plan.chip, 2 * 98304 + 22.5 / 8
  within = sum(row['sent_bytes'] for row in values['collectives'].values()) - between
  assert values['roofline_s']['network'] == between / chip.network_bytes_per_s
  assert values['roofline_s']['links'] == within / chip.link_bytes_per_s
  assert values['collectives_network_bytes'] == {
    'all-gather': 0,
    'all-reduce': between,
    'reduce-scatter': 0,
  }
  lines = report.lines_of(plan)
  title = next(i for i, line in enumerate(lines) if line.startswith('collectives per step'))
  assert 'MiB within a node   MiB between nodes' in lines[title]
  assert lines[title + 2].split() == ['all-reduce', '3', '0.0', '0.2']
  assert (
    lines[title + 4] == 'waits for the host per step (conditionals, loops of unknown length): 0'
  )


def test_formula_has_what_leaves_a_node():
  chip = chips.chip('NVIDIA H100')

  def seconds(topology, **mesh):
    mesh = dict(data=1, fsdp=1, tensor=1) | mesh
    cfg = tiny.cfg(plan__topology=topology, data__batch_size=16)
    return analytic.estimate(cfg, mesh, chip).seconds

  assert seconds('h100:8', fsdp=8)['network'] == 0
  # Gradients cross it once a step, gathered weights are 8 times as large.
  across = seconds('h100:2x8', data=2, fsdp=8)
  assert 0 < across['network'] < seconds('h100:2x8', fsdp=16)['network']
  assert across['links'] == seconds('h100:8', fsdp=8)['links']


@pytest.mark.parametrize('is_gpu', [False, True])
def test_wheels_are_silent_without_a_gpu(is_gpu, monkeypatch):
  name = 'JAX_SKIP_CUDA_CONSTRAINTS_CHECK'
  monkeypatch.setenv(name, 'x')
  monkeypatch.delenv(name)  # restored afterwards
  monkeypatch.setattr(chips, 'has_gpu', lambda: is_gpu)
  monkeypatch.setattr(chips, 'has_tpu', lambda: True)
  chips.silence_compilers()
  assert os.environ.get(name) == (None if is_gpu else '1')


def _mtp(*args):
  """Runs mtp in a new process, as on a machine where nothing selects a platform."""
  unset = 'JAX_PLATFORMS', 'XLA_FLAGS', *nvidia.FRACTION_VARIABLES
  return subprocess.run(
    [sys.executable, '-m', 'mtp_jax', *args],
    cwd=runs.ROOT,
    env={k: v for k, v in os.environ.items() if k not in unset},
    capture_output=True,
    text=True,
    timeout=600,
  )


@NEEDS_WHEELS
@pytest.mark.skipif(chips.has_gpu() or chips.has_tpu(), reason='of a machine with a CPU alone')
def test_installed_wheels_change_neither_devices_nor_stderr():
  done = _mtp('plan', *SMALL)  # for the devices here
  assert (done.returncode, done.stderr) == (0, '')
  assert '1 x cpu, mesh' in done.stdout


@NEEDS_WHEELS
@pytest.mark.slow
@pytest.mark.parametrize(
  'topology, mesh',
  [('h100:8', (1, 8)), ('h100:2x8', (2, 8)), ('b200:8', (1, 8)), ('a100:8', (1, 8))],
)
def test_step_compiles_ahead_of_time_for_gpus(topology, mesh, tmp_path):
  out = str(tmp_path / 'plan.json')
  data, fsdp = mesh
  done = _mtp(
    'plan',
    *('--model.d_model=256', '--model.n_layers=4', '--heads.n=2', '--data.seq_len=256'),
    *(f'--mesh.data={data}', f'--mesh.fsdp={fsdp}', '--data.batch_size=32'),
    *(f'--plan.topology={topology}', '--plan.profile', f'--out={out}'),
  )
  assert (done.returncode, done.stderr) == (0, '')
  with open(out) as f:
    found = json.load(f)
  assert found['fits'] and found['nodes'] == data and found['devices'] == data * fsdp
  # Parameters and two moments in float32, and the batch, twice: rows of 256 + 4 tokens.
  state_bytes = found['params_bytes'] + found['opt_state_bytes']
  assert state_bytes < found['held_bytes'] < state_bytes + 2**20
  assert found['temp_bytes'] > found['params_bytes']  # gradients, at least
  assert found['peak_estimate_bytes'] == pytest.approx(found['temp_bytes'], rel=0.1)
  # Attention is our kernel, and nothing waits for the host.
  assert found['host_syncs'] == 0
  sent, between = found['collectives'], found['collectives_network_bytes']
  # Weights are gathered in bfloat16 for each of the passes, gradients reduced in float32.
  assert sent['all-gather']['sent_bytes'] > found['params_bytes']
  assert sent['reduce-scatter']['sent_bytes'] > found['params_bytes']
  assert between['all-gather'] == between['reduce-scatter'] == 0
  # Between two nodes: the gradients of what fsdp shards, in float32, once.
  network = between['all-reduce'] / found['params_bytes']
  assert 0.9 < network < 1.1 if data == 2 else network == 0
  assert found['step_s'] == max(found['roofline_s'].values()) > 0
