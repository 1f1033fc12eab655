"""The order of imports between folders, and which libraries each may import."""

import ast
import pathlib

import pytest

import mtp_jax
from tests.support import runs

PACKAGE = pathlib.Path(mtp_jax.__file__).parent

# Lowest first; a folder imports itself and those before it.
FLOORS = (
  'io',
  'config',
  'parallel',
  'model',
  'data',
  'losses',
  'optim',
  'checkpoint',
  'decode',
  'evals',
  'train',
  'interop',
  'planning',
  'bench',
  'report',
  'api',
  'cli',
)
NEVER = {'losses/': ('data/',), 'evals/': ('train/',), 'decode/': ('train/', 'evals/')}
# Library -> files or folders that may import it.
LIBRARIES = {
  'absl': ('cli/',),
  'grain': ('data/',),
  'sentencepiece': ('data/', 'interop/tokens'),
  'pyarrow': ('data/',),
  'orbax': ('checkpoint/',),
  'tensorboardX': ('train/metrics',),
  'rich': ('cli/progress',),  # flax needs it as well
  'matplotlib': ('report/figures',),
  'torch': ('interop/',),
  'safetensors': ('interop/',),
  'gguf': ('interop/llama_cpp',),
  'lm_eval': ('evals/harness',),
}
LAZY = ('torch', 'safetensors', 'gguf', 'matplotlib')  # inside functions only


def _within(name, places):
  return any(name == p or (p.endswith('/') and name.startswith(p)) for p in places)


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


def test_import_graph_covers_the_package():
  found = {(name, imported) for name, imported, _ in IMPORTS}
  assert ('train/loop', 'mtp_jax.train.metrics') in found
  assert ('model/block', 'mtp_jax.model.layers') in found
  assert ('cli/report', 'mtp_jax.report.files') in found  # inside a function
  assert {name for name, _, top in IMPORTS if not top} >= {'cli/report', 'report/figures'}


def test_every_module_has_a_layer():
  loose = {name for name in FILES if name.split('/')[0] not in FLOORS}
  assert loose == {'__main__'}
  assert {name.split('/')[0] for name in FILES} == {*FLOORS, '__main__'}


def test_imports_point_down():
  wrong = [
    f'{name} imports {imported}'
    for name, imported, _ in IMPORTS
    if (other := _module(imported)) and name != '__main__'
    if FLOORS.index(other.split('/')[0]) > FLOORS.index(name.split('/')[0])
  ]
  assert not wrong


def test_no_import_cycles():
  """Also within a folder, which the order of folders does not cover."""
  arrows = {name: set() for name in FILES}
  for name, imported, _ in IMPORTS:
    if other := _module(imported):
      arrows[name].add(other)
  done, under_way = set(), []

  def visit(name):
    assert name not in under_way, [*under_way, name]
    if name not in done:
      under_way.append(name)
      for other in sorted(arrows[name]):
        visit(other)
      done.add(under_way.pop())

  for name in arrows:
    visit(name)


@pytest.mark.parametrize('place', NEVER)
def test_forbidden_imports(place):
  wrong = [
    f'{name} imports {imported}'
    for name, imported, _ in IMPORTS
    if _within(name, [place]) and _within(_module(imported), NEVER[place])
  ]
  assert not wrong


@pytest.mark.parametrize('library', LIBRARIES)
def test_libraries_are_imported_by_their_layers_only(library):
  wrong = [
    f'{name} imports {imported}'
    for name, imported, top in IMPORTS
    if imported.split('.')[0] == library
    and (not _within(name, LIBRARIES[library]) or (library in LAZY and top))
  ]
  assert not wrong


def test_init_files_have_no_code():
  for path in PACKAGE.rglob('__init__.py'):
    if path.parent == PACKAGE:
      continue
    for node in ast.parse(path.read_text()).body:
      assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), path


PUBLIC = """
import importlib, pkgutil
import mtp_jax
for module in pkgutil.walk_packages(mtp_jax.__path__, 'mtp_jax.'):
  if not module.name.endswith(('__main__', 'runner', 'supervisor', 'harness')):
    importlib.import_module(module.name)
for name in mtp_jax.__all__:
  assert callable(getattr(mtp_jax, name)), name
print(len(mtp_jax.__all__))
"""


def test_no_public_name_is_hidden_by_a_subpackage():
  """An imported subpackage becomes an attribute of the package, in place of a public
  name that is spelled alike."""
  assert not {*mtp_jax.__all__} & {*FLOORS}
  process = runs.process(['-c', PUBLIC])
  out, error = process.communicate()
  assert (process.returncode, out) == (0, f'{len(mtp_jax.__all__)}\n'), error


def test_importing_the_package_imports_no_jax():
  code = 'import sys, mtp_jax; mtp_jax.Config; print("jax" in sys.modules)'
  out, error = runs.process(['-c', code]).communicate()
  assert out == 'False\n', error


BARE = """
import sys
for name in ('grain', 'tensorboardX', 'matplotlib', 'sentencepiece'):
  sys.modules[name] = None  # importing it raises
import mtp_jax.losses.multi_token
import mtp_jax.train.step
import mtp_jax.bench.run
try:
  import mtp_jax.train.loop
except ImportError:
  print('as it should')
"""


def test_step_imports_no_library_of_the_loop():
  process = runs.process(['-c', BARE])
  out, error = process.communicate()
  assert (process.returncode, out) == (0, 'as it should\n'), error


COLLECT = """
import sys
import pytest
sys.modules |= dict.fromkeys(['orbax', 'grain', 'tensorboardX'])
paths = ['tests/config', 'tests/cli/flags_test.py']
sys.exit(pytest.main(['-p', 'no:xdist', '-p', 'no:cacheprovider', '--collect-only', *paths]))
"""


def test_tests_of_flags_are_collected_without_the_libraries_of_a_run():
  process = runs.process(['-c', COLLECT])
  out, error = process.communicate()
  assert process.returncode == 0 and 'flags_test.py::' in out, out + error


NO_JAX = """
import sys
sys.modules['jax'] = None
from mtp_jax.cli import main
sys.exit(main.main(sys.argv[1:]))
"""


def test_wrong_flag_fails_before_jax_is_imported():
  args = ['train', '--data.store=s', '--train.workdir=w', '--heads.n=99']
  process = runs.process(['-c', NO_JAX, *args])
  out, error = process.communicate()
  assert (process.returncode, out) == (2, '')
  assert error == (
    'mtp: --heads.n=99: each head is one of --model.n_layers=5 layers and the'
    ' trunk needs at least one; at most 4\n'
  )


MOST_POSITIONAL, MOST_LINES = 5, 450


def test_functions_have_at_most_5_positional_parameters():
  for path in PACKAGE.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        names = [a.arg for a in [*node.args.posonlyargs, *node.args.args]]
        n = len(names) - (names[:1] in (['self'], ['cls']))
        assert n <= MOST_POSITIONAL, f'{path}:{node.lineno} {node.name}'


def test_files_fit_a_reader():
  """All but the table of flags."""
  long = {p.name for p in PACKAGE.rglob('*.py') if p.read_text().count('\n') > MOST_LINES}
  assert long == {'schema.py'}
