"""The launch scripts: what they set, and that the compilers know it."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from mtp_jax.planning import nvidia
from tests.support import ahead, runs

LAUNCH = pathlib.Path(runs.ROOT) / 'launch'
VARIABLES = dict(tpu='LIBTPU_INIT_ARGS', gpu='XLA_FLAGS')
TOPOLOGY = """
from jax.experimental import topologies
topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')
"""


def _bash(command, *, path='', **variables):
  return subprocess.run(
    ['bash', '-euo', 'pipefail', '-c', command],
    cwd=runs.ROOT,
    text=True,
    capture_output=True,
    env=dict(PATH=f'{path}:/usr/bin:/bin', **variables),
  )


def _flags(platform, **kwargs):
  """(LIBTPU_INIT_ARGS, XLA_FLAGS) that xla_flags.sh exports, as lists."""
  done = _bash(
    f'source launch/xla_flags.sh {platform}; '
    'printenv LIBTPU_INIT_ARGS || echo; printenv XLA_FLAGS || echo',
    **kwargs,
  )
  assert (done.returncode, done.stderr) == (0, '')
  tpu, gpu = (line.split() for line in done.stdout.split('\n')[:2])
  return dict(tpu=tpu, gpu=gpu)


@pytest.fixture
def machine(tmp_path):
  """make(devices, nvidia) -> variables of a machine that has these."""

  def make(devices=(), nvidia=None):
    for name in devices:
      device = tmp_path / 'dev' / name
      device.parent.mkdir(parents=True, exist_ok=True)
      device.touch()
    if nvidia is not None:
      program = tmp_path / 'nvidia-smi'
      program.write_text(f'#!/bin/sh\nexit {nvidia}\n')
      program.chmod(0o755)
    return dict(path=str(tmp_path), dev=str(tmp_path / 'dev'))

  return make


@pytest.mark.parametrize('script', sorted(LAUNCH.glob('*.sh')), ids=lambda p: p.name)
def test_scripts_are_bash(script):
  done = subprocess.run(['bash', '-n', script], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.parametrize('script', ['local.sh', 'processes.sh', 'slurm.sbatch'])
def test_training_scripts_source_the_xla_flags(script):
  text = (LAUNCH / script).read_text()
  assert re.search(r'^source .*xla_flags\.sh"? auto$', text, re.MULTILINE)


@pytest.mark.parametrize(
  'devices, nvidia, platform',
  [
    (['accel0'], None, 'tpu'),
    (['vfio/0', 'vfio/vfio'], None, 'tpu'),
    (['vfio/vfio'], None, 'cpu'),  # the driver without a device
    ([], 0, 'gpu'),
    ([], 9, 'cpu'),  # the program without a GPU
    ([], None, 'cpu'),
  ],
)
def test_auto_platform_by_devices(machine, devices, nvidia, platform):
  found = _flags('auto', **machine(devices, nvidia))
  assert found == _flags(platform)
  assert {name for name, flags in found.items() if flags} == ({platform} & VARIABLES.keys())


@pytest.mark.parametrize('platform', VARIABLES)
def test_user_environment_is_kept(platform):
  ours = _flags(platform)[platform]
  name = ours[1].removesuffix('=true')
  for given in (f'{name}=false --xla_else=3', f'--xla_else=3 {name}', name):
    found = _flags(platform, **{VARIABLES[platform]: given})[platform]
    assert found == [f for f in ours if f != ours[1]] + given.split()
  longer = f'{name}_of_another_name=1'
  found = _flags(platform, **{VARIABLES[platform]: longer})[platform]
  assert found == [*ours, longer]


def _fractions(platform, **variables):
  """The variables of JAX's share of a GPU's memory after xla_flags.sh."""
  names = ' '.join(nvidia.FRACTION_VARIABLES)
  command = f'source launch/xla_flags.sh {platform}; for v in {names}; do echo "${{!v:-}}"; done'
  done = _bash(command, **variables)
  assert (done.returncode, done.stderr) == (0, '')
  return dict(zip(nvidia.FRACTION_VARIABLES, done.stdout.split('\n'), strict=False))


def test_memory_fraction_is_that_of_plans_and_kept_if_given():
  ours, other = nvidia.FRACTION_VARIABLES
  share = str(nvidia.MEMORY_FRACTION)
  assert _fractions('gpu') == {ours: share, other: ''}
  assert _fractions('gpu', **{ours: '.5'}) == {ours: '.5', other: ''}
  assert _fractions('gpu', **{other: '.5'}) == {ours: '', other: '.5'}  # JAX refuses both
  assert _fractions('tpu') == _fractions('cpu') == {ours: '', other: ''}
  image = (LAUNCH / 'Dockerfile.cuda').read_text()
  assert f'\nENV {ours}={share}\n' in image


def test_gpu_flags_are_those_of_plans():
  assert _flags('gpu')['gpu'] == [f'--{name}=true' for name in nvidia.LAUNCH_FLAGS]


def test_unknown_platform_is_refused():
  done = _bash('source launch/xla_flags.sh npu; echo on')
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == 'xla_flags.sh: auto, tpu, gpu or cpu, not: npu\n'


def _starts(code, **variables):
  return subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    env=os.environ | ahead.VARIABLES | variables,
  )


@pytest.mark.parametrize(
  'platform, code',
  [
    pytest.param(
      'tpu',
      TOPOLOGY,
      marks=pytest.mark.skipif(
        importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed'
      ),
    ),
    ('gpu', 'import jax; jax.devices()'),
  ],
)
def test_compiler_knows_each_xla_flag(platform, code):
  """One that it does not know ends it at the start."""
  flags = ' '.join(_flags(platform)[platform])
  done = _starts(code, **{VARIABLES[platform]: flags})
  assert done.returncode == 0, done.stderr
  wrong = _starts(code, **{VARIABLES[platform]: flags + ' --xla_no_such=true'})
  assert wrong.returncode != 0 and 'xla_no_such' in wrong.stderr
