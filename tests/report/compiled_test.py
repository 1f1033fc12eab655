"""The section of RUN/plan.json: where a step's time goes, by the compiler."""

import json
import pathlib
import re

import pytest

from mtp_jax.config import parse
from mtp_jax.report import compiled, figures, files, history
from tests.support import browser, tiny

SCOPES = {  # of cycles
  'forward trunk/qkv/BTD,DGH->BTGH/dot_general': 4_000_000,
  'forward trunk/mlp/mul': 3_000_000,
  'forward other': 1_000_000,
  'backward trunk/<b>$x$&/add': 6_000_000,
  'backward heads/ce/BCD,DV->BCV/dot_general': 12_000_000,
  'recomputed heads/ce/exp': 2_000_000,
  'recomputed heads/ce/log': 2_000,  # too small to be drawn
  'forward trunk/attend/pallas_call': 0,  # a kernel
}


def _plan(**changes) -> dict:
  rows = [
    dict(scope=scope, cycles=n, flops=1e9, memory_bytes=2.0**20) for scope, n in SCOPES.items()
  ]
  buffer = dict(shape='bf16[4,1024,32000]', bytes=2.0**28, scope='recomputed heads/ce/exp')
  return (
    dict(
      device_kind='TPU v5 lite',
      params_bytes=1,
      temp_bytes=1,
      total_bytes=2,
      clock_hz=1.5e9,
      operations=rows,
      peak_buffers=[buffer],
    )
    | changes
  )


def _run(folder: pathlib.Path, plan: dict | str | None) -> str:
  folder.mkdir()
  (folder / 'metrics.jsonl').write_text('{"kind": "train", "step": 1, "loss_1": 2.0}\n')
  if plan is not None:
    text = plan if isinstance(plan, str) else json.dumps(plan)
    (folder / 'plan.json').write_text(text)
  return str(folder)


def _sections(run: str) -> list[str]:
  return re.findall(r'<h2 id="(\w+)">', (pathlib.Path(run) / 'report.html').read_text())


def test_section_has_an_icicle_and_tables(tmp_path):
  run = _run(tmp_path / 'run', _plan())
  section = compiled.where_time_goes(history.read([run]))
  (plot,) = section.plots
  assert {name: part.value for name, part in plot.parts.items()} == {
    'backward': 18,
    'forward': 8,
    'recomputed': 2.002,
  }
  trunk = plot.parts['forward'].parts['trunk']
  assert list(trunk.parts) == ['qkv', 'mlp'] and trunk.value == 7
  assert list(trunk.parts['qkv'].parts) == ['BTD,DGH->BTGH/dot_general']
  assert plot.description() == (
    'Cycles by scope, run, in M cycles per step and device. backward 18, of which heads 12,'
    ' trunk 6; forward 8, of which trunk 7, other 1; recomputed 2, of which heads 2'
  )
  scopes, buffers = section.tables
  # The largest first, none without cycles. 1e9 FLOPs and 1 MiB take 7614 cycles at the peak.
  assert [row[0] for row in scopes.rows[:2]] == [
    'backward heads/ce/BCD,DV->BCV/dot_general',
    'backward trunk/<b>$x$&/add',
  ]
  assert len(scopes.rows) == 7
  assert scopes.rows[0][1:] == ['12.00', f'{12 / 28.002:.1%}', '1.0', '1.0', '0%']
  assert scopes.rows[-1][1:] == ['0.00', '0.0%', '1.0', '1.0', '381%']
  assert buffers.rows == [['recomputed heads/ce/exp', 'bf16[4,1024,32000]', '256.0']]


def test_plan_of_other_flags_is_named(tmp_path):
  run = _run(tmp_path / 'run', _plan(heads=4, batch_size=8))
  (tmp_path / 'run' / 'config.json').write_text(parse.to_json(tiny.cfg(heads__n=2)))
  section = compiled.where_time_goes(history.read([run]))
  assert section.text[1:] == ['The plan of run is of other flags: it has heads 4, the run 2.']


def test_unknown_clock_has_no_floor(tmp_path):
  run = _run(tmp_path / 'run', _plan(clock_hz=None))
  section = compiled.where_time_goes(history.read([run]))
  assert {row[-1] for row in section.tables[0].rows} == {'–'}


def test_labels_are_drawn_where_they_fit(tmp_path):
  run = _run(tmp_path / 'run', _plan())
  (plot,) = compiled.where_time_goes(history.read([run])).plots
  svg, png = figures.draw(plot)
  assert png.startswith(b'\x89PNG') and '<title' not in svg
  drawn = re.findall(r'<text[^>]*>([^<]*)</text>', svg)
  assert {'backward', 'forward', 'recomputed', 'trunk', 'heads', 'ce', 'qkv', 'mlp'} <= set(drawn)
  assert 'log' not in drawn and '&lt;b&gt;$x$&amp;' in drawn
  shortened = [text for text in drawn if text.endswith('…')]
  assert 'BCD,DV-&gt;BCV/dot…' in shortened
  assert figures.draw(plot) == (svg, png)  # deterministic


def test_page_of_a_plan_in_a_browser(tmp_path):
  run = _run(tmp_path / 'run', _plan())
  files.write([run])
  assert _sections(run) == ['runs', 'loss', 'compiled']
  with browser.page() as shown:
    for width, dark in ((360, False), (1200, True)):
      shown.look(width, dark)
      shown.open(tmp_path / 'run' / 'report.html')
      assert shown.run('return document.documentElement.scrollWidth') <= width
      assert shown.run(browser.FAULTS) == []


def test_plan_without_cycles_has_the_buffers_only(tmp_path):
  rows = [dict(scope='forward other', cycles=0, flops=1.0, memory_bytes=1.0)]
  run = _run(tmp_path / 'run', _plan(device_kind='NVIDIA H100 80GB HBM3', operations=rows))
  section = compiled.where_time_goes(history.read([run]))
  assert not section.plots and len(section.tables) == 1


@pytest.mark.parametrize(
  'plan, problem',
  [
    ('{"a', 'is not JSON: '),
    ('[1]', 'is not a plan: must be an object'),
    (dict(rows=[], sweep=[]), 'is of --plan.sweep'),
    (_plan(operations=[dict(scope='x')]), 'is not a plan: has no field operations[0].'),
    (_plan(operations=None, peak_buffers=None), 'has no operations; mtp plan --plan.profile'),
  ],
)
def test_unreadable_plan_is_skipped_and_named(plan, problem, tmp_path):
  broken = _run(tmp_path / 'broken', plan)
  lines, _ = files.write([broken])
  assert _sections(broken) == ['runs', 'loss']
  (line,) = [line for line in lines if 'plan.json' in line]
  assert line.startswith(f'{broken}/plan.json is skipped: ') and problem in line
  # Beside a run that has one, the section names it.
  good = _run(tmp_path / 'good', _plan())
  files.write([good, broken])
  assert 'compiled' in _sections(good)
  assert 'broken/plan.json is skipped' in (tmp_path / 'good' / 'report.html').read_text()


def test_run_without_plan_has_no_section(tmp_path):
  run = _run(tmp_path / 'run', None)
  lines, _ = files.write([run])
  assert 'compiled' not in _sections(run) and not any('plan.json' in line for line in lines[:-1])
