"""A disk's process that is given another image (devices/virtio/blk.py: open, swap)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.abi import virtio
from cellvisor.core.errors import CellvisorError, Conflict, UsageError
from cellvisor.devices.backends.disk import Disk
from cellvisor.devices.virtio import blk
from tests.fakes.host import Rig

READ = virtio.BLK_REQUEST.pack(virtio.BLK_T_IN, 0, 0)
MIB = 1 << 20


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1" * MIB)
    two.write_bytes(b"2" * 2 * MIB)
    return one, two


@pytest.fixture
def rig(images: tuple[Path, Path]) -> Iterator[Rig]:
    made = Rig(blk.Blk, {"path": str(images[0])})
    yield made
    made.close()
    for image in images:
        Disk(str(image)).close()  # nobody has its lock


def first(rig: Rig) -> bytes:
    return rig.request([READ], [512, 1])[:1]


def test_opened_first_then_swapped(rig: Rig, images: tuple[Path, Path]) -> None:
    one, two = images
    assert rig.device.call("open", {"path": str(two)}) == {"size": 2 * MIB}
    assert (first(rig), rig.host.configs) == (b"1", [])
    with pytest.raises(Conflict, match="in use by"):
        Disk(str(two))
    for _ in range(2):  # asked again, it is so already
        assert rig.device.call("swap", {"path": str(two)}) == {}
    assert first(rig) == b"2"
    assert [virtio.BLK_CONFIG.unpack(config)[0] for config in rig.host.configs] == [2 * MIB // 512]
    Disk(str(one)).close()


def test_requests_that_a_limit_holds_up_go_to_the_new_image(images: tuple[Path, Path]) -> None:
    rig = Rig(blk.Blk, {"path": str(images[0]), "ops_size": 1, "ops_refill_time": 3_600_000})
    assert first(rig) == b"1"
    head = rig.drivers[0].add([READ], [512, 1])
    rig.kick()
    rig.device.call("open", {"path": str(images[1])})
    rig.device.call("swap", {"path": str(images[1])})
    rig.device.call("limit", {})
    rig.until(lambda: not rig.host.kicked)
    assert rig.drivers[0].data(head)[:1] == b"2"
    rig.close()


def test_what_is_not_swapped_in_time_is_let_go(rig: Rig, images: tuple[Path, Path],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blk, "SWAP_SECONDS", 0.0)
    rig.device.call("open", {"path": str(images[1])})
    rig.until(lambda: not rig.host.reactor._due)
    Disk(str(images[1])).close()
    with pytest.raises(Conflict, match="two has not been opened"):
        rig.device.call("swap", {"path": str(images[1])})
    assert first(rig) == b"1"


def test_the_second_opened_takes_the_place_of_the_first(rig: Rig, images: tuple[Path, Path], tmp_path: Path) -> None:
    third = tmp_path / "third"
    third.write_bytes(b"3" * MIB)
    for path in (images[1], third):
        rig.device.call("open", {"path": str(path)})
    Disk(str(images[1])).close()
    with pytest.raises(Conflict, match="has not been opened"):
        rig.device.call("swap", {"path": str(images[1])})
    rig.device.call("swap", {"path": str(images[0])})  # to stay with what it has lets the other one go
    Disk(str(third)).close()


def test_refused_and_all_is_as_before(rig: Rig, images: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(images[0])
    (tmp_path / "odd").write_bytes(b"x" * 700)
    wrong: tuple[tuple[object, type[CellvisorError], str], ...] = (
        (tmp_path / "link", Conflict, "link is what the disk has already"),
        (tmp_path / "nope", UsageError, "nope: No such file"), (tmp_path / "odd", UsageError, "size 700 is not"),
        (None, UsageError, "path=None: No such file"))
    for path, error, message in wrong:
        with pytest.raises(error, match=message):
            rig.device.call("open", {"path": str(path)})
    assert (first(rig), rig.host.configs) == (b"1", [])


def test_blocks_of_another_size(rig: Rig, images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Disk._measure

    def large(disk: Disk) -> None:
        measure(disk)
        disk.logical = 4096

    monkeypatch.setattr(Disk, "_measure", large)
    with pytest.raises(UsageError, match="two has blocks of 4096 bytes, its driver was told 512"):
        rig.device.call("open", {"path": str(images[1])})
    monkeypatch.undo()
    Disk(str(images[1])).close()
