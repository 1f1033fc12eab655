"""Who may import whom."""

import ast
import pathlib

import pytest

import mtp_jax
from tests import runs

PACKAGE = pathlib.Path(mtp_jax.__file__).parent

# A file imports lower floors, its own folder, and what is allowed below.
FLOORS = {
  'jsonl': 0,
  'versions': 0,
  'config': 0,
  'chips': 0,
  'validate': 0,
  'paths': 1,
  'flags': 1,
  'sharding': 1,
  'params': 1,
  'processes': 1,
  'manifest': 2,
  'model/': 2,
  'data/': 2,
  'data/loader': 3,
  'flops': 3,
  'targets': 3,
  'cross_entropy': 3,
  'loss': 3,
  'optim': 3,
  'checkpoint': 3,
  'decode/': 3,
  'train/': 4,
  'evals/': 4,
  'train/loop': 5,
  'train/suites': 5,
  'report': 5,
  'run_report/': 5,
  'bench': 5,
  'generate': 5,
  'interop/': 4,
  'transfer': 5,
  'plan/': 5,
  'main': 6,
  '__main__': 7,
}
ALLOWED = {
  ('config', 'jsonl'),
  ('validate', 'config'),
  ('params', 'sharding'),
  ('flags', 'paths'),
  ('processes', 'paths'),
  ('loss', 'targets'),
  ('loss', 'cross_entropy'),
  ('report', 'train/loop'),
  ('report', 'generate'),  # a checkpoint, ready to write
  ('transfer', 'generate'),  # the tokenizer of a checkpoint
  ('generate', 'bench'),  # ratios and tables
  ('bench', 'train/loop'),  # the loader only; it needs grain
}
NEVER = {
  'model/': ('data/', 'loss', 'cross_entropy', 'targets'),
  'evals/': ('train/',),
  'decode/': ('train/',),
}
# Library -> files or folders that may import it.
LIBRARIES = {
  'absl': ('flags', 'main'),
  'grain': ('data/',),
  'sentencepiece': ('data/', 'interop/tokens'),
  'pyarrow': ('data/',),
  'orbax': ('checkpoint',),
  'tensorboardX': ('train/metrics',),
  'rich': ('train/loop', 'data/progress'),  # flax needs it as well
  'matplotlib': ('run_report/figures',),
  'torch': ('interop/',),
  'safetensors': ('interop/',),
  'gguf': ('interop/llama_cpp',),
  'lm_eval': ('evals/harness',),
}
LAZY = ('torch', 'safetensors', 'gguf', 'matplotlib')  # inside functions only


def _within(name, places):
  return any(name == p or (p.endswith('/') and name.startswith(p)) for p in places)


def _floor(name):
  places = [p for p in FLOORS if _within(name, [p])]
  assert places, f'{name}: give it a floor here and in WORKSPACE.md'
  return FLOORS[max(places, key=len)]


def _imports(path):
  """(module, is at the top level) of each import of a file."""
  tree = ast.parse(path.read_text())
  top = set(ast.walk(tree))
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.Lambda):
      top -= set(ast.walk(node))
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node in top
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: a relative import'
      for alias in node.names:
        yield f'{node.module}.{alias.name}', node in top


def _name(path):
  """mtp_jax/train/loop.py -> train/loop."""
  return path.relative_to(PACKAGE).with_suffix('').as_posix()


def _module(imported):
  """'mtp_jax.train.loop' -> 'train/loop'; '' for another package."""
  if imported.split('.')[0] != 'mtp_jax':
    return ''
  parts = imported.split('.')[1:]
  file = PACKAGE.joinpath(*parts).with_suffix('.py')
  assert file.is_file(), f'{imported}: import modules, not what is in them'
  return '/'.join(parts)


FILES = {_name(p): p for p in PACKAGE.rglob('*.py') if p.name != '__init__.py'}
IMPORTS = [
  (name, imported, top) for name, path in FILES.items() for imported, top in _imports(path)
]


def test_the_walk_sees_the_package():
  found = {(name, imported) for name, imported, _ in IMPORTS}
  assert ('train/loop', 'mtp_jax.train.metrics') in found
  assert ('model/block', 'mtp_jax.model.layers') in found
  assert ('main', 'mtp_jax.report') in found  # inside a function
  assert {name for name, _, top in IMPORTS if not top} >= {'main', 'run_report/figures'}


def test_no_import_goes_up():
  wrong = []
  for name, imported, _ in IMPORTS:
    other = _module(imported)
    if not other or (name, other) in ALLOWED:
      continue
    mine, folder = _floor(name), '/' in name and name.split('/')[0] + '/'
    own = folder and other.startswith(folder)
    if _floor(other) > mine or (_floor(other) == mine and not own):
      wrong.append(f'{name} (floor {mine}) imports {other}')
  assert not wrong


@pytest.mark.parametrize('place', NEVER)
def test_what_is_kept_apart(place):
  wrong = [
    f'{name} imports {imported}'
    for name, imported, _ in IMPORTS
    if _within(name, [place]) and _within(_module(imported), NEVER[place])
  ]
  assert not wrong


@pytest.mark.parametrize('library', LIBRARIES)
def test_a_library_stays_in_its_place(library):
  wrong = [
    f'{name} imports {imported}'
    for name, imported, top in IMPORTS
    if imported.split('.')[0] == library
    and (not _within(name, LIBRARIES[library]) or (library in LAZY and top))
  ]
  assert not wrong


def test_every_place_of_the_table_exists():
  """A name that is no longer there would allow anything."""
  for place in [*FLOORS, *sum(ALLOWED, ())]:
    assert any(_within(name, [place]) for name in FILES), place


def test_init_files_hold_no_code():
  for path in PACKAGE.rglob('__init__.py'):
    for node in ast.parse(path.read_text()).body:
      assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), path


BARE = """
import sys
for name in ('grain', 'tensorboardX', 'matplotlib', 'sentencepiece'):
  sys.modules[name] = None  # an import of it raises
import mtp_jax.loss
import mtp_jax.train.step
import mtp_jax.bench
try:
  import mtp_jax.train.loop
except ImportError:
  print('as it should')
"""


def test_a_step_needs_no_library_of_the_loop():
  process = runs.process(['-c', BARE])
  out, error = process.communicate()
  assert (process.returncode, out) == (0, 'as it should\n'), error


NO_JAX = """
import sys
sys.modules['jax'] = None
from mtp_jax import main
sys.exit(main.main(sys.argv[1:]))
"""


def test_a_wrong_flag_is_told_before_jax_is_imported():
  args = ['train', '--data.store=s', '--train.workdir=w', '--heads.n=99']
  process = runs.process(['-c', NO_JAX, *args])
  out, error = process.communicate()
  assert (process.returncode, out) == (2, '')
  assert error == (
    'mtp: --heads.n=99: each head is one of --model.n_layers=5 layers and the'
    ' trunk needs at least one; at most 4\n'
  )
