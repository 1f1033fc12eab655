"""Acceptance on a machine with a GPU or a TPU: equalities, time and memory beside the plan.

  python -m tests.hardware [--minutes=5] [--part=NAME,NAME] [--out=hardware.json]

Needs jax, flax, optax, absl-py and numpy, and no network. Runs the parts of parts.py in that
order, the order being the priority, on the first device. Every figure is written at once to
--out and to a Markdown table beside it (hardware.md, for docs/hardware.md). What does not fit
the time is named with the command that runs it alone; what fails is recorded with its error,
and the next figure follows. SIGTERM ends the run with the report written.

On a CPU, or with --size=tiny, sizes are tiny: every line of code runs and equalities are
judged, bars of time and memory are not. Exit status: 0; 1 if a bar or an equality is missed or
something failed; 2 for a wrong argument; 143 after SIGTERM.
"""

import argparse
import math
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

# Before jax is imported: 1.3B with its optimizer state needs more than the default share.
if 'XLA_CLIENT_MEM_FRACTION' not in os.environ:  # jax refuses both
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '.92')

import jax  # noqa: E402

# With mtp_jax.api, which silences the compilers of devices that are not here.
from tests.hardware import machine, parts, session  # noqa: E402
from tests.hardware import report as report_lib  # noqa: E402

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    print(f'tests.hardware: {message}', file=sys.stderr)
    raise SystemExit(2)


def _minutes(text: str) -> float:
  try:
    minutes = float(text)
  except ValueError:
    minutes = math.nan
  if not 0 < minutes < 1e4:
    raise argparse.ArgumentTypeError(f'{text!r}: must be a number of minutes above 0, e.g. 5')
  return minutes


def _parts(text: str) -> list[session.Part]:
  known = {part.name: part for part in parts.PARTS}
  names = text.split(',')
  for name in names:
    if name not in known:
      raise argparse.ArgumentTypeError(f'{name!r}: no such part; parts are {", ".join(known)}')
  return [part for part in parts.PARTS if part.name in names]


def _out(text: str) -> str:
  path = os.path.abspath(text)
  if not path.endswith('.json') or not os.path.isdir(os.path.dirname(path)):
    raise argparse.ArgumentTypeError(f'{text!r}: must be a .json file in an existing directory')
  return path


def _parse(args: list[str]) -> argparse.Namespace:
  listed = '\n'.join(f'  {p.name:14} {p.minutes:4.1f} min  {p.shows}' for p in parts.PARTS)
  parser = _Parser(
    prog='python -m tests.hardware',
    description=f'{__doc__}\nparts, with minutes on one GPU of the H100 class:\n{listed}',
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--minutes', type=_minutes, default=5.0, help='minutes to fill (5)')
  parser.add_argument('--part', type=_parts, default=list(parts.PARTS), help='parts, with commas')
  parser.add_argument('--out', type=_out, default=os.path.abspath('hardware.json'))
  parser.add_argument('--size', choices=('auto', 'full', 'tiny'), default='auto')
  found = parser.parse_args(args)
  is_cpu = jax.devices()[0].platform == 'cpu'
  if found.size == 'full' and is_cpu:
    parser.error('--size=full: jax finds no GPU or TPU here; auto and tiny are allowed')
  found.is_tiny = is_cpu or found.size == 'tiny'
  return found


def _run_part(part: session.Part, work: session.Session) -> None:
  begin = time.monotonic()
  print(f'{part.name}: {part.shows}', flush=True)
  work.part = part
  work.report.start(part.name, part.shows, part.command)
  try:
    part.run(work)
    work.report.end('done', time.monotonic() - begin)
  except Exception as error:
    traceback.print_exc()
    problem = session.one_line(error)
    print(f'  {part.name} failed: {problem}', flush=True)
    work.report.end(report_lib.FAILED, time.monotonic() - begin, problem)
  session.free()


def _run_parts(wanted: list[session.Part], work: session.Session) -> None:
  """Runs the parts, those that do not fit skipped; `wanted` loses each that is started or
  skipped."""
  while wanted:
    part = wanted.pop(0)
    if work.has_time(60 * part.first_minutes):
      _run_part(part, work)
    else:
      work.report.skip(part.name, part.shows, part.command)
      print(f'{part.name}: {report_lib.OUT_OF_TIME}: {part.command}', flush=True)


def _end_on_sigterm(end: Callable[[], None]) -> None:
  """Calls end, then ends the process, upon SIGTERM: in a thread of its own, as the main one may
  be inside the compiler, where Python runs no handler."""
  from_fd, to_fd = os.pipe()
  os.set_blocking(to_fd, False)
  signal.set_wakeup_fd(to_fd, warn_on_full_buffer=False)  # written by any thread, at once
  signal.signal(signal.SIGTERM, lambda *_: None)

  def wait():
    while signal.SIGTERM not in os.read(from_fd, 64):
      pass
    end()
    sys.stdout.flush()
    os._exit(TERMINATED)

  threading.Thread(target=wait, daemon=True).start()


def main(args: list[str]) -> int:
  begin_s = time.monotonic()
  found = _parse(args)
  device = jax.devices()[0]
  report = report_lib.Report(
    found.out,
    command=shlex.join(['python', '-m', 'tests.hardware', *args]),
    date=time.strftime('%Y-%m-%d'),
    minutes=found.minutes,
    size='tiny' if found.is_tiny else 'full',
    **machine.about(device),
  )
  work = session.Session(
    report, device=device, is_tiny=found.is_tiny, end_s=begin_s + 60 * found.minutes
  )
  wanted = list(found.part)

  def interrupt(reason: str) -> None:
    report.interrupt(reason, [(p.name, p.shows, p.command) for p in wanted])

  _end_on_sigterm(lambda: interrupt('SIGTERM'))
  try:
    _run_parts(wanted, work)
  except KeyboardInterrupt:
    interrupt('SIGINT')
    return INTERRUPTED
  status = 'complete' if report.is_complete else 'incomplete: not everything had time'
  report.set(status=status, seconds=round(time.monotonic() - begin_s, 1))
  print('\n'.join(['', *report.markdown(), '', f'{found.out}, {report.markdown_out}']), flush=True)
  return 0 if report.is_met else 1


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
