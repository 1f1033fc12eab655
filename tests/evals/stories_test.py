"""The stories suite: which occurrences are scored, and in which group."""

import collections
import itertools
import json
import math
import re

import numpy as np
import pytest

from mtp_jax.cli import main
from mtp_jax.config import fields, schema
from mtp_jax.data import tasks, tokenizers
from mtp_jax.evals import intervals, scores, stories, subject
from mtp_jax.train import metrics
from tests.support import runs

TASK = tasks.named('stories')
TOKENIZER = tokenizers.get('task:stories')
SYLLABLES = stories.syllables(TOKENIZER, TASK.params)

STORIES = (
  'Balbam met Delbam. Balbam gave the lamp to Delbam.',
  # Two share the first syllable; the third has the second one of another.
  'Balbam saw Baldem. then Baldem, Balbam and Deldem sat. Balbam was happy. Deldem was not.',
  'the garden was quiet. it was a small day.',
  'Balbam, Balbam, Balbam, Balbam, Balbam, Balbam.',
)


def _by_hand(text):
  """(index of the first token, earlier occurrences, distance, decided) of each name, by
  its place among the words."""
  words = re.findall(r'[A-Za-z]+|[.,]', text)
  tokens = []  # (word, part)
  for word in words:
    # Words that are no token of the task are bytes.
    n = 2 if word[0].isupper() else len(TOKENIZER.encode(word)) - (word in '.,')
    tokens += [(word, part) for part in range(max(n, 1))]
  names = {word for word in words if word[0].isupper()}
  found, seen = [], collections.defaultdict(list)
  for at, (word, part) in enumerate(tokens):
    if word in names and part == 0:
      alone = [name for name in names if name[:3] == word[:3]] == [word]
      before = seen[word]
      found.append((at, len(before), at - before[-1] if before else 0, alone))
      before.append(at)
  return found


@pytest.mark.parametrize(
  'text', [*STORIES, *(tasks.item(TASK, 'test', i).answer for i in range(5))]
)
def test_mentions_equal_brute_force(text):
  ids = TOKENIZER.encode(text)
  assert [tuple(m) for m in stories.mentions(ids, *SYLLABLES)] == _by_hand(text)


def test_mentions_on_known_values():
  ids = TOKENIZER.encode(STORIES[0])  # ▁Bal bam ▁met ▁Del bam . ▁Bal bam ▁gave ▁the ▁lamp ▁to …
  assert [tuple(m) for m in stories.mentions(ids, *SYLLABLES)] == [
    (0, 0, 0, True),
    (3, 0, 0, True),
    (6, 1, 6, True),
    (12, 1, 9, True),
  ]


def _subject(of_rows, monkeypatch, **changes):
  monkeypatch.setattr(scores, 'of_rows', of_rows)
  values = {'data.seq_len': 128, 'eval.limit': 50} | changes
  cfg = schema.replace(schema.CommandConfig(), **values)
  return subject.Subject('of a test', cfg, None, None, TOKENIZER, 1, None)


def _induction(model, rows, mesh, cfg, *, n_active, batch_size):
  """A model that copies: after the first token of a name, what followed that token when
  it last occurred; at its first occurrence the token 0."""
  found = []
  for row in rows:
    after, argmax = {}, []
    for token, following in itertools.pairwise(row):
      argmax.append(after.get(token, 0))
      after[token] = following
    nats = np.array(argmax) == 0
    found.append(scores.Scores(nats[None] * 1.0, None, None, np.array(argmax)[None], None))
  return found


def test_a_model_that_copies_is_right_where_the_first_token_decides(monkeypatch):
  found = stories.run(_subject(_induction, monkeypatch), 'characters=6/firsts=8').scalars
  assert found['accuracy_decided'] == 1 and found['nats_decided'] == 0
  assert found['accuracy_first'] == 0
  assert 0.5 < found['accuracy'] < 1  # some share the first syllable
  assert found['accuracy_low'] < found['accuracy'] < found['accuracy_high']


def test_the_position_of_the_first_token_is_scored(monkeypatch):
  """Nats of position p are p: which positions are scored shows in their mean."""

  def of_rows(model, rows, mesh, cfg, *, n_active, batch_size):
    return [
      scores.Scores(np.arange(len(row) - 1)[None] * 1.0, None, None, row[None, 1:], None)
      for row in rows
    ]

  found = stories.run(_subject(of_rows, monkeypatch, **{'eval.limit': 20}), '').scalars
  # Rows start with BOS.
  by_hand = [_by_hand(item.answer) for item in tasks.tests(TASK, 20)]
  later = [1 + at for story in by_hand for at, before, _, _ in story if before]
  first = [1 + at for story in by_hand for at, before, _, _ in story if not before]
  assert found['nats'] == pytest.approx(np.mean(later))
  assert found['nats_first'] == pytest.approx(np.mean(first))
  assert found['accuracy'] == found['accuracy_first'] == 1
  lengths = [len(TOKENIZER.encode(item.answer)) for item in tasks.tests(TASK, 20)]
  every = sum(n * (n - 1) / 2 for n in lengths)
  names = sum(1 + at for story in by_hand for at, *_ in story)
  others = sum(lengths) - sum(map(len, by_hand))
  assert found['nats_other'] == pytest.approx((every - names) / others)
  assert found['nats_other_low'] < found['nats_other'] < found['nats_other_high']
  far = [1 + at for story in by_hand for at, before, distance, _ in story if distance >= 32]
  both = [found[f'nats_distance_{low}'] for low in (32, 64)]
  assert min(both) <= np.mean(far) <= max(both)


def test_scores_on_known_values():
  def second(before, distance, decided, right, nats):
    return stories.Second(stories.Mention(0, before, distance, decided), right, nats)

  found = stories.score(
    [
      [second(0, 0, True, False, 4.0), second(1, 15, True, True, 1.0)],
      [
        second(1, 16, False, False, 3.0),
        second(2, 40, True, True, 0.5),
        second(4, 64, True, True, 0.5),
      ],
      [],
    ]
  )
  assert found['accuracy'] == 3 / 4 and found['nats'] == 5 / 4
  assert (found['accuracy_first'], found['nats_first']) == (0, 4)
  assert (found['accuracy_decided'], found['nats_decided']) == (1, 2 / 3)
  assert [found[f'accuracy_seen_{n}'] for n in stories.BEFORE] == [0.5, 1, 1]
  assert [found[f'nats_distance_{n}'] for n in stories.DISTANCES] == [1, 3, 0.5, 0.5]
  assert math.isnan(stories.score([[], []])['accuracy'])


def test_bootstrap_interval_equals_that_of_the_normal_distribution():
  rng = np.random.default_rng(1)
  counts = np.full(400, 5)
  sums = rng.binomial(5, 0.7, size=400)
  found = intervals.bootstrap('x', sums, counts)
  half = intervals.Z95 * np.std(sums / 5) / 20
  assert found['x'] == sums.sum() / 2000
  assert found['x_low'] == pytest.approx(found['x'] - half, abs=half / 10)
  assert found['x_high'] == pytest.approx(found['x'] + half, abs=half / 10)


def test_bootstrap_resamples_whole_groups():
  """Ten equal items in a group are worth one: the interval is wider than that of items."""
  rng = np.random.default_rng(2)
  right = rng.random(100) < 0.5
  grouped = intervals.bootstrap('x', 10 * right, np.full(100, 10))
  alone = intervals.bootstrap('x', right, np.ones(100))
  assert grouped == pytest.approx(alone)
  assert grouped['x_high'] - grouped['x_low'] > 0.15
  assert math.isnan(intervals.bootstrap('x', [0, 0], [0, 0])['x_low'])


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('stories')
  store = str(folder / 'store')
  args = ['--data.documents=task:stories/items=300', '--data.tokenizer=task:stories']
  assert not main.main(['prepare', f'--data.store={store}', *args])
  assert not runs.train(
    store,
    folder / 'run',
    heads__family='linear',
    model__vocab_size=413,
    data__seq_len=64,
    eval__tasks='stories',
    train__steps=1,
    eval__limit=40,
    optim__warmup_steps=0,
    optim__lr=1e-9,
  )
  return folder / 'run'


def test_an_untrained_model_is_at_chance_at_all_occurrences(run, tmp_path, capsys):
  """In training and in mtp eval alike; a long story is cut at the context."""
  (record,) = [r for r in metrics.read(str(run)) if r.get('source') == 'stories']
  assert record['accuracy_first'] < 0.05 and record['accuracy'] < 0.05
  # Logits of variance 1 have a log-sum-exp of about ln V + 1/2.
  assert record['nats_first'] == pytest.approx(np.log(413) + 0.5, abs=0.3)
  assert record['nats'] == pytest.approx(record['nats_first'], abs=0.2)
  capsys.readouterr()
  out = tmp_path / 'out.json'
  args = ['--eval.tasks=stories', '--train.compilation_cache=', '--mesh.fsdp=-1', f'--out={out}']
  assert not main.main(['eval', str(run), *args])
  assert 'stories are longer than --data.seq_len=64, and cut' in capsys.readouterr().out
  found = json.loads(out.read_text())['suites']['stories']
  assert found['accuracy'] == record['accuracy'] and found['nats'] == record['nats']
  assert len(found['items']) == 40
  assert main.main(['eval', str(run), *args, '--eval.tasks=stories:firsts=100']) == 2
  assert 'tokens under sentencepiece' in capsys.readouterr().err


def test_a_tokenizer_of_other_names_is_refused():
  with pytest.raises(fields.ConfigError, match='the name Balbam has 6 tokens under bytes, not 2'):
    stories.syllables(tokenizers.get('bytes'), TASK.params)
