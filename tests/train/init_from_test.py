"""A run that begins with the parameters of another, and one that trains heads
alone."""

import functools
import itertools
import os

import jax
import numpy as np
import pytest

from mtp_jax.checkpoint import metadata, restore, saver
from mtp_jax.config import draft_vocab, schema
from mtp_jax.data import tokenizers
from mtp_jax.io import paths
from mtp_jax.model import flops, heads, lm, next_token, params
from mtp_jax.parallel import sharding
from mtp_jax.train import init_from
from mtp_jax.train import state as state_lib
from mtp_jax.train import step as step_lib
from tests.support import runs, tiny
from tests.support.decoding import FAMILIES

LAYERS = 5  # that compute the next token
UNEMBEDDINGS = ('shared', 'replicated', 'tied')


def _cfg(family, n, unembedding='shared', **changes):
  more = n - 1 if family in ('parallel', 'causal') else 0
  return tiny.cfg(
    heads__family=family,
    heads__n=n,
    heads__unembedding=unembedding,
    model__n_layers=LAYERS + more,
    **changes,
  )


def _begun(was, cfg):
  """Returns (parameters of `was`, initial parameters of a run of cfg)."""
  init_from.check(was, cfg, 'X')
  m = tiny.mesh(cfg)
  old = tiny.model(was, m)
  return old, state_lib.init(cfg, m, (old, was)).params


@functools.cache
def _old_logits(was):
  """Computes the logits of the source parameters of `_begun`."""
  return _logits(tiny.model(was, tiny.mesh(was)), was)


def _logits(w, c):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 32, (2, 40))[:, : 16 + c.span]
  position = np.tile(np.arange(tokens.shape[1]), (2, 1))
  with jax.set_mesh(tiny.mesh(c)):
    found = jax.device_get(tiny.dense_logits(w, tokens, position, c))
  return found[:, :, :16]


def _pairs():
  """Every family from and to three others, itself among them; the rest is slow."""
  for (i, other), (j, family) in itertools.product(enumerate(FAMILIES), repeat=2):
    slow = (i - j) % len(FAMILIES) not in (0, 4, 6)
    marks = [pytest.mark.slow] if slow else []
    yield pytest.param(other, family, marks=marks, id=f'{other}-{family}')


@pytest.mark.parametrize('other, family', _pairs())
def test_warm_start_keeps_next_token_logits_and_heads_of_the_family(other, family):
  """Of 2 heads to 3 and of 3 to 1, in every family from every other; of 3 to 2
  where heads are kept."""
  fewer = [(3, 2)] if init_from.kept(_cfg(family, 3), _cfg(other, 2)) > 1 else []
  for before, n in ((2, 3), (3, 1), *fewer):
    was, cfg = _cfg(family, before), _cfg(other, n)
    _, new = _begun(was, cfg)
    first = init_from.kept(was, cfg)
    alike = family == other or (family, other) == ('recursive', 'sequential')
    assert first == (min(before, n) if alike else 1)
    a, b = _old_logits(was), _logits(new, cfg)
    np.testing.assert_allclose(b[:first], a[:first], atol=1e-6)
    if n > first and other in ('parallel', 'linear', 'residual'):
      for head in b[first:]:
        np.testing.assert_allclose(head, b[0], atol=1e-6)


@pytest.mark.parametrize('before, after', itertools.product(UNEMBEDDINGS, UNEMBEDDINGS[:2]))
def test_warm_start_keeps_unembedding_of_head_1(before, after):
  for family in 'parallel', 'sequential':
    for n in 1, 4:
      was, cfg = _cfg(family, 3, before), _cfg(family, n, after)
      _, new = _begun(was, cfg)
      a, b = _old_logits(was), _logits(new, cfg)
      same = 1 if before == 'replicated' and after == 'shared' else min(3, n)
      np.testing.assert_allclose(b[:same], a[:same], atol=1e-6)
  if after == 'replicated' and family == 'sequential':
    np.testing.assert_array_equal(new.unembed[3], new.unembed[0])


def test_warm_start_keeps_tied_embeddings():
  old, new = _begun(_cfg('linear', 2, 'tied'), _cfg('linear', 3, 'tied'))
  assert new.unembed is None
  np.testing.assert_array_equal(new.embed, old.embed)


@pytest.mark.parametrize('family', FAMILIES)
def test_random_head_init_equals_that_of_a_new_model(family):
  was, cfg = _cfg('linear', 1), _cfg(family, 3, train__head_init='random')
  _, new = _begun(was, cfg)
  fresh = state_lib.init(cfg, tiny.mesh(cfg)).params.heads
  if family == 'anticausal':  # they are layers of the trunk
    return
  first = 1 if cfg.heads.block_first else 0
  for a, b in zip(jax.tree.leaves(new.heads), jax.tree.leaves(fresh), strict=True):
    np.testing.assert_array_equal(a[first:], b[first:])


def test_copied_module_equals_layer_of_head_1():
  """On [hidden; embedding] = [z; anything], head 2 is head 1's layer on z."""
  was, cfg = _cfg('parallel', 1), _cfg('sequential', 2)
  _, new = _begun(was, cfg)
  w = new.heads
  np.testing.assert_array_equal(w.block.q[0], new.trunk.q[-1])
  np.testing.assert_array_equal(w.final_norm[0], new.norm)
  x = np.random.default_rng(0).normal(size=(3, 32))
  np.testing.assert_allclose(x @ w.proj[0], x[:, :16], atol=1e-6)


def test_warm_start_drops_heads_of_another_stride():
  was, cfg = _cfg('parallel', 3), _cfg('parallel', 3, heads__stride=2)
  assert init_from.kept(was, cfg) == 1
  _, new = _begun(was, cfg)
  np.testing.assert_array_equal(new.heads.q[2], new.heads.q[0])


def test_warm_start_drops_untrained_heads():
  """With the curriculum 0:1;5:3 heads 2 and 3 start at the sixth step."""
  was = _cfg('parallel', 3, loss__curriculum='0:1;5:3')
  assert [next_token.trained_heads(was, step) for step in (1, 5, 6)] == [1, 1, 3]
  assert next_token.trained_heads(was, 0) == 3  # an import
  falls = _cfg('parallel', 3, loss__curriculum='0:3;5:1')
  assert next_token.trained_heads(falls, 9) == 3
  for family in ('parallel', 'anticausal', 'sequential'):
    for unembedding in 'shared', 'replicated':
      was = _cfg(family, 3, unembedding, loss__curriculum='0:1;5:3')
      fewer = next_token.as_trained(was, 5)
      assert fewer.heads.n == 1
      layers = len(heads.next_token_layers(fewer))
      more = 1 if family == 'parallel' else 0
      cfg = schema.replace(_cfg(family, 2, unembedding), **{'model.n_layers': layers + more})
      init_from.check(fewer, cfg, 'X')
      m = tiny.mesh(cfg)
      old = tiny.model(was, m)
      new = state_lib.init(cfg, m, (old, fewer)).params
      a = _logits(next_token.trained_part(old, fewer), fewer)
      np.testing.assert_allclose(_logits(new, cfg)[0], a[0], atol=1e-6)


def test_warm_start_keeps_token_order_head_and_own_unembeddings():
  of = dict(loss__token_order_weight=1.0)
  old, new = _begun(_cfg('linear', 2, **of), _cfg('linear', 3, **of))
  np.testing.assert_array_equal(new.order, old.order)
  old, new = _begun(_cfg('linear', 2, **of), _cfg('linear', 3))
  assert new.order is None
  cfg = _cfg('linear', 3, 'replicated', train__head_init='random')
  old, new = _begun(_cfg('linear', 2, 'replicated'), cfg)
  fresh = state_lib.init(cfg, tiny.mesh(cfg)).params
  np.testing.assert_array_equal(new.unembed[:2], old.unembed)
  np.testing.assert_array_equal(new.unembed[2], fresh.unembed[2])


@pytest.mark.parametrize('family', ['anticausal', 'recursive'])
def test_warm_start_does_not_depend_on_the_mesh(family):
  was = _cfg('parallel', 2, 'replicated')
  cfg = _cfg(family, 3, 'replicated', optim__name='muon')
  one = _begun(was, cfg)[1]
  many = schema.replace(cfg, **{'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2})
  m = tiny.mesh(many)
  state = state_lib.init(many, m, (tiny.model(was, m), was))
  runs.assert_same(jax.device_get(state.params), jax.device_get(one))
  for a, x in zip(
    jax.tree.leaves(state_lib.abstract(many, m)), jax.tree.leaves(state), strict=True
  ):
    assert (a.shape, a.dtype, a.sharding) == (x.shape, x.dtype, x.sharding)


def test_description_of_a_warm_start():
  def expected(was, cfg):
    return init_from.described(was, cfg)

  p = 'parallel'
  assert expected(_cfg(p, 4), _cfg(p, 1)) == ('head 1 unchanged; heads 2 to 4 dropped')
  own = _cfg(p, 2, unembedding='replicated')
  assert expected(own, _cfg(p, 2)) == "head 1 unchanged; head 2 with head 1's unembedding"
  assert expected(_cfg(p, 2), own) == 'heads 1 to 2 unchanged'
  assert expected(_cfg(p, 1), _cfg(p, 4)) == (
    'head 1 unchanged; heads 2 to 4 new, copied from head 1'
  )
  assert expected(_cfg(p, 2), _cfg(p, 3, train__head_init='random')) == (
    'heads 1 to 2 unchanged; head 3 new, randomly initialized'
  )
  assert expected(_cfg('recursive', 2), _cfg('recursive', 4)) == (
    'heads 1 to 2 unchanged; heads 3 to 4 new, with the shared module'
  )
  few, r = draft_vocab.recorded([1, 2, 9], 32), 'recursive'
  assert expected(_cfg(p, 2), _cfg(p, 2, heads__draft_vocab=few)) == (
    'heads 1 to 2 unchanged; drafts of 3 tokens, before of 32'
  )
  assert expected(_cfg(p, 2), _cfg(p, 2, heads__markov_rank=4)).endswith('; Markov head new')
  shared = dict(heads__share_keys_values=True, heads__confidence=True, loss__head_loss='kl')
  assert expected(_cfg(r, 4), _cfg(r, 4, **shared)) == (
    'heads 1 to 2 unchanged; heads 3 to 4 with shared keys and values; confidence head new'
  )
  assert expected(_cfg(p, 1), _cfg('anticausal', 2)) == (
    'head 1 unchanged; head 2 new, from layers of the trunk'
  )


@pytest.mark.parametrize(
  'cfg, expected',
  [
    (
      lambda: _cfg('parallel', 2, model__d_ff=32),
      '--model.d_ff=32: the parameters of X, which it is initialized from, have 24',
    ),
    (
      lambda: _cfg('parallel', 2, 'tied'),
      '--heads.unembedding=tied: embedding and unembedding of X are two arrays',
    ),
    (
      lambda: tiny.cfg(heads__n=2, model__n_layers=5),
      '--model.n_layers=5: trunk and head 1 of X are 5 layers; with --heads.n=2'
      ' of parallel that is 6',
    ),
  ],
)
def test_incompatible_warm_start_raises(cfg, expected):
  with pytest.raises(paths.InputError) as error:
    init_from.check(_cfg('linear', 3), cfg(), 'X')
  assert str(error.value) == expected


# On the command line.


def _held_out(workdir) -> float:
  """The last held-out loss of head 1."""
  found = [r['loss_1'] for r in runs.records(workdir) if r['kind'] == 'eval']
  return found[-1]


def _dropped(undisturbed, **changes):
  """Returns flags for head 1 of a run alone, at a negligible learning rate."""
  return (
    dict(
      train__init_from=undisturbed,
      heads__n=1,
      model__n_layers=2,
      optim__lr=1e-9,
      optim__weight_decay=0,
      optim__warmup_steps=1,
      train__steps=4,
      train__checkpoint_every=2,
    )
    | changes
  )


def test_next_token_fine_tuning_starts_at_loss_of_head_1(store, undisturbed, tmp_path, capsys):
  of = _dropped(undisturbed)
  assert runs.train(store, tmp_path / 'run', **of) == 0
  expected = capsys.readouterr().out
  assert 'step 6: head 1 unchanged; head 2 dropped' in expected
  np.testing.assert_allclose(_held_out(tmp_path / 'run'), _held_out(undisturbed), rtol=1e-5)
  cut = tmp_path / 'cut'
  assert runs.train(store, cut, **of | dict(train__steps=2)) == 0
  capsys.readouterr()
  assert runs.train(store, cut, **of) == 0  # the same command resumes
  assert 'initialized from' not in capsys.readouterr().out
  runs.assert_same(runs.restored(cut, 4), runs.restored(tmp_path / 'run', 4))


def test_warm_start_in_another_dtype_rounds_parameters(store, undisturbed, tmp_path):
  run = tmp_path / 'run'
  assert (
    runs.train(store, run, **_dropped(undisturbed, model__param_dtype='bfloat16', train__steps=2))
    == 0
  )
  old, new = runs.restored(undisturbed, 6).params, runs.restored(run, 2).params
  assert new.embed.dtype == 'bfloat16'
  np.testing.assert_array_equal(new.embed, old.embed.astype(new.embed.dtype))


def test_resume_of_a_warm_start_ignores_its_source(store, undisturbed, tmp_path, capsys):
  run = tmp_path / 'run'
  assert runs.train(store, run, **_dropped(undisturbed, train__steps=2)) == 0
  capsys.readouterr()
  assert runs.train(store, run, **_dropped(tmp_path / 'other')) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'mtp: --train.init_from={tmp_path / "other"}: ')
  assert f'was started with {undisturbed}' in error


def test_frozen_trunk_is_bitwise_unchanged(store, undisturbed, tmp_path):
  """Heads added to a run, and trained alone: what computes its next token has
  the same bits, and the heads have moved."""
  run = tmp_path / 'run'
  assert (
    runs.train(
      store,
      run,
      train__init_from=undisturbed,
      train__freeze='trunk',
      heads__family='sequential',
      heads__n=3,
      model__n_layers=2,
    )
    == 0
  )
  old, new = runs.restored(undisturbed, 6).params, runs.restored(run, 6).params
  for a, b in ((old.embed, new.embed), (old.norm, new.norm), (old.unembed, new.unembed)):
    np.testing.assert_array_equal(a, b)
  for a, b, c in zip(*map(jax.tree.leaves, (old.trunk, old.heads, new.trunk)), strict=True):
    np.testing.assert_array_equal(c, np.concatenate([a, b[:1]]))
  q = new.heads.block.q
  assert (q[0] != new.trunk.q[-1]).any() and (q[0] != q[1]).any()
  np.testing.assert_allclose(_held_out(run), _held_out(undisturbed), rtol=1e-5)


def test_frozen_trunk_has_neither_gradient_nor_moments():
  """In the memory of the compiled step, and in the FLOPs of the traced one."""
  of = dict(
    heads__family='sequential',
    heads__n=2,
    model__n_layers=8,
    model__d_model=64,
    model__d_ff=128,
    data__seq_len=64,
    mesh__fsdp=1,
  )
  for accumulate in 1, 2:
    traced = {}
    for freeze in 'none', 'trunk':
      c = tiny.cfg(train__freeze=freeze, train__grad_accum_steps=accumulate, **of)
      m = tiny.mesh(c)
      with jax.set_mesh(m):
        traced[freeze] = step_lib.trace(c, m, 2)
    # The trunk's backward pass has two products per forward product.
    all_flops, some_flops = (flops.of_program(x.jaxpr, 64) for x in traced.values())
    tokens = c.data.batch_size * c.data.seq_len
    forward, *_ = flops.forward(c, 2, causal=False)
    assert all_flops - some_flops >= 2 * tokens * forward
  # Of micro-batches, whose gradients are kept and summed.
  every, alone = (x.lower().compile().memory_analysis() for x in traced.values())
  trunk = params.count(lm.specs(c).trunk)
  moments = every.argument_size_in_bytes - alone.argument_size_in_bytes
  assert moments >= 2 * 4 * trunk
  assert every.temp_size_in_bytes - alone.temp_size_in_bytes >= 4 * trunk


@pytest.mark.parametrize(
  'changes, expected',
  [
    (dict(model__d_ff=64), '--model.d_ff=64: the parameters of'),
    (dict(model__n_layers=3), '--model.n_layers=3: trunk and head 1 of'),
    (dict(train__init_from='/nowhere'), 'no complete checkpoint there, which'),
  ],
)
def test_invalid_init_from_is_refused(changes, expected, store, undisturbed, tmp_path, capsys):
  of = _dropped(undisturbed, **changes)
  assert runs.train(store, tmp_path / 'run', **of) == 2
  error = capsys.readouterr().err
  assert expected in error and error.count('\n') == 1, error
  assert not os.path.exists(tmp_path / 'run')


def test_init_from_in_an_imported_workdir_is_refused(store, undisturbed, tmp_path, capsys):
  c = schema.replace(
    metadata.read(str(undisturbed), 6).cfg, **{'train.workdir': str(tmp_path / 'run')}
  )
  m = sharding.make_mesh(schema.replace(c, **{'mesh.fsdp': -1}))
  model = restore.restore_model(str(undisturbed), 6, c, m)
  saver.save_params(model, c, tokenizers.get('bytes'), c.train.workdir)
  assert runs.train(store, tmp_path / 'run', **_dropped(undisturbed)) == 2
  error = capsys.readouterr().err
  assert 'holds an imported model' in error and '--train.init_from=' in error
