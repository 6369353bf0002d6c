"""The ACPI PM timer (ACPI 6.5, 4.8.3.3): 32 bits counting at 3.579545 MHz. Four-byte reads end in C."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

FREQUENCY: Final = 3_579_545  # Hz
SIZE: Final = 4


class PmTimer:
    """Counts from `zero_ns` on (CLOCK_MONOTONIC); writes are ignored.

    The formula is the one in core/_native/vcpu.c, so that both give the same count.
    """

    def __init__(self, zero_ns: int, now: Callable[[], int] = time.monotonic_ns) -> None:
        self._zero = zero_ns
        self._now = now

    def read(self, offset: int, size: int) -> int:
        """Return `size` bytes of the counter from byte `offset` on."""
        ticks = (self._now() - self._zero) * FREQUENCY // 1_000_000_000 & 0xFFFFFFFF
        return ticks >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Ignore the write: the counter is read-only."""
