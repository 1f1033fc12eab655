"""A fault-injection campaign: what a run survives, and whether it ends bitwise equal.

  python -m tests.faults                   until there are 300
  python -m tests.faults --faults=80 …     fewer
  python -m tests.faults --kinds=SIGHUP …  of the kinds that have this in them


Each fault is a line of build/faults.jsonl (--out) once the run it fell upon has
been compared; the next call begins after those that are there, and the table in
docs/reliability.md is made of all of them.

Runs of 1, 2 and 4 processes of one mesh of four devices are disturbed at random
(--seed), started again with the same command until they are done, and compared:
parameters, moments and counters of the last step, and every record of
metrics.jsonl, bit for bit with an undisturbed run. A process that has
not ended LIMIT_S after a fault hangs, and one that shows a traceback does not
say in a line what is wrong; both fail the campaign.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.support import runs

TIMEOUT_S = 10  # --distributed.heartbeat_timeout_s
LIMIT_S = 90.0  # of any session to end by itself after a fault
STEPS, EVERY, STEP_S = 24, 3, 0.12
DEVICES = 4
EVAL_EVERY = 4
FLAGS = dict(
  mesh__data=2,
  mesh__fsdp=2,
  model__n_layers=2,
  heads__n=1,
  train__steps=STEPS,
  train__checkpoint_every=EVERY,
  train__max_to_keep=3,
  train__eval_every=EVAL_EVERY,
  train__watchdog_s=60,
  eval__batches=1,
  distributed__heartbeat_timeout_s=TIMEOUT_S,
)

# The program, but no step is shorter than STEP_S: else a run would be over
# before it is disturbed.
# Its lines have 200 scalars more, as those of a run with many heads, and its
# clock is set by the file that CLOCK names, if it does.
CLOCK = 'MTP_FAULTS_CLOCK'
SLOWLY = f"""
import os, sys, time
from mtp_jax.cli import main
from mtp_jax.data import batches as data
from mtp_jax.losses import metrics

now, clock = time.time, os.environ.get('{CLOCK}')

def moved():
  with open(clock) as f:
    return now() + float(f.read() or 0)

if clock:
  time.time = moved
scalars, batches = metrics.scalars, data.train_batches

def many(sums):
  out = scalars(sums)
  return out | {{f'again_{{i}}': out['loss'] for i in range(200)}}

metrics.scalars = many

def slowly(*args):
  for batch in batches(*args):
    time.sleep({STEP_S})
    yield batch

data.train_batches = slowly
sys.exit(main.main(sys.argv[1:]))
"""


class Over(Exception):
  """A run finished before it was disturbed."""


class Session(NamedTuple):
  """The processes of one start."""

  store: str
  workdir: pathlib.Path
  logs: pathlib.Path  # folder of one file for each process
  processes: list[subprocess.Popen]
  begun: float

  def running(self) -> list[subprocess.Popen]:
    return [p for p in self.processes if p.poll() is None]

  def check_running(self) -> None:
    """Raises Over if none is."""
    if not self.running():
      raise Over

  def end(self, limit: float = LIMIT_S) -> tuple[list[int], float]:
    """(statuses, seconds until the last one had ended); RuntimeError if one
    hangs, or has shown a traceback."""
    begin = time.monotonic()
    try:
      for p in self.processes:
        p.wait(timeout=max(0.1, begin + limit - time.monotonic()))
    except subprocess.TimeoutExpired as error:
      raise RuntimeError(f'{p.args[-1]} hangs: no end in {limit} s') from error
    finally:
      for p in self.processes:
        p.kill()
    for index in range(len(self.processes)):
      if 'Traceback' in (log := self.log(index)):
        raise RuntimeError(f'{self.workdir}: process {index}\n{log}')
    return [p.returncode for p in self.processes], time.monotonic() - begin

  def log(self, index: int) -> str:
    return (self.logs / f'{index}.log').read_text(errors='replace')


def start(store: str, workdir: pathlib.Path, n: int, logs: pathlib.Path, of=()) -> Session:
  """`of`: a command that starts the processes in a place of their own."""
  logs.mkdir(exist_ok=True)
  clock = logs / 'clock'
  clock.touch()
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  processes = []
  for index in range(n):
    own = dict(
      distributed__coordinator_address=f'localhost:{port}',
      distributed__num_processes=n,
      distributed__process_id=index,
    )
    args = runs.args(store, str(workdir), **FLAGS | (own if n > 1 else {}))
    with open(logs / f'{index}.log', 'w') as log:
      processes.append(
        runs.process(
          ['-c', SLOWLY, 'train', *args],
          devices=DEVICES // n,
          stdout=log,
          stderr=subprocess.STDOUT,
          variables={CLOCK: str(clock)},
          of=of,
        )
      )
  return Session(store, workdir, logs, processes, time.monotonic())


# Faults: each disturbs a session, or files on disk before one, and returns a function
# that repairs it after the session, or None.


def _joined(session: Session) -> bool:
  """Whether jax.distributed is initialized, which may block for minutes; a single
  process has started once it logs a line."""
  n = len(session.processes)
  if n == 1:
    return bool(session.log(0))
  return all('] on ' in session.log(i) for i in range(n))


def _wait(session: Session, rng, joined: bool = True) -> None:
  """Waits for a random moment: compiling, stepping, saving, or before. Raises Over."""
  while joined and session.running() and not _joined(session):
    time.sleep(0.02)
  begin = time.monotonic() if joined else session.begun
  _sleep(session, begin + rng.uniform(0, 8) - time.monotonic())
  session.check_running()


def _sleep(session: Session, seconds: float) -> None:
  """Unless it ends before."""
  until = time.monotonic() + seconds
  while time.monotonic() < until and session.running():
    time.sleep(0.02)


def _sigterm_first(session: Session) -> None:
  """To one process, if any is running; all of them stop."""
  for p in session.running()[:1]:
    p.send_signal(signal.SIGTERM)


def _sigterm_later(session: Session, rng) -> None:
  _sleep(session, rng.uniform(2, 6))
  _sigterm_first(session)


def kill_one(session, rng):
  _wait(session, rng)
  rng.choice(session.processes).kill()


def kill_all(session, rng):
  _wait(session, rng, joined=False)
  for p in session.processes:
    p.kill()


def kill_in_save(session, rng):
  """As soon as the folder of an unfinished save is there, but for those that
  earlier kills have left."""
  skip, folder = rng.randrange(3), session.workdir / 'checkpoints'

  def unfinished():
    found = folder.iterdir() if folder.is_dir() else ()
    return {p.name for p in found if 'tmp' in p.name}

  left, seen = unfinished(), set()
  while session.running() and len(seen) <= skip:
    seen |= unfinished() - left
    time.sleep(0.001)
  session.check_running()
  for p in session.processes:
    p.kill()


def sigterm_one(session, rng):
  _wait(session, rng)
  rng.choice(session.processes).send_signal(signal.SIGTERM)


def sighup_one(session, rng):
  """As a terminal that closes sends it."""
  _wait(session, rng)
  rng.choice(session.processes).send_signal(signal.SIGHUP)


def sigterm_in_evaluation(session, rng):
  """At the log line of a step after which it evaluates: saved or not, the next
  start makes up for what is missing."""
  at = rng.randrange(1, STEPS // EVAL_EVERY + 1) * EVAL_EVERY
  while session.running() and f'step {at}/{STEPS}' not in session.log(0):
    time.sleep(0.005)
  time.sleep(rng.uniform(0, 0.2))
  session.check_running()
  rng.choice(session.processes).send_signal(signal.SIGTERM)


def limit_files(session, rng):
  """EFBIG: process 0 may write no file of more than some KiB, which checkpoints
  or lines then have."""
  _wait(session, rng)
  size = rng.choice((1, 16, 64)) * 2**10
  with contextlib.suppress(ProcessLookupError):
    resource.prlimit(session.processes[0].pid, resource.RLIMIT_FSIZE, (size, size))
  _sigterm_later(session, rng)


def freeze_one(session, rng):
  """Freezes a process, which keeps its connections but does not respond."""
  _wait(session, rng)
  frozen = rng.choice(session.processes)
  frozen.send_signal(signal.SIGSTOP)
  others = [p for p in session.processes if p is not frozen]
  limit = time.monotonic() + LIMIT_S
  while any(p.poll() is None for p in others) and time.monotonic() < limit:
    time.sleep(0.05)
  frozen.kill()


def fill_the_disk(session, rng):
  """No space for a checkpoint, or for 200 scalars of a step, for some seconds;
  then a signal stops it. Needs its own file system (small_disk)."""
  _wait(session, rng)
  found = os.statvfs(session.workdir)
  space = found.f_bavail * found.f_frsize - rng.choice((0, 2**16))
  ballast = session.workdir.parent / 'ballast'
  with contextlib.suppress(OSError):  # a save was faster
    ballast.write_bytes(bytes(max(0, space)))
  _sleep(session, rng.uniform(2, 6))
  ballast.unlink()
  _sigterm_first(session)


def move_the_clock(session, rng):
  """By minutes to a year, back or ahead; it stays so for the next session, or
  not."""
  clock = session.logs / 'clock'
  _wait(session, rng)
  clock.write_text(str(rng.choice((-1, 1)) * rng.choice((700, 3e4, 3e7))))
  _sigterm_later(session, rng)
  if rng.random() < 0.5:
    return lambda: clock.write_text('')


def rename_the_workdir(session, rng):
  """The run ends, and writes nothing at the old name."""
  _wait(session, rng)
  workdir = session.workdir
  aside = workdir.with_name('renamed')
  workdir.rename(aside)

  def back():
    if workdir.exists():
      raise RuntimeError(f'{workdir} is there again: {[*workdir.rglob("*")]}')
    aside.rename(workdir)

  return back


def start_in_a_container(session, rng):
  """The same command in another pid namespace of the same host name: it sees a
  lock of a process that it cannot look for, and is refused. Needs root. Not
  while the first one compiles: it touches its lock with each step, and is given
  ten minutes to."""
  while session.running() and 'step ' not in session.log(0):
    time.sleep(0.02)
  _sleep(session, rng.uniform(0, 2))
  session.check_running()
  second = start(session.store, session.workdir, 1, session.logs / 'container', of=CONTAINER)
  statuses, _ = second.end()
  alone = statuses == [2] and 'one run per workdir' in second.log(0)
  if session.running() and not alone:
    raise RuntimeError(f'in a container: {statuses}\n{second.log(0)}')
  _sigterm_later(session, rng)


def change_the_store(session, rng):
  """Another program writes into a shard that the run reads: shorter, or of the
  same size."""
  shards = sorted(pathlib.Path(session.store).glob('train/*.bin'))
  path = rng.choice([p for p in shards if p.stat().st_size])
  whole, stamp = path.read_bytes(), path.stat()
  _wait(session, rng)
  size = rng.choice((0, len(whole) // 2, len(whole)))
  path.write_bytes(bytes(size))

  def back():
    path.write_bytes(whole)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

  return back


FULL = 'a full disk (tmpfs) for some seconds, 200 scalars a step'
IN_CONTAINER = 'a second start in another container'
CONTAINER = ('unshare', '--pid', '--fork', '--kill-child', '--mount-proc')
DURING = {
  'SIGKILL to one process': kill_one,
  'SIGKILL to all processes': kill_all,
  'SIGKILL to all during a save': kill_in_save,
  'SIGTERM to one process': sigterm_one,
  'SIGTERM during an evaluation': sigterm_in_evaluation,
  'SIGHUP to one process': sighup_one,
  'a limit of the size of files (EFBIG)': limit_files,
  'SIGSTOP to one process (it freezes)': freeze_one,
  FULL: fill_the_disk,
  'a clock that jumps': move_the_clock,
  'a renamed workdir': rename_the_workdir,
  IN_CONTAINER: start_in_a_container,
  'a store changed under the run': change_the_store,
}
KILLS = ('SIGKILL',)


def flip_a_byte(workdir, store, rng) -> Callable[[], None]:
  """In the largest files of the newest checkpoint. Returns what mends it: the
  run does that itself."""
  del store
  steps = [p for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()]
  newest = max(steps, key=lambda p: int(p.name))
  files = [p for p in newest.rglob('*') if p.is_file() and p.stat().st_size]
  path = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)
  return lambda: None


def copy_by_halves(workdir, store, rng) -> Callable[[], None]:
  """The newest checkpoint as a copy that broke off: no manifest, and no state
  or half of its files."""
  del store
  newest = max(
    (p for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
  )
  (newest / 'manifest.json').unlink()
  if rng.random() < 0.5:
    shutil.rmtree(newest / 'state')
  else:
    (newest / 'state' / 'manifest.ocdbt').unlink()
  return lambda: None


def truncate_a_shard(workdir, store, rng) -> Callable[[], None]:
  del workdir
  shards = [p for p in pathlib.Path(store).rglob('*.bin') if p.stat().st_size]
  path = rng.choice(sorted(shards))
  whole = path.read_bytes()
  path.write_bytes(whole[: rng.randrange(len(whole))])
  return lambda: path.write_bytes(whole)


ODD = ('run[1]', 'run*', os.fsdecode(b'run\xff'))
PATH = 'brackets, stars or no UTF-8 in the workdir'
BEFORE = {
  'a flipped bit in the newest checkpoint': flip_a_byte,
  'a half-copied newest checkpoint': copy_by_halves,
  'a truncated shard of the store': truncate_a_shard,
  PATH: None,
}


class Row(NamedTuple):
  fault: str
  n: int
  statuses: tuple[int, ...]
  seconds: float  # until all processes had ended


def _checkpoints(workdir: pathlib.Path) -> int:
  folder = workdir / 'checkpoints'
  if not folder.is_dir():
    return 0
  return sum(p.name.isdigit() for p in folder.iterdir())


def _damageable(workdir: pathlib.Path) -> bool:
  """There is a checkpoint to fall back to, and the newest has its manifest:
  a kill before it was hashed would be a second fault."""
  if _checkpoints(workdir) < 2:
    return False
  steps = [p for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()]
  newest = max(steps, key=lambda p: int(p.name))
  return (newest / 'manifest.json').exists()


def _before(store, workdir, n, logs, name, rng) -> Row:
  """Injects a fault on disk: the next session resumes from an older checkpoint or is
  refused in one line; then the fault is repaired."""
  if name == PATH:
    odd = workdir.with_name(rng.choice(ODD))
    row = _refused(start(store, odd, n, logs), name)
    if odd.exists():
      raise RuntimeError(f'{odd!r} was made')
    return row
  mend = BEFORE[name](workdir, store, rng)
  session = start(store, workdir, n, logs)
  if name.startswith('a truncated'):
    row = _refused(session, name)
    mend()
    return row
  limit = time.monotonic() + LIMIT_S
  while session.running() and time.monotonic() < limit and not _detected(session):
    time.sleep(0.05)
  _sleep(session, rng.uniform(0, 6))
  for p in session.processes:
    p.kill()
  statuses, seconds = session.end()
  if not _detected(session):
    raise RuntimeError(f'{name}: not detected\n{session.log(0)}')
  mend()
  return Row(name, n, tuple(statuses), seconds)


def _refused(session, name) -> Row:
  statuses, seconds = session.end()
  if set(statuses) != {2}:
    raise RuntimeError(f'{name}: {statuses}\n{session.log(0)}')
  return Row(name, len(statuses), tuple(statuses), seconds)


def _detected(session) -> bool:
  return any(word in session.log(0) for word in ('resuming from', 'corrupt'))


def disturbed(store, workdir, n, logs, rng, names, say) -> list[Row]:
  """A run, disturbed once a session until it is done; takes what it was
  disturbed by out of names."""
  rows = []

  def fell(row: Row):
    names.remove(row.fault)
    rows.append(row)
    say(row)

  while True:
    if names and names[-1] in BEFORE and _damageable(workdir):
      fell(_before(store, workdir, n, logs, names[-1], rng))
      continue
    session = start(store, workdir, n, logs)
    during = [name for name in names if name in DURING]
    if names and not during:
      while session.running() and not _damageable(workdir):
        time.sleep(0.02)
      for p in session.processes:  # a fault on disk needs a checkpoint
        p.kill()
      session.end()
      if _damageable(workdir):
        continue
    elif during:
      try:
        mend = DURING[during[-1]](session, rng)
      except Over:
        pass
      else:
        statuses, seconds = session.end()
        if mend:
          mend()
        fell(Row(during[-1], n, tuple(statuses), seconds))
        continue
    statuses, _ = session.end(300.0)
    if set(statuses) - {0}:
      raise RuntimeError(f'{workdir}: {statuses}\n{session.log(0)}')
    return rows


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str) -> Iterator[bool]:
  """`folder` as a file system of its own; whether it could be mounted, which
  needs root."""
  folder.mkdir()
  mounted = not subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)], capture_output=True
  ).returncode
  try:
    yield mounted
  finally:
    if mounted:
      subprocess.run(['umount', '--lazy', str(folder)], check=True)


def _state(workdir):
  return runs.restored(workdir, STEPS)


def compare(workdir, reference) -> None:
  runs.assert_same(_state(workdir), _state(reference))
  mine, theirs = runs.records(workdir), runs.records(reference)
  if mine != theirs:
    raise AssertionError(f'{workdir}: metrics.jsonl differs')


def campaign(n_faults: int, seed: int, folder: pathlib.Path, kinds: list[str], say, done) -> None:
  """done(rows) when a run has ended and equals the undisturbed one."""
  rng = random.Random(seed)
  store = runs.make_store(str(folder / 'store'))
  kills = [name for name in DURING if name.startswith(KILLS)]
  wanted = [x for x in [*DURING, *kills, *kills, *BEFORE] if x in kinds]
  plan = [wanted[i % len(wanted)] for i in range(n_faults)]
  rng.shuffle(plan)
  references = {}
  trial = 0
  while plan:
    n = (1, 2, 1, 4)[trial % 4]
    logs = folder / 'logs'
    if n not in references:
      references[n] = folder / f'undisturbed{n}'
      statuses, _ = start(store, references[n], n, logs).end(300.0)
      if set(statuses) != {0}:
        raise RuntimeError(f'undisturbed: {statuses}')
    names = [plan.pop() for _ in range(min(6, len(plan)))]
    disk = folder / f'disk{trial}'
    with small_disk(disk, '64m') as mounted:
      if not mounted:
        names = [name for name in names if name not in (FULL, IN_CONTAINER)]
      rows = disturbed(store, disk / 'run', n, logs, rng, names, say)
      plan = names + plan  # the run was done before them; others come first
      compare(disk / 'run', references[n])
      done(rows)
    disk.rmdir()
    shutil.rmtree(logs)
    trial += 1


def report(rows: list[Row]) -> str:
  kills = sum(row.fault.startswith(KILLS) for row in rows)
  lines = [
    '## Faults',
    '',
    'Written by `python -m tests.faults`: runs of 1, 2 and 4 processes,'
    ' disturbed, started again with the same command until they are done, and'
    ' compared bit for bit (parameters, moments, counters, every record of'
    ' metrics.jsonl)'
    f' with an undisturbed run. {len(rows)} faults, {kills} of them'
    f' kills; --distributed.heartbeat_timeout_s={TIMEOUT_S}.',
    '',
    '| fault | tried | survived | longest until all processes had ended |',
    '|---|---|---|---|',
  ]
  for name in dict.fromkeys([*DURING, *BEFORE]):
    mine = [row for row in rows if row.fault == name]
    if mine:
      longest = max(row.seconds for row in mine)
      lines.append(f'| {name} | {len(mine)} | {len(mine)} | {longest:.1f} s |')
    else:
      lines.append(f'| {name} | 0 | - | - |')
  return '\n'.join(lines) + '\n'


def read(path: pathlib.Path) -> list[Row]:
  """Rows of earlier calls."""
  lines = path.read_text().splitlines() if path.exists() else []
  return [Row(**json.loads(line)) for line in lines]


def main(args: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m tests.faults')
  parser.add_argument('--faults', type=int, default=300, help='in all')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--kinds', default='', help='parts of names, by commas')
  parser.add_argument('--out', type=pathlib.Path, default='build/faults.jsonl')
  given = parser.parse_args(args)
  wanted = given.kinds.split(',')
  kinds = [name for name in [*DURING, *BEFORE] if any(part in name for part in wanted)]
  if not kinds:
    parser.error(f'--kinds={given.kinds}: none of {[*DURING, *BEFORE]}')
  rows, begin = read(given.out), time.monotonic()
  given.out.parent.mkdir(parents=True, exist_ok=True)

  def say(row: Row):
    print(
      f'{time.monotonic() - begin:7.0f} s  {row.n} processes: {row.fault}:'
      f' {list(row.statuses)}, {row.seconds:.1f} s',
      flush=True,
    )

  def done(new: list[Row]):
    rows.extend(new)
    with open(given.out, 'a') as f:
      f.writelines(json.dumps(row._asdict()) + '\n' for row in new)
    runs.write_section('faults', report(rows))

  left = given.faults - len(rows)
  if left > 0:  # another seed, or it would try the same moments again
    with tempfile.TemporaryDirectory() as folder:
      seed = given.seed + len(rows)
      campaign(left, seed, pathlib.Path(folder), kinds, say, done)
  else:
    runs.write_section('faults', report(rows))
  return 0


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
  from mtp_jax.parallel import chips

  chips.answer_libtpu()
  import jax

  jax.config.update('jax_compilation_cache_dir', tempfile.mkdtemp(prefix='mtp_faults'))
  sys.exit(main(sys.argv[1:]))
