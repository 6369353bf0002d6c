"""Set a host interface up by ioctl (netdevice(7)): addresses, MTU, MAC, up."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import socket
import struct

from cellvisor.core.abi import tap as abi
from cellvisor.core.errors import UsageError

Address = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def parse_address(ip: str, mask: str) -> Address:
    """Return both together. Raises UsageError naming the one that is wrong."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        raise UsageError(f"ip={ip[:60]} is not an IP address") from None
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


def set_up(name: str, address: Address | None = None, mtu: int | None = None, mac: bytes | None = None) -> None:
    """Configure interface `name` and bring it up. Raises UsageError naming the key that the host refused.

    An interface that is as it should be needs no privilege.
    """
    label = name.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        if mac is not None:
            _do(control, f"host_mac={mac.hex(':')}", abi.SIOCSIFHWADDR,
                abi.IFREQ_ADDRESS.pack(label, abi.ETHERNET, mac),
                f"sudo ip link set {name} address {mac.hex(':')}, and leave host_mac= out")
        if mtu is not None and _get(control, abi.SIOCGIFMTU, label, abi.IFREQ_INT) != mtu:
            _do(control, f"mtu={mtu}", abi.SIOCSIFMTU, abi.IFREQ_INT.pack(label, mtu),
                f"sudo ip link set {name} mtu {mtu}")
        if isinstance(address, ipaddress.IPv4Interface):
            for key, value, request in (("ip", address.ip, abi.SIOCSIFADDR),
                                        ("mask", address.netmask, abi.SIOCSIFNETMASK)):
                raw = abi.IFREQ_ADDRESS.pack(label, socket.AF_INET, b"\0\0" + value.packed)
                _do(control, f"{key}={value}", request, raw, _for_address(name, address))
        flags = _get(control, abi.SIOCGIFFLAGS, label, abi.IFREQ_FLAGS)
        if not flags & abi.IFF_UP:
            _do(control, f"tap={name}: it is down", abi.SIOCSIFFLAGS, abi.IFREQ_FLAGS.pack(label, flags | abi.IFF_UP),
                f"sudo ip link set {name} up")
    if isinstance(address, ipaddress.IPv6Interface):
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
            raw = abi.IN6_IFREQ.pack(address.ip.packed, address.network.prefixlen, socket.if_nametoindex(name))
            _do(control, f"ip={address.ip}", abi.SIOCSIFADDR, raw, _for_address(name, address))


def _get(control: socket.socket, request: int, label: bytes, layout: struct.Struct) -> int:
    raw = _do(control, f"tap={label.decode()}", request, layout.pack(label, 0))
    return int(layout.unpack(raw)[1])


def _for_address(name: str, address: Address) -> str:
    return f"sudo ip addr add {address} dev {name}, and leave ip= and mask= out"


def _do(control: socket.socket, given: str, request: int, raw: bytes, by_root: str = "") -> bytes:
    try:
        return fcntl.ioctl(control, request, raw)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise UsageError(f"{given}: changing that needs CAP_NET_ADMIN", hint=by_root) from None
        raise UsageError(f"{given}: the host refuses it: {error.strerror}") from None
