"""Rate limits as they are written down: how many bytes and how many operations a device, or a group, may do.

A limit lives in one page of shared memory, a memfd for a group: core/_native/budget.h says what is in it and takes
from it, here it is made and changed. Who is killed in between leaves either the old limits or the new ones.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cellvisor.core.errors import UsageError
from cellvisor.core.wire.options import DeviceOptions, option

KEYS = ("bw_size", "bw_one_time_burst", "bw_refill_time", "ops_size", "ops_one_time_burst", "ops_refill_time")
GROUP = "rate_limit_group"  # the option that names a group, and its memfd's name in core's store
SIZE = mmap.PAGESIZE
_SLOTS, _SLOT = 64, struct.Struct("=8Q")  # two times due, burst, size, refill
_MS = 1_000_000
_LONGEST = 24 * 3600 * 1000


def _amount(help: str, default: int | None = 0) -> Any:
    return option(default, help=help, size=True, min=0)


def _time(default: int | None = 0) -> Any:
    return option(default, help="milliseconds", min=0, max=_LONGEST)


@dataclass(frozen=True, kw_only=True)  # no slots: LimitedOptions has them from its other base
class Limits:
    """How much may pass: KEYS, sizes in bytes or requests, times in ms."""

    bw_size: int = _amount("bytes that pass in bw_refill_time; 0: no limit")
    bw_one_time_burst: int = _amount("so many bytes more, once")
    bw_refill_time: int = _time()
    ops_size: int = _amount("requests that pass in ops_refill_time; 0: no limit")
    ops_one_time_burst: int = _amount("so many requests more, once")
    ops_refill_time: int = _time()


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitedOptions(Limits, DeviceOptions):
    """The options of a device that can be limited: KEYS, or a group that has them."""

    rate_limit_group: str | None = option(None, help="share the limits of this --rate-limit-group", length=32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimitGroup(Limits):
    """Limits that several devices share: `--rate-limit-group`."""

    id: str = option(help="its name", length=32)

    def limits(self) -> dict[str, int]:
        """Return KEYS with their values."""
        return {key: getattr(self, key) for key in KEYS}

    def as_json(self) -> dict[str, Any]:
        """Return Cloud Hypervisor's shape."""
        return {"id": self.id, "rate_limiter_config": {
            name: {key: getattr(self, f"{kind}_{key}") for key in ("size", "one_time_burst", "refill_time")}
            for name, kind in (("bandwidth", "bw"), ("ops", "ops"))}}


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimitArgs:
    """What `set-rate-limit` takes: a disk, a network card or a group, and KEYS. What is not given stays as it is."""

    id: str | None = option(None, help="name of the disk or network card")
    group: str | None = option(None, help="or of a rate limit group")
    bw_size: int | None = _amount("bytes that pass in bw_refill_time; 0: no limit", None)
    bw_one_time_burst: int | None = _amount("so many bytes more, once", None)
    bw_refill_time: int | None = _time(None)
    ops_size: int | None = _amount("requests that pass in ops_refill_time; 0: no limit", None)
    ops_one_time_burst: int | None = _amount("so many requests more, once", None)
    ops_refill_time: int | None = _time(None)


def create(limits: Mapping[str, int | None]) -> int:
    """Return a memfd of limits for several processes; nobody can resize it. Raises UsageError."""
    check_limits(limits)
    fd = os.memfd_create("cellvisor-budget", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        with mmap.mmap(fd, SIZE) as page:
            put(page, limits)
    except BaseException:
        os.close(fd)
        raise
    return fd


def put(page: mmap.mmap, limits: Mapping[str, int | None], *, empty_at: int | None = None) -> None:
    """Have other limits from now on (keys: KEYS, times in ms; a size of 0 is none).

    Buckets are full, or were empty at this moment (ns, CLOCK_MONOTONIC). Raises UsageError.
    """
    check_limits(limits)
    words: list[int] = []
    for kind in ("bw", "ops"):
        size, burst, refill = _three(limits, kind)
        full = (0, burst) if empty_at is None else (empty_at + refill * _MS, 0)
        words += [*full, size, refill * _MS]
    which = 1 - page[0] % 2
    _SLOT.pack_into(page, _SLOTS + which * _SLOT.size, *words)
    page[0] = which


def get(page: mmap.mmap) -> dict[str, int]:
    """Return the sizes and refill times that hold, without what was spent."""
    words = _SLOT.unpack_from(page, _SLOTS + page[0] % 2 * _SLOT.size)
    return {"bw_size": words[2], "bw_refill_time": words[3] // _MS,
            "ops_size": words[6], "ops_refill_time": words[7] // _MS}


def check_limits(limits: Mapping[str, int | None], flag: str = "") -> None:
    """Refuse halves of a limit. Raises UsageError naming the key, after `flag`."""
    flag = flag and f"{flag}: "
    for kind in ("bw", "ops"):
        size, burst, refill = _three(limits, kind)
        if size and not refill:
            raise UsageError(f"{flag}{kind}_size={size} needs {kind}_refill_time", hint="in milliseconds")
        if not size and (burst or refill):
            key, value = ("one_time_burst", burst) if burst else ("refill_time", refill)
            raise UsageError(f"{flag}{kind}_{key}={value} needs {kind}_size", hint="how much passes in one refill time")


def check_member(group: str, limits: Mapping[str, int | None], flag: str = "") -> None:
    """Refuse limits of its own for a member of `group`. Raises UsageError naming the key, after `flag`."""
    for key in KEYS:
        if limits.get(key):
            raise UsageError(f"{flag and flag + ': '}{key}={limits[key]} beside {GROUP}={group}",
                             hint="a group's members have no limits of their own")


def _three(limits: Mapping[str, int | None], kind: str) -> tuple[int, int, int]:
    size, burst, refill = (limits.get(f"{kind}_{key}") or 0 for key in ("size", "one_time_burst", "refill_time"))
    return size, burst, refill
