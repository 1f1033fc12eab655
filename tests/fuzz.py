"""Bad input must end in one line: cases of many kinds, seeded, in process.

  python -m tests.fuzz                 6,600 cases; resumed where it ended
  python -m tests.fuzz --kinds=reports,prompts --cases=50

A case is a command line and the files it reads, one of them wrong: a bit, a
type, an extreme, a structure. It is fine if the command accepts it, which is
known when all is read and nothing is compiled (`HOOKS`), or ends with status 2
and one line on stderr that names a flag or a file. All else is a fault: a
traceback, no end within LIMIT_S, more lines or none.

A case depends on --seed, its kind and its number alone. Each outcome is a line
of --out; docs/reliability.md has the table of what is there.
"""

import argparse
import collections
import contextlib
import copy
import faulthandler
import importlib.util
import io
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import jax

from mtp_jax.cli import main
from mtp_jax.config import schema
from mtp_jax.io import jsonl
from tests.support import runs

LIMIT_S = 20.0
CASES = 550  # of each kind
LINE = 1600  # characters of a refusal, at most
MEMORY = 8 * 2**30  # bytes of address space that a case may add
OUT = pathlib.Path('build/fuzz.jsonl')
FINE = ('accepted', 'refused')
OUTCOMES = (*FINE, 'traceback', 'hang', 'unclear', 'died')


class World(NamedTuple):
  """The inputs of cases; a case changes a copy."""

  base: pathlib.Path  # store, run, hf, meta, texts, tokenizers
  here: pathlib.Path  # of this case, empty


class Outcome(NamedTuple):
  kind: str
  number: int
  outcome: str
  seconds: float
  said: str  # the line, or the exception and its location; a key of stored outcomes
  args: list[str]


# Values that are wrong, or nearly.

INTEGERS = (0, 1, -1, 2, 3, 7, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 10**23, -(2**63))
NUMBERS = (
  '0',
  '-0.0',
  '1e300',
  '-1e300',
  '1e-320',
  'nan',
  'inf',
  '-inf',
  '1e',
  '0x10',
  '1_0',
  '٣',
  '1.5',
  '9' * 5000,
  '',
  ' ',
  '+1',
  '1e400',
  'NaN',
)
TEXTS = (
  '',
  ' ',
  'x',
  'a\nb',
  'a\0b',
  '\ud800',
  'é' * 200,
  'x' * 300,
  '../..',
  '/dev/null',
  '/dev/zero/x',
  '~nobody/x',
  '[x]',
  '*',
  's3://x',
  'file:///x',
  '://',
  ',',
  ',,,',
  '=',
  ':',
  'a=b=c',
  '%s',
  '{0}',
  '-',
  '--',
  'a:0',
  'a:1e9',
  '\u2028',
  '0' * 10_000,
  '1,' * 20_000,
  'null',
  '[]',
)
JSON = (
  None,
  True,
  False,
  [],
  {},
  '',
  'x',
  0,
  1,
  -1,
  1.5,
  -0.0,
  2**31,
  2**63,
  10**23,
  1e308,
  float('nan'),
  float('inf'),
  [None],
  {'a': None},
  '\ud800',
  'a\nb',
  'x' * 5000,
  [[]] * 3,
  -1e308,
  '1',
  '../..',
  '/dev/null',
)


def hostile(rng: random.Random) -> str:
  """A value for a flag."""
  return rng.choice(
    (
      lambda: str(rng.choice(INTEGERS)),
      lambda: rng.choice(NUMBERS),
      lambda: rng.choice(TEXTS),
      lambda: ''.join(rng.choices('0123456789,;:=.-/abe ', k=rng.randint(1, 12))),
    )
  )()


def mutate_json(value, rng: random.Random):
  """The value with one thing in it that is wrong."""
  places = [()]
  for path in places:
    at = _at(value, path)
    if isinstance(at, dict | list) and len(places) < 3000:
      keys = at if isinstance(at, dict) else range(min(len(at), 30))
      places += [(*path, key) for key in keys]
  value = copy.deepcopy(value)
  path = rng.choice(places)
  if not path:
    return rng.choice(JSON)
  parent = _at(value, path[:-1])
  match rng.choice(('replace', 'replace', 'replace', 'remove', 'add', 'nest')):
    case 'replace':
      parent[path[-1]] = rng.choice(JSON)
    case 'remove':
      del parent[path[-1]]
    case 'add' if isinstance(parent, dict):
      parent[rng.choice(('', 'x', 'a.b', '\ud800', 'version'))] = 1
    case 'add':
      parent.append(rng.choice(JSON))
    case 'nest':
      nested = parent[path[-1]]
      for _ in range(rng.choice((1, 3, 400))):
        nested = rng.choice(([nested], {'x': nested}))
      parent[path[-1]] = nested
  return value


def _at(value, path):
  for key in path:
    value = value[key]
  return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
  data = bytearray(data)
  ways = 'flip', 'flip', 'cut', 'empty', 'insert', 'noise', 'twice'
  match rng.choice(ways):
    case 'flip' if data:
      for _ in range(rng.choice((1, 1, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    case 'cut' if data:
      del data[rng.randrange(len(data)) :]
    case 'insert':
      at = rng.randint(0, len(data))
      data[at:at] = rng.choice(
        (
          b'\0',
          b'\xff\xfe',
          b'\xef\xbb\xbf',
          b'\n',
          b'{',
          b'"',
          b'[' * 10**5,
          b'9' * 5000,
          b'\r\n',
          '\u2028'.encode(),
        )
      )
    case 'noise':
      data = rng.randbytes(rng.choice((1, 100, 5000)))
    case 'twice':
      data += bytes(data)
    case _:
      data = b''
  return bytes(data)


def damage(path: pathlib.Path, rng: random.Random) -> None:
  """One file: its JSON, its bytes, or the file itself."""
  how = rng.random()
  if how < 0.04:
    path.unlink()
  elif how < 0.08:
    path.unlink()
    path.mkdir()
  else:
    data = path.read_bytes()
    lines = data.splitlines(True) if path.suffix == '.jsonl' else [data]
    i = rng.randrange(len(lines)) if lines else 0
    try:
      value = mutate_json(json.loads(lines[i]), rng)
    except (ValueError, IndexError):  # no JSON
      how = 1
    if how < 0.7:
      path.write_bytes(data.replace(lines[i], json.dumps(value).encode() + b'\n'))
    else:
      path.write_bytes(mutate_bytes(data, rng))


def _copy(world: World, name: str) -> pathlib.Path:
  return shutil.copytree(world.base / name, world.here / name, symlinks=True)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob('*') if p.is_file())


def _flags(values: dict) -> list[str]:
  return [f'--{name}={value}' for name, value in values.items()]


def _run(world: World, **changes) -> list[str]:
  """Flags of the run that `base` holds, in a new workdir."""
  return runs.args(str(world.base / 'store'), str(world.here / 'new'), **changes)


# Kinds of cases: (rng, world) -> a command line.


def flag_values(rng, world) -> list[str]:
  name, field = rng.choice(sorted(schema.fields().items()))
  section = name.split('.')[0]
  command = {
    'eval': 'eval',
    'decode': 'generate',
    'export': 'export',
    'plan': 'plan',
    'import': 'import',
    'inspect': 'inspect',
    'bench': 'bench',
  }.get(section) or rng.choice(('train', 'train', 'plan', 'bench', 'prepare'))
  args = {
    'eval': [f'{world.base}/run'],
    'generate': [f'{world.base}/run', '--prompt=a'],
    'export': [f'{world.base}/run', f'--export.out={world.here}/out'],
    'import': [f'--import.path={world.base}/hf', f'--train.workdir={world.here}/new'],
    'bench': ['loss', *_run(world)],
    'prepare': [
      f'--data.documents=text:{world.base}/texts/a.txt',
      f'--data.store={world.here}/store',
    ],
  }.get(command) or _run(world)
  value = hostile(rng)
  if field.type is bool:
    value = rng.choice((value, 'true', 'False', '1'))
    text = rng.choice((f'{name}={value}', f'no{name}={value}', name))
    given = f'--{text}'
  elif 'choices' in field.metadata and rng.random() < 0.3:
    given = f'--{name}={rng.choice(field.metadata["choices"])}'
  else:
    given = f'--{name}={value}'
  if rng.random() < 0.3:  # two at once
    other, _ = rng.choice(sorted(schema.fields().items()))
    args = [*args, f'--{other}={hostile(rng)}']
  return [command, *args, given]


SMALL = {
  'loss.weights': '0123456789.,;:e-n',
  'loss.curriculum': '0123:;,.',
  'data.store': 'ab/=:,.123 ',
  'eval.stores': 'ab/=:,.1 ',
  'decode.tree': '0123,-',
  'decode.stop_token_ids': '0123,-none',
  'bench.heads': '0123,',
  'bench.chunk_size': '0148,',
  'bench.num_draft_tokens': '012,auto',
  'bench.batches': '018,',
  'bench.backward': 'remat,interleaved',
  'eval.tasks': 'heldout,:ab',
  'eval.pass_at_k': '012,.',
  'eval.temperatures': '01.,-e',
  'plan.sweep': 'heads.n=12,loss',
  'plan.topology': 'v5epx:4816',
  'distributed.coordinator_address': 'auto:host123456',
  'mesh.data': '-0128',
}


def small_languages(rng, world) -> list[str]:
  """Texts with a grammar, of its letters."""
  name = rng.choice(sorted(SMALL))
  value = ''.join(rng.choices(SMALL[name], k=rng.randint(0, 12)))
  if rng.random() < 0.2:
    value = value.replace(rng.choice('0123'), str(rng.choice(INTEGERS)))
  command = rng.choice(
    {'eval': ('eval',), 'decode': ('generate',), 'bench': ('bench',), 'plan': ('plan',)}.get(
      name.split('.')[0], ('train', 'inspect', 'plan')
    )
  )
  args = {
    'eval': [f'{world.base}/run', '--eval.samples=2'],
    'generate': [f'{world.base}/run', '--prompt=a'],
    'bench': ['loss', *_run(world)],
  }.get(command) or _run(world)
  return [command, *args, f'--{name}={value}']


def flag_files(rng, world) -> list[str]:
  n = rng.randint(1, 6)
  names = [f'{i}.flags' for i in range(n)]
  lines = [
    '--heads.n=2',
    '# text',
    '',
    '--flagfile=0.flags',
    '--flagfile=none',
    '--flagfile',
    '--flagfile=',
    'heads.n=2',
    '--heads.n',
    '--heads.n 2',
    '-heads.n=2',
    '--nodata.verify',
    '--nodata.verify=1',
    '--=',
    '--',
    '-',
    '--heads.n=2\r',
    '--data.store=a\0b',
    '--prompt=x',
    '--undefok=x',
    '--help',
    '--x=' + 'y' * 5000,
    '--loss.weights=0:1',
    '--train.seed=\u2028',
    f'--flagfile={world.here}',
    '--flagfile=s3://x',
    '--flagfile=' + 'z' * 300,
  ]
  for name in names:
    chosen = rng.choices(lines, k=rng.randint(0, 4))
    chosen += [f'--flagfile={x}' for x in rng.choices(names, k=rng.randint(0, 2))]
    rng.shuffle(chosen)
    text = '\n'.join(chosen).encode()
    if rng.random() < 0.2:
      text = mutate_bytes(text, rng)
    (world.here / name).write_bytes(text)
  if rng.random() < 0.1:  # two includes a level
    for i in range(30):
      (world.here / f'd{i}').write_text(f'--flagfile=d{i + 1}\n' * 2)
    (world.here / 'd30').write_text('--heads.n=2')
    names[0] = 'd0'
  if rng.random() < 0.05:
    (world.here / names[0]).write_text('--heads.n=2\n' * 50_000)
  return ['train', *_run(world), f'--flagfile={world.here}/{names[0]}']


def stores(rng, world) -> list[str]:
  from mtp_jax.data import store

  folder = _copy(world, rng.choice(('store', 'store_hf')))
  path = folder / 'manifest.json'
  if rng.random() < 0.6:  # with its checksum, as a hostile one has
    manifest = mutate_json(json.loads(path.read_text()), rng)
    if isinstance(manifest, dict) and rng.random() < 0.9:
      with contextlib.suppress(Exception):  # of what has no JSON
        manifest['sha256'] = store._manifest_sha256(manifest)
    path.write_text(json.dumps(manifest))
  else:
    damage(rng.choice(_files(folder)), rng)
  args = runs.args(str(folder), str(world.here / 'new'))
  if rng.random() < 0.5:
    args.append('--nodata.verify')
  return [rng.choice(('inspect', 'train', 'train')), *args]


def documents(rng, world) -> list[str]:
  folder = _copy(world, 'texts')
  kind, name = rng.choice(
    (
      ('text', 'a.txt'),
      ('text', 'a.txt.gz'),
      ('jsonl', 'b.jsonl'),
      ('jsonl', 'b.jsonl.gz'),
      ('parquet', 'c.parquet'),
      ('dir', ''),
    )
  )
  for _ in range(rng.choice((1, 1, 2))):
    files = [p for p in _files(folder) if not name or p.name == name]
    if files:
      damage(rng.choice(files), rng)
  field = rng.choice(('', '', '#text', '#prompt+text', '#x', '#', '#a+b+c'))
  source = f'{kind}:{folder / name}{field if kind != "text" else ""}'
  if rng.random() < 0.15:
    source = rng.choice(
      (
        f'{source},{source}',
        f'{source},',
        hostile(rng),
        f'task:{hostile(rng)}',
        f'task:star_graph/{hostile(rng)}',
        f'task:polynomial/p={hostile(rng)}',
        f'python:{hostile(rng)}',
        f'{kind}:{hostile(rng)}',
      )
    )
  return [
    'prepare',
    f'--data.documents={source}',
    f'--data.store={world.here}/new',
    '--data.workers=1',
    '--data.valid_fraction=0',
    f'--data.tokenizer={rng.choice(("bytes", "bytes", "train:300", ""))}',
  ]


def tokenizers(rng, world) -> list[str]:
  folder = _copy(world, 'tokenizers')
  kind, name = rng.choice(
    (('hf', 'tokenizer.json'), ('hf', 'tokenizer.json'), ('sentencepiece', 'm.model'))
  )
  wanted = [folder / name]
  if kind == 'hf' and rng.random() < 0.4:
    wanted = [folder / 'tokenizer_config.json']
  damage(wanted[0], rng)
  named = f'{kind}:{folder}/{name}'
  if rng.random() < 0.1:
    named = rng.choice((f'train:{hostile(rng)}', f'{kind}:{hostile(rng)}', hostile(rng)))
  return [
    'prepare',
    f'--data.documents=text:{world.base}/texts/a.txt',
    f'--data.store={world.here}/new',
    '--data.workers=1',
    '--data.valid_fraction=0',
    f'--data.tokenizer={named}',
  ]


def checkpoints(rng, world) -> list[str]:
  run = _copy(world, 'run')
  step = run / 'checkpoints' / rng.choice(('3', '6'))
  what = rng.random()
  if what < 0.35:
    damage(step / 'manifest.json', rng)
  else:
    if rng.random() < 0.8:
      (step / 'manifest.json').unlink()
    about = [p for p in _files(step / 'about') if what < 0.75]
    damage(rng.choice(about or _files(step) or _files(run)), rng)
  if rng.random() < 0.1:
    target = rng.choice(_files(run))
    damage(target, rng)
  at = rng.choice((run, run, step))
  return rng.choice(
    (
      ['train', *runs.args(str(world.base / 'store'), str(run), train__steps=9)],
      ['eval', f'{at}', '--eval.batches=1'],
      ['generate', f'{at}', '--prompt=a'],
      ['export', f'{at}', f'--export.out={world.here}/out'],
      ['train', *_run(world, train__init_from=at)],
    )
  )


def locks(rng, world) -> list[str]:
  run = world.here / 'new'
  run.mkdir()
  lock = dict(
    run='0' * 32,
    host=rng.choice((os.uname().nodename, 'elsewhere')),
    pid=rng.choice((1, 2**22 + 7, os.getppid())),
    started='1',
    time=1.0,
  )
  path = run / 'lock.json'
  path.write_text(json.dumps(lock))
  damage(path, rng)
  if path.is_file():
    os.utime(path, (1, 1))
  return ['train', *_run(world)]


def _import(rng, world, form: str) -> list[str]:
  folder = _copy(world, form)
  texts = [p for p in _files(folder) if p.suffix == '.json']
  chosen = rng.choice(texts if rng.random() < 0.6 else _files(folder))
  if chosen.suffix == '.safetensors' and rng.random() < 0.7:
    data = chosen.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header = mutate_json(json.loads(data[8 : 8 + length]), rng)
    text = json.dumps(header).encode()
    length = rng.choice((len(text),) * 8 + (0, 2**63, 2**64 - 1))
    chosen.write_bytes(length.to_bytes(8, 'little') + text + data[8 + length :])
  else:
    damage(chosen, rng)
  ours = folder / 'mtp_jax.json'
  if rng.random() < 0.7 and ours.is_file():  # as of a stranger
    ours.unlink()
  return [
    'import',
    f'--import.path={folder}',
    f'--train.workdir={world.here}/new',
    f'--import.format={"meta" if form == "meta" else "hf"}',
  ]


def imports_hf(rng, world) -> list[str]:
  return _import(rng, world, rng.choice(('hf', 'hf_sharded')))


def imports_meta(rng, world) -> list[str]:
  return _import(rng, world, 'meta')


def imports_gguf(rng, world) -> list[str]:
  folder = _copy(world, 'gguf')
  if rng.random() < 0.3:
    damage(rng.choice(_files(folder)), rng)
  else:  # lengths and kinds of the header
    path = folder / 'model.gguf'
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 3)):
      at, n = rng.randrange(3000), rng.choice((1, 4, 8))
      number = rng.choice((0, 1, 7, 2**31, 2**63, 2**64 - 1)) % 2 ** (8 * n)
      data[at : at + n] = number.to_bytes(n, 'little')
    path.write_bytes(data)
  return ['import', f'--import.path={folder}', f'--train.workdir={world.here}/new']


def prompts(rng, world) -> list[str]:
  args = ['generate', f'{world.base}/run']
  match rng.choice(('prompt', 'ids', 'file', 'file', 'file', 'both')):
    case 'prompt':
      return [*args, f'--prompt={rng.choice((hostile(rng), "x" * 3_000_000))}']
    case 'ids':
      return [*args, f'--prompt_ids={hostile(rng)}']
    case 'both':
      more = ['--prompt=a', '--prompt_ids=1', '--decode.prompts=x', '--out=y']
      return [*args, *rng.sample(more, 2)]
  path = world.here / rng.choice(('p.txt', 'p.jsonl'))
  record = {'prompt': 'abc', 'other': {'x': [1, None]}}
  lines = [
    json.dumps(rng.choice((record, {'prompt_ids': [1, 2]}, {'prompt': ''}))) for _ in range(3)
  ]
  i = rng.randrange(3)
  lines[i] = json.dumps(mutate_json(json.loads(lines[i]), rng))
  data = '\n'.join(lines).encode()
  if rng.random() < 0.3:
    data = mutate_bytes(data, rng)
  path.write_bytes(data)
  named = rng.choice((path,) * 9 + (world.here, hostile(rng)))
  return [*args, f'--decode.prompts={named}']


def reports(rng, world) -> list[str]:
  run = _copy(world, 'run')
  names = ('metrics.jsonl', 'metrics.jsonl', 'goodput.jsonl', 'config.json')
  for name in rng.sample(names, rng.choice((1, 1, 2))):
    if (run / name).is_file():
      damage(run / name, rng)
  if rng.random() < 0.1:
    (run / 'report').write_text('')
  other = rng.choice(([], [], [str(world.base / 'run')], [hostile(rng)], [str(run) + '/.']))
  return ['report', str(run), *other]


KINDS: dict[str, Callable[[random.Random, World], list[str]]] = {
  'flags': flag_values,
  'small-languages': small_languages,
  'flag-files': flag_files,
  'stores': stores,
  'documents': documents,
  'tokenizers': tokenizers,
  'checkpoints': checkpoints,
  'locks': locks,
  'imports-hf': imports_hf,
  'imports-meta': imports_meta,
  'imports-gguf': imports_gguf,
  'prompts': prompts,
  'reports': reports,
}


def possible() -> list[str]:
  """Kinds whose libraries are installed here."""
  torch = importlib.util.find_spec('torch')
  return [kind for kind in KINDS if torch or kind != 'imports-meta']


# Running one.


class Accepted(BaseException):
  """All input of a command was read and is valid."""


class TooLong(BaseException):
  pass


def _hooks() -> list[tuple]:
  """Returns (owner, name) of the functions called once all input was accepted."""
  from mtp_jax.bench import run
  from mtp_jax.checkpoint import saver
  from mtp_jax.decode import decoder
  from mtp_jax.evals import heldout
  from mtp_jax.interop import hf_folder
  from mtp_jax.losses import targets
  from mtp_jax.parallel import distributed
  from mtp_jax.planning import ahead
  from mtp_jax.train import loop

  return [
    (loop, '_loop'),
    (targets, 'targets'),
    (heldout, 'evaluator'),
    (decoder, 'Decoder'),
    (hf_folder, 'export'),
    (saver, 'save_params'),
    (ahead, 'plan'),
    (run, '_loss'),
    (run, '_step'),
    (run, '_data'),
    (distributed, '_join'),
  ]


@contextlib.contextmanager
def _hooked(kind: str):
  """Commands stop where a compile would begin, and draw no figures."""
  from mtp_jax.data import store
  from mtp_jax.report import figures
  from mtp_jax.train import lock as lock_lib

  def accepted(*args, **kwargs):
    raise Accepted

  changes = [(owner, name, accepted) for owner, name in _hooks()]
  changes += [
    (figures, 'draw', lambda plot: ('', b'')),
    (lock_lib, 'STALE_S', 0.05),
    (lock_lib, 'LIVES_S', 0.05),
    (lock_lib, 'LOOK_S', 0.02),
  ]
  if kind in ('flags', 'small-languages'):  # of workers, of every document
    changes.append((store, 'write', accepted))
  cache = jax.config.jax_compilation_cache_dir
  with contextlib.ExitStack() as stack:
    stack.callback(jax.config.update, 'jax_compilation_cache_dir', cache)
    for owner, name, value in changes:
      stack.callback(setattr, owner, name, getattr(owner, name))
      setattr(owner, name, value)
    yield


@contextlib.contextmanager
def _limited(seconds: float):
  """Raises TooLong in the main thread."""

  def late(*_):
    signal.setitimer(signal.ITIMER_REAL, 1)  # if something swallows it
    raise TooLong

  old = signal.signal(signal.SIGALRM, late)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


def run(kind: str, number: int, seed: int, base: pathlib.Path) -> Outcome:
  """Makes a case and runs it."""
  rng = random.Random(f'{seed}/{kind}/{number}')
  with tempfile.TemporaryDirectory(prefix='fuzz-') as folder:
    here = pathlib.Path(folder)
    args = KINDS[kind](rng, World(base, here))
    begin = time.perf_counter()
    outcome, line = _ended(kind, args, here)
    seconds = time.perf_counter() - begin
  if seconds > LIMIT_S:
    outcome = 'hang'
  shown = [jsonl.one_line(a, 300) for a in args]
  return Outcome(kind, number, outcome, seconds, line, shown)


def _ended(kind: str, args: list[str], here: pathlib.Path) -> tuple[str, str]:
  out, err = (
    io.TextIOWrapper(io.BytesIO(), 'utf-8', errors=errors, write_through=True)
    for errors in ('strict', 'backslashreplace')
  )
  cwd = os.getcwd()
  try:
    with (
      _hooked(kind),
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(err),
      _limited(LIMIT_S),
    ):
      os.chdir(here)
      status = main.main(args)
  except Accepted:
    return 'accepted', ''
  except TooLong:
    return 'hang', f'no end in {LIMIT_S:.0f} s'
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if 'mtp_jax' in f.filename] or frames
    where = ' < '.join(f'{pathlib.Path(f.filename).name}:{f.lineno}' for f in ours[:-4:-1])
    return 'traceback', jsonl.one_line(
      f'{type(error).__name__}: {jsonl.one_line(error)} ({where})', 500
    )
  finally:
    os.chdir(cwd)
  stderr = err.buffer.getvalue().decode()
  return judged(status, stderr), jsonl.one_line(stderr.removesuffix('\n'), 500)


def judged(status: int, stderr: str) -> str:
  """Returns the outcome of a command that returned."""
  if status in (0, 3, 4):  # 3 and 4 are results of plan
    return 'accepted'
  line = stderr.removesuffix('\n')
  one = stderr.startswith('mtp: ') and '\n' not in line and len(line) < LINE
  names = any(word in line for word in ('--', '/', 'flag', 'command', 'argument'))
  return 'refused' if status == 2 and one and names else 'unclear'


# What cases are made of.


def build(base: pathlib.Path, run_of: Callable[[str, str], object]) -> None:
  """Fills `base`. run_of: trains a run on a store, into a workdir."""
  import gzip

  import pyarrow
  import pyarrow.parquet
  import sentencepiece
  from tokenizers import Tokenizer, models, pre_tokenizers, trainers

  texts, tokenizer = base / 'texts', base / 'tokenizers'
  texts.mkdir(parents=True)
  tokenizer.mkdir()
  rng = random.Random(0)
  words = [''.join(rng.choices('abcde', k=rng.randint(1, 6))) for _ in range(80)]
  rows = [' '.join(rng.choices(words, k=30)) for _ in range(40)]
  (texts / 'a.txt').write_text('\n'.join(rows))
  (texts / 'a.txt.gz').write_bytes(gzip.compress('\n'.join(rows).encode()))
  lines = '\n'.join(json.dumps(dict(text=x, prompt='a b')) for x in rows)
  (texts / 'b.jsonl').write_text(lines)
  (texts / 'b.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
  pyarrow.parquet.write_table(pyarrow.table(dict(text=rows, prompt=rows)), texts / 'c.parquet')
  fast = Tokenizer(models.BPE())
  fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  fast.train_from_iterator(
    rows,
    trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<s>', '</s>'],
      show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  fast.save(str(tokenizer / 'tokenizer.json'))
  (tokenizer / 'tokenizer_config.json').write_text(
    json.dumps(dict(bos_token='<s>', eos_token=dict(content='</s>')))
  )
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(rows),
    model_prefix=str(tokenizer / 'm'),
    vocab_size=280,
    byte_fallback=True,
    minloglevel=2,
    hard_vocab_limit=False,
  )
  store = str(base / 'store')
  runs.make_store(store)
  run_of(store, str(base / 'run'))
  prepared = [
    'prepare',
    f'--data.documents=text:{texts}/a.txt',
    '--data.workers=1',
    f'--data.store={base}/store_hf',
    '--data.valid_fraction=0',
    f'--data.tokenizer=hf:{tokenizer}/tokenizer.json',
  ]
  export = ['export', f'{base}/run', '--train.compilation_cache=']
  meta = [*export, f'--export.out={base}/meta', '--export.format=meta']
  for args in (
    prepared,
    [*export, f'--export.out={base}/hf'],
    [*export, f'--export.out={base}/hf_sharded', '--export.max_shard_gib=1e-5'],
    *([meta] if 'imports-meta' in possible() else []),
    [  # its tokenizer of bytes has no place in the next
      'import',
      f'--import.path={base}/hf',
      f'--train.workdir={base}/ids',
      '--import.tokenizer=skip',
      '--train.compilation_cache=',
    ],
    [
      'export',
      f'{base}/ids',
      '--export.format=gguf',
      f'--export.out={base}/gguf',
      '--train.compilation_cache=',
    ],
  ):
    with contextlib.redirect_stdout(io.StringIO()):
      if main.main(args):
        raise RuntimeError(f'{args}: refused')


# The campaign.


def read(path: pathlib.Path) -> list[Outcome]:
  if not path.exists():
    return []
  return [Outcome(**json.loads(x)) for x in path.read_text().splitlines()]


def table(found: list[Outcome], seed: int) -> str:
  """The section of docs/reliability.md."""
  faults = sum(o.outcome not in FINE for o in found)
  slowest = max((o.seconds for o in found), default=0.0)
  lines = [
    '## Bad input',
    '',
    'Written by `python -m tests.fuzz`: command lines with one wrong value, and'
    ' files with one wrong bit, type, extreme or structure, in process. A'
    ' command must accept it or exit with status 2 and one line that names the'
    f' flag or the file. Seed {seed}, {len(found):,} cases, {faults:,} faults,'
    f' slowest {slowest:.1f} s.',
    '',
    f'| kind | cases | {" | ".join(OUTCOMES)} | slowest |',
    '|---' * (len(OUTCOMES) + 3) + '|',
  ]
  for kind in KINDS:
    mine = [o for o in found if o.kind == kind]
    counts = collections.Counter(o.outcome for o in mine)
    cells = [f'{len(mine):,}', *(f'{counts[o]:,}' for o in OUTCOMES)]
    longest = max((o.seconds for o in mine), default=0.0)
    lines.append(f'| {kind} | {" | ".join(cells)} | {longest:.1f} s |')
  return '\n'.join(lines) + '\n'


def campaign(
  kinds: list[str],
  cases: int,
  seed: int,
  base: pathlib.Path,
  out: pathlib.Path,
  say: Callable[[Outcome], None],
) -> list[Outcome]:
  """Runs what `out` has no outcome of, and adds it; returns all there is."""
  found, current = read(out), out.with_suffix('.current')
  with open(out, 'a', encoding='utf-8') as file:

    def add(o: Outcome):
      print(json.dumps(o._asdict()), file=file, flush=True)
      current.unlink()
      found.append(o)
      say(o)

    if current.exists():  # that case took the whole process down
      add(Outcome(*json.loads(current.read_text()), 'died', 0.0, '', []))
    done = {(o.kind, o.number) for o in found}
    for number, kind in itertools.product(range(cases), kinds):
      if (kind, number) in done:
        continue
      current.write_text(json.dumps([kind, number]))
      faulthandler.dump_traceback_later(3 * LIMIT_S, exit=True)
      try:
        o = run(kind, number, seed, base)
      except BaseException:  # not of the case
        current.unlink()
        raise
      finally:
        faulthandler.cancel_dump_traceback_later()
      add(o)
  return found


def main_(args: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m tests.fuzz')
  parser.add_argument('--kinds', default=','.join(KINDS))
  parser.add_argument('--cases', type=int, default=CASES, help='of each kind')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=pathlib.Path, default=OUT)
  given = parser.parse_args(args)
  kinds = given.kinds.split(',')
  if unknown := set(kinds) - KINDS.keys():
    parser.error(f'no kind {", ".join(sorted(unknown))}')
  if without := set(kinds) - set(possible()):
    print(f'skipped, since torch is not installed: {", ".join(without)}')
    kinds = [kind for kind in kinds if kind not in without]
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  out = given.out.absolute()
  out.parent.mkdir(parents=True, exist_ok=True)

  def say(o: Outcome):
    if o.outcome not in FINE:
      print(f'{o.kind} {o.number}: {o.outcome}: {o.said}', flush=True)

  with tempfile.TemporaryDirectory(prefix='fuzz-base-') as folder:
    base = pathlib.Path(folder, 'base')
    with contextlib.redirect_stdout(io.StringIO()):
      build(base, lambda s, w: runs.train(s, w, train__checkpoint_every=3))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    limit = size * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    found = campaign(kinds, given.cases, given.seed, base, out, say)
  if len(found) >= 1000:
    runs.write_section('fuzz', table(found, given.seed))
  faults = [o for o in found if o.outcome not in FINE]
  print(f'{len(found):,} cases, {len(faults):,} faults')
  return 1 if faults else 0


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
  from mtp_jax.parallel import chips

  chips.answer_libtpu()
  sys.exit(main_(sys.argv[1:]))
