"""Configuration space of one function: bytes, write masks, capabilities, BARs (PCI 3.0, 6; PCIe 7.2.2).

The bytes here are the truth; each change is copied to the shadow that C answers the guest from. Dwords
whose reading has an effect are marked `ask` there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cellvisor.core.abi import pci
from cellvisor.core.errors import Internal
from cellvisor.core.pci.ports import ConfigShadow

_WRITABLE_COMMAND = (pci.COMMAND_MEMORY | pci.COMMAND_MASTER | pci.COMMAND_PARITY | pci.COMMAND_SERR
                     | pci.COMMAND_INTX_DISABLE)
_BARS_END = pci.BAR_0 + 4 * pci.BARS


@dataclass(frozen=True, slots=True)
class Bar:
    """A memory BAR: `size` in bytes is a power of two; `wide` ones take two registers."""

    index: int
    size: int
    wide: bool
    prefetch: bool


def all_ones(size: int) -> int:
    """Return what reading nothing gives."""
    return (1 << 8 * size) - 1


class ConfigSpace:
    """4 KiB of one function; built first, then attached, then the guest's to read and write."""

    def __init__(self, *, vendor: int, device: int, pci_class: int, revision: int = 0,
                 subsystem_vendor: int = 0, subsystem: int = 0, pin: int = 0) -> None:
        """`pci_class` has 24 bits; `pin` is 0 for none, 1 for INTA#."""
        self._data = bytearray(pci.CONFIG_SIZE)
        self._mask = bytearray(pci.CONFIG_SIZE)
        self._power_on = bytes(pci.CONFIG_SIZE)
        self._asks: dict[int, Callable[[], int]] = {}
        self._hooks: list[tuple[int, int, Callable[[], None]]] = []
        self._next_free = pci.HEADER_SIZE
        self._last_link = pci.CAPABILITY_LIST
        self._shadow: ConfigShadow | None = None
        self._slot = 0
        self.bars: dict[int, Bar] = {}
        self.layout_changed: Callable[[], None] | None = None
        self._put(pci.VENDOR_ID, 2, vendor)
        self._put(pci.DEVICE_ID, 2, device)
        self._put(pci.REVISION_ID, 1, revision)
        self._put(pci.CLASS_PROG, 3, pci_class)
        self._put(pci.SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor)
        self._put(pci.SUBSYSTEM_ID, 2, subsystem)
        self._put(pci.INTERRUPT_PIN, 1, pin)
        self._allow(pci.COMMAND, 2, _WRITABLE_COMMAND)
        self._allow(pci.CACHE_LINE_SIZE, 1, 0xFF)
        self._allow(pci.INTERRUPT_LINE, 1, 0xFF)

    # --- building -------------------------------------------------------------------------------------

    def add_capability(self, kind: int, body: bytes, mask: bytes = b"") -> int:
        """Append a capability: `body` follows the two bytes of id and next; `mask` has a 1 for each bit of
        `body` that the guest may write. Returns the capability's offset."""
        offset = self._next_free
        end = offset + 2 + len(body)
        if end > pci.CONVENTIONAL_SIZE:
            raise Internal(f"capability {kind:#x}: no room at {offset:#x} for {len(body)} bytes")
        self._put(offset, 1, kind)
        self._data[offset + 2 : end] = body
        self._mask[offset + 2 : offset + 2 + len(mask)] = mask
        self._put(self._last_link, 1, offset)
        self._put(pci.STATUS, 2, self.status | pci.STATUS_CAP_LIST)
        self._last_link = offset + 1
        self._next_free = (end + 3) & ~3
        return offset

    def add_bar(self, index: int, size: int, *, wide: bool = True, prefetch: bool = False) -> None:
        """Declare BAR `index` (of 0..5; a wide one needs the next register too)."""
        if size & (size - 1) or size < 16 or (not wide and size > 1 << 31):
            raise Internal(f"BAR {index}: size {size:#x} is no power of two that fits")
        if index + wide >= pci.BARS or any(self.has_register(index + half) for half in range(1 + wide)):
            raise Internal(f"BAR {index}: its registers are taken or do not exist")
        self.bars[index] = Bar(index, size, wide, prefetch)
        flags = (pci.BAR_64 if wide else 0) | (pci.BAR_PREFETCH if prefetch else 0)
        self._put(pci.BAR_0 + 4 * index, 4, flags)
        self._allow(pci.BAR_0 + 4 * index, 8 if wide else 4, -size & all_ones(8 if wide else 4) & ~0xF)

    def has_register(self, index: int) -> bool:
        """Say whether BAR register `index` belongs to a BAR."""
        return index in self.bars or (index - 1 in self.bars and self.bars[index - 1].wide)

    def on_write(self, offset: int, size: int, callback: Callable[[], None]) -> None:
        """Call back after a guest's write that touches any of `size` bytes at `offset`."""
        self._hooks.append((offset, offset + size, callback))

    def on_read(self, offset: int, callback: Callable[[], int]) -> None:
        """Have the guest's reads of the dword at `offset` answered by `callback` (it returns 32 bits)."""
        self._asks[offset // 4] = callback

    # --- attaching ------------------------------------------------------------------------------------

    def set_bar(self, index: int, address: int) -> None:
        """Store a BAR's address as firmware does."""
        bar = self.bars[index]
        size = 8 if bar.wide else 4
        offset = pci.BAR_0 + 4 * index
        flags = self._data[offset] & 0xF
        self._put(offset, size, address & -bar.size | flags)

    def remember(self) -> None:
        """Take the present bytes for the power-on state."""
        self._power_on = bytes(self._data)

    def reset(self) -> None:
        """Return to the power-on state."""
        self._data[:] = self._power_on
        self._publish(0, pci.CONFIG_SIZE)
        self._changed_layout()

    def bind(self, shadow: ConfigShadow | None, slot: int = 0) -> None:
        """Publish everything to `shadow` and every later change too; None stops that."""
        self._shadow, self._slot = shadow, slot
        if shadow is not None:
            for dword in range(pci.CONFIG_SIZE // 4):
                shadow.ask(slot, dword, dword in self._asks)
            self._publish(0, pci.CONFIG_SIZE)

    # --- state ----------------------------------------------------------------------------------------

    @property
    def command(self) -> int:
        """The command register."""
        return self.peek(pci.COMMAND, 2)

    @command.setter
    def command(self, value: int) -> None:
        self._put(pci.COMMAND, 2, value)

    @property
    def status(self) -> int:
        """The status register."""
        return self.peek(pci.STATUS, 2)

    def set_interrupt_status(self, on: bool) -> None:
        """Set or clear the Interrupt Status bit."""
        status = self.status
        wanted = status | pci.STATUS_INTERRUPT if on else status & ~pci.STATUS_INTERRUPT
        if wanted != status:
            self._put(pci.STATUS, 2, wanted)

    @property
    def decodes(self) -> bool:
        """Whether memory BARs answer."""
        return bool(self._data[pci.COMMAND] & pci.COMMAND_MEMORY)

    def bar_address(self, index: int) -> int:
        """Return where the guest wants BAR `index`."""
        return self.peek(pci.BAR_0 + 4 * index, 8 if self.bars[index].wide else 4) & ~0xF

    def peek(self, offset: int, size: int) -> int:
        """Return stored bytes; no side effects."""
        return int.from_bytes(self._data[offset : offset + size], "little")

    # --- the guest ------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Answer a read of 1..8 bytes anywhere; bytes past the end are ones."""
        if offset < 0 or offset >= pci.CONFIG_SIZE:
            return all_ones(size)
        for dword in range(offset // 4, (offset + size - 1) // 4 + 1):
            answer = self._asks.get(dword)
            if answer is not None:
                self._put(4 * dword, 4, answer())
        data = self._data[offset : offset + size]
        return int.from_bytes(data.ljust(size, b"\xff"), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write of 1..8 bytes anywhere; only bits that may change do."""
        end = min(offset + size, pci.CONFIG_SIZE)
        if offset < 0 or offset >= end:
            return
        before = self._layout() if offset < _BARS_END else None
        data = (value & all_ones(size)).to_bytes(size, "little")
        for place, new in zip(range(offset, end), data, strict=False):
            mask = self._mask[place]
            self._data[place] = self._data[place] & ~mask | new & mask
        self._publish(offset, end)
        if before is not None and self._layout() != before:
            self._changed_layout()
        for first, last, callback in self._hooks:
            if first < end and offset < last:
                callback()

    # --- below ----------------------------------------------------------------------------------------

    def _layout(self) -> tuple[bool, bytes]:
        return self.decodes, bytes(self._data[pci.BAR_0 : _BARS_END])

    def _changed_layout(self) -> None:
        if self.layout_changed is not None:
            self.layout_changed()

    def _put(self, offset: int, size: int, value: int) -> None:
        self._data[offset : offset + size] = value.to_bytes(size, "little")
        self._publish(offset, offset + size)

    def _allow(self, offset: int, size: int, mask: int) -> None:
        self._mask[offset : offset + size] = mask.to_bytes(size, "little")

    def _publish(self, first: int, end: int) -> None:
        if self._shadow is not None:
            self._shadow.publish(self._slot, first, bytes(self._data[first:end]))
