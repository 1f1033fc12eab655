"""`mtp prepare`: documents to a token store."""

import collections
import os
import sys

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags
from mtp_jax.config import fields, parse, schema
from mtp_jax.io import paths


def run(parsed: flags.Parsed) -> int:
  from mtp_jax.cli import progress
  from mtp_jax.data import readers, store, tokenizers, vocabulary

  cfg = parsed.config()
  path, name = cfg.data.store, cfg.data.tokenizer or 'bytes'
  command_lib.require(cfg, 'data.store', 'the directory to write')
  if [ref.path for ref in parse.parse_stores(path)] != [path]:
    raise fields.ConfigError(
      'data.store', path, 'prepare writes one store; no comma, NAME= or :WEIGHT'
    )
  store.check_target(path, cfg.data.overwrite)
  skipped = collections.Counter()

  def found(report, tokenizer=None):
    skipped.clear()
    return readers.read(
      cfg.data.documents,
      skipped,
      report=report,
      whole=False,
      max_bytes=cfg.data.max_document_mib * 2**20,
      tokenizer=tokenizer,
    )

  def report(line):
    print(f'mtp: {line}', file=sys.stderr, flush=True)

  if name.startswith('train:'):
    with progress.timed(f'tokenizer {name}'):
      tokenizer = vocabulary.train(name, found(lambda line: None), cfg.data.valid_fraction)
  else:
    tokenizer = tokenizers.get(name)
  teacher = _teacher(cfg, tokenizer) if cfg.data.teacher else None
  shard_bytes = cfg.data.max_shard_gib * 2**30
  with progress.status() as show:
    manifest = store.write(
      path,
      found(report, tokenizer),
      tokenizer,
      valid_fraction=cfg.data.valid_fraction,
      shard_tokens=shard_bytes // store.token_bytes(tokenizer),
      sources=cfg.data.documents,
      progress=show,
      overwrite=cfg.data.overwrite,
      workers=cfg.data.workers or os.cpu_count() or 1,
      teacher=teacher,
    )
  n_skipped = {what: n for what, n in sorted(skipped.items()) if n}
  lines = [f'skipped    {n:,} {what}' for what, n in n_skipped.items()]
  if n_skipped:
    manifest['skipped'] = n_skipped
  command_lib.print_report(store.summary(manifest) + lines, manifest, parsed.out)
  return 0


def _teacher(cfg: schema.CommandConfig, tokenizer):
  """Loads the teacher before documents are read, so that a wrong one is refused at once."""
  cfg = schema.replace(cfg, **{'data.teacher': paths.absolute(cfg.data.teacher)})
  command_lib.start_jax(cfg)
  from mtp_jax.train import stored_teacher

  return stored_teacher.of_checkpoint(cfg, tokenizer)
