"""`acceptance`: acceptance rates of drafts when continuing held-out text.

Acceptance on training and held-out windows is teacher-forced, an estimate: here
the model reads its own tokens.
"""

import numpy as np

from mtp_jax.config import fields, parse, schema
from mtp_jax.data import store as store_lib
from mtp_jax.evals import intervals, suites
from mtp_jax.evals import subject as subject_lib
from mtp_jax.io import paths

PIECES = 32  # default of --eval.limit


def check(arg: str, cfg: schema.CommandConfig) -> None:
  if arg:
    raise fields.ConfigError('eval.tasks', f'acceptance:{arg}', 'takes no argument')
  if not cfg.data.store:
    raise fields.ConfigError('data.store', '', 'acceptance needs a store with held-out text')
  pieces(cfg, cfg.eval.limit or PIECES)


def run(subject: subject_lib.Subject, arg: str) -> suites.Result:
  cfg = subject.cfg
  prompts = pieces(cfg, cfg.eval.limit or PIECES)
  decoded = subject.decoder(prompts, stop_ids=subject.tokenizer.stop_ids, each=lambda tokens: None)
  scalars = dict(tokens_per_forward=decoded.tokens_per_forward)
  proposed_J, accepted_J = decoded.proposed_J, decoded.accepted_J
  for j, (n, accepted) in enumerate(zip(proposed_J, accepted_J, strict=True), 2):
    scalars |= intervals.share(f'accepted_{j}', int(accepted), int(n))
  rates = ', '.join(
    f't+{j} {intervals.shown(scalars, f"accepted_{j}")} of {int(n):,}'
    for j, n in enumerate(proposed_J, 2)
  )
  line = (
    f'{len(prompts)} prompts of {cfg.bench.prompt_len} tokens, continued by'
    f' {decoded.n_tokens:,}: {decoded.tokens_per_forward:.2f} tokens per forward pass'
  )
  if rates:
    line += f'; acceptance rates, given that earlier drafts were accepted: {rates}'
  return suites.Result([line], scalars)


def pieces(cfg: schema.CommandConfig, n: int) -> list[np.ndarray]:
  """Returns n pieces of held-out documents, --bench.prompt_len tokens each: the
  first piece of each document, then the second of each, and so on."""
  path = parse.parse_stores(cfg.data.store)[0].path
  split = store_lib.open_store(path, verify=False).split(cfg.eval.split)
  P, found = cfg.bench.prompt_len, []
  for skip in range(n):
    for tokens in split.documents():
      piece = tokens[skip * P : (skip + 1) * P + 1]  # and one token to predict
      if piece.size > P:
        found.append(np.array(piece[:P], np.int64))
      if len(found) == n:
        return found
  raise paths.InputError(
    path, f'has {len(found)} held-out pieces of --bench.prompt_len={P} tokens; {n} are needed'
  )
