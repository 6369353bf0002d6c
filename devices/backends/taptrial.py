"""Whether a tap could be had, without a queue of it: its other end would see one come and go.

What attaching would be refused for is known from what the kernel shows of the interface (rtnetlink(7)).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cellvisor.core.abi import tap as abi
from cellvisor.devices.backends import tapsetup
from cellvisor.devices.backends.tap import PATTERN, exists, open_device, refusal


@dataclass(frozen=True, slots=True)
class Untried:
    """Stands for a queue of a tap that is not opened."""

    name: str
    takes_several: bool
    offloads: bool = True
    mtu: int = 1500
    fd: int = -1

    def use(self, wanted: bool) -> None:
        pass

    def close(self) -> None:
        pass


def check(name: str | None, count: int, given: str, address: tapsetup.Address | None, mtu: int | None,
          mac: bytes | None) -> None:
    """Refuse what opening `count` queues of tap `name` and setting it up would be refused for.

    Raises UsageError or Conflict, with `given` as the key and value to blame. A single-queue tap that is down looks
    free if who uses it cannot be seen from here.
    """
    os.close(open_device(given))
    there = name is not None and exists(name)
    try:
        if name is None or not there:
            tapsetup.check_privilege()
        else:
            _check_attach(name, count > 1)
    except OSError as error:
        raise refusal(error, given, name or PATTERN, there, count > 1) from None
    if name is not None and there:
        tapsetup.set_up(name, address, mtu, mac, trial=True)


def _check_attach(name: str, multi: bool) -> None:
    """Raise the OSError of who would attach to this interface."""
    shown = dict(_attributes(_ask(name)))
    about = dict(_attributes(shown.get(abi.IFLA_LINKINFO, b"")))
    tun = dict(_attributes(about.get(abi.IFLA_INFO_DATA, b"")))
    several = tun.get(abi.IFLA_TUN_MULTI_QUEUE) == b"\1"
    if (about.get(abi.IFLA_INFO_KIND) != b"tun\0" or tun.get(abi.IFLA_TUN_TYPE) != bytes([abi.IFF_TAP])
            or (multi and not several)):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    mine = {abi.IFLA_TUN_OWNER: (os.geteuid(),), abi.IFLA_TUN_GROUP: (os.getegid(), *os.getgroups())}
    if any(key in tun and struct.unpack("=I", tun[key])[0] not in ids for key, ids in mine.items()):
        tapsetup.check_privilege()
    if not several and (shown.get(abi.IFLA_CARRIER) == b"\1" or _is_held(name)):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _ask(name: str) -> bytes:
    """Return the attributes of an interface. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        about = abi.IFINFOMSG.pack(socket.AF_UNSPEC, 0, socket.if_nametoindex(name), 0, 0)
        head = abi.NLMSGHDR.pack(abi.NLMSGHDR.size + len(about), abi.RTM_GETLINK, abi.NLM_F_REQUEST, 1, 0)
        kernel.send(head + about)
        answer = kernel.recv(1 << 16)
    if abi.NLMSGHDR.unpack_from(answer)[1] != abi.RTM_NEWLINK:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    return answer[abi.NLMSGHDR.size + abi.IFINFOMSG.size:]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= abi.RTATTR.size:
        size, kind = abi.RTATTR.unpack_from(data)
        yield kind & abi.NLA_TYPE_MASK, data[abi.RTATTR.size:size]
        data = data[max(abi.RTATTR.size, size + 3 & ~3):]


def _is_held(name: str) -> bool:
    """Say that a process of this network namespace has a queue of this interface open: fdinfo tells."""
    here = os.readlink("/proc/self/ns/net")
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/net") == here:
                for entry in os.listdir(f"/proc/{pid}/fdinfo"):
                    with suppress(OSError), open(f"/proc/{pid}/fdinfo/{entry}") as info:
                        if f"iff:\t{name}\n" in info.read():
                            return True
    return False


def stand_ins(name: str, count: int) -> list[Any]:
    """Return what stands for the queues that would be opened."""
    return [Untried(name, takes_several=True)] * count
