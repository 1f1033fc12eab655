"""The interface of the suites of `--eval.tasks`."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from mtp_jax.config import schema
from mtp_jax.evals import subject as subject_lib
from mtp_jax.io import paths


class Result(NamedTuple):
  """The result of a suite.

  NAME_low and NAME_high are the bounds of the interval of a scalar NAME.
  """

  lines: list[str]  # human-readable
  scalars: dict[str, float]  # flat names, logged during training
  items: list[dict] = []  # noqa: RUF012 one per example, for --out
  pages: dict[str, str] = {}  # noqa: RUF012 file name -> contents, written to the run directory


class Suite(NamedTuple):
  """check(arg, cfg) raises ConfigError before anything is loaded;
  run(subject, arg) -> Result, with the flags in subject.cfg.eval."""

  check: Callable[[str, schema.CommandConfig], Any]
  run: Callable[[subject_lib.Subject, str], Result]


def write_pages(workdir: str, step: int, pages: dict[str, str]) -> list[str]:
  """Writes pages to WORKDIR/evals/STEP; returns lines with their paths."""
  folder = os.path.join(workdir, 'evals', str(step))
  if pages:
    paths.make_folder(folder)
  for name, text in pages.items():
    paths.write(os.path.join(folder, name), text.encode())
  return [f'page: {os.path.join(folder, name)}' for name in pages]
