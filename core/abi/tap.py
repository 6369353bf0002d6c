"""Tap devices and how an interface is set up (linux/if_tun.h, sockios.h, rtnetlink.h; netdevice(7), rtnetlink(7))."""

from __future__ import annotations

from struct import Struct

from cellvisor.core._native import _native

_lib = _native.lib

TUNSETIFF: int = _lib.TUNSETIFF
TUNGETIFF: int = _lib.TUNGETIFF
TUNSETOFFLOAD: int = _lib.TUNSETOFFLOAD
TUNSETVNETHDRSZ: int = _lib.TUNSETVNETHDRSZ
TUNSETQUEUE: int = _lib.TUNSETQUEUE
TUNSETCARRIER: int = _lib.TUNSETCARRIER
IFF_ATTACH_QUEUE: int = _lib.IFF_ATTACH_QUEUE
IFF_DETACH_QUEUE: int = _lib.IFF_DETACH_QUEUE
IFF_TAP: int = _lib.IFF_TAP
IFF_NO_PI: int = _lib.IFF_NO_PI
IFF_VNET_HDR: int = _lib.IFF_VNET_HDR
IFF_MULTI_QUEUE: int = _lib.IFF_MULTI_QUEUE
TUN_F_CSUM: int = _lib.TUN_F_CSUM
TUN_F_TSO4: int = _lib.TUN_F_TSO4
TUN_F_TSO6: int = _lib.TUN_F_TSO6
TUN_F_TSO_ECN: int = _lib.TUN_F_TSO_ECN
TUN_F_UFO: int = _lib.TUN_F_UFO
IFF_UP: int = _lib.IFF_UP
SIOCGIFFLAGS: int = _lib.SIOCGIFFLAGS
SIOCSIFFLAGS: int = _lib.SIOCSIFFLAGS
SIOCGIFMTU: int = _lib.SIOCGIFMTU
SIOCSIFMTU: int = _lib.SIOCSIFMTU
SIOCSIFADDR: int = _lib.SIOCSIFADDR
SIOCSIFNETMASK: int = _lib.SIOCSIFNETMASK
SIOCSIFHWADDR: int = _lib.SIOCSIFHWADDR
RTM_GETLINK: int = _lib.RTM_GETLINK
RTM_NEWLINK: int = _lib.RTM_NEWLINK
NLM_F_REQUEST: int = _lib.NLM_F_REQUEST
NLA_TYPE_MASK: int = _lib.NLA_TYPE_MASK
IFLA_CARRIER: int = _lib.IFLA_CARRIER
IFLA_LINKINFO: int = _lib.IFLA_LINKINFO
IFLA_INFO_KIND: int = _lib.IFLA_INFO_KIND
IFLA_INFO_DATA: int = _lib.IFLA_INFO_DATA
IFLA_TUN_OWNER: int = _lib.IFLA_TUN_OWNER
IFLA_TUN_GROUP: int = _lib.IFLA_TUN_GROUP
IFLA_TUN_TYPE: int = _lib.IFLA_TUN_TYPE
IFLA_TUN_MULTI_QUEUE: int = _lib.IFLA_TUN_MULTI_QUEUE

NLMSGHDR = Struct("=IHHII")  # length, type, flags, number, port
IFINFOMSG = Struct("=BxHiII")  # family, type, index, flags, change
RTATTR = Struct("=HH")  # length with this, type
IFREQ_FLAGS = Struct("=16sH22x")  # struct ifreq: the name, then a union of 24 bytes
IFREQ_INT = Struct("=16si20x")
IFREQ_ADDRESS = Struct("=16sH14s8x")  # struct sockaddr: family and data
IN6_IFREQ = Struct("=16sIi")  # address, prefix length, interface index
MAX_NAME = 15
ETHERNET = 1  # ARPHRD_ETHER, the family of a hardware address
