"""A page in headless Chromium, over chromedriver's HTTP (W3C WebDriver)."""

import base64
import contextlib
import json
import pathlib
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

MISSING = 'a page needs a browser: apt-get install chromium-driver'
ARGS = (
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--disable-dev-shm-usage',
)
LIMIT_S = 120  # per response
# Scripts: what is wrong with a page of figures and tables; its ground and ink.
FAULTS = """
const bad = [], all = (s, f) => document.querySelectorAll(s).forEach(f);
all('img', i => { if (!i.complete || !i.naturalWidth) bad.push('img'); });
all('figure', f => {
  if (!f.querySelector('svg[role=img]')) bad.push('empty figure'); });
all('svg[role=img]', s => {
  const drawn = s.getBBox(), at = s.getBoundingClientRect();
  if (!drawn.width || at.width < 200 || at.right > innerWidth)
    bad.push('svg ' + at.width);
  if (s.getAttribute('aria-label').length < 20) bad.push('unnamed svg'); });
all('svg text', t => {
  if (t.getBoundingClientRect().height < 8) bad.push('tiny ' + t.textContent);
});
all('table', t => { if (!t.caption || !t.querySelector('td')) bad.push('table');
});
const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
if (new Set(ids).size < ids.length) bad.push('an id twice');
const known = new Set(ids), html = document.documentElement.outerHTML;
for (const m of html.matchAll(/(?:href="|url\\()#([^")]+)/g))
  if (!known.has(m[1])) bad.push('#' + m[1]);
if (document.querySelectorAll('script, main i, main b').length)
  bad.push('a name became an element');
return bad;
"""
GROUND = """
const of = getComputedStyle(document.body);
return [of.backgroundColor, of.color].map(
  c => c.match(/\\d+/g).slice(0, 3).map(Number));
"""


class Page:
  """A session of a browser."""

  def __init__(self, url: str):
    self._url = url
    wanted = {
      'goog:chromeOptions': dict(args=[*ARGS]),
      'goog:loggingPrefs': dict(browser='ALL', performance='ALL'),
    }
    binary = shutil.which('chromium') or shutil.which('google-chrome')
    if binary:
      wanted['goog:chromeOptions']['binary'] = binary
    made = self._post('session', capabilities=dict(alwaysMatch=wanted))
    self._url += f'/session/{made["sessionId"]}'

  def _post(self, path: str, **body):
    request = urllib.request.Request(
      f'{self._url}/{path}', json.dumps(body).encode(), {'Content-Type': 'application/json'}
    )
    try:
      with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        return json.load(answer)['value']
    except urllib.error.HTTPError as error:
      raise RuntimeError(f'{path}: {error.read().decode()[:500]}') from error

  def cdp(self, command: str, **params):
    return self._post('goog/cdp/execute', cmd=command, params=params)

  def look(self, width: int, dark: bool = False) -> None:
    """As a screen of that many pixels; of a phone if it is narrow."""
    self.cdp(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=800,
      deviceScaleFactor=1,
      mobile=width < 600,
    )
    scheme = dict(name='prefers-color-scheme', value='dark' if dark else 'light')
    self.cdp('Emulation.setEmulatedMedia', features=[scheme])

  def open(self, path) -> None:
    self._post('url', url=pathlib.Path(path).absolute().as_uri())

  def run(self, script: str):
    """Returns the result of a script."""
    return self._post('execute/sync', script=script, args=[])

  def log(self, kind: str) -> list[dict]:
    return self._post('se/log', type=kind)

  def asked_for(self) -> list[str]:
    """Returns the URLs requested since the last call, the page's own included."""
    events = [json.loads(r['message'])['message'] for r in self.log('performance')]
    return [
      m['params']['request']['url'] for m in events if m['method'] == 'Network.requestWillBeSent'
    ]

  def picture(self, path, height: int = 0) -> None:
    """Saves the page, or its first pixels, as a PNG."""
    size = self.cdp('Page.getLayoutMetrics')['cssContentSize']
    clip = dict(size, scale=1) | (dict(height=height) if height else {})
    found = self.cdp('Page.captureScreenshot', captureBeyondViewport=True, clip=clip)
    pathlib.Path(path).write_bytes(base64.b64decode(found['data']))

  def close(self) -> None:
    request = urllib.request.Request(self._url, method='DELETE')
    urllib.request.urlopen(request, timeout=LIMIT_S).close()


@contextlib.contextmanager
def page() -> Iterator[Page]:
  driver = shutil.which('chromedriver')
  if not driver:
    pytest.skip(MISSING)
  with tempfile.TemporaryFile('w+') as log:
    process = subprocess.Popen([driver, '--port=0'], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
      port = None
      for line in process.stdout:  # … started successfully on port 1234.
        if 'successfully on port' in line:
          port = int(line.rstrip().rstrip('.').rpartition(' ')[2])
          break
      assert port, f'chromedriver says no port: {log.seek(0) or log.read()}'
      found = Page(f'http://127.0.0.1:{port}')
      try:
        yield found
      finally:
        found.close()
    finally:
      process.terminate()
      process.wait()
      process.stdout.close()


def luminance(rgb) -> float:
  """Of WCAG 2."""
  linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
  red, green, blue = linear
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a, b) -> float:
  """Of two colours; 3 is enough for lines, 4.5 for text."""
  low, high = sorted((luminance(a), luminance(b)))
  return (high + 0.05) / (low + 0.05)
