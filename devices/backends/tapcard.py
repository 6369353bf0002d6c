"""What a network card is made of on the host: its taps, opened or from the store, its address, its cable."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cellvisor.core.abi import net, tap
from cellvisor.core.errors import UsageError
from cellvisor.devices.backends.passt import is_wanted, open_passt
from cellvisor.devices.backends.tap import Tap, is_gone, look, open_queues, parse_mac

if TYPE_CHECKING:
    from cellvisor.devices.backends.tapsetup import Address

CSUM = net.F_CSUM | net.F_GUEST_CSUM
TSO = (net.F_HOST_TSO4 | net.F_HOST_TSO6 | net.F_HOST_ECN | net.F_GUEST_TSO4 | net.F_GUEST_TSO6 | net.F_GUEST_ECN)
UFO = net.F_HOST_UFO | net.F_GUEST_UFO
LARGE = net.F_GUEST_TSO4 | net.F_GUEST_TSO6 | net.F_GUEST_UFO
CONTROL = (net.F_CTRL_VQ | net.F_CTRL_RX | net.F_CTRL_RX_EXTRA | net.F_CTRL_VLAN | net.F_CTRL_MAC_ADDR
           | net.F_GUEST_ANNOUNCE)
NEW_TAP = {"ip": "192.168.249.1", "mask": "255.255.255.0"}  # Cloud Hypervisor's defaults
_CARD = struct.Struct("<6sB")  # address, link down

# What a driver takes -> what the tap may give it then
_OFFLOADS = ((net.F_GUEST_CSUM, tap.TUN_F_CSUM), (net.F_GUEST_TSO4, tap.TUN_F_TSO4),
             (net.F_GUEST_TSO6, tap.TUN_F_TSO6), (net.F_GUEST_ECN, tap.TUN_F_TSO_ECN),
             (net.F_GUEST_UFO, tap.TUN_F_UFO))


def offloads(features: int) -> int:
    """Return which unfinished frames (TUN_F_*) a driver with these features takes."""
    return sum(flag for feature, flag in _OFFLOADS if features & feature)


class Card:
    """What outlives processes and drivers: `mac`, the user's or a random one, and whether the link `is_down`.

    `options` and `host` are the device's. Raises UsageError for options that contradict themselves.
    """

    def __init__(self, options: Any, host: Any) -> None:
        check(options)
        wanted = parse_mac("mac", options.mac) if options.mac is not None else None
        stored = host.take("card")
        self._fd = os.memfd_create("card", os.MFD_CLOEXEC) if stored is None else stored
        if stored is None:
            os.pwrite(self._fd, _CARD.pack(wanted or b"\x2e" + os.urandom(5), 0), 0)  # locally administered
            host.deposit("card", self._fd)
        self.mac, down = _CARD.unpack(os.pread(self._fd, _CARD.size, 0))
        self.is_down = bool(down)

    def plug(self, up: bool) -> None:
        """Put the cable in, or pull it out."""
        self.is_down = not up
        os.pwrite(self._fd, _CARD.pack(self.mac, self.is_down), 0)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


def offered(options: Any, taps: list[Tap]) -> int:
    """Return the features of a card on these taps."""
    features = net.F_MAC | net.F_MTU | net.F_STATUS | net.F_MRG_RXBUF | CONTROL
    if len(taps) > 1:
        features |= net.F_MQ
    if options.offload_csum and taps[0].offloads:  # the others rest on it (5.1.3.1)
        features |= CSUM | (TSO if options.offload_tso else 0) | (UFO if options.offload_ufo else 0)
    return features


def open_taps(options: Any, host: Any) -> list[Tap]:
    """Return the queues of a card's tap. Raises UsageError or Conflict naming key and value; nothing is left then."""
    if is_wanted(options):
        return [open_passt(options, host)]
    count = options.num_queues // 2
    what, name = (f"fd={options.fd}", "fd") if options.fd else (f"tap={options.tap or 'vmtap'}", "tap")
    stored = [fd for index in range(count) if (fd := host.take(f"{name}{index}")) is not None]
    if host.trial:
        return _try_taps(options, count, what, stored)
    taps: list[Tap] = []
    try:
        # A tap that somebody deleted may have been made again by now.
        if len(stored) == count and (options.fd or not is_gone(stored[0])):
            while stored:
                taps.append(Tap(stored[0], what))
                del stored[0]
            _check_together(what, taps)
            return taps
        while stored:
            os.close(stored.pop())
        if options.fd:
            raise _none_came(what)
        from cellvisor.devices.backends import tapsetup  # not for who inherits a tap

        settings = _to_set(options)
        taps = open_queues(options.tap or None, count, _given(options))
        tapsetup.set_up(taps[0].name, *settings)
        for index, queue in enumerate(taps):
            host.deposit(f"{name}{index}", queue.fd)
        return taps
    except BaseException:
        for fd in [*stored, *(queue.fd for queue in taps)]:
            os.close(fd)
        raise


def _given(options: Any) -> str:
    """Return the key and value that ask for the tap."""
    keys = [key for key in ("tap", "ip", "host_mac") if getattr(options, key) is not None]
    return f"{keys[0]}={getattr(options, keys[0])}"


def _try_taps(options: Any, count: int, what: str, given: list[int]) -> list[Any]:
    """Refuse what open_taps() would; returns stand-ins."""
    from cellvisor.devices.backends import taptrial

    if options.fd:
        found = [taptrial.Untried(*look(fd, what)) for fd in given]
        if len(found) < count:
            raise _none_came(what)
        _check_together(what, found)
        return found
    taptrial.check(options.tap or None, count, _given(options), *_to_set(options))
    return taptrial.stand_ins(what, count)


def _none_came(what: str) -> UsageError:
    return UsageError(f"{what}: no such descriptor came with it",
                      hint="they are numbers of the process that starts the VM, or come with the request")


def _check_together(what: str, taps: Sequence[Any]) -> None:
    """Raise UsageError for queues that are not of one card."""
    if len({queue.name for queue in taps}) > 1:
        raise UsageError(f"{what}: of different interfaces: {', '.join(queue.name for queue in taps)}",
                         hint="open one interface several times, with IFF_MULTI_QUEUE")
    if len(taps) > 1 and not all(queue.takes_several for queue in taps):
        raise UsageError(f"{what}: {taps[0].name} has a single queue", hint="open it with IFF_MULTI_QUEUE")


def _to_set(options: Any) -> tuple[Address | None, int | None, bytes | None]:
    """Return the host's address on the tap, its MTU and its MAC. Raises UsageError."""
    from cellvisor.devices.backends.tapsetup import parse_address

    return (None if options.ip is None else parse_address(options.ip, options.mask), options.mtu,
            None if options.host_mac is None else parse_mac("host_mac", options.host_mac))


def filled(options: Any) -> Any:
    """Return `options` with each key that was left empty (`mac=`) as if it were missing; `tap=` asks for a new tap.

    A new tap that was asked for so gets Cloud Hypervisor's address if it gets no other.
    """
    empty: dict[str, str | None] = {}
    empty |= {key: None for key in ("mac", "host_mac", "ip", "mask") if getattr(options, key) == ""}
    if options.tap == "" and not (options.ip or options.mask or options.fd):
        empty |= NEW_TAP
    return replace(options, **empty)


def check(options: Any) -> None:
    """Refuse what contradicts itself. Raises UsageError."""
    if (options.ip is None) != (options.mask is None):
        key, other = ("ip", "mask") if options.mask is None else ("mask", "ip")
        raise UsageError(f"{key}={getattr(options, key)[:60]} without {other}", hint="give both or none")
    if options.num_queues % 2:
        raise UsageError(f"num_queues={options.num_queues} is odd", hint="each pair has a queue in and a queue out")
    for key in ("mac", "host_mac"):
        if getattr(options, key) is not None:
            parse_mac(key, getattr(options, key))
    if options.forward and not is_wanted(options):
        raise UsageError(f"forward={options.forward[0][:60]} is for passt alone",
                         hint="leave tap, ip, mask, host_mac and fd out")
    if options.tap and ("/" in options.tap or not options.tap.isprintable()):
        raise UsageError(f"tap={options.tap!r} cannot name an interface")
    if options.fd is not None:
        if 2 * len(options.fd) != options.num_queues or len(set(options.fd)) != len(options.fd):
            raise UsageError(f"fd={options.fd}: {len(set(options.fd))} different descriptors for "
                             f"num_queues={options.num_queues}", hint="one for each pair of queues")
        for key in ("tap", "ip", "host_mac"):
            if getattr(options, key):
                raise UsageError(f"{key}={getattr(options, key)[:60]} does not go with fd",
                                 hint="whoever made the descriptor sets the interface up")
