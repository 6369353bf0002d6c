"""MSI-X: capability, table, PBA, and which eventfd interrupts the guest (PCI 3.0, 6.8.2).

    vector    off ---- enabled, unmasked, address is a LAPIC's ----> live
               ^                                                      |
               +------- disabled, masked, function masked ------------+

A live vector has a GSI route and its eventfds are irqfds. Off: the irqfds are gone, what is signalled stays
in the eventfds, the PBA shows it, and going live delivers it (KVM_IRQFD polls the eventfd).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cellvisor.core import log
from cellvisor.core.abi import pci
from cellvisor.core.errors import CellvisorError
from cellvisor.core.pci import eventfd
from cellvisor.core.pci.config import ConfigSpace
from cellvisor.core.pci.ports import MsiPort

_LAPIC_LOW, _LAPIC_MASK = 0xFEE0_0000, 0xFFF0_0000
_ENTRY_MASK = (0xFFFF_FFFC | 0xFFFF_FFFF << 32 | 0xFFFF_FFFF << 64 | pci.MSIX_ENTRY_MASKED << 96)
_CONTROL_MASK = pci.MSIX_FLAGS_ENABLE | pci.MSIX_FLAGS_MASKALL


class Msix:
    """The MSI-X capability of one function and the eventfds bound to its vectors."""

    def __init__(self, vectors: int, port: MsiPort, config: ConfigSpace, *, bar: int, table: int, pba: int,
                 name: str) -> None:
        """Add the capability: table and PBA lie in `bar` at these offsets (multiples of 8)."""
        self.vectors = vectors
        self._port, self._config, self._name = port, config, name
        body = (vectors - 1).to_bytes(2, "little") + (table | bar).to_bytes(4, "little")
        body += (pba | bar).to_bytes(4, "little")
        self._control = config.add_capability(pci.CAP_MSIX, body, _CONTROL_MASK.to_bytes(2, "little"))
        self.changed: Callable[[], None] | None = None  # called after a write to the control register
        config.on_write(self._control + pci.MSIX_FLAGS, 2, self._written)
        self._table = bytearray()
        self._bound: dict[int, int] = {}  # eventfd -> vector
        self._assigned: dict[int, int] = {}  # eventfd -> gsi, while it is an irqfd
        self._gsis: dict[int, int] = {}  # vector -> gsi
        self._routes: dict[int, tuple[int, int]] = {}  # vector -> (address, data) as KVM has it
        self._clear()

    @property
    def enabled(self) -> bool:
        """Whether the guest uses MSI-X rather than INTx."""
        return bool(self._flags & pci.MSIX_FLAGS_ENABLE)

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return len(self._table)

    def bind(self, fd: int, vector: int | None) -> None:
        """Have `fd` raise `vector` from now on; None for no vector."""
        if self._bound.get(fd) == vector:
            return
        self._off(fd)
        if vector is None:
            self._bound.pop(fd, None)
        else:
            self._bound[fd] = vector
            self._sync(vector)

    def refresh(self) -> None:
        """Bring every vector into the state that the registers ask for."""
        for vector in range(self.vectors):
            self._sync(vector)

    def reset(self) -> None:
        """Unbind everything, give the GSIs back, mask every entry; the control bits are the config's."""
        for fd in list(self._bound):
            self._off(fd)
        self._bound.clear()
        for gsi in self._gsis.values():
            self._try("free", partial(self._port.free, gsi))
        self._gsis.clear()
        self._routes.clear()
        self._clear()

    # --- the guest ------------------------------------------------------------------------------------

    def read_table(self, offset: int, size: int) -> int:
        """Read table bytes; beyond the table is 0."""
        return int.from_bytes(self._table[offset : offset + size], "little")

    def write_table(self, offset: int, size: int, value: int) -> None:
        """Write table bytes; beyond the table nothing happens."""
        data = value.to_bytes(size, "little")[: max(0, len(self._table) - offset)]
        if not data:
            return
        self._table[offset : offset + len(data)] = data
        entry = pci.MSIX_ENTRY_SIZE
        for vector in range(offset // entry, (offset + len(data) - 1) // entry + 1):
            first = vector * entry
            legal = int.from_bytes(self._table[first : first + entry], "little") & _ENTRY_MASK
            self._table[first : first + entry] = legal.to_bytes(entry, "little")
            self._sync(vector)

    def read_pba(self, offset: int, size: int) -> int:
        """Read bytes of the Pending Bit Array."""
        bits = 0
        for fd, vector in self._bound.items():
            asked = 8 * offset <= vector < 8 * (offset + size)
            if asked and fd not in self._assigned and eventfd.pending(fd):
                bits |= 1 << vector
        return bits >> 8 * offset

    # --- below ----------------------------------------------------------------------------------------

    @property
    def _flags(self) -> int:
        return self._config.peek(self._control + pci.MSIX_FLAGS, 2)

    def _written(self) -> None:
        self.refresh()
        if self.changed is not None:
            self.changed()

    def _clear(self) -> None:
        masked = pci.MSIX_ENTRY_MASKED.to_bytes(4, "little").rjust(pci.MSIX_ENTRY_SIZE, b"\0")
        self._table[:] = masked * self.vectors

    def _message(self, vector: int) -> tuple[int, int] | None:
        """Return (address, data) if the vector may interrupt. KVM refuses some that are no LAPIC's address."""
        if self._flags & _CONTROL_MASK != pci.MSIX_FLAGS_ENABLE:
            return None
        first = vector * pci.MSIX_ENTRY_SIZE
        entry = int.from_bytes(self._table[first : first + pci.MSIX_ENTRY_SIZE], "little")
        address, data, control = entry & (1 << 64) - 1, entry >> 64 & 0xFFFF_FFFF, entry >> 96
        if control & pci.MSIX_ENTRY_MASKED or address & _LAPIC_MASK != _LAPIC_LOW or address >> 32 & 0xFF:
            return None
        return address, data

    def _sync(self, vector: int) -> None:
        fds = [fd for fd, bound in self._bound.items() if bound == vector]
        message = self._message(vector)
        if message is None or not fds or not self._route(vector, message):
            for fd in fds:
                self._off(fd)
            return
        gsi = self._gsis[vector]
        for fd in fds:
            if fd not in self._assigned and self._try("irqfd", partial(self._port.assign, fd, gsi)):
                self._assigned[fd] = gsi

    def _route(self, vector: int, message: tuple[int, int]) -> bool:
        def route() -> None:
            if vector not in self._gsis:
                self._gsis[vector] = self._port.allocate()
            self._port.update(self._gsis[vector], *message)

        if self._routes.get(vector) != message:
            if not self._try("route", route):
                return False
            self._routes[vector] = message
        return True

    def _off(self, fd: int) -> None:
        gsi = self._assigned.pop(fd, None)
        if gsi is not None:
            # What KVM delivered may still be in the count (always before Linux 5.11, and what it found while
            # assigning) and would look pending. A signal between these two lines comes twice at most.
            eventfd.take(fd)
            self._try("irqfd", partial(self._port.deassign, fd, gsi))

    def _try(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except CellvisorError as error:
            log.get("pci").warning("%s: %s: %s", self._name, what, error)
            return False
        return True
