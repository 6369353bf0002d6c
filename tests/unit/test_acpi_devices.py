"""The GED's register and line, and the reset and sleep register, under every access."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest

from cellvisor.core.abi import acpi as abi
from cellvisor.core.acpi.ged import Ged
from cellvisor.core.acpi.power import PowerRegister


def test_line_is_high_while_an_event_waits() -> None:
    line: list[bool] = []
    ged = Ged(line.append)
    ged.raise_event(abi.EVENT_POWER_BUTTON)
    ged.raise_event(abi.EVENT_PCI)
    assert line == [True]
    assert ged.pending == 0xC
    assert ged.read(0, 1) == 0xC
    assert line == [True, False]
    assert ged.read(0, 1) == 0
    assert line == [True, False]
    ged.raise_event(abi.EVENT_CPU)
    assert line == [True, False, True]


@pytest.mark.parametrize("bit", [0, 0x10, -1, 0x108])
def test_unknown_events_are_refused(bit: int) -> None:
    line: list[bool] = []
    ged = Ged(line.append)
    with pytest.raises(ValueError, match="no event"):
        ged.raise_event(bit)
    assert line == []
    assert ged.pending == 0


def test_only_a_read_of_the_register_takes_events() -> None:
    line: list[bool] = []
    ged = Ged(line.append)
    ged.raise_event(abi.EVENT_CPU)
    for offset in (1, 2, 8, 0xFFF):
        for size in (1, 2, 4, 8):
            assert ged.read(offset, size) == 0
            ged.write(offset, size, 2 ** (8 * size) - 1)
    for size in (1, 2, 4, 8):
        ged.write(0, size, 2 ** (8 * size) - 1)
    assert line == [True]
    assert ged.read(0, 8) == abi.EVENT_CPU


def test_reset_lowers_the_old_line_and_takes_a_new_one() -> None:
    old: list[bool] = []
    new: list[bool] = []
    ged = Ged(old.append)
    ged.raise_event(abi.EVENT_MEMORY)
    ged.reset(new.append)
    assert old == [True, False]
    assert ged.read(0, 1) == 0
    ged.raise_event(abi.EVENT_MEMORY)
    assert new == [True]


def test_no_event_is_lost_between_threads() -> None:
    line: list[bool] = []
    ged = Ged(line.append)
    seen = 0

    def guest() -> None:
        nonlocal seen
        while seen != abi.EVENT_ALL:
            seen |= ged.read(0, 1)

    thread = threading.Thread(target=guest)
    thread.start()
    for _ in range(200):
        for bit in (1, 2, 4, 8):
            ged.raise_event(bit)
    thread.join(30)
    assert not thread.is_alive()
    ged.read(0, 1)
    assert line[-1] is False
    assert all(before != after for before, after in pairwise(line))


def test_power_register() -> None:
    calls: list[str] = []
    power = PowerRegister(lambda: calls.append("reset"), lambda: calls.append("off"))
    for value, said in ((1, ["reset"]), (0x34, ["off"]), (0x101, ["reset"]), (0xFFFFFF34, ["off"]), (0, []),
                        (0x14, []), (0x20, []), (0x24, []), (0x3C, []), (2, []), (0xFF, [])):
        calls.clear()
        power.write(0, 4, value)
        assert calls == said, hex(value)


def test_power_register_ignores_what_is_not_its_byte() -> None:
    calls: list[str] = []
    power = PowerRegister(lambda: calls.append("reset"), lambda: calls.append("off"))
    for offset in range(1, 8):
        for size in (1, 2, 4):
            for value in (1, 0x34):
                power.write(offset, size, value)
    assert calls == []
    assert [power.read(offset, size) for offset in range(8) for size in (1, 2, 4)] == [0] * 24
