"""The command line, from documents to a report."""

import json
import os

import jax
import numpy as np
import pytest

from mtp_jax.cli import main
from mtp_jax.config import schema
from mtp_jax.data import loader
from mtp_jax.data import store as store_lib
from mtp_jax.losses import metrics as metrics_lib
from mtp_jax.train import metrics, state
from tests.support import runs

SECTIONS = {
  'prepare': ['data'],
  'inspect': ['inspect', 'data', 'heads', 'train'],
  'train': ['train', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'distributed', 'eval'],
  'eval': ['eval', 'data', 'decode', 'bench.prompt_len', 'mesh', 'distributed'],
  'bench': ['bench', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'train'],
  'plan': ['plan', 'model', 'heads', 'loss', 'data', 'optim', 'mesh', 'train'],
  'generate': ['decode', 'mesh', 'bench'],
  'export': ['export', 'data', 'mesh'],
  'import': [
    'import',
    'train.workdir',
    'heads.family',
    'model.param_dtype',
    'model.compute_dtype',
    'mesh',
  ],
  'report': [],
}


NO_CACHE = '--train.compilation_cache='


def _fails(capsys, *args) -> str:
  """Returns the one stderr line of a command that exits with status 2."""
  capsys.readouterr()
  assert main.main([str(a) for a in args]) == 2
  out, error = capsys.readouterr()
  assert out == ''
  assert error.startswith('mtp: ') and error.count('\n') == 1, error
  return error[len('mtp: ') : -1]


# Help and errors.


def test_usage_names_the_commands(capsys):
  assert main.main(['--help']) == main.main(['help']) == 0
  out = capsys.readouterr().out
  for name in SECTIONS:
    assert f'\n  {name} ' in out
  assert main.main([]) == 2


@pytest.mark.parametrize('command', SECTIONS)
@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_fits_a_screen(capsys, command, flag):
  assert main.main([command, '--heads.n=3', flag]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith(f'usage: mtp {command} ')
  assert len(lines) <= 32 and max(map(len, lines)) <= 100
  shown = [line.split('=')[0].strip() for line in lines if line.startswith('  --')]
  assert shown == [f'--{name}' for name in main.COMMANDS[command].common.split()]


@pytest.mark.parametrize('command', SECTIONS)
def test_helpfull_lists_flags_with_defaults(capsys, command):
  assert main.main([command, '--heads.n=3', '--helpfull']) == 0
  lines = capsys.readouterr().out.splitlines()
  shown = [line.strip() for line in lines if line.startswith('  --')]
  default = schema.CommandConfig()
  wanted = []
  for section in SECTIONS[command]:  # the command's own come first
    for name in schema.fields():
      if section in (name, name.split('.')[0]):
        value = schema.get(default, name)
        shown_value = "''" if value in ('', ()) else value
        wanted.append(f'--{name}={shown_value}')
  if command == 'generate':
    wanted += ["--prompt=''", "--prompt_ids=''"]
  if command not in ('train', 'export', 'import'):  # these write a folder
    wanted.append("--out=''")
  assert shown == wanted
  if command == 'train':
    assert '--model.d_model=128' in shown and '--optim.lr=0.0003' in shown


# Each is refused before anything is compiled or written.
IMPOSSIBLE = [
  ('heads.n', 3, {}, 'at most 2'),  # of FLAGS' three layers
  ('heads.n', 0, {}, 'must be at least 1'),
  ('heads.n', 16, {'model.n_layers': 20}, 'must be below --data.seq_len=16'),
  ('model.d_model', 18, {'model.n_attn_heads': 4}, 'must be a multiple of --model.n_attn_heads=4'),
  ('model.d_model', 18, {}, 'a head is 9 wide; it must be even'),
  ('model.d_model', 0, {}, 'must be at least 1'),
  ('model.n_kv_heads', 3, {}, 'must divide --model.n_attn_heads=2'),
  ('model.n_kv_heads', 4, {}, 'must divide --model.n_attn_heads=2'),
  ('model.vocab_size', 1, {}, 'must be at least 2'),
  ('model.vocab_size', 257, {}, 'tokenizer bytes needs at least 258'),
  ('model.compute_dtype', 'float16', {}, 'one of float32, bfloat16'),
  ('model.remat', 'all', {}, 'one of none, block, dots'),
  ('model.attention', 'fast', {}, 'one of auto, reference, splash, flash'),
  ('model.attention', 'splash', {}, 'needs a multiple of 128 as --data.seq_len, not 16'),
  (
    'model.attention',
    'flash',
    {'data.seq_len': 128},
    'needs d_model / n_attn_heads of 16 to 256, not 8',
  ),
  (
    'model.attention',
    'splash',
    {'data.seq_len': 128},
    'is a kernel for tpu, but the devices are cpu',
  ),
  ('model.norm_eps', 0, {}, 'must be above 0'),
  ('heads.family', 'serial', {}, 'one of parallel'),
  ('loss.backward', 'lazy', {}, 'one of remat, interleaved'),
  ('loss.chunk_size', 5, {}, 'must divide --data.seq_len=16'),
  ('loss.chunk_size', 32, {}, 'must divide --data.seq_len=16'),
  ('loss.weights', '1', {}, 'at most --heads.n=2 weights'),
  ('loss.weights', '', {}, 'at most --heads.n=2 weights'),
  ('loss.weights', '0:1,1,1', {}, 'at most --heads.n=2 weights'),
  ('loss.weights', '0:-1', {}, 'weights >= 0'),
  ('loss.weights', '0:nan', {}, 'weights >= 0'),
  ('loss.weights', '0:inf', {}, 'weights >= 0'),
  ('loss.weights', '5:1', {}, 'steps that start at 0 and rise'),
  ('loss.weights', '0:1;5:1;5:2', {}, 'steps that start at 0 and rise'),
  ('loss.curriculum', '0:3', {}, '1 to --heads.n=2 heads'),
  ('loss.curriculum', '0:0', {}, '1 to --heads.n=2 heads'),
  ('loss.curriculum', '0:1.5', {}, '1 to --heads.n=2 heads'),
  ('loss.curriculum', '0:nan', {}, '1 to --heads.n=2 heads'),
  ('loss.curriculum', '0:inf', {}, '1 to --heads.n=2 heads'),
  ('loss.curriculum', '0:1,2', {}, '1 to --heads.n=2 heads'),
  ('loss.curriculum', '2', {}, 'steps that start at 0 and rise'),
  ('loss.z_loss', 'nan', {}, 'must be at least 0'),
  ('optim.lr', 'nan', {}, 'must be above 0'),
  ('optim.lr', 'inf', {}, 'must be a finite number'),
  ('optim.lr', 0, {}, 'must be above 0'),
  ('optim.b2', 1, {}, 'must be below 1'),
  ('optim.min_lr_ratio', 1.5, {}, 'must be at most 1'),
  ('optim.clip_norm', -1, {}, 'must be at least 0'),
  ('optim.schedule', 'linear', {}, 'one of cosine, wsd, constant'),
  ('optim.name', 'sgd', {}, 'one of adamw, muon'),
  ('optim.momentum', 1, {}, 'must be below 1'),
  ('optim.heads_lr_mult', -1, {}, 'must be above 0'),
  ('optim.trunk_lr_mult', 0, {}, 'must be above 0'),
  ('train.freeze', 'all', {}, 'one of none, trunk, heads'),
  ('train.freeze', 'trunk', {'heads.n': 1, 'heads.family': 'linear'}, 'no parameter would train'),
  ('optim.warmup_steps', 6, {}, 'must be below --train.steps=6'),
  ('optim.decay_steps', 0, {'optim.schedule': 'wsd'}, '1 to steps'),
  ('optim.decay_steps', 2, {'optim.schedule': 'wsd'}, 'warmup_steps = 1'),
  ('data.seq_len', 0, {}, 'must be at least 1'),
  ('data.seq_len', 100_000, {}, 'no shard of the train split has 100000 + 2'),
  ('data.tokenizer', 'words', {}, 'one of: bytes'),
  ('data.valid_fraction', 1, {}, 'must be below 1'),
  ('train.grad_accum_steps', 3, {}, 'must divide --data.batch_size=8'),
  ('train.seed', 2**32, {}, 'must be at most 4294967295'),
  ('train.max_nonfinite', 0, {}, 'must be at least 1'),
  ('train.workdir', '', {}, 'give the directory of the run'),
  ('data.store', '', {}, 'give the store that `mtp prepare` wrote'),
  ('data.teacher', 'runs/x', {}, 'is of `mtp prepare`; a run reads --loss.teacher=RUN or store'),
  (
    'heads.share_keys_values',
    True,
    {'heads.family': 'sequential'},
    'needs --heads.family=recursive',
  ),
  ('heads.draft_vocab', '300', {}, 'from 1 to --model.vocab_size=264'),
  ('heads.draft_vocab', '101', {'mesh.tensor': 2, 'mesh.fsdp': 4}, 'a multiple of mesh tensor=2'),
  ('decode.min_confidence', 0.5, {}, 'needs --heads.confidence'),
  (
    'data.batch_size',
    4,
    {},
    'must be a multiple of mesh data x fsdp = 8 times --train.grad_accum_steps=1',
  ),
  (
    'data.batch_size',
    8,
    {'train.grad_accum_steps': 2},
    'must be a multiple of mesh data x fsdp = 8 times --train.grad_accum_steps=2',
  ),
  ('mesh.fsdp', 3, {}, 'data=1 x fsdp=3 x tensor=1 does not fit 8 devices: the product must be 8'),
  ('mesh.fsdp', 4, {}, 'does not fit 8 devices'),
  ('mesh.data', 16, {}, 'does not fit 8 devices'),
  ('mesh.data', -1, {}, 'at least 1, or -1 on a single axis'),  # so is fsdp
  ('mesh.tensor', 0, {}, 'at least 1, or -1'),
  ('mesh.tensor', -1, {}, 'a single axis, and --mesh.fsdp is -1'),
  ('mesh.data', -2, {}, 'must be at least -1'),
  ('distributed.coordinator_address', 'here', {}, 'HOST:PORT, auto or empty'),
  ('distributed.coordinator_address', ':1234', {}, 'HOST:PORT, auto or empty'),
  ('distributed.coordinator_address', 'here:99999', {}, 'HOST:PORT, auto or empty'),
  ('distributed.num_processes', 2, {}, 'needs --distributed.coordinator_address=HOST:PORT'),
  (
    'distributed.process_id',
    1,
    {'distributed.coordinator_address': 'auto'},
    'needs --distributed.coordinator_address=HOST:PORT',
  ),
  (
    'distributed.process_id',
    2,
    {'distributed.coordinator_address': 'here:1234', 'distributed.num_processes': 2},
    'must be below --distributed.num_processes=2',
  ),
  ('distributed.heartbeat_timeout_s', 0, {}, 'must be at least 1'),
  ('model.n_kv_heads', 2, {'mesh.tensor': 4}, 'must be a multiple of mesh tensor=4'),
  ('model.d_model', 12, {}, 'must be a multiple of mesh fsdp=8'),
  ('model.d_ff', 33, {'mesh.tensor': 2}, 'must be a multiple of mesh tensor=2'),
  ('model.vocab_size', 265, {'mesh.tensor': 2}, 'must be a multiple of mesh tensor=2'),
]


@pytest.mark.parametrize('name, value, others, allowed', IMPOSSIBLE)
def test_invalid_configs_are_refused(
  store, tmp_path, capsys, monkeypatch, name, value, others, allowed
):
  for owner, function in ((jax.stages.Lowered, 'compile'), (state, 'init')):
    monkeypatch.setattr(owner, function, lambda *_: pytest.fail('too late'))
  workdir = tmp_path / 'run'
  args = runs.args(store, str(workdir))
  args += [f'--{n}={v}' for n, v in {**others, name: value}.items()]
  line = _fails(capsys, 'train', *args)
  if value != '' and isinstance(schema.fields()[name].default, float):
    value = float(value)
  assert line.startswith(f'--{name}={value}: ') and allowed in line
  assert not os.listdir(tmp_path)


def test_unknown_command_or_flag_is_refused(capsys, tmp_path):
  flag = f'--train.workdir={tmp_path}/run'
  line = _fails(capsys, 'trian', flag)
  assert line == (
    "no command 'trian'; there are prepare, inspect, train, eval, generate,"
    ' export, import, plan, bench, report'
  )
  assert "'model.d_modle'" in _fails(capsys, 'train', flag, '--model.d_modle=1')
  for command in ('prepare', 'inspect', 'train'):
    assert _fails(capsys, command, flag, 'x') == "'x' is not a flag"
  assert _fails(capsys, 'eval', 'a', 'b') == "'b' is not a flag"
  assert _fails(capsys, 'bench', 'step', 'x') == "'x' is not a flag"
  assert _fails(capsys, 'bench', 'x') == "bench needs one of loss, step, data, decode; not 'x'"
  assert _fails(capsys, 'bench') == 'bench needs one of loss, step, data, decode; none is given'
  assert _fails(capsys, 'report') == 'report needs a RUN: the directory of a run'
  for command in (['eval'], ['generate'], ['export'], ['bench', 'decode']):
    line = _fails(capsys, *command)
    assert line.startswith(f'{command[0]} needs a CHECKPOINT: a run directory')
  for command in ('prepare', 'inspect'):
    assert _fails(capsys, command).startswith('--data.store=: give the')
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
  'command, given',
  [
    ('import', '--out=x'),
    ('import', '--prompt=x'),
    ('export', '--out=x'),
    ('train', '--out=x'),
    ('train', '--prompt=x'),
    ('eval', '--prompt_ids=1'),
    ('report', '--prompt=x'),
    ('prepare', '--prompt=x'),
  ],
)
def test_unused_flag_is_refused(capsys, command, given):
  line = _fails(capsys, command, given)
  assert line.startswith(f'{given}: {command} does not use it')


def test_import_refuses_training_flags(capsys, tmp_path):
  line = _fails(
    capsys,
    'import',
    f'--import.path={tmp_path}',
    NO_CACHE,
    f'--train.workdir={tmp_path}/new',
    '--train.init_from=x',
  )
  assert line.startswith('--train.init_from=x: is set by the imported model')


def test_error_is_one_line_for_any_value(capsys, tmp_path, store):
  assert _fails(capsys, 'train', '--heads.n=1\n2') == (r'--heads.n=1\n2: must be an integer')
  assert _fails(capsys, 'report', 'a\nb').startswith(r'a\nb/metrics.jsonl: ')
  long = 'x' * 300
  for command, flag in (
    ('prepare', f'--data.store={tmp_path}/{long}'),
    ('train', f'--data.store={store}/{long}'),
    ('report', f'{tmp_path}/{long}'),
    ('report', f'--out={tmp_path}/{long}'),
    ('train', '--data.store=a\0b'),
    ('report', 'a\0b'),
  ):
    args = [] if command == 'report' else [f'--train.workdir={tmp_path}/w']
    line = _fails(capsys, command, flag, NO_CACHE, *args)
    assert len(line) < 1500 and ('--' in line or 'x' in line or 'NUL' in line)
  assert not os.listdir(tmp_path)


def test_missing_paths_are_refused(capsys, tmp_path, store, undisturbed):
  out = f'--out={tmp_path}/none/x.json'
  line = _fails(capsys, 'eval', f'{undisturbed}', out)
  assert line == f'{out}: there is no {tmp_path}/none'
  (tmp_path / 'file').write_text('')
  for workdir in ('file', 'file/run'):
    args = runs.args(store, f'{tmp_path}/{workdir}')
    line = _fails(capsys, 'train', *args)
    assert line.startswith(f'--train.workdir={tmp_path}/{workdir}: cannot')
  for path in ('file', 'none'):
    line = _fails(capsys, 'report', tmp_path / path)
    assert line.startswith(f'{tmp_path}/{path}/metrics.jsonl: has no record')
    line = _fails(capsys, 'eval', f'{tmp_path}/{path}', NO_CACHE)
    assert 'no complete checkpoint there' in line
    line = _fails(capsys, 'train', *runs.args(f'{tmp_path}/{path}', f'{tmp_path}/run'))
    assert line.startswith(f'--data.store={tmp_path}/{path}: no such directory')
  assert os.listdir(tmp_path) == ['file']


def test_process_exit_status_and_one_line_error(tmp_path):
  args = runs.args('none', str(tmp_path / 'run'), heads__n=3)
  process = runs.process(['-m', 'mtp_jax', 'train', *args])
  out, error = process.communicate()
  assert (process.returncode, out) == (2, '')
  assert error.startswith('mtp: --heads.n=3: ') and error.count('\n') == 1
  assert not os.listdir(tmp_path)


# Commands that succeed.


def _with_report(tmp_path, capsys, command, *args):
  """Returns (printed lines, content of --out), parsed as strict JSON."""
  path = tmp_path / f'{command}.json'
  capsys.readouterr()
  assert main.main([command, *map(str, args), f'--out={path}']) == 0
  out = capsys.readouterr().out.splitlines()
  return out, json.loads(path.read_text(), parse_constant=pytest.fail)


def test_prepare_train_and_report(tmp_path, capsys, monkeypatch):
  texts, store, run = (tmp_path / name for name in ('texts', 'store', 'run'))
  texts.mkdir()
  rng = np.random.default_rng(0)
  for i in range(40):
    text = ''.join(rng.choice(list('abc \n'), size=150))
    (texts / f'{i}.txt').write_text(text)
  monkeypatch.setenv('HOME', str(tmp_path))

  out, manifest = _with_report(
    tmp_path,
    capsys,
    'prepare',
    f'--data.documents=dir:{texts}',
    '--data.store=~/store',
    '--data.valid_fraction=0.2',
  )
  documents = [s['documents'] for s in manifest['splits'].values()]
  assert sum(documents) == 40 and len(documents) == 2
  assert store_lib.open_store(store).manifest == manifest
  assert f'train      {documents[0]} documents' in '\n'.join(out)

  args = runs.args('~/store', '~/run')
  assert main.main(['train', *args]) == 0
  assert capsys.readouterr().out.splitlines()[3] == f'writing to {run}'

  out, values = _with_report(tmp_path, capsys, 'eval', '~/run', NO_CACHE)
  (logged,) = [r for r in metrics.read(str(run)) if r['kind'] == 'eval']
  assert values.pop('workdir') == str(run)
  assert values.pop('step') == logged.pop('step') == 6
  assert logged.pop('kind') == 'eval'
  # Programs with and without calibration may round sums differently.
  for name, x in logged.items():
    assert values[name] == (pytest.approx(x, rel=1e-6) if isinstance(x, float) else x)
  assert values['top5_1'] > 0
  assert out[0].startswith(f'{run}, step 6, valid split of {store}: ')
  assert f'{values["loss_1"]:.4f}' in out[2]

  monkeypatch.undo()  # matplotlib keeps its list of fonts at home
  out, shown = _with_report(tmp_path, capsys, 'report', run)
  assert out[-1] == f'report: {run}/report.html'
  assert shown['report'] == f'{run}/report.html'
  assert f'{run}/report/loss-run.png' in shown['figures']
  assert shown['last'] == {str(run): metrics.read(str(run))[-1]}
  assert out[0].startswith(f'{run}: step 6, head 1 {values["loss_1"]:.4f}')

  # Again, with existing outputs.
  assert 'exists' in _fails(
    capsys, 'prepare', f'--data.documents=dir:{texts}', f'--data.store={store}'
  )
  assert main.main(['train', *runs.args(str(store), str(run))]) == 0
  assert 'training already finished' in capsys.readouterr().out


def test_run_flags_reproduce_the_run(undisturbed, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert 0 == main.main(['train', f'--flagfile={undisturbed}/run.flags', '--train.workdir=again'])
  again = tmp_path / 'again'
  runs.assert_same(runs.restored(again, 6), runs.restored(undisturbed, 6))
  assert runs.records(again) == runs.records(undisturbed)
  for name in ('run.flags', 'config.json'):
    old, new = ((w / name).read_text() for w in (undisturbed, again))
    assert old.replace(str(undisturbed), str(again)) == new


def _evaluate(tmp_path, capsys, path, *args):
  return _with_report(tmp_path, capsys, 'eval', f'{path}', NO_CACHE, *args)[1]


def test_eval_of_an_older_checkpoint_or_another_split(undisturbed, tmp_path, capsys, monkeypatch):
  last = _evaluate(tmp_path, capsys, undisturbed)
  older = _evaluate(tmp_path, capsys, undisturbed / 'checkpoints' / '3')
  assert (last['step'], older['step']) == (6, 3)
  assert older['loss_1'] > last['loss_1']
  of_train = _evaluate(tmp_path, capsys, undisturbed, '--eval.split=train')
  assert of_train['loss_1'] != last['loss_1']
  fewer = _evaluate(tmp_path, capsys, undisturbed, '--eval.batches=1')
  assert fewer['loss_1'] != last['loss_1']
  scalars = metrics_lib.scalars
  monkeypatch.setattr(metrics_lib, 'scalars', lambda raw: scalars(raw) | dict(acceptance_2=np.nan))
  undefined = _evaluate(tmp_path, capsys, undisturbed)
  assert undefined == last | dict(acceptance_2=None)


def test_eval_keeps_results_when_a_later_task_fails(undisturbed, tmp_path, capsys):
  text = tmp_path / 'no_name.txt'
  text.write_text('there is no name in this')
  out = tmp_path / 'out.json'
  assert (
    main.main(
      [
        'eval',
        f'{undisturbed}',
        NO_CACHE,
        f'--out={out}',
        '--eval.tasks=heldout,induction',
        f'--eval.data=text:{text}',
      ]
    )
    == 2
  )
  shown = capsys.readouterr()
  assert 'targets of head 1' in shown.out
  assert shown.err.startswith('mtp: --eval.data=') and 'no name' in shown.err
  assert json.loads(out.read_text())['loss_1'] > 0


@pytest.mark.parametrize('flag', ['heads.n=1', 'model.d_model=32', 'loss.token_order_weight=0.5'])
def test_eval_of_another_model_is_refused(undisturbed, capsys, flag):
  path = f'{undisturbed}'
  line = _fails(capsys, 'eval', path, f'--{flag}', NO_CACHE)
  assert line.startswith(f'--{flag}: the checkpoint {undisturbed} was trained')


@pytest.mark.parametrize('n_drafted', [0, 4])
def test_inspect_shows_the_batch_of_a_step(store, tmp_path, capsys, n_drafted):
  args = [f'--{n}={v}' for n, v in runs.FLAGS.items()]
  out, shown = _with_report(
    tmp_path,
    capsys,
    'inspect',
    *args,
    f'--data.store={store}',
    '--inspect.step=3',
    '--inspect.rows=8',
    '--inspect.tokens=16',
    f'--heads.draft_vocab={n_drafted or ""}',
  )
  split = store_lib.open_store(store).split('train')
  count_V = np.bincount(np.concatenate([*split.documents()]), minlength=264)
  drafted = np.argsort(-count_V, stable=True)[: n_drafted or 264]
  rows = loader.row_indices([split.n_windows(16, 2)], [1], 0, 8, 3).tolist()
  assert shown['step'] == 3 and shown['windows'] == rows
  lines = [line for line in out if line[:5].strip().isdigit()]
  valid_KBT = np.array(shown['valid'])
  for b, row in enumerate(rows):
    tokens_U, position_U = split.window(row, 16, 2)
    assert shown['tokens'][b] == tokens_U.tolist()
    assert shown['position'][b] == position_U.tolist()
    for k in (1, 2):
      for t in range(16):
        same = position_U[t + k] - position_U[t] == k
        same &= k == 1 or tokens_U[t + k] in drafted
        assert valid_KBT[k - 1, b, t] == same
        assert shown['targets'][k - 1][b][t] == tokens_U[t + k]
  assert shown['counts'] == valid_KBT.sum((1, 2)).tolist()
  assert 0 < shown['counts'][1] < shown['counts'][0] < 8 * 16
  for b in range(8):
    for t, line in enumerate(lines[16 * b : 16 * (b + 1)]):
      assert int(line[:5]) == t
      assert line.count('  [') == (~valid_KBT[:, b, t]).sum()


def test_report_of_several_runs(undisturbed, tmp_path, capsys):
  run = tmp_path / 'run'
  run.mkdir()
  records = metrics.read(str(undisturbed))[:3]
  records[-1]['loss_1'] = None  # a step that was not finite
  (run / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
  out, shown = _with_report(tmp_path, capsys, 'report', run, undisturbed)
  assert out[0].startswith(f'{run}: step 3, head 1 -, head 2 ')
  assert out[1].startswith(f'{undisturbed}: step 6, head 1 ')
  assert shown['last'][str(run)] == records[-1]
  assert (run / 'report.html').exists()
  assert not (undisturbed / 'report.html').exists()
