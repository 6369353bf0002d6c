"""The serial port's way to the host: UART registers, the ring that C fills, and a byte channel.

vCPU threads write registers under the board lock; the channel lives on core's main thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cellvisor.core._native import _native
from cellvisor.core.board.serial16550 import Serial16550
from cellvisor.core.mem import layout
from cellvisor.core.wire.bytechannel import ByteChannel, ReactorLoop, Target
from cellvisor.core.wire.reactor import Reactor

lib, ffi = _native.lib, _native.ffi
INPUT_CHUNK = 4096


class SerialLine:
    """COM1. `board` is the struct cv_board; `irq` drives its line."""

    def __init__(self, reactor: Reactor, lock: threading.RLock, board: Any, irq: Callable[[bool], None],
                 post: Callable[[Callable[[], None]], None], where: Target, given: Mapping[str, int],
                 keep: Callable[[str, int], None]) -> None:
        self._lock = lock
        self._board = board
        self._scratch = ffi.new("uint8_t[]", lib.CV_TX_RING)
        self._pending = b""
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        board.serial_port, board.serial_wake_fd = layout.PORT_COM1, self._wake_fd
        self._reactor = reactor
        reactor.add(self._wake_fd, self._drain)
        self.channel = ByteChannel(ReactorLoop(reactor), where, given=given, keep=keep,
                                   on_input=self._input, on_output=self._flush)
        self.uart = Serial16550(self.channel.write, irq, fast=board, take_tx=self._take_tx,
                                wake=lambda: os.eventfd_write(self._wake_fd, 1),
                                on_room=lambda: post(self._feed))

    def _take_tx(self) -> bytes:
        count = lib.cv_board_take_tx(self._board, self._scratch, lib.CV_TX_RING)
        return bytes(ffi.buffer(self._scratch, count))

    def _drain(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            self.uart.flush()

    def _input(self) -> None:
        """The host has bytes: read no more than one chunk ahead of the guest."""
        if not self._pending:
            self._pending = self.channel.read(INPUT_CHUNK)
        self._feed()

    def _feed(self) -> None:
        with self._lock:
            taken = self.uart.feed(self._pending)
        self._pending = self._pending[taken:]
        self.channel.want_input(not self._pending)

    def reset(self) -> None:
        """Put the registers back to power-on; under the lock."""
        self.uart.reset()

    def close(self) -> None:
        """Write out what waits, then close the channel."""
        self._flush()
        self.channel.close(unlink=True)
        self._board.serial_wake_fd = -1
        self._reactor.remove(self._wake_fd)
        os.close(self._wake_fd)
