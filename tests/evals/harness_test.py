"""lm-evaluation-harness: parity with its own class on the exported model."""

import importlib
import json
import multiprocessing
import os
import sys

import numpy as np
import pytest

os.environ['HF_HUB_OFFLINE'] = '1'  # read when the libraries are imported

import lm_eval
from lm_eval import evaluator
from lm_eval.api.instance import Instance

from mtp_jax.checkpoint import saver
from mtp_jax.cli import main
from mtp_jax.config import fields, schema
from mtp_jax.data import tokenizers
from mtp_jax.decode import decoder
from mtp_jax.evals import gsm8k, harness, intervals, subject
from mtp_jax.interop import hf_folder, tokens
from tests.support import parity, tiny

HFLM = not parity.MISSING and (  # imports torch
  importlib.import_module('lm_eval.models.huggingface').HFLM
)

CONTEXT = 64
MODELS = [('parallel', 4), ('anticausal', 4), ('sequential', 3), ('parallel', 1)]
TASKS = {
  'tiny_mc': """
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
  'tiny_ll': """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
  'tiny_roll': """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
""",
  'tiny_gen': """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean}]
""",
}
WORDS = 'the old king sat by a fire and sang us ümlaut 7 tales of the sea'


@pytest.fixture(autouse=True)
def no_environment_info(monkeypatch):
  monkeypatch.setattr(evaluator, 'add_env_info', lambda results: None)  # slow


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  """A directory of local tasks with their data; needs no network."""
  path, rng = tmp_path_factory.mktemp('tasks'), np.random.default_rng(0)

  def text(n):
    return ' '.join(rng.choice(WORDS.split(), size=n))

  rows = [
    dict(question=text(n), choices=[' ' + text(k) for k in (1, 2, 3)], gold=n % 3)
    for n in (1, 3, 4, 9, 30, 31, 60)
  ]
  data = path / 'data.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  for name, body in TASKS.items():
    (path / f'{name}.yaml').write_text(
      f'task: {name}\ndataset_path: json\ntest_split: test\n'
      f'fewshot_split: test\n'
      f'dataset_kwargs: {{data_files: {{test: {data}}}}}\n{body}'
    )
  return path


def _cfg(family, n, **changes):
  layers = 2 + (n if schema.HEAD_FAMILIES[family] else 0)
  return tiny.cfg(
    heads__family=family,
    heads__n=n,
    model__n_layers=layers,
    model__vocab_size=264,
    data__seq_len=CONTEXT,
    data__tokenizer='bytes',
    decode__batch_size=4,
    **changes,
  )


def _subject(c):
  m = tiny.mesh(c)
  w = tiny.model(c, m)
  return subject.Subject(
    'tiny', c, w, m, tokenizers.get('bytes'), 1, decoder.Decoder(w, c, m, c.heads.n)
  )


@pytest.fixture(
  scope='module', ids=str, params=[pytest.param(m, marks=pytest.mark.parity) for m in MODELS]
)
def both(request, tmp_path_factory):
  """Returns (our subject, the harness's own class on its export)."""
  ours = _subject(_cfg(*request.param))
  out = str(tmp_path_factory.mktemp('export') / 'out')
  hf_folder.export(ours.model, ours.cfg, ours.tokenizer, out, dtype='float32', about='a test')
  return ours, HFLM(out, device='cpu', dtype='float32', batch_size=3)


def _model(ours):
  return harness._model(ours, harness._fail('x'))


def _requests(kind, args):
  return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(args)]


LONG = ' '.join([WORDS] * 4) + '!'
PAIRS = [
  ('', 'abc'),
  ('Q: x\nA:', ' y'),
  ('spaces that move  ', 'over'),
  ('ä', 'öü'),
  (WORDS, ' a'),
  (LONG, ' tail'),
  ('short', LONG[: CONTEXT - 1]),  # CONTEXT bytes: the longest possible continuation
  (WORDS[: CONTEXT - 3], 'abc'),
  (WORDS[: CONTEXT - 3], 'abcd'),
]


def test_tok_encode_matches_the_harness(both):
  ours, theirs = both
  model = _model(ours)
  for context, continuation in PAIRS:
    for text in context, continuation:
      assert model.tok_encode(text) == theirs.tok_encode(text)
    if context:
      assert model._encode_pair(context, continuation) == theirs._encode_pair(context, continuation)
  assert theirs.max_length == subject.context(ours.cfg) == CONTEXT


def test_loglikelihoods_match_the_harness(both):
  ours, theirs = both
  requests = _requests('loglikelihood', PAIRS)
  got, expected = _model(ours).loglikelihood(requests), theirs.loglikelihood(requests)
  np.testing.assert_allclose(*([nats for nats, _ in found] for found in (got, expected)), atol=1e-3)
  assert [g for _, g in got] == [g for _, g in expected]


def test_greedy_flag_matches_the_harness(both):
  ours, theirs = both
  rng = np.random.default_rng(1)
  prompts = [rng.integers(0, 256, size=n) for n in (1, 7, 30)]
  written = ours.decoder.with_sampling(max_new_tokens=5)(prompts).tokens
  requests = []
  for prompt, ids in zip(prompts, written, strict=True):
    for wrong in (None, 0, 4):
      cont = ids.tolist()
      if wrong is not None:
        cont[wrong] = (cont[wrong] + 1) % 256
      requests.append((None, prompt.tolist(), cont))
  got = _model(ours)._loglikelihood_tokens(requests)
  assert [g for _, g in got] == [True, False, False] * 3
  expected = theirs._loglikelihood_tokens(requests)
  assert [g for _, g in got] == [g for _, g in expected]


def test_rolling_loglikelihoods_match_the_harness(both):
  ours, theirs = both
  requests = _requests('loglikelihood_rolling', [('',), ('a',), (WORDS,), (LONG,)])
  np.testing.assert_allclose(
    _model(ours).loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests), atol=2e-3
  )


def test_generated_texts_match_the_harness(both):
  ours, theirs = both
  kwargs = dict(do_sample=False, max_gen_toks=20)
  requests = [(text, kwargs) for text in ('', 'a', WORDS, LONG)]
  free = theirs.generate_until(_requests('generate_until', requests))
  stop = free[1][3:5]
  requests += [(text, kwargs | dict(until=['no', stop])) for text, _ in requests]
  requests = _requests('generate_until', requests)
  got = _model(ours).generate_until(requests)
  assert got == theirs.generate_until(requests)
  assert got[5] == got[1].split(stop)[0] != got[1] and len(set(got[:4])) == 4


def _with_flags(ours, tasks, **flags):
  flags = {'eval.data': str(tasks)} | {k.replace('__', '.'): v for k, v in flags.items()}
  return ours._replace(cfg=schema.replace(ours.cfg, **flags))


def test_task_scores_match_the_harness(both, tasks):
  ours, theirs = both
  ours = _with_flags(ours, tasks, eval__num_fewshot=2, eval__limit=6)
  arg = '+'.join(TASKS)
  harness.check(arg, ours.cfg)
  got = harness.run(ours, arg)
  with harness._contained():
    expected = evaluator.simple_evaluate(
      theirs,
      tasks=list(TASKS),
      limit=6,
      bootstrap_iters=harness.BOOTSTRAP,
      num_fewshot=2,
      task_manager=harness._tasks(tuple(TASKS), str(tasks)),
    )['results']
  names = []
  for task, values in expected.items():
    for key, value in values.items():
      metric, _, kind = key.partition(',')
      if kind != 'none' or metric.endswith('_stderr'):
        continue
      names.append(f'{task}/{metric}')
      assert got.scalars[names[-1]] == pytest.approx(value, rel=1e-3)
      error = values[f'{metric}_stderr,none']
      if metric in harness.SHARES:
        low, high = intervals.wilson(round(value * 6), 6)
        assert got.scalars[names[-1] + '_low'] == low
        assert got.scalars[names[-1] + '_high'] == high
      elif error != 'N/A':
        assert got.scalars[names[-1] + '_high'] == pytest.approx(value + 1.959964 * error, rel=1e-3)
  assert len(names) == 8 and len(got.lines) == 8
  assert got.scalars['tiny_ll/perplexity_high'] > 0  # by the bootstrap
  assert len(got.items) == 24 and json.dumps(got.items)


@pytest.fixture(scope='module')
def plain():
  return _subject(_cfg('parallel', 2, decode__prefill_chunk_size=4))


def test_samples_of_equal_requests_differ(plain):
  kwargs = dict(do_sample=True, temperature=0.9, max_gen_toks=8)
  requests = _requests('generate_until', [('a', kwargs)] * 4)
  texts = _model(plain).generate_until(requests)
  assert len(set(texts)) == 4 and texts == _model(plain).generate_until(requests)


@pytest.mark.parametrize(
  'kwargs, problem',
  [
    (dict(max_gen_toks=64), 'requests 64 new tokens in a context of 64'),
    (dict(max_gen_toks=9, num_beams=4), 'generation_kwargs with num_beams=4'),
    (dict(do_sample=True, temperature=1, top_k=3), 'with top_k=3'),
    (dict(do_sample=True), 'do_sample but no temperature'),
  ],
)
def test_unsupported_generation_kwargs_raise(kwargs, problem, plain):
  with pytest.raises(fields.ConfigError, match=problem):
    _model(plain).generate_until(_requests('generate_until', [('a', kwargs)]))


def test_neutral_generation_kwargs_are_accepted(plain):
  requests = dict(max_new_tokens=9, num_beams=1, top_k=3, repetition_penalty=1.0)
  requests |= dict(until='\n', temperature=0.0)
  generation = harness._generation_config(requests, plain.cfg, harness._fail('x'))
  assert generation == subject.GenerationConfig(max_new=9, stop=('\n',))


@pytest.mark.parametrize('text, n', [('', 0), ('x' * (CONTEXT + 1), 65)])
def test_continuations_longer_than_the_context_raise(text, n, plain):
  with pytest.raises(fields.ConfigError, match=f'continuation of {n} tokens'):
    _model(plain).loglikelihood(_requests('loglikelihood', [('a', text)]))


@pytest.mark.parity
@pytest.mark.parametrize('begin', [False, True])
def test_bos_follows_the_tokenizer(begin, tmp_path, plain):
  """A third-party tokenizer.json may not prepend BOS."""
  made = tokens.files_of(tokenizers.get('bytes'))
  about = json.loads(made[tokens.JSON])
  if not begin:
    about['post_processor'] = None
  (tmp_path / tokens.JSON).write_text(json.dumps(about))
  tokenizer = tokenizers.get(f'hf:{tmp_path / tokens.JSON}')
  ours = plain._replace(tokenizer=tokenizer)
  out = str(tmp_path / 'out')
  hf_folder.export(ours.model, ours.cfg, tokenizer, out, dtype='float32', about='a test')
  theirs = HFLM(out, device='cpu', dtype='float32')
  requests = _requests('loglikelihood', [('', 'ab'), ('a b', ' c')])
  got, expected = _model(ours).loglikelihood(requests), theirs.loglikelihood(requests)
  np.testing.assert_allclose(got, expected, atol=1e-3)
  text = _requests('loglikelihood_rolling', [(WORDS,)])
  np.testing.assert_allclose(
    _model(ours).loglikelihood_rolling(text), theirs.loglikelihood_rolling(text), atol=1e-3
  )
  assert _model(ours).tok_encode('a') == [*[256] * begin, 97]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = str(tmp_path_factory.mktemp('runs') / 'run')
  c = schema.replace(_cfg('parallel', 2), **{'train.workdir': path})
  model = tiny.model(c, tiny.mesh(c))
  saver.save_params(model, c, tokenizers.get('bytes'), path)
  return path


def _eval(workdir, *flags):
  return main.main(['eval', f'{workdir}', '--mesh.fsdp=-1', '--train.compilation_cache=', *flags])


def test_mtp_eval_runs_harness_tasks(workdir, tasks, tmp_path, capsys, monkeypatch):
  # A process forked while jax runs may hang.
  monkeypatch.setattr(multiprocessing, 'Pool', None)
  out, suite = tmp_path / 'out.json', 'lm_eval:tiny_ll+tiny_mc+tiny_gen'
  assert (
    _eval(
      workdir, f'--eval.tasks={suite}', f'--eval.data={tasks}', '--eval.limit=3', f'--out={out}'
    )
    == 0
  )
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].endswith(f'step 0, {suite}:') and len(lines) == 6
  assert lines[3].startswith('  tiny_mc/acc 0.') and '3 items, 0 few-shot' in lines[3]
  found = json.loads(out.read_text())['suites'][suite]
  right = [x['acc'] for x in found['items'] if x['task'] == 'tiny_mc']
  assert len(right) == 3 and found['tiny_mc/acc'] == sum(right) / 3
  assert found['tiny_gen/exact_match'] == 0


@pytest.mark.parametrize(
  'suite, data, problem',
  [
    ('lm_eval:', '', 'needs the names of tasks'),
    ('lm_eval:tiny_mc+nope', 'TASKS', "no task 'nope' in lm_eval nor in "),
    ('lm_eval:tiny_mc', 'TASKS/data.jsonl', 'takes a directory of tasks'),
    ('lm_eval:torn', 'TASKS/torn', 'cannot be evaluated: '),
  ],
)
def test_bad_suite_flags_raise(suite, data, problem, workdir, tasks, capsys):
  torn = tasks / 'torn'
  torn.mkdir(exist_ok=True)
  (torn / 'torn.yaml').write_text(
    'task: torn\ndataset_path: json\ntest_split: test\n'
    f'dataset_kwargs: {{data_files: {{test: {torn}/gone.jsonl}}}}\n' + TASKS['tiny_mc']
  )
  data = data.replace('TASKS', str(tasks))
  assert _eval(workdir, f'--eval.tasks={suite}', f'--eval.data={data}') == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith('mtp: --eval.') and problem in error


def test_missing_harness_names_its_extra(workdir, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  assert _eval(workdir, '--eval.tasks=lm_eval:hellaswag') == 2
  assert 'needs lm_eval: pip install "mtp_jax[evals]"' in (capsys.readouterr().err)


def test_gsm8k_prompt_matches_the_harness(tmp_path):
  """The examples of Wei et al., verbatim, and the format of the prompt."""
  data = tmp_path / 'data.jsonl'
  row = dict(question='How many are 2 and 2?', answer='2 + 2 = 4\n#### 4')
  data.write_text(json.dumps(row) + '\n')
  theirs = os.path.join(os.path.dirname(lm_eval.__file__), 'tasks/gsm8k/gsm8k-cot.yaml')
  (tmp_path / 'task.yaml').write_text(
    f'include: {theirs}\ntask: cot\ndataset_path: json\ndataset_name: null\n'
    f'dataset_kwargs: {{data_files: {{test: {data}}}}}\n'
  )
  task = harness._tasks(('cot',), str(tmp_path)).load(['cot'])['tasks']['cot']
  task.build_all_requests()
  (requests,) = task.instances
  assert requests.args[0] == gsm8k.prompt(row['question'], gsm8k.SHOTS)
