"""The sandbox: outcomes, limits, isolation, forged results."""

import os
import socket
import subprocess
import sys
import time

import pytest

from mtp_jax.config import fields
from mtp_jax.evals.sandbox import launch, supervisor
from tests.support import namespaces

TESTS = 'assert f(1) == 2'
pytestmark = pytest.mark.skipif(
  namespaces.KIND == 'weak', reason='this system does not support the sandbox'
)
GOOD = 'def f(x):\n  return x + 1\n'
# The supervisor as another user, which may read Python and the supervisor but no home.
AS_USER = """
mount --bind "$1" /mnt && mount -t tmpfs -o mode=755 tmpfs /root &&
mkdir -p "$1" && mount --bind /mnt "$1" && cat > /root/supervisor.py <&9 &&
exec setpriv --reuid=1000 --regid=1000 --clear-groups "$2" -I -S /root/supervisor.py
"""


@pytest.fixture(params=['as root', 'as a user'], autouse=True)
def who(request, monkeypatch):
  """Both if the tests run as root; otherwise the two are the same."""
  if request.param == 'as a user' and os.geteuid() == 0:
    python = launch._command()[0]
    script = f'exec 9< {launch.SUPERVISOR}; {AS_USER}'
    prefix = os.path.realpath(sys.base_prefix)
    command = ['unshare', '-m', 'sh', '-c', script, 'sh', prefix, python]
    monkeypatch.setattr(launch, '_command', lambda: command)


def _run(source, tests=TESTS, wall_s=8.0, kind='full', stdin='', **limits):
  return launch.run(launch.Program(source, tests, stdin, wall_s), kind, launch.Limits(**limits))


def _processes(mark: str) -> list[str]:
  found = []
  for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
      with open(f'/proc/{pid}/environ', 'rb') as f:
        environ = f.read()
    except OSError:
      continue
    if mark.encode() in environ:
      found.append(pid)
  return found


def test_benign_programs_run():
  launch.check('full')
  assert _run(GOOD).outcome == 'passed'
  wrong = _run('def f(x):\n  return x')
  assert (wrong.outcome, wrong.status) == ('failed', 1)
  assert wrong.err.strip().endswith('AssertionError')
  echo = _run('print(input(), input())\nexit()', '', stdin='a\nü\n')
  assert echo.outcome == 'passed' and echo.out == 'a ü\n'
  assert _run('raise SystemExit(3)', '').status == 3
  assert 'SyntaxError' in _run('def f(x:').err
  whole = (
    'from __future__ import annotations\nimport dataclasses, math, ssl, heapq\n'
    '@dataclasses.dataclass\nclass A:\n  x: int\ndef f(x):\n'
    '  with open("w", "w") as f: print(A(x + 1).x, file=f)\n'
    '  return int(open("w").read())\n'
  )
  assert _run(whole).outcome == 'passed'
  assert _run('print({"a", "b", "c"})', '').out == (_run('print({"a", "b", "c"})', '').out)


@pytest.mark.parametrize(
  'source, outcome',
  [
    ('while True: pass', 'timeout'),
    ('import time\ntime.sleep(1e6)', 'timeout'),
    (
      'import signal\nfor s in set(signal.Signals) - {9, 19}:\n'
      '  signal.signal(s, signal.SIG_IGN)\nwhile True: pass',
      'timeout',
    ),
    ('import os\nwhile True:\n  try: os.fork()\n  except OSError: pass', 'timeout'),
    (
      'import threading, time\nwhile True:\n'
      '  threading.Thread(target=time.sleep, args=(60,)).start()',
      'timeout',
    ),
    ('x = "x" * 10**11', 'memory'),
    ('x = []\nwhile True: x.append(bytearray(2**24))', 'memory'),
    (
      'import os, time\nfor _ in range(4): os.fork()\nx = bytearray(2**27)\ntime.sleep(60)',
      'memory',
    ),
    ('while True: print("x" * 10000)', 'output'),
    ('import sys\nwhile True: sys.stderr.write("x" * 10000)', 'output'),
    ('import os\nos.closerange(0, 64)\nwhile True: os.dup(os.open(".", 0))', 'failed'),
    ('import os\nfor i in range(3, 64): os.dup2(1, i)', 'failed'),
    ('import sys\nsys.exit(0)', 'failed'),
    ('import os\nos._exit(0)', 'failed'),
    ('raise SystemExit', 'failed'),
    ('import os\nos.execv("/usr/bin/true", ["true"])', 'failed'),
    ('import os\nos.kill(os.getpid(), 9)', 'failed'),
    (
      'import atexit, builtins, os\ndef no(*a, **k): return b""\n'
      'builtins.exec = builtins.compile = builtins.open = os.write = no',
      'failed',
    ),
    (
      'for i in range(3, 64):\n  try: __import__("os").write(i, b"0" * 32)\n  except OSError: pass',
      'failed',
    ),
    ('open("x", "w").truncate(2**34)', 'failed'),
    ('f = open("x", "wb")\nwhile True: f.write(bytes(2**20))', 'failed'),
    ('for i in range(10**9): open(str(i), "w").close()', 'failed'),
    ('x = [open(".x", "w") for _ in range(1000)]', 'failed'),
    ('for i in range(99):\n  with open(str(i), "wb") as f:\n    f.write(bytes(2**23))', 'failed'),
    ('f = lambda x: f(x)', 'failed'),
  ],
)
def test_resource_limits(source, outcome):
  ended = _run(source, wall_s=2.0 if outcome == 'timeout' else 8.0)
  assert ended.outcome == outcome, ended
  assert len(ended.err) <= launch.TAIL
  assert ended.seconds < 8


ESCAPES = {
  'signals': """
    import os, signal
    for pid in (-1, 0, 1, os.getppid()):
      for s in (signal.SIGINT, signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        if pid or s == signal.SIGINT:
          signal.signal(signal.SIGINT, signal.SIG_IGN)
          try: os.kill(pid, s)
          except OSError: pass
    """,
  'namespaces': """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (0x10000000, 0x20000, 0x40000000):
      assert libc.unshare(flags) == -1
    for fd in range(64):
      assert libc.setns(fd, 0) == -1
    assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == -1
    assert libc.umount2(b'/usr', 2) == -1
    assert libc.syscall(56 if os.uname().machine == 'x86_64' else 220,
                        0x10000011, 0, 0, 0, 0) == -1
    assert libc.memfd_create(b'x', 0) == -1 and libc.shmget(0, 9, 0o1777) == -1
    """,
  'its supervisor': """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ('mem', 'environ', 'fd', 'root', 'maps', 'cwd'):
      try: os.listdir(f'/proc/1/{name}'), open(f'/proc/1/{name}').read()
      except OSError: pass
      else: raise AssertionError(name)
      try: open(f'/proc/1/{name}', 'rb').read(1)
      except OSError: pass
      else: raise AssertionError(name)
    assert libc.ptrace(16, 1, 0, 0) == -1
    import resource
    for what in (resource.RLIMIT_CPU, resource.RLIMIT_NOFILE):
      try: resource.prlimit(1, what, (0, 0))
      except PermissionError: pass
      else: raise AssertionError
    resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
    """,
  'privileges': """
    import os, resource
    assert os.getuid() == os.geteuid() == 65534
    assert os.getgroups() in ([], [65534])
    for change in (os.setuid, os.setgid):
      try: change(0)
      except OSError: pass
      else: raise AssertionError
    for what in (resource.RLIMIT_NPROC, resource.RLIMIT_AS):
      try: resource.setrlimit(what, (-1, -1))
      except ValueError: pass
      else: raise AssertionError
    status = open('/proc/self/status').read().split()
    for name in ('CapPrm:', 'CapEff:', 'CapBnd:', 'CapInh:', 'CapAmb:'):
      assert int(status[status.index(name) + 1], 16) == 0, name
    assert status[status.index('NoNewPrivs:') + 1] == '1'
    assert status[status.index('Seccomp:') + 1] == '2'
    """,
}


# Programs without a right f that want to pass all the same.
SCAN = """
import os, select
def read(fd):
  try: return os.read(fd, 999) if select.select([fd], [], [], 0)[0] else b''
  except OSError: return b''
def write(data):
  for fd in range(3, 64) if data else ():
    try: os.write(fd, data)
    except OSError: pass
"""
FORGERIES = {
  'tests overwritten': SCAN
  + """
for fd in range(3, 64):
  for way in (lambda: os.ftruncate(fd, 0), lambda: os.pwrite(fd, b'#' * 99, 0),
              lambda: open(f'/proc/self/fd/{fd}', 'wb').write(b'pass')):
    try: way()
    except OSError: pass
def f(x): return 0
""",
  'tests overwritten while they run': SCAN
  + """
def f(x):
  for fd in range(3, 64):
    for way in (lambda: os.ftruncate(fd, 0), lambda: os.pwrite(fd, b'# ', 0)):
      try: way()
      except OSError: pass
  return 0
""",
  'a verdict of its own': SCAN + 'write(b"passed")\ndef f(x): return 0',
  'all that can be read is sent': SCAN
  + """
def f(x):
  for data in [read(fd) for fd in range(3, 64)]:
    write(data)
  return 0
""",
  'all that can be read is sent at once': SCAN
  + """
for data in [read(fd) for fd in range(3, 64)]: write(data)
f = lambda x: 0
""",
  'a token in memory': SCAN
  + """
import gc, sys
def f(x):
  frame, found = sys._getframe(), gc.get_objects()
  while frame:
    found += list(frame.f_locals.values()) + list(frame.f_code.co_consts)
    frame = frame.f_back
  for x in found:
    if isinstance(x, bytes) and 8 < len(x) < 99: write(x)
  return 0
""",
  'exit before the tests': 'import os\nos._exit(0)',
  'exit within the tests': 'import os\ndef f(x): os._exit(0)',
  'exit of a thread': """
import os, threading, time
threading.Thread(target=lambda: (time.sleep(.05), os._exit(0))).start()
def f(x): time.sleep(9)
""",
  'a child stays': """
import os
if os.fork(): os._exit(0)
def f(x): return 0
""",
  'no assertion fails': """
import builtins, sys
class Never(Exception): pass
builtins.AssertionError = builtins.Exception = Never
sys.exit = sys.excepthook = lambda *_: None
f = lambda x: 0
""",
  'nothing is run': """
import builtins, os, sys
def no(*a, **k): return b''
builtins.exec = builtins.compile = builtins.open = builtins.int = no
os.fdopen = os.read = sys.settrace = no
for name in ('_socket', 'os', 'sys', 'builtins', '_sitebuiltins'):
  sys.modules[name] = None
f = lambda x: 0
""",
  'lines are skipped': """
import sys
def trace(frame, event, arg):
  if frame.f_code.co_filename == 'tests' and event == 'line':
    try: frame.f_lineno += 1
    except ValueError: pass
  return trace
sys.settrace(trace)
f = lambda x: 0
""",
}
# Deceptions that tests in the same process cannot detect; documented in README.
UNDETECTED = {
  'an object that equals all': """
class Any:
  def __eq__(self, other): return True
f = lambda x: Any()
""",
  'a program that knows the protocol': """
import socket
supervisor = socket.socket(fileno=4)
supervisor.send(b'tests')
supervisor.recv(64)
supervisor.send(supervisor.recv(64)[::-1])
supervisor.recv(64)
""",
}


def test_sealed_files_are_immutable():
  fd = supervisor._sealed_file(b'tests')
  for change in (
    lambda: os.pwrite(fd, b'x', 0),
    lambda: os.ftruncate(fd, 0),
    lambda: os.ftruncate(fd, 99),
    lambda: open(f'/proc/self/fd/{fd}', 'r+b', 0).write(b'x'),
  ):
    with pytest.raises(PermissionError):
      change()
  with open(fd, 'rb') as file:
    assert file.read() == b'tests'


LAST_WORD = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import supervisor

class Late:  # its message comes after select has looked, before the exit is seen
  fd = os.pipe()[0]
  def hear(self):
    return 'passed'

child = os.fork()
if not child:
  os._exit(0)
pipes = [os.pipe() for _ in range(2)]
for _, end in pipes:
  os.close(end)
time.sleep(0.2)
spec = dict(output_mib=1, wall_s=9, tests='assert True')
started = child, [out for out, _ in pipes], Late(), time.monotonic()
print(supervisor._watched(spec, False, started)['outcome'])
"""


def test_token_sent_right_before_the_exit_is_heard():
  """Between two looks at the channel; on a busy machine a pass was judged a failure."""
  folder = os.path.dirname(launch.RUNNER)
  done = subprocess.run([sys.executable, '-c', LAST_WORD, folder], capture_output=True, text=True)
  assert done.stdout == 'passed\n', done.stderr


def test_forged_passes_fail():
  programs = {**FORGERIES, **UNDETECTED, 'an honest one': GOOD}
  ended = launch.together(
    lambda source: _run(source, tests='assert f(1) == 2\nassert f(2) == 3'),
    list(programs.values()),
    lambda line: None,
  )
  found = {name: e.outcome for name, e in zip(programs, ended, strict=True)}
  passed = [name for name, outcome in found.items() if outcome == 'passed']
  assert passed == [*UNDETECTED, 'an honest one'], found
  assert {found[name] for name in FORGERIES} <= {'failed', 'timeout'}, found


def test_denied_sockets_and_system_calls():
  """Socket families outside of network namespaces, as AF_VSOCK; calls that act on
  files and processes outside, or expose them."""
  source = """
import ctypes, errno, fcntl, os, socket
for family in range(46):
  try: socket.socket(family, socket.SOCK_DGRAM).close()
  except OSError as e:
    assert family not in (1, 2, 10), (family, e)
    assert e.errno == errno.EAFNOSUPPORT, (family, e)
  else: assert family in (1, 2, 10), family
a, b = socket.socketpair()
a.send(b'x'), b.recv(1)
try: fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_SH)
except PermissionError: pass
else: raise AssertionError('flock')
x86 = os.uname().machine == 'x86_64'
libc = ctypes.CDLL(None, use_errno=True)
for number in ((240, 434, 424, 294, 135, 238, 256, 300, 154, 440) if x86 else
               (180, 434, 424, 26, 92, 237, 238, 262, 440)):
  ctypes.set_errno(0)
  assert libc.syscall(number, 0, 0, 0, 0) == -1
  assert ctypes.get_errno() == errno.EPERM, (number, ctypes.get_errno())
"""
  ended = _run(source + GOOD)
  assert ended.outcome == 'passed', ended


@pytest.mark.parametrize('name', ESCAPES)
def test_escapes_are_contained(name):
  source = '\n'.join(line[4:] for line in ESCAPES[name].splitlines())
  ended = _run(source + '\n' + GOOD)
  assert ended.outcome == 'passed', ended


def test_outside_files_are_inaccessible(tmp_path):
  secret = tmp_path / 'secret'
  secret.write_text('known')
  os.chmod(secret, 0o666)
  os.chmod(tmp_path, 0o777)
  paths = [
    str(secret),
    '/etc/shadow',
    '/etc/passwd',
    os.path.expanduser('~'),
    os.path.join(os.getcwd(), 'setup.cfg'),  # also of a clone in /tmp, where files may be made
    launch.SUPERVISOR,
    sys.prefix,
    '/proc/1/root',
  ]
  ended = _run(
    f"""
import os
for path in {paths}:
  for mode in ('r', 'w', 'a'):
    try: open(path, mode)
    except OSError: pass
    else: raise AssertionError(path)
for path in ('/usr', '/lib', '/etc', '/dev', '/', os.path.dirname(os.__file__)):
  try: open(path + '/x', 'w')
  except OSError: pass
  else: raise AssertionError(path)
  try: os.chmod(path, 0o777)
  except OSError: pass
  else: raise AssertionError(path)
try: home = os.listdir({os.path.expanduser('~')!r})
except OSError: home = []
assert not [x for x in home if not x.startswith('.')], home
assert os.listdir('/tmp') == []
"""
    + GOOD
  )
  assert ended.outcome == 'passed', ended
  assert secret.read_text() == 'known'


def test_network_is_inaccessible():
  with socket.create_server(('127.0.0.1', 0)) as server:
    server.settimeout(0)
    name = f'\0mtp-{os.getpid()}'
    with socket.socket(socket.AF_UNIX) as abstract:
      abstract.bind(name)
      abstract.listen()
      ended = _run(
        f"""
import socket
for family, address in (
  (socket.AF_INET, ('127.0.0.1', {server.getsockname()[1]})),
  (socket.AF_INET, ('10.0.0.1', 80)), (socket.AF_UNIX, {name!r}),
):
  s = socket.socket(family)
  s.settimeout(1)
  try: s.connect(address)
  except OSError: pass
  else: raise AssertionError(address)
"""
        + GOOD
      )
    with pytest.raises(BlockingIOError):
      server.accept()
  assert ended.outcome == 'passed', ended


DAEMON = """
import os, time
if not os.fork():
  os.setsid()
  if not os.fork():
    os.environ['MARK'] = 'x'
    os.execve({python!r}, ['python', '-c', 'import time; time.sleep(60)'],
              {{'MARK': {mark!r}}})
  os._exit(0)
time.sleep({pause})
"""


@pytest.mark.parametrize('kind', ['full', 'weak'])
def test_daemons_do_not_outlive_a_program(kind):
  mark = f'mtp-daemon-{os.getpid()}-{kind}'
  python = os.path.realpath(sys._base_executable)
  source = DAEMON.format(python=python, mark=mark, pause=0.5)
  begun = time.monotonic()
  assert _run(source + GOOD, kind=kind).outcome == 'passed'
  assert time.monotonic() - begun < 30
  assert not _processes(mark)


def test_programs_do_not_outlive_the_evaluation(tmp_path):
  """If the evaluation is killed by SIGKILL, so are its programs."""
  mark = f'mtp-orphan-{os.getpid()}'
  python = os.path.realpath(sys._base_executable)
  source = DAEMON.format(python=python, mark=mark, pause=60)
  code = (
    'import sys\nfrom mtp_jax.evals.sandbox import launch\n'
    f'launch._command = lambda: {launch._command()!r}\n'
    f'launch.run(launch.Program({source!r}, wall_s=60), "full")'
  )
  evaluation = subprocess.Popen([sys.executable, '-c', code])
  while not _processes(mark):
    assert evaluation.poll() is None
    time.sleep(0.05)
  evaluation.kill()
  evaluation.wait()
  end = time.monotonic() + 20
  while _processes(mark) and time.monotonic() < end:
    time.sleep(0.05)
  assert not _processes(mark)


def test_tests_are_hidden_from_programs():
  """The environment visible to a program is the same in every run."""
  source = """
import gc, os, sys
seen = [open('/proc/self/cmdline').read(), open('/proc/self/environ').read()]
frame = sys._getframe()
while frame:
  seen += [str(sorted(map(str, frame.f_code.co_consts))), str(frame.f_locals)]
  frame = frame.f_back
found = [x for x in gc.get_objects() if isinstance(x, (str, bytes))]
mark = ' == '.join(['f(1)', '2'])
print([s for s in map(str, seen + found) if mark in s])
print(sorted(os.environ), os.listdir('/tmp'))
"""
  ended = _run(source + GOOD)
  hidden, *_ = ended.out.splitlines()
  assert (ended.outcome, hidden) == ('passed', '[]')
  assert 'LANG' in ended.out and 'HOSTNAME' not in ended.out


@pytest.mark.parametrize('kind', ['full', 'weak'])
def test_sandbox_works_if_the_temporary_folder_is_removed(kind, monkeypatch, tmp_path):
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  monkeypatch.setattr('tempfile.tempdir', None)
  real = subprocess.Popen.communicate

  def cleaned(self, *args, **kwargs):
    for folder in tmp_path.iterdir():
      folder.rmdir()
    return real(self, *args, **kwargs)

  monkeypatch.setattr(subprocess.Popen, 'communicate', cleaned)
  assert _run(GOOD, kind=kind).outcome == 'passed'
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'source', ['', '\x00', 'x = "\ud800"', '\ufeffx = 1', '#' * 10**6, '(' * 10**5]
)
def test_arbitrary_text_is_a_failing_program(source):
  """It does not define f."""
  assert _run(source).outcome == 'failed'


@pytest.mark.parametrize(
  'source, outcome',
  [
    (GOOD, 'passed'),
    ('while True: pass', 'timeout'),
    ('exit(0)', 'failed'),
    ('x = "x" * 10**11', 'memory'),
    ('while True: print("x" * 999)', 'output'),
    ('open("x", "wb").write(bytes(2**25))', 'failed'),
  ],
)
def test_weak_sandbox_outcomes(source, outcome):
  assert _run(source, wall_s=3.0, kind='weak').outcome == outcome


def test_programs_run_in_parallel():
  """Their processes are counted separately."""
  bomb = 'import os\nwhile True:\n  try: os.fork()\n  except OSError: pass'
  mixed = [bomb, GOOD, bomb, GOOD, GOOD]
  programs = [launch.Program(s, TESTS, wall_s=3.0) for s in mixed]
  lines = []
  found = launch.together(lambda p: launch.run(p, 'full'), programs, lines.append)
  expected = {bomb: 'timeout', GOOD: 'passed'}
  assert [e.outcome for e in found] == [expected[s] for s in mixed]
  assert len(lines) == 5 and lines[-1] == '5 of 5 programs judged'


def test_unsupported_sandbox_raises(monkeypatch):
  python, *_, supervisor = namespaces.PLAIN
  refuses = (
    'import ctypes, os, runpy, sys\n'
    'libc = ctypes.CDLL(None)\n'
    'sys.argv = sys.argv[1:]\n'
    'supervisor = runpy.run_path(sys.argv[0])\n'
    'def call(name, *args, real=supervisor["_call"]):\n'
    '  if name == "unshare":\n'
    '    raise OSError(1, "unshare: Operation not permitted")\n'
    '  real(name, *args)\n'
    'supervisor["main"].__globals__["_call"] = call\n'
    'supervisor["main"]()\n'
  )
  command = [python, '-I', '-S', '-c', refuses, supervisor]
  monkeypatch.setattr(launch, '_command', lambda: command)
  with pytest.raises(fields.ConfigError) as e:
    launch.check('full')
  assert str(e.value) == (
    '--eval.sandbox=full: not supported by this system (unshare: Operation not'
    ' permitted); in a disposable container or machine,'
    ' --eval.sandbox=weak runs programs without one'
  )
  launch.check('weak')


def test_interrupt_kills_running_programs():
  """Programs of five minutes are killed before the exception of a signal is raised."""

  def stop(line):
    raise KeyboardInterrupt

  def judge(source):
    return launch.run(launch.Program(source, 'assert True', wall_s=300), 'weak').outcome

  with pytest.raises(KeyboardInterrupt):
    launch.together(judge, ['', *['import time; time.sleep(300)'] * 3], stop)
  assert not launch._running
