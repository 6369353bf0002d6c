"""Build the FADT body, hardware-reduced: reset, sleep and PM timer registers (ACPI 6.5, 5.2.9)."""

from __future__ import annotations

import struct

from cellvisor.core.abi import acpi as abi
from cellvisor.core.mem import layout

FADT_SIZE = 276
MINOR_VERSION = 3  # 6.3 is where "online capable" in the MADT begins to count
PM_TIMER_BYTES = 4
NO_C2, NO_C3 = 101, 1001  # worst-case latencies in us that say "not supported"

FLAGS = (
    abi.FADT_HW_REDUCED | abi.FADT_RESET_REGISTER | abi.FADT_TIMER_32BIT
    | abi.FADT_WBINVD | abi.FADT_POWER_BUTTON | abi.FADT_SLEEP_BUTTON
)


def fadt_body(dsdt: int) -> bytes:
    """Return the FADT for the DSDT at gpa `dsdt`, without its table header."""
    raw = bytearray(FADT_SIZE)
    pm_byte = _address(8, abi.ACCESS_BYTE, layout.PORT_PM)
    fields: tuple[tuple[int, bytes], ...] = (
        (40, struct.pack("<I", dsdt)),
        (76, struct.pack("<I", layout.PORT_PM_TIMER)),
        (91, bytes([PM_TIMER_BYTES])),
        (96, struct.pack("<HH", NO_C2, NO_C3)),
        (109, struct.pack("<H", abi.BOOT_NO_VGA)),
        (112, struct.pack("<I", FLAGS)),
        (116, pm_byte),  # RESET_REG
        (128, bytes([abi.RESET_VALUE])),
        (131, bytes([MINOR_VERSION])),
        (140, struct.pack("<Q", dsdt)),
        (208, _address(32, abi.ACCESS_DWORD, layout.PORT_PM_TIMER)),
        (244, pm_byte),  # SLEEP_CONTROL_REG
        (256, pm_byte),  # SLEEP_STATUS_REG
        (268, abi.OEM_TABLE_ID),  # hypervisor vendor identity
    )
    for offset, value in fields:
        raw[offset:offset + len(value)] = value
    return bytes(raw[36:])


def _address(bits: int, access: int, port: int) -> bytes:
    return struct.pack("<BBBBQ", abi.SPACE_IO, bits, 0, access, port)
