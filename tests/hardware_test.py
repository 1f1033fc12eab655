"""`python -m tests.hardware` at tiny sizes: every part, its files, its verdicts, its end."""

import json
import math
import signal
import time

import jax
import pytest

from mtp_jax.parallel import chips
from tests import docs_test
from tests.hardware import __main__ as hardware
from tests.hardware import cross_entropy, decoding, parts, report, session, step
from tests.support import runs

NAMES = [part.name for part in parts.PARTS]
# As on a machine with jax, flax, optax, absl-py and numpy alone, whose CPU has the peaks of
# an H100: predictions are of a known chip.
BARE = """
import sys
for name in ('grain', 'tensorboardX', 'tokamax', 'transformer_engine', 'orbax', 'sentencepiece',
             'matplotlib', 'pyarrow', 'torch', 'pytest'):
  sys.modules[name] = None  # importing it raises
from mtp_jax.parallel import chips
chips.chip = lambda kind: chips.CHIPS['NVIDIA H100']
from tests.hardware import __main__
sys.exit(__main__.main(sys.argv[1:]))
"""
# One kernel is 5% off, the other one exhausts the memory.
WRONG = """
import sys
from mtp_jax.model import attention
right = attention.KERNELS['flash']
def wrong(x, window, m, interpret=False):
  return 1.05 * right(x, window, m, interpret)
def fails(*args, **kwargs):
  raise MemoryError('RESOURCE_EXHAUSTED: 1 TiB')
attention.KERNELS |= dict(flash=wrong, splash=fails)
from tests.hardware import __main__
sys.exit(__main__.main(sys.argv[1:]))
"""
SLOW = """
import sys, time
from tests.hardware import __main__, parts, session
def slow(work):
  work.figure('a figure', 1.0, 'ratio')
  time.sleep(300)
parts.PARTS = tuple(session.Part(name, slow, 1, 0, name) for name in ('first', 'second'))
sys.exit(__main__.main(sys.argv[1:]))
"""


def _run(code, path, *args):
  process = runs.process(['-c', code, f'--out={path}', *args], devices=2)
  out, error = process.communicate()
  return process.returncode, out, error


def _read(path):
  """JSON without NaN."""
  return json.loads(path.read_text(), parse_constant=pytest.fail)


def _figures(values) -> dict[str, dict]:
  return {f['name']: f for part in values['parts'] for f in part['figures']}


@pytest.fixture(scope='module')
def complete(tmp_path_factory):
  path = tmp_path_factory.mktemp('hardware') / 'hardware.json'
  status, out, error = _run(BARE, path, '--minutes=30')
  assert status == 0, out + error
  return _read(path), path.with_suffix('.md').read_text(), out


def test_every_part_runs_with_jax_flax_and_optax_alone(complete):
  values, _, _ = complete
  assert (values['status'], values['size'], values['platform']) == ('complete', 'tiny', 'cpu')
  assert values['versions']['jax'] == jax.__version__
  assert [(p['name'], p['status']) for p in values['parts']] == [(n, 'done') for n in NAMES]
  assert all(p['figures'] for p in values['parts'])


def test_equalities_are_judged_and_bars_of_time_are_not_at_tiny_sizes(complete):
  for name, f in _figures(complete[0]).items():
    equality = 'against' in name or 'texts equal' in name or 'loss of head' in name
    expected = 'met' if equality else 'not judged' if f['bar'] else ''
    assert f['verdict'] == expected, name


def test_figures_are_beside_predictions(complete):
  figures = _figures(complete[0])
  peak = chips.CHIPS['NVIDIA H100']
  for n in (1, 4):
    name = f'step of tiny, interleaved, n = {n}'
    took, mfu = figures[f'{name}: time'], figures[f'{name}: MFU']
    assert took['measured'] == pytest.approx(sorted(took['seconds'])[0], rel=10)
    assert mfu['measured'] == pytest.approx(
      took['model_flops'] / took['measured'] / peak.flops_per_s
    )
    assert took['predicted'] == pytest.approx(
      max(took['executed_flops'] / peak.flops_per_s, took['roofline']['memory'])
    )
    assert mfu['predicted'] == pytest.approx(mfu['measured'] * took['measured'] / took['predicted'])
  loss = figures['cross-entropy, chunks of the default: 512 x 64 x 512, bfloat16']
  # Three products, the logits among them.
  assert loss['predicted'] == pytest.approx(6 * 512 * 64 * 512 / peak.flops_per_s)
  assert loss['temp_bytes'] > 0
  kernel = figures['flash, forward and backward, share of the peak']
  assert kernel['measured'] > 0 and kernel['predicted'] == 0.5


def test_drafts_of_the_trained_model_are_accepted(complete):
  figures = _figures(complete[0])
  trained = figures['decoding, trained, batch 1, W = 4']
  assert trained['tokens_per_forward'] > 1
  assert trained['over_plain']['median'] > 0 and trained['predicted'] > 0
  assert figures['decoding, trained, batch 1, W = 1']['tokens_per_forward'] == 1


def test_heads_are_added_to_a_frozen_trunk(complete):
  figures = _figures(complete[0])
  for loss in ('ce', 'lk_hybrid'):
    for temperature in (0, 1):
      found = figures[f'heads by {loss}, temperature {temperature}']
      assert 1 < found['measured'] <= 4
  assert figures['heads added to a frozen trunk: the whole recipe']['measured'] > 0


def test_markdown_has_a_row_per_figure_in_the_words_of_the_field(complete):
  values, markdown, out = complete
  head, _, *table = markdown.splitlines()
  assert head.startswith('`python -m tests.hardware') and values['versions']['jax'] in head
  assert table[0] == "| figure | bar | measured | plan's prediction | verdict |"
  found = [line.split(' | ') for line in table[2:]]
  assert [cells[0].removeprefix('| ') for cells in found] == [*_figures(values)]
  assert {len(cells) for cells in found} == {5}
  assert not docs_test.forbidden_words(docs_test.CODE.sub(' ', markdown))
  assert markdown.strip() in out


def test_what_does_not_fit_the_time_is_named_with_its_command(tmp_path):
  path = tmp_path / 'short.json'
  status, out, error = _run(BARE, path, '--minutes=0.001')
  assert status == 0, error
  assert json.loads(path.read_text())['status'].startswith('incomplete')
  values = _read(path)
  machine, *others = values['parts']
  assert machine['status'] == 'done' and [p['name'] for p in others] == NAMES[1:]
  markdown = path.with_suffix('.md').read_text()
  for part in others:
    command = f'python -m tests.hardware --part={part["name"]} --minutes='
    assert part['status'] == 'out of time' and part['command'].startswith(command)
    assert f'| part {part["name"]} |  |  |  | out of time: `{part["command"]}` |' in markdown


def test_wrong_kernel_is_missed_and_a_failure_does_not_end_the_run(tmp_path):
  path = tmp_path / 'wrong.json'
  status, out, error = _run(WRONG, path, '--part=kernels')
  values = _read(path)
  assert (status, values['status'], values['size']) == (1, 'complete', 'tiny'), error
  assert [p['name'] for p in values['parts']] == ['kernels']
  verdicts = {name: f['verdict'] for name, f in _figures(values).items() if 'reference' in name}
  assert {name.split(',')[0]: verdict for name, verdict in verdicts.items()} == dict(
    splash='failed', flash='missed'
  )
  assert 'MemoryError: RESOURCE_EXHAUSTED: 1 TiB' in path.with_suffix('.md').read_text()


def test_sigterm_ends_with_the_report_written(tmp_path):
  path = tmp_path / 'ended.json'
  process = runs.process(['-c', SLOW, f'--out={path}'])
  for line in process.stdout:
    if 'a figure' in line:
      break
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  values = _read(path)
  assert (process.returncode, values['status']) == (128 + signal.SIGTERM, 'interrupted')
  assert [(p['name'], p['status']) for p in values['parts']] == [
    ('first', 'interrupted'),
    ('second', 'out of time'),
  ]
  assert _figures(values)['a figure']['measured'] == 1
  assert (
    'interrupted: `python -m tests.hardware --part=first' in path.with_suffix('.md').read_text()
  )


@pytest.mark.parametrize(
  'arg, problem',
  [
    ('--part=step,speed', f"'speed': no such part; parts are {', '.join(NAMES)}"),
    ('--minutes=soon', "'soon': must be a number of minutes above 0, e.g. 5"),
    ('--minutes=0', "'0': must be a number of minutes above 0, e.g. 5"),
    ('--minutes=nan', "'nan': must be a number of minutes above 0, e.g. 5"),
    ('--out=missing/x.json', "'missing/x.json': must be a .json file in an existing directory"),
    ('--size=huge', "invalid choice: 'huge'"),
    ('--size=full', 'jax finds no GPU or TPU here; auto and tiny are allowed'),
    ('--parts=step', 'unrecognized arguments: --parts=step'),
  ],
)
def test_wrong_argument_is_one_line_and_status_2(capsys, arg, problem):
  with pytest.raises(SystemExit) as found:
    hardware.main([arg])
  error = capsys.readouterr().err
  assert found.value.code == 2
  assert problem in error and error.startswith('tests.hardware: ') and error.count('\n') == 1


def test_the_page_of_hardware_lists_every_part():
  page = (docs_test.DOCS / 'hardware.md').read_text()
  for part in parts.PARTS:
    assert f'| {part.name} | {part.minutes} |' in page
  # --minutes=25 is stated to be enough for all.
  assert sum(part.minutes for part in parts.PARTS) < 25


# Sessions without a subprocess.


def _session(tmp_path, seconds=60.0, is_tiny=True):
  made = report.Report(
    str(tmp_path / 'x.json'), command='x', date='', device='', versions={}, size='tiny'
  )
  end_s = time.monotonic() + seconds
  return session.Session(made, device=jax.devices()[0], is_tiny=is_tiny, end_s=end_s)


def test_parts_run_in_the_order_of_priority_whatever_fails(tmp_path):
  ran = []

  def fails(work):
    ran.append('fails')
    raise RuntimeError('INTERNAL: first line\nsecond line')

  def works(work):
    ran.append('works')
    assert work.attempt('too long', 1e6, lambda: ran.append('never')) is None
    work.figure('not a number', math.nan, 'ratio', bar=report.Bar('at most', 1.0, True))

  work = _session(tmp_path)
  listed = [session.Part(f.__name__, f, 1, 0, 'x') for f in (fails, works)]
  hardware._run_parts(listed, work)
  values = _read(tmp_path / 'x.json')
  assert ran == ['fails', 'works'] and not work.report.is_met
  first, second = values['parts']
  assert (first['status'], first['error']) == ('failed', 'RuntimeError: INTERNAL: first line')
  assert [(f['measured'], f['verdict']) for f in second['figures']] == [
    ('', 'out of time: `python -m tests.hardware --part=works --minutes=2`'),
    (None, 'missed'),
  ]


def test_bars_of_time_are_judged_at_full_size(tmp_path):
  work = _session(tmp_path, is_tiny=False)
  work.report.start('x', 'x', 'x')
  for measured, verdict in ((0.49, 'missed'), (0.5, 'met')):
    work.figure(f'MFU {measured}', measured, 'share', bar=report.Bar('at least', 0.5))
    assert _figures(work.report.values)[f'MFU {measured}']['verdict'] == verdict
  assert not work.report.is_met


@pytest.mark.parametrize('gib, size', [(73, '1.3b'), (36, '1.3b'), (14.5, '0.3b'), (1, '30m')])
def test_the_largest_size_that_fits_the_memory_is_measured(tmp_path, monkeypatch, gib, size):
  monkeypatch.setattr(session.Session, 'memory_bytes', gib * 2**30)
  assert step.largest(_session(tmp_path, is_tiny=False)) == size


def test_full_sizes_are_those_of_the_bars(tmp_path):
  work = _session(tmp_path, is_tiny=False)
  c = step.config(work, step.Options(), '1.3b', 4)
  assert (c.model.d_model, c.data.seq_len, c.data.batch_size, c.heads.n) == (2048, 4096, 8, 4)
  by_flops = step.ratio_of_flops(c, step.config(work, step.Options(), '1.3b', 1))
  assert by_flops == pytest.approx(1.131, abs=1e-3)
  assert cross_entropy.B * cross_entropy.T == 32768
  c = cross_entropy.config(work, (cross_entropy.B, cross_entropy.T, 2560, 128256), 0)
  with jax.set_mesh(work.mesh(c)):
    args = jax.eval_shape(lambda: cross_entropy.arrays(c))
    loss, dh_BTD, dunembed_DV = jax.eval_shape(cross_entropy.loss_and_grads(c), *args)
  assert (loss.shape, dh_BTD.shape, dunembed_DV.shape) == ((), (8, 4096, 2560), (2560, 128256))
  c = work.config(*decoding.MODEL, *decoding.FULL.flags)
  assert c.heads.n == max(decoding.FULL.widths) == 8
  _, prompts = decoding.corpus(decoding.FULL, 42)
  assert len(prompts) >= 42 and {len(prompt) for prompt in prompts} == {512}
