"""A head family from outside the package: python examples/custom_head.py DIR

Head k > 1 is a two-layer perceptron on the trunk's output, h_k = norm(z + W2 silu(W1 z)).
Registered under a name, it trains, decodes, and is saved and loaded as any other.
"""

import sys
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import mtp_jax as mtp
from mtp_jax.model import heads, layers, params


@flax.struct.dataclass
class Perceptron:
  """Parameters of one head; their names are paths of a checkpoint."""

  up: Any
  down: Any


def specs(m: mtp.ModelConfig) -> Perceptron:
  D = m.d_model
  return Perceptron(
    up=params.Spec((D, 2 * D), ('embed', None), D**-0.5, (1, 1)),
    down=params.Spec((2 * D, D), (None, 'embed'), (2 * D) ** -0.5, (1, 1)),
  )


def block_input(module, x: heads.Inputs, ctx, cfg):
  del ctx
  w = params.gather_cast(module, specs(cfg.model), cfg)  # whole, in the compute dtype
  y_BTF = jax.nn.silu(jnp.einsum('BTD,DF->BTF', x.z_BTD, w.up))
  return x.z_BTD + jnp.einsum('BTF,FD->BTD', y_BTF, w.down)


def block_output(module, y_BTD, x: heads.Inputs, cfg):
  del module
  return x.carry_BTD, layers.rms_norm(y_BTD, x.norm_D, cfg.model)


def main(path: str, steps: int = 40) -> mtp.Model:
  if 'perceptron' not in heads.FAMILIES:
    family = mtp.Family(specs, block_input, block_output, layer=None)
    mtp.register_family('perceptron', family, block_first=False)
  cfg = mtp.Config(
    model=mtp.ModelConfig(d_model=64, n_layers=3, vocab_size=264),
    heads=mtp.HeadsConfig(n=3, family='perceptron'),
    data=mtp.DataConfig(seq_len=32, batch_size=8),
    optim=mtp.OptimConfig(lr=3e-3, warmup_steps=5),
    train=mtp.TrainConfig(steps=steps),
    loss=mtp.LossConfig(backward='interleaved'),
  )
  text = np.frombuffer(b'tick tock, ' * 100, np.uint8).astype(np.int32)
  state, U = mtp.init_state(cfg), cfg.data.seq_len + cfg.span
  for step in range(steps):
    batch = {'tokens': np.stack([text[s : s + U] for s in range(step % 11, step % 11 + 8)])}
    state, metrics = mtp.train_step(state, batch, cfg)
  print({name: round(value, 3) for name, value in metrics.items() if name.startswith('loss')})
  mtp.save(state.params, cfg, path, tokenizer='bytes')
  return mtp.load(path)


if __name__ == '__main__':
  print(main(sys.argv[1]).generate('tick tock, ', max_new_tokens=22).text)
