"""Runs of two processes: equality with one, resume, failures, signals."""

import json
import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from mtp_jax.checkpoint import restore
from mtp_jax.parallel import distributed
from mtp_jax.train import lock, loop
from tests.support import pairs, runs

# A tensor axis over all four devices, i.e. over both processes.
WIDE = dict(mesh__fsdp=1, mesh__tensor=4, model__n_attn_heads=4)

# Several runs in one session of the processes, since import and initialization take
# longer than the runs. First it prints the rows that each process holds.
SESSION = """
import json, sys
import jax
import numpy as np
from mtp_jax.cli import flags
from mtp_jax.parallel import distributed, sharding
from mtp_jax.train import lock, loop

meshes, path, args = map(json.loads, sys.argv[1:])
cfgs = [flags.parse(a).config() for a in args]

def rows():
  held = []
  whole = np.arange(2 * 8 * 3).reshape(2, 8, 3)
  for order, sizes in meshes:
    mesh = jax.sharding.Mesh(
      np.array(jax.devices())[order].reshape(sizes), sharding.AXES,
      axis_types=(jax.sharding.AxisType.Explicit,) * 3)
    mine = sharding.local_rows(mesh, 8)
    x = sharding.put_batch(mesh, dict(x=whole[:, mine]))['x']
    assert x.shape == whole.shape
    for shard in x.addressable_shards:
      np.testing.assert_array_equal(shard.data, whole[shard.index])
    held.append(mine.tolist())
  with open(f'{path}/rows{jax.process_index()}', 'w') as f:
    json.dump(held, f)

def session():
  rows()
  return max([loop.train(cfg) for cfg in cfgs], default=0)

sys.exit(distributed.run(cfgs[0], session))
"""

# The command line, with an action at the third batch.
AT_BATCH_3 = """
import errno, json, os, signal, sys
from mtp_jax.cli import main
from mtp_jax.parallel import sharding

put, calls = sharding.put_batch, []

def patched(mesh, batch):
  calls.append(1)
  if len(calls) == 3:
    %s
  return put(mesh, batch)

sharding.put_batch = patched
sys.exit(main.main(['train', *sys.argv[1:]]))
"""


def _happens(what: str) -> list[str]:
  return ['-c', AT_BATCH_3 % what]


@pytest.fixture
def four_devices(monkeypatch):
  pairs.of_four(monkeypatch)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('processes')


@pytest.fixture(scope='module')
def one(store, folder):
  """Workdir of one process."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    pairs.of_four(monkeypatch)
    assert runs.train(store, folder / 'one', **pairs.MESH) == 0
  return folder / 'one'


MESHES = [  # order of devices, (data, fsdp, tensor), rows of either process
  ([0, 1, 2, 3], (2, 2, 1), [[0, 1, 2, 3], [4, 5, 6, 7]]),
  ([0, 1, 2, 3], (1, 1, 4), [[*range(8)], [*range(8)]]),
  ([0, 2, 1, 3], (1, 2, 2), [[*range(8)], [*range(8)]]),
  ([0, 2, 1, 3], (1, 4, 1), [[0, 1, 4, 5], [2, 3, 6, 7]]),
  ([2, 3, 0, 1], (2, 1, 2), [[4, 5, 6, 7], [0, 1, 2, 3]]),
]


@pytest.fixture(scope='module')
def session(store, folder):
  """Returns the pair's workdirs: with the flags of `one`, and with the wide mesh."""
  found = folder / 'two', folder / 'two_wide'
  port, meshes = pairs.port(), json.dumps([mesh[:2] for mesh in MESHES])
  running = []
  for index in (0, 1):
    args = [
      runs.args(store, str(workdir), **changes, **pairs.flags(index, port))
      for workdir, changes in zip(found, (pairs.MESH, WIDE), strict=True)
    ]
    command = ['-c', SESSION, meshes, json.dumps(str(folder)), json.dumps(args)]
    running.append(runs.process(command, devices=2))
  (status, out, error), silent = pairs.ends(running)
  assert status == 0, error
  assert silent[:2] == (0, ''), silent[2]
  assert 'step 9/9  loss' in out and 'step 6/6  loss' in out
  return found


def _until_3(workdir, copy):
  """Returns a copy of a run as if killed after it had saved step 3."""
  shutil.copytree(workdir, copy)
  for step in ('6', '9'):
    shutil.rmtree(copy / 'checkpoints' / step)


def _assert_close(mine, theirs):
  """Asserts that records are close; sums over devices may differ in order."""
  mine, theirs = runs.records(mine), runs.records(theirs)
  assert len(mine) == len(theirs) > 6
  for a, b in zip(mine, theirs, strict=True):
    assert a.keys() == b.keys() and a['kind'] == b['kind']
    for name in set(a) - {'kind'}:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-6, err_msg=name)


# Equality.


def test_two_processes_equal_one(session, one, store, folder, tmp_path, four_devices):
  """One test, as tests that run in parallel cannot share a session."""
  for process in (0, 1):
    held = json.loads((folder / f'rows{process}').read_text())
    assert held == [rows[process] for *_, rows in MESHES]
  assert runs.train(store, tmp_path, **WIDE) == 0
  for mine, theirs in zip(session, (one, tmp_path), strict=True):
    _assert_close(mine, theirs)
    assert restore.steps(str(mine)) == restore.steps(str(theirs))
    assert sorted(os.listdir(mine)) == sorted(os.listdir(theirs))
    assert 'processes' not in (mine / 'run.flags').read_text()


# Signals and failures.


@pytest.mark.slow
def test_resume_across_one_and_two_processes_with_a_signal(
  store, one, tmp_path, capsys, four_devices
):
  run = tmp_path / 'run'
  _until_3(one, run)
  # The third batch is that of step 6; a signal at it takes effect two steps later,
  # see distributed.Stop.
  signalled = _happens('os.kill(os.getpid(), signal.SIGTERM)')
  ends = pairs.ends(pairs.pair(store, run, of_1=signalled))
  assert [e[0] for e in ends] == [loop.EXIT_INTERRUPTED] * 2, ends
  assert 'step 3 of 9, 6 remaining' in ends[0][1]
  assert 'interrupted: saved step 8; run the same' in ends[0][1]
  assert ends[1][1] == ''
  assert restore.steps(str(run)) == [3, 6, 8]
  capsys.readouterr()
  assert runs.train(store, run, **pairs.MESH) == 0
  assert 'step 8 of 9, 1 remaining' in capsys.readouterr().out
  _assert_close(run, one)


def _slurm_pair(stores, workdir):
  """Starts them like Slurm's srun: environments differ, flags are equal."""
  job = dict(
    SLURM_JOB_ID=str(pairs.port()),
    SLURM_STEP_NODELIST='localhost',
    SLURM_NTASKS='2',
    SLURM_STEP_NUM_NODES='1',
  )
  running = []
  for index, store in enumerate(stores):
    auto = dict(distributed__coordinator_address='auto', distributed__heartbeat_timeout_s=10)
    args = runs.args(store, str(workdir), **pairs.MESH, **auto)
    task = dict(SLURM_PROCID=str(index), SLURM_LOCALID=str(index))
    running.append(runs.process([*pairs.MAIN, *args], devices=2, variables=job | task))
  return running


def test_input_error_of_one_process_aborts_both(store, tmp_path):
  workdir = tmp_path / 'run'
  missing = f'{tmp_path}/none'
  ends = pairs.ends(_slurm_pair([store, missing], workdir))
  assert [e[0] for e in ends] == [2, 2], ends
  line = f'mtp: --data.store={missing}: no such directory'
  assert ends[1][2].splitlines()[-1].startswith(line)
  assert 'mtp:' not in ends[0][2] and not workdir.exists()


@pytest.mark.slow
def test_crash_of_one_process_aborts_both(store, tmp_path):
  mark = tmp_path / 'crashed'
  crash = f'open({str(mark)!r}, "w").close(); raise OSError("disk gone")'
  ends = pairs.ends(pairs.pair(store, tmp_path, of_1=_happens(crash)))
  assert time.time() - mark.stat().st_mtime < 30
  assert ends[0][0] != 0 and ends[1][0] == 1, ends
  # Process 0 prints the failed process's traceback too.
  assert '[1/2] Traceback' in ends[1][2] and 'disk gone' in ends[1][2]
  assert '[0/2] aborting: another process failed:\n[1] Traceback' in (ends[0][2])
  assert 'disk gone' in ends[0][2]


@pytest.mark.slow
def test_process_0_exits_after_the_other_has_aborted(store, tmp_path):
  full = _happens('raise OSError(errno.ENOSPC, "", "metrics.jsonl")')
  ends = pairs.ends(pairs.pair(store, tmp_path, of_0=full))
  assert [e[0] for e in ends] == [2, 1], ends
  assert '[0/2] metrics.jsonl: no space left on device' in ends[0][2]
  assert '[1/2] aborting: another process failed:\n[0] metrics.jsonl: no space' in ends[1][2]
  assert 'Traceback' not in ends[0][2] + ends[1][2]


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_killed_process_is_detected_by_heartbeat(store, tmp_path, number):
  """Also of a process that keeps its connections but does not respond."""
  silent = _happens(f'os.kill(os.getpid(), {number:d})')
  other, silent = pairs.pair(store, tmp_path, of_1=silent)
  (end,) = pairs.ends([other])
  silent.kill()
  silent.communicate()
  assert end[0] not in (0, None), end
  assert 'step 2/9' in end[1] and 'Traceback' not in end[2], end[2]


@pytest.mark.parametrize(
  'error, expected',
  [
    (
      jax.errors.JaxRuntimeError(
        'UNKNOWN: Gloo all-reduce failed: Read error [::1]:9: Connection reset by peer\nmore'
      ),
      'aborting: another process was lost: UNKNOWN: Gloo all-reduce failed: Read'
      ' error [::1]:9: Connection reset by peer',
    ),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'), ''),
    (
      ValueError('UNKNOWN: Gloo AllGather failed: Connection closed by peer'),
      'aborting: another process was lost: UNKNOWN: Gloo AllGather failed:'
      ' Connection closed by peer',
    ),
    (ValueError('a barrier'), ''),
  ],
)
def test_lost_peer_is_a_one_line_error(error, expected, monkeypatch):
  monkeypatch.setattr(distributed, 'is_multiprocess', lambda: True)
  assert distributed._peer_loss(error) == expected


def test_signal_right_after_check_is_not_lost(monkeypatch):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('data',))
  stop = distributed.Stop(mesh)
  check = stop.check

  def then_a_signal():
    check()
    os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(stop, 'check', then_a_signal)
  with stop.on_signal(), pytest.raises(distributed.Interrupted):
    with stop.interrupting():
      pytest.fail('not interrupted')
  assert stop.requested.is_set() and not stop._interrupts


@pytest.mark.slow
def test_auto_needs_a_cluster(store, tmp_path):
  args = runs.args(store, str(tmp_path), distributed__coordinator_address='auto')
  ((status, _, error),) = pairs.ends([runs.process([*pairs.MAIN, *args])])
  assert status == 2
  assert error.splitlines()[-1].startswith(
    'mtp: --distributed.coordinator_address=auto: jax.distributed initialization failed: '
  )


@pytest.mark.slow
def test_different_flags_between_processes_are_refused(store, tmp_path):
  ends = pairs.ends(pairs.pair(store, tmp_path, only_1='--optim.lr=0.5'))
  assert [e[0] for e in ends] == [2, 2], ends
  assert ends[1][2].splitlines()[-1] == (
    'mtp: --optim.lr=0.5: on process 1, but 0.01 on process 0; give all the same flags'
  )


@pytest.mark.slow
def test_resume_with_another_store_is_refused(store, tmp_path):
  other = runs.make_store(str(tmp_path / 'other'), seed=1)
  ends = pairs.ends(pairs.pair(store, tmp_path, only_1=f'--data.store={other}'))
  assert [e[0] for e in ends] == [2, 2], ends
  assert 'process 1 reads a different store' in ends[1][2]


@pytest.mark.slow
def test_locked_workdir_is_refused_by_both_processes(store, tmp_path):
  held = lock.Lock(str(tmp_path))
  ends = pairs.ends(pairs.pair(store, tmp_path))
  assert [e[0] for e in ends] == [2, 2], ends
  assert 'is being written by process' in ends[0][2]
  assert 'mtp:' not in ends[1][2]
  held.check()


@pytest.mark.slow
def test_lost_lock_aborts_both_processes(store, tmp_path):
  path = str(tmp_path / 'lock.json')
  lose = _happens(
    f'held = json.load(open({path!r})); json.dump(held | dict(run="other"), open({path!r}, "w"))'
  )
  ends = pairs.ends(pairs.pair(store, tmp_path, of_0=lose))
  assert [e[0] for e in ends] == [loop.EXIT_REPLACED] * 2, ends
  assert 'taken by another run' in ends[0][2] and 'mtp:' not in ends[1][2]
  assert len(runs.records(tmp_path)) == 2
  assert restore.steps(str(tmp_path)) == []


@pytest.mark.slow
def test_launch_script_forwards_signals_and_exit_status(store, tmp_path):
  args = runs.args(store, str(tmp_path), **pairs.MESH | dict(train__steps=200))
  script = subprocess.Popen(
    ['launch/processes.sh', '2', 'train', *args],
    cwd=runs.ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=runs.environment(devices=2),
  )
  for line in script.stdout:
    if line.startswith('step 2/'):
      script.terminate()
      break
  ((status, out, error),) = pairs.ends([script])
  assert status == loop.EXIT_INTERRUPTED, error
  assert 'interrupted: saved step' in out


@pytest.mark.slow
def test_evaluation_on_two_processes_equals_one(session, tmp_path):
  port, running = pairs.port(), []
  for index in (0, 1):
    flags = [f'--{k.replace("__", ".")}={v}' for k, v in pairs.flags(index, port).items()]
    out = tmp_path / f'{index}.json'
    command = [
      '-m',
      'mtp_jax',
      'eval',
      f'{session[0]}',
      f'--out={out}',
      '--train.compilation_cache=',
      *flags,
    ]
    running.append(runs.process(command, devices=2))
  ends = pairs.ends(running)
  assert [e[0] for e in ends] == [0, 0], ends
  assert ends[1][1] == '' and not (tmp_path / '1.json').exists()
  found = json.loads((tmp_path / '0.json').read_text())
  logged = runs.records(session[0])[-1]
  for name in set(logged) - {'kind'}:
    np.testing.assert_allclose(found[name], logged[name], rtol=1e-6)


@pytest.mark.slow
def test_resume_on_other_process_counts_and_meshes(store, one, tmp_path):
  """The same rows in the same order, whichever process reads them."""
  run = tmp_path / 'run'
  meshes = (
    (1, dict(mesh__data=2, mesh__fsdp=2)),
    (2, dict(mesh__data=4, mesh__fsdp=1)),
    (4, dict(mesh__data=1, mesh__fsdp=4)),
  )
  for (n, mesh), steps in zip(meshes, (3, 6, 9), strict=True):
    port, running = pairs.port(), []
    for index in range(n):
      own = dict(
        distributed__coordinator_address=f'localhost:{port}' if n > 1 else '',
        distributed__num_processes=n,
        distributed__process_id=index,
        distributed__heartbeat_timeout_s=10,
      )
      changes = pairs.MESH | mesh | own | dict(train__steps=steps, optim__warmup_steps=2)
      args = runs.args(store, str(run), **changes)
      running.append(runs.process([*pairs.MAIN, *args], devices=4 // n))
    for status, _, error in pairs.ends(running):
      assert status == 0, error
  whole = tmp_path / 'whole'
  args = runs.args(store, str(whole), **pairs.MESH | dict(optim__warmup_steps=2))
  ((status, _, error),) = pairs.ends([runs.process([*pairs.MAIN, *args], devices=4)])
  assert status == 0, error
  mine, theirs = ([r for r in runs.records(path) if r['kind'] == 'train'] for path in (run, whole))
  assert [r['step'] for r in mine] == list(range(1, 10))
  for a, b in zip(mine, theirs, strict=True):
    for name in set(a) - {'kind'}:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)


# A process that sleeps between two steps.
SLOW = """
import sys, time
from mtp_jax.cli import main
from mtp_jax.parallel import sharding
put_batch = sharding.put_batch

def slowly(*args):
  time.sleep(0.3)
  return put_batch(*args)

sharding.put_batch = slowly
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_straggler_is_logged(store, tmp_path):
  ends = pairs.ends(pairs.pair(store, tmp_path / 'run', of_1=['-c', SLOW, 'train']))
  assert [e[0] for e in ends] == [0, 0], ends
  assert 'process 1 of 2 is a straggler: at work ' in ends[0][1], ends[0][1]
  assert 'process 0 of 2 is a straggler' not in ends[0][1]


# Process 1 sees a checkpoint that process 0 does not see yet, or vice versa.
BLIND = """
import sys
from mtp_jax.checkpoint import restore
from mtp_jax.cli import main
steps = restore.steps
restore.steps = lambda path: steps(path)[: -1 if 'source' in path else None]
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_processes_agree_on_the_init_from_checkpoint(one, store, tmp_path):
  source, found = tmp_path / 'source', []
  shutil.copytree(one, source)
  port, running = pairs.port(), []
  for index, command in enumerate((pairs.MAIN, ['-c', BLIND, 'train'])):
    changes = (
      pairs.MESH
      | pairs.flags(index, port)
      | dict(
        train__init_from=source,
        train__steps=2,
        optim__warmup_steps=1,
        optim__lr=1e-9,
        optim__weight_decay=0,
      )
    )
    args = runs.args(store, str(tmp_path / 'run'), **changes)
    running.append(runs.process([*command, *args], devices=2))
  for status, _, error in pairs.ends(running):
    assert status == 0, error
  for path, step in ((source, 9), (tmp_path / 'run', 2)):
    found.append(runs.restored(path, step).params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found)
