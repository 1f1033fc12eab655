"""The token store: documents as flat token shards with offsets and checksums.

Standard library and NumPy. A store is a directory:

  manifest.json                    tokenizer, counts, sizes, checksums
  {train,valid}/tokens-00000.bin   uint16, or uint32 above 65,536 tokens
  {train,valid}/offsets-00000.bin  uint64, where each document starts
  {train,valid}/scored-00000.bin   the loss mask, one byte per token, 1 = target;
                                   only if some tokens are masked out
  {train,valid}/teacher_ids-00000.bin   the P most probable next tokens at each token, of
  {train,valid}/teacher_logp-00000.bin  the tokens' dtype, and float16 log-probabilities of
                                   these and then of all other tokens together: P + 1
                                   per token; only with a teacher
  tokenizer/*                      the files of the tokenizer

A document is BOS, its tokens, EOS (a conversation: what its chat template writes),
within one shard, little endian. The sha256 of its text (and its loss mask)
determines everything else: duplicates, its split, its place in the split. So the
order is a shuffle, and the same documents in any order give the same bytes.
Letter: M documents.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mtp_jax.config import fields
from mtp_jax.data import encoding, shards, tokenizers, windows
from mtp_jax.data import spool as spool_lib
from mtp_jax.io import jsonl, paths

FORMAT = 2  # incremented when an older version would misread the store
MIN_SHARD_TOKENS = 2**27  # tokens per shard, or more, so that there are at most
MAX_SHARDS = 512  # this many shards

# Schema of manifest.json; fields of newer versions are ignored.
RECORD = {'file': str, 'size': jsonl.NATURAL, 'sha256': str}
SHARD = {
  **dict.fromkeys(('tokens_file', 'offsets_file'), RECORD),
  **dict.fromkeys(('scored_file?', 'teacher_ids_file?', 'teacher_logp_file?'), RECORD),
  ...: object,
}
SPLIT = {
  **dict.fromkeys(('documents', 'tokens', 'bytes'), jsonl.NATURAL),
  'scored?': jsonl.NATURAL,
  'shards': [SHARD],
  ...: object,
}
TOKENIZER = {
  **dict.fromkeys(('vocab_size', 'bos', 'eos'), jsonl.NATURAL),
  'name': str,
  'fingerprint': str,
  'files': [RECORD],
  ...: object,
}
TEACHER = {
  'checkpoint': str,
  **dict.fromkeys(('vocab_size', 'top_k', 'seq_len', 'stride'), jsonl.NATURAL),
  ...: object,
}
MANIFEST = {
  'sources': str,
  'dtype': str,
  'tokenizer': TOKENIZER,
  'splits': {...: SPLIT},
  'teacher?': TEACHER,
  **dict.fromkeys(('duplicates', 'empty'), jsonl.NATURAL),
  ...: object,
}


class Teacher(NamedTuple):
  """A model whose most probable next tokens are stored beside the documents."""

  about: dict  # of TEACHER
  predict: shards.Predict


@dataclasses.dataclass(frozen=True)
class Store:
  path: pathlib.Path
  manifest: dict
  splits: dict[str, windows.Split]

  def split(self, name: str) -> windows.Split:
    if name not in self.splits:
      has = ', '.join(self.splits)
      raise _error(self.path, f'has no split {name!r}, only: {has}')
    return self.splits[name]


def _error(path, problem: str) -> fields.ConfigError:
  return fields.ConfigError('data.store', path, problem)


# Writing.


def write(
  out_dir,
  documents: Iterable,
  tokenizer: tokenizers.Tokenizer,
  *,
  valid_fraction: float,
  shard_tokens: int = 0,
  sources: str = '',
  progress: spool_lib.Progress | None = None,
  overwrite: bool = False,
  workers: int = 1,
  teacher: Teacher | None = None,
) -> dict:
  """Writes a store atomically, and returns its manifest.

  Each text is encoded once, into a spool beside the store, so that the tokens
  take twice their size on disk; memory use is about 200 bytes per document.

  Args:
    out_dir: the store's directory; it appears when everything is on disk.
    documents: the documents to encode, each a documents.Document.
    tokenizer: encodes their texts.
    valid_fraction: probability that a document is held out, by a part of its
      hash that does not affect its order; 0 = no valid split.
    shard_tokens: maximum tokens per shard, unless one document is longer; 0 =
      MIN_SHARD_TOKENS, or more to stay within MAX_SHARDS.
    sources: recorded in the manifest for information.
    progress: called periodically with documents, tokens and text bytes so far.
    overwrite: replace an existing store.
    workers: number of encoder processes; above one, the main module of the
      program must be importable.
    teacher: reads all tokens once they are written.

  Raises:
    ConfigError: a directory that must not be replaced, a fraction outside
      [0, 1), a split without documents.
  """
  out = check_target(out_dir, overwrite)
  if not 0 <= valid_fraction < 1:
    raise fields.ConfigError('data.valid_fraction', valid_fraction, 'from 0 to below 1')
  with contextlib.ExitStack() as stack:
    try:
      tmp = pathlib.Path(stack.enter_context(paths.temporary_folder(out)))
    except OSError as error:
      raise _error(out_dir, f'cannot write there: {error.strerror}') from error
    spool = spool_lib.fill(tmp / 'spool', documents, tokenizer, progress, workers)
    manifest = _describe(tokenizer, sources, valid_fraction, spool)
    manifest['tokenizer']['files'] = _write_tokenizer(tmp, tokenizer)
    shard_tokens = shard_tokens or max(
      MIN_SHARD_TOKENS, -(-int(spool.length_M.sum()) // MAX_SHARDS)
    )
    for name, rows_M in _split_rows(spool, valid_fraction, sources).items():
      manifest['splits'][name] = shards.write_split(tmp / name, spool, rows_M, shard_tokens)
    spool.path.unlink()
    if teacher:
      manifest['teacher'] = teacher.about
      for name, entry in manifest['splits'].items():
        shards.write_teacher(tmp / name, entry, manifest['dtype'], teacher.predict)
    manifest['sha256'] = _manifest_sha256(manifest)
    shards.write_file(tmp / 'manifest.json', [_to_json(manifest).encode()])
    shards.sync_folder(tmp)
    _publish(tmp, out)
  return manifest


def token_bytes(tokenizer: tokenizers.Tokenizer) -> int:
  """Returns the bytes on disk per token of a store."""
  return np.dtype(encoding.dtype(tokenizer.vocab_size)).itemsize


def check_target(shown, overwrite: bool) -> pathlib.Path:
  """Returns the directory to write a store to; raises ConfigError."""
  out = pathlib.Path(shown).expanduser().resolve()
  if not str(shown):
    raise _error(shown, 'must be a directory')
  if out.exists() and not overwrite:
    raise _error(shown, 'exists; choose another directory, or set --data.overwrite')
  # Overwrite stores only: a typo must not remove a home directory.
  if out.exists() and not (
    out.is_dir() and ((out / 'manifest.json').exists() or not os.listdir(out))
  ):
    raise _error(shown, 'is not a token store, and is not overwritten')
  return out


def _write_tokenizer(tmp: pathlib.Path, tokenizer) -> list[dict]:
  folder = tmp / 'tokenizer'
  if not tokenizer.files:
    return []
  folder.mkdir()
  records = [shards.write_file(folder / name, [data]) for name, data in tokenizer.files.items()]
  shards.sync_folder(folder)
  return records


def _describe(tokenizer, sources, valid_fraction, spool) -> dict:
  return {
    'format': FORMAT,
    'sources': sources,
    'valid_fraction': valid_fraction,
    'duplicates': spool.duplicates,
    'empty': spool.empty,
    'dtype': spool.dtype,
    'splits': {},
    'tokenizer': {
      'name': tokenizer.name,
      'vocab_size': int(tokenizer.vocab_size),
      'bos': int(tokenizer.bos),
      'eos': int(tokenizer.eos),
      'fingerprint': tokenizer.fingerprint,
      'token_bytes': np.asarray(tokenizer.token_bytes_V).tolist(),
    },
  }


def _split_rows(spool, valid_fraction, sources) -> dict[str, np.ndarray]:
  """Returns the rows of the spool of each split, in the order of the store."""
  n, key_M4 = len(spool.digest_M4), spool.digest_M4
  if not n:
    raise fields.ConfigError('data.documents', sources, 'there is no document with text in it')
  order_M = np.lexsort((key_M4[:, 2], key_M4[:, 1], key_M4[:, 0]))
  valid_M = spool_lib.held_out(key_M4[order_M], valid_fraction)
  rows = {'train': order_M[~valid_M], 'valid': order_M[valid_M]}
  if not valid_fraction:
    del rows['valid']
  for name, rows_M in rows.items():
    if not rows_M.size:
      raise fields.ConfigError(
        'data.valid_fraction', valid_fraction, f'leaves the {name} split of {n} documents empty'
      )
  return rows


def _publish(tmp: pathlib.Path, out: pathlib.Path):
  """Moves tmp to out; a previous directory is removed last."""
  if not out.exists():
    os.rename(tmp, out)
    shards.sync_folder(out.parent)
    return
  # A unique name: a leftover of an earlier process must not block the exchange.
  old = tempfile.mkdtemp(prefix=f'{out.name}.old-', dir=out.parent)
  try:
    os.rename(out, old)  # a power loss here leaves both, under other names
    os.rename(tmp, out)
    shards.sync_folder(out.parent)
  finally:
    if not out.exists():
      os.rename(old, out)
    shutil.rmtree(old, ignore_errors=True)


def _manifest_sha256(manifest: dict) -> str:
  rest = {key: value for key, value in manifest.items() if key != 'sha256'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _to_json(manifest: dict) -> str:
  """Formats the manifest with one line per key."""
  lines = (f'{json.dumps(k)}: {json.dumps(v)}' for k, v in manifest.items())
  return '{\n' + ',\n'.join(lines) + '\n}\n'


# Reading.


def open_store(path, *, verify: bool = True, teacher: bool = False) -> Store:
  """Opens a store; raises ConfigError with the name of a file that is corrupt.

  Checks the checksum of the manifest and the size of every file; with verify,
  reads every file and compares its sha256. With teacher, its probabilities are opened too.
  """
  root = pathlib.Path(path).expanduser()
  manifest = _read_manifest(path, root)
  if teacher and 'teacher' not in manifest:
    raise _error(
      path, 'has no teacher for --loss.teacher=store; mtp prepare stores one with --data.teacher'
    )
  splits = {
    name: shards.open_split(root, name, split, manifest['dtype'], verify, teacher=teacher)
    for name, split in manifest['splits'].items()
  }
  return Store(root, manifest, splits)


def _read_manifest(path, root: pathlib.Path) -> dict:
  if not str(path) or not root.is_dir():
    moved = sorted(root.parent.glob(f'{glob.escape(root.name)}.old-*'))
    hint = f'; the previous one is {moved[0]}' if moved else ''
    raise _error(path, f'no such directory; mtp prepare writes a store{hint}')
  try:
    manifest = jsonl.loads((root / 'manifest.json').read_bytes())
  except FileNotFoundError as error:
    raise _error(path, 'is not a token store: no manifest.json') from error
  except OSError as error:
    raise _error(path, f'manifest.json: {error.strerror}') from error
  except ValueError as error:
    raise _error(path, f'manifest.json is corrupt: {error}') from error
  if not isinstance(manifest, dict) or 'format' not in manifest:
    raise _error(path, 'manifest.json is not the manifest of a token store')
  if manifest['format'] != FORMAT:
    raise _error(
      path,
      f'has format {manifest["format"]}, this version reads {FORMAT}; rewrite it with mtp prepare',
    )
  if manifest.get('sha256') != _manifest_sha256(manifest):
    raise _error(path, 'manifest.json is corrupt: checksum mismatch')
  try:
    jsonl.check(manifest, MANIFEST)
  except ValueError as error:
    raise _error(path, f'manifest.json is corrupt: {error}') from error
  for name, split in manifest['splits'].items():
    masked = {'scored_file' in shard for shard in split['shards']}
    if len(masked) != 1:
      raise _error(path, f'manifest.json: {name} has no shards, or only some with a loss mask')
  if manifest['dtype'] not in encoding.DTYPES:
    raise _error(
      path, f'manifest.json: dtype={manifest["dtype"]}: must be one of {", ".join(encoding.DTYPES)}'
    )
  return manifest


def tokenizer_of(store: Store) -> tokenizers.Tokenizer:
  """Loads the tokenizer of the store from the files in it."""
  made = store.manifest['tokenizer']
  files = {}
  for record in made['files']:
    path, _ = shards.checked(store.path, record, verify=True)
    files[path.name] = path.read_bytes()
  tokenizer = tokenizers.of_files(made['name'], files)
  if tokenizer.fingerprint != made['fingerprint']:
    raise _error(
      store.path,
      f'its tokenizer {made["name"]} has fingerprint {made["fingerprint"]},'
      f' but its files give {tokenizer.fingerprint}',
    )
  return tokenizer


def _teacher_summary(manifest: dict) -> str:
  of, records = manifest['teacher'], []
  for split in manifest['splits'].values():
    for shard in split['shards']:
      records += [shard['teacher_ids_file'], shard['teacher_logp_file']]
  n_bytes = sum(record['size'] for record in records)
  n_tokens = sum(split['tokens'] for split in manifest['splits'].values())
  return (
    f'teacher    {of["checkpoint"]}: {of["top_k"]} tokens per position,'
    f' {n_bytes // n_tokens} bytes each, {n_bytes / 2**30:.2f} GiB in all; windows of'
    f' {of["seq_len"]} tokens, {of["stride"]} apart in longer documents'
  )


def summary(manifest: dict) -> list[str]:
  """Returns human-readable lines that describe a store."""
  tokenizer = manifest['tokenizer']
  lines = [
    f'sources    {manifest["sources"] or "not recorded"}',
    f'tokenizer  {tokenizer["name"]}, {tokenizer["vocab_size"]:,} tokens as'
    f' {np.dtype(manifest["dtype"]).name}',
  ]
  for name, split in manifest['splits'].items():
    lines.append(
      f'{name:10} {split["documents"]:,} documents, {split["tokens"]:,} tokens,'
      f' {split["bytes"]:,} bytes of text, shards: {len(split["shards"])}'
      + (f', {split["scored"]:,} tokens in the loss mask' if 'scored' in split else '')
    )
  if 'teacher' in manifest:
    lines.append(_teacher_summary(manifest))
  duplicates = f'{manifest["duplicates"]:,} duplicates'
  return [*lines, f'skipped    {duplicates}, {manifest["empty"]:,} empty documents']
