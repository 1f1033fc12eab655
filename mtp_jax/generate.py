"""`mtp generate`, and the bench of decoding: a checkpoint writes. Floor 5."""

import dataclasses
import io
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import bench, checkpoint, config, flags, jsonl, paths, sharding
from mtp_jax.data import store as store_lib
from mtp_jax.data import tokenizers
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.evals import acceptance
from mtp_jax.evals import subject as subject_lib

SHORT_S = 0.02  # of a turn; what is shorter is noise
PARTIAL = '\ufffd'  # of a character whose last bytes are not there yet


class Found(NamedTuple):
  """A checkpoint whose parameters are not read yet."""

  workdir: str
  step: int
  cfg: config.Config
  active: int  # heads that trained
  tokenizer: tokenizers.Tokenizer | None  # None where only ids are wanted


class Opened(NamedTuple):
  """A checkpoint, ready to decode."""

  name: str
  cfg: config.Config
  mesh: Any
  decoder: decoder_lib.Decoder
  tokenizer: tokenizers.Tokenizer | None


class Prompt(NamedTuple):
  """What a row goes on from; its text, unless ids were given; of a file, its
  line and what else stands there."""

  ids: np.ndarray
  text: str | None
  line: int = 0
  fields: dict | None = None


def find(parsed: flags.Parsed, only_ids: bool) -> Found:
  """The one of --decode.checkpoint; ConfigError says what is wrong."""
  flag = 'decode.checkpoint'
  path = parsed.given.get(flag, '')
  if not path:
    raise config.ConfigError(flag, '', 'give a workdir')
  opened = checkpoint.opened(paths.absolute(path, flag), flag, parsed)
  return of_opened(parsed, opened, only_ids, flag)


def of_opened(parsed: flags.Parsed, opened, only_ids: bool, flag: str) -> Found:
  """Of what `checkpoint.opened` says of the checkpoint that a flag names."""
  workdir, step, saved, cfg = opened
  active = config.active_heads(cfg, max(step - 1, 0))
  decoder_lib.widths(cfg, active)
  tokenizer = None
  if not only_ids:
    tokenizer = tokenizer_of(parsed, saved, workdir)
    if tokenizer is None:
      raise config.ConfigError(
        flag, workdir, 'was imported without a tokenizer; give --prompt_ids, or --data.tokenizer'
      )
    check_rows(tokenizer, cfg)
  return Found(workdir, step, cfg, active, tokenizer)


def load(found: Found) -> Opened:
  """Reads the parameters, and no more."""
  cfg, mesh = found.cfg, sharding.serving_mesh(found.cfg)
  model = checkpoint.restore_model(found.workdir, found.step, cfg, mesh, 'decode.checkpoint')
  return Opened(
    f'{found.workdir}, step {found.step}',
    cfg,
    mesh,
    decoder_lib.Decoder(model, cfg, mesh, found.active),
    found.tokenizer,
  )


def check_rows(tokenizer, cfg: config.Config) -> None:
  """ConfigError if a tokenizer has tokens that the model has no row for."""
  if tokenizer.vocab_size > cfg.model.vocab_size:
    raise config.ConfigError(
      'data.tokenizer',
      tokenizer.name,
      f'has {tokenizer.vocab_size} tokens, the model --model.vocab_size={cfg.model.vocab_size}',
    )


def tokenizer_of(parsed, saved: config.Config, workdir: str):
  """The run's own, from its workdir or its store; one that is given must be
  that one. None of an import without any."""
  recorded, given = saved.data.tokenizer, parsed.given.get('data.tokenizer')
  folder = paths.of(workdir) / 'tokenizer'
  if given and given != recorded:
    found = tokenizers.get(given)
  elif folder.is_dir():
    found = tokenizers.load(str(folder))
  elif recorded in ('', 'bytes'):
    return tokenizers.get('bytes') if recorded else None
  else:
    path = parsed.given.get('data.store', saved.data.store)
    first = config.parse_stores(path)[0].path if path else ''
    found = store_lib.tokenizer_of(store_lib.open_store(first, verify=False))
  if recorded and not tokenizers.matches(found, recorded):
    raise config.ConfigError(
      'data.tokenizer',
      given or found.name,
      f'is {tokenizers.recorded_name(found)}; the checkpoint was trained with {recorded}',
    )
  return found


# Prompts.


def wants_only_ids(parsed: flags.Parsed) -> bool:
  return parsed.prompt_ids is not None


def read_prompts(parsed: flags.Parsed, found: Found) -> list[Prompt]:
  """Of --prompt, --prompt_ids or --decode.prompts, one of them; checked.

  A text starts a document: the begin token is put before it.
  """
  cfg, path = found.cfg, found.cfg.decode.prompts
  given = [parsed.prompt is not None, parsed.prompt_ids is not None, bool(path)]
  if sum(given) != 1:
    raise config.ConfigError(
      'prompt',
      parsed.prompt or '',
      ('give one of' if any(given) else 'none is given; there are')
      + ' --prompt, --prompt_ids and --decode.prompts',
    )
  if parsed.prompt_ids is not None:
    prompts = [Prompt(_numbers(parsed.prompt_ids), None)]
  elif parsed.prompt is not None:
    prompts = [_encoded(parsed.prompt, found.tokenizer)]
  else:
    prompts = _read_file(path, found.tokenizer)
  ids = [prompt.ids for prompt in prompts]
  of = (
    ('decode.prompts', path, [f'line {p.line}' for p in prompts])
    if path
    else ('prompt_ids', parsed.prompt_ids)
    if parsed.prompt is None
    else ('prompt', parsed.prompt)
  )
  decoder_lib.check(ids, decoder_lib.room(ids, cfg), cfg, *of)
  return prompts


def _numbers(text: str) -> np.ndarray:
  try:
    return np.array(config.parse_numbers(text), np.int64)
  except (ValueError, OverflowError):
    raise config.ConfigError('prompt_ids', text, 'token ids, with commas') from None


def _encoded(text: str, tokenizer) -> Prompt:
  try:
    text.encode()
  except UnicodeEncodeError:
    raise config.ConfigError('prompt', repr(text), 'is not text') from None
  ids = [tokenizer.bos, *tokenizer.encode(text)]
  return Prompt(np.array(ids, np.int64), text)


def _read_file(path: str, tokenizer) -> list[Prompt]:
  def wrong(problem):
    return config.ConfigError('decode.prompts', path, problem)

  path = paths.absolute(path, 'decode.prompts')
  try:
    text = paths.of(path).read_bytes().decode('utf-8-sig')
    lines = [line.rstrip('\n') for line in io.StringIO(text, newline=None)]
  except UnicodeDecodeError as error:
    raise wrong('is not text') from error
  except OSError as error:
    raise wrong(f'cannot be read: {error.strerror or error}') from error
  read = _of_record if path.endswith('.jsonl') else _encoded
  prompts = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      prompt = read(line, tokenizer)
    except config.ConfigError as error:
      raise wrong(f'line {number} {error.args[2]}') from error
    except ValueError as error:
      raise wrong(f'line {number} {error}') from error
    prompts.append(prompt._replace(line=number))
  if not prompts:
    raise wrong('has no prompt')
  return prompts


FORM = 'is no object with prompt, a text, or prompt_ids, a list of token ids'


def _of_record(line: str, tokenizer) -> Prompt:
  """A line of .jsonl; ValueError says what is wrong with it."""
  record = jsonl.loads(line)
  if not isinstance(record, dict):
    raise ValueError(FORM)
  known = ('prompt', 'prompt_ids')
  fields = {k: v for k, v in record.items() if k not in known}
  text, ids = (record.get(name) for name in known)
  if text is not None and ids is not None:
    raise ValueError('has both prompt and prompt_ids')
  if isinstance(text, str):
    return _encoded(text, tokenizer)._replace(fields=fields)
  if isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids):
    return Prompt(np.array(ids, np.int64), None, fields=fields)
  raise ValueError(FORM)


def _stop_ids(cfg: config.Config, opened: Opened) -> tuple[int, ...]:
  said = config.parse_stop_ids(cfg.decode.stop_ids)
  if said is not None:
    return said
  return opened.tokenizer.stop_ids if opened.tokenizer else ()


# Generating.


def run(opened: Opened, prompts: list[Prompt], say: Callable[[str], None], part=None) -> dict:
  """Decodes all prompts, and says what it wrote: one alone as it comes, several
  each when its batch is done. How it went goes to stderr.

  part: of paths.growing; each batch's rows are written to it when it is done.

  Returns:
    the report, with all rows.
  """
  cfg, decode = opened.cfg, opened.decoder
  B = min(cfg.decode.batch_size or len(prompts), len(prompts))
  cache = decoder_lib.room([p.ids for p in prompts], cfg)
  stop_ids = _stop_ids(cfg, opened)
  rows, done = [], []
  _tell(_beyond(cfg, prompts, cache))
  for first in range(0, len(prompts), B):
    batch = prompts[first : first + B]
    stream = _stream(opened, batch[0], say) if len(prompts) == 1 else None
    decoded = decode(
      [p.ids for p in batch],
      rows=B,
      cache=cache,
      stop_ids=stop_ids,
      seeds=range(cfg.decode.seed + first, cfg.decode.seed + first + B),
      each=stream,
    )
    done.append(decoded)
    if stream:
      stream(decoded.tokens, last=True)
    for prompt, tokens, forwards in zip(batch, decoded.tokens, decoded.forwards, strict=True):
      row = _row(prompt, tokens, forwards, opened, stop_ids)
      rows.append(row)
      if part:
        line = f'{json.dumps(row, ensure_ascii=False)}\n'
        # A prompt file may spell half a character: it is escaped again.
        part.write(line.encode(errors='backslashreplace'))
        part.flush()
      if not stream:
        say(f'=== {len(rows)} of {len(prompts)}\n{_shown(row)}\n')
  if len(prompts) == 1:
    say('\n')
  total = decoder_lib.joined(done)
  _tell(
    [
      f'{opened.name}: {total.n_tokens:,} tokens in'
      f' {int(total.forwards.sum()):,} forward passes of a row,'
      f' {total.tokens_per_forward:.2f} a pass with'
      f' {len(decode.widths) + 1} of {cfg.heads.n} heads' + _sampled(cfg),
      *_acceptance(total),
      f'prompts {total.prefill_s:.3f} s, decoding {total.decode_s:.3f} s:'
      f' {total.n_tokens / total.decode_s:,.0f} tokens/s'
      f' (compiled in {total.compile_s:.1f} s)',
    ]
  )
  if cfg.decode.compare:
    _tell(['head 1 alone was in use: nothing to compare it with'])
  return summary(total) | dict(rows=rows)


def _tell(lines: list[str]) -> None:
  """Beside the text, which may be piped."""
  sys.stdout.flush()
  for line in lines:
    print(line, file=sys.stderr, flush=True)


def _sampled(cfg) -> str:
  t = cfg.decode.temperature
  return f', sampled at temperature {t:g}' if t else ', greedy'


def _acceptance(decoded) -> list[str]:
  if not len(decoded.asked_J):
    return []
  rates = ', '.join(
    f't+{j}: {"-" if rate is None else f"{rate:.2f}"}'
    for j, rate in enumerate(decoded.acceptance_J, 2)
  )
  return [f'drafts that stood, given those before: {rates}']


def _beyond(cfg, prompts, cache: int) -> list[str]:
  longest = max(len(p.ids) for p in prompts) + cfg.decode.max_new
  longest = min(longest, cache)
  if longest <= subject_lib.context(cfg):
    return []
  return [
    f'up to {longest:,} tokens a row are more than the windows that it was'
    f' trained on (--data.seq_len={cfg.data.seq_len:,})'
  ]


def summary(decoded: decoder_lib.Decoded) -> dict:
  return dict(
    tokens=decoded.n_tokens,
    forwards=int(decoded.forwards.sum()),
    tokens_per_forward=decoded.tokens_per_forward,
    acceptance=decoded.acceptance_J,
    asked=decoded.asked_J.tolist(),
    accepted=decoded.accepted_J.tolist(),
    prefill_s=decoded.prefill_s,
    decode_s=decoded.decode_s,
    compile_s=decoded.compile_s,
    tokens_per_s=decoded.n_tokens / decoded.decode_s,
  )


def _row(prompt: Prompt, tokens, forwards, opened, stop_ids) -> dict:
  """What a prompt became, with all that its line said."""
  row = dict(prompt.fields or {})
  if prompt.line:
    row['line'] = prompt.line
  if prompt.text is None:
    row['prompt_ids'] = prompt.ids.tolist()
  else:
    row['prompt'] = prompt.text
  if opened.tokenizer is not None:
    row['text'] = _text(prompt, tokens, opened.tokenizer)
  finish = 'length' if len(tokens) == opened.cfg.decode.max_new else 'cache'
  if len(tokens) and int(tokens[-1]) in stop_ids:
    finish = 'stop'
  return row | dict(ids=tokens.tolist(), forwards=int(forwards), finish=finish)


def _text(prompt: Prompt, tokens, tokenizer) -> str:
  """What the new tokens add to the text of the prompt's."""
  # A prompt of ids may end within a character.
  before = tokenizer.decode(prompt.ids).rstrip(PARTIAL)
  return tokenizer.decode([*prompt.ids, *tokens])[len(before) :]


def _shown(row: dict) -> str:
  if 'text' not in row:
    return ','.join(map(str, row['ids']))
  return row.get('prompt', '') + row['text']


def _stream(opened: Opened, prompt: Prompt, say):
  """A function of the new tokens so far, that says what it has not said yet."""
  said = 0
  if opened.tokenizer is not None and prompt.text is not None:
    say(prompt.text)

  def each(rows, last=False):
    nonlocal said
    tokens = rows[0]
    if opened.tokenizer is None:
      text = ','.join(map(str, tokens[said:]))
      say(',' * (said > 0 and bool(text)) + text)
      said = len(tokens)
      return
    text = _text(prompt, tokens, opened.tokenizer)
    if not last:  # the rest of a character may come
      text = text.rstrip(PARTIAL)
    say(text[said:])
    said = max(said, len(text))

  return each


# Comparing.


def compare(opened: Opened, prompts: list[Prompt], say: Callable[[str], None]):
  """Head 1 alone and all heads in use, of which there are several, in turn:
  (report's lines, dict)."""
  cfg, decode = opened.cfg, opened.decoder
  ids, stop_ids = [p.ids for p in prompts], _stop_ids(cfg, opened)
  plain, drafted, ratios = _in_turn(opened, [(), decode.widths], ids, stop_ids)
  for prompt, tokens, forwards in zip(prompts, drafted.tokens, drafted.forwards, strict=True):
    say(_shown(_row(prompt, tokens, forwards, opened, stop_ids)) + '\n')
  speed_up = ratios[1]
  per_forward = drafted.tokens_per_forward / plain.tokens_per_forward
  lines = [
    f'{opened.name}: {len(prompts)} prompts, {drafted.n_tokens:,} tokens,'
    f' {len(decode.widths) + 1} heads against head 1 alone, rounds:'
    f' {cfg.bench.rounds}' + _sampled(cfg),
    f'speed-up {bench.shown(speed_up)}, tokens a pass {per_forward:.2f},'
    f' efficiency {speed_up["median"] / per_forward:.2f}',
    *_acceptance(drafted),
  ]
  values = dict(
    speed_up=speed_up,
    tokens_per_forward=per_forward,
    efficiency=speed_up['median'] / per_forward,
    plain=summary(plain),
    drafted=summary(drafted),
  )
  if plain.decode_s < SHORT_S:
    lines.append(
      f'a turn of head 1 took {1e3 * plain.decode_s:.0f} ms: too short for a'
      ' ratio; ask for more tokens'
    )
  if cfg.decode.temperature:
    return [*lines, 'sampled: equal in distribution, not in text'], values
  parted = _partings(opened, ids, plain, drafted)
  lines += [
    f'row {p["row"]} parts at its new token {p["at"]}, where the two best'
    f' logits of head 1 are {p["margin"]:.1e} apart: programs of different'
    ' width round differently'
    for p in parted
  ]
  if not parted:
    lines.append(f'identical, all {len(prompts)} rows')
  return lines, values | dict(identical=not parted, partings=parted)


def _in_turn(opened: Opened, variants: list, ids, stop_ids, rows: int = 0):
  """Each variant's Decoded (of the last round, with the median times) and its
  speed-ups over the first, by round; `rows` prompts at once, 0 = all."""
  rows, rounds = rows or len(ids), opened.cfg.bench.rounds
  seed = opened.cfg.decode.seed

  def decode(widths):
    return decoder_lib.joined(
      [
        opened.decoder(
          ids[i : i + rows],
          widths=widths,
          rows=rows,
          stop_ids=stop_ids,
          seeds=range(seed + i, seed + i + rows),
        )
        for i in range(0, len(ids), rows)
      ]
    )

  last, times = {}, {v: [] for v in variants}
  prefills = {v: [] for v in variants}
  for r in range(rounds + 1):
    for widths in variants if r % 2 else variants[::-1]:
      last[widths] = decode(widths)
      if r:  # the first is not kept
        times[widths].append(last[widths].decode_s)
        prefills[widths].append(last[widths].prefill_s)
  found = [
    last[v]._replace(decode_s=statistics.median(times[v]), prefill_s=statistics.median(prefills[v]))
    for v in variants
  ]
  tokens = [d.n_tokens for d in found]
  ratios = [
    bench.ratio(times[variants[0]], times[v], tokens[0] / n)
    for v, n in zip(variants, tokens, strict=True)
  ]
  return *found, ratios


def _partings(opened: Opened, ids, plain, drafted) -> list[dict]:
  """Where the texts of a row part, and how near head 1's two best were."""
  parted = []
  for row, (prompt, a, b) in enumerate(zip(ids, plain.tokens, drafted.tokens, strict=True)):
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    if not len(differ) and len(a) == len(b):
      continue
    at = int(differ[0]) if len(differ) else n
    logits_V = opened.decoder.next_logits(np.concatenate([prompt, a[:at]]))
    best, second = np.sort(logits_V)[::-1][:2].tolist()
    parted.append(dict(row=row, at=at, margin=best - second))
  return parted


# The bench.


def measure(opened: Opened) -> tuple[list[str], dict]:
  """--bench.what=decode: heads in use by rows at once, in turn, on pieces of
  held-out documents, the same for any number of rows."""
  cfg, decode = opened.cfg, opened.decoder
  b, n = cfg.bench, len(decode.widths) + 1
  drafts = config.parse_numbers(b.drafts) or tuple(range(1, n + 1))
  if max(drafts) > n:
    raise config.ConfigError('bench.drafts', b.drafts, f'{n} heads are in use')
  variants = [(1,) * (W - 1) for W in (1, *(W for W in drafts if W > 1))]
  if not all(width == 1 for width in decode.widths):
    variants.append(decode.widths)  # --decode.tree
  bandwidth = _bandwidth(opened.mesh)
  table = []
  for B in config.parse_numbers(b.batches):
    ids = acceptance.pieces(cfg, max(B, b.pieces), 'bench.pieces')
    *found, ratios = _in_turn(opened, variants, ids, (), B)
    for widths, decoded, speed_up in zip(variants, found, ratios, strict=True):
      # A batch ends with its slowest row.
      each = [decoded.forwards[i : i + B] for i in range(0, len(ids), B)]
      passes = sum(int(forwards.max()) for forwards in each)
      held = sum(len(forwards) * int(forwards.max()) for forwards in each)
      read = decode.read_bytes(widths)
      table.append(
        dict(
          batch=B,
          pieces=len(ids),
          heads=len(widths) + 1,
          widths=widths,
          speed_up=speed_up,
          efficiency=speed_up['median'] * held / decoded.n_tokens,
          bound=decode.read_bytes(()) / read,
          read_bytes=read,
          pass_s=decoded.decode_s / passes,
          over_floor=decoded.decode_s / passes * bandwidth / read,
          **summary(decoded),
        )
      )
  columns = {
    'batch': lambda r: str(r['batch']),
    'heads': lambda r: str(r['heads']) + ' tree' * any(width > 1 for width in r['widths']),
    'tokens a pass': lambda r: f'{r["tokens_per_forward"]:.2f}',
    'speed-up': lambda r: bench.shown(r['speed_up']),
    'efficiency': lambda r: f'{r["efficiency"]:.2f}',
    'bound': lambda r: f'{r["bound"]:.2f}',
    'ms a pass': lambda r: f'{1e3 * r["pass_s"]:.2f}',
    'over weights / bandwidth': lambda r: f'{r["over_floor"]:.1f}',
    'tokens/s': lambda r: f'{r["tokens_per_s"]:,.0f}',
    'drafts stood': lambda r: ' '.join(f'{a:.2f}' for a in r['acceptance']),
  }
  return [
    f'{opened.name}: {b.pieces} prompts of {b.prompt} tokens, or as many as'
    f' rows, {cfg.decode.max_new} new' + _sampled(cfg),
    *bench.table(table, columns),
    f'memory reads {bandwidth / 1e9:.1f} GB/s (a sum over 512 MiB); bound:'
    ' bytes of weights that a pass reads with head 1 alone over those read;'
    ' efficiency: speed-up over tokens a row and pass, until the last row ends',
  ], dict(rows=table, bandwidth=bandwidth, checkpoint=opened.name, config=dataclasses.asdict(cfg))


def _bandwidth(mesh) -> float:
  """Bytes a second that one device reads, with nothing else to do."""
  one = sharding.make_mesh(config.Config(), mesh.devices.flat[:1])
  with jax.set_mesh(one):
    x = jax.jit(lambda: jnp.ones(2**27, jnp.float32))()
    total = jax.jit(jnp.sum)
    seconds = [bench.seconds(lambda: total(x)) for _ in range(8)]
  return x.nbytes / min(seconds)


def say(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()
