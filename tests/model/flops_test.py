"""FLOPs by formula against values by hand, XLA's cost analysis, published ratios."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.cli import flags
from mtp_jax.config import schema
from mtp_jax.model import attention, flops
from mtp_jax.model import heads as heads_lib
from mtp_jax.parallel import sharding
from mtp_jax.train import step
from tests.support import tiny

# By hand, forward, of tiny.cfg: D 16, N 4, G 2, H 4, F 24, V 32, T 16. The last
# term is attention: scores, then values, over the T / 2 keys seen on average.
LAYER = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24) + 2 * (2 * 8 * 16)
UNEMBEDDING = 2 * 16 * 32


def test_flops_per_token():
  cfg = tiny.cfg(heads__n=2)  # six layers, two of them heads
  assert flops.flops_per_token(cfg, 2) == 3 * (6 * LAYER + 2 * UNEMBEDDING)
  assert flops.flops_per_token(cfg, 1) == 3 * (5 * LAYER + UNEMBEDDING)


def test_non_causal_attention_flops_are_twice_causal():
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
def test_flops_per_token_of_each_family(family, module):
  cfg = tiny.cfg(heads__n=3, heads__family=family)
  causal = family in ('causal', 'anticausal')
  trunk, modules = (3, 3) if causal else (6, 2)
  assert flops.flops_per_token(cfg, 3) == 3 * (trunk * LAYER + modules * module + 3 * UNEMBEDDING)
  assert flops.flops_per_token(cfg, 1) == 3 * (trunk * LAYER + (modules - 2) * module + UNEMBEDDING)


def test_flops_per_token_of_frozen_groups():
  cfg = tiny.cfg(heads__n=2, train__freeze='trunk')  # shared unembedding
  trunk = heads_lib.trunk_layers(cfg) * LAYER
  assert flops.flops_per_token(cfg, 2) == (trunk + 3 * 2 * LAYER + 2 * 2 * UNEMBEDDING)
  cfg = tiny.cfg(heads__n=2, train__freeze='heads')
  assert flops.flops_per_token(cfg, 2) == (3 * trunk + 2 * 2 * LAYER + 3 * 2 * UNEMBEDDING)


def test_block_first_heads_cost_as_much_as_layers():
  """n = 1 is an L-layer model; further heads add only unembeddings."""
  found = [flops.flops_per_token(tiny.cfg(heads__n=n), n) for n in range(1, 5)]
  assert np.diff(found).tolist() == [3 * UNEMBEDDING] * 3


@pytest.mark.parametrize('n', [1, 4])
@pytest.mark.parametrize('family', ['parallel', 'anticausal', 'residual', 'sequential'])
def test_flops_formula_equals_xla_cost_analysis(family, n):
  """Of a model that is unrolled, because XLA counts a loop's body once, and
  wide, because it counts norms and softmax too."""
  c = tiny.cfg(
    heads__family=family,
    heads__n=n,
    model__d_model=256,
    model__d_ff=768,
    model__n_layers=2 if family in ('residual', 'sequential') else n + 1,
    model__vocab_size=1024,
    data__seq_len=64,
    data__batch_size=2,
    model__attention='reference',
  )
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
def test_four_head_flops_ratio_as_published(size, ratio):
  four, one = (
    flags.parse(
      [f'--flagfile=experiments/size/{size}.flags', f'--heads.n={n}', '--data.seq_len=4096']
    ).config()
    for n in (4, 1)
  )
  found = flops.flops_per_token(four, 4) / flops.flops_per_token(one, 1)
  assert abs(found - ratio) < 5e-4


def _executed(**changes):
  """Returns (traced FLOPs per token of a step, those of the formula's parts)."""
  c = tiny.cfg(heads__n=3, **changes)
  m = tiny.mesh(c)
  with jax.set_mesh(m):
    jaxpr = step.trace(c, m, c.heads.n).jaxpr
  tokens = c.data.batch_size * c.data.seq_len
  return (
    flops.of_program(jaxpr, c.data.seq_len) / tokens,
    flops.forward(c, c.heads.n, causal=False),
  )


@pytest.mark.parametrize('accumulate', [1, 2])
def test_executed_flops_equal_the_formula_without_remat(accumulate):
  executed, of = _executed(loss__backward='interleaved', train__grad_accum_steps=accumulate)
  assert executed == 3 * (of.trunk + of.heads + 3 * of.unembedding)


@pytest.mark.parametrize('family', ['parallel', 'linear'])
def test_executed_flops_include_recomputation(family):
  executed, of = _executed(heads__family=family, model__remat='block')
  # Except the last product of a trunk layer, whose result is unused.
  down = 2 * 24 * 16 * (3 if family == 'parallel' else 6)
  assert executed == 4 * (of.trunk + of.heads + 3 * of.unembedding) - down


@pytest.mark.parametrize('head_loss', ['ce', 'kl'])
def test_executed_flops_with_a_draft_vocabulary(head_loss):
  executed, of = _executed(
    loss__backward='interleaved', heads__draft_vocab='8', loss__head_loss=head_loss
  )
  assert of.drafts == 2 * 2 * 16 * 8
  again = (head_loss == 'kl') * (of.heads + of.teacher)
  assert executed == 3 * (of.trunk + of.heads + of.unembedding + of.drafts) + again


@pytest.mark.parametrize('backward', ['remat', 'interleaved'])
def test_executed_flops_of_shared_keys_and_values(backward):
  changes = dict(heads__family='recursive', heads__share_keys_values=True, loss__backward=backward)
  executed, of = _executed(**changes)
  c = tiny.cfg(heads__n=3, **changes)
  assert executed == pytest.approx(flops.executed(c, 3, causal=False), rel=1e-3)
  own = flops.forward(schema.replace(c, **{'heads.share_keys_values': False}), 3, causal=False)
  assert own.heads - of.heads == 2 * 2 * 16 * 2 * 4


def test_interleaved_chain_recomputes_blocks_only():
  executed, of = _executed(heads__family='causal', loss__backward='interleaved')
  assert executed == 3 * (of.trunk + 3 * of.unembedding) + 4 * of.heads


@pytest.mark.parametrize('isolated', [False, True])
@pytest.mark.parametrize('backward', ['remat', 'interleaved'])
@pytest.mark.parametrize('loss', ['lk', 'e2e_tv'])
@pytest.mark.parametrize('family', ['parallel', 'sequential'])
def test_executed_flops_of_losses_that_compare_drafts(family, loss, backward, isolated):
  """The teacher's logits per head once more: forward, and where logits are recomputed."""
  changes = dict(
    heads__family=family,
    heads__isolated=isolated,
    loss__head_loss=loss,
    loss__backward=backward,
    model__remat='none',
  )
  executed, of = _executed(**changes)
  c = tiny.cfg(heads__n=3, **changes)
  assert executed == pytest.approx(flops.executed(c, 3, causal=False), rel=0.02)
  twice = backward == 'remat' or loss == 'e2e_tv'
  one = of.unembedding
  of_logits = 3 + (backward == 'remat')  # of head 1
  of_logits += 2 * (3 + twice - isolated)  # of heads 2 and 3
  of_logits += 2 * (1 + twice)  # of their teacher
  assert of.teacher == 2 * one
  assert executed - 3 * of.trunk - 4 * of.heads == pytest.approx(of_logits * one, rel=0.02)
  plain = flops.flops_per_token(tiny.cfg(heads__n=3, heads__family=family), 3)
  assert flops.flops_per_token(c, 3) == plain + (2 - 2 * isolated) * one


@pytest.mark.parametrize('kernel', ['splash', 'flash'])
def test_kernel_flops_by_products(kernel):
  """Forward two products of T x T x H per query head, backward seven (scores and
  dP twice); half of each is above the diagonal."""
  q = jnp.zeros((2, 256, 4, 16))
  k = v = jnp.zeros((2, 256, 2, 16))
  segment, m = jnp.zeros((2, 256), jnp.int32), schema.ModelConfig(d_model=64)
  one = 2 * 2 * 4 * 256 * 256 * 16 / 2

  def attend(q):
    return jnp.sum(attention.KERNELS[kernel](attention.Operands(q, k, v, segment), 0, m))

  forward = jax.make_jaxpr(attend)(q)
  both = jax.make_jaxpr(jax.grad(attend))(q)
  assert flops.of_program(forward.jaxpr, 256) == 2 * one
  # dq's kernel makes three, dk and dv's four; before them out . dout, T x H.
  assert flops.of_program(both.jaxpr, 256) == (2 + 3 + 4) * one + 2 * q.size


def test_flops_of_sliding_layers():
  """Four trunk layers and head 1: sliding, sliding, full, sliding, sliding; by hand, of a
  window of 4 in rows of 16: 3.5 keys on average instead of 8."""
  cfg = tiny.cfg(
    heads__n=1, model__n_layers=5, model__window=4, model__layer_types='sliding*2,full'
  )
  less = 2 * (2 * (8 - 3.5) * 16)
  trunk, head, *_ = flops.forward(cfg, 1)
  assert trunk == 4 * LAYER - 3 * less and head == LAYER - less
  assert flops.window_shares(cfg) == dict(trunk=(0.25, 0.75), heads=(0, 1))
  own = tiny.cfg(heads__n=3, heads__layer_type='sliding', heads__window=4)
  assert flops.forward(own, 3)[1] == 3 * LAYER - 2 * less


def test_executed_flops_of_sliding_kernels(monkeypatch):
  """A scan over three sliding layers and a full one, and a sliding head."""
  monkeypatch.setitem(
    attention.KERNELS, 'splash', functools.partial(attention.splash, interpret=True)
  )
  c = tiny.cfg(
    heads__n=1,
    model__n_layers=5,
    model__window=128,
    model__layer_types='sliding*3,full',
    model__attention='splash',
    data__seq_len=512,
    loss__backward='interleaved',
  )
  m = tiny.mesh(tiny.cfg())
  with jax.set_mesh(m):
    jaxpr = step.trace(c, m, 1).jaxpr
  found = flops.of_program(jaxpr, 512, shares=flops.window_shares(c)) / (8 * 512)
  trunk, head, unembedding, *_ = flops.forward(c, 1)
  attention_flops = 4 * 4 * 4 * (256 + 4 * 112)
  # Kernels make 9 products rather than 6, forward and backward.
  want = 3 * (trunk + head + unembedding) + attention_flops * (9 / 2 - 3)
  np.testing.assert_allclose(found, want, rtol=1e-2)


def test_executed_flops_of_heads_of_another_type():
  """Sliding layers in the trunk, full heads: each by its own share of the windows."""
  found = []
  for own in ('full', 'sliding'):
    c = tiny.cfg(
      heads__n=3,
      heads__layer_type=own,
      model__n_layers=7,
      model__window=4,
      model__layer_types='sliding*3,full',
      loss__backward='interleaved',
    )
    shares = flops.window_shares(c)
    assert shares['heads'] == ((2 / 3, 1 / 3) if own == 'full' else (0, 1))
    assert shares['trunk'] == (0.25, 0.75)
    # A scan over heads selects the kernel of each window: 10 and 1 products there.
    found.append(_of_scan('heads', (10, 1), shares))
  assert found == pytest.approx([2 * 512 * (20 + 1) / 3, 2 * 512 * 1])


def _of_scan(part, products, shares) -> float:
  """FLOPs of a scan in a part of a step whose body selects one of several windows."""

  def of(n, window):
    def branch(x):
      with jax.named_scope(f'attend_window_{window}'):
        for _ in range(n):
          x = x @ x
      return x

    return branch

  def f(x, i):
    with jax.named_scope(part):
      return jax.lax.switch(i, [of(n, window) for window, n in enumerate(products)], x)

  m = tiny.mesh(tiny.cfg())
  with jax.set_mesh(m):
    jaxpr = jax.make_jaxpr(f)(jnp.zeros((8, 8)), 0)
    return flops.of_program(jaxpr.jaxpr, 8, shares=shares)


def test_flops_of_branches_and_loops():
  def f(x, yes):
    def body(x, _):
      return jax.lax.cond(yes, lambda x: x @ x @ x, lambda x: x @ x, x), None

    return jax.lax.scan(body, x, None, length=5)[0]

  jaxpr = jax.make_jaxpr(f)(jnp.zeros((8, 8)), True)
  assert flops.of_program(jaxpr.jaxpr, 8) == 5 * 2 * 2 * 8**3


@pytest.mark.parametrize('family', ['parallel', 'anticausal', 'sequential'])
@pytest.mark.parametrize('schedule, times', [('remat', 4), ('interleaved', 3)])
def test_token_order_flops_count_for_head_1_only(family, schedule, times):
  changes = dict(heads__family=family, loss__backward=schedule)
  with_order, of = _executed(loss__token_order_weight=0.5, **changes)
  without, _ = _executed(**changes)
  assert with_order - without == pytest.approx(times * of.order)


def test_replicated_work_counts_on_each_device():
  """Muon's products are divided over fsdp x tensor, not over data."""

  def executed(optimizer, **mesh):
    c = tiny.cfg(heads__n=2, optim__name=optimizer, model__n_layers=6, **mesh)
    m = tiny.mesh(c)
    with jax.set_mesh(m):
      jaxpr = step.trace(c, m, c.heads.n).jaxpr
    return flops.of_program(jaxpr, c.data.seq_len)

  def muon(**mesh):
    return executed('muon', **mesh) - executed('adamw', **mesh)

  assert muon(mesh__fsdp=2) == muon(mesh__fsdp=2, mesh__data=4)
  whole, parts = (executed('adamw', mesh__data=n) for n in (1, 8))
  assert whole == 8 * parts
