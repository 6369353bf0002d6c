"""Devices that come and go while the machine runs: between the verbs, the slots (core/pci/slots.py) and the links.

    ATTACH, worker READY --PLUG--> in its slot, guest told --...--> slot.enumerated, slot.bound
    UNPLUG --> guest told --_EJ0--> function off the bus, slot.ejected --DETACH--> worker told END, all released
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from cellvisor.core import log
from cellvisor.core.errors import Conflict, NotFound
from cellvisor.core.link import Link, WorkerState
from cellvisor.core.pci.slots import PRESENT, PciSlots, SlotState
from cellvisor.core.state import State
from cellvisor.core.store import Store
from cellvisor.core.wire.messages import ToWorker

GUEST_MAY_RUN = frozenset({State.RUNNING, State.PAUSED, State.RESETTING})


class Outside(Protocol):
    """What of the server is needed."""

    store: Store

    def post(self, action: Callable[[], None]) -> None:
        """Run on the main thread; any thread may call."""

    def event(self, name: str, **properties: Any) -> None:
        """Tell the controlplane; main thread only."""


class Hotplug:
    """The slots' listener and the verbs PLUG, UNPLUG and DETACH. Main thread, but for the listener's part."""

    def __init__(self, outside: Outside, lock: threading.RLock, slots: PciSlots, links: dict[str, Link]) -> None:
        self._outside, self._lock, self._slots, self._links = outside, lock, slots, links
        slots.listen(self)

    # ---- verbs

    def ready(self, link: Link, state: State) -> None:
        """A worker serves: before boot the function goes in at once, afterwards PLUG says when."""
        with self._lock:
            if state is State.CREATED and link.function is not None and not self._holds(link):
                self._slots.place(link.slot, link.function)

    def plug(self, device: str, state: State) -> SlotState:
        """Show a complete function to the guest; nothing happens to one that is there. Raises Conflict."""
        link = self._link(device)
        if state not in GUEST_MAY_RUN and state is not State.CREATED:
            raise Conflict(f"plug {device}: the VM is {state}")
        if link.function is None:
            raise Conflict(f"plug {device}: its process has not said what it is", hint="try again")
        with self._lock:
            if not self._holds(link):
                if state is State.CREATED:
                    self._slots.place(link.slot, link.function)
                else:
                    self._slots.insert(link.slot, link.function)
            return self._slots.state(link.slot)

    def unplug(self, device: str, state: State, *, force: bool = False, cancel: bool = False,
               check: bool = False) -> SlotState:
        """Ask the guest for a device (again), call that off, or take it out without asking. Without a guest
        it leaves at once. `check`: nothing of that, only raise Conflict as it would. Returns the slot's state; EJECTED
        and GONE are also told by slot.ejected."""
        link = self._link(device)
        runs = state in GUEST_MAY_RUN
        with self._lock:
            if not self._holds(link):
                if not cancel and self.state(link) == SlotState.EJECTED:
                    return SlotState.EJECTED  # the guest let go before it could be asked again
                raise Conflict(f"unplug {device}: it is not plugged")
            if check:
                pass
            elif cancel:
                self._slots.call_off(link.slot)
            elif force or not runs:
                self._slots.take_out(link.slot, guest_runs=runs)
            else:
                self._slots.ask(link.slot)
            return self._slots.state(link.slot)

    def detach(self, device: str) -> None:
        """Forget a device that is in no slot (any more): its worker is told END, its id and slot are free."""
        link = self._link(device)
        with self._lock:
            if self._holds(link):
                raise Conflict(f"detach {device}: it is plugged", hint="unplug it first")
            if self._slots.device(link.slot) == device:
                self._slots.release(link.slot)
        link.send(ToWorker.END)
        worker = link.worker
        if worker is not None:
            worker.state = WorkerState.DEAD  # what it says or how it ends concerns nobody from here on
            calls, worker.calls = list(worker.calls.values()), {}
            for done in calls:
                done(None, Conflict(f"{device}: the device was removed"))
        del self._links[device]
        link.close()
        self._outside.store.drop(device)

    def machine_reset(self) -> None:
        """See PciSlots.machine_reset; call it before the functions are reset."""
        with self._lock:
            self._slots.machine_reset()

    def state(self, link: Link) -> str:
        """Return the state of a device's slot, "unplugged" when it is in none."""
        mine = self._slots.device(link.slot) == link.device
        return str(self._slots.state(link.slot)) if mine else "unplugged"

    def states(self) -> dict[int, str]:
        """Return slot -> state of every slot that is not empty."""
        found = {slot: self._slots.state(slot) for slot in range(32)}
        return {slot: str(state) for slot, state in found.items() if state is not SlotState.EMPTY}

    def _link(self, device: str) -> Link:
        link = self._links.get(device)
        if link is None:
            raise NotFound(f"no device {device[:80]!r}", hint="see `cellvisor devices`")
        return link

    def _holds(self, link: Link) -> bool:
        state = self._slots.state(link.slot)
        return (state in PRESENT or state is SlotState.REMOVING) and self._slots.device(link.slot) == link.device

    # ---- SlotListener: under the board lock, on vCPU threads too

    def activated(self, link: Link) -> None:
        """The driver said DRIVER_OK; a vCPU thread that holds the board lock calls this."""
        self._slots.activated(link.slot)

    def _tell(self, name: str, **properties: Any) -> None:
        self._outside.post(lambda: self._outside.event(name, **properties))

    def enumerated(self, slot: int, device: str, how: str) -> None:
        """SlotListener."""
        self._tell("slot.enumerated", device=device, slot=slot, how=how)

    def bound(self, slot: int, device: str) -> None:
        """SlotListener."""
        self._tell("slot.bound", device=device, slot=slot)

    def refused(self, slot: int, device: str, event: int, status: int) -> None:
        """SlotListener."""
        log.get("hotplug").info("%s: the guest's _OST(%#x) is %#x", device, event, status)
        self._tell("slot.ost", device=device, slot=slot, event=event, status=status)

    def ejected(self, slot: int, device: str, how: str) -> None:
        """SlotListener."""
        self._tell("slot.ejected", device=device, slot=slot, how=how)

    def unexpected(self, slot: int, device: str) -> None:
        """SlotListener."""
        log.get("hotplug").warning("the guest ejected %s in slot %d, which nobody asked for: refused", device, slot)
        self._tell("eject.unexpected", device=device, slot=slot)

    def freed(self, slot: int) -> None:
        """SlotListener."""
        self._tell("slot.freed", slot=slot)
