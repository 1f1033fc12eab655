"""What an evaluator is: the protocol of `--eval.tasks`. Floor 4."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from mtp_jax.config import schema
from mtp_jax.evals import subject as subject_lib
from mtp_jax.io import paths


class Result(NamedTuple):
  """What a suite found.

  A scalar NAME may have NAME_low and NAME_high beside it: its interval.
  """

  lines: list[str]  # for a reader
  scalars: dict[str, float]  # by flat names, recorded while training
  items: list[dict] = []  # noqa: RUF012 each item asked, for --out
  pages: dict[str, str] = {}  # noqa: RUF012 texts of files beside the run


class Suite(NamedTuple):
  """check(arg, cfg) raises ConfigError before anything is loaded;
  run(subject, arg) -> Result, with subject.cfg.eval as the flags say."""

  check: Callable[[str, schema.Config], Any]
  run: Callable[[subject_lib.Subject, str], Result]


def write_pages(workdir: str, step: int, pages: dict[str, str]) -> list[str]:
  """Into WORKDIR/evals/STEP; lines that name the files."""
  folder = os.path.join(workdir, 'evals', str(step))
  if pages:
    paths.make_folder(folder)
  for name, text in pages.items():
    paths.write(os.path.join(folder, name), text.encode())
  return [f'page: {os.path.join(folder, name)}' for name in pages]
