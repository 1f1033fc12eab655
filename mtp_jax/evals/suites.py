"""The evaluators of `--eval.suite`, one protocol. Floor 4.

A suite is asked for as NAME or NAME:ARG. To add one, write a file with its
`check` and `run` and name it in SUITES.
"""

from collections.abc import Callable
from typing import NamedTuple

from mtp_jax import config
from mtp_jax.evals import subject as subject_lib

HELDOUT = 'heldout'  # the run's own store, window by window; see heldout.py


class Result(NamedTuple):
  """What a suite found.

  A scalar NAME may have NAME_low and NAME_high beside it: its interval.
  """

  lines: list[str]  # for a reader
  scalars: dict[str, float]  # by flat names, recorded while training
  items: list[dict] = []  # noqa: RUF012 each item asked, for --out


class Suite(NamedTuple):
  """check(arg, cfg) raises ConfigError before anything is loaded;
  run(subject, arg) -> Result, with subject.cfg.eval as the flags say."""

  check: Callable[[str, config.Config], None]
  run: Callable[[subject_lib.Subject, str], Result]


SUITES: dict[str, Suite] = {}


def asked(cfg: config.Config) -> list[tuple[str, str]]:
  """(name, argument) of each suite of --eval.suite.

  Raises:
    ConfigError: there is none of this name, or its argument or flags are wrong.
  """
  found = []
  for entry in cfg.eval.suite.split(','):
    name, _, arg = entry.strip().partition(':')
    if name not in SUITES and (name != HELDOUT or arg):
      raise config.ConfigError(
        'eval.suite', entry,
        f'NAME or NAME:ARG with NAME one of: {", ".join([HELDOUT, *SUITES])}',
      )  # fmt: skip
    if (name, arg) in found:
      raise config.ConfigError('eval.suite', entry, 'is there twice')
    if name in SUITES:
      SUITES[name].check(arg, cfg)
    found.append((name, arg))
  return found
