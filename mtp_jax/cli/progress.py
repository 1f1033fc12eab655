"""How far the preparation of a store is. Floor 2."""

import contextlib
import sys
import time

import rich.console
import rich.progress
import rich.status

from mtp_jax.train import run as run_lib


@contextlib.contextmanager
def status():
  """show(documents, tokens, bytes): a live line at a terminal; at the end, and
  elsewhere only then, one line with the speed."""
  begin, so_far = time.perf_counter(), (0, 0, 0)

  def text():
    seconds = time.perf_counter() - begin
    documents, tokens, n_bytes = so_far
    return (
      f'{documents:,} documents, {tokens:,} tokens in {seconds:.1f} s:'
      f' {tokens / seconds:,.0f} tokens/s, {n_bytes / seconds / 1e6:.1f} MB/s'
    )

  with _live('') as live:

    def show(*counts):
      nonlocal so_far
      so_far = counts
      live.update(text())

    yield show
  print(text())


@contextlib.contextmanager
def timed(what: str):
  """A live line while it lasts, at a terminal; then one with the seconds."""
  begin = time.perf_counter()
  with _live(f'{what} …'):
    yield
  print(f'{what}: {time.perf_counter() - begin:.1f} s')


def _live(text: str) -> rich.status.Status:
  console = rich.console.Console(quiet=not sys.stdout.isatty())
  return rich.status.Status(text, console=console)


@contextlib.contextmanager
def bar(start: int, steps: int):
  """Yields say(text, step=None): a bar at a terminal, plain lines elsewhere."""
  if not sys.stdout.isatty():
    with run_lib.plain_lines(start, steps) as say:
      yield say
    return
  with rich.progress.Progress(
    *rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn()
  ) as bar:
    task = bar.add_task('training', total=steps, completed=start)

    def say(text, step=None):
      bar.console.print(text, markup=False, highlight=False)
      if step:
        bar.update(task, completed=step)

    yield say
