"""Device processes: the contract, the one main loop, the nursery that forks them, and one file per type."""

from __future__ import annotations

# At the repository root "import devices" would work by accident and load a second copy of everything.
assert __name__ == "cellvisor.devices", "import cellvisor.devices, not devices"
