"""Mutation testing: one fault at a time, in a copy of the tree.

  python -m tests.mutants            all; docs/mutants.md is written
  python -m tests.mutants NAME …     some; their rows there are
  python -m tests.mutants -j 2       two at a time

First all tests that are to notice must pass without a fault. A fault that its
tests do not notice names a test that is missing; exit status 1.
"""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from tests import mutations

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ('mtp_jax', 'tests', 'experiments', 'launch', 'pyproject.toml', 'setup.cfg')
REPORT = ROOT / 'docs' / 'mutants.md'
TIMEOUT_S = 1800.0


class Outcome(NamedTuple):
  """The result of one test run: pytest's exit status and the failed test."""

  status: int | None  # None: out of time
  failed: str
  seconds: float
  output: str

  @property
  def killed(self) -> bool:
    """1 is a failed test, or time; another is a broken run, e.g. no test."""
    return self.status in (1, None)

  @property
  def skipped(self) -> bool:
    """Whether no test ran, e.g. as PyTorch is missing: neither detected nor survived."""
    return not self.killed and ' skipped' in self.output and ' passed' not in self.output


def run_tests(tree: pathlib.Path, tests: tuple[str, ...]) -> Outcome:
  """Runs pytest in a tree up to the first failure."""
  environment = dict(
    os.environ,
    PYTHONPATH=str(tree),
    # A fault of the same length within a second would meet the old bytecode.
    PYTHONDONTWRITEBYTECODE='1',
  )
  begin = time.perf_counter()
  command = [sys.executable, '-m', 'pytest', '-x', '-p', 'no:cacheprovider']
  try:
    done = subprocess.run(
      [*command, *tests],
      cwd=tree,
      env=environment,
      text=True,
      capture_output=True,
      timeout=TIMEOUT_S,
    )
    status, output = done.returncode, done.stdout + done.stderr
  except subprocess.TimeoutExpired:
    status, output = None, 'out of time'
  failed = re.search(r'^FAILED ([\w/.]+::\w+)', output, re.M)
  return Outcome(status, failed[1] if failed else '', time.perf_counter() - begin, output)


def replaced(whole: str, fault: mutations.Fault) -> str:
  """Returns the file's text with the fault in it.

  Line breaks, spaces between tokens and trailing commas are the formatter's, so
  they are not compared.

  Raises:
    ValueError: the fault's old text does not occur exactly once.
  """
  pattern = r'\s*'.join(
    (r',?\s*' if token in ')]}' else '') + re.escape(token)
    for token in re.findall(r'\w+|[^\w\s]', fault.old)
  )
  # Matches whole words: `n` does not match in `new`.
  left = r'(?<!\w)' if re.match(r'\w', fault.old.strip()) else ''
  right = r'(?!\w)' if re.search(r'\w$', fault.old.strip()) else ''
  found = list(re.finditer(left + pattern + right, whole))
  if len(found) != 1:
    raise ValueError(f'{fault.name}: {len(found)} times: {fault.old!r}')
  return whole[: found[0].start()] + fault.new.strip() + whole[found[0].end() :]


def with_fault(tree: pathlib.Path, fault: mutations.Fault) -> Outcome:
  """Runs a fault's tests in a tree with the fault applied, then reverts it."""
  path = tree / fault.file
  whole = path.read_text()
  path.write_text(replaced(whole, fault))
  try:
    return run_tests(tree, fault.tests)
  finally:
    path.write_text(whole)


def copy_tree(to: pathlib.Path) -> pathlib.Path:
  to.mkdir(parents=True)
  for name in COPIED:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns('__pycache__'))
    else:
      shutil.copy(ROOT / name, to / name)
  return to


def in_trees(trees: list[pathlib.Path], function, items):
  """(item, function(tree, item)) as they end, one at a time in each tree."""
  free = queue.SimpleQueue()
  for tree in trees:
    free.put(tree)

  def in_a_tree(item):
    tree = free.get()
    try:
      return item, function(tree, item)
    finally:
      free.put(tree)

  with concurrent.futures.ThreadPoolExecutor(len(trees)) as pool:
    waiting = [pool.submit(in_a_tree, item) for item in items]
    for done in concurrent.futures.as_completed(waiting):
      yield done.result()


def _cells(fault: mutations.Fault, outcome: Outcome) -> list[str]:
  killer = {1: outcome.failed, None: 'out of time', 0: 'SURVIVED'}
  return [
    fault.name,
    mutations.MISTAKES[fault.mistake],
    fault.file.removeprefix('mtp_jax/'),
    'NOT RUN: its tests are skipped here'
    if outcome.skipped
    else killer.get(outcome.status, f'BROKEN, pytest ended with {outcome.status}'),
    f'{outcome.seconds:.0f}',
  ]


def report(before: str, outcomes: dict[mutations.Fault, Outcome]) -> str:
  """Returns the report with these outcomes; rows of other faults are unchanged."""
  rows = {row.split(' | ')[0]: row for row in before.splitlines()}
  for fault, outcome in outcomes.items():
    if outcome.skipped and f'| {fault.name}' in rows:
      continue
    rows[f'| {fault.name}'] = f'| {" | ".join(_cells(fault, outcome))} |'
  names = [f'| {fault.name}' for fault in mutations.FAULTS]
  rows = [rows[name] for name in names if name in rows]
  left = sum(any(word in row for word in ('SURVIVED', 'BROKEN', 'NOT RUN')) for row in rows)
  lines = [
    '# Mutants',
    '',
    'Written by `python -m tests.mutants`, which inserts one fault at a time into a copy of the',
    'tree (`tests/mutations.py` defines them) and runs the tests that should detect it.',
    f'{len(rows) - left} of {len(names)} were detected.',
    '',
    '| fault | mistake | file | detected by | s |',
    '|---|---|---|---|---|',
    *rows,
  ]
  return '\n'.join(lines) + '\n'


def main(args: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m tests.mutants')
  parser.add_argument('names', nargs='*', help='faults; none = all')
  parser.add_argument('-j', type=int, default=1, help='at a time')
  given = parser.parse_args(args)
  unknown = set(given.names) - {fault.name for fault in mutations.FAULTS}
  if unknown:
    parser.error(f'no fault {", ".join(sorted(unknown))}')
  names = given.names or [fault.name for fault in mutations.FAULTS]
  chosen = [fault for fault in mutations.FAULTS if fault.name in names]

  with tempfile.TemporaryDirectory(prefix='mutants-') as folder:
    trees = [copy_tree(pathlib.Path(folder, str(i))) for i in range(given.j)]
    plain = run_tests(trees[0], (f'-n{given.j}', *{t for fault in chosen for t in fault.tests}))
    print(f'{plain.seconds:4.0f} s  without a fault', flush=True)
    if plain.status != 0:
      print(f'{plain.output}\npytest: {plain.status}', file=sys.stderr)
      return 1
    outcomes = {}
    for fault, outcome in in_trees(trees, with_fault, chosen):
      outcomes[fault] = outcome
      *cells, seconds = _cells(fault, outcome)
      print(f'{seconds:>4} s  {"  ".join(cells)}', flush=True)
  before = REPORT.read_text() if REPORT.exists() else ''
  REPORT.write_text(report(before, outcomes))
  not_run = [f.name for f, outcome in outcomes.items() if outcome.skipped]
  left = [f.name for f, o in outcomes.items() if not (o.killed or o.skipped)]
  print(f'{len(outcomes) - len(left) - len(not_run)} of {len(outcomes)} detected')
  if not_run:
    print(f'not run, since their tests are skipped here: {", ".join(not_run)}')
  if left:
    print('not detected: ' + ', '.join(left), file=sys.stderr)
  return 1 if left else 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
