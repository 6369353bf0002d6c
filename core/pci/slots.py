"""The PCI hotplug controller: who is in which slot, what the guest was told of it, and its registers.

    EMPTY --place (before boot)--> ENUMERATED --DRIVER_OK--> BOUND
      |                               ^                        ^
      +--insert--> INSERTING --_OST---+      DRIVER_OK --------+      (these three: present)
                       |                                       |
    present --ask--> REMOVING --_EJ0, machine reset--> EJECTED --release--> EMPTY
       ^                |
       +-- call off, or _OST says no
    present --take out--> GONE (the device is away, the guest still believes in it) --_EJ0, reset--> EMPTY
                     +--> EJECTED, where no guest has heard of it yet
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cellvisor.core.abi import acpi, pci
from cellvisor.core.abi import hotplug as reg
from cellvisor.core.errors import Conflict
from cellvisor.core.pci.bars import PciFunction
from cellvisor.core.pci.root import PciRoot

_MOST_REPORTS = 8  # complaints of a slot until something is asked of it again: the guest decides how often it lies
_SOURCE_MASK = 0xFF  # an _OST answers a Notify value, or 0x100 + it where the OS acted on its own


class SlotState(StrEnum):
    EMPTY = "empty"
    INSERTING = "inserting"
    ENUMERATED = "enumerated"
    BOUND = "bound"
    REMOVING = "removing"
    EJECTED = "ejected"
    GONE = "gone"


PRESENT = frozenset({SlotState.INSERTING, SlotState.ENUMERATED, SlotState.BOUND})


class SlotListener(Protocol):
    """Who hears of it. Called under the board lock, on vCPU threads too: hand over, do not wait."""

    def enumerated(self, slot: int, device: str, how: str) -> None:
        """The guest knows the device: it said so ("ost"), drives it ("driver"), or boots with it ("reset")."""

    def bound(self, slot: int, device: str) -> None:
        """The first DRIVER_OK since the device came."""

    def refused(self, slot: int, device: str, event: int, status: int) -> None:
        """The guest's _OST is a failure; a removal that it answers is called off."""

    def ejected(self, slot: int, device: str, how: str) -> None:
        """The function is off the bus: by the "guest", a "reset", or "force"."""

    def unexpected(self, slot: int, device: str) -> None:
        """The guest ejected what nobody wanted back. It was not done."""

    def freed(self, slot: int) -> None:
        """The guest has let go of a slot whose device was taken out before."""


@dataclass(slots=True)
class _Slot:
    state: SlotState = SlotState.EMPTY
    before: SlotState = SlotState.EMPTY  # where a removal that is called off goes back to
    device: str = ""
    reports: int = _MOST_REPORTS


class PciSlots:
    """A bus device (the registers) and the machine's side of the slots. Callers hold the board lock.

    *Eject expected* is the state REMOVING; *notify pending* is a bit that the guest's read clears.
    """

    def __init__(self, root: PciRoot, notify: Callable[[], None]) -> None:
        """`notify` raises the PCI event of the GED."""
        self._root, self._notify = root, notify
        self._listener: SlotListener | None = None
        self._slots = [_Slot() for _ in range(pci.SLOTS)]
        self._up = self._down = 0
        self._ost_slot = self._ost_event = 0

    def listen(self, listener: SlotListener) -> None:
        """Say who hears of changes."""
        self._listener = listener

    # ---- the machine's side

    def state(self, slot: int) -> SlotState:
        """Return the state of slot 0..31."""
        return self._slots[slot].state

    def device(self, slot: int) -> str:
        """Return the name of the function that is, or last was, in `slot`."""
        return self._slots[slot].device

    def place(self, slot: int, function: PciFunction) -> None:
        """Put a function where the guest will find it when it boots. Raises as insert() does."""
        self._attach(slot, function, SlotState.ENUMERATED)

    def insert(self, slot: int, function: PciFunction) -> None:
        """Put a complete function into `slot` and tell the guest. Raises Conflict, changing nothing, when the
        slot is not empty or a BAR has no room."""
        self._attach(slot, function, SlotState.INSERTING)
        self._up |= 1 << slot
        self._down &= ~(1 << slot)
        self._notify()

    def _attach(self, slot: int, function: PciFunction, state: SlotState) -> None:
        here = self._slots[slot]
        if here.state is not SlotState.EMPTY:
            why = {SlotState.GONE: "the guest has not let go of the device that was taken out",
                   SlotState.EJECTED: f"{here.device} is still leaving"}.get(here.state, f"taken by {here.device}")
            raise Conflict(f"{function.name}: PCI slot {slot}: {why}")
        self._root.attach(slot, function)
        self._slots[slot] = _Slot(state, state, function.name)

    def ask(self, slot: int) -> None:
        """Ask the guest to give the device back; once more if it was asked before. Raises Conflict."""
        here = self._slots[slot]
        if here.state is not SlotState.REMOVING:
            if here.state not in PRESENT:
                raise Conflict(f"PCI slot {slot} is {here.state}: there is no device to ask for")
            here.before, here.state = here.state, SlotState.REMOVING
        here.reports = _MOST_REPORTS
        self._down |= 1 << slot
        self._up &= ~(1 << slot)
        self._notify()

    def call_off(self, slot: int) -> None:
        """Want the device no longer back. Raises Conflict if nobody did."""
        here = self._slots[slot]
        if here.state is not SlotState.REMOVING:
            raise Conflict(f"PCI slot {slot} is {here.state}: no removal to call off")
        here.state = here.before
        self._down &= ~(1 << slot)
        if here.state is SlotState.INSERTING:  # it may not have been seen yet
            self._up |= 1 << slot
            self._notify()

    def take_out(self, slot: int, *, guest_runs: bool = True) -> None:
        """Detach the function at once; a running guest is told afterwards. Raises Conflict."""
        here = self._slots[slot]
        if here.state not in PRESENT and here.state is not SlotState.REMOVING:
            raise Conflict(f"PCI slot {slot} is {here.state}: there is no device to take out")
        unseen = here.state is SlotState.INSERTING and bool(self._up >> slot & 1)  # the guest never heard of it
        told = guest_runs and not unseen
        self._eject(slot, "force", SlotState.GONE if told else SlotState.EJECTED)
        if told:
            self._down |= 1 << slot
            self._notify()

    def release(self, slot: int) -> None:
        """Forget an ejected device: the slot may be used again. One that is GONE stays so."""
        here = self._slots[slot]
        if here.state in PRESENT or here.state is SlotState.REMOVING:
            raise Conflict(f"PCI slot {slot} holds {here.device}", hint="eject it first")
        if here.state is SlotState.EJECTED:
            self._slots[slot] = _Slot()

    def activated(self, slot: int) -> None:
        """The driver said DRIVER_OK."""
        here = self._slots[slot]
        if here.state is SlotState.INSERTING:
            self._enumerated(slot, "driver")
        if here.state is SlotState.ENUMERATED:
            here.state = SlotState.BOUND
            if self._listener is not None:
                self._listener.bound(slot, here.device)
        elif here.state is SlotState.REMOVING:
            here.before = SlotState.BOUND

    def machine_reset(self) -> None:
        """Rebuild from what is wanted, while the old VM is still there: devices that were being added are there
        at the next boot, those being removed are not."""
        self._up = self._down = 0
        for number, here in enumerate(self._slots):
            here.reports = _MOST_REPORTS
            if here.state is SlotState.REMOVING:
                self._eject(number, "reset", SlotState.EJECTED)
            elif here.state is SlotState.INSERTING:
                self._enumerated(number, "reset")
            elif here.state is SlotState.BOUND:
                here.state = SlotState.ENUMERATED
            elif here.state is SlotState.GONE:
                self._free(number)

    # ---- the guest's side

    def read(self, offset: int, size: int) -> int:
        """Read one dword register; any other access reads 0 and does nothing."""
        value = 0
        if size != 4:
            return 0
        if offset == reg.PCI_UP:
            value, self._up = self._up, 0
        elif offset == reg.PCI_DOWN:
            value, self._down = self._down, 0
        elif offset == reg.OST_SLOT:
            value = self._ost_slot
        elif offset == reg.OST_EVENT:
            value = self._ost_event
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write one dword register; any other access is ignored, and so is another segment than 0."""
        if size != 4:
            return
        if offset == reg.PCI_EJECT:
            for slot in range(pci.SLOTS):
                if value >> slot & 1:
                    self._guest_ejects(slot)
        elif offset == reg.OST_SLOT:
            self._ost_slot = value
        elif offset == reg.OST_EVENT:
            self._ost_event = value
        elif offset == reg.OST_STATUS and self._ost_slot < pci.SLOTS:
            self._ost(self._ost_slot, self._ost_event & _SOURCE_MASK, value)

    def _guest_ejects(self, slot: int) -> None:
        here = self._slots[slot]
        if here.state is SlotState.REMOVING:
            self._eject(slot, "guest", SlotState.EJECTED)
        elif here.state is SlotState.GONE:
            self._free(slot)
        elif here.state in PRESENT:
            if self._may_report(here) and self._listener is not None:
                self._listener.unexpected(slot, here.device)
            # The guest's driver has let go already: have it look again, so that both sides agree.
            self._up |= 1 << slot
            self._notify()

    def _ost(self, slot: int, event: int, status: int) -> None:
        here = self._slots[slot]
        inserting = here.state is SlotState.INSERTING and event in (acpi.NOTIFY_BUS_CHECK, acpi.NOTIFY_DEVICE_CHECK)
        removing = here.state is SlotState.REMOVING and event == acpi.NOTIFY_EJECT_REQUEST
        if inserting and status == reg.OST_SUCCESS:
            self._enumerated(slot, "ost")
        elif inserting and status == reg.OST_INSERT_PENDING:
            pass
        elif removing and status in (reg.OST_SUCCESS, reg.OST_EJECT_PENDING):
            pass  # it will come, or has come already: _EJ0 counts
        elif (inserting or removing) and self._may_report(here):
            if removing:
                here.state = here.before
                self._down &= ~(1 << slot)
            if self._listener is not None:
                self._listener.refused(slot, here.device, event, status)

    # ---- below

    @staticmethod
    def _may_report(here: _Slot) -> bool:
        here.reports -= 1
        return here.reports >= 0

    def _enumerated(self, slot: int, how: str) -> None:
        here = self._slots[slot]
        here.state = SlotState.ENUMERATED
        if self._listener is not None:
            self._listener.enumerated(slot, here.device, how)

    def _eject(self, slot: int, how: str, state: SlotState) -> None:
        here = self._slots[slot]
        self._root.detach(slot)
        here.state = state
        self._up &= ~(1 << slot)
        self._down &= ~(1 << slot)
        if self._listener is not None:
            self._listener.ejected(slot, here.device, how)

    def _free(self, slot: int) -> None:
        self._slots[slot] = _Slot()
        if self._listener is not None:
            self._listener.freed(slot)
