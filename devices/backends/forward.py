"""`forward=`: ports of the host that passt hands to the guest, written tcp:2222:22 or udp:0.0.0.0:53:5353."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from cellvisor.core.errors import UsageError

LOOPBACK = "127.0.0.1"  # who wants others to reach the guest says so
_FLAGS = (("tcp", "-t"), ("udp", "-u"))


def arguments(texts: Iterable[str]) -> list[str]:
    """Return passt's arguments for these ports. Raises UsageError naming the one that is wrong."""
    found = []
    for text in texts:
        found += _parse(text)
    if found and "-u" not in found:
        found += ["-u", "none"]  # or each TCP port brings its UDP port along
    return found


def blame(error: UsageError, texts: Sequence[str]) -> UsageError:
    """Return the refusal of a port by its key and value if `error`, of passt, is about one; else `error`."""
    for text in texts:
        if f"'{' '.join(_parse(text))}'" in str(error):
            return UsageError(f"forward={text}: passt cannot listen there",
                              hint="another process may do so; a port below 1024 takes root")
    return error


def _parse(text: str) -> list[str]:
    protocol, *address, here, there = text.split(":") if text.count(":") in (2, 3) else ("", "", "")
    flag = dict(_FLAGS).get(protocol)
    try:
        where = ipaddress.IPv4Address(*address or [LOOPBACK])
        ports = [int(port) for port in (here, there) if port.isascii() and port.isdecimal()]
    except ValueError:
        flag, ports = None, []
    if flag is None or len(ports) != 2 or not all(0 < port < 65536 for port in ports):
        raise UsageError(f"forward={text[:60]} is not PROTOCOL:PORT:GUESTPORT",
                         hint="tcp:2222:22, or with an address of the host: udp:0.0.0.0:53:53")
    return [flag, f"{where}/{ports[0]}:{ports[1]}"]
