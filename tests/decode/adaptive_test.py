"""The measured number of draft tokens: the choice as a function, and whole batches of a
simulated machine whose times and acceptance rates are known."""

import math

import numpy as np
import pytest

from mtp_jax.decode import adaptive

MOST = 3


def choose(times, rates):
  return adaptive.choose(times, rates, range(MOST + 1))


@pytest.mark.parametrize(
  'times, rates, wanted',
  [
    ({0: 1.0, 3: 1.0}, [1, 1, 1], 3),  # drafts for free
    ({0: 1.0, 3: 1.0}, [0, 0, 0], 0),  # a tie: the fewest
    ({0: 1.0, 3: 1.6}, [0, 0, 0], 0),  # bad heads
    ({0: 1.0, 3: 1.6}, [0, 1, 1], 0),  # nothing counts after a rejection
    ({0: 1.0, 3: 1.6}, [0.58, 0.8, 0.49], 2),
    ({0: 1.0, 3: 1.3}, [0.58, 0.8, 0.49], 3),
    ({0: 1.0, 3: 4.0}, [1, 1, 1], 0),  # a tie: each costs what it yields
    ({0: 1.0, 3: 3.9}, [1, 1, 1], 3),
    ({0: 1.0, 3: 2.5}, [0.9, 0.1, 0.1], 1),  # 1.5 interpolated, 1.9 tokens
    ({0: 1.0, 1: 2.0, 3: 2.5}, [0.9, 0.1, 0.1], 0),  # the measured time counts
    ({0: 1.0, 2: 1.1, 3: 3.0}, [0.9, 0.9, 0.9], 2),
  ],
)
def test_choice_has_the_least_seconds_per_token(times, rates, wanted):
  assert choose(times, rates) == wanted


def test_expected_tokens_and_times():
  assert adaptive.tokens_per_forward([0.5, 0.5, 1.0], 0) == 1
  assert adaptive.tokens_per_forward([0.5, 0.5, 1.0], 3) == 2
  assert adaptive.interpolated_s({0: 1.0, 3: 4.0}, 2) == 3
  assert not adaptive.can_pay({0: 1.0, 3: 4.2}, 3)
  assert adaptive.can_pay({0: 1.0, 3: 2.0}, 3)


class Machine:
  """Decodes rows of given lengths by a Policy, in simulated time."""

  def __init__(self, times, rates, lengths, *, most=MOST, compile_s=1e9, noise=None, **kwargs):
    self.true_s, self.rates = times, rates
    self.measured = adaptive.Times(noise or {j: times[j] for j in (0, most)}, 0.0, compile_s)
    accepted = kwargs.get('accepted') or adaptive.Accepted(most)
    self.policy = adaptive.Policy(self.measured, most, len(lengths), accepted)
    self.left_B = np.array(lengths)
    self.rng, self.seconds, self.plans = np.random.default_rng(0), 0.0, []
    self.behind_s = kwargs.get('behind_s', 0.0)

  def run(self):
    most, now = self.policy.most, self.policy.most
    while (live_B := self.left_B > 0).any():
      plan = self.policy.plan(
        live_B, left=int(self.left_B.max()), behind_s=self.behind_s if now < most else 0.0
      )
      if plan.num_drafts > now:
        self.policy.spend(self.behind_s)
        self.seconds += self.behind_s
      changed, now = plan.num_drafts != now or not self.plans, plan.num_drafts
      self.plans.append(plan)
      assert plan.forwards > 0
      drafts_2BJ = np.zeros((2, len(self.left_B), most), int)
      forwards = n_tokens = row_forwards = 0
      while forwards < plan.forwards and (self.left_B > 0).any():
        for b in np.flatnonzero(self.left_B > 0):
          rates = self.rates(self, b)
          new = 1
          # The first forward pass after a change has no drafts.
          for j in range(now if forwards or not changed else 0):
            drafts_2BJ[0, b, j] += 1
            if self.rng.random() >= rates[j]:
              break
            drafts_2BJ[1, b, j] += 1
            new += 1
          new = min(new, self.left_B[b])
          self.left_B[b] -= new
          n_tokens += new
          row_forwards += 1
        forwards += 1
      seconds = forwards * adaptive.interpolated_s(self.true_s, now)
      self.seconds += seconds
      self.policy.record(
        adaptive.Segment(now, forwards, seconds, n_tokens, row_forwards, *drafts_2BJ)
      )
    return self

  @property
  def forwards(self):
    return self.policy.report().forwards


def constant(*rates):
  return lambda machine, b: rates


@pytest.mark.parametrize('rows', [1, 8])
def test_bad_heads_cost_no_more_than_the_measurement(rows):
  times = {0: 1.0, 3: 1.6}
  machine = Machine(times, constant(0, 0, 0), [512] * rows, behind_s=4.0).run()
  assert machine.forwards[0] > 0.9 * 512
  assert machine.plans[0].num_drafts == 3
  assert machine.seconds <= 1.03 * 512
  # As long texts are, the budget bounds what trying again costs.
  machine = Machine(times, constant(0, 0, 0), [20_000] * rows, behind_s=4.0).run()
  assert 3 in [p.num_drafts for p in machine.plans[5:]]
  assert machine.seconds <= (1 + adaptive.BUDGET) * 20_000 + 10


def _batches(rates, n, accepted, lengths=(100, 60)):
  times = {0: 1.0, 3: 1.6}
  runs = [Machine(times, rates, lengths, accepted=accepted).run() for _ in range(n)]
  return runs, sum(machine.seconds for machine in runs)


@pytest.mark.parametrize('lengths', [(100, 60), (60, 0, 0, 0, 0, 0, 0, 0)])  # with filling
def test_later_batches_start_with_what_the_first_ones_accepted(lengths):
  accepted, longest = adaptive.Accepted(3), max(lengths)
  (first,), _ = _batches(constant(0, 0, 0), 1, accepted, lengths)
  later, seconds = _batches(constant(0, 0, 0), 50, accepted, lengths)
  assert first.plans[0].num_drafts == 3
  tried = [3 in machine.forwards for machine in later]
  assert not any(tried[:2]) and any(tried)  # within the budget of all batches together
  assert seconds <= (1 + adaptive.BUDGET) * 50 * longest + 10
  # Once heads draft well, a batch that tries them again finds it, and those after it know.
  later, _ = _batches(constant(1, 1, 1), 30, accepted, lengths)
  assert set(later[-1].forwards) == {3} and later[-1].forwards[3] == longest // 4 + 1
  # A few verified drafts are no measurement.
  accepted = adaptive.Accepted(3)
  accepted.drafts_2J[:] = [[adaptive.FEW - 1, 0, 0], [0, 0, 0]]
  policy = adaptive.Policy(adaptive.Times({0: 1.0, 3: 1.6}), 3, 4, accepted)
  assert policy.plan(np.ones(4, bool), left=99).num_drafts == 3


def test_good_drafts_earn_no_credit_to_be_spent_on_bad_ones():
  accepted = adaptive.Accepted(3)
  _batches(constant(1, 1, 1), 100, accepted, [3000])
  _, seconds = _batches(constant(0, 0, 0), 20, accepted, [300])
  # 96 until the first batch has forgotten the good ones, and one try.
  assert seconds <= (1 + adaptive.BUDGET) * 20 * 300 + 96 + 6


def test_a_stall_while_drafts_are_tried_is_no_loss():
  accepted = adaptive.Accepted(3)
  policy = adaptive.Policy(adaptive.Times({0: 1.0, 3: 1.6}), 3, 1, accepted)
  plan = policy.plan(np.ones(1, bool), left=99)
  verified = np.array([[8, 0, 0]])
  policy.record(adaptive.Segment(3, plan.forwards, 1e4, plan.forwards, 9, verified, 0 * verified))
  assert policy.plan(np.ones(1, bool), left=99).num_drafts == 0
  assert -6 < accepted.spare_s <= 0


def test_perfect_heads_use_all_drafts_from_the_first_forward_pass():
  machine = Machine({0: 1.0, 3: 1.6}, constant(1, 1, 1), [256]).run()
  assert set(machine.forwards) == {3} and machine.forwards[3] == 65


def test_drafts_that_cannot_pay_are_never_run():
  machine = Machine({0: 1.0, 3: 4.2}, constant(1, 1, 1), [256] * 8).run()
  assert machine.plans == [adaptive.Plan(0, adaptive.NO_LIMIT)]
  assert machine.seconds == 256
  line = machine.policy.report().line()
  assert line == (
    'num_draft_tokens=auto: plain decoding, 1e+03 ms per forward pass; 3 draft tokens take'
    ' 4.2e+03 ms, too much at any acceptance rate up to 0.9'
  )


def test_close_heads_are_measured_longer_than_bad_ones():
  """0 of 8 settles it; a rate near that of break-even takes 24."""
  bad = Machine({0: 1.0, 3: 1.6}, constant(0, 0, 0), [100]).run()
  close = Machine({0: 1.0, 3: 1.9}, constant(0.45, 0.5, 0.5), [400]).run()
  first = [next(i for i, p in enumerate(m.plans) if not p.num_drafts) for m in (bad, close)]
  tried = [sum(p.forwards for p in m.plans[:n]) for m, n in zip((bad, close), first, strict=True)]
  assert tried[0] == 9 and 20 <= tried[1] <= 40


def test_choice_changes_when_acceptance_drifts():
  def drifts(machine, b):
    return (0.9, 0.9, 0.9) if 1500 < machine.left_B[b] or machine.left_B[b] < 800 else (0, 0, 0)

  machine = Machine({0: 1.0, 3: 1.6}, drifts, [3000], behind_s=4.0).run()
  order = [p.num_drafts for p in machine.plans]
  assert order[0] == 3 and 0 in order and order[-1] == 3
  plain, good = 700 * 1.0, 2300 * 1.6 / 3.44
  assert machine.seconds < 1.17 * (plain + good)  # 1.163, as one failed try waits for the next


def test_only_live_rows_count():
  """Seven rows with bad heads finish; the last one's are good."""

  def rates(machine, b):
    return (0.95, 0.95, 0.95) if b == 7 else (0, 0, 0)

  machine = Machine({0: 1.0, 3: 1.6}, rates, [300] * 7 + [3000], behind_s=4.0).run()
  order = [p.num_drafts for p in machine.plans]
  assert 0 in order[:6] and order[-1] == 3
  assert machine.seconds < 300 + 0.6 * 2700
  # The other way round: what the finished rows had is forgotten at once.
  machine = Machine({0: 1.0, 3: 1.6}, lambda m, b: rates(m, 7 - b), [3000] + [300] * 7)
  machine.run()
  assert machine.forwards[3] > 500
  policy = adaptive.Policy(adaptive.Times({0: 1.0, 3: 1.6}), 3, 2, adaptive.Accepted(3))
  good, bad = np.array([[20, 19, 18], [0, 0, 0]]), np.array([[0, 0, 0], [40, 0, 0]])
  policy.record(
    adaptive.Segment(3, 20, 32.0, 80, 40, np.array([good[0], bad[1]]), np.array([good[0], bad[0]]))
  )
  assert policy.plan(np.array([True, False]), left=500).num_drafts == 3
  assert policy.plan(np.array([False, True]), left=500).num_drafts == 0


def test_intermediate_number_is_compiled_once_it_saves_its_compilation():
  times, rates = {0: 1.0, 1: 1.1, 3: 3.2}, constant(0.9, 0.05, 0.05)

  def runs(compile_s, tokens=400):
    return Machine(times, rates, [tokens], compile_s=compile_s, noise={0: 1.0, 3: 1.9}).run()

  assert set(runs(1e9).forwards) <= {0, 3}
  machine = runs(10.0)
  assert machine.forwards[1] > 150
  assert machine.measured.forward_s[1] == pytest.approx(1.1)
  # Short batches of one shape: what each misses adds up.
  shared = adaptive.Times({0: 1.0, 3: 1.9}, compile_s=60.0)
  chosen = []
  for _ in range(12):
    policy = adaptive.Policy(shared, 3, 1, adaptive.Accepted(3))
    policy.record(
      adaptive.Segment(3, 30, 57.0, 57, 30, np.array([[30, 27, 2]]), np.array([[27, 2, 0]]))
    )
    chosen.append(policy.plan(np.array([True]), left=100).num_drafts)
  assert chosen[0] == 3 and chosen[-1] == 1


def test_wrong_first_times_are_corrected_where_they_are_run():
  """Plain decoding seemed slow; drafts seemed slow."""
  true = {0: 1.0, 3: 3.0}
  machine = Machine(true, constant(0.3, 0.3, 0.3), [500], noise={0: 1.0, 3: 1.2})
  machine.measured.forward_s = {0: 2.0, 3: 3.0}
  machine.run()
  assert set(machine.forwards) == {0, 3} and machine.seconds < 1.1 * 500 + 60
  times = adaptive.Times({0: 1.0, 3: 2.0}, call_s=0.5)
  times.update(3, 10, 12.5)
  times.update(0, 3, 0.1)  # a call that is too short to tell
  times.update(1, 3, 4.1)
  assert times.forward_s == {0: 1.0, 3: 1.2, 1: pytest.approx(1.2)}


def test_heads_that_cannot_read_again_are_not_tried_again():
  machine = Machine({0: 1.0, 3: 1.6}, constant(0, 0, 0), [20_000], behind_s=math.inf).run()
  assert [p.num_drafts for p in machine.plans].count(3) == 1
  assert machine.plans[-1] == adaptive.Plan(0, adaptive.NO_LIMIT)


def test_report_lines():
  report = adaptive.Report(3, {3: 54, 0: 6}, {3: 2.22, 0: 1.0}, {0: 39e-5, 3: 6e-4})
  assert report.num_draft_tokens == 3
  assert report.line() == (
    'num_draft_tokens=auto: 3 in 54 of 60 forward passes (0 in 6); per forward pass 3: 2.22'
    ' tokens in 0.6 ms, plain 1 in 0.39 ms'
  )
  assert adaptive.Report(0, {}, {}, {}).line().endswith('plain decoding, no head drafts')
  short = adaptive.Report(3, {}, {}, {})
  assert 'fewer than 64 new tokens are not measured' in short.line()
  assert adaptive.merged([None, None]) is None
  both = adaptive.merged([report, report._replace(forwards={0: 60}, tokens_per_forward={0: 1.0})])
  assert both.forwards == {3: 54, 0: 66} and both.tokens_per_forward[3] == pytest.approx(2.22)
