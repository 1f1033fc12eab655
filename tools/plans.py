"""Writes docs/plans.md: the fewest chips that hold each size of experiments/size.

  python tools/plans.py                      all sizes; what is compiled already is kept
  python tools/plans.py 7b 13b               these sizes only
  python tools/plans.py --chips=h100,b200    these chips only

For each size, n = 1 and 4 (a published model: n = 1), and each generation of TPU and NVIDIA
GPU: the smallest slice, or the fewest GPUs, that hold the whole train step with one sequence
of 4096 tokens per device, trunk remat=block and parameters sharded over all chips. The formula of
mtp_jax/planning/analytic.py gives the first candidate; the answer, and the next smaller
slice, are compiled. Each compile is a line of docs/plans.jsonl, written at once.
"""

import argparse
import json
import os
import pathlib
from importlib import metadata

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # see ahead._ledger

import jax  # noqa: E402

from mtp_jax.cli import flags  # noqa: E402
from mtp_jax.config import fields  # noqa: E402
from mtp_jax.parallel import chips  # noqa: E402
from mtp_jax.planning import ahead, analytic, nvidia, report, tpu  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
ROWS = ROOT / 'docs' / 'plans.jsonl'
REPORT = ROOT / 'docs' / 'plans.md'
SIZES = ('1m', '3m', '10m', '30m', '100m', '300m', '1b', '0.3b', '0.6b', '1.3b', '3b', '7b', '13b')
PUBLISHED = (
  *('qwen3_0.6b', 'qwen3_1.7b', 'qwen3_4b', 'qwen3_8b'),
  *('gemma3_1b', 'gemma3_4b', 'olmo2_1b', 'olmo2_7b'),
)
FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBES = '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4'
TPUS = {'v4': CUBES, 'v5e': FLAT, 'v5p': CUBES, 'v6e': FLAT, 'tpu7x': CUBES}
NODES = ('1', '2', '4', '8', '2x8', '4x8', '8x8')
SLICES = TPUS | {name: NODES for name in nvidia.GPUS}
HEADS = (1, 4)


def parsed(topology: str) -> tpu.Topology | nvidia.Topology:
  at = tpu.topology(topology, slices=1) or nvidia.topology(topology)
  assert at
  return at


def configured(size: str, n: int, topology: str):
  """Returns the Config of a row, one sequence per device."""
  return flags.parse(
    [
      f'--flagfile={ROOT}/experiments/size/{size}.flags',
      f'--heads.n={n}',
      '--data.seq_len=4096',
      f'--data.batch_size={parsed(topology).devices}',
      '--mesh.fsdp=-1',
      '--model.remat=block',
      f'--plan.topology={topology}',
    ]
  ).config()


def fits_by_formula(size, n, generation, shape) -> bool:
  topology = f'{generation}:{shape}'
  at, cfg = parsed(topology), configured(size, n, topology)
  chip = chips.chip(at.device_kind)
  try:
    estimate = analytic.estimate(cfg, dict(data=1, fsdp=at.devices, tensor=1), chip)
  except fields.ConfigError:  # more chips than the width divides
    return False
  return estimate.total_bytes <= ahead.usable_bytes(at.device_kind, cfg)


def compilers(generation: str) -> str:
  compiler = 'libtpu' if generation in TPUS else 'jax-cuda13-plugin'
  return ' and '.join(f'{name} {metadata.version(name)}' for name in ('jaxlib', compiler))


class Compiled:
  """Rows by (size, n, topology); a new one is compiled and written."""

  def __init__(self):
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    self.rows = {tuple(r['key']): r for r in map(json.loads, lines)}

  def __call__(self, size: str, n: int, generation: str, shape: str) -> dict:
    topology = f'{generation}:{shape}'
    key = (size, n, topology)
    if key not in self.rows:
      cfg = configured(size, n, topology)
      row = dict(key=key, by=compilers(generation)) | report.values_of(ahead.plan(cfg))
      with open(ROWS, 'a') as f:
        f.write(json.dumps(row) + '\n')
      print(*key, 'fits' if row['fits'] else 'too large', flush=True)
      self.rows[key] = row
    return self.rows[key]


def smallest(compiled, size: str, n: int, generation: str):
  """Returns (row of the smallest slice that fits, row of the next smaller or None)."""
  shapes = SLICES[generation]
  at = next(
    (i for i, shape in enumerate(shapes) if fits_by_formula(size, n, generation, shape)),
    len(shapes) - 1,
  )
  while not compiled(size, n, generation, shapes[at])['fits']:
    at += 1
    if at == len(shapes):
      return None, None
  while at and compiled(size, n, generation, shapes[at - 1])['fits']:
    at -= 1
  rows = compiled.rows
  here, below = (rows.get((size, n, f'{generation}:{shapes[i]}')) for i in (at, at - 1))
  return here, below if at else None


def _usable(row) -> str:
  """Returns what a program may have of a chip's memory, in GiB."""
  return gib(row, 'usable_bytes' if row.get('usable_bytes') else 'hbm_bytes')


def gib(row, name: str) -> str:
  return f'{row[name] / 2**30:.2f}'


def table(compiled, sizes, generations) -> list[str]:
  lines = [
    '| size | n | chips | state | temp | total | next fewer chips | roofline | MFU at most |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for size in sizes:
    for n in HEADS if size in SIZES else HEADS[:1]:
      for generation in generations:
        try:
          row, below = smallest(compiled, size, n, generation)
        except fields.ConfigError as error:
          lines.append(f'| {size} | {n} | none: {error} | | | | | | |')
          break
        if row is None:
          lines.append(f'| {size} | {n} | larger than {generation} here |')
          continue
        state = (row['params_bytes'] + row['opt_state_bytes']) / 2**30
        smaller = (
          f'{gib(below, "total_bytes")} of {_usable(below)} on {below["topology"]}'
          if below
          else 'none'
        )
        lines.append(
          f'| {size} | {n} | {row["topology"]} | {state:.2f}'
          f' | {gib(row, "temp_bytes")} | {gib(row, "total_bytes")}'
          f' of {_usable(row)} | {smaller}'
          f' | {row["step_s"]:.3f} s{"*" if row["roofline_by_formula"] else ""}'
          f' | {row["mfu"]:.0%} |'
        )
  return lines


HEAD = """\
# Plans

Written by `python tools/plans.py`, which compiles the whole train step (model, loss,
AdamW, donation, shardings) ahead of time, with libtpu and with the CUDA wheels of `[plan]`.

For each size, the tables give the smallest slice, or the fewest GPUs, that hold it with one
sequence of 4096 tokens per device, `--model.remat=block`, `--loss.backward=remat`, float32
parameters and moments, bfloat16 compute, and all devices along `--mesh.fsdp`. Memory is in
GiB per device. The roofline is the step time of the busiest resource at its peak; more
sequences per device raise the MFU (`mtp plan --plan.search_mesh`). `*`: by formula, where
what libtpu compiled cannot be read. Of a GPU's memory, a program may have the share
that JAX allocates, .92; the rest is for CUDA and NCCL ([Plan a run](guides/plan.md)). A TPU7x is
two devices. Rows on GPUs are of a step that cast layers before the loop over
them: seven of them, compiled again, take the same memory within 10 KiB, and their rooflines are
from 2.4% shorter to .3% longer. No step of these tables has run on a chip
([Hardware](hardware.md)).
"""


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('sizes', nargs='*', default=[*SIZES, *PUBLISHED])
  parser.add_argument('--chips', default='', help='comma-separated; empty = all')
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  compiled = Compiled()
  wanted = args.chips.split(',') if args.chips else [*SLICES]
  parts = {
    name: table(compiled, args.sizes, [g for g in of if g in wanted])
    for name, of in (('TPUs', TPUS), ('GPUs', nvidia.GPUS))
  }
  if args.sizes != [*SIZES, *PUBLISHED] or wanted != [*SLICES]:
    return
  seconds = [r['compile_s'] for r in compiled.rows.values()]
  by = ', '.join(sorted({r['by'] for r in compiled.rows.values()}))
  tail = (
    f'\n{len(seconds)} programs; a compile took {min(seconds):.0f} to'
    f' {max(seconds):.0f} s, with other work on the two cores; by {by}.\n'
  )
  lines = [line for name, rows in parts.items() for line in ('', f'## {name}', '', *rows)]
  REPORT.write_text('\n'.join([HEAD, *lines[1:]]) + '\n' + tail)


if __name__ == '__main__':
  main()
