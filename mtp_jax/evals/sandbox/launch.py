"""Runs untrusted, model-generated programs.

`full`: each program runs as user nobody in its own process, user, network, IPC
and mount namespaces, with an empty /tmp and a read-only Python: no other file,
no network, no capability, no other process. Time, memory, processes, files and
output are limited. Nothing outlives the run. `weak`: a session, limits per
process and an empty folder; no protection against malicious programs.

A program with tests passes if its process, after the last test, sends back a
token that it receives only then; exit() before that is a failure, and so is any
other message. Program and tests share the process, as in the official programs
of these benchmarks: a program written to deceive the tests (objects equal to all
others, redefined built-ins, this protocol) passes.
"""

import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mtp_jax.config import fields
from mtp_jax.evals.sandbox import seccomp

FOLDER = os.path.dirname(os.path.abspath(__file__))
SUPERVISOR, RUNNER = (os.path.join(FOLDER, f) for f in ('supervisor.py', 'runner.py'))
OUTCOMES = ('passed', 'failed', 'timeout', 'memory', 'output')
TAIL = 2000  # characters of stderr to keep
SLACK_S = 30  # seconds over the time limit after which the supervisor is killed


class Program(NamedTuple):
  """A program: source, then tests, in one namespace."""

  source: str
  tests: str = ''  # '' = exit status 0 passes
  stdin: str = ''
  wall_s: float = 10.0


class Limits(NamedTuple):
  """Resource limits of one run."""

  memory_mib: int = 1024  # of all its processes (weak: per process, plus 1 GiB)
  processes: int = 32  # including threads; full only
  work_mib: int = 64  # of its folder; full only
  file_mib: int = 16
  files: int = 64  # open files
  output_mib: int = 8  # of stdout and of stderr, each


class Ended(NamedTuple):
  """The outcome of a run."""

  outcome: str  # one of OUTCOMES
  status: int | None  # exit status, or minus the signal; None = it was killed
  out: str
  err: str  # its last TAIL characters
  seconds: float


class Refused(Exception):
  """Raised if the system lacks what a sandbox needs; states what."""


def run(program: Program, kind: str, limits: Limits = Limits()) -> Ended:  # noqa: B008
  """Runs a program in a sandbox of kind `full` or `weak`.

  Raises:
    Refused: the sandbox cannot be created, after three attempts.
  """
  for pause_s in (1, 5):  # a busy machine may be out of processes
    try:
      return _run(program, kind, limits)
    except (Refused, OSError):
      time.sleep(pause_s)
  return _run(program, kind, limits)


def _run(program: Program, kind: str, limits: Limits) -> Ended:
  with open(RUNNER) as f:
    runner = f.read()
  spec = dict(
    program._asdict(),
    **limits._asdict(),
    full=kind == 'full',
    runner=runner,
    filter=seccomp.packed().hex(),
  )
  kept = ('PATH', 'LD_LIBRARY_PATH')
  with _folder(kind) as folder:
    process = subprocess.Popen(
      _command(),
      cwd=folder,
      start_new_session=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env={k: os.environ[k] for k in kept if k in os.environ},
    )
    _running.add(process)
    try:
      out, err = process.communicate(json.dumps(spec).encode(), timeout=program.wall_s + SLACK_S)
    except subprocess.TimeoutExpired:
      return Ended('timeout', None, '', '', program.wall_s + SLACK_S)
    finally:
      process.kill()  # the kernel then kills all its processes
      process.wait()
      _running.discard(process)
  found: dict[str, Any] = json.loads(out) if out else dict(error=err.decode()[-TAIL:].strip())
  if 'error' not in found:
    found['err'] = found['err'][-TAIL:]
    return Ended(**found)
  if found['error']:
    raise Refused(found['error'])
  return Ended('failed', None, '', 'it killed its supervisor', 0.0)


def _folder(kind: str):
  """Returns the working directory of the supervisor; a full sandbox mounts its own."""
  if kind == 'full':
    return contextlib.nullcontext('/')
  return tempfile.TemporaryDirectory(prefix='mtp-run-', ignore_cleanup_errors=True)


def _command() -> list[str]:
  python = os.path.realpath(getattr(sys, '_base_executable', sys.executable))
  return [python, '-I', '-S', '-B', '-X', 'utf8', SUPERVISOR]


def together(judge: Callable, items: Sequence, report: Callable) -> list:
  """Returns judge(item) for each item, with as many threads as there are CPUs.

  An exception, as of a signal, kills the running programs: their time limits may
  be longer than the time left to a preempted machine.
  """
  found, workers = [], len(os.sched_getaffinity(0))
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    futures = [pool.submit(judge, item) for item in items]
    try:
      for future in futures:
        found.append(future.result())
        report(f'{len(found):,} of {len(items):,} programs judged')
    except BaseException:
      for future in futures:
        future.cancel()
      while not all(future.done() for future in futures):
        for process in [*_running]:  # another one may just be starting
          process.kill()
        time.sleep(0.05)
      raise
  return found


_running: set[subprocess.Popen] = set()


PROBE = """
import os, threading
threads = [threading.Thread(target=os.getpid) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
"""


def check(kind: str) -> None:
  """Checks the sandbox with a trusted program.

  Raises:
    ConfigError: the program could not run.
  """
  try:
    if sys.platform != 'linux':
      raise Refused('requires Linux')
    ended = _run(Program(PROBE, 'assert threads'), kind, Limits())
    if ended.outcome != 'passed':
      raise Refused(f'a test program {ended.outcome}: {ended.err[-200:]}')
  except (Refused, OSError) as e:
    hint = (
      '; in a disposable container or machine, --eval.sandbox=weak runs programs without one'
      if kind == 'full'
      else ''
    )
    raise fields.ConfigError(
      'eval.sandbox', kind, f'not supported by this system ({e}){hint}'
    ) from e
