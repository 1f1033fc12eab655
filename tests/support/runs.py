"""Tiny runs that the tests of the loop and of the command line share."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from mtp_jax.checkpoint import metadata, restore
from mtp_jax.cli import main
from mtp_jax.config import schema
from mtp_jax.data import documents, store, tokenizers
from mtp_jax.parallel import sharding
from mtp_jax.train import metrics, state

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FLAGS = {
  'model.d_model': 16,
  'model.n_layers': 3,
  'model.n_attn_heads': 2,
  'model.d_ff': 32,
  'model.compute_dtype': 'float32',
  'model.remat': 'none',
  'heads.n': 2,
  'data.seq_len': 16,
  'data.batch_size': 8,
  # The learning rate differs from step to step, but not with train.steps.
  'optim.schedule': 'constant',
  'optim.warmup_steps': 5,
  'optim.lr': 1e-2,
  'train.steps': 6,
  'train.log_every': 1,
  'eval.batches': 2,
  'train.compilation_cache': '',
}
TIMES = ('step_time_s', 'tokens_per_s', 'model_flops_per_s', 'time_left_s', 'data_wait_frac')


def make_store(path: str, seed: int = 0) -> str:
  rng = np.random.default_rng(seed)
  texts = [''.join(rng.choice(list('abcde ()\n'), size=rng.integers(20, 200))) for _ in range(60)]
  store.write(
    path,
    (documents.Document(str(i), text) for i, text in enumerate(texts)),
    tokenizers.get('bytes'),
    valid_fraction=0.2,
  )
  return path


def args(store_path: str, workdir: str, **changes) -> list[str]:
  """Returns the flags of a run; `train__steps=3` means --train.steps=3."""
  values = FLAGS | {k.replace('__', '.'): v for k, v in changes.items()}
  values |= {'data.store': store_path, 'train.workdir': workdir}
  return [f'--{name}={value}' for name, value in values.items()]


def train(store_path: str, workdir, **changes) -> int:
  return main.main(['train', *args(store_path, str(workdir), **changes)])


def environment(devices: int = 8) -> dict:
  """Returns the environment of another process, with this one's cache."""
  count = f' --xla_force_host_platform_device_count={devices}'
  return dict(
    os.environ,
    PYTHONPATH=ROOT,
    XLA_FLAGS=os.environ['XLA_FLAGS'] + count,  # the last one counts
    JAX_COMPILATION_CACHE_DIR=jax.config.jax_compilation_cache_dir,
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.3',
  )


def process(
  command: list[str], devices: int = 8, variables: dict | None = None, of=(), **kwargs
) -> subprocess.Popen:
  """Python in a process of its own; `of` is a command that starts it."""
  return subprocess.Popen(
    [*of, sys.executable, *command],
    text=True,
    cwd=ROOT,
    env=environment(devices) | (variables or {}),
    **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | kwargs,
  )


def printed(program: str, *args: str, variables: dict) -> str:
  """Returns what Python code prints in a process of its own, which must succeed."""
  python = process(['-c', program, *args], variables=variables)
  out, error = python.communicate()
  assert python.returncode == 0, error
  return out


def restored(workdir, step: int, **mesh) -> state.State:
  """Returns the saved state, restored onto a mesh, on the host."""
  cfg = metadata.read(str(workdir), step).cfg
  sizes = dict(data=1, fsdp=1, tensor=1) | mesh
  cfg = schema.replace(cfg, **{f'mesh.{k}': v for k, v in sizes.items()})
  devices = jax.devices()[: np.prod(list(sizes.values()))]
  m = sharding.make_mesh(cfg, devices)
  return jax.device_get(restore.restore(str(workdir), step, state.abstract(cfg, m)))


def records(workdir) -> list[dict]:
  """Returns the records of metrics.jsonl without times."""
  return [
    {k: v for k, v in record.items() if k not in TIMES} for record in metrics.read(str(workdir))
  ]


def assert_same(a, b) -> None:
  """Asserts that two States are bitwise equal."""
  jax.tree.map(np.testing.assert_array_equal, a, b)


RELIABILITY = pathlib.Path(ROOT, 'docs', 'reliability.md')


def write_section(name: str, text: str, path=RELIABILITY) -> None:
  """Replaces the part of a page that one tool writes, or adds it at the end;
  the parts of others stay."""
  begin, end = f'<!-- {name} -->\n', f'<!-- end of {name} -->\n'
  page = path.read_text() if path.exists() else ''
  before, _, rest = page.partition(begin)
  after = rest.partition(end)[2] if rest else ''
  between = '\n' if before and not before.endswith('\n\n') else ''
  path.write_text(f'{before}{between}{begin}{text}{end}{after}')
