"""How a virtio function interrupts: MSI-X vectors, or INTx with the ISR (virtio 1.2, 4.1.4.5, 4.1.5.1).

MSI-X on: the call eventfds are irqfds, this code is not involved. MSI-X off: core's main loop watches them
while the device is live; a call sets ISR bit 0, the line is high while ISR is not 0, reading ISR lowers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from cellvisor.core.abi import pci, virtio
from cellvisor.core.pci import eventfd
from cellvisor.core.pci.config import ConfigSpace
from cellvisor.core.pci.msix import Msix
from cellvisor.core.pci.ports import Ports


class Interrupts:
    """The interrupts of one virtio function: one per queue and one for configuration changes."""

    def __init__(self, ports: Ports, config: ConfigSpace, msix: Msix, call_fds: Sequence[int],
                 config_fd: int) -> None:
        self._ports, self._config, self._msix = ports, config, msix
        self._calls = [eventfd.prepare(fd) for fd in call_fds]
        self._config_fd = eventfd.prepare(config_fd)
        self._config_vector = virtio.NO_VECTOR
        self._isr = 0
        self._live = False
        self._watched: set[int] = set()
        self._slot: int | None = None
        self._level = False
        config.on_write(pci.COMMAND, 2, self.update)

    def attached(self, slot: int) -> None:
        """INTA# belongs to `slot` from now on."""
        self._slot = slot

    def start(self) -> None:
        """The device is live."""
        self._live = True
        self.update()

    def stop(self) -> None:
        """The device is being reset: no vectors, no line."""
        self._live = False
        self._isr = 0
        self._config_vector = virtio.NO_VECTOR
        for fd in (*self._calls, self._config_fd):
            self._msix.bind(fd, None)
        self.update()

    def drain(self) -> None:
        """Drop what was signalled before the reset ended."""
        for fd in (*self._calls, self._config_fd):
            eventfd.take(fd)

    def set_queue_vector(self, index: int, vector: int) -> None:
        """Bind a queue's call eventfd; NO_VECTOR for none."""
        self._msix.bind(self._calls[index], None if vector == virtio.NO_VECTOR else vector)

    def set_config_vector(self, vector: int) -> None:
        """Bind the config eventfd; NO_VECTOR for none."""
        self._config_vector = vector
        self._msix.bind(self._config_fd, None if vector == virtio.NO_VECTOR else vector)

    def config_changed(self) -> None:
        """Tell the driver to read device_status and device config."""
        if not self._live:
            return
        if not self._msix.enabled:
            self._isr |= virtio.ISR_CONFIG
            self.update()
        elif self._config_vector != virtio.NO_VECTOR:
            eventfd.signal(self._config_fd)

    def read_isr(self) -> int:
        """Read and clear the ISR register."""
        value, self._isr = self._isr, 0
        self.update()
        return value

    def update(self) -> None:
        """Bring line and watching into the state that the registers ask for."""
        intx = not self._msix.enabled
        watched = {*self._calls, self._config_fd} if intx and self._live else set()
        for fd in self._watched - watched:
            self._ports.calls.unwatch_call(fd)
        fresh, self._watched = watched - self._watched, watched
        for fd in fresh:
            self._ports.calls.watch_call(fd, partial(self._called, fd))
        self._config.set_interrupt_status(bool(self._isr) and intx)
        level = bool(self._isr) and intx and not self._config.command & pci.COMMAND_INTX_DISABLE
        if level != self._level and self._slot is not None:
            self._level = level
            self._ports.lines.drive(self._slot, level)

    def _called(self, fd: int) -> None:
        if fd in self._watched and eventfd.take(fd):
            self._isr |= virtio.ISR_CONFIG if fd == self._config_fd else virtio.ISR_QUEUE
            self.update()
