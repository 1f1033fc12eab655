"""The token store: documents as flat token shards with offsets and checksums.

Floor 2: standard library and NumPy. A store is a directory:

  manifest.json                    tokenizer, counts, sizes, checksums
  {train,valid}/tokens-00000.bin   uint16, or uint32 above 65,536 tokens
  {train,valid}/offsets-00000.bin  uint64, where each document starts
  {train,valid}/scored-00000.bin   a byte a token, 1 = it counts as a target;
                                   only where some do not
  tokenizer/*                      the files that the tokenizer is made of

A document is BOS, its tokens, EOS, within one shard, little endian. The
sha256 of its text (and of what is scored) decides everything else: duplicates,
its split, its place in the split. So the order is a shuffle, and the same
documents in any order make the same bytes. Letter: M documents.
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

import numpy as np

from mtp_jax.config import fields
from mtp_jax.data import encoding, shards, tokenizers, windows
from mtp_jax.data import spool as spool_lib
from mtp_jax.io import jsonl, paths

FORMAT = 2  # raised when an older program would misread the store
MIN_SHARD_TOKENS = 2**27  # of all shards but the last, however many there are,
MAX_SHARDS = 512  # or more tokens: of 10**12, 4,096 files hold a store

# Of manifest.json; a field of a newer version does not change what these mean.
RECORD = {'file': str, 'size': jsonl.NATURAL, 'sha256': str}
SHARD = {'tokens_file': RECORD, 'offsets_file': RECORD, 'scored_file?': RECORD, ...: object}
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
MANIFEST = {
  'sources': str,
  'dtype': str,
  'tokenizer': TOKENIZER,
  'splits': {...: SPLIT},
  **dict.fromkeys(('duplicates', 'empty'), jsonl.NATURAL),
  ...: object,
}


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
) -> dict:
  """Writes a store, complete or not at all, and returns its manifest.

  Each text is encoded once, into a spool beside the store, so the disk holds
  the tokens twice; memory holds about 200 bytes a document.

  Args:
    out_dir: the store's directory; it appears when everything is on disk.
    documents: what to encode, each a documents.Document.
    tokenizer: how texts become ids.
    valid_fraction: probability of a document to be held out, by a part of its
      hash that does not order it; 0 = no valid split.
    shard_tokens: most tokens of a shard, unless one document is longer; 0 =
      MIN_SHARD_TOKENS, or more in a store of more than MAX_SHARDS.
    sources: kept in the manifest for the reader.
    progress: called now and then with documents, tokens and text bytes so far.
    overwrite: replace the store that is there.
    workers: processes that encode; more than one only from a program whose
      main module can be imported.

  Raises:
    ConfigError: a directory that may not be replaced, a fraction outside
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
    manifest['sha256'] = _manifest_sha256(manifest)
    shards.write_file(tmp / 'manifest.json', [_to_json(manifest).encode()])
    shards.sync_folder(tmp)
    _publish(tmp, out)
  return manifest


def token_bytes(tokenizer: tokenizers.Tokenizer) -> int:
  """Bytes on disk per token of a store."""
  return np.dtype(encoding.dtype(tokenizer.vocab_size)).itemsize


def check_target(shown, overwrite: bool) -> pathlib.Path:
  """The directory that a store may be written to, or raises ConfigError."""
  out = pathlib.Path(shown).expanduser().resolve()
  if not str(shown):
    raise _error(shown, 'must be a directory')
  if out.exists() and not overwrite:
    raise _error(shown, 'exists; give another directory, or --data.overwrite')
  # Overwriting is for stores: a slip must not remove a home directory.
  if out.exists() and not (
    out.is_dir() and ((out / 'manifest.json').exists() or not os.listdir(out))
  ):
    raise _error(shown, 'is not a token store, so it is not overwritten')
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
  """Rows of the spool of each split in the order of the store."""
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
        'data.valid_fraction', valid_fraction, f'it leaves the {name} split of {n} documents empty'
      )
  return rows


def _publish(tmp: pathlib.Path, out: pathlib.Path):
  """Puts tmp in the place of out; what was there is removed last."""
  if not out.exists():
    os.rename(tmp, out)
    shards.sync_folder(out.parent)
    return
  # Not two names of one process id: a leftover must not stop the exchange.
  old = tempfile.mkdtemp(prefix=f'{out.name}.old-', dir=out.parent)
  try:
    os.rename(out, old)  # power lost here leaves both, under other names
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
  """One line a key: readable without a line for each token's bytes."""
  lines = (f'{json.dumps(k)}: {json.dumps(v)}' for k, v in manifest.items())
  return '{\n' + ',\n'.join(lines) + '\n}\n'


# Reading.


def open_store(path, *, verify: bool = True) -> Store:
  """Opens a store whose files are whole, or raises ConfigError naming one.

  The manifest's own checksum and every file's size are always checked; with
  verify, every file is read and its sha256 compared.
  """
  root = pathlib.Path(path).expanduser()
  manifest = _read_manifest(path, root)
  splits = {
    name: shards.open_split(root, name, split, manifest['dtype'], verify)
    for name, split in manifest['splits'].items()
  }
  return Store(root, manifest, splits)


def _read_manifest(path, root: pathlib.Path) -> dict:
  if not str(path) or not root.is_dir():
    moved = sorted(root.parent.glob(f'{glob.escape(root.name)}.old-*'))
    hint = f'; the one before it is {moved[0]}' if moved else ''
    raise _error(path, f'no such directory; mtp prepare makes a store{hint}')
  try:
    manifest = jsonl.loads((root / 'manifest.json').read_bytes())
  except FileNotFoundError as error:
    raise _error(path, 'is no token store: no manifest.json') from error
  except OSError as error:
    raise _error(path, f'manifest.json: {error.strerror}') from error
  except ValueError as error:
    raise _error(path, f'manifest.json is damaged: {error}') from error
  if not isinstance(manifest, dict) or 'format' not in manifest:
    raise _error(path, 'manifest.json is not the manifest of a token store')
  if manifest['format'] != FORMAT:
    raise _error(
      path,
      f'has format {manifest["format"]}, this program reads {FORMAT}; mtp prepare makes it anew',
    )
  if manifest.get('sha256') != _manifest_sha256(manifest):
    raise _error(path, 'manifest.json is damaged: its checksum is wrong')
  try:
    jsonl.check(manifest, MANIFEST)
  except ValueError as error:
    raise _error(path, f'manifest.json is damaged: {error}') from error
  for name, split in manifest['splits'].items():
    masked = {'scored_file' in shard for shard in split['shards']}
    if len(masked) != 1:
      raise _error(path, f'manifest.json: {name} has no shards, or of two kinds')
  if manifest['dtype'] not in encoding.DTYPES:
    raise _error(
      path, f'manifest.json: dtype={manifest["dtype"]}: must be one of {", ".join(encoding.DTYPES)}'
    )
  return manifest


def tokenizer_of(store: Store) -> tokenizers.Tokenizer:
  """The tokenizer that the store was made with, from the files in the store."""
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
      f' this program makes {tokenizer.fingerprint} of its files',
    )
  return tokenizer


def summary(manifest: dict) -> list[str]:
  """What a store holds, in lines for people."""
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
      + (f', {split["scored"]:,} tokens scored' if 'scored' in split else '')
    )
  left_out = f'{manifest["duplicates"]:,} duplicates'
  return [*lines, f'left out   {left_out}, {manifest["empty"]:,} empty documents']
