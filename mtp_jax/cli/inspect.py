"""`mtp inspect`: the batch of a training step, as tokens and targets."""

from mtp_jax.cli import command as command_lib
from mtp_jax.cli import flags
from mtp_jax.config import draft_vocab, schema


def run(parsed: flags.Parsed) -> int:
  cfg = parsed.config()
  command_lib.require(cfg, 'data.store', 'the store that `mtp prepare` wrote')
  command_lib.start_jax(cfg)

  lines, values = inspect_batch(cfg)
  command_lib.print_report(lines, values, parsed.out)
  return 0


def inspect_batch(cfg: schema.CommandConfig) -> tuple[list[str], dict]:
  """Returns (lines, values) of the batch of a training step.

  Per position: the token, its position and segment, and the target of each head,
  bracketed where it is not valid.
  """
  import numpy as np

  from mtp_jax.data import batches as batches_lib
  from mtp_jax.data import loader
  from mtp_jax.losses import targets

  cfg = schema.replace(cfg, **{'loss.teacher': ''})  # of a store, it is not printed
  tokens = batches_lib.open_tokens(cfg)
  cfg = batches_lib.recorded(tokens, cfg)
  mixture, window = tokens.train(), (cfg.data.seq_len, cfg.span)
  batch = next(batches_lib.train_batches(tokens, cfg, cfg.inspect.step))
  rows = loader.row_indices(
    mixture.sizes(*window), mixture.weights, cfg.train.seed, cfg.data.batch_size, cfg.inspect.step
  )
  of_row = [mixture.find(row, *window) for row in rows]
  names = [tokens.sources[s].ref.name for s, _ in of_row]
  flat = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()}
  targets_KBT, valid_KBT = map(np.array, targets.targets(flat, cfg))
  if (ids_X := draft_vocab.of(cfg)) is not None:
    valid_KBT[1:] &= np.isin(targets_KBT[1:], ids_X)
  count_K = valid_KBT.sum(axis=(1, 2))

  def piece(token):
    text = tokens.tokenizer.piece(int(token))
    return text if text.strip() else text.replace(' ', '␣')

  lines = [
    f'step {cfg.inspect.step}: {len(rows)} windows of {cfg.data.seq_len} +'
    f' {cfg.span} tokens; valid targets by head '
    + ' '.join(f'{k}: {c:,}' for k, c in enumerate(count_K, 1))
  ]
  for b in range(min(cfg.inspect.rows, len(rows))):
    of = f' of {names[b]}' if len(tokens.sources) > 1 else ''
    lines.append(f'window {of_row[b][1]}{of}: {tokens.tokenizer.decode(flat["tokens"][b])!r}')
    lines.append(
      '    t  token     position  segment  targets '
      + ' '.join(f't+{offset}' for offset in cfg.heads.offsets)
    )
    segment_U = np.cumsum(flat['position'][b] == 0)
    for t in range(min(cfg.inspect.tokens, cfg.data.seq_len)):
      shown = [
        piece(x) if ok else f'[{piece(x)}]'
        for x, ok in zip(targets_KBT[:, b, t], valid_KBT[:, b, t], strict=True)
      ]
      lines.append(
        f'{t:5d}  {piece(flat["tokens"][b, t]):8}'
        f'  {flat["position"][b, t]:8d}  {segment_U[t]:7d}  {"  ".join(shown)}'
      )
  lines.append(
    '[x]: not a target: another document' + (', or masked out' if 'loss_mask' in flat else '')
  )
  return lines, dict(
    step=cfg.inspect.step,
    sources=names,
    windows=[number for _, number in of_row],
    counts=count_K.tolist(),
    **{name: x.tolist() for name, x in flat.items()},
    targets=targets_KBT.tolist(),
    valid=valid_KBT.tolist(),
  )
