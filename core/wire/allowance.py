"""So much at once, so much a second: what a guest, a worker or a stranger may make core do or write down."""

from __future__ import annotations

import time
from collections.abc import Callable


class Allowance:
    """`burst` at once and `rate` a second after that, in whatever unit; refills up to `burst`."""

    def __init__(self, rate: float, burst: float, now: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._now = rate, burst, now
        self._left, self._last = burst, now()

    def _refill(self) -> None:
        now = self._now()
        self._left = min(self._burst, self._left + (now - self._last) * self._rate)
        self._last = now

    def afford(self, cost: float = 1.0) -> bool:
        """Spend `cost` if it is there."""
        self._refill()
        if self._left < cost:
            return False
        self._left -= cost
        return True

    def spend(self, cost: float = 1.0) -> float:
        """Spend `cost` in any case; return for how many seconds nothing should be spent now, 0.0 if debtless."""
        self._refill()
        self._left -= cost
        return max(0.0, -self._left / self._rate)
