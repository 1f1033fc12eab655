"""humaneval, mbpp, apps, code_contests: does what it writes pass the tests?

Floor 4. Programs run in sandbox.py, problems and prompts are of problems.py.
Answers are continuations with the heads' drafts; pass@k is the unbiased
estimator of Chen et al. 2021 (arXiv 2107.03374).
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
  """What the flags say of how often, and how, each problem is answered."""

  samples: int
  ks: tuple[int, ...]
  temperatures: tuple[float, ...]


def pass_at_k(n: int, c: int, k: int) -> float:
  """1 - C(n-c, k) / C(n, k): of n answers c are right; k of them are drawn."""
  if n - c < k:
    return 1.0
  return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def sampling(cfg: schema.Config) -> Sampling:
  """The flags' meaning.

  Raises:
    ConfigError: they do not fit together.
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
    allowed = f'different whole numbers, 1 to --eval.samples={n}, with commas'
    ks = numbers('pass_at_k', int, allowed, lambda k: 1 <= k <= n)
  temperatures = (0.0,) if n == 1 else (0.2, 0.8)
  if e.temperatures:
    allowed = 'different numbers, 0 or more, with commas'
    temperatures = numbers('temperatures', float, allowed, lambda t: 0 <= t < float('inf'))
  if n > 1 and 0 in temperatures:
    raise fields.ConfigError(
      'eval.temperatures',
      e.temperatures,
      f'0 writes the same text --eval.samples={n} times; above 0',
    )
  if cfg.decode.tree and max(temperatures):
    raise fields.ConfigError('decode.tree', cfg.decode.tree, 'needs --eval.temperatures=0')
  for name, unused in (('top_k', 0), ('top_p', 1), ('min_p', 0)):
    value = getattr(cfg.decode, name)
    if value != unused and not max(cfg.decode.temperature, *temperatures):
      raise fields.ConfigError(f'decode.{name}', value, 'needs --eval.temperatures above 0')
  return Sampling(n, ks, temperatures)


def check(name: str, arg: str, cfg: schema.Config) -> None:
  """Refuses what cannot run, before a model is read."""
  if not cfg.eval.allow_code_execution:
    raise fields.ConfigError(
      'eval.allow_code_execution',
      False,
      f'{name} runs programs that a model wrote; where this machine may,'
      ' say --eval.allow_code_execution',
    )
  sampling(cfg)
  problems.read(name, arg, cfg)
  launch.check(cfg.eval.sandbox)


def run(name: str, subject: subject_lib.Subject, arg: str) -> suites.Result:
  """pass@k and its interval for each temperature, and the share of each
  outcome; an item for each answer."""
  cfg = subject.cfg
  asked, how = problems.read(name, arg, cfg), sampling(cfg)
  scalars, items, lines = {}, [], [_asked(asked, how, cfg)]
  lines += subject_lib.beyond(subject, [p.prompt for p in asked], cfg.decode.max_new_tokens)
  passed_TP = []  # right answers of each problem, by temperature
  for temperature in how.temperatures:
    of = f'/t{temperature:g}' if len(how.temperatures) > 1 else ''
    found = _answers(name, subject, asked, how, temperature)
    items += found
    cut = sum(x['finish'] == 'length' for x in found)
    if cut:
      lines.append(
        f'  {cut:,} texts were cut off at --decode.max_new_tokens={cfg.decode.max_new_tokens}'
        + f', of temperature {temperature:g}' * bool(of)
      )
    passed = np.array([x['outcome'] == 'passed' for x in found])
    passed_TP.append(passed.reshape(len(asked), -1).sum(axis=1))
    scalars |= _scores(of, how, passed_TP[-1:]) | _shares(of, found)
  if len(how.temperatures) > 1:
    scalars |= _scores('/oracle', how, passed_TP)
  return suites.Result(lines + _table(scalars, how), scalars, items)


def _answers(name, subject, asked, how: Sampling, temperature) -> list[dict]:
  """An item for each answer, judged."""
  cfg = subject.cfg
  texts = subject_lib.continuations(
    subject,
    [p.prompt for p in asked],
    subject_lib.Ask(
      cfg.decode.max_new_tokens,
      asked[0].stop,
      how.samples,
      temperature,
      cfg.decode.top_p,
      cfg.decode.seed,
      joined=True,
    ),
  )
  each = [(p, t) for p, row in zip(asked, texts, strict=True) for t in row]
  judge = functools.partial(judged, name, cfg.eval)
  ended = launch.together(lambda job: judge(job[0], job[1].text), each, subject.say)
  return [
    dict(
      id=p.id,
      temperature=temperature,
      sample=i % how.samples,
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
  """Runs an answer: its tests once, or its cases until one is not passed; what
  it printed is not kept."""
  source = f'{problem.before}{answer}\n'
  seconds, ended = max(flags.timeout_s, problem.seconds), None
  for given, expected in problem.cases or (('', None),):
    ended = launch.run(launch.Program(source, problem.tests, given, seconds), flags.sandbox)
    if ended.outcome == 'passed' and expected is not None:
      if not problems.FORMATS[name].same(ended.out, expected):
        ended = ended._replace(outcome='failed', err='another output')
    if ended.outcome != 'passed':
      break
  return ended._replace(out='')  # of 200 samples it would be GiB


def _scores(of: str, how: Sampling, passed_TP) -> dict[str, float]:
  """pass@k, the best of T temperatures, with an interval over problems.

  A problem's score lies in [0, 1], so that a share's interval is no narrower
  than its own; that an oracle chose is not in it.
  """
  found = {}
  for k in how.ks:
    score_TP = np.array([[pass_at_k(how.samples, c, k) for c in row] for row in passed_TP])
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


def _asked(asked, how: Sampling, cfg) -> str:
  temperatures = ', '.join(f'{t:g}' for t in how.temperatures)
  return (
    f'{len(asked):,} problems, {how.samples:,} answers each at temperature'
    f' {temperatures} and top_p {cfg.decode.top_p:g}, of at most'
    f' {cfg.decode.max_new_tokens:,} tokens; sandbox: {cfg.eval.sandbox}'
  )


def _table(scalars: dict[str, float], how: Sampling) -> list[str]:
  several = len(how.temperatures) > 1
  rows = [(f'temperature {t:g}', f'/t{t:g}' * several) for t in how.temperatures]
  rows += [('oracle over temperatures', '/oracle')] * several
  lines = []
  for label, of in rows:
    for k in how.ks:
      score = intervals.shown(scalars, f'pass@{k}{of}')
      lines.append(f'  {label}: pass@{k} {score}')
    if f'passed{of}' in scalars:
      shares = ', '.join(f'{o} {scalars[o + of]:.1%}' for o in launch.OUTCOMES)
      speed = scalars[f'tokens_per_forward{of}']
      lines.append(f'    {shares}; {speed:.2f} tokens a pass')
  return lines
