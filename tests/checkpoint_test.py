"""Checkpoints: what is saved comes back, whole or not at all."""

import itertools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import checkpoint, config, validate
from mtp_jax.train import state as state_lib
from tests import runs, tiny

# The shapes of the runs, so that orbax's small programs are compiled once; and
# moments whose dtype is not that of the parameters.
CFG = config.replace(
  config.Config(), **runs.FLAGS, **{'optim.moment_dtype': 'bfloat16'}
)
MESHES = {
  'as saved': dict(data=2, fsdp=2, tensor=2),
  'fsdp': dict(data=1, fsdp=8, tensor=1),
  'one device': dict(data=1, fsdp=1, tensor=1),
  'tensor': dict(data=1, fsdp=1, tensor=2),
}


def _cfg(mesh):
  sizes = {f'mesh.{axis}': n for axis, n in MESHES[mesh].items()}
  return validate.validate(config.replace(CFG, **sizes))


def _abstract(cfg):
  return state_lib.abstract(cfg, tiny.mesh(cfg))


def _save(workdir, cfg, states: dict):
  with checkpoint.manager(str(workdir), cfg) as to:
    for step, state in states.items():
      checkpoint.save(to, step, state, cfg, 'the store')
      to.wait_until_finished()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(workdir, the state of step 7 on the host); sharded when it was saved."""
  workdir = tmp_path_factory.mktemp('saved')
  cfg, rng = _cfg('as saved'), np.random.default_rng(0)
  values = jax.tree.map(
    lambda x: (1000 * rng.normal(size=x.shape)).astype(x.dtype), _abstract(cfg)
  )
  state = jax.tree.map(
    lambda v, a: jax.device_put(v, a.sharding), values, _abstract(cfg)
  )
  _save(workdir, cfg, {7: state})
  return workdir, values


@pytest.mark.parametrize('mesh', MESHES)
def test_a_state_restores_onto_any_mesh(saved, mesh):
  workdir, values = saved
  abstract = _abstract(_cfg(mesh))
  state = checkpoint.restore(str(workdir), 7, abstract)
  runs.assert_same(jax.device_get(state), values)
  for a, x in zip(jax.tree.leaves(abstract), jax.tree.leaves(state),
                  strict=True):  # fmt: skip
    assert (x.dtype, x.sharding) == (a.dtype, a.sharding)


def test_the_parameters_alone(saved):
  workdir, values = saved
  abstract = _abstract(_cfg('tensor')).params
  model = checkpoint.restore_params(str(workdir), 7, abstract)
  runs.assert_same(jax.device_get(model), values.params)
  assert model.embed.sharding == abstract.embed.sharding


def test_what_it_says_about_itself(saved):
  cfg, store = checkpoint.about(str(saved[0]), 7)
  assert (cfg, store) == (_cfg('as saved'), 'the store')


@pytest.mark.parametrize(
  'last, every, kept',
  [(1, 0, [7]), (2, 0, [6, 7]), (2, 3, [3, 6, 7]), (1, 2, [2, 4, 6, 7]),
   (9, 0, [1, 2, 3, 4, 5, 6, 7])],
)  # fmt: skip
def test_the_last_and_every_mth_stay(tmp_path, last, every, kept):
  cfg = tiny.cfg(train__keep_last=last, train__keep_every=every)
  _save(tmp_path, cfg, {s: dict(x=jnp.ones(2) * s) for s in range(1, 8)})
  assert checkpoint.steps(str(tmp_path)) == kept


def test_leftovers_are_no_checkpoints_and_go(tmp_path):
  cfg = tiny.cfg()
  _save(tmp_path, cfg, {2: dict(x=jnp.ones(2))})
  folder = tmp_path / 'checkpoints'
  os.rename(folder / '2', folder / '4.orbax-checkpoint-tmp')
  _save(tmp_path / 'other', cfg, {3: dict(x=jnp.ones(2))})
  os.rename(tmp_path / 'other' / 'checkpoints' / '3', folder / '3')
  assert checkpoint.steps(str(tmp_path)) == [3]
  assert checkpoint.find(str(tmp_path)) == (str(tmp_path), 3)
  _save(tmp_path, cfg, {5: dict(x=jnp.ones(2))})
  assert sorted(os.listdir(folder)) == ['3', '5']


def test_find(saved, tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  shutil.copytree(saved[0], workdir)
  shutil.copytree(workdir / 'checkpoints' / '7', workdir / 'checkpoints' / '10')
  assert checkpoint.steps(str(workdir)) == [7, 10]  # as numbers
  assert checkpoint.find(str(workdir)) == (str(workdir), 10)
  for path in ('checkpoints/7', 'checkpoints/7/'):
    assert checkpoint.find(f'{workdir}/{path}') == (str(workdir), 7)
  monkeypatch.chdir(workdir / 'checkpoints')
  assert checkpoint.find('7') == (str(workdir), 7)
  with pytest.raises(config.ConfigError) as error:
    checkpoint.find(f'{workdir}/checkpoints/8')
  assert str(error.value) == (
    f'--eval.checkpoint={workdir}/checkpoints/8: no complete checkpoint there;'
    f' there are [7, 10] in {workdir}'
  )


@pytest.mark.parametrize('path', ['', 'none', 'file', 'checkpoints/3'])
def test_no_checkpoint_to_find(tmp_path, path):
  (tmp_path / 'file').write_text('')
  assert checkpoint.steps(str(tmp_path / path)) == []
  with pytest.raises(config.ConfigError, match='no complete checkpoint there'):
    checkpoint.find(str(tmp_path / path))


def test_another_format_is_refused(tmp_path):
  _save(tmp_path, tiny.cfg(), {7: dict(x=jnp.ones(2))})
  path = tmp_path / 'checkpoints' / '7' / 'about' / 'metadata'
  about = json.loads(path.read_text())
  path.write_text(json.dumps(about | dict(format=checkpoint.FORMAT + 1)))
  with pytest.raises(config.ConfigError) as error:
    checkpoint.about(str(tmp_path), 7)
  assert str(error.value) == (
    f'--train.workdir={tmp_path}: checkpoint 7 has format 2, this program reads'
    ' 1'
  )


def _read_all(workdir):
  checkpoint.about(str(workdir), 7)
  x = jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=jnp.ones(1).sharding)
  return checkpoint.restore(str(workdir), 7, dict(x=x))


@pytest.mark.parametrize(
  'name, damage',
  [
    *itertools.product(
      ['about/metadata', 'state/manifest.ocdbt', 'data'],
      ['missing', 'empty', 'half'],
    ),
    ('state/_METADATA', 'empty'),  # orbax does without it, not with half of it
    ('state/_METADATA', 'half'),
  ],
)
def test_a_damaged_checkpoint_is_one_line(tmp_path, name, damage):
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
  with pytest.raises(config.ConfigError) as error:
    _read_all(tmp_path)
  line = str(error.value)
  assert line.startswith(f'--train.workdir={folder}: cannot be read')
  assert '\n' not in line
