"""Eventfds that must never block: signal, look, take (eventfd(2)).

O_NONBLOCK belongs to the open file, which core shares with a worker: the worker can clear it, and fill the counter.
So nothing here relies on it.
"""

from __future__ import annotations

import errno
import os
import select
from contextlib import suppress

from cellvisor.core._native import _native


def prepare(fd: int) -> int:
    """Make `fd` non-blocking, for whoever else reads and writes it."""
    os.set_blocking(fd, False)
    return fd


def signal(fd: int) -> None:
    """Add one; a counter at its limit is signalled already. What is no eventfd is left alone."""
    if _native.lib.cv_eventfd_signal(fd) == -errno.ENOSYS:  # a kernel without AIO
        os.set_blocking(fd, False)
        with suppress(OSError):  # full
            os.eventfd_write(fd, 1)


def pending(fd: int) -> bool:
    """Say whether the count is not 0, without taking it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def take(fd: int) -> int:
    """Return the count and set it to 0."""
    count = bytearray(8)
    try:
        os.preadv(fd, [count], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    return int.from_bytes(count, "little")
