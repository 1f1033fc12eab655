"""Validation of a Config: limits of fields, and constraints between them."""

import dataclasses
import itertools
import re

from mtp_jax.config import draft_vocab, fields, kernels, schema, validate_loss
from mtp_jax.config import parse as parse_lib


def configured(
  given: dict[str, object], base: schema.CommandConfig | None = None
) -> schema.CommandConfig:
  """Returns `base` (or the defaults) with some 'section.field' values, validated."""
  return validate(schema.replace(base or schema.CommandConfig(), **given))


def validate(cfg: schema.AnyConfig) -> schema.AnyConfig:
  """Returns cfg; raises ConfigError for the first invalid field."""
  for name, field in schema.fields(type(cfg)).items():
    _check_limits(name, schema.get(cfg, name), field.metadata)
  _check_model(cfg)
  validate_loss.check_loss(cfg)
  validate_loss.check_groups(cfg)
  _check_steps(cfg)
  _check_stores(cfg)
  if isinstance(cfg, schema.CommandConfig):
    _check_distributed(cfg.distributed)
    _check_decode(cfg)
    _check_bench(cfg)
  return cfg


def variants(cfg: schema.CommandConfig) -> tuple[schema.CommandConfig, ...]:
  """Returns cfg with each combination of --bench.backward, chunk_size and heads; the
  last varies fastest. Raises ConfigError, naming the bench flag, for an invalid one.

  All heads are active with weight 1: a run's weights and curriculum may not fit
  another number of heads, and weights do not affect time.
  """
  b = cfg.bench
  if b.documents > cfg.data.seq_len:
    raise fields.ConfigError(
      'bench.documents', b.documents, f'must be at most --data.seq_len={cfg.data.seq_len}'
    )
  wanted = itertools.product(
    b.backward.split(',') if b.backward else (cfg.loss.backward,),
    parse_lib.parse_numbers(b.chunk_size) or (cfg.loss.chunk_size,),
    parse_lib.parse_numbers(b.heads) or (cfg.heads.n,),
  )
  found = []
  for schedule, chunk, n in wanted:
    values = {
      'loss.backward': schedule,
      'loss.chunk_size': chunk,
      'heads.n': n,
      'loss.weights': '0:1',
      'loss.curriculum': '',
    }
    try:
      found.append(validate(schema.replace(cfg, **values)))
    except fields.ConfigError as error:
      flag = {'loss.chunk_size': 'chunk_size', 'heads.n': 'heads'}.get(error.args[0])
      if not flag:
        raise
      raise fields.ConfigError(f'bench.{flag}', getattr(b, flag), str(error)) from error
  return tuple(found)


def _check_limits(name, value, limits):
  """Checks a value against its limits and choices, and that it can be stored."""

  def need(ok, allowed):
    if not ok:
      raise fields.ConfigError(name, value, allowed)

  if 'choices' in limits:
    need(value in limits['choices'], f'one of {", ".join(limits["choices"])}')
  if 'min' in limits:
    need(value >= limits['min'], f'must be at least {limits["min"]}')
  if 'above' in limits:
    need(value > limits['above'], f'must be above {limits["above"]}')
  if isinstance(value, float):
    need(abs(value) < float('inf'), 'must be a finite number')
  if 'max' in limits:
    need(value <= limits['max'], f'must be at most {limits["max"]}')
  if 'below' in limits:
    need(value < limits['below'], f'must be below {limits["below"]}')
  texts = value if isinstance(value, tuple) else (str(value),)
  problem = fields.wrong_text(''.join(texts))
  need(not problem, problem)
  # run.flags would not reproduce the run, e.g. with a line break in a value.
  need(
    all(x == x.strip() and len(x.splitlines()) < 2 for x in texts),
    'must be one line, with no space at an end',
  )


def _check_model(cfg):
  m, n = cfg.model, cfg.heads.n
  if not m.d_head and m.d_model % m.n_attn_heads:
    raise fields.ConfigError(
      'model.d_model',
      m.d_model,
      f'must be a multiple of --model.n_attn_heads={m.n_attn_heads}, unless'
      ' --model.d_head is given',
    )
  if m.rope_fraction == 1 and m.head_width % 2:
    raise fields.ConfigError(
      *(('model.d_head', m.d_head) if m.d_head else ('model.d_model', m.d_model)),
      f'a head is {m.head_width} wide; it must be even (RoPE pairs)',
    )
  if m.rotary_width % 2 or not m.rotary_width:
    raise fields.ConfigError(
      'model.rope_fraction',
      m.rope_fraction,
      f'of a head of {m.head_width} it rotates {m.rotary_width} dimensions; must be even, above 0',
    )
  if m.rope_factor > 1 and m.rope_high_freq <= m.rope_low_freq:
    raise fields.ConfigError(
      'model.rope_high_freq',
      m.rope_high_freq,
      f'must be above --model.rope_low_freq={m.rope_low_freq}',
    )
  if m.rope_factor > 1 and m.rope_scaling == 'yarn' and m.rope_beta_fast <= m.rope_beta_slow:
    raise fields.ConfigError(
      'model.rope_beta_fast',
      m.rope_beta_fast,
      f'must be above --model.rope_beta_slow={m.rope_beta_slow}',
    )
  if m.rope_factor > 1 and m.rope_scaling == 'yarn' and m.rope_theta <= 1:
    raise fields.ConfigError('model.rope_theta', m.rope_theta, 'yarn needs a base above 1')
  _check_layer_types(cfg)
  if m.n_attn_heads % m.kv_heads:
    raise fields.ConfigError(
      'model.n_kv_heads', m.n_kv_heads, f'must divide --model.n_attn_heads={m.n_attn_heads}'
    )
  if cfg.heads.block_first and m.n_layers - n < 1:
    raise fields.ConfigError(
      'heads.n',
      n,
      f'each head is one of --model.n_layers={m.n_layers} layers and the trunk'
      f' needs at least one; at most {m.n_layers - 1}',
    )
  if unfit := kernels.problem(m, cfg.data.seq_len, m.attention):
    raise unfit
  # Targets of a query, and with strided heads drafts from positions before it.
  reach = cfg.heads.offsets[-1] + cfg.heads.stride - 1
  if reach >= cfg.data.seq_len:
    raise fields.ConfigError(
      'heads.n',
      n,
      f'with --heads.stride={cfg.heads.stride} that spans {reach} tokens, must'
      f' be below --data.seq_len={cfg.data.seq_len}',
    )


MOST_LAYERS = 10_000
LAYER_TYPE = re.compile(rf'({"|".join(schema.LAYER_TYPES)})(\*[1-9][0-9]{{0,4}})?')


def _check_layer_types(cfg):
  m, h = cfg.model, cfg.heads
  names = m.layer_types.split(',') if m.layer_types else []
  found = [LAYER_TYPE.fullmatch(name) for name in names]
  if not all(found) or sum(int((x and x[2] or '*1')[1:]) for x in found) > MOST_LAYERS:
    raise fields.ConfigError(
      'model.layer_types',
      m.layer_types,
      f'{", ".join(schema.LAYER_TYPES)}, with commas, each NAME or NAME*TIMES, at most'
      f' {MOST_LAYERS:,} layers',
    )
  sliding = 'sliding' in m.pattern
  if sliding and not m.window:
    raise fields.ConfigError('model.window', m.window, 'sliding layers need a window above 0')
  if m.window and not (sliding or (h.layer_type == 'sliding' and not h.window)):
    raise fields.ConfigError(
      'model.window', m.window, f'no layer is sliding with --model.layer_types={m.layer_types}'
    )
  if m.sliding_rope_theta and not (sliding or h.layer_type == 'sliding'):
    raise fields.ConfigError(
      'model.sliding_rope_theta', m.sliding_rope_theta, 'no layer is sliding'
    )
  if h.layer_type == 'sliding' and not (h.window or m.window):
    raise fields.ConfigError('heads.window', h.window, 'sliding heads need a window above 0')
  if h.window and h.layer_type != 'sliding':
    raise fields.ConfigError('heads.window', h.window, 'needs --heads.layer_type=sliding')


def _check_steps(cfg):
  t, o, batch_size = cfg.train, cfg.optim, cfg.data.batch_size
  if batch_size % t.grad_accum_steps:
    raise fields.ConfigError(
      'train.grad_accum_steps', t.grad_accum_steps, f'must divide --data.batch_size={batch_size}'
    )
  if o.warmup_steps >= t.steps:
    raise fields.ConfigError(
      'optim.warmup_steps', o.warmup_steps, f'must be below --train.steps={t.steps}'
    )
  if o.schedule == 'wsd' and not 1 <= o.decay_steps <= t.steps - o.warmup_steps:
    raise fields.ConfigError(
      'optim.decay_steps',
      o.decay_steps,
      f'wsd needs 1 to steps - warmup_steps = {t.steps - o.warmup_steps} of them',
    )
  sizes = dataclasses.asdict(cfg.mesh)
  rest = [axis for axis, size in sizes.items() if size == -1]
  for axis, size in sizes.items():
    if size == 0:
      raise fields.ConfigError(f'mesh.{axis}', size, 'at least 1, or -1')
  if len(rest) > 1:
    default = schema.MeshConfig()
    rest.sort(key=lambda axis: getattr(default, axis) == -1)  # not given: last
    raise fields.ConfigError(
      f'mesh.{rest[0]}', -1, f'at least 1, or -1 on a single axis, and --mesh.{rest[-1]} is -1'
    )


def _check_distributed(p):
  host, _, port = p.coordinator_address.rpartition(':')
  if p.coordinator_address in ('', 'auto'):
    for name, default in (('num_processes', 1), ('process_id', 0)):
      if getattr(p, name) != default:
        raise fields.ConfigError(
          f'distributed.{name}',
          getattr(p, name),
          'needs --distributed.coordinator_address=HOST:PORT',
        )
  elif not (host and port.isdigit() and 0 < int(port) < 2**16):
    raise fields.ConfigError(
      'distributed.coordinator_address', p.coordinator_address, 'HOST:PORT, auto or empty'
    )
  if p.process_id >= p.num_processes:
    raise fields.ConfigError(
      'distributed.process_id',
      p.process_id,
      f'must be below --distributed.num_processes={p.num_processes}',
    )


def _check_stores(cfg):
  names = set()
  for flag, form in (
    ('data.store', '[NAME=]PATH[:WEIGHT],… with weights above 0'),
    ('eval.stores', '[NAME=]PATH,…'),
  ):
    text = schema.get(cfg, flag)
    try:
      refs = parse_lib.parse_stores(text)
    except ValueError as error:
      raise fields.ConfigError(flag, text, form) from error
    if flag == 'eval.stores' and any(ref.weight != '1' for ref in refs):
      raise fields.ConfigError(flag, text, f'{form}, without weights')
    for ref in refs:
      if '://' in ref.path:
        raise fields.ConfigError(
          flag,
          text,
          'a store must be a local path: copy it to a disk of each host, or mount the bucket',
        )
      if ref.name in names:
        raise fields.ConfigError(flag, text, f'duplicate name {ref.name!r}; give NAME=PATH')
      names.add(ref.name)


def _check_decode(cfg):
  d, n, stride = cfg.decode, cfg.heads.n, cfg.heads.stride
  most, drafts_of_heads = schema.MOST_TOKENS, cfg.heads.most_drafts

  def need(ok, flag, allowed):
    if not ok:
      raise fields.ConfigError(f'decode.{flag}', getattr(d, flag), allowed)

  try:
    widths = parse_lib.parse_numbers(d.tree)
  except ValueError:
    widths = (0,)
  slots, level = 1, 1
  for width in widths:
    level = min(level * width, 2 * most)  # bounds the size of the integers
    slots = min(slots + level, 2 * most)
  need(
    all(width >= 1 for width in widths) and slots <= most,
    'tree',
    'candidates of heads 2, 3 …, above 0, with commas, that make a window of at'
    f' most {most} tokens',
  )
  need(
    len(widths) <= drafts_of_heads and max(widths, default=1) <= draft_vocab.size(cfg),
    'tree',
    f'with --heads.n={n} at most {drafts_of_heads} numbers, none above the number of'
    ' tokens that they score',
  )
  need(not d.temperature or d.temperature >= 1e-6, 'temperature', '0, or at least 1e-6')
  sampled = d.temperature or cfg.eval.samples > 1 or cfg.eval.temperatures
  for flag, unused in (('top_k', 0), ('top_p', 1), ('min_p', 0)):
    need(sampled or getattr(d, flag) == unused, flag, 'needs --decode.temperature above 0')
  need(not widths or not d.temperature, 'tree', 'needs --decode.temperature=0')
  need(cfg.heads.confidence or not d.min_confidence, 'min_confidence', 'needs --heads.confidence')
  need(
    d.num_draft_tokens not in ('auto', '0') or not d.min_confidence,
    'min_confidence',
    'needs --decode.num_draft_tokens=all or a number above 0: auto measures a time that does not'
    ' depend on the text',
  )
  need(not widths or not d.min_confidence, 'tree', 'must be empty with --decode.min_confidence')
  of_all = d.num_draft_tokens in ('all', 'auto')
  drafts = None if of_all else _natural(d.num_draft_tokens)
  need(
    of_all or (drafts is not None and drafts <= drafts_of_heads),
    'num_draft_tokens',
    'auto, all, or an integer from 0 to '
    + (f'--heads.n - 1 = {n - 1}' if drafts_of_heads == n - 1 else str(drafts_of_heads)),
  )
  need(
    drafts is None or not widths or drafts == len(widths),
    'num_draft_tokens',
    f'--decode.tree={d.tree} drafts {len(widths)} tokens in a row',
  )
  leaps = f'strided heads (--heads.stride={stride}) leave gaps between drafts'
  need(stride == 1 or not drafts, 'num_draft_tokens', f'must be 0: {leaps}')
  need(stride == 1 or not widths, 'tree', f'must be empty: {leaps}')
  try:
    stops = parse_lib.parse_stop_ids(d.stop_token_ids) or ()
  except ValueError:
    stops = (-1,)
  need(
    all(0 <= stop < cfg.model.vocab_size for stop in stops),
    'stop_token_ids',
    f'none, or ids from 0 to --model.vocab_size - 1 = {cfg.model.vocab_size - 1}, with commas',
  )


def _natural(text: str) -> int | None:
  return int(text) if re.fullmatch('[0-9]{1,9}', text) else None


def _check_bench(cfg):
  b = cfg.bench
  schedules = {f.name: f for f in dataclasses.fields(schema.LossConfig)}['backward']
  known = schedules.metadata['choices']
  most_drafts = max(cfg.heads.n - 1, _natural(cfg.decode.num_draft_tokens) or 0)
  of_module = ', of a shared module to --decode.num_draft_tokens' * (
    cfg.heads.most_drafts >= cfg.heads.n
  )
  for flag, parse, ok, allowed in (
    ('heads', parse_lib.parse_numbers, lambda n: n >= 1, 'numbers above 0'),
    ('chunk_size', parse_lib.parse_numbers, lambda c: c >= 0, 'numbers of positions'),
    ('batches', parse_lib.parse_numbers, lambda b: 1 <= b <= 2**20, f'numbers from 1 to {2**20:,}'),
    (
      'num_draft_tokens',
      lambda text: parse_lib.parse_drafts(text)[0],
      lambda drafts: 0 <= drafts <= most_drafts,
      f'auto, and numbers from 0 to --heads.n - 1 = {cfg.heads.n - 1}{of_module}',
    ),
    (
      'backward',
      lambda text: text.split(',') if text else (),
      lambda name: name in known,
      f'of {", ".join(known)}',
    ),
  ):
    text = getattr(b, flag)
    try:
      values = parse(text)
    except ValueError:
      values = (-1,)
    if not all(map(ok, values)) or len(set(values)) < len(values):
      raise fields.ConfigError(f'bench.{flag}', text, f'different ones, with commas: {allowed}')
