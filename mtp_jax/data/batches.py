"""TODO of mtp_jax.train.loop."""

from collections.abc import Iterator

import jax
import numpy as np

from mtp_jax.config import fields, schema
from mtp_jax.data import corpus, loader
from mtp_jax.parallel import distributed, sharding


def open_tokens(cfg: schema.Config) -> corpus.Corpus:
  """The stores of a run, refused unless whole, and not of too many tokens."""
  tokens = corpus.open_corpus(cfg)
  tokenizer = tokens.tokenizer
  if tokenizer.vocab_size > cfg.model.vocab_size:
    raise fields.ConfigError(
      'model.vocab_size',
      cfg.model.vocab_size,
      f'tokenizer {tokenizer.name} needs at least {tokenizer.vocab_size}',
    )
  return tokens


def check_same_store(tokens: corpus.Corpus, cfg: schema.Config) -> None:
  """Each process may read copies of its own, but of the same stores."""
  wanted = distributed.broadcast_one_to_all(tokens.fingerprint_of_all)
  with distributed.fail_together():
    if tokens.fingerprint_of_all != wanted:
      raise fields.ConfigError(
        'data.store',
        cfg.data.store,
        f'process {jax.process_index()} reads another store than process 0',
      )


def bytes_of_tokens(tokens: corpus.Corpus, cfg: schema.Config, mesh):
  """UTF-8 bytes of each row of the vocabulary, on every device."""
  bytes_V = np.zeros(cfg.model.vocab_size, np.int32)
  bytes_V[: tokens.tokenizer.vocab_size] = tokens.tokenizer.token_bytes_V
  return jax.device_put(bytes_V, jax.NamedSharding(mesh, jax.P()))


def train_batches(
  tokens: corpus.Corpus,
  cfg: schema.Config,
  start_step: int,
  mesh=None,
  left_out: loader.Ranges = (),
) -> Iterator[dict]:
  """Batches of each step from start_step on, endlessly, but for those that are
  left out; with a mesh, the rows of this process."""
  n_rows = cfg.data.batch_size // cfg.train.grad_accum_steps
  return loader.train_batches(
    tokens.train(),
    seq_len=cfg.data.seq_len,
    span=cfg.span,
    batch_size=cfg.data.batch_size,
    accumulate=cfg.train.grad_accum_steps,
    seed=cfg.train.seed,
    start_step=start_step,
    left_out=left_out,
    rows=sharding.local_rows(mesh, n_rows) if mesh else None,
    threads=cfg.data.read_threads,
  )


def eval_batches(tokens: corpus.Corpus, cfg: schema.Config, mesh=None) -> dict[str, Iterator[dict]]:
  """Batches of each set to evaluate on, by name; with a mesh, the rows of this
  process. Every process has as many batches."""
  n_rows = cfg.data.batch_size // cfg.train.grad_accum_steps
  return {
    name: loader.eval_batches(
      split,
      seq_len=cfg.data.seq_len,
      span=cfg.span,
      batch_size=n_rows,
      limit=cfg.eval.batches * cfg.train.grad_accum_steps or None,
      rows=sharding.local_rows(mesh, n_rows) if mesh else None,
    )
    for name, split in tokens.held_out(cfg.eval.split).items()
  }
