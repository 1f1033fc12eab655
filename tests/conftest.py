"""Eight virtual CPU devices, strict ranks, and one tiny store for all tests."""

import gc
import math
import os
import resource

from mtp_jax.parallel import versions

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    # A fifth of the compile time; these programs run for milliseconds.
    *versions.FAST_COMPILE_FLAGS,
  ]
)

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.support import (
  parity,
  programs,  # noqa: E402
)
from tests.support.programs import own_programs, shared_programs  # noqa: E402, F401

jax.config.update('jax_numpy_rank_promotion', 'raise')

KEPT_BYTES = 2**30  # of a worker; more is given back after a module


def pytest_collection_modifyitems(items):
  if parity.MISSING:
    for item in items:
      if item.get_closest_marker('parity'):
        item.add_marker(pytest.mark.skip(reason=parity.REASON))


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  """Equal programs are compiled once per session, by any of its workers."""
  base = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    base = base.parent  # of all workers
  folder = str(base / 'xla')
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)
  yield folder


@pytest.fixture(scope='module', autouse=True)
def compiled_programs_go():
  """Drops most of a module's programs: keeping all of them took several GiB per worker
  and crashed jaxlib 0.12."""
  yield
  programs.drop_old()
  if _resident_bytes() > KEPT_BYTES:
    jax.clear_caches()
  gc.collect()


def _resident_bytes() -> float:
  try:
    with open('/proc/self/statm') as file:
      return int(file.read().split()[1]) * resource.getpagesize()
  except OSError:  # not Linux
    return math.inf


@pytest.fixture(autouse=True)
def cache_stays(compilation_cache):
  yield  # a command without --train.compilation_cache= writes into one's home
  assert jax.config.jax_compilation_cache_dir == compilation_cache


@pytest.fixture(scope='session')
def store(tmp_path_factory):
  """Path of a token store of some 6,000 bytes; see runs.make_store."""
  from tests.support import runs

  return runs.make_store(str(tmp_path_factory.mktemp('data') / 'store'))


@pytest.fixture(scope='session')
def undisturbed(store, tmp_path_factory):
  """Workdir of a finished run; tests copy it before they change it."""
  from tests.support import runs

  workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
  assert runs.train(store, workdir, train__checkpoint_every=3) == 0
  return workdir
