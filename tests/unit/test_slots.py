"""The slot machine and its registers: every step of the picture, every refusal, every odd access."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellvisor.core.abi import hotplug as reg
from cellvisor.core.errors import Conflict
from cellvisor.core.hotplug import Hotplug
from cellvisor.core.pci.config import ConfigSpace
from cellvisor.core.pci.root import PciRoot
from cellvisor.core.pci.slots import PciSlots, SlotState
from cellvisor.core.state import State

SLOT = 6
BIT = 1 << SLOT
CHECK, EJECT = 1, 3


class Shadow:
    """ports.ConfigShadow that only notes who is present."""

    config_address = 0

    def __init__(self) -> None:
        self.there: set[int] = set()

    def publish(self, slot: int, offset: int, data: bytes) -> None: ...
    def ask(self, slot: int, dword: int, on: bool) -> None: ...
    def present(self, slot: int, on: bool) -> None:
        (self.there.add if on else self.there.discard)(slot)


class Function:
    """A PCI function with one BAR that notes when it left."""

    def __init__(self, name: str = "disk") -> None:
        self.name = name
        self.config = ConfigSpace(vendor=0x1AF4, device=0x1042, pci_class=0x010000)
        self.config.add_bar(0, 0x1000)
        self.left = 0

    def attached(self, slot: int) -> None: ...
    def machine_reset(self) -> None: ...
    def bar_read(self, bar: int, offset: int, size: int) -> int:
        return 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None: ...
    def bar_placed(self, bar: int, gpa: int | None) -> None: ...
    def detached(self) -> None:
        self.left += 1


class Heard:
    """A SlotListener that writes everything down."""

    def __init__(self) -> None:
        self.said: list[tuple[object, ...]] = []

    def enumerated(self, slot: int, device: str, how: str) -> None:
        self.said.append(("enumerated", slot, device, how))

    def bound(self, slot: int, device: str) -> None:
        self.said.append(("bound", slot, device))

    def refused(self, slot: int, device: str, event: int, status: int) -> None:
        self.said.append(("refused", slot, device, event, status))

    def ejected(self, slot: int, device: str, how: str) -> None:
        self.said.append(("ejected", slot, device, how))

    def unexpected(self, slot: int, device: str) -> None:
        self.said.append(("unexpected", slot, device))

    def freed(self, slot: int) -> None:
        self.said.append(("freed", slot))

    def take(self) -> list[tuple[object, ...]]:
        said, self.said = self.said, []
        return said


class Board:
    """A bus, its slots, and what the guest does with the registers."""

    def __init__(self) -> None:
        self.shadow = Shadow()
        self.root = PciRoot(self.shadow)
        self.interrupts = 0
        self.heard = Heard()
        self.slots = PciSlots(self.root, self._notify)
        self.slots.listen(self.heard)

    def _notify(self) -> None:
        self.interrupts += 1

    def state(self) -> SlotState:
        return self.slots.state(SLOT)

    def up(self) -> int:
        return self.slots.read(reg.PCI_UP, 4)

    def down(self) -> int:
        return self.slots.read(reg.PCI_DOWN, 4)

    def eject(self, bits: int = BIT) -> None:
        self.slots.write(reg.PCI_EJECT, 4, bits)

    def ost(self, event: int, status: int, slot: int = SLOT) -> None:
        self.slots.write(reg.OST_SLOT, 4, slot)
        self.slots.write(reg.OST_EVENT, 4, event)
        self.slots.write(reg.OST_STATUS, 4, status)

    def insert(self, name: str = "disk") -> Function:
        function = Function(name)
        self.slots.insert(SLOT, function)
        return function

    def bind(self) -> Function:
        function = self.insert()
        assert self.up() == BIT
        self.ost(CHECK, 0)
        self.slots.activated(SLOT)
        self.heard.take()
        return function


@pytest.fixture
def board() -> Board:
    return Board()


def test_the_function_is_complete_before_the_guest_is_told() -> None:
    seen: list[tuple[bool, bool, int]] = []

    def told() -> None:
        config = function.config
        seen.append((SLOT in shadow.there, SLOT in root.functions, config.bar_address(0)))

    shadow = Shadow()
    root = PciRoot(shadow)
    slots = PciSlots(root, told)
    function = Function()
    slots.insert(SLOT, function)
    assert seen == [(True, True, 0xC0000000)]
    assert slots.read(reg.PCI_UP, 4) == BIT


def test_added_enumerated_bound_removed(board: Board) -> None:
    function = board.insert()
    assert (board.state(), board.interrupts) == (SlotState.INSERTING, 1)
    assert (board.up(), board.up(), board.down()) == (BIT, 0, 0)
    board.ost(CHECK, 0)
    board.slots.activated(SLOT)
    board.slots.activated(SLOT)  # a driver that is loaded again is no news
    assert board.state() is SlotState.BOUND
    assert board.heard.take() == [("enumerated", SLOT, "disk", "ost"), ("bound", SLOT, "disk")]
    board.slots.ask(SLOT)
    assert (board.state(), board.interrupts) == (SlotState.REMOVING, 2)
    assert (board.down(), board.down(), board.up()) == (BIT, 0, 0)
    board.eject()
    assert board.state() is SlotState.EJECTED
    assert (function.left, SLOT in board.shadow.there, SLOT in board.root.functions) == (1, False, False)
    assert board.heard.take() == [("ejected", SLOT, "disk", "guest")]
    with pytest.raises(Conflict, match="disk is still leaving"):
        board.insert("next")
    board.slots.release(SLOT)
    board.insert("next")
    board.ost(EJECT, 0)  # Linux reports the ejection of the one before only now
    assert (board.state(), board.heard.take()) == (SlotState.INSERTING, [])


def test_a_driver_says_more_than_an_ost(board: Board) -> None:
    board.insert()
    board.slots.activated(SLOT)
    assert board.heard.take() == [("enumerated", SLOT, "disk", "driver"), ("bound", SLOT, "disk")]
    board.ost(CHECK, 0)
    assert board.heard.take() == []


def test_an_eject_that_nobody_asked_for_is_refused(board: Board) -> None:
    function = board.bind()
    board.eject()
    assert (board.state(), function.left) == (SlotState.BOUND, 0)
    assert board.heard.take() == [("unexpected", SLOT, "disk")]
    assert board.up() == BIT  # the guest is told that it is still there
    for _ in range(100):
        board.eject(0xFFFF_FFFF)
    assert len(board.heard.take()) == 7  # a guest cannot flood whoever listens
    assert SLOT in board.root.functions
    assert 0 in board.root.functions


def test_notify_pending_is_not_eject_expected(board: Board) -> None:
    board.bind()
    board.slots.ask(SLOT)
    assert board.down() == BIT
    assert board.down() == 0
    board.eject()
    assert board.heard.take() == [("ejected", SLOT, "disk", "guest")]


def test_asking_again_notifies_again(board: Board) -> None:
    board.bind()
    for count in (1, 2, 3):
        before = board.interrupts
        board.slots.ask(SLOT)
        assert (board.down(), board.interrupts - before) == (BIT, 1), count
    board.eject()
    with pytest.raises(Conflict, match="ejected: there is no device"):
        board.slots.ask(SLOT)


@pytest.mark.parametrize("status", [1, 0x80, 0x81, 0x82, 0x83])
def test_a_guest_that_says_no_keeps_the_device(board: Board, status: int) -> None:
    board.bind()
    board.slots.ask(SLOT)
    board.ost(EJECT, status)
    assert (board.state(), board.down()) == (SlotState.BOUND, 0)
    assert board.heard.take() == [("refused", SLOT, "disk", EJECT, status)]
    board.eject()
    assert board.heard.take() == [("unexpected", SLOT, "disk")]


@pytest.mark.parametrize("status", [0, 0x84])
def test_only_the_eject_itself_counts_as_done(board: Board, status: int) -> None:
    board.bind()
    board.slots.ask(SLOT)
    board.ost(EJECT, status)
    board.ost(0x103, status)
    assert (board.state(), board.heard.take()) == (SlotState.REMOVING, [])


def test_a_refused_insertion_is_told_and_the_device_stays(board: Board) -> None:
    board.insert()
    board.ost(CHECK, 0x80)  # in progress
    assert board.heard.take() == []
    board.ost(CHECK, 0x81)
    assert board.heard.take() == [("refused", SLOT, "disk", CHECK, 0x81)]
    assert board.state() is SlotState.INSERTING
    for _ in range(100):
        board.ost(CHECK, 1)
    assert len(board.heard.take()) == 7


def test_call_off(board: Board) -> None:
    board.bind()
    with pytest.raises(Conflict, match="bound: no removal"):
        board.slots.call_off(SLOT)
    board.slots.ask(SLOT)
    board.slots.call_off(SLOT)
    assert (board.state(), board.down(), board.up()) == (SlotState.BOUND, 0, 0)


def test_calling_off_before_the_guest_saw_the_device_shows_it_again(board: Board) -> None:
    board.insert()
    board.slots.ask(SLOT)
    assert board.up() == 0
    board.slots.call_off(SLOT)
    assert (board.state(), board.up(), board.down()) == (SlotState.INSERTING, BIT, 0)


def test_taken_out_without_asking(board: Board) -> None:
    function = board.bind()
    board.slots.take_out(SLOT)
    assert (board.state(), function.left, board.down()) == (SlotState.GONE, 1, BIT)
    assert board.heard.take() == [("ejected", SLOT, "disk", "force")]
    board.slots.release(SLOT)
    with pytest.raises(Conflict, match="the guest has not let go"):
        board.insert("next")
    board.eject()
    assert (board.state(), board.heard.take()) == (SlotState.EMPTY, [("freed", SLOT)])
    board.insert("next")


def test_what_no_guest_knows_of_leaves_the_slot_free(board: Board) -> None:
    board.insert()
    board.slots.take_out(SLOT)
    assert (board.state(), board.down(), board.up()) == (SlotState.EJECTED, 0, 0)
    board.slots.release(SLOT)
    board.slots.place(SLOT, Function())
    board.slots.take_out(SLOT, guest_runs=False)
    assert (board.state(), board.down()) == (SlotState.EJECTED, 0)
    with pytest.raises(Conflict, match="no device to take out"):
        board.slots.take_out(SLOT)


def test_a_present_device_is_not_released(board: Board) -> None:
    board.bind()
    with pytest.raises(Conflict, match="slot 6 holds disk"):
        board.slots.release(SLOT)
    with pytest.raises(Conflict, match="taken by disk"):
        board.insert("other")
    assert board.slots.device(SLOT) == "disk"


def test_a_bar_without_room_changes_nothing(board: Board) -> None:
    big = Function("big")
    big.config.add_bar(2, 1 << 30, wide=True)
    with pytest.raises(Conflict, match="no MMIO room"):
        board.slots.insert(SLOT, big)
    assert (board.state(), board.up(), board.interrupts) == (SlotState.EMPTY, 0, 0)
    board.insert()


@pytest.mark.parametrize(("prepare", "after", "said"), [
    (lambda board: board.insert(), SlotState.ENUMERATED, [("enumerated", SLOT, "disk", "reset")]),
    (lambda board: board.bind(), SlotState.ENUMERATED, []),
    (lambda board: (board.bind(), board.slots.ask(SLOT)), SlotState.EJECTED, [("ejected", SLOT, "disk", "reset")]),
    (lambda board: (board.bind(), board.slots.take_out(SLOT), board.heard.take()), SlotState.EMPTY,
     [("freed", SLOT)]),
    (lambda board: board.slots.place(SLOT, Function()), SlotState.ENUMERATED, []),
])
def test_a_machine_reset_does_what_is_wanted(
        board: Board, prepare: Callable[[Board], object], after: SlotState, said: list[object]) -> None:
    prepare(board)
    board.slots.machine_reset()
    assert (board.state(), board.heard.take()) == (after, said)
    assert (board.up(), board.down()) == (0, 0)
    board.slots.machine_reset()
    assert board.heard.take() == []


@pytest.mark.parametrize("size", [1, 2, 8])
def test_other_widths_do_nothing(board: Board, size: int) -> None:
    board.bind()
    board.slots.ask(SLOT)
    for offset in range(0x40):
        assert board.slots.read(offset, size) == 0
        board.slots.write(offset, size, BIT)
    assert (board.state(), board.down()) == (SlotState.REMOVING, BIT)


def test_registers_that_are_written_read_as_documented(board: Board) -> None:
    assert board.slots.read(reg.PCI_EJECT, 4) == 0
    board.slots.write(reg.PCI_SEGMENT, 4, 7)
    assert board.slots.read(reg.PCI_SEGMENT, 4) == 0
    board.ost(CHECK, 0, slot=0xFFFF_FFFF)
    assert board.slots.read(reg.OST_SLOT, 4) == 0xFFFF_FFFF
    assert board.heard.take() == []


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 0x40), st.sampled_from([1, 2, 4, 8]),
                          st.sampled_from([0, 1, 3, 6, BIT, BIT | 1, 0x80, 0xFFFF_FFFF, 2**64 - 1])), max_size=60))
def test_no_guest_gets_rid_of_a_device_by_itself(accesses: list[tuple[bool, int, int, int]]) -> None:
    board = Board()
    board.bind()
    for is_write, offset, size, value in accesses:
        if is_write:
            board.slots.write(offset, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= board.slots.read(offset, size) < 1 << 8 * size
    assert board.state() is SlotState.BOUND
    assert not any(said[0] in ("ejected", "refused") for said in board.heard.take())


# ---- the verbs on top of it


def test_asking_again_for_what_was_just_ejected_is_no_mistake(board: Board) -> None:
    """The guest may be quicker than a second client; calling off comes too late, and so does asking for another."""
    class Outside:
        store: Any = None

        def post(self, action: Callable[[], None]) -> None: ...
        def event(self, name: str, **properties: Any) -> None: ...

    link: Any = SimpleNamespace(device="disk", slot=SLOT)
    hotplug = Hotplug(Outside(), threading.RLock(), board.slots, {"disk": link})
    board.bind()
    assert hotplug.unplug("disk", State.RUNNING) is SlotState.REMOVING
    board.eject()
    assert hotplug.unplug("disk", State.RUNNING) is SlotState.EJECTED
    with pytest.raises(Conflict, match="unplug disk: it is not plugged"):
        hotplug.unplug("disk", State.RUNNING, cancel=True)
    board.slots.release(SLOT)
    with pytest.raises(Conflict, match="unplug disk: it is not plugged"):
        hotplug.unplug("disk", State.RUNNING)
