"""What a run reads: the stores of --data.store, mixed, and of --eval.stores.

Floor 2. All have one tokenizer, and it comes from them: nobody needs the file
that it was made of. A store is known by a name, its directory's unless given.
"""

import hashlib
import json
import math
import re
from typing import NamedTuple

from mtp_jax.config import fields, parse, schema
from mtp_jax.data import store as store_lib
from mtp_jax.data import tokenizers, windows

RECORDED = re.compile(r'\w+#([0-9a-f]{12})')


class Source(NamedTuple):
  """One store, and what a flag says of it."""

  ref: parse.StoreRef
  store: store_lib.Store


class Corpus(NamedTuple):
  """Checked stores and the tokenizer that made them all."""

  sources: tuple[Source, ...]
  further: tuple[Source, ...]  # evaluated, not trained on
  tokenizer: tokenizers.Tokenizer

  @property
  def fingerprint(self) -> str:
    """Of all that decides the rows of a step, but the seed: stores, weights."""
    shas = [source.store.manifest['sha256'] for source in self.sources]
    if len(shas) == 1:
      return shas[0]
    parts = list(zip(shas, self._weights(), strict=True))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  @property
  def fingerprint_of_all(self) -> str:
    """Of the further stores as well: what processes must agree on."""
    shas = [source.store.manifest['sha256'] for source in self.further]
    return ' '.join([self.fingerprint, *shas])

  @property
  def recorded(self) -> str:
    """--data.tokenizer of a run, KIND#FINGERPRINT: what it is, wherever it came
    from. A run goes on, and a checkpoint is evaluated, with no other."""
    return tokenizers.recorded_name(self.tokenizer)

  def train(self) -> windows.Mixture:
    splits = {source.ref.name: source.store.split('train') for source in self.sources}
    return windows.Mixture(tuple(_told_apart(splits).values()), self._weights())

  def held_out(self, split: str) -> dict[str, windows.Split]:
    """The split of each store that has it; all of a further one that has one
    split only."""
    found = {
      source.ref.name: source.store.splits[split]
      for source in self.sources
      if split in source.store.splits
    }
    for source in self.further:
      name = split if split in source.store.splits else 'train'
      found[source.ref.name] = source.store.split(name)
    return _told_apart(found)

  def evaluates_itself_only(self, held_out: dict) -> bool:
    """Whether there is but one set, of the one store that is trained on: it
    needs no name."""
    return len(held_out) == 1 and not self.further

  def _weights(self) -> tuple[int, ...]:
    """The smallest whole numbers in the ratios of the weights."""
    shares = [source.ref.share for source in self.sources]
    over = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * over) for share in shares]
    return tuple(weight // math.gcd(*whole) for weight in whole)


def _told_apart(splits: dict) -> dict[str, windows.Split]:
  """Splits whose names, in errors, say of which of several stores they are."""
  if len(splits) == 1:
    return splits
  return {name: split._replace(name=f'{name} {split.name}') for name, split in splits.items()}


def open_corpus(cfg: schema.Config) -> Corpus:
  """The stores of a Config, refused unless whole and of one tokenizer, which is
  that of --data.tokenizer where one is given."""
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
          f' {source.store.path} with {other["name"]}, which is another',
        )
  _check_given(cfg.data.tokenizer, first)
  return Corpus(sources, further, store_lib.tokenizer_of(first))


def _open(cfg: schema.Config, flag: str) -> tuple[Source, ...]:
  try:
    return tuple(
      Source(ref, store_lib.open_store(ref.path, verify=cfg.data.verify))
      for ref in parse.parse_stores(schema.get(cfg, flag))
    )
  except fields.ConfigError as error:  # it takes any store for --data.store
    raise fields.ConfigError(flag, *error.args[1:]) from error


def _check_given(given: str, store: store_lib.Store) -> None:
  """A tokenizer that is given must be the store's, in name or in content."""
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
      f'the store {store.path} was made with another, {made["name"]} of'
      f' fingerprint {made["fingerprint"][:12]}; leave out the flag to take it',
    )
