"""`acceptance`: acceptance rates of drafts when continuing held-out text.

Acceptance on training and held-out windows is teacher-forced, an estimate: here
the model reads its own tokens. Of sampled text the rates are also predicted from the
distributions of the heads alone.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from mtp_jax.config import fields, parse, schedule, schema
from mtp_jax.data import store as store_lib
from mtp_jax.evals import intervals, suites
from mtp_jax.evals import subject as subject_lib
from mtp_jax.io import paths
from mtp_jax.losses import acceptance, multi_token
from mtp_jax.parallel import sharding

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
  if not rates:
    return suites.Result([line], scalars)
  lines = [f'{line}; acceptance rates, given that earlier drafts were accepted: {rates}']
  if cfg.decode.temperature >= schema.fields()['loss.temperature'].metadata['min']:
    rate_J = predicted(subject, prompts, decoded.tokens, len(proposed_J))
    scalars |= {f'predicted_{j}': float(rate) for j, rate in enumerate(rate_J, 2)}
    shown = ', '.join(
      f't+{j} {"none" if np.isnan(rate) else format(rate, ".1%")}'
      for j, rate in enumerate(rate_J, 2)
    )
    lines.append(f'predicted from the distributions of the heads on this text: {shown}')
  return suites.Result(lines, scalars)


def predicted(
  subject: subject_lib.Subject,
  prompts: Sequence[np.ndarray],
  continuations: Sequence[np.ndarray],
  J: int,
) -> np.ndarray:
  """Returns the rates (J,) at which J drafts in a row are accepted, each given the ones
  before it, in expectation over the drafts that could have led to these sampled texts;
  NaN for a draft that none of them reaches.

  A text's token x is an accepted draft of q with probability min(1, q(x) / p(x)), as it has
  probability p(x) and min(p(x), q(x)) of being both; so queries from which drafts were made,
  and drafts that were reached, have probabilities. A draft that is reached is accepted
  with probability alpha = sum min(p, q).
  """
  reached_J, accepted_J = np.zeros(J), np.zeros(J)
  for prompt, new, (alpha_TJ, is_draft_TJ) in zip(
    prompts, continuations, _rates(subject, prompts, continuations, J), strict=True
  ):
    query_T = np.zeros(len(prompt) + len(new) + J + 1)
    query_T[len(prompt) - 1] = 1
    for t in range(len(prompt) - 1, len(prompt) + len(new) - 2):
      here = query_T[t]  # probability that drafts were made here
      for j in range(min(J, len(prompt) + len(new) - 2 - t)):  # as far as the text goes
        reached_J[j] += here
        accepted_J[j] += here * alpha_TJ[t, j]
        query_T[t + j + 1] += here * (1 - is_draft_TJ[t, j])
        here *= is_draft_TJ[t, j]
      query_T[t + J + 1] += here
  return np.divide(accepted_J, reached_J, out=np.full(J, np.nan), where=reached_J > 0)


def _rates(subject, prompts, continuations, J: int):
  """Yields alpha_TJ of each text, and the probabilities that its tokens are accepted drafts."""
  d, n_active = subject.cfg.decode, schedule.trained_heads(subject.cfg, subject.step)
  texts = [np.concatenate(x) for x in zip(prompts, continuations, strict=True)]
  T = -(-max(map(len, texts)) // schema.TILE) * schema.TILE
  cfg = schema.replace(
    subject.cfg,
    **{'data.seq_len': T, 'loss.chunk_size': 0, 'loss.temperature': d.temperature},
    **{f'loss.{name}': getattr(d, name) for name in ('top_k', 'top_p', 'min_p')},
    **{'loss.token_order_weight': 0.0, 'loss.head_loss': 'tv', 'model.attention': 'auto'},
  )
  shards = subject.mesh.shape['data'] * subject.mesh.shape['fsdp']
  B = -(-min(len(texts), PIECES) // shards) * shards

  @jax.jit
  def compared(model, batch):
    rows = jax.tree.map(lambda x: x[0], batch)
    detail = functools.partial(acceptance.probability, l=cfg.loss)
    model = model.replace(order=None)
    _, stats, _ = multi_token.evaluate(model, rows, n_active=n_active, cfg=cfg, detail=detail)
    assert stats.drafts is not None  # there are heads >= 2
    return stats.drafts.alpha_BT, stats.detail

  for first in range(0, len(texts), B):
    here = texts[first : first + B]
    batch = {name: np.zeros((1, B, T + cfg.span), np.int32) for name in ('tokens', 'position')}
    for row, text in enumerate(here):
      batch['tokens'][0, row, : len(text)] = text
      batch['position'][0, row, : len(text)] = np.arange(len(text))
    with jax.set_mesh(subject.mesh):
      placed = sharding.put_batch(subject.mesh, batch)
      alpha_KBT, own_KBT = jax.device_get(compared(subject.model, placed))
    is_draft_KBT = np.zeros_like(own_KBT)
    for k in range(2, J + 2):
      # Head 1 verifies at t + k - 1 what head k drafted at t.
      p_BT, q_BT = own_KBT[0, :, k - 1 :], own_KBT[k - 1, :, : T - k + 1]
      is_draft_KBT[k - 1, :, : T - k + 1] = np.minimum(q_BT / np.maximum(p_BT, 1e-30), 1)
    for row in range(len(here)):
      yield tuple(x[1 : J + 1, row].T for x in (alpha_KBT, is_draft_KBT))


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
    path,
    f'has {len(found)} held-out pieces of --bench.prompt_len={P} tokens; {n} are needed: fewer with'
    f' --eval.limit={max(len(found), 1)} (or --bench.num_prompts), shorter with --bench.prompt_len',
  )
