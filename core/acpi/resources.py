"""Encode resource descriptors, the content of _CRS (ACPI 6.5, 6.4): what a device occupies or forwards."""

from __future__ import annotations

import struct

from cellvisor.core.acpi import aml
from cellvisor.core.errors import Internal

# Memory attributes of an address space (6.4.3.5.5, Table 6.57).
NOT_CACHEABLE, CACHEABLE, WRITE_COMBINING, PREFETCHABLE = range(4)

_MEMORY, _IO, _BUS = range(3)
_MIN_AND_MAX_FIXED = 0x0C  # positive decode, resource producer
_ENTIRE_RANGE = 3
_END_TAG = b"\x79\x00"  # checksum 0: not checked


def template(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {descriptors}."""
    return aml.buffer(b"".join(descriptors) + _END_TAG)


def io(first: int, last: int, size: int, align: int = 1) -> bytes:
    """IO (Decode16): `size` ports, based at first..last."""
    return struct.pack("<BBHHBB", 0x47, 1, first, last, align, size)


def memory32_fixed(base: int, size: int, *, writable: bool = True) -> bytes:
    """Memory32Fixed: `size` bytes at `base`."""
    return struct.pack("<BHBII", 0x86, 9, int(writable), base, size)


def interrupt(*gsis: int, edge: bool = False, active_low: bool = False, shared: bool = False,
              wake: bool = False) -> bytes:
    """Interrupt (ResourceConsumer): extended interrupts; level, active high and exclusive by default."""
    flags = 1 | edge << 1 | active_low << 2 | shared << 3 | wake << 4
    body = struct.pack(f"<BB{len(gsis)}I", flags, len(gsis), *gsis)
    return struct.pack("<BH", 0x89, len(body)) + body


def bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber: the buses behind a bridge."""
    return _address_space("H", 0x88, _BUS, 0, first, last)


def io_window(first: int, last: int) -> bytes:
    """WordIO: ports that a bridge forwards."""
    return _address_space("H", 0x88, _IO, _ENTIRE_RANGE, first, last)


def memory32_window(base: int, size: int, attribute: int = NOT_CACHEABLE) -> bytes:
    """DWordMemory: 32-bit addresses that a bridge forwards."""
    return _address_space("I", 0x87, _MEMORY, 1 | attribute << 1, base, base + size - 1)


def memory64_window(base: int, size: int, attribute: int = NOT_CACHEABLE) -> bytes:
    """QWordMemory: 64-bit addresses that a bridge forwards."""
    return _address_space("Q", 0x8A, _MEMORY, 1 | attribute << 1, base, base + size - 1)


def register(space: int, bits: int, address: int, access: int = 0) -> bytes:
    """Register: a generic register (6.4.3.7)."""
    return struct.pack("<BHBBBBQ", 0x82, 12, space, bits, 0, access, address)


def _address_space(unit: str, tag: int, kind: int, kind_flags: int, first: int, last: int) -> bytes:
    if not 0 <= first <= last:
        raise Internal(f"resource {first:#x}..{last:#x} is empty")
    numbers = struct.pack(f"<5{unit}", 0, first, last, 0, last - first + 1)
    return struct.pack("<BHBBB", tag, 3 + len(numbers), kind, _MIN_AND_MAX_FIXED, kind_flags) + numbers
