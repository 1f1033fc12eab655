"""Text of `mtp generate`, as it is decoded. Imports jax."""

import json
import sys
from collections.abc import Callable

from mtp_jax.cli import prompts as prompts_lib
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import load as load_lib
from mtp_jax.decode import summary as summary_lib
from mtp_jax.evals import subject as subject_lib

PARTIAL = '\ufffd'  # of a character whose last bytes are not there yet


def decode_prompts(
  opened: load_lib.LoadedModel,
  prompts: list[prompts_lib.Prompt],
  say: Callable[[str], None],
  part=None,
) -> dict:
  """Decodes all prompts, and says what it wrote: one alone as it comes, several
  each when its batch is done. How it went goes to stderr.

  part: of paths.growing; each batch's rows are written to it when it is done.

  Returns:
    the report, with all rows.
  """
  cfg, decode = opened.cfg, opened.decoder
  B = min(cfg.decode.batch_size or len(prompts), len(prompts))
  cache = decoder_lib.cache_length([p.ids for p in prompts], cfg)
  stop_ids = summary_lib.stop_ids(cfg, opened)
  rows, done = [], []
  _log(_warn_context(cfg, prompts, cache))
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
      record = row(prompt, tokens, forwards, opened, stop_ids)
      rows.append(record)
      if part:
        line = f'{json.dumps(record, ensure_ascii=False)}\n'
        # A prompt file may spell half a character: it is escaped again.
        part.write(line.encode(errors='backslashreplace'))
        part.flush()
      if not stream:
        say(f'=== {len(rows)} of {len(prompts)}\n{shown(record)}\n')
  if len(prompts) == 1:
    say('\n')
  total = decoder_lib.joined(done)
  _log(
    [
      f'{opened.name}: {total.n_tokens:,} tokens in'
      f' {int(total.forwards.sum()):,} forward passes of a row,'
      f' {total.tokens_per_forward:.2f} a pass with'
      f' {len(decode.widths) + 1} of {cfg.heads.n} heads' + summary_lib.sampled(cfg),
      *summary_lib.acceptance_lines(total),
      f'prompts {total.prefill_s:.3f} s, decoding {total.decode_s:.3f} s:'
      f' {total.n_tokens / total.decode_s:,.0f} tokens/s'
      f' (compiled in {total.compile_s:.1f} s)',
    ]
  )
  if cfg.decode.compare:
    _log(['head 1 alone was in use: nothing to compare it with'])
  return summary_lib.summary(total) | dict(rows=rows)


def _log(lines: list[str]) -> None:
  """Beside the text, which may be piped."""
  sys.stdout.flush()
  for line in lines:
    print(line, file=sys.stderr, flush=True)


def _warn_context(cfg, prompts, cache: int) -> list[str]:
  longest = max(len(p.ids) for p in prompts) + cfg.decode.max_new_tokens
  longest = min(longest, cache)
  if longest <= subject_lib.context(cfg):
    return []
  return [
    f'up to {longest:,} tokens a row are more than the windows that it was'
    f' trained on (--data.seq_len={cfg.data.seq_len:,})'
  ]


def row(prompt: prompts_lib.Prompt, tokens, forwards, opened, stop_ids) -> dict:
  """What a prompt became, with all that its line said."""
  record = dict(prompt.fields or {})
  if prompt.line:
    record['line'] = prompt.line
  if prompt.text is None:
    record['prompt_ids'] = prompt.ids.tolist()
  else:
    record['prompt'] = prompt.text
  if opened.tokenizer is not None:
    record['text'] = _text(prompt, tokens, opened.tokenizer)
  finish = 'length' if len(tokens) == opened.cfg.decode.max_new_tokens else 'cache'
  if len(tokens) and int(tokens[-1]) in stop_ids:
    finish = 'stop'
  return record | dict(ids=tokens.tolist(), forwards=int(forwards), finish=finish)


def _text(prompt: prompts_lib.Prompt, tokens, tokenizer) -> str:
  """What the new tokens add to the text of the prompt's."""
  # A prompt of ids may end within a character.
  before = tokenizer.decode(prompt.ids).rstrip(PARTIAL)
  return tokenizer.decode([*prompt.ids, *tokens])[len(before) :]


def shown(row: dict) -> str:
  if 'text' not in row:
    return ','.join(map(str, row['ids']))
  return row.get('prompt', '') + row['text']


def _stream(opened: load_lib.LoadedModel, prompt: prompts_lib.Prompt, say):
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


def print_rows(opened: load_lib.LoadedModel, prompts: list[prompts_lib.Prompt], decoded) -> None:
  """Prints each prompt with what was decoded of it."""
  stop_ids = summary_lib.stop_ids(opened.cfg, opened)
  for prompt, tokens, forwards in zip(prompts, decoded.tokens, decoded.forwards, strict=True):
    say(shown(row(prompt, tokens, forwards, opened, stop_ids)) + '\n')


def say(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()
