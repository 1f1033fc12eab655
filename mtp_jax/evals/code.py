"""humaneval, mbpp, apps, code_contests: pass@k of generated programs.

Programs run in sandbox/, problems and prompts are from problems.py. Answers are
generated with the heads' drafts; pass@k is the unbiased estimator of Chen et
al. 2021 (arXiv 2107.03374).
"""

import functools
from typing import NamedTuple

import numpy as np

from mtp_jax.config import fields, schema
from mtp_jax.evals import intervals, problems, suites
from mtp_jax.evals import subject as subject_lib
from mtp_jax.evals.sandbox import launch

DEFAULT_K = (1, 10, 100)


class Sampling(NamedTuple):
  """How many samples per problem are generated, and settings."""

  samples: int
  ks: tuple[int, ...]
  temperatures: tuple[float, ...]


def pass_at_k(n: int, c: int, k: int) -> float:
  """Returns 1 - C(n-c, k) / C(n, k), for c correct ones of n samples."""
  if n - c < k:
    return 1.0
  return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def sampling(cfg: schema.CommandConfig) -> Sampling:
  """Parses the flags of sampling.

  Raises:
    ConfigError: inconsistent flags.
  """
  e, n = cfg.eval, cfg.eval.samples

  def numbers(name, kind, allowed, ok):
    text = getattr(e, name)
    try:
      found = tuple(kind(x) for x in text.split(','))
    except ValueError:
      found = ()
    if not found or len(set(found)) < len(found) or not all(map(ok, found)):
      raise fields.ConfigError(f'eval.{name}', text, allowed)
    return found

  ks = tuple(k for k in DEFAULT_K if k <= n)
  if e.pass_at_k:
    allowed = f'must be distinct integers from 1 to --eval.samples={n}, comma-separated'
    ks = numbers('pass_at_k', int, allowed, lambda k: 1 <= k <= n)
  temperatures = (0.0,) if n == 1 else (0.2, 0.8)
  if e.temperatures:
    allowed = 'must be distinct numbers, 0 or more, comma-separated'
    temperatures = numbers('temperatures', float, allowed, lambda t: 0 <= t < float('inf'))
  if n > 1 and 0 in temperatures:
    raise fields.ConfigError(
      'eval.temperatures',
      e.temperatures,
      f'0 gives --eval.samples={n} identical texts; must be above 0',
    )
  if cfg.decode.tree and max(temperatures):
    raise fields.ConfigError('decode.tree', cfg.decode.tree, 'needs --eval.temperatures=0')
  for name, unused in (('top_k', 0), ('top_p', 1), ('min_p', 0)):
    value = getattr(cfg.decode, name)
    if value != unused and not max(cfg.decode.temperature, *temperatures):
      raise fields.ConfigError(f'decode.{name}', value, 'needs --eval.temperatures above 0')
  return Sampling(n, ks, temperatures)


def check(name: str, arg: str, cfg: schema.CommandConfig) -> None:
  """Raises ConfigError for what cannot run, before a model is loaded."""
  if not cfg.eval.allow_code_execution:
    raise fields.ConfigError(
      'eval.allow_code_execution',
      False,
      f'{name} runs model-generated programs; set --eval.allow_code_execution if this machine may',
    )
  sampling(cfg)
  problems.read(name, arg, cfg)
  launch.check(cfg.eval.sandbox)


def run(name: str, subject: subject_lib.Subject, arg: str) -> suites.Result:
  """Returns pass@k with its interval for each temperature, and the fraction of
  each outcome; one item per answer."""
  cfg = subject.cfg
  selected, settings = problems.read(name, arg, cfg), sampling(cfg)
  scalars, items, lines = {}, [], [_description(selected, settings, cfg)]
  lines += subject_lib.context_warnings(
    subject, [p.prompt for p in selected], cfg.decode.max_new_tokens
  )
  passed_TP = []  # correct answers per problem, for each temperature
  for temperature in settings.temperatures:
    of = f'/t{temperature:g}' if len(settings.temperatures) > 1 else ''
    found = _answers(name, subject, selected, settings, temperature)
    items += found
    truncated = sum(x['finish'] == 'length' for x in found)
    if truncated:
      lines.append(
        f'  {truncated:,} texts truncated at --decode.max_new_tokens={cfg.decode.max_new_tokens}'
        + f', temperature {temperature:g}' * bool(of)
      )
    passed = np.array([x['outcome'] == 'passed' for x in found])
    passed_TP.append(passed.reshape(len(selected), -1).sum(axis=1))
    scalars |= _scores(of, settings, passed_TP[-1:]) | _shares(of, found)
  if len(settings.temperatures) > 1:
    scalars |= _scores('/oracle', settings, passed_TP)
  return suites.Result(lines + _table(scalars, settings), scalars, items)


def _answers(name, subject, selected, settings: Sampling, temperature) -> list[dict]:
  """Generates and judges the answers; returns one item per answer."""
  cfg = subject.cfg
  texts = subject_lib.continuations(
    subject,
    [p.prompt for p in selected],
    subject_lib.GenerationConfig(
      cfg.decode.max_new_tokens,
      selected[0].stop,
      settings.samples,
      temperature,
      cfg.decode.top_p,
      cfg.decode.seed,
      joined=True,
    ),
  )
  each = [(p, t) for p, row in zip(selected, texts, strict=True) for t in row]
  judge = functools.partial(judged, name, cfg.eval)
  ended = launch.together(lambda job: judge(job[0], job[1].text), each, subject.report)
  return [
    dict(
      id=p.id,
      temperature=temperature,
      sample=i % settings.samples,
      completion=text.text,
      outcome=e.outcome,
      status=e.status,
      error=e.err,
      finish=text.finish,
      tokens=len(text.ids),
      forwards=text.forwards,
    )
    for i, ((p, text), e) in enumerate(zip(each, ended, strict=True))
  ]


def judged(
  name: str, flags: schema.EvalConfig, problem: problems.Problem, answer: str
) -> launch.Ended:
  """Runs an answer: its tests once, or its cases until one fails; its output is
  dropped."""
  source = f'{problem.before}{answer}\n'
  seconds, ended = max(flags.timeout_s, problem.seconds), None
  for given, expected in problem.cases or (('', None),):
    ended = launch.run(launch.Program(source, problem.tests, given, seconds), flags.sandbox)
    if ended.outcome == 'passed' and expected is not None:
      if not problems.FORMATS[name].same(ended.out, expected):
        ended = ended._replace(outcome='failed', err='wrong output')
    if ended.outcome != 'passed':
      break
  assert ended
  return ended._replace(out='')  # GiB for 200 samples


def _scores(of: str, settings: Sampling, passed_TP) -> dict[str, float]:
  """Returns pass@k of the best of T temperatures, with an interval over problems.

  A problem's score is in [0, 1], so that the interval of a proportion is no
  narrower than that of the scores. The choice by an oracle is not accounted for.
  """
  found = {}
  for k in settings.ks:
    score_TP = np.array([[pass_at_k(settings.samples, c, k) for c in row] for row in passed_TP])
    best = score_TP.sum(axis=1).max()
    found |= intervals.share(f'pass@{k}{of}', float(best), score_TP.shape[1])
  return found


def _shares(of: str, items: list[dict]) -> dict[str, float]:
  found = {
    f'{outcome}{of}': sum(x['outcome'] == outcome for x in items) / len(items)
    for outcome in launch.OUTCOMES
  }
  forwards = sum(x['forwards'] for x in items)
  tokens = sum(x['tokens'] for x in items)
  return found | {f'tokens_per_forward{of}': tokens / max(forwards, 1)}


def _description(selected, settings: Sampling, cfg) -> str:
  temperatures = ', '.join(f'{t:g}' for t in settings.temperatures)
  return (
    f'{len(selected):,} problems, {settings.samples:,} samples each at temperature'
    f' {temperatures} and top_p {cfg.decode.top_p:g}, of at most'
    f' {cfg.decode.max_new_tokens:,} tokens; sandbox: {cfg.eval.sandbox}'
  )


def _table(scalars: dict[str, float], settings: Sampling) -> list[str]:
  several = len(settings.temperatures) > 1
  rows = [(f'temperature {t:g}', f'/t{t:g}' * several) for t in settings.temperatures]
  rows += [('oracle over temperatures', '/oracle')] * several
  lines = []
  for label, of in rows:
    for k in settings.ks:
      score = intervals.shown(scalars, f'pass@{k}{of}')
      lines.append(f'  {label}: pass@{k} {score}')
    if f'passed{of}' in scalars:
      shares = ', '.join(f'{o} {scalars[o + of]:.1%}' for o in launch.OUTCOMES)
      speed = scalars[f'tokens_per_forward{of}']
      lines.append(f'    {shares}; {speed:.2f} tokens per forward pass')
  return lines
