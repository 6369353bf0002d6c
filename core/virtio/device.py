"""A virtio PCI function, whole, built from the Spec that a worker sent (virtio 1.2, 4.1).

Registers are core's; queues are served by the owner's worker through the eventfds. Nothing here waits: the
owner is told, and a reset ends when reset_done comes. State machine: core/virtio/common.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cellvisor.core import log
from cellvisor.core.abi import virtio
from cellvisor.core.errors import CellvisorError, UsageError
from cellvisor.core.pci import eventfd
from cellvisor.core.pci.config import ConfigSpace
from cellvisor.core.pci.msix import Msix
from cellvisor.core.pci.ports import Owner, Ports
from cellvisor.core.pci.windows import Windows
from cellvisor.core.virtio import transport
from cellvisor.core.virtio.common import CommonConfig
from cellvisor.core.virtio.interrupts import Interrupts
from cellvisor.core.wire.spec import Spec, Window, WindowKind


class VirtioPciDevice:
    """A bars.PciFunction with the modern virtio transport. Callers hold the board lock."""

    def __init__(self, name: str, spec: Spec, ports: Ports, owner: Owner, *, kick_fds: Sequence[int],
                 call_fds: Sequence[int], config_fd: int,
                 window_fds: Mapping[str, int] | None = None) -> None:
        """Build the function. One kick and one call eventfd per queue; all become non-blocking and stay the
        caller's, as do `window_fds` (descriptor of each name in spec.windows). Raises UsageError naming what
        is wrong in the Spec."""
        self.name = name
        self.owner = owner
        queues = len(spec.queues)
        if len(kick_fds) != queues or len(call_fds) != queues:
            raise UsageError(f"{name}: {len(kick_fds)} kick and {len(call_fds)} call eventfds "
                             f"for {queues} queues")
        self._ports = ports
        self._kicks = [eventfd.prepare(fd) for fd in kick_fds]
        self._device_config = bytearray(spec.config)
        self._windows = Windows(name, spec.windows, window_fds or {}, ports)
        self._fixups = [window for window in spec.windows if window.config_fixup >= 0]
        shared = self._windows.of_kind(WindowKind.MEMORY)
        self._check(spec, shared)
        device_id = virtio.PCI_DEVICE_BASE + spec.virtio_id
        self.config = ConfigSpace(
            vendor=virtio.PCI_VENDOR, device=device_id, pci_class=spec.pci_class, revision=1,
            subsystem_vendor=virtio.PCI_VENDOR, subsystem=spec.subsystem or device_id, pin=1)
        self.config.add_bar(transport.BAR, transport.BAR_SIZE)
        self._windows.add_bars(self.config)
        self._msix = Msix(queues + 1, ports.msi, self.config, bar=transport.BAR, table=transport.MSIX_TABLE,
                          pba=transport.MSIX_PBA, name=name)
        transport.add_capabilities(self.config, queues, len(spec.config), shared)
        transport.PciCfgWindow(self.config, self)
        self._interrupts = Interrupts(ports, self.config, self._msix, call_fds, config_fd)
        self._msix.changed = self._interrupts.update
        self._common = CommonConfig(name, spec.features, spec.queues, self._msix.vectors, self)
        self._base: int | None = None  # where BAR 0 is
        self._doorbells: dict[int, int] = {}  # eventfd -> gpa, as registered

    def _check(self, spec: Spec, shared: Sequence[Window]) -> None:
        if not 0 < spec.virtio_id <= 0x3F:
            raise UsageError(f"{self.name}: virtio id {spec.virtio_id} is outside 1..63")
        if len(shared) > transport.MOST_SHARED:
            raise UsageError(f"{self.name}: {len(shared)} memory windows, at most {transport.MOST_SHARED}")
        for window in spec.windows:
            if window.bar != transport.WINDOW_BAR:
                raise UsageError(f"{self.name}: window in BAR {window.bar}; only BAR 2 is for windows")
        for window in self._fixups:
            if window.config_fixup + 8 > len(spec.config):
                raise UsageError(f"{self.name}: fix-up at {window.config_fixup} is outside the config bytes")

    # --- the owner --------------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """device_status as the guest reads it."""
        return self._common.status

    @property
    def epoch(self) -> int:
        """Which activation this is; rises with every DRIVER_OK and machine reset."""
        return self._common.epoch

    @property
    def live(self) -> bool:
        """From DRIVER_OK until the driver resets the device."""
        return self._common.live

    @property
    def resetting(self) -> bool:
        """Whether reset_done is being waited for."""
        return self._common.resetting

    @property
    def features(self) -> int:
        """What the driver accepted."""
        return self._common.accepted

    def queues(self) -> list[dict[str, int]]:
        """Return {index, size, desc, avail, used} of each enabled queue."""
        return self._common.enabled_queues()

    def reset_done(self, epoch: int) -> bool:
        """The owner has let go of the queues of `epoch`: device_status reads 0. False if it came too late."""
        if not self._common.reset_done(epoch):
            return False
        self._interrupts.drain()
        return True

    def request_reset(self) -> bool:
        """Reset as if the driver had written 0. True if reset_done is now being waited for."""
        self._common.begin_reset()
        return self._common.resetting

    def needs_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET and raise the config interrupt (2.1.2)."""
        self._common.set_needs_reset()
        self._interrupts.config_changed()

    def set_config(self, data: bytes) -> None:
        """Publish device config bytes, raise the config interrupt. Raises UsageError if the length differs."""
        if len(data) != len(self._device_config):
            raise UsageError(f"{self.name}: {len(data)} config bytes, not {len(self._device_config)}")
        self._device_config[:] = data
        self._fix_config()
        self._common.generation += 1
        self._interrupts.config_changed()

    # --- the bus and the machine ----------------------------------------------------------------------

    def attached(self, slot: int) -> None:
        """The function is in `slot`, its BARs have addresses."""
        self._interrupts.attached(slot)
        self._fix_config()

    def detached(self) -> None:
        """The function left its slot."""
        self.remove()

    def remove(self) -> None:
        """Hold no line, irqfd, doorbell or mapping any more; the owner is not told."""
        self._common.power_on()
        self._interrupts.stop()
        self._msix.reset()
        self._sync_doorbells()
        self._windows.close()

    def machine_reset(self) -> None:
        """Return to power-on; call it through PciRoot.machine_reset. The owner is not told, and a reset_done
        that is still to come is void."""
        self._common.power_on()
        self._interrupts.stop()
        self._msix.reset()
        self._interrupts.drain()
        self._sync_doorbells()
        self.config.reset()

    def bar_placed(self, bar: int, gpa: int | None) -> None:
        """Follow the guest."""
        if bar == transport.BAR:
            self._base = gpa
            self._sync_doorbells()
            return
        self._windows.placed(bar, gpa)
        if gpa is not None:
            self._fix_config()

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Answer a load."""
        if bar != transport.BAR:
            return self._windows.read(bar, offset, size)
        if offset < transport.ISR:
            return self._common.read(offset, size)
        if offset < transport.DEVICE:
            return self._interrupts.read_isr() if offset == transport.ISR else 0
        if offset < transport.NOTIFY:
            at = offset - transport.DEVICE
            return int.from_bytes(self._device_config[at : at + size], "little")
        if transport.MSIX_TABLE <= offset < transport.MSIX_PBA:
            return self._msix.read_table(offset - transport.MSIX_TABLE, size)
        if offset >= transport.MSIX_PBA:
            return self._msix.read_pba(offset - transport.MSIX_PBA, size)
        return 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Take a store."""
        if bar != transport.BAR:
            self._windows.write(bar, offset, size, value)
        elif offset < transport.ISR:
            self._common.write(offset, size, value)
        elif transport.DEVICE <= offset < transport.NOTIFY:
            at = offset - transport.DEVICE
            data = value.to_bytes(size, "little")[: max(0, len(self._device_config) - at)]
            if data and not self._common.resetting:
                self.owner.config_write(at, data)
        elif transport.NOTIFY <= offset < transport.MSIX_TABLE:
            self._notify(offset - transport.NOTIFY)
        elif transport.MSIX_TABLE <= offset < transport.MSIX_PBA:
            self._msix.write_table(offset - transport.MSIX_TABLE, size, value)

    # --- common.Listener --------------------------------------------------------------------------------

    def went_live(self) -> None:
        """DRIVER_OK: doorbells first, so that what is kicked from now on is in the eventfds."""
        self._sync_doorbells()
        self._interrupts.start()
        self.owner.activate(self._common.epoch, self.queues(), self._common.accepted)

    def reset_begins(self, live: bool) -> None:
        """0 was written to device_status."""
        self._sync_doorbells()
        self._interrupts.stop()
        if live:
            self.owner.reset(self._common.epoch)

    def config_vector_set(self, vector: int) -> None:
        """Route the config interrupt."""
        self._interrupts.set_config_vector(vector)

    def queue_vector_set(self, index: int, vector: int) -> None:
        """Route a queue's interrupt."""
        self._interrupts.set_queue_vector(index, vector)

    # --- below ------------------------------------------------------------------------------------------

    def _notify(self, at: int) -> None:
        """A notify that no ioeventfd took: early, through PCI-cfg, or where KVM refused one."""
        index, odd = divmod(at, transport.NOTIFY_EACH)
        queues = self._common.queues
        if not odd and index < len(queues) and queues[index].enabled and not self._common.resetting:
            eventfd.signal(self._kicks[index])

    def _sync_doorbells(self) -> None:
        wanted: dict[int, int] = {}
        if self._base is not None and self._common.live:
            wanted = {self._kicks[index]: self._base + transport.NOTIFY + transport.NOTIFY_EACH * index
                      for index, queue in enumerate(self._common.queues) if queue.enabled}
        doorbells = self._ports.doorbells
        for fd, gpa in list(self._doorbells.items()):
            if wanted.get(fd) != gpa:
                del self._doorbells[fd]
                self._try(doorbells.deassign, fd, gpa)
        for fd, gpa in wanted.items():
            if fd not in self._doorbells and self._try(doorbells.assign, fd, gpa):
                self._doorbells[fd] = gpa

    def _try(self, call: Callable[[int, int], None], fd: int, gpa: int) -> bool:
        try:
            call(fd, gpa)
        except CellvisorError as error:
            log.get("pci").warning("%s: doorbell at %#x: %s", self.name, gpa, error)
            return False
        return True

    def _fix_config(self) -> None:
        for window in self._fixups:
            address = self.config.bar_address(window.bar) + window.offset
            at = window.config_fixup
            self._device_config[at : at + 8] = address.to_bytes(8, "little")
