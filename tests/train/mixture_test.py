"""A run on a mixture of stores, one of prompts and completions, in tokens that
were trained on the first: from documents to a report."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from mtp_jax.cli import main
from mtp_jax.config import parse
from mtp_jax.data import store as store_lib
from mtp_jax.train import metrics
from tests.support import runs

FLAGS = dict(model__vocab_size=296, train__checkpoint_every=3)


def _prepare(root, name, documents, tokenizer):
  assert 0 == main.main(
    [
      'prepare',
      f'--data.documents={documents}',
      f'--data.store={root}/{name}',
      f'--data.tokenizer={tokenizer}',
      '--data.valid_fraction=0.3',
    ]
  )


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Stores code, chat and far of one tokenizer, other of another."""
  root = tmp_path_factory.mktemp('mixture')
  rng = np.random.default_rng(0)

  def text():
    return ''.join(rng.choice(list('abcde ()\n'), size=rng.integers(20, 90)))

  for name in ('code', 'far'):
    lines = (json.dumps(dict(text=text())) + '\n' for _ in range(60))
    (root / f'{name}.jsonl').write_text(''.join(lines))
  lines = (json.dumps(dict(ask=text(), say=text())) + '\n' for _ in range(60))
  (root / 'chat.jsonl').write_text(''.join(lines))
  _prepare(root, 'code', f'jsonl:{root}/code.jsonl', 'train:290')
  model = f'sentencepiece:{root}/code/tokenizer/sentencepiece.model'
  _prepare(root, 'chat', f'jsonl:{root}/chat.jsonl#ask+say', model)
  _prepare(root, 'far', f'jsonl:{root}/far.jsonl', model)
  _prepare(root, 'other', f'jsonl:{root}/code.jsonl', 'train:280')
  return root


@pytest.fixture(scope='module')
def mixture(root):
  return f'{root}/code:3,{root}/chat'


@pytest.fixture(scope='module')
def run(root, mixture):
  workdir = root / 'run'
  further = dict(eval__stores=f'new={root}/far')
  assert runs.train(mixture, workdir, **FLAGS, **further) == 0
  return workdir


def _fails(capsys, *args, **changes) -> str:
  capsys.readouterr()
  assert runs.train(*args, **FLAGS | dict(train__steps=9) | changes) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  return error


def test_each_validation_set_has_its_own_record(run, root):
  sets = [r for r in runs.records(run) if r['kind'] == 'eval']
  assert [(r['step'], r['source']) for r in sets] == [(6, 'code'), (6, 'chat'), (6, 'new')]
  assert len({r['loss_1'] for r in sets}) == 3
  assert all(np.isfinite(r['bits_per_byte']) for r in sets)
  cfg = parse.from_json((run / 'config.json').read_text())
  made = store_lib.open_store(f'{root}/code').manifest['tokenizer']
  assert cfg.data.tokenizer == f'sentencepiece#{made["fingerprint"][:12]}'
  assert cfg.data.store == f'{root}/code:3,{root}/chat'


def test_resume_of_a_mixture_is_bitwise(run, root, mixture):
  again = root / 'again'
  shutil.copytree(run, again)
  shutil.rmtree(again / 'checkpoints' / '6')
  further = dict(eval__stores=f'new={root}/far')
  assert runs.train(mixture, again, **FLAGS, **further) == 0
  runs.assert_same(runs.restored(again, 6), runs.restored(run, 6))
  assert runs.records(again) == runs.records(run)


def test_resume_with_another_mixture_or_tokenizer_is_refused(run, root, mixture, capsys):
  for stores in (f'{root}/code:2,{root}/chat', f'{root}/chat,{root}/code:3', f'{root}/code'):
    error = _fails(capsys, stores, run)
    assert f'--data.store={stores}: is not the store, or not' in error
  error = _fails(capsys, f'{root}/other', run)
  assert '--data.tokenizer=sentencepiece#' in error
  assert 'was started with sentencepiece#' in error
  error = _fails(capsys, mixture, run, data__tokenizer='bytes')
  assert f'the store {root}/code was made with a different one, train:290' in error
  error = _fails(capsys, mixture, root / 'new', data__seq_len=4000)
  assert 'no shard of the code train split has 4000 + 2 tokens' in error
  assert not (root / 'new').exists()


def _with_report(capsys, root, command, *args):
  path = root / f'{command}.json'
  capsys.readouterr()
  assert main.main([command, *args, f'--out={path}']) == 0
  return capsys.readouterr().out, json.loads(path.read_text())


def test_eval_of_each_validation_set_equals_the_runs(run, root, capsys):
  args = [f'{run}', '--train.compilation_cache=']
  out, found = _with_report(capsys, root, 'eval', *args)
  logged = {r['source']: r for r in metrics.read(str(run)) if 'source' in r}
  assert found['step'] == 6 and found['sources'].keys() == logged.keys()
  for name, r in logged.items():
    values = {k: v for k, v in r.items() if k not in ('kind', 'step', 'source')}
    assert found['sources'][name] == found['sources'][name] | values
    assert found['sources'][name]['top5_1'] >= values['accuracy_1']
  for expected in ('valid split of code', 'valid split of chat', 'new'):
    assert f'step 6, {expected}: ' in out
  assert out.count('bits per byte') == 3
  # A validation set equals that of its store alone.
  alone = [f'--data.store={root}/chat', '--eval.stores=']
  out, one = _with_report(capsys, root, 'eval', *args, *alone)
  assert f'valid split of {root}/chat: ' in out and 'sources' not in one
  assert {k: one[k] for k in found['sources']['chat']} == (found['sources']['chat'])
  wrong = [f'--data.store={root}/other', '--eval.stores=']
  assert main.main(['eval', *args, *wrong]) == 2
  error = capsys.readouterr().err
  assert 'mtp: --data.tokenizer=sentencepiece#' in error
  assert 'was made with a different one, train:280' in error


def test_report_shows_each_validation_set(run, root, capsys):
  out, found = _with_report(capsys, root, 'report', str(run))
  page = pathlib.Path(found['report']).read_text()
  for name in ('code', 'chat', 'new'):
    assert f'held-out loss of head 1 (nats), {name}<' in page
  for line, name in zip(out.splitlines(), ('code', 'chat', 'new'), strict=False):
    assert line.startswith(f'{run}: step 6, {name}: head 1 ')


def test_inspect_shows_sources_and_loss_mask(root, mixture, capsys):
  args = runs.args(mixture, '', **FLAGS)
  out, found = _with_report(
    capsys, root, 'inspect', *args, '--inspect.rows=8', '--inspect.tokens=16'
  )
  assert found['sources'].count('code') == 6
  assert found['sources'].count('chat') == 2
  split = store_lib.open_store(f'{root}/chat').split('train')
  scored, valid = np.array(found['loss_mask']), np.array(found['valid'])
  for b, (name, window) in enumerate(zip(found['sources'], found['windows'], strict=True)):
    assert f'window {window} of {name}: ' in out
    if name == 'code':
      assert scored[b].all()
    else:
      np.testing.assert_array_equal(scored[b], split.mask(window, 16, 2))
    for k in (1, 2):
      position = np.array(found['position'][b])
      ahead = position[k : 16 + k] - position[:16] == k
      np.testing.assert_array_equal(valid[k - 1, b], ahead & scored[b, k : 16 + k])
  assert not scored.all()
  assert '[x]: not a target: another document, or masked out' in out


def test_prepare_writes_one_store(root, capsys):
  for name in ('a,b', 'n=a', 'a:3'):
    assert main.main(['prepare', f'--data.store={name}']) == 2
    error = capsys.readouterr().err
    assert error == (
      f'mtp: --data.store={name}: prepare writes one store; no comma, NAME= or :WEIGHT\n'
    )
