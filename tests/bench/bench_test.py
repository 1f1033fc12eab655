"""`mtp bench`: values and tables, and the baselines for comparison."""

import itertools
import json

import jax
import numpy as np
import pytest

from mtp_jax.bench import run
from mtp_jax.cli import flags, main
from mtp_jax.config import fields, schema, validate
from mtp_jax.model import flops
from mtp_jax.parallel import chips
from tests.baselines import compare, n_logits
from tests.support import runs, tiny

TINY = runs.FLAGS | {'model.n_layers': 5, 'bench.rounds': 2, 'optim.warmup_steps': 1}


def _args(*more, what='loss', **changes):
  values = TINY | {k.replace('__', '.'): v for k, v in changes.items()}
  return ['bench', what, *(f'--{n}={v}' for n, v in values.items()), *more]


def _bench(tmp_path, capsys, **changes):
  """Returns (printed lines, contents of --out), which must be strict JSON."""
  path = tmp_path / 'bench.json'
  capsys.readouterr()
  assert main.main(_args(f'--out={path}', **changes)) == 0
  out = capsys.readouterr().out.splitlines()
  return out, json.loads(path.read_text(), parse_constant=pytest.fail)


def _positive(row):
  for name in ('time_s', 'temp_bytes'):
    assert row[name] > 0, name
  ratios = ('over_first_n', 'over_first_schedule')
  for name in (*ratios, *(f'cpu_{name}' for name in ratios)):
    ratio = row[name]
    assert 0 < ratio['min'] <= ratio['median'] <= ratio['max']


ONE = dict(median=1.0, min=1.0, max=1.0)


def _of_itself(rows):
  """Checks that ratios to the first n, schedule and chunk are 1 for themselves."""
  first = rows[0]
  for row in rows:
    if row['n'] == first['n']:
      assert row['over_first_n'] == row['cpu_over_first_n'] == ONE
    if (row['schedule'], row['chunk']) == (first['schedule'], first['chunk']):
      assert row['over_first_schedule'] == ONE


def _one_program_per_number_of_heads(monkeypatch, name) -> list:
  """Patches a function that builds programs to build one for all schedules and
  chunks; returns the requested Configs. Their times are not tested here."""
  make, made, requested = getattr(run, name), {}, []

  def once(cfg, mesh, teacher):
    requested.append(cfg)
    if cfg.heads.n not in made:
      made[cfg.heads.n] = make(cfg, mesh, teacher)
    return made[cfg.heads.n]

  monkeypatch.setattr(run, name, once)
  return requested


def test_loss_bench_has_a_row_for_each_variant(tmp_path, capsys, monkeypatch):
  requested = _one_program_per_number_of_heads(monkeypatch, 'loss_program')
  out, values = _bench(tmp_path, capsys, bench__heads='1,3', bench__chunk_size='0,4')
  rows = values['rows']
  assert [(r['schedule'], r['chunk'], r['n']) for r in rows] == list(
    itertools.product(('remat', 'interleaved'), (0, 4), (1, 3))
  )
  assert [(c.loss.backward, c.loss.chunk_size, c.heads.n) for c in requested] == [
    (r['schedule'], r['chunk'], r['n']) for r in rows
  ]
  for row in rows:
    _positive(row)
  _of_itself(rows)
  assert len(out) == 2 + len(rows)
  assert out[0].startswith('loss on 8 x cpu, jax ')
  assert values['what'] == 'loss' and values['device_kind'] == 'cpu'
  assert values['versions']['jax'] == jax.__version__
  assert values['config']['model']['d_model'] == 16
  assert values['config']['data']['seq_len'] == 16
  assert values['device_peak_bytes'] is None  # not counted on a CPU


@pytest.mark.parametrize(
  'more',
  [
    dict(heads__family='sequential', loss__token_order_weight=0.5),
    dict(heads__family='residual', loss__head_loss='kl'),
    dict(heads__unembedding='tied', loss__curriculum='0:1;5:2', loss__weights='0:1,.3'),
    dict(
      heads__unembedding='replicated',
      train__grad_accum_steps=2,
      data__batch_size=16,
      bench__documents=3,
    ),
  ],
)
def test_loss_bench_of_every_head_family(tmp_path, capsys, more):
  out, values = _bench(
    tmp_path,
    capsys,
    bench__heads='3',
    bench__rounds=1,
    bench__backward='interleaved',
    bench__chunk_size='4',
    **more,
  )
  for row in values['rows']:
    _positive(row)
  assert ('head_loss kl' in out[0]) == ('loss__head_loss' in more)


def test_step_bench_compares_time_with_flops(tmp_path, capsys, monkeypatch):
  peak = chips.CHIPS['NVIDIA H100']
  monkeypatch.setattr(chips, 'chip', lambda kind: peak)
  requested = _one_program_per_number_of_heads(monkeypatch, '_step_program')
  out, values = _bench(tmp_path, capsys, what='step', bench__heads='1,2', bench__iters=2)
  rows = values['rows']
  assert [(r['schedule'], r['n']) for r in rows] == [
    ('remat', 1),
    ('remat', 2),
    ('interleaved', 1),
    ('interleaved', 2),
  ]
  assert [(c.loss.backward, c.heads.n) for c in requested] == [
    (r['schedule'], r['n']) for r in rows
  ]
  _of_itself(rows)
  cfg = flags.parse(_args()[1:]).config()
  for row in rows:
    _positive(row)
    n = row['n']
    c = schema.replace(cfg, **{'heads.n': n})
    assert row['tokens_per_s'] == pytest.approx(8 * 16 / row['time_s'])
    done = row['tokens_per_s'] * flops.flops_per_token(c, n)
    assert row['mfu'] == pytest.approx(done / (8 * peak.flops_per_s))
    assert row['of_matmul'] == pytest.approx(done / values['matmul_flops_per_s'])
    one = schema.replace(cfg, **{'heads.n': 1})
    ratio = flops.flops_per_token(c, n, False) / flops.flops_per_token(one, 1, False)
    assert row['flops_ratio'] == pytest.approx(ratio)
    for name in ('', 'cpu_'):
      over = row['cpu_over_flops' if name else 'time_over_flops']['median']
      assert over == pytest.approx(row[f'{name}over_first_n']['median'] / ratio)
  assert values['flops_ratio_causal'] is False  # T = 16: the reference
  assert len(out) == 2 + len(rows) + 2


def test_step_bench_on_cpu_has_no_mfu(tmp_path, capsys):
  out, values = _bench(
    tmp_path, capsys, what='step', bench__heads='2', bench__backward='', bench__rounds=1
  )
  (row,) = values['rows']
  assert row['mfu'] is None and row['of_matmul'] > 0
  assert row['schedule'] == 'remat' and row['time_over_flops'] == ONE
  assert 'n/a' in out[2]


@pytest.mark.slow
def test_data_bench_compares_loader_with_step(store, tmp_path, capsys):
  out, values = _bench(
    tmp_path,
    capsys,
    what='data',
    data__store=store,
    bench__rounds=1,
    model__vocab_size=264,
    data__batch_size=64,
  )
  assert values['n_batches'] == 2**18 // (64 * 16)
  assert values['loader_tokens_per_s'] > 0 < values['step_tokens_per_s']
  assert values['loader_over_step']['median'] == pytest.approx(
    values['loader_tokens_per_s'] / values['step_tokens_per_s']
  )
  assert len(out) == 4


@pytest.mark.parametrize(
  'flag, value, problem',
  [
    ('bench.heads', '1,x', 'different ones, with commas: numbers above 0'),
    ('bench.heads', '0', 'different ones, with commas: numbers above 0'),
    ('bench.heads', '2,2', 'different ones, with commas: numbers above 0'),
    ('bench.heads', '1,5', '--heads.n=5: each head is one of'),
    ('bench.chunk_size', '0,3', '--loss.chunk_size=3: must divide --data.seq_len=16'),
    ('bench.chunk_size', '-1', 'different ones, with commas: numbers of positions'),
    ('bench.backward', 'lazy', 'different ones, with commas: of remat, interleaved'),
    ('bench.rounds', 0, 'must be at least 1'),
    ('bench.iters', 0, 'must be at least 1'),
    ('bench.documents', 0, 'must be at least 1'),
    ('bench.documents', 17, 'must be at most --data.seq_len=16'),
  ],
)
def test_bad_bench_flags_raise(capsys, flag, value, problem):
  capsys.readouterr()
  assert main.main(_args(f'--{flag}={value}')) == 2
  out, error = capsys.readouterr()
  assert out == '' and error.count('\n') == 1
  assert error.startswith(f'mtp: --{flag}={value}: {problem}')


def test_drafts_of_a_shared_module_may_be_more_than_its_heads():
  found = {'heads.n': 2, 'heads.family': 'recursive', 'bench.num_draft_tokens': '0,6'}
  cfg = schema.replace(schema.CommandConfig(), **found)
  with pytest.raises(fields.ConfigError, match='= 1, of a shared module to --decode.num_draft'):
    validate.validate(cfg)
  validate.validate(schema.replace(cfg, **{'decode.num_draft_tokens': '6'}))


def test_data_bench_requires_a_store(capsys):
  assert main.main(_args(what='data')) == 2
  assert capsys.readouterr().err.startswith('mtp: --data.store=: give the')


# The baselines compute the same loss and gradients.


def _ours():
  c = tiny.cfg(heads__n=3, model__n_layers=5, loss__backward='interleaved')
  rows = tiny.batch(c, packed=False)
  model = jax.device_get(tiny.model(c, tiny.mesh(c)))
  (total, _), (grads, _) = tiny.value_and_grad(c, rows)
  return c, model, rows['tokens'][0], total, tiny.flat(grads)


def _same(found, expected):
  assert found.keys() == expected.keys()
  for name, x in found.items():
    np.testing.assert_allclose(x, expected[name], rtol=2e-4, atol=2e-6, err_msg=name)


def test_n_logits_baseline_matches():
  c, model, tokens_BU, total, expected = _ours()
  step = jax.jit(jax.value_and_grad(n_logits.loss), static_argnums=(2, 3))
  value, grads = step(jax.tree.map(jax.numpy.asarray, model), tokens_BU, 3, c.model)
  np.testing.assert_allclose(value, total, rtol=1e-5)
  _same(tiny.flat(grads), expected)


@pytest.mark.parity
def test_torch_baseline_matches():
  import torch

  from tests.baselines import torch_sequential

  c, model, tokens_BU, total, expected = _ours()
  p = torch_sequential.load(model)
  tokens = torch.tensor(tokens_BU).long()
  for _ in range(2):  # gradients of two steps do not accumulate
    value = torch_sequential.step(p, tokens, 3, c.model)
  np.testing.assert_allclose(value, total, rtol=1e-5)
  _same(torch_sequential.gradients(p), expected)


def test_compare_rejects_unsupported_models():
  with pytest.raises(SystemExit, match='--heads.family: the baselines support'):
    compare.main(['--heads.family=causal'])


def test_comparison_ratios():
  found = {
    (contender, n): dict(loss=1.0, grown_bytes=None, seconds=[s * n, 2 * s * n], cpu=[n, s])
    for contender, s in (('interleaved', 2.0), ('torch', 3.0))
    for n in (1, 4)
  }
  lines, rows = compare.table(found)
  assert [r['over_interleaved']['median'] for r in rows] == [1, 1, 1.5, 1.5]
  assert [r['over_first_n']['median'] for r in rows] == [1, 4, 1, 4]
  assert [r['cpu_over_interleaved']['max'] for r in rows] == [1, 1, 1.5, 1.5]
  assert len(lines) == 4
