"""TODO of mtp_jax.train.loop."""

import contextlib
import os

import jax

from mtp_jax.config import schema
from mtp_jax.io import paths
from mtp_jax.parallel import distributed


@contextlib.contextmanager
def profile(cfg: schema.Config):
  """at(step, state), called before each step, traces those of the profile; a
  run that begins or ends among them traces what it has of them."""
  t, tracing = cfg.train, False
  n_steps = t.profile_steps if distributed.is_primary() else 0
  wanted = range(t.profile_start, t.profile_start + n_steps)

  def at(step, state):
    nonlocal tracing
    if tracing and step not in wanted:
      jax.block_until_ready(state)  # dispatched is not yet done
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
