"""A run: stopped and resumed it is the run that was not, bit for bit."""

import io
import json
import os
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import checkpoint, config, targets
from mtp_jax.train import loop, metrics
from tests import runs


@pytest.fixture
def resumable(undisturbed, tmp_path):
  """A copy of the undisturbed run, killed between step 5 and the end."""
  run = tmp_path / 'resumable'
  shutil.copytree(undisturbed, run)
  shutil.rmtree(run / 'checkpoints' / '6')
  path = run / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  assert len(lines) == 7
  path.write_text(''.join(lines[:5]) + lines[5][:30])
  return run


def _at_batch(monkeypatch, number, action):
  """Calls action when the run is about to use its number-th batch."""
  put, calls = loop.sharding.put_batch, []

  def patched(mesh, batch):
    calls.append(1)
    if len(calls) == number:
      action()
    return put(mesh, batch)

  monkeypatch.setattr(loop.sharding, 'put_batch', patched)


def _of_kind(workdir, kind, names=None):
  """Records of a kind; with names, the values of those as rows."""
  found = [r for r in runs.records(workdir) if r['kind'] == kind]
  return [[r[n] for n in names] for r in found] if names else found


def test_a_run_writes_what_it_says(undisturbed, store):
  assert sorted(os.listdir(undisturbed)) == [
    'checkpoints', 'config.json', 'goodput.jsonl', 'metrics.jsonl',
    'run.flags', 'tensorboard',
  ]  # fmt: skip
  assert checkpoint.steps(str(undisturbed)) == [3, 6]
  cfg = config.from_json((undisturbed / 'config.json').read_text())
  assert cfg.data.store == store and cfg.train.steps == 6
  assert 'workdir' not in (undisturbed / 'run.flags').read_text()
  kinds = [(r['kind'], r['step']) for r in runs.records(undisturbed)]
  assert kinds == [('train', s) for s in range(1, 7)] + [('eval', 6)]
  lr = np.float32(1e-2) * np.array([0, 0.2, 0.4, 0.6, 0.8, 1])
  rows = _of_kind(undisturbed, 'train', ['lr', 'loss'])
  np.testing.assert_allclose([row[0] for row in rows], lr, rtol=1e-6)
  assert rows[-1][1] < rows[0][1]  # it learns
  last = metrics.read(str(undisturbed))[5]
  for name in ('loss_1', 'loss_2', 'bits_per_byte', 'grad_norm', 'accuracy_2',
               'accepted_length', 'acceptance_2', 'head_grad_norm_2',
               *runs.TIMES):  # fmt: skip
    assert np.isfinite(last[name]), name
  # Bits are of head 1 alone; a document's end may add some, without bytes.
  bits_1 = last['loss_1'] / np.log(2)
  assert 0.999 * bits_1 < last['bits_per_byte'] < 1.1 * bits_1
  state = runs.restored(undisturbed, 6)
  assert (state.step, state.skipped, state.skipped_in_a_row) == (6, 0, 0)


def test_batches_of_an_evaluation_are_those_of_steps_not_micro_batches(store):
  rows = []
  for accumulate in (1, 2, 4):
    cfg = config.replace(
      config.Config(),
      **runs.FLAGS,
      **{'data.store': store, 'train.accumulate': accumulate},
    )
    (found,) = loop.eval_batches(loop.open_tokens(cfg), cfg).values()
    batches = list(found)
    assert len(batches) == 2 * accumulate  # --eval.batches=2
    rows.append(np.concatenate([b['tokens'][0] for b in batches]))
    assert rows[-1].shape == (2 * 8, 16 + 2)
    np.testing.assert_array_equal(rows[-1], rows[0])


# Stopped and resumed.


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_then_the_same_command_is_the_undisturbed_run(
  store, tmp_path, undisturbed, monkeypatch, capsys, number
):
  handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  _at_batch(monkeypatch, 4, lambda: os.kill(os.getpid(), number))
  assert runs.train(store, tmp_path) == loop.EXIT_INTERRUPTED == 75
  assert 'saved step 4; run the same command' in capsys.readouterr().out
  assert checkpoint.steps(str(tmp_path)) == [4]
  monkeypatch.undo()
  assert handlers == [
    signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)
  ]
  assert runs.train(store, tmp_path) == 0
  assert 'step 4 of 6, 2 to go' in capsys.readouterr().out
  runs.assert_same(runs.restored(tmp_path, 6), runs.restored(undisturbed, 6))
  assert runs.records(tmp_path) == runs.records(undisturbed)


def test_resumed_under_muon_and_random_rounding(store, tmp_path):
  of = dict(
    optim__name='muon', model__param_dtype='bfloat16', optim__heads_lr=2,
    optim__moment_dtype='bfloat16', train__checkpoint_every=3,
    heads__family='linear', model__n_layers=1,
  )  # fmt: skip
  straight, resumed = tmp_path / 'a', tmp_path / 'b'
  assert runs.train(store, straight, **of) == 0
  shutil.copytree(straight, resumed)
  shutil.rmtree(resumed / 'checkpoints' / '6')
  assert runs.train(store, resumed, **of) == 0
  states = [runs.restored(run, 6) for run in (straight, resumed)]
  runs.assert_same(*states)
  assert runs.records(straight) == runs.records(resumed)
  early = runs.restored(straight, 3).params
  for x, old in zip(*map(jax.tree.leaves, (states[0].params, early)),
                    strict=True):  # fmt: skip
    assert x.dtype == jnp.bfloat16 and (x != old).any()


def test_a_second_interrupt_does_not_wait(store, tmp_path, monkeypatch):
  def twice():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)

  _at_batch(monkeypatch, 4, twice)
  assert runs.train(store, tmp_path) == 130
  assert checkpoint.steps(str(tmp_path)) == []
  assert not (tmp_path / 'lock.json').exists()


def test_sigterm_to_a_process(store, tmp_path):
  # Long enough that it cannot be over before the signal arrives.
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
  (stopped_at,) = checkpoint.steps(str(interrupted))
  assert 4 <= stopped_at < 60
  run = runs.process(['-m', 'mtp_jax', 'train', *command])
  out, error = run.communicate()
  assert run.returncode == 0, error
  assert f'step {stopped_at} of 60' in out
  assert runs.train(store, straight, **flags) == 0
  runs.assert_same(runs.restored(interrupted, 60), runs.restored(straight, 60))
  assert runs.records(interrupted) == runs.records(straight)


KILLED_SAVING = """
import os, signal, sys
from mtp_jax import main

rename = os.rename

def killed(source, target, **kwargs):
  # The commit of step 4; everything before it has been written.
  if os.path.basename(target) == '4':
    os.kill(os.getpid(), signal.SIGKILL)
  rename(source, target, **kwargs)

os.rename = killed
sys.exit(main.main(sys.argv[1:]))
"""


def test_kill_during_a_save(store, tmp_path, undisturbed):
  flags = dict(train__checkpoint_every=2)
  command = runs.args(store, str(tmp_path), **flags)
  run = runs.process(['-c', KILLED_SAVING, 'train', *command])
  _, error = run.communicate()
  assert run.returncode == -signal.SIGKILL, error
  left = set(os.listdir(tmp_path / 'checkpoints')) - {'2'}
  assert left and all(name.startswith('4.') for name in left), left
  assert (tmp_path / 'lock.json').exists()
  assert checkpoint.steps(str(tmp_path)) == [2]
  assert checkpoint.find(str(tmp_path)) == (str(tmp_path), 2)
  assert runs.train(store, tmp_path, **flags) == 0
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['4', '6']
  runs.assert_same(runs.restored(tmp_path, 6), runs.restored(undisturbed, 6))
  assert runs.records(tmp_path) == runs.records(undisturbed)


def test_records_past_the_checkpoint_are_cut_off(
  store, resumable, undisturbed, capsys
):
  assert runs.train(store, resumable, train__checkpoint_every=3) == 0
  assert 'step 3 of 6, 3 to go' in capsys.readouterr().out
  assert runs.records(resumable) == runs.records(undisturbed)
  runs.assert_same(runs.restored(resumable, 6), runs.restored(undisturbed, 6))


def test_steps_and_cadences_may_change(store, resumable, undisturbed):
  assert 0 == runs.train(
    store, resumable, train__steps=8, train__log_every=5, train__eval_every=7,
    train__checkpoint_every=2, train__keep_last=9,
  )  # fmt: skip
  kinds = [(r['kind'], r['step']) for r in runs.records(resumable)[3:]]
  assert kinds == [('train', 5), ('eval', 7), ('train', 8), ('eval', 8)]
  assert checkpoint.steps(str(resumable)) == [3, 4, 6, 8]
  mine, theirs = (runs.restored(w, 6) for w in (resumable, undisturbed))
  runs.assert_same(mine, theirs)
  cfg = config.from_json((resumable / 'config.json').read_text())
  assert cfg.train.steps == 8


def test_another_mesh_goes_on(store, tmp_path, undisturbed, monkeypatch):
  _at_batch(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
  mesh = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  assert runs.train(store, tmp_path, **mesh) == loop.EXIT_INTERRUPTED
  monkeypatch.undo()
  assert runs.train(store, tmp_path) == 0
  names = ['loss', 'loss_1', 'loss_2', 'grad_norm', 'head_grad_norm_2', 'lr']
  np.testing.assert_allclose(
    _of_kind(tmp_path, 'train', names),
    _of_kind(undisturbed, 'train', names),
    rtol=1e-4,
  )
  assert runs.records(tmp_path) != runs.records(undisturbed)  # other sums


def test_a_finished_run_is_left_alone(store, undisturbed, capsys):
  before = _contents(undisturbed)
  assert runs.train(store, undisturbed, train__checkpoint_every=3) == 0
  assert 'trained already, to step 6' in capsys.readouterr().out
  assert _contents(undisturbed) == before


@pytest.mark.parametrize(
  'change, line',
  [
    ({'optim__lr': 0.5}, '--optim.lr=0.5: the run in'),
    ({'heads__n': 1}, '--heads.n=1: the run in'),
    ({'train__seed': 7}, '--train.seed=7: the run in'),
    ({'loss__schedule': 'eager'}, '--loss.schedule=eager: the run in'),
    ({'train__accumulate': 1, 'data__batch_size': 16}, '--data.batch_size=16'),
  ],
)
def test_what_changes_the_result_is_refused(
  store, undisturbed, capsys, change, line
):
  before = _contents(undisturbed)
  assert runs.train(store, undisturbed, train__steps=9, **change) == 2
  error = capsys.readouterr().err
  old = runs.FLAGS.get(line[2:].split('=')[0])
  assert line in error and f'was started with {old or ""}' in error
  assert error.count('\n') == 1
  assert _contents(undisturbed) == before


def test_another_store_is_refused(undisturbed, tmp_path, capsys):
  other = runs.make_store(str(tmp_path / 'other'), seed=1)
  before = _contents(undisturbed)
  assert runs.train(other, undisturbed, train__steps=9) == 2
  error = capsys.readouterr().err
  assert f'--data.store={other}: is not the store' in error
  assert error.count('\n') == 1
  assert _contents(undisturbed) == before


def _contents(workdir):
  """Every file below workdir and its bytes."""
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
def test_who_lost_the_lock_writes_nothing_more(
  store, tmp_path, monkeypatch, capsys, cadence
):
  seen = {}

  def files():  # TensorBoard writes when it likes, to a file of this run only
    return {k: v for k, v in _contents(tmp_path).items() if 'tfev' not in k}

  def take():
    holder = json.loads((tmp_path / 'lock.json').read_text())
    (tmp_path / 'lock.json').write_text(json.dumps(holder | dict(run='other')))
    seen.update(files())

  _at_batch(monkeypatch, 2, take)
  assert runs.train(store, tmp_path, **cadence) == loop.EXIT_REPLACED
  assert 'taken by another run' in capsys.readouterr().err
  assert files() == seen and len(seen) == 5, seen.keys()
  assert checkpoint.steps(str(tmp_path)) == []


# What goes wrong in a step, and what does not take part in it.


def test_a_non_finite_step_changes_nothing_and_too_many_end_the_run(
  store, tmp_path, monkeypatch, capsys
):
  # By step: a loss that is no number, or a gradient whose norm overflows.
  factors = np.ones(6, np.float32)
  factors[[1, 4]], factors[3] = np.nan, 1e37
  weights = targets.weights
  monkeypatch.setattr(
    targets, 'weights',
    lambda step, cfg: weights(step, cfg) * jnp.array(factors)[step],
  )  # fmt: skip
  every = dict(train__checkpoint_every=1, train__keep_last=9)
  a, b = tmp_path / 'a', tmp_path / 'b'
  assert runs.train(store, a, train__max_nonfinite=3, **every) == 0
  assert _of_kind(a, 'train', ['skipped', 'skipped_in_a_row']) == [
    [0, 0], [1, 1], [1, 0], [2, 1], [3, 2], [3, 0],
  ]  # fmt: skip
  first, *states = (runs.restored(a, step) for step in range(1, 7))
  for old, new, factor in zip(
    [first, *states], states, factors[1:], strict=False
  ):
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
  assert '2 steps in a row were not finite' in capsys.readouterr().out
  assert checkpoint.steps(str(b)) == []
  assert _of_kind(b, 'train')[-1]['step'] == 5


def test_a_curriculum_leaves_inactive_heads_alone(store, tmp_path):
  assert 0 == runs.train(
    store, tmp_path, train__checkpoint_every=1, train__keep_last=9,
    loss__curriculum='0:1;2:2;4:1',
  )  # fmt: skip
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


# What one looks at.


@pytest.mark.parametrize(
  'start, steps, told',
  [
    (2, 2, 'start batch stop batch batch'),
    (4, 9, 'batch start batch batch'),
  ],
)
def test_a_profile_of_what_the_run_has_of_its_steps(
  store, resumable, monkeypatch, start, steps, told
):
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
  tell(loop.sharding, 'put_batch', 'batch')
  assert 0 == runs.train(
    store, resumable, train__profile_start=start, train__profile_steps=steps
  )
  assert ' '.join(calls[: len(told.split())]) == told
  assert calls.count('start') == calls.count('stop') == 1
  found = [f for _, _, files in os.walk(resumable / 'profile') for f in files]
  assert any(name.endswith('.xplane.pb') for name in found)


def test_a_terminal_shows_a_bar(store, resumable, undisturbed, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, 'stdout', terminal)
  assert runs.train(store, resumable) == 0
  written = terminal.getvalue()
  assert 'step 6/6  loss' in written and 'held out' in written
  assert '\x1b[' in written and 'training' in written and '6/6' in written
  assert runs.records(resumable) == runs.records(undisturbed)
