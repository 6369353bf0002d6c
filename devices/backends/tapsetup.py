"""Set a host interface up by ioctl (netdevice(7)): addresses, MTU, MAC, up."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator

from cellvisor.core.abi import tap as abi
from cellvisor.core.errors import UsageError

_NOBODY = b"/"  # no interface can have this name
Address = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def parse_address(ip: str, mask: str) -> Address:
    """Return both together. Raises UsageError naming the one that is wrong."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        raise UsageError(f"ip={ip[:60]} is not an IP address") from None
    if address.is_multicast:
        raise UsageError(f"ip={ip} is the address of a group, not of a host")
    try:
        if isinstance(address, ipaddress.IPv4Address):
            return ipaddress.IPv4Interface((address, _prefix(int(ipaddress.IPv4Address(mask)), 32)))
        return ipaddress.IPv6Interface((address, _prefix(int(ipaddress.IPv6Address(mask)), 128)))
    except ValueError:
        raise UsageError(f"mask={mask[:60]} is not a mask for ip={ip}",
                         hint="mask=255.255.255.0, or mask=ffff:ffff:ffff:ffff:: for IPv6") from None


def _prefix(mask: int, bits: int) -> int:
    rest = mask ^ ((1 << bits) - 1)
    if rest & (rest + 1):
        raise ValueError("has holes")
    return bits - rest.bit_length()


def set_up(name: str, address: Address | None = None, mtu: int | None = None, mac: bytes | None = None, *,
           trial: bool = False) -> None:
    """Configure interface `name` and bring it up. Raises UsageError naming the key that the host refused.

    An interface that is as it should be needs no privilege. `trial`: only refuse who has none and would need it.
    """
    label = name.encode()
    change = _may if trial else _do
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        if mac is not None:
            change(control, f"host_mac={mac.hex(':')}", abi.SIOCSIFHWADDR,
                   abi.IFREQ_ADDRESS.pack(label, abi.ETHERNET, mac),
                   f"sudo ip link set {name} address {mac.hex(':')}, and leave host_mac= out")
        if mtu is not None and _get(control, abi.SIOCGIFMTU, label, abi.IFREQ_INT) != mtu:
            change(control, f"mtu={mtu}", abi.SIOCSIFMTU, abi.IFREQ_INT.pack(label, mtu),
                   f"sudo ip link set {name} mtu {mtu}")
        if isinstance(address, ipaddress.IPv4Interface):
            for key, value, request in (("ip", address.ip, abi.SIOCSIFADDR),
                                        ("mask", address.netmask, abi.SIOCSIFNETMASK)):
                raw = abi.IFREQ_ADDRESS.pack(label, socket.AF_INET, b"\0\0" + value.packed)
                change(control, f"{key}={value}", request, raw, _for_address(name, address))
        flags = _get(control, abi.SIOCGIFFLAGS, label, abi.IFREQ_FLAGS)
        if not flags & abi.IFF_UP:
            change(control, f"tap={name}: it is down", abi.SIOCSIFFLAGS,
                   abi.IFREQ_FLAGS.pack(label, flags | abi.IFF_UP),
                   f"sudo ip link set {name} up")
    if isinstance(address, ipaddress.IPv6Interface):
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
            raw = abi.IN6_IFREQ.pack(address.ip.packed, address.network.prefixlen, socket.if_nametoindex(name))
            change(control, f"ip={address.ip}", abi.SIOCSIFADDR, raw, _for_address(name, address))


def _get(control: socket.socket, request: int, label: bytes, layout: struct.Struct) -> int:
    raw = _do(control, f"tap={label.decode()}", request, layout.pack(label, 0))
    return int(layout.unpack(raw)[1])


def _for_address(name: str, address: Address) -> str:
    return f"sudo ip addr add {address} dev {name}, and leave ip= and mask= out"


def check_privilege() -> None:
    """Raise the PermissionError of who may not make interfaces or set them up. Nothing is done."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, abi.SIOCSIFFLAGS, abi.IFREQ_FLAGS.pack(_NOBODY, 0))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise


def _may(control: socket.socket, given: str, request: int, raw: bytes, by_root: str = "") -> None:
    with _refusing(given, by_root):
        check_privilege()


def _do(control: socket.socket, given: str, request: int, raw: bytes, by_root: str = "") -> bytes:
    with _refusing(given, by_root):
        return fcntl.ioctl(control, request, raw)


@contextlib.contextmanager
def _refusing(given: str, by_root: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPERM:
            raise UsageError(f"{given}: changing that needs CAP_NET_ADMIN", hint=by_root) from None
        raise UsageError(f"{given}: the host refuses it: {error.strerror}") from None
