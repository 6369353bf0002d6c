"""A function that is not virtio: PCI ids and windows from its Spec, nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from cellvisor.core.pci.config import ConfigSpace
from cellvisor.core.pci.ports import Ports
from cellvisor.core.pci.windows import Windows
from cellvisor.core.wire.spec import Spec


class RawPciDevice:
    """A bars.PciFunction over bytes, file, doorbell and memory windows."""

    def __init__(self, name: str, spec: Spec, ports: Ports, *,
                 window_fds: Mapping[str, int] | None = None) -> None:
        """Build from a Spec with vendor and device. Raises UsageError naming what is wrong in it."""
        self.name = name
        self.config = ConfigSpace(vendor=spec.vendor, device=spec.device, pci_class=spec.pci_class,
                                  revision=spec.revision, subsystem_vendor=spec.vendor,
                                  subsystem=spec.subsystem)
        self._windows = Windows(name, spec.windows, window_fds or {}, ports)
        self._windows.add_bars(self.config)

    def attached(self, slot: int) -> None:
        """Nothing depends on the slot."""

    def detached(self) -> None:
        """Hold nothing any more."""
        self._windows.close()

    def remove(self) -> None:
        """Hold nothing any more."""
        self._windows.close()

    def machine_reset(self) -> None:
        """Return to the power-on state."""
        self.config.reset()

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Answer a load."""
        return self._windows.read(bar, offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Take a store."""
        self._windows.write(bar, offset, size, value)

    def bar_placed(self, bar: int, gpa: int | None) -> None:
        """Follow the guest."""
        self._windows.placed(bar, gpa)
