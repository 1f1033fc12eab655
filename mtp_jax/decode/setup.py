"""The static setup of a decoding program: model, heads in use, tree of drafts."""

from typing import NamedTuple

import numpy as np

from mtp_jax.config import schema
from mtp_jax.model import heads


class Tree(NamedTuple):
  """The tree of a window's tokens: slot 0 is the last known one, the others drafts."""

  depth_M: tuple[int, ...]  # distance from the root
  rank_M: tuple[int, ...]  # rank among its head's candidates
  levels: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # slots, parents
  widths: tuple[int, ...]  # candidates of heads 2, 3, …

  @property
  def is_chain(self) -> bool:
    return all(width == 1 for width in self.widths)


def sees(tree: Tree) -> np.ndarray:
  """Returns (M, M), whether a slot's token attends to another's: its ancestors, itself."""
  mask_MM = np.eye(len(tree.depth_M), dtype=bool)
  for slots, parents in tree.levels:
    mask_MM[np.array(slots)] |= mask_MM[np.array(parents)]
  return mask_MM


def tree(widths: tuple[int, ...]) -> Tree:
  """Returns the tree with each candidate of a head under each of the head before it
  (Cai et al. 2024, https://arxiv.org/abs/2401.10774); all widths 1: a chain."""
  depth, rank, levels, above = [0], [0], [], (0,)
  for level, width in enumerate(widths, 1):
    slots = tuple(range(len(depth), len(depth) + len(above) * width))
    parents = tuple(parent for parent in above for _ in range(width))
    levels.append((slots, parents))
    depth += [level] * len(slots)
    rank += list(range(width)) * len(above)
    above = slots
  return Tree(tuple(depth), tuple(rank), tuple(levels), tuple(widths))


class Setup(NamedTuple):
  """The static arguments of a decoding program; hashable."""

  cfg: schema.Config  # model and heads; other sections at their defaults
  active: int  # number of trained heads
  tree: Tree  # of depth W - 1, the number of drafts
  stop_ids: tuple[int, ...]
  min_confidence: float = 0.0  # of the product, or later steps are skipped

  @property
  def window(self) -> int:
    """W, the number of heads in use."""
    return len(self.tree.widths) + 1

  @property
  def slots(self) -> int:
    """M, tokens per forward pass: W unless drafts form a tree."""
    return len(self.tree.depth_M)

  @property
  def num_reread(self) -> int:
    """R, positions before the window that heads with next-token input read again."""
    if self.cfg.heads.share_keys_values:
      return 0  # what head 2 reads is known, and it alone has a cache
    return max(self.window - 2, 0) * heads.family(self.cfg.heads).uses_next_token


def setup(cfg: schema.Config, active: int, widths: tuple[int, ...], stop_ids=()) -> Setup:
  only = schema.Config(model=cfg.model, heads=cfg.heads)
  only = schema.replace(only, **{'loss.grad_dtype': cfg.model.compute_dtype})
  return Setup(only, active, tree(widths), tuple(stop_ids))
