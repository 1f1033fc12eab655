"""Memory of the step on a TPU with the logits of all heads live at the same time.

  python -m tests.baselines.ahead --flagfile=… --plan.topology=v5e:4x4 --out=…

The package's step, trunk, sharding and optimizer, with another loss: the hidden
states of all heads, then their logits in one product. Heads save their
activations, as in a naive version; with --loss.backward=remat they are
rematerialised as ours are. Prints the output of `mtp plan`.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp

from mtp_jax.cli import flags
from mtp_jax.losses import backward, cross_entropy, head_loss
from mtp_jax.model import heads
from mtp_jax.planning import ahead, report


def keeps_all_logits(w: backward.DiffInputs, rows: backward.NondiffInputs, cfg):
  """A strategy like those of backward.STRATEGIES, for a shared unembedding."""
  shared = head_loss.gather_shared(w.norm_D, w.unembed, w.order_VD, cfg)
  w = w._replace(norm_D=shared.norm_D)

  keeps = jax.checkpoint_policies.everything_saveable
  if cfg.loss.backward == 'remat':
    keeps = jax.checkpoint_policies.nothing_saveable

  @functools.partial(jax.checkpoint, policy=keeps)
  def visit(carry_BTD, module, head, is_head_1):
    carry_BTD, h_BTD = backward.hidden(
      module, head, carry_BTD, w, is_head_1=is_head_1, window=rows.window, cfg=cfg
    )
    return carry_BTD, (h_BTD, None)

  z_BTD = w.z_BTD.astype(cfg.model.compute_dtype)
  per_head = head_loss.HeadBatch(
    k=rows.k_K, target_BT=None, valid_BT=None, scale=None, probe=w.probe_K
  )
  _, (h_KBTD, _) = heads.scan_heads(visit, z_BTD, w.modules, per_head, cfg.heads)
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
  return jnp.sum(rows.scale_K * loss_K), head_loss.HeadStats(stats, jnp.zeros_like(loss_K), None)


def main(args) -> None:
  parsed = flags.parse(args)
  cfg = parsed.config()
  jax.config.update('jax_platforms', 'cpu')
  backward.STRATEGIES[cfg.loss.backward] = keeps_all_logits
  plan = ahead.plan(cfg)
  print('\n'.join(report.lines_of(plan)))
  if parsed.out:
    with open(parsed.out, 'w') as f:
      json.dump(report.values_of(plan), f, indent=1)


if __name__ == '__main__':
  main(sys.argv[1:])
