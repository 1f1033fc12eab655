"""Runs in gs://, over HTTP with a bucket of this process (tests/support/gcs.py)."""

import json
import os
import signal
import threading
import time

import pytest
from etils.epath import backend

from mtp_jax.checkpoint import restore
from mtp_jax.cli import main
from mtp_jax.config import fields, parse
from mtp_jax.io import paths
from mtp_jax.train import goodput, lock, loop, metrics
from tests.support import gcs, runs, signals

HERE = ['--train.compilation_cache=', '--mesh.fsdp=-1']


@pytest.fixture(scope='module')
def server():
  backend.fsspec_backend._get_filesystem.cache_clear()
  server = gcs.Server('bucket')
  with pytest.MonkeyPatch.context() as patch:
    for name, value in server.variables.items():
      patch.setenv(name, value)
    yield server
  backend.fsspec_backend._get_filesystem.cache_clear()
  server.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
  monkeypatch.setattr(lock, 'SETTLE_S', 0.2)


@pytest.fixture(scope='module')
def finished(server, undisturbed):
  """gs:// workdir of a finished run; its steps are those of `undisturbed`."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lock, 'SETTLE_S', 0.2)
    cfg = parse.from_json((undisturbed / 'config.json').read_text())
    flags = dict(train__checkpoint_every=3)
    where = 'gs://bucket/finished'
    assert runs.train(cfg.data.store, where, **flags) == 0
  return where


def _names(server, folder):
  return sorted(
    name.removeprefix(f'{folder}/')
    for name in server.objects['bucket']
    if name.startswith(f'{folder}/')
  )


def _fails(capsys, *args) -> str:
  capsys.readouterr()
  assert main.main([str(a) for a in args]) == 2
  error = capsys.readouterr().err
  assert error.startswith('mtp: ') and error.count('\n') == 1, error
  return error[len('mtp: ') : -1]


# Training runs.


@pytest.mark.slow
def test_resume_from_bucket_matches_run_on_disk(server, store, undisturbed, monkeypatch, capsys):
  where = 'gs://bucket/stopped'
  stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
  signals.at_batch(monkeypatch, 4, stop)
  assert runs.train(store, where) == loop.EXIT_INTERRUPTED
  assert restore.steps(where) == [4]
  assert [r['step'] for r in metrics.read(where)] == [1, 2, 3, 4]
  monkeypatch.undo()
  assert runs.train(store, where) == 0
  out = capsys.readouterr().out
  assert 'step 4 of 6, 2 remaining' in out and f'writing to {where}' in out
  runs.assert_same(runs.restored(where, 6), runs.restored(undisturbed, 6))
  assert runs.records(where) == runs.records(undisturbed)
  sessions = goodput.summary(goodput.read(where))['sessions']
  assert [(s['start'], s['end']) for s in sessions] == [(0, 'interrupted'), (4, 'finished')]
  names = [n for n in _names(server, 'stopped') if 'checkpoints/' not in n]
  events = [n for n in names if n.startswith('tensorboard/')]
  assert sorted(set(names) - set(events)) == [
    'config.json',
    'goodput.jsonl',
    'metrics.jsonl',
    'run.flags',
  ]
  found = [server.objects['bucket'][f'stopped/{name}'].data for name in events]
  # Two starts within a second share a name, as on disk.
  assert any(b'train/loss' in data for data in found)
  assert runs.train(store, where) == 0  # already finished
  assert 'training already finished (step 6)' in capsys.readouterr().out


def test_incomplete_checkpoint_in_bucket_is_ignored(server, store, undisturbed, finished):
  where = _copy(server, finished, 'killed')
  objects = server.objects['bucket']
  # The result of a kill: everything but the commit mark, which is written last.
  del objects['killed/checkpoints/6/commit_success.txt']
  assert restore.steps(where) == [3]
  assert runs.train(store, where, train__checkpoint_every=3) == 0
  runs.assert_same(runs.restored(where, 6), runs.restored(undisturbed, 6))


def test_corrupt_checkpoint_in_bucket_falls_back(server, store, undisturbed, finished, capsys):
  where = _copy(server, finished, 'flipped')
  names = [n for n in server.objects['bucket'] if 'flipped/checkpoints/6' in n]
  largest = max(names, key=lambda n: len(server.objects['bucket'][n].data))
  data = bytearray(server.objects['bucket'][largest].data)
  data[len(data) // 2] ^= 1
  server.put('bucket', largest, data)
  wrong = f'checkpoint 6 is corrupt: {largest.split("/6/")[1]} does not match'
  flags = dict(train__checkpoint_every=3)
  assert runs.train(store, where, **flags) == 0
  out = capsys.readouterr().out
  assert wrong in out and 'resuming from step 3' in out
  runs.assert_same(runs.restored(where, 6), runs.restored(undisturbed, 6))
  assert runs.records(where) == runs.records(undisturbed)
  aside = _names(server, 'flipped/checkpoints/6.corrupt')
  assert aside == _names(server, 'finished/checkpoints/6')


def test_quarantine_moves_the_commit_mark_first(server, finished, monkeypatch):
  """A kill while files are moved must not leave an apparently complete checkpoint."""
  where = _copy(server, finished, 'halfway')
  folder = type(paths.as_path(where))

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(folder, 'rename', killed)
  with pytest.raises(KeyboardInterrupt):
    restore.quarantine(where, 6)
  assert restore.steps(where) == [3]


def _copy(server, where, name) -> str:
  for old in _names(server, where.removeprefix('gs://bucket/')):
    data = server.get('bucket', f'{where.removeprefix("gs://bucket/")}/{old}')
    server.put('bucket', f'{name}/{old}', data.data)
  return f'gs://bucket/{name}'


def test_commands_read_from_and_write_to_bucket(server, undisturbed, finished, tmp_path, capsys):
  found = {}
  for name, of in (('here', undisturbed), ('there', finished)):
    out = f'gs://bucket/{name}.json'
    args = ['eval', f'{of}', f'--out={out}', *HERE]
    assert main.main(args) == 0
    found[name] = json.loads(server.get('bucket', f'{name}.json').data)
    assert found[name].pop('workdir') == str(of)
  assert found['here'] == found['there']

  rows = 'gs://bucket/rows.jsonl'
  server.put('bucket', 'prompts.txt', b'ab\r\ncd\n')
  args = [
    'generate',
    f'{finished}',
    '--decode.max_new_tokens=4',
    '--decode.prompts=gs://bucket/prompts.txt',
    f'--out={rows}',
    *HERE,
  ]
  assert main.main(args) == 0
  lines = server.get('bucket', 'rows.jsonl').data.splitlines()
  assert [json.loads(line)['prompt'] for line in lines] == ['ab', 'cd']
  assert not _names(server, 'rows.jsonl.part')

  for out in ('gs://bucket/hf', str(tmp_path / 'hf')):
    args = ['export', f'{finished}/checkpoints/6']
    assert main.main([*args, f'--export.out={out}', *HERE]) == 0
  for path in (tmp_path / 'hf').iterdir():
    assert server.get('bucket', f'hf/{path.name}').data == path.read_bytes()
  again = _fails(capsys, 'export', f'{finished}', '--export.out=gs://bucket/hf', *HERE)
  assert again == ('gs://bucket/hf: is not empty; choose another directory')

  args = [f'--import.path={tmp_path / "hf"}', '--train.workdir=gs://bucket/in']
  assert main.main(['import', *args, *HERE]) == 0
  assert restore.steps('gs://bucket/in') == [0]
  assert _fails(capsys, 'import', '--import.path=gs://bucket/hf', *HERE) == (
    'gs://bucket/hf: must be local; copy it to a local disk'
  )

  assert main.main(['report', finished]) == 0
  assert f'report: {finished}/report.html' in capsys.readouterr().out
  page = server.get('bucket', 'finished/report.html').data.decode()
  assert f'finished: {finished}' in page
  names = [x['name'] for x in server.list('bucket', {})['items']]
  png = next(name for name in names if name.endswith('.png'))
  assert server.get('bucket', png).data[:4] == b'\x89PNG'


def test_init_from_a_run_in_bucket(server, undisturbed, finished, tmp_path, capsys):
  args = [
    'train',
    f'--flagfile={finished}/run.flags',
    '--train.steps=7',
    f'--train.init_from={finished}',
    f'--train.workdir={tmp_path}',
    '--train.profile_start=1',
    '--train.profile_steps=1',
  ]
  assert main.main([*args, *HERE]) == 0
  assert f'initialized from {finished}, step 6' in capsys.readouterr().out
  there = 'gs://bucket/profiled'
  assert main.main([*args, f'--train.workdir={there}', *HERE]) == 0
  (trace,) = _names(server, 'profiled/profile')[-1:]
  assert trace.startswith('plugins/profile/')
  assert runs.records(there) == runs.records(tmp_path)


# Appended files.


def test_appended_file_is_uploaded_periodically(server, monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(paths.time, 'monotonic', lambda: now[0])
  file = paths.open_append('gs://bucket/lines', b'0\n')
  there = lambda: server.get('bucket', 'lines').data  # noqa: E731
  assert there() == b'0\n'
  for line in (b'1\n', b'2\n'):
    file.write(line)
    file.flush()
  assert there() == b'0\n'
  now[0] += paths.EVERY_S
  file.flush()
  assert there() == b'0\n1\n2\n'
  file.write(b'3\n')
  file.sync()
  assert there().endswith(b'3\n')
  file.write(b'4\n')
  file.close()
  assert there() == b'0\n1\n2\n3\n4\n'
  n = len(server.log)
  file.close()
  assert len(server.log) == n  # nothing to upload


def test_slow_uploads_are_rate_limited(server, monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(paths.time, 'monotonic', lambda: now[0])
  file = paths.open_append('gs://bucket/slow')
  write = type(file._path).write_bytes

  def slow(*args):
    now[0] += 2  # seconds
    write(*args)

  monkeypatch.setattr(type(file._path), 'write_bytes', slow)
  file.write(b'1')
  file.sync()
  file.write(b'2')
  now[0] += 199
  file.flush()
  assert server.get('bucket', 'slow').data == b'1'
  now[0] += 1
  file.flush()
  assert server.get('bucket', 'slow').data == b'12'


def test_failed_upload_is_logged_and_retried(server, monkeypatch, capsys):
  file = paths.open_append('gs://bucket/tried')
  with monkeypatch.context() as m:
    m.setattr(server, 'refuses', 403)
    file.write(b'1\n')
    file.sync()
  line = 'gs://bucket/tried could not be written: Forbidden'
  out = capsys.readouterr().out
  assert out.startswith(line) and out.endswith('will retry\n')
  assert server.get('bucket', 'tried').data == b''
  file.close()
  assert server.get('bucket', 'tried').data == b'1\n'


def test_flush_writes_lines_to_disk(tmp_path):
  file = paths.open_append(tmp_path / 'lines', b'0\n')
  file.write(b'1\n')
  file.flush()
  assert (tmp_path / 'lines').read_bytes() == b'0\n1\n'
  assert os.listdir(tmp_path) == ['lines']
  file.close()


# Locks.


def _other(server, **changes):
  holder = dict(run='x', host='elsewhere', pid=1, started='', time=time.time())
  server.put('bucket', 'l/lock.json', json.dumps(holder | changes).encode())


def test_second_run_in_bucket_raises(server, store, capsys):
  held = lock.Lock('gs://bucket/l')
  error = _fails(capsys, 'train', *runs.args(store, 'gs://bucket/l'))
  assert error.startswith('--train.workdir=gs://bucket/l: is being written')
  assert _names(server, 'l') == ['lock.json']
  held.check()
  held.release()
  assert not lock.is_held('gs://bucket/l') and not _names(server, 'l')


def test_renewed_lock_of_another_host_is_respected(server, monkeypatch):
  _other(server)
  later = iter(range(1, 99))
  monkeypatch.setattr(time, 'sleep', lambda _: _other(server, time=time.time() + next(later)))
  with pytest.raises(paths.InputError, match='on elsewhere'):
    lock.Lock('gs://bucket/l')


def test_stale_lock_of_another_host_is_taken_over(server, monkeypatch):
  monkeypatch.setattr(lock, 'LIVES_S', 0.1)
  _other(server, time=time.time() - lock.STALE_S - 1)
  lock.Lock('gs://bucket/l').check()


def test_lost_lock_is_detected_at_next_check(server, monkeypatch):
  server.delete('bucket', 'l/lock.json')
  held = lock.Lock('gs://bucket/l')
  n = len(server.log)
  held.check(closely=False)  # at a log line: checked recently
  assert len(server.log) == n
  held.check()
  assert json.loads(server.get('bucket', 'l/lock.json').data)['time'] > 1e9
  _other(server)
  with pytest.raises(lock.Lost):
    held.check()  # at a checkpoint
  monkeypatch.setattr(lock, 'AGAIN_S', 0.0)  # as after a sleep
  with pytest.raises(lock.Lost):
    held.check(closely=False)
  held.release()
  assert lock.is_held('gs://bucket/l')  # by the other process


def test_outage_shorter_than_stale_time_is_tolerated(server, monkeypatch):
  server.delete('bucket', 'l/lock.json')
  held = lock.Lock('gs://bucket/l')
  monkeypatch.setattr(server, 'refuses', 403)
  held.check()
  held._seen -= lock.STALE_S
  with pytest.raises(OSError, match='Forbidden'):
    held.check()


def test_concurrent_lock_attempts_have_one_winner(server, monkeypatch):
  monkeypatch.setattr(lock, 'SETTLE_S', 0.5)
  server.delete('bucket', 'l/lock.json')
  barrier, got = threading.Barrier(2), []

  def take():
    barrier.wait()
    try:
      got.append(lock.Lock('gs://bucket/l'))
    except fields.ConfigError:
      return

  threads = [threading.Thread(target=take) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(got) == 1
  got[0].check()
  got[0].release()


# Errors.


def test_bucket_errors_are_one_line(server, store, capsys, monkeypatch):
  def train(workdir, **changes):
    args = runs.args(store, workdir, **changes)
    return _fails(capsys, 'train', *args)

  assert train('s3://bucket/run') == ('s3://bucket/run: unsupported storage; use gs://')
  assert train('gs://nothing/run').startswith(
    '--train.workdir=gs://nothing/run: cannot write there: no such bucket'
  )
  assert _fails(capsys, 'eval', 'gs://bucket/none', *HERE).startswith(
    'gs://bucket/none: no complete checkpoint'
  )
  expected = (
    'gs://bucket/store: a store must be a local path: copy it to a disk of each'
    ' host, or mount the bucket'
  )
  for args in (['train', *runs.args(store, 'gs://bucket/run')], ['prepare']):
    last = '--data.store=gs://bucket/store'
    assert _fails(capsys, *args, last) == f'--data.store={expected}'
  with monkeypatch.context() as m:
    m.setattr(server, 'refuses', 403)
    assert train('gs://bucket/run').startswith('gs://bucket/run: cannot be reached: Forbidden')
  monkeypatch.setattr(paths.importlib.util, 'find_spec', lambda _: None)
  assert train('gs://bucket/run') == ("gs://bucket/run: needs gcsfs: pip install 'mtp_jax[gcs]'")
