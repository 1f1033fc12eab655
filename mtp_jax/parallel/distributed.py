"""Several processes that make one run: they join, agree, and end together.

Floor 1. Process 0 speaks and writes; each runs the same program on its own
devices. With one process every function here does nothing or is the identity.

What one process alone would find out (a missing file, a lock, a signal) is
agreed upon before any of them acts on it, since one that leaves makes the
others wait. One that crashes tells the others why, and all end at once. Who
ends without a word is missed after --distributed.heartbeat_timeout_s.
"""

import collections
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # its key-value store has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax.config import commands, fields, parse, schema
from mtp_jax.io import paths

# What may differ from one process to another: where it is, what its machine
# calls things.
OWN = (
  'distributed.process_id',
  'data.store',
  'eval.stores',
  'data.read_threads',
  'data.verify',
  'train.compilation_cache',
)


class Aborted(Exception):
  """Another process has said what is wrong; leave with its exit status."""

  def __init__(self, status: int):
    super().__init__(f'another process ended with status {status}')
    self.status = status


def run(cfg: schema.Config, command: Callable[[], int]) -> int:
  """command() as one of the processes of --processes.*; its exit status.

  A process that crashes leaves at once, without Python's own end: that would
  wait for threads which wait for other processes. So do the others when they
  hear of it.

  Raises:
    ConfigError: the processes do not find each other, or have other flags.
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


# What is said of another process that answers no more, by who carries numbers
# between processes (Gloo, NCCL) or counts them (JAX's coordination service).
_OF_ANOTHER = re.compile('gloo|nccl|connection|heartbeat|barrier|coordination', re.IGNORECASE)
_STATUS = re.compile(r'[A-Z]+(_[A-Z]+)*: ')  # what XLA's errors begin with


def _peer_loss(error: BaseException) -> str:
  """A line on an error that only says that another process is gone; else ''."""
  first = (str(error).strip().splitlines() or [''])[0]
  # A collective within a jitted call ends in the one class or the other.
  of_xla = isinstance(error, jax.errors.JaxRuntimeError) or (
    isinstance(error, ValueError) and _STATUS.match(first)
  )
  if not is_multiprocess() or not of_xla or not _OF_ANOTHER.search(first):
    return ''
  return f'aborting: another process was lost: {first[:300]}'


def _log(text: str) -> None:
  """A line of this process, with its rank. Only process 0 has a stdout."""
  print(f'[{jax.process_index()}/{jax.process_count()}] {text}', file=sys.stderr)


FAILED = 'mtp/failed'  # the culprit's words, in the coordinator's store
POLL_S = 1.0  # between two looks at it


def _fail(why: str, status: int = 1) -> None:
  """Leaves, and has all others leave with these words; unless it is another
  that has failed, and this process with it."""
  if is_multiprocess():
    _leave_after(_failure_of_peer())
  _log(why)
  if is_multiprocess():
    with contextlib.suppress(Exception):  # nobody hears
      _store().key_value_set(FAILED, f'[{jax.process_index()}] {why}')
    if jax.process_index() == 0:  # the store ends with it
      time.sleep(2 * POLL_S)
  _leave(status)


def _failure_of_peer() -> str | None:
  """What another process has failed of; None if none has said so."""
  store = _store()
  if not store:  # the run is over
    return None
  try:
    why = store.key_value_try_get(FAILED)
  except jax.errors.JaxRuntimeError:
    return None
  # Process 0 stays after its own failure, until the others have heard of it.
  return None if why.startswith(f'[{jax.process_index()}] ') else why


def _leave_after(why: str | None) -> None:
  if why:
    _log(f'ends, since another process failed:\n{why}')
    _leave(1)


def _store():
  return distributed.global_state.client


def _listen() -> None:
  """Ends this process soon after another has said that it failed."""
  if not is_multiprocess():
    return

  def listen():
    while _store():  # None when the run is over
      time.sleep(POLL_S)
      _leave_after(_failure_of_peer())

  threading.Thread(target=listen, daemon=True).start()


def _leave(status: int):
  with contextlib.suppress(OSError):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(status)


def _join(p: commands.DistributedConfig) -> None:
  # It would take SIGTERM away from Python, in every command; see `Stop`.
  jax.config.update('jax_enable_preemption_service', False)
  told = {}  # else what the cluster says
  if p.coordinator_address != 'auto':
    told = dict(
      coordinator_address=p.coordinator_address,
      num_processes=p.num_processes,
      process_id=p.process_id,
      cluster_detection_method='deactivate',
    )
  try:
    jax.distributed.initialize(
      **told,
      heartbeat_timeout_seconds=p.heartbeat_timeout_s,
      shutdown_timeout_seconds=p.heartbeat_timeout_s,
    )
  except (RuntimeError, ValueError) as error:
    why = (str(error).strip() or repr(error)).splitlines()[0][:300]
    raise fields.ConfigError(
      'distributed.coordinator_address',
      p.coordinator_address,
      f'the processes do not find each other: {why}',
    ) from error
  if not is_primary():
    # Also what libraries print past Python.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def is_multiprocess() -> bool:
  # The latter alone would start the devices before the first flag is checked.
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_primary() -> bool:
  """Whether this is the process that speaks and writes."""
  return not is_multiprocess() or jax.process_index() == 0


def _gather(value: int) -> list[int]:
  """Each process's value, in their order."""
  with jax.transfer_guard('allow'):
    return multihost_utils.process_allgather(np.int32(value)).tolist()


def process_allgather(value: float) -> list[float]:
  """Each process's number, in their order. All processes must call it."""
  if not is_multiprocess():
    return [value]
  with jax.transfer_guard('allow'):
    return multihost_utils.process_allgather(np.float32(value)).tolist()


def barrier(where: str) -> None:
  """Waits until all processes are here."""
  if is_multiprocess():
    with jax.transfer_guard('allow'):
      multihost_utils.sync_global_devices(where)


def broadcast_one_to_all(text: str) -> str:
  """Process 0's text. All processes must call it."""
  if not is_multiprocess():
    return text
  mine = np.frombuffer(text.encode(), np.uint8)
  with jax.transfer_guard('allow'):
    size = multihost_utils.broadcast_one_to_all(np.int32(mine.size))
    sent = np.zeros(int(size), np.uint8)
    if is_primary():
      sent[:] = mine
    sent = multihost_utils.broadcast_one_to_all(sent)
  return sent.astype(np.uint8).tobytes().decode()


@contextlib.contextmanager
def fail_together():
  """If the body fails in one process, it ends all of them.

  The body must not communicate. What the lowest of those that failed has raised
  is raised there, and `Ended`, with the `status` of that error, elsewhere. All
  processes must come here; it waits for the last.
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
    raise error
  raise Aborted(statuses[failed[0]]) from error


def _check_same_flags(cfg: schema.Config) -> None:
  theirs = parse.from_json(broadcast_one_to_all(parse.to_json(cfg)))
  with fail_together():
    for name in schema.fields():
      mine, wanted = schema.get(cfg, name), schema.get(theirs, name)
      if mine != wanted and name not in OWN:
        raise fields.ConfigError(
          name,
          mine,
          f'process {jax.process_index()} has it, process 0 has {wanted}; give all the same flags',
        )


class Interrupted(BaseException):
  """A signal came while `Stop.interrupting` was on; as KeyboardInterrupt it is
  no error that somebody may handle."""


# SIGHUP comes from a terminal that closes, and from some schedulers.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _leave_the_terminal() -> None:
  """What is then printed would be an error, before anything is saved."""
  for fd in (1, 2):
    if os.isatty(fd):
      os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


class Stop:
  """Has any process been asked to stop? All get the same answer at a step.

  SIGTERM, SIGHUP or the first SIGINT asks; a second SIGINT raises
  KeyboardInterrupt.
  Between several processes the question is a maximum over all devices, put at
  each step and read `LAG` steps later, when it has been answered: it costs one
  small program a step and no wait. (JAX's own notifier agrees on a step as
  well, but knows no SIGINT, counts steps from 0 and keeps SIGTERM for good.)
  """

  LAG = 2

  def __init__(self, mesh: Mesh):
    self.asked = threading.Event()
    self._interrupts = False
    self._answers = collections.deque()
    self._sharding = NamedSharding(mesh, P(mesh.axis_names))
    self._any = jax.jit(jnp.max)

  def __call__(self) -> bool:
    """Once a step, under jax.set_mesh."""
    if not is_multiprocess():
      return self.asked.is_set()
    flag = np.full(1, self.asked.is_set(), np.int32)
    with jax.transfer_guard('allow'):  # this copy is meant
      flags = jax.make_array_from_callback(
        (self._sharding.mesh.size,), self._sharding, lambda _: flag
      )
    self._answers.append(self._any(flags))
    if len(self._answers) <= self.LAG:
      return False
    return bool(jax.device_get(self._answers.popleft()))

  @contextlib.contextmanager
  def on_signal(self):
    """Listens, and gives the signals back to whom they belonged."""

    def handle(number, _):
      if self.asked.is_set() and number == signal.SIGINT:
        raise KeyboardInterrupt
      self.asked.set()
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
      if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
        old[number] = signal.signal(number, handle)
    try:
      yield self
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)

  @contextlib.contextmanager
  def interrupting(self):
    """Work that may be broken off and done again: in here a signal raises
    Interrupted at once, wherever Python is, rather than at the next step.

    Of several processes none may leave alone: there a loop which all of them
    make equally often calls `check` instead.
    """
    if is_multiprocess():
      yield
      return
    self._interrupts = True  # before the look, or one between were not heard
    try:
      self.check()
      yield
    finally:
      self._interrupts = False

  def check(self) -> None:
    """Raises Interrupted if any process has been asked; calls as `self()`."""
    if self():
      raise Interrupted
