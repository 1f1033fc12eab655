"""--decode.num_draft_tokens=auto: the number of draft tokens, by measurement.

Pure of devices and clocks: times and counts in, numbers out. A batch is decoded with
J draft tokens per forward pass, 0 = plain. Seconds per token and row with J are those
of a forward pass over 1 + a_1 + a_1 a_2 + … + a_1 … a_J, a_j being the acceptance rate
of draft j given that those before it were accepted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

AUTO = 'auto'
NO_LIMIT = 2**31 - 1
MIN_NEW_TOKENS = 64  # fewer are decoded plainly: a second program costs more than it saves
FEW, ENOUGH = 8, 24  # verified drafts of head 2 that a choice takes, unless it is close
GOOD = 0.9  # acceptance rate above which a batch is not expected to be
BUDGET = 0.02  # of the time: what later measurements may lose
MEMORY = 32  # forward passes after which half of a count is forgotten
SHORTEST, LONGEST = 8, 128  # forward passes between choices


class Times:
  """Seconds of the programs of one shape, which batches of that shape share.

  Attributes:
    forward_s: the least seconds per forward pass by number of draft tokens: 0, the
      most, and others once they are compiled.
    call_s: seconds of a call without a forward pass.
    compile_s: of the programs so far, the maximum.
    missed_s: seconds that a program not yet compiled would have saved.
  """

  def __init__(self, forward_s: Mapping[int, float], call_s: float = 0.0, compile_s: float = 0.0):
    self.forward_s, self.call_s, self.compile_s = dict(forward_s), call_s, compile_s
    self.missed_s: dict[int, float] = {}

  def can_pay(self, most: int) -> bool:
    return can_pay(self.forward_s, most)

  def update(self, num_drafts: int, forwards: int, seconds: float) -> None:
    """Records a call of so many forward passes."""
    if forwards >= SHORTEST or num_drafts not in self.forward_s:
      found = max(seconds - self.call_s, 0.0) / max(forwards, 1)
      self.forward_s[num_drafts] = min(found, self.forward_s.get(num_drafts, math.inf))


class Accepted:
  """What batches of one shape and sampling have accepted; they share it.

  Attributes:
    drafts_2J: counts of verified and of accepted drafts; half of them are of the last MEMORY
      forward passes with drafts.
    spare_s: seconds that trying drafts may lose: BUDGET of the time so far, less what was
      lost; one try at most.
  """

  def __init__(self, most: int):
    self.drafts_2J, self.spare_s = np.zeros((2, most)), 0.0


def tokens_per_forward(acceptance_J: Sequence[float], num_drafts: int) -> float:
  """Returns the expected tokens per forward pass and row."""
  return 1.0 + float(np.sum(np.cumprod(np.asarray(acceptance_J[:num_drafts], float))))


def interpolated_s(forward_s: Mapping[int, float], num_drafts: int) -> float:
  """Returns the seconds of a forward pass, linear between the nearest that are known."""
  known = sorted(forward_s)
  return float(np.interp(num_drafts, known, [forward_s[j] for j in known]))


def token_s(forward_s: Mapping[int, float], acceptance_J, num_drafts: int) -> float:
  """Returns the expected seconds per token and row."""
  return interpolated_s(forward_s, num_drafts) / tokens_per_forward(acceptance_J, num_drafts)


def choose(
  forward_s: Mapping[int, float], acceptance_J: Sequence[float], candidates: Iterable[int]
) -> int:
  """Returns the number of draft tokens with the least seconds per token; the fewest of
  several.

  Args:
    forward_s: seconds per forward pass by number of draft tokens, some of them.
    acceptance_J: conditional acceptance rate of each draft.
    candidates: numbers to choose from.
  """
  return min(sorted(candidates), key=lambda j: token_s(forward_s, acceptance_J, j))


def can_pay(forward_s: Mapping[int, float], most: int) -> bool:
  """Returns whether drafts could be faster than plain decoding, if GOOD ones."""
  return choose(forward_s, [GOOD] * most, range(most + 1)) > 0


class Plan(NamedTuple):
  """What to run next."""

  num_drafts: int
  forwards: int  # forward passes, after which to plan again


class Segment(NamedTuple):
  """What a call has done."""

  num_drafts: int
  forwards: int  # forward passes of the batch
  seconds: float
  n_tokens: int  # of all rows
  row_forwards: int  # forward passes of each row, their sum
  proposed_BJ: np.ndarray  # drafts verified in this call, per row
  accepted_BJ: np.ndarray


class Policy:
  """Plans the calls of one batch.

  First the most drafts, until enough are verified, unless batches before have measured them;
  then whatever is fastest, measured again as acceptance drifts and rows finish: only live rows
  count. Plain decoding observes no acceptance, so that drafts are tried again now and then,
  within BUDGET.
  """

  def __init__(self, times: Times, most: int, rows: int, accepted: Accepted):
    """Starts a batch.

    Args:
      times: of its shape; updated.
      most: maximum number of draft tokens.
      rows: of the batch.
      accepted: of its shape and sampling; updated.
    """
    self.times, self.most, self._accepted = times, most, accepted
    self._current, self._stretch = most, SHORTEST
    self._counts_2BJ = np.zeros((2, rows, most))  # verified, accepted
    self._trying = times.can_pay(most)
    self._tokens: dict[int, int] = {}
    self._row_forwards: dict[int, int] = {}
    self._forwards: dict[int, int] = {}

  def plan(self, live_B: np.ndarray, *, left: int, behind_s: float = 0.0) -> Plan:
    """Plans the next call.

    Args:
      live_B: rows that are not done.
      left: maximum number of new tokens that a live row still takes.
      behind_s: seconds that heads need to read what was decoded without them;
        infinite if they cannot.
    """
    times, n_live = self.times, max(int(live_B.sum()), 1)
    if not times.can_pay(self.most):
      self._current, self._trying = 0, False
      return Plan(0, NO_LIMIT)
    if not self._forwards:
      known_2J = self._accepted.drafts_2J
      known_2J = known_2J * min(1.0, MEMORY / max(known_2J[0, 0], 1.0))
      self._counts_2BJ[:, live_B] = known_2J[:, None] / n_live
    verified_J, accepted_J = self._counts_2BJ[:, live_B].sum(1)
    if self._trying:
      if self._is_open(verified_J, accepted_J):
        lacking = (ENOUGH if verified_J[0] >= FEW else FEW) - verified_J[0]
        first = 0 if self._current == self.most and self._forwards else 1
        self._current = self.most
        return Plan(self.most, first + math.ceil(lacking / n_live))
      self._trying = False
    acceptance_J = accepted_J / np.maximum(verified_J, 1e-9)
    wanted = self._compiled_or_worth_it(acceptance_J, left)
    now = self._current
    if wanted > now and (wanted == 0 or not self._pays(acceptance_J, wanted, left, behind_s)):
      wanted = now
    if now == wanted == 0:
      return self._plain(n_live, left, behind_s)
    self._stretch = SHORTEST if wanted != now else min(4 * self._stretch, LONGEST)
    self._current = wanted
    return self._plain(n_live, left, behind_s) if not wanted else Plan(wanted, self._stretch)

  def _is_open(self, verified_J, accepted_J) -> bool:
    """Whether too few drafts are verified: or, being few, leave drafting possible that
    seems too slow."""
    if verified_J[0] < FEW:
      return True
    if verified_J[0] >= ENOUGH:
      return False
    rate_J = accepted_J / np.maximum(verified_J, 1e-9)
    all_J = range(self.most + 1)
    if choose(self.times.forward_s, rate_J, all_J):
      return False
    error_J = 0.5 / np.sqrt(np.maximum(verified_J, 1.0))
    return choose(self.times.forward_s, np.minimum(rate_J + error_J, 1.0), all_J) > 0

  def _compiled_or_worth_it(self, acceptance_J, left: int) -> int:
    """The fastest that is compiled, or a faster one that saves its compilation, with what
    it would have saved before."""
    times = self.times
    compiled = [j for j in times.forward_s if j <= self.most]
    found = choose(times.forward_s, acceptance_J, compiled)
    ideal = choose(times.forward_s, acceptance_J, range(self.most + 1))
    if ideal in compiled:
      return found
    per_token_s, ideal_s = (token_s(times.forward_s, acceptance_J, j) for j in (found, ideal))
    saved_s = left * (per_token_s - ideal_s)
    missed_s = times.missed_s.get(ideal, 0.0)
    if missed_s + saved_s > times.compile_s:
      return ideal
    stretch = self._stretch * tokens_per_forward(acceptance_J, found)
    times.missed_s[ideal] = missed_s + min(stretch, left) * (per_token_s - ideal_s)
    return found

  def _pays(self, acceptance_J, wanted: int, left: int, behind_s: float) -> bool:
    per_s, wanted_s = (
      token_s(self.times.forward_s, acceptance_J, j) for j in (self._current, wanted)
    )
    # The first forward pass has no drafts.
    return left * (per_s - wanted_s) > behind_s + interpolated_s(self.times.forward_s, wanted)

  def _plain(self, n_live: int, left: int, behind_s: float) -> Plan:
    """Plain decoding, or drafts again, if what that may lose is within the budget."""
    plain_s = self.times.forward_s[0]
    tries = 1 + math.ceil(FEW / n_live)
    cost_s = behind_s + tries * max(self.times.forward_s[self.most] - plain_s, 0.0)
    accepted = self._accepted
    accepted.spare_s = min(accepted.spare_s, cost_s)
    wait_s = (cost_s - accepted.spare_s) / BUDGET
    if wait_s <= 0 and left > tries:
      self._trying, self._current = True, self.most
      self._counts_2BJ[:] = 0
      return Plan(self.most, tries)
    if not math.isfinite(wait_s):
      return Plan(0, NO_LIMIT)
    return Plan(0, int(min(max(wait_s / max(plain_s, 1e-9), SHORTEST), LONGEST)))

  def record(self, done: Segment) -> None:
    """Records what a planned call has done."""
    J, times = done.num_drafts, self.times
    times.update(J, done.forwards, done.seconds)
    new_2BJ = np.stack([done.proposed_BJ[:, :J], done.accepted_BJ[:, :J]])
    shared = self._accepted
    for counts, new in ((self._counts_2BJ, new_2BJ), (shared.drafts_2J, new_2BJ.sum(1))):
      counts[..., :J] *= 0.5 ** (done.forwards / MEMORY)
      counts[..., :J] += new
    # By the least times: other work on the machine is neither gained nor lost.
    shared.spare_s += BUDGET * done.forwards * times.forward_s[J]
    if self._trying:
      mean = done.n_tokens / max(done.row_forwards, 1)
      lost_s = times.forward_s[J] - mean * times.forward_s[0]
      shared.spare_s -= done.forwards * max(lost_s, 0.0)
    for counts, n in (
      (self._tokens, done.n_tokens),
      (self._row_forwards, done.row_forwards),
      (self._forwards, done.forwards),
    ):
      counts[J] = counts.get(J, 0) + n

  def spend(self, seconds: float) -> None:
    """Records seconds of a change to more drafts, the reading included."""
    self._accepted.spare_s += BUDGET * seconds
    if self._trying:
      self._accepted.spare_s -= seconds

  def report(self) -> 'Report':
    rates = {j: self._tokens[j] / max(n, 1) for j, n in self._row_forwards.items()}
    return Report(self.most, dict(self._forwards), rates, dict(self.times.forward_s))


class Report(NamedTuple):
  """What was chosen, and by which measurements."""

  most: int
  forwards: dict[int, int]  # forward passes by number of draft tokens
  tokens_per_forward: dict[int, float]  # per row
  forward_s: dict[int, float]  # seconds per forward pass; empty = not measured

  @property
  def num_draft_tokens(self) -> int:
    """The number that most forward passes used."""
    return max(self.forwards, key=lambda j: self.forwards[j], default=0)

  def line(self) -> str:
    """Returns the choice and its reason, as one line."""
    if not self.most:
      return 'num_draft_tokens=auto: plain decoding, no head drafts'
    if not self.forward_s:
      return (
        f'num_draft_tokens=auto: plain decoding, fewer than {MIN_NEW_TOKENS} new tokens are'
        ' not measured'
      )
    ms = {j: f'{1e3 * s:.3g} ms' for j, s in self.forward_s.items()}
    total = max(sum(self.forwards.values()), 1)
    J = self.num_draft_tokens
    if not can_pay(self.forward_s, self.most):
      return (
        f'num_draft_tokens=auto: plain decoding, {ms[0]} per forward pass; {self.most} draft'
        f' tokens take {ms[self.most]}, too much at any acceptance rate up to {GOOD}'
      )
    others = ', '.join(f'{j} in {n}' for j, n in sorted(self.forwards.items()) if j != J)
    rates = ', '.join(
      f'{j}: {self.tokens_per_forward[j]:.2f} tokens in {ms[j]}'
      for j in sorted(self.forwards)
      if j and j in ms
    )
    return (
      f'num_draft_tokens=auto: {J} in {self.forwards.get(J, 0)} of {total} forward passes'
      + (f' ({others})' if others else '')
      + f'; per forward pass {rates}, plain 1 in {ms[0]}'
    )


def merged(reports: Sequence[Report | None]) -> Report | None:
  """Returns the Report of consecutive batches; None if none has one."""
  found = [r for r in reports if r is not None]
  if not found:
    return None
  forwards: dict[int, int] = {}
  tokens: dict[int, float] = {}
  for r in found:
    for j, n in r.forwards.items():
      forwards[j] = forwards.get(j, 0) + n
      tokens[j] = tokens.get(j, 0.0) + n * r.tokens_per_forward.get(j, 1.0)
  rates = {j: tokens[j] / max(n, 1) for j, n in forwards.items()}
  return Report(found[-1].most, forwards, rates, found[-1].forward_s)
