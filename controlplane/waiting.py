"""Waiting for descriptors in asyncio: one that gets readable, a process that ends."""

from __future__ import annotations

import asyncio
import os


async def wait_readable(fd: int) -> None:
    """Wait until `fd` is readable, at end of file too."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, settle, readable)
    try:
        await readable
    finally:
        loop.remove_reader(fd)


async def wait_pidfd(pidfd: int) -> None:
    """Wait until the process of `pidfd` ended; nothing to wait for if it is -1.

    Others may wait for it too, and whoever owns `pidfd` may close it meanwhile. Raises OSError without descriptors.
    """
    if pidfd >= 0:
        ours = os.dup(pidfd)
        try:
            await wait_readable(ours)
        finally:
            os.close(ours)


def settle(future: asyncio.Future[None]) -> None:
    """Resolve `future` unless it is done."""
    if not future.done():
        future.set_result(None)
