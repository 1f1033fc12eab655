"""Stores with a teacher's next-token probabilities, and runs that read them."""

import json

import numpy as np
import pytest

from mtp_jax.checkpoint import saver
from mtp_jax.cli import main
from mtp_jax.config import schema
from mtp_jax.data import batches, loader, store, tokenizers
from mtp_jax.train import stored_teacher
from tests.support import oracle, runs, tiny

P, L = 5, 12
MODEL = dict(model__d_model=8, model__vocab_size=264, model__n_layers=3, heads__n=2)
OF_RUN = dict(
  optim__warmup_steps=1,
  model__vocab_size=264,
  loss__head_loss='lk_hybrid',
  loss__teacher='store',
  train__checkpoint_every=3,
  eval__batches=1,
)


def _cfg():
  return tiny.cfg(heads__family='causal', data__tokenizer='bytes', **MODEL)


def _prepare(root, out, **flags):
  flags = {
    'documents': f'jsonl:{root}/text.jsonl#text',
    'store': out,
    'valid_fraction': 0.3,
    'workers': 1,
    'teacher': root / 'other',
    'teacher_top_k': P,
    'teacher_seq_len': L,
  } | flags
  args = [f'--data.{name}={value}' for name, value in flags.items()]
  return main.main(['prepare', *args, f'--out={root}/out.json', '--train.compilation_cache='])


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A teacher, and a store of 25 documents of 5 to 60 bytes with its probabilities."""
  root = tmp_path_factory.mktemp('stored')
  c = _cfg()
  w = tiny.model(c, tiny.mesh(c))
  saver.save_params(w, c, tokenizers.get('bytes'), str(root / 'other'))
  rng = np.random.default_rng(0)
  texts = [''.join(rng.choice(list('abcde \n'), size=5 + 55 * i // 25)) for i in range(25)]
  lines = [json.dumps(dict(text=text)) for text in texts]
  (root / 'text.jsonl').write_text('\n'.join(lines))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stored_teacher, 'BATCH_TOKENS', L)  # several batches
    assert _prepare(root, root / 'store') == 0
  return root


def _context(i):
  """The first token that the teacher has read of a document when it predicts after token i:
  windows of L begin every L / 2, and the first one that has the token counts."""
  begin = 0
  while i >= begin + L:
    begin += L // 2
  return begin


def test_stored_probabilities_are_those_of_the_teacher(root):
  """Of each token of each document, by the oracle, in whichever window of a batch it is."""
  c = _cfg()
  w, shape = tiny.flat(tiny.model(c, tiny.mesh(c))), oracle.Shape('causal', 2)
  split = store.open_store(root / 'store', teacher=True).split('train')
  assert split.teacher_top_k == P and len(split.tokens) == 1
  tokens, n_long = split.tokens[0][:], 0
  starts = [*split.offsets[0][:].tolist(), len(tokens)]
  seq_len, span = 7, 2
  ids, logp = map(
    np.concatenate,
    zip(
      *(split.teacher(i, seq_len, span) for i in range(split.n_windows(seq_len, span))), strict=True
    ),
  )
  assert ids.shape == (len(logp), P) and logp.shape[1] == P + 1 and logp.dtype == np.float16
  for first, end in zip(starts[:-1], starts[1:], strict=True):
    n_long += end - first > L
    document = tokens[first:end].astype(int)
    for begin in {_context(i) for i in range(len(document))}:
      window = document[begin : begin + L]
      padded = np.concatenate([window, np.zeros(2, int)])[None]
      position = np.arange(padded.shape[1])[None]
      logits_TV = oracle.forward(w, padded, position, shape)[0, 0]
      for i in range(begin, begin + len(window)):
        if _context(i) != begin or first + i >= len(ids):
          continue
        log_V = logits_TV[i - begin] - np.log(np.sum(np.exp(logits_TV[i - begin])))
        best = np.argsort(-log_V)[:P]
        np.testing.assert_allclose(logp[first + i, :P], log_V[best], rtol=2e-3)
        np.testing.assert_allclose(log_V[ids[first + i]], log_V[best], rtol=2e-3)
        rest = np.log(np.sum(np.exp(np.delete(log_V, ids[first + i]))))
        np.testing.assert_allclose(logp[first + i, P], rest, rtol=2e-3, atol=1e-3)
  assert n_long > 5


def test_windows_of_a_document_overlap_by_half():
  found = list(stored_teacher.pieces([np.arange(30), np.arange(12), np.arange(3)], L))
  assert [(p.tokens[0], len(p.tokens), p.done) for p in found] == [
    *((0, 12, 0), (6, 12, 6), (12, 12, 6), (18, 12, 6)),
    *((0, 12, 0), (0, 3, 0)),
  ]


def test_store_states_its_teacher_and_size(root, capsys):
  manifest = store.open_store(root / 'store').manifest
  assert manifest['teacher'] == dict(
    checkpoint=f'{root}/other/checkpoints/0', vocab_size=264, top_k=P, seq_len=L, stride=L // 2
  )
  (line,) = [line for line in store.summary(manifest) if line.startswith('teacher')]
  # uint16 ids, float16 log-probabilities and that of the others
  assert f'{P} tokens per position, {2 * P + 2 * (P + 1)} bytes each, 0.00 GiB in all' in line
  assert not store.open_store(root / 'store').split('train').teacher_ids  # not opened unasked
  # The same documents without a teacher have the same tokens.
  assert _prepare(root, root / 'plain', teacher='') == 0
  plain = store.open_store(root / 'plain').manifest
  for key in ('tokens_file', 'offsets_file'):
    assert (
      plain['splits']['train']['shards'][0][key] == manifest['splits']['train']['shards'][0][key]
    )


def test_batches_have_the_probabilities_of_their_windows(root):
  c = tiny.cfg(
    **MODEL,
    data__store=str(root / 'store'),
    data__seq_len=7,
    train__grad_accum_steps=2,
    loss__teacher='store',
    loss__head_loss='tv',
  )
  tokens = batches.open_tokens(c)
  batch = next(batches.train_batches(tokens, c, 3))
  plain = next(
    batches.train_batches(batches.open_tokens(schema.replace(c, **{'loss.teacher': ''})), c, 3)
  )
  assert plain.keys() == {'tokens', 'position'}
  np.testing.assert_array_equal(batch['tokens'], plain['tokens'])
  assert batch['teacher_ids'].shape == (2, 4, 7, P)
  mixture, window = tokens.train(), (7, c.span)
  rows = loader.row_indices(mixture.sizes(*window), mixture.weights, c.train.seed, 8, 3)
  for place, row in zip(np.ndindex(2, 4), rows, strict=True):
    ids_TP, logp_TP1 = mixture.teacher(row, *window)
    np.testing.assert_array_equal(batch['teacher_ids'][place], ids_TP)
    np.testing.assert_array_equal(batch['teacher_logp'][place], logp_TP1)


def test_resume_is_bitwise_with_a_stored_teacher(root, tmp_path, capsys):
  path = str(root / 'store')
  assert runs.train(path, tmp_path / 'whole', **OF_RUN) == 0
  assert runs.train(path, tmp_path / 'run', **OF_RUN, train__steps=3) == 0
  assert runs.train(path, tmp_path / 'run', **OF_RUN) == 0
  runs.assert_same(runs.restored(tmp_path / 'run', 6), runs.restored(tmp_path / 'whole', 6))
  evaluated = [r for r in runs.records(tmp_path / 'run') if r['kind'] == 'eval'][-1]
  assert {'alpha_2', 'teacher_alpha_2', 'draft_loss_2'} <= evaluated.keys()
  capsys.readouterr()
  flags = [f'--out={tmp_path}/eval.json', '--train.compilation_cache=']
  assert main.main(['eval', str(tmp_path / 'run'), *flags]) == 0
  again = json.loads((tmp_path / 'eval.json').read_text())
  for name in ('alpha_2', 'teacher_alpha_2', 'draft_loss_2', 'loss'):
    np.testing.assert_allclose(again[name], evaluated[name], rtol=1e-5)


@pytest.mark.parametrize(
  'changes, line',
  [
    (dict(model__vocab_size=272), '/store has --model.vocab_size=264, the run 272'),
    (dict(loss__top_k=6), f'/store has {P} tokens per position, fewer than --loss.top_k=6'),
  ],
)
def test_unsuitable_store_is_refused(changes, line, root, tmp_path, capsys):
  assert runs.train(str(root / 'store'), tmp_path / 'run', **OF_RUN | changes) == 2
  error = capsys.readouterr().err
  assert error.startswith('mtp: --loss.teacher=store: ') and line in error


def test_store_without_a_teacher_is_refused(root, tmp_path, capsys):
  path = runs.make_store(str(tmp_path / 'store'))
  assert runs.train(path, tmp_path / 'run', **OF_RUN) == 2
  error = capsys.readouterr().err
  assert f'mtp: --data.store={path}: has no teacher for --loss.teacher=store; ' in error


@pytest.mark.parametrize(
  'flags, line',
  [
    (dict(teacher='/nowhere'), '--data.teacher=/nowhere: /nowhere: no complete checkpoint there'),
    (dict(teacher_top_k=300), '--data.teacher_top_k=300: the teacher has 264 tokens'),
    (dict(tokenizer='train:300'), 'its tokenizer is bytes, that of the documents sentencepiece#'),
  ],
)
def test_unsuitable_teacher_of_a_store_is_refused(flags, line, root, tmp_path, capsys):
  assert _prepare(root, tmp_path / 'store', **flags) == 2
  error = capsys.readouterr().err
  assert line in error and error.splitlines()[-1].startswith('mtp: --data.teacher')
  assert not (tmp_path / 'store').exists()
