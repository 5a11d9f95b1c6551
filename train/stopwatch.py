"""Time that passes, on clocks that may be set back or stand still."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds since it was made or last read.

    Example:
      >>> Stopwatch().lap() >= 0
      True
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap; 0 where the clock says that they were fewer."""
        began, self._began = self._began, time.perf_counter()
        return max(self._began - began, 0.0)


def rate(units: float, seconds: float) -> float:
    """Units a second; 0 where no time has passed.

    Example:
      >>> rate(6, 2), rate(6, 0)
      (3.0, 0.0)
    """
    return units / seconds if seconds > 0 else 0.0
