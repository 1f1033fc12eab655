"""The supervisor of a sandbox, a standalone script. Linux, standard library only.

Reads a JSON object from stdin and writes one to stdout. Its first process
unshares namespaces; the second, process 1 of the new ones, mounts a root that contains
only Python, drops privileges, starts the third, the program, and watches it, until it
ends: the kernel then kills all others.
"""

import _socket
import contextlib
import ctypes
import fcntl
import json
import math
import os
import re
import resource
import selectors
import signal
import struct
import sys
import time

NOBODY = 65534
SEALED = ('stdin', 'source', 'tests')
REQUEST = b'tests'  # sent by runner.py after the source has run
TOKEN = 32  # bytes
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
TICK = 0.02  # seconds between checks of time and memory
MIB = 2**20
# linux/sched.h, linux/mount.h, linux/prctl.h
NEW_NS, NEW_UTS, NEW_IPC = 0x20000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
REMOUNT, BIND, REC, PRIVATE, DETACH = 0x20, 0x1000, 0x4000, 0x40000, 2
PDEATHSIG, DUMPABLE, SECCOMP, CAPBSET_DROP, SUBREAPER, NO_NEW_PRIVS = 1, 4, 22, 24, 36, 38

libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args) -> None:
  args = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
  if getattr(libc, name)(*args) == -1:
    raise OSError(n := ctypes.get_errno(), f'{name}: {os.strerror(n)}')


def _prctl(option: int, a: object = 0, b: object = 0) -> None:
  _call('prctl', option, a, b, 0, 0)


def _mount(source, target: str, kind, flags: int, options: str = '') -> None:
  of = [x and os.fsencode(x) for x in (source, target, kind)]
  _call('mount', *of, flags, options.encode() or None)


def _write(path: str, text: str) -> None:
  with open(path, 'w') as f:
    f.write(text)


def _map_ids(inside: int, uid: int, gid: int) -> None:
  """Maps the caller's ids to `inside`, the only ids of a new user namespace."""
  _write('/proc/self/setgroups', 'deny')
  _write('/proc/self/uid_map', f'{inside} {uid} 1')
  _write('/proc/self/gid_map', f'{inside} {gid} 1')


def _python_needs() -> list[str]:
  """Returns folders and files of the Python interpreter and its libraries."""
  candidates = ['/usr', '/lib', '/lib64', '/etc/ld.so.cache', sys.base_prefix]
  candidates += [sys.base_exec_prefix, os.path.dirname(os.__file__)]
  with open('/proc/self/maps') as f:
    files = {line.split(maxsplit=5)[-1].strip() for line in f}
  candidates += sorted({os.path.dirname(p) for p in files if '.so' in p})
  found = []
  for path in candidates:
    within = any(path == p or path.startswith(p + '/') for p in found)
    if os.path.exists(path) and not within and path != '/':
      found.append(path)
  return found


def _new_root(work_mib: int) -> None:
  """Mounts a root with a read-only Python and an empty /tmp to work in."""
  root = '/dev'  # any folder works; this one always exists
  devices = [f'/dev/{d}' for d in ('null', 'zero', 'random', 'urandom', 'full')]
  paths = _python_needs()
  # Opened before mounts hide them, and while their parents are accessible.
  held = {p: os.open(p, os.O_PATH) for p in [*paths, *devices] if os.path.exists(p)}
  folders = {p for p in held if os.path.isdir(p)}
  private, options = NOSUID | NODEV | NOEXEC, f'size={work_mib}m,nr_inodes=1024'
  _mount(None, '/', None, REC | PRIVATE)
  _mount('tmpfs', root, 'tmpfs', NOSUID, 'size=1m,mode=755')
  for path in ('/proc', '/tmp'):
    os.mkdir(root + path)
  _mount('tmpfs', root + '/tmp', 'tmpfs', private, options + ',mode=1777')
  for path, fd in held.items():
    folder = path if path in folders else os.path.dirname(path)
    os.makedirs(root + folder, exist_ok=True)
    if path not in folders:
      _write(root + path, '')
    _mount(f'/proc/self/fd/{fd}', root + path, None, BIND | REC)
    os.close(fd)
  _read_only([root + p for p in paths])
  try:
    _mount('proc', root + '/proc', 'proc', private, 'subset=pid')
  except OSError:  # before Linux 5.8
    _mount('proc', root + '/proc', 'proc', private)
  os.symlink('/proc/self/fd', root + '/dev/fd')
  for i, name in enumerate(('stdin', 'stdout', 'stderr')):
    os.symlink(f'/proc/self/fd/{i}', f'{root}/dev/{name}')
  os.chdir(root)
  _call('pivot_root', b'.', b'.')
  _call('umount2', b'.', DETACH)  # the old root, mounted over the new one
  os.chdir('/tmp')
  _mount(None, '/', None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)


def _read_only(paths: list[str]) -> None:
  """Remounts everything at or below the paths read-only, one mount at a time."""
  with open('/proc/self/mountinfo') as f:
    rows = [line.split() for line in f]
  for row in rows:
    target = re.sub(r'\\(\d{3})', lambda m: chr(int(m[1], 8)), row[4])
    if any(target == p or target.startswith(p + '/') for p in paths):
      noexec = NOEXEC if 'noexec' in row[5].split(',') else 0  # it may be locked
      flags = REMOUNT | BIND | RDONLY | NOSUID | NODEV | noexec
      _mount(None, target, None, flags)


def _drop(root: bool) -> None:
  """Becomes user nobody, without capabilities or a way to gain them."""
  if root:
    _bound()
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    try:  # so that process limits do not include other sandboxes
      _call('unshare', NEW_USER)
    except OSError:
      pass
    else:
      _prctl(DUMPABLE, 1)  # otherwise root owns our files in /proc
      _map_ids(NOBODY, NOBODY, NOBODY)
  _bound()
  none = (ctypes.c_uint32 * 6)()
  _call('capset', (ctypes.c_uint32 * 2)(0x20080522, 0), none)
  _prctl(NO_NEW_PRIVS, 1)
  _prctl(DUMPABLE, 0)  # no ptrace, no access to its /proc


def _bound() -> None:
  with contextlib.suppress(OSError):  # past the last capability
    for capability in range(64):
      _prctl(CAPBSET_DROP, capability)


def _filter(packed: bytes) -> None:
  """Installs the filter of seccomp.py."""
  buffer = ctypes.create_string_buffer(packed)
  program = struct.pack('HxxxxxxQ', len(packed) // 8, ctypes.addressof(buffer))
  _prctl(SECCOMP, 2, ctypes.c_char_p(program))


def _sealed_file(data: bytes) -> int:
  """Returns a descriptor, at offset 0, of an anonymous file with this data, which
  cannot be changed, even if it is opened again."""
  fd = os.memfd_create('sealed', os.MFD_ALLOW_SEALING)
  with open(fd, 'wb', closefd=False) as f:
    f.write(data)
  os.lseek(fd, 0, os.SEEK_SET)
  fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
  return fd


def _program(spec: dict, fds: list[int], full: bool) -> None:
  """Becomes the program; never returns."""
  os.setsid()
  high = [os.dup(fd) for fd in fds]
  while min(high) < len(fds):
    high = [os.dup(fd) for fd in high]
  for i, fd in enumerate(high):
    os.dup2(fd, i)
  os.closerange(len(fds), 4096)
  for what, limit in (
    (resource.RLIMIT_CPU, math.ceil(spec['wall_s']) + 1),
    # Address space exceeds memory: each thread has a stack and an arena.
    (resource.RLIMIT_AS, (spec['memory_mib'] + 1024) * MIB),
    (resource.RLIMIT_FSIZE, spec['file_mib'] * MIB),
    (resource.RLIMIT_NOFILE, spec['files']),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_MEMLOCK, 0),
    *([(resource.RLIMIT_NPROC, spec['processes'])] if full else []),
  ):
    resource.setrlimit(what, (limit, limit))
  if full and spec['filter']:
    _filter(bytes.fromhex(spec['filter']))
  kept = {k: v for k, v in os.environ.items() if k == 'LD_LIBRARY_PATH'}
  os.execve(
    sys.executable,
    [sys.executable, '-s', '-S', '-B', '-X', 'utf8', '-c', spec['runner']],
    dict(PATH='/usr/bin:/bin', HOME='/tmp', LANG='C.UTF-8', PYTHONHASHSEED='0', **kept),
  )


def _memory() -> int:
  """Returns the bytes of all processes in the namespace except this one."""
  total = 0
  for pid in _pids():
    try:
      with open(f'/proc/{pid}/statm') as f:
        total += int(f.read().split()[1]) if pid != os.getpid() else 0
    except OSError:
      pass  # it ended
  return total * resource.getpagesize()


class Channel:
  """The channel on which runner.py requests the tests and reports that they passed.

  The program has access to the other end, but there is nothing to read until its
  source has run, and any other message is a failure. The token is sent after the
  tests and must be returned reversed.
  """

  def __init__(self, tests: int, end: _socket.socket):
    self.fd = end.fileno()
    self._tests, self._end = tests, end
    self._token = os.urandom(TOKEN)
    self._requested = False
    end.setblocking(False)

  def hear(self) -> str:
    """Receives a message; returns '' if undecided, 'passed', 'forged' or 'closed'."""
    try:
      message = self._end.recv(64)
      if not message:
        return 'closed'
      if self._requested:
        return 'passed' if message == self._token[::-1] else 'forged'
      if message != REQUEST:
        return 'forged'
      self._requested = True
      fd = self._tests.to_bytes(4, sys.byteorder)
      rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd)
      self._end.sendmsg([REQUEST], [rights])
      self._end.send(self._token)
    except BlockingIOError:
      return ''
    except OSError:
      return 'closed'
    return ''


def _start(spec: dict, full: bool) -> tuple[int, list[int], Channel, float]:
  """Starts the program; returns (pid, its pipes: stdout, stderr; channel; start time)."""
  pipes = [os.pipe() for _ in range(2)]
  ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
  stdin, source, tests = (_sealed_file(spec[k].encode(errors='replace')) for k in SEALED)
  fds = [stdin, pipes[0][1], pipes[1][1], source, theirs.fileno()]
  begun = time.monotonic()
  child = os.fork()
  if not child:
    try:
      _program(spec, fds, full)
    finally:
      os._exit(127)
  for fd in fds[:-1]:
    os.close(fd)
  theirs.close()
  return child, [out for out, _ in pipes], Channel(tests, ours), begun


def _watch(spec: dict, full: bool) -> dict:
  """Runs the program; returns its outcome."""
  started = _start(spec, full)
  try:
    return _watched(spec, full, started)
  except (OSError, MemoryError):
    return dict(error='')  # only the program can have caused it


def _watched(spec: dict, full: bool, started) -> dict:
  child, pipes, channel, begun = started
  selector, kept = selectors.DefaultSelector(), [bytearray() for _ in pipes]
  for i, out in enumerate(pipes):
    os.set_blocking(out, False)
    selector.register(out, selectors.EVENT_READ, kept[i])
  selector.register(channel.fd, selectors.EVENT_READ)
  outcome, most, verdict = '', spec['output_mib'] * MIB, ''
  while not outcome:
    if not selector.get_map():
      time.sleep(TICK / 5)
    for key, _ in selector.select(TICK) if selector.get_map() else ():
      if key.fd == channel.fd:
        verdict = channel.hear()
        if verdict:
          selector.unregister(key.fd)
      elif data := _read(key.fd):
        key.data.extend(data)
      else:
        selector.unregister(key.fd)
    status, seconds = _reaped(child), time.monotonic() - begun
    verdict = verdict or ('' if status is None else channel.hear())  # its last message
    if status is not None or verdict:  # all its output is in the pipes
      for key in selector.get_map().values():
        while key.data is not None and len(key.data) <= most:
          if not (data := _read(key.fd)):
            break
          key.data.extend(data)
    if max(map(len, kept)) > most:
      outcome = 'output'
    elif verdict == 'forged':
      outcome = 'failed'
      kept[1] += b'\nwrote to the channel of its tests'
    elif verdict == 'passed':
      outcome = 'passed'
    elif status is not None:
      outcome = _outcome(status, kept[1], spec)
    elif seconds > spec['wall_s']:
      outcome = 'timeout'
    elif full and _memory() > spec['memory_mib'] * MIB:
      outcome = 'memory'
  _kill(child, full)
  return dict(
    outcome=outcome,
    status=status,
    seconds=seconds,
    out=kept[0].decode(errors='replace'),
    err=kept[1].decode(errors='replace'),
  )


def _read(fd: int) -> bytes:
  try:
    return os.read(fd, 65536)
  except BlockingIOError:
    return b''


def _reaped(child: int) -> int | None:
  """Returns the child's exit status, negative for a signal; reaps other processes."""
  try:
    while True:
      pid, status = os.waitpid(-1, os.WNOHANG)
      if pid == child:
        return os.waitstatus_to_exitcode(status)
      if not pid:
        return None
  except ChildProcessError:
    return None


def _outcome(status: int, err: bytearray, spec: dict) -> str:
  last = bytes(err[-300:]).strip().rpartition(b'\n')[2]
  if status and last.startswith(b'MemoryError'):
    return 'memory'
  of = resource.getrusage(resource.RUSAGE_CHILDREN)
  if status == -signal.SIGXCPU or (
    status == -signal.SIGKILL and of.ru_utime + of.ru_stime > spec['wall_s']
  ):
    return 'timeout'
  return 'failed' if status or spec['tests'] else 'passed'


def _kill(child: int, full: bool) -> None:
  if full:
    _signal(os.kill, -1)  # all of this namespace except process 1
    return
  _signal(os.killpg, child)
  left = [child]
  while left:  # processes that left the session are reparented to this one
    _reaped(child)
    left = [pid for pid in _pids() if _parent(pid) == os.getpid()]
    for pid in left:
      _signal(os.kill, pid)


def _signal(send, pid: int) -> None:
  with contextlib.suppress(ProcessLookupError):
    send(pid, signal.SIGKILL)


def _pids() -> list[int]:
  return [int(name) for name in os.listdir('/proc') if name.isdigit()]


def _parent(pid: int) -> int:
  try:
    with open(f'/proc/{pid}/stat') as f:
      return int(f.read().rpartition(')')[2].split()[1])
  except OSError:
    return 0  # it ended


def _inside(spec: dict, root: bool) -> dict:
  """Runs as process 1 of the namespaces."""
  _prctl(PDEATHSIG, signal.SIGKILL)
  _call('sethostname', b'sandbox', 7)
  _new_root(spec['work_mib'])
  _drop(root)
  _prctl(PDEATHSIG, signal.SIGKILL)  # changing the user cleared it
  return _watch(spec, full=True)


def _full(spec: dict) -> dict:
  uid, gid = os.geteuid(), os.getegid()
  root = uid == 0
  flags = NEW_NS | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS
  _call('unshare', flags if root else flags | NEW_USER)
  if not root:
    _map_ids(NOBODY, uid, gid)
  back, into = os.pipe()
  child = os.fork()
  if not child:
    os.close(back)
    # With a handler, process 1 would accept signals from the program.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
      answer = _inside(spec, root)
    except OSError as e:
      answer = _refused(e)
    with open(into, 'w') as f:
      json.dump(answer, f)
    os._exit(0)
  os.close(into)
  with open(back) as f:
    text = f.read()
  os.waitpid(child, 0)
  return json.loads(text) if text else dict(error='')


def _refused(e: OSError) -> dict:
  return dict(error=e.strerror if e.filename is None else str(e))


def main() -> None:
  spec = json.load(sys.stdin)
  os.umask(0o022)
  try:
    _prctl(PDEATHSIG, signal.SIGKILL)  # dies with the process that started it
    _prctl(SUBREAPER, 1)  # so that `weak` finds orphans
    answer = _full(spec) if spec['full'] else _watch(spec, full=False)
  except OSError as e:
    answer = _refused(e)
  json.dump(answer, sys.stdout)


if __name__ == '__main__':
  main()
