"""The state: abstract = initialized, shardings, dtypes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mtp_jax.train import state as state_lib
from tests.support import runs, tiny

COUNTERS = ('step', 'skipped', 'skipped_in_a_row')
MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2)]

# Written out, not read from the rules: D is split over fsdp; attention heads,
# F and V over tensor; norms are whole everywhere.
LAYER = dict(
  attn_norm=P(None, None),
  q=P(None, 'fsdp', 'tensor', None),
  k=P(None, 'fsdp', 'tensor', None),
  v=P(None, 'fsdp', 'tensor', None),
  o=P(None, 'tensor', None, 'fsdp'),
  mlp_norm=P(None, None),
  gate=P(None, 'fsdp', 'tensor'),
  up=P(None, 'fsdp', 'tensor'),
  down=P(None, 'tensor', 'fsdp'),
)
ENDS = dict(embed=P('tensor', 'fsdp'), norm=P(None), unembed=P('fsdp', 'tensor'))


def _cfg(mesh, **changes):
  data, fsdp, tensor = mesh
  return tiny.cfg(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, **changes)


def _wanted(path):
  """PartitionSpec of the leaf at this path of a State."""
  names = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
  if names[0] == 'opt_state' and not {'mu', 'nu', 'trace'} & set(names):
    return P()
  if names[0] in ('params', 'opt_state'):
    return (LAYER if names[-2] in ('trunk', 'heads') else ENDS)[names[-1]]
  return P()


@pytest.mark.parametrize('sizes, name', [*((s, 'adamw') for s in MESHES), (MESHES[2], 'muon')])
def test_abstract_state_matches_init(sizes, name):
  cfg = _cfg(sizes, optim__name=name)
  mesh = tiny.mesh(cfg)
  abstract = state_lib.abstract(cfg, mesh)
  made = state_lib.init(cfg, mesh)
  assert jax.tree.structure(abstract) == jax.tree.structure(made)
  for (path, a), x in zip(
    jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(made), strict=True
  ):
    name = jax.tree_util.keystr(path)
    assert (a.shape, a.dtype) == (x.shape, x.dtype), name
    assert a.sharding == x.sharding, name
    assert x.sharding.spec == _wanted(path), name
    whole = x.ndim < 2 or 'norm' in name
    parts = 1 if whole else cfg.mesh.fsdp * cfg.mesh.tensor
    shards = x.addressable_shards
    assert len(shards) == mesh.size
    assert {s.data.size * parts for s in shards} == {x.size}, name


def test_initial_state_depends_on_seed_not_mesh():
  first, *others = (
    jax.device_get(state_lib.init(cfg, tiny.mesh(cfg))) for cfg in map(_cfg, MESHES)
  )
  for other in others:
    runs.assert_same(first, other)
  cfg = _cfg(MESHES[0], train__seed=1)
  other = jax.device_get(state_lib.init(cfg, tiny.mesh(cfg)))
  assert (first.params.trunk.q != other.params.trunk.q).all()


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_moment_dtype(name):
  cfg = _cfg(MESHES[0], optim__moment_dtype='bfloat16', optim__name=name)
  made = state_lib.abstract(cfg, tiny.mesh(cfg))
  seen = set()
  for path, x in jax.tree_util.tree_leaves_with_path(made):
    names = {getattr(key, 'name', None) for key in path}
    (first,) = names & {'params', 'mu', 'nu', 'trace', 'count', *COUNTERS}
    want = dict(mu=jnp.bfloat16, trace=jnp.bfloat16, count=jnp.int32)
    want |= dict.fromkeys(COUNTERS, jnp.int32)
    assert x.dtype == want.get(first, jnp.float32), path
    seen.add(first)
  assert ('trace' in seen) == (name == 'muon') and {'mu', 'nu'} < seen
