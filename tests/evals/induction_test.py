"""The induction and choice_points suites."""

import json
import math
import random

import numpy as np
import pytest

from mtp_jax.cli import main
from mtp_jax.config import fields, schema
from mtp_jax.data import documents, store, tokenizers
from mtp_jax.evals import induction, scores, subject
from mtp_jax.train import metrics
from tests.support import browser, runs

STORY = (
  'Once a fox named Tomkin lived here. The old fox, Tomkin, was sly. "Oh,'
  ' Tomkin!" cried Tomkin, and a king came. King Tomkin he was not. '
)
BYTES = tokenizers.get('bytes')


def _items(text=STORY, seq_len=300, limit=0):
  found = [documents.Document('a', text), documents.Document('b', text)]
  return induction.make(iter(found), BYTES, seq_len, limit)


def test_induction_replaces_names_by_two_tokens():
  a, b = _items()
  for item in (a, b):
    text = BYTES.decode(item.ids)
    assert len(item.name) == 2 and item.name[0].isupper()
    assert text == STORY.replace('Tomkin', item.name) + '\n\n'
    assert len(item.at) == 5 and item.before == [0, 1, 2, 3, 4]
    for p in item.at:
      assert BYTES.decode(item.ids[p : p + 2]) == item.name
  assert a.name != b.name  # a different document
  assert [x.name for x in _items()] == [a.name, b.name]
  assert len(_items(limit=1)) == 1


def test_induction_limit_is_spread_over_documents():
  """A long document does not use up --eval.limit; one without names gives none."""
  texts = ['No name.', (STORY + '\n\n') * 40, STORY, 'No name.', STORY * 2]
  found = [documents.Document(str(i), text) for i, text in enumerate(texts)]

  def of(limit):
    items = induction.make(iter(found), BYTES, 300, limit)
    return [item.document for item in items]

  assert of(2) == ['1', '1']  # at most two texts in memory
  assert of(6)[:4] == ['1', '2', '4', '1']
  assert sorted(of(999)) == sorted(of(0)) and len(of(5)) == 5
  texts[:] = ['No name.', STORY, 'No name.', STORY]
  found[:] = [documents.Document(str(i), text) for i, text in enumerate(texts)]
  assert of(2) == ['1', '3']  # the first two have only one item


def test_induction_texts_covers_the_held_out_split(tmp_path):
  path = runs.make_store(str(tmp_path / 'store'))
  cfg = schema.replace(schema.CommandConfig(), **{'data.store': path})
  opened = store.open_store(path)
  found = list(induction.texts(cfg, BYTES))
  assert len(found) == opened.manifest['splits']['valid']['documents'] > 3
  whole = np.concatenate([file[:] for file in opened.split('valid').tokens])
  assert ''.join(d.text for d in found) == BYTES.decode(whole)


def test_held_out_conversations_are_refused(tmp_path):
  """Their special tokens would be lost, and the user's turns scored."""
  found = [documents.Document(str(i), f'text {i}') for i in range(9)]
  store.write(
    tmp_path / 's',
    found,
    tokenizers.get('bytes'),
    valid_fraction=0.5,
    sources='jsonl:a.jsonl#messages',
  )
  c = schema.replace(schema.CommandConfig(), **{'data.store': str(tmp_path / 's')})
  with pytest.raises(fields.ConfigError, match='holds conversations; --eval.data names other'):
    list(induction.texts(c, tokenizers.get('bytes')))
  # A field that is only called like it holds texts.
  of_texts = 'jsonl:a.jsonl#messages_as_text'
  store.write(tmp_path / 't', found, tokenizers.get('bytes'), valid_fraction=0.5, sources=of_texts)
  c = schema.replace(c, **{'data.store': str(tmp_path / 't')})
  assert list(induction.texts(c, tokenizers.get('bytes')))


def test_occurrences_with_other_tokens_count_as_seen():
  """A tokenizer whose first piece of a name needs a space before it."""
  words = ' Ab', 'cd', ' x'
  text = '"Tomkin sang. An ant met Tomkin, then met Tomkin, met Tomkin.'
  vocabulary = [chr(i) for i in range(128)] + list(words)

  def encode(text):
    ids = []
    while text:
      word = next((w for w in words if text.startswith(w)), text[0])
      ids.append(vocabulary.index(word))
      text = text[len(word) :]
    return np.array(ids)

  pieces = BYTES._replace(
    vocab_size=len(vocabulary),
    bos=0,
    start=(0,),
    encode=encode,
    decode=lambda ids: ''.join(vocabulary[i] for i in ids if i),
  )
  pool = ([(128, ' Ab')], [(129, 'cd')])
  item = induction._item(
    'a', text, {'Tomkin'}, pool, tokenizer=pieces, seq_len=99, rng=random.Random(0)
  )
  assert item.name == 'Abcd' and item.before == [1, 2, 3]


def test_induction_passage_constraints():
  """Other words that start with the name are kept; the made-up name is new; a pair
  may end on the last token."""
  (a, _) = _items(STORY + 'The Tomkins met Tomkin.')
  text = BYTES.decode(a.ids)
  assert 'The Tomkins met' in text and len(a.at) == 6
  end = a.at[-1] + 1  # of the last pair, in ids
  cut = _items(STORY + 'The Tomkins met Tomkin.', seq_len=end)[0]
  assert cut.at == a.at and len(cut.ids) == end + 1
  assert len(_items(STORY + 'The Tomkins met Tomkin.', end - 1)[0].at) == 5
  there = ' '.join(x + y for x in map(chr, range(65, 91)) for y in 'abcdefghijklmnopqrstuvwxyz')
  assert not _items(STORY + there, seq_len=9999)


def test_passages_without_names_give_no_items():
  assert not _items(STORY.replace('Tomkin', 'King'))  # king is a word
  assert not _items('The fox met Ann once. ' * 2)  # only two occurrences
  assert not _items(seq_len=40)  # truncated before the third


def test_induction_scores_of_perfect_and_random_models(monkeypatch):
  """A model that copies the last continuation fails only at first occurrences."""
  items = _items() * 20

  def predicted(item, p):
    before = [q for q in item.at if q < p]
    return item.ids[before[-1] + 1] if before else 0

  found = induction.score(
    [
      induction.Second(n, predicted(i, p) == i.ids[p + 1], 0.0)
      for i in items
      for n, p in zip(i.before, i.at, strict=True)
    ]
  )
  assert found['accuracy'] == 1 and found['first_occurrence'] == 0
  assert found['accuracy_1'] == found['accuracy_2'] == found['accuracy_4'] == 1
  rng = np.random.default_rng(0)
  chance = induction.score(
    [induction.Second(n, bool(rng.random() < 1 / 26), 0.0) for n in range(6) for _ in range(400)]
  )
  for name in ('accuracy', 'first_occurrence', 'accuracy_1', 'accuracy_4'):
    assert chance[f'{name}_low'] < 1 / 26 < chance[f'{name}_high']


def test_induction_scores_the_predicted_position(monkeypatch):
  """A model that predicts the next token at each position is always right."""

  def of_rows(model, rows, mesh, cfg, n_active, batch_size):
    after = [np.array([[*row[1:], 0]]) for row in rows]
    nats = [np.arange(1.0, len(row) + 1)[None] for row in rows]
    return [scores.Scores(y, None, None, x, None) for x, y in zip(after, nats, strict=True)]

  monkeypatch.setattr(scores, 'of_rows', of_rows)
  monkeypatch.setattr(
    induction, 'texts', lambda *_: [documents.Document('a', STORY), documents.Document('b', STORY)]
  )
  cfg = schema.replace(schema.CommandConfig(), **{'data.seq_len': 300})
  model = subject.Subject('knows', cfg, None, None, BYTES, 1, None)
  found = induction.run(model, '')
  assert found.scalars['accuracy'] == found.scalars['first_occurrence'] == 1
  assert [item['right'] for item in found.items] == [[True] * 5] * 2
  # Nats of position p were p + 1.
  first, later = zip(*((i.at[0], i.at[1:]) for i in _items()), strict=True)
  assert found.scalars['first_nats'] == np.mean(first) + 1
  assert found.scalars['nats'] == np.mean(later) + 1


def test_induction_scores_on_known_values():
  right = [False, True, False, True, False, True, True]
  nats = [4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 3.0]
  found = induction.score([induction.Second(n, right[n], nats[n]) for n in range(len(right))])
  assert found['accuracy'] == 4 / 6 and found['accuracy_1'] == 1
  assert found['accuracy_2'] == 0.5 and found['accuracy_4'] == 2 / 3
  assert found['nats'] == 1.5 and found['first_nats'] == 4
  none = induction.score([])
  assert math.isnan(none['nats']) and math.isnan(none['first_nats'])


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('induction')
  text = folder / 'story.jsonl'
  text.write_text(''.join(json.dumps(dict(text=f'{i} {STORY}')) + '\n' for i in range(40)))
  store = str(folder / 'store')
  assert not main.main(
    [
      'prepare',
      f'--data.store={store}',
      f'--data.documents=jsonl:{text}',
      '--data.valid_fraction=0.3',
    ]
  )
  workdir = folder / 'run'
  assert not runs.train(
    store,
    workdir,
    heads__family='linear',
    data__seq_len=256,
    eval__tasks='induction,choice_points',
    train__steps=2,
    eval__limit=6,
    optim__warmup_steps=1,
  )
  return text, workdir


def _eval(workdir, *args):
  return main.main(['eval', f'{workdir}', '--mesh.fsdp=-1', '--train.compilation_cache=', *args])


def test_induction_in_training_and_mtp_eval(run, tmp_path, capsys):
  """On held-out documents of the store, and on those of --eval.data."""
  text, workdir = run
  (record,) = [r for r in metrics.read(str(workdir)) if r.get('source') == 'induction']
  assert record['kind'] == 'suite'
  page = workdir / 'evals' / '2' / 'choice_points.html'
  assert page.exists()  # of the run itself
  page.unlink()
  out = tmp_path / 'out.json'
  assert not _eval(workdir, '--eval.tasks=induction', f'--out={out}')
  found = json.loads(out.read_text())['suites']['induction']
  assert found['accuracy'] == record['accuracy'] and len(found['items']) == 6
  assert not _eval(
    workdir, '--eval.tasks=induction', f'--eval.data=jsonl:{text}', '--eval.limit=0', f'--out={out}'
  )
  found = json.loads(out.read_text())['suites']['induction']
  both = '--eval.tasks=choice_points,induction'
  assert not _eval(workdir, both, f'--out={out}')
  suites = json.loads(out.read_text())['suites']
  assert [*suites] == ['choice_points', 'induction']
  assert suites['induction']['accuracy'] == record['accuracy']
  assert 30 < len(found['items']) <= 40  # a made-up name may occur in the text
  capsys.readouterr()
  missing = f'--eval.data=jsonl:{tmp_path}/none.jsonl'
  assert _eval(workdir, '--eval.tasks=induction', missing) == 2
  assert 'no such file' in capsys.readouterr().err
  few = tmp_path / 'few.txt'
  few.write_text('nothing here')
  assert _eval(workdir, '--eval.tasks=induction', f'--eval.data=text:{few}') == 2
  error = capsys.readouterr().err
  assert error.startswith('mtp: --eval.data=') and 'no name that occurs' in error
  few.write_text('')
  assert _eval(workdir, '--eval.tasks=choice_points', f'--eval.data=text:{few}') == 2
  assert 'contains no text' in capsys.readouterr().err


def test_choice_points_page_contents(run, capsys):
  _, workdir = run
  capsys.readouterr()
  assert not _eval(workdir, '--eval.tasks=choice_points', '--eval.limit=2')
  page = workdir / 'evals' / '2' / 'choice_points.html'
  assert f'page: {page}' in capsys.readouterr().out
  text = page.read_text()
  assert text.count('<h2>') == 2 and 'http' not in text
  n_tokens = text.count('<span class="t')
  assert n_tokens > 2 * len(STORY)
  assert text.count('<i style') == 5 + 2 * n_tokens  # the key, two heads


def test_by_token_aligns_nats_with_tokens():
  K, T = 2, 4
  nats = np.arange(K * T, dtype=float).reshape(K, T)
  valid = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
  found = scores.Scores(nats, None, None, None, valid)
  from mtp_jax.evals import choice_points

  got = choice_points.by_token(found, 5, (1, 2))
  np.testing.assert_array_equal(got, [[np.nan, 0, 1, 2, 3], [np.nan, np.nan, 4, 5, 6]])
  # A strided head predicts a token from its offset before it.
  far = choice_points.by_token(found, 6, (1, 3))
  np.testing.assert_array_equal(far[1], [np.nan] * 3 + [4, 5, 6])
  x = np.array([[0.1, 0.1, 1.0, np.nan], [5.0, 0.1, 5.0, np.nan]])
  assert choice_points.choices(x).tolist() == [True, False, False, False]
  assert not choice_points.choices(x[:1]).any()


def test_choice_points_on_known_values(monkeypatch, tmp_path):
  """Two heads, one of them strided; head 2 predicts nothing of the second text."""
  from mtp_jax.evals import choice_points

  text = tmp_path / 'text.jsonl'
  text.write_text('{"text": "abcd"}\n{"text": "a"}\n')
  nats = np.array([[0.1, 0.2, 0.3, 0.4, 9.0], [0.5, 5.0, 9.0, 9.0, 9.0]])
  valid = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)
  long = scores.Scores(nats, None, None, None, valid)
  one = np.zeros_like(valid)
  one[0, 0] = True
  short = long._replace(valid=one)
  monkeypatch.setattr(scores, 'of_rows', lambda *_, **__: [long, short])
  cfg = schema.replace(
    schema.CommandConfig(),
    **{'heads.n': 2, 'heads.stride': 2, 'eval.data': f'jsonl:{text}#text', 'data.seq_len': 16},
  )
  tiny_subject = subject.Subject('tiny', cfg, None, None, BYTES, 1, None)
  found = choice_points.run(tiny_subject, '')
  # Head 2 predicts tokens 3 and 4 from 0 and 1; of these, 4 is a choice point.
  assert found.scalars == pytest.approx(dict(nats_1=1.1 / 5, nats_2=5.5 / 2, choice_points=1 / 2))
  assert 'of 2 that heads 1 and 2 predict' in found.lines[0]
  monkeypatch.setattr(scores, 'of_rows', lambda *_, **__: [short, short])
  text.write_text('{"text": "b"}\n{"text": "a"}\n')
  found = choice_points.run(tiny_subject, '')
  # No token that both heads predict: the fraction is NaN.
  assert found.scalars.pop('nats_1') == 0.1
  assert [*found.scalars] == ['choice_points']
  assert math.isnan(found.scalars['choice_points'])
  assert 'predict, choice points -: ' in found.lines[0]


def test_choice_points_page_in_a_browser(run):
  _, workdir = run
  assert not _eval(workdir, '--eval.tasks=choice_points', '--eval.limit=2')
  with browser.page() as shown:
    for dark in (False, True):
      shown.look(360, dark)
      shown.open(workdir / 'evals' / '2' / 'choice_points.html')
      assert shown.run('return document.documentElement.scrollWidth') <= 360
      assert shown.run(browser.FAULTS) == []
      (url,) = shown.asked_for()
      assert url.endswith('choice_points.html') and not shown.log('browser')
