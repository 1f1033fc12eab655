"""Runs whose heads have another run as their teacher (--loss.teacher)."""

import contextlib
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest

from mtp_jax.checkpoint import metadata, saver
from mtp_jax.checkpoint import teacher as teacher_lib
from mtp_jax.cli import main
from mtp_jax.config import fields, schema
from mtp_jax.data import tokenizers
from mtp_jax.model import flops, lm, params
from mtp_jax.parallel import chips, sharding
from mtp_jax.planning import analytic
from tests.support import runs, tiny

OF_RUN = dict(
  optim__warmup_steps=1,
  model__vocab_size=512,
  loss__head_loss='lk_hybrid',
  train__checkpoint_every=3,
)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A store, and a teacher of another width and family with checkpoints 2 and 4."""
  root = tmp_path_factory.mktemp('teacher')
  runs.make_store(str(root / 'store'))
  changes = dict(model__d_model=8, model__vocab_size=512, model__n_layers=3, heads__n=2)
  c = tiny.cfg(heads__family='causal', data__tokenizer='bytes', **changes)
  w = tiny.model(c, tiny.mesh(c))
  for step, factor in ((2, 2.0), (4, 3.0)):
    workdir = root / f'made_{step}'
    scaled = w.replace(unembed=factor * w.unembed)
    saver.save_params(scaled, c, tokenizers.get('bytes'), str(workdir))
    (root / 'other' / 'checkpoints').mkdir(parents=True, exist_ok=True)
    (workdir / 'checkpoints' / '0').rename(root / 'other' / 'checkpoints' / str(step))
  return root


def _train(root, workdir, **changes):
  changes = OF_RUN | dict(loss__teacher=str(root / 'other')) | changes
  return runs.train(str(root / 'store'), workdir, **changes)


@pytest.fixture(scope='module')
def undisturbed(root):
  with open(root / 'log.txt', 'w') as log, contextlib.redirect_stdout(log):
    assert _train(root, root / 'run') == 0
  return root / 'run'


def test_a_trunk_that_heads_make_worse_is_reported(root, undisturbed):
  assert 'make head 1 worse; --heads.isolated or --train.freeze' in (root / 'log.txt').read_text()


def test_run_records_the_checkpoint_of_its_teacher(root, undisturbed, capsys):
  saved = metadata.read(str(undisturbed), 6)
  assert saved.cfg.loss.teacher == f'{root}/other/checkpoints/4'
  records = runs.records(undisturbed)
  train, evaluated = ([r for r in records if r['kind'] == kind][-1] for kind in ('train', 'eval'))
  assert 0 < train['teacher_alpha_2'] < 1 and 'alpha_2' not in train
  assert {'alpha_2', 'teacher_alpha_2', 'draft_loss_2'} <= evaluated.keys()
  capsys.readouterr()
  flags = [f'--out={root}/eval.json', '--train.compilation_cache=']
  assert main.main(['eval', str(undisturbed), *flags]) == 0
  again = json.loads((root / 'eval.json').read_text())
  for name in ('alpha_2', 'teacher_alpha_2', 'draft_loss_2', 'loss'):
    np.testing.assert_allclose(again[name], evaluated[name], rtol=1e-5)


def test_resume_is_bitwise_with_the_teacher_it_started_with(root, undisturbed, tmp_path):
  """The teacher's run has a newer checkpoint by then."""
  other = tmp_path / 'other'
  shutil.copytree(root / 'other', other)
  four = other / 'checkpoints' / '4'
  shutil.move(four, tmp_path / '4')
  assert _train(root, tmp_path / 'run', loss__teacher=str(other), train__steps=3) == 0
  shutil.move(tmp_path / '4', four)
  assert _train(root, tmp_path / 'run', loss__teacher=str(other)) == 0
  assert metadata.read(str(tmp_path / 'run'), 6).cfg.loss.teacher.endswith('checkpoints/2')
  of_2 = f'{root}/other/checkpoints/2'
  assert _train(root, tmp_path / 'whole', loss__teacher=of_2) == 0
  runs.assert_same(runs.restored(tmp_path / 'run', 6), runs.restored(tmp_path / 'whole', 6))
  by_4 = runs.restored(undisturbed, 6)
  assert np.any(by_4.params.embed != runs.restored(tmp_path / 'run', 6).params.embed)


def test_resume_without_its_teacher_is_refused(root, undisturbed, tmp_path, capsys):
  other = tmp_path / 'other'
  shutil.copytree(root / 'other', other)
  assert _train(root, tmp_path / 'run', loss__teacher=str(other), train__steps=3) == 0
  before = sorted(os.listdir(tmp_path / 'run' / 'checkpoints'))
  shutil.rmtree(other / 'checkpoints' / '4')
  capsys.readouterr()
  assert _train(root, tmp_path / 'run', loss__teacher=str(other)) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'mtp: --loss.teacher={other}/checkpoints/4: ')
  assert line.endswith(f'no complete checkpoint there; there are [2] in {other}')
  assert sorted(os.listdir(tmp_path / 'run' / 'checkpoints')) == before


@pytest.mark.parametrize(
  'changes, line',
  [
    (dict(model__vocab_size=544), '/other/checkpoints/4: has --model.vocab_size=512, the run 544'),
    (dict(loss__teacher='/nowhere'), '/nowhere: /nowhere: no complete checkpoint there, which'),
    (dict(loss__head_loss='ce'), '/other: needs another --loss.head_loss than ce'),
  ],
)
def test_unsuitable_teacher_is_refused(changes, line, root, tmp_path, capsys):
  assert _train(root, tmp_path / 'run', **changes) == 2
  error = capsys.readouterr().err
  assert error.startswith('mtp: --loss.teacher=') and line in error and error.count('\n') == 1
  assert not os.path.exists(tmp_path / 'run')


@pytest.mark.parametrize(
  'changes, n, line',
  [
    ({'data.tokenizer': 'hf#123'}, 1, 'its tokenizer is bytes, that of --data.store hf#123'),
    ({}, 16, 'does not fit the mesh: --model.d_model=8: must be a multiple of mesh fsdp=16'),
  ],
)
def test_teacher_of_another_tokenizer_or_mesh_is_refused(changes, n, line, root, undisturbed):
  cfg = schema.replace(metadata.read(str(undisturbed), 6).cfg, **changes)
  with pytest.raises(fields.ConfigError, match=f'checkpoints/4: {re.escape(line)}'):
    teacher_lib.find(cfg, dict(data=1, fsdp=n, tensor=1))


def test_plan_has_the_memory_of_the_teacher(root, undisturbed, tmp_path, capsys):
  def plan(**changes):
    args = runs.args('', '', **OF_RUN | changes)
    assert main.main(['plan', f'--out={tmp_path}/plan.json', *args]) in (0, 4)
    return json.loads((tmp_path / 'plan.json').read_text()), capsys.readouterr().out

  (alone, _), (found, out) = plan(), plan(loss__teacher=str(root / 'other'))
  n = jax.device_count()
  source = teacher_lib.find(metadata.read(str(undisturbed), 6).cfg, dict(fsdp=n))
  assert source
  bytes_ = params.bytes_per_device(
    params.abstract(lm.specs(source.cfg), 'float32', sharding.make_mesh(source.cfg))
  )
  assert found['teacher_bytes'] == bytes_ > 0 and alone['teacher_bytes'] is None
  more = found['held_bytes'] - alone['held_bytes']  # of metrics some bytes less
  assert 0.99 * bytes_ < more <= bytes_
  cfg = metadata.read(str(undisturbed), 6).cfg
  assert found['model_flops_per_token'] == flops.flops_per_token(cfg, 2, teacher=source.cfg)
  assert found['executed_flops_per_step'] != alone['executed_flops_per_step']
  assert '  teacher  ' in out
  on = dict(data=1, fsdp=n, tensor=1)
  chip = chips.chip('TPU v5 lite')
  without = schema.replace(cfg, **{'loss.teacher': ''})
  a, b = (analytic.estimate(schema.command_config(c), on, chip) for c in (without, cfg))
  assert b.total_bytes > a.total_bytes + bytes_ and b.seconds['compute'] != a.seconds['compute']
