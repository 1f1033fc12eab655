"""pass@k, and the code suites on answers with known scores."""

import fractions
import itertools
import json
import math

import numpy as np
import pytest

from mtp_jax.cli import main
from mtp_jax.config import fields, schema
from mtp_jax.data import tokenizers
from mtp_jax.evals import code, problems, registry, subject
from tests.support import namespaces, problem_files


@pytest.mark.parametrize('n', [1, 2, 5, 10, 200])
def test_pass_at_k_matches_the_closed_form(n):
  for c, k in itertools.product({0, 1, n // 2, n - 1, n}, {1, n // 2, n}):
    if 1 <= k <= n:
      exact = 1 - fractions.Fraction(math.comb(n - c, k), math.comb(n, k))
      assert code.pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-14)


def test_pass_at_k_matches_enumeration():
  for n in range(1, 7):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
      right = [i < c for i in range(n)]
      draws = list(itertools.combinations(right, k))
      share = sum(map(any, draws)) / len(draws)
      assert code.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-14)


def _cfg(path, **changes):
  kind = namespaces.KIND
  return problem_files.problem_cfg(path, allow_code_execution=True, sandbox=kind, **changes)


@pytest.fixture
def answering(monkeypatch):
  """answering(cfg, f): a subject whose j-th sample for prompt i at temperature t
  is f(i, j, t)."""

  def make(cfg, answer):
    def continuations(who, prompts, generation):
      return [
        [
          subject.Text(answer(i, j, generation.temperature), np.zeros(6), 2, 'stop')
          for j in range(generation.samples)
        ]
        for i in range(len(prompts))
      ]

    monkeypatch.setattr(subject, 'continuations', continuations)
    return subject.Subject('tiny', cfg, None, None, tokenizers.get('bytes'), 1, None)

  return make


TWICE = 'def twice(x):\n  return 2 * x\n'
READS = 'for x in open(0):\n  print(2 * int(x))\n'
LEETCODE = 'class Solution:\n  def twice(self, x):\n    return (2 * x, 1)\n'
SUITES = {
  'humaneval': ([problem_files.HUMANEVAL] * 2, '  return 2\n', '  return 3\n'),
  'mbpp': (
    problem_files.MBPP,
    'add = type("", (), dict(__call__=lambda *a: Any()))()\n'
    'class Any:\n  __eq__ = lambda *a: True\n',
    'def add(x):\n  return x',
  ),
  'apps': (
    [problem_files.apps(['1\n2\n', '3'], ['2\n4', ['6']]), problem_files.apps(['7'], ['14.0'])],
    READS,
    'print(2)\nprint(4)',
  ),
  'code_contests': ([problem_files.CONTEST] * 2, READS, 'print(2)'),
}


@pytest.mark.parametrize('name', problems.FORMATS)
def test_code_suites_score_right_and_wrong_answers(name, answering, tmp_path):
  rows, right, wrong = SUITES[name]
  cfg = _cfg(problem_files.write(tmp_path / 'p.jsonl', rows))
  registry.SUITES[name].check('', cfg)
  for answer, score in ((right, 1), (wrong, 0)):
    found = registry.SUITES[name].run(answering(cfg, lambda *a, x=answer: x), '')
    assert found.scalars['pass@1'] == found.scalars['passed'] == score
    assert found.scalars[f'pass@1_{"high" if score else "low"}'] == score
    assert found.scalars['failed'] == 1 - score
    assert found.scalars['tokens_per_forward'] == 3
    outcome = 'passed' if score else 'failed'
    assert {x['outcome'] for x in found.items} == {outcome}
    assert {x['completion'] for x in found.items} == {answer}
    json.dumps(found.items)
  assert f'{len(found.items)} problems, 1 samples each' in found.lines[0]


@pytest.mark.parametrize(
  'source, expected, passes',
  [
    (TWICE, 2, True),
    (TWICE, [2], True),
    (LEETCODE, [2, 1], True),
    (TWICE, 3, False),
    ('', 2, False),
    ('def twice(x): exit()', 2, False),
    ('def twice(x): return {1: 2}', {'1': 2}, True),
    ('def twice(x): return [(1, 2)]', [[[1, 2]]], True),
    ('print(1)\n' * 9 + TWICE, 2, True),
    ('twice = lambda x: int(sqrt(4)) * len(Counter([x]))', 2, True),
  ],
)
def test_apps_call_based_tests(source, expected, passes, tmp_path):
  row = problem_files.apps([[1], [1]], [expected] * 2, fn_name='twice')
  cfg = _cfg(problem_files.write(tmp_path / 'p.jsonl', [row]))
  (problem,) = problems.read('apps', '', cfg)
  ended = code.judged('apps', cfg.eval, problem, source)
  assert (ended.outcome == 'passed') == passes, ended
  assert ended.out == ''  # the outputs of 200 samples would be GiB


def test_pass_at_k_of_mixed_answers(answering, tmp_path):
  """By temperature, with an oracle over temperatures, and fractions of outcomes."""
  rows = [problem_files.HUMANEVAL] * 3
  rows = [r | dict(task_id=str(i)) for i, r in enumerate(rows)]
  right_TP = {0.2: (0, 1, 4), 0.8: (1, 1, 1)}  # of 4 answers each

  def answer(i, j, temperature):
    if j < right_TP[temperature][i]:
      return '  return 2\n'
    return '  while True: pass\n' if (i, j) == (0, 3) else '  return 3\n'

  cfg = _cfg(
    problem_files.write(tmp_path / 'p.jsonl', rows),
    samples=4,
    pass_at_k='1,2',
    temperatures='0.2,0.8',
    timeout_s=1.5,
  )
  found = code.run('humaneval', answering(cfg, answer), '').scalars
  expected = {
    'pass@1/t0.2': 5 / 12,
    'pass@2/t0.2': (0 + 1 / 2 + 1) / 3,
    'pass@1/t0.8': 1 / 4,
    'pass@2/t0.8': 1 / 2,
    'pass@1/oracle': 5 / 12,
    'pass@2/oracle': 1 / 2,
    'passed/t0.2': 5 / 12,
    'timeout/t0.2': 1 / 12,
    'failed/t0.2': 6 / 12,
  }
  for name, value in expected.items():
    assert found[name] == pytest.approx(value), name
    if 'pass@' in name:
      assert found[f'{name}_low'] <= value <= found[f'{name}_high']
  assert not {'pass@1', 'pass@2', 'passed'} & set(found)
  lines = code.run('humaneval', answering(cfg, answer), '').lines
  assert any('oracle over temperatures: pass@1 41.7% (' in x for x in lines)


def test_pass_at_k_interval_is_conservative():
  """For 400 problems: equal with one sample per problem, wider with several."""
  rng, n = np.random.default_rng(0), 400
  for samples, exact in ((1, True), (8, False)):
    c_P = rng.binomial(samples, 0.25, size=n)
    found = code._scores('', code.Sampling(samples, (1,), (0.0,)), [c_P])
    spread = 1.96 * np.std(c_P / samples) / np.sqrt(n)
    half = (found['pass@1_high'] - found['pass@1_low']) / 2
    assert found['pass@1'] == pytest.approx(c_P.mean() / samples)
    assert half == pytest.approx(spread, rel=0.01) if exact else half > spread


@pytest.mark.parametrize(
  'changes, ks, temperatures',
  [
    ({}, (1,), (0.0,)),
    (dict(eval__samples=10), (1, 10), (0.2, 0.8)),
    (dict(eval__samples=200), (1, 10, 100), (0.2, 0.8)),
    (dict(eval__samples=5, eval__pass_at_k='5,2', eval__temperatures='.1'), (5, 2), (0.1,)),
    (dict(eval__temperatures='0,1', eval__pass_at_k='1'), (1,), (0, 1)),
  ],
)
def test_sampling_flags(changes, ks, temperatures):
  cfg = schema.replace(
    schema.CommandConfig(), **{k.replace('__', '.'): v for k, v in changes.items()}
  )
  assert code.sampling(cfg)[1:] == (ks, temperatures)


@pytest.mark.parametrize(
  'changes, flag, problem',
  [
    ({'eval.allow_code_execution': False}, 'allow_code', 'model-generated'),
    ({'eval.pass_at_k': '2'}, 'k', '1 to --eval.samples=1'),
    ({'eval.pass_at_k': '0'}, 'k', 'integers'),
    ({'eval.pass_at_k': 'x'}, 'k', 'integers'),
    ({'eval.pass_at_k': '1,1'}, 'k', 'distinct'),
    ({'eval.temperatures': '-1'}, 'temperatures', '0 or more'),
    ({'eval.temperatures': 'nan'}, 'temperatures', '0 or more'),
    ({'eval.temperatures': '0', 'eval.samples': 2}, 'temperatures', 'above 0'),
    ({'eval.data': ''}, 'data', 'needs the file'),
    ({'decode.tree': '2', 'eval.temperatures': '1'}, 'tree', 'temperatures=0'),
    ({'decode.top_p': 0.9, 'eval.temperatures': '0'}, 'top_p', 'above 0'),
    ({'decode.min_p': 0.1}, 'min_p', 'needs --eval.temperatures above 0'),
  ],
)
def test_bad_code_flags_raise_before_loading(changes, flag, problem, tmp_path):
  cfg = _cfg(problem_files.write(tmp_path / 'p.jsonl', problem_files.MBPP))
  cfg = schema.replace(cfg, **{'eval.tasks': 'mbpp'} | changes)
  with pytest.raises(fields.ConfigError) as e:
    registry.selected(cfg)
  assert flag in str(e.value).split('=')[0] and problem in str(e.value)


def test_mtp_eval_runs_a_code_suite(undisturbed, tmp_path, capsys):
  path = problem_files.write(tmp_path / 'p.jsonl', problem_files.MBPP)
  out = tmp_path / 'found.json'
  args = [
    'eval',
    f'{undisturbed}',
    '--eval.tasks=mbpp',
    f'--eval.data={path}',
    '--eval.allow_code_execution',
    '--eval.samples=2',
    '--eval.temperatures=0.5',
    '--eval.num_fewshot=0',
    '--eval.limit=2',
    '--decode.max_new_tokens=12',
    '--decode.top_p=0.95',
    '--mesh.fsdp=-1',
    '--train.compilation_cache=',
    f'--out={out}',
    f'--eval.sandbox={namespaces.KIND}',
  ]
  assert main.main(args) == 0
  text = capsys.readouterr().out
  assert '2 problems, 2 samples each at temperature 0.5' in text
  assert 'pass@1 0.0% (0.0% to ' in text and 'tokens per forward pass' in text
  found = json.loads(out.read_text())['suites']['mbpp']
  assert found['pass@1'] == 0 and found['failed'] == 1
  assert [x['id'] for x in found['items']] == ['MBPP/11'] * 2 + ['MBPP/12'] * 2
  assert all(len(x['completion']) <= 12 for x in found['items'])
  assert found['items'][0]['completion'] != found['items'][1]['completion']

  refused = [a for a in args if 'allow_code' not in a]
  assert main.main(refused) == 2
  assert capsys.readouterr().err == (
    'mtp: --eval.allow_code_execution=False: mbpp runs model-generated programs;'
    ' set --eval.allow_code_execution if this machine may\n'
  )
