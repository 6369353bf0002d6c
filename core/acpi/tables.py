"""Build the ACPI tables as one block of memory, RSDP first (ACPI 6.5, 5.2)."""

from __future__ import annotations

import struct

from cellvisor.core.abi import acpi as abi
from cellvisor.core.acpi.config import AcpiConfig
from cellvisor.core.acpi.dsdt import dsdt_body
from cellvisor.core.acpi.fadt import fadt_body
from cellvisor.core.errors import Internal
from cellvisor.core.mem import layout

HEADER_SIZE = 36
RSDP_SIZE = 36
ALIGN = 16


def build_tables(config: AcpiConfig) -> bytes:
    """Return the bytes to put at `config.base`: RSDP, DSDT, FADT, MADT, MCFG, XSDT, 16-byte aligned."""
    block = bytearray(RSDP_SIZE)

    def place(content: bytes) -> int:
        block.extend(bytes(-len(block) % ALIGN))
        address = config.base + len(block)
        block.extend(content)
        return address

    dsdt = place(table(b"DSDT", 6, dsdt_body(config)))
    listed = [
        place(table(b"FACP", 6, fadt_body(dsdt))),
        place(table(b"APIC", 5, _madt_body(config))),
        place(table(b"MCFG", 1, _mcfg_body())),
    ]
    xsdt = place(table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    block[:RSDP_SIZE] = _rsdp(xsdt)
    if config.base == layout.ACPI_TABLES and len(block) > layout.ACPI_TABLES_END - layout.ACPI_TABLES:
        raise Internal(f"ACPI tables take {len(block)} bytes, more than there is room for")
    return bytes(block)


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Put the table header before `body`, checksum included."""
    raw = bytearray(struct.pack(
        "<4sIBB6s8sI4sI", signature, HEADER_SIZE + len(body), revision, 0, abi.OEM_ID, abi.OEM_TABLE_ID,
        abi.OEM_REVISION, abi.CREATOR_ID, abi.CREATOR_REVISION,
    ) + body)
    raw[9] = checksum(raw)
    return bytes(raw)


def checksum(data: bytes | bytearray) -> int:
    """Return the byte that makes the sum of `data` zero, with zero in its place."""
    return -sum(data) & 0xFF


def _rsdp(xsdt: int) -> bytes:
    raw = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, abi.OEM_ID, 2, 0, RSDP_SIZE, xsdt, 0))
    raw[8] = checksum(raw[:20])  # ACPI 1.0 part
    raw[32] = checksum(raw)
    return bytes(raw)


def _madt_body(config: AcpiConfig) -> bytes:
    body = struct.pack("<II", layout.LAPIC, 0)  # no 8259s
    for number in range(config.max_vcpus):
        flags = abi.X2APIC_ENABLED if number < config.boot_vcpus else abi.X2APIC_ONLINE_CAPABLE
        body += struct.pack("<BBHIII", abi.MADT_X2APIC, 16, 0, number, flags, number)
    body += struct.pack("<BBBBII", abi.MADT_IOAPIC, 12, 0, 0, layout.IOAPIC, 0)
    # Hardware-reduced Linux knows no ISA interrupt that is not listed here.
    return body + struct.pack("<BBBBIH", abi.MADT_OVERRIDE, 10, 0, layout.GSI_COM1, layout.GSI_COM1,
                              abi.INTI_CONFORMS)


def _mcfg_body() -> bytes:
    return struct.pack("<8xQHBB4x", layout.ECAM, 0, 0, layout.ECAM_SIZE // layout.MIB - 1)
