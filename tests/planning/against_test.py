"""--plan.against: what differs between two plans."""

import json
import os

import pytest

from mtp_jax.cli import main
from mtp_jax.planning import against, ahead, hlo, peak, profile, report, run
from tests.support import tiny

SMALL = [f'--{name}={value}' for name, value in (tiny.BASE | {'mesh.fsdp': -1}).items()]
QKV, CE = 'jit(step)/jvp(trunk)/qkv/dot_general', 'jit(step)/transpose(jvp(heads))/ce/dot_general'
ADAM, MUON = 'jit(step)/update/mul', 'jit(step)/update/dot_general'


def _plan(cfg=None, kind='TPU v5 lite', temp=2**30, **cycles):
  """A plan with operations of these scopes."""
  stacks = dict(qkv=QKV, ce=CE, adam=ADAM, muon=MUON)
  operations = tuple(
    hlo.Operation(name, stacks[name], 2, 2**20, 1e9, n) for name, n in cycles.items()
  )
  moved = hlo.Collective('all-gather', (hlo.Array('f32', (2**18,), False),), 4, 3, '', ())
  buffer = peak.Buffer(2**20, 'f32', (4, 8), 'x', 'forward trunk/qkv/dot_general')
  return ahead.Plan(
    cfg or tiny.cfg(plan__profile=True),
    dict(data=1, fsdp=4, tensor=1),
    kind,
    100,
    200,
    float(temp),
    executed_flops=1e12,
    ledger=hlo.Ledger((moved,), operations),
    clock=1.5e9 if kind.startswith('TPU') else None,
    peak=peak.Peak((buffer,)),
  )


def _values(plan):
  return json.loads(json.dumps(report.values_of(plan)))


def _run(tmp_path, monkeypatch, before, now, *flags):
  """Runs the command on a plan that is not compiled; returns (exit status, its JSON)."""
  (tmp_path / 'before.json').write_text(json.dumps(_values(before)))
  given = []

  def plan(cfg):
    given.append(cfg)
    return now._replace(cfg=cfg)

  monkeypatch.setattr(ahead, 'plan', plan)
  out = tmp_path / 'now.json'
  args = [*SMALL, f'--plan.against={tmp_path}/before.json', f'--out={out}', *flags]
  status = main.main(['plan', *args])
  assert given[0].plan.profile  # implied
  return status, json.loads(out.read_text())


def test_scopes_totals_and_flags_that_differ(tmp_path, monkeypatch, capsys):
  before = _plan(temp=2**31, qkv=3 * 10**6, ce=10**6, adam=10**6)
  now = _plan(qkv=10**6, ce=10**6, muon=5 * 10**6)
  flags = '--heads.n=2', '--data.seq_len=32'
  status, values = _run(tmp_path, monkeypatch, before, now, *flags)
  assert status == run.FITS
  found = values['against']
  assert found['file'] == f'{tmp_path}/before.json'
  assert found['differs'] == {'heads': [4, 2], 'seq_len': [16, 32]}
  # By difference; 2 executions each; what is equal is not a row.
  assert found['scopes'] == [
    dict(scope='forward update/dot_general', before=None, now=10**7, difference=10**7),
    dict(
      scope='forward trunk/qkv/dot_general', before=6 * 10**6, now=2 * 10**6, difference=-4 * 10**6
    ),
    dict(scope='forward update/mul', before=2 * 10**6, now=None, difference=-2 * 10**6),
  ]
  totals = found['totals']
  assert totals['estimated_cycles'] == dict(before=10**7, now=14 * 10**6, ratio=1.4)
  assert totals['temp_bytes'] == dict(before=2**31, now=2**30, ratio=0.5)
  assert totals['total_bytes']['before'] == 2**31 + 300
  sent = 3 * 2**20 * 3 / 4
  assert found['collectives']['all-gather']['before'] == dict(count=3, sent_bytes=sent)
  printed = [line.split() for line in capsys.readouterr().out.splitlines()]
  for line in (
    'heads 4 2',
    'estimated cycles (M) 10 14 1.400',
    'temporaries (GiB) 2 1 0.500',
    'all-gather 3 2.2 3 2.2',
    'new 10.00 +10.00 forward update/dot_general',
    '6.00 2.00 -4.00 forward trunk/qkv/dot_general',
    '2.00 gone -2.00 forward update/mul',
  ):
    assert line.split() in printed


def test_plan_against_itself_has_no_difference(tmp_path, monkeypatch, capsys):
  plan = _plan(tiny.cfg(plan__profile=True, mesh__fsdp=-1), qkv=10**6)
  _, values = _run(tmp_path, monkeypatch, plan, plan)
  found = values['against']
  assert found['differs'] == {} and found['scopes'] == []
  assert {of['ratio'] for of in found['totals'].values()} == {1.0}
  printed = capsys.readouterr().out
  assert 'no difference in devices, model, loss or batch' in printed
  assert 'every scope has the same cycles' in printed


def test_gpus_are_compared_without_cycles(tmp_path, monkeypatch, capsys):
  kind = 'NVIDIA H100 80GB HBM3'
  before, now = _plan(kind=kind, temp=2**31, qkv=0), _plan(kind=kind, qkv=0)
  status, values = _run(tmp_path, monkeypatch, before, now)
  assert status == run.FITS and values['against']['scopes'] is None
  assert values['against']['totals']['temp_bytes']['ratio'] == 0.5
  assert values['against']['totals']['executed_flops_per_step']['ratio'] == 1
  printed = capsys.readouterr().out
  assert against.NO_CYCLES in printed and 'collectives, count and MiB' in printed
  # Also with a plan that has no operations, and one that was not compiled.
  shard = before._replace(ledger=None, temp_bytes=None, executed_flops=None, peak=None)
  _, values = _run(tmp_path, monkeypatch, shard, now)
  assert values['against']['totals']['temp_bytes'] == dict(before=None, now=2**30, ratio=None)
  # Another kind of device has cycles, which are not compared.
  _, values = _run(tmp_path, monkeypatch, before, _plan(qkv=10**6))
  assert values['against']['scopes'] is None
  assert values['against']['differs']['device_kind'] == [kind, 'TPU v5 lite']


def _bad_files():
  plan = _values(_plan(qkv=10**6))
  row = plan['operations'][0]
  return {
    'none': (None, 'cannot be read: No such file or directory'),
    'folder': ('', 'cannot be read: Is a directory'),
    'text': ('{"a', 'is not JSON'),
    'bytes': (b'\xff', 'is not JSON: it is not UTF-8'),
    'list': ([1], 'is not a plan: must be an object'),
    'config': (dict(version=1), 'is not a plan: has no field device_kind'),
    'sweep': (dict(sweep=['heads.n=1,2'], rows=[plan]), 'is of --plan.sweep'),
    'search': (dict(candidates=3, rows=[plan], best=None), 'is of --plan.search_mesh'),
    'without': (plan | dict(operations=None), 'has no operations'),
    'memory': (plan | dict(temp_bytes='many'), 'is not a plan: temp_bytes="many": must be'),
    'row': (plan | dict(operations=[row | dict(cycles='x')]), 'operations[0].cycles="x": must'),
    'kinds': (plan | dict(collectives={'send': 3}), 'collectives.send=3: must be an object'),
  }


@pytest.mark.parametrize('name', _bad_files())
def test_bad_file_raises_before_compiling(name, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(ahead, 'plan', None)
  content, problem = _bad_files()[name]
  path = tmp_path / 'before.json'
  if content == '':
    os.mkdir(path)
  elif content is not None:
    data = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
  assert main.main(['plan', *SMALL, f'--plan.against={path}']) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'mtp: --plan.against={path}: ') and error.count('\n') == 1
  assert problem in error and 'a file that mtp plan --plan.profile --out wrote' in error


@pytest.mark.parametrize('flag', ['against=x.json', 'profile=True'])
@pytest.mark.parametrize('other', ['sweep=heads.n=1,2', 'search_mesh'])
def test_sweeps_and_searches_are_refused(other, flag, capsys, monkeypatch):
  monkeypatch.setattr(ahead, 'plan', None)
  assert main.main(['plan', *SMALL, f'--plan.{flag}', f'--plan.{other}']) == 2
  error = capsys.readouterr().err
  name = other.partition('=')[0]
  assert f'--plan.{flag}: not supported together with --plan.{name}' in error


def test_profile_is_written_and_printed_with_peak_buffers(capsys):
  plan = _plan(qkv=10**6)._replace(temp_bytes=2.0**21)
  values = report.values_of(plan)
  (row,) = values['peak_buffers']
  assert row == dict(shape='f32[4,8]', bytes=2**20, scope='forward trunk/qkv/dot_general')
  assert values['peak_estimate_bytes'] == 2**20 and values['temp_bytes'] == 2**21
  lines = report.lines_of(plan)
  title = next(i for i, line in enumerate(lines) if line.startswith('temporaries at the peak'))
  assert lines[title].endswith('1.00 MiB; the compiler states 2.00 MiB')
  assert lines[title + 2].split() == ['1.00', 'f32[4,8]', *row['scope'].split()]


@pytest.mark.parametrize(
  'name, scope',
  [
    ('broadcast.215', 'forward broadcast'),
    ('jit(step)/jvp(trunk)/while/body/copy.2', 'forward trunk/copy'),
    ('state.opt_state[1].mu.embed', 'forward state.opt_state[1].mu.embed'),
    (CE, 'backward heads/ce/dot_general'),
    ('', 'forward other'),
  ],
)
def test_scope_has_no_numbers_of_the_compiler(name, scope):
  assert profile.scope_of(name) == scope
