"""Steps with an attention kernel, small enough to compile ahead of time."""

from tests.support import tiny

STEP = dict(
  model__d_model=64,
  model__n_layers=3,
  model__vocab_size=256,
  heads__n=2,
  data__batch_size=2,
  loss__chunk_size=512,
  mesh__fsdp=2,
  mesh__tensor=2,
  model__compute_dtype='bfloat16',
  model__remat='block',
)


def step_cfg(kernel, T):
  return tiny.cfg(**STEP, data__seq_len=T, model__attention=kernel)
