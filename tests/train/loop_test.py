"""A run: stopped and resumed it is the run that was not, bit for bit."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from mtp_jax import checkpoint, config, main
from mtp_jax.train import loop, metrics
from tests import runs


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return runs.make_store(str(tmp_path_factory.mktemp('data') / 'store'))


@pytest.fixture(scope='module')
def undisturbed(store, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
  assert runs.train(store, workdir, train__checkpoint_every=3) == 0
  return workdir


@pytest.fixture(scope='module')
def undisturbed_process(store, tmp_path_factory):
  """The same on one device: other sums, so another run."""
  workdir = tmp_path_factory.mktemp('runs') / 'process'
  run = runs.process(
    ['-m', 'mtp_jax', 'train', *runs.args(store, str(workdir))]
  )
  assert run.wait() == 0, run.stderr.read()
  return workdir


def test_a_run_writes_what_it_says(undisturbed, store):
  assert sorted(os.listdir(undisturbed)) == [
    'checkpoints', 'config.json', 'metrics.jsonl', 'run.flags', 'tensorboard',
  ]  # fmt: skip
  assert checkpoint.steps(str(undisturbed)) == [3, 6]
  cfg = config.from_json((undisturbed / 'config.json').read_text())
  assert cfg.data.store == store and cfg.train.steps == 6
  assert 'workdir' not in (undisturbed / 'run.flags').read_text()
  kinds = [(r['kind'], r['step']) for r in runs.records(undisturbed)]
  assert kinds == [('train', s) for s in range(1, 7)] + [('eval', 6)]
  last = runs.records(undisturbed)[-2]
  for name in (
    'loss', 'loss_1', 'loss_2', 'bits_per_byte', 'lr', 'grad_norm',
    'accepted_length', 'acceptance_2', 'head_grad_norm_2',
  ):  # fmt: skip
    assert np.isfinite(last[name]), name


def test_a_signal_then_the_same_command_is_the_undisturbed_run(
  store, tmp_path, undisturbed, monkeypatch
):
  put, calls = loop.sharding.put_batch, []

  def signalled(mesh, batch):
    calls.append(1)
    if len(calls) == 4:
      os.kill(os.getpid(), signal.SIGINT)
    return put(mesh, batch)

  monkeypatch.setattr(loop.sharding, 'put_batch', signalled)
  workdir = tmp_path / 'run'
  assert runs.train(store, workdir) == loop.EXIT_INTERRUPTED
  assert checkpoint.steps(str(workdir)) == [4]
  monkeypatch.undo()
  assert runs.train(store, workdir) == 0
  runs.assert_same(runs.restored(workdir, 6), runs.restored(undisturbed, 6))
  assert runs.records(workdir) == runs.records(undisturbed)


def test_sigterm_to_a_process(store, tmp_path, undisturbed_process):
  workdir = tmp_path / 'run'
  command = ['-m', 'mtp_jax', 'train', *runs.args(store, str(workdir))]
  run = runs.process(command)
  for line in run.stdout:
    if line.startswith('step 2/'):
      run.send_signal(signal.SIGTERM)
      break
  assert run.wait() == loop.EXIT_INTERRUPTED, run.stderr.read()
  stopped_at = checkpoint.steps(str(workdir))[-1]
  assert 2 <= stopped_at < 6
  run = runs.process(command)
  assert run.wait() == 0, run.stderr.read()
  runs.assert_same(
    runs.restored(workdir, 6), runs.restored(undisturbed_process, 6)
  )
  assert runs.records(workdir) == runs.records(undisturbed_process)


KILLED_SAVING = """
import os, signal, sys, threading
from mtp_jax import checkpoint, main

save = checkpoint.save

def killed(to, step, *args):
  # The commit of step 4 is a rename; everything before it has been written.
  if step == 4:
    to.wait_until_finished()
    import orbax.checkpoint as ocp
    def die(*_, **__):
      os.kill(os.getpid(), signal.SIGKILL)
    os.rename = die
    import pathlib
    pathlib.Path.rename = die
    from etils import epath
    for cls in type(epath.Path('/tmp')).__mro__:
      if 'rename' in vars(cls):
        try: cls.rename = die
        except TypeError: pass
  save(to, step, *args)
  if step == 4:
    to.wait_until_finished()

checkpoint.save = killed
sys.exit(main.main(sys.argv[1:]))
"""


def test_kill_during_a_save(store, tmp_path, undisturbed_process):
  workdir = tmp_path / 'run'
  flags = runs.args(store, str(workdir), train__checkpoint_every=2)
  run = runs.process(['-c', KILLED_SAVING, 'train', *flags])
  assert run.wait() == -signal.SIGKILL, run.stderr.read()
  left = os.listdir(workdir / 'checkpoints')
  assert any('4' in name and not name.isdigit() for name in left), left
  assert checkpoint.steps(str(workdir)) == [2]
  run = runs.process(['-m', 'mtp_jax', 'train', *flags])
  out, error = run.communicate()
  assert run.returncode == 0, error
  assert 'step 3/' in out and 'step 2/' not in out
  runs.assert_same(
    runs.restored(workdir, 6), runs.restored(undisturbed_process, 6)
  )
  assert runs.records(workdir) == runs.records(undisturbed_process)
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['4', '6']


def test_run_flags_repeat_the_run(undisturbed, tmp_path):
  assert 0 == main.main([
    'train', f'--flagfile={undisturbed}/run.flags',
    f'--train.workdir={tmp_path}/again',
  ])  # fmt: skip
  runs.assert_same(
    runs.restored(tmp_path / 'again', 6), runs.restored(undisturbed, 6)
  )


def test_a_finished_run_is_left_alone(store, undisturbed, capsys):
  before = (undisturbed / 'metrics.jsonl').stat().st_mtime_ns
  assert runs.train(store, undisturbed, train__checkpoint_every=3) == 0
  assert 'trained already, to step 6' in capsys.readouterr().out
  assert (undisturbed / 'metrics.jsonl').stat().st_mtime_ns == before


@pytest.mark.parametrize(
  'change, line',
  [
    ({'optim__lr': 0.5}, '--optim.lr=0.5: the run in'),
    ({'heads__n': 1}, '--heads.n=1: the run in'),
    ({'train__seed': 7}, '--train.seed=7: the run in'),
  ],
)
def test_a_changed_result_is_refused(store, undisturbed, capsys, change, line):
  assert runs.train(store, undisturbed, train__steps=9, **change) == 2
  error = capsys.readouterr().err
  assert line in error and 'was started with' in error
  assert error.count('\n') == 1
  assert checkpoint.steps(str(undisturbed)) == [3, 6]


def test_another_store_is_refused(undisturbed, tmp_path, capsys):
  other = runs.make_store(str(tmp_path / 'other'), seed=1)
  assert runs.train(other, undisturbed, train__steps=9) == 2
  assert 'is not the store' in capsys.readouterr().err


def test_another_mesh_goes_on_from_the_same_state(store, tmp_path):
  # More steps: the schedule must not depend on them.
  flags = dict(optim__schedule='constant', model__vocab_size=264)
  workdir = tmp_path / 'run'
  assert 0 == runs.train(
    store, workdir, train__steps=3, mesh__data=2, mesh__fsdp=2, mesh__tensor=2,
    **flags,
  )  # fmt: skip
  meshes = (dict(), dict(fsdp=8), dict(data=2, fsdp=2, tensor=2))
  for other in meshes[:-1]:
    runs.assert_same(
      runs.restored(workdir, 3, **other),
      runs.restored(workdir, 3, **meshes[-1]),
    )
  assert 0 == runs.train(store, workdir, mesh__fsdp=8, **flags)
  straight = tmp_path / 'straight'
  assert 0 == runs.train(store, straight, mesh__fsdp=8, **flags)
  for a, b in zip(*map(_train_records, (workdir, straight)), strict=True):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-4)


def _train_records(workdir):
  return [r for r in runs.records(workdir) if r['kind'] == 'train']


def test_the_last_and_every_mth_checkpoint_stay(store, tmp_path):
  assert 0 == runs.train(
    store, tmp_path, train__checkpoint_every=1, train__keep_last=2,
    train__keep_every=3,
  )  # fmt: skip
  assert checkpoint.steps(str(tmp_path)) == [3, 5, 6]


def test_a_non_finite_step_changes_nothing_and_too_many_end_the_run(
  store, tmp_path, monkeypatch, capsys
):
  make, bad = loop.step_lib.compiled, {2, 4}

  def poisoned(cfg, n_active):
    good = make(cfg, n_active)

    class Step:
      def lower(self, *a):
        return self

      def compile(self):
        return self

      def memory_analysis(self):
        return None

      def __call__(self, state, batch, bytes_V):
        with jax.transfer_guard('allow'):
          before = jax.device_get(state)
          step = int(before.step)
          if step in bad:  # as a hardware fault would
            state = state.replace(params=state.params.replace(
              norm=state.params.norm * np.nan))  # fmt: skip
          new, values = good(state, batch, bytes_V)
          if step in bad:
            for a, b in (
              (new.opt_state, before.opt_state),
              (new.params.trunk, before.params.trunk),
            ):
              jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), b)
            new = new.replace(params=jax.tree.map(
              jax.device_put, before.params,
              jax.tree.map(lambda x: x.sharding, new.params)))  # fmt: skip
        return new, values

    return Step()

  monkeypatch.setattr(loop.step_lib, 'compiled', poisoned)
  assert runs.train(store, tmp_path / 'a', train__max_nonfinite=2) == 0
  skipped = [r['skipped'] for r in metrics.read(str(tmp_path / 'a'))
             if r['kind'] == 'train']  # fmt: skip
  assert skipped == [0, 0, 1, 1, 2, 2]
  lines = (tmp_path / 'a' / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(lines[2])['loss'] is None  # NaN, in JSON
  bad.add(3)
  capsys.readouterr()
  assert (
    runs.train(store, tmp_path / 'b', train__max_nonfinite=2)
    == loop.EXIT_DIVERGED
  )
  assert '2 steps in a row were not finite' in capsys.readouterr().out
  assert checkpoint.steps(str(tmp_path / 'b')) == []


def test_a_curriculum_leaves_inactive_heads_alone(store, tmp_path):
  flags = dict(heads__n=2, loss__curriculum='0:1;3:2', optim__weight_decay=0.5)
  assert 0 == runs.train(
    store, tmp_path, train__checkpoint_every=1, train__keep_last=9, **flags
  )
  states = [runs.restored(tmp_path, step) for step in range(1, 7)]

  def of_head(state, k):
    adam = state.opt_state[1]
    return jax.tree.map(
      lambda x: x[k], (state.params.heads, adam.mu.heads, adam.nu.heads)
    )

  runs.assert_same(of_head(states[0], 1), of_head(states[2], 1))
  for mu in jax.tree.leaves(of_head(states[2], 1)[1]):
    assert not mu.any()
  start = jax.tree.leaves(of_head(states[0], 1)[0])
  for moved in (of_head(states[5], 1), of_head(states[2], 0)):
    for a, b in zip(jax.tree.leaves(moved[0]), start, strict=True):
      assert (a != b).any()
  found = _train_records(tmp_path)
  assert ['loss_2' in r for r in found] == [False] * 3 + [True] * 3


def test_a_half_written_last_record_is_dropped(store, tmp_path, undisturbed):
  flags = dict(train__checkpoint_every=3)
  run = tmp_path / 'run'
  assert runs.train(store, run, **flags) == 0
  shutil.rmtree(run / 'checkpoints' / '6')
  with open(run / 'metrics.jsonl', 'a') as f:
    f.write('{"kind": "train", "st')
  assert runs.train(store, run, **flags) == 0
  assert runs.records(run) == runs.records(undisturbed)


def test_a_profile_is_written(store, tmp_path):
  assert 0 == runs.train(
    store, tmp_path, train__profile_start=2, train__profile_steps=2
  )
  found = [f for _, _, files in os.walk(tmp_path / 'profile') for f in files]
  assert any(name.endswith('.xplane.pb') for name in found)
