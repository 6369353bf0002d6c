"""Descriptors that a user gave for a device (`fd=`): they live in core's store as `fd0`, `fd1`, ... of the device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

from cellvisor.controlplane.corelink import CoreLink
from cellvisor.controlplane.inventory import Device
from cellvisor.core.errors import CellvisorError, UsageError

Kept = list[tuple[str, str, int]]  # device, name, descriptor


def give(core: CoreLink, device: Device, fds: Sequence[int]) -> None:
    """Put `fds`, which stay the caller's, into the store. Raises UsageError for one that is not open, Internal."""
    check(device, fds)
    for index, fd in enumerate(fds):
        core.deposit(device.id, f"fd{index}", fd)


def check(device: Device, fds: Sequence[int]) -> None:
    """Raise UsageError for one that is not open."""
    for fd in fds:
        try:
            os.fstat(fd)
        except OSError as error:
            raise UsageError(f"{device.id}: fd={fd}: {error.strerror}",
                             hint="they are descriptors of the process that starts the VM") from None


def give_named(core: CoreLink, devices: Iterable[Device], generation: int) -> None:
    """Put in what the options name: descriptors that the first controlplane inherited. Raises as give() does.

    From then on core alone has them, so that they are closed with their device. The standard ones stay.
    """
    inherited = set()
    for device in devices:
        numbers = named(device)
        if numbers and generation > 1:
            raise UsageError(f"{device.id}: fd={numbers[0]}: the process that inherited it died too early",
                             hint="start the VM again")
        give(core, device, numbers)
        inherited |= {fd for fd in numbers if fd > 2}
    for fd in inherited:
        os.close(fd)


def named(device: Device) -> list[int]:
    """Return the numbers that the options of `device` hold."""
    found = device.options.get("fd")
    return found if isinstance(found, list) else []


@contextlib.contextmanager
def lent(core: CoreLink, device: Device) -> Iterator[list[int]]:
    """Give what the device was given, for as long as the block lasts."""
    kept = collect(core, [device])
    try:
        yield [fd for _, _, fd in kept]
    finally:
        for _, _, fd in kept:
            os.close(fd)


def take_back(core: CoreLink, devices: Iterable[Device]) -> None:
    """Have core close what devices were given that it never learned of: nothing else names them."""
    for device in devices:
        for index in range(len(named(device))):
            with contextlib.suppress(OSError, CellvisorError), open(os.devnull) as nothing:
                core.deposit(device.id, f"fd{index}", nothing.fileno())


def collect(core: CoreLink | None, devices: Iterable[Device]) -> Kept:
    """Take out of core what the devices were given: it is about to end and another follows."""
    kept: Kept = []
    with contextlib.suppress(OSError, CellvisorError):  # core is gone, and they with it
        for device in devices:
            for index in range(len(named(device))):
                fd = core.stored(device.id, f"fd{index}") if core is not None else None
                if fd is not None:
                    kept.append((device.id, f"fd{index}", fd))
    return kept


def pass_on(core: CoreLink, kept: Kept) -> None:
    """Give another core what collect() returned."""
    while kept:
        device, name, fd = kept.pop()
        try:
            core.deposit(device, name, fd)
        finally:
            os.close(fd)
