"""Where a PC has its keyboard controller: enough of ports 0x60 to 0x64 for a reset and for Linux's probes.

There is no controller. Status reads "output full, input empty", for two loops of Linux: i8042_flush() gives
up after 16 bytes and finds no controller (all zeros would cost it half a second per command), and the
reboot path's kb_wait() sees room for its command at once (0xff would cost it 65,536 reads).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cellvisor.core.board.bus import ByteDevice

BASE: Final = 0x60
SIZE: Final = 5
DATA: Final = 0
PORT_B: Final = 1
COMMAND: Final = 4
STATUS: Final = 0x05  # output buffer full, self-test passed

PORT_B_WRITABLE: Final = 0x0F
PORT_B_REFRESH: Final = 0x10  # toggles: old delay loops count it
PORT_B_TIMER2: Final = 0x20  # always expired: Linux's TSC calibration waits for it without a limit


class I8042(ByteDevice):
    """Ports 0x60..0x64. `reset` is called when the guest pulses the reset line, in the vCPU's thread."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._port_b = 0

    def read8(self, offset: int) -> int:
        """Return a register; 0x62 and 0x63 do not exist."""
        if offset == PORT_B:
            self._port_b ^= PORT_B_REFRESH
            return self._port_b | PORT_B_TIMER2
        return {DATA: 0, COMMAND: STATUS}.get(offset, 0xFF)

    def write8(self, offset: int, value: int) -> None:
        """Take a command; 0xf0 to 0xff pulse the output lines whose bit is clear, and line 0 is reset."""
        if offset == PORT_B:
            self._port_b = self._port_b & ~PORT_B_WRITABLE | value & PORT_B_WRITABLE
        elif offset == COMMAND and value >= 0xF0 and not value & 1:
            self._reset()
