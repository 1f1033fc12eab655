"""A teacher's most probable next tokens at every token of a store (`mtp prepare
--data.teacher`).

At temperature 1, on the text itself. The teacher reads each document from its start, in
windows of L = seq_len tokens, L / 2 apart: a document of at most L tokens as a whole; of a
longer one each token beyond the first L is read in the first window that has it, with at
least L / 2 tokens before it. Nothing before a document is read, whereas a training window may
also begin within one: the teacher has seen at least what the model that trains has.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.checkpoint import teacher as teacher_lib
from mtp_jax.config import fields, schema
from mtp_jax.data import store, tokenizers
from mtp_jax.losses import cross_entropy
from mtp_jax.losses import teacher as model_lib
from mtp_jax.parallel import sharding

BATCH_TOKENS = 2**13  # per device and forward pass, or one window


class Piece(NamedTuple):
  """A window of a document."""

  tokens: np.ndarray
  done: int  # tokens at its start that the window before has


def of_checkpoint(cfg: schema.CommandConfig, tokenizer: tokenizers.Tokenizer) -> store.Teacher:
  """Loads the teacher of --data.teacher, onto all devices.

  Raises:
    ConfigError: no checkpoint, or one of another tokenizer.
  """
  path, k = cfg.data.teacher, cfg.data.teacher_top_k

  def need(ok, problem):
    if not ok:
      raise fields.ConfigError('data.teacher', path, problem)

  source = teacher_lib.open_source('data.teacher', path, cfg)
  was, saved = source.cfg, source.saved
  ours, theirs = tokenizers.recorded_name(tokenizer), saved.data.tokenizer
  need(theirs in ('', ours), f'its tokenizer is {theirs}, that of the documents {ours}')
  V = was.model.vocab_size
  need(V >= tokenizer.vocab_size, f'has {V} tokens, the tokenizer {tokenizer.vocab_size}')
  if k > V:
    raise fields.ConfigError('data.teacher_top_k', k, f'the teacher has {V} tokens')
  L = cfg.data.teacher_seq_len or saved.model.max_position_embeddings or saved.data.seq_len
  of = dataclasses.replace(was, data=schema.DataConfig(seq_len=L))
  try:
    mesh = sharding.make_mesh(of)
  except fields.ConfigError as error:
    raise fields.ConfigError('data.teacher', path, f'does not fit the mesh: {error}') from error
  model = teacher_lib.load(source._replace(cfg=of), mesh)
  about = dict(checkpoint=source.path, vocab_size=V, top_k=k, seq_len=L, stride=stride(L))

  def predict(documents):
    return predictions(model, documents, k, mesh)

  return store.Teacher(about, predict)


def stride(L: int) -> int:
  return max(L // 2, 1)


def pieces(documents: Iterable[np.ndarray], L: int) -> Iterator[Piece]:
  """Yields the windows of each document in order: each token is new in one of them."""
  for tokens in documents:
    begin = done = 0
    while done < len(tokens):
      yield Piece(tokens[begin : begin + L], done - begin)
      done, begin = min(begin + L, len(tokens)), begin + stride(L)


def _rows(found: Iterable[Piece], L: int) -> Iterator[list[Piece]]:
  """Packs consecutive pieces into rows of at most L tokens."""
  row, n = [], 0
  for piece in found:
    if n + len(piece.tokens) > L:
      yield row
      row, n = [], 0
    row.append(piece)
    n += len(piece.tokens)
  if row:
    yield row


def predictions(
  model: model_lib.Model, documents: Iterable[np.ndarray], k: int, mesh
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (ids_MP, logp_MP1) of consecutive tokens, P = k: the most probable next tokens, most
  probable first, and the log-probabilities of these and of all others together, in float16."""
  L = model.cfg.data.seq_len
  B = mesh.size * max(BATCH_TOKENS // L, 1)
  rows, is_last = _rows(pieces(documents, L), L), False
  while not is_last:
    batch = []
    while len(batch) < B and not is_last:
      row = next(rows, None)
      is_last = row is None
      batch += [] if row is None else [row]
    if not batch:
      return
    shape = (1, B, L)
    tokens, position = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for b, row in enumerate(batch):
      joined = np.concatenate([piece.tokens for piece in row])
      tokens[0, b, : len(joined)] = joined
      position[0, b, : len(joined)] = np.concatenate([np.arange(len(p.tokens)) for p in row])
    with jax.set_mesh(mesh):
      placed = sharding.put_batch(mesh, dict(tokens=tokens, position=position))
      ids_BTP, logp_BTP1 = jax.device_get(_top(model, placed, k=k))
    for b, row in enumerate(batch):
      at = 0
      for piece in row:
        new = slice(at + piece.done, at + len(piece.tokens))
        yield ids_BTP[b, new], logp_BTP1[b, new]
        at += len(piece.tokens)


def _found(logits_BCV, k: int):
  """Returns (ids_BCP, logp_BCP1) of rows of logits."""
  log_BCV = jax.nn.log_softmax(logits_BCV)
  logp_BCP, ids_BCP = jax.lax.top_k(log_BCV, k)
  B, C, _ = ids_BCP.shape
  at = jnp.arange(B)[:, None, None], jnp.arange(C)[None, :, None], ids_BCP
  # The sum of what is not among them: 1 - the sum of the others would cancel.
  rest_BC = jax.nn.logsumexp(log_BCV.at[at].set(-jnp.inf), axis=-1)
  logp_BCP1 = jnp.concatenate([logp_BCP, rest_BC[:, :, None]], axis=-1)
  return ids_BCP, logp_BCP1.astype(jnp.float16)


@functools.partial(jax.jit, static_argnames='k')
def _top(model: model_lib.Model, batch: dict, *, k: int):
  rows, cfg = jax.tree.map(lambda x: x[0], batch), model.cfg
  of = model_lib.read(model, rows, cfg.data.seq_len)

  def chunk(h_BCD, unembed_DV, cfg):
    logits_BCV = cross_entropy.scores(h_BCD, unembed_DV, cfg.model)
    return jnp.zeros(()), sharding.by_rows(lambda x: _found(x, k), logits_BCV)

  _, found = cross_entropy.sum_chunks(chunk, of.h_BTD, of.unembed_DV, (), cfg)
  return jax.tree.map(cross_entropy.out_of_chunks, found)
