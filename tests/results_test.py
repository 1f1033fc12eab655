"""tools/results.py: its runs are valid, its page states what was measured."""

import importlib.util
import json
import pathlib
import sys

import pytest

from mtp_jax.cli import flags
from mtp_jax.config import schema
from mtp_jax.data import readers
from mtp_jax.evals import registry
from mtp_jax.model import lm, params
from tests.support import runs
from tools import heads, induction

PATH = pathlib.Path(runs.ROOT, 'tools', 'results.py')
SPEC = importlib.util.spec_from_file_location('results', PATH)
results = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results)
RUNS = [(r, label) for r in results.RESULTS for label in r.variants]


def _config(result, label) -> schema.Config:
  name, *args = results.command(result, label, 0, 'STORE', 'RUN')
  assert name == 'train'
  return flags.parse(args).config()


def test_no_measured_row_is_lost_to_a_changed_flag_file():
  assert len(results.rows()) == len(results.ROWS.read_text().splitlines())
  for path, known in (
    (induction.ROWS, induction.jobs(induction.rows())),
    (heads.ROWS, heads.jobs()),
  ):
    assert {job.key for job in known} >= induction.rows(path).keys(), path


@pytest.mark.parametrize('result, label', RUNS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_result_run_is_valid_and_has_its_columns(result, label, monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  cfg = _config(result, label)
  if result.documents.startswith('task:'):  # otherwise the store determines them
    cfg = schema.replace(cfg, **{'data.store': ''})
  tasks = {name for name, _ in registry.selected(cfg)}
  for what, *given in result.commands:
    parsed = flags.parse([*results.arguments_of(what, 'STORE', 'RUN'), *given])
    if what == 'bench':
      assert parsed.rest == ['decode', 'RUN']
      tasks.add('bench')
    else:
      assert what == 'eval'
      tasks |= set(parsed.config().eval.tasks.split(','))
      assert parsed.rest == ['RUN']
  assert tasks <= {'bench', registry.HELDOUT, *registry.SUITES}
  for _, source, _, form in result.columns:
    assert (registry.HELDOUT if source == 'eval' else source) in tasks
    assert format(0.5, form)
  if result.documents.startswith('task:'):
    assert next(readers.read(result.documents)).text


def test_families_are_equal_in_parameters(monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  (families,) = [r for r in results.RESULTS if r.name == 'families']
  totals = {label: params.count(lm.specs(_config(families, label))) for label in families.variants}
  assert max(totals.values()) < 1.01 * totals['parallel'], totals
  assert min(totals.values()) > 0.99 * totals['parallel'], totals


def _made_of(name, label):
  (result,) = [r for r in results.RESULTS if r.name == name]
  return results.made_of(result, label)


@pytest.fixture
def there(tmp_path, monkeypatch):
  """Rows of two results: several seeds, and one run with an interval."""
  rows = [
    dict(
      run=f'a_{seed}',
      seed=seed,
      cpu_s=1800,
      made_of=_made_of('code', 'n = 1'),
      values={'eval/loss_1': 2.0 + seed, 'eval/bits_per_byte': 3.0},
    )
    for seed in (0, 1)
  ]
  rows.append(
    dict(
      run='b_0',
      seed=0,
      cpu_s=3600,
      made_of=_made_of('star_graph', 'n = 2'),
      values={
        'star_graph/accuracy': 0.5,
        'star_graph/accuracy_low': 0.4,
        'star_graph/accuracy_high': 0.6,
      },
    )
  )
  monkeypatch.setattr(results, 'ROWS', tmp_path / 'results.jsonl')
  monkeypatch.setattr(results, 'REPORT', tmp_path / 'results.md')
  results.ROWS.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return tmp_path


def test_results_document(there):
  results.main(['--write'])
  lines = results.REPORT.read_text().splitlines()
  code = next(line for line in lines if line.startswith('| n = 1 `--heads.n=1`') and '2.5' in line)
  assert code.split(' | ')[1:4] == ['2.500 ± 0.707 [2 of 3]', '3.000 ± 0.000 [2 of 3]', '-']
  star = next(line for line in lines if '40.0%' in line)
  assert star.split(' | ')[1] == '50.0% (40.0% to 60.0%) [1 of 3]'
  assert '3 runs, 2.0 CPU-hours in all.' in lines
  assert 'Seeds 0, 1, 2; 2 of 12 runs, 1.00 CPU-hours.' in lines
  assert any('`--heads.family=sequential --model.n_layers=7' in x for x in lines)
  n_open = sum('open' in line for line in lines if line.startswith('| '))
  assert n_open == len(RUNS) - 3  # curricula have a run of n = 1 as well


def test_newest_row_wins_and_shared_runs_count_once(there):
  (row, *_) = results.rows().values()
  with open(results.ROWS, 'a') as f:  # of the same run, measured again
    f.write(json.dumps(row | dict(values={'eval/loss_1': 7.0})) + '\n')
    forward = row | dict(made_of=_made_of('curriculum', 'forward'))
    f.write(json.dumps(forward) + '\n')
  assert results.rows()[row['made_of'], 0]['values'] == {'eval/loss_1': 7.0}
  results.main(['--write'])
  text = results.REPORT.read_text()
  assert '3 runs, 2.0 CPU-hours in all.' in text


def test_values_are_the_last_record_of_each_source(tmp_path):
  records = [
    dict(kind='eval', step=step, loss_1=loss) | (dict(source=source) if source else {})
    for step, loss in ((5, 3.0), (9, 2.0))
    for source in ('', 'star_graph')
  ]
  lines = [json.dumps(record) for record in records]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  rows = [dict(heads=n, tokens_per_forward=n / 2, speed_up=dict(median=n / 4)) for n in (2, 6)]
  (tmp_path / 'bench.json').write_text(json.dumps(dict(rows=rows)))
  found = results.values(
    results.RESULTS[0]._replace(
      columns=(*results.HELD_OUT, *results.SPED_UP, ('', 'star_graph', 'loss_1', '')),
      commands=(('bench',),),
    ),
    tmp_path,
  )
  assert found == {
    'eval/loss_1': 2.0,
    'star_graph/loss_1': 2.0,
    'bench/speed_up': 1.5,
    'bench/tokens_per_forward': 3.0,
    'bench/pass_cost': 2.0,
  }


def test_measured_rows_are_not_run_again(there, monkeypatch):
  ran = []

  def measure(result, label, seed, folder, data):
    ran.append((label, seed))
    return dict(
      run=f'{result.name}_{label}_{seed}',
      seed=seed,
      cpu_s=0,
      values={},
      made_of=results.made_of(result, label),
    )

  monkeypatch.setattr(results, 'measure', measure)
  main = ['--data=.', f'--runs={there}/runs', 'star_graph']
  results.main(main)
  assert ran[:2] == [('n = 1', 0), ('n = 3', 0)] and len(ran) == 8
  results.main(main)
  assert len(ran) == 8


@pytest.mark.parametrize(
  'args, expected',
  [
    (['sudoku'], 'sudoku: results are star_graph polynomial'),
    (['books'], 'books needs --data=DIR'),
    (['code', 'books', '--data={}'], 'books needs books.jsonl.gz there'),
    (['star_graph'], ''),  # reads no texts
  ],
)
def test_missing_inputs_fail_at_once(there, monkeypatch, capsys, args, expected):
  monkeypatch.setattr(results, '_mtp', lambda _: sys.exit(2))
  with pytest.raises(SystemExit):
    results.main([arg.format(there) for arg in args])
  assert expected in capsys.readouterr().err


def test_row_of_another_command_is_ignored(there, monkeypatch):
  assert len(results.rows()) == 3
  star, *others = results.RESULTS
  other = star._replace(prepare=('--data.valid_fraction=0.5',))
  monkeypatch.setattr(results, 'RESULTS', (other, *others))
  made = _made_of('code', 'n = 1')
  assert sorted(results.rows()) == [(made, 0), (made, 1)]


def test_flags_include_those_of_included_files(monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  for result in results.RESULTS:
    name = f'experiments/small/{result.flags or result.name}.flags'
    flat = results.flags_of(pathlib.Path(name))
    assert not any(line.startswith('--flagfile') for line in flat)
    assert flags.parse(flat).config() == flags.parse([f'--flagfile={name}']).config()


def test_shared_run_is_run_once(there, monkeypatch):
  ran = []

  def measure(result, label, seed, folder, data):
    ran.append((result.name, label))
    made = results.made_of(result, label)
    return dict(run=made, seed=seed, cpu_s=0, values={}, made_of=made)

  monkeypatch.setattr(results, 'measure', measure)
  results.main(['--data=.', f'--runs={there}/runs', 'code', 'curriculum'])
  assert {label for name, label in ran if name == 'curriculum'} == {'forward', 'reverse'}


@pytest.mark.slow
def test_small_run_is_measured(tmp_path, monkeypatch):
  """Prepared, trained and evaluated by the commands that the document shows."""
  monkeypatch.setenv('XLA_FLAGS', runs.environment(1)['XLA_FLAGS'])
  shrunk = (
    '--model.d_model=16',
    '--model.n_layers=3',
    '--model.n_attn_heads=2',
    '--model.d_ff=32',
    '--data.batch_size=8',
    '--train.steps=2',
    '--optim.warmup_steps=1',
    '--eval.limit=6',
    '--train.log_every=1',
  )
  monkeypatch.setattr(results, 'ROWS', tmp_path / 'results.jsonl')
  monkeypatch.setattr(results, 'REPORT', tmp_path / 'results.md')
  star = results.RESULTS[0]
  star = star._replace(
    documents='task:star_graph/d=2/length=3/nodes=20/items=200',
    variants={'small': ('--heads.n=2', *shrunk)},
    figure='loss-small',
    prepare=('--data.valid_fraction=0.2',),
    commands=(
      (
        'eval',
        '--eval.tasks=heldout,acceptance',
        '--eval.split=train',
        '--bench.prompt_len=4',
        '--decode.max_new_tokens=4',
      ),
      (
        'bench',
        '--bench.batches=1',
        '--bench.prompt_len=4',
        '--decode.max_new_tokens=4',
        '--bench.rounds=1',
      ),
    ),
    columns=(*star.columns, *results.ACCEPTED, *results.SPED_UP),
  )
  row = results.measure(star, 'small', 0, tmp_path, '.')
  assert row['name'] == 'star_graph, small' and row['cpu_s'] > 1
  assert 0 <= row['values']['star_graph/first_step'] <= 1
  assert row['values']['star_graph/accuracy_high'] <= 1
  evaluated = json.loads((tmp_path / row['run'] / 'eval.json').read_text())
  assert row['values']['eval/mean_acceptance_length'] == evaluated['mean_acceptance_length']
  assert 1 <= row['values']['acceptance/tokens_per_forward'] <= 2
  assert 1 <= row['values']['bench/tokens_per_forward'] <= 2
  assert row['values']['bench/speed_up'] > 0
  # Another result of the same run is not trained again.
  plain = star._replace(commands=(), columns=results.RESULTS[0].columns)
  again = results.measure(plain, 'small', 0, tmp_path, '.')
  assert again['run'] == row['run'] and again['made_of'] != row['made_of']
  assert again['values'].items() < row['values'].items()
  assert 'eval/mean_acceptance_length' not in again['values']
  assert again['cpu_s'] > row['cpu_s']
  # A failing command has printed the reason.
  with pytest.raises(SystemExit, match='2'):
    results.measure(star._replace(documents='task:sudoku'), 'small', 0, tmp_path, '.')
  # The picture of the report, where the document looks for it.
  monkeypatch.setattr(results, 'RESULTS', (star,))
  results.picture_of(star).write_text('of rows before')
  results.draw(star, tmp_path)
  assert not results.picture_of(star).exists()
  results.ROWS.write_text(json.dumps(row) + '\n')
  results.draw(star, tmp_path)
  assert results.picture_of(star).read_bytes()[:4] == b'\x89PNG'
  results.write()
  assert '](star_graph.png)' in results.REPORT.read_text()
  results.ROWS.write_text('')  # without rows there is no picture
  results.write()
  assert 'star_graph.png' not in results.REPORT.read_text()
