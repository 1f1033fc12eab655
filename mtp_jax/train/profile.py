"""Traces the steps of --train.profile_start, profile_steps with jax.profiler."""

import contextlib
import os

import jax

from mtp_jax.config import schema
from mtp_jax.io import paths
from mtp_jax.parallel import distributed


@contextlib.contextmanager
def profile(cfg: schema.Config):
  """Yields at(step, state), to be called before each step, which starts and stops
  the trace; a run that starts or ends within the range traces its part."""
  t, tracing = cfg.train, False
  n_steps = t.profile_steps if distributed.is_primary() else 0
  wanted = range(t.profile_start, t.profile_start + n_steps)

  def at(step, state):
    nonlocal tracing
    if tracing and step not in wanted:
      jax.block_until_ready(state)  # dispatched steps may still run
      jax.profiler.stop_trace()
    elif not tracing and step in wanted:
      jax.profiler.start_trace(folder)
    tracing = step in wanted

  with paths.local(os.path.join(t.workdir, 'profile')) as folder:
    try:
      yield at
    finally:
      if tracing:
        jax.profiler.stop_trace()
