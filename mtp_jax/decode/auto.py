"""Decoding a batch with a measured number of draft tokens: clocks and programs.

`adaptive` decides; here programs are timed, compiled when they are needed, and changed
between calls.
"""

import time

import jax
import numpy as np

from mtp_jax.decode import adaptive
from mtp_jax.decode import batch as batch_lib

ROUNDS = 8  # timed calls of each program, in turn
CALL_S = 0.002  # seconds of a timed call: short ones escape other work on the machine
MOST_FORWARDS = 7  # of a timed call: all rounds fit into adaptive.MIN_NEW_TOKENS
LONG_S = 0.05  # a forward pass of so many seconds is timed once, after a first call


def measure(batch: batch_lib.Batch, most: int) -> adaptive.Times:
  """Compiles the programs of 0 and of the most drafts and times them, before the prefill.

  The time of a forward pass depends on shapes alone, not on tokens.
  """
  scratch = {J: batch.scratch(J) for J in (most, 0)}
  compile_s, call_s = 0.0, float('inf')
  done, forward_s = {J: 0 for J in scratch}, {}

  def seconds(J: int, n: int) -> float:
    """Returns the seconds per forward pass of a call of up to n."""
    counts, total_s = batch.lend(scratch[J], n)
    n_done = int(counts.forwards_B.max()) - done[J]
    done[J] += n_done
    return max(total_s - call_s, 0.0) / n_done if n_done else float('inf')

  for J in scratch:
    begin = time.perf_counter()
    batch.lend(scratch[J], 0)
    compile_s = max(compile_s, time.perf_counter() - begin)
    call_s = min(call_s, *(batch.lend(scratch[J], 0)[1] for _ in range(2)))
  for J in scratch:
    forward_s[J] = seconds(J, 1)  # with what only a first call does
  for r in range(ROUNDS):
    for J in scratch:
      if not r or forward_s[J] < LONG_S:
        n = int(np.clip(CALL_S / max(forward_s[J], 1e-9), 1, MOST_FORWARDS))
        forward_s[J] = min(forward_s[J], seconds(J, n))
  return adaptive.Times(forward_s, call_s, compile_s)


class Auto:
  """A batch, and the Policy that changes its number of drafts; `forward` as of Batch."""

  def __init__(
    self, batch: batch_lib.Batch, policy: adaptive.Policy, *, read_s: float, compiled: set
  ):
    """Prepares the batch after its prefill.

    Args:
      batch: with the most drafts, or none if these cannot pay.
      policy: plans its calls.
      read_s: seconds in which heads read a position, with the trunk's layers.
      compiled: Setups, and pairs of them, whose programs have run at this shape; updated.
    """
    self._batch, self.policy, self._compiled = batch, policy, compiled
    self._read_s = read_s
    self._limit_B = jax.device_get(batch.state.limit_B)
    self._most = policy.most
    self._drafts_2BJ = np.zeros((2, len(self._limit_B), self._most), np.int32)
    self.compile_s = 0.0

  def forward(self, max_forwards: int) -> tuple[batch_lib.Counts, float]:
    """Decodes up to the next choice, in at most so many forward passes; returns the
    counters, drafts of the whole batch included, and the seconds."""
    batch, policy, before = self._batch, self.policy, self._batch.counts()
    live_B = ~before.done_B
    left = int((self._limit_B - before.length_B)[live_B].max(initial=0))
    plan = policy.plan(live_B, left=left, behind_s=self._behind_s())
    change_s = self._change(plan.num_drafts)
    J = plan.num_drafts
    start_2BJ = np.zeros_like(self._drafts_2BJ[:, :, :J])
    if before.proposed_BJ.shape[1] == J:
      start_2BJ = np.stack([before.proposed_BJ, before.accepted_BJ])
    counts, seconds = batch.forward(min(plan.forwards, max_forwards))
    drafts_2BJ = np.stack([counts.proposed_BJ, counts.accepted_BJ]) - start_2BJ
    forwards_B = counts.forwards_B - before.forwards_B
    policy.record(
      adaptive.Segment(
        J,
        int(forwards_B.max()),
        seconds,
        int((counts.length_B - before.length_B).sum()),
        int(forwards_B.sum()),
        *drafts_2BJ,
      )
    )
    self._drafts_2BJ[:, :, :J] += drafts_2BJ
    proposed_BJ, accepted_BJ = self._drafts_2BJ
    counts = counts._replace(proposed_BJ=proposed_BJ, accepted_BJ=accepted_BJ)
    return counts, seconds + change_s

  def _behind_s(self) -> float:
    """Returns the seconds that a change to more drafts takes."""
    if not self._batch.must_read or self._batch.s == self._batch.widest:
      return 0.0
    if not self._batch.can_read:
      return float('inf')
    first, end = self._batch.lacking()
    n = len(batch_lib.catch_up_chunks(first, end, end + batch_lib.CATCH_UP))
    return n * batch_lib.CATCH_UP * self._read_s

  def _change(self, num_drafts: int) -> float:
    """Changes the number of drafts and returns the seconds; those of new programs count as
    compilation."""
    batch, old = self._batch, self._batch.s
    if num_drafts == len(old.tree.widths):
      return 0.0
    begin = time.perf_counter()
    batch.change(num_drafts)
    new = {batch.s, (old, batch.s)}
    is_new = not new <= self._compiled
    if is_new:
      batch.forward(0)
      self._compiled |= new
    jax.block_until_ready(batch.state)
    seconds = time.perf_counter() - begin
    if is_new:
      self.compile_s += seconds
      return 0.0
    self.policy.spend(seconds)
    return seconds
