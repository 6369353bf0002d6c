"""Mechanism: the KVM VM, its vCPUs, the PCI bus, ACPI, and the store of what outlives a device process."""

from __future__ import annotations

# At the repository root "import core" would work by accident and load a second copy of everything.
assert __name__ == "cellvisor.core", "import cellvisor.core, not core"
