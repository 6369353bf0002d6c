"""AML of PCI hotplug: the controller \\_SB.PHPR, its 32 slots, and the scan that an event sets off.

GED._EVT -> PHPR.PSCN -> PC00.PCNT reads who came and who should go -> Notify (Sxxx); the guest answers
with Sxxx._EJ0 and Sxxx._OST, which write the registers of core/pci/slots.py (ACPI 6.5, 6.3.3, 6.3.5).
"""

from __future__ import annotations

from cellvisor.core.abi import acpi as abi
from cellvisor.core.abi import hotplug as reg
from cellvisor.core.acpi import aml
from cellvisor.core.acpi.aml import ARG, device, if_, method, name, ref
from cellvisor.core.mem import layout

_CONTROLLER = "\\_SB.PHPR"
_FIELDS = ("PCIU", "PCID", "B0EJ", "PSEG", "OSLT", "OEVT", "OSTS")
_SHOW_NOT = 0xB  # present, enabled, functioning; not for a user interface


def pci_controller() -> bytes:
    """Return Device (PHPR): registers, their mutex, and the methods that slots call."""
    locked = (aml.acquire("BLCK"), aml.release("BLCK"))
    return device(
        "PHPR",
        name("_HID", aml.eisa_id("PNP0A06")),
        name("_UID", "PCI hotplug"),
        name("_STA", _SHOW_NOT),
        aml.mutex("BLCK"),
        aml.op_region("PREG", aml.SYSTEM_MEMORY, layout.PCI_HOTPLUG, reg.PCI_HOTPLUG_SIZE),
        aml.field("PREG", aml.DWORD_ACCESS, *((each, 32) for each in _FIELDS), rule=aml.WRITE_AS_ZEROS),
        method(
            "PCEJ", 2,
            locked[0],
            aml.store(ARG[1], ref("PSEG")),
            aml.shift_left(1, ARG[0], ref("B0EJ")),
            locked[1],
            serialized=True,
        ),
        # (slot, segment, source event, status): the status goes last, its write is the report.
        method(
            "POST", 4,
            locked[0],
            aml.store(ARG[1], ref("PSEG")),
            aml.store(ARG[0], ref("OSLT")),
            aml.store(ARG[2], ref("OEVT")),
            aml.store(ARG[3], ref("OSTS")),
            locked[1],
            serialized=True,
        ),
        method("PSCN", 0, aml.call("\\_SB.PC00.PCNT"), serialized=True),
    )


def bridge_slots() -> bytes:
    """Return what belongs into the root bridge: the slots and the methods that notify them."""
    slots = range(layout.PCI_SLOTS)
    dispatch = method(
        "DVNT", 2,
        *(if_(aml.and_(ARG[0], 1 << slot), aml.notify(f"S{slot:03d}", ARG[1])) for slot in slots),
        serialized=True,
    )
    scan = method(
        "PCNT", 0,
        aml.acquire(f"{_CONTROLLER}.BLCK"),
        aml.store(ref("_SEG"), ref(f"{_CONTROLLER}.PSEG")),
        aml.call("DVNT", ref(f"{_CONTROLLER}.PCIU"), abi.NOTIFY_DEVICE_CHECK),
        aml.call("DVNT", ref(f"{_CONTROLLER}.PCID"), abi.NOTIFY_EJECT_REQUEST),
        aml.release(f"{_CONTROLLER}.BLCK"),
        serialized=True,
    )
    return b"".join(_slot(number) for number in slots) + dispatch + scan


def _slot(number: int) -> bytes:
    return device(
        f"S{number:03d}",
        name("_SUN", number),
        name("_ADR", number << 16),
        method("_EJ0", 1, aml.call(f"{_CONTROLLER}.PCEJ", ref("_SUN"), ref("_SEG")), serialized=True),
        method("_OST", 3, aml.call(f"{_CONTROLLER}.POST", ref("_SUN"), ref("_SEG"), ARG[0], ARG[1]), serialized=True),
    )
