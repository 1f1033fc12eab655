"""What the step needs on a TPU with the logits of all heads alive at once.

  python -m tests.baselines.ahead --flagfile=… --plan.topology=v5e:4x4 --out=…

The package's own step, trunk, sharding and optimizer, but for the loss: every
head's hidden states, then the logits of all heads in one product. Heads keep
their activations, as in a first version; with --loss.backward=remat they are
rematerialised as our own are. Prints what `mtp plan` prints.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp

from mtp_jax.cli import flags
from mtp_jax.losses import cross_entropy, multi_token
from mtp_jax.model import heads
from mtp_jax.planning import ahead, report


def keeps_all_logits(w: multi_token.Weights, rows: multi_token.LossInputs, cfg):
  """A schedule as those of loss.SCHEDULES, for a shared unembedding."""
  shared = multi_token.gather_shared(w.norm_D, w.unembed, w.order_VD, cfg)

  keeps = jax.checkpoint_policies.everything_saveable
  if cfg.loss.backward == 'remat':
    keeps = jax.checkpoint_policies.nothing_saveable

  @functools.partial(jax.checkpoint, static_argnums=0, policy=keeps)
  def head(step, carry_BTD, module, of_head):
    k, probe = of_head
    carry_BTD, h_BTD = multi_token._hidden(
      step, module, w, shared.norm_D, carry_BTD, k, probe, rows.ctx, cfg
    )
    return carry_BTD, (h_BTD, None)

  z_BTD = w.z_BTD.astype(cfg.model.compute_dtype)
  _, (h_KBTD, _) = heads.scan_heads(head, z_BTD, w.modules, (rows.k_K, w.probe_K), cfg)
  logits_KBTV = jnp.einsum(
    'KBTD,DV->KBTV',
    h_KBTD,
    shared.unembed_DV.astype(h_KBTD.dtype),
    preferred_element_type=jnp.float32,
  )
  lse_KBT = jax.nn.logsumexp(logits_KBTV, axis=-1)
  ids = jnp.arange(logits_KBTV.shape[-1])[None, None, None, :]
  is_label = ids == rows.targets_KBT[..., None]
  label_KBT = jnp.sum(jnp.where(is_label, logits_KBTV, 0), axis=-1)
  loss_K = jnp.sum(rows.valid_KBT * (lse_KBT - label_KBT), axis=(1, 2))
  argmax_KBT = jnp.argmax(logits_KBTV, axis=-1).astype(jnp.int32)
  correct_K = jnp.sum(
    rows.valid_KBT * (argmax_KBT == rows.targets_KBT), axis=(1, 2), dtype=jnp.float32
  )
  stats = cross_entropy.Stats(loss_K, 0 * loss_K, correct_K, argmax_KBT)
  return jnp.sum(rows.scale_K * loss_K), (stats, 0.0)


def main(args) -> None:
  parsed = flags.parse(args)
  cfg = parsed.config()
  jax.config.update('jax_platforms', 'cpu')
  multi_token.BACKWARD[cfg.loss.backward] = keeps_all_logits
  plan = ahead.plan(cfg)
  print('\n'.join(report.lines_of(plan)))
  if parsed.out:
    with open(parsed.out, 'w') as f:
      json.dump(report.values_of(plan), f, indent=1)


if __name__ == '__main__':
  main(sys.argv[1:])
