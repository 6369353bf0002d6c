"""What lies where in the guest: physical addresses, ports and interrupt lines of the board.

Declared once, here; ACPI tells the guest, KVM and the devices are set up from the same names.
"""

from __future__ import annotations

from typing import Final

from cellvisor.core.errors import UsageError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# Low memory, used at boot only (all of it is RAM; the guest owns it once it runs).
GDT: Final = 0x500
PVH_START_INFO: Final = 0x6000
PVH_MODULES: Final = 0x6040
PVH_MEMMAP: Final = 0x7000
ZERO_PAGE: Final = 0x7000  # a kernel gets either the PVH memory map or the zero page
BOOT_STACK: Final = 0x8FF0
PAGE_TABLES: Final = 0x9000
PAGE_TABLES_END: Final = 0x20000
CMDLINE: Final = 0x20000
CMDLINE_SIZE: Final = 64 * KIB
LOW_USABLE_END: Final = 0xA0000
ACPI_TABLES: Final = 0xA0000  # RSDP first; firmware area, hidden from the guest's allocator by e820
ACPI_TABLES_END: Final = 0xF0000
RESET_VECTOR: Final = 0xFFFF0  # F000:FFF0, where a kernel that reboots "by BIOS" jumps in real mode
KERNEL: Final = 0x100000

# Guest-physical map.
LOW_RAM_END: Final = 0xC000_0000
MMIO32: Final = 0xC000_0000
MMIO32_END: Final = 0xE800_0000
ECAM: Final = 0xE800_0000  # segment 0, bus 0
ECAM_SIZE: Final = 1 * MIB
KVM_TSS: Final = 0xF800_0000  # three pages, for KVM on Intel without unrestricted guest
KVM_TSS_SIZE: Final = 0x3000
KVM_IDENTITY_MAP: Final = 0xF800_3000
KVM_IDENTITY_MAP_SIZE: Final = 0x1000
IOAPIC: Final = 0xFEC0_0000
GED: Final = 0xFED0_0000
PCI_HOTPLUG: Final = 0xFED0_1000
CPU_HOTPLUG: Final = 0xFED0_2000
MEMORY_HOTPLUG: Final = 0xFED0_3000
REGISTER_PAGE: Final = 0x1000
LAPIC: Final = 0xFEE0_0000
HIGH_RAM: Final = 4 * GIB
MMIO64_ALIGN: Final = 4 * GIB
MMIO64_LEAST: Final = 4 * GIB
DEFAULT_PHYS_BITS: Final = 46

# Ports.
PORT_PM: Final = 0x600  # ACPI reset, sleep control and sleep status, one byte
PORT_PM_TIMER: Final = 0x608
PORT_COM1: Final = 0x3F8
PORT_RTC: Final = 0x70

# Interrupt lines (GSI is the IOAPIC pin).
IOAPIC_PINS: Final = 24
GSI_COM1: Final = 4
GSI_INTX_FIRST: Final = 5
GSI_INTX_COUNT: Final = 8
GSI_GED: Final = 13

PCI_SLOTS: Final = 32

RAM_LEAST: Final = 64 * MIB
RAM_ALIGN: Final = 2 * MIB


def intx_gsi(slot: int, pin: int) -> int:
    """Return the GSI of `pin` (0..3 for INTA..INTD) of PCI slot 0..31; eight lines are shared."""
    return GSI_INTX_FIRST + (slot + pin) % GSI_INTX_COUNT


def ranges(ram_size: int) -> list[tuple[int, int, int]]:
    """Return (gpa, size, offset in the RAM memfd) of each stretch of `ram_size` bytes: low, then high.

    The hole below 4 GiB takes no room in the memfd: offsets run on.
    """
    if ram_size <= LOW_RAM_END:
        return [(0, ram_size, 0)]
    return [(0, LOW_RAM_END, 0), (HIGH_RAM, ram_size - LOW_RAM_END, LOW_RAM_END)]


def ram_end(ram_size: int) -> int:
    """Return the first gpa after `ram_size` bytes of RAM laid out by `ranges`."""
    gpa, size, _ = ranges(ram_size)[-1]
    return gpa + size


def mmio64_window(max_ram_size: int, phys_bits: int = DEFAULT_PHYS_BITS) -> tuple[int, int]:
    """Return (gpa, size) of the 64-bit MMIO window: after the end of the largest RAM, 4 GiB aligned."""
    start = max(ram_end(max_ram_size), HIGH_RAM)
    start = -(-start // MMIO64_ALIGN) * MMIO64_ALIGN
    return start, (1 << phys_bits) - start


def check_ram_size(size: int, phys_bits: int = DEFAULT_PHYS_BITS, flag: str = "--memory size") -> None:
    """Refuse a number of bytes that no guest could have. Raises UsageError naming `flag`."""
    if size <= 0:
        raise UsageError(f"{flag}: {size} bytes is no memory at all", hint="say for example size=512M")
    if size < RAM_LEAST:
        raise UsageError(f"{flag}: {size} bytes is too little", hint=f"at least {RAM_LEAST // MIB}M")
    if size % RAM_ALIGN:
        raise UsageError(f"{flag}: {size} bytes is no multiple of 2 MiB",
                         hint=f"try {-(-size // RAM_ALIGN) * (RAM_ALIGN // MIB)}M")
    if mmio64_window(size, phys_bits)[1] < MMIO64_LEAST:
        room = (1 << phys_bits) - MMIO64_LEAST - (HIGH_RAM - LOW_RAM_END)
        raise UsageError(f"{flag}: {size} bytes does not fit into {phys_bits} bits of physical address",
                         hint=f"at most {max(room, 0) // GIB}G with the device window")
