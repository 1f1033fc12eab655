"""A short fault campaign: `python -m tests.faults` is the long one."""

import random

import pytest

from tests import faults
from tests.support import runs


@pytest.mark.slow
def test_a_short_campaign(tmp_path):
  """A kill of one process, one during a save, and a flipped bit."""
  store = runs.make_store(str(tmp_path / 'store'))
  reference = tmp_path / 'undisturbed'
  logs = tmp_path / 'logs'
  session = faults.start(store, reference, 2, logs)
  statuses, _ = session.end(300.0)
  assert statuses == [0, 0], session.log(0)
  names = [
    'a flipped bit in the newest checkpoint',
    'SIGKILL to all during a save',
    'SIGKILL to one process',
  ]
  rows = faults.disturbed(
    store, tmp_path / 'run', 2, logs, random.Random(1), list(names), lambda row: None
  )
  assert {row.fault for row in rows} <= set(names) and len(rows) >= 2
  faults.compare(tmp_path / 'run', reference)


def test_campaign_report_counts(tmp_path):
  rows = [
    faults.Row('SIGKILL to one process', 2, (-9, -6), 0.4),
    faults.Row('SIGKILL to one process', 4, (-9,) * 4, 1.25),
    faults.Row('SIGTERM to one process', 2, (75, 75), 3.0),
  ]
  text = faults.report(rows)
  assert ' 3 faults, 2 of them kills' in text
  assert '| SIGKILL to one process | 2 | 2 | 1.2 s |' in text


def test_campaign_is_resumed(tmp_path, monkeypatch, capsys):
  """The second call runs the remaining faults, and the table has both."""
  page, calls = [], []

  def campaign(n_faults, seed, folder, kinds, say, done):
    calls.append((n_faults, seed, kinds))
    done([faults.Row(kinds[0], 2, (75, 75), 1.0)] * min(2, n_faults))

  monkeypatch.setattr(faults, 'campaign', campaign)
  monkeypatch.setattr(runs, 'write_section', lambda *args: page.append(args))
  of = ['--faults=3', f'--out={tmp_path / "faults.jsonl"}']
  assert faults.main([*of, '--kinds=SIGHUP']) == 0
  assert faults.main([*of, '--kinds=SIGTERM to,EFBIG']) == 0
  assert faults.main(of) == 0
  assert calls == [
    (3, 0, ['SIGHUP to one process']),
    (1, 2, ['SIGTERM to one process', 'a limit of the size of files (EFBIG)']),
  ]
  assert '| SIGHUP to one process | 2 | 2 | 1.0 s |' in page[-1][1]
  assert '| SIGTERM to one process | 1 | 1 | 1.0 s |' in page[-1][1]
  with pytest.raises(SystemExit):
    faults.main([*of, '--kinds=lightning'])


def test_report_section_is_replaced_in_place(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text('# Page\n')
  runs.write_section('a', 'one\n', page)
  runs.write_section('b', 'two\n', page)
  runs.write_section('a', 'three\n', page)
  assert page.read_text() == (
    '# Page\n\n<!-- a -->\nthree\n<!-- end of a -->\n\n<!-- b -->\ntwo\n<!-- end of b -->\n'
  )


def test_hang_is_a_failure(tmp_path):
  process = runs.process(['-c', 'import time; time.sleep(60)'])
  session = faults.Session('', tmp_path / 'run', tmp_path, [process], 0.0)
  with pytest.raises(RuntimeError, match='hangs: no end in 0.2 s'):
    session.end(0.2)
  assert process.poll() is not None or process.wait() < 0


def test_traceback_is_a_failure(tmp_path):
  (tmp_path / '0.log').write_text('Traceback (most recent call last):\n')
  session = faults.Session('', tmp_path / 'run', tmp_path, [runs.process(['-c', ''])], 0.0)
  with pytest.raises(RuntimeError, match='process 0\nTraceback'):
    session.end()
