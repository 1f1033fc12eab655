"""The corpus of a run: the mixture of --data.store, and --eval.stores.

All stores share one tokenizer, which is loaded from them, so that the original
tokenizer file is not needed. A store has a name, by default its directory's.
"""

import hashlib
import json
import math
import re
from typing import NamedTuple

import numpy as np

from mtp_jax.config import fields, parse, schema
from mtp_jax.data import store as store_lib
from mtp_jax.data import tokenizers, windows

COUNTED, BLOCK = 2**28, 2**22  # tokens
RECORDED = re.compile(r'\w+#([0-9a-f]{12})')


class Source(NamedTuple):
  """One store and its entry in the flag."""

  ref: parse.StoreRef
  store: store_lib.Store


class Corpus(NamedTuple):
  """Verified stores and their common tokenizer."""

  sources: tuple[Source, ...]
  further: tuple[Source, ...]  # for evaluation only
  tokenizer: tokenizers.Tokenizer

  @property
  def fingerprint(self) -> str:
    """Fingerprint of what determines the rows of a step besides the seed: stores, weights."""
    shas = [source.store.manifest['sha256'] for source in self.sources]
    if len(shas) == 1:
      return shas[0]
    parts = list(zip(shas, self._weights(), strict=True))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  @property
  def fingerprint_of_all(self) -> str:
    """Fingerprints of all stores, also `further`, which all processes must share."""
    shas = [source.store.manifest['sha256'] for source in self.further]
    return ' '.join([self.fingerprint, *shas])

  @property
  def recorded(self) -> str:
    """--data.tokenizer as a run records it, KIND#FINGERPRINT, independent of
    paths. A run is resumed, and a checkpoint evaluated, with no other."""
    return tokenizers.recorded_name(self.tokenizer)

  def frequency(self, vocab_size: int) -> np.ndarray:
    """Returns each token's share of what is trained on, (V,) float64, by the mixture's
    weights: of the first COUNTED tokens of each store."""
    share_V = np.zeros(vocab_size)
    for split, weight in zip(self.train().splits, self._weights(), strict=True):
      count_V, left = np.zeros(vocab_size, np.int64), COUNTED
      for tokens in split.tokens:
        for first in range(0, min(tokens.size, left), BLOCK):
          block = tokens[first : min(first + BLOCK, left, tokens.size)]
          count_V += np.bincount(block, minlength=vocab_size)
        left -= min(tokens.size, left)
      share_V += weight * count_V / max(count_V.sum(), 1)
    return share_V / share_V.sum()

  def train(self) -> windows.Mixture:
    splits = {source.ref.name: source.store.split('train') for source in self.sources}
    return windows.Mixture(tuple(_with_store_names(splits).values()), self._weights())

  def held_out(self, split: str) -> dict[str, windows.Split]:
    """Returns the named split of each store that has one; of a store in `further`
    without it, its train split."""
    found = {
      source.ref.name: source.store.splits[split]
      for source in self.sources
      if split in source.store.splits
    }
    for source in self.further:
      name = split if split in source.store.splits else 'train'
      found[source.ref.name] = source.store.split(name)
    return _with_store_names(found)

  def evaluates_itself_only(self, held_out: dict) -> bool:
    """Whether the only evaluation set is that of the only training store: its
    metrics need no name."""
    return len(held_out) == 1 and not self.further

  def _weights(self) -> tuple[int, ...]:
    """Returns the smallest integers in the ratios of the weights."""
    shares = [source.ref.share for source in self.sources]
    over = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * over) for share in shares]
    return tuple(weight // math.gcd(*whole) for weight in whole)


def _with_store_names(splits: dict) -> dict[str, windows.Split]:
  """Prefixes the names of splits, as errors show them, with that of the store."""
  if len(splits) == 1:
    return splits
  return {name: split._replace(name=f'{name} {split.name}') for name, split in splits.items()}


def open_corpus(cfg: schema.Config) -> Corpus:
  """Opens the stores of a Config; raises ConfigError if one is corrupt, or if
  their tokenizers differ from each other or from --data.tokenizer."""
  sources, further = (_open(cfg, flag) for flag in ('data.store', 'eval.stores'))
  first = sources[0].store
  made = first.manifest['tokenizer']
  for flag, group in (('data.store', sources), ('eval.stores', further)):
    for source in group:
      other = source.store.manifest['tokenizer']
      if other['fingerprint'] != made['fingerprint']:
        raise fields.ConfigError(
          flag,
          schema.get(cfg, flag),
          f'{first.path} was made with the tokenizer {made["name"]},'
          f' {source.store.path} with {other["name"]}, which differs',
        )
  _check_given(cfg.data.tokenizer, first)
  if cfg.loss.reads_stored_teacher:
    _check_teachers(cfg, [source.store for source in (*sources, *further)])
  return Corpus(sources, further, store_lib.tokenizer_of(first))


def _open(cfg: schema.Config, flag: str) -> tuple[Source, ...]:
  try:
    return tuple(
      Source(
        ref,
        store_lib.open_store(
          ref.path, verify=cfg.data.verify, teacher=cfg.loss.reads_stored_teacher
        ),
      )
      for ref in parse.parse_stores(schema.get(cfg, flag))
    )
  except fields.ConfigError as error:  # open_store names --data.store in any case
    raise fields.ConfigError(flag, *error.args[1:]) from error


def _check_teachers(cfg: schema.Config, stores: list[store_lib.Store]) -> None:
  """Raises unless the stored teachers have the model's vocabulary, equally many tokens, and no
  fewer than --loss.top_k keeps."""

  def need(ok, problem):
    if not ok:
      raise fields.ConfigError('loss.teacher', 'store', problem)

  first = stores[0].manifest['teacher']['top_k']
  for store in stores:
    of = store.manifest['teacher']
    need(
      of['vocab_size'] == cfg.model.vocab_size,
      f'the teacher of {store.path} has --model.vocab_size={of["vocab_size"]}, the run'
      f' {cfg.model.vocab_size}',
    )
    need(
      of['top_k'] == first,
      f'{store.path} has {of["top_k"]} tokens per position, {stores[0].path} {first}',
    )
    need(
      cfg.loss.top_k <= of['top_k'],
      f'{store.path} has {of["top_k"]} tokens per position, fewer than --loss.top_k='
      f'{cfg.loss.top_k}',
    )


def _check_given(given: str, store: store_lib.Store) -> None:
  """Raises unless --data.tokenizer, if set, equals the store's, in name or content."""
  made = store.manifest['tokenizer']
  if given in ('', made['name']):
    return
  recorded = RECORDED.fullmatch(given)
  if recorded:
    same = made['fingerprint'].startswith(recorded[1])
  elif given.startswith('train:'):
    same = False
  else:
    same = tokenizers.get(given).fingerprint == made['fingerprint']
  if not same:
    raise fields.ConfigError(
      'data.tokenizer',
      given,
      f'the store {store.path} was made with a different one, {made["name"]} with'
      f' fingerprint {made["fingerprint"][:12]}; omit the flag to use it',
    )
