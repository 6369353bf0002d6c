"""virtio-console (virtio 1.2, 5.3), one port: the guest's hvc0 on a terminal, pty, file or socket.

Bytes that leave are noted in the request's progress, so that the next incarnation goes on after them; in a file
they are counted instead, from where the request began. Input is taken only while the driver has a buffer for it.
Terminals, ptys and sockets live in core's store.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar

from cellvisor.core.abi.virtio import CONSOLE_CONFIG, CONSOLE_F_SIZE, ID_CONSOLE
from cellvisor.core.errors import RingError, UsageError
from cellvisor.core.wire.bytechannel import MODES, ByteChannel, Target, target
from cellvisor.core.wire.bytepath import check_file, check_socket
from cellvisor.devices.device import Chain, DeviceBase, DeviceOptions, Host, Queue, Spec, option

RX, TX = 0, 1
MAX_INPUT = 4096
ORIGIN = struct.Struct("=Qq")  # private state: the counter of a request and the file's size when it began
STORED = ("pty", "listener", "client", "tty", "tty-in")


class Console(DeviceBase):
    """One port, always open."""

    verb: ClassVar[str] = "console"
    help: ClassVar[str] = "console port, hvc0 in the guest"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options(DeviceOptions):
        mode: str = option("tty", help="where the console is; file and socket by their own keys",
                           choices=MODES, bare=True)
        file: str | None = option(None, help="write output to this file", path=True)
        socket: str | None = option(None, help="serve one client at a time on this Unix socket", path=True)

    def __init__(self, options: Any, host: Host) -> None:
        super().__init__(options, host)
        self._sending: deque[Chain] = deque()
        self._room: deque[Chain] = deque()
        self._begun: Chain | None = None
        self._origin = (-1, 0)
        self._paused = False
        self._counts = {"read_bytes": 0, "write_bytes": 0}
        stored = {name: fd for name in STORED if (fd := host.take(name)) is not None}
        where = target(options.mode, options.file, options.socket, "console")
        if host.trial:
            where = _tried(where)
        self._columns, self._rows = _terminal_size(stored.get("tty"))
        self._channel = ByteChannel(host, where, given=stored, keep=host.deposit, append=host.generation > 1,
                                    on_input=self._input, on_output=lambda: host.kick(TX))
        self._channel.want_input(False)
        for name in set(stored) - _used(where.mode):
            os.close(stored[name])

    @property
    def spec(self) -> Spec:
        return Spec(virtio_id=ID_CONSOLE, pci_class=0x078000, queues=(256, 256), features=CONSOLE_F_SIZE,
                    config=self._config(), title="virtio-console", counters=tuple(self._counts),
                    private_size=ORIGIN.size)

    def _config(self) -> bytes:
        return CONSOLE_CONFIG.pack(self._columns, self._rows, 0, 0)

    def on_activate(self, features: int) -> None:
        _, saved = self.host.load()
        if len(saved) == ORIGIN.size:
            self._origin = ORIGIN.unpack(saved)

    def on_queue(self, index: int, queue: Queue) -> None:
        if index == RX:
            for chain in queue.harvest():
                if not chain.writable_size:
                    raise RingError("an input buffer that cannot be written to")
                self._room.append(chain)
            self._channel.want_input(bool(self._room))
            return
        self._sending += queue.harvest()
        while self._sending and self._send(queue, self._sending[0]):
            queue.complete(self._sending.popleft())

    def _send(self, queue: Queue, chain: Chain) -> bool:
        """Write what is left of `chain`; False if the channel is full."""
        if chain is not self._begun:
            self._begin(queue, chain)
        while chain.resume < chain.readable_size:
            data = chain.read(min(MAX_INPUT, chain.readable_size - chain.resume), chain.resume)
            before = chain.resume
            done = self._channel.write(data, lambda fd, part: queue.write(chain, fd, part))
            if chain.resume != before + done:  # nobody is there who could take them
                chain.resume = before + done
                queue.progress(chain, chain.resume)
            self._counts["write_bytes"] += done
            if done < len(data):
                return False
        return True

    def _begin(self, queue: Queue, chain: Chain) -> None:
        queue.begin(chain)
        self._begun = chain
        size = self._channel.size()
        if size is None:
            return
        counter, start = self._origin
        if counter == chain.counter and start <= size:  # a predecessor began it: the file knows how far it came
            chain.resume = min(size - start, chain.readable_size)
        else:
            self._origin = chain.counter, size - chain.resume
            self.host.save(ORIGIN.pack(*self._origin))

    def _input(self) -> None:
        queue = self.host.queue(RX)
        if queue is None or self._paused or not self._room:
            self._channel.want_input(False)
            return
        data = self._channel.read(min(MAX_INPUT, self._room[0].writable_size))
        if data:
            chain = self._room.popleft()
            queue.complete(chain, chain.write(data))
            queue.publish()
            self._counts["read_bytes"] += len(data)
            self._channel.want_input(bool(self._room))

    def on_pause(self) -> None:
        self._paused = True
        self._channel.want_input(False)

    def on_resume(self) -> None:
        self._paused = False
        self._channel.want_input(bool(self._room))

    def on_reset(self) -> None:
        self._sending.clear()
        self._room.clear()
        self._paused = False
        self._channel.want_input(False)

    def call(self, verb: str, args: dict[str, Any]) -> Any:
        """resize {columns, rows}: tell the driver; where {}: the path of the pty, file or socket; deaf {}: take no
        input any more."""
        if verb == "where":
            return {"mode": self._channel.mode, "path": self._channel.path}
        if verb == "deaf":
            return self._channel.deaf()
        if verb != "resize":
            return super().call(verb, args)
        columns, rows = args.get("columns"), args.get("rows")
        if not all(type(size) is int and 0 < size < 1 << 16 for size in (columns, rows)):
            raise UsageError(f"resize: {columns!r} columns and {rows!r} rows are no size")
        self._columns, self._rows = int(str(columns)), int(str(rows))
        self.host.set_config(self._config())
        return None

    @staticmethod
    def drain(index: int, chain: Chain) -> int | None:
        return None if index == RX else 0

    def counters(self) -> dict[str, int]:
        return dict(self._counts)

    def close(self) -> None:
        self._channel.close(unlink=True)


def _tried(where: Target) -> Target:
    """Refuse a place that cannot be had; returns one that leaves no mark."""
    if where.mode == "file":
        check_file(where.path)
    elif where.mode == "socket":
        check_socket(where.path)
    return Target("null")


def _used(mode: str) -> set[str]:
    return {"pty": {"pty"}, "socket": {"listener", "client"}, "tty": {"tty", "tty-in"}}.get(mode, set())


def _terminal_size(fd: int | None) -> tuple[int, int]:
    try:
        size = os.get_terminal_size(-1 if fd is None else fd)
    except OSError:
        return 80, 25
    return size.columns or 80, size.lines or 25
