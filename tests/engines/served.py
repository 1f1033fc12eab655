"""Runs a run's modules in the engines that draft with them, beside mtp_jax.

  python -m tests.engines.served RUN --prompts=FILE.jsonl

Exports RUN in each format of an engine that drafts, lets the engine continue the first 20
prompts by 128 tokens, greedily, and prints a table: tokens per forward pass of the engine
and of mtp_jax, the share of drafts accepted, and whether the engine hands modules the
hidden states that they were trained on. Environments and drivers are those of
`python -m tests.engines`, with its --work and --python.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np

from mtp_jax.config import schema
from mtp_jax.decode import load
from mtp_jax.interop import hand_over, mapping
from tests.engines import __main__ as engines

PROMPTS, NEW, CONTEXT = 20, 128, 256
FORMS = {'transformers_mtp': 'transformers', 'mimo': 'vLLM', 'gguf': 'llama.cpp'}
HEADER = (
  '| engine | `--export.format` | states as trained | same tokens |'
  ' tokens per forward pass: engine, mtp_jax | drafts accepted: engine, mtp_jax | points apart |',
  '|---|---|---|---|---|---|---|',
)


def accepted(passes: int, rows: int, steps: int) -> float:
  """Returns the share of drafts accepted: after the first forward pass of a row, each
  has `steps` drafts and adds one token of its own."""
  drafted = passes - rows
  return (rows * NEW - rows - drafted) / (drafted * steps)


def ours(opened, prompts) -> tuple[list[list[int]], int]:
  """Returns (tokens of mtp_jax with all drafts, its number of forward passes)."""
  widths = (1,) * (opened.cfg.heads.n - 1)
  found = [opened.decoder([np.asarray(p, np.int32)], widths=widths) for p in prompts]
  return [x.tokens[0].tolist() for x in found], sum(int(x.forwards.sum()) for x in found)


def row(form: str, opened, prompts, mine, options) -> str:
  """Returns a row of the table."""
  engine, steps = FORMS[form], opened.cfg.heads.n - 1
  work = options.work
  out, request, result = (work / name for name in (f'served-{form}', 'request', 'result'))
  shutil.rmtree(out, ignore_errors=True)
  engines._mtp('export', options.run, f'--export.out={out}', f'--export.format={form}')
  request.write_text(
    json.dumps(
      dict(
        folder=str(out), form=form, prompts=prompts, new=NEW, steps=steps, context=CONTEXT, texts=[]
      )
    )
  )
  driver = pathlib.Path(__file__).with_name(engines.DRIVERS[engine])
  python = engines.environment(work, engine, options.python)
  log = work / f'served-{form}.log'
  try:
    # Small models: several threads only wait for each other.
    threads = os.environ | {'OMP_NUM_THREADS': '1'}
    engines._run(python, driver, request, result, log=log, timeout=900, env=threads)
  except (RuntimeError, subprocess.TimeoutExpired) as error:
    last = re.findall(r'\w+Error: .*', str(error)) or str(error).strip().splitlines()
    return f'| {engine} | `{form}` | fails: {last[-1][:200]} | | | | |'
  found = json.loads(result.read_text())
  ids, passes = mine
  same = sum(a == b for a, b in zip(found['ids'], ids, strict=True))
  cfg = schema.replace(opened.cfg, **{'export.format': form})
  there = hand_over.of_engine(cfg)
  states = 'yes' if there == cfg.heads.trunk_state else f'no, `{there}`'
  rates = [accepted(n, len(prompts), steps) for n in (sum(found['passes']), passes)]
  speeds = [len(prompts) * NEW / n for n in (sum(found['passes']), passes)]
  return (
    f'| {found["version"]} | `{form}` | {states} | {same} of {len(prompts)}'
    f' | {speeds[0]:.2f}, {speeds[1]:.2f} | {rates[0]:.1%}, {rates[1]:.1%}'
    f' | {100 * (rates[0] - rates[1]):+.1f} |'
  )


def run(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('run')
  parser.add_argument('--prompts', type=pathlib.Path, required=True)
  parser.add_argument('--work', type=pathlib.Path, default=engines.ROOT / 'build/engines')
  parser.add_argument('--python', default=shutil.which('python3.11') or 'python3.11')
  options = parser.parse_args(argv)
  options.work = options.work.absolute()
  options.work.mkdir(parents=True, exist_ok=True)
  given = {'decode.max_new_tokens': NEW, 'train.compilation_cache': ''}
  opened = load.load(load.find(options.run, given, only_ids=False))
  tokenizer = opened.tokenizer
  if tokenizer is None:
    raise SystemExit(f'{options.run} has no tokenizer')
  lines = options.prompts.read_text().splitlines()[:PROMPTS]
  prompts = [
    [tokenizer.bos, *tokenizer.encode(json.loads(line)['prompt']).tolist()] for line in lines
  ]
  mine = ours(opened, prompts)
  rows = []
  for form in FORMS:
    if problem := mapping.unfit(opened.cfg, form):
      rows.append(f'| {FORMS[form]} | `{form}` | {problem} | | | | |')
    else:
      rows.append(row(form, opened, prompts, mine, options))
  print('\n'.join([*HEADER, *rows]))
  return 0


if __name__ == '__main__':
  sys.exit(run(sys.argv[1:]))
