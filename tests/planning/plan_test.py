"""`mtp plan` on the command line: output, files and exit status."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading

import jax
import pytest

from mtp_jax.cli import main
from mtp_jax.config import schema
from mtp_jax.model import params
from mtp_jax.parallel import chips, sharding
from mtp_jax.planning import ahead, analytic, hlo, report, run, tpu
from mtp_jax.train import state
from tests.support import ahead as compiled
from tests.support import runs, tiny

SMALL = [f'--{name}={value}' for name, value in (tiny.BASE | {'mesh.fsdp': -1}).items()]


def test_plan_for_local_devices(tmp_path, capsys):
  out = str(tmp_path / 'plan.json')
  assert main.main(['plan', *SMALL, f'--out={out}']) == 0
  with open(out) as f:
    found = json.load(f)
  printed = capsys.readouterr().out
  assert 'mesh data=1 x fsdp=8 x tensor=1' in printed
  cfg = tiny.cfg(mesh__fsdp=8)
  held = state.abstract(cfg, sharding.make_mesh(cfg))
  assert found['params_bytes'] == params.bytes_per_device(held.params)
  assert found['opt_state_bytes'] == params.bytes_per_device(held.opt_state)
  assert found['total_bytes'] == pytest.approx(
    sum(found[f'{x}_bytes'] for x in ('held', 'temp', 'code'))
  )
  batch = 2 * (16 + 4) * 4 + 4 * 32 + 3 * 4  # tokens, positions; bytes_V; counters
  state_bytes = found['params_bytes'] + found['opt_state_bytes']
  assert state_bytes < found['held_bytes'] <= state_bytes + 4 * batch
  assert found['fits'] is None and found['days'] is None  # a CPU has no peaks
  assert found['executed_flops_per_step'] > 0 and found['temp_bytes'] > 0
  assert {'all-gather', 'all-reduce'} <= found['collectives'].keys()
  largest = [c['sent_bytes'] for c in found['largest_collectives']]
  assert len(largest) == 10 and largest == sorted(largest, reverse=True)


@pytest.mark.slow
def test_sweep_of_two_flags_is_a_grid(tmp_path, capsys):
  out = str(tmp_path / 'plan.json')
  status = main.main(
    [
      'plan',
      *SMALL,
      '--plan.sweep=heads.n=1,2',
      '--plan.sweep=loss.backward=remat,interleaved',
      f'--out={out}',
    ]
  )
  assert status == 0
  with open(out) as f:
    rows = json.load(f)['rows']
  grid = [(n, s) for n in (1, 2) for s in ('remat', 'interleaved')]
  assert [tuple(row['set'].values()) for row in rows] == grid
  assert [(row['heads'], row['schedule']) for row in rows] == grid
  assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
  'sweep, allowed',
  [
    ('heads.n', 'FLAG=VALUE'),
    ('heads.m=1', 'FLAG=VALUE'),
    ('plan.slices=1,2', 'FLAG=VALUE'),
    ('heads.n=1,two', 'must be int'),
    ('heads.n=1,600', '--heads.n=600'),
    ('heads.family=causal,casual', '--heads.family=casual'),
    ('data.verify=1,0', 'must be bool'),
  ],
)
def test_bad_sweep_raises_before_compiling(sweep, allowed, capsys, monkeypatch):
  monkeypatch.setattr(ahead, 'plan', None)
  assert main.main(['plan', *SMALL, f'--plan.sweep={sweep}']) == 2
  error = capsys.readouterr().err
  assert allowed in error and error.count('\n') == 1


def test_duplicate_sweep_flag_raises(capsys, monkeypatch):
  monkeypatch.setattr(ahead, 'plan', None)
  sweep = '--plan.sweep=heads.n=1,2'
  assert main.main(['plan', *SMALL, sweep, sweep]) == 2
  assert 'duplicate flag heads.n' in capsys.readouterr().err


def test_fit_on_unknown_accelerator_is_unknown():
  plan = ahead.Plan(tiny.cfg(), dict(data=1, fsdp=1, tensor=1), 'NVIDIA L40S', 1, 1, 1.0)
  assert plan.fits is None and run.status([plan]) == 4
  assert run.status([plan._replace(device_kind='cpu')]) == 0
  assert run.status([plan._replace(device_kind='TPU v5e')]) == 0


def test_plan_without_libtpu_is_sharding_only(monkeypatch, capsys):
  monkeypatch.setattr(tpu, 'has_compiler', lambda: False)
  args = ['--plan.topology=v5e:2x4', '--plan.slices=2', '--mesh.data=2']
  assert main.main(['plan', *SMALL, *args, '--data.batch_size=16']) == 4
  printed = capsys.readouterr().out
  assert "pip install 'mtp_jax[tpu]'" in printed
  assert '16 x TPU v5 lite, mesh data=2 x fsdp=8 x tensor=1' in printed
  assert 'unknown whether it fits' in printed


def test_plan_without_libtpu_detects_too_large_state(monkeypatch):
  monkeypatch.setattr(tpu, 'has_compiler', lambda: False)
  flags = ['--flagfile=experiments/size/13b.flags', '--data.seq_len=4096']
  assert main.main(['plan', *flags, '--plan.topology=v5e:2x2']) == 3
  flags += ['--data.batch_size=16']
  assert main.main(['plan', *flags, '--plan.topology=v5e:4x4']) == 4


@pytest.mark.parametrize('has_compiler', [False, True])
@pytest.mark.parametrize(
  'topology, allowed',
  [
    ('v9:4x4', 'v4 or v5e or v5p or v6e or tpu7x, a colon, and e.g. 4x4 or 2x2x4; or a100-40g or'),
    ('4x4', 'v4 or v5e'),
    ('v5e:', 'a slice has 2 dimensions in chips, e.g. v5e:4x4'),
    ('v5e:22', '2 dimensions'),
    ('v5e:0x2', '2 dimensions'),
    ('v5e:2X2', '2 dimensions'),
    ('v5e:2x2x2', '2 dimensions'),
    ('v6e:2x3', 'the first two 1 or even'),
    ('v6e:16x32', 'at most 256 chips'),
    ('v4:2x2', 'a slice has 3 dimensions in chips, e.g. v4:2x2x4'),
    ('v4:0x2x1', '3 dimensions'),
    ('v5p:3x2x1', 'the first two 1 or even'),
    ('tpu7x:99x99x99', 'at most 9,216 chips'),
  ],
)
def test_bad_topology_is_refused_by_the_same_line_without_the_compiler(
  topology, allowed, has_compiler, monkeypatch, capsys
):
  monkeypatch.setattr(tpu, 'has_compiler', lambda: has_compiler)
  monkeypatch.setattr(tpu, 'devices', None)
  assert main.main(['plan', *SMALL, f'--plan.topology={topology}']) == 2
  error = capsys.readouterr().err
  assert f'--plan.topology={topology}: ' in error and allowed in error
  assert error.count('\n') == 1


def test_slices_need_a_topology(capsys):
  assert main.main(['plan', *SMALL, '--plan.slices=2']) == 2
  assert '--plan.slices=2' in capsys.readouterr().err


@pytest.mark.parametrize(
  'message, temp',
  [
    (
      'Ran out of memory on HBM, the total memory required for HLO temporaries'
      ' (24.88G) exceeds available HBM (15.75G).',
      24.88 * 2**30,
    ),
    ('Used 18.5G of 15.75G hbm. Exceeded hbm capacity', 18.5 * 2**30 - 300),
  ],
)
def test_needed_memory_is_parsed_from_compiler_errors(message, temp):
  plan = ahead.Plan(tiny.cfg(), dict(data=1, fsdp=1, tensor=1), 'TPU v5 lite', 100, 200)
  plan = plan._replace(temp_bytes=ahead._needed(message)(plan))
  assert plan.temp_bytes == pytest.approx(temp)
  assert plan.fits is False and run.status([plan]) == 3
  barely = plan._replace(temp_bytes=1.0, refused=True)
  assert barely.fits is False  # whatever the message states
  assert ahead._needed('INTERNAL: something else') is None


def test_roofline_uses_peak_rates():
  whole = hlo.Array('f32', (1000,), on_chip=False)
  moved = hlo.Collective('all-gather', (whole,), 4, 2, '', ())
  plan = ahead.Plan(
    tiny.cfg(),
    dict(data=1, fsdp=4, tensor=1),
    'TPU v5 lite',
    1,
    1,
    1.0,
    executed_flops=197e12,
    ledger=hlo.Ledger((moved,), (hlo.Operation('x', '', 2, 819e9 / 4),)),
  )
  assert plan.roofline() == dict(
    compute=1.0, memory=0.5, links=2 * 4000 * 3 / 4 / 200e9, network=0.0
  )
  values = report.values_of(plan)
  assert values['step_s'] == 1.0
  assert values['tokens_per_s_all'] == 8 * 16
  assert values['days'] == 1000 / 86400
  assert values['mfu'] == pytest.approx(plan.model_flops / 4 / 197e12)


def test_estimated_time_is_of_a_calibrated_clock():
  operation = hlo.Operation('x', 'jit(step)/jvp(trunk)/qkv/dot_general', 2, 0.0, 1e12, 3 * 10**8)
  plan = ahead.Plan(
    tiny.cfg(plan__profile=True),
    dict(data=1, fsdp=1, tensor=1),
    'TPU v5 lite',
    1,
    1,
    1.0,
    executed_flops=3e12,
    kernel_flops=197e12,
    ledger=hlo.Ledger((), (operation,)),
  )
  assert report.values_of(plan)['estimated_s'] is None
  assert any('the clock is not calibrated' in line for line in report.lines_of(plan))
  timed = plan._replace(clock=1.5e9)
  values = report.values_of(timed)
  # 6e8 cycles, and a second of the peak at half of it.
  assert values['estimated_s'] == pytest.approx(0.4 + 2)
  assert values['estimated_cycles'] == 6 * 10**8
  (row,) = values['operations']
  assert row['scope'] == 'forward trunk/qkv/dot_general' and row['flops'] == 2e12
  floor = 2e12 / 197e12 * 1.5e9 / 6e8
  assert f'100.0% {floor:13.0%}  forward trunk/qkv' in '\n'.join(report.lines_of(timed))


def test_unparsable_program_has_roofline_by_formula():
  class Compiled:
    def as_text(self):
      raise jax.errors.JaxRuntimeError('async-update should have 1 operands')

  assert ahead._ledger(Compiled()) is None
  plan = ahead.Plan(
    tiny.cfg(),
    dict(data=1, fsdp=1, tensor=1),
    'TPU v5',
    1,
    1,
    1.0,
    code_bytes=1.0,
    executed_flops=1.0,
  )
  values = report.values_of(plan)
  formula = analytic.estimate(plan.cfg, plan.mesh, plan.chip)
  assert values['roofline_by_formula'] and values['fits']
  assert values['step_s'] == formula.step_s > 0
  assert values['collectives'] is None
  assert any('by formula' in line for line in report.lines_of(plan))
  unfit = plan._replace(temp_bytes=1e12, code_bytes=0.0)
  assert report.values_of(unfit)['step_s'] is None


def test_candidates_divide_the_batch_and_the_model():
  cfg = tiny.cfg(data__batch_size=16, mesh__fsdp=-1)
  found = list(analytic.candidates(cfg, 8))
  assert found and len(set(found)) == len(found)
  for one in found:
    m = one.mesh
    assert m.data * m.fsdp * m.tensor == 8
    assert 2 % m.tensor == 0  # key/value heads
    assert 16 % (one.train.grad_accum_steps * m.data * m.fsdp) == 0
  sliced = schema.replace(cfg, **{'plan.slices': 2})
  assert {one.mesh.data % 2 for one in analytic.candidates(sliced, 8)} == {0}


def test_formula_is_exact_for_state_and_monotonic_in_cost():
  chip = chips.chip('TPU v5e')
  base = schema.replace(
    schema.CommandConfig(),
    **{
      'model.d_model': 512,
      'model.n_layers': 16,
      'model.n_attn_heads': 8,
      'model.vocab_size': 32000,
      'data.seq_len': 2048,
      'data.batch_size': 32,
    },
  )
  mesh = dict(data=1, fsdp=8, tensor=1)

  def of(mesh=mesh, **changes):
    changes = {k.replace('__', '.'): v for k, v in changes.items()}
    return analytic.estimate(schema.replace(base, **changes), mesh, chip)

  held = state.abstract(base, sharding.abstract_mesh(schema.replace(base, **{'mesh.fsdp': 8}), 8))
  assert analytic._state_bytes(
    dataclasses.replace(base, mesh=schema.MeshConfig(**mesh)), (1, 8, 1)
  ) == (params.bytes_per_device(held.params), params.bytes_per_device(held.opt_state))
  plain = of()
  for remat in ('dots', 'none'):  # save more, recompute less
    other = of(model__remat=remat)
    assert other.total_bytes > plain.total_bytes
    assert other.seconds['compute'] < plain.seconds['compute']
  more = of(train__grad_accum_steps=4)  # smaller activations, more gathers
  assert more.total_bytes < plain.total_bytes
  assert more.seconds['links'] > plain.seconds['links']
  eager = of(loss__backward='interleaved')
  assert eager.seconds['compute'] < plain.seconds['compute']
  replicas = of(dict(data=8, fsdp=1, tensor=1))
  assert replicas.total_bytes > plain.total_bytes
  assert of(plan__slices=2, mesh=dict(data=2, fsdp=4, tensor=1)).seconds['network']


def test_search_ranks_and_compiles_candidates(monkeypatch, capsys):
  monkeypatch.setattr(tpu, 'has_compiler', lambda: False)
  flags = ['--flagfile=experiments/scaling/1.3b_n4.flags']
  args = [*flags, '--plan.topology=v5e:8x8', '--plan.search_mesh']
  compiled = []

  def plan(cfg):
    compiled.append(cfg)
    return ahead.of_shardings(cfg)

  monkeypatch.setattr(ahead, 'plan', plan)
  assert main.main(['plan', *args]) == 4
  assert len(compiled) == run.COMPILES
  assert 'candidates' in capsys.readouterr().out
  for cfg in compiled:
    assert cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.tensor == 64


def test_search_requires_known_peaks(capsys):
  assert main.main(['plan', *SMALL, '--plan.search_mesh']) == 2
  assert '--plan.search_mesh' in capsys.readouterr().err


def _tpu(*args, timeout=600):
  """Runs `mtp plan` in a new process, since libtpu is loaded once per process."""
  pytest.importorskip('libtpu')
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return subprocess.run(
    [sys.executable, '-m', 'mtp_jax', 'plan', *args],
    cwd=runs.ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=timeout,
  )


DEVICES = """
from mtp_jax.config import schema
from mtp_jax.planning import ahead, tpu
for generation, of_tpu in tpu.TPUS.items():
  shape = '2x2' if of_tpu.dims == 2 else '2x2x1'
  of = schema.replace(schema.CommandConfig(), **{'plan.topology': f'{generation}:{shape}'})
  at, on = ahead.topology(of), ahead.devices(of)
  print(generation, len(on), (len(on), on[0].device_kind) == (at.devices, of_tpu.device_kind))
"""


@pytest.mark.parametrize(
  'handler, expected',
  [(signal.default_int_handler, signal.SIG_DFL), (signal.SIG_IGN, signal.SIG_IGN)],
)
def test_ctrl_c_has_its_default_effect_during_a_plan(handler, expected, monkeypatch):
  during = []

  def plan(*_):
    during.append(signal.getsignal(signal.SIGINT))
    return {}, 0

  monkeypatch.setattr(run, 'run', plan)
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  args = ['plan', *SMALL, '--plan.topology=v5e:2x2']
  before = signal.signal(signal.SIGINT, handler)
  try:
    assert main.main(args) == 0
    assert signal.getsignal(signal.SIGINT) is handler
    thread = threading.Thread(target=main.main, args=(args,))
    thread.start()
    thread.join()
  finally:
    signal.signal(signal.SIGINT, before)
  assert during == [expected, handler]


def test_times_and_counts_have_units_of_their_size():
  days = 1234.5, 3.014, 1.0, 0.5, 1 / 48, 2e-5
  assert [report._time(d) for d in days] == [
    *('1,234 days', '3.01 days', '1 days', '12 hours', '30 minutes', '1.73 seconds')
  ]
  assert [report._count(n) for n in (15e12, 2.1e11, 16.4e6, 65536)] == [
    *('15T', '210B', '16.4M', '65,536')
  ]


TERMINATED = """
import os, signal
from mtp_jax.planning import tpu
tpu.devices(tpu.topology('v5e:2x2', 1))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_sigterm_prints_nothing_of_libtpu():
  pytest.importorskip('libtpu')
  python = runs.process(['-c', TERMINATED], variables=compiled.VARIABLES)
  _, error = python.communicate()
  assert (python.returncode, error) == (-signal.SIGTERM, '')


def test_a_slice_has_the_devices_that_jax_will_have():
  """A TPU v4 is one device of two cores, a TPU7x is two devices."""
  pytest.importorskip('libtpu')
  out = runs.printed(DEVICES, variables=compiled.VARIABLES)
  found = {generation: of for generation, *of in map(str.split, out.splitlines())}
  four = dict.fromkeys(['v4', 'v5e', 'v5p', 'v6e'], ['4', 'True'])
  assert found == four | dict(tpu7x=['8', 'True'])


@pytest.mark.slow
def test_collectives_of_a_sparsecore_are_counted(tmp_path):
  """Each gradient is reduced and scattered once over eight devices, in float32."""
  model = ['--model.d_model=512', '--model.n_layers=4', '--model.vocab_size=8192']
  data = ['--heads.n=2', '--data.seq_len=512', '--data.batch_size=16']
  out = str(tmp_path / 'plan.json')
  done = _tpu(*model, *data, '--plan.topology=tpu7x:2x2x1', f'--out={out}')
  assert done.returncode == 0, done.stderr
  with open(out) as f:
    found = json.load(f)
  sent = found['collectives']['reduce-scatter']['sent_bytes']
  assert found['devices'] == 8
  assert sent == pytest.approx(7 / 8 * 4 * found['parameters'], rel=0.03)


def test_plan_compiles_ahead_of_time_for_a_tpu(tmp_path):
  out = str(tmp_path / 'plan.json')
  done = _tpu(*SMALL, '--plan.topology=v5e:2x2', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert '4 x TPU v5 lite' in done.stdout and 'compiled in' in done.stdout
  with open(out) as f:
    found = json.load(f)
  assert found['fits'] and found['hbm_bytes'] == 15.75 * 2**30
  assert found['collectives']['all-gather']['sent_bytes'] > 0
  assert found['step_s'] == max(found['roofline_s'].values()) > 0


@pytest.mark.slow
def test_only_gradients_cross_the_network_between_slices(tmp_path):
  found = {}
  for slices, rows in ((2, 16), (2, 32), (4, 32)):
    out = str(tmp_path / 'plan.json')
    done = _tpu(
      '--model.d_model=256',
      '--data.seq_len=256',
      '--heads.n=2',
      '--plan.topology=v5e:2x2',
      f'--plan.slices={slices}',
      f'--mesh.data={slices}',
      f'--data.batch_size={rows}',
      f'--out={out}',
    )
    assert done.returncode == 0, done.stderr
    with open(out) as f:
      found[slices, rows] = json.load(f)
  two = found[2, 16]
  assert 0 < two['roofline_s']['network'] < found[4, 32]['roofline_s']['network']
  # Gradient shards in float32 cross the network, independent of batch and number of
  # slices; everything else stays within a slice.
  sent = two['collectives']['send']['sent_bytes']
  assert 0 < sent <= 2 * two['params_bytes']
  for other in found.values():
    assert other['collectives']['send']['sent_bytes'] == sent
  assert found[4, 32]['collectives'] == two['collectives']


@pytest.mark.slow
def test_too_large_model_exits_with_3():
  done = _tpu(
    '--flagfile=experiments/size/7b.flags',
    '--data.seq_len=4096',
    '--data.batch_size=4',
    '--plan.topology=v5e:2x2',
  )
  assert done.returncode == 3, done.stderr
  assert 'DOES NOT FIT' in done.stdout


def test_one_device_has_no_collectives():
  cfg = tiny.cfg()
  found = ahead._of_state(cfg, tiny.mesh(cfg), jax.devices()[0].device_kind)
  assert found.devices == 1 and found.fits is None
