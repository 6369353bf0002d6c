"""The BAR windows of a Spec: bytes, doorbells, a worker's memory, a worker's file behind pread and pwrite.

Memory and doorbells follow the BAR wherever the guest puts it; everything else is served by offset.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise

from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, UsageError
from cellvisor.core.pci import eventfd
from cellvisor.core.pci.config import ConfigSpace, all_ones
from cellvisor.core.pci.ports import Ports
from cellvisor.core.wire.spec import Window, WindowKind

PAGE = 4096


class Windows:
    """All windows of one function, over the BARs that they need."""

    def __init__(self, name: str, windows: Sequence[Window], fds: Mapping[str, int], ports: Ports) -> None:
        """`fds` has every descriptor that a window names; they stay the caller's. Raises UsageError."""
        self._name, self._ports = name, ports
        self._windows = sorted(windows, key=lambda window: (window.bar, window.offset))
        self._fds: dict[Window, int] = {}
        self._live: dict[Window, int] = {}  # memory and doorbells: window -> gpa where it is registered
        for window, following in pairwise(self._windows):
            if following.bar == window.bar and following.offset < window.offset + window.size:
                raise UsageError(f"{name}: windows at {window.offset:#x} and {following.offset:#x} of BAR "
                                 f"{window.bar} overlap")
        for window in self._windows:
            self._check(window, fds)

    def _check(self, window: Window, fds: Mapping[str, int]) -> None:
        if window.kind == WindowKind.BYTES:
            return
        if window.fd not in fds:
            raise UsageError(f"{self._name}: window names descriptor {window.fd!r}, which was not deposited")
        if window.kind == WindowKind.MEMORY and (window.offset | window.size | window.fd_offset) % PAGE:
            raise UsageError(f"{self._name}: memory window at {window.offset:#x} is not made of whole pages")
        if window.kind == WindowKind.DOORBELL:
            eventfd.prepare(fds[window.fd])
        self._fds[window] = fds[window.fd]

    def of_kind(self, kind: WindowKind) -> list[Window]:
        """Return the windows of one kind, by BAR and offset."""
        return [window for window in self._windows if window.kind == kind]

    def add_bars(self, config: ConfigSpace) -> None:
        """Declare the BARs: as large as their last window needs, wide where two registers are free."""
        used = {window.bar for window in self._windows}
        for bar in sorted(used):
            size = max(PAGE, *(window.offset + window.size for window in self._windows if window.bar == bar))
            wide = bar + 1 < 6 and bar + 1 not in used
            memory = any(window.kind == WindowKind.MEMORY for window in self._windows if window.bar == bar)
            if config.has_register(bar) or (not wide and size > 1 << 31):
                raise UsageError(f"{self._name}: BAR {bar} of {size:#x} bytes has no registers of its own")
            config.add_bar(bar, 1 << (size - 1).bit_length(), wide=wide, prefetch=memory and wide)

    def placed(self, bar: int, gpa: int | None) -> None:
        """Register memory and doorbells of `bar` at `gpa`, None for nowhere."""
        for window in [window for window in self._live if window.bar == bar]:
            self._leave(window)
        if gpa is None:
            return
        for window in self._windows:
            if window.bar == bar and window.kind in (WindowKind.MEMORY, WindowKind.DOORBELL):
                self._enter(window, gpa + window.offset)

    def close(self) -> None:
        """Register nothing any more."""
        for window in list(self._live):
            self._leave(window)

    def read(self, bar: int, offset: int, size: int) -> int:
        """Answer a load; where no window is, and past the end of one, zero."""
        window = self._at(bar, offset)
        if window is None:
            return 0
        at = offset - window.offset
        size = min(size, window.size - at)
        data = b""
        if window.kind == WindowKind.BYTES:
            data = window.data[at : at + size]
        elif window.kind == WindowKind.FILE:
            try:
                data = os.pread(self._fds[window], size, window.fd_offset + at)
            except OSError:
                return all_ones(size)
        return int.from_bytes(data, "little")

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Take a store; read-only windows and bytes ignore it."""
        window = self._at(bar, offset)
        if window is None:
            return
        at = offset - window.offset
        if window.kind == WindowKind.DOORBELL:
            if at == 0:
                eventfd.signal(self._fds[window])
        elif window.kind == WindowKind.FILE and not window.readonly:
            data = value.to_bytes(size, "little")[: window.size - at]
            with suppress(OSError):  # the device is the worker's: it knows
                os.pwrite(self._fds[window], data, window.fd_offset + at)

    def _at(self, bar: int, offset: int) -> Window | None:
        for window in self._windows:
            if window.bar == bar and window.offset <= offset < window.offset + window.size:
                return window
        return None

    def _enter(self, window: Window, gpa: int) -> None:
        fd = self._fds[window]
        try:
            if window.kind == WindowKind.DOORBELL:
                self._ports.doorbells.assign(fd, gpa)
            else:
                self._ports.memory.map(gpa, window.size, fd, window.fd_offset, window.readonly)
        except CellvisorError as error:
            log.get("pci").warning("%s: window at %#x: %s", self._name, gpa, error)
        else:
            self._live[window] = gpa

    def _leave(self, window: Window) -> None:
        gpa = self._live.pop(window)
        try:
            if window.kind == WindowKind.DOORBELL:
                self._ports.doorbells.deassign(self._fds[window], gpa)
            else:
                self._ports.memory.unmap(gpa, window.size)
        except CellvisorError as error:
            log.get("pci").warning("%s: window at %#x: %s", self._name, gpa, error)
