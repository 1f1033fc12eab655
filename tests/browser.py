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

MISSING = 'a page needs a browser: apt-get install chromium-driver'
ARGS = (
  '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic',
  '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage',
)  # fmt: skip
LIMIT_S = 120  # of one answer


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
      f'{self._url}/{path}', json.dumps(body).encode(),
      {'Content-Type': 'application/json'},
    )  # fmt: skip
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
      'Emulation.setDeviceMetricsOverride', width=width, height=800,
      deviceScaleFactor=1, mobile=width < 600,
    )  # fmt: skip
    scheme = dict(
      name='prefers-color-scheme', value='dark' if dark else 'light'
    )
    self.cdp('Emulation.setEmulatedMedia', features=[scheme])

  def open(self, path) -> None:
    self._post('url', url=pathlib.Path(path).absolute().as_uri())

  def run(self, script: str):
    """What a script returns."""
    return self._post('execute/sync', script=script, args=[])

  def log(self, kind: str) -> list[dict]:
    return self._post('se/log', type=kind)

  def asked_for(self) -> list[str]:
    """Every URL that the page wanted, itself too, since the last call."""
    said = [
      json.loads(r['message'])['message'] for r in self.log('performance')
    ]
    return [
      m['params']['request']['url'] for m in said
      if m['method'] == 'Network.requestWillBeSent'
    ]  # fmt: skip

  def picture(self, path, height: int = 0) -> None:
    """The whole page as a PNG, or its first pixels."""
    size = self.cdp('Page.getLayoutMetrics')['cssContentSize']
    clip = dict(size, scale=1) | (dict(height=height) if height else {})
    found = self.cdp(
      'Page.captureScreenshot', captureBeyondViewport=True, clip=clip
    )
    pathlib.Path(path).write_bytes(base64.b64decode(found['data']))

  def close(self) -> None:
    request = urllib.request.Request(self._url, method='DELETE')
    urllib.request.urlopen(request, timeout=LIMIT_S).close()


@contextlib.contextmanager
def page() -> Iterator[Page]:
  driver = shutil.which('chromedriver')
  assert driver, MISSING
  with tempfile.TemporaryFile('w+') as log:
    process = subprocess.Popen(
      [driver, '--port=0'], stdout=subprocess.PIPE, stderr=log, text=True
    )
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
