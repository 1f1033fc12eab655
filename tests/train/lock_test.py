"""One writer a workdir."""

import json
import os
import socket
import subprocess
import sys

import pytest

from mtp_jax import config
from mtp_jax.train import lock
from tests import runs


def _other(path, **changes):
  holder = dict(run='x', host=socket.gethostname(), pid=1, started='')
  path.write_text(json.dumps(holder | changes))


def test_a_living_holder_is_named(tmp_path):
  pid = os.getppid()
  _other(tmp_path / 'lock.json', pid=pid, started=lock._started(pid))
  with pytest.raises(config.ConfigError, match=f'written by process {pid}'):
    lock.Lock(str(tmp_path))
  assert json.loads((tmp_path / 'lock.json').read_text())['run'] == 'x'


def test_a_second_run_in_a_living_workdir_is_refused(tmp_path, capsys):
  store = runs.make_store(str(tmp_path / 'store'))
  workdir = tmp_path / 'run'
  workdir.mkdir()
  held = lock.Lock(str(workdir))
  assert runs.train(store, workdir) == 2
  error = capsys.readouterr().err
  assert '--train.workdir=' in error and 'one run a workdir' in error
  assert os.listdir(workdir) == ['lock.json']
  held.check()


def test_a_dead_process_loses_its_lock(tmp_path):
  dead = subprocess.Popen([sys.executable, '-c', ''])
  dead.wait()
  _other(tmp_path / 'lock.json', pid=dead.pid)
  lock.Lock(str(tmp_path)).check()


def test_a_reused_pid_is_not_the_holder(tmp_path):
  _other(tmp_path / 'lock.json', pid=os.getppid(), started='0')
  lock.Lock(str(tmp_path)).check()


def test_another_machine_is_believed_until_it_is_silent(tmp_path):
  path = tmp_path / 'lock.json'
  _other(path, host='elsewhere')
  with pytest.raises(config.ConfigError, match='on elsewhere'):
    lock.Lock(str(tmp_path))
  os.utime(path, (0, 0))
  lock.Lock(str(tmp_path)).check()


def test_who_was_replaced_notices(tmp_path):
  first = lock.Lock(str(tmp_path))
  _other(tmp_path / 'lock.json')
  with pytest.raises(lock.Lost):
    first.check()
  first.release()
  assert (tmp_path / 'lock.json').exists()


def test_release(tmp_path):
  lock.Lock(str(tmp_path)).release()
  assert not os.listdir(tmp_path)
