"""Runs of several processes on this machine."""

import socket
import time

import jax

from mtp_jax.parallel import sharding
from tests.support import runs

LIMIT_S = 240.0
# Small: on a CPU jax's cache serves process 0 alone, and the other compiles for
# itself each time.
MESH = dict(
  mesh__data=2,
  mesh__fsdp=2,
  model__n_layers=2,
  heads__n=1,
  train__steps=9,
  train__checkpoint_every=3,
  train__max_to_keep=9,
)
MAIN = ['-m', 'mtp_jax', 'train']


def port() -> int:
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def flags(index: int, port: int) -> dict:
  return dict(
    distributed__coordinator_address=f'localhost:{port}',
    distributed__num_processes=2,
    distributed__process_id=index,
    distributed__heartbeat_timeout_s=10,
  )


def ends(running) -> list[tuple[int, str, str]]:
  """(status, stdout, stderr) of each, in seconds or not at all."""
  limit = time.monotonic() + LIMIT_S
  try:
    return [
      (p.returncode, out, error)
      for p in running
      for out, error in [p.communicate(timeout=limit - time.monotonic())]
    ]
  finally:
    for p in running:
      p.kill()


def pair(store, workdir, of_0=MAIN, of_1=MAIN, only_1='', **changes):
  """Two processes of one run; only_1: a flag that process 1 alone has."""
  at, running = port(), []
  for index, command in enumerate((of_0, of_1)):
    own = MESH | changes | flags(index, at)
    args = runs.args(store, str(workdir), **own)
    args += [only_1] * (index and only_1 != '')
    running.append(runs.process([*command, *args], devices=2))
  return running


def of_four(monkeypatch):
  make = sharding.make_mesh
  monkeypatch.setattr(sharding, 'make_mesh', lambda cfg: make(cfg, jax.devices()[:4]))
