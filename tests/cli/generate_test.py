"""`mtp generate` and `mtp bench decode`, end to end."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from mtp_jax.checkpoint import metadata
from mtp_jax.cli import main, prompts, streaming
from mtp_jax.config import fields
from mtp_jax.data import store as store_lib
from mtp_jax.data import tokenizers
from tests.support import oracle, runs, tiny

NO_CACHE = '--train.compilation_cache='


def _generate(workdir, *args):
  return main.main(['generate', f'{workdir}', '--mesh.fsdp=-1', NO_CACHE, *args])


def _oracle(workdir, prompt, new):
  state = runs.restored(workdir, 6)
  params = tiny.flat(state.params)
  return oracle.greedy(params, prompt, new, oracle.Shape('parallel', 2))


def test_generated_text_equals_reference_and_reports_statistics(undisturbed, capsys):
  flags = ('--decode.max_new_tokens=12', '--decode.num_draft_tokens=all')
  assert _generate(undisturbed, '--prompt=ab(', *flags) == 0
  out, err = capsys.readouterr()
  bos, eos = tokenizers.BYTES_BOS, tokenizers.BYTES_EOS
  ids = _oracle(undisturbed, [bos, *b'ab('], 12)
  ids = ids[: ids.index(eos)] if eos in ids else ids
  text = bytes(i for i in ids if i < 256).decode(errors='replace')
  assert out == f'ab({text}\n'
  assert re.search(r'step 6: \d+ tokens in \d+ forward passes, ', err)
  assert 'with 2 of 2 heads, greedy' in err
  assert streaming._heads(7, 3) == '7 heads, 3 of them trained'
  assert re.search(r'conditional acceptance rate of drafts: t\+2: [01]\.\d\d\n', err)
  assert re.search(r'decoding [\d.]+ s: [\d,]+ tokens/s', err)


def test_auto_reports_its_choice(undisturbed, tmp_path, capsys, monkeypatch):
  from mtp_jax.decode import adaptive, auto

  ids = _oracle(undisturbed, [1, 5, 9], 70)
  line = 'num_draft_tokens=auto: plain decoding, '
  for times, new, wanted in (
    ({0: 1.0, 1: 1.0}, 70, r'num_draft_tokens=auto: [01] in \d+ of \d+ forward passes.*; per '),
    ({0: 1.0, 1: 9.0}, 70, line + r'[\d.e-]+ ms per forward pass; 1 draft tokens take 9e.03 ms'),
    (None, 12, line + 'fewer than 64 new tokens are not measured'),
  ):
    monkeypatch.setattr(auto, 'measure', lambda *args, times=times: adaptive.Times(times))
    out = tmp_path / 'out.json'
    flags = (f'--decode.max_new_tokens={new}', f'--out={out}')
    assert _generate(undisturbed, '--prompt_ids=1,5,9', *flags) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == ','.join(map(str, ids[:new]))
    assert 'with up to 2 of 2 heads, greedy' in shown.err
    (found,) = (x for x in shown.err.splitlines() if x.startswith('num_draft_tokens'))
    assert re.match(wanted, found), found
    values = json.loads(out.read_text())
    assert values['auto']['reason'] == found
    assert values['auto']['num_draft_tokens'] in (0, 1)
    assert sum(values['auto']['forwards'].values()) in (0, values['forwards'])


def test_prompt_ids_print_ids(undisturbed, capsys):
  ids = ','.join(map(str, _oracle(undisturbed, [1, 5, 9], 12)))
  for draft in (0, 1):
    assert (
      _generate(
        undisturbed,
        '--prompt_ids=1,5,9',
        '--decode.max_new_tokens=12',
        f'--decode.num_draft_tokens={draft}',
      )
      == 0
    )
    assert capsys.readouterr().out.splitlines()[0] == ids


def test_prompt_file_in_batches(undisturbed, tmp_path, capsys):
  prompts = tmp_path / 'prompts.jsonl'
  records = [
    dict(prompt='a', id='é7', half='\ud800'),
    dict(prompt='bcd e'),
    dict(prompt_ids=[256, 98]),
  ]
  prompts.write_text('\n'.join(json.dumps(r) + '\n' for r in records))
  out = tmp_path / 'rows.jsonl'
  common = ('--decode.max_new_tokens=6', '--decode.stop_token_ids=none')
  assert (
    _generate(
      undisturbed, f'--decode.prompts={prompts}', f'--out={out}', '--decode.batch_size=2', *common
    )
    == 0
  )
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [r.get('prompt') for r in rows] == ['a', 'bcd e', None]
  for row, prompt in zip(rows, ([256, *b'a'], [256, *b'bcd e'], [256, 98]), strict=True):
    assert row['ids'] == _oracle(undisturbed, prompt, 6)
    assert (row['finish'], len(row['ids'])) == ('length', 6)
  assert [row['line'] for row in rows] == [1, 3, 5]
  assert rows[0]['half'] == '\ud800'  # escaped as in the input
  assert rows[0]['id'] == 'é7' and 'é' in out.read_text()
  assert f'=== 1 of 3\na{rows[0]["text"]}\n' in capsys.readouterr().out
  assert not os.path.exists(f'{out}.part')
  lines = tmp_path / 'prompts.txt'
  lines.write_text('a\n\nbcd e\n')
  report = tmp_path / 'report.json'
  assert _generate(undisturbed, f'--decode.prompts={lines}', f'--out={report}', *common) == 0
  found = json.loads(report.read_text())
  assert [r['ids'] for r in found['rows']] == [r['ids'] for r in rows[:2]]
  assert found['tokens'] == 12 and len(found['acceptance']) == 1


def test_samples_depend_on_seed_only(undisturbed, tmp_path, capsys):
  lines = tmp_path / 'prompts.txt'
  lines.write_text('a\na\na\n')

  def texts(*flags):
    out = tmp_path / 'rows.jsonl'
    assert (
      _generate(
        undisturbed,
        f'--decode.prompts={lines}',
        f'--out={out}',
        '--decode.temperature=1',
        '--decode.max_new_tokens=20',
        '--decode.stop_token_ids=none',
        *flags,
      )
      == 0
    )
    return [json.loads(x)['ids'] for x in out.read_text().splitlines()]

  first = texts()
  assert 'exceed the sequence length' in capsys.readouterr().err
  assert first[0] != first[1]
  assert texts('--decode.batch_size=2') == first
  assert texts('--decode.seed=1')[:2] == first[1:]


def test_stop_token_ends_a_row(undisturbed, tmp_path, capsys):
  ids = _oracle(undisturbed, [1, 5, 9], 12)
  stop = ids[3]
  assert (
    _generate(
      undisturbed,
      '--prompt_ids=1,5,9',
      f'--decode.stop_token_ids={stop}',
      '--decode.max_new_tokens=12',
    )
    == 0
  )
  wanted = ids[: ids.index(stop) + 1]
  assert capsys.readouterr().out.splitlines()[0] == ','.join(map(str, wanted))


def test_compare_reports_equal_text(undisturbed, tmp_path, capsys):
  out = tmp_path / 'compare.json'
  assert (
    _generate(
      undisturbed,
      '--prompt=ab',
      '--decode.compare',
      '--decode.num_draft_tokens=all',
      '--decode.max_new_tokens=14',
      '--bench.rounds=2',
      f'--out={out}',
      '--decode.stop_token_ids=none',
    )
    == 0
  )
  shown, error = capsys.readouterr()
  assert re.search(r'rows of up to 1\d tokens exceed the sequence length', error)
  assert 'identical, all 1 rows' in shown and '2 heads compared with head 1 only' in shown
  assert re.search(r'speed-up [\d.]+ \([\d.]+-[\d.]+\), tokens per forward pass', shown)
  found = json.loads(out.read_text())
  assert found['identical'] and not found['divergences']
  assert found['efficiency'] == pytest.approx(
    found['speed_up']['median'] / found['tokens_per_forward']
  )


def test_compare_with_a_measured_number(undisturbed, tmp_path, capsys):
  out = tmp_path / 'compare.json'
  flags = ('--decode.max_new_tokens=64', '--bench.rounds=1', '--decode.stop_token_ids=none')
  assert _generate(undisturbed, '--prompt=ab', '--decode.compare', f'--out={out}', *flags) == 0
  shown = capsys.readouterr().out
  assert 'up to 2 heads (--decode.num_draft_tokens=auto) compared with head 1 only' in shown
  assert 'identical, all 1 rows' in shown and '\nnum_draft_tokens=auto: ' in shown
  found = json.loads(out.read_text())
  assert found['identical'] and 'auto' not in found['plain']
  assert set(found['drafted']['auto']['forward_s']) == {'0', '1'}


def test_compare_without_drafts_is_skipped(undisturbed, capsys):
  assert (
    _generate(
      undisturbed,
      '--prompt=ab',
      '--decode.compare',
      '--decode.num_draft_tokens=0',
      '--decode.max_new_tokens=4',
    )
    == 0
  )
  assert 'nothing to compare' in capsys.readouterr().err


def test_diverging_rows_are_reported(undisturbed, monkeypatch, capsys):
  """Divergence by rounding cannot be provoked: one program's text is changed here."""
  from mtp_jax.decode import decoder

  call = decoder.Decoder.__call__

  def other(self, *args, widths=None, **kwargs):
    found = call(self, *args, widths=widths, **kwargs)
    if widths:
      found.tokens[0] = found.tokens[0] + (np.arange(12) == 5)
    return found

  monkeypatch.setattr(decoder.Decoder, '__call__', other)
  assert (
    _generate(
      undisturbed,
      '--prompt=ab',
      '--decode.compare',
      '--decode.max_new_tokens=12',
      '--bench.rounds=1',
      '--decode.stop_token_ids=none',
    )
    == 0
  )
  out = capsys.readouterr().out
  found = re.search(r'row 0 diverges at generated token 5, where .* are (\S+) apart', out)
  state = runs.restored(undisturbed, 6)
  prompt = [256, *b'ab']
  ids = prompt + _oracle(undisturbed, prompt, 5)
  logits = oracle.forward(
    tiny.flat(state.params),
    np.array([ids + [0, 0]]),
    np.arange(len(ids) + 2)[None],
    oracle.Shape('parallel', 2),
  )[0, 0, -1]
  best, second = np.sort(logits)[::-1][:2]
  assert float(found[1]) == pytest.approx(best - second, rel=0.05)
  assert 'identical' not in out


def test_bench_decode(undisturbed, tmp_path, capsys, monkeypatch):
  from mtp_jax.decode import adaptive

  monkeypatch.setattr(adaptive, 'MIN_NEW_TOKENS', 1000)
  out = tmp_path / 'decode.json'
  assert (
    main.main(
      [
        'bench',
        'decode',
        f'{undisturbed}',
        '--bench.batches=1,2',
        '--bench.num_prompts=3',
        '--bench.prompt_len=8',
        '--bench.num_draft_tokens=0,1,auto',
        '--decode.max_new_tokens=10',
        '--bench.rounds=1',
        '--mesh.fsdp=-1',
        NO_CACHE,
        f'--out={out}',
      ]
    )
    == 0
  )
  found = json.loads(out.read_text())
  keys = [(r['batch'], r['heads'], r['is_auto']) for r in found['rows']]
  of_batch = [(1, False), (2, False), (1, True)]  # ten tokens: plain decoding
  assert keys == [(batch, *of) for batch in (1, 2) for of in of_batch]
  for row in found['rows'][2::3]:
    assert 'fewer than 1000' in row['auto']['reason'] and row['tokens'] == 30
  found['rows'] = [row for row in found['rows'] if not row['is_auto']]
  for row in found['rows']:
    assert row['tokens'] == 10 * row['pieces'] == 30
    assert 1 <= row['tokens_per_forward'] <= row['heads']
  plain, drafted, *two = found['rows']
  for one, other in zip((plain, drafted), two, strict=True):
    assert one['forwards'] == other['forwards']
    # A batch takes as many forward passes as its slowest row.
    held = [r['efficiency'] * r['tokens'] / r['speed_up']['median'] for r in (one, other)]
    assert held[0] == pytest.approx(one['forwards'])
    assert -1e-6 < held[1] - held[0] < 10
  assert plain['efficiency'] == two[0]['efficiency'] == 1
  assert plain['bound'] == 1 and plain['speed_up']['median'] == 1
  # 16 x 16 x 4 of attention and 3 x 16 x 32, two norms: of 2 + 1 layers, twice
  # the unembedding of 264 tokens.
  layer = 4 * 16**2 + 3 * 16 * 32 + 2 * 16
  assert plain['read_bytes'] == 4 * (2 * layer + 16 + 16 * 264)
  assert drafted['read_bytes'] == 4 * (3 * layer + 16 + 2 * 16 * 264)
  shown = capsys.readouterr().out
  assert 'tokens per forward' in shown and 'batch 2: num_draft_tokens=auto: plain' in shown


def test_checkpoint_decodes_without_its_store(store, tmp_path, capsys):
  """A run directory contains its SentencePiece tokenizer."""
  # Four characters: as many tokens as bytes have, and so the step compiled for
  # `undisturbed`.
  rng, text = np.random.default_rng(0), tmp_path / 'text.jsonl'
  text.write_text(
    ''.join(
      json.dumps(dict(text=' '.join(rng.choice(['def', 'f', 'fed'], 40)))) + '\n' for _ in range(40)
    )
  )
  pieces = tmp_path / 'pieces'
  assert (
    main.main(
      [
        'prepare',
        f'--data.store={pieces}',
        '--data.tokenizer=train:264',
        f'--data.documents=jsonl:{text}',
        '--data.valid_fraction=0',
      ]
    )
    == 0
  )
  workdir = tmp_path / 'run'
  assert runs.train(str(pieces), workdir) == 0
  shutil.rmtree(pieces)
  capsys.readouterr()
  args = ('--prompt=def f', '--decode.max_new_tokens=4', '--mesh.fsdp=-1')
  assert _generate(workdir, *args) == 0
  assert capsys.readouterr().out.startswith('def f')
  assert _generate(workdir, *args, '--data.tokenizer=bytes') == 2
  error = capsys.readouterr().err
  assert error.startswith('mtp: --data.tokenizer=bytes: is bytes; the')
  assert 'was trained with sentencepiece#' in error
  # A run of an earlier version has no tokenizer folder; its store has one.
  shutil.rmtree(workdir / 'tokenizer')
  assert _generate(workdir, *args) == 2
  assert '--data.store' in capsys.readouterr().err


@pytest.mark.parametrize(
  'args, error',
  [
    (
      ['--prompt=a', '--decode.num_draft_tokens=2'],
      '--decode.num_draft_tokens=2: auto, all, or an integer from 0 to --heads.n - 1 = 1',
    ),
    (
      ['--prompt=a', '--decode.num_draft_tokens=Auto'],
      '--decode.num_draft_tokens=Auto: auto, all, or an integer',
    ),
    (['--prompt=a', '--decode.tree=2,2'], '--decode.tree=2,2: with --heads.n=2 at most 1 numbers'),
    (
      ['--prompt=a', '--decode.tree=2', '--decode.temperature=1'],
      '--decode.tree=2: needs --decode.temperature=0',
    ),
    (['--prompt=a', '--decode.tree=0'], '--decode.tree=0: candidates of heads'),
    (['--prompt=a', '--decode.tree=99'], '--decode.tree=99: candidates of'),
    (
      ['--prompt=a', '--decode.tree=2', '--decode.num_draft_tokens=0'],
      '--decode.num_draft_tokens=0: --decode.tree=2 drafts 1 tokens in a row',
    ),
    (
      ['--prompt=abcd', '--decode.cache_length=4'],
      '--decode.cache_length=4: --prompt=abcd has 5 tokens; no room for a new one',
    ),
    ([], '--prompt=: none is given; there are --prompt, --prompt_ids'),
    (['--prompt=a', '--prompt_ids=1'], '--prompt=a: give one of'),
    (['--prompt_ids=1,x'], '--prompt_ids=1,x: token ids, with commas'),
    (['--prompt_ids=1,999'], '--prompt_ids=1,999: has 999; ids are 0'),
    (['--prompt_ids=1,99999999999999999999'], '--prompt_ids=1,9999999999999'),
    (['--prompt=a', '--decode.temperature=1e-9'], '--decode.temperature=1e-09'),
    (['--prompt=a', '--decode.top_p=1e-46'], '--decode.top_p=1e-46: must be'),
    (['--prompt=a', '--out=/proc/x.json'], '--out=/proc/x.json: cannot be'),
    (['--prompt=\udcff'], "--prompt='\\udcff': is not text"),
    (['--prompt=a', '--decode.top_k=5'], '--decode.top_k=5: needs --decode.temperature'),
    (['--prompt=a', '--decode.min_p=0.5'], '--decode.min_p=0.5: needs'),
    (['--prompt=a', '--loss.curriculum=0:1'], '--loss.curriculum=0:1: the'),
    (
      ['--prompt=a', '--decode.compare', '--decode.batch_size=2'],
      '--decode.batch_size=2: not with --decode.compare',
    ),
    (
      ['--prompt=a', '--decode.compare', '--out=x.jsonl'],
      '--out=x.jsonl: not with --decode.compare',
    ),
    (['--decode.prompts=/no/such'], '/no/such: cannot be'),
    (['--prompt=a', '--decode.stop_token_ids=7,x'], '--decode.stop_token_ids=7,x: none,'),
    (['--prompt=a', '--heads.n=1'], '--heads.n=1: the checkpoint'),
    (['--prompt=a', '--model.d_ff=64'], '--model.d_ff=64: the checkpoint'),
    (
      ['--prompt=a', '--distributed.coordinator_address=auto'],
      '--distributed.coordinator_address=auto: this command runs in one process',
    ),
  ],
)
def test_invalid_generate_flags_are_one_line_errors(undisturbed, args, error, capsys):
  assert _generate(undisturbed, *args) == 2
  shown = capsys.readouterr()
  assert shown.err.startswith(f'mtp: {error}'), shown.err
  assert shown.err.count('\n') == 1 and not shown.out


def test_cache_larger_than_memory_is_refused(undisturbed, tmp_path, capsys):
  size, rows = 1_000_000, 8_000
  lines = tmp_path / 'prompts.txt'
  lines.write_text('a\n' * rows)
  assert (
    _generate(
      undisturbed,
      f'--decode.prompts={lines}',
      f'--decode.cache_length={size}',
      f'--decode.max_new_tokens={size}',
      f'--decode.batch_size={rows}',
    )
    == 2
  )
  line = capsys.readouterr().err.splitlines()[-1]
  # Two layers of the trunk and two heads, a thousand rows on each device.
  gib = 1000 * 2 * (1 + 2) * 2 * 8 * 4 * (size // 64 + 1) * 64 / 2**30
  found = re.fullmatch(
    f'mtp: --decode.cache_length={size}: keys and values of 8,?000 rows are'
    r' ([\d,]+) GiB.*',
    line,
  )
  assert found and found[1] == f'{gib:,.0f}', line


def test_missing_checkpoint_is_a_one_line_error(tmp_path, capsys):
  assert _generate(tmp_path, '--prompt=a') == 2
  error = capsys.readouterr().err
  assert error == (f'mtp: {tmp_path}: no complete checkpoint there\n')
  assert main.main(['generate', '--prompt=a', NO_CACHE]) == 2
  assert 'generate needs a CHECKPOINT: a run directory' in capsys.readouterr().err


def test_invalid_prompt_names_its_line(undisturbed, tmp_path, capsys):
  path = tmp_path / 'prompts.jsonl'
  for text, problem in (
    ('{"prompt": "a"}\n{"text": 1}\n', 'line 2 must be an object with prompt'),
    ('[1]\n', 'line 1 must be an object'),
    ('{"prompt"\n', 'line 1 is not JSON'),
    ('{"prompt": "a", "prompt_ids": [1]}\n', 'line 1 has both'),
    ('{"prompt": "\\ud800"}\n', 'line 1 is not text'),
    ('{"prompt": null}\n', 'line 1 must be an object'),
    ('{"prompt": ["a"]}\n', 'line 1 must be an object'),
    ('{"prompt_ids": [1.7, 2]}\n', 'line 1 must be an object'),
    ('{"prompt_ids": [true]}\n', 'line 1 must be an object'),
    ('{"prompt_ids": [[1, 2]]}\n', 'line 1 must be an object'),
    ('{"prompt_ids": 5}\n', 'line 1 must be an object'),
    ('{"prompt_ids": [99999999999999999999]}\n', 'line 1 must be an object'),
    ('{"prompt_ids": []}\n', f'mtp: {path}, line 1: has no token'),
    ('\n{"prompt_ids": [300]}\n', f'{path}, line 2: has 300; ids are 0'),
    ('\n', 'has no prompt'),
  ):
    path.write_text(text)
    assert _generate(undisturbed, f'--decode.prompts={path}') == 2
    assert problem in capsys.readouterr().err


def test_huge_prompt_is_a_one_line_error(undisturbed, capsys):
  assert _generate(undisturbed, '--prompt=' + 'x' * 3_000_000) == 2
  error = capsys.readouterr().err
  assert error.startswith('mtp: --prompt=xxx') and error.count('\n') == 1
  assert 'has 3,000,001 tokens; with --decode.max_new_tokens=' in error
  assert len(error) < 600
  assert _generate(undisturbed, '--decode.prompts=s3://x') == 2
  error = capsys.readouterr().err
  assert error == 'mtp: s3://x: unsupported storage; use gs://\n'


def test_streamed_text_is_complete(undisturbed):
  """Also with a character that is never completed, and a prompt that ends in one."""
  from mtp_jax.decode import load

  opened = load.LoadedModel('', None, None, None, tokenizers.get('bytes'))
  for prompt, new, wanted in (
    ([256, 97], [98, 0xE2, 0x82], 'b\ufffd'),
    ([256, 0xE2], [0x82, 0xAC, 97], '€a'),
  ):
    shown = []
    stream = streaming._stream(opened, prompts.Prompt(np.array(prompt), None), shown.append)
    for n in range(len(new) + 1):
      stream([np.array(new[:n], int)])
    stream([np.array(new)], last=True)
    assert ''.join(shown) == wanted


def test_seeds_wrap_at_int32(undisturbed, tmp_path):
  lines = tmp_path / 'prompts.txt'
  lines.write_text('a\nb\n')
  assert (
    _generate(
      undisturbed,
      f'--decode.prompts={lines}',
      '--decode.temperature=1',
      f'--decode.seed={2**31 - 1}',
      '--decode.max_new_tokens=3',
      '--decode.top_k=2000000000',
    )
    == 0
  )


def test_output_file_is_not_lost_on_error(undisturbed, tmp_path, capsys):
  """Neither the prompts, a device, nor the rows of finished batches."""
  lines = tmp_path / 'prompts.txt'
  lines.write_text('a\nb\nc\n')
  args = (f'--decode.prompts={lines}', '--decode.max_new_tokens=3')
  assert _generate(undisturbed, *args, f'--out={lines}') == 2
  assert 'is the file of --decode.prompts' in capsys.readouterr().err
  assert lines.read_text() == 'a\nb\nc\n'
  link = tmp_path / 'link'
  link.symlink_to('/dev/null')
  assert _generate(undisturbed, *args, f'--out={link}') == 0
  assert link.is_symlink() and not os.path.isfile('/dev/null')
  from mtp_jax.decode import decoder

  call, calls = decoder.Decoder.__call__, []

  def second_fails(self, *args, **kwargs):
    calls.append(args)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return call(self, *args, **kwargs)

  out = tmp_path / 'rows.jsonl'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(decoder.Decoder, '__call__', second_fails)
    assert _generate(undisturbed, *args, f'--out={out}', '--decode.batch_size=2') == 130
  assert not out.exists()
  part = (tmp_path / 'rows.jsonl.part').read_text().splitlines()
  assert [json.loads(row)['prompt'] for row in part] == ['a', 'b']


def test_row_that_fills_the_cache_finishes_with_cache(undisturbed, tmp_path):
  out = tmp_path / 'one.jsonl'
  assert (
    _generate(
      undisturbed,
      '--prompt=abc',
      '--decode.cache_length=6',
      '--decode.stop_token_ids=none',
      f'--out={out}',
    )
    == 0
  )
  row = json.loads(out.read_text())
  assert (row['finish'], len(row['ids'])) == ('cache', 2)


def test_strided_heads_do_not_draft():
  c = tiny.cfg(heads__n=3, heads__stride=2)
  for flag, value in (('num_draft_tokens', '1'), ('tree', '2')):
    with pytest.raises(fields.ConfigError, match='leave gaps between drafts'):
      tiny.cfg(heads__n=3, heads__stride=2, **{f'decode__{flag}': value})
  from mtp_jax.decode import decoder

  assert decoder.widths(c, 3) == ()


def test_run_directory_contains_its_tokenizer(undisturbed):
  cfg = metadata.read(str(undisturbed), 6).cfg
  assert cfg.data.tokenizer == 'bytes'
  assert not os.path.exists(undisturbed / 'tokenizer')
  assert store_lib.FORMAT  # bytes need no file
