"""Synthetic suites: scores of a solver and of chance, in training and mtp eval."""

import json
import random

import pytest

from mtp_jax.cli import main
from mtp_jax.config import fields, schema
from mtp_jax.data import tasks, tokenizers
from mtp_jax.evals import intervals, subject, synthetic
from mtp_jax.train import metrics
from tests.support import runs, solvers


def _cfg(**changes):
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  return schema.replace(schema.CommandConfig(), **changes)


def _run_suite(monkeypatch, name, arg, answer, n=200):
  """Returns the suite's Result if the continuation of a prompt is answer(prompt)."""

  def continuations(of, prompts, generation):
    assert generation.temperature == 0 and generation.samples == 1
    texts = []
    for prompt in prompts:
      text = answer(prompt)
      assert len(text) < generation.max_new
      ids = list(text.encode()) + [257]
      texts.append([subject.Text(text, ids, 2, 'stop')])
    return texts

  monkeypatch.setattr(subject, 'continuations', continuations)
  model = subject.Subject(
    'solver', _cfg(eval__limit=n), None, None, tokenizers.get('bytes'), 1, None
  )
  return synthetic.run(name, model, arg)


def _shortcut(prompt: str) -> str:
  """The shortcut learned by teacher forcing: a random arm, then its edges."""
  start = prompt.split('/')[1][0]
  after = [e[1] for e in prompt.split('/')[0].split('|') if e[0] == start]
  path = start + random.Random(prompt).choice(after)
  goals = {e[0]: e[1] for e in prompt.split('/')[0].split('|')}
  while path[-1] in goals:
    path += goals[path[-1]]
  return path


@pytest.mark.parametrize('d, length', [(2, 5), (5, 4)])
def test_star_graph_scores_of_solver_and_shortcut(monkeypatch, d, length):
  arg = f'd={d}/length={length}'
  solved = _run_suite(monkeypatch, 'star_graph', arg, lambda p: solvers.all_paths(p)[0])
  assert solved.scalars['accuracy'] == solved.scalars['first_step'] == 1
  assert solved.scalars['tokens_per_forward'] == (length + 1) / 2
  chance = _run_suite(monkeypatch, 'star_graph', arg, _shortcut, n=1000).scalars
  assert chance['accuracy_low'] < 1 / d < chance['accuracy_high']
  assert chance['first_step'] == chance['accuracy']
  assert len(solved.items) == 200


def test_star_graph_requires_exact_match(monkeypatch):
  arg = 'd=2/length=4'
  for change in (lambda path: path[:-1], lambda path: path[:2] + path[:-2]):
    found = _run_suite(
      monkeypatch, 'star_graph', arg, lambda p, change=change: change(solvers.all_paths(p)[0])
    ).scalars
    assert found['accuracy'] == 0 and found['first_step'] == 1
  other = _run_suite(
    monkeypatch,
    'star_graph',
    arg,
    lambda p: solvers.all_paths(p)[0][0] + '=' + solvers.all_paths(p)[0][2:],
  ).scalars
  assert other['accuracy'] == other['first_step'] == 0


def test_polynomial_scores_by_level(monkeypatch):
  arg = 'n=3/test=4'

  def up_to_two(prompt):
    expression = prompt.removesuffix('=')
    value = solvers.polynomial_value(expression, 7, 3)
    operations = sum(map(expression.count, '-+*o'))
    return ''.join(map(str, value)) if operations <= 2 else '???'

  found = _run_suite(monkeypatch, 'polynomial', arg, up_to_two).scalars
  assert [found[f'accuracy_{m}'] for m in (1, 2, 3, 4)] == [1, 1, 0, 0]
  assert found['accuracy'] == 0.5
  assert (found['accuracy_low'], found['accuracy_high']) == intervals.wilson(400, 800)
  # By chance one value in 7^3 is right; constants and zeros slightly more often.
  rng = random.Random(1)

  def guess(prompt):
    return ''.join(str(rng.randrange(7)) for _ in range(3))

  found = _run_suite(monkeypatch, 'polynomial', arg, guess, n=1000).scalars
  assert found['accuracy_low'] < 1 / 343 < found['accuracy_high']


def test_number_of_test_items_is_limited_to_excluded_ones(monkeypatch):
  arg = 'd=1/length=2/nodes=3'
  found = _run_suite(monkeypatch, 'star_graph', arg, lambda p: '', n=0)
  assert len(found.items) == tasks.N_TESTS
  with pytest.raises(fields.ConfigError, match='at most 2000 per level'):
    _run_suite(monkeypatch, 'star_graph', arg, lambda p: '', n=2001)


def test_missing_store_requires_task_parameters(tmp_path):
  cfg = _cfg(data__store=str(tmp_path / 'gone'))
  with pytest.raises(fields.ConfigError, match='not found, so that its star_graph is unknown'):
    synthetic.check('star_graph', '', cfg)
  assert synthetic.check('star_graph', 'd=3', cfg).params['d'] == 3
  assert synthetic.check('star_graph', '', _cfg()).params['d'] == 2


def test_wilson_on_published_values():
  # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
  for successes, n, low, high in (
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
  ):
    assert intervals.wilson(successes, n) == pytest.approx((low, high), abs=1e-4)
  assert intervals.wilson(20, 20)[1] == 1


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A few training steps on star graphs, with periodic evaluation of the suite."""
  folder = tmp_path_factory.mktemp('star')
  store, workdir = str(folder / 'store'), folder / 'run'
  source = 'task:star_graph/d=2/length=3/nodes=9/items=300'
  assert not main.main(
    ['prepare', f'--data.store={store}', f'--data.documents={source}', '--data.valid_fraction=0.1']
  )
  changes = dict(
    eval__tasks='heldout,star_graph',
    eval__limit=20,
    train__eval_tasks_every=2,
    train__steps=9,
    model__max_position_embeddings=20,
  )
  assert not runs.train(store, workdir, **changes)
  return store, workdir, changes


def test_suite_runs_periodically_during_training(run):
  _, workdir, _ = run
  records = [r for r in metrics.read(str(workdir)) if r['kind'] == 'suite']
  assert [r['step'] for r in records] == [2, 4, 6, 8, 9]
  assert {r['source'] for r in records} == {'star_graph'}
  assert all(0 <= r['first_step'] <= 1 for r in records)


def test_suite_results_are_identical_after_resume(run, tmp_path):
  store, workdir, changes = run
  for steps in (7, 9):
    assert not runs.train(store, tmp_path, **changes | dict(train__steps=steps))
  expected = [r for r in metrics.read(str(workdir)) if r['kind'] == 'suite']
  found = [r for r in metrics.read(str(tmp_path)) if r['kind'] == 'suite']
  # One more at the end of the first start, at step 7.
  assert [r for r in found if r['step'] != 7] == expected


def test_mtp_eval_matches_training_evaluation(run, tmp_path, capsys):
  """The task is that of the run's store; all items are written to --out."""
  _, workdir, _ = run
  out = tmp_path / 'eval.json'
  capsys.readouterr()
  assert not main.main(
    ['eval', f'{workdir}', '--mesh.fsdp=-1', '--train.compilation_cache=', f'--out={out}']
  )
  text = capsys.readouterr().out
  assert 'star_graph/d=2/length=3/nodes=9' in text and 'bits per byte' in text
  found = json.loads(out.read_text())['suites']['star_graph']
  (last,) = [r for r in metrics.read(str(workdir)) if r['kind'] == 'suite' and r['step'] == 9]
  assert found['accuracy'] == last['accuracy']
  assert found['first_step'] == last['first_step']
  task = tasks.named('star_graph/d=2/length=3/nodes=9')
  assert [i['right'] for i in found['items']] == [i.answer for i in tasks.tests(task, 20)]


@pytest.mark.parametrize(
  'suite, problem',
  [
    ('sudoku', 'NAME or NAME:ARG with NAME one of: heldout, '),
    ('heldout:x', 'heldout takes no argument'),
    ('star_graph,star_graph', 'duplicate'),
    ('star_graph:d=0', 'd must be at least 1'),
    ('polynomial:q=1', "'q=1' is none of"),
    ('induction:x', 'takes no argument'),
    ('', 'NAME or NAME:ARG'),
  ],
)
def test_bad_suites_raise_before_loading(run, capsys, suite, problem):
  store, workdir, _ = run
  capsys.readouterr()
  common = [f'--eval.tasks={suite}', '--train.compilation_cache=']
  assert main.main(['eval', f'{workdir}', '--mesh.fsdp=-1', *common]) == 2
  line = capsys.readouterr().err
  assert line.startswith('mtp: --eval.tasks=') and problem in line
  assert line.count('\n') == 1
  assert runs.train(store, workdir / 'new', eval__tasks=suite) == 2
  assert problem in capsys.readouterr().err
  assert not (workdir / 'new').exists()
