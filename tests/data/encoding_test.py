"""Encoding in one or several processes; loss masks; errors of workers."""

import hashlib
import json
import os
import signal
import time
import types

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from mtp_jax.cli import main
from mtp_jax.config import fields
from mtp_jax.data import documents, encoding, shards, spool, store, tokenizers
from tests.support import runs

BYTES = tokenizers.get('bytes')
BOS, EOS = tokenizers.BYTES_BOS, tokenizers.BYTES_EOS
Document = documents.Document


@pytest.fixture
def words(tmp_path):
  """A tokenizer.json of a few words, whose ids have a gap."""
  vocab = {'<s>': 0, '</s>': 1, '?': 2, 'a': 3, 'b': 4, 'bad': 99}
  fast = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token='?'))
  fast.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  fast.add_special_tokens(['<s>', '</s>'])
  fast.save(str(tmp_path / 'tokenizer.json'))
  return f'hf:{tmp_path}/tokenizer.json'


def _prepare(tmp_path, name, texts, tokenizer, workers):
  lines = (json.dumps(dict(text=text)) + '\n' for text in texts)
  (tmp_path / 'd.jsonl').write_text(''.join(lines))
  return main.main(
    [
      'prepare',
      f'--data.documents=jsonl:{tmp_path}/d.jsonl',
      f'--data.store={tmp_path}/{name}',
      f'--data.tokenizer={tokenizer}',
      '--data.valid_fraction=.2',
      f'--data.workers={workers}',
    ]
  )


def _files(path) -> dict[str, bytes]:
  files = (p for p in sorted(path.rglob('*')) if p.is_file())
  return {str(p.relative_to(path)): p.read_bytes() for p in files}


def test_store_bytes_do_not_depend_on_number_of_workers(tmp_path, words, monkeypatch):
  monkeypatch.setattr(encoding, 'BATCH_BYTES', 200)  # many batches
  texts = ['a b ' * (i % 37) + str(i) for i in range(300)]
  for workers in (1, 2):
    name = f's{workers}'
    assert _prepare(tmp_path, name, texts + texts[:9], words, workers) == 0
  assert _files(tmp_path / 's1') == _files(tmp_path / 's2')
  assert store.open_store(tmp_path / 's1').manifest['duplicates'] == 9


@pytest.mark.parametrize('workers', [1, 2])
def test_encoding_error_is_reported_on_one_line(tmp_path, words, monkeypatch, capsys, workers):
  monkeypatch.setattr(encoding, 'BATCH_BYTES', 200)
  about = json.loads((tmp_path / 'tokenizer.json').read_text())
  del about['model']['vocab']['?']  # what an unknown word would be
  (tmp_path / 'tokenizer.json').write_text(json.dumps(about))
  texts = ['a b ' * (20 + i) for i in range(30)]
  assert _prepare(tmp_path, 's', [*texts, 'a odd b'], words, workers) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'mtp: --data.tokenizer={words}: cannot encode a ')
  assert error.count('\n') == 1
  assert sorted(os.listdir(tmp_path)) == ['d.jsonl', 'tokenizer.json']


def test_tokenizers_panic_becomes_config_error(words, monkeypatch):
  class PanicException(BaseException):  # as pyo3 has it
    pass

  class Fast:
    def __init__(self, fast):
      self._fast = fast

    def __getattr__(self, name):
      return getattr(self._fast, name)

    def encode(self, *_, **__):
      raise PanicException('AddedVocabulary bad split')

  load = hf.Tokenizer.from_buffer
  monkeypatch.setattr(hf, 'Tokenizer', types.SimpleNamespace(from_buffer=lambda x: Fast(load(x))))
  with pytest.raises(fields.ConfigError, match='cannot encode a text: Added'):
    tokenizers.get(words).encode('a')


@pytest.mark.parametrize('wait_s', [0, 2])  # until it can write no more
def test_killed_worker_raises_config_error(words, wait_s):
  tokenizer = tokenizers.get(words)
  found = (Document('x', 'a b ' * 2**17) for _ in range(9))
  running = encoding.run(found, tokenizer, 1 + 1)
  next(running)
  time.sleep(wait_s)
  for child in encoding.multiprocessing.active_children():
    os.kill(child.pid, signal.SIGKILL)
  with pytest.raises(fields.ConfigError, match='--data.workers=2: a worker'):
    list(running)


def test_results_held_behind_a_slow_batch_are_bounded(words, monkeypatch):
  """The order of results is kept."""
  tokenizer = tokenizers.get(words)
  monkeypatch.setattr(encoding, 'BATCH_BYTES', 1)
  monkeypatch.setattr(encoding, 'PART', 2**20)  # whole documents
  held, received = [], encoding._received

  def counting(in_flight, done, turn, workers):
    found = received(in_flight, done, turn, workers)
    held.append(len(done))
    return found

  monkeypatch.setattr(encoding, '_received', counting)
  texts = ['a b ' * 2**17, *('a ' * i for i in range(1, 100))]
  found = (Document('x', text) for text in texts)
  lengths = [x.length_M.tolist() for x in encoding.run(found, tokenizer, 3)]
  assert lengths == [[2**18 + 2], *([i + 2] for i in range(1, 100))]
  assert 1 < max(held) <= 2 * 3 + 3


INTERRUPTED = """
import os, signal, sys, threading
from mtp_jax.cli import main
from mtp_jax.data import encoding

def interrupts(*counts):  # as Ctrl-C does: all processes of the terminal
  os.killpg(os.getpgid(0), signal.SIGINT)

if __name__ == '__main__':
  # A shell that runs tests in the background has it ignored.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  encoding.BATCH_BYTES = 200
  from mtp_jax.cli import progress
  progress.rich.status.Status.update = interrupts
  sys.exit(main.main(sys.argv[1:]))
"""


def test_interrupt_ends_all_workers(tmp_path, words):
  (tmp_path / 'd.txt').write_text('a b ' * 100)
  for i in range(50):
    (tmp_path / f'{i}.txt').write_text(f'a b {i}' * 99)
  program = tmp_path / 'program.py'
  program.write_text(INTERRUPTED)
  run = runs.process(
    [
      str(program),
      'prepare',
      f'--data.documents=text:{tmp_path}/*.txt',
      f'--data.store={tmp_path}/s',
      f'--data.tokenizer={words}',
      '--data.workers=2',
    ],
    start_new_session=True,
  )
  out, error = run.communicate(timeout=60)  # pipes end with the last process
  assert (run.returncode, out, error) == (130, '', 'mtp: interrupted\n')
  assert not list(tmp_path.glob('s*'))


# Masks.


def _encode(*found: Document, tokenizer=BYTES) -> encoding.Encoded:
  (encoded,) = encoding.run(found, tokenizer, 1)
  return encoded


def test_loss_spans_are_converted_to_tokens():
  found = [
    Document('a', 'Qé?Ab', (3,)),
    Document('b', 'plain'),
    Document('c', 'uvwxyz', (1, 3, 5)),
    Document('d', 'xy', (0,)),
    Document('e', 'xy', (2,)),
  ]
  got = _encode(*found)
  assert got.loss_spans == [(5,), (), (2, 4, 6), (1,), (3,)]
  assert got.length_M.tolist() == [8, 7, 8, 4, 4]
  assert got.n_bytes == 6 + 5 + 6 + 2 + 2


@pytest.mark.parametrize(
  'length, loss_spans, expected',
  [
    (4, (), '1111'),
    (5, (3,), '00011'),
    (4, (1,), '0111'),
    (4, (3,), '0001'),  # nothing but EOS
    (8, (2, 4, 6), '00110011'),
    (8, (2, 4), '00110000'),  # the last span and EOS are masked out
    (6, (2, 2, 4), '000011'),
  ],
)
def test_loss_mask_of_a_document(length, loss_spans, expected):
  mask_T = shards.mask(length, loss_spans)
  assert ''.join(map(str, mask_T.astype(int))) == expected


def test_digest_depends_on_loss_spans():
  one, two, plain = (Document('', 'ab', loss_spans) for loss_spans in ((1,), (2,), ()))
  assert len({spool.digest(d) for d in (one, two, plain)}) == 3
  assert spool.digest(plain) == hashlib.sha256(b'ab').digest()


def test_loss_spans_are_encoded_separately(tmp_path):
  """As at decoding time, no token spans the end of a prompt."""
  model = tmp_path / 'm.model'
  with open(model, 'wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['abab abab abab'] * 9),
      model_writer=file,
      vocab_size=264,
      model_type='bpe',
      byte_fallback=True,
      minloglevel=2,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
    )
  tokenizer = tokenizers.get(f'sentencepiece:{model}')
  whole, parts = (
    _encode(Document('', 'abab', loss_spans), tokenizer=tokenizer) for loss_spans in ((), (1,))
  )
  ids = [*tokenizer.encode('a'), *tokenizer.encode('bab')]
  assert parts.tokens_P.tolist() == [tokenizer.bos, *ids, tokenizer.eos]
  assert len(ids) > whole.tokens_P.size - 2 and parts.loss_spans == [(2,)]


def test_loss_spans_do_not_start_with_a_dummy_prefix(tmp_path):
  model = tmp_path / 'm.model'
  with open(model, 'wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['the answer is B or C'] * 9),
      model_writer=file,
      vocab_size=300,
      model_type='bpe',
      byte_fallback=True,
      minloglevel=2,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      hard_vocab_limit=False,
    )
  tokenizer = tokenizers.get(f'sentencepiece:{model}')
  text = 'the answer is B'
  for split in (14, 13, 3):
    found = _encode(Document('', text, (split,)), tokenizer=tokenizer)
    inner = found.tokens_P[1:-1]
    assert tokenizer.decode(inner) == text
    completion = found.tokens_P[found.loss_spans[0][0] :]
    assert tokenizer.token_bytes_V[completion].sum() == len(text) - split


def _write(path, found, **kwargs):
  store.write(path, found, BYTES, valid_fraction=0, **kwargs)
  return store.open_store(path)


def test_store_round_trips_loss_masks(tmp_path):
  found = [
    Document(
      str(i),
      f'{i} prompt' * (1 + i % 3) + f'answer {i}',
      (len(f'{i} prompt') * (1 + i % 3),) if i % 4 else (),
    )
    for i in range(60)
  ]
  opened = _write(tmp_path / 's', found, shard_tokens=400)
  split = opened.split('train')
  assert len(split.loss_mask) == len(split.tokens) > 1
  texts = {d.text: d.loss_spans for d in found}
  total = 0
  for tokens_P, offset_M, loss_mask_P in zip(
    split.tokens, split.offsets, split.loss_mask, strict=True
  ):
    split = offset_M[1:].astype(np.int64)
    for ids_T, loss_mask_T in zip(
      np.split(tokens_P[:], split), np.split(loss_mask_P[:], split), strict=True
    ):
      loss_spans = texts.pop(BYTES.decode(ids_T))
      expected_T = np.arange(ids_T.size) > (loss_spans[0] if loss_spans else -1)
      np.testing.assert_array_equal(loss_mask_T, expected_T)
      total += expected_T.sum()
  assert not texts and opened.manifest['splits']['train']['scored'] == total
  assert f'{total:,} tokens in the loss mask' in store.summary(opened.manifest)[2]
  file = opened.manifest['splits']['train']['shards'][0]['scored_file']['file']
  data = bytearray((tmp_path / 's' / file).read_bytes())
  data[3] ^= 1
  (tmp_path / 's' / file).write_bytes(data)
  with pytest.raises(fields.ConfigError, match=f'{file}: is corrupt'):
    store.open_store(tmp_path / 's')


def test_store_without_prompts_has_no_loss_mask(tmp_path):
  opened = _write(tmp_path / 's', [Document('', f'text {i}') for i in range(9)])
  assert not opened.split('train').masked
  assert not list(tmp_path.rglob('scored*'))
  assert 'scored' not in opened.manifest['splits']['train']
