"""Google Cloud Storage in memory, over HTTP: as much of its JSON interface as
gcsfs, google-cloud-storage and tensorstore use, with its rules: objects appear
whole, have generations, and know no folders.

https://cloud.google.com/storage/docs/json_api
"""

import base64
import contextlib
import datetime
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from typing import NamedTuple

OBJECT = re.compile(r'(?:/download)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?')
REWRITE = re.compile(r'/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)')
MOVE = re.compile(r'/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)')
UPLOAD = re.compile(r'/upload/storage/v1/b/([^/]+)/o')
BUCKET = re.compile(r'/storage/v1/b/([^/]+)')


class Object(NamedTuple):
  """One version of it."""

  data: bytes
  generation: int
  updated: str


class Server:
  """Buckets and their objects; `log` has (method, object) of each request, and
  `refuses` is a status for all of them."""

  refuses = 0

  def __init__(self, *buckets: str):
    self.objects: dict[str, dict[str, Object]] = {b: {} for b in buckets}
    self.log: list[tuple[str, str]] = []
    self._lock, self._generation = threading.Lock(), 1
    self._uploads: dict[str, tuple[str, str, dict, bytearray]] = {}
    handler = type('Handler', (_Handler,), dict(server_=self))
    self._http = _Http(('127.0.0.1', 0), handler)
    threading.Thread(target=self._http.serve_forever, daemon=True).start()
    self.url = f'http://127.0.0.1:{self._http.server_port}'

  @property
  def variables(self) -> dict[str, str]:
    """Returns the environment with which a process's clients use this server."""
    return dict(
      STORAGE_EMULATOR_HOST=self.url,
      TENSORSTORE_GCS_HTTP_URL=self.url,
      GOOGLE_AUTH_TOKEN_FOR_TESTING='none',
      # Queries the kind of bucket by gRPC.
      GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false',
    )

  def close(self) -> None:
    self._http.shutdown()
    self._http.server_close()

  def put(self, bucket: str, name: str, data: bytes, wanted=None) -> Object:
    """Replaces an object; wanted: the generation that is there, '0' = none."""
    with self._lock:
      found = self.objects[bucket].get(name)
      there = found.generation if found else 0
      if wanted is not None and int(wanted) != there:
        raise _Refused(412, 'conditionNotMet')
      self._generation += 1
      now = datetime.datetime.now(datetime.UTC).strftime('%FT%T.%fZ')
      new = Object(bytes(data), self._generation, now)
      self.objects[bucket][name] = new
      return new

  def get(self, bucket: str, name: str) -> Object:
    if bucket not in self.objects or name not in self.objects[bucket]:
      raise _Refused(404, f'No such object: {bucket}/{name}')
    return self.objects[bucket][name]

  def delete(self, bucket: str, name: str, wanted=None) -> None:
    found = self.get(bucket, name)
    if wanted is not None and int(wanted) != found.generation:
      raise _Refused(412, 'conditionNotMet')
    with self._lock:
      self.objects[bucket].pop(name, None)

  def list(self, bucket: str, query: dict) -> dict:
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
    if bucket not in self.objects:
      raise _Refused(404, 'The specified bucket does not exist.')
    with self._lock:
      there = dict(self.objects[bucket])
    items, prefixes = [], set()
    for name in sorted(there):
      if not name.startswith(prefix):
        continue
      if name < query.get('startOffset', ''):
        continue
      if 'endOffset' in query and name >= query['endOffset']:
        continue
      folder, found, _ = name[len(prefix) :].partition(delimiter or '\0')
      if found:
        prefixes.add(prefix + folder + delimiter)
      else:
        items.append(_resource(bucket, name, there[name]))
    return dict(kind='storage#objects', items=items, prefixes=sorted(prefixes))  # in one page


class _Http(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 64

  def handle_error(self, *_):
    pass  # a client that was killed


class _Refused(Exception):
  pass


def _resource(bucket: str, name: str, found: Object) -> dict:
  return dict(
    kind='storage#object',
    bucket=bucket,
    name=name,
    size=str(len(found.data)),
    generation=str(found.generation),
    metageneration='1',
    id=f'{bucket}/{name}/{found.generation}',
    contentType='binary/octet-stream',
    updated=found.updated,
    timeCreated=found.updated,
    storageClass='STANDARD',
    md5Hash=base64.b64encode(hashlib.md5(found.data).digest()).decode(),
  )


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True
  server_: Server

  def log_message(self, *_):
    pass

  def _any(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    body = self._body()
    try:
      status, data, headers = self._answer(url.path, query, body)
    except _Refused as error:
      status, why = error.args
      headers, data = {}, dict(error=dict(code=status, message=why))
    if not isinstance(data, bytes):
      headers = headers | {'Content-Type': 'application/json'}
      data = json.dumps(data).encode()
    if status == 204 or status == 304:
      data = b''
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _any

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding', '') == 'chunked':
      parts = []
      while size := int(self.rfile.readline().split(b';')[0], 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b''.join(parts)
    return self.rfile.read(int(self.headers.get('Content-Length') or 0))

  def _answer(self, path, query, body):
    server, method = self.server_, self.command
    if server.refuses:
      raise _Refused(server.refuses, 'refused')
    if match := UPLOAD.fullmatch(path):
      return self._upload(match[1], query, body)
    if match := REWRITE.fullmatch(path):
      b, name, to, new = map(urllib.parse.unquote, match.groups())
      server.log.append(('COPY', name))
      found = server.put(to, new, server.get(b, name).data)
      resource = _resource(to, new, found)
      return 200, dict(kind='storage#rewriteResponse', done=True, resource=resource) | resource, {}
    if match := MOVE.fullmatch(path):
      b, name, new = map(urllib.parse.unquote, match.groups())
      server.log.append(('MOVE', name))
      found = server.put(b, new, server.get(b, name).data)
      server.delete(b, name)
      return 200, _resource(b, new, found), {}
    if match := OBJECT.fullmatch(path):
      bucket, name = match[1], urllib.parse.unquote(match[2] or '')
      server.log.append((method, name or f'?{query.get("prefix", "")}'))
      if not name:
        return 200, server.list(bucket, query), {}
      if method == 'DELETE':
        server.delete(bucket, name, query.get('ifGenerationMatch'))
        return 204, b'', {}
      return self._read(bucket, name, query)
    if match := BUCKET.fullmatch(path):
      if match[1] not in server.objects:
        raise _Refused(404, 'The specified bucket does not exist.')
      return 200, dict(kind='storage#bucket', name=match[1], id=match[1]), {}
    raise _Refused(400, f'this bucket knows no {method} {path}')

  def _read(self, bucket, name, query):
    found = self.server_.get(bucket, name)
    headers = {'x-goog-generation': str(found.generation)}
    if query.get('ifGenerationNotMatch') == str(found.generation):
      return 304, b'', headers
    wanted = query.get('ifGenerationMatch', str(found.generation))
    if wanted != str(found.generation):
      raise _Refused(412, 'conditionNotMet')
    if query.get('alt') != 'media':
      return 200, _resource(bucket, name, found), {}
    match = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
    if not match:
      return 200, found.data, headers
    size, first = len(found.data), int(match[1])
    last = min(int(match[2] or size - 1), size - 1)
    if first >= size:
      raise _Refused(416, 'requested range not satisfiable')
    headers['Content-Range'] = f'bytes {first}-{last}/{size}'
    return 206, found.data[first : last + 1], headers

  def _upload(self, bucket, query, body):
    server, how = self.server_, query.get('uploadType')
    if bucket not in server.objects:
      raise _Refused(404, 'The specified bucket does not exist.')
    wanted, name = query.get('ifGenerationMatch'), query.get('name')
    if 'upload_id' in query:
      return self._part(query['upload_id'], body)
    if how == 'resumable':
      name = name or json.loads(body)['name']
      number = str(len(server._uploads))
      server._uploads[number] = bucket, name, wanted, bytearray()
      where = f'{server.url}{self.path.split("?")[0]}?upload_id={number}'
      return 200, {}, {'Location': where}
    if how == 'multipart':
      # As gcsfs puts it: what it is, then the data.
      about, body = body.split(b'\n--==0==\n', 1)
      name = json.loads(about.split(b'\n\n', 1)[1])['name']
      body = body.split(b'\n\n', 1)[1].removesuffix(b'\n--==0==--')
    server.log.append(('PUT', name))
    found = server.put(bucket, name, body, wanted)
    return 200, _resource(bucket, name, found), {}

  def _part(self, number, body):
    bucket, name, wanted, data = self.server_._uploads[number]
    match = re.fullmatch(r'bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)', self.headers['Content-Range'])
    data += body
    if match[3] == '*' or len(data) < int(match[3]):
      return 308, b'', {'Range': f'bytes=0-{len(data) - 1}'}
    self.server_.log.append(('PUT', name))
    found = self.server_.put(bucket, name, data, wanted)
    return 200, _resource(bucket, name, found), {}
