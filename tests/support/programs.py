"""Runs with equal programs share them, within a module of tests and with the next ones.

Tracing, lowering and compiling was three quarters of a tiny run, and most tests
of the loop start several that differ in nothing but their workdir. That a run
traced and compiled anew in another process ends with the same bits is what
tests that start processes show.
"""

import numpy as np
import pytest

from mtp_jax.config import schema

# Flags that the programs of a run depend on, though its result may not (another
# kernel), or only by them (a learning rate that falls until the last step).
OF_A_PROGRAM = {*schema.fixed(), 'model.attention', 'train.steps'}
OF_NO_PROGRAM = {'data.tokenizer', 'train.init_from', 'loss.teacher'}


def _key(cfg: schema.Config) -> tuple:
  """Of the programs of a Config."""
  names = OF_A_PROGRAM - OF_NO_PROGRAM
  if cfg.optim.schedule == 'constant':
    names -= {'train.steps'}
  return tuple((name, schema.get(cfg, name)) for name in sorted(names))


class _Lowered:
  """A jax.stages.Traced that is lowered and compiled once."""

  def __init__(self, traced):
    self._traced, self._compiled = traced, None

  def lower(self):
    return self

  def compile(self):
    self._compiled = self._compiled or self._traced.lower().compile()
    return self._compiled


_PROGRAMS = {}  # the one used last at the end
KEPT = 12  # programs that the next module may use again


def _once(key: tuple, make):
  _PROGRAMS[key] = _PROGRAMS.pop(key) if key in _PROGRAMS else make()
  return _PROGRAMS[key]


def drop_old() -> None:
  for key in [*_PROGRAMS][:-KEPT]:
    del _PROGRAMS[key]


@pytest.fixture(scope='session', autouse=True)
def shared_programs():
  """What the loop compiles is found again by the next run that needs it."""
  # Here, so that tests of flags run without the libraries of the loop.
  try:
    from mtp_jax.evals import heldout
    from mtp_jax.train import loop, state, step
  except ImportError:
    yield
    return

  trace, evaluator, init = step.trace, heldout.evaluator, state.init_program

  def shared_trace(cfg, mesh, n_active, masked=False, teacher=None):
    return _once(
      ('step', _key(cfg), mesh, n_active, masked, teacher),
      lambda: _Lowered(trace(cfg, mesh, n_active, masked, teacher)),
    )

  def shared_evaluator(cfg, mesh, bytes_V, calibrated=False):
    key = 'eval', _key(cfg), mesh, np.asarray(bytes_V).tobytes(), calibrated
    return _once(key, lambda: evaluator(cfg, mesh, bytes_V, calibrated))

  def shared_init(cfg, was):
    return _once(('init', _key(cfg), was and _key(was)), lambda: init(cfg, was))

  class Step:  # to the loop alone; others look at what is traced
    trace = staticmethod(shared_trace)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'step_lib', Step)
    patch.setattr(heldout, 'evaluator', shared_evaluator)
    patch.setattr(state, 'init_program', shared_init)
    yield


def clear() -> None:
  _PROGRAMS.clear()


@pytest.fixture
def own_programs():
  """For a test that changes what they are made of."""
  clear()
  yield
  clear()
