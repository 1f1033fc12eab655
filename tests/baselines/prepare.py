"""Memory and time of `mtp prepare` by tokenizer, kind of source and size.

  python -m tests.baselines.prepare make --data=DIR --work=WORK
  python -m tests.baselines.prepare memory --work=WORK [--tokenizers=A,B]
    [--sources=text,dir,jsonl,parquet] [--mb=20,60,200]
  python -m tests.baselines.prepare speed --work=WORK --before=CHECKOUT
    [--tokenizers=A,B] [--mb=4] [--pairs=6]

`make` trains small tokenizers of each kind on the books of DIR (books.jsonl.gz),
or uses those in WORK. `memory` prepares one document, the books tiled, in a fresh
process without workers, and prints the growth of its peak resident memory from
before the document was opened. `speed` compares the CPU time of encoding with that
of another checkout, alternating.
"""

import argparse
import base64
import gzip
import io
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
KINDS = {
  'bytes': 'bytes',
  'bpe': 'sentencepiece:bpe.model',
  'bpe-nfkc': 'sentencepiece:bpe-nfkc.model',
  'unigram': 'sentencepiece:unigram.model',
  'unigram-nfkc': 'sentencepiece:unigram-nfkc.model',
  'hf-llama': 'hf:hf-llama/tokenizer.json',
  'hf-gpt2': 'hf:hf-gpt2/tokenizer.json',
  'hf-split': 'hf:hf-split/tokenizer.json',
  'hf-unigram': 'hf:hf-unigram/tokenizer.json',
  'tiktoken': 'tiktoken:ranks.tiktoken',
}
# One of its alternatives is not in any known tokenizer.
OTHER_WORDS = (
  r'[0-9]{1,4}|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+| ?[^\s\p{L}\p{N}]+[\r\n]*|'
  r'\s*[\r\n]+|\s+(?!\S)|\s+|\p{N}'
)


def _books(path: str) -> str:
  with gzip.open(os.path.join(path, 'books.jsonl.gz'), 'rt') as file:
    return '\n\n'.join(json.loads(line)['text'] for line in file)


def make(data: str, work: pathlib.Path) -> None:
  work.mkdir(parents=True, exist_ok=True)
  text = _books(data)
  (work / 'books.txt').write_text(text)
  lines = text[:4_000_000].split('\n')
  lossless = dict(
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
  )
  for name, options in {
    'bpe': dict(model_type='bpe', add_dummy_prefix=False) | lossless,
    'bpe-nfkc': dict(model_type='bpe'),
    'unigram': dict(model_type='unigram') | lossless,
    'unigram-nfkc': dict(model_type='unigram'),
  }.items():
    _sentencepiece(work / f'{name}.model', lines, **options)
  _hugging_face(work, lines)


def _sentencepiece(path, lines, **options):
  import sentencepiece

  if path.exists():
    return
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    vocab_size=4096,
    num_threads=1,
    minloglevel=2,
    **options,
  )
  path.write_bytes(model.getvalue())


def _hugging_face(work, lines):
  import tokenizers as hf

  pre = hf.pre_tokenizers
  ends = ['<unk>', '<s>', '</s>']
  every = [f'<0x{b:02X}>' for b in range(256)]

  def save(name, model, trainer, normalizer, step, change=lambda about: None):
    if (work / name).exists():
      return
    fast = hf.Tokenizer(model)
    fast.normalizer, fast.pre_tokenizer = normalizer, step
    fast.train_from_iterator(lines, trainer)
    about = json.loads(fast.to_str())
    change(about)
    (work / name).mkdir()
    (work / name / 'tokenizer.json').write_text(json.dumps(about))

  def bpe(specials, alphabet=()):
    return hf.trainers.BpeTrainer(
      vocab_size=4096, special_tokens=specials, show_progress=False, initial_alphabet=list(alphabet)
    )

  def as_llama(about):
    about['model'] |= dict(byte_fallback=True, fuse_unk=True)
    about['added_tokens'] = about['added_tokens'][:3]

  marks = hf.normalizers.Sequence(
    [hf.normalizers.Prepend('\u2581'), hf.normalizers.Replace(' ', '\u2581')]
  )
  save('hf-llama', hf.models.BPE(unk_token='<unk>'), bpe([*ends, *every]), marks, None, as_llama)
  letters = pre.ByteLevel.alphabet()
  level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
  save('hf-gpt2', hf.models.BPE(), bpe(ends, letters), None, pre.ByteLevel(add_prefix_space=False))
  save(
    'hf-split',
    hf.models.BPE(),
    bpe(ends, letters),
    hf.normalizers.NFKC(),
    pre.Sequence([pre.Split(hf.Regex(OTHER_WORDS), 'isolated'), level]),
  )
  save(
    'hf-unigram',
    hf.models.Unigram(),
    hf.trainers.UnigramTrainer(
      vocab_size=4096, special_tokens=ends, unk_token='<unk>', show_progress=False
    ),
    hf.normalizers.NFKC(),
    pre.Metaspace(),
  )
  about = json.loads((work / 'hf-gpt2/tokenizer.json').read_text())
  from mtp_jax.data import ranks

  byte_of = {letter: byte for byte, letter in enumerate(ranks.byte_letters())}
  tokens = [
    bytes(byte_of[x] for x in token) for token in about['model']['vocab'] if token not in ends
  ]
  tokens.sort(key=lambda token: len(token) > 1)  # bytes first, else in order
  (work / 'ranks.tiktoken').write_bytes(
    b''.join(base64.b64encode(token) + b' %d\n' % rank for rank, token in enumerate(tokens))
  )


# Memory.

PREPARE = """
import json, re, sys
from mtp_jax.data import documents, readers, store, tokenizers

def peak():  # getrusage would include the process before exec
  status = open('/proc/self/status').read()
  return int(re.search(r'VmHWM:\\s+(\\d+)', status)[1])

name, source, out = sys.argv[1:]
if source.startswith('parquet'):
  documents.pyarrow()
tokenizer = tokenizers.get(name)
tokenizer.encode('a text')
before = peak()
found = readers.read(source, whole=False, max_bytes=2**30)
manifest = store.write(out, found, tokenizer, valid_fraction=0)
print(json.dumps(dict(
  above=1024 * (peak() - before), before=1024 * before,
  bytes=manifest['splits']['train']['bytes'],
  tokens=manifest['splits']['train']['tokens'],
)))
"""


def write_source(kind: str, folder: pathlib.Path, text: str, mb: int) -> str:
  """Writes one document of `mb` million bytes; returns the --data.documents flag."""
  data = text.encode()
  n = 10**6 * mb
  data = (data * (n // len(data) + 1))[:n].decode(errors='ignore')
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  if kind in ('text', 'dir'):
    (folder / 'a.txt').write_text(data, newline='')
    return f'text:{folder}/a.txt' if kind == 'text' else f'dir:{folder}'
  if kind in ('jsonl', 'jsonl-utf8'):
    with open(folder / 'a.jsonl', 'w') as file:
      json.dump(dict(text=data), file, ensure_ascii=kind == 'jsonl')
      file.write('\n')
    return f'jsonl:{folder}/a.jsonl#text'
  import pyarrow.parquet

  table = pyarrow.table(dict(text=[data]))
  pyarrow.parquet.write_table(table, folder / 'a.parquet')
  return f'parquet:{folder}/a.parquet#text'


def _run(code, *args, checkout=ROOT, timeout=3000):
  done = subprocess.run(
    [sys.executable, '-c', code, *args],
    capture_output=True,
    text=True,
    env=os.environ | dict(PYTHONPATH=str(checkout)),
    timeout=timeout,
  )
  if done.returncode:
    return dict(failed=done.returncode, why=done.stderr.strip()[-300:])
  return json.loads(done.stdout.splitlines()[-1])


def name_of(kind: str, work: pathlib.Path) -> str:
  scheme, mark, path = KINDS[kind].partition(':')
  return f'{scheme}:{work / path}' if mark else scheme


def memory(work, tokenizers, sources, mbs) -> None:
  text = (work / 'books.txt').read_text()
  for source in sources:
    for mb in mbs:
      given = write_source(source, work / 'source', text, mb)
      for kind in tokenizers:
        out = work / 'store'
        shutil.rmtree(out, ignore_errors=True)
        found = _run(PREPARE, name_of(kind, work), given, str(out))
        if 'failed' in found:
          print(f'{kind:14}{source:10}{mb:5} MB  {found}', flush=True)
          continue
        above = found['above']
        ratio = (above - 2**26) / found['bytes']
        print(
          f'{kind:14}{source:12}{mb:5} MB  {above / 2**20:8.1f} MiB'
          f'  {ratio:6.2f} bytes per byte over 64 MiB',
          flush=True,
        )
  shutil.rmtree(work / 'source')
  shutil.rmtree(work / 'store')


# Time.

ENCODE = """
import json, resource, sys, types
from mtp_jax.data import readers, spool, tokenizers

name, source, out = sys.argv[1:]
tokenizer = tokenizers.get(name)
tokenizer.encode('a text')
start = resource.getrusage(resource.RUSAGE_SELF)
try:
  found = readers.read(source, whole=False)
except TypeError:
  found = readers.read(source)
spool.fill(out, found, tokenizer)
end = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime))
"""


def speed(work, before, tokenizers, mbs, pairs) -> None:
  text = (work / 'books.txt').read_text()
  for mb in mbs:
    source = write_source('text', work / 'source', text, mb)
    for kind in tokenizers:
      ratios, times = [], []
      for i in range(pairs):
        pair = {}
        for checkout in (before, ROOT) if i % 2 else (ROOT, before):
          args = name_of(kind, work), source, str(work / 'spool')
          pair[checkout] = _run(ENCODE, *args, checkout=checkout)
        ratios.append(pair[ROOT] / pair[before])
        times.append(pair[ROOT])
      print(
        f'{kind:14}{mb:5} MB  {statistics.median(times):7.2f} s'
        f'  {statistics.median(ratios):.3f} of the time before'
        f' ({min(ratios):.3f} to {max(ratios):.3f}, {pairs} pairs)',
        flush=True,
      )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('command', choices=['make', 'memory', 'speed'])
  parser.add_argument('--data')
  parser.add_argument('--work', type=pathlib.Path, required=True)
  parser.add_argument('--before')
  parser.add_argument('--tokenizers', default=','.join(KINDS))
  parser.add_argument('--sources', default='text,dir,jsonl,parquet')
  parser.add_argument('--mb', default='20,60,200')
  parser.add_argument('--pairs', type=int, default=6)
  given = parser.parse_args()
  kinds, mbs = (given.tokenizers.split(','), [int(x) for x in given.mb.split(',')])
  if given.command == 'make':
    make(given.data, given.work)
  elif given.command == 'memory':
    memory(given.work, kinds, given.sources.split(','), mbs)
  else:
    speed(given.work, given.before, kinds, mbs, given.pairs)


if __name__ == '__main__':
  main()
