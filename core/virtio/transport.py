"""What lies where in a virtio function: BAR 0, the capabilities that say so, and the PCI-cfg window.

BAR 0 has the layout of Cloud Hypervisor's devices, so that guests see familiar hardware (virtio 1.2, 4.1.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cellvisor.core.abi import pci, virtio
from cellvisor.core.pci.config import ConfigSpace
from cellvisor.core.wire.spec import Window

BAR = 0
BAR_SIZE = 0x80000
COMMON = 0x0
ISR = 0x2000
DEVICE = 0x4000
NOTIFY = 0x6000
NOTIFY_EACH = 4  # notify_off_multiplier: every queue has an address of its own, so no data match is needed
MSIX_TABLE = 0x8000
MSIX_PBA = 0x48000
WINDOW_BAR = 2
MOST_SHARED = 3  # capabilities must end below 0x100

_NUMBERS = slice(2, None)  # a capability's body starts after id and next


class BarAccess(Protocol):
    """The BARs that the PCI-cfg window gives access to."""

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Answer a load."""

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Take a store."""


def add_capabilities(config: ConfigSpace, queues: int, config_size: int, shared: Sequence[Window]) -> None:
    """Add everything but MSI-X and PCI-cfg. Without config bytes there is no device-cfg capability."""
    _add(config, virtio.CAP_COMMON, COMMON, virtio.COMMON_SIZE)
    _add(config, virtio.CAP_ISR, ISR, 1)
    if config_size:
        _add(config, virtio.CAP_DEVICE, DEVICE, config_size)
    _add(config, virtio.CAP_NOTIFY, NOTIFY, NOTIFY_EACH * max(queues, 1), NOTIFY_EACH.to_bytes(4, "little"))
    for window in shared:
        _add(config, virtio.CAP_SHARED_MEMORY, window.offset & 0xFFFF_FFFF, window.size & 0xFFFF_FFFF,
             (window.offset >> 32).to_bytes(4, "little") + (window.size >> 32).to_bytes(4, "little"),
             bar=window.bar, number=window.shmid)


def _add(config: ConfigSpace, kind: int, offset: int, length: int, extra: bytes = b"", *, bar: int = BAR,
         number: int = 0) -> None:
    size = virtio.PCI_CAP.size + len(extra)
    body = virtio.PCI_CAP.pack(pci.CAP_VENDOR, 0, size, kind, bar, number, offset, length)
    config.add_capability(pci.CAP_VENDOR, (body + extra)[_NUMBERS])


class PciCfgWindow:
    """VIRTIO_PCI_CAP_PCI_CFG: BAR accesses through config space (4.1.4.9), even while decode is off."""

    def __init__(self, config: ConfigSpace, target: BarAccess) -> None:
        """Add the capability; reads of its data dword are asked of Python."""
        self._config, self._target = config, target
        size = virtio.PCI_CAP_DATA + 4
        body = virtio.PCI_CAP.pack(pci.CAP_VENDOR, 0, size, virtio.CAP_PCI, 0, 0, 0, 0) + bytes(4)
        mask = virtio.PCI_CAP.pack(0, 0, 0, 0, 0xFF, 0, 0xFFFF_FFFF, 0xFFFF_FFFF) + b"\xff" * 4
        self._at = config.add_capability(pci.CAP_VENDOR, body[_NUMBERS], mask[_NUMBERS])
        self._data = self._at + virtio.PCI_CAP_DATA
        config.on_read(self._data, self._load)
        config.on_write(self._data, 1, self._store)

    def _access(self) -> tuple[int, int, int] | None:
        bar = self._config.bars.get(self._config.peek(self._at + virtio.PCI_CAP_BAR, 1))
        offset = self._config.peek(self._at + virtio.PCI_CAP_OFFSET, 4)
        length = self._config.peek(self._at + virtio.PCI_CAP_LENGTH, 4)
        if bar is None or length not in (1, 2, 4) or offset % length or offset + length > bar.size:
            return None
        return bar.index, offset, length

    def _load(self) -> int:
        access = self._access()
        return self._config.peek(self._data, 4) if access is None else self._target.bar_read(*access)

    def _store(self) -> None:
        access = self._access()
        if access is not None:
            self._target.bar_write(*access, self._config.peek(self._data, access[2]))


