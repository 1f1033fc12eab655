"""What of a trained model computes the next token: trunk and head 1, a plain Transformer."""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.config import schedule, schema
from mtp_jax.model import block, heads, lm


def trained_heads(was: schema.Config, step: int) -> int:
  """Returns n such that heads 1..n trained within `step` steps; all heads of an
  import (step 0)."""
  if not was.loss.curriculum or not step:
    return was.heads.n
  phases = schedule.parse_steps(was.loss.curriculum)
  return max(int(values[0]) for start, values in phases if start < step)


def as_trained(was: schema.Config, step: int) -> schema.Config:
  """Returns `was` without the heads that have not trained yet."""
  n = trained_heads(was, step)
  fewer = was.heads.n - n if was.heads.block_first else 0
  return schema.replace(
    was, **{'heads.n': n, 'model.n_layers': was.model.n_layers - fewer, 'loss.curriculum': ''}
  )


def trained_part(old: lm.LM, was: schema.Config) -> lm.LM:
  """Returns the parameters of `was` without heads beyond those of `as_trained`."""
  n_modules = heads.n_modules(was.heads, was.heads.n)
  trained = jax.tree.map(lambda w: w[:n_modules], old.heads)
  old = old.replace(heads=trained if n_modules else None)
  if was.heads.unembedding == 'replicated':
    old = old.replace(unembed=old.unembed[: was.heads.n])
  return old


def layers(old: lm.LM, was: schema.Config) -> block.Block:
  """Returns the layers of trunk and head 1, stacked in order."""
  if not was.heads.block_first:
    return old.trunk
  last = slice(None, None, -1) if heads.family(was.heads).reverse else slice(0, 1)
  return jax.tree.map(
    lambda trunk, head: jnp.concatenate([trunk, head[last]]), old.trunk, old.heads
  )


def config(was: schema.Config) -> schema.Config:
  """Returns the config of trunk and head 1 of a model alone, a plain Transformer: one head,
  the identity on a trunk of all layers of the next token."""
  tied = was.heads.unembedding == 'tied'
  return dataclasses.replace(
    was,
    model=dataclasses.replace(was.model, n_layers=len(heads.next_token_layers(was))),
    heads=schema.HeadsConfig(n=1, family='linear', unembedding='tied' if tied else 'shared'),
    loss=schema.LossConfig(grad_dtype=was.model.compute_dtype),  # none
  )


def model(old: lm.LM, was: schema.Config) -> lm.LM:
  """Returns the parameters of `config`; all heads of `was` must have trained."""
  unembed = old.unembed[0] if was.heads.unembedding == 'replicated' else old.unembed
  return lm.LM(
    embed=old.embed, trunk=layers(old, was), heads=None, norm=old.norm, unembed=unembed, order=None
  )
