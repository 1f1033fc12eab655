"""Eight virtual CPU devices, strict ranks, and one tiny store for all tests."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8'
  # Half the compile time; these programs run for milliseconds.
  + ' --xla_backend_optimization_level=0'
)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  """Equal programs are compiled once a session, not once a test."""
  folder = str(tmp_path_factory.mktemp('xla'))
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
  yield folder
