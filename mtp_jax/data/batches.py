"""The batches of a run: opens the stores of a Config and iterates over them."""

from collections.abc import Iterator

import jax
import numpy as np

from mtp_jax.config import draft_vocab, fields, schema
from mtp_jax.data import corpus, loader
from mtp_jax.parallel import distributed, sharding


def open_tokens(cfg: schema.Config) -> corpus.Corpus:
  """Opens the stores of a run; raises if corrupt or if the vocabulary is too large."""
  tokens = corpus.open_corpus(cfg)
  tokenizer = tokens.tokenizer
  if tokenizer.vocab_size > cfg.model.vocab_size:
    raise fields.ConfigError(
      'model.vocab_size',
      cfg.model.vocab_size,
      f'tokenizer {tokenizer.name} needs at least {tokenizer.vocab_size}',
    )
  return tokens


def recorded(tokens: corpus.Corpus, cfg: schema.AnyConfig) -> schema.AnyConfig:
  """Returns the Config with what a run records of its corpus: the tokenizer and, where only
  its size is given, the draft vocabulary."""
  cfg = schema.replace(cfg, **{'data.tokenizer': tokens.recorded})
  n, _, ids = cfg.heads.draft_vocab.partition(':')
  if not n or ids:
    return cfg
  share_V = tokens.frequency(cfg.model.vocab_size)
  ids_X = np.argsort(-share_V, stable=True)[: int(n)]
  if distributed.is_primary():
    print(f'--heads.draft_vocab={n}: {share_V[ids_X].sum():.2%} of the tokens of --data.store')
  value = draft_vocab.recorded(ids_X, cfg.model.vocab_size)
  return schema.replace(cfg, **{draft_vocab.FLAG: value})


def check(tokens: corpus.Corpus, cfg: schema.Config) -> None:
  """Raises ConfigError if a batch is indivisible or a split has no window."""
  loader.check_divides(cfg.data.batch_size, cfg.train.grad_accum_steps)
  for split in [*tokens.train().splits, *tokens.held_out(cfg.eval.split).values()]:
    loader.check_windows(split, cfg.data.seq_len, cfg.span)


def check_same_store(tokens: corpus.Corpus, cfg: schema.Config) -> None:
  """Raises unless all processes read the same stores (copies are fine)."""
  expected = distributed.broadcast_one_to_all(tokens.fingerprint_of_all)
  with distributed.fail_together():
    if tokens.fingerprint_of_all != expected:
      raise fields.ConfigError(
        'data.store',
        cfg.data.store,
        f'process {jax.process_index()} reads a different store than process 0',
      )


def bytes_of_tokens(tokens: corpus.Corpus, cfg: schema.Config, mesh):
  """Returns the UTF-8 bytes per vocabulary entry (V,), replicated on all devices."""
  bytes_V = np.zeros(cfg.model.vocab_size, np.int32)
  bytes_V[: tokens.tokenizer.vocab_size] = tokens.tokenizer.token_bytes_V
  return jax.device_put(bytes_V, jax.NamedSharding(mesh, jax.P()))


def train_batches(
  tokens: corpus.Corpus,
  cfg: schema.Config,
  start_step: int,
  mesh=None,
  skipped_batches: loader.Ranges = (),
) -> Iterator[dict]:
  """Yields the batch of each step from start_step on, without end, except for
  skipped_batches; with a mesh, only the rows of this process."""
  n_rows = cfg.data.batch_size // cfg.train.grad_accum_steps
  return loader.train_batches(
    tokens.train(),
    seq_len=cfg.data.seq_len,
    span=cfg.span,
    batch_size=cfg.data.batch_size,
    accumulate=cfg.train.grad_accum_steps,
    seed=cfg.train.seed,
    start_step=start_step,
    skipped_batches=skipped_batches,
    rows=sharding.local_rows(mesh, n_rows) if mesh else None,
    threads=cfg.data.read_threads,
  )


def eval_batches(tokens: corpus.Corpus, cfg: schema.Config, mesh=None) -> dict[str, Iterator[dict]]:
  """Returns an iterator of batches per evaluation set, by name; with a mesh, of
  the rows of this process. All processes have the same number of batches."""
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
