"""Manifests: any change of a file of a checkpoint is detected and named."""

import json
import os

import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations import memory

from mtp_jax.checkpoint import manifest, restore


def _write(folder):
  (folder / 'state' / 'd').mkdir(parents=True)
  (folder / 'about').write_bytes(b'{}')
  (folder / 'state' / 'd' / 'large').write_bytes(bytes(3 * manifest.BLOCK + 1))
  (folder / 'state' / 'empty').write_bytes(b'')
  manifest.write(folder)


@pytest.fixture
def folder(tmp_path):
  _write(epath.Path(tmp_path / '7'))
  return epath.Path(tmp_path / '7')


def flip(path, at=-1):
  """Flips one bit of a file, keeping its size."""
  data = bytearray(path.read_bytes())
  data[at] ^= 1
  path.write_bytes(data)


def test_what_was_written_is_whole(folder):
  assert manifest.problem(folder) == ''
  files = json.loads((folder / manifest.NAME).read_text())['files']
  assert sorted(files) == ['about', 'state/d/large', 'state/empty']
  # Of sha256sum.
  assert files['about'] == dict(
    size=2, sha256='44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a'
  )
  assert files['state/d/large']['size'] == 3 * manifest.BLOCK + 1
  manifest.write(folder)  # not of itself
  assert json.loads((folder / manifest.NAME).read_text())['files'] == files


@pytest.mark.parametrize('at', [0, manifest.BLOCK, 3 * manifest.BLOCK])
def test_a_flipped_bit(folder, at):
  flip(folder / 'state' / 'd' / 'large', at)
  assert manifest.problem(folder) == 'state/d/large does not match its sha256'


@pytest.mark.parametrize('size', [0, 1, 3 * manifest.BLOCK + 2])
def test_another_size(folder, size):
  (folder / 'state' / 'd' / 'large').write_bytes(bytes(size))
  assert manifest.problem(folder) == (f'state/d/large has {size:,} bytes, not 12,582,913')


def test_a_missing_file(folder):
  (folder / 'state' / 'empty').unlink()
  assert manifest.problem(folder) == 'state/empty is missing'
  (folder / 'state').rmtree()
  assert manifest.problem(folder) == 'state/d/large is missing'


def test_a_file_that_cannot_be_read(folder):
  (folder / 'about').unlink()
  (folder / 'about').mkdir()
  assert manifest.problem(folder).startswith('about ')


def test_what_else_lies_there_is_no_matter(folder):
  (folder / 'notes').write_text('mine')
  assert manifest.problem(folder) == ''


def test_without_a_manifest_nothing_is_known(folder):
  (folder / manifest.NAME).unlink()
  (folder / 'about').unlink()
  assert manifest.problem(folder) == ''


@pytest.mark.parametrize(
  'text, expected',
  [
    ('', 'is not JSON'),
    ('{"files": ', 'is not JSON'),
    ('[]', 'it=[]: must be an object'),
    ('{"files": []}', 'files=[]: must be an object'),
    ('{"files": {"about": 1}}', 'files.about=1: must be an object'),
    ('{"files": {"about": {"size": 2}}}', 'has no field files.about.sha256'),
    (
      '{"files": {"about": {"size": null, "sha256": ""}}}',
      'files.about.size=null: must be an integer from 0',
    ),
    (
      '{"files": {"about": {"size": -1, "sha256": ""}}}',
      'files.about.size=-1: must be an integer from 0',
    ),
    ('{"files": {}, "x": 1}', 'x: no such field'),
  ],
)
def test_corrupt_manifest_is_detected(folder, text, expected):
  (folder / manifest.NAME).write_text(text)
  found = manifest.problem(folder)
  assert found.startswith(f'manifest.json cannot be read: {expected}')


@pytest.mark.parametrize(
  'name',
  [
    '../8/about',
    '../..',
    '..',
    '.',
    '',
    '/dev/zero',
    'state/../../x',
    'a\0',
    './about',
    'state//d',
  ],
)
def test_a_manifest_names_files_of_its_folder_only(folder, name):
  """Devices must not be read: /dev/zero never ends."""
  file = dict(size=0, sha256='')
  (folder / manifest.NAME).write_text(json.dumps(dict(files={name: file})))
  assert manifest.problem(folder).endswith('which lies elsewhere')


def test_a_link_to_a_device_is_not_read(folder):
  (folder / 'state' / 'empty').unlink()
  os.symlink('/dev/zero', folder / 'state' / 'empty')
  assert manifest.problem(folder) == 'state/empty is not a regular file'


def test_a_manifest_that_was_altered(folder):
  path = folder / manifest.NAME
  path.write_text(path.read_text().replace('44136fa3', '44136fa4'))
  assert manifest.problem(folder) == 'about does not match its sha256'


def test_it_is_written_whole_or_not_at_all(folder, monkeypatch):
  (folder / manifest.NAME).unlink()

  def fails(*_):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as m:
    m.setattr(os, 'replace', fails)
    with pytest.raises(OSError, match='No space'):
      manifest.write(folder)
  assert sorted(p.name for p in folder.iterdir()) == ['about', 'state']


@pytest.fixture
def bucket(monkeypatch):
  """gs://bucket, in memory."""

  class Bucket(memory.MemoryFileSystem):
    protocol = 'gs'
    store, pseudo_dirs = {}, ['']

    @classmethod
    def _strip_protocol(cls, path):
      return memory.MemoryFileSystem._strip_protocol(str(path).removeprefix('gs:/'))

  monkeypatch.setattr(backend.fsspec_backend, '_get_filesystem', lambda _: Bucket())
  return epath.Path('gs://bucket')


def test_in_a_bucket(bucket):
  """What needs no orbax: there it writes by drivers of its own."""
  workdir = bucket / 'run'
  for step in (7, 10):
    folder = workdir / 'checkpoints' / str(step)
    _write(folder)
  assert restore.steps(str(workdir)) == []  # nothing says they are complete
  (workdir / 'checkpoints' / '7' / 'commit_success.txt').write_text('yes')
  assert restore.steps('gs://bucket/run') == [7]
  assert restore.find('gs://bucket/run') == ('gs://bucket/run', 7)
  found = restore.find('gs://bucket/run/checkpoints/7')
  assert found == ('gs://bucket/run', 7)
  assert restore.latest_valid_step('gs://bucket/run') == (7, [])
  (folder / 'commit_success.txt').write_text('yes')
  flip(folder / 'about')
  wrong = 'about does not match its sha256'
  assert restore.latest_valid_step('gs://bucket/run') == (7, [(10, wrong)])
  assert restore.quarantine('gs://bucket/run', 10) == '10.corrupt'
  assert restore.steps('gs://bucket/run') == [7]
