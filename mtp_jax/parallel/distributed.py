"""Multi-process runs: initialization, collectives on the host, and joint failure.

Process 0, the primary, logs and writes; each process runs the same program on its
own devices. In a single process every function is a no-op or the identity.

What one process alone detects (a missing file, a lock, a signal) is agreed upon
before any process acts on it, since the others would wait for one that exits. A
process that crashes reports why, and all abort. One that dies silently is detected
after --distributed.heartbeat_timeout_s.
"""

import collections
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # its key-value store has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax.config import commands, fields, schema
from mtp_jax.io import paths

# Fields that may differ between processes: rank and paths on the machine.
OWN = (
  'distributed.process_id',
  'data.store',
  'eval.stores',
  'data.read_threads',
  'data.verify',
  'train.compilation_cache',
)


class Aborted(Exception):
  """Another process has reported the error; exit with its status."""

  def __init__(self, status: int):
    super().__init__(f'another process ended with status {status}')
    self.status = status


def run(cfg: schema.CommandConfig, command: Callable[[], int]) -> int:
  """Runs command() as one process of --distributed.*; returns its exit status.

  A process that crashes exits at once with os._exit: Python's shutdown would wait
  for threads that wait for other processes. So do the others when they detect it.

  Raises:
    ConfigError: jax.distributed initialization failed, or flags differ.
  """
  if not cfg.distributed.coordinator_address:
    return command()
  _join(cfg.distributed)
  try:
    _check_same_flags(cfg)
    _log(f'on {socket.gethostname()}, {jax.local_device_count()} devices')
    _listen()
    return command()
  except Aborted as end:
    return end.status
  except fields.FileChanged as error:
    _fail(str(error), error.status)
  except paths.InputError:
    raise
  except KeyboardInterrupt:
    print('mtp: interrupted', file=sys.stderr)
    _leave(130)
  except OSError as error:
    why = paths.disk_error(error)
    if not why:
      _fail(traceback.format_exc())
    _fail(why, 2)
  except BaseException as error:
    _fail(_peer_loss(error) or traceback.format_exc())


# Errors about a lost peer, of the transports (Gloo, NCCL) and of JAX's coordination
# service.
_PEER_ERROR = re.compile('gloo|nccl|connection|heartbeat|barrier|coordination', re.IGNORECASE)
_STATUS = re.compile(r'[A-Z]+(_[A-Z]+)*: ')  # prefix of XLA's errors


def _peer_loss(error: BaseException) -> str:
  """Returns a line for an error that means a lost peer; '' for any other."""
  first = (str(error).strip().splitlines() or [''])[0]
  # A collective within a jitted call raises either class.
  of_xla = isinstance(error, jax.errors.JaxRuntimeError) or (
    isinstance(error, ValueError) and _STATUS.match(first)
  )
  if not is_multiprocess() or not of_xla or not _PEER_ERROR.search(first):
    return ''
  return f'aborting: another process was lost: {first[:300]}'


def _log(text: str) -> None:
  """Prints a line with the rank to stderr. Only process 0 has a stdout."""
  print(f'[{jax.process_index()}/{jax.process_count()}] {text}', file=sys.stderr)


FAILED = 'mtp/failed'  # key of the first failure's message in the coordinator's store
POLL_S = 1.0  # interval of polling it


def _fail(why: str, status: int = 1) -> NoReturn:
  """Exits, and makes all other processes abort with this message; unless another
  process failed first, and caused this failure."""
  if is_multiprocess():
    _leave_after(_failure_of_peer())
  _log(why)
  if is_multiprocess():
    with contextlib.suppress(Exception):  # the coordinator is gone
      _store().key_value_set(FAILED, f'[{jax.process_index()}] {why}')
    if jax.process_index() == 0:  # the store is lost with process 0
      time.sleep(2 * POLL_S)
  _leave(status)


def _failure_of_peer() -> str | None:
  """Returns the message of another process's failure; None without one."""
  store = _store()
  if not store:  # the run is over
    return None
  try:
    why = store.key_value_try_get(FAILED)
  except jax.errors.JaxRuntimeError:
    return None
  # Process 0 outlives its own failure until the others have polled it.
  return None if why.startswith(f'[{jax.process_index()}] ') else why


def _leave_after(why: str | None) -> None:
  if why:
    _log(f'aborting: another process failed:\n{why}')
    _leave(1)


def _store() -> Any:
  return distributed.global_state.client


def _listen() -> None:
  """Starts a thread that aborts this process after another has failed."""
  if not is_multiprocess():
    return

  def listen():
    while _store():  # None when the run is over
      time.sleep(POLL_S)
      _leave_after(_failure_of_peer())

  threading.Thread(target=listen, daemon=True).start()


def _leave(status: int) -> NoReturn:
  with contextlib.suppress(OSError):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(status)


def _join(p: commands.DistributedConfig) -> None:
  # It would take over SIGTERM, in every command; see `Stop`.
  jax.config.update('jax_enable_preemption_service', False)
  given: dict[str, Any] = {}  # with `auto` jax detects the cluster
  if p.coordinator_address != 'auto':
    given = dict(
      coordinator_address=p.coordinator_address,
      num_processes=p.num_processes,
      process_id=p.process_id,
      cluster_detection_method='deactivate',
    )
  try:
    jax.distributed.initialize(
      **given,
      heartbeat_timeout_seconds=p.heartbeat_timeout_s,
      shutdown_timeout_seconds=p.heartbeat_timeout_s,
    )
  except (RuntimeError, ValueError) as error:
    why = (str(error).strip() or repr(error)).splitlines()[0][:300]
    raise fields.ConfigError(
      'distributed.coordinator_address',
      p.coordinator_address,
      f'jax.distributed initialization failed: {why}',
    ) from error
  if not is_primary():
    # Also silences what libraries print from C.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def is_multiprocess() -> bool:
  # process_count alone would initialize the devices before flags are checked.
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_primary() -> bool:
  """Whether this is the process that logs and writes."""
  return not is_multiprocess() or jax.process_index() == 0


def _gather(value: int) -> list[int]:
  """Returns each process's value, in order of rank."""
  with jax.transfer_guard('allow'):
    return multihost_utils.process_allgather(np.int32(value)).tolist()


def process_allgather(value: float) -> list[float]:
  """Returns each process's number, in order of rank. Collective."""
  if not is_multiprocess():
    return [value]
  with jax.transfer_guard('allow'):
    return multihost_utils.process_allgather(np.float32(value)).tolist()


def barrier(where: str) -> None:
  """Waits until all processes have called it."""
  if is_multiprocess():
    with jax.transfer_guard('allow'):
      multihost_utils.sync_global_devices(where)


def broadcast_one_to_all(value: Any) -> Any:
  """Returns process 0's value, whose types are those of JSON; the others' is unused.
  Collective."""
  if not is_multiprocess():
    return value
  mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
  with jax.transfer_guard('allow'):
    size = multihost_utils.broadcast_one_to_all(np.int32(mine.size))
    sent = np.zeros(int(size), np.uint8)
    if is_primary():
      sent[:] = mine
    sent = multihost_utils.broadcast_one_to_all(sent)
  return json.loads(sent.astype(np.uint8).tobytes())


@contextlib.contextmanager
def fail_together():
  """Raises in all processes if the body fails in one. Collective.

  The body must not communicate. The error of the lowest failed rank is raised
  there, and `Aborted` with the `status` of that error elsewhere.
  """
  if not is_multiprocess():
    yield
    return
  error = None
  try:
    yield
  except Exception as raised:
    error = raised
  statuses = _gather(getattr(error, 'status', 1) if error else 0)
  failed = [i for i, status in enumerate(statuses) if status]
  if not failed:
    return
  if failed[0] == jax.process_index():
    assert error
    raise error
  raise Aborted(statuses[failed[0]]) from error


def _check_same_flags(cfg: schema.CommandConfig) -> None:
  mine = {name: schema.get(cfg, name) for name in schema.fields() if name not in OWN}
  mine |= {'plan.sweep': list(cfg.plan.sweep)}  # as JSON has it
  theirs = broadcast_one_to_all(mine)
  with fail_together():
    for name, value in mine.items():
      if value != theirs[name]:
        raise fields.ConfigError(
          name,
          value,
          f'on process {jax.process_index()}, but {theirs[name]} on process 0; give all the'
          ' same flags',
        )


class Interrupted(BaseException):
  """A signal arrived within `Stop.interrupting`. Like KeyboardInterrupt it is not an
  Exception, so that no handler of errors catches it."""


# SIGHUP comes from a terminal that closes, and from some schedulers.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _leave_the_terminal() -> None:
  """Redirects a closed terminal's stdout and stderr to the null device: printing
  would raise before anything is saved."""
  for fd in (1, 2):
    if os.isatty(fd):
      os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


class Stop:
  """Whether a signal has requested a stop, with the same result in all processes.

  SIGTERM, SIGHUP or the first SIGINT requests it; a second SIGINT raises
  KeyboardInterrupt. With several processes the result is a maximum over all
  devices, dispatched at each step and read `LAG` steps later: one small program
  per step, and no blocking. (JAX's preemption notifier agrees on a step as well,
  but ignores SIGINT, counts steps from 0 and keeps SIGTERM's handler.)
  """

  LAG = 2

  def __init__(self, mesh: Mesh):
    self.requested = threading.Event()
    self._interrupts = False
    self._pending = collections.deque()
    self._sharding = NamedSharding(mesh, P(mesh.axis_names))
    self._any = jax.jit(jnp.max)

  def __call__(self) -> bool:
    """Returns whether to stop; to be called once per step, under jax.set_mesh."""
    if not is_multiprocess():
      return self.requested.is_set()
    flag = np.full(1, self.requested.is_set(), np.int32)
    with jax.transfer_guard('allow'):  # an intended copy
      flags = jax.make_array_from_callback(
        (self._sharding.mesh.size,), self._sharding, lambda _: flag
      )
    self._pending.append(self._any(flags))
    if len(self._pending) <= self.LAG:
      return False
    return bool(jax.device_get(self._pending.popleft()))

  @contextlib.contextmanager
  def on_signal(self):
    """Installs the signal handlers, and restores the previous ones at the end."""

    def handle(number, _):
      if self.requested.is_set() and number == signal.SIGINT:
        raise KeyboardInterrupt
      self.requested.set()
      if number == signal.SIGHUP:
        _leave_the_terminal()
      if self._interrupts:
        self._interrupts = False
        raise Interrupted

    if threading.current_thread() is not threading.main_thread():
      yield self  # signals belong to the main thread's owner
      return
    old = {}
    for number in SIGNALS:
      if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup
        old[number] = signal.signal(number, handle)
    try:
      yield self
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)

  @contextlib.contextmanager
  def interrupting(self):
    """Marks work that may be interrupted and repeated: a signal raises Interrupted
    at once, wherever Python is, rather than at the next step.

    No process of several may stop alone: there a loop of the same length in all of
    them calls `check` instead.
    """
    if is_multiprocess():
      yield
      return
    self._interrupts = True  # before `check`, or a signal in between would be lost
    try:
      self.check()
      yield
    finally:
      self._interrupts = False

  def check(self) -> None:
    """Raises Interrupted if `self()`: any process has been requested to stop."""
    if self():
      raise Interrupted
