"""A value of each field that is not its default."""

OTHER = {
  'model.d_model': 96,
  'model.rope_theta': 500_000.0,
  'model.norm_eps': 1e-6,
  'heads.n': 3,
  'loss.weights': '0:1,.3;50:1,.1',
  'data.verify': False,
  'data.documents': 'text:/tmp/a b.txt,python:json',
  'optim.lr': 0.1 + 0.2,  # 0.30000000000000004
  'train.seed': 2**32 - 1,
  'train.workdir': '/runs/ü',
  'plan.sweep': ('heads.n=1,2', 'loss.backward=remat,interleaved'),
}
