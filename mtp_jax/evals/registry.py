"""Registry of the suites of `--eval.tasks`.

A suite is requested as NAME or NAME:ARG. To add one, write a module with `check`
and `run` (see suites.py) and register it here.
"""

import functools

from mtp_jax.config import fields, schema
from mtp_jax.evals import (
  acceptance,
  choice_points,
  code,
  gsm8k,
  harness,
  induction,
  problems,
  stories,
  suites,
  synthetic,
)

HELDOUT = 'heldout'  # the run's own store, window by window; see heldout.py

SUITES = {
  'acceptance': suites.Suite(acceptance.check, acceptance.run),
  'choice_points': suites.Suite(choice_points.check, choice_points.run),
  'gsm8k': suites.Suite(gsm8k.check, gsm8k.run),
  'induction': suites.Suite(induction.check, induction.run),
  'lm_eval': suites.Suite(harness.check, harness.run),
  'stories': suites.Suite(stories.check, stories.run),
  **{
    name: suites.Suite(
      functools.partial(synthetic.check, name), functools.partial(synthetic.run, name)
    )
    for name in ('star_graph', 'polynomial')
  },
  **{
    name: suites.Suite(functools.partial(code.check, name), functools.partial(code.run, name))
    for name in problems.FORMATS
  },
}


def selected(cfg: schema.CommandConfig) -> list[tuple[str, str]]:
  """Returns (name, argument) of each requested suite, after checking it.

  Raises:
    ConfigError: an unknown name, or a bad argument or flag.
  """
  found = []
  for name, arg in named(cfg):
    entry = label(name, arg)
    if name == HELDOUT and arg:
      raise fields.ConfigError('eval.tasks', entry, f'{HELDOUT} takes no argument')
    if name not in SUITES and name != HELDOUT:
      raise fields.ConfigError(
        'eval.tasks', entry, f'NAME or NAME:ARG with NAME one of: {", ".join([HELDOUT, *SUITES])}'
      )
    if (name, arg) in found:
      raise fields.ConfigError('eval.tasks', entry, 'duplicate')
    if name in SUITES:
      SUITES[name].check(arg, cfg)
    found.append((name, arg))
  return found


def named(cfg: schema.CommandConfig) -> list[tuple[str, str]]:
  """Returns (name, argument) of each requested suite, unchecked."""
  entries = (entry.strip() for entry in cfg.eval.tasks.split(','))
  return [(e.partition(':')[0], e.partition(':')[2]) for e in entries]


def label(name: str, arg: str) -> str:
  return f'{name}:{arg}' if arg else name
