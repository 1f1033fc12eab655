"""Checkpoints: save and restore, retention, corruption, failed saves."""

import dataclasses
import errno
import gc
import itertools
import json
import os
import shutil
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mtp_jax.checkpoint import manifest, metadata, restore, saver
from mtp_jax.config import parse, schema, validate
from mtp_jax.io import paths
from mtp_jax.model import lm
from mtp_jax.train import state as state_lib
from tests.support import runs, tiny

# The shapes of the runs, so that orbax's small programs are compiled once; and
# moments whose dtype is not that of the parameters.
CFG = schema.replace(schema.Config(), **runs.FLAGS, **{'optim.moment_dtype': 'bfloat16'})
MESHES = {
  'as saved': dict(data=2, fsdp=2, tensor=2),
  'fsdp': dict(data=1, fsdp=8, tensor=1),
  'one device': dict(data=1, fsdp=1, tensor=1),
  'tensor': dict(data=1, fsdp=1, tensor=2),
}


def _cfg(mesh):
  sizes = {f'mesh.{axis}': n for axis, n in MESHES[mesh].items()}
  return validate.validate(schema.replace(CFG, **sizes))


def _abstract(cfg):
  return state_lib.abstract(cfg, tiny.mesh(cfg))


def _save(workdir, cfg, states: dict):
  with saver.Saver(str(workdir), cfg) as to:
    for step, state in states.items():
      saver.save(to, step, state, cfg, store='the store')
      to.wait_until_finished()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(workdir, the state of step 7 on the host); sharded when it was saved."""
  workdir = tmp_path_factory.mktemp('saved')
  cfg, rng = _cfg('as saved'), np.random.default_rng(0)
  values = jax.tree.map(lambda x: (1000 * rng.normal(size=x.shape)).astype(x.dtype), _abstract(cfg))
  state = jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), values, _abstract(cfg))
  _save(workdir, cfg, {7: state})
  return workdir, values


@pytest.mark.parametrize('mesh', MESHES)
def test_state_restores_onto_any_mesh(saved, mesh):
  workdir, values = saved
  abstract = _abstract(_cfg(mesh))
  state = restore.restore(str(workdir), 7, abstract)
  runs.assert_same(jax.device_get(state), values)
  for a, x in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
    assert (x.dtype, x.sharding) == (a.dtype, a.sharding)


def test_restore_params_only(saved):
  workdir, values = saved
  abstract = _abstract(_cfg('tensor')).params
  model = restore.restore_params(str(workdir), 7, abstract)
  runs.assert_same(jax.device_get(model), values.params)
  assert model.embed.sharding == abstract.embed.sharding


def test_markov_head_is_part_of_the_state(tmp_path):
  """And without one there is no such field, as in checkpoints of before."""
  cfg = validate.validate(schema.replace(_cfg('one device'), **{'heads.markov_rank': 4}))
  values = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), _abstract(cfg))
  state = jax.tree.map(lambda v, a: jax.device_put(v, a.sharding), values, _abstract(cfg))
  _save(tmp_path, cfg, {3: state})
  runs.assert_same(jax.device_get(restore.restore(str(tmp_path), 3, _abstract(cfg))), values)
  model = restore.restore_params(str(tmp_path), 3, _abstract(cfg).params)
  runs.assert_same(jax.device_get(model), values.params)
  plain = lm.without_unused(_abstract(_cfg('one device')))
  assert not any('markov' in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain))
  assert 'markov' not in plain.params and 'embed' in plain.params


def test_checkpoint_metadata(saved):
  found = metadata.read(str(saved[0]), 7)
  assert (found.cfg, found.store) == (_cfg('as saved'), 'the store')


@pytest.mark.parametrize(
  'last, every, kept',
  [
    (1, 0, [6, 7]),
    (2, 0, [6, 7]),
    (2, 3, [3, 6, 7]),
    (1, 2, [2, 4, 6, 7]),
    (9, 0, [1, 2, 3, 4, 5, 6, 7]),
  ],
)
def test_retention_of_last_and_every_mth(tmp_path, last, every, kept):
  cfg = tiny.cfg(train__max_to_keep=last, train__keep_every=every)
  _save(tmp_path, cfg, {s: dict(x=jnp.ones(2) * s) for s in range(1, 8)})
  assert restore.steps(str(tmp_path)) == kept


@pytest.mark.parametrize(
  'changes, kept',
  [
    ({}, [61, 62]),
    (dict(keep_every=20), [0, 20, 40, 60, 61, 62]),
    # A rollback may go to 50 when 60 holds the spike: three signals since.
    (dict(skip_batches=1), [0, 50, 60, 61, 62]),
    (dict(skip_batches=1, checkpoint_every=0), [0, 61, 62]),
    # A spike at 61 is detected after 61 and 62 were saved.
    (dict(skip_batches=1, checkpoint_every=1), [0, 60, 61, 62]),
  ],
)
def test_interruptions_do_not_evict_rollback_checkpoints(changes, kept):
  t = dict(max_to_keep=2, checkpoint_every=10, steps=100) | changes
  t = dataclasses.replace(schema.TrainConfig(), **t)
  steps = [0, 20, 40, 41, 50, 60, 61, 62]
  found = saver._Retention(t).should_preserve(
    [types.SimpleNamespace(step=step) for step in steps], context=None
  )
  assert [s for s, stays in zip(steps, found, strict=True) if stays] == kept


def test_incomplete_saves_are_ignored_and_deleted(tmp_path):
  cfg = tiny.cfg()
  _save(tmp_path, cfg, {2: dict(x=jnp.ones(2))})
  folder = tmp_path / 'checkpoints'
  os.rename(folder / '2', folder / '4.orbax-checkpoint-tmp')
  _save(tmp_path / 'other', cfg, {3: dict(x=jnp.ones(2))})
  os.rename(tmp_path / 'other' / 'checkpoints' / '3', folder / '3')
  assert restore.steps(str(tmp_path)) == [3]
  assert restore.find(str(tmp_path)) == (str(tmp_path), 3)
  _save(tmp_path, cfg, {5: dict(x=jnp.ones(2))})
  assert sorted(os.listdir(folder)) == ['3', '5']


def test_find_resolves_workdir_and_step(saved, tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  shutil.copytree(saved[0], workdir)
  shutil.copytree(workdir / 'checkpoints' / '7', workdir / 'checkpoints' / '10')
  assert restore.steps(str(workdir)) == [7, 10]  # as numbers
  assert restore.find(str(workdir)) == (str(workdir), 10)
  for path in ('checkpoints/7', 'checkpoints/7/'):
    assert restore.find(f'{workdir}/{path}') == (str(workdir), 7)
  monkeypatch.chdir(workdir / 'checkpoints')
  assert restore.find('7') == (str(workdir), 7)
  with pytest.raises(paths.InputError) as error:
    restore.find(f'{workdir}/checkpoints/8')
  assert str(error.value) == (
    f'{workdir}/checkpoints/8: no complete checkpoint there; there are [7, 10] in {workdir}'
  )


@pytest.mark.parametrize('path', ['', 'none', 'file', 'checkpoints/3'])
def test_find_without_a_checkpoint_raises(tmp_path, path):
  (tmp_path / 'file').write_text('')
  assert restore.steps(str(tmp_path / path)) == []
  with pytest.raises(paths.InputError, match='no complete checkpoint there'):
    restore.find(str(tmp_path / path))


@pytest.mark.parametrize(
  'changes, expected',
  [
    (dict(format=metadata.FORMAT + 1), 'format 2, this program reads 1'),
    (dict(format=metadata.FORMAT + 1, more=1), 'format 2, this program'),
    (dict(format=None), 'format=null: must be an integer'),
    (dict(store=None), 'store=null: must be text'),
    (dict(config=[]), 'config=[]: must be an object'),
    (dict(config={'version': 4}), 'config version 4, this program reads 3'),
    (dict(config={'version': 1, 'model': {'d_modle': 1}}), 'model.d_modle: no such field'),
    (
      dict(config={'version': 1, 'model': {'d_model': '16'}}),
      'model.d_model="16": must be an integer',
    ),
    (dict(config={'version': 1, 'model': {'d_model': 0}}), '--model.d_model=0: must be at least 1'),
    (dict(left_out=[[1]]), 'left_out must be pairs'),
    (dict(left_out=[[1, 'x']]), 'left_out[0][1]="x": must be an integer'),
    (dict(of_a_newer_program=1), 'of_a_newer_program: no such field'),
  ],
)
def test_invalid_metadata_is_a_one_line_error(tmp_path, changes, expected):
  folder = tmp_path / 'checkpoints' / '7'
  path = folder / 'about' / 'metadata'
  path.parent.mkdir(parents=True)
  about = dict(
    format=metadata.FORMAT, store='', left_out=[], config=json.loads(parse.to_json(tiny.cfg()))
  )
  path.write_text(json.dumps(about))
  assert metadata.read(str(tmp_path), 7) == (schema.run_config(tiny.cfg()), '', (), {})
  path.write_text(json.dumps(about | changes))
  with pytest.raises(paths.InputError) as error:
    metadata.read(str(tmp_path), 7)
  assert str(error.value).startswith(f'{folder}: cannot be read as a checkpoint: about: {expected}')


def _read_all(workdir):
  metadata.read(str(workdir), 7)
  x = jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=jnp.ones(1).sharding)
  return restore.restore(str(workdir), 7, dict(x=x))


@pytest.mark.parametrize(
  'name, damage',
  [
    *itertools.product(
      ['about/metadata', 'state/manifest.ocdbt', 'data'], ['missing', 'empty', 'half']
    ),
    ('state/_METADATA', 'empty'),  # orbax does without it, not with half of it
    ('state/_METADATA', 'half'),
  ],
)
def test_corrupt_checkpoint_is_a_one_line_error(tmp_path, name, damage):
  x = jnp.arange(1000, dtype=jnp.float32)
  _save(tmp_path, tiny.cfg(), {7: dict(x=x)})
  assert (_read_all(tmp_path)['x'] == x).all()
  folder = tmp_path / 'checkpoints' / '7'
  path = folder / name
  if name == 'data':
    path = max(folder.glob('state/**/d/*'), key=lambda p: p.stat().st_size)
  data = path.read_bytes()
  if damage == 'missing':
    path.unlink()
  else:
    path.write_bytes(data[: len(data) // 2 if damage == 'half' else 0])
  with pytest.raises(paths.InputError) as error:
    _read_all(tmp_path)
  line = str(error.value)
  assert line.startswith(f'{folder}: cannot be read')
  assert '\n' not in line


# Manifests.

ONE = dict(x=jnp.ones(3))


def _manifests(workdir):
  return sorted(
    os.path.relpath(os.path.join(folder, name), workdir / 'checkpoints')
    for folder, _, names in os.walk(workdir)
    for name in names
    if 'manifest.json' in name
  )


def test_every_checkpoint_has_a_manifest(tmp_path):
  cfg = tiny.cfg(train__max_to_keep=2, train__keep_every=3)
  _save(tmp_path, cfg, {s: ONE for s in range(1, 8)})
  assert _manifests(tmp_path) == [f'{s}/manifest.json' for s in (3, 6, 7)]
  assert restore.latest_valid_step(str(tmp_path)) == (7, [])


def test_any_corruption_of_any_file_is_detected(saved, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(saved[0], workdir)
  folder = workdir / 'checkpoints' / '7'
  found = [p for p in folder.rglob('*') if p.is_file()]
  assert len(found) > 10
  for path in found:
    data, name = path.read_bytes(), path.relative_to(folder)
    for corrupt in (b'', data[:-1], data[:-1] + bytes([data[-1] ^ 1]), None):
      path.unlink()
      if corrupt is not None:
        path.write_bytes(corrupt)
      elif name.name == 'manifest.json':
        continue  # is as if it had been killed before
      with pytest.raises(paths.InputError) as error:
        restore.verify(str(workdir), 7)
      line = str(error.value)
      assert line.startswith(f'{folder}: is corrupt: {name} ')
      assert '\n' not in line
    path.write_bytes(data)
  restore.verify(str(workdir), 7)


def test_workdir_may_be_named_like_a_step(saved, tmp_path):
  workdir = tmp_path / 'checkpoints' / '42'
  shutil.copytree(saved[0], workdir)
  assert restore.find(str(workdir)) == (str(workdir), 7)
  step = workdir / 'checkpoints' / '7'
  assert restore.find(str(step)) == (str(workdir), 7)


def _data(folder):
  # All of them: which ones the newest version of the database refers to varies.
  return folder.glob('state/ocdbt.process_0/d/*')


def _of_array_metadatas(folder):
  return [folder / 'state' / 'array_metadatas' / 'process_0']


def _delete(path):
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def _cut(path):
  os.truncate(path, 16)


def _zero(path):
  path.write_bytes(bytes(os.path.getsize(path)))


@pytest.mark.parametrize(
  'damage, of',
  [
    (_delete, lambda folder: [folder / 'state']),
    (_delete, lambda folder: [folder / 'about']),
    (_delete, lambda folder: [folder / 'state' / 'manifest.ocdbt']),
    (_delete, _data),
    (_cut, _data),
    (_zero, _data),
    (_cut, _of_array_metadatas),
  ],
)
def test_incomplete_copy_is_corrupt(damage, of, saved, tmp_path):
  """It has no manifest, like a checkpoint that was killed before it was hashed."""
  workdir = tmp_path / 'run'
  shutil.copytree(saved[0], workdir)
  newest = workdir / 'checkpoints' / '9'
  shutil.copytree(workdir / 'checkpoints' / '7', newest)
  (newest / manifest.NAME).unlink()
  assert restore.latest_valid_step(str(workdir)) == (9, [])
  for path in [*of(newest)]:
    damage(path)
  step, [(bad, why)] = restore.latest_valid_step(str(workdir))
  assert (step, bad) == (7, 9) and 'cannot be opened' in why
  with pytest.raises(paths.InputError, match='is corrupt: .*cannot be open'):
    restore.verify(str(workdir), 9)


def test_save_that_cannot_be_reopened_fails(tmp_path, capsys):
  """orbax reads [1] as a pattern, and finds none of the parts it wrote."""
  workdir = tmp_path / 'a[1]'
  cfg = _cfg('one device')
  state = dict(params=jnp.arange(8.0))
  with saver.Saver(str(workdir), cfg) as to:
    saver.save(to, 3, state, cfg, store='the store')
    to.wait_until_finished()
    with pytest.raises(paths.InputError, match='checkpoint 3 could not be'):
      to.check()
  assert 'it was written, but cannot be opened: ' in capsys.readouterr().out
  assert restore.steps(str(workdir)) == []


def test_previous_checkpoint_is_kept_until_newest_is_verified(tmp_path, monkeypatch):
  cfg, unreadable = tiny.cfg(train__max_to_keep=1), restore.open_problem
  monkeypatch.setattr(
    restore,
    'open_problem',
    lambda path: 'cannot be opened' if path.name == '4' else unreadable(path),
  )
  with saver.Saver(str(tmp_path), cfg) as to:
    for step in (2, 4):
      saver.save(to, step, ONE, cfg, store='')
    to.wait_until_finished()
  assert restore.latest_valid_step(str(tmp_path)) == (2, [])
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['2', '4.unreadable']


def test_latest_valid_step_skips_corrupt_checkpoints(tmp_path):
  assert restore.latest_valid_step(str(tmp_path)) == (None, [])
  _save(tmp_path, tiny.cfg(train__max_to_keep=9), {s: ONE for s in (0, 2, 4, 6)})
  folder = tmp_path / 'checkpoints'
  for step, found in ((6, 4), (4, 2), (2, 0)):
    (folder / str(step) / 'commit_success.txt').unlink()
    valid, corrupt = restore.latest_valid_step(str(tmp_path))
    assert valid == found
    assert corrupt == [(s, 'commit_success.txt is missing') for s in range(6, step - 1, -2)]
  (folder / '0' / 'about' / 'metadata').write_text('')
  before = sorted(os.listdir(folder))
  with pytest.raises(paths.InputError) as error:
    restore.latest_valid_step(str(tmp_path))
  assert str(error.value).startswith(
    f'--train.workdir={tmp_path}: all of its checkpoints are corrupt: 6:'
    ' commit_success.txt is missing; 4: '
  )
  assert '; 0: about/metadata has 0 bytes, not ' in str(error.value)
  assert sorted(os.listdir(folder)) == before


def test_quarantined_checkpoints_are_kept_and_ignored(tmp_path):
  cfg = tiny.cfg(train__max_to_keep=1)
  for name in ('6.corrupt', '6.corrupt2', '6.corrupt3'):
    _save(tmp_path, cfg, {6: ONE})
    assert restore.quarantine(str(tmp_path), 6) == name
    assert restore.steps(str(tmp_path)) == []
  _save(tmp_path, cfg, {4: ONE, 6: ONE, 8: ONE})
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == [
    '6',
    '6.corrupt',
    '6.corrupt2',
    '6.corrupt3',
    '8',
  ]


def test_manifest_blocks_next_save_and_end_but_no_step(tmp_path, monkeypatch):
  write, slow = manifest.write, threading.Event()

  def patched(folder):
    assert slow.wait(60)
    write(folder)

  monkeypatch.setattr(manifest, 'write', patched)
  with saver.Saver(str(tmp_path), tiny.cfg()) as to:
    assert 0 < saver.save(to, 1, ONE, tiny.cfg(), store='') < 30
    threading.Timer(0.5, slow.set).start()
    assert 0.3 < saver.save(to, 2, ONE, tiny.cfg(), store='') < 30
    assert _manifests(tmp_path)[0] == '1/manifest.json'
  assert _manifests(tmp_path) == ['1/manifest.json', '2/manifest.json']


def _no_space(*_, **__):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _patch_save_of(monkeypatch, step, where):
  """No space for a step: when a save begins, when all but the last of it is
  written, or for the manifest alone."""
  owner, name = dict(
    begin=(ocp.AsyncCheckpointer, 'save'), commit=(os, 'rename'), manifest=(manifest, 'write')
  )[where]
  function = getattr(owner, name)

  def patched(*args, **kwargs):
    if any(os.path.basename(str(a)) == str(step) for a in args):
      _no_space()
    return function(*args, **kwargs)

  monkeypatch.setattr(owner, name, patched)


@pytest.mark.parametrize('where', ['begin', 'commit'])
@pytest.mark.parametrize('keep', [1, 3])
def test_failed_save_leaves_no_files_and_keeps_others(tmp_path, monkeypatch, capfd, where, keep):
  _patch_save_of(monkeypatch, 4, where)
  cfg, folder = tiny.cfg(train__max_to_keep=keep), tmp_path / 'checkpoints'
  with saver.Saver(str(tmp_path), cfg) as to:
    saver.save(to, 2, ONE, cfg, store='')
    to.wait_until_finished()
    saver.save(to, 4, ONE, cfg, store='')
    limit = time.monotonic() + 30
    while not to.failed or os.listdir(folder) != ['2']:  # not at the next save
      assert time.monotonic() < limit
      time.sleep(0.05)
    to.wait_until_finished()
    assert to.failed == (4, 'no space left on the device')
    with pytest.raises(paths.InputError) as error:
      to.check()
    assert str(error.value) == (
      f'--train.workdir={tmp_path}: checkpoint 4 could not be saved: no space'
      ' left on the device; the newest there is 2'
    )
    for step in (6, 8):
      saver.save(to, step, ONE, cfg, store='')
    to.wait_until_finished()
    to.check()
  kept = [6, 8] if keep == 1 else [2, 6, 8]
  assert restore.steps(str(tmp_path)) == kept
  assert sorted(os.listdir(folder)) == [str(step) for step in kept]
  gc.collect()
  out, error = capfd.readouterr()
  assert out == (
    'checkpoint 4 could not be saved: no space left on the device; earlier ones remain\n'
  )
  assert error == ''


def test_unwritable_manifest_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
  _patch_save_of(monkeypatch, 4, 'manifest')
  _save(tmp_path, tiny.cfg(), {2: ONE, 4: ONE})
  assert capsys.readouterr().out == ('checkpoint 4 has no manifest: no space left on the device\n')
  assert restore.latest_valid_step(str(tmp_path)) == (4, [])


def test_import_on_a_full_disk_is_refused(tmp_path, monkeypatch):
  _patch_save_of(monkeypatch, 0, 'commit')
  cfg = schema.replace(tiny.cfg(), **{'train.workdir': str(tmp_path)})
  with pytest.raises(paths.InputError, match='newest there is none'):
    saver.save_params(ONE, cfg, None, str(tmp_path))
