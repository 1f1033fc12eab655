"""Libraries of the extra [parity], the judges of tests that are marked so.

Where they are missing those tests are skipped, with the reason (conftest.py).
"""

import importlib
import importlib.util

import pytest

NAMES = ('torch', 'transformers', 'accelerate', 'xllamacpp')
MISSING = [name for name in NAMES if importlib.util.find_spec(name) is None]
REASON = f'needs {", ".join(MISSING)}: launch/test.sh --parity installs it'


def library(name: str):
  """The module; None where it is missing, for tests that will be skipped."""
  return importlib.import_module(name) if not MISSING else None


def marked(rows: list, needs) -> list:
  """Rows of parametrize; those of which needs(row) holds are of parity."""
  return [pytest.param(*row, marks=pytest.mark.parity) if needs(row) else row for row in rows]
