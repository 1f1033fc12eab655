"""Runs programs that nobody has read. Floor 4.

`full`: each has a process, user, network, IPC and mount namespace of its own,
as nobody, with an empty /tmp and, read-only, Python: no other file, no network,
no capability, no other process. Limits of time, memory, processes, files and
output. Nothing of it outlives its run. `weak`: a session, limits for each
process and an empty folder; no protection from a program that means harm.

A program with tests has passed when its own process, after the last test, sends
back a token that it is given only then; exit() before them is a failure, and so
is anything else that is sent. Program and tests share that process, as in the
official programs of these benchmarks: one that was written to deceive the tests
(objects equal to all others, redefined built-ins, this protocol) passes.
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
from typing import NamedTuple

from mtp_jax.config import fields
from mtp_jax.evals.sandbox import seccomp as filter_lib

FOLDER = os.path.dirname(os.path.abspath(__file__))
KEEPER, DRIVER = (os.path.join(FOLDER, f) for f in ('keeper.py', 'driver.py'))
OUTCOMES = ('passed', 'failed', 'timeout', 'memory', 'output')
TAIL = 2000  # characters of stderr that are kept
SLACK_S = 30  # the keeper itself is ended after that much more than the limit


class Program(NamedTuple):
  """What is run: source, then tests, in one namespace."""

  source: str
  tests: str = ''  # without any, exit status 0 is a pass
  stdin: str = ''
  wall_s: float = 10.0


class Limits(NamedTuple):
  """Of one run."""

  memory_mib: int = 1024  # of all its processes (weak: of each, and 1 GiB more)
  processes: int = 32  # and threads; full only
  work_mib: int = 64  # of its folder; full only
  file_mib: int = 16
  files: int = 64  # open at once
  output_mib: int = 8  # of stdout, and of stderr


class Ended(NamedTuple):
  """What became of a program."""

  outcome: str  # one of OUTCOMES
  status: int | None  # of exit, or minus the signal; None = it was ended
  out: str
  err: str  # its last TAIL characters
  seconds: float


class Refused(Exception):
  """The system does not give what a sandbox needs; says what."""


def run(program: Program, kind: str, limits: Limits = Limits()) -> Ended:  # noqa: B008
  """Runs it, by kind `full` or `weak`.

  Raises:
    Refused: its surroundings cannot be made, three times.
  """
  for pause_s in (1, 5):  # a busy machine may have no process left
    try:
      return _run(program, kind, limits)
    except (Refused, OSError):
      time.sleep(pause_s)
  return _run(program, kind, limits)


def _run(program: Program, kind: str, limits: Limits) -> Ended:
  with open(DRIVER) as f:
    driver = f.read()
  spec = dict(
    program._asdict(),
    **limits._asdict(),
    full=kind == 'full',
    driver=driver,
    filter=filter_lib.packed().hex(),
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
      process.kill()  # and with it, by the kernel, all that it keeps
      process.wait()
      _running.discard(process)
  found = json.loads(out) if out else dict(error=err.decode()[-TAIL:].strip())
  if 'error' not in found:
    found['err'] = found['err'][-TAIL:]
    return Ended(**found)
  if found['error']:
    raise Refused(found['error'])
  return Ended('failed', None, '', 'it killed its keeper', 0.0)


def _folder(kind: str):
  """Where the keeper starts; a full one mounts a folder of its own."""
  if kind == 'full':
    return contextlib.nullcontext('/')
  return tempfile.TemporaryDirectory(prefix='mtp-run-', ignore_cleanup_errors=True)


def _command() -> list[str]:
  python = os.path.realpath(getattr(sys, '_base_executable', sys.executable))
  return [python, '-I', '-S', '-B', '-X', 'utf8', KEEPER]


def together(judge: Callable, items: Sequence, say: Callable) -> list:
  """judge(item) of each, as many at once as there are processors.

  What ends this, such as a signal, ends the programs that run: their limits of
  time may be longer than a machine that is taken away has left.
  """
  found, workers = [], len(os.sched_getaffinity(0))
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    futures = [pool.submit(judge, item) for item in items]
    try:
      for future in futures:
        found.append(future.result())
        say(f'{len(found):,} of {len(items):,} programs judged')
    except BaseException:
      for future in futures:
        future.cancel()
      while not all(future.done() for future in futures):
        for process in [*_running]:  # one more may have been about to start
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
  """Runs a program that does no harm.

  Raises:
    ConfigError: it could not, so no other will.
  """
  try:
    if sys.platform != 'linux':
      raise Refused('it is not Linux')
    ended = _run(Program(PROBE, 'assert threads'), kind, Limits())
    if ended.outcome != 'passed':
      raise Refused(f'a first program {ended.outcome}: {ended.err[-200:]}')
  except (Refused, OSError) as e:
    hint = (
      '; in a container or machine that may be lost, --eval.sandbox=weak runs programs without one'
      if kind == 'full'
      else ''
    )
    raise fields.ConfigError(
      'eval.sandbox', kind, f'this system does not give one ({e}){hint}'
    ) from e
