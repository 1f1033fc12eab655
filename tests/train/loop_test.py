"""The training loop: resume after signals, kills, corruption and full disks."""

import errno
import io
import json
import os
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.checkpoint import manifest, metadata, restore, saver
from mtp_jax.cli import main
from mtp_jax.config import parse, schema
from mtp_jax.data import batches as batches_lib
from mtp_jax.evals import heldout, registry
from mtp_jax.losses import metrics as metrics_lib
from mtp_jax.losses import targets
from mtp_jax.parallel import sharding
from mtp_jax.train import evaluation, loop, metrics
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib
from tests import faults
from tests.support import pairs as pairs_lib
from tests.support import runs, signals, tiny


@pytest.fixture
def resumable(undisturbed, tmp_path):
  """Returns a copy of the undisturbed run as if killed after step 5."""
  run = tmp_path / 'resumable'
  shutil.copytree(undisturbed, run)
  shutil.rmtree(run / 'checkpoints' / '6')
  path = run / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  assert len(lines) == 7
  path.write_text(''.join(lines[:5]) + lines[5][:30])
  return run


def _of_kind(workdir, kind, names=None):
  """Returns the records of a kind, or rows of their values under some names."""
  found = [r for r in runs.records(workdir) if r['kind'] == kind]
  return [[r[n] for n in names] for r in found] if names else found


def test_run_directory_files_and_records(undisturbed, store):
  assert sorted(os.listdir(undisturbed)) == [
    'checkpoints',
    'config.json',
    'goodput.jsonl',
    'metrics.jsonl',
    'run.flags',
    'tensorboard',
  ]
  assert restore.steps(str(undisturbed)) == [3, 6]
  cfg = parse.from_json((undisturbed / 'config.json').read_text())
  assert cfg.data.store == store and cfg.train.steps == 6
  assert 'workdir' not in (undisturbed / 'run.flags').read_text()
  kinds = [(r['kind'], r['step']) for r in runs.records(undisturbed)]
  assert kinds == [('train', s) for s in range(1, 7)] + [('eval', 6)]
  lr = np.float32(1e-2) * np.array([0, 0.2, 0.4, 0.6, 0.8, 1])
  rows = _of_kind(undisturbed, 'train', ['lr', 'loss'])
  np.testing.assert_allclose([row[0] for row in rows], lr, rtol=1e-6)
  assert rows[-1][1] < rows[0][1]  # it learns
  last = metrics.read(str(undisturbed))[5]
  for name in (
    'loss_1',
    'loss_2',
    'bits_per_byte',
    'grad_norm',
    'accuracy_2',
    'mean_acceptance_length',
    'acceptance_2',
    'head_grad_norm_2',
    *runs.TIMES,
  ):
    assert np.isfinite(last[name]), name
  # Bits of head 1 only; the end of a document may add bits without bytes.
  bits_1 = last['loss_1'] / np.log(2)
  assert 0.999 * bits_1 < last['bits_per_byte'] < 1.1 * bits_1
  state = runs.restored(undisturbed, 6)
  assert (state.step, state.skipped, state.skipped_in_a_row) == (6, 0, 0)


def test_evaluation_batches_do_not_depend_on_grad_accumulation(store):
  rows = []
  for accumulate in (1, 2, 4):
    cfg = schema.replace(
      schema.CommandConfig(),
      **runs.FLAGS,
      **{'data.store': store, 'train.grad_accum_steps': accumulate},
    )
    (found,) = batches_lib.eval_batches(batches_lib.open_tokens(cfg), cfg).values()
    batches = list(found)
    assert len(batches) == 2 * accumulate  # --eval.batches=2
    rows.append(np.concatenate([b['tokens'][0] for b in batches]))
    assert rows[-1].shape == (2 * 8, 16 + 2)
    np.testing.assert_array_equal(rows[-1], rows[0])


# Interruption and resume.


SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture
def mortal():
  """Makes an unhandled signal an error of the test rather than its end; and none is
  ignored, as in background jobs of a shell."""

  def unhandled(number, _):
    raise AssertionError(f'signal {number} is not handled')

  old = {number: signal.signal(number, unhandled) for number in SIGNALS}
  yield
  for number, handler in old.items():
    signal.signal(number, handler)


@pytest.mark.parametrize('number', SIGNALS)
def test_resume_is_bitwise_after_a_signal(
  store, tmp_path, undisturbed, monkeypatch, capsys, number, mortal
):
  handlers = [signal.getsignal(s) for s in SIGNALS]
  signals.at_batch(monkeypatch, 4, lambda: os.kill(os.getpid(), number))
  assert runs.train(store, tmp_path) == loop.EXIT_INTERRUPTED == 75
  assert 'saved step 4; run the same command' in capsys.readouterr().out
  assert restore.steps(str(tmp_path)) == [4]
  monkeypatch.undo()
  assert handlers == [signal.getsignal(s) for s in SIGNALS]
  assert runs.train(store, tmp_path) == 0
  assert 'step 4 of 6, 2 remaining' in capsys.readouterr().out
  runs.assert_same(runs.restored(tmp_path, 6), runs.restored(undisturbed, 6))
  assert runs.records(tmp_path) == runs.records(undisturbed)


@pytest.mark.parametrize('at, of', [(6, {}), (2, dict(train__eval_every=2))])
def test_interrupted_evaluation_is_repeated_on_resume(
  at, of, store, tmp_path, undisturbed, monkeypatch, capsys
):
  """At the end, and at a step that has no checkpoint otherwise: what would be
  lost is saved first, and the records are those of the undisturbed run."""
  of = dict(train__checkpoint_every=3) | of
  straight = undisturbed
  if at != 6:
    straight = tmp_path / 'straight'
    assert runs.train(store, straight, **of) == 0

  def evaluator(*_):
    def evaluate(*_):
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(300)  # a long evaluation

    return evaluate

  monkeypatch.setattr(heldout, 'evaluator', evaluator)
  run = tmp_path / 'run'
  assert runs.train(store, run, **of) == loop.EXIT_INTERRUPTED
  assert f'interrupted: saved step {at};' in capsys.readouterr().out
  assert restore.steps(str(run))[-1] == at and not _of_kind(run, 'eval')
  monkeypatch.undo()
  assert runs.train(store, run, **of) == 0
  runs.assert_same(runs.restored(run, 6), runs.restored(straight, 6))
  assert runs.records(run) == runs.records(straight)
  assert runs.train(store, run, **of) == 0
  assert ': training already finished (step 6)' in capsys.readouterr().out


def test_tasks_are_due_at_their_cadence():
  """Held-out windows included, as one of --eval.tasks."""

  def due(done, **changes):
    given = {k.replace('__', '.'): v for k, v in changes.items()}
    cfg = schema.replace(schema.CommandConfig(), **{'train.steps': 9, **given})
    return evaluation.due(cfg, done)

  both = dict(eval__tasks='heldout,acceptance', train__eval_tasks_every=4)
  # Whether the task can be evaluated is tested elsewhere.
  check = registry.SUITES['acceptance']._replace(check=lambda *_: None)
  with pytest.MonkeyPatch.context() as patched:
    patched.setitem(registry.SUITES, 'acceptance', check)
    assert due(4, **both) == (True, True)
    assert due(4, **both | dict(eval__tasks='acceptance')) == (False, True)
    assert due(3, **both) == (False, False)
    assert due(0, **both) == (False, False)
    assert due(9, **both | dict(eval__tasks='acceptance')) == (True, True)
    assert due(6, train__eval_every=3, train__eval_tasks_every=4) == (True, False)


@pytest.mark.parametrize('name', ['a[1]', 'b*', 'c?/run', '[d'])
def test_workdir_with_glob_characters_is_refused(name, store, tmp_path, capsys):
  """orbax would merge the parts of other runs, or find none of its own."""
  assert runs.train(store, tmp_path / name) == 2
  error = capsys.readouterr().err
  assert f'--train.workdir={tmp_path / name}: no path of checkpoints' in error
  assert error.count('\n') == 1 and not os.listdir(tmp_path)


def test_step_without_targets_keeps_the_nonfinite_counter():
  c = tiny.cfg(heads__n=2, heads__family='linear', model__n_layers=1)
  rows = tiny.batch(c)
  rows['position'][:] = 0
  m = tiny.mesh(c)
  state = state_lib.init(c, m)
  with jax.set_mesh(m):
    two = state.skipped_in_a_row + 2
    after, values = step_lib.compiled(c, 2)(
      state.replace(skipped_in_a_row=two),
      sharding.put_batch(m, rows),
      jnp.ones(c.model.vocab_size, jnp.int32),
    )
  assert (after.skipped_in_a_row, after.skipped) == (2, 0)
  assert set(metrics_lib.scalars(jax.device_get(values))) >= {'loss', 'loss_2'}
  assert metrics_lib.scalars(jax.device_get(values))['loss_2'] is None


def test_resume_is_bitwise_with_muon_and_stochastic_rounding(store, tmp_path):
  of = dict(
    optim__name='muon',
    model__param_dtype='bfloat16',
    optim__heads_lr_mult=2,
    optim__moment_dtype='bfloat16',
    train__checkpoint_every=3,
    heads__family='linear',
    heads__draft_vocab='100',
    model__n_layers=1,
  )
  straight, resumed = tmp_path / 'a', tmp_path / 'b'
  assert runs.train(store, straight, **of) == 0
  shutil.copytree(straight, resumed)
  shutil.rmtree(resumed / 'checkpoints' / '6')
  assert runs.train(store, resumed, **of) == 0
  states = [runs.restored(run, 6) for run in (straight, resumed)]
  runs.assert_same(*states)
  assert runs.records(straight) == runs.records(resumed)
  recorded = json.loads((straight / 'config.json').read_text())['heads']['draft_vocab']
  assert recorded.startswith('100:')
  early = runs.restored(straight, 3).params
  for x, old in zip(*map(jax.tree.leaves, (states[0].params, early)), strict=True):
    assert x.dtype == jnp.bfloat16 and (x != old).any()


def test_second_sigint_exits_immediately(store, tmp_path, monkeypatch):
  def twice():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)

  signals.at_batch(monkeypatch, 4, twice)
  assert runs.train(store, tmp_path) == 130
  assert restore.steps(str(tmp_path)) == []
  assert not (tmp_path / 'lock.json').exists()


def test_resume_is_bitwise_after_sigterm_to_a_process(store, tmp_path, capsys):
  # Long enough not to finish before the signal arrives.
  flags = dict(train__steps=60, train__log_every=4)
  interrupted, straight = tmp_path / 'a', tmp_path / 'b'
  command = runs.args(store, str(interrupted), **flags)
  run = runs.process(['-m', 'mtp_jax', 'train', *command])
  for line in run.stdout:
    if line.startswith('step 4/') and _of_kind(interrupted, 'train'):
      run.send_signal(signal.SIGTERM)
      break
  _, error = run.communicate()
  assert run.returncode == loop.EXIT_INTERRUPTED, error
  (stopped_at,) = restore.steps(str(interrupted))
  assert 4 <= stopped_at < 60
  assert runs.train(store, interrupted, **flags) == 0
  assert f'step {stopped_at} of 60' in capsys.readouterr().out
  assert runs.train(store, straight, **flags) == 0
  runs.assert_same(runs.restored(interrupted, 60), runs.restored(straight, 60))
  assert runs.records(interrupted) == runs.records(straight)


KILLED_SAVING = """
import os, signal, sys
from mtp_jax.cli import main

rename = os.rename

def killed(source, target, **kwargs):
  # The commit of step 4; everything before it has been written.
  if os.path.basename(target) == '4':
    os.kill(os.getpid(), signal.SIGKILL)
  rename(source, target, **kwargs)

os.rename = killed
sys.exit(main.main(sys.argv[1:]))
"""


def test_resume_is_bitwise_after_kill_during_save(store, tmp_path, undisturbed):
  flags = dict(train__checkpoint_every=2)
  command = runs.args(store, str(tmp_path), **flags)
  run = runs.process(['-c', KILLED_SAVING, 'train', *command])
  _, error = run.communicate()
  assert run.returncode == -signal.SIGKILL, error
  left = set(os.listdir(tmp_path / 'checkpoints')) - {'2'}
  assert left and all(name.startswith('4.') for name in left), left
  assert (tmp_path / 'lock.json').exists()
  assert restore.steps(str(tmp_path)) == [2]
  assert restore.find(str(tmp_path)) == (str(tmp_path), 2)
  assert runs.train(store, tmp_path, **flags) == 0
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['4', '6']
  runs.assert_same(runs.restored(tmp_path, 6), runs.restored(undisturbed, 6))
  assert runs.records(tmp_path) == runs.records(undisturbed)


def test_resume_truncates_records_past_the_checkpoint(store, resumable, undisturbed, capsys):
  assert runs.train(store, resumable, train__checkpoint_every=3) == 0
  assert 'step 3 of 6, 3 remaining' in capsys.readouterr().out
  assert runs.records(resumable) == runs.records(undisturbed)
  runs.assert_same(runs.restored(resumable, 6), runs.restored(undisturbed, 6))


def test_steps_and_cadences_may_change_on_resume(store, resumable, undisturbed):
  assert 0 == runs.train(
    store,
    resumable,
    train__steps=8,
    train__log_every=5,
    train__eval_every=7,
    train__checkpoint_every=2,
    train__max_to_keep=9,
  )
  kinds = [(r['kind'], r['step']) for r in runs.records(resumable)[3:]]
  assert kinds == [('train', 5), ('eval', 7), ('train', 8), ('eval', 8)]
  assert restore.steps(str(resumable)) == [3, 4, 6, 8]
  mine, theirs = (runs.restored(w, 6) for w in (resumable, undisturbed))
  runs.assert_same(mine, theirs)
  cfg = parse.from_json((resumable / 'config.json').read_text())
  assert cfg.train.steps == 8


def test_resume_on_another_mesh(store, tmp_path, undisturbed, monkeypatch):
  signals.at_batch(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
  mesh = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  assert runs.train(store, tmp_path, **mesh) == loop.EXIT_INTERRUPTED
  monkeypatch.undo()
  assert runs.train(store, tmp_path) == 0
  names = ['loss', 'loss_1', 'loss_2', 'grad_norm', 'head_grad_norm_2', 'lr']
  np.testing.assert_allclose(
    _of_kind(tmp_path, 'train', names), _of_kind(undisturbed, 'train', names), rtol=1e-4
  )
  assert runs.records(tmp_path) != runs.records(undisturbed)  # other sums


def test_finished_run_is_unchanged(store, undisturbed, capsys):
  before = _contents(undisturbed)
  assert runs.train(store, undisturbed, train__checkpoint_every=3) == 0
  assert 'training already finished (step 6)' in capsys.readouterr().out
  assert _contents(undisturbed) == before


@pytest.mark.parametrize(
  'change, line',
  [
    ({'optim__lr': 0.5}, '--optim.lr=0.5: the run in'),
    ({'heads__n': 1}, '--heads.n=1: the run in'),
    ({'train__seed': 7}, '--train.seed=7: the run in'),
    ({'loss__backward': 'interleaved'}, '--loss.backward=interleaved: the run in'),
    ({'train__grad_accum_steps': 1, 'data__batch_size': 16}, '--data.batch_size=16'),
  ],
)
def test_resume_with_result_changing_flags_is_refused(store, undisturbed, capsys, change, line):
  before = _contents(undisturbed)
  assert runs.train(store, undisturbed, train__steps=9, **change) == 2
  error = capsys.readouterr().err
  old = runs.FLAGS.get(line[2:].split('=')[0])
  assert line in error and f'was started with {old or ""}' in error
  assert error.count('\n') == 1
  assert _contents(undisturbed) == before


def test_resume_with_another_store_is_refused(undisturbed, tmp_path, capsys):
  other = runs.make_store(str(tmp_path / 'other'), seed=1)
  before = _contents(undisturbed)
  assert runs.train(other, undisturbed, train__steps=9) == 2
  error = capsys.readouterr().err
  assert f'--data.store={other}: is not the store' in error
  assert error.count('\n') == 1
  assert _contents(undisturbed) == before


def _contents(workdir):
  """Returns {path: bytes} of every file below workdir."""
  return {
    os.path.join(folder, name): open(os.path.join(folder, name), 'rb').read()
    for folder, _, names in os.walk(workdir)
    for name in names
  }


@pytest.mark.parametrize(
  'cadence',
  [
    dict(train__log_every=1),
    dict(train__log_every=99, train__eval_every=2),
    dict(train__log_every=99, train__checkpoint_every=2),
  ],
)
def test_run_without_its_lock_writes_nothing(store, tmp_path, monkeypatch, capsys, cadence):
  seen = {}

  def files():  # TensorBoard writes when it likes, to a file of this run only
    return {k: v for k, v in _contents(tmp_path).items() if 'tfev' not in k}

  def take():
    holder = json.loads((tmp_path / 'lock.json').read_text())
    (tmp_path / 'lock.json').write_text(json.dumps(holder | dict(run='other')))
    seen.update(files())

  signals.at_batch(monkeypatch, 2, take)
  assert runs.train(store, tmp_path, **cadence) == loop.EXIT_REPLACED
  assert 'taken by another run' in capsys.readouterr().err
  assert files() == seen and len(seen) == 5, seen.keys()
  assert restore.steps(str(tmp_path)) == []


# Non-finite steps and inactive heads.


def test_nonfinite_steps_are_skipped_and_abort_after_a_limit(
  store, tmp_path, monkeypatch, capsys, own_programs
):
  # By step: a NaN loss, or a gradient whose norm overflows.
  factors = np.ones(6, np.float32)
  factors[[1, 4]], factors[3] = np.nan, 1e37
  weights = targets.weights
  monkeypatch.setattr(
    targets, 'weights', lambda step, cfg: weights(step, cfg) * jnp.array(factors)[step]
  )
  every = dict(train__checkpoint_every=1, train__max_to_keep=9)
  a, b = tmp_path / 'a', tmp_path / 'b'
  assert runs.train(store, a, train__max_nonfinite=3, **every) == 0
  assert _of_kind(a, 'train', ['skipped', 'consecutive_nonfinite']) == [
    [0, 0],
    [1, 1],
    [1, 0],
    [2, 1],
    [3, 2],
    [3, 0],
  ]
  first, *states = (runs.restored(a, step) for step in range(1, 7))
  for old, new, factor in zip([first, *states], states, factors[1:], strict=False):
    assert new.step == old.step + 1
    held = [
      (x == y).all()
      for x, y in zip(
        jax.tree.leaves((old.params, old.opt_state)),
        jax.tree.leaves((new.params, new.opt_state)),
        strict=True,
      )
    ]
    assert all(held) if factor != 1 else not any(held)
  losses = [record['loss'] for record in _of_kind(a, 'train')]
  norms = [record['grad_norm'] for record in _of_kind(a, 'train')]
  assert [x is None for x in losses] == [0, 1, 0, 0, 1, 0]  # NaN, in JSON
  assert [x is None for x in norms] == [0, 1, 0, 1, 1, 0]

  capsys.readouterr()
  assert runs.train(store, b, train__max_nonfinite=2) == 76
  assert loop.EXIT_DIVERGED == 76
  assert '2 consecutive steps were not finite' in capsys.readouterr().out
  assert restore.steps(str(b)) == []
  assert _of_kind(b, 'train')[-1]['step'] == 5


def test_curriculum_does_not_update_inactive_heads(store, tmp_path):
  assert 0 == runs.train(
    store, tmp_path, train__checkpoint_every=1, train__max_to_keep=9, loss__curriculum='0:1;2:2;4:1'
  )
  states = {step: runs.restored(tmp_path, step) for step in range(1, 7)}

  def of_head(k, step):
    adam = states[step].opt_state[1]
    return [
      leaf[k - 1]
      for tree in (states[step].params.heads, adam.mu.heads, adam.nu.heads)
      for leaf in jax.tree.leaves(tree)
    ]

  def moved(k, first, last):
    pairs = zip(of_head(k, first), of_head(k, last), strict=True)
    return [bool((x != y).any()) for x, y in pairs]

  moments = slice(len(of_head(2, 1)) // 3, None)
  assert not any(x.any() for x in of_head(2, 2)[moments])
  assert not any(moved(2, 1, 2)) and not any(moved(2, 4, 6))
  assert all(moved(2, 2, 3)) and all(moved(2, 3, 4))
  assert all(all(moved(1, step, step + 1)) for step in range(1, 6))
  found = ['loss_2' in record for record in _of_kind(tmp_path, 'train')]
  assert found == [False, False, True, True, False, False]
  assert ['loss_2' in r for r in _of_kind(tmp_path, 'eval')] == [False]


# Profiles and the progress bar.


@pytest.mark.parametrize(
  'start, steps, expected',
  [(2, 2, 'start batch stop batch batch'), (4, 9, 'batch start batch batch')],
)
def test_profile_covers_the_requested_steps(store, resumable, monkeypatch, start, steps, expected):
  """The run goes from step 3 to 6: from within the profile, or into it."""
  calls = []

  def tell(owner, name, word):
    function = getattr(owner, name)

    def patched(*args):
      calls.append(word)
      return function(*args)

    monkeypatch.setattr(owner, name, patched)

  tell(jax.profiler, 'start_trace', 'start')
  tell(jax.profiler, 'stop_trace', 'stop')
  tell(sharding, 'put_batch', 'batch')
  assert 0 == runs.train(store, resumable, train__profile_start=start, train__profile_steps=steps)
  assert ' '.join(calls[: len(expected.split())]) == expected
  assert calls.count('start') == calls.count('stop') == 1
  found = [f for _, _, files in os.walk(resumable / 'profile') for f in files]
  assert any(name.endswith('.xplane.pb') for name in found)


def test_progress_bar_at_a_terminal(store, resumable, undisturbed, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, 'stdout', terminal)
  assert runs.train(store, resumable) == 0
  written = terminal.getvalue()
  assert 'step 6/6  loss' in written and 'held-out' in written
  assert '\x1b[' in written and 'training' in written and '6/6' in written
  assert runs.records(resumable) == runs.records(undisturbed)


# Corrupt checkpoints.


def _damage(run, step, how='flipped'):
  """Corrupts the largest file of a checkpoint; returns the expected message."""
  folder = run / 'checkpoints' / str(step)
  path = max((p for p in folder.rglob('d/*')), key=lambda p: (p.stat().st_size, p))
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  half = data[: len(data) // 2]
  path.unlink()
  if how != 'missing':
    path.write_bytes(dict(flipped=data, half=half, empty=b'')[how])
  name = path.relative_to(folder)
  return dict(
    flipped=f'{name} does not match its sha256',
    half=f'{name} has {len(half):,} bytes, not {len(data):,}',
    empty=f'{name} has 0 bytes, not {len(data):,}',
    missing=f'{name} is missing',
  )[how]


@pytest.fixture
def copy(undisturbed, tmp_path):
  return shutil.copytree(undisturbed, tmp_path / 'copy')


@pytest.mark.parametrize('how', ['flipped', 'half', 'empty', 'missing'])
def test_resume_falls_back_to_newest_valid_checkpoint(store, copy, undisturbed, capsys, how):
  line = _damage(copy, 6, how)
  corrupt = _contents(copy / 'checkpoints' / '6')
  assert runs.train(store, copy, train__checkpoint_every=3) == 0
  out = capsys.readouterr().out
  assert out.count('corrupt') == 2 and out.splitlines()[0] == (
    f'checkpoint 6 is corrupt: {line}; quarantined as checkpoints/6.corrupt, resuming from step 3'
  )
  assert 'step 3 of 6, 3 remaining' in out
  assert restore.steps(str(copy)) == [3, 6]
  quarantined = _contents(copy / 'checkpoints' / '6.corrupt')
  assert [*quarantined.values()] == [*corrupt.values()]
  runs.assert_same(runs.restored(copy, 6), runs.restored(undisturbed, 6))
  assert runs.records(copy) == runs.records(undisturbed)
  restore.verify(str(copy), 6)


def test_run_with_only_corrupt_checkpoints_is_refused(store, copy, capsys):
  lines = [f'{step}: {_damage(copy, step)}' for step in (6, 3)]
  before = _contents(copy)
  assert runs.train(store, copy) == 2
  assert capsys.readouterr() == (
    '',
    f'mtp: --train.workdir={copy}: all of its checkpoints are corrupt: {"; ".join(lines)}\n',
  )
  assert _contents(copy) == before


def test_refused_resume_quarantines_nothing(store, copy, capsys):
  _damage(copy, 6)
  before = _contents(copy)
  assert runs.train(store, copy, optim__lr=0.5) == 2
  assert '--optim.lr=0.5: the run in' in capsys.readouterr().err
  assert _contents(copy) == before


@pytest.mark.parametrize(
  'command, more',
  [
    ('eval', ['--mesh.fsdp=-1']),
    ('generate', ['--prompt=ab', '--mesh.fsdp=-1']),
    ('export', ['--export.out={}/out']),
  ],
)
def test_commands_refuse_a_corrupt_checkpoint(copy, tmp_path, capsys, command, more):
  line = _damage(copy, 6)
  before = _contents(tmp_path)
  for path in (copy, copy / 'checkpoints' / '6'):
    args = [str(path), '--train.compilation_cache=', *more]
    args = [arg.format(tmp_path) for arg in args]
    assert main.main([command, *args]) == 2
    assert capsys.readouterr() == ('', f'mtp: {copy}/checkpoints/6: is corrupt: {line}\n')
  assert _contents(tmp_path) == before


def test_init_from_a_corrupt_checkpoint_is_refused(store, copy, tmp_path, capsys):
  line = _damage(copy, 6)
  begun = dict(train__init_from=copy)
  assert runs.train(store, tmp_path / 'run', **begun) == 2
  assert capsys.readouterr().err == (f'mtp: {copy}/checkpoints/6: is corrupt: {line}\n')
  assert restore.steps(str(tmp_path / 'run')) == []
  begun = dict(train__init_from=copy / 'checkpoints' / '3')
  assert runs.train(store, tmp_path / 'run', **begun) == 0


def test_resume_falls_back_to_imported_parameters(store, copy, tmp_path, capsys):
  """As when nothing newer was saved."""
  cfg = metadata.read(str(copy), 6).cfg
  cfg = schema.replace(cfg, **{'train.max_to_keep': 9})
  m = sharding.make_mesh(cfg)
  model = restore.restore_model(str(copy), 6, cfg, m)
  run = tmp_path / 'run'
  cfg = schema.replace(cfg, **{'train.workdir': str(run)})
  saver.save_params(model, cfg, None, str(run))
  keep = dict(train__steps=3, optim__warmup_steps=2, train__max_to_keep=9)
  assert runs.train(store, run, **keep) == 0
  first = runs.restored(run, 3)
  assert restore.steps(str(run)) == [0, 3]
  _damage(run, 3)
  assert runs.train(store, run, **keep) == 0
  out = capsys.readouterr().out
  assert 'resuming from step 0' in out
  assert out.count(f'initialized from {run}, step 0') == 2
  runs.assert_same(runs.restored(run, 3), first)
  _damage(run, 0)
  _damage(run, 3)
  assert runs.train(store, run, **keep) == 2


KILLED_BEFORE_A_MANIFEST = """
import os, signal, sys
from mtp_jax.checkpoint import manifest
from mtp_jax.cli import main

manifest.write = lambda _: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(main.main(sys.argv[1:]))
"""


def test_resume_is_bitwise_after_kill_before_manifest(store, tmp_path, undisturbed):
  flags = dict(train__checkpoint_every=4)
  command = runs.args(store, str(tmp_path), **flags)
  run = runs.process(['-c', KILLED_BEFORE_A_MANIFEST, 'train', *command])
  _, error = run.communicate()
  assert run.returncode == -signal.SIGKILL, error
  assert restore.steps(str(tmp_path)) == [4]
  folder = tmp_path / 'checkpoints' / '4'
  assert not (folder / manifest.NAME).exists()
  assert runs.train(store, tmp_path, **flags) == 0
  assert (tmp_path / 'checkpoints' / '6' / manifest.NAME).exists()
  runs.assert_same(runs.restored(tmp_path, 6), runs.restored(undisturbed, 6))
  assert runs.records(tmp_path) == runs.records(undisturbed)


# Fails if it hashes anything.
HASHES_NOTHING = """
import sys
from mtp_jax.checkpoint import manifest
from mtp_jax.cli import main

manifest.problem = manifest.write = None
sys.exit(main.main(['train', *sys.argv[1:]]))
"""


@pytest.mark.parametrize('is_one_good', [True, False])
def test_two_processes_agree_on_the_resume_step(store, tmp_path, monkeypatch, is_one_good):
  """Both fall back, or both are refused; only process 0 hashes."""
  run = tmp_path / 'run'
  pairs_lib.of_four(monkeypatch)
  assert runs.train(store, run, **pairs_lib.MESH) == 0
  monkeypatch.undo()
  records, last = runs.records(run), runs.restored(run, 9)
  lines = [_damage(run, step) for step in ((9, 6) if is_one_good else (9, 6, 3))]
  of_1 = ['-c', HASHES_NOTHING]
  ends = pairs_lib.ends(pairs_lib.pair(store, run, of_1=of_1))
  status = 0 if is_one_good else 2
  assert [e[0] for e in ends] == [status] * 2, ends
  assert ends[1][1] == '' and 'mtp:' not in ends[1][2]
  if status:
    assert f'mtp: --train.workdir={run}: all of its' in ends[0][2]
    assert restore.steps(str(run)) == [3, 6, 9]
    return
  for step, line in zip((9, 6), lines, strict=True):
    assert f'checkpoint {step} is corrupt: {line}; ' in ends[0][1]
  assert 'step 3 of 9, 6 remaining' in ends[0][1]
  assert sorted(os.listdir(run / 'checkpoints')) == ['3', '6', '6.corrupt', '9', '9.corrupt']
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), runs.restored(run, 9), last
  )
  assert [r['step'] for r in runs.records(run)] == [r['step'] for r in records]


# A full disk.


NO_SPACE_FOR_MY_PART = """
import errno, sys
import jax
import orbax.checkpoint as ocp
from mtp_jax.cli import main

write, saves = ocp.StandardCheckpointHandler.async_save, []

class Full:
  def result(self, timeout=None):
    raise OSError(errno.ENOSPC, 'No space left on device')

async def patched(*args, **kwargs):
  saves.append(1)
  mine = 2 + jax.process_index()  # of steps 3, 6, 9 and 12
  return [*await write(*args, **kwargs), *[Full()] * (len(saves) == mine)]

ocp.StandardCheckpointHandler.async_save = patched
sys.exit(main.main(['train', *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_full_disk_of_one_process_fails_the_save_on_both(store, tmp_path):
  """Once of the first, once of the second: both learn it at once, and both can
  save again."""
  run, code = tmp_path / 'run', ['-c', NO_SPACE_FOR_MY_PART]
  begin = time.monotonic()
  ends = pairs_lib.ends(pairs_lib.pair(store, run, of_0=code, of_1=code, train__steps=12))
  assert [e[0] for e in ends] == [0, 0], ends
  assert time.monotonic() - begin < 120
  assert 'Traceback' not in ends[0][2] + ends[1][2]
  for step, why in (6, ends[0][1]), (9, ends[1][2]):
    line = f'checkpoint {step} could not be saved: '
    assert ends[0][1].count(line) == 1
    assert line + 'no space left on the device' in why
  assert sorted(os.listdir(run / 'checkpoints')) == ['12', '3']
  restore.verify(str(run), 12)


def _no_space_for(monkeypatch, *steps):
  """Makes the commit of these steps fail, after everything else was written."""
  rename = os.rename

  def patched(source, target, **kwargs):
    if os.path.basename(target) in map(str, steps):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    rename(source, target, **kwargs)

  monkeypatch.setattr(os, 'rename', patched)


def test_failed_save_is_logged_in_one_line(store, tmp_path, undisturbed, monkeypatch, capsys):
  _no_space_for(monkeypatch, 2)
  assert runs.train(store, tmp_path, train__checkpoint_every=2) == 0
  out, error = capsys.readouterr()
  line = 'checkpoint 2 could not be saved: no space left on the device; earlier ones remain'
  assert out.splitlines().count(line) == out.count('saved') == 1
  assert error == ''
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['4', '6']
  runs.assert_same(runs.restored(tmp_path, 6), runs.restored(undisturbed, 6))
  assert runs.records(tmp_path) == runs.records(undisturbed)


@pytest.mark.parametrize('end', ['of the run', 'by a signal'])
def test_failed_last_save_exits_with_an_error(
  store, tmp_path, undisturbed, monkeypatch, capsys, end
):
  with monkeypatch.context() as m:
    _no_space_for(m, 5, 6)
    if end != 'of the run':
      signals.at_batch(m, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert runs.train(store, tmp_path, train__checkpoint_every=3) == 2
  out, error = capsys.readouterr()
  step = 6 if end == 'of the run' else 5
  assert error == (
    f'mtp: --train.workdir={tmp_path}: checkpoint {step} could not be saved: no'
    ' space left on the device; the newest there is 3\n'
  )
  assert 'interrupted' not in out
  assert os.listdir(tmp_path / 'checkpoints') == ['3']
  assert not (tmp_path / 'lock.json').exists()
  assert runs.train(store, tmp_path, train__checkpoint_every=3) == 0
  runs.assert_same(runs.restored(tmp_path, 6), runs.restored(undisturbed, 6))
  assert runs.records(tmp_path) == runs.records(undisturbed)


@pytest.fixture
def small_disk(tmp_path):
  """Yields a file system of 4 MiB; a checkpoint needs about one."""
  folder = tmp_path / 'disk'
  with faults.small_disk(folder, '4m') as mounted:
    if not mounted:
      pytest.skip('cannot mount a tmpfs')
    yield folder


FILLED = """
import os, sys, threading
from mtp_jax.cli import main
from mtp_jax.parallel import sharding

put, calls, disk = sharding.put_batch, [], sys.argv[1]
left, freed = map(int, sys.argv[2:4])

def patched(mesh, batch):
  calls.append(1)
  for thread in threading.enumerate():
    if '_follow' in thread.name:
      thread.join()  # what it fills is not filled while metrics are written
  if len(calls) == 3:
    found = os.statvfs(disk)
    with open(disk + '/ballast', 'wb') as f:
      f.write(bytes(found.f_bavail * found.f_frsize - left))
  elif len(calls) == freed:
    os.remove(disk + '/ballast')
  return put(mesh, batch)

sharding.put_batch = patched
sys.exit(main.main(sys.argv[4:]))
"""


def _on_small_disk(store, disk, left, freed_at=0, **flags):
  """(status, stdout, stderr) of a run on a disk that is full but for so many
  bytes from the third batch on, until another; it saves each second step."""
  run = runs.process(
    [
      '-c',
      FILLED,
      str(disk),
      str(left),
      str(freed_at),
      'train',
      *runs.args(store, str(disk / 'run'), train__checkpoint_every=2, **flags),
    ]
  )
  out, error = run.communicate(timeout=120)
  return run.returncode, out, error


def test_run_survives_a_temporarily_full_disk(store, small_disk, undisturbed):
  status, out, error = _on_small_disk(store, small_disk, 2**16, freed_at=5)
  assert (status, error) == (0, ''), error
  assert 'checkpoint 4 could not be saved: no space left on the device' in out
  run = small_disk / 'run'
  assert sorted(os.listdir(run / 'checkpoints')) == ['2', '6']
  runs.assert_same(runs.restored(run, 6), runs.restored(undisturbed, 6))
  assert runs.records(run) == runs.records(undisturbed)


def test_run_on_a_full_disk_keeps_its_checkpoint(store, small_disk):
  status, out, error = _on_small_disk(store, small_disk, 2**16)
  run = small_disk / 'run'
  assert (status, error) == (
    2,
    f'mtp: --train.workdir={run}: checkpoint 6 could not be saved: no space'
    ' left on the device; the newest there is 2\n',
  )
  assert 'checkpoint 4 could not be saved: no space left on the device' in out
  assert os.listdir(run / 'checkpoints') == ['2']


def test_full_disk_while_writing_metrics_exits_with_an_error(store, small_disk):
  """The metrics soon fail to be written."""
  status, out, error = _on_small_disk(store, small_disk, 0, train__steps=60)
  assert status == 2, error
  assert 'no space left on device' in error and error.count('\n') == 1
  assert os.listdir(small_disk / 'run' / 'checkpoints') == ['2']
