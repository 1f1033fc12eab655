"""Programs that mean harm: each is contained, and said of what became of it."""

import os
import socket
import subprocess
import sys
import time

import pytest

from mtp_jax import config
from mtp_jax.evals import sandbox

TESTS = 'assert f(1) == 2'
PLAIN = sandbox._command()
# Whether namespaces are to be had here at all, asked of util-linux.
NEW = [
  '--mount',
  '--net',
  '--pid',
  '--fork',
  *(['--user'] if os.geteuid() else []),
]
HAS = subprocess.run(['unshare', *NEW, 'true'], capture_output=True)
KIND = 'weak' if HAS.returncode else 'full'
pytestmark = pytest.mark.skipif(
  KIND == 'weak', reason='this system gives no sandbox'
)
GOOD = 'def f(x):\n  return x + 1\n'
# The keeper as another user, who may read Python and the keeper but no home.
AS_USER = """
mount --bind "$1" /mnt && mount -t tmpfs -o mode=755 tmpfs /root &&
mkdir -p "$1" && mount --bind /mnt "$1" && cat > /root/keeper.py <&9 &&
exec setpriv --reuid=1000 --regid=1000 --clear-groups "$2" -I -S /root/keeper.py
"""


@pytest.fixture(params=['as root', 'as a user'], autouse=True)
def who(request, monkeypatch):
  """Both, when root runs the tests; they are the same for anyone else."""
  if request.param == 'as a user' and os.geteuid() == 0:
    python = sandbox._command()[0]
    script = f'exec 9< {sandbox.KEEPER}; {AS_USER}'
    prefix = os.path.realpath(sys.base_prefix)
    command = ['unshare', '-m', 'sh', '-c', script, 'sh', prefix, python]
    monkeypatch.setattr(sandbox, '_command', lambda: command)


def _run(source, tests=TESTS, wall_s=8.0, kind='full', stdin='', **limits):
  return sandbox.run(
    sandbox.Program(source, tests, stdin, wall_s), kind,
    sandbox.Limits(**limits),
  )  # fmt: skip


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


def test_programs_that_mean_no_harm():
  sandbox.check('full')
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
  assert _run('print({"a", "b", "c"})', '').out == (
    _run('print({"a", "b", "c"})', '').out
  )


@pytest.mark.parametrize(
  'source, outcome',
  [
    ('while True: pass', 'timeout'),
    ('import time\ntime.sleep(1e6)', 'timeout'),
    (
      'import signal\nfor s in set(signal.Signals) - {9, 19}:\n'
      '  signal.signal(s, signal.SIG_IGN)\nwhile True: pass', 'timeout',
    ),
    (
      'import os\nwhile True:\n  try: os.fork()\n  except OSError: pass',
      'timeout',
    ),
    (
      'import threading, time\nwhile True:\n'
      '  threading.Thread(target=time.sleep, args=(60,)).start()', 'timeout',
    ),
    ('x = "x" * 10**11', 'memory'),
    ('x = []\nwhile True: x.append(bytearray(2**24))', 'memory'),
    (
      'import os, time\nfor _ in range(4): os.fork()\nx = bytearray(2**27)\n'
      'time.sleep(60)', 'memory',
    ),
    ('while True: print("x" * 10000)', 'output'),
    ('import sys\nwhile True: sys.stderr.write("x" * 10000)', 'output'),
    (
      'import os\nos.closerange(0, 64)\nwhile True: os.dup(os.open(".", 0))',
      'failed',
    ),
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
    ('for i in range(3, 64):\n  try: __import__("os").write(i, b"0" * 32)\n'
     '  except OSError: pass', 'failed'),
    ('open("x", "w").truncate(2**34)', 'failed'),
    ('f = open("x", "wb")\nwhile True: f.write(bytes(2**20))', 'failed'),
    ('for i in range(10**9): open(str(i), "w").close()', 'failed'),
    ('x = [open(".x", "w") for _ in range(1000)]', 'failed'),
    ('for i in range(99):\n  with open(str(i), "wb") as f:\n'
     '    f.write(bytes(2**23))', 'failed'),
    ('f = lambda x: f(x)', 'failed'),
  ],
)  # fmt: skip
def test_contained(source, outcome):
  ended = _run(source, wall_s=2.0 if outcome == 'timeout' else 8.0)
  assert ended.outcome == outcome, ended
  assert len(ended.err) <= sandbox.TAIL
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
  'its keeper': """
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


@pytest.mark.parametrize('name', ESCAPES)
def test_no_way_out(name):
  source = '\n'.join(line[4:] for line in ESCAPES[name].splitlines())
  ended = _run(source + '\n' + GOOD)
  assert ended.outcome == 'passed', ended


def test_files_outside_are_neither_read_nor_written(tmp_path):
  secret = tmp_path / 'secret'
  secret.write_text('known')
  os.chmod(secret, 0o666)
  os.chmod(tmp_path, 0o777)
  paths = [str(secret), '/etc/shadow', '/etc/passwd', os.path.expanduser('~'),
           os.getcwd(), sandbox.KEEPER, sys.prefix, '/proc/1/root']  # fmt: skip
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


def test_no_network():
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
def test_nothing_outlives_a_program(kind):
  mark = f'mtp-daemon-{os.getpid()}-{kind}'
  python = os.path.realpath(sys._base_executable)
  source = DAEMON.format(python=python, mark=mark, pause=0.5)
  begun = time.monotonic()
  assert _run(source + GOOD, kind=kind).outcome == 'passed'
  assert time.monotonic() - begun < 30
  assert not _processes(mark)


def test_nothing_outlives_who_asked(tmp_path):
  """Killed with SIGKILL; its programs go as well."""
  mark = f'mtp-orphan-{os.getpid()}'
  python = os.path.realpath(sys._base_executable)
  source = DAEMON.format(python=python, mark=mark, pause=60)
  code = (
    'import sys\nfrom mtp_jax.evals import sandbox\n'
    f'sandbox._command = lambda: {sandbox._command()!r}\n'
    f'sandbox.run(sandbox.Program({source!r}, wall_s=60), "full")'
  )
  asks = subprocess.Popen([sys.executable, '-c', code])
  while not _processes(mark):
    assert asks.poll() is None
    time.sleep(0.05)
  asks.kill()
  asks.wait()
  end = time.monotonic() + 20
  while _processes(mark) and time.monotonic() < end:
    time.sleep(0.05)
  assert not _processes(mark)


def test_no_secret_to_see():
  """What a program sees of its surroundings is the same in every run."""
  source = """
import gc, os, sys
seen = [open('/proc/self/cmdline').read(), open('/proc/self/environ').read()]
frame = sys._getframe()
while frame:
  seen += [str(sorted(map(str, frame.f_code.co_consts))), str(frame.f_locals)]
  frame = frame.f_back
found = [x for x in gc.get_objects() if isinstance(x, (str, bytes))]
print([s for s in map(str, seen + found) if 'f(1) == 2' in s])
print(sorted(os.environ), os.listdir('/tmp'))
"""
  ended = _run(source + GOOD)
  hidden, *_ = ended.out.splitlines()
  assert (ended.outcome, hidden) == ('passed', '[]')
  assert 'LANG' in ended.out and 'HOSTNAME' not in ended.out


@pytest.mark.parametrize('kind', ['full', 'weak'])
def test_the_temporary_folder_may_be_cleaned(kind, monkeypatch, tmp_path):
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
  'source',
  ['', '\x00', 'x = "\ud800"', '\ufeffx = 1', '#' * 10**6, '(' * 10**5],
)
def test_any_text_is_a_program(source):
  """That does not define f."""
  assert _run(source).outcome == 'failed'


@pytest.mark.parametrize(
  'source, outcome',
  [
    (GOOD, 'passed'), ('while True: pass', 'timeout'), ('exit(0)', 'failed'),
    ('x = "x" * 10**11', 'memory'), ('while True: print("x" * 999)', 'output'),
    ('open("x", "wb").write(bytes(2**25))', 'failed'),
  ],
)  # fmt: skip
def test_weak(source, outcome):
  assert _run(source, wall_s=3.0, kind='weak').outcome == outcome


def test_programs_run_side_by_side():
  """Their processes are counted apart."""
  bomb = 'import os\nwhile True:\n  try: os.fork()\n  except OSError: pass'
  mixed = [bomb, GOOD, bomb, GOOD, GOOD]
  programs = [sandbox.Program(s, TESTS, wall_s=3.0) for s in mixed]
  said = []
  found = sandbox.together(
    lambda p: sandbox.run(p, 'full'), programs, said.append
  )
  expected = {bomb: 'timeout', GOOD: 'passed'}
  assert [e.outcome for e in found] == [expected[s] for s in mixed]
  assert len(said) == 5 and said[-1] == '5 of 5 programs judged'


def test_a_system_that_gives_none_says_so(monkeypatch):
  python, *_, keeper = PLAIN
  refuses = (
    'import ctypes, os, runpy, sys\n'
    'libc = ctypes.CDLL(None)\n'
    'sys.argv = sys.argv[1:]\n'
    'keeper = runpy.run_path(sys.argv[0])\n'
    'def call(name, *args, real=keeper["_call"]):\n'
    '  if name == "unshare":\n'
    '    raise OSError(1, "unshare: Operation not permitted")\n'
    '  real(name, *args)\n'
    'keeper["main"].__globals__["_call"] = call\n'
    'keeper["main"]()\n'
  )
  command = [python, '-I', '-S', '-c', refuses, keeper]
  monkeypatch.setattr(sandbox, '_command', lambda: command)
  with pytest.raises(config.ConfigError) as e:
    sandbox.check('full')
  assert str(e.value) == (
    '--eval.sandbox=full: this system does not give one (unshare: Operation not'
    ' permitted); in a container or machine that may be lost,'
    ' --eval.sandbox=weak runs programs without one'
  )
  sandbox.check('weak')
