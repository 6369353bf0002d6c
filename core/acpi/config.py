"""What the ACPI tables depend on."""

from __future__ import annotations

from dataclasses import dataclass

from cellvisor.core.mem import layout


@dataclass(frozen=True, slots=True)
class AcpiConfig:
    """The machine that the tables describe.

    APIC ids are vCPU indexes: 0 .. `boot_vcpus`-1 run from the start, up to `max_vcpus`-1 may come later.
    `mmio64` is (gpa, size) of the 64-bit device window (layout.mmio64_window). `com1` says whether the
    serial port exists.
    """

    boot_vcpus: int
    max_vcpus: int
    mmio64: tuple[int, int]
    com1: bool = True
    base: int = layout.ACPI_TABLES
