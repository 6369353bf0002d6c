"""The reset and sleep register: one byte at port 0x600 (ACPI 6.5, 4.8.3.6 and 4.8.3.7).

Writing RESET_VALUE resets; sleep type 5 with SLP_EN powers off; anything else is ignored. It reads zero: the
wake status never sets, for the machine never sleeps.
"""

from __future__ import annotations

from collections.abc import Callable

from cellvisor.core import log
from cellvisor.core.abi import acpi as abi


class PowerRegister:
    """`on_reset` and `on_shutdown` are called on the vCPU thread that wrote, so they must not block."""

    def __init__(self, on_reset: Callable[[], None], on_shutdown: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._on_shutdown = on_shutdown

    def read(self, offset: int, size: int) -> int:
        """Return the sleep status: always 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write of `size` bytes; the byte at offset 0 decides."""
        if offset != 0:
            return
        value &= 0xFF
        if value == abi.RESET_VALUE:
            self._on_reset()
        elif value & abi.SLEEP_ENABLE:
            kind = value >> abi.SLEEP_TYPE_SHIFT & abi.SLEEP_TYPE_MASK
            if kind == abi.S5_TYPE:
                self._on_shutdown()
            else:
                log.get("power").warning("guest asked for sleep type %d, but only S5 exists", kind)
