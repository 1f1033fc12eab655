"""The examples run as written, at a size for tests."""

import json
import pathlib
import runpy

import jax
import numpy as np
import pytest

import mtp_jax as mtp
from mtp_jax.checkpoint import metadata
from mtp_jax.cli import main
from mtp_jax.config import schema
from mtp_jax.model import heads
from tests.support import runs

EXAMPLES = pathlib.Path(runs.ROOT, 'examples')


def _example(name):
  return runpy.run_path(str(EXAMPLES / name))


@pytest.fixture
def families():
  """Registered families are the process's: what a test adds is removed."""
  before = {*heads.FAMILIES}
  yield
  for name in {*heads.FAMILIES} - before:
    del heads.FAMILIES[name], schema.HEAD_FAMILIES[name]


def test_training_loop_has_40_lines_and_learns(capsys):
  source = (EXAMPLES / 'train_loop.py').read_text()
  body = source.split('def main')[1].split('if __name__')[0]
  assert len(body.splitlines()) <= 40
  loss, text = _example('train_loop.py')['main'](steps=6, d_model=32, n_layers=5)
  assert loss < np.log(264) and text.startswith('def __init__(self')
  assert 'step 6: nats per token of head 1' in capsys.readouterr().out


def test_custom_head_trains_decodes_and_is_saved(tmp_path, families, capsys):
  model = _example('custom_head.py')['main'](str(tmp_path / 'run'), steps=10)
  assert model.cfg.heads.family == 'perceptron' and model.params.heads.up.shape == (2, 64, 128)
  found = model.generate('tick tock, ', max_new_tokens=11)
  plain = model.generate('tick tock, ', max_new_tokens=11, num_draft_tokens=0)
  np.testing.assert_array_equal(found.tokens, plain.tokens)
  losses = json.loads(capsys.readouterr().out.replace("'", '"'))
  assert max(losses.values()) < 3 * np.log(264)  # of three heads at the start


def test_custom_head_backward_strategies_agree(families):
  example = _example('custom_head.py')
  mtp.register_family(
    'perceptron',
    mtp.Family(example['specs'], example['block_input'], example['block_output'], layer=None),
    block_first=False,
  )
  grads = []
  for backward in ('remat', 'interleaved'):
    cfg = mtp.Config(
      model=mtp.ModelConfig(
        d_model=16, n_layers=1, d_ff=32, vocab_size=264, compute_dtype='float32', remat='none'
      ),
      heads=mtp.HeadsConfig(n=3, family='perceptron'),
      loss=mtp.LossConfig(backward=backward),
    )
    params = mtp.init(cfg, jax.random.key(0))
    tokens = np.arange(2 * 19, dtype=np.int32).reshape(2, 19)
    loss = jax.jit(jax.grad(lambda p: mtp.loss(p, {'tokens': tokens}, cfg)[0]))  # noqa: B023
    grads.append(loss(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *grads)


def test_heads_are_added_to_a_llama(tmp_path, store, monkeypatch):
  """A Llama of this program's own export stands for a downloaded one."""
  cfg = schema.Config(
    model=schema.ModelConfig(d_model=16, n_layers=2, n_attn_heads=2, vocab_size=264),
    heads=schema.HeadsConfig(n=1),
  )
  mtp.save(mtp.init(cfg, jax.random.key(0)), cfg, tmp_path / 'plain')
  example = _example('add_heads_to_llama.py')
  command = main.main  # the cache of compiled programs is the session's
  monkeypatch.setattr(main, 'main', lambda args: command([*args, '--train.compilation_cache=']))
  example['run']('export', f'{tmp_path}/plain', f'--export.out={tmp_path}/llama')
  (tmp_path / 'llama' / 'mtp_jax.json').unlink()
  small = ['--train.steps=3', '--optim.warmup_steps=1', '--data.seq_len=16', '--data.batch_size=8']
  example['main'](str(tmp_path / 'llama'), store, str(tmp_path), *small)
  cfg = metadata.read(str(tmp_path / 'model'), 3).cfg
  assert (cfg.heads.n, cfg.heads.family, cfg.train.freeze) == (3, 'sequential', 'trunk')
  assert (tmp_path / 'faster' / 'llama_mtp.py').exists()


def test_notebook_cells_run(monkeypatch):
  monkeypatch.setenv('MPLBACKEND', 'agg')
  cells = json.loads((EXAMPLES / 'what_heads_learn.ipynb').read_text())['cells']
  names = {'STEPS': 12}
  for cell in cells:
    if cell['cell_type'] == 'code':
      exec(''.join(cell['source']), names)  # noqa: S102
  curves = np.array(names['curves'])
  assert curves.shape == (12, 3) and (curves[-1] < curves[0]).all()
  assert names['entropy_KT'].shape == (3, 40)
