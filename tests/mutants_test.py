"""The faults of tests/mutations.py apply to the code; tests/mutants.py runs them."""

import ast
import subprocess
import sys

import pytest

from tests import mutants, mutations


def test_faults_have_names_and_every_mistake_has_one():
  names = [fault.name for fault in mutations.FAULTS]
  assert len(names) == len(set(names)) >= 25
  tried = {fault.mistake for fault in mutations.FAULTS}
  assert tried == mutations.MISTAKES.keys()


@pytest.mark.parametrize('fault', mutations.FAULTS, ids=lambda fault: fault.name)
def test_source_line_of_a_fault_occurs_once(fault):
  whole = (mutants.ROOT / fault.file).read_text()
  changed = mutants.replaced(whole, fault)
  assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(whole))


def test_tests_of_each_fault_exist(request):
  """A renamed test would make pytest fail for the wrong reason."""
  there = {item.nodeid for item in request.session.items}
  there |= {nodeid.partition('[')[0] for nodeid in there}
  wanted = {test for fault in mutations.FAULTS for test in fault.tests}
  if not wanted - there:
    return
  # Slow tests, and those of files outside this session.
  done = subprocess.run(
    [sys.executable, '-m', 'pytest', '--collect-only', *sorted(wanted - there)],
    cwd=mutants.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
  'output, failed',
  [
    ('FAILED tests/a_test.py::test_b - assert 1', 'tests/a_test.py::test_b'),
    ('x\nFAILED tests/c/a_test.py::test_b[{1}]\n', 'tests/c/a_test.py::test_b'),
    ('ERROR tests/a_test.py', ''),
  ],
)
def test_pytest_output_is_parsed(monkeypatch, tmp_path, output, failed):
  def run(command, **_):
    assert command[1:4] == ['-m', 'pytest', '-x'] and command[-1] == 'tests/x'
    return subprocess.CompletedProcess(command, 1, output, '')

  monkeypatch.setattr(mutants.subprocess, 'run', run)
  assert mutants.run_tests(tmp_path, ('tests/x',)).failed == failed


@pytest.mark.parametrize('test, noticed', [('NUMBER == 1', True), ('NUMBER > 0', False)])
def test_fault_is_applied_to_a_copy_and_detected(monkeypatch, tmp_path, capsys, test, noticed):
  code = tmp_path / 'code_under_test.py'
  code.write_text('NUMBER = 1\n')
  (tmp_path / 'it_test.py').write_text(
    f'from code_under_test import NUMBER\ndef test_it():\n  assert {test}\n'
  )
  fault = mutations.Fault('a', 0, code.name, '= 1', '= 2', ('it_test.py',))
  monkeypatch.setattr(mutations, 'FAULTS', (fault,))
  monkeypatch.setattr(mutants, 'ROOT', tmp_path)
  monkeypatch.setattr(mutants, 'REPORT', tmp_path / 'mutants.md')
  monkeypatch.setattr(mutants, 'COPIED', (code.name, 'it_test.py'))
  assert mutants.main([]) == (0 if noticed else 1)
  assert capsys.readouterr().out.endswith(f'{int(noticed)} of 1 detected\n')
  assert code.read_text() == 'NUMBER = 1\n'
  (row,) = (
    line.split(' | ')
    for line in (tmp_path / 'mutants.md').read_text().splitlines()
    if line.startswith('| a |')
  )
  killer = 'it_test.py::test_it' if noticed else 'SURVIVED'
  assert row[:4] == ['| a', 'another', code.name, killer]


def test_fault_whose_tests_are_skipped_is_not_run(monkeypatch, tmp_path, capsys):
  """Neither detected nor survived; a row of before stays."""
  code = tmp_path / 'code_under_test.py'
  code.write_text('NUMBER = 1\n')
  (tmp_path / 'it_test.py').write_text(
    'import pytest\n@pytest.mark.skip(reason="no library")\ndef test_it():\n  pass\n'
  )
  fault = mutations.Fault('a', 0, code.name, '= 1', '= 2', ('it_test.py',))
  report = tmp_path / 'mutants.md'
  monkeypatch.setattr(mutations, 'FAULTS', (fault,))
  monkeypatch.setattr(mutants, 'ROOT', tmp_path)
  monkeypatch.setattr(mutants, 'REPORT', report)
  monkeypatch.setattr(mutants, 'COPIED', (code.name, 'it_test.py'))
  assert mutants.main([]) == 0
  assert 'not run, since their tests are skipped here: a' in capsys.readouterr().out
  assert '0 of 1 were detected' in report.read_text()
  report.write_text(report.read_text().replace('NOT RUN: its tests are skipped here', 'it_test'))
  assert mutants.main([]) == 0
  assert '1 of 1 were detected' in report.read_text()
