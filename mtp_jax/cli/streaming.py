"""Output of `mtp generate`, streamed as it is decoded. Imports jax."""

import json
import sys
from collections.abc import Callable

from mtp_jax.cli import prompts as prompts_lib
from mtp_jax.decode import adaptive
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import load as load_lib
from mtp_jax.decode import summary as summary_lib
from mtp_jax.evals import subject as subject_lib

PARTIAL = '\ufffd'  # decoded in place of an incomplete character


def decode_prompts(
  opened: load_lib.LoadedModel,
  prompts: list[prompts_lib.Prompt],
  write: Callable[[str], None],
  part=None,
) -> dict:
  """Decodes all prompts and writes their text: a single one as a stream, several
  after each batch. Statistics go to stderr.

  part: of paths.open_append; the rows of each finished batch are appended to it.

  Returns:
    The report, with all rows.
  """
  cfg, decode = opened.cfg, opened.decoder
  B = min(cfg.decode.batch_size or len(prompts), len(prompts))
  cache = decoder_lib.cache_length([p.ids for p in prompts], cfg)
  stop_ids = summary_lib.stop_ids(cfg, opened)
  widths = decoder_lib.requested(cfg, decode.active)
  rows, done = [], []
  for first in range(0, len(prompts), B):
    batch = prompts[first : first + B]
    stream = _stream(opened, batch[0], write) if len(prompts) == 1 else None
    decoded = decode(
      [p.ids for p in batch],
      widths=widths,
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
        # A prompt file may escape half a surrogate pair: it is escaped again.
        part.write(line.encode(errors='backslashreplace'))
        part.flush()
      if not stream:
        write(f'=== {len(rows)} of {len(prompts)}\n{shown(record)}\n')
  if len(prompts) == 1:
    write('\n')
  total = decoder_lib.joined(done)
  _log(
    [
      f'{opened.name}: {total.n_tokens:,} tokens in'
      f' {int(total.forwards.sum()):,} forward passes,'
      f' {total.tokens_per_forward:.2f} tokens per forward pass with'
      f' {"up to " * (widths == adaptive.AUTO)}{_heads(1 + len(decode.widths), cfg.heads.n)}'
      + summary_lib.sampled(cfg),
      *summary_lib.acceptance_lines(total),
      *summary_lib.auto_lines(total),
      f'prompts {total.prefill_s:.3f} s, decoding {total.decode_s:.3f} s:'
      f' {total.n_tokens / total.decode_s:,.0f} tokens/s'
      f' (compiled in {total.compile_s:.1f} s)',
    ]
  )
  if cfg.decode.compare:
    _log(['plain decoding with head 1 only: nothing to compare'])
  return summary_lib.summary(total) | dict(rows=rows)


def _heads(used: int, trained: int) -> str:
  if used > trained:  # a shared module, applied again
    return f'{used} heads, {trained} of them trained'
  return f'{used} of {trained} heads'


def _log(lines: list[str]) -> None:
  """Prints lines to stderr, as stdout may be piped."""
  sys.stdout.flush()
  for line in lines:
    print(line, file=sys.stderr, flush=True)


def warn_of_length(prompts: list[prompts_lib.Prompt], cfg) -> None:
  """Prints a line to stderr if rows may become longer than what the model was trained on."""
  cache = decoder_lib.cache_length([p.ids for p in prompts], cfg)
  longest = max(len(p.ids) for p in prompts) + cfg.decode.max_new_tokens
  longest = min(longest, cache)
  if longest > subject_lib.context(cfg):
    line = f'rows of up to {longest:,} tokens exceed the sequence length that the model was'
    _log([f'{line} trained on (--data.seq_len={cfg.data.seq_len:,})'])


def row(prompt: prompts_lib.Prompt, tokens, forwards, opened, stop_ids) -> dict:
  """Returns the output record of a prompt, with the other fields of its line."""
  record = dict(prompt.fields or {})
  if prompt.line:
    record['line'] = prompt.line
  text = None if opened.tokenizer is None else _text(prompt, tokens, opened.tokenizer)
  if prompt.messages is not None:  # what jsonl:PATH#messages trains on
    record['messages'] = [*prompt.messages, dict(role='assistant', content=text)]
  elif prompt.text is None:
    record['prompt_ids'] = prompt.ids.tolist()
  else:
    record['prompt'] = prompt.text
  if text is not None:
    record['text'] = text
  finish = 'length' if len(tokens) == opened.cfg.decode.max_new_tokens else 'cache'
  if len(tokens) and int(tokens[-1]) in stop_ids:
    finish = 'stop'
  return record | dict(ids=tokens.tolist(), forwards=int(forwards), finish=finish)


def _text(prompt: prompts_lib.Prompt, tokens, tokenizer) -> str:
  """Returns the text that the new tokens add to that of the prompt."""
  # A prompt of ids may end within a character.
  before = tokenizer.decode(prompt.ids).rstrip(PARTIAL)
  return tokenizer.decode([*prompt.ids, *tokens])[len(before) :]


def shown(row: dict) -> str:
  if 'text' not in row:
    return ','.join(map(str, row['ids']))
  return row.get('prompt', '') + row['text']


def _stream(opened: load_lib.LoadedModel, prompt: prompts_lib.Prompt, write):
  """Returns each(rows), which writes the part of the text not yet written."""
  n_written = 0
  if opened.tokenizer is not None and prompt.text is not None:
    write(prompt.text)

  def each(rows, last=False):
    nonlocal n_written
    tokens = rows[0]
    if opened.tokenizer is None:
      text = ','.join(map(str, tokens[n_written:]))
      write(',' * (n_written > 0 and bool(text)) + text)
      n_written = len(tokens)
      return
    text = _text(prompt, tokens, opened.tokenizer)
    if not last:  # a character may be incomplete
      text = text.rstrip(PARTIAL)
    write(text[n_written:])
    n_written = max(n_written, len(text))

  return each


def print_rows(opened: load_lib.LoadedModel, prompts: list[prompts_lib.Prompt], decoded) -> None:
  """Prints each prompt with its continuation."""
  stop_ids = summary_lib.stop_ids(opened.cfg, opened)
  for prompt, tokens, forwards in zip(prompts, decoded.tokens, decoded.forwards, strict=True):
    write_stdout(shown(row(prompt, tokens, forwards, opened, stop_ids)) + '\n')


def write_stdout(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()
