"""Progress at a terminal: of `prepare`, of timed work, of training."""

import contextlib
import sys
import time

import rich.console
import rich.progress
import rich.status

from mtp_jax.train import run as run_lib


@contextlib.contextmanager
def status():
  """Yields show(documents, tokens, bytes), a live status line at a terminal; prints
  the throughput at the end."""
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
  """Shows a live line at a terminal during the body, then prints its seconds."""
  begin = time.perf_counter()
  with _live(f'{what} …'):
    yield
  print(f'{what}: {time.perf_counter() - begin:.1f} s')


def _live(text: str) -> rich.status.Status:
  console = rich.console.Console(quiet=not sys.stdout.isatty())
  return rich.status.Status(text, console=console)


@contextlib.contextmanager
def bar(start: int, steps: int):
  """Yields log_line(text, step=None): a progress bar at a terminal, plain lines elsewhere."""
  if not sys.stdout.isatty():
    with run_lib.plain_lines(start, steps) as log_line:
      yield log_line
    return
  with rich.progress.Progress(
    *rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn()
  ) as bar:
    task = bar.add_task('training', total=steps, completed=start)

    def log_line(text, step=None):
      bar.console.print(text, markup=False, highlight=False)
      if step:
        bar.update(task, completed=step)

    yield log_line
