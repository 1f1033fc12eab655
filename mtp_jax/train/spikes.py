"""Loss spikes: steps whose loss is far above those before them. Floor 4."""

import collections
import math
import statistics

WINDOW, ENOUGH = 128, 16
# Losses of so regular a run that any wiggle would be a spike.
LEAST = 0.01


class Detector:
  """spike(loss of head 1), step by step.

  A loss is a spike if it is more than `sigma` deviations above the median of
  the last 128 that were none; a deviation is 1.4826 times the median distance
  from the median, which is that of a normal distribution and does not see
  spikes themselves, and at least a hundredth of the median. The first 16 are
  none, and so are those that are not finite, whose steps change nothing.
  """

  def __init__(self, sigma: float):
    self._sigma = sigma
    self._losses = collections.deque(maxlen=WINDOW)

  def __call__(self, loss: float) -> bool:
    if not self._sigma or not math.isfinite(loss):
      return False
    if len(self._losses) >= ENOUGH:
      median = statistics.median(self._losses)
      spread = statistics.median(abs(x - median) for x in self._losses)
      deviation = max(1.4826 * spread, LEAST * abs(median))
      if loss > median + self._sigma * deviation:
        return True
    self._losses.append(loss)
    return False
