"""The MC146818 clock and CMOS memory at ports 0x70 and 0x71: the host's time, and how much memory there is.

The time is made when it is read, so it never has an update in progress. There are no interrupts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from cellvisor.core.abi import cmos
from cellvisor.core.board.bus import ByteDevice

SIZE: Final = 2
_INDEX_MASK: Final = 0x7F  # bit 7 of the index port masks NMI on a PC
_TIME: Final = (cmos.SECONDS, cmos.MINUTES, cmos.HOURS, cmos.WEEKDAY, cmos.DAY, cmos.MONTH, cmos.YEAR,
                cmos.CENTURY)
_MIB: Final = 1 << 20


class Rtc(ByteDevice):
    """Index at offset 0, data at offset 1.

    `ram_below_4g` and `ram_above_4g` are in bytes. `clock()` gives UTC in seconds since 1970. A guest that
    sets the time moves only its own offset to the host's clock.
    """

    def __init__(self, ram_below_4g: int, ram_above_4g: int = 0,
                 clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._offset = 0.0
        self._index = 0
        self._held: dict[int, int] = {}
        self._memory = bytearray(128)
        self._memory[cmos.REG_B] = cmos.B_24H
        extended = min(max(ram_below_4g - _MIB, 0) >> 10, 0xFC00)
        above_16m = min(max(ram_below_4g - 16 * _MIB, 0) >> 16, 0xFFFF)
        for register, size, value in (
            (cmos.BASE_MEMORY, 2, 640), (cmos.EXTENDED_MEMORY, 2, extended),
            (cmos.EXTENDED_MEMORY_2, 2, extended), (cmos.MEMORY_ABOVE_16M, 2, above_16m),
            (cmos.MEMORY_ABOVE_4G, 3, min(ram_above_4g >> 16, 0xFFFFFF)),
        ):
            self._memory[register:register + size] = value.to_bytes(size, "little")

    def read8(self, offset: int) -> int:
        """Return the register that the index selects; the index itself can't be read back."""
        if offset != 1:
            return 0xFF
        match self._index:
            case cmos.REG_A:
                return cmos.A_DIVIDER_32768 | cmos.A_RATE_1024
            case cmos.REG_C:
                return 0
            case cmos.REG_D:
                return cmos.D_VALID
            case register if register in _TIME:
                held = self._held.get(register)
                return self._now()[register] if held is None else held
        return self._memory[self._index]

    def write8(self, offset: int, value: int) -> None:
        """Select a register, or write it; A, C and D are read-only."""
        register = self._index
        if offset == 0:
            self._index = value & _INDEX_MASK
        elif register in _TIME:
            self._held[register] = value
            if not self._memory[cmos.REG_B] & cmos.B_SET:
                self._set_time()
        elif register == cmos.REG_B:
            was_set = self._memory[cmos.REG_B] & cmos.B_SET
            if was_set and not value & cmos.B_SET:
                self._set_time()  # in the format in which it was written
            elif value & cmos.B_SET and not was_set:
                self._held = self._now()  # the time stands still while it is being set
            self._memory[cmos.REG_B] = value
        elif register not in (cmos.REG_A, cmos.REG_C, cmos.REG_D):
            self._memory[register] = value

    def _now(self) -> dict[int, int]:
        now = datetime.fromtimestamp(self._clock() + self._offset, UTC)
        mode = self._memory[cmos.REG_B]
        hour, late = now.hour, 0
        if not mode & cmos.B_24H:
            late = cmos.HOUR_PM if hour >= 12 else 0
            hour = hour % 12 or 12
        values = {
            cmos.SECONDS: now.second, cmos.MINUTES: now.minute, cmos.HOURS: hour,
            cmos.WEEKDAY: now.isoweekday() % 7 + 1, cmos.DAY: now.day, cmos.MONTH: now.month,
            cmos.YEAR: now.year % 100, cmos.CENTURY: now.year // 100,
        }
        if not mode & cmos.B_BINARY:
            values = {register: value // 10 << 4 | value % 10 for register, value in values.items()}
        values[cmos.HOURS] |= late
        return values

    def _set_time(self) -> None:
        fields = self._now() | self._held
        self._held = {}
        mode = self._memory[cmos.REG_B]
        late = 0 if mode & cmos.B_24H else fields[cmos.HOURS] & cmos.HOUR_PM
        fields[cmos.HOURS] &= ~late
        if not mode & cmos.B_BINARY:
            fields = {register: (value >> 4) * 10 + (value & 0xF) for register, value in fields.items()}
        hour = fields[cmos.HOURS] if mode & cmos.B_24H else fields[cmos.HOURS] % 12 + (12 if late else 0)
        year = fields[cmos.CENTURY] * 100 + fields[cmos.YEAR]
        try:
            wanted = datetime(year, fields[cmos.MONTH], fields[cmos.DAY], hour, fields[cmos.MINUTES],
                              fields[cmos.SECONDS], tzinfo=UTC)
        except ValueError:
            return  # no such date: the clock runs on as it was
        if 1970 <= year < 9000:
            self._offset = wanted.timestamp() - self._clock()
