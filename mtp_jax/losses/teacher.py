"""The external teacher of losses of acceptance (--loss.teacher): a frozen model, in place of
head 1 of the model that trains.

Its trunk and head 1 read the same window, with the same positions, and give its next-token
distribution at each query. Its hidden states, B x T x D of the teacher, are kept, and its
logits computed from them a chunk at a time, as head 1's are. Nothing is differentiated by
it: it is an argument of the step, but part neither of the training state nor of what a
checkpoint stores. Of a teacher whose most probable tokens a store has (data/store.py), the
batch brings these instead: acceptance.Stored.
"""

from typing import Generic

import flax.struct
import jax

from mtp_jax.config import schema
from mtp_jax.losses import acceptance
from mtp_jax.model import heads, lm, params
from mtp_jax.parallel import sharding


class Model(flax.struct.PyTreeNode, Generic[params.Leaf]):
  """Trunk and head 1 of a model as a plain Transformer: a Config of one head, whose trunk has
  all layers. The Config is static under jit."""

  params: lm.LM[params.Leaf]
  cfg: schema.Config = flax.struct.field(pytree_node=False)


def abstract(cfg: schema.Config, mesh) -> Model[jax.ShapeDtypeStruct]:
  """Returns the shapes, dtypes and shardings of the teacher of a Config of one head."""
  return Model(params.abstract(lm.specs(cfg), cfg.model.param_dtype, mesh), cfg)


def read(teacher: Model, batch: dict, T: int) -> acceptance.Teacher:
  """Computes the teacher's hidden states in the T queries of a micro-batch."""
  w, cfg = teacher.params, teacher.cfg
  tokens_BT, position_BT = batch['tokens'][:, :T], batch['position'][:, :T]
  specs = lm.specs(cfg)
  with jax.named_scope('teacher'):
    z_BTD, ctx = lm.trunk_output(w, lm.embed(w, tokens_BT, cfg), position_BT, cfg)
    norm_D = params.gather(w.norm, specs.norm, cfg)
    x = heads.Inputs(norm_D=norm_D, z_BTD=z_BTD, carry_BTD=z_BTD)
    _, h_BTD = lm.head_step(None, 1, x, ctx, cfg, feed=None)
    unembed_DV = _gathered(w.embed, specs.embed, cfg).T if w.unembed is None else None
    if unembed_DV is None:
      unembed_DV = _gathered(w.unembed, specs.unembed, cfg)
  return acceptance.Teacher(h_BTD, unembed_DV, cfg.model)


def _gathered(w, spec: params.Spec, cfg: schema.Config):
  """Gathers a parameter over the batch axes: `params.gather` of one without a gradient."""
  return jax.reshard(w.astype(cfg.model.compute_dtype), sharding.whole(*spec.axes))
