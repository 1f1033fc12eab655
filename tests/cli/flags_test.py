"""Command lines and flag files."""

import os
import time

import pytest
from absl import flags as absl_flags

from mtp_jax.cli import flags
from mtp_jax.config import fields, parse, schema, validate
from tests.support import values as values_lib


def _config(*args):
  return flags.parse(list(args)).config()


def _file(path, *lines):
  path.parent.mkdir(exist_ok=True, parents=True)
  path.write_text('\n'.join(lines))
  return f'--flagfile={path}'


def _refused(*args) -> str:
  with pytest.raises((fields.ConfigError, absl_flags.Error)) as error:
    _config(*args)
  return str(error.value)


def test_no_flags_is_the_default_config():
  assert _config() == schema.CommandConfig()


def test_every_field_is_a_flag():
  values = {
    int: lambda v: v + 2,
    float: lambda v: v / 2,
    bool: lambda v: not v,
    str: lambda v: v + 'x',
    tuple: lambda v: (*v, 'x', 'y=1,2'),
  }
  for name, field in schema.fields().items():
    value = values[field.type](field.default)
    given = value if field.type is tuple else (value,)
    parsed = flags.parse([f'--{name}={v}' for v in given])
    assert parsed.given == {name: value}, name
    assert type(parsed.given[name]) is field.type


def test_flag_spellings():
  cfg = _config('--model.d_model', '64', '-heads.n=3', '--nodata.verify', '--data.overwrite')
  assert cfg.model.d_model == 64 and cfg.heads.n == 3
  assert not cfg.data.verify and cfg.data.overwrite


def test_given_flags_override_the_base():
  base = schema.replace(schema.CommandConfig(), **{'heads.n': 2, 'optim.lr': 0.5})
  cfg = flags.parse(['--heads.n=3']).config(base)
  assert (cfg.heads.n, cfg.optim.lr) == (3, 0.5)


def test_flags_may_follow_positional_arguments():
  parsed = flags.parse(['a', '--out=x.json', 'b'])
  assert (parsed.rest, parsed.out) == (['a', 'b'], 'x.json')


def test_flag_file_round_trip(tmp_path):
  cfg = schema.replace(schema.CommandConfig(), **values_lib.OTHER)
  text = parse.to_flag_file(cfg)
  assert 'workdir' not in text
  for section in 'distributed', 'decode', 'export', 'import', 'inspect', 'plan', 'bench':
    assert f'--{section}.' not in text
  got = _config(_file(tmp_path / 'run.flags', *text.splitlines()))
  assert got == schema.replace(cfg, **{'train.workdir': '', 'plan.sweep': ()})
  assert len(text.splitlines()) == len(schema.fields(schema.Config)) - 1  # but for the workdir


def test_flag_file_comments_and_blank_lines_are_ignored(tmp_path):
  file = _file(tmp_path / 'a', '# --heads.n=1', '', '  --heads.n=2  ', '#')
  assert flags.parse([file]).given == {'heads.n': 2}


def test_flag_file_byte_order_mark_is_ignored(tmp_path):
  (tmp_path / 'a').write_bytes(b'\xef\xbb\xbf--heads.n=2\n')
  assert flags.parse([f'--flagfile={tmp_path}/a']).given == {'heads.n': 2}


def test_later_flag_wins(tmp_path):
  file = _file(tmp_path / 'a', '--heads.n=1', '--heads.n=2')
  assert _config(file).heads.n == 2
  assert _config('--heads.n=3', file).heads.n == 2
  assert _config(file, '--heads.n=3').heads.n == 3
  outer = _file(tmp_path / 'b', '--flagfile=a', '--heads.n=3')
  assert _config(outer).heads.n == 3
  outer = _file(tmp_path / 'b', '--heads.n=3', '--flagfile=a')
  assert _config(outer).heads.n == 2


def test_nested_flag_file_is_relative_to_the_including_one(tmp_path, monkeypatch):
  here, there = tmp_path / 'here', tmp_path / 'there'
  monkeypatch.chdir(_made(here))
  outer = _file(there / 'deep' / 'outer', '--flagfile=size/inner')
  _file(here / 'size' / 'inner', '--heads.n=1')
  assert _config(outer).heads.n == 1
  _file(there / 'deep' / 'size' / 'inner', '--heads.n=2', '--flagfile=last')
  _file(there / 'deep' / 'size' / 'last', '--model.d_model=32')
  cfg = _config(outer)
  assert (cfg.heads.n, cfg.model.d_model) == (2, 32)
  # From the command line a path is relative to the working directory.
  _file(here / 'mine', '--heads.n=3')
  for spelling in (['--flagfile=mine'], ['--flagfile', 'mine'], ['-flagfile=mine']):
    assert _config(*spelling).heads.n == 3


def _made(path):
  path.mkdir()
  return path


def test_flag_file_cycles_are_refused(tmp_path):
  _file(tmp_path / 'leaf', '--heads.n=2')
  twice = _file(tmp_path / 'a', '--flagfile=leaf', '--flagfile=leaf')
  assert _config(twice).heads.n == 2
  a = _file(tmp_path / 'a', '--flagfile=b')
  _file(tmp_path / 'b', '--flagfile=c')
  os.symlink(tmp_path / 'a', tmp_path / 'c')
  cycle = f'{tmp_path}/a > {tmp_path}/b > {tmp_path}/a'
  assert _refused(a) == f'--flagfile=c: includes itself: {cycle}'


def test_flag_file_expansion_is_linear_and_bounded(tmp_path):
  """Two includes per level: 2^40 files without a bound."""
  for i in range(40):
    _file(tmp_path / f'{i}', *[f'--flagfile={i + 1}'] * 2)
  _file(tmp_path / '40', '--heads.n=2')
  begin = time.perf_counter()
  expected = f'more than {flags.MOST_FILES:,} files'
  assert expected in _refused(f'--flagfile={tmp_path}/0')
  many = [*['--heads.n=1'] * (flags.MOST_FLAGS - 1), '--heads.n=2']
  assert _config(_file(tmp_path / 'many', *many)).heads.n == 2
  expected = f'more than {flags.MOST_FLAGS:,} flags'
  assert expected in _refused(_file(tmp_path / 'many', *many, '--heads.n=2'))
  large = '#' * (flags.MOST_BYTES + 1)
  assert 'more than 1,048,576 bytes' in _refused(_file(tmp_path / 'x', large))
  assert time.perf_counter() - begin < 20


def test_missing_flag_file_is_refused(tmp_path):
  assert _refused('--flagfile=none') == '--flagfile=none: no such file'
  assert _refused('--flagfile') == '--flagfile=: no such file'
  assert _refused(f'--flagfile={tmp_path}').endswith('no such file')
  line = _refused('--flagfile=experiments/none.flags')
  assert line.endswith('experiments/ is in the source repository, not in the installed package')
  outer = _file(tmp_path / 'a', '--flagfile=none')
  assert _refused(outer) == '--flagfile=none: no such file'


def test_invalid_flag_file_is_refused(tmp_path):
  file = _file(tmp_path / 'a', '--heads.n=2', 'model.d_model=3')
  assert _refused(file).endswith("'model.d_model=3' is not a flag")
  (tmp_path / 'b').write_bytes(b'\xff\xfe')
  assert _refused(f'--flagfile={tmp_path}/b').endswith('is not text')


@pytest.mark.parametrize(
  'arg, expected',
  [
    ('--model.d_modle=3', 'model.d_modle'),
    ('--d_model=3', 'd_model'),
    ('--model.d_model=many', 'model.d_model=many: must be an integer'),
    ('--model.d_model=1.5', 'model.d_model=1.5'),
    ('--model.d_model=', 'model.d_model='),
    ('--data.verify=perhaps', 'data.verify=perhaps: must be true or false'),
    ('--optim.lr=fast', 'optim.lr=fast: must be a number'),
    ('--model.d_model 3', 'model.d_model 3'),
    ('--nodata.overwrite=1', '--nodata.overwrite=1 does not take an argument'),
    ('--' + 'x' * 5000 + '=3', 'is not a flag'),
    ('--undefok=heads.m', "'--undefok=heads.m' is not a flag"),
    ('--flagfile=a\0', r'--flagfile=a\x00: must not contain a NUL character'),
    ('--out=a\0', 'must not contain a NUL character'),
  ],
)
def test_unknown_flag_or_type_raises(tmp_path, arg, expected):
  for args in ([arg], [_file(tmp_path / 'a', arg)]):
    error = _refused(*args)
    assert expected in error and '\n' not in error


@pytest.mark.parametrize('value', ['/x\n--train.seed=5', '/x ', '/x\n', '/x\u2028y'])
def test_run_flags_reproduce_the_config(value):
  """A value that a line of a flag file cannot hold is refused."""
  with pytest.raises(fields.ConfigError, match='--eval.data=.*must be one line'):
    validate.validate(flags.parse([f'--eval.data={value}']).config())


@pytest.mark.parametrize('arg', ['--out=\udcff', '--flagfile=\udcff', '\udcff'])
def test_non_utf8_flags_are_refused(arg):
  """As a shell passes a name that is not UTF-8."""
  assert _refused(arg).endswith(': must be UTF-8')


def test_usage_shows_the_flags_of_some_sections():
  text = flags.usage(('heads', 'optim'))
  assert '  --heads.n=4\n      number of prediction heads' in text
  assert '--out' not in text
  assert "  --out=''\n" in flags.usage(('heads', 'out'))
  assert '[cosine | wsd | constant]' in text
  shown = [line.strip().split('=')[0][2:] for line in text.splitlines() if line.startswith('  --')]
  wanted = [n for n in schema.fields() if n.startswith(('heads.', 'optim.'))]
  assert shown == wanted
