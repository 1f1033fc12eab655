"""tools/induction.py: statistics, the choice of learning rates, and what is run."""

import math

import pytest

from mtp_jax.cli import flags
from mtp_jax.model import lm, params
from tests.support import runs
from tools import induction

CURVE = [
  dict(tokens=1_000_000, accuracy=0.2, nats=3.0),
  dict(tokens=2_000_000, accuracy=0.6, nats=2.0),
  dict(tokens=4_000_000, accuracy=0.8, nats=1.0),
]


def test_a_curve_is_interpolated_and_not_continued():
  assert induction.at(CURVE, 1.5) == pytest.approx(0.4)
  assert induction.at(CURVE, 3, 'nats') == 1.5
  assert (induction.at(CURVE, 0.1), induction.at(CURVE, 9)) == (0.2, 0.8)
  assert induction.tokens_to(CURVE, 0.1) == 500_000
  assert induction.tokens_to(CURVE, 0.4) == pytest.approx(1_500_000)
  assert induction.tokens_to(CURVE, 0.9) is None


def test_interval_of_students_t():
  """Student's sleep data (1908): mean difference 1.58, 95% interval 0.70 to 2.46."""
  gains = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
  induction.T95[9] = 2.262
  mean, low, high = induction.interval(gains)
  assert (mean, low, high) == pytest.approx((1.58, 0.70, 2.46), abs=0.005)
  del induction.T95[9]
  assert induction.interval([3.0]) == (3.0, -math.inf, math.inf)


def test_intervals_of_accuracies_end_where_accuracies_do():
  assert induction.shown([0.6, 0.9], '.1%') == '75.0% (0.0% to 100.0%)'
  assert induction.shown([0.1, 0.5], '+.1%') == '+30.0% (-100.0% to +100.0%)'
  assert induction.shown([0.5, 1.5], '.1f') == '1.0 (-5.4 to 7.4)'


def test_ratios_pair_the_seeds():
  def group(**tokens):
    curves = {int(seed[1:]): [dict(tokens=n, accuracy=1.0)] for seed, n in tokens.items()}
    return induction.Group('', curves, [])

  found = induction.ratios(
    group(s1=100, s2=400, s3=7), group(s2=200, s1=200), lambda curve: curve[-1]['tokens']
  )
  assert sorted(map(math.exp, found)) == pytest.approx([0.5, 2.0])


def _row(job, nats, **more):
  curve = [dict(CURVE[0]), dict(CURVE[-1], nats=nats)]
  return {job.key: dict(key=job.key, **job._asdict(), curve=curve, cpu_s=1.0, **more)}


def test_the_learning_rate_is_that_of_the_lowest_loss_on_another_seed():
  there = {}
  for rate, nats in zip(induction.RATES, (2.0, 0.5, 1.0), strict=True):
    assert induction.rates_of(there) == {}
    there |= _row(induction.Job('rate', 'n = 2', induction.RATE_SEED, rate), nats)
  assert induction.rates_of(there) == {'n = 2': '2e-3'}
  assert induction.RATE_SEED not in {s for of in induction.SETTINGS.values() for s in of.seeds}
  todo = induction.jobs(there)
  assert {job.rate for job in todo if job.part in ('main', 'long')} == {'2e-3'}
  there[induction.Job('rate', 'n = 2', induction.RATE_SEED, '4e-3').key]['curve'][-1]['nats'] = 0.1
  rates = {job.part: job.rate for job in induction.jobs(there)}
  assert (rates['main'], rates['rate_2e-3']) == ('4e-3', '2e-3')
  assert {job.variant for job in todo if job.part != 'rate'} == {'n = 2'}
  long, main = (induction.Job(part, 'n = 2', 1, '2e-3') for part in ('long', 'main'))
  assert long.folder == main.folder and long.key != main.key  # it goes on with the same run


def test_variants_have_equal_parameters():
  counts = {}
  for part, setting in induction.SETTINGS.items():
    for variant in setting.variants:
      job = induction.Job(part, variant, 1, '2e-3')
      cfg = flags.parse([f'--flagfile={runs.ROOT}/{induction.FLAGS}', *job.trained]).config()
      counts.setdefault(part, []).append(params.count(lm.specs(cfg)))
      assert cfg.data.seq_len * cfg.data.batch_size == induction.TOKENS
  assert all(max(of) < 1.003 * min(of) for of in counts.values()), counts
  assert counts['small'][0] < 0.45e6 and 4.5e6 < counts['large'][0] < 5.5e6


def test_the_page_shows_what_is_measured(monkeypatch, tmp_path):
  there = {}
  for variant in induction.BOTH:
    for rate in induction.RATES:
      there |= _row(induction.Job('rate', variant, induction.RATE_SEED, rate), 1.0)
    for seed in induction.SEEDS:
      there |= _row(induction.Job('main', variant, seed, '1e-3'), seed / 10, tokens_per_forward=1.5)
  for curve in (row['curve'] for row in there.values()):
    for point in curve:
      point['nats_other'] = 1.25
      point |= {f'accuracy_{name}': 0.5 for name in ('first', 'seen_1', 'seen_2', 'seen_4')}
      point['accuracy_decided'] = 0.75
  monkeypatch.setattr(induction, 'rows', lambda: there)
  monkeypatch.setattr(induction, 'REPORT', tmp_path / 'induction.md')
  induction.write()
  text = (tmp_path / 'induction.md').read_text()
  assert '16 of 131 runs' in text
  assert '| n = 2 | 1e-3 | 20.0% (20.0% to 20.0%) |' in text
  assert '0.300 (0.104 to 0.496)' in text  # nats .1 to .5: t of 4 degrees of freedom
  assert '| 4.00 (4.00 to 4.00) | 5 of 5 |' in text  # to 80%
  assert '| n = 2 | 50.0% (50.0% to 50.0%) |' in text and '| 75.0% (75.0% to 75.0%) |' in text
  assert '| n = 4 | open |' in text and '| 1.4M parameters, 5 layers: n = 2 | +0.0%' in text
  assert (tmp_path / 'induction_accuracy.png').stat().st_size > 1000
