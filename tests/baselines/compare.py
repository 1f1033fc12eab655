"""Compares our backward strategies with a naive loss and the paper's loop in PyTorch.

  python -m tests.baselines.compare --flagfile=… --bench.heads=1,4 --out=…

Loss and gradients of the whole model, in float32, without an optimizer. Every
contender has its own process, so that thread pools and allocators do not
interfere; in each round they run one after the other. Memory is the peak growth of
a process in its first call, including gradients: parameters exist and the program
is compiled before. It is measured by the operating system (Linux), equally for JAX
and PyTorch. CPU seconds (`cpu`) are reported in addition to wall time, which other
processes affect.
"""

import json
import multiprocessing
import os
import statistics
import sys
import time

import numpy as np

from mtp_jax.bench import timing
from mtp_jax.cli import flags
from mtp_jax.config import parse, schema, validate

CONTENDERS = ('interleaved', 'remat', 'n logits', 'torch')


def _model(cfg):
  """Returns the initial parameters, unsharded, on the host."""
  import jax

  from mtp_jax.model import lm, params
  from mtp_jax.parallel import sharding

  with jax.set_mesh(sharding.make_mesh(cfg, jax.devices()[:1])):
    key = jax.random.key(cfg.train.seed)
    return jax.device_get(params.init(key, lm.specs(cfg), 'float32'))


def _tokens(cfg):
  shape = cfg.data.batch_size, cfg.data.seq_len + cfg.span
  rng = np.random.default_rng(cfg.train.seed)
  return rng.integers(0, cfg.model.vocab_size, shape, np.int32)


def _ours(cfg):
  import jax
  import jax.numpy as jnp

  from mtp_jax.losses import multi_token, targets
  from mtp_jax.model import lm, params
  from mtp_jax.parallel import sharding

  n = cfg.heads.n
  mesh = sharding.make_mesh(cfg, jax.devices()[:1])
  tokens_BU = _tokens(cfg)
  position_BU = np.broadcast_to(np.arange(tokens_BU.shape[1], dtype=np.int32), tokens_BU.shape)
  with jax.set_mesh(mesh):
    rows = dict(tokens=tokens_BU[None], position=position_BU[None])
    rows = jax.tree.map(lambda x: x[0], sharding.put_batch(mesh, rows))
    abstract = params.abstract(lm.specs(cfg), 'float32', mesh)
    model = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), _model(cfg), abstract)
    count_K = jnp.full(n, tokens_BU.shape[0] * cfg.data.seq_len)

    def value(model, rows):
      return multi_token.mtp_loss(
        model,
        jnp.zeros(n),
        rows,
        count_K=count_K,
        weight_K=targets.weights(0, cfg),
        n_active=n,
        cfg=cfg,
      )

    compiled = jax.jit(jax.value_and_grad(value, has_aux=True)).lower(model, rows).compile()

  def call():
    (total, _), _ = jax.block_until_ready(compiled(model, rows))
    return float(total)

  return call


def _n_logits(cfg):
  import functools

  import jax

  from tests.baselines import n_logits

  model = jax.tree.map(jax.numpy.asarray, _model(cfg))
  tokens_BU = jax.numpy.asarray(_tokens(cfg))
  value = functools.partial(n_logits.loss, n=cfg.heads.n, m=cfg.model)
  compiled = jax.jit(jax.value_and_grad(value)).lower(model, tokens_BU).compile()

  def call():
    total, _ = jax.block_until_ready(compiled(model, tokens_BU))
    return float(total)

  return call


def _torch(cfg):
  import torch

  from tests.baselines import torch_sequential

  parameters = torch_sequential.load(_model(cfg))
  tokens_BU = torch.tensor(_tokens(cfg)).long()

  def call():
    return torch_sequential.step(parameters, tokens_BU, cfg.heads.n, cfg.model)

  return call


def _resident(field: str) -> int | None:
  """Returns bytes of this process: VmRSS, or VmHWM, the peak since its reset."""
  try:
    with open('/proc/self/status') as f:
      (line,) = [line for line in f if line.startswith(field)]
  except OSError:
    return None
  return 1024 * int(line.split()[1])


def _reset_peak() -> bool:
  try:
    with open('/proc/self/clear_refs', 'w') as f:
      f.write('5')
  except OSError:
    return False
  return True


def _work(contender: str, cfg: schema.Config, pipe) -> None:
  """Runs a contender: a first call, then a timed one for each request."""
  make = {'n logits': _n_logits, 'torch': _torch}.get(contender, _ours)
  call = make(cfg)
  can, before = _reset_peak(), _resident('VmRSS')
  total = call()
  grown = _resident('VmHWM') - before if can and before else None
  pipe.send((total, grown))
  while pipe.recv():
    begin = time.perf_counter(), time.process_time()
    for _ in range(cfg.bench.iters):
      call()
    end = time.perf_counter(), time.process_time()
    pipe.send([(b - a) / cfg.bench.iters for a, b in zip(begin, end, strict=True)])


def compare(cfg: schema.Config) -> dict[tuple[str, int], dict]:
  """Returns (contender, n) -> its loss, its memory, and by round its wall and CPU
  seconds."""
  context, started, found = multiprocessing.get_context('spawn'), {}, {}
  try:
    for n in parse.parse_numbers(cfg.bench.heads):
      for contender in CONTENDERS:
        schedule = contender if contender in ('interleaved', 'remat') else 'remat'
        c = schema.replace(cfg, **{'heads.n': n, 'loss.backward': schedule})
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(contender, validate.validate(c), theirs))
        process.start()
        theirs.close()  # so that the end of the process is detected
        started[contender, n] = process, ours
        total, grown = ours.recv()
        found[contender, n] = dict(loss=total, grown_bytes=grown, seconds=[], cpu=[])
    for r in range(cfg.bench.rounds):
      keys = list(started)
      for key in keys[r % len(keys) :] + keys[: r % len(keys)]:
        started[key][1].send(True)
        for name, seconds in zip(('seconds', 'cpu'), started[key][1].recv(), strict=True):
          found[key][name].append(seconds)
  finally:
    for process, pipe in started.values():
      if process.is_alive():
        pipe.send(False)
      process.join()
  return found


def table(found: dict[tuple[str, int], dict]) -> tuple[list[str], list[dict]]:
  """Returns (lines, JSON-able rows), with times relative to interleaved and the first n."""
  (_, first), *_ = found
  rows = [
    dict(
      contender=contender,
      n=n,
      loss=x['loss'],
      time_s=statistics.median(x['seconds']),
      **{
        f'{kind}over_{what}': timing.ratio(x[name], found[other][name])
        for kind, name in (('', 'seconds'), ('cpu_', 'cpu'))
        for what, other in (('interleaved', ('interleaved', n)), ('first_n', (contender, first)))
      },
      grown_bytes=x['grown_bytes'],
    )
    for (contender, n), x in found.items()
  ]
  lines = [
    f'{r["contender"]:>8} n={r["n"]}  loss {r["loss"]:.4f}'
    f'  {r["time_s"]:7.3f} s  over interleaved {timing.shown(r["over_interleaved"])}'
    f' cpu {r["cpu_over_interleaved"]["median"]:.3f}'
    f'  over first n {timing.shown(r["over_first_n"])}'
    f' cpu {r["cpu_over_first_n"]["median"]:.3f}'
    f'  grown {timing.mib(r["grown_bytes"])} MiB'
    for r in rows
  ]
  return lines, rows


def main(args: list[str]) -> None:
  parsed = flags.parse(args)
  cfg = parsed.config()
  for name, needed in (
    ('heads.family', 'parallel'),
    ('heads.unembedding', 'shared'),
    ('model.compute_dtype', 'float32'),
    ('train.grad_accum_steps', 1),
  ):
    if schema.get(cfg, name) != needed:
      raise SystemExit(f'--{name}: the baselines support {needed} only')
  found = compare(cfg)
  for n in parse.parse_numbers(cfg.bench.heads):
    losses = [found[contender, n]['loss'] for contender in CONTENDERS]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
  lines, rows = table(found)
  print('\n'.join(lines))
  if parsed.out:
    with open(parsed.out, 'w', encoding='utf-8') as f:
      json.dump(dict(cores=os.cpu_count(), rows=rows), f, indent=1)


if __name__ == '__main__':
  main(sys.argv[1:])
