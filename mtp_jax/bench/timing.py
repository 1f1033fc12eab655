"""Timing of programs in interleaved rounds, and tables of results."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mtp_jax.config import schema


class Program(NamedTuple):
  """A callable to time: args -> (args of the next call, results)."""

  call: Callable[[Any], tuple[Any, Any]]
  temp_bytes: int | None = None  # per device


class Seconds(NamedTuple):
  """Seconds per call of each program, one value per round."""

  wall: dict[Any, list[float]]
  cpu: dict[Any, list[float]]  # over all cores; empty unless the device is a CPU


class Group(NamedTuple):
  """Programs that take the same arguments, which are made before and freed after the
  group: the states of two numbers of heads are never live at the same time."""

  make: Callable[[], Any]
  programs: dict[Any, Program]


# Timing.


def _rotated(items: list, by: int) -> list:
  """Rotates the items, so that a different one is first in each round."""
  by %= len(items)
  return items[by:] + items[:by]


def measure(groups: list[Group], cfg: schema.CommandConfig) -> Seconds:
  """Times all programs in --bench.rounds rounds, after a warm-up round."""
  seconds = Seconds({}, {})
  for r in range(cfg.bench.rounds + 1):
    for group in _rotated(groups, r):
      args = group.make()
      for name, program in _rotated(list(group.programs.items()), r):
        jax.block_until_ready(args)
        begin = time.perf_counter(), time.process_time()
        for _ in range(cfg.bench.iters):
          args, out = program.call(args)
        jax.block_until_ready((args, out))
        end = time.perf_counter(), time.process_time()
        for times, from_s, to_s in zip(seconds, begin, end, strict=True):
          times.setdefault(name, []).append((to_s - from_s) / cfg.bench.iters)
      del args, out
  on_cpu = jax.devices()[0].platform == 'cpu'
  wall, cpu = ({name: times[1:] for name, times in of_kind.items()} for of_kind in seconds)
  return Seconds(wall, cpu if on_cpu else {})


def ratio(times: list[float], others: list[float], by: float = 1.0) -> dict[str, float]:
  """Returns median, min and max of the ratios by round, divided by `by`."""
  ratios = [a / b / by for a, b in zip(times, others, strict=True)]
  return dict(median=statistics.median(ratios), min=min(ratios), max=max(ratios))


def seconds(call: Callable[[], Any]) -> float:
  """Returns the seconds of a call until its results are ready."""
  begin = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - begin


def variants_table(rows: list[dict], more: dict[str, Callable[[dict], str]]):
  columns = {
    'schedule': lambda r: r['schedule'],
    'chunk': lambda r: str(r['chunk']),
    'n': lambda r: str(r['n']),
    'ms': lambda r: f'{1e3 * r["time_s"]:.1f}',
    'over first n': lambda r: shown(r['over_first_n']),
    'over first schedule': lambda r: shown(r['over_first_schedule']),
    'cpu over n': lambda r: median(r, 'cpu_over_first_n'),
    'cpu over schedule': lambda r: median(r, 'cpu_over_first_schedule'),
    'temp MiB': lambda r: mib(r['temp_bytes']),
    **more,
  }
  return table(rows, columns)


def table(rows: list[dict], columns: dict[str, Callable[[dict], str]]):
  """Returns the lines of a table with right-aligned columns."""
  cells = [list(columns), *([f(r) for f in columns.values()] for r in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return ['  '.join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells]


def shown(ratio: dict[str, float]) -> str:
  return f'{ratio["median"]:.3f} ({ratio["min"]:.3f}-{ratio["max"]:.3f})'


def median(row: dict, name: str) -> str:
  return f'{row[name]["median"]:.3f}' if name in row else 'n/a'


def mib(n_bytes: int | None) -> str:
  return 'n/a' if n_bytes is None else f'{n_bytes / 2**20:.1f}'


def temp_bytes(compiled) -> int | None:
  memory = compiled.memory_analysis()
  return memory.temp_size_in_bytes if memory else None


def device_peak(n_programs: int) -> int | None:
  """Returns the peak bytes of a device in this process, if it ran only one program:
  the counter cannot be reset."""
  stats = jax.local_devices()[0].memory_stats()
  return stats['peak_bytes_in_use'] if stats and n_programs == 1 else None
