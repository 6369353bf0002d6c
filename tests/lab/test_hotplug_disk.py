"""A stock Debian guest sees what is done to a disk that it has: size, image, and how much it may do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cellvisor.ctl.client import Client
from tests.lab import fio
from tests.lab.guest import Linux
from tests.lab.hotplug import MIB, Shared, add, disk_in, eventually, is_done, remove, sparse
from tests.lab.programs import LOADER

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

# What even the slow lab does more of: 80 and 40 requests of 4 KiB a second.
RATES = {"bandwidth": 320 << 10, "ops": 40}
LIMITS: dict[str, dict[str, Any]] = {kind: {"size": rate // 10, "refill_time": 100} for kind, rate in RATES.items()}
COUNTED = {"bandwidth": ("read_bytes", "write_bytes"), "ops": ("read_ops", "write_ops")}
GROUPS = ("id=bandwidth,bw_size=32K,bw_refill_time=100", "id=ops,ops_size=4,ops_refill_time=100")
MEASURED_SECONDS = 5.0
TOLERANCE = 0.2


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(tmp_path_factory.mktemp("guest"), "--rate-limit-group", *GROUPS)
    yield made
    made.close()


def resize(guest: Linux, client: Client, key: str, disk: str) -> None:
    """Double a disk of 16 MiB and halve it again."""
    def has(size: int) -> bool:
        return int(guest.run(f"cat /sys/block/{disk}/size")) * 512 == size

    assert has(16 * MIB)
    for size in (32 * MIB, 16 * MIB):
        client.call("resize-disk", id=key, desired_size=size)
        eventually(lambda size=size: has(size), f"{size} bytes")
    guest.run(f"dd if=/dev/zero of=/dev/{disk} bs=1M count=16 conv=fsync 2>/dev/null")
    assert guest.try_run(f"dd if=/dev/zero of=/dev/{disk} bs=1M count=1 seek=16 conv=fsync").status != 0


def test_disk_resize(vm: tuple[Linux, Client]) -> None:
    resize(*vm, "_disk2", "vdc")


def test_disk_resize_after_hotplug(vm: tuple[Linux, Client], tmp_path: Path) -> None:
    guest, client = vm
    add(client, path=str(sparse(tmp_path / "added.raw")), id="test0")
    is_done(client, "test0")
    resize(guest, client, "test0", disk_in(guest, 6))
    remove(client, "test0")


def test_another_image_after_hotplug(vm: tuple[Linux, Client], tmp_path: Path) -> None:
    guest, client = vm
    one, two = sparse(tmp_path / "one.raw"), sparse(tmp_path / "two.raw", 24 * MIB)
    two.write_bytes(b"second".ljust(24 * MIB, b"."))
    add(client, path=str(one), id="test0")
    is_done(client, "test0")
    disk = disk_in(guest, 6)
    guest.run(f"printf %-4096s first >/tmp/block && dd if=/tmp/block of=/dev/{disk} oflag=direct bs=4k 2>/dev/null")
    client.call("swap-disk", id="test0", path=str(two))
    eventually(lambda: int(guest.run(f"cat /sys/block/{disk}/size")) * 512 == 24 * MIB, "the other size")
    assert guest.run(f"dd if=/dev/{disk} iflag=direct bs=4k count=1 2>/dev/null | head -c 6") == "second"
    guest.run(f"dd if=/tmp/block of=/dev/{disk} oflag=direct bs=4k seek=5000 2>/dev/null")
    remove(client, "test0")
    assert one.read_bytes()[:6] == b"first "
    assert two.read_bytes()[5000 * 4096:][:6] == b"first "


def rate(client: Client, kind: str, *keys: str) -> list[float]:
    """Return how much each disk does in a second."""
    def look() -> tuple[float, list[int]]:
        counters = client.call("counters")
        return time.monotonic(), [sum(counters[key][name] for name in COUNTED[kind]) for key in keys]

    began, before = look()
    time.sleep(MEASURED_SECONDS)
    ended, after = look()
    return [(now - then) / (ended - began) for now, then in zip(after, before, strict=True)]


def busy(guest: Linux, client: Client, **options: Any) -> None:
    """Add a disk and have fio write to it as fast as it may."""
    key = options["id"]
    slot = int(add(client, **options)["bdf"][8:10], 16)
    is_done(client, key)
    fio.load(guest, disk_in(guest, slot))
    eventually(lambda: client.call("counters")[key]["throttled"] > 0, "the limit to hold")


def leave(guest: Linux, client: Client, *keys: str) -> None:
    guest.run(f"kill $(pidof {LOADER}); while pidof {LOADER} >/dev/null; do sleep 0.1; done")
    for key in keys:
        remove(client, key)


@pytest.mark.parametrize("kind", RATES)
def test_rate_limiter_block(vm: tuple[Linux, Client], tmp_path: Path, kind: str) -> None:
    """Measured rate within tolerance of the limit, and of twice the limit when that is set meanwhile."""
    guest, client = vm
    busy(guest, client, path=str(sparse(tmp_path / "added.raw")), id="test0", rate_limiter_config={kind: LIMITS[kind]})
    assert rate(client, kind, "test0") == [pytest.approx(RATES[kind], rel=TOLERANCE)]
    more = {"bandwidth": "bw_size", "ops": "ops_size"}[kind]
    client.call("set-rate-limit", id="test0", **{more: 2 * LIMITS[kind]["size"]})
    assert rate(client, kind, "test0") == [pytest.approx(2 * RATES[kind], rel=TOLERANCE)]
    leave(guest, client, "test0")


@pytest.mark.parametrize("kind", RATES)
def test_rate_limiter_group_block(vm: tuple[Linux, Client], tmp_path: Path, kind: str) -> None:
    """Two disks, two processes, together within tolerance of the one limit, and none of them starves."""
    guest, client = vm
    for key in ("test0", "test1"):
        busy(guest, client, path=str(sparse(tmp_path / f"{key}.raw")), id=key, rate_limit_group=kind)
    rates = rate(client, kind, "test0", "test1")
    assert sum(rates) == pytest.approx(RATES[kind], rel=TOLERANCE)
    assert min(rates) > RATES[kind] / 20
    leave(guest, client, "test0", "test1")
