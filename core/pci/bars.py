"""Where BARs are: the allocator (firmware's part) and the map that MMIO is dispatched by (the guest's part).

The guest may write any address into a BAR. Only a BAR that lies in an MMIO window and overlaps no other is
dispatched, and only there are doorbells and memory registered.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol

from cellvisor.core.errors import Conflict
from cellvisor.core.pci.config import Bar, ConfigSpace

SMALL = 16 << 20  # a wide BAR up to this goes below 4 GiB, where every guest can reach it


class PciFunction(Protocol):
    """One function as the root sees it."""

    name: str
    config: ConfigSpace

    def attached(self, slot: int) -> None:
        """The function is in `slot`, its BARs have addresses."""

    def detached(self) -> None:
        """The function left its slot: hold no line, doorbell or mapping."""

    def machine_reset(self) -> None:
        """Return to power-on: config.reset(), no line, irqfd or doorbell held; no BAR is placed."""

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Answer a load inside BAR `bar`; the result fits `size` bytes."""

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Take a store inside BAR `bar`."""

    def bar_placed(self, bar: int, gpa: int | None) -> None:
        """BAR `bar` is at `gpa` from now on: register doorbells and memory there, and nowhere else."""


@dataclass(slots=True)
class Region:
    """One BAR of one function.

    `start`: where it is dispatched, None for nowhere. `placed`: where the function has registered doorbells
    and memory. They differ while decode is off, for `placed` stays: Linux toggles decode while sizing, and
    taking ioeventfds away and back costs milliseconds.
    """

    function: PciFunction
    bar: Bar
    start: int | None = None
    placed: int | None = None


class BarMap:
    """All BARs of the bus."""

    def __init__(self, windows: list[tuple[int, int]]) -> None:
        """`windows` are (base, size) in which BARs may be, the one below 4 GiB first."""
        self.windows = [(base, base + size) for base, size in windows if size > 0]
        self._regions: list[Region] = []
        self._assigned: dict[tuple[int, int], tuple[PciFunction, int]] = {}  # (start, end) -> whose
        self._starts: list[int] = []
        self._active: list[Region] = []

    def assign(self, function: PciFunction) -> None:
        """Give every BAR of `function` an address, as firmware does. Raises Conflict if there is no room."""
        taken = [*self._assigned]
        taken += [(address, address + region.bar.size) for region in self._regions
                  for address in (region.function.config.bar_address(region.bar.index),)]
        chosen: dict[int, int] = {}
        for bar in sorted(function.config.bars.values(), key=lambda each: -each.size):
            start = self._find(bar, taken)
            if start is None:
                raise Conflict(f"{function.name}: no MMIO room for BAR {bar.index} of {bar.size:#x} bytes")
            taken.append((start, start + bar.size))
            chosen[bar.index] = start
        for index, start in chosen.items():
            function.config.set_bar(index, start)
            self._assigned[start, start + function.config.bars[index].size] = function, index

    def add(self, function: PciFunction) -> None:
        """Dispatch the BARs of `function` from now on."""
        self._regions += [Region(function, bar) for bar in function.config.bars.values()]
        self.refresh()

    def remove(self, function: PciFunction) -> None:
        """Forget `function` and free its addresses."""
        for region in self._regions:
            if region.function is function and region.placed is not None:
                region.placed = None
                function.bar_placed(region.bar.index, None)
        self._regions = [region for region in self._regions if region.function is not function]
        self._assigned = {key: owner for key, owner in self._assigned.items() if owner[0] is not function}
        self.refresh()

    def clear(self) -> None:
        """Have every function unregister what it has and dispatch nothing until refresh()."""
        self._starts, self._active = [], []
        for region in self._regions:
            region.start = None
            if region.placed is not None:
                region.placed = None
                region.function.bar_placed(region.bar.index, None)

    def find(self, gpa: int) -> tuple[Region, int] | None:
        """Return the region at `gpa` and the offset in it."""
        index = bisect_right(self._starts, gpa) - 1
        if index < 0:
            return None
        region = self._active[index]
        offset = gpa - self._starts[index]
        return (region, offset) if offset < region.bar.size else None

    def refresh(self) -> None:
        """Look at every BAR and decode bit again; who was there first keeps its place."""
        settled: list[tuple[int, int]] = []
        wanted: list[tuple[Region, int | None]] = []
        for region in self._regions:
            config = region.function.config
            wanted.append((region, config.bar_address(region.bar.index) if config.decodes else None))
        wanted.sort(key=lambda each: each[0].start is None or each[0].start != each[1])
        for region, address in wanted:
            region.start = None
            if address is not None and self._fits(address, region.bar.size, settled):
                region.start = address
                settled.append((address, address + region.bar.size))
        for region, address in wanted:
            if region.placed is None:
                continue
            size = region.bar.size
            keep = region.placed == region.start if address is not None else not _overlaps(
                region.placed, region.placed + size, settled)
            if not keep:  # everything leaves before anything arrives: two ioeventfds cannot share an address
                region.placed = None
                region.function.bar_placed(region.bar.index, None)
        for region, _ in wanted:
            if region.start is not None and region.placed != region.start:
                region.placed = region.start
                region.function.bar_placed(region.bar.index, region.start)
        self._active = sorted((region for region in self._regions if region.start is not None),
                              key=lambda region: region.start or 0)
        self._starts = [region.start or 0 for region in self._active]

    def _fits(self, start: int, size: int, taken: list[tuple[int, int]]) -> bool:
        inside = any(base <= start and start + size <= end for base, end in self.windows)
        return inside and not _overlaps(start, start + size, taken)

    def _find(self, bar: Bar, taken: list[tuple[int, int]]) -> int | None:
        windows = self.windows if bar.size <= SMALL or not bar.wide else self.windows[::-1]
        for base, end in windows:
            if not bar.wide and end > 1 << 32:
                continue
            start = -(-base // bar.size) * bar.size
            while start + bar.size <= end:
                blocker = max((last for first, last in taken if first < start + bar.size and start < last),
                              default=None)
                if blocker is None:
                    return start
                start = -(-blocker // bar.size) * bar.size
        return None


def _overlaps(start: int, end: int, taken: list[tuple[int, int]]) -> bool:
    return any(first < end and start < last for first, last in taken)
