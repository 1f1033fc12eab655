"""Files written by one version of Python, jax or mtp_jax, read by another.

  python -m tests.golden write DIR    with the one: a store, a run of three of
                                      six steps, its export, and their outputs
  python -m tests.golden read DIR     with the other: the same is read and
                                      computed, and the run goes to its end
  python -m tests.golden keep         what a version of mtp_jax wrote, for those
                                      after it: kept.tar.xz here

Bits are compared where bits are kept (parameters, tokens, greedy text), numbers
that are computed anew to 1e-4. What is kept is never made anew: it is there to
be read when flags, names and files have changed (tests/golden_test.py).
"""

import contextlib
import io
import json
import os
import pathlib
import sys
import tarfile
import tempfile

import jax
import numpy as np

from mtp_jax.checkpoint import metadata, restore
from mtp_jax.cli import main
from mtp_jax.data import store as store_lib
from mtp_jax.io import paths
from mtp_jax.parallel import sharding
from tests import conftest  # noqa: F401  # devices and XLA flags of the tests
from tests.support import runs

OF = dict(train__checkpoint_every=3, optim__warmup_steps=2)


def _mtp(*args: str) -> None:
  with contextlib.redirect_stdout(io.StringIO()):
    status = main.main([*args, '--train.compilation_cache='])
  if status:
    raise SystemExit(f'mtp {args[0]} ended with {status}')


def _outputs(top: str, run: str, to: str) -> dict:
  """Losses and greedy text of a checkpoint, and the tokens of its store."""
  held_out, texts = os.path.join(to, 'eval.json'), os.path.join(to, 'text.json')
  _mtp('eval', f'{run}', f'--out={held_out}')
  _mtp(
    'generate',
    f'{run}',
    '--prompt=ab (c',
    '--mesh.fsdp=1',
    '--mesh.data=8',
    '--decode.max_new_tokens=24',
    f'--out={texts}',
  )
  with open(held_out) as f:
    values = json.load(f)
  with open(texts) as f:
    text = json.load(f)
  split = store_lib.open_store(os.path.join(top, 'store')).split('train')
  tokens = np.concatenate([np.array(d) for d in split.documents()])
  return dict(
    losses={k: v for k, v in values.items() if k.startswith('loss')},
    text=text,
    tokens=tokens.tolist(),
  )


def _params(run: str, step: int) -> list:
  return jax.tree.leaves(runs.restored(run, step).params)


def write(top: str) -> None:
  os.makedirs(top)
  runs.make_store(os.path.join(top, 'store'))
  run, out = os.path.join(top, 'run'), os.path.join(top, 'export')
  if runs.train(os.path.join(top, 'store'), run, **OF, train__steps=3):
    raise SystemExit('training failed')
  _mtp('export', f'{run}', f'--export.out={out}', '--mesh.fsdp=-1')
  np.savez(os.path.join(top, 'params.npz'), *_params(run, 3))
  expected = _outputs(top, run, top)
  expected |= dict(python=sys.version.split()[0], jax=jax.__version__)
  paths.write(os.path.join(top, 'expected.json'), json.dumps(expected).encode())


def read(top: str) -> None:
  with open(os.path.join(top, 'expected.json')) as f:
    expected = json.load(f)
  run = os.path.join(top, 'run')
  with np.load(os.path.join(top, 'params.npz')) as saved:
    wanted = [saved[name] for name in saved.files]
  runs.assert_same(_params(run, 3), wanted)
  back = os.path.join(top, 'imported')
  _mtp(
    'import',
    f'--import.path={os.path.join(top, "export")}',
    f'--train.workdir={back}',
    '--mesh.fsdp=-1',
  )
  cfg = metadata.read(back, 0).cfg
  model = restore.restore_model(back, 0, cfg, sharding.make_mesh(cfg))
  runs.assert_same(jax.device_get(jax.tree.leaves(model)), wanted)
  now = _outputs(top, run, top)
  assert now['tokens'] == expected['tokens'], 'the store has other tokens'
  assert _ids(now['text']) == _ids(expected['text']) != [], 'another greedy text'
  for name, value in expected['losses'].items():
    np.testing.assert_allclose(now['losses'][name], value, rtol=1e-4)
  if runs.train(os.path.join(top, 'store'), run, **OF, train__steps=6):
    raise SystemExit('the run does not resume')
  print(
    f'written by Python {expected["python"]}, jax {expected["jax"]}; read by'
    f' {sys.version.split()[0]}, {jax.__version__}: equal'
  )


def _ids(text) -> list:
  """All lists of ids in what `mtp generate --out` wrote."""
  if isinstance(text, dict):
    return [y for k, x in sorted(text.items()) if k != 'seconds' for y in _ids(x)]
  if isinstance(text, list) and text and all(type(x) is int for x in text):
    return [text]
  return [y for x in text for y in _ids(x)] if isinstance(text, list) else []


# What is kept.

KEPT = pathlib.Path(__file__).with_name('kept.tar.xz')
FORMS = ('hf', 'transformers_mtp', 'mimo', 'gguf')
SMALL = dict(
  model__d_model=8,
  model__d_ff=16,
  model__n_layers=2,
  model__d_head=4,
  heads__family='recursive',
  heads__n=3,
  mesh__data=8,
  mesh__fsdp=1,
  train__checkpoint_every=3,
  optim__warmup_steps=2,
)


def mixture(top: str) -> str:
  """--data.store of the two stores in a folder."""
  return f'a={top}/a:3,b={top}/b'


def keep(path: pathlib.Path = KEPT) -> None:
  """Writes two stores, half a run on a mixture of them, its exports, its held-out
  losses and text, and the losses of the remaining steps."""
  with tempfile.TemporaryDirectory() as top:
    runs.make_store(f'{top}/a')
    runs.make_store(f'{top}/b', seed=1)
    for steps, run in (6, f'{top}/whole'), (3, f'{top}/run'):
      if runs.train(mixture(top), run, **SMALL, train__steps=steps):
        raise SystemExit('training failed')
    for form in FORMS:
      more = []
      if form == 'gguf':  # which has no tokenizer of bytes
        _mtp(
          'import',
          f'--import.path={top}/hf',
          f'--train.workdir={top}/ids',
          '--import.tokenizer=skip',
          '--mesh.fsdp=-1',
        )
        more = [f'{top}/ids']
      _mtp(
        'export',
        f'{top}/run',
        f'--export.out={top}/{form}',
        f'--export.format={form}',
        '--mesh.fsdp=-1',
        *more,
      )
    later = {
      r['step']: r['loss']
      for r in runs.records(f'{top}/whole')
      if r['kind'] == 'train' and r['step'] > 3
    }
    text = json.dumps(dict(losses=later), indent=2)
    pathlib.Path(top, 'expected.json').write_text(text)
    with tarfile.open(path, 'w:xz') as tar:
      for name in ('a', 'b', 'run', 'expected.json', *FORMS):
        tar.add(f'{top}/{name}', name)
