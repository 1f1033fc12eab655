"""Flags of earlier versions and their successors.

An earlier version's run.flags, config.json and checkpoints are read through these
tables; on a command line an old flag is refused in one line that names its
successor.
"""

RENAMED = {
  'model.context': 'model.max_position_embeddings',
  'model.rope_context': 'model.original_max_position_embeddings',
  'loss.schedule': 'loss.backward',
  'loss.chunk': 'loss.chunk_size',
  'loss.order_weight': 'loss.token_order_weight',
  'loss.order_window': 'loss.token_order_window',
  'optim.trunk_lr': 'optim.trunk_lr_mult',
  'optim.heads_lr': 'optim.heads_lr_mult',
  'optim.end_ratio': 'optim.min_lr_ratio',
  'processes.coordinator': 'distributed.coordinator_address',
  'processes.count': 'distributed.num_processes',
  'processes.index': 'distributed.process_id',
  'processes.timeout_s': 'distributed.heartbeat_timeout_s',
  'train.accumulate': 'train.grad_accum_steps',
  'train.new_heads': 'train.head_init',
  'train.keep_last': 'train.max_to_keep',
  'train.suite_every': 'train.eval_tasks_every',
  'eval.suite': 'eval.tasks',
  'eval.items': 'eval.limit',
  'eval.shots': 'eval.num_fewshot',
  'eval.k': 'eval.pass_at_k',
  'decode.draft': 'decode.num_draft_tokens',
  'decode.max_new': 'decode.max_new_tokens',
  'decode.stop_ids': 'decode.stop_token_ids',
  'decode.cache': 'decode.cache_length',
  'decode.prefill': 'decode.prefill_chunk_size',
  'decode.segment': 'decode.stream_every',
  'export.shard_gib': 'export.max_shard_gib',
  'plan.search_s': 'plan.search_timeout_s',
  'bench.calls': 'bench.iters',
  'bench.pieces': 'bench.num_prompts',
  'bench.prompt': 'bench.prompt_len',
  'bench.schedules': 'bench.backward',
  'bench.chunks': 'bench.chunk_size',
  'bench.drafts': 'bench.num_draft_tokens',
}
# Values that were renamed with their flag.
VALUES: dict[tuple[str, object], str] = {
  ('loss.schedule', 'eager'): 'interleaved',
  ('train.new_heads', 'fresh'): 'random',
}


def trunk_state(family: object) -> dict[str, object]:
  """Returns the fields of a run of before --heads.trunk_state existed, by its family."""
  if family in ('sequential', 'recursive'):
    return {'heads.trunk_state': 'pre_norm'}
  return {}


# Flags that have become positional arguments, and their usage.
ARGUMENTS = {
  'eval.checkpoint': 'mtp eval CHECKPOINT',
  'decode.checkpoint': 'mtp generate CHECKPOINT',
  'export.checkpoint': 'mtp export CHECKPOINT',
  'bench.what': 'mtp bench loss|step|data|decode',
}


def _drafts(value: str) -> str:
  """Returns the number of draft tokens of a number of heads in use (head 1 counted,
  0 = all)."""
  return str(int(value) - 1) if int(value or 0) else 'all'


def successor(name: str, value: object) -> tuple[str, object] | None:
  """Returns (today's flag, its value) of an old flag and value; None if it has become
  an argument or is no old flag."""
  if name not in RENAMED:
    return None
  if name in ('decode.draft', 'bench.drafts'):
    try:
      if name == 'decode.draft':
        value = _drafts(str(value))
      else:
        value = ','.join(map(_drafts, str(value).split(','))) if value else ''
    except ValueError:
      pass  # validated under today's flag
  if name == 'bench.schedules':
    return RENAMED[name], str(value).replace('eager', 'interleaved')
  return RENAMED[name], VALUES.get((name, value), value)


def advice(name: str, value: str | None) -> str:
  """Returns what replaces an old flag; '' for any other."""
  if name in ARGUMENTS:
    return f'--{name} is an argument now: {ARGUMENTS[name]}'
  found = successor(name, value if value is not None else '')
  if not found:
    return ''
  new, today = found
  moved = value is not None and today != value
  return f'--{name} is --{new}' + (f'={today}' if moved else '') + ' now'
