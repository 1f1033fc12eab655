"""Checks of the multi-head loss and of the heads; see validate.py."""

from mtp_jax.config import draft_vocab, fields, schema
from mtp_jax.config import schedule as schedule_lib


def check_loss(cfg: schema.Config) -> None:
  """Raises ConfigError for values of --loss.* and --heads.* that do not go together."""
  h, l, seq_len = cfg.heads, cfg.loss, cfg.data.seq_len
  n = h.n

  def need(ok, flag, allowed):
    if not ok:
      raise fields.ConfigError(f'loss.{flag}', getattr(l, flag), allowed)

  need(
    not l.chunk_size or seq_len % l.chunk_size == 0,
    'chunk_size',
    f'must divide --data.seq_len={seq_len}',
  )
  try:
    phases = schedule_lib.parse_weights(l.weights, n)
  except (ValueError, OverflowError):
    phases = ()
  need(
    phases and all(len(p.weights) == n and all(0 <= w <= 1e6 for w in p.weights) for p in phases),
    'weights',
    f'STEP:W,W,…;STEP:… with at most --heads.n={n} weights >= 0, at most 1e6, or'
    ' STEP:beta=B with B above 0, at most 1, ~ for ; to move linearly, and steps that'
    ' start at 0 and rise',
  )
  try:
    active = schedule_lib.parse_steps(l.curriculum or f'0:{n}')
  except (ValueError, OverflowError):
    active = ((0, ()),)
  need(
    all(len(v) == 1 and 1 <= v[0] <= n and v[0] == int(v[0]) for _, v in active),
    'curriculum',
    f'STEP:HEADS;STEP:… with 1 to --heads.n={n} heads and steps that start at 0 and rise',
  )
  # Of weights that move from 0, those of the second step are above it.
  steps = {p.start + p.is_linear for p in phases} | {start for start, _ in active}
  need(
    l.token_order_weight
    or any(
      any(schedule_lib.head_weights(cfg, step)[: schedule_lib.active_heads(cfg, step)])
      for step in steps
      if step < cfg.train.steps
    ),
    'weights',
    'no head that is active at any step has a weight above 0',
  )
  need(
    l.head_loss != 'e2e_tv' or h.stride == 1,
    'head_loss',
    f'strided heads (--heads.stride={h.stride}) leave gaps between drafts, and e2e_tv is a loss'
    ' of drafts in a row; one of kl, tv, lk, lk_hybrid',
  )
  need(
    l.compares or not l.head_ce_weight, 'head_ce_weight', 'needs another --loss.head_loss than ce'
  )
  need(
    l.head_loss == 'lk_hybrid' or l.lk_eta == schema.LossConfig().lk_eta,
    'lk_eta',
    'is of --loss.head_loss=lk_hybrid',
  )
  need(l.compares or not l.teacher, 'teacher', 'needs another --loss.head_loss than ce')
  for flag, unused in (('temperature', 1), ('top_p', 1), ('min_p', 0)):
    need(
      l.top_k or not l.reads_stored_teacher or getattr(l, flag) == unused,
      flag,
      f'must be {unused} with --loss.teacher=store: of a stored distribution no more than its most'
      ' probable tokens are known; or give --loss.top_k, at most as many as are stored',
    )
  if h.markov_rank and (h.family in ('sequential', 'recursive') or h.stride > 1):
    raise fields.ConfigError(
      'heads.markov_rank',
      h.markov_rank,
      f'must be 0: {h.family} heads read the token before'
      if h.stride == 1
      else f'must be 0: strided heads (--heads.stride={h.stride}) leave gaps between drafts',
    )
  if h.mix_hidden_states and h.family not in ('sequential', 'recursive'):
    raise fields.ConfigError(
      'heads.mix_hidden_states', True, f'needs sequential or recursive heads; these are {h.family}'
    )
  draft_vocab.check(cfg)
  others = ('parallel', 'causal', 'anticausal', 'linear', 'residual', 'sequential')
  if h.share_keys_values and h.family in others:
    raise fields.ConfigError(
      'heads.share_keys_values', True, f'needs --heads.family=recursive; these are {h.family}'
    )
  for ok, needed in (
    (h.share_keys_values, '--heads.share_keys_values: other heads cannot be skipped'),
    (h.unembedding != 'replicated', 'one unembedding, shared or tied'),
    (not l.teacher, 'no --loss.teacher: it predicts what head 1 accepts'),
    (l.compares, 'a --loss.head_loss that computes acceptance rates: any but ce'),
  ):
    if h.confidence and not ok:
      raise fields.ConfigError('heads.confidence', True, f'needs {needed}')
  if h.isolated and h.family == 'anticausal':
    raise fields.ConfigError(
      'heads.isolated', True, 'head 1 of --heads.family=anticausal is computed from the others'
    )


def check_groups(cfg: schema.Config) -> None:
  """Raises ConfigError where --train.freeze leaves nothing to train."""
  h, freeze = cfg.heads, cfg.train.freeze
  phases = schedule_lib.parse_steps(cfg.loss.curriculum or f'0:{h.n}')
  n_active = [int(values[0]) for _, values in phases]
  no_heads = (
    not h.block_first
    and min(n_active) == 1
    and not (h.unembedding == 'replicated' or cfg.loss.token_order_weight)
  )
  if freeze == 'trunk' and no_heads:
    raise fields.ConfigError(
      'train.freeze',
      freeze,
      f'with {min(n_active)} active heads of {h.family} no parameter would train',
    )
