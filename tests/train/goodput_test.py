"""Goodput, loss spikes and rollbacks, the watchdog."""

import json
import math
import os
import shutil
import signal
import time

import pytest

from mtp_jax.cli import main
from mtp_jax.data import batches as batches_lib
from mtp_jax.parallel import sharding
from mtp_jax.train import goodput, loop, rollback, watchdog
from tests.support import runs


def _clock(**seconds):
  clock = goodput.Clock()
  clock.seconds |= seconds
  return clock


def test_clock_attributes_time_to_one_cause(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
  clock = goodput.Clock()
  for seconds, cause in (
    (2, 'compile'),
    (30, 'data'),
    (1, 'host'),
    (4, 'eval'),
    (5, 'device'),
    (7, 'checkpoint'),
  ):
    now[0] += seconds
    clock.at(cause)
  clock.steps = 5
  now[0] += 8
  assert clock.lap() == (12 / 5, 1 / 12, 4 / 12)
  assert clock.seconds == dict(start=2, compile=30, data=1, host=4, device=7, eval=5, checkpoint=8)
  clock.at('host')
  now[0] += 6
  clock.steps = 2
  assert clock.lap() == (3, 0, 1)
  assert math.isnan(clock.lap()[0])


def _session(folder, monkeypatch, steps, began, ends, end, **seconds):
  monkeypatch.setattr(time, 'time', lambda: began)
  ledger = goodput.Ledger(str(folder), steps[0])
  monkeypatch.setattr(time, 'time', lambda: ends)
  ledger.write(steps[1], _clock(**seconds), end)
  ledger.close()


def test_repeated_steps_are_not_goodput(tmp_path, monkeypatch):
  """Steps 0 to 10 in 100 s, then killed; 20 s later resumed from 6 to 12."""
  _session(
    tmp_path,
    monkeypatch,
    (0, 10),
    1000,
    1150,
    '',
    start=10,
    compile=40,
    host=60,
    device=30,
    data=10,
  )
  (tmp_path / 'goodput.jsonl').open('a').write('{"session": 7, "st')
  _session(
    tmp_path,
    monkeypatch,
    (6, 12),
    1170,
    1270,
    'finished',
    start=5,
    compile=30,
    device=60,
    checkpoint=5,
  )
  found = goodput.summary(goodput.read(str(tmp_path)))
  assert [(s['start'], s['step'], s['end'], s['repeated_steps']) for s in found['sessions']] == [
    (0, 10, 'killed', 0),
    (6, 12, 'finished', 4),
  ]
  assert found['whole_s'] == 270 and found['down_s'] == 20
  assert found['repeated_s'] == 4 * 10
  assert found['goodput'] == pytest.approx((150 - 40) / 270)
  assert goodput.lines(found) == [
    'goodput 40.7% of 270 s: start 5.6%, compile 25.9%, data 3.7%, host 22.2%,'
    ' device 33.3%, eval 0.0%, checkpoint 1.9%, repeated 14.8%, down 7.4%',
    '  session 0: steps 0 to 10, killed',
    '  session 1: steps 6 to 12, finished; 4 steps repeated',
  ]


def test_goodput_of_an_empty_workdir(tmp_path):
  assert goodput.summary(goodput.read(str(tmp_path))) == {}
  assert goodput.lines({}) == []


def test_run_records_goodput_and_report_shows_it(undisturbed, tmp_path, capsys):
  found = goodput.summary(goodput.read(str(undisturbed)))
  (session,) = found['sessions']
  assert (session['start'], session['step']) == (0, 6)
  assert session['end'] == 'finished'
  assert found['compile_s'] > 0 and 0 < found['goodput'] < 1
  parts = sum(found[f'{cause}_s'] for cause in goodput.CAUSES)
  assert parts == pytest.approx(found['whole_s'], rel=0.2)
  run, out = tmp_path / 'run', tmp_path / 'report.json'
  shutil.copytree(undisturbed, run)
  assert main.main(['report', str(run), f'--out={out}']) == 0
  assert f'{run}: goodput ' in capsys.readouterr().out
  assert str(run) in json.loads(out.read_text())['goodput']


# Spikes.


def _spikes(losses, sigma=10.0):
  spike = rollback.Detector(sigma)
  return [i for i, loss in enumerate(losses) if spike(loss)]


def test_spike_is_far_above_the_running_median():
  calm = [3 + 0.01 * (i % 5) - 0.001 * i for i in range(200)]
  assert _spikes(calm) == []
  # The minimum deviation is a hundredth of the median: .03, ten of them .3.
  assert _spikes([*calm[:50], 3.2, *calm[50:]]) == []
  assert _spikes([*calm[:50], 3.4, 3.5, *calm[50:]]) == [50, 51]
  assert _spikes([*calm[:10], 9.0, *calm]) == []  # not enough losses yet
  assert _spikes([*calm[:50], math.nan, math.inf, *calm]) == []
  assert _spikes([*calm[:50], 9.0], sigma=0) == []
  noisy = [3 + (i % 7) / 7 for i in range(64)]
  assert _spikes([*noisy, 5.0]) == []
  assert _spikes([*noisy, 8.0]) == [64]


def test_spikes_are_logged_and_counted(store, tmp_path, capsys, monkeypatch):
  seen = []

  def third(self, loss):
    seen.append(loss)
    return len(seen) == 3

  monkeypatch.setattr(rollback.Detector, '__call__', third)
  assert runs.train(store, tmp_path) == 0
  out = capsys.readouterr().out
  assert f'step 3: head 1 {seen[2]:.4f} is a loss spike' in out
  records = [r for r in runs.records(tmp_path) if r['kind'] == 'train']
  assert seen == [r['loss_1'] for r in records[: len(seen)]]
  found = goodput.summary(goodput.read(str(tmp_path)))
  assert goodput.lines(found)[-1] == '  1 loss spikes'


def _spike_once(monkeypatch, loss_of_step):
  """Makes the loss of one step a spike, the first time it is computed."""
  seen = []

  def detect(self, loss):
    seen.append(loss)
    return len(seen) == loss_of_step

  monkeypatch.setattr(rollback.Detector, '__call__', detect)


@pytest.mark.parametrize('every, back', [(3, 3), (0, 0)])
def test_rollback_equals_a_run_without_the_skipped_batches(
  every, back, store, tmp_path, capsys, monkeypatch
):
  """Of batches 0 to 9, 3 and 4 are skipped at the spike of step 5; stopped after
  that and gone on with as well."""
  of = dict(train__checkpoint_every=every, train__steps=10)
  went = tmp_path / 'went'
  with monkeypatch.context() as patched:
    _spike_once(patched, 5)
    assert runs.train(store, went, **of | dict(train__skip_batches=2, train__steps=8)) == 0
  out = capsys.readouterr().out
  assert f'rolling back to step {back}; skipping batches 3-4' in out
  assert runs.train(store, went, **of | dict(train__skip_batches=2)) == 0

  batches = batches_lib.train_batches
  monkeypatch.setattr(
    batches_lib,
    'train_batches',
    lambda tokens, cfg, start, mesh, left_out=(): batches(tokens, cfg, start, mesh, ((3, 2),)),
  )
  plain = tmp_path / 'plain'
  assert runs.train(store, plain, **of) == 0
  runs.assert_same(runs.restored(went, 10), runs.restored(plain, 10))
  mine, theirs = runs.records(went), runs.records(plain)
  wanted = [r for r in theirs if r['kind'] == 'train']
  assert [r for r in mine if r['kind'] == 'train'] == wanted
  found = goodput.summary(goodput.read(str(went)))
  assert [s['end'] for s in found['sessions']] == ['rolled back', 'finished', 'finished']
  assert found['sessions'][1]['repeated_steps'] == 7 - back


@pytest.mark.parametrize('stopped_at', [4, pytest.param(5, marks=pytest.mark.slow), 6])
def test_signal_does_not_change_the_skipped_batches(
  stopped_at, store, undisturbed, tmp_path, monkeypatch
):
  """Step 5 is a spike to a detector that remembers four steps. Its loss is read
  two steps later: the signal comes before that, and makes a checkpoint of its
  own: of step 4, to which no run rolls back, or with the loss unread."""
  spike = runs.records(undisturbed)[4]['loss_1']

  def detect(self, loss):
    self.losses.append(loss)
    return len(self.losses) > 4 and loss == spike

  monkeypatch.setattr(rollback.Detector, '__call__', detect)
  of = dict(train__checkpoint_every=3, train__steps=10, train__skip_batches=2)
  straight, signalled = tmp_path / 'straight', tmp_path / 'signalled'
  assert runs.train(store, straight, **of) == 0
  ends = [s['end'] for s in goodput.summary(_lines(straight))['sessions']]
  assert ends == ['rolled back', 'finished']

  put, calls = sharding.put_batch, []

  def signal_at(mesh, batch):
    calls.append(1)
    if len(calls) == stopped_at:
      os.kill(os.getpid(), signal.SIGTERM)
    return put(mesh, batch)

  with monkeypatch.context() as patched:
    patched.setattr(sharding, 'put_batch', signal_at)
    assert runs.train(store, signalled, **of) == loop.EXIT_INTERRUPTED
  assert runs.train(store, signalled, **of) == 0
  runs.assert_same(runs.restored(signalled, 10), runs.restored(straight, 10))
  assert runs.records(signalled) == runs.records(straight)


def _lines(workdir):
  return goodput.read(str(workdir))


def test_spike_detector_ignores_nonfinite_and_missing_losses():
  detector = rollback.Detector(6.0)
  for loss in [1.0, None, float('nan')] * 16:
    assert not detector(loss)
  assert list(detector.losses) == [1.0] * 16
  assert detector(2.0) and not rollback.Detector(6.0, [1.0] * 15)(2.0)
  assert rollback.Detector(6.0, detector.losses)(2.0)


def test_number_of_rollbacks_is_limited(store, tmp_path, monkeypatch):
  monkeypatch.setattr(rollback.Detector, '__call__', lambda self, loss: True)
  assert runs.train(store, tmp_path, train__skip_batches=1) == loop.EXIT_DIVERGED


# The watchdog, and waiting for data.

HANGS = """
import sys, time
from mtp_jax.train import watchdog
with watchdog.watchdog(float(sys.argv[1])) as heartbeat:
  for seconds in map(float, sys.argv[2:]):
    time.sleep(seconds)
    heartbeat()
time.sleep(1)
print('alive')
"""


@pytest.mark.parametrize(
  'limit, sleeps, status', [('0.5', ['0.2'] * 5, 0), ('0.5', ['0.2', '9'], 1), ('0', ['0.7'], 0)]
)
def test_watchdog_exits_with_stack_traces(limit, sleeps, status):
  begin = time.monotonic()
  process = runs.process(['-c', HANGS, limit, *sleeps])
  out, error = process.communicate(timeout=60)
  assert process.returncode == status
  assert time.monotonic() - begin < 30
  if status:
    assert 'Timeout' in error and 'line 6 in <module>' in error and not out
  else:
    assert (out, error) == ('alive\n', '')


def test_loop_resets_the_watchdog(store, tmp_path, monkeypatch):
  import contextlib

  calls = []

  @contextlib.contextmanager
  def count(seconds):
    calls.append(seconds)
    yield lambda: calls.append('heartbeat')

  monkeypatch.setattr(watchdog, 'watchdog', count)
  assert runs.train(store, tmp_path, train__watchdog_s=77) == 0
  assert calls[0] == 77
  assert calls.count('heartbeat') == 1 + 6 + 2  # compiled, steps, held-out batches


def test_waiting_for_data_is_logged(store, tmp_path, capsys, monkeypatch):
  batches = batches_lib.train_batches

  def slow(*args):
    for batch in batches(*args):
      time.sleep(0.3)
      yield batch

  monkeypatch.setattr(batches_lib, 'train_batches', slow)
  assert runs.train(store, tmp_path) == 0
  assert 'the run waits for data ' in capsys.readouterr().out
