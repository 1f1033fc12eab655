"""GSM8K: extracted numbers, prompts, scores, output of mtp eval."""

import decimal
import gzip
import json

import pytest

from mtp_jax.checkpoint import saver
from mtp_jax.cli import main
from mtp_jax.config import fields, schema
from mtp_jax.data import tokenizers
from mtp_jax.decode import decoder
from mtp_jax.evals import gsm8k, intervals, subject
from tests.support import tiny

ROWS = [
  dict(question='How many are 2 and 2?', answer='2 + 2 = <<2+2=4>>4\n#### 4'),
  dict(question='And of 1000 twice?', answer='1000 + 1000\n#### 2,000'),
  dict(question='Half of 3?', answer='3 / 2 = 1.50\n#### 1.50'),
]


@pytest.mark.parametrize(
  'text, found',
  [
    (' 20 - 12 = 8. The answer is 8.', '8'),
    (' The answer is 18', '18'),
    (' The answer is 18.00. She has 3 dogs.', '18'),
    (' The answer is $1,234.50.', '1234.5'),
    (' The answer is -$5.', '-5'),
    (' The answer is 5 + 6 = 11.', '11'),
    (' The answer is 9-2.', '2'),
    (' The answer is .5 miles', '0.5'),
    (' The answer is\n42 apples\nor 3', '42'),
    (' The answer is 3. No: The answer is 4.', '3'),
    (' The answer is 3.\n\nQ. Of 9?\nA: The answer is 4.', '3'),
    (' The answer is 3.\n#### 5', '3'),
    (' The answer is $9{,}500.', '9500'),
    (' The answer is \\$1{,}234{,}567.50.', '1234567.5'),
    ('3 + 4 = 7\n#### 7', '7'),
    ('#### 2,125', '2125'),
    (' The answer is 50% of it.', '50'),
    (' It is 8.', None),
    (' The answer is unknown.', None),
    ('', None),
  ],
)
def test_number_extracts_the_final_answer(text, found):
  assert gsm8k.number(text) == (found and decimal.Decimal(found))


def test_few_shot_examples_have_answers():
  found = [gsm8k.number(e.worked) for e in gsm8k.SHOTS]
  assert found == [6, 5, 39, 8, 9, 29, 33, 8]  # from the paper


def test_gsm8k_prompt_format():
  examples = [gsm8k.Example('Of 1?', 'It is 1. The answer is 1.')]
  assert gsm8k.prompt('Of 2?', examples) == (
    'Q: Of 1?\nA: It is 1. The answer is 1.\n\nQ: Of 2?\nA:'
  )


@pytest.mark.parametrize(
  'successes, n, low, high',
  [
    # From Newcombe 1998, Statistics in Medicine 17, 857-872, table I.
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (29, 29, 0.8830, 1.0),
    (0, 0, 0.0, 1.0),
  ],
)
def test_wilson_matches_published_values(successes, n, low, high):
  found = intervals.wilson(successes, n)
  assert found == pytest.approx((low, high), abs=5e-5)
  assert found[0] >= 0 and found[1] <= 1


def test_wilson_contains_the_rate_and_is_symmetric():
  for n in (1, 7, 1319):
    for successes in {0, 1, n // 2, n}:
      low, high = intervals.wilson(successes, n)
      assert 0 <= low <= successes / n <= high <= 1
      other = intervals.wilson(n - successes, n)
      assert (1 - high, 1 - low) == pytest.approx(other, abs=1e-12)


@pytest.fixture
def data(tmp_path):
  path = tmp_path / 'test.jsonl.gz'
  with gzip.open(path, 'wt') as f:
    f.writelines(json.dumps(row) + '\n' for row in ROWS)
  return str(path)


def test_gsm8k_problems_are_read(data):
  found = gsm8k.problems(data)
  assert [(p.id, p.answer) for p in found] == [(0, 4), (1, 2000), (2, 1.5)]
  assert [p.question for p in found] == [row['question'] for row in ROWS]


@pytest.mark.parametrize(
  'line, problem',
  [
    ('{"question": "a", "answer": "4"}', ":1: no number after '####'"),
    ('{"question": "a", "answer": "4 ####"}', 'no number after'),
    ('{"question": "a"}', "no field 'answer'"),
    ('{"question": 1, "answer": "#### 4"}', 'is int, not a string'),
    ('{', 'bad JSON'),
    ('', 'contains no problem'),
  ],
)
def test_malformed_gsm8k_problems_raise(line, problem, tmp_path):
  path = tmp_path / 'test.jsonl'
  path.write_text(line + '\n')
  with pytest.raises(fields.ConfigError, match=problem):
    gsm8k.problems(str(path))


def _cfg(**changes):
  return tiny.cfg(heads__n=2, model__vocab_size=258, data__tokenizer='bytes', **changes)


@pytest.fixture(scope='module')
def model_subject():
  c = _cfg(decode__max_new_tokens=9, decode__stream_every=2)
  m = tiny.mesh(c)
  w = tiny.model(c, m)
  return subject.Subject('tiny', c, w, m, tokenizers.get('bytes'), 1, decoder.Decoder(w, c, m, 2))


def _with_flags(model_subject, data, **changes):
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  cfg = schema.replace(model_subject.cfg, **{'eval.data': data} | changes)
  return model_subject._replace(cfg=cfg)


def test_gsm8k_accuracy_counts_answers(model_subject, data, monkeypatch):
  texts = {
    'How many are 2 and 2?': ' 2 and 2. The answer is 4.0.',
    'And of 1000 twice?': ' The answer is 200.',
    'Half of 3?': ' 1.5',
  }

  def write(_, prompts, generation):
    assert generation == subject.GenerationConfig(max_new=9, stop=('Q:', 'Question:'))
    questions = [p.rsplit('Q: ', 1)[1][: -len('\nA:')] for p in prompts]
    return [
      [subject.Text(texts[q], tokenizers.get('bytes').encode('abcd'), 2, 'stop')] for q in questions
    ]

  monkeypatch.setattr(subject, 'continuations', write)
  long = _with_flags(model_subject, data, eval__num_fewshot=0, model__max_position_embeddings=100)
  found = gsm8k.run(long, '')
  assert found.scalars == dict(
    accuracy=1 / 3,
    accuracy_low=pytest.approx(0.0615, abs=1e-4),
    accuracy_high=pytest.approx(0.7923, abs=1e-4),
    shots=0,
    tokens_per_forward=2.0,
  )
  assert found.lines == [
    '  3 problems, accuracy 33.3% (6.1% to 79.2%), 0 few-shot examples,'
    ' 2.00 tokens per forward pass'
  ]
  short = _with_flags(model_subject, data, eval__num_fewshot=0, model__max_position_embeddings=30)
  assert '  2 prompts with 9 new tokens exceed' in gsm8k.run(short, '').lines[1]


@pytest.mark.parametrize(
  'context, shots, kept', [(10_000, -1, 8), (10_000, 2, 2), (460, 2, 1), (16, 2, 0)]
)
def test_few_shot_examples_that_do_not_fit_are_dropped(
  context, shots, kept, model_subject, data, monkeypatch
):
  seen = []

  def write(_, prompts, generation):
    seen.extend(prompts)
    ids = tokenizers.get('bytes').encode('abcd')
    return [[subject.Text('', ids, 2, 'length')] for _ in prompts]

  monkeypatch.setattr(subject, 'continuations', write)
  found = gsm8k.run(
    _with_flags(
      model_subject,
      data,
      eval__limit=1,
      eval__num_fewshot=shots,
      model__max_position_embeddings=context,
    ),
    '',
  )
  first = len(gsm8k.SHOTS) if shots < 0 else shots
  examples = gsm8k.SHOTS[first - kept : first]
  assert seen == [gsm8k.prompt(ROWS[0]['question'], examples)]
  assert found.scalars['shots'] == found.items[0]['shots'] == kept
  fewer = [line for line in found.lines if 'fewer examples' in line]
  assert len(fewer) == (kept < first)
  assert found.lines[-1] == '  1 texts truncated at --decode.max_new_tokens=9'
  if fewer:
    assert f'the context of {context} tokens' in fewer[0]


def _eval(workdir, *flags):
  return main.main(['eval', f'{workdir}', '--mesh.fsdp=-1', '--train.compilation_cache=', *flags])


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = str(tmp_path_factory.mktemp('runs') / 'run')
  c = schema.replace(_cfg(), **{'train.workdir': path})
  model = tiny.model(c, tiny.mesh(c))
  saver.save_params(model, c, tokenizers.get('bytes'), path)
  return path


def test_mtp_eval_runs_gsm8k(workdir, data, tmp_path, capsys):
  out = tmp_path / 'out.json'
  assert (
    _eval(
      workdir,
      '--eval.tasks=gsm8k',
      f'--eval.data={data}',
      '--eval.limit=2',
      '--eval.num_fewshot=1',
      '--decode.max_new_tokens=7',
      f'--out={out}',
    )
    == 0
  )
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].endswith('step 0, gsm8k:')
  assert '2 problems, accuracy 0.0%' in lines[1]
  found = json.loads(out.read_text())['suites']['gsm8k']
  assert found['accuracy'] == 0 and len(found['items']) == 2


@pytest.mark.parametrize(
  'flags, problem',
  [
    (['--eval.tasks=gsm8k'], 'gsm8k needs its problems'),
    (['--eval.tasks=gsm8k', '--eval.data=/gone.jsonl'], 'cannot read /gone'),
    (['--eval.tasks=gsm8k', '--eval.num_fewshot=9'], '8 few-shot examples'),
    (['--eval.tasks=gsm8k:x'], 'gsm8k takes no argument'),
  ],
)
def test_bad_suite_flags_raise(flags, problem, workdir, capsys):
  assert _eval(workdir, *flags) == 2
  error = capsys.readouterr().err
  assert problem in error and error.count('\n') == 1


def test_last_mark_of_a_problem_has_its_answer(tmp_path):
  row = dict(question='?', answer='The answer is 3.\n#### 4\n#### 5')
  (tmp_path / 'x.jsonl').write_text(json.dumps(row))
  assert gsm8k.problems(str(tmp_path / 'x.jsonl'))[0].answer == 5
  row['answer'] = 'The answer is 3.'
  (tmp_path / 'x.jsonl').write_text(json.dumps(row))
  with pytest.raises(fields.ConfigError, match="no number after '####'"):
    gsm8k.problems(str(tmp_path / 'x.jsonl'))
