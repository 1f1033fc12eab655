"""Runs whose heads have another run as their teacher (--loss.teacher)."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from mtp_jax.checkpoint import metadata
from mtp_jax.checkpoint import teacher as teacher_lib
from mtp_jax.cli import main
from mtp_jax.config import schema
from mtp_jax.data import documents, store, tokenizers
from mtp_jax.model import lm, next_token, params
from mtp_jax.parallel import sharding
from tests.support import runs, tiny

OF_TEACHER = dict(model__d_model=8, model__vocab_size=512, heads__family='causal')
OF_RUN = dict(model__vocab_size=512, loss__head_loss='lk_hybrid', train__checkpoint_every=3)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A store, and a teacher of another width and family with checkpoints 2 and 4."""
  root = tmp_path_factory.mktemp('teacher')
  runs.make_store(str(root / 'store'))
  more = dict(train__steps=4, train__checkpoint_every=2, eval__batches=1)
  assert runs.train(str(root / 'store'), root / 'other', **OF_TEACHER | more) == 0
  return root


def _train(root, workdir, **changes):
  changes = OF_RUN | dict(loss__teacher=str(root / 'other')) | changes
  return runs.train(str(root / 'store'), workdir, **changes)


@pytest.fixture(scope='module')
def undisturbed(root):
  assert _train(root, root / 'run') == 0
  return root / 'run'


def test_run_records_the_checkpoint_of_its_teacher(root, undisturbed, capsys):
  saved = metadata.read(str(undisturbed), 6)
  assert saved.cfg.loss.teacher == f'{root}/other/checkpoints/4'
  records = runs.records(undisturbed)
  train, evaluated = ([r for r in records if r['kind'] == kind][-1] for kind in ('train', 'eval'))
  assert 0 < train['teacher_alpha_2'] < 1 and 'alpha_2' not in train
  assert {'alpha_2', 'teacher_alpha_2', 'draft_loss_2'} <= evaluated.keys()
  state = runs.restored(undisturbed, 6)
  assert state.params.embed.shape == (512, 16)  # and nothing of the teacher's 8
  assert not [x for x in jax.tree.leaves(state) if np.shape(x)[-1:] == (8,)]
  capsys.readouterr()
  assert main.main(['eval', str(undisturbed), f'--out={root}/eval.json']) == 0
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
  assert np.any(by_4.params.heads.proj != runs.restored(tmp_path / 'run', 6).params.heads.proj)


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
    (dict(model__vocab_size=544), 'has --model.vocab_size=512, the run 544'),
    (dict(loss__teacher='/nowhere'), '/nowhere: no complete checkpoint there'),
    (dict(loss__head_loss='ce'), 'needs another --loss.head_loss than ce'),
    (dict(store='task'), 'its tokenizer is bytes, that of --data.store'),
    (dict(mesh__tensor=2, mesh__fsdp=4, model__d_model=16), ''),
    (dict(mesh__fsdp=16), ''),
  ],
  ids=lambda value: next(iter(value), '') if isinstance(value, dict) else '',
)
def test_teacher_that_does_not_suit_is_refused(root, changes, line, tmp_path, capsys):
  del root, changes, line, tmp_path, capsys
