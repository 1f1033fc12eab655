"""Models to decode with, and their expected tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import schema, validate
from mtp_jax.decode import decoder
from tests.support import oracle, tiny

VOCAB = 8  # small: some drafts of untrained heads are accepted
FAMILIES = ('parallel', 'causal', 'anticausal', 'linear', 'residual', 'sequential', 'recursive')
PROMPTS = ([3], [1, 5, 2, 0, 7, 7], [6, 6, 1], [2, 0, 4, 1, 3, 5, 5, 2, 6])
NEW = 40
ROWS = 48  # of a batch that is filled up, so that tests share its programs


def cfg(family='parallel', n=4, **changes) -> schema.Config:
  # Head 1's logits come of two layers at least.
  layers = 1 + (n if schema.HEAD_FAMILIES[family] else 1)
  changes = dict(decode__max_new_tokens=NEW, decode__prefill_chunk_size=4) | changes
  return tiny.cfg(
    heads__family=family,
    heads__n=n,
    model__n_layers=layers,
    model__vocab_size=VOCAB,
    data__seq_len=64,
    **changes,
  )


def make(c: schema.Config, model=None, active=None) -> decoder.Decoder:
  m = tiny.mesh(c)
  model = tiny.model(c, m) if model is None else model
  return decoder.Decoder(model, c, m, active or c.heads.n)


def with_rows(c: schema.Config, model=None, active=None, rows=ROWS):
  """Decodes PROMPTS, or others, of rows that are filled up."""
  made = make(c, model, active)

  def decode(prompts=PROMPTS, **kwargs):
    return made([np.array(p) for p in prompts], rows=rows, **kwargs)

  decode.widths = made.widths
  return decode


def decode(c: schema.Config, prompts=PROMPTS, model=None, **kwargs):
  return make(c, model)([np.array(p) for p in prompts], **kwargs)


def lists(decoded) -> list[list[int]]:
  return [tokens.tolist() for tokens in decoded.tokens]


@functools.cache
def greedy(family: str, n: int = 4, new: int = NEW, unembedding='shared'):
  """Returns the float64 oracle's continuation of each of PROMPTS."""
  c = cfg(family, n, heads__unembedding=unembedding)
  params = tiny.flat(tiny.model(c, tiny.mesh(c)))
  return [oracle.greedy(params, p, new, oracle.Shape(family, n)) for p in PROMPTS]


def counter(n: int = 4) -> tuple[schema.Config, object]:
  """Returns (Config, a model of linear heads that counts x, x + 1, x + 2 … modulo
  VOCAB, and drafts that without an error)."""
  c = cfg('linear', n)
  model = tiny.model(c, tiny.mesh(c))
  D = c.model.d_model
  one_hot_VD = 4 * np.eye(VOCAB, D, dtype=np.float32)
  ahead_DD = np.zeros((D, D), np.float32)
  for x in range(VOCAB):
    ahead_DD[x, (x + 1) % VOCAB] = 1
  still = model.trunk.replace(o=0 * model.trunk.o, down=0 * model.trunk.down)
  proj = np.stack([np.linalg.matrix_power(ahead_DD, k) for k in range(1, n)])
  new = model.replace(
    embed=one_hot_VD,
    trunk=still,
    norm=np.ones(D, np.float32),
    heads=model.heads.replace(proj=proj),
    unembed=ahead_DD @ one_hot_VD.T,
  )
  return c, jax.tree.map(lambda w, old: jax.device_put(jnp.asarray(w), old.sharding), new, model)


def with_flags(c: schema.Config, **changes) -> schema.Config:
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  return validate.validate(schema.replace(c, **changes))
