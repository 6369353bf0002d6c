"""The PCI root: segment 0, bus 0, 32 slots with function 0 only; CF8/CFC, ECAM and MMIO dispatch.

C answers most config reads from the shadow; what comes here is writes, reads of `ask` dwords and odd
accesses. Nothing raises for what a guest does (PCI 3.0, 3.2.2.3.2; PCIe 7.2.2).
"""

from __future__ import annotations

from cellvisor.core.abi import pci
from cellvisor.core.errors import Conflict, NotFound, UsageError
from cellvisor.core.mem import layout
from cellvisor.core.pci.bars import BarMap, PciFunction
from cellvisor.core.pci.config import ConfigSpace, all_ones
from cellvisor.core.pci.ports import ConfigShadow

BRIDGE_SLOT = 0
_SLOT_SHIFT, _FUNCTION_SHIFT = 15, 12  # of an ECAM offset


class HostBridge:
    """00:00.0: an id and a class, nothing else."""

    name = "host bridge"

    def __init__(self) -> None:
        self.config = ConfigSpace(vendor=pci.HOST_BRIDGE_VENDOR, device=pci.HOST_BRIDGE_DEVICE,
                                  pci_class=pci.HOST_BRIDGE_CLASS)

    def attached(self, slot: int) -> None:
        """Nothing depends on the slot."""

    def detached(self) -> None:
        """Never."""

    def machine_reset(self) -> None:
        """Return to power-on."""
        self.config.reset()

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """There is no BAR."""
        return all_ones(size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """There is no BAR."""

    def bar_placed(self, bar: int, gpa: int | None) -> None:
        """There is no BAR."""


class PciRoot:
    """The bus and its functions. Callers hold the board lock."""

    def __init__(self, shadow: ConfigShadow, *, window64: tuple[int, int] | None = None,
                 window32: tuple[int, int] = (layout.MMIO32, layout.MMIO32_END - layout.MMIO32),
                 ecam: int = layout.ECAM) -> None:
        """Windows are (base, size) in bytes; `ecam` is the gpa of bus 0's 1 MiB."""
        self._shadow = shadow
        self._ecam = ecam
        self._bars = BarMap([window32] if window64 is None else [window32, window64])
        self._functions: dict[int, PciFunction] = {}
        self.attach(BRIDGE_SLOT, HostBridge())

    # --- slots ----------------------------------------------------------------------------------------

    @property
    def functions(self) -> dict[int, PciFunction]:
        """Slot -> function, the host bridge included."""
        return dict(self._functions)

    def free_slot(self) -> int:
        """Return the lowest free slot. Raises Conflict when there is none."""
        for slot in range(pci.SLOTS):
            if slot not in self._functions:
                return slot
        raise Conflict(f"all {pci.SLOTS} PCI slots are taken", hint="remove a device first")

    def attach(self, slot: int, function: PciFunction, *, decode: bool = True) -> None:
        """Put `function` into `slot`, its BARs assigned as firmware would and decoding if `decode`.

        Raises UsageError for a slot outside 0..31, Conflict for one that is taken or when a BAR has no room.
        """
        if not 0 <= slot < pci.SLOTS:
            raise UsageError(f"{function.name}: PCI slot {slot} is outside 0..{pci.SLOTS - 1}")
        if slot in self._functions:
            raise Conflict(f"{function.name}: PCI slot {slot} is taken by {self._functions[slot].name}")
        config = function.config
        self._bars.assign(function)
        if decode and config.bars:
            config.command = pci.COMMAND_MEMORY
        config.remember()
        config.bind(self._shadow, slot)
        config.layout_changed = self._bars.refresh
        self._functions[slot] = function
        function.attached(slot)
        self._bars.add(function)
        self._shadow.present(slot, True)

    def detach(self, slot: int) -> PciFunction:
        """Take the function out of `slot` and return it. Raises NotFound."""
        if slot == BRIDGE_SLOT or slot not in self._functions:
            raise NotFound(f"PCI slot {slot} holds no device")
        self._shadow.present(slot, False)
        function = self._functions.pop(slot)
        function.config.layout_changed = None
        function.config.bind(None)
        self._bars.remove(function)
        function.detached()
        return function

    def machine_reset(self) -> None:
        """First half of a machine reset, while the old VM is still there: every function returns to power-on
        and unregisters all it had with that VM."""
        self._bars.clear()
        for function in self._functions.values():
            function.config.layout_changed = None
            function.machine_reset()
        self._shadow.config_address = 0

    def power_on(self, shadow: ConfigShadow | None = None) -> None:
        """Second half, with the new VM behind the ports: place the BARs and fill the shadow (or another one,
        from now on)."""
        self._shadow = shadow or self._shadow
        for function in self._functions.values():
            function.config.layout_changed = self._bars.refresh
        self._bars.clear()
        self._bars.refresh()
        for slot in range(pci.SLOTS):
            if slot in self._functions:
                self._functions[slot].config.bind(self._shadow, slot)
            self._shadow.present(slot, slot in self._functions)

    # --- configuration space --------------------------------------------------------------------------

    def config_read(self, bus: int, slot: int, function: int, register: int, size: int) -> int:
        """Answer a config read of 1..8 bytes; nobody there is all ones."""
        found = self._functions.get(slot) if bus == 0 and function == 0 else None
        return all_ones(size) if found is None else found.config.read(register, size)

    def config_write(self, bus: int, slot: int, function: int, register: int, size: int, value: int) -> None:
        """Take a config write of 1..8 bytes."""
        found = self._functions.get(slot) if bus == 0 and function == 0 else None
        if found is not None:
            found.config.write(register, size, value)

    def io_read(self, port: int, size: int) -> int:
        """Answer IN from 0xCF8..0xCFF."""
        at = port - pci.CONFIG_ADDRESS_PORT
        if at >= 0 and at + size <= 4:
            return self._shadow.config_address >> 8 * at & all_ones(size)
        target = self._data_target(port, size)
        return all_ones(size) if target is None else self.config_read(*target, size)

    def io_write(self, port: int, size: int, value: int) -> None:
        """Take OUT to 0xCF8..0xCFF. The address takes dwords only: on PCs, 0xCF9 is another register."""
        if port == pci.CONFIG_ADDRESS_PORT and size == 4:
            self._shadow.config_address = value & 0xFFFF_FFFF
            return
        target = self._data_target(port, size)
        if target is not None:
            self.config_write(*target, size, value)

    def _data_target(self, port: int, size: int) -> tuple[int, int, int, int] | None:
        address = self._shadow.config_address
        at = port - pci.CONFIG_DATA_PORT
        # Bits 30:24 reach extended registers on some AMD machines; a guest that tries finds none.
        if not address & pci.CONFIG_ENABLE or address & 0x7F00_0000 or at < 0 or at + size > 4:
            return None
        return address >> 16 & 0xFF, address >> 11 & 0x1F, address >> 8 & 7, (address & 0xFC) + at

    # --- memory ---------------------------------------------------------------------------------------

    def mmio_read(self, gpa: int, size: int) -> int | None:
        """Answer a load of 1..8 bytes from ECAM or a BAR; None if `gpa` is neither."""
        found = self._bars.find(gpa)
        if found is not None:
            region, offset = found
            if offset + size > region.bar.size:
                return all_ones(size)
            return region.function.bar_read(region.bar.index, offset, size) & all_ones(size)
        if self._ecam <= gpa < self._ecam + layout.ECAM_SIZE:
            return self.config_read(*self._ecam_target(gpa), size)
        return None

    def mmio_write(self, gpa: int, size: int, value: int) -> bool:
        """Take a store of 1..8 bytes to ECAM or a BAR; False if `gpa` is neither."""
        found = self._bars.find(gpa)
        if found is not None:
            region, offset = found
            if offset + size <= region.bar.size:
                region.function.bar_write(region.bar.index, offset, size, value & all_ones(size))
            return True
        if self._ecam <= gpa < self._ecam + layout.ECAM_SIZE:
            self.config_write(*self._ecam_target(gpa), size, value)
            return True
        return False

    def _ecam_target(self, gpa: int) -> tuple[int, int, int, int]:
        offset = gpa - self._ecam
        return 0, offset >> _SLOT_SHIFT & 31, offset >> _FUNCTION_SHIFT & 7, offset & (pci.CONFIG_SIZE - 1)
