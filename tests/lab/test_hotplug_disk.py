"""A stock Debian guest sees what is done to a disk that it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.ctl.client import Client
from tests.lab.guest import Linux
from tests.lab.hotplug import MIB, Shared, add, disk_in, eventually, is_done, remove, sparse

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(tmp_path_factory.mktemp("guest"))
    yield made
    made.close()


@pytest.fixture
def vm(shared: Shared) -> Iterator[tuple[Linux, Client]]:
    """The module's guest, which gets everything back."""
    yield shared.get()
    shared.give_back()


def test_disk_resize_after_hotplug(vm: tuple[Linux, Client], tmp_path: Path) -> None:
    guest, client = vm
    add(client, path=str(sparse(tmp_path / "added.raw")), id="test0")
    is_done(client, "test0")
    disk = disk_in(guest, 6)

    def has(size: int) -> bool:
        return int(guest.run(f"cat /sys/block/{disk}/size")) * 512 == size

    assert has(16 * MIB)
    for size in (32 * MIB, 16 * MIB):
        client.call("resize-disk", id="test0", desired_size=size)
        eventually(lambda size=size: has(size), f"{size} bytes")
    guest.run(f"dd if=/dev/zero of=/dev/{disk} bs=1M count=16 conv=fsync 2>/dev/null")
    assert guest.try_run(f"dd if=/dev/zero of=/dev/{disk} bs=1M count=1 seek=16 conv=fsync").status != 0
    remove(client, "test0")
