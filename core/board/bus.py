"""An address space of the board: which device answers at which address. One for ports, one for MMIO.

Nothing here or in the devices raises for what a guest does, whatever address, size or value it uses.
The caller holds the board lock.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Final, Protocol

from cellvisor.core.errors import Conflict, UsageError

PIO_SIZE: Final = 1 << 16
MMIO_SIZE: Final = 1 << 64


class BusDevice(Protocol):
    """What stands on a bus. `offset` is from the start of the device's range; the access lies inside it."""

    def read(self, offset: int, size: int) -> int:
        """Return the little-endian value of `size` bytes (1 to 8) at `offset`."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the little-endian `value` of `size` bytes (1 to 8) at `offset`."""


class ByteDevice:
    """Registers of one byte each: a wider access touches them in address order, as on a PC's 8-bit bus."""

    def read8(self, offset: int) -> int:
        """Return the register at `offset`, 0..255. Override me."""
        return 0xFF

    def write8(self, offset: int, value: int) -> None:
        """Take `value`, 0..255, for the register at `offset`. Override me."""

    def read(self, offset: int, size: int) -> int:
        """Read `size` registers from `offset` on."""
        if size == 1:
            return self.read8(offset)
        return int.from_bytes(bytes(self.read8(offset + index) for index in range(size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` registers from `offset` on."""
        for index in range(size):
            self.write8(offset + index, value >> 8 * index & 0xFF)


@dataclass(frozen=True, slots=True)
class Range:
    """`size` addresses from `base` on belong to `device`; `name` is for people."""

    base: int
    size: int
    device: BusDevice
    name: str


class Bus:
    """Ranges that do not overlap, found by bisection."""

    def __init__(self, size: int, name: str = "bus") -> None:
        self.size = size
        self.name = name
        self._bases: list[int] = []
        self._ranges: list[Range] = []

    def add(self, base: int, size: int, device: BusDevice, name: str) -> None:
        """Give `size` addresses from `base` on to `device`.

        Raises Conflict naming the device that is there already, UsageError for a range outside the bus.
        """
        if size <= 0 or base < 0 or base + size > self.size:
            raise UsageError(f"{name}: {self.name} range {base:#x}+{size:#x} is outside 0..{self.size:#x}")
        index = bisect_right(self._bases, base)
        for other in self._ranges[max(index - 1, 0):index + 1]:
            if base < other.base + other.size and other.base < base + size:
                raise Conflict(f"{name}: {self.name} range {base:#x}+{size:#x} overlaps {other.name} "
                               f"at {other.base:#x}+{other.size:#x}")
        self._bases.insert(index, base)
        self._ranges.insert(index, Range(base, size, device, name))

    def remove(self, base: int) -> None:
        """Forget the range that starts at `base`; none there is no error."""
        index = bisect_right(self._bases, base) - 1
        if index >= 0 and self._bases[index] == base:
            del self._bases[index], self._ranges[index]

    def ranges(self) -> tuple[Range, ...]:
        """Return what is on the bus, in address order."""
        return tuple(self._ranges)

    def find(self, address: int) -> Range | None:
        """Return the range that holds `address`."""
        index = bisect_right(self._bases, address) - 1
        if index < 0:
            return None
        found = self._ranges[index]
        return found if address - found.base < found.size else None

    def read(self, address: int, size: int) -> int:
        """Return `size` bytes (1 to 8) at `address`; where nobody answers, all bits are ones.

        An access that crosses the end of a range is made byte by byte, each where it belongs.
        """
        found = self.find(address)
        if found is not None and address + size <= found.base + found.size:
            return found.device.read(address - found.base, size) & (1 << 8 * size) - 1
        if found is None and self._free(address, size):
            return (1 << 8 * size) - 1
        return int.from_bytes(bytes(self.read(address + index, 1) for index in range(size)), "little")

    def write(self, address: int, size: int, value: int) -> None:
        """Write `size` bytes (1 to 8) at `address`; what nobody takes is lost."""
        value &= (1 << 8 * size) - 1
        found = self.find(address)
        if found is not None and address + size <= found.base + found.size:
            found.device.write(address - found.base, size, value)
        elif found is not None or not self._free(address, size):
            for index in range(size):
                self.write(address + index, 1, value >> 8 * index & 0xFF)

    def _free(self, address: int, size: int) -> bool:
        # The start is known to be free: is the rest, up to the next range?
        index = bisect_right(self._bases, address)
        return index == len(self._bases) or address + size <= self._bases[index]
