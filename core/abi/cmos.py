"""CMOS registers: the MC146818 clock (data sheet, figure 2), and the memory sizes of PC firmware."""

from __future__ import annotations

from typing import Final

SECONDS: Final = 0x00
MINUTES: Final = 0x02
HOURS: Final = 0x04
WEEKDAY: Final = 0x06  # 1 is Sunday
DAY: Final = 0x07
MONTH: Final = 0x08
YEAR: Final = 0x09  # of the century
REG_A: Final = 0x0A
REG_B: Final = 0x0B
REG_C: Final = 0x0C
REG_D: Final = 0x0D
BASE_MEMORY: Final = 0x15  # KiB below 640 KiB, le16
EXTENDED_MEMORY: Final = 0x17  # KiB above 1 MiB, le16, at most 63 MiB
EXTENDED_MEMORY_2: Final = 0x30  # the same again
CENTURY: Final = 0x32
MEMORY_ABOVE_16M: Final = 0x34  # 64 KiB units up to 4 GiB, le16
MEMORY_ABOVE_4G: Final = 0x5B  # 64 KiB units, le24

A_DIVIDER_32768: Final = 0x20  # the chain runs from a 32.768 kHz crystal
A_RATE_1024: Final = 0x06
B_24H: Final = 0x02
B_BINARY: Final = 0x04
B_SET: Final = 0x80
D_VALID: Final = 0x80
HOUR_PM: Final = 0x80  # in 12-hour mode
