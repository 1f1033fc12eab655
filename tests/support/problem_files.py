"""Problems as their official files have them."""

import json

from mtp_jax.config import schema

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


def problem_cfg(path='', **changes):
  changes = {f'eval.{k}': v for k, v in changes.items()}
  return schema.replace(schema.CommandConfig(), **{'eval.data': path} | changes)
