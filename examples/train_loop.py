"""A minimal training loop on the public API: python examples/train_loop.py [STEPS]

Trains a byte-level model of a few million parameters on Python's own source code, then
continues a prompt with the model's heads as drafts.
"""

import pathlib
import sys

import jax
import numpy as np

import mtp_jax as mtp


def main(steps: int = 300, d_model: int = 256, n_layers: int = 6) -> tuple[float, str]:
  cfg = mtp.Config(
    model=mtp.ModelConfig(d_model=d_model, n_layers=n_layers, vocab_size=264),
    heads=mtp.HeadsConfig(n=4),
    data=mtp.DataConfig(seq_len=128, batch_size=16),
    optim=mtp.OptimConfig(lr=1e-3, warmup_steps=min(20, steps // 2)),
    train=mtp.TrainConfig(steps=steps),
  )
  folder = pathlib.Path(np.__file__).parent
  text = b''.join(path.read_bytes() for path in sorted(folder.glob('lib/*.py'))[:40])
  tokens, rng = np.frombuffer(text, np.uint8).astype(np.int32), np.random.default_rng(0)
  state, loss = mtp.init_state(cfg, jax.random.key(0)), float('nan')
  U = cfg.data.seq_len + cfg.span  # queries, and the targets beyond the last one
  for step in range(1, steps + 1):
    starts = rng.integers(0, len(tokens) - U, cfg.data.batch_size)
    batch = {'tokens': np.stack([tokens[s : s + U] for s in starts])}
    state, metrics = mtp.train_step(state, batch, cfg)
    loss = metrics['loss_1']
    if step % 20 == 0 or step == steps:
      print(f'step {step}: nats per token of head 1 {loss:.3f}, of head 4 {metrics["loss_4"]:.3f}')
  prompt = list(b'def __init__(self')
  (new,) = mtp.generate(state.params, [prompt], cfg, max_new_tokens=40, num_draft_tokens=3)
  return loss, bytes(t for t in [*prompt, *new] if t < 256).decode(errors='replace')


if __name__ == '__main__':
  print(main(*map(int, sys.argv[1:]))[1])
