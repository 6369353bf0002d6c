"""The verb `logs`: a VM's log in pieces, for who cannot open the file, however long it is."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING, Any

from cellvisor.core.errors import NotFound
from cellvisor.core.wire import places

if TYPE_CHECKING:
    from cellvisor.controlplane.supervisor import Supervisor

PIECE = 64 << 10  # bytes of an answer
TAIL = 1 << 20    # bytes from the end among which the last lines are looked for


def path_of(vm: Supervisor) -> str:
    """Return where the log of `vm` is."""
    return vm.flags.log_file or vm.rundir.file(places.LOG)


async def serve(vm: Supervisor, args: dict[str, Any]) -> dict[str, Any]:
    """Answer `logs` {since, lines}: whole lines from a place in the file on, and where the next ones begin.

    A disk may be slow, so another thread reads. Raises NotFound.
    """
    return await asyncio.to_thread(read, path_of(vm), args["since"], args["lines"])


def read(path: str, since: int, lines: int | None) -> dict[str, Any]:
    """Return {"text", "rest", "next"}: `rest` is a line that is not complete. See serve()."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}", hint="that VM keeps no log") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise NotFound(f"{path}: not a file", hint="whoever reads it has the log")
        if since > status.st_size:
            since = 0  # it began anew
        elif lines is not None:
            since = _last(fd, status.st_size, lines)
        data = os.pread(fd, PIECE, since)
    finally:
        os.close(fd)
    end = data.rfind(b"\n") + 1
    if not end and len(data) == PIECE:
        end = PIECE  # no line is as long: pass it on in parts
    return {"text": data[:end].decode(errors="replace"), "rest": data[end:].decode(errors="replace"),
            "next": since + end}


def _last(fd: int, size: int, lines: int) -> int:
    """Return where the last `lines` whole lines begin, TAIL bytes before the end at most."""
    first = max(0, size - TAIL)
    data = os.pread(fd, size - first, first)
    at = data.rfind(b"\n") + 1
    for _ in range(lines):
        if not at:
            return first
        at = data.rfind(b"\n", 0, at - 1) + 1
    return first + at
