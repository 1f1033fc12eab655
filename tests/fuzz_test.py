"""A short campaign of bad input: `python -m tests.fuzz` is the long one."""

import collections
import shutil
import time

import pytest

from mtp_jax.cli import main
from tests import fuzz


@pytest.fixture(scope='module')
def base(undisturbed, tmp_path_factory):
  base = tmp_path_factory.mktemp('fuzz') / 'base'
  fuzz.build(base, lambda _, workdir: shutil.copytree(undisturbed, workdir))
  return base


def test_a_short_campaign(base, tmp_path):
  """Three cases of each kind; a second call runs nothing, a fourth case one more."""
  out, kinds, logged = tmp_path / 'out.jsonl', fuzz.possible(), []
  found = fuzz.campaign(kinds, 3, 1, base, out, logged.append)
  assert len(found) == len(logged) == 3 * len(kinds)
  assert [o for o in found if o.outcome not in fuzz.FINE] == []
  counts = collections.Counter(o.outcome for o in found)
  assert counts['refused'] > len(kinds) and counts['accepted'] > 0, counts
  assert fuzz.read(out) == found
  assert fuzz.campaign(kinds, 3, 1, base, out, pytest.fail) == found
  more = fuzz.campaign(['flag-files'], 4, 1, base, out, logged.append)
  assert more[:-1] == found and fuzz.read(out) == more
  assert (more[-1].kind, more[-1].number) == ('flag-files', 3)


def test_output_that_is_not_one_line_is_a_fault(base, monkeypatch):
  """The fuzzer detects a traceback, a hang, a second line, and no output."""

  def ends(status, text=''):
    def run(args):
      print(text, end='', file=fuzz.sys.stderr)
      return status

    return run

  def fails(args):
    return {}['x']

  def hangs(args):
    time.sleep(9)

  monkeypatch.setattr(fuzz, 'LIMIT_S', 0.2)
  for command, outcome in (
    (fails, 'traceback'),
    (hangs, 'hang'),
    (ends(2), 'unclear'),
    (ends(2, 'mtp: --a=b: c\n'), 'refused'),
    (ends(0), 'accepted'),
    (ends(2, 'mtp: --a=b: c\nd\n'), 'unclear'),
    (ends(1), 'unclear'),
    (ends(2, 'mtp: it failed\n'), 'unclear'),
    (ends(2, f'mtp: --a={"b" * 2000}: c\n'), 'unclear'),
  ):
    monkeypatch.setattr(main, 'main', command)
    assert fuzz.run('flags', 0, 0, base).outcome == outcome
  monkeypatch.setattr(main, 'main', fails)
  assert fuzz.run('flags', 0, 0, base).said.startswith("KeyError: 'x' (")


def test_case_that_kills_the_process_is_counted(base, tmp_path):
  out = tmp_path / 'out.jsonl'
  (tmp_path / 'out.current').write_text('["flag-files", 0]')
  found = fuzz.campaign(['flag-files'], 2, 0, base, out, lambda o: None)
  assert [o.outcome for o in found][0] == 'died' and len(found) == 2
  assert fuzz.read(out) == found and not (tmp_path / 'out.current').exists()


def test_fuzz_table_counts():
  row = fuzz.Outcome('flags', 0, 'refused', 0.5, '', [])
  text = fuzz.table([row, row._replace(number=1, outcome='hang')], seed=7)
  assert 'Seed 7, 2 cases, 1 faults, slowest 0.5 s' in text
  assert '| flags | 2 | 0 | 1 | 0 | 1 | 0 | 0 | 0.5 s |' in text
