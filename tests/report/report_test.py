"""`mtp report`: contents of the page, and its layout in a browser."""

import json
import pathlib
import re
import shutil

import pytest

from mtp_jax.cli import main
from mtp_jax.config import fields, parse, schema
from mtp_jax.model import lm, params
from mtp_jax.report import cost, curves, figures, files, history
from mtp_jax.train import goodput, metrics
from tests.support import browser
from tests.support import runs as runs_lib

SUITE = [
  dict(
    kind='suite',
    source='star <b>graph',
    step=step,
    accuracy=step / 10,
    accuracy_low=step / 10 - 0.05,
    accuracy_high=step / 10 + 0.05,
    recall_1=0.5,
    recall_2=0.25 * step,
    examples=200,
  )
  for step in (2, 4, 6)
]


def _append(path: pathlib.Path, records: list[dict]) -> None:
  with path.open('a') as file:
    file.writelines(json.dumps(record) + '\n' for record in records)


@pytest.fixture(scope='module')
def trained(undisturbed, store, tmp_path_factory):
  """Runs with n = 2 and n = 1, the first with a suite, a spike and a name that must
  be escaped."""
  folder = tmp_path_factory.mktemp('report')
  multi, single = folder / 'two <i>heads & "n"', folder / 'one'
  assert runs_lib.train(store, single, heads__n=1) == 0
  shutil.copytree(undisturbed, multi, ignore=shutil.ignore_patterns('checkpoints'))
  _append(multi / 'metrics.jsonl', SUITE)
  last = goodput.read(str(multi))[-1]
  _append(multi / 'goodput.jsonl', [last | dict(spike=3, loss=5.5)] * 2)
  return multi, single


@pytest.fixture(scope='module')
def page(trained):
  """The page of both runs, as text."""
  files.write([str(run) for run in trained])
  return (trained[0] / 'report.html').read_text()


def _sections(page: str) -> list[str]:
  return re.findall(r'<h2 id="(\w+)">', page)


def _written(folder: pathlib.Path, *records: dict) -> str:
  folder.mkdir()
  _append(folder / 'metrics.jsonl', list(records))
  return str(folder)


# In a browser.


def test_report_page_in_a_browser(trained, page):
  path = trained[0] / 'report.html'
  with browser.page() as shown:
    grounds = []
    for width, dark in ((360, False), (360, True), (1200, False), (1200, True)):
      shown.look(width, dark)
      shown.open(path)
      assert shown.run('return innerWidth') == width
      wide = shown.run('return document.documentElement.scrollWidth')
      assert wide <= width
      assert shown.run(browser.FAULTS) == []
      ground, ink = shown.run(browser.GROUND)
      assert browser.contrast(ground, ink) > 10
      grounds.append(browser.luminance(ground))
    assert grounds[0] == grounds[2] > 0.9 and grounds[1] == grounds[3] < 0.05
    titles = shown.run('return [...document.querySelectorAll("h1, h2")].map(h => h.textContent)')
    assert titles[0] == f'Report on {trained[0].name} and one'
    assert len(titles) == 1 + len(_sections(page))
    # No requests to other files, no browser errors.
    assert set(shown.asked_for()) == {path.as_uri()}
    assert shown.log('browser') == []


def test_browser_checks_detect_requests_and_errors(tmp_path):
  """Shows that the test above can fail."""
  path = tmp_path / 'page.html'
  path.write_text(
    '<img src="none.png"><figure></figure><script>nothing()</script><p style="width: 900px">wide'
  )
  with browser.page() as shown:
    shown.look(360)
    shown.open(path)
    assert shown.run('return document.documentElement.scrollWidth') > 360
    assert {'img', 'empty figure', 'a name became an element'} <= set(shown.run(browser.FAULTS))
    assert (tmp_path / 'none.png').as_uri() in shown.asked_for()
    assert len(shown.log('browser')) == 2


def test_colours_have_contrast_on_light_and_dark():
  def rgb(text):
    return [int(text[i : i + 2], 16) for i in (1, 3, 5)]

  for ground in (figures.LIGHT, figures.DARK):
    for color in figures.COLORS:
      assert browser.contrast(rgb(ground), rgb(color)) >= 3, (ground, color)


# Contents.


def test_report_has_a_section_for_all_records(trained, page):
  assert _sections(page) == [
    'runs',
    'loss',
    'acceptance',
    'evaluators',
    'speed',
    'memory',
    'goodput',
    'spikes',
    'flags',
  ]
  assert 'only the loss of head 1' in page
  drawn = {p.name for p in (trained[0] / 'report').glob('*.png')}
  two = 'two-i-heads-n'
  assert drawn == {
    f'{name}.png'
    for name in (
      'head-1-held-out',
      f'loss-{two}',
      'loss-one',
      f'acceptance-{two}',
      'suite-star-b-graph-accuracy',
      'suite-star-b-graph-recall',
      'tokens-per-s',
      'step-time',
      'memory',
      'goodput',
    )
  }
  for path in (trained[0] / 'report').glob('*.png'):
    assert path.read_bytes().startswith(b'\x89PNG')
  assert len(page) < 2_000_000
  assert '://' not in page and '@import' not in page


def test_report_is_deterministic_and_removes_older_figures(trained, page):
  folder = trained[0] / 'report'
  (folder / 'notes.txt').write_text('kept')
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  (folder / 'older.png').write_bytes(b'')
  drawn = json.loads((folder / files.DRAWN).read_text())
  (folder / files.DRAWN).write_text(json.dumps([*drawn, 'older.png']))
  files.write([str(run) for run in trained])
  after = {p.name: p.read_bytes() for p in folder.iterdir()}
  assert after.keys() == before.keys()
  assert all(after[name] == before[name] for name in after)
  (folder / 'notes.txt').unlink()
  assert (trained[0] / 'report.html').read_text() == page
  assert not list(trained[0].rglob('*.tmp'))


def test_report_keeps_other_files_in_the_folder(tmp_path):
  """Also through a symbolic link: only figures of the last report are removed."""
  (tmp_path / 'shared').mkdir()
  (tmp_path / 'run').mkdir()
  folder = tmp_path / 'run' / 'report'
  folder.symlink_to(tmp_path / 'shared')
  (folder / 'mine.png').write_bytes(b'x')
  files._write_figures(str(folder), {'a.png': b'a', 'b.png': b'b'})
  files._write_figures(str(folder), {'b.png': b'c'})
  found = {p.name: p.read_bytes() for p in folder.glob('*.png')}
  assert found == {'mine.png': b'x', 'b.png': b'c'}
  (folder / files.DRAWN).write_text('["../mine.png", "mine.png/..", 3]')
  files._write_figures(str(folder), {'b.png': b'c'})
  assert (folder / 'mine.png').exists()


def test_report_skips_sections_without_data(trained, tmp_path):
  single = tmp_path / 'single'
  shutil.copytree(trained[1], single)
  files.write([str(single)])
  page = (single / 'report.html').read_text()
  assert _sections(page) == ['runs', 'loss', 'speed', 'memory', 'goodput', 'flags']
  assert 'difference to n = 1' not in page and 'accepted<' not in page
  bare = _written(tmp_path / 'bare', dict(kind='train', step=1, loss_1=None))
  _, values = files.write([bare])
  assert _sections((tmp_path / 'bare' / 'report.html').read_text()) == ['runs']
  assert values['figures'] == []


def test_comparison_table_has_recorded_values(trained):
  found = history.read([str(run) for run in trained])
  section = curves.compared(found)
  (table,) = section.tables
  rows = {row[0].strip(): row[1:] for row in table.rows}
  ends = [run.of('eval')[-1] for run in found]
  count = params.count(lm.specs(found[0].cfg))
  assert rows['heads n'] == ['2', '1']
  assert rows['family'] == ['parallel', '–']
  assert rows['parameters'] == [f'{count:,}'] * 2
  assert rows['tokens seen'] == [f'{6 * 8 * 16:,}'] * 2
  loss = [end['loss_1'] for end in ends]
  assert rows['held-out loss of head 1 (nats)'] == [f'{x:.4f}' for x in loss]
  assert rows['difference to n = 1'] == [f'{loss[0] - loss[1]:+.4f}', '+0.0000']
  assert rows['accuracy of head 1'] == [f'{e["accuracy_1"]:.2%}' for e in ends]
  assert section.text[0] == ('All have the same number of parameters and tokens.')
  (plot,) = section.plots
  assert [s.points for s in plot.series] == [[(6 * 8 * 16, x)] for x in loss]
  more = found[1]._replace(records=[*found[1].records, dict(kind='train', step=9)])
  assert curves.compared([found[0], more]).text[0] == (
    'All have the same number of parameters. They differ in tokens by up to 50.0%.'
  )
  unread = more._replace(cfg=None)
  assert curves.compared([found[0], unread]).text[0] == (
    'Not all runs record their parameters and tokens.'
  )


def test_suite_plots_have_bands_and_intervals(trained):
  section = curves.suites(history.read([str(run) for run in trained]))
  accuracy, recall = section.plots
  (line,) = accuracy.series
  assert line.points == [(r['step'], r['accuracy']) for r in SUITE]
  assert line.band == ([r['accuracy_low'] for r in SUITE], [r['accuracy_high'] for r in SUITE])
  assert [s.band for s in recall.series] == [None, None]
  (table,) = section.tables
  assert table.rows == [
    ['accuracy', '0.6 [0.55, 0.65]', '–'],
    ['recall_1', '0.5', '–'],
    ['recall_2', '1.5', '–'],
    ['examples', '200', '–'],
  ]


def test_suite_levels_of_several_runs_have_one_figure_each(tmp_path):
  def record(step):
    return dict(kind='suite', source='s', step=step, right_1=0.1 * step, right_2=0.2)

  records = [record(step) for step in (1, 2)]
  runs = [_written(tmp_path / name, *records) for name in 'ab']
  one = curves.suites(history.read(runs[:1]))
  assert [[s.label for s in p.series] for p in one.plots] == [['right_1', 'right_2']]
  two = curves.suites(history.read(runs))
  assert [p.name for p in two.plots] == ['suite-s-right-1']  # 2 never changes
  assert [s.label for s in two.plots[0].series] == ['a', 'b']


def test_memory_and_step_time_match_records(trained, store, tmp_path):
  found = history.read([str(run) for run in trained])
  for run in found:
    memory = history.memory(run)
    # Sharded over all eight devices, except for replicated norms.
    assert 0 < memory['parameters'] < 4 * history.n_parameters(run)
    assert memory['optimizer'] > 2 * memory['parameters']
    assert memory['temporaries'] > 0 and memory['heads'] == run.cfg.heads.n
  bars, *_ = cost.memory(found).plots
  assert list(bars.rows) == [run.name for run in found]
  (*_, bars) = cost.speed(found).plots
  (session,) = history.sessions(found[1])
  assert sum(bars.rows['one'].values()) == pytest.approx(
    1e3 / 6 * sum(session['seconds'][c] for c in ('data', 'host', 'device'))
  )
  assert cost.spikes(found).tables[0].rows == [['3', found[0].name, '5.5000']]
  assert cost.flags(found).tables[0].rows == [
    ['heads.n', '2', '1'],
    ['train.checkpoint_every', '3', '0'],
  ]
  # Each number of heads is a separate program; the largest is reported.
  curriculum = dict(loss__curriculum='0:1;3:2', train__steps=4, optim__warmup_steps=1)
  assert runs_lib.train(store, tmp_path / 'run', **curriculum) == 0
  records = goodput.read(str(tmp_path / 'run'))
  memory = {
    r['memory']['heads']: (r['step'], r['memory']['temporaries']) for r in records if 'memory' in r
  }
  assert [memory[n][0] for n in (1, 2)] == [0, 3]
  (run,) = history.read([str(tmp_path / 'run')])
  assert history.memory(run)['temporaries'] == max(m for _, m in memory.values())


def test_head_tables_by_source_and_stride(tmp_path):
  last = dict(
    kind='eval',
    step=8,
    loss_1=1.0,
    loss_2=2.0,
    accuracy_1=0.5,
    accuracy_2=0.25,
    acceptance_2=0.5,
    acceptance_3=0.125,
    bits_per_byte=None,
  )
  path = _written(tmp_path / 'run', last | dict(source='code'), last | dict(source='chat'))
  found = history.read([path])
  assert [t.caption for t in curves.losses(found).tables] == [
    'run, code: held out after step 8',
    'run, chat: held out after step 8',
  ]
  assert curves.losses(found).tables[0].rows == [
    ['1', '1.0000', '50.00%', '–'],
    ['2', '2.0000', '25.00%', '50.00%'],
    ['3', '–', '–', '12.50%'],
  ]
  (plot,) = curves.losses(found).plots
  assert plot.note.endswith('code: circles; chat: squares.')


# Parts of the report.


def test_run_names_are_unique(tmp_path):
  record = dict(kind='train', step=1, loss_1=2.0)
  for folder in ('a', 'b'):
    (tmp_path / folder).mkdir()
  one = _written(tmp_path / 'a' / 'run', record)
  two = _written(tmp_path / 'b' / 'run', record)
  names = ('_$x$', '- x', 'ラン')
  odd = [_written(tmp_path / name, record) for name in names]
  found = history.read([one, two, f'{one}/', *odd])
  assert [run.name for run in found] == [
    'a/run',
    'b/run',
    *(f'{tmp_path.name}/{name}' for name in names),
  ]
  _, values = files.write([one, two, *odd])
  assert len(values['figures']) == len(set(values['figures'])) == 5
  page = pathlib.Path(values['report']).read_text()
  assert page.count('$x$') >= 4


def test_long_series_are_averaged():
  points = [(x, 2.0 * x) for x in range(1, 1001)]
  found, each = history.thinned(points, 250)
  assert each == 4 and len(found) == 250
  assert found[0] == (2.5, 5.0) and found[-1] == (998.5, 1997.0)
  assert history.thinned(points[:3]) == (points[:3], 1)
  assert history.thinned([]) == ([], 1)


def test_loss_limits_clip_outliers(tmp_path):
  records = [
    dict(kind='train', step=s, loss_1=60.0 if s < 5 or s == 50 else 3 - s / 100)
    for s in range(1, 101)
  ]
  (calm,) = curves.losses(history.read([_written(tmp_path / 'calm', *records[5:49])])).plots
  section = curves.losses(history.read([_written(tmp_path / 'run', *records)]))
  (plot,) = section.plots
  low, high = plot.limits
  assert low < 2 and 3 < high < 5 and calm.limits[1] < 3.1
  assert section.text == ['The highest losses, mostly of the first steps, are clipped.']


def test_labels_and_values_are_shortened():
  assert figures.short('a run') == 'a run'
  cut = figures.short('a' * 40 + ', session 12')
  assert len(cut) == figures.LABEL and cut.endswith('a, session 12')
  assert figures.short('_$x$') == r'_\$x\$'
  assert [figures.plain(x) for x in (86400.4, 123.4, 12.34, 0.01234)] == [
    '86,400',
    '123',
    '12.3',
    '0.0123',
  ]


def test_unwritable_report_raises(trained, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(files.os, 'access', lambda *_: False)
  assert main.main(['report', str(trained[1])]) == 2
  assert capsys.readouterr().err == f'mtp: {trained[1]}: cannot write there\n'
  monkeypatch.undo()
  run = tmp_path / 'run'
  _written(run, dict(kind='train', step=1, loss_1=2.0))
  (run / 'report').write_text('of the user')
  assert main.main(['report', str(run)]) == 2
  assert capsys.readouterr().err == f'mtp: {run}/report: is not a directory\n'
  assert not (run / 'report.html').exists()


def test_corrupt_metrics_record_raises(tmp_path, capsys):
  run = tmp_path / 'run'
  _written(run, dict(kind='train', step=1, loss_1=2.0))
  path = run / 'metrics.jsonl'
  for bad, problem in (
    ('{"kind": "train", "st', 'is not JSON: '),
    ('[1]', 'it=[1]: must be an object\n'),
    ('{"step": 2}', 'has no field kind\n'),
    ('{"kind": "train", "step": null}', 'step=null: must be an integer from 0 to 2,147,483,647\n'),
    (
      '{"kind": "train", "step": 2, "loss_1": "low"}',
      'loss_1="low": must be a number, at most 1e100 or null\n',
    ),
    (
      '{"kind": "train", "step": 2, "loss_1": [2.0]}',
      'loss_1=[2.0]: must be a number, at most 1e100 or null\n',
    ),
  ):
    lines = path.read_text().splitlines()[:1]
    path.write_text('\n'.join([*lines, bad, *lines, '']))
    assert main.main(['report', str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'mtp: {path}:2: not a record, corrupt: {problem}')
    assert error.count('\n') == 1
    with pytest.raises(fields.ConfigError, match='--train.workdir='):
      metrics.Sinks(str(run), 1)


def test_corrupt_goodput_and_config_raise(tmp_path, capsys):
  run = tmp_path / 'run'
  _written(run, dict(kind='train', step=1, loss_1=2.0))
  good = dict(
    session=0,
    start=0,
    began=1.0,
    step=1,
    time=2.0,
    end='finished',
    seconds=dict.fromkeys(goodput.CAUSES, 1.0),
  )
  for name, record, problem in (
    ('goodput.jsonl', good | dict(step='x'), ':1: step="x": must be an int'),
    (
      'goodput.jsonl',
      good | dict(seconds=dict(good['seconds'], data=None)),
      ':1: seconds.data=null: must be a number',
    ),
    ('goodput.jsonl', [good], ':1: it=[{'),
    ('config.json', dict(version=1, heads=dict(n='4')), ': heads.n="4": must be an integer'),
    ('config.json', 3, ': it=3: must be an object'),
  ):
    (run / name).write_text(json.dumps(record) + '\n')
    assert main.main(['report', str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'mtp: {run}/{name}{problem}'), error
    if name == 'goodput.jsonl':
      with pytest.raises(fields.ConfigError, match='--train.workdir='):
        goodput.Ledger(str(run), 1)
    (run / name).unlink()
  (run / 'goodput.jsonl').write_text('{"cut of\n' + json.dumps(good) + '\n')
  assert goodput.read(str(run)) == [good]


def test_config_of_another_version_is_ignored(trained, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(trained[1], copy)
  (copy / 'config.json').write_text('{"version": 99}')
  (run,) = history.read([str(copy)])
  assert run.cfg is None and history.heads(run) == 1
  text = parse.to_json(schema.CommandConfig()).replace('"d_model"', '"d_wide"')
  (copy / 'config.json').write_text(text)
  assert history.read([str(copy)])[0].cfg is None
  assert metrics.read(str(copy)) == history.read([str(copy)])[0].records
