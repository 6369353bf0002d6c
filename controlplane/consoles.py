"""The consoles' ties to the outside: the user's terminal for `tty`, and which pty was made for `pty`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence

from cellvisor.controlplane.corelink import CoreLink
from cellvisor.controlplane.inventory import Device
from cellvisor.controlplane.terminal import Terminal
from cellvisor.core.errors import CellvisorError
from cellvisor.core.wire.messages import CoreVerb

SERIAL = "__serial"  # its name in core's store


class Consoles:
    """The console devices and the serial port of one VM."""

    def __init__(self, core: CoreLink, terminal: Terminal, devices: Sequence[Device], serial_mode: str) -> None:
        self._core, self._terminal = core, terminal
        modes = {SERIAL: serial_mode, **{device.id: device.mode for device in devices}}
        self._tty = [name for name, mode in modes.items() if mode == "tty"]
        self._pty = [name for name, mode in modes.items() if mode == "pty"]
        self._tasks: set[asyncio.Task[None]] = set()

    def give_terminal(self) -> None:
        """Put our stdout and stdin into core's store, from where core and console workers take them."""
        for name in self._tty:
            for role, fd in (("tty", 1), ("tty-in", 0)):
                with contextlib.suppress(OSError):  # closed by who started us
                    os.fstat(fd)
                    self._core.deposit(name, role, fd)

    async def give_up_input(self) -> None:
        """The terminal is in somebody else's hands: what is typed there is not the guest's, whoever serves it."""
        for name in self._tty:
            with contextlib.suppress(OSError, CellvisorError), open(os.devnull) as nothing:
                self._core.deposit(name, "tty-in", nothing.fileno())
                await self._core.request(CoreVerb.CALL, device=name, verb="deaf", args={})

    def make_raw(self) -> None:
        """Pass every key on to the guest, if it has the terminal."""
        if self._tty:
            self._terminal.make_raw()

    async def ptys(self, serial: str) -> dict[str, str]:
        """Return the path of each pty, the serial port's being `serial`."""
        found = {}
        for name in self._pty:
            found[name] = serial if name == SERIAL else await self._where(name)
        return found

    async def _where(self, device: str) -> str:
        answer = await self._core.request(CoreVerb.CALL, device=device, verb="where", args={})
        result = answer.get("result")
        return str(result.get("path", "")) if isinstance(result, dict) else ""

    def resized(self) -> None:
        """The user's terminal has another size: tell the consoles that are on it."""
        size = self._terminal.size()
        for name in self._tty:
            if size is not None and name != SERIAL:
                task = asyncio.get_running_loop().create_task(self._resize(name, *size))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _resize(self, device: str, columns: int, rows: int) -> None:
        with contextlib.suppress(CellvisorError):
            await self._core.request(CoreVerb.CALL, device=device, verb="resize",
                                     args={"columns": columns, "rows": rows})
