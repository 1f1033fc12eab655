import errno
import fcntl
import hashlib
import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from mtp_jax.config import fields
from mtp_jax.data import documents, encoding, shards, store, tokenizers
from mtp_jax.io import paths

BYTES = tokenizers.get('bytes')
TEXTS = [f'document {i} ' + 'é' * (i % 7) for i in range(200)]


def _documents(texts):
  for i, text in enumerate(texts):
    yield documents.Document(f'{i}', text)


def _write(path, texts=TEXTS, tokenizer=BYTES, *, valid_fraction=0.2, **kwargs):
  return store.write(path, _documents(texts), tokenizer, valid_fraction=valid_fraction, **kwargs)


def _texts(opened: store.Store, name: str) -> list[str]:
  """Returns the texts of a split in store order, after checking BOS and EOS."""
  made, found, split = opened.manifest['tokenizer'], [], opened.split(name)
  for tokens_P, offset_M in zip(split.tokens, split.offsets, strict=True):
    for ids_T in np.split(tokens_P[:], offset_M[1:].astype(np.int64)):
      assert (ids_T[0], ids_T[-1]) == (made['bos'], made['eos'])
      assert not np.isin(ids_T[1:-1], (made['bos'], made['eos'])).any()
      found.append(BYTES.decode(ids_T))
  return found


def _files(path: pathlib.Path) -> dict[str, bytes]:
  files = (p for p in sorted(path.rglob('*')) if p.is_file())
  return {str(p.relative_to(path)): p.read_bytes() for p in files}


def _refused(call, *args, **kwargs) -> str:
  with pytest.raises(fields.ConfigError) as error:
    call(*args, **kwargs)
  assert '\n' not in str(error.value)
  return str(error.value)


def _wide(vocab_size: int) -> tokenizers.Tokenizer:
  """Bytes with the specials at the end of a vocabulary of this size."""
  return BYTES._replace(
    name=f'wide{vocab_size}',
    vocab_size=vocab_size,
    fingerprint='0' * 64,
    bos=vocab_size - 2,
    start=(vocab_size - 2,),
    eos=vocab_size - 1,
  )


def test_store_round_trip(tmp_path):
  manifest = _write(tmp_path / 's', sources='here')
  opened = store.open_store(tmp_path / 's')
  assert opened.manifest == manifest and manifest['sources'] == 'here'
  splits = {name: _texts(opened, name) for name in ('train', 'valid')}
  assert sorted(splits['train'] + splits['valid']) == sorted(TEXTS)
  for name, texts in splits.items():
    n_bytes = sum(len(text.encode()) for text in texts)
    entry = manifest['splits'][name]
    assert entry['documents'] == len(texts)
    assert entry['bytes'] == n_bytes
    assert entry['tokens'] == n_bytes + 2 * len(texts)
  assert manifest['tokenizer']['token_bytes'] == BYTES.token_bytes_V.tolist()
  assert len(splits['valid']) == pytest.approx(40, abs=20)
  assert os.listdir(tmp_path) == ['s']  # no spool, no temporary directory


def test_manifest_matches_every_file(tmp_path):
  manifest = _write(tmp_path / 's', shard_tokens=300)
  files = _files(tmp_path / 's')
  del files['manifest.json']
  for entry in manifest['splits'].values():
    for shard in entry['shards']:
      for kind, width, n in (
        ('tokens_file', 2, shard['tokens']),
        ('offsets_file', 8, shard['documents']),
      ):
        data = files.pop(shard[kind]['file'])
        assert len(data) == shard[kind]['size'] == width * n
        assert hashlib.sha256(data).hexdigest() == shard[kind]['sha256']
  assert not files


def test_order_is_by_hash_and_independent_of_reading(tmp_path):
  _write(tmp_path / 'a')
  shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
  _write(tmp_path / 'b', shuffled)
  assert _files(tmp_path / 'a') == _files(tmp_path / 'b')
  for name in ('train', 'valid'):
    texts = _texts(store.open_store(tmp_path / 'a'), name)
    hashes = [hashlib.sha256(text.encode()).digest() for text in texts]
    assert hashes == sorted(hashes)


def test_split_of_a_document_does_not_depend_on_others(tmp_path):
  _write(tmp_path / 'a')
  _write(tmp_path / 'b', [*TEXTS[50:], *(f'more {i}' for i in range(300))])
  _write(tmp_path / 'c', valid_fraction=0.5)
  a, b, c = (store.open_store(tmp_path / name) for name in 'abc')
  for name in ('train', 'valid'):
    kept = set(_texts(a, name)) & set(TEXTS[50:])
    assert kept == set(_texts(b, name)) & set(TEXTS)
  # A larger fraction holds out more, and never trains on what was held out.
  assert set(_texts(a, 'valid')) < set(_texts(c, 'valid'))
  # The order of the store is independent of the split.
  first = [hashlib.sha256(t.encode()).digest()[0] for t in _texts(c, 'valid')]
  assert np.mean(first) == pytest.approx(127.5, abs=25)


def test_duplicates_and_empty_documents(tmp_path):
  manifest = _write(tmp_path / 's', [*TEXTS, '', *TEXTS[:3], '', TEXTS[0]])
  assert (manifest['duplicates'], manifest['empty']) == (4, 2)
  same = _write(tmp_path / 't')
  assert manifest['splits'] == same['splits']


@pytest.mark.parametrize('vocab_size, dtype', [(258, 'u2'), (65536, 'u2'), (65537, 'u4')])
def test_store_dtype_follows_vocab_size(tmp_path, vocab_size, dtype):
  tokenizer = _wide(vocab_size)
  manifest = _write(tmp_path / 's', tokenizer=tokenizer)
  assert manifest['dtype'] == f'<{dtype}'
  opened = store.open_store(tmp_path / 's')
  assert opened.split('train').tokens[0].dtype == np.dtype(f'<{dtype}')
  assert opened.split('train').tokens[0][:].max() == vocab_size - 1
  both = _texts(opened, 'train') + _texts(opened, 'valid')
  assert sorted(both) == sorted(TEXTS)


def test_ids_outside_the_vocabulary_raise(tmp_path):
  for bad in ([70000], [-1]):
    broken = BYTES._replace(encode=lambda text, bad=bad: np.array(bad))
    with pytest.raises(ValueError, match='its vocab_size is 258'):
      _write(tmp_path / 's', tokenizer=broken)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize('shard_tokens', [1, 16, 100, 400])
def test_shards_hold_whole_documents(tmp_path, shard_tokens):
  manifest = _write(tmp_path / 'many', shard_tokens=shard_tokens)
  _write(tmp_path / 'one')
  many, one = (store.open_store(tmp_path / name) for name in ('many', 'one'))
  for name in ('train', 'valid'):
    assert _texts(many, name) == _texts(one, name)
    shards = manifest['splits'][name]['shards']
    assert len(shards) > 1 and len(one.split(name).tokens) == 1
    for shard, after in zip(shards, shards[1:], strict=False):
      assert shard['tokens'] <= shard_tokens or shard['documents'] == 1
      assert shard['tokens'] + after['tokens'] > shard_tokens  # nearly full
    split = many.split(name)
    expected = sum(max(t.size - 1, 0) // 8 for t in split.tokens)
    assert split.n_windows(8, 1) == expected


def test_shards_are_filled_to_the_last_token(tmp_path):
  texts = [f'{i:08d}' for i in range(12)]  # 10 tokens each
  manifest = _write(tmp_path / 's', texts, valid_fraction=0, shard_tokens=40)
  shards = manifest['splits']['train']['shards']
  assert [shard['tokens'] for shard in shards] == [40, 40, 40]


def test_progress_rises_to_the_totals(tmp_path, monkeypatch):
  monkeypatch.setattr(encoding, 'BATCH_BYTES', 500)
  calls = []
  manifest = _write(tmp_path / 's', progress=lambda *n: calls.append(n))
  assert len(calls) > 3 and calls == sorted(calls)
  entries = manifest['splits'].values()
  assert calls[-1] == tuple(
    sum(entry[key] for entry in entries) for key in ('documents', 'tokens', 'bytes')
  )


def test_valid_fraction_limits(tmp_path):
  manifest = _write(tmp_path / 's', valid_fraction=0)
  assert list(manifest['splits']) == ['train']
  line = _refused(store.open_store(tmp_path / 's').split, 'valid')
  assert line.endswith("s: has no split 'valid', only: train")
  for fraction in (1, 1.5, -0.1, float('nan')):
    line = _refused(_write, tmp_path / 't', valid_fraction=fraction)
    assert line == f'--data.valid_fraction={fraction}: from 0 to below 1'
  for fraction, name in ((1e-9, 'valid'), (1 - 1e-9, 'train')):
    line = _refused(_write, tmp_path / 't', TEXTS[:3], valid_fraction=fraction)
    problem = f'leaves the {name} split of 3 documents empty'
    assert line == f'--data.valid_fraction={fraction}: {problem}'
  line = _refused(_write, tmp_path / 't', ['', ''], sources='dir:x')
  assert line == ('--data.documents=dir:x: there is no document with text in it')
  assert os.listdir(tmp_path) == ['s']


def test_existing_targets_are_not_overwritten(tmp_path):
  _write(tmp_path / 's')
  before = _files(tmp_path / 's')
  line = _refused(_write, tmp_path / 's', TEXTS[:50])
  assert line.endswith('s: exists; choose another directory, or set --data.overwrite')
  home = tmp_path / 'home'
  (home / 'thesis').mkdir(parents=True)
  (tmp_path / 'file').write_text('x')
  for name in ('home', 'file'):
    line = _refused(_write, tmp_path / name, overwrite=True)
    assert line.endswith('is not a token store, and is not overwritten')
  assert (home / 'thesis').is_dir() and _files(tmp_path / 's') == before
  assert _refused(_write, '') == '--data.store=: must be a directory'
  line = _refused(_write, tmp_path / 'file' / 'below')
  assert line.endswith('below: cannot write there: Not a directory')


def test_overwrite(tmp_path, monkeypatch):
  (tmp_path / 's').mkdir()  # an empty directory may be replaced
  _write(tmp_path / 's', overwrite=True)
  monkeypatch.setenv('HOME', str(tmp_path))
  manifest = _write('~/s', TEXTS[:50], overwrite=True)
  assert store.open_store('~/s').manifest == manifest
  assert os.listdir(tmp_path) == ['s']


class Killed(BaseException):
  """Not caught by `except Exception`, like KeyboardInterrupt."""


def _killed_after(n: int):
  yield from _documents(TEXTS[:n])
  raise Killed


def test_killed_write_leaves_no_files(tmp_path):
  with pytest.raises(Killed):
    store.write(tmp_path / 's', _killed_after(50), BYTES, valid_fraction=0.2)
  assert not os.listdir(tmp_path)
  stale = tmp_path / f's.tmp-{os.getpid()}'  # what SIGKILL would have left
  (stale / 'train').mkdir(parents=True)
  _write(tmp_path / 's')
  store.open_store(tmp_path / 's')
  before = _files(tmp_path / 's')
  with pytest.raises(Killed):
    store.write(tmp_path / 's', _killed_after(50), BYTES, valid_fraction=0.2, overwrite=True)
  assert _files(tmp_path / 's') == before
  assert os.listdir(tmp_path) == ['s']


@pytest.mark.parametrize('failing', [1, 2])
def test_failed_exchange_keeps_the_old_store(tmp_path, monkeypatch, failing):
  _write(tmp_path / 's')
  before, rename, calls = _files(tmp_path / 's'), os.rename, []

  def fails_once(source, target):
    calls.append(source)
    if len(calls) == failing:
      raise OSError(errno.EIO, 'Input/output error')
    rename(source, target)

  monkeypatch.setattr(os, 'rename', fails_once)
  with pytest.raises(OSError):
    _write(tmp_path / 's', TEXTS[:50], overwrite=True)
  assert _files(tmp_path / 's') == before
  assert os.listdir(tmp_path) == ['s']


def _record(path: pathlib.Path, kind: str) -> str:
  manifest = json.loads((path / 'manifest.json').read_bytes())
  return manifest['splits']['valid']['shards'][0][kind]['file']


@pytest.mark.parametrize('kind', ['tokens_file', 'offsets_file'])
def test_corrupt_files_raise_with_their_name(tmp_path, kind):
  path = tmp_path / 's'
  _write(path)
  name = _record(path, kind)
  data = (path / name).read_bytes()
  flipped = bytearray(data)
  flipped[len(data) // 2] ^= 1
  (path / name).write_bytes(flipped)
  line = _refused(store.open_store, path)
  start = f'--data.store={path}: {name}: '
  assert line == start + 'is corrupt: checksum mismatch'
  store.open_store(path, verify=False)
  n = len(data)
  for bad in (data[:-1], data + b'\0'):
    (path / name).write_bytes(bad)
    line = _refused(store.open_store, path, verify=False)
    assert line == start + f'has {len(bad)} bytes instead of {n}'
  (path / name).unlink()
  assert _refused(store.open_store, path) == start + 'No such file or directory'


def test_corrupt_manifests_raise(tmp_path):
  path = tmp_path / 's'
  _write(path)
  manifest = path / 'manifest.json'
  good = manifest.read_text()
  for bad, problem in (
    (good[:-10], 'manifest.json is corrupt: '),
    ('\xff', 'manifest.json is corrupt: '),
    ('[1]', 'manifest.json is not the manifest of a token store'),
    ('{"a": 1}', 'manifest.json is not the manifest of a token store'),
    (good.replace('"format": 2', '"format": 9'), 'has format 9, this version'),
    (good.replace('"bos": 256', '"bos": 0'), 'checksum mismatch'),
  ):
    assert bad != good
    manifest.write_bytes(bad.encode('latin-1'))
    line = _refused(store.open_store, path)
    assert line.startswith(f'--data.store={path}: ') and problem in line
  manifest.unlink()
  line = _refused(store.open_store, path)
  assert line == f'--data.store={path}: is not a token store: no manifest.json'
  manifest.mkdir()
  assert 'manifest.json: Is a directory' in _refused(store.open_store, path)


@pytest.mark.parametrize(
  'place, value, problem',
  [
    (('splits',), [], 'splits=[]: must be an object'),
    (('splits', 'train', 'shards'), None, 'splits.train.shards=null: must be a list'),
    (('splits', 'train', 'tokens'), '9', 'splits.train.tokens="9": must be'),
    (
      ('splits', 'valid', 'shards', 0, 'tokens_file', 'size'),
      1.5,
      'splits.valid.shards[0].tokens_file.size=1.5: must be an integer from 0',
    ),
    (('splits', 'train', 'shards'), [], 'train has no shards'),
    (('tokenizer', 'bos'), None, 'tokenizer.bos=null: must be an integer'),
    (('dtype',), 'O', 'dtype=O: must be one of <u2, <u4'),
    (
      ('splits', 'valid', 'shards', 0, 'tokens_file', 'file'),
      '../../x',
      '../../x: is outside of the store',
    ),
    (
      ('splits', 'valid', 'shards', 0, 'tokens_file', 'file'),
      '/dev/zero',
      '/dev/zero: is outside of the store',
    ),
  ],
)
def test_manifest_type_errors_name_the_field(tmp_path, place, value, problem):
  """Even if its checksum is correct."""
  path = tmp_path / 's'
  _write(path)
  manifest = json.loads((path / 'manifest.json').read_bytes())
  at = manifest
  for key in place[:-1]:
    at = at[key]
  at[place[-1]] = value
  manifest['sha256'] = store._manifest_sha256(manifest)
  (path / 'manifest.json').write_text(json.dumps(manifest))
  line = _refused(store.open_store, path)
  assert line.startswith(f'--data.store={path}: ') and problem in line


def test_missing_stores_raise(tmp_path):
  for path in ('', tmp_path / 'none', __file__):
    line = _refused(store.open_store, path)
    assert line == (f'--data.store={path}: no such directory; mtp prepare writes a store')
  (tmp_path / 'none.old-x1').mkdir()  # power loss between two renames
  line = _refused(store.open_store, tmp_path / 'none')
  assert line.endswith(f'; the previous one is {tmp_path}/none.old-x1')


def test_store_summary(tmp_path):
  manifest = _write(tmp_path / 's', [*TEXTS, ''], sources='dir:x')
  n = {name: entry['documents'] for name, entry in manifest['splits'].items()}
  lines = store.summary(manifest)
  assert lines[:2] == ['sources    dir:x', 'tokenizer  bytes, 258 tokens as uint16']
  assert lines[2].startswith(f'train      {n["train"]} documents, ')
  assert lines[3].startswith(f'valid      {n["valid"]} documents, ')
  assert lines[4] == 'skipped    0 duplicates, 1 empty documents'


# Files that change, and many of them.


def _overwrite(path, data):
  with open(path, 'r+b') as file:
    file.write(data)


CHANGES = {
  'truncated': lambda path: os.truncate(path, 10),
  'zeroed': lambda path: _overwrite(path, bytes(path.stat().st_size)),
  'rewritten': lambda path: path.write_bytes(path.read_bytes()[::-1]),
  'removed': lambda path: path.unlink(),
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('kind', ['tokens', 'offsets'])
def test_shard_changed_while_open_raises(tmp_path, change, kind):
  _write(tmp_path / 's', valid_fraction=0)
  split = store.open_store(tmp_path / 's').split('train')
  if change != 'removed':  # an open file survives its removal
    split.window(0, 8, 1)
  os.utime(tmp_path / 's')  # the time of the folder does not matter
  CHANGES[change](tmp_path / f's/train/{kind}-00000.bin')
  line = _refused(split.window, 1, 8, 1)
  assert line.startswith(f'--data.store={tmp_path}/s: train/{kind}-00000.bin ')
  assert 'changed' in line or 'No such file' in line


def test_many_shards_use_few_descriptors(tmp_path):
  _write(tmp_path / 's', valid_fraction=0, shard_tokens=1)
  opened = store.open_store(tmp_path / 's')
  split, before = opened.split('train'), len(os.listdir('/proc/self/fd'))
  assert len(split.tokens) == len(TEXTS)
  for _ in range(2):
    assert sum(t.size for t in split.documents()) == sum(
      shard['tokens'] for shard in opened.manifest['splits']['train']['shards']
    )
    for i in range(split.n_windows(4, 1)):
      split.window(i, 4, 1)
  assert len(os.listdir('/proc/self/fd')) - before <= shards.OPEN_FILES


MANY = """
import resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from mtp_jax.data import store
opened = store.open_store(sys.argv[1], verify=False)
split = opened.split('train')
rng, n = np.random.default_rng(0), split.n_windows(4, 1)
for i in rng.integers(0, n, 5000).tolist():
  window = split.window(i, 4, 1)
assert sum(t.size for t in split.documents()) == 20_000 * 8
print(len(split.tokens), n)
"""


@pytest.mark.slow
def test_store_of_20_000_shards_opens_under_256_descriptors(tmp_path):
  store.write(
    tmp_path / 's',
    (documents.Document(str(i), f'{i:06d}') for i in range(20_000)),
    tokenizers.get('bytes'),
    valid_fraction=0,
    shard_tokens=1,
  )
  done = subprocess.run(
    [sys.executable, '-c', MANY, str(tmp_path / 's')], capture_output=True, text=True
  )
  assert done.stdout.split()[:1] == ['20000'], done.stderr


def test_shard_size_grows_with_the_store(tmp_path, monkeypatch):
  """There are at most MAX_SHARDS shards per split."""
  monkeypatch.setattr(store, 'MAX_SHARDS', 3)
  monkeypatch.setattr(store, 'MIN_SHARD_TOKENS', 16)
  manifest = _write(tmp_path / 's')
  n = sum(len(split['shards']) for split in manifest['splits'].values())
  assert 4 <= n <= 6


def test_temporary_folders_of_killed_processes_are_removed(tmp_path):
  """By name and lock; not those of live processes, other hosts, other folders."""
  done = subprocess.run(
    [sys.executable, '-c', 'import os; print(os.getpid())'], capture_output=True, check=True
  )
  dead, host = int(done.stdout), socket.gethostname()
  gone = [f's.tmp-{dead}', f's.tmp-{dead}-{host}', f's.tmp-{os.getpid()}-{host}']
  kept = [
    f's.tmp-{dead}-other',
    f's.tmp-{os.getppid()}-{host}',
    f's2.tmp-{dead}',
    's.tmp-x',
    's.tmp',
  ]
  for name in gone + kept:
    (tmp_path / name).mkdir()
    (tmp_path / name / 'spool').write_text('x')
  locked = tmp_path / f's.tmp-{dead}-{host}'
  handle = os.open(locked, os.O_RDONLY)
  fcntl.flock(handle, fcntl.LOCK_EX)  # as of another namespace
  _write(tmp_path / 's')
  assert sorted(os.listdir(tmp_path)) == sorted([*kept, locked.name, 's'])
  os.close(handle)
  with paths.new_folder(str(tmp_path / 's')) as tmp:
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, 's', os.path.basename(tmp)])
    shutil.rmtree(tmp_path / 's')
  assert sorted(os.listdir(tmp_path)) == sorted([*kept, 's'])
