"""Files of an earlier mtp_jax are readable: stores, a run, its flags, exports."""

import json
import tarfile

import jax
import numpy as np
import pytest

from mtp_jax.checkpoint import metadata, restore
from mtp_jax.cli import main
from mtp_jax.interop import hf_folder
from mtp_jax.parallel import sharding
from tests import golden
from tests.support import runs


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  top = tmp_path_factory.mktemp('kept')
  with tarfile.open(golden.KEPT) as tar:
    tar.extractall(top, filter='data')
  return top


def _params(workdir, step):
  cfg = metadata.read(str(workdir), step).cfg
  return jax.device_get(restore.restore_model(str(workdir), step, cfg, sharding.make_mesh(cfg)))


@pytest.mark.parametrize('form', golden.FORMS)
def test_golden_exports_hold_the_golden_parameters(kept, form):
  cfg, ours = hf_folder.find(str(kept / form), {})
  assert ours
  back = hf_folder.read(str(kept / form), cfg, sharding.make_mesh(cfg))
  wanted = _params(kept / 'run', 3)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), wanted)


def test_golden_run_resumes_from_its_run_flags(kept):
  assert kept.joinpath('run/run.flags').is_file()
  assert (
    main.main(
      [
        'train',
        f'--flagfile={kept}/run/run.flags',
        f'--train.workdir={kept}/run',
        f'--data.store={golden.mixture(kept)}',
        '--train.steps=6',
      ]
    )
    == 0
  )
  expected = json.loads((kept / 'expected.json').read_text())['losses']
  for record in runs.records(kept / 'run'):
    if record['kind'] == 'train' and record['step'] > 3:
      wanted = expected[str(record['step'])]
      np.testing.assert_allclose(record['loss'], wanted, rtol=1e-5)
