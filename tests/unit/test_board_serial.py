"""The 16550A: what Linux's driver probes, both directions, interrupts, bounds and the part that C does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellvisor.core.abi import serial as reg
from cellvisor.core.board import serial16550
from cellvisor.core.board.serial16550 import FIFO_DEPTH, MAX_OUTPUT, Serial16550


class Bench:
    """A UART with everything around it recorded."""

    def __init__(self, **options: object) -> None:
        self.sent = bytearray()
        self.levels: list[bool] = []
        self.fast = SimpleNamespace(serial_lsr=0, serial_tx_fast=0)
        self.uart = Serial16550(self.sink, self.levels.append, fast=self.fast, **options)  # type: ignore[arg-type]

    def sink(self, data: bytes) -> None:
        self.sent += data

    @property
    def line(self) -> bool:
        return bool(self.levels) and self.levels[-1]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_power_on_state(bench: Bench) -> None:
    uart = bench.uart
    assert uart.read8(reg.LSR) == 0x60
    assert uart.read8(reg.IIR) == reg.IIR_NONE
    assert uart.read8(reg.MSR) == 0xB0
    assert uart.read8(reg.IER) == uart.read8(reg.LCR) == uart.read8(reg.MCR) == 0
    assert (bench.fast.serial_lsr, bench.fast.serial_tx_fast) == (0x60, 1)
    assert bench.levels == []


def test_linux_autoconfig_finds_a_16550a(bench: Bench) -> None:
    """The steps of drivers/tty/serial/8250/8250_port.c: autoconfig()."""
    uart = bench.uart
    uart.write8(reg.IER, 0)
    assert uart.read8(reg.IER) & 0x0F == 0
    uart.write8(reg.IER, 0x0F)
    assert uart.read8(reg.IER) & 0x0F == 0x0F
    uart.write8(reg.IER, 0)
    uart.write8(reg.MCR, reg.MCR_LOOP | 0x0A)
    assert uart.read8(reg.MSR) & 0xF0 == 0x90
    uart.write8(reg.MCR, 0)
    uart.write8(reg.FCR, reg.FCR_ENABLE)
    assert uart.read8(reg.IIR) >> 6 == 3
    uart.write8(reg.LCR, reg.LCR_DLAB)  # 16750: bit 5 of FCR sticks under DLAB
    uart.write8(reg.FCR, reg.FCR_ENABLE | 0x20)
    assert uart.read8(reg.IIR) & 0x20 == 0


def test_divisor_latch_and_scratch(bench: Bench) -> None:
    uart = bench.uart
    uart.write8(reg.LCR, reg.LCR_DLAB | 3)
    assert (uart.read8(reg.DLL), uart.read8(reg.DLM)) == (12, 0)
    uart.write8(reg.DLL, 0x34)
    uart.write8(reg.DLM, 0x12)
    assert uart.read(reg.DLL, 2) == 0x1234
    assert bench.fast.serial_tx_fast == 0
    uart.write8(reg.LCR, 3)
    assert uart.read8(reg.LCR) == 3
    assert uart.read8(reg.IER) == 0
    assert bench.sent == b""
    assert bench.fast.serial_tx_fast == 1
    uart.write8(reg.SCR, 0xA5)
    assert uart.read8(reg.SCR) == 0xA5


def test_transmit_with_interrupts(bench: Bench) -> None:
    uart = bench.uart
    uart.write8(reg.IER, reg.IER_TRANSMIT)
    assert bench.line, "enabling the interrupt of an empty transmitter raises it"
    assert bench.fast.serial_tx_fast == 1, "already pending: one more byte changes nothing"
    assert uart.read8(reg.IIR) == reg.IIR_TRANSMIT
    assert not bench.line
    assert uart.read8(reg.IIR) == reg.IIR_NONE
    assert bench.fast.serial_tx_fast == 0, "a byte must raise the interrupt again"
    uart.write8(reg.THR, ord("x"))
    assert bench.line
    assert bench.sent == b"x"
    uart.write8(reg.IER, 0)
    assert not bench.line
    uart.write8(reg.IER, reg.IER_TRANSMIT)
    assert bench.line


def test_receive_with_trigger_level_and_timeout(bench: Bench) -> None:
    uart = bench.uart
    uart.write8(reg.FCR, reg.FCR_ENABLE | 1 << reg.FCR_TRIGGER_SHIFT)  # four bytes
    uart.write8(reg.IER, reg.IER_RECEIVE)
    assert uart.feed(b"ab") == 2
    assert bench.line
    assert uart.read8(reg.IIR) == reg.IIR_TIMEOUT | reg.IIR_FIFO
    assert uart.feed(b"cd") == 2
    assert uart.read8(reg.IIR) == reg.IIR_RECEIVE | reg.IIR_FIFO
    assert bench.fast.serial_lsr & reg.LSR_DATA
    assert bytes(uart.read8(reg.RBR) for _ in range(4)) == b"abcd"
    assert not bench.line
    assert not bench.fast.serial_lsr & reg.LSR_DATA
    assert uart.read8(reg.RBR) == 0


def test_receive_is_bounded_and_says_when_there_is_room() -> None:
    calls: list[int] = []
    bench = Bench(on_room=lambda: calls.append(1))
    uart = bench.uart
    assert uart.room() == 1, "no FIFO yet"
    assert uart.feed(b"ab") == 1
    uart.write8(reg.FCR, reg.FCR_ENABLE)
    assert calls == [1]
    assert uart.room() == FIFO_DEPTH, "switching the FIFO on empties it"
    assert uart.feed(b"z" * 1000) == FIFO_DEPTH
    assert uart.feed(b"y") == uart.room() == 0
    for _ in range(FIFO_DEPTH - 1):
        uart.read8(reg.RBR)
    assert calls == [1]
    uart.read8(reg.RBR)
    assert calls == [1, 1]
    uart.feed(b"abc")
    uart.write8(reg.FCR, reg.FCR_ENABLE | reg.FCR_CLEAR_RECEIVE)
    assert not uart.read8(reg.LSR) & reg.LSR_DATA


def test_loopback_keeps_bytes_inside_and_overruns() -> None:
    calls: list[int] = []
    bench = Bench(on_room=lambda: calls.append(1))
    uart = bench.uart
    uart.write8(reg.FCR, reg.FCR_ENABLE)
    uart.write8(reg.MCR, reg.MCR_LOOP)
    assert bench.fast.serial_tx_fast == 0
    assert uart.room() == uart.feed(b"host") == 0
    for byte in b"hi":
        uart.write8(reg.THR, byte)
    assert bench.sent == b""
    assert bytes(uart.read8(reg.RBR) for _ in range(2)) == b"hi"
    uart.write8(reg.IER, reg.IER_LINE)
    for _ in range(FIFO_DEPTH + 1):
        uart.write8(reg.THR, 1)
    assert bench.line
    assert uart.read8(reg.IIR) == reg.IIR_LINE | reg.IIR_FIFO
    assert bench.fast.serial_lsr & reg.LSR_OVERRUN, "such an LSR is not C's to answer"
    assert uart.read8(reg.LSR) & reg.LSR_OVERRUN
    assert not uart.read8(reg.LSR) & reg.LSR_OVERRUN
    assert not bench.line
    before = len(calls)
    uart.write8(reg.MCR, 0)
    assert len(calls) == before + 1, "the host may feed again"


def test_modem_lines_in_loopback(bench: Bench) -> None:
    uart = bench.uart
    uart.write8(reg.MCR, reg.MCR_LOOP)
    uart.read8(reg.MSR)
    uart.write8(reg.IER, reg.IER_MODEM)
    assert not bench.line
    uart.write8(reg.MCR, reg.MCR_LOOP | reg.MCR_RTS)
    assert bench.line
    assert uart.read8(reg.IIR) == reg.IIR_MODEM
    assert uart.read8(reg.MSR) == reg.MSR_CTS | 0x01
    assert not bench.line
    uart.write8(reg.MCR, reg.MCR_LOOP | reg.MCR_OUT1)
    assert uart.read8(reg.MSR) == reg.MSR_RI | 0x01, "RI rising is no event"
    uart.write8(reg.MCR, reg.MCR_LOOP)
    assert uart.read8(reg.MSR) == reg.MSR_RING_ENDED


def test_interrupt_priorities(bench: Bench) -> None:
    uart = bench.uart
    uart.write8(reg.FCR, reg.FCR_ENABLE)
    uart.write8(reg.IER, reg.IER_RECEIVE | reg.IER_TRANSMIT)
    uart.feed(b"a")
    assert uart.read8(reg.IIR) & 0x0F == reg.IIR_RECEIVE
    uart.read8(reg.RBR)
    assert uart.read8(reg.IIR) & 0x0F == reg.IIR_TRANSMIT
    assert uart.read8(reg.IIR) & 0x0F == reg.IIR_NONE


def test_bytes_that_c_took_keep_their_place() -> None:
    ring = [b"first ", b"", b" last"]
    bench = Bench(take_tx=lambda: ring.pop(0) if ring else b"")
    bench.uart.write8(reg.THR, ord("2"))
    bench.uart.flush()
    assert bench.sent == b"first 2 last"


def test_output_waits_for_flush_and_wakes_once() -> None:
    wakes: list[int] = []
    bench = Bench(wake=lambda: wakes.append(1))
    for byte in b"hello":
        bench.uart.write8(reg.THR, byte)
    assert (bytes(bench.sent), wakes) == (b"", [1])
    assert bench.uart.flush() == 0
    assert bench.sent == b"hello"


def test_flood_is_bounded_and_counted() -> None:
    ring = [b"x" * (MAX_OUTPUT - 2), b"yyy"]
    uart = Serial16550(lambda data: 0, lambda level: None, take_tx=lambda: ring.pop(0) if ring else b"")
    assert uart.flush() == MAX_OUTPUT - 2
    assert uart.flush() == MAX_OUTPUT
    assert uart.output_dropped == 1
    uart.write8(reg.THR, 1)
    assert uart.flush() == MAX_OUTPUT
    assert uart.output_dropped == 2


def test_slow_sink_gets_the_rest_later() -> None:
    got = bytearray()

    def slow(data: bytes) -> int:
        got.extend(data[:2])
        return 2

    uart = Serial16550(slow, lambda level: None, wake=lambda: None)
    for byte in b"abcde":
        uart.write8(reg.THR, byte)
    assert [uart.flush() for _ in range(3)] == [3, 1, 0]
    assert got == b"abcde"


def test_reset_lowers_the_line(bench: Bench) -> None:
    bench.uart.write8(reg.IER, reg.IER_TRANSMIT)
    bench.uart.reset()
    assert not bench.line
    assert bench.uart.read8(reg.IER) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.sampled_from([1, 2, 4, 8]),
                          st.integers(0, 2**64 - 1)), max_size=60))
def test_any_access_is_safe(accesses: list[tuple[bool, int, int, int]]) -> None:
    bench = Bench()
    for is_write, offset, size, value in accesses:
        size = min(size, serial16550.SIZE - offset)
        bench.uart.feed(b"in")
        if is_write:
            bench.uart.write(offset, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= bench.uart.read(offset, size) < 1 << 8 * size
        assert 0 <= bench.fast.serial_lsr <= 0xFF
        assert bench.fast.serial_tx_fast in (0, 1)
    assert all(a != b for a, b in zip(bench.levels, bench.levels[1:], strict=False)), "only changes are told"
