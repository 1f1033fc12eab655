"""Tasks of lm-evaluation-harness, generated with the heads' drafts.

Gao et al. 2024, https://github.com/EleutherAI/lm-evaluation-harness: its tasks,
prompts and metrics. Texts are encoded, truncated and scored as in its class for
Hugging Face models: `--eval.tasks=lm_eval:TASK` gives the results of
`lm_eval --model hf --tasks TASK` on the exported checkpoint.
"""

import contextlib
import functools
import importlib.util
import json
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mtp_jax.config import fields, schema
from mtp_jax.data import special_tokens
from mtp_jax.evals import intervals, scores, suites
from mtp_jax.evals import subject as subject_lib

MAX_NEW = 256  # tokens, if a task does not set it; the harness's default
BOOTSTRAP = 1000  # samples, for the error of metrics other than means
GENERATION = 'do_sample', 'max_gen_toks', 'temperature', 'top_p', 'until'
OF_SAMPLES = 'top_k', 'min_p', 'typical_p'  # without effect on greedy decoding
NEUTRAL = dict(num_beams=1, repetition_penalty=1)
Fail = Callable[[str], fields.ConfigError]
SHARES = ('acc', 'acc_norm', 'exact_match')  # means of 0 or 1 per item


def check(arg: str, cfg: schema.CommandConfig) -> None:
  """Raises ConfigError unless the harness is installed and has each of TASK+TASK…"""
  fail, folder = _fail(arg), cfg.eval.data
  if not arg:
    raise fail('needs the names of tasks, TASK+TASK…')
  if importlib.util.find_spec('lm_eval') is None:
    raise fail('needs lm_eval: pip install "mtp_jax[evals]"')
  if folder and not os.path.isdir(folder):
    raise fields.ConfigError('eval.data', folder, 'lm_eval takes a directory of tasks, .yaml')
  names = arg.split('+')
  known = _tasks(tuple(names), folder).all_tasks
  unknown = [name for name in names if name not in known]
  if unknown:
    there = f' nor in {folder}' if folder else ''
    raise fail(f'no task {unknown[0]!r} in lm_eval{there}')


def run(subject: subject_lib.Subject, arg: str) -> suites.Result:
  """Evaluates tasks of the harness, with --eval.num_fewshot examples (-1: the
  default of each task), on the first --eval.limit documents of each (0: all)."""
  from lm_eval import evaluator

  cfg, names = subject.cfg, arg.split('+')
  model = _model(subject, _fail(arg))
  with _contained():
    try:
      found = evaluator.simple_evaluate(
        model,
        tasks=[*names],
        task_manager=_tasks(tuple(names), cfg.eval.data),
        num_fewshot=None if cfg.eval.num_fewshot < 0 else cfg.eval.num_fewshot,
        limit=cfg.eval.limit or None,
        bootstrap_iters=BOOTSTRAP,
      )
    except Exception as error:
      if model.was_called or isinstance(error, fields.ConfigError):
        raise
      # Nothing was computed: the error is in the task's data, template or code.
      problem = ' '.join(f'{type(error).__name__}: {error}'.split())
      raise _fail(arg)(f'cannot be evaluated: {problem}') from error
  assert found is not None
  return _result(found)


def _fail(arg: str) -> Fail:
  entry = 'lm_eval' + f':{arg}' * bool(arg)
  return functools.partial(fields.ConfigError, 'eval.tasks', entry)


@functools.cache
def _tasks(names: tuple[str, ...], folder: str):
  """Returns the harness's index of tasks; loads its own, which is slow, only if needed."""
  from lm_eval.tasks import TaskManager

  if folder:
    found = TaskManager(include_path=folder, include_defaults=False)
    if set(names) <= set(found.all_subtasks):
      return found
  return TaskManager(include_path=folder or None)


@contextlib.contextmanager
def _contained():
  """Redirects stdout, which is for the report; avoids forks, which break jax."""
  before = os.environ.get('DISABLE_MULTIPROC')
  os.environ['DISABLE_MULTIPROC'] = '1'
  try:
    with contextlib.redirect_stdout(sys.stderr):
      yield
  finally:
    del os.environ['DISABLE_MULTIPROC']
    if before is not None:
      os.environ['DISABLE_MULTIPROC'] = before


def _model(subject: subject_lib.Subject, fail: Fail):
  """Wraps the subject as the harness's LM; `was_called` tells whether it was used."""
  from lm_eval import utils
  from lm_eval.api.model import TemplateLM

  tokenizer, context = subject.tokenizer, subject_lib.context(subject.cfg)
  begin = [tokenizer.bos] if special_tokens.begins(tokenizer) else []

  class Model(TemplateLM):
    was_called = False
    eot_token_id = tokenizer.eos  # pyright: ignore[reportAssignmentType]
    prefix_token_id = tokenizer.bos  # pyright: ignore[reportAssignmentType]

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
      before = [] if add_special_tokens is False else begin
      return [*before, *tokenizer.encode(string).tolist()]

    def loglikelihood(self, requests, disable_tqdm=True):
      return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **kwargs):
      self.was_called = True
      return _loglikelihoods(subject, [r[1:] for r in requests], context, fail)

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
      windows = [
        list(
          map(
            utils.make_disjoint_window,
            utils.get_rolling_token_windows(
              self.tok_encode(r.args[0]), self.prefix_token_id, context, 1
            ),
          )
        )
        for r in requests
      ]
      flat = [(None, *window) for of_text in windows for window in of_text]
      nats = iter(self._loglikelihood_tokens(flat))
      return [sum(next(nats)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests, disable_tqdm=True):
      self.was_called = True
      texts, by_kwargs = [''] * len(requests), {}
      for i, r in enumerate(requests):
        key = json.dumps(r.args[1], sort_keys=True)
        by_kwargs.setdefault(key, []).append(i)
      for of_kwargs in by_kwargs.values():
        generation = _generation_config(requests[of_kwargs[0]].args[1], subject.cfg, fail)
        if generation.max_new >= context:
          raise fail(f'requests {generation.max_new} new tokens in a context of {context}')
        budget = context - generation.max_new
        ids = [self.tok_encode(requests[i].args[0])[-budget:] for i in of_kwargs]
        prompts = [np.array(x or [tokenizer.bos]) for x in ids]
        found = subject_lib.continuations(subject, prompts, generation)
        for i, (text,) in zip(of_kwargs, found, strict=True):
          texts[i] = text.text
      return texts

  return Model()


def _loglikelihoods(
  subject: subject_lib.Subject, pairs: Sequence, context: int, fail: Fail
) -> list[tuple[float, bool]]:
  """Returns (log-probability under head 1, whether greedy decoding generates it)
  of the continuation of each (context ids, continuation ids). Rows that are too
  long are truncated at the start."""
  for _, ids in pairs:
    if not 0 < len(ids) <= context:
      text = subject.tokenizer.decode(ids)
      raise fail(
        f'has a continuation of {len(ids)} tokens, {text[:40]!r}; from 1 to {context}, the context'
      )
  cfg = subject.cfg
  n_active = subject_lib.next_token_heads(subject)
  B = cfg.decode.batch_size or subject_lib.ROWS
  rows = [np.array([*a, *b], np.int32)[-(context + 1) :] for a, b in pairs]
  order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
  found = [(0.0, False)] * len(rows)
  at_once = 16 * B  # bounds the scores per token that are kept in memory
  for first in range(0, len(order), at_once):
    of = order[first : first + at_once]
    got = scores.of_rows(
      subject.model, [rows[i] for i in of], subject.mesh, cfg, n_active=n_active, batch_size=B
    )
    for i, row in zip(of, got, strict=True):
      n = len(pairs[i][1])
      nats, rank = row.nats[0, -n:], row.rank[0, -n:]
      found[i] = -float(nats.sum(dtype=np.float64)), bool((rank == 0).all())
    subject.report(f'{first + len(of):,} of {len(order):,} scored')
  return found


def _generation_config(
  kwargs: dict, cfg: schema.CommandConfig, fail: Fail
) -> subject_lib.GenerationConfig:
  """Parses a task's generation_kwargs as the harness does."""
  from lm_eval.models import utils

  options: dict[str, Any] = dict(utils.normalize_gen_kwargs(kwargs, MAX_NEW))
  until = utils.handle_stop_sequences(options['until'], eos=None)
  samples = options['do_sample']
  known = GENERATION if samples else GENERATION + OF_SAMPLES
  for name, value in options.items():
    if name not in known and value != NEUTRAL.get(name):
      raise fail(f'generation_kwargs with {name}={value}: not supported')
  if samples and not options.get('temperature'):
    raise fail('generation_kwargs with do_sample but no temperature')
  if samples and cfg.decode.tree:
    raise fail('generation_kwargs with do_sample; --decode.tree is greedy')
  return subject_lib.GenerationConfig(
    options['max_gen_toks'],
    tuple(filter(None, until)),
    seed=cfg.decode.seed,
    temperature=float(options['temperature']) if samples else 0.0,
    top_p=options.get('top_p', 1.0),
  )


def _result(found: Mapping[str, Any]) -> suites.Result:
  lines, scalars, items = [], {}, []
  for task, values in found['results'].items():
    shots = found['n-shot'].get(task, '')
    for key, value in values.items():
      metric, comma, of_filter = key.partition(',')
      if not comma or metric.endswith('_stderr'):
        continue
      if not isinstance(value, numbers.Real):
        continue  # a metric that the harness could not compute
      name = f'{task}/{metric}'
      name += '' if of_filter == 'none' else f'/{of_filter}'
      scalars[name] = float(value)
      line = f'  {name} {value:.4f}'
      error = values.get(f'{metric}_stderr,{of_filter}')
      n = found['n-samples'].get(task, {}).get('effective', 0)
      if isinstance(error, numbers.Real):
        value, error = float(value), float(error)
        low, high = (value + side * intervals.Z95 * error for side in (-1, 1))
        if metric in SHARES and n:  # the normal interval has no width at 0 and 1
          low, high = intervals.wilson(round(value * n), n)
        scalars |= {f'{name}_low': float(low), f'{name}_high': float(high)}
        line += f' (95%: {low:.4f} to {high:.4f})'
      line += f', {n:,} items' if n else ''
      lines.append(line + (f', {shots} few-shot examples' if shots != '' else ''))
  for task, samples in found.get('samples', {}).items():
    items += [_item(task, sample) for sample in samples]
  return suites.Result(lines, scalars, items)


def _item(task: str, sample: dict) -> dict:
  kept = dict(
    task=task,
    id=sample['doc_id'],
    filter=sample['filter'],
    target=sample['target'],
    responses=sample['resps'],
    answers=sample['filtered_resps'],
    **{name: sample[name] for name in sample['metrics']},
  )
  return json.loads(json.dumps(kept, default=str))
