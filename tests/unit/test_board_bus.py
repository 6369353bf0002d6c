"""The bus: overlap, lookup, and accesses of any size at any address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellvisor.core.board.bus import MMIO_SIZE, PIO_SIZE, Bus, ByteDevice
from cellvisor.core.errors import Conflict, UsageError


class Memory(ByteDevice):
    """A device of bytes that remembers each access."""

    def __init__(self, size: int, fill: int = 0) -> None:
        self.data = bytearray([fill]) * size
        self.accesses: list[tuple[str, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        assert offset >= 0
        assert offset + size <= len(self.data)
        self.accesses.append(("read", offset, size))
        return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        assert offset >= 0
        assert offset + size <= len(self.data)
        assert 0 <= value < 1 << 8 * size
        self.accesses.append(("write", offset, size))
        super().write(offset, size, value)

    def read8(self, offset: int) -> int:
        return self.data[offset]

    def write8(self, offset: int, value: int) -> None:
        self.data[offset] = value


def test_access_inside_a_device_reaches_it_whole() -> None:
    bus, device = Bus(PIO_SIZE), Memory(8)
    bus.add(0x100, 8, device, "dev")
    bus.write(0x104, 4, 0x11223344)
    assert bus.read(0x104, 4) == 0x11223344
    assert bus.read(0x105, 1) == 0x33
    assert device.accesses == [("write", 4, 4), ("read", 4, 4), ("read", 5, 1)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_nobody_answers_with_ones(size: int) -> None:
    bus = Bus(PIO_SIZE)
    assert bus.read(0x1234, size) == (1 << 8 * size) - 1
    bus.write(0x1234, size, 0)


def test_access_across_the_end_is_split() -> None:
    bus, first, second = Bus(PIO_SIZE), Memory(4, 0xA1), Memory(4, 0xB2)
    bus.add(0x10, 4, first, "first")
    bus.add(0x16, 4, second, "second")
    assert bus.read(0x12, 8) == 0xB2B2B2B2FFFFA1A1
    assert bus.read(0x0E, 4) == 0xA1A1FFFF
    bus.write(0x12, 8, 0x0807060504030201)
    assert first.data == b"\xa1\xa1\x01\x02"
    assert second.data == b"\x05\x06\x07\x08"


def test_a_wide_answer_is_cut_to_size() -> None:
    class Loud:
        def read(self, offset: int, size: int) -> int:
            return -1

        def write(self, offset: int, size: int, value: int) -> None:
            self.value = value

    bus, loud = Bus(MMIO_SIZE), Loud()
    bus.add(0, 8, loud, "loud")
    assert bus.read(0, 2) == 0xFFFF
    bus.write(0, 1, 0x1FF)
    assert loud.value == 0xFF


@pytest.mark.parametrize(("base", "size"), [(0x0F, 2), (0x10, 1), (0x13, 4), (0x0, 0x100), (0x12, 1)])
def test_overlap_is_refused_with_both_names(base: int, size: int) -> None:
    bus = Bus(PIO_SIZE, "pio")
    bus.add(0x10, 4, Memory(4), "uart")
    with pytest.raises(Conflict, match=r"late: pio range .* overlaps uart at 0x10\+0x4"):
        bus.add(base, size, Memory(size), "late")
    assert [entry.name for entry in bus.ranges()] == ["uart"]


@pytest.mark.parametrize(("base", "size"), [(-1, 2), (PIO_SIZE - 1, 2), (0, 0), (0, -1), (PIO_SIZE, 1)])
def test_range_outside_the_bus_is_refused(base: int, size: int) -> None:
    with pytest.raises(UsageError, match="outside"):
        Bus(PIO_SIZE).add(base, size, Memory(1), "wild")


def test_removed_device_answers_no_more() -> None:
    bus = Bus(MMIO_SIZE)
    bus.add(0x1000, 0x1000, Memory(0x1000), "page")
    bus.remove(0x1001)
    assert bus.read(0x1800, 1) == 0
    bus.remove(0x1000)
    assert bus.read(0x1800, 1) == 0xFF
    bus.add(0x1800, 0x10, Memory(0x10), "moved")
    assert bus.read(0x1800, 1) == 0


def test_the_very_end_of_the_space() -> None:
    bus = Bus(MMIO_SIZE)
    bus.add(MMIO_SIZE - 4, 4, Memory(4), "last")
    assert bus.read(MMIO_SIZE - 4, 8) == 0xFFFFFFFF00000000
    bus.write(MMIO_SIZE - 1, 8, 0x5A)
    assert bus.read(MMIO_SIZE - 1, 1) == 0x5A


@given(st.lists(st.tuples(st.integers(0, 120), st.integers(1, 12)), max_size=8), st.integers(0, 130),
       st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1))
def test_against_a_plain_model(wanted: list[tuple[int, int]], address: int, size: int, value: int) -> None:
    bus, model = Bus(PIO_SIZE), {}
    for number, (base, length) in enumerate(wanted):
        taken = any(base + index in model for index in range(length))
        try:
            bus.add(base, length, Memory(length, number), str(number))
            assert not taken
            model |= {base + index: number for index in range(length)}
        except Conflict:
            assert taken
    bus.write(address, size, value)
    for index in range(size):
        if address + index in model:
            model[address + index] = value >> 8 * index & 0xFF
    expected = bytes(model.get(address + index, 0xFF) for index in range(size))
    assert bus.read(address, size) == int.from_bytes(expected, "little")
