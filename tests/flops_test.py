"""FLOPs by formula: by hand, by XLA's own count, and the published ratios."""

import functools

import jax
import numpy as np
import pytest

from mtp_jax import flags, flops, sharding
from mtp_jax.model import heads
from tests import tiny

# By hand, forward, of tiny.cfg: D 16, N 4, G 2, H 4, F 24, V 32, T 16. The last
# term is attention: scores, then values, over the T / 2 keys seen on average.
LAYER = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24) + 2 * (2 * 8 * 16)
UNEMBEDDING = 2 * 16 * 32


def test_of_a_token():
  cfg = tiny.cfg(heads__n=2)  # six layers, two of them heads
  assert flops.flops_per_token(cfg, 2) == 3 * (6 * LAYER + 2 * UNEMBEDDING)
  assert flops.flops_per_token(cfg, 1) == 3 * (5 * LAYER + UNEMBEDDING)


def test_masked_scores_are_twice_those_that_are_skipped():
  cfg = tiny.cfg(heads__n=2)
  skipped = 3 * 6 * 2 * (2 * 8 * 16)
  more = flops.flops_per_token(cfg, 2, causal=False)
  assert more - flops.flops_per_token(cfg, 2) == skipped


@pytest.mark.parametrize(
  'family, module',
  [
    ('causal', LAYER),
    ('anticausal', LAYER),
    ('linear', 2 * 16 * 16),
    ('residual', 2 * 16 * 16),
    ('sequential', LAYER + 2 * 32 * 16),  # [hidden; embedding] -> D
    ('recursive', LAYER + 2 * 32 * 16),
  ],
)
def test_of_a_family(family, module):
  cfg = tiny.cfg(heads__n=3, heads__family=family)
  causal = family in ('causal', 'anticausal')
  trunk, modules = (3, 3) if causal else (6, 2)
  assert flops.flops_per_token(cfg, 3) == 3 * (
    trunk * LAYER + modules * module + 3 * UNEMBEDDING
  )
  assert flops.flops_per_token(cfg, 1) == 3 * (
    trunk * LAYER + (modules - 2) * module + UNEMBEDDING
  )


def test_of_frozen_groups():
  cfg = tiny.cfg(heads__n=2, optim__trunk_lr=0.0)  # shared unembedding
  trunk = heads.trunk_layers(cfg) * LAYER
  assert flops.flops_per_token(cfg, 2) == (
    trunk + 3 * 2 * LAYER + 2 * 2 * UNEMBEDDING
  )
  cfg = tiny.cfg(heads__n=2, optim__heads_lr=0.0)
  assert flops.flops_per_token(cfg, 2) == (
    3 * trunk + 2 * 2 * LAYER + 3 * 2 * UNEMBEDDING
  )


def test_heads_cost_what_layers_do():
  """n = 1 is an L-layer model; further heads add only unembeddings."""
  found = [flops.flops_per_token(tiny.cfg(heads__n=n), n) for n in range(1, 5)]
  assert np.diff(found).tolist() == [3 * UNEMBEDDING] * 3


@pytest.mark.parametrize('n', [1, 4])
@pytest.mark.parametrize(
  'family', ['parallel', 'anticausal', 'residual', 'sequential']
)
def test_xla_counts_as_many(family, n):
  """Of a model that is unrolled, because XLA counts a loop's body once, and
  wide, because it counts norms and softmax too."""
  c = tiny.cfg(
    heads__family=family, heads__n=n, model__d_model=256, model__d_ff=768,
    model__n_layers=2 if family in ('residual', 'sequential') else n + 1,
    model__vocab_size=1024, data__seq_len=64, data__batch_size=2,
    model__attention='reference',
  )  # fmt: skip
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    f = jax.grad(functools.partial(tiny.dense_loss, c=c), has_aux=True)
    rows = sharding.put_batch(m, tiny.batch(c))
    compiled = jax.jit(f).lower(tiny.model(c, m), rows).compile()
  found = compiled.cost_analysis()['flops']
  tokens = c.data.batch_size * c.data.seq_len
  want = tokens * flops.flops_per_token(c, n, causal=False)
  np.testing.assert_allclose(found, want, rtol=0.02)


@pytest.mark.parametrize('size, ratio', [('1.3b', 1.131), ('0.3b', 1.290)])
def test_four_heads_over_one_as_published(size, ratio):
  four, one = (
    flags.parse(
      [
        f'--flagfile=experiments/size/{size}.flags',
        f'--heads.n={n}',
        '--data.seq_len=4096',
      ]
    ).config()
    for n in (4, 1)
  )
  found = flops.flops_per_token(four, 4) / flops.flops_per_token(one, 1)
  assert abs(found - ratio) < 5e-4
