"""How often and how soon a dead device process is replaced: back-off and budget, per device.

    serving --died--> waiting (back-off) --> next incarnation --> serving
                         |
                         +-- budget spent --> parked: requests wait until restart-device, or removal
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from signal import SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP
from typing import Any

BACKOFF = (0.0, 0.01, 0.05, 0.25, 1.0)
CALM = 1.0  # seconds: who has lived as long does not die in a row with its predecessor
SELF_INFLICTED = frozenset(-number for number in (SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP))


@dataclass(frozen=True, slots=True)
class Policy:
    """At most `budget` restarts in any `window` seconds; `backoff`: seconds before the 1st, 2nd, ... in a row."""

    budget: int = 5
    window: float = 10.0
    backoff: tuple[float, ...] = BACKOFF

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Policy:
        """Read the options that every device has (core/wire/options.py: DeviceOptions)."""
        return cls(options.get("restart_budget", 5), options.get("restart_window", 10.0),
                   tuple(options.get("restart_backoff", BACKOFF)) or (0.0,))


@dataclass(slots=True)
class Budget:
    """What is left of a device's policy."""

    policy: Policy = field(default_factory=Policy)
    _restarts: deque[float] = field(default_factory=deque)
    _in_a_row: int = 0

    def next_delay(self, now: float) -> float | None:
        """Count a death at `now` (monotonic seconds); return how long to wait, None if the budget is spent."""
        policy = self.policy
        while self._restarts and now - self._restarts[0] > policy.window:
            self._restarts.popleft()
        if len(self._restarts) >= policy.budget:
            return None
        self._in_a_row = self._in_a_row + 1 if self._restarts and now - self._restarts[-1] < CALM else 0
        delay = policy.backoff[min(self._in_a_row, len(policy.backoff) - 1)]
        self._restarts.append(now + delay)
        return delay

    def moments(self) -> list[float]:
        """Return when it was restarted lately, for inherit()."""
        return list(self._restarts)

    def inherit(self, moments: Iterable[float]) -> None:
        """Count the restarts that a predecessor of ours made (the clock is the same for all processes)."""
        self._restarts.extend(moments)

    def refill(self) -> None:
        """Begin anew: somebody revived the device by hand."""
        self._restarts.clear()


def is_self_inflicted(status: int | None) -> bool:
    """Tell whether a worker brought its death on itself: an exception or a fatal signal of its own making.

    Other signals come from outside (a user, the OOM killer, our own hang detection); an unknown status blames nobody.
    """
    return status is not None and (status > 0 or status in SELF_INFLICTED)
