"""ACPI numbers, as the ACPI specification 6.5 has them, and the registers that this board adds."""

from __future__ import annotations

from typing import Final

# FADT flags (5.2.9, Table 5.10)
FADT_WBINVD: Final = 1 << 0
FADT_POWER_BUTTON: Final = 1 << 4       # no fixed power button: it is a device in the namespace
FADT_SLEEP_BUTTON: Final = 1 << 5       # likewise
FADT_TIMER_32BIT: Final = 1 << 8        # TMR_VAL_EXT
FADT_RESET_REGISTER: Final = 1 << 10    # RESET_REG_SUP
FADT_HW_REDUCED: Final = 1 << 20

# FADT IA-PC boot architecture flags (5.2.9.3)
BOOT_NO_VGA: Final = 1 << 2

# Generic address structure (5.2.3.2)
SPACE_MEMORY: Final = 0
SPACE_IO: Final = 1
ACCESS_BYTE: Final = 1
ACCESS_DWORD: Final = 3

# MADT (5.2.12)
MADT_IOAPIC: Final = 1
MADT_OVERRIDE: Final = 2                # interrupt source override
MADT_X2APIC: Final = 9
X2APIC_ENABLED: Final = 1 << 0
X2APIC_ONLINE_CAPABLE: Final = 1 << 1
INTI_CONFORMS: Final = 0                # polarity and trigger as the bus has them: ISA is edge, high

# Reset and sleep registers (4.8.3.6, 4.8.3.7): one byte on this board, both the same port
RESET_VALUE: Final = 1
SLEEP_ENABLE: Final = 1 << 5            # SLP_EN
SLEEP_TYPE_SHIFT: Final = 2             # SLP_TYP, three bits
SLEEP_TYPE_MASK: Final = 7
S5_TYPE: Final = 5
POWER_OFF: Final = S5_TYPE << SLEEP_TYPE_SHIFT | SLEEP_ENABLE

# Event register of the generic event device (GED): one byte; a read gives and clears it
EVENT_CPU: Final = 1 << 0
EVENT_MEMORY: Final = 1 << 1
EVENT_PCI: Final = 1 << 2
EVENT_POWER_BUTTON: Final = 1 << 3
EVENT_ALL: Final = 0xF

# Values of Notify (5.6.6)
NOTIFY_BUS_CHECK: Final = 0
NOTIFY_DEVICE_CHECK: Final = 1
NOTIFY_EJECT_REQUEST: Final = 3
NOTIFY_POWER_BUTTON: Final = 0x80

# _OSC and _DSM of a PCI host bridge (6.2.11.3; PCI Firmware 3.3, 4.6.5)
OSC_PCI_UUID: Final = "33DB4D5B-1FF7-401C-9657-7441C03DD766"
OSC_FAILURE_UUID: Final = 1 << 2
OSC_FAILURE_REVISION: Final = 1 << 3
OSC_MASKED: Final = 1 << 4              # fewer capabilities granted than asked for
OSC_PCIE_CAPABILITY: Final = 1 << 4     # control field: the OS owns the PCIe capability structures
DSM_PCI_UUID: Final = "E5C937D0-3553-4D7A-9117-EA4D19C3434D"
DSM_PRESERVE_BOOT_CONFIG: Final = 5

OEM_ID: Final = b"CELLVI"
OEM_TABLE_ID: Final = b"CELLVISR"
OEM_REVISION: Final = 1
CREATOR_ID: Final = b"CVSR"
CREATOR_REVISION: Final = 1
