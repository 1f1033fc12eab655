"""Runs a program inside the sandbox; launch.py passes this text to `python -c`.

File descriptor 3 holds the source. Descriptor 4 is connected to the supervisor,
which sends the tests after the source has run, and a token that must be sent
back after the tests: before that, neither argv, the environment, a frame nor a
descriptor exposes tests or token. All functions used after the source has run
are looked up before it.
"""


def _run():
  import _sitebuiltins  # `site` would read files that do not exist
  import _socket
  import builtins
  import os
  import sys

  for name in ('exit', 'quit'):
    setattr(builtins, name, _sitebuiltins.Quitter(name, 'Ctrl-D'))

  def take(fd, open=os.fdopen):
    with open(fd, 'rb') as f:
      return f.read()

  run, make, number, order = exec, compile, int.from_bytes, sys.byteorder
  untraced = sys.settrace, sys.setprofile
  supervisor = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, 4)
  send, receive, receive_fd = supervisor.send, supervisor.recv, supervisor.recvmsg
  names = globals()
  names.pop('_run')
  names['__doc__'] = None
  run(make(take(3), 'program', 'exec', dont_inherit=True), names)
  for reset in untraced:
    reset(None)
  send(b'tests')
  _, [(_, _, fd)], *_ = receive_fd(64, 64)
  if tests := take(number(fd, order)):
    run(make(tests, 'tests', 'exec', dont_inherit=True), names)
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    send(receive(64)[::-1])


_run()
