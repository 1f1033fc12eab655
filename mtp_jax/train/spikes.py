"""Loss spikes: steps whose loss is far above those before them. Floor 4."""

import collections
import math
import statistics
from collections.abc import Iterable

WINDOW, ENOUGH = 128, 16
# Losses of so regular a run that any wiggle would be a spike.
LEAST = 0.01


class Detector:
  """spike(loss of head 1), step by step; `losses` is all that it remembers.

  A loss is a spike if it is more than `sigma` deviations above the median of
  the last 128 that were none; a deviation is 1.4826 times the median distance
  from the median, which is that of a normal distribution and does not see
  spikes themselves, and at least a hundredth of the median. The first 16 are
  none, and so are those that are not finite, whose steps change nothing, and
  None, of a batch in which head 1 has no target.
  """

  def __init__(self, sigma: float, losses: Iterable[float] = ()):
    self._sigma = sigma
    self.losses = collections.deque(losses, maxlen=WINDOW)

  def __call__(self, loss: float | None) -> bool:
    if not self._sigma or loss is None or not math.isfinite(loss):
      return False
    if len(self.losses) >= ENOUGH:
      median = statistics.median(self.losses)
      spread = statistics.median(abs(x - median) for x in self.losses)
      deviation = max(1.4826 * spread, LEAST * abs(median))
      if loss > median + self._sigma * deviation:
        return True
    self.losses.append(loss)
    return False
