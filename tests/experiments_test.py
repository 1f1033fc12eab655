"""Every experiment parses, has the stated size and length, and trains."""

import dataclasses
import functools
import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.cli import flags
from mtp_jax.config import schema
from mtp_jax.interop import config_json, hf
from mtp_jax.model import heads, lm, params
from mtp_jax.parallel import sharding
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib
from tests.support import runs, tiny

FOLDER = pathlib.Path(runs.ROOT, 'experiments')
FILES = sorted(p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob('*.*'))
FIELDS = ('Purpose', 'Command', 'Hardware', 'Time', 'Expect')


@functools.cache
def _config(name, *more) -> schema.Config:
  return flags.parse([f'--flagfile={FOLDER}/{name}', *more]).config()


def _text(name):
  return (FOLDER / name).read_text()


def _head(name) -> str:
  """The comment at the start of a file, without its marks."""
  return re.match('(#.*\n)*', _text(name))[0].replace('# ', '')


def _comment_fields(name) -> dict[str, str]:
  """Returns the fields of the head comment."""
  lines, found, field = _head(name).splitlines(), {}, None
  for line in lines:
    word = line.split(' ')[0]
    field = word if word in FIELDS else field if line[:1] == ' ' else None
    if field:
      found[field] = f'{found.get(field, "")} {line.removeprefix(field).strip()}'
  return {field: text.strip() for field, text in found.items()}


PARTS = [name for name in FILES if 'included by run files' in _head(name)]
RUNS = [name for name in FILES if name not in PARTS]
# At the sizes of a publication, of the paper's own but for star_graph/.
SMALL = 'small/', 'add_heads/', 'heads/'
LARGE = [n for n in RUNS if n != 'smoke.flags' and not n.startswith(SMALL)]
PAPER = [name for name in LARGE if not name.startswith('star_graph/')]


def _included(name):
  """The files that a file includes, itself as well, as they are on disk."""
  found = {(FOLDER / name).resolve()}
  for path in re.findall('^--flagfile=(.*)$', _text(name), re.M):
    inner = (FOLDER / name).parent / path
    found |= _included(inner.resolve().relative_to(FOLDER).as_posix())
  return found


def test_flag_file_is_a_run_or_included():
  assert all(name.endswith('.flags') for name in FILES)
  used = set.union(*map(_included, RUNS))
  # Shapes of other models than the paper's are for a reader's own runs.
  shapes = {FOLDER / f'size/{name}.flags' for name in PUBLISHED}
  assert used | shapes == {FOLDER / name for name in FILES}
  for name in PARTS:
    assert not _comment_fields(name), f'{name}: a part has no command of its own'


PUBLISHED = {  # model_type, parameters of a next-token model, tied unembeddings counted once
  'qwen3_0.6b': ('qwen3', 596_049_920),
  'qwen3_1.7b': ('qwen3', 1_720_574_976),
  'qwen3_4b': ('qwen3', 4_022_468_096),
  'qwen3_8b': ('qwen3', 8_190_735_360),
  'gemma3_1b': ('gemma3_text', 999_885_952),
  'gemma3_4b': ('gemma3_text', 3_880_263_168),
  'olmo2_1b': ('olmo2', 1_484_916_736),
  'olmo2_7b': ('olmo2', 7_298_617_344),
  'llama3.2_1b': ('llama', 1_235_814_400),
  'mistral_7b': ('mistral', 7_241_732_096),
  'qwen2.5_0.5b': ('qwen2', 494_032_768),
  'olmo3_7b': ('olmo3', 7_298_011_136),
  'gemma2_2b': ('gemma2', 2_614_341_888),
  'smollm3_3b': ('smollm3', 3_075_098_624),
  'glm4_9b': ('glm4', 9_400_279_040),
  'mimo_7b': ('qwen2', 7_622_619_136),  # without its module
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_are_exact(name):
  kind, count = PUBLISHED[name]
  cfg = _config(f'size/{name}.flags', '--heads.n=1')
  assert params.count(lm.specs(cfg)) == count
  assert f'{count:,} parameters with one head' in _head(f'size/{name}.flags')
  assert config_json.of(cfg) == kind


ADDED = sorted(p.stem for p in (FOLDER / 'add_heads').glob('*_*b.flags'))
CONFIGS = json.loads((FOLDER.parent / 'tests/interop/published.json').read_text())


def test_every_family_has_a_recipe_and_its_shape_is_the_published_one():
  left = dict(CONFIGS)
  for name in ADDED:
    kind = 'mimo' if name.startswith('mimo') else PUBLISHED[name][0]
    published = hf.read('x', left.pop(kind)['config'], {}).model
    ours = _config(f'add_heads/{name}.flags').model
    # What a run may choose for itself.
    own = ('max_position_embeddings', 'param_dtype', 'compute_dtype')
    kept = {field: getattr(published, field) for field in own}
    kept['n_kv_heads'] = published.n_kv_heads  # 0 = as many as heads
    assert (ours.n_kv_heads or ours.n_attn_heads) == published.n_kv_heads
    assert dataclasses.replace(ours, **kept) == published, name
  assert not left


@pytest.mark.parametrize('name', FILES)
def test_experiment_is_a_valid_config(name):
  # The smallest sizes have no room for the default n.
  alone = name in PARTS and '--heads.n=' not in _text(name)
  cfg = _config(name, *(['--heads.n=1'] if alone else []))
  assert cfg.train.workdir == cfg.data.store == ''


@pytest.mark.parametrize('name', RUNS)
def test_head_comment_is_complete_and_its_command_runs_the_file(name):
  found = _comment_fields(name)
  assert list(found) == list(FIELDS) and all(found.values())
  command = shlex.split(found['Command'].replace('\\', ''))
  itself = f'--flagfile=experiments/{name}'
  if command[0] == 'mtp':
    assert command[1:3] == ['train', itself]
    given = flags.parse(command[2:])
    assert {'data.store', 'train.workdir'} <= given.given.keys()
    changed = schema.changed(_config(name), given.config())
    # The model that heads are added to is given like the store.
    assert [x for x in changed if x[0] != 'train.init_from'] == []
  else:
    (script,) = command
    assert itself in pathlib.Path(runs.ROOT, script).read_text()


@pytest.mark.parametrize('name', LARGE)
def test_head_comment_counts_are_correct(name):
  n_params = params.count(lm.specs(_config(name)))
  count, unit, gib = re.match(
    r'([\d.]+)([BM]) parameters: ([\d.]+) GiB', _comment_fields(name)['Hardware']
  ).groups()
  stated = float(count) * dict(B=1e9, M=1e6)[unit]
  np.testing.assert_allclose(stated, n_params, rtol=2e-3)
  # Parameters and two moments of four bytes.
  np.testing.assert_allclose(float(gib), 12 * n_params / 2**30, rtol=5e-3)
  n = re.search(r'n = (\d+)\.', _head(name))[1]
  assert int(n) == _config(name).heads.n


# Table S13: windows x context in 2^20 tokens, steps, warm-up, peak, end ratio,
# and the tokens that the run is named for.
TABLE = {
  'scaling/(0.3|0.6|1.3|3)b': (8, 10_850, 1000, 3e-4, 0.03, 91e9),
  'scaling/7b': (8, 25_000, 2000, 3e-4, 0.03, 200e9),
  'scaling/13b': (8, 25_000, 1000, 3e-4, 0.03, 200e9),
  'code/7b_200b': (8, 25_000, 2000, 3e-4, 0.03, 200e9),
  'code/7b_500b': (7, 68_570, 2000, 3e-4, 0.03, 500e9),
  'code/7b_1t': (7, 136_240, 2000, 3e-4, 0.03, 1000e9),
  'families/': (8, 25_000, 2000, 3e-4, 0.03, 200e9),
  'bytes/7b': (12, 25_000, 2000, 3e-4, 0.03, 313e9),
  'language/7b_200b': (8, 25_000, 2000, 3e-4, 0.10, 200e9),
  'language/7b_500b': (8, 60_000, 2000, 3e-4, 0.10, 500e9),
  'induction/': (0.25, 100_000, 2000, 1e-4, 0.03, None),
  'arithmetic/': (0.25, 100_000, 2000, 1e-4, 0.03, None),
}


@pytest.mark.parametrize('name', PAPER)
def test_training_tokens_are_as_published(name):
  (row,) = [values for key, values in TABLE.items() if re.match(key, name)]
  batch, steps, warmup_steps, lr, end_ratio, budget = row
  cfg = _config(name)
  o, tokens = cfg.optim, cfg.data.batch_size * cfg.data.seq_len
  assert tokens == batch * 2**20
  assert (cfg.train.steps, o.warmup_steps) == (steps, warmup_steps)
  assert (o.lr, o.min_lr_ratio, o.schedule) == (lr, end_ratio, 'cosine')
  assert (o.b1, o.b2, o.weight_decay, o.clip_norm) == (0.9, 0.95, 0.1, 1.0)
  context = dict(bytes=8192, induction=2048, arithmetic=2048)
  context = context.get(name.split('/')[0], 4096)
  if name.startswith('arithmetic/30m'):
    context = 1024
  assert cfg.data.seq_len == context
  if budget:  # 25,000 x 8 x 2^20 is 209.7e9, and called 200B
    off = abs(tokens * steps / budget - 1)
    assert off < (0.05 if budget == 200e9 else 0.01)


# As published, at 32,000 rows of vocabulary.
TOTALS = {
  '1m': 9.5e6,
  '3m': 19.8e6,
  '10m': 35.2e6,
  '30m': 66.9e6,
  '100m': 148e6,
  '300m': 387e6,
  '1b': 1.12e9,
  '0.3b': 297e6,
  '0.6b': 630e6,
  '1.3b': 1.36e9,
  '3b': 3.02e9,
  '7b': 6.74e9,
  '13b': 13.02e9,
}


@pytest.mark.parametrize('name', PAPER)
def test_parameter_counts_are_as_published(name):
  """For every n and family: heads replace layers, except in bytes/."""
  cfg = _config(name)
  folder, file = name.split('/')
  size = '7b' if folder == 'families' else file.split('_')[0]
  if folder == 'bytes':
    assert heads.trunk_layers(cfg) == 31
    assert cfg.heads.n > 1 or cfg.model.n_layers == 32
    cfg = schema.replace(cfg, **{'heads.n': 1, 'model.n_layers': 32, 'heads.unembedding': 'shared'})
  cfg = schema.replace(cfg, **{'model.vocab_size': 32_000})
  assert abs(params.count(lm.specs(cfg)) / TOTALS[size] - 1) < 0.01


def test_family_experiments_differ_in_family_only():
  cfgs = [_config(name) for name in PAPER if name.startswith('families/')]
  kinds = {(c.heads.family, c.heads.unembedding) for c in cfgs}
  assert kinds == {(family, 'shared') for family in heads.FAMILIES} | {('parallel', 'replicated')}
  totals = [params.count(lm.specs(c)) for c in cfgs]
  assert max(totals) < 1.01 * min(totals)
  (parallel,) = [_config(n) for n in PAPER if n == 'families/parallel.flags']
  assert parallel == _config('code/7b_200b_n4.flags')
  for cfg in cfgs:
    assert {name for name, _, _ in schema.changed(parallel, cfg)} <= {
      'heads.family',
      'heads.unembedding',
      'model.n_layers',
      'model.d_ff',
    }


def test_list_of_experiments():
  """No other test would detect that the files of a row of table S13 are missing."""

  def of(pattern, ns):
    return {f'{pattern}_n{n}.flags' for n in ns}

  want = {'smoke.flags'} | {
    f'families/{family}.flags' for family in (*heads.FAMILIES, 'replicated')
  }
  for size in ('0.3b', '0.6b', '1.3b', '3b', '7b', '13b'):
    want |= of(f'scaling/{size}', (1, 2, 4))
  for budget in ('200b', '500b', '1t'):
    want |= of(f'code/7b_{budget}', (1, 2, 4, 6, 8))
  want |= of('bytes/7b', (1, 8, 16, 32))
  for budget in ('200b', '500b'):
    want |= of(f'language/7b_{budget}', (1, 2, 4))
  for size in ('1m', '3m', '10m', '30m', '100m', '300m', '1b'):
    want |= of(f'induction/{size}', (1, 2))
  for size in ('30m', '100m'):
    want |= of(f'arithmetic/{size}', (1, 2, 4))
  want |= {f'star_graph/n{n}.flags' for n in (1, 2, 4)}
  assert set(RUNS) >= want


SIBLINGS = {}  # small sibling -> the runs that it represents
for _name in RUNS:
  SIBLINGS.setdefault(tiny.sibling(_config(_name)), []).append(_name)


def test_small_siblings_keep_the_defining_flags():
  for small, names in SIBLINGS.items():
    for cfg in map(_config, names):
      assert (small.heads, small.loss) == (cfg.heads, cfg.loss)
      assert small.train.grad_accum_steps == cfg.train.grad_accum_steps
      shrunk = {name for name, _, _ in schema.changed(cfg, small)}
      assert shrunk <= {
        'model.d_model',
        'model.n_layers',
        'model.n_attn_heads',
        'model.n_kv_heads',
        'model.d_ff',
        'model.vocab_size',
        'data.tokenizer',
        'data.seq_len',
        'data.batch_size',
        'optim.warmup_steps',
      }
      assert small.optim.warmup_steps > 0
  assert len(SIBLINGS) < len(RUNS) / 2


# A sum of heads, a chain that ends in head 1, and one that feeds tokens. Of the
# others the step is traced alone: losses and gradients of all families are
# those of float64 in tests/losses/loss_test.py, and no optimizer knows of families.
TRAINED = ('parallel', 'anticausal', 'recursive')
MOST_HEADS = {  # of each family
  small.heads.family: small for small in sorted(SIBLINGS, key=lambda c: c.heads.n)
}


def _cases():
  """All siblings; slow except those with the most heads of some families."""
  quick = [MOST_HEADS[family] for family in TRAINED]
  for small, names in SIBLINGS.items():
    marks = [] if small in quick else [pytest.mark.slow]
    yield pytest.param(small, names, id=names[0], marks=marks)


@pytest.mark.parametrize('family', sorted(MOST_HEADS.keys() - set(TRAINED)))
def test_step_of_small_sibling_lowers(family):
  small = MOST_HEADS[family]
  mesh = tiny.mesh(small)
  with jax.set_mesh(mesh):
    traced = step_lib.trace(small, mesh, small.heads.n)
  _, values = traced.out_info
  assert values['loss_sum_K'].shape == (small.heads.n,)


@pytest.mark.parametrize('small, names', _cases())
def test_small_sibling_trains(small, names):
  m = tiny.mesh(small)
  losses = []
  with jax.set_mesh(m):
    rows = sharding.put_batch(m, tiny.batch(small))
    bytes_V = jnp.ones(small.model.vocab_size, jnp.int32)
    state = state_lib.init(small, m)
    step = step_lib.compiled(small, small.heads.n)
    for _ in range(3):  # the first of them has a learning rate of 0
      state, values = step(state, rows, bytes_V)
      losses.append(jax.device_get(values['loss_sum_K']))
  losses = np.array(losses)
  assert np.isfinite(losses).all() and losses.shape == (3, small.heads.n)
  np.testing.assert_array_equal(losses[0], losses[1])
  assert losses[2].sum() < losses[1].sum(), names
