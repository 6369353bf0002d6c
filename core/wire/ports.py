"""Which of a VM's consoles somebody can be at, told by its VmConfig: a pty or a socket each; and how to be there."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping
from typing import Any

from cellvisor.core.errors import NotFound

PLAIN = {"__console": "console", "__serial": "serial"}  # what people call them

Place = tuple[str, str]  # "pty" or "socket", its path


def attachable(config: Mapping[str, Any]) -> dict[str, Place]:
    """Return device -> place of every console that can be attached to."""
    ports = [("__console", config.get("console") or {}), ("__serial", config.get("serial") or {})]
    ports += [(str(entry.get("id")), entry) for entry in config.get("virtio", ()) if entry.get("mode")]
    found = {}
    for key, port in ports:
        mode = str(port.get("mode", "")).lower()
        path = port.get("file") if mode == "pty" else port.get("socket") if mode == "socket" else None
        if path:
            found[key] = (mode, str(path))
    return found


def choose(config: Mapping[str, Any], wanted: str | None, vm: str) -> tuple[str, Place]:
    """Return the device that is meant, the first if none is named, and its place. Raises NotFound."""
    found = attachable(config)
    key = next((key for key, plain in PLAIN.items() if plain == wanted), wanted)
    if key is None:
        key = next(iter(found), "console")
    if key not in found:
        known = f"there are: {', '.join(PLAIN.get(one, one) for one in found)}" if found else \
            "start the VM with --console pty, --serial pty or socket=PATH"
        raise NotFound(f"{vm}: {PLAIN.get(key, key)} is neither a pty nor a socket", hint=known)
    return key, found[key]


def take(place: Place, *, blocking: bool = True) -> int:
    """Open a console as the one who is at it: two readers of a pty would get half of the bytes each.

    Raises OSError: BlockingIOError if somebody else is there, which of a socket only who does not block is told.
    """
    kind, path = place
    if kind == "socket":
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(blocking)
            sock.connect(path)
            return sock.detach()
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | (0 if blocking else os.O_NONBLOCK))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd
