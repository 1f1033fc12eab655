import collections
import gzip
import json
import os
import sys

import pytest

from mtp_jax.cli import main
from mtp_jax.config import fields as fields_lib
from mtp_jax.data import documents, readers, records, store


def _read(sources: str, *args) -> list[tuple[str, str]]:
  """Returns names and texts of documents without loss spans."""
  found = list(readers.read(sources, *args))
  assert not any(document.loss_spans for document in found)
  return [(document.name, document.text) for document in found]


def _refused(sources: str) -> str:
  """Returns the error of a source, after checking that it names the source."""
  with pytest.raises(fields_lib.ConfigError) as error:
    _read(sources)
  line = str(error.value)
  flag, _, problem = line.partition(': ')
  assert flag == f'--data.documents={sources}' and '\n' not in line
  return problem


def _gz(path, data: bytes):
  with gzip.open(path, 'wb') as file:
    file.write(data)


def test_stdlib_source_lists_sorted_modules():
  found = dict(_read('python:stdlib'))
  names = list(found)
  assert names == sorted(names) and len(names) > 500
  assert 'class JSONDecoder' in found['stdlib/json/decoder.py']
  parts = {part for name in names for part in name.split('/')[:-1]}
  assert not parts & readers.NOT_STDLIB
  assert all(name.endswith('.py') for name in names)


def test_python_package_is_not_imported(tmp_path, monkeypatch):
  package = tmp_path / 'floor_pkg'
  (package / 'sub' / 'tests').mkdir(parents=True)
  bomb = 'raise RuntimeError("imported")\n'
  for name in ('__init__.py', 'a.py', 'sub/__init__.py', 'sub/tests/t.py'):
    (package / name).write_text(bomb)
  (package / 'data.txt').write_text('no source')
  (tmp_path / 'floor_module.py').write_text(bomb)
  monkeypatch.syspath_prepend(tmp_path)
  assert [name for name, _ in _read('python:floor_pkg')] == [
    'floor_pkg/__init__.py',
    'floor_pkg/a.py',
    'floor_pkg/sub/__init__.py',
    'floor_pkg/sub/tests/t.py',
  ]
  assert _read('python:floor_pkg.sub')[0] == ('floor_pkg/sub/__init__.py', bomb)
  assert _read('python:floor_pkg.a') == [('floor_pkg/a.py', bomb)]
  assert _read('python:floor_module') == [('floor_module.py', bomb)]
  assert not [name for name in sys.modules if name.startswith('floor_')]


def test_python_frozen_and_namespace_modules(tmp_path, monkeypatch):
  assert _read('python:os')[0][0] == 'os.py'  # frozen, yet its source is there
  for place in ('one', 'two'):
    (tmp_path / place / 'floor_ns').mkdir(parents=True)
    (tmp_path / place / 'floor_ns' / f'{place}.py').write_text(place)
    monkeypatch.syspath_prepend(tmp_path / place)
  assert _read('python:floor_ns') == [('floor_ns/one.py', 'one'), ('floor_ns/two.py', 'two')]


@pytest.mark.parametrize(
  'module', ['no_such_module_x', 'json.no_such', 'os.path.x', 'a b', '.json']
)
def test_python_module_missing(module):
  problem = _refused(f'python:{module}')
  assert problem == 'no module of this name is installed'


def test_python_without_source(monkeypatch):
  assert _refused('python:sys') == 'contains no .py file'
  monkeypatch.setitem(sys.modules, 'floor_specless', type(sys)('x'))
  problem = _refused('python:floor_specless')  # as __main__: __spec__ is None
  assert problem == 'no module of this name is installed'


def test_dir_skips_and_counts_files_that_are_not_text(tmp_path):
  root = tmp_path / 'tree'
  (root / 'b').mkdir(parents=True)
  (root / 'z.txt').write_bytes('é\r\n'.encode())
  (root / 'b' / 'a.md').write_text('a')
  (root / 'latin.txt').write_bytes(b'caf\xe9')
  (root / 'zeros').write_bytes(b'a\0b')
  _gz(root / 'b' / 'packed.gz', b'text inside')
  (root / 'broken.gz').write_bytes(b'\x1f\x8b\xff')
  (tmp_path / 'outside').mkdir()
  (tmp_path / 'outside' / 'secret').write_text('secret')
  (root / 'link').symlink_to(tmp_path / 'outside')
  (root / 'link.txt').symlink_to(root / 'z.txt')
  os.mkfifo(root / 'pipe')
  skipped = collections.Counter()
  found = _read(f'dir:{root}', skipped)
  assert found == [('tree/b/a.md', 'a'), ('tree/z.txt', 'é\r\n')]
  assert skipped == {'files that are not UTF-8 text': 4, 'symbolic links': 2}
  assert _read(f'dir:{root}/') == found


def test_dir_errors(tmp_path, monkeypatch):
  assert _refused(f'dir:{tmp_path}/none') == 'no such directory'
  assert _refused(f'dir:{tmp_path}') == 'contains no regular file'

  def denied(top, onerror):
    onerror(PermissionError(13, 'Permission denied', f'{top}/x'))
    return iter(())

  monkeypatch.setattr(os, 'walk', denied)
  problem = _refused(f'dir:{tmp_path}')
  assert problem == f'cannot read {tmp_path}/x: Permission denied'


def test_text_path_glob_and_gz(tmp_path):
  for folder, text in (('b', 'two'), ('a', 'one')):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / 'part.txt').write_text(text)
  _gz(tmp_path / 'a' / 'more.txt.gz', 'zipped é'.encode())
  (tmp_path / 'a' / 'folder.txt').mkdir()
  (tmp_path / 'odd[1].txt').write_text('brackets')
  assert _read(f'text:{tmp_path}/b/part.txt') == [('part.txt', 'two')]
  assert _read(f'text:{tmp_path}/*/*.txt*') == [
    ('a/more.txt.gz', 'zipped é'),
    ('a/part.txt', 'one'),
    ('b/part.txt', 'two'),
  ]
  assert [n for n, _ in _read(f'text:{tmp_path}/**/part.txt')] == ['a/part.txt', 'b/part.txt']
  numbers = [7, 2, 9, 0, 5, 3, 8, 1, 6, 4]
  for number in numbers:
    (tmp_path / f'n{number}').write_text(f'{number}')
  texts = [text for _, text in _read(f'text:{tmp_path}/n*')]
  assert texts == sorted(map(str, numbers))
  assert _read(f'text:{tmp_path}/odd[1].txt') == [('odd[1].txt', 'brackets')]


def test_text_errors(tmp_path):
  assert _refused(f'text:{tmp_path}/none.txt') == 'no such file'
  assert _refused(f'text:{tmp_path}/*.txt') == 'no file matches'
  assert _refused(f'text:{tmp_path}') == 'is a directory; dir:PATH reads one'
  bad = tmp_path / 'bad.txt'
  bad.write_bytes(b'\xff')
  assert _refused(f'text:{bad}') == f'{bad} is not UTF-8 text'


def test_corrupt_or_missing_files_raise_with_their_path(tmp_path, monkeypatch):
  whole = tmp_path / 'whole.gz'
  _gz(whole, b'{"text": "x"}\n' * 1000)
  cut = tmp_path / 'cut.gz'
  cut.write_bytes(whole.read_bytes()[:-12])
  flipped = tmp_path / 'flipped.gz'
  data = bytearray(whole.read_bytes())
  data[25] ^= 0xFF
  flipped.write_bytes(data)
  (tmp_path / 'plain.gz').write_bytes(b'not zipped')
  for name in ('cut.gz', 'flipped.gz', 'plain.gz'):
    for kind in ('text', 'jsonl'):
      problem = _refused(f'{kind}:{tmp_path}/{name}')
      assert problem.startswith(f'cannot read {tmp_path}/{name}: ')
  later = readers.read(f'text:{whole}')
  whole.unlink()  # between the look-up and the reading
  with pytest.raises(fields_lib.ConfigError, match='No such file or directory'):
    next(later)


def test_jsonl_reads_fields_of_plain_and_gz_files(tmp_path):
  lines = '{"text": "one", "body": "eins"}\n\n  \n{"text": "\\ud83d\\ude00"}\n'
  (tmp_path / 'a.jsonl').write_text(lines)
  assert _read(f'jsonl:{tmp_path}/a.jsonl') == [('a.jsonl:1', 'one'), ('a.jsonl:4', '😀')]
  _gz(tmp_path / 'b.jsonl.gz', b'{"body": "zwei"}')
  _gz(tmp_path / 'c.jsonl.gz', b'{"body": "half \\ud83d."}')
  assert _read(f'jsonl:{tmp_path}/*.gz#body') == [
    ('b.jsonl.gz:1', 'zwei'),
    ('c.jsonl.gz:1', 'half \ufffd.'),
  ]


@pytest.mark.parametrize(
  'line, problem',
  [
    (b'{"text": ', 'bad JSON: Expecting value at column 9'),
    (b'[' * 200_000, 'bad JSON: nested too deeply'),
    (b'"\xff"', 'not UTF-8 text'),
    (b'[1]', 'list where an object should be'),
    (b'{"b": 1, "a": 2}', "no field 'text', its fields are: a, b"),
    (b'{}', "no field 'text', its fields are: none"),
    (b'{"text": 3}', "field 'text' is int, not a string"),
    (b'{"text": [null]}', "field 'text' is list, not a string"),
    (b'{"text": %s}' % (b'1' * 5000), 'bad JSON: a number has too many digits'),
  ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, problem):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n')
  assert _refused(f'jsonl:{path}') == f'{path}:3: {problem}'


@pytest.mark.parametrize('source', ['', 'orc:x', 'dir', 'dir:', 'x.txt'])
def test_unknown_source_kinds_raise(source):
  kinds = 'python, dir, text, jsonl, parquet, task'
  assert _refused(source) == f'KIND:ARG with KIND one of: {kinds}'


def test_sources_are_looked_up_before_reading(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('a')
  with pytest.raises(fields_lib.ConfigError, match='text:missing: no such file'):
    readers.read(f'text:{path},text:missing')
  line = json.dumps({'text': 'b'})
  (tmp_path / 'b.jsonl').write_text(line)
  both = f'text:{path} , jsonl:{tmp_path}/b.jsonl'
  assert _read(both) == [('a.txt', 'a'), ('b.jsonl:1', 'b')]


def test_jsonl_joins_prompt_and_completion(tmp_path):
  path = tmp_path / 'a.jsonl'
  rows = [dict(p='try é', c='now'), dict(p='', c='x'), dict(p='y', c='')]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  found = list(readers.read(f'jsonl:{path}#p+c'))
  assert [(d.name, d.text, d.loss_spans) for d in found] == [
    ('a.jsonl:1', 'try énow', (5,)),
    ('a.jsonl:2', 'x', (0,)),
    ('a.jsonl:3', 'y', (1,)),
  ]
  for fields in ('p+', '+c', '+', 'p+c+d'):
    problem = _refused(f'jsonl:{path}#{fields}')
    assert problem == 'one FIELD, or PROMPT+COMPLETION'
  assert "no field 'd', its fields are: c, p" in _refused(f'jsonl:{path}#p+d')


# Byte order marks, symbolic links, vanished files, size limits.

MARK = b'\xef\xbb\xbf'


def test_byte_order_mark_is_dropped(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(MARK + b'{"text": "one"}\n')
  (tmp_path / 'b.txt').write_bytes(MARK + 'two \ufeff'.encode())
  _gz(tmp_path / 'c.txt.gz', MARK + b'three')
  for source, text in (
    ('jsonl:{}/a.jsonl', 'one'),
    ('text:{}/b.txt', 'two \ufeff'),
    ('text:{}/c.txt.gz', 'three'),
  ):
    assert _read(source.format(tmp_path))[0][1] == text


def test_jsonl_null_is_an_empty_text(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": null, "b": "x"}\n')
  assert _read(f'jsonl:{path}') == [('a.jsonl:1', '')]
  (found,) = readers.read(f'jsonl:{path}#text+b')
  assert (found.text, found.loss_spans) == ('x', (0,))


def test_dir_counts_files_that_vanish(tmp_path, monkeypatch):
  for name in 'abc':
    (tmp_path / name).write_text(name)
  real = os.lstat

  def lstat(path):
    if os.fspath(path).endswith('/a'):
      raise FileNotFoundError(2, 'No such file or directory', path)
    return real(path)

  skipped = collections.Counter()
  monkeypatch.setattr(readers.os, 'lstat', lstat)
  found = readers.read(f'dir:{tmp_path}', skipped)
  (tmp_path / 'c').unlink()
  assert [document.text for document in found] == ['b']
  assert skipped == {readers.VANISHED: 2}


def test_documents_over_the_size_limit_are_skipped_and_reported(tmp_path):
  (tmp_path / 'd').mkdir()
  (tmp_path / 'd/a').write_text('x' * 101)
  (tmp_path / 'd/b').write_text('y' * 100)
  _gz(tmp_path / 'c.gz', b'z' * 101)
  lines = [json.dumps(dict(text='a' * n)) for n in (200, 89, 3, 88)]
  (tmp_path / 'e.jsonl').write_text('\n'.join(lines))
  skipped, lines = collections.Counter(), []
  found = readers.read(
    f'dir:{tmp_path}/d,text:{tmp_path}/c.gz,jsonl:{tmp_path}/e.jsonl',
    skipped,
    max_bytes=100,
    report=lines.append,
    whole=False,
  )
  assert [d.name for d in found] == ['d/b', 'e.jsonl:3', 'e.jsonl:4']
  (reason,) = skipped
  assert skipped[reason] == 4 and '--data.max_document_mib' in reason
  assert [line.split(':')[0] for line in lines] == [
    'skipped d/a',
    'skipped c.gz',
    'skipped e.jsonl',
    'skipped e.jsonl',
  ]


def test_large_files_are_read_in_blocks(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, 'HELD', 10)
  monkeypatch.setattr(documents, 'BLOCK', 4)
  text, skipped = 'zwölf Ähren\n' * 3, collections.Counter()
  (tmp_path / 'a').write_text(text)
  (tmp_path / 'b').write_bytes(text.encode() + b'\xff')
  (tmp_path / 'c').write_bytes(text.encode() + b'\0')
  _gz(tmp_path / 'd.gz', text.encode())
  for source in (f'dir:{tmp_path}', f'text:{tmp_path}/d.gz'):
    (found,) = readers.read(source, skipped, whole=False)
    assert found.text == '' and ''.join(found.blocks()) == text
    (found,) = readers.read(source)
    assert found.text == text
  assert skipped == {'files that are not UTF-8 text': 3}
  (found,) = readers.read(f'text:{tmp_path}/a', whole=False)
  (tmp_path / 'a').write_text(text + 'x')
  with pytest.raises(fields_lib.ConfigError, match='changed during reading'):
    list(found.blocks())


# Large values of jsonl and parquet.

LINES = [
  dict(text='plain ' * 40),
  dict(text='\u00fcber \u4e2d\u6587 \U0001f600 \n\t"\\' * 30),
  dict(text='\\' * 101 + '"' * 50 + '\x1f' * 50),
  dict(text='\U0001f600' * 60),
  dict(text='x' * 90, other='y' * 90),
  dict(text=None, other='\u4e2d' * 90),
  dict(text='a', other=['"' * 70, {'b' * 70: 1.5}]),
]


@pytest.mark.parametrize('block', [12, 13, 17, 64, 10**6])
@pytest.mark.parametrize('escaped', [True, False])
def test_large_jsonl_lines_are_decoded_in_blocks(tmp_path, monkeypatch, block, escaped):
  """The result equals that of the json module."""
  monkeypatch.setattr(documents, 'HELD', 50)
  monkeypatch.setattr(records, 'LONG', 20)
  monkeypatch.setattr(documents, 'BLOCK', block)
  lines = [json.dumps(x, ensure_ascii=escaped) for x in LINES]
  # Surrogates, as JSON escapes, alone and in pairs.
  lines += [
    r'{"text": "%s"}' % (x * 30)
    for x in (r'\ud83d', r'\ude00', r'\ud83d\ude00', r'\ud83dx', r'\\ud83d', r'\/\b\f')
  ]
  lines += [r'{"text": "a", "text": "%s"}' % ('b' * 99)]
  path = tmp_path / 'a.jsonl'
  path.write_text('\n'.join(lines))
  expected = [d.text for d in readers.read(f'jsonl:{path}')]
  found = list(readers.read(f'jsonl:{path}', whole=False))
  assert [''.join(d.blocks()) for d in found] == expected
  assert sum(d.read is not None for d in found) >= len(lines) - 3


def test_large_jsonl_lines_keep_their_loss_spans(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, 'HELD', 50)
  monkeypatch.setattr(records, 'LONG', 20)
  path, pairs = (tmp_path / 'a.jsonl', [('\u00e9', 'x'), ('a' * 60, 'b\u00e9' * 60)])
  pairs += [('\u00e9' * 60, 'y'), ('z', '\u4e2d' * 60), ('', 'x' * 60)]
  path.write_text('\n'.join(json.dumps(dict(p=p, c=c)) for p, c in pairs))
  for found, (p, c) in zip(readers.read(f'jsonl:{path}#p+c', whole=False), pairs, strict=True):
    assert ''.join(found.blocks()) == p + c and found.loss_spans == (len(p),)


BAD_LINES = [
  b'{"text": "%s\x01"}',
  b'{"text": "%s\\x"}',
  b'{"text": "%s\\u12"}',
  b'{"text": "%s\xff"}',
  b'{"other": "\xff%s", "text": "a"}',
  b'{"other": "%s\\x", "text": "a"}',
  b'{"text": "%s',
  b'{"text": "%s" 1}',
  b'["%s"]',
  b'{"%s": 1}',
  b'{"text": ["%s"]}',
  b'{"text": 1, "b": "%s"}',
]


@pytest.mark.parametrize('line', BAD_LINES)
def test_large_jsonl_lines_raise_the_same_errors(tmp_path, monkeypatch, line):
  monkeypatch.setattr(documents, 'HELD', 50)
  monkeypatch.setattr(records, 'LONG', 20)
  path = tmp_path / 'a.jsonl'
  path.write_bytes(line.replace(b'%s', b'x' * 100))
  problems = []
  for whole in (True, False):
    with pytest.raises(fields_lib.ConfigError) as error:
      list(readers.read(f'jsonl:{path}', whole=whole))
    problems.append(str(error.value))
  assert problems[0] == problems[1] and f'{path}:1: ' in problems[0]
  assert 'at at' not in problems[0]


def test_large_parquet_values_are_decoded_in_blocks(tmp_path, monkeypatch):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')

  monkeypatch.setattr(documents, 'HELD', 50)
  monkeypatch.setattr(documents, 'BLOCK', 7)
  texts = ['a', '\U0001f600\u00e9x' * 40, None, '', 'y' * 300]
  for kind in (pyarrow.string(), pyarrow.large_string()):
    table = pyarrow.table(dict(text=pyarrow.array(texts, kind)))
    parquet.write_table(table, tmp_path / 'a.parquet')
    source = f'parquet:{tmp_path}/a.parquet'
    found = list(readers.read(source, whole=False, max_bytes=299))
    assert [''.join(d.blocks()) for d in found] == [x or '' for x in texts[:4]]
    assert [d.read is not None for d in found] == [False, True, False, False]


@pytest.mark.parametrize('n', [1, 100])
def test_parquet_values_that_are_not_utf8_raise(tmp_path, monkeypatch, n):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  monkeypatch.setattr(documents, 'HELD', 50)
  data = pyarrow.array([b'fine', b'x' * n + b'\xff']).view(pyarrow.string())
  parquet.write_table(pyarrow.table(dict(text=data)), tmp_path / 'a.parquet')
  source = f'parquet:{tmp_path}/a.parquet'
  for whole in (True, False):
    with pytest.raises(fields_lib.ConfigError, match='a.parquet is not UTF-8 text'):
      list(readers.read(source, whole=whole))


# Names that are not UTF-8.


def test_file_names_that_are_not_utf8(tmp_path, capsys):
  """They are read from a folder, but raise in a flag."""
  folder = tmp_path / 'texts'
  folder.mkdir()
  name = os.fsdecode(b'a\xff.txt')
  try:
    (folder / name).write_text('text')
  except OSError:
    pytest.skip('the file system accepts only UTF-8')
  out = tmp_path / 'store'

  def prepare(source):
    args = [f'--data.documents={source}', f'--data.store={out}']
    return main.main(['prepare', *args, '--data.valid_fraction=0'])

  assert prepare(f'text:{folder / name}') == 2
  assert capsys.readouterr().err == (
    f'mtp: --data.documents=text:{folder}/a\\udcff.txt: must be UTF-8\n'
  )
  assert prepare(f'dir:{folder}') == 0
  assert store.open_store(out).manifest['splits']['train']['documents'] == 1
