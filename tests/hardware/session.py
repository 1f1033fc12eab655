"""What a part works with: a device, the time left, and the report."""

import gc
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mtp_jax.cli import flags
from mtp_jax.config import schema
from mtp_jax.parallel import chips, sharding
from tests.hardware import report as report_lib

ROOT = pathlib.Path(__file__).parents[2]
TINY_SHARE = 0.1  # expected time of a part at tiny sizes


class Part(NamedTuple):
  """A part of the acceptance; minutes are estimates for one GPU of the H100's class, most
  of them compilation."""

  name: str
  run: Callable[['Session'], None]
  minutes: float  # of all its figures
  first_minutes: float  # until its first figure: a part that does not fit it is skipped
  shows: str

  @property
  def command(self) -> str:
    """The command that runs this part alone, with enough time."""
    return (
      f'python -m tests.hardware --part={self.name} --minutes={max(1, round(2 * self.minutes))}'
    )


class Session:
  """One device and the time left on it; parts record their figures here."""

  def __init__(self, report: report_lib.Report, *, device, is_tiny: bool, end_s: float):
    """end_s: time.monotonic() after which nothing more is started."""
    self.report, self.device, self.is_tiny, self._end_s = report, device, is_tiny, end_s
    self.chip = chips.chip(device.device_kind)
    self.part: Part | None = None

  @property
  def is_cpu(self) -> bool:
    return self.device.platform == 'cpu'

  def has_time(self, expected_s: float) -> bool:
    """Whether so much still fits; expected_s: at full size."""
    share = TINY_SHARE if self.is_tiny else 1
    return time.monotonic() + share * expected_s <= self._end_s

  @property
  def memory_bytes(self) -> float | None:
    """Bytes of the device that this process may allocate."""
    stats = self.device.memory_stats() or {}
    return stats.get('bytes_limit') or (self.chip and self.chip.hbm_bytes)

  @property
  def peak_bytes(self) -> int | None:
    """Most bytes allocated at the same time since the process started."""
    return (self.device.memory_stats() or {}).get('peak_bytes_in_use')

  def figure(self, name: str, measured, unit: str, **more) -> None:
    """Records a figure, see report.figure, and prints it. Bars of time and memory are judged
    at full size only."""
    more['is_judged'] = more.get('is_judged', True) and not self.is_tiny
    self._add(report_lib.figure(name, measured, unit, **more))

  def _add(self, figure: dict) -> None:
    self.report.add(figure)
    shown = [figure['shown'], figure['bar'], figure['verdict']]
    print(f'  {figure["name"]}: {"; ".join(filter(None, shown))}', flush=True)

  def attempt(self, what: str, expected_s: float, call: Callable[[], Any]) -> Any:
    """Returns call(), or None: out of time, or it failed. Either is recorded as a figure.

    expected_s: seconds at full size, by estimate or as measured before.
    """
    assert self.part is not None
    if not self.has_time(expected_s):
      verdict = f'{report_lib.OUT_OF_TIME}: `{self.part.command}`'
      return self._add(report_lib.figure(what, '', 'text') | dict(verdict=verdict))
    try:
      return call()
    except Exception as error:  # e.g. out of memory: the next figure may fit
      problem = one_line(error)
    # After the exception and what its frames hold are gone.
    gc.collect()
    failed = report_lib.figure(what, problem, 'text') | dict(verdict=report_lib.FAILED)
    return self._add(failed)

  def config(self, *args: str) -> schema.CommandConfig:
    """Returns the Config of command-line flags, on one device."""
    return flags.parse(['--mesh.fsdp=1', *args]).config()

  def mesh(self, cfg: schema.Config, device=None):
    return sharding.make_mesh(cfg, [device or self.device])


def one_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:300]}'.rstrip(': ')


def free() -> None:
  """Gives back the arrays and programs of the part before."""
  gc.collect()
  jax.clear_caches()


def size_flags(size: str) -> str:
  return f'--flagfile={os.path.join(ROOT, "experiments", "size", size)}.flags'
