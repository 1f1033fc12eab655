"""Stories of names of two tokens, and their tokenizer."""

import collections
import itertools
import random
import re

import pytest

from mtp_jax.cli import main
from mtp_jax.config import fields
from mtp_jax.data import readers, store, stories, tasks, tokenizers

TASK = tasks.named('stories')
TOKENIZER = tokenizers.get('task:stories')
NAME = re.compile('[A-Z][a-z]{2}[a-z]{3}')
FIRST = (
  'everyone at the library knew Filbim. Filbim went to the school. the cellar was broken and'
  ' quiet. the wheel belonged to Gelpim. the school was broken and quiet. it was a happy day.'
  ' Gelpim and Filbim sat near the garden. it was a green day. Filbim asked Valnim about the'
  ' mirror. then Valnim walked home with the mirror. then Gelpim walked home with the drum.'
)


def _texts(task, n=200, part='train'):
  return [tasks.item(task, part, i).answer for i in range(n)]


def _words(text):
  return re.findall(r'[A-Za-z]+|[.,]', text)


def test_a_story_is_reproducible():
  assert tasks.item(TASK, 'test', 0).answer == FIRST
  shape = 'stories/characters=3/firsts=40/seconds=40/min_sentences=7/max_sentences=12/distance=0'
  assert str(TASK) == shape
  assert tasks.item(tasks.named(shape), 'test', 0).answer == FIRST
  assert tasks.item(TASK, 'train', 0).answer != FIRST


@pytest.mark.parametrize('name', ['stories', 'stories/firsts=7/seconds=9/characters=6'])
def test_names_are_two_tokens_that_no_other_word_has(name):
  task = tasks.named(name)
  tokenizer = tokenizers.get(f'task:{name}')
  of_names, of_words = set(), set()
  for text in _texts(task):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    words = _words(text)
    n_names = sum(bool(NAME.fullmatch(word)) for word in words)
    assert len(ids) == len(words) + n_names
    for word in words:
      # As after a space; the marks follow a word.
      tokens = tokenizer.encode(word)[-1:] if word in '.,' else tokenizer.encode(word)
      assert len(tokens) == 1 + bool(NAME.fullmatch(word)), word
      (of_names if NAME.fullmatch(word) else of_words).update(tokens.tolist())
  assert not of_names & of_words
  assert len(of_names) == task.params['firsts'] + task.params['seconds']
  assert max(of_names | of_words) < tokenizer.vocab_size


def test_other_text_is_encoded_without_loss():
  for text in ('Héllo, world', 'the  cat\nBad', 'Plan'):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_story_follows_its_parameters():
  task = tasks.named('stories/characters=5/min_sentences=4/max_sentences=6')
  lengths, syllables = collections.Counter(), collections.Counter()
  for text in _texts(task, 400):
    lengths[text.count('.')] += 1
    names = set(NAME.findall(text))
    assert len(names) <= 5
    syllables.update(name[:3] for name in names)
  assert set(lengths) == {4, 5, 6} and min(lengths.values()) > 90
  assert len(syllables) == 40 and max(syllables.values()) < 3 * min(syllables.values())


def test_names_are_drawn_anew_for_each_story():
  names = [frozenset(NAME.findall(text)) for text in _texts(TASK, 300)]
  assert len(set(names)) > 290
  counts = collections.Counter(name for of_story in names for name in of_story)
  assert max(counts.values()) < 8  # of 1,600 names, some 870 times


@pytest.mark.parametrize('distance', [20, 60])
def test_occurrences_are_a_distance_apart(distance):
  task = tasks.named(f'stories/distance={distance}/min_sentences=14/max_sentences=16')
  apart = []
  for text in _texts(task, 100):
    at, n_tokens = collections.defaultdict(list), 0
    for word in _words(text):
      is_name = bool(NAME.fullmatch(word))
      if is_name:
        at[word].append(n_tokens)
      n_tokens += 1 + is_name
    apart += [b - a for of_name in at.values() for a, b in itertools.pairwise(of_name)]
  assert len(apart) > 50 and min(apart) >= distance


def test_stories_become_a_store_without_a_loss_mask(tmp_path):
  found = list(readers.read('task:stories/items=40'))
  assert len(found) == 40 and not any(document.loss_spans for document in found)
  path = str(tmp_path / 'store')
  args = ['--data.documents=task:stories/items=40', '--data.tokenizer=task:stories']
  assert main.main(['prepare', f'--data.store={path}', *args, '--data.valid_fraction=0.2']) == 0
  opened = store.open_store(path)
  tokenizer = store.tokenizer_of(opened)
  assert tokenizer.fingerprint == TOKENIZER.fingerprint
  texts = [tokenizer.decode(ids) for split in opened.splits.values() for ids in split.documents()]
  assert sorted(texts) == sorted(document.text for document in found)
  assert not opened.split('train').masked


def test_test_stories_are_not_among_the_training_stories(monkeypatch):
  monkeypatch.setattr(tasks, 'N_TESTS', 200)
  small = 'stories/characters=1/firsts=2/seconds=2/min_sentences=1/max_sentences=1'
  task = tasks.named(small)
  kept = {item.answer for _, item in tasks.train(task, 2000)}
  held_out = {item.answer for item in tasks.tests(task, 200)}
  assert kept and not kept & held_out


@pytest.mark.parametrize(
  'name, problem',
  [
    ('stories/firsts=1', 'firsts from 2 to 210'),
    ('stories/seconds=999', 'seconds from 2 to 210'),
    ('stories/characters=0', 'characters from 1'),
    ('stories/characters=5/firsts=2/seconds=2', 'characters from 1 to firsts x seconds'),
    ('stories/min_sentences=3/max_sentences=2', 'min_sentences from 1 to max_sentences'),
  ],
)
def test_bad_parameters_raise(name, problem):
  with pytest.raises(ValueError, match=problem):
    tasks.named(name)
  with pytest.raises(fields.ConfigError, match=problem):
    tokenizers.get(f'task:{name}')


def test_tokenizer_of_another_task_raises():
  with pytest.raises(fields.ConfigError, match='the only task with a tokenizer is stories'):
    tokenizers.get('task:star_graph')


def test_syllables_are_different():
  assert len({*stories.FIRSTS}) == len({*stories.SECONDS}) == 210
  assert not {*stories.SECONDS} & {*stories.words()}
  rng = random.Random(0)
  assert NAME.fullmatch(rng.choice(stories.FIRSTS) + rng.choice(stories.SECONDS))
