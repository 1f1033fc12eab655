"""Simple stories in which names matter, and a tokenizer in which every name is two
tokens. Standard library; sentencepiece is imported in the function that needs it.

After the first token of a name that occurred before, the second one can be copied from
the earlier occurrence (induction: Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737,
section 4.1). Names are drawn anew for each story, so that nothing else predicts it.
"""

import itertools
import random

TEMPLATES = (
  '{a} went to the {place}.',
  '{a} found a {adjective} {thing} in the {place}.',
  '{a} gave the {thing} to {b}.',
  '{a} asked {b} about the {thing}.',
  'in the {place} {a} met {b}.',
  '{a} was {adjective} all day.',
  'the {thing} belonged to {a}.',
  'then {a} walked home with the {thing}.',
  '{b} and {a} sat near the {place}.',
  'the {adjective} {thing} fell, and {a} laughed.',
  '{a} lost the {thing} near the {place}.',
  'everyone at the {place} knew {a}.',
  'the {place} was {adjective} and quiet.',
  'nobody saw the {thing} in the {place}.',
  'it was a {adjective} day.',
)
CHOICES = {
  'place': 'garden valley market school forest village harbour kitchen tower library'
  ' cellar orchard'.split(),
  'thing': 'lamp basket letter stone apple coat drum kite ladder mirror rope spoon'
  ' wheel whistle boat book'.split(),
  'adjective': 'small tall bright heavy quick strange green warm broken tiny round happy'.split(),
}
PUNCTUATION = '.,'
CONSONANTS, VOWELS = 'bdfgklmnprstvz', 'aeiou'
FIRSTS = [
  c.upper() + v + end for end, v, c in itertools.product('lnr', VOWELS, CONSONANTS)
]  # no other word starts with a capital
SECONDS = [c + v + end for end, v, c in itertools.product('msk', VOWELS, CONSONANTS)]

DEFAULTS = dict(characters=3, firsts=40, seconds=40, min_sentences=7, max_sentences=12, distance=0)


def check(params: dict) -> str:
  """Returns why the parameters are invalid; '' if they are not."""
  for name, of in (('firsts', FIRSTS), ('seconds', SECONDS)):
    if not 2 <= params[name] <= len(of):
      return f'{name} from 2 to {len(of)}'
  if not 1 <= params['characters'] <= params['firsts'] * params['seconds']:
    return 'characters from 1 to firsts x seconds'
  if not 1 <= params['min_sentences'] <= params['max_sentences']:
    return 'min_sentences from 1 to max_sentences'
  return ''


def story(rng: random.Random, params: dict) -> str:
  """Makes a story of min_sentences to max_sentences sentences.

  Each mentions up to two of the characters. Names are different, and a pair of
  syllables that is uniform among all. Two occurrences of a name are at least `distance`
  tokens apart, counted from the start of the later one's sentence.
  """
  names = set()
  while len(names) < params['characters']:
    first = FIRSTS[rng.randrange(params['firsts'])]
    names.add(first + SECONDS[rng.randrange(params['seconds'])])
  last: dict[str, int | None] = dict.fromkeys(sorted(names))  # token of the last occurrence
  sentences, n_tokens = [], 0
  for _ in range(rng.randint(params['min_sentences'], params['max_sentences'])):
    free = [name for name, at in last.items() if at is None or n_tokens - at >= params['distance']]
    fit = [t for t in TEMPLATES if t.count('{a}') + t.count('{b}') <= len(free)]
    template = rng.choice(fit)
    who = dict(zip('ab', rng.sample(free, len(free)), strict=False))
    what = {name: rng.choice(words) for name, words in CHOICES.items()}
    text = template.format(**who, **what)
    for word in text.split():
      bare = word.rstrip(PUNCTUATION)
      if bare in last:
        last[bare] = n_tokens
      n_tokens += 1 + (bare in last) + len(word) - len(bare)
    sentences.append(text)
  return ' '.join(sentences)


def words() -> list[str]:
  """Returns all words of stories except names, without punctuation."""
  fixed = ' '.join(TEMPLATES).translate({ord(mark): None for mark in PUNCTUATION}).split()
  found = {word for word in fixed if not word.startswith('{')}
  return sorted(found.union(*CHOICES.values()))


def sentencepiece_model(params: dict) -> bytes:
  """Returns a SentencePiece model of whole words and syllables: a word is one token, a
  name is two, and no other word holds these. Any other text is bytes.

  Raises:
    ImportError: protobuf is not installed.
  """
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
  kinds = proto.SentencePiece
  for piece, kind in (('<unk>', kinds.UNKNOWN), ('<s>', kinds.CONTROL), ('</s>', kinds.CONTROL)):
    proto.pieces.add(piece=piece, score=0.0, type=kind)
  for byte in range(256):
    proto.pieces.add(piece=f'<0x{byte:02X}>', score=0.0, type=kinds.BYTE)
  spaced = [f'\u2581{word}' for word in ['', *words(), *FIRSTS[: params['firsts']]]]
  for piece in [*PUNCTUATION, *spaced, *SECONDS[: params['seconds']]]:
    proto.pieces.add(piece=piece, score=-1.0, type=kinds.NORMAL)
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  trainer.model_type = trainer.UNIGRAM
  trainer.byte_fallback = True
  trainer.vocab_size = len(proto.pieces)
  normalizer.name = 'identity'
  normalizer.add_dummy_prefix = True
  normalizer.remove_extra_whitespaces = False
  normalizer.escape_whitespaces = True
  return proto.SerializeToString(deterministic=True)
