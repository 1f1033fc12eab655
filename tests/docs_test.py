"""The documentation: it builds, its links resolve, and it uses the field's words."""

import html.parser
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys

import pytest

from mtp_jax.cli import main
from tests.support import runs

ROOT = pathlib.Path(runs.ROOT)
DOCS = ROOT / 'docs'
PAGES = sorted(DOCS.rglob('*.md'))
OUTSIDE = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
MOST_README_LINES = 150
SITE_PACKAGES = ('mkdocs', 'material', 'mkdocstrings_handlers')
# Expression -> what to write. Code, file names and addresses are not searched.
FORBIDDEN = {
  r'(go|goes|going|gone|went) on': 'resume, continue',
  r'said|told|says': 'reported, logged, states',
  r'asked': 'requested, evaluated, proposed',
  r'stand|stands|stood': 'accepted, acceptance rate',
  r'a pass': 'a forward pass; per forward pass',
  r'(bits|bytes|tokens|seconds|times|nats|GiB|FLOPs|losses|numbers|positions)'
  r' an? (step|token|head|byte|device|chip|row|layer)': 'per step, per token, per head',
  r'alive at once': 'live, in memory at the same time',
  r'left out|leaves? out': 'skipped, excluded',
  r'what counts|scored': 'loss mask, masked out',
  r'(?<!user )nobody|no one|whoever': '(rephrase)',
  r'(rounded|rounding)( up or down)? at random': 'stochastic rounding',
  r'slow host': 'straggler',
  r'begins? with the parameters': 'is initialized from, warm start',
  r'held up': 'blocked on checkpointing',
  r'damaged|set aside|moved aside': 'corrupt, quarantined',
  r'heads? that leaps?': 'strided (leap) heads',
  r'order of the tokens to come': 'token order prediction',
  r'what the shardings alone say': 'sharding-only estimate',
  r'tiles that are not full': 'layout padding',
  r'comes in|leaves with': 'is imported, is exported',
}
CODE = re.compile(r'^( *)```.*?^\1```|`[^`]*`|<!--.*?-->|\]\([^)]*\)', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\]\(([^)\s]+)(?:\s+"[^"]*")?\)')


def _name(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def _load(tool: str):
  spec = importlib.util.spec_from_file_location(tool, ROOT / 'tools' / f'{tool}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def forbidden_words(text: str) -> list[str]:
  """Returns 'found: what to write' for each forbidden word of a prose text."""
  one_line = ' '.join(text.split())
  return [
    f'{found[0]!r}: {instead}'
    for expression, instead in FORBIDDEN.items()
    for found in re.finditer(rf'\b({expression})\b', one_line, re.IGNORECASE)
  ]


def anchors(text: str) -> set[str]:
  """Returns the anchors of a page's headings, as the site has them."""
  headings = re.findall(r'^#+ (.+)$', CODE.sub(lambda m: m[0].strip('`'), text), re.MULTILINE)
  slugs = (re.sub(r'[^\w\s-]', '', heading.lower()).strip() for heading in headings)
  return {re.sub(r'[\s-]+', '-', slug) for slug in slugs}


def test_forbidden_words_are_found_in_prose_and_not_in_code():
  assert forbidden_words('A run goes\non, as nobody said.') == [
    "'goes on': resume, continue",
    "'said': reported, logged, states",
    "'nobody': (rephrase)",
  ]
  assert not forbidden_words(CODE.sub(' ', 'Run `said.py`:\n```sh\ngo on\n```\n[x](said.md)'))


@pytest.mark.parametrize('path', [*PAGES, *OUTSIDE], ids=_name)
def test_a_page_uses_the_words_of_the_field(path):
  assert not forbidden_words(CODE.sub(' ', path.read_text()))


@pytest.mark.parametrize('command', ['', *main.COMMANDS])
def test_help_uses_the_words_of_the_field(command, capsys):
  assert main.main([*command.split(), '--help']) == 0
  assert not forbidden_words(capsys.readouterr().out)


@pytest.mark.parametrize('path', [*PAGES, *OUTSIDE, ROOT / 'launch' / 'README.md'], ids=_name)
def test_relative_links_resolve(path):
  prose = re.sub(
    r'^( *)```.*?^\1```|`[^`]*`', ' ', path.read_text(), flags=re.DOTALL | re.MULTILINE
  )
  for link in LINK.findall(prose):
    if '://' in link or link.startswith('mailto:'):
      continue
    file, _, anchor = link.partition('#')
    target = (path.parent / file).resolve() if file else path
    assert target.exists(), link
    if path.is_relative_to(DOCS):
      assert target.is_relative_to(DOCS), f'{link}: is not part of the site'
    if anchor:
      assert anchor in anchors(target.read_text()), link


def test_every_page_is_in_the_navigation_once():
  yaml = pytest.importorskip('yaml')
  nav = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav']

  def pages(entry):
    if isinstance(entry, str):
      return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return list(itertools.chain.from_iterable(map(pages, values)))

  assert sorted(pages(nav)) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)


def test_the_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= MOST_README_LINES


def test_the_flags_page_is_that_of_the_schema():
  # In a process of its own: tests may have registered head families in this one.
  done = subprocess.run(
    [sys.executable, 'tools/flags_page.py', '--check'],
    cwd=ROOT,
    env=dict(os.environ, PYTHONPATH=str(ROOT)),
  )
  assert done.returncode == 0, 'run python tools/flags_page.py'


def test_the_figures_are_those_of_their_script():
  figures = _load('figures')
  for name, draw in figures.FIGURES.items():
    path = figures.FOLDER / f'{name}.svg'
    assert path.read_text() == draw(), 'run python tools/figures.py'


class _Requests(html.parser.HTMLParser):
  """Collects what a browser loads with a page, without links."""

  def __init__(self):
    super().__init__()
    self.found = []

  def handle_starttag(self, tag, attrs):
    of = dict(attrs)
    loaded = of.get('href') if tag == 'link' else of.get('src') if tag != 'a' else None
    if loaded and re.match(r'(https?:)?//', loaded):
      self.found.append(loaded)


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
  missing = [name for name in SITE_PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    pytest.skip(f"needs pip install -e '.[docs]': no {', '.join(missing)}")
  done = subprocess.run(
    [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path)],
    cwd=ROOT,
    text=True,
    capture_output=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  built = sorted(tmp_path.rglob('*.html'))
  assert len(built) >= len(PAGES)
  for path in built:
    requests = _Requests()
    requests.feed(path.read_text())
    assert not requests.found, path
