"""The register block of PCI hotplug on this board, one dword each, and what _OST says (ACPI 6.5, 6.3.5).

The first four registers have the places and the meaning of Cloud Hypervisor's; the rest is ours.
"""

from __future__ import annotations

from typing import Final

PCI_UP: Final = 0x00            # R: bitmap of slots that got a device since the last read; a read clears
PCI_DOWN: Final = 0x04          # R: bitmap of slots whose device is wanted back; a read clears
PCI_EJECT: Final = 0x08         # W: bitmap of slots to eject (_EJ0); reads 0
PCI_SEGMENT: Final = 0x0C       # RW: the segment that the others are about; there is only 0
OST_SLOT: Final = 0x10          # W: slot number of an _OST
OST_EVENT: Final = 0x14         # W: its source event: the Notify value that is answered
OST_STATUS: Final = 0x18        # W: its status code; the write reports all three
PCI_HOTPLUG_SIZE: Final = 0x1C

# _OST status codes, Tables 6.63 to 6.65
OST_SUCCESS: Final = 0x00
OST_FAILURE: Final = 0x01
OST_UNRECOGNIZED: Final = 0x02
OST_EJECT_NOT_SUPPORTED: Final = 0x80
OST_EJECT_IN_USE: Final = 0x81
OST_EJECT_BUSY: Final = 0x82
OST_EJECT_DEPENDENCY: Final = 0x83
OST_EJECT_PENDING: Final = 0x84
OST_INSERT_PENDING: Final = 0x80
OST_INSERT_DRIVER: Final = 0x81
OST_INSERT_NOT_SUPPORTED: Final = 0x82
