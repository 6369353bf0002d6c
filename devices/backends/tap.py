"""One queue of a tap interface: opened or taken over, frames with a vnet header read and written without blocking.

Knows nothing of guests or rings. Addresses and MTU are set by tapsetup.py, which is loaded only for them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

from cellvisor.core.abi import tap as abi
from cellvisor.core.errors import Conflict, UsageError

DEVICE = "/dev/net/tun"
PATTERN = "vmtap%d"  # the kernel fills in the number
HEADER_SIZE = 12
_MOST = 4096  # more than a tap's queue holds: a flood must not keep us
MAX_VIEWS = os.sysconf("SC_IOV_MAX")


class Tap:
    """An open queue; owns `fd`. Every failure of I/O is an OSError."""

    offloads: ClassVar[bool] = True  # it takes unfinished frames
    repeats: ClassVar[bool] = False  # a frame whose process dies goes again, maybe twice then; else it may be lost

    def __init__(self, fd: int, given: str) -> None:
        """Take over `fd`. Raises UsageError, with `given` as the key and value to blame, if it is no tap's."""
        self.fd = fd
        with _no_tap(given):
            self.name, self.takes_several = look(fd, given)
            fcntl.ioctl(fd, abi.TUNSETVNETHDRSZ, HEADER_SIZE.to_bytes(4, "little"))
            os.set_blocking(fd, False)

    @property
    def mtu(self) -> int:
        """Return the interface's MTU, 1500 where it cannot be seen (another network namespace)."""
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                raw = fcntl.ioctl(control, abi.SIOCGIFMTU, abi.IFREQ_INT.pack(self.name.encode(), 0))
            return int(abi.IFREQ_INT.unpack(raw)[1])
        except OSError:
            return 1500

    def offload(self, flags: int) -> None:
        """Say which unfinished frames may come (TUN_F_*)."""
        fcntl.ioctl(self.fd, abi.TUNSETOFFLOAD, flags)

    def use(self, wanted: bool) -> None:
        """Have the interface spread frames over this queue too, or leave it out. For one of several queues."""
        flags = abi.IFF_ATTACH_QUEUE if wanted else abi.IFF_DETACH_QUEUE
        try:
            fcntl.ioctl(self.fd, abi.TUNSETQUEUE, abi.IFREQ_FLAGS.pack(b"", flags))
        except OSError as error:
            if error.errno != errno.EINVAL:  # it is so already
                raise

    def carrier(self, there: bool) -> None:
        """Show the host a cable, or none. A macvtap has its parent's."""
        with suppress(OSError):
            fcntl.ioctl(self.fd, abi.TUNSETCARRIER, int(there).to_bytes(4, "little"))

    def read(self, views: Sequence[memoryview]) -> int:
        """Read a frame with its header; returns 0 if there is none, or no interface any more (then EPOLLERR comes)."""
        try:
            return os.readv(self.fd, views)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            if error.errno != errno.EBADFD:
                raise
            return 0

    def taken(self) -> None:
        """What read() gave needs not be kept any longer."""

    def write(self, views: Sequence[memoryview]) -> bool:
        """Write a frame with its header; False if there is no room now."""
        try:
            os.writev(self.fd, views if len(views) <= MAX_VIEWS else [b"".join(views)])
        except (BlockingIOError, InterruptedError):
            return False
        return True

    def empty(self, scratch: memoryview) -> None:
        """Throw away what waits, and have only finished frames come."""
        with suppress(OSError):  # its interface is gone
            self.offload(0)
            for _ in range(_MOST):
                if not self.read([scratch]):
                    break

    def lost(self, host: Any, found: Callable[[], None]) -> None:
        """Its interface was deleted: nothing more will come."""
        host.log(f"tap {self.name} is gone")

    def close(self) -> None:
        """Let go of the queue."""
        os.close(self.fd)


@contextmanager
def _no_tap(given: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = "not a tap" if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EBADFD) else error.strerror
        raise UsageError(f"{given}: {why}", hint="give a descriptor of a tap or macvtap") from None


def look(fd: int, given: str) -> tuple[str, bool]:
    """Return the name of a tap's interface and whether it takes several queues. Raises UsageError if it is no tap."""
    with _no_tap(given):
        name, flags = abi.IFREQ_FLAGS.unpack(fcntl.ioctl(fd, abi.TUNGETIFF, bytes(abi.IFREQ_FLAGS.size)))
        if not flags & abi.IFF_TAP or not flags & abi.IFF_VNET_HDR:
            raise UsageError(f"{given}: not a tap with a vnet header",
                             hint="open it with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR")
        if not flags & abi.IFF_NO_PI:
            raise UsageError(f"{given}: puts a packet header of its own before each frame", hint="set IFF_NO_PI")
        # Every macvtap takes several, and says so only if it was told.
        several = bool(flags & abi.IFF_MULTI_QUEUE) or os.fstat(fd).st_rdev != os.stat(DEVICE).st_rdev
    return name.split(b"\0", 1)[0].decode(errors="replace"), several


def is_gone(fd: int) -> bool:
    """Say that the interface behind a tap's descriptor was deleted."""
    try:
        fcntl.ioctl(fd, abi.TUNGETIFF, bytes(abi.IFREQ_FLAGS.size))
    except OSError as error:
        return error.errno == errno.EBADFD
    return False


def open_queues(name: str | None, count: int, given: str) -> list[Tap]:
    """Open `count` queues of tap `name`, which is made if it is not there.

    Raises UsageError or Conflict, with `given` as the key and value to blame.
    """
    taps: list[Tap] = []
    try:
        for _ in range(count):
            taps.append(_open(taps[0].name if taps else name or PATTERN, count > 1, given))
    except BaseException:
        for tap in taps:
            tap.close()
        raise
    return taps


def open_device(given: str) -> int:
    """Return a descriptor that is no tap yet. Raises UsageError."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"{given}: {DEVICE}: {error.strerror}", hint="modprobe tun, or pass fd=[...]") from None


def _open(name: str, multi: bool, given: str) -> Tap:
    there = exists(name)
    fd = open_device(given)
    try:
        flags = abi.IFF_TAP | abi.IFF_NO_PI | abi.IFF_VNET_HDR
        try:
            _attach(fd, name, flags | (abi.IFF_MULTI_QUEUE if multi else 0))
        except OSError as error:
            if multi or error.errno != errno.EINVAL:
                raise
            _attach(fd, name, flags | abi.IFF_MULTI_QUEUE)  # a tap that was made for several queues
        return Tap(fd, given)
    except OSError as error:
        os.close(fd)
        raise refusal(error, given, name, there, multi) from None
    except BaseException:
        os.close(fd)
        raise


def exists(name: str) -> bool:
    """Say that the host has an interface of this name."""
    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


def _attach(fd: int, name: str, flags: int) -> None:
    fcntl.ioctl(fd, abi.TUNSETIFF, abi.IFREQ_FLAGS.pack(name.encode(), flags))


def refusal(error: OSError, given: str, name: str, there: bool, multi: bool) -> Conflict | UsageError:
    """Say why tap `name` cannot be opened, which was `there` or not."""
    if error.errno == errno.EBUSY:
        return Conflict(f"{given}: is used by another process", hint="give each card a tap of its own")
    if error.errno == errno.EINVAL and there:
        return UsageError(f"{given}: is not a tap, or has a single queue", hint="ip tuntap add mode tap multi_queue")
    if error.errno in (errno.EPERM, errno.EACCES):
        if name == PATTERN:
            key = given.partition("=")[0]
            return UsageError(f"{given}: a new tap needs CAP_NET_ADMIN", hint=f"{_how_to_make('tap0', multi)}, and "
                              f"write tap=tap0 instead; without {key}= the guest is on passt")
        if there:
            return UsageError(f"{given}: belongs to somebody else", hint=f"one of your own: "
                              f"{_how_to_make('NAME', multi)}; without tap= the guest is on passt")
        return UsageError(f"{given}: does not exist, and making it needs CAP_NET_ADMIN",
                          hint=f"{_how_to_make(name, multi)}; without tap= the guest is on passt")
    return UsageError(f"{given}: {error.strerror}")


def _how_to_make(name: str, multi: bool) -> str:
    several = " multi_queue" if multi else ""
    return f"sudo ip tuntap add {name} mode tap user $USER{several} && sudo ip link set {name} up"


def parse_mac(key: str, text: str) -> bytes:
    """Read aa:bb:cc:dd:ee:ff. Raises UsageError; a group's address is nobody's."""
    parts = text.split(":")
    try:
        mac = bytes(int(part, 16) for part in parts if len(part) == 2)
    except ValueError:
        mac = b""
    if len(mac) != 6 or len(parts) != 6:
        raise UsageError(f"{key}={text[:40]} is not a MAC address", hint="write aa:bb:cc:dd:ee:ff")
    if mac[0] & 1 or not any(mac):
        raise UsageError(f"{key}={text} is not the address of one card", hint="its first byte must be even")
    return mac
