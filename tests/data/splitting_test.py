"""Safe places to split a text, compared with encoding the whole text."""

import io
import json
import os
import random
import tempfile

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from mtp_jax.data import documents, encoding, readers, splitting, spool, tokenizers
from tests.support import texts as texts_lib


def _text(seed, n=250):
  rng = random.Random(seed)
  return ''.join(
    x for _ in range(n) for x in (rng.choice(texts_lib.WORDS), rng.choice(texts_lib.GAPS))
  )


CORPUS = [_text(seed) for seed in range(40)]


def _sentencepiece(**options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS),
    model_writer=model,
    minloglevel=2,
    **dict(
      vocab_size=400,
      model_type='bpe',
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
    )
    | options,
  )
  return tokenizers.of_files('sentencepiece:x', {tokenizers.PIECES: model.getvalue()})


def _rule(text):
  with tempfile.NamedTemporaryFile('w', suffix='.tsv', delete=False) as file:
    file.write(text)
  return file.name


def _byte_level(regex=None, normalizer=None, added=(), prefix=False):
  pre, fast = hf.pre_tokenizers, hf.Tokenizer(hf.models.BPE())
  steps = [pre.ByteLevel(add_prefix_space=prefix, use_regex=regex is None)]
  if regex:
    steps.insert(0, pre.Split(hf.Regex(regex), 'isolated'))
  fast.pre_tokenizer = pre.Sequence(steps)
  fast.normalizer, fast.decoder = normalizer, hf.decoders.ByteLevel()
  fast.train_from_iterator(
    CORPUS,
    hf.trainers.BpeTrainer(
      vocab_size=600,
      special_tokens=['<s>', '</s>'],
      show_progress=False,
      initial_alphabet=pre.ByteLevel.alphabet(),
    ),
  )
  fast.add_tokens(list(added))
  return tokenizers.of_files('hf:x', {'tokenizer.json': fast.to_str().encode()})


def _spaced(split=None, added=()):
  """Like Hugging Face's Llama 2: space markers, byte fallback."""
  fast = hf.Tokenizer(hf.models.BPE(unk_token='<unk>'))
  fast.normalizer = hf.normalizers.Sequence(
    [hf.normalizers.Prepend('\u2581'), hf.normalizers.Replace(' ', '\u2581')]
  )
  fast.train_from_iterator(
    [x.replace('\n', ' ') for x in CORPUS],
    hf.trainers.BpeTrainer(
      vocab_size=600,
      show_progress=False,
      special_tokens=['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))],
    ),
  )
  about = json.loads(fast.to_str())
  about['model'] |= dict(byte_fallback=True, fuse_unk=True)
  about['added_tokens'] = about['added_tokens'][:3]
  for name in added:
    about['added_tokens'].append(
      about['added_tokens'][0] | dict(id=about['model']['vocab'][name], content=name, special=False)
    )
  if split is not None:
    about['normalizer'] = None
    about['pre_tokenizer'] = dict(
      type='Metaspace', replacement='\u2581', prepend_scheme='first', split=split
    )
  return tokenizers.of_files('hf:x', {'tokenizer.json': json.dumps(about).encode()})


KNOWN = {
  'bytes': lambda: tokenizers.get('bytes'),
  'trained': lambda: _sentencepiece(add_dummy_prefix=False),
  'llama-2': lambda: _sentencepiece(user_defined_symbols=['<tool>', '\n\n']),
  'gpt-2': _byte_level,
  'gpt-2-prefix': lambda: _byte_level(prefix=True),
  'llama-3': lambda: _byte_level(texts_lib.LLAMA_3, added=['<tool>']),
  'qwen-2': lambda: _byte_level(texts_lib.QWEN_2, hf.normalizers.NFC()),
  'spaced': _spaced,
  'metaspace': lambda: _spaced(split=True),
  'metaspace-whole': lambda: _spaced(split=False),
}


def _words(model, step, normalizer=None, **options):
  """A tokenizer with a pre-tokenizer and any model."""
  fast = hf.Tokenizer(model(**options))
  fast.normalizer, fast.pre_tokenizer = normalizer, step
  kind = type(fast.model).__name__
  specials = ['<unk>', '<s>', '</s>']
  more = dict(unk_token='<unk>') if kind == 'Unigram' else {}
  trainer = dict(
    BPE=hf.trainers.BpeTrainer,
    Unigram=hf.trainers.UnigramTrainer,
    WordPiece=hf.trainers.WordPieceTrainer,
  )[kind]
  fast.train_from_iterator(
    CORPUS, trainer(vocab_size=400, special_tokens=specials, show_progress=False, **more)
  )
  return tokenizers.of_files('hf:x', {'tokenizer.json': fast.to_str().encode()})


def _charsmap():
  """Returns the charsmap of a SentencePiece model with nmt_nfkc, as in T5."""
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()
  model = _sentencepiece(normalization_rule_name='nmt_nfkc')
  proto.ParseFromString(model.files[tokenizers.PIECES])
  return proto.normalizer_spec.precompiled_charsmap


def _like_t5():
  norm = hf.normalizers
  return _words(
    hf.models.Unigram,
    hf.pre_tokenizers.Metaspace(),
    norm.Sequence(
      [norm.Precompiled(_charsmap()), norm.Strip(), norm.Replace(hf.Regex(' {2,}'), '\u2581')]
    ),
  )


def _like_bert():
  return _words(
    hf.models.WordPiece,
    hf.pre_tokenizers.BertPreTokenizer(),
    hf.normalizers.BertNormalizer(),
    unk_token='<unk>',
  )


TOOL = hf.AddedToken('<tool>', normalized=False)
KNOWN |= {
  'upper-case-tokens': lambda: _byte_level(added=['[INST]', '<toolCall>']),
  'prefix-after-token': lambda: _byte_level(prefix=True, added=[TOOL]),
  'strip-after-token': lambda: _byte_level(normalizer=hf.normalizers.Strip(), added=[TOOL]),
  'prepend-after-token': lambda: _spaced(added=['<tool>']),
  'token-normalized': lambda: _byte_level(
    normalizer=hf.normalizers.Replace('e', 'y'), added=["I'ey 12ex"]
  ),
  'word-characters': lambda: _byte_level(r'\w+|[^\w\s]+|\s'),
  'lower-case': lambda: _byte_level(texts_lib.LLAMA_3, hf.normalizers.Lowercase()),
  'nfkc': lambda: _byte_level(texts_lib.QWEN_2, hf.normalizers.NFKC()),
  'other-words': lambda: _byte_level(texts_lib.LLAMA_3.replace('[\\r\\n]*', '[\\s]*')),
  'unknown-joined': lambda: _sentencepiece(byte_fallback=False),
  'sentencepiece-nfkc': lambda: _sentencepiece(normalization_rule_name='nmt_nfkc'),
  'sentencepiece-default': lambda: _sentencepiece(
    normalization_rule_name='nmt_nfkc_cf',
    byte_fallback=False,
    remove_extra_whitespaces=True,
    vocab_size=380,
  ),
  'spaces-removed': lambda: _sentencepiece(remove_extra_whitespaces=True),
  'characters': lambda: _sentencepiece(model_type='char', normalization_rule_name='nmt_nfkc'),
  'spaced-token': lambda: _byte_level(added=['the cat']),
  'gpt-4o': lambda: _byte_level(texts_lib.GPT_4O),
  'deepseek': lambda: _byte_level(texts_lib.DEEPSEEK),
  't5': _like_t5,
  'bert': _like_bert,
}
UNKNOWN = {
  'unigram': lambda: _sentencepiece(model_type='unigram'),
  'space-replaced': lambda: _sentencepiece(
    normalization_rule_name='', normalization_rule_tsv=_rule('20 27\t27\n')
  ),
  'suffix': lambda: _sentencepiece(treat_whitespace_as_suffix=True),
  'strips': lambda: _byte_level(added=[hf.AddedToken('<tool>', rstrip=True)]),
  'looks-behind': lambda: _byte_level(r'(?<=a) |' + texts_lib.LLAMA_3),
  'any': lambda: _byte_level(r'[\s\S]+'),
}


def _tokens(tokenizer, document):
  """Returns the encoded batches of a document, and its tokens."""
  batches = list(encoding.run([document], tokenizer, workers=1))
  return batches, np.concatenate([batch.tokens_P for batch in batches])


@pytest.mark.parametrize('kind', KNOWN)
def test_parts_have_the_tokens_of_the_whole_text(kind, monkeypatch, tmp_path):
  tokenizer = KNOWN[kind]()
  is_safe = splitting.rule(tokenizer)
  texts = [_text(seed, 120) for seed in range(100, 130)]
  texts += ['a' * 500, ' ' * 500, '\n' * 300 + 'x', 'a ' * 300, ' a' * 300]
  texts += [f'{a}{gap}{b}' * 40 for gap in texts_lib.GAPS for a, b in ('xy', '1,', '.x')]
  texts += [
    x * 60
    for x in (
      '<tool>b',
      '<tool> b',
      '<tool>abc',
      '[INST] do this ',
      '<toolCall>',
      "I'yy 12yx I'ey",
      '\u00bd%',
      'a\u24b6!',
    )
  ]
  n_parts = 0
  for text in texts:
    for size in (7, 64):
      parts = list(splitting.pieces([text], is_safe, size))
      assert ''.join(parts) == text
      n_parts += len(parts) - 1
    whole = encoding.encode([documents.Document('x', text)], tokenizer)
    monkeypatch.setattr(encoding, 'PART', 32)
    _, tokens = _tokens(tokenizer, documents.Document('x', text))
    monkeypatch.undo()
    assert tokens.tolist() == whole.tokens_P.tolist(), text
  assert n_parts > 50 * len(texts) / 10


@pytest.mark.parametrize('kind', UNKNOWN)
def test_unsupported_tokenizers_have_no_split_rule(kind):
  assert splitting.rule(UNKNOWN[kind]()) is None


@pytest.mark.parametrize('kind', ['bytes', 'llama-2', 'qwen-2'])
def test_spool_does_not_depend_on_splitting(kind, monkeypatch, tmp_path):
  """With loss spans, files read in blocks, small and large documents."""
  tokenizer = KNOWN[kind]()
  (tmp_path / 'a.txt').write_text(CORPUS[0], newline='')
  more = [
    documents.Document('b', CORPUS[1], (0, 5, 300, len(CORPUS[1]))),
    documents.Document('c', 'short', (2,)),
    documents.Document('d', ''),
    documents.Document('e', CORPUS[2]),
    documents.Document('f', 'end'),
  ]

  def fill(name, whole):
    read = readers.read(f'text:{tmp_path}/a.txt', whole=whole)
    found = spool.fill(tmp_path / name, [*read, *more], tokenizer)
    return (tmp_path / name).read_bytes(), found

  expected, first = fill('1', True)
  monkeypatch.setattr(encoding, 'PART', 50)
  monkeypatch.setattr(documents, 'HELD', 10)
  monkeypatch.setattr(documents, 'BLOCK', 33)
  found, second = fill('2', False)
  assert found == expected
  assert second.loss_spans == first.loss_spans and second.empty == 1
  for a, b in zip(first[2:5], second[2:5], strict=True):
    np.testing.assert_array_equal(a, b)


def test_pieces_of_a_text_without_a_safe_place():
  blocks = ['ab', 'cd', 'e f', 'gh', '']
  spaces = lambda before, after: after == ' '  # noqa: E731
  assert list(splitting.pieces(blocks, spaces, 3)) == ['abcde', ' fgh']
  assert list(splitting.pieces([], spaces, 3)) == ['']


def test_memory_does_not_grow_with_document_size(tmp_path):
  """For 40 MB of text a few MB are held, not a multiple of the text."""
  import tracemalloc

  path = tmp_path / 'a.txt'
  with open(path, 'w') as file:
    for _ in range(40):
      file.write('some words of a text\n' * 50_000)
  tokenizer = tokenizers.get('bytes')
  tracemalloc.start()
  try:
    read = readers.read(f'text:{path}', whole=False)
    found = spool.fill(tmp_path / 'spool', read, tokenizer)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert os.path.getsize(tmp_path / 'spool') == 2 * found.length_M[0]
  assert found.length_M[0] == os.path.getsize(path) + 2
  assert peak < 16 * 2**20
