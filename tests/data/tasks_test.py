"""Synthetic tasks: items, disjoint training and test sets, loss masks."""

import collections
import itertools

import pytest

from mtp_jax.cli import main
from mtp_jax.config import fields
from mtp_jax.data import readers, store, tasks, tokenizers
from tests.support import solvers

STAR = tasks.named('star_graph/d=3/length=4/nodes=30')
POLYNOMIAL = tasks.named('polynomial')


@pytest.mark.parametrize(
  'name',
  [
    'star_graph',
    'star_graph/d=5/length=5',
    'star_graph/d=1/length=2',
    'star_graph/d=2/length=12',
    str(STAR),
  ],
)
def test_star_graph_has_one_path(name):
  task = tasks.named(name)
  d, length = task.params['d'], task.params['length']
  for part, i in itertools.product(('train', 'test'), range(100)):
    item = tasks.item(task, part, i)
    assert solvers.all_paths(item.prompt) == [item.answer]
    assert len(item.answer) == length
    edges = item.prompt.split('/')[0].split('|')
    assert len(edges) == d * (length - 1)
    degrees = collections.Counter(a for a, _ in edges)
    assert degrees.pop(item.answer[0]) == d and set(degrees.values()) <= {1}


def test_star_graph_arm_and_edge_order_are_random():
  items = [tasks.item(STAR, 'train', i) for i in range(600)]
  # The place of the answer's first edge among the nine is uniform.
  places = collections.Counter(
    item.prompt.split('/')[0].split('|').index(item.answer[:2]) for item in items
  )
  assert len(places) == 9 and min(places.values()) > 30


@pytest.mark.parametrize('name', ['polynomial', 'polynomial/n=3', 'polynomial/p=5/n=1/test=4'])
def test_polynomial_answers_match_an_independent_solver(name):
  task = tasks.named(name)
  p, n = task.params['p'], task.params['n']
  for item in tasks.tests(task, 30):
    expression = item.prompt.removesuffix('=')
    assert solvers.polynomial_value(expression, p, n) == [int(c) for c in item.answer]
    assert sum(map(expression.count, '-+*o')) == item.level
    assert expression.count('(') == sum(map(expression.count, '+*o'))


def test_polynomial_operations_on_known_values():
  assert tasks.evaluate('(12000+60000)', 7, 5) == '02000'
  assert tasks.evaluate('(110*110)', 7, 3) == '121'
  assert tasks.evaluate('(001*010)', 7, 3) == '000'  # X^3 = 0
  # f = 1 + 2X + 3X^2, g = X + X^2: f(g) = 1 + 2X + (2 + 3) X^2 + …
  assert tasks.evaluate('(123o011)', 7, 3) == '125'
  assert tasks.evaluate('(123o500)', 7, 3) == '200'  # f(5) = 86 = 2 mod 7
  assert tasks.evaluate('--(123+-001)', 7, 3) == '122'
  with pytest.raises(ValueError, match='ends at 3'):
    tasks.evaluate('1234', 7, 3)


def test_levels_and_operations_are_uniform():
  items = [tasks.item(POLYNOMIAL, 'train', i) for i in range(2000)]
  levels = collections.Counter(item.level for item in items)
  assert sorted(levels) == [1, 2, 3, 4, 5]
  assert max(levels.values()) < 1.25 * min(levels.values())
  ones = [item.prompt for item in items if item.level == 1]
  roots = collections.Counter('-' if prompt[0] == '-' else prompt[6] for prompt in ones)
  assert set(roots) == set('-+*o')
  assert max(roots.values()) < 1.6 * min(roots.values())
  assert {item.level for item in tasks.tests(POLYNOMIAL, 1)} == {*range(1, 11)}


def test_task_items_are_reproducible_by_index():
  """Across versions and machines: recorded results depend on these items."""
  assert tasks.item(STAR, 'test', 7) == tasks.item(STAR, 'test', 7)
  assert tasks.item(STAR, 'test', 7) != tasks.item(STAR, 'train', 7)
  task = tasks.named('star_graph/d=2/length=5')
  assert tasks.item(task, 'train', 3) == tasks.Item('Wa|aQ|ol|RW|ld|Rn|no|Qr/Rr=', 'RWaQr', 0)
  task = tasks.named('polynomial/n=3')
  assert tasks.item(task, 'test', 1, 2) == tasks.Item('(201o(661o423))=', '404', 2)
  # The training level does not change the test items.
  assert tasks.item(tasks.named('polynomial/n=3/train=2'), 'test', 1, 2) == (
    tasks.item(task, 'test', 1, 2)
  )


def test_training_items_exclude_test_items(monkeypatch):
  task = tasks.named('polynomial/n=1/p=2/train=1/test=1')  # 14 expressions
  tested = {item.prompt for item in tasks.tests(task, 3)}
  monkeypatch.setattr(tasks, 'N_TESTS', 3)
  trained = {item.prompt for _, item in tasks.train(task, 500)}
  assert trained and not trained & tested
  assert len(trained | tested) == 14
  # Items of levels that only the test of another task has are excluded as well.
  task = tasks.named('polynomial/n=1/p=2/train=2/test=1')
  tested = {tasks.item(task, 'test', i, m).prompt for m in (1, 2) for i in range(3)}
  trained = {item.prompt for _, item in tasks.train(task, 500)}
  assert trained and not trained & tested


def test_training_graphs_exclude_reordered_test_graphs(monkeypatch):
  task = tasks.named('star_graph/d=2/length=2/nodes=4')  # 24 questions
  monkeypatch.setattr(tasks, 'N_TESTS', 12)

  def question(item):
    edges, ends = item.prompt.split('/')
    return frozenset(edges.split('|')), ends

  held_out = {question(item) for item in tasks.tests(task, 12)}
  trained = {question(item) for _, item in tasks.train(task, 900)}
  assert 6 < len(held_out) and not trained & held_out
  assert len(trained | held_out) == 4 * 3 * 2  # a centre, two of the rest, goal


@pytest.mark.parametrize(
  'text, problem',
  [
    ('sudoku', 'the task must be one of: star_graph, polynomial'),
    ('star_graph/n=3', "'n=3' is none of: d=2, length=5, nodes=50"),
    ('star_graph/d', 'must be integers'),
    ('star_graph/d=2/d=3', 'duplicate key d'),
    ('star_graph/d=-1', 'must be integers'),
    ('star_graph/length=1', 'length at least 2'),
    ('star_graph/d=20/length=9', 'nodes from 161, the size of the graph, to 87'),
    ('polynomial/p=8', 'p must be a prime of one digit'),
    ('polynomial/train=0', 'must be at least 1'),
  ],
)
def test_bad_task_names_raise(text, problem):
  with pytest.raises(ValueError, match=problem):
    tasks.named(text)
  with pytest.raises(fields.ConfigError, match='--data.documents=task:'):
    readers.read(f'task:{text}')


def test_task_documents_mask_out_the_prompt(tmp_path):
  source = 'task:star_graph/d=2/length=3/items=40'
  found = list(readers.read(source))
  assert len(found) == 40
  store.write(
    str(tmp_path / 's'), iter(found), tokenizers.get('bytes'), valid_fraction=0.0, sources=source
  )
  split = store.open_store(str(tmp_path / 's')).split('train')
  tokens, loss_mask = split.tokens[0][:], split.loss_mask[0][:]
  assert len(tokens) == 40 * 20  # begin, 15 of the prompt, 3 + end
  assert loss_mask.reshape(40, 20).astype(int).tolist() == [[0] * 16 + [1] * 4] * 40
  answers = tokens[loss_mask.astype(bool)].reshape(40, 4)[:, :3]
  assert {bytes(a.astype('uint8')).decode() for a in answers} == {
    d.text.split('=')[1] for d in found
  }


def test_excluded_test_items_are_counted(capsys, tmp_path):
  source = 'task:polynomial/p=3/n=2/train=2/test=1'
  skipped = collections.Counter()
  found = list(readers.read(f'{source}/items=500', skipped))
  (n,) = skipped.values()
  assert n and len(found) + n == 500
  assert (
    main.main(
      [
        'prepare',
        f'--data.documents={source}/items=500',
        f'--data.store={tmp_path}/s',
        '--data.valid_fraction=0',
      ]
    )
    == 0
  )
  out = capsys.readouterr().out
  assert f'skipped    {n} items in the test set' in out
  one = 'task:polynomial/p=2/n=1/train=1/test=1/items=50'
  with pytest.raises(fields.ConfigError, match='all of its items are in the test set'):
    list(readers.read(one))


def test_repeated_task_items_are_kept(tmp_path, monkeypatch):
  """Otherwise the few short expressions would hardly be trained on; equal items
  belong to the same split."""
  monkeypatch.setattr(tasks, 'N_TESTS', 5)
  source = 'task:polynomial/p=3/n=1/train=3/test=1/items=3000'
  found = list(readers.read(source))
  manifest = store.write(
    str(tmp_path / 's'), iter(found), tokenizers.get('bytes'), valid_fraction=0.3, sources=source
  )
  assert manifest['duplicates'] == 0
  opened, texts = store.open_store(str(tmp_path / 's')), {}
  for name in ('train', 'valid'):
    rows = [bytes(row[1:-1].astype('uint8')) for row in opened.split(name).documents()]
    texts[name] = collections.Counter(row.decode() for row in rows)
  assert texts['train'] + texts['valid'] == collections.Counter(d.text for d in found)
  assert not texts['train'].keys() & texts['valid'].keys()
  assert max(texts['train'].values()) > 20
