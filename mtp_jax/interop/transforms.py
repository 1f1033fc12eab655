"""Transforms between an array of ours and one of a file."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mtp_jax.config import schema


class Form(NamedTuple):
  """The transform of an array of ours to one of a file, and back. Both get the
  Config; matrices in files are (out, in)."""

  out: Callable[[np.ndarray, schema.Config], np.ndarray]
  back: Callable[[np.ndarray, schema.Config], np.ndarray]
  shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # our shape -> the file's


def _heads_out(w_DNH, cfg):
  D, N, H = w_DNH.shape
  return w_DNH.transpose(1, 2, 0).reshape(N * H, D)


def _heads_back(w_ED, cfg):
  H = cfg.model.head_width
  E, D = w_ED.shape
  return w_ED.reshape(E // H, H, D).transpose(2, 0, 1)


def _in_pairs(w, cfg):
  """Reorders the last dimension for RoPE, which rotates i and i + R/2 of a head together
  here and in Hugging Face's Llama, 2i and 2i + 1 in Meta's and in GLM-4."""
  R = cfg.model.rotary_width
  order = np.arange(w.shape[-1])
  order[:R] = np.arange(R).reshape(2, R // 2).T.reshape(-1)
  return w[..., order]


def _of_pairs(w, cfg):
  R = cfg.model.rotary_width
  order = np.arange(w.shape[-1])
  order[:R] = np.arange(R).reshape(R // 2, 2).T.reshape(-1)
  return w[..., order]


def _swapped(w_ED):
  """Swaps the two halves of the input dimension."""
  return np.concatenate(np.split(w_ED, 2)[::-1])


SAME = Form(lambda w, _: w, lambda w, _: w, lambda s: s)
TRANSPOSED = Form(lambda w, _: w.T, lambda w, _: w.T, lambda s: s[::-1])
HEADS_IN = Form(_heads_out, _heads_back, lambda s: (s[1] * s[2], s[0]))
HEADS_IN_PAIRS = Form(
  lambda w, cfg: _heads_out(_in_pairs(w, cfg), cfg),
  lambda w, cfg: _of_pairs(_heads_back(w, cfg), cfg),
  HEADS_IN.shape,
)
# Biases and norms per attention head: (N, H) in one dimension.
FLAT = Form(
  lambda w_NH, _: w_NH.reshape(-1),
  lambda w_E, cfg: w_E.reshape(-1, cfg.model.head_width),
  lambda s: (math.prod(s),),
)
FLAT_PAIRS = Form(
  lambda w, cfg: FLAT.out(_in_pairs(w, cfg), cfg),
  lambda w, cfg: _of_pairs(FLAT.back(w, cfg), cfg),
  FLAT.shape,
)
# Gemma's norms in files of llama.cpp. In float32, to 2^-24: the sum is rounded.
PLUS_ONE = Form(
  lambda w, _: (w.astype(np.float32) + 1).reshape(-1),
  lambda w, _: w.astype(np.float32) - 1,
  lambda s: (math.prod(s),),
)
# A norm over the width of a head, (H,), or over that of all, (N, H).
NORM_OF_HEADS = Form(
  FLAT.out, lambda w_E, cfg: w_E if cfg.model.qk_norm == 'head' else FLAT.back(w_E, cfg), FLAT.shape
)
IN_PAIRS = {HEADS_IN: HEADS_IN_PAIRS, FLAT: FLAT_PAIRS}
HEADS_OUT = Form(
  lambda w_NHD, _: w_NHD.reshape(-1, w_NHD.shape[-1]).T,
  lambda w_DE, cfg: w_DE.T.reshape(-1, cfg.model.head_width, w_DE.shape[0]),
  lambda s: (s[2], s[0] * s[1]),
)
EMBEDDING_FIRST = Form(lambda w, _: _swapped(w).T, lambda w, _: _swapped(w.T), TRANSPOSED.shape)


def _zeros_of(w_DNH, cfg):
  return np.zeros(w_DNH.shape[1] * w_DNH.shape[2], w_DNH.dtype)


# A bias, which our layers do not have: always zero, a copy in the sense of Place.
NO_BIAS = Form(_zeros_of, SAME.back, lambda s: (s[1] * s[2],))
