"""How often and how soon a dead device process is replaced: back-off and budget, per device.

    serving --died--> waiting (back-off) --> next incarnation --> serving
                         |
                         +-- budget spent --> parked: requests wait until restart-device, or removal
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

BACKOFF = (0.0, 0.01, 0.05, 0.25, 1.0)  # seconds before the 1st, 2nd, ... restart within the window


@dataclass(frozen=True, slots=True)
class Policy:
    """At most `budget` restarts in any `window` seconds."""

    budget: int = 5
    window: float = 10.0
    backoff: tuple[float, ...] = BACKOFF


@dataclass(slots=True)
class Budget:
    """What is left of a device's policy."""

    policy: Policy = field(default_factory=Policy)
    _restarts: deque[float] = field(default_factory=deque)

    def next_delay(self, now: float) -> float | None:
        """Count a death at `now` (monotonic seconds); return how long to wait, None if the budget is spent."""
        policy = self.policy
        while self._restarts and now - self._restarts[0] > policy.window:
            self._restarts.popleft()
        if len(self._restarts) >= policy.budget:
            return None
        self._restarts.append(now)
        return policy.backoff[min(len(self._restarts), len(policy.backoff)) - 1]

    def refill(self) -> None:
        """Begin anew: somebody revived the device by hand."""
        self._restarts.clear()


def is_self_inflicted(status: int | None) -> bool:
    """Tell whether a worker brought its death on itself: an exception or a fatal signal of its own making.

    SIGKILL comes from outside (a user, the OOM killer, our own hang detection); an unknown status blames nobody.
    """
    return status is not None and status not in (0, -9, -15)
