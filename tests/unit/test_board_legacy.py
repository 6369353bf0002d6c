"""Clock, keyboard controller's ports, PM timer and debug ports."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellvisor.core.abi import cmos
from cellvisor.core.board import debug, i8042
from cellvisor.core.board.bus import PIO_SIZE, Bus
from cellvisor.core.board.debug import DebugConsole, StageLog
from cellvisor.core.board.i8042 import I8042
from cellvisor.core.board.pmtimer import PmTimer
from cellvisor.core.board.rtc import Rtc

NOON = datetime(2026, 7, 19, 13, 45, 59, tzinfo=UTC).timestamp()  # a Sunday
GIB = 1 << 30


class Cmos:
    """The two ports as a guest uses them."""

    def __init__(self, low: int = GIB, high: int = 0) -> None:
        self.time = NOON
        self.rtc = Rtc(low, high, lambda: self.time)

    def get(self, register: int) -> int:
        self.rtc.write8(0, register)
        return self.rtc.read8(1)

    def put(self, register: int, value: int) -> None:
        self.rtc.write8(0, register)
        self.rtc.write8(1, value)

    def clock(self) -> list[int]:
        return [self.get(register) for register in (
            cmos.CENTURY, cmos.YEAR, cmos.MONTH, cmos.DAY, cmos.HOURS, cmos.MINUTES, cmos.SECONDS)]


def test_time_in_every_format() -> None:
    guest = Cmos()
    assert guest.clock() == [0x20, 0x26, 0x07, 0x19, 0x13, 0x45, 0x59]
    assert guest.get(cmos.WEEKDAY) == 1
    guest.put(cmos.REG_B, cmos.B_24H | cmos.B_BINARY)
    assert guest.clock() == [20, 26, 7, 19, 13, 45, 59]
    guest.put(cmos.REG_B, cmos.B_BINARY)
    assert guest.get(cmos.HOURS) == 1 | cmos.HOUR_PM
    guest.time -= 13 * 3600
    assert guest.get(cmos.HOURS) == 12
    guest.put(cmos.REG_B, 0)
    assert guest.get(cmos.HOURS) == 0x12


def test_update_in_progress_is_never_seen_and_status_is_valid() -> None:
    guest = Cmos()
    for step in range(200):
        guest.time = NOON + step / 100
        assert not guest.get(cmos.REG_A) & 0x80
    assert guest.get(cmos.REG_C) == 0
    assert guest.get(cmos.REG_D) == cmos.D_VALID


def test_guest_sets_the_time_as_linux_does() -> None:
    guest = Cmos()
    control = guest.get(cmos.REG_B)
    guest.put(cmos.REG_B, control | cmos.B_SET)
    for register, value in ((cmos.CENTURY, 0x20), (cmos.YEAR, 0x30), (cmos.MONTH, 0x02), (cmos.DAY, 0x28),
                            (cmos.HOURS, 0x23), (cmos.MINUTES, 0x59), (cmos.SECONDS, 0x58)):
        guest.put(register, value)
    guest.time += 30
    assert guest.clock()[-1] == 0x58, "the time stands still while it is being set"
    guest.put(cmos.REG_B, control)
    assert guest.clock() == [0x20, 0x30, 0x02, 0x28, 0x23, 0x59, 0x58]
    guest.time += 2
    assert guest.clock() == [0x20, 0x30, 0x03, 0x01, 0x00, 0x00, 0x00]


def test_twelve_hour_time_can_be_set() -> None:
    guest = Cmos()
    guest.put(cmos.REG_B, cmos.B_BINARY)
    guest.put(cmos.HOURS, 12)
    assert guest.get(cmos.HOURS) == 12
    guest.put(cmos.REG_B, cmos.B_BINARY | cmos.B_24H)
    assert guest.get(cmos.HOURS) == 0
    guest.put(cmos.HOURS, 99)
    assert guest.get(cmos.HOURS) == 0, "no such hour"


@pytest.mark.parametrize(("low", "high", "extended", "above_16m", "above_4g"), [
    (64 << 20, 0, 0xFC00, 48 << 4, 0),
    (8 << 20, 0, 7 << 10, 0, 0),
    (3 * GIB, 2 * GIB, 0xFC00, (3 * GIB - (16 << 20)) >> 16, 2 * GIB >> 16),
    (0, 1 << 60, 0, 0, 0xFFFFFF),
])
def test_memory_sizes(low: int, high: int, extended: int, above_16m: int, above_4g: int) -> None:
    guest = Cmos(low, high)

    def number(register: int, size: int) -> int:
        return int.from_bytes(bytes(guest.get(register + index) for index in range(size)), "little")

    assert number(cmos.BASE_MEMORY, 2) == 640
    assert number(cmos.EXTENDED_MEMORY, 2) == number(cmos.EXTENDED_MEMORY_2, 2) == extended
    assert number(cmos.MEMORY_ABOVE_16M, 2) == above_16m
    assert number(cmos.MEMORY_ABOVE_4G, 3) == above_4g


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=80))
def test_any_cmos_write_is_safe(writes: list[tuple[int, int]]) -> None:
    guest = Cmos()
    for register, value in writes:
        guest.put(register, value)
        assert 0 <= guest.get(register ^ 1) <= 0xFF
    assert 0 <= guest.rtc.read(0, 2) <= 0xFFFF
    guest.rtc.write(0, 2, 0xFFFF)
    assert all(0 <= guest.get(register) <= 0xFF for register in range(256))


def test_reset_only_on_a_pulse_of_line_0() -> None:
    resets: list[int] = []
    bus = Bus(PIO_SIZE)
    bus.add(i8042.BASE, i8042.SIZE, I8042(lambda: resets.append(1)), "i8042")
    for value in (0x00, 0xAA, 0xD1, 0xED, 0xEE, 0xF1, 0xFF):
        bus.write(0x64, 1, value)
        bus.write(0x60, 1, value)
    assert resets == []
    bus.write(0x64, 1, 0xFE)
    assert resets == [1]


def test_linux_finds_no_keyboard_controller_quickly() -> None:
    """i8042_flush() gives up after 16 full reads, kb_wait() needs bit 1 clear: 0xff would not do."""
    device = I8042(lambda: None)
    for _ in range(17):
        status = device.read8(i8042.COMMAND)
        assert status & 0x01
        assert not status & 0x02
        assert device.read8(i8042.DATA) == 0


def test_port_b_lets_calibration_loops_end() -> None:
    device = I8042(lambda: None)
    device.write8(i8042.PORT_B, 0xF3)
    reads = [device.read8(i8042.PORT_B) for _ in range(4)]
    assert all(value & 0x20 and value & 0x0F == 0x03 and not value & 0xC0 for value in reads)
    assert {value & 0x10 for value in reads} == {0, 0x10}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_keyboard_ports_take_any_size(size: int) -> None:
    bus = Bus(PIO_SIZE)
    bus.add(i8042.BASE, i8042.SIZE, I8042(lambda: None), "i8042")
    for port in range(0x5E, 0x67):
        assert 0 <= bus.read(port, size) < 1 << 8 * size
        bus.write(port, size, 0)


def test_pm_timer_counts_at_its_frequency_and_wraps() -> None:
    now = 5_000_000_000
    timer = PmTimer(now, lambda: now)
    assert timer.read(0, 4) == 0
    now += 1_000_000_000
    assert timer.read(0, 4) == 3_579_545
    assert timer.read(1, 2) == 3_579_545 >> 8 & 0xFFFF
    timer.write(0, 4, 0)
    assert timer.read(0, 4) == 3_579_545
    now = 5_000_000_000 + 1200 * 1_000_000_000
    assert timer.read(0, 4) == 1200 * 3_579_545 - (1 << 32)


def test_debug_console_collects_lines() -> None:
    lines: list[str] = []
    console = DebugConsole(lines.append)
    for byte in b"hello\r\nwor":
        console.write8(0, byte)
    assert lines == ["hello"]
    console.feed(b"ld\n\x1b[2Jred\n\xff\n")
    assert lines == ["hello", "world", "?[2Jred", "\ufffd"]
    console.feed(b"half")
    console.flush()
    assert lines[-1] == "half"
    assert console.read8(0) == 0xE9


def test_debug_console_is_bounded() -> None:
    lines: list[str] = []
    now = 0.0
    console = DebugConsole(lines.append, lambda: now)
    console.feed(b"x" * (debug.BURST + 10))
    assert console.dropped == 10
    assert max(map(len, lines)) == debug.MAX_LINE
    assert sum(map(len, lines)) == debug.BURST
    console.feed(b"lost\n")
    assert console.dropped == 15
    now = 1.0
    console.feed(b"heard\n")
    assert lines[-1] == "heard"


def test_stage_log_keeps_the_last() -> None:
    clock = iter(range(1000))
    log = StageLog(lambda: next(clock))
    for code in range(100):
        log.write8(0, code)
    assert log.read8(0) == 99
    assert log.stages()[0] == (36, 36)
    assert len(log.stages()) == debug.MAX_STAGES
