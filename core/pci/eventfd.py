"""Eventfds that must never block: signal, look, take (eventfd(2))."""

from __future__ import annotations

import os
import select
from contextlib import suppress


def prepare(fd: int) -> int:
    """Make `fd` non-blocking: neither a full counter nor an empty one may stop a vCPU thread."""
    os.set_blocking(fd, False)
    return fd


def signal(fd: int) -> None:
    """Add one; a counter at its limit is signalled already."""
    with suppress(BlockingIOError):
        os.eventfd_write(fd, 1)


def pending(fd: int) -> bool:
    """Say whether the count is not 0, without taking it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def take(fd: int) -> int:
    """Return the count and set it to 0."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
