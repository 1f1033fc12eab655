"""The workdir lock: live, dead and stale holders, concurrent starts, release."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from mtp_jax.config import fields
from mtp_jax.io import paths
from mtp_jax.train import lock
from tests.support import runs


def _other(path, **changes):
  holder = dict(run='x', host=socket.gethostname(), pid=1, started='')
  path.write_text(json.dumps(holder | changes))


def test_live_holder_is_named(tmp_path):
  pid = os.getppid()
  _other(tmp_path / 'lock.json', pid=pid, started=lock._started(pid))
  with pytest.raises(paths.InputError, match=f'written by process {pid}'):
    lock.Lock(str(tmp_path))
  assert json.loads((tmp_path / 'lock.json').read_text())['run'] == 'x'


def test_second_run_in_a_locked_workdir_is_refused(store, tmp_path, capsys):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  held = lock.Lock(str(workdir))
  assert runs.train(store, workdir) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'mtp: --train.workdir={workdir}: is being written')
  assert error.endswith('only one run per workdir\n') and error.count('\n') == 1
  assert os.listdir(workdir) == ['lock.json']
  held.check()


def test_lock_of_a_dead_process_is_taken_over(tmp_path):
  dead = subprocess.Popen([sys.executable, '-c', ''])
  dead.wait()
  _other(tmp_path / 'lock.json', pid=dead.pid)
  lock.Lock(str(tmp_path)).check()


def test_lock_of_a_zombie_process_is_taken_over(tmp_path):
  sleeping = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
  started = lock._started(sleeping.pid)
  _other(tmp_path / 'lock.json', pid=sleeping.pid, started=started)
  with pytest.raises(paths.InputError):
    lock.Lock(str(tmp_path))
  sleeping.kill()
  os.waitid(os.P_PID, sleeping.pid, os.WEXITED | os.WNOWAIT)
  lock.Lock(str(tmp_path)).check()
  sleeping.communicate()


def test_lock_of_a_reused_pid_is_taken_over(tmp_path):
  _other(tmp_path / 'lock.json', pid=os.getppid(), started='0')
  lock.Lock(str(tmp_path)).check()


def test_renewed_lock_of_another_machine_is_live(tmp_path, monkeypatch, capsys):
  path = tmp_path / 'lock.json'
  _other(path, host='elsewhere')
  monkeypatch.setattr(time, 'sleep', lambda _: os.utime(path, (1e10, 1e10)))
  with pytest.raises(paths.InputError, match='on elsewhere'):
    lock.Lock(str(tmp_path))
  assert f'on elsewhere; waiting up to {lock.STALE_S:.0f} s for it to expire' in (
    capsys.readouterr().out
  )
  assert json.loads(path.read_text())['run'] == 'x'


def test_stale_lock_of_another_machine_is_taken_over(tmp_path, monkeypatch, capsys):
  _other(tmp_path / 'lock.json', host='elsewhere')
  monkeypatch.setattr(lock, 'STALE_S', 1.5)
  monkeypatch.setattr(lock, 'LIVES_S', 0.1)
  monkeypatch.setattr(lock, 'LOOK_S', 0.1)
  begin = time.monotonic()
  lock.Lock(str(tmp_path)).check()
  assert 0.5 < time.monotonic() - begin < 30
  assert capsys.readouterr().out.count('waiting up to') == 1


def test_stale_lock_is_watched_in_case_of_clock_skew(tmp_path, monkeypatch, capsys):
  """This clock may be ahead: a lock that is renewed in that time is live."""
  path = tmp_path / 'lock.json'
  _other(path, host='elsewhere')
  os.utime(path, (0, 0))
  with monkeypatch.context() as m:
    m.setattr(time, 'sleep', lambda _: os.utime(path, (20, 20)))
    with pytest.raises(paths.InputError, match='on elsewhere'):
      lock.Lock(str(tmp_path))
  assert f'waiting up to {lock.LIVES_S:.0f} s for' in capsys.readouterr().out
  monkeypatch.setattr(lock, 'LIVES_S', 0.5)
  monkeypatch.setattr(lock, 'LOOK_S', 0.1)
  begin = time.monotonic()
  lock.Lock(str(tmp_path)).check()
  assert 0.5 < time.monotonic() - begin < 30


def test_replaced_holder_raises_lost(tmp_path):
  first = lock.Lock(str(tmp_path))
  _other(tmp_path / 'lock.json')
  with pytest.raises(lock.Lost):
    first.check()
  first.release()
  assert json.loads((tmp_path / 'lock.json').read_text())['run'] == 'x'
  os.remove(tmp_path / 'lock.json')
  with pytest.raises(lock.Lost):
    first.check()


def test_check_renews_the_lock(tmp_path):
  held = lock.Lock(str(tmp_path))
  os.utime(tmp_path / 'lock.json', (0, 0))
  held.check()
  age_s = time.time() - (tmp_path / 'lock.json').stat().st_mtime
  assert age_s < lock.STALE_S


def test_lock_is_renewed_during_a_long_step(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'SHOW_S', 0.02)
  path = tmp_path / 'lock.json'
  held = lock.Lock(str(tmp_path))
  for _ in range(2):
    os.utime(path, (0, 0))
    limit = time.monotonic() + 30
    while not path.stat().st_mtime and time.monotonic() < limit:
      time.sleep(0.01)
    assert path.stat().st_mtime
  held.release()
  assert not held._shows.is_alive() and not path.exists()


def test_unreadable_lock_is_taken_over(tmp_path):
  (tmp_path / 'lock.json').write_text('{"run"')
  lock.Lock(str(tmp_path)).check()


def test_release_deletes_the_lock(tmp_path):
  lock.Lock(str(tmp_path)).release()
  assert not os.listdir(tmp_path)


def test_one_of_many_concurrent_starts_acquires_the_lock(tmp_path):
  # Over a dead holder's lock, which each of them would replace.
  for trial in range(20):
    workdir = tmp_path / str(trial)
    workdir.mkdir()
    _other(workdir / 'lock.json', pid=2**22 + 1)
    barrier, got = threading.Barrier(4), []

    def take():
      barrier.wait()  # noqa: B023
      try:
        got.append(lock.Lock(str(workdir)))  # noqa: B023
      except fields.ConfigError:
        return

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert len(got) == 1
    got[0].check()
    assert os.listdir(workdir) == ['lock.json']


def _foreign(path, pid=None):
  """The lock of a process of another container of this machine: its host name,
  but another namespace of pids. This one's parent has its pid, unless given."""
  pid = pid or os.getppid()
  _other(path, pid=pid, started=lock._started(pid), machine='boot pid:[1]')


def test_lock_of_another_container_is_watched(tmp_path, monkeypatch):
  path = tmp_path / 'lock.json'
  _foreign(path)
  monkeypatch.setattr(time, 'sleep', lambda _: os.utime(path, (1e9, 1e9)))
  with pytest.raises(paths.InputError, match='is being written by'):
    lock.Lock(str(tmp_path))
  _foreign(path, pid=2**22 + 1)  # no local process has this pid, which is irrelevant
  with pytest.raises(paths.InputError, match='is being written by'):
    lock.Lock(str(tmp_path))


@pytest.mark.parametrize('ahead_s', [1e9, 0.0])
def test_lock_with_a_time_in_the_future_is_watched(ahead_s, tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'STALE_S', 1.0)
  monkeypatch.setattr(lock, 'LIVES_S', 0.1)
  monkeypatch.setattr(lock, 'LOOK_S', 0.1)
  _foreign(tmp_path / 'lock.json')
  os.utime(tmp_path / 'lock.json', (time.time() + ahead_s,) * 2)
  slept = []
  real = time.sleep
  monkeypatch.setattr(time, 'sleep', lambda s: (slept.append(s), real(s)))
  lock.Lock(str(tmp_path)).check()
  assert 1 <= len(slept) <= 12


@pytest.mark.parametrize('pid', [0, -1, -(10**30), 10**30])
def test_lock_with_an_impossible_pid_is_taken_over(pid, tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'STALE_S', 0.2)
  monkeypatch.setattr(lock, 'LIVES_S', 0.1)
  monkeypatch.setattr(lock, 'LOOK_S', 0.05)
  _other(tmp_path / 'lock.json', pid=pid)
  lock.Lock(str(tmp_path)).check()


@pytest.mark.parametrize('text', ['null', '[]', '3', '{"run": 1}', '{"run": "x", "pid": "1"}', ''])
def test_malformed_lock_is_taken_over(text, tmp_path):
  (tmp_path / 'lock.json').write_text(text)
  lock.Lock(str(tmp_path)).check()


@pytest.mark.parametrize('how', ['renamed', 'deleted'])
def test_deleted_workdir_raises_config_error(how, tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  held = lock.Lock(str(workdir))
  if how == 'renamed':
    workdir.rename(tmp_path / 'other')
  else:
    (workdir / 'lock.json').unlink()
    workdir.rmdir()
  with pytest.raises(paths.InputError, match='is gone: it was deleted, or'):
    held.check()
  (workdir / 'checkpoints' / '3.tmp').mkdir(parents=True)  # of a save
  held.release()
  assert not workdir.exists()


def test_release_keeps_a_successors_files(tmp_path):
  held = lock.Lock(str(tmp_path))
  _other(tmp_path / 'lock.json')
  (tmp_path / 'checkpoints' / '3.tmp').mkdir(parents=True)  # of its save
  held.release()
  assert (tmp_path / 'checkpoints' / '3.tmp').is_dir()


@pytest.mark.parametrize('theirs', ['lock.json', 'checkpoints/3/a'])
def test_release_in_a_deleted_workdir_removes_no_files(theirs, tmp_path):
  (tmp_path / 'run').mkdir()
  held = lock.Lock(str(tmp_path / 'run'))
  (tmp_path / 'run').rename(tmp_path / 'other')
  file = tmp_path / 'run' / theirs
  file.parent.mkdir(parents=True)
  file.write_text('{}')
  held.release()
  assert file.read_text() == '{}'


def test_machine_id_distinguishes_containers():
  assert 'pid:[' in lock._machine()
