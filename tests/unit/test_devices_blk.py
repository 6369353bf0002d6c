"""virtio-blk against a fake driver: every request type, every refusal, and the lock."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.abi import virtio
from cellvisor.core.errors import Conflict, RingError, UsageError
from cellvisor.devices.backends.disk import CHUNK, Disk
from cellvisor.devices.virtio.blk import MAX_DISCARD, MAX_ZEROES, Blk
from tests.fakes.host import Rig

SECTORS = 4096
OK, IOERR, UNSUPP = virtio.BLK_S_OK, virtio.BLK_S_IOERR, virtio.BLK_S_UNSUPP
IN, OUT, FLUSH = virtio.BLK_T_IN, virtio.BLK_T_OUT, virtio.BLK_T_FLUSH
DISCARD, ZEROES = virtio.BLK_T_DISCARD, virtio.BLK_T_WRITE_ZEROES
Make = Callable[..., Rig]


def header(kind: int, sector: int = 0) -> bytes:
    return virtio.BLK_REQUEST.pack(kind, 0, sector)


def segment(sector: int, count: int, flags: int = 0) -> bytes:
    return virtio.BLK_SEGMENT.pack(sector, count, flags)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(struct.pack("<Q", sector) * 64 for sector in range(SECTORS)))
    return path


@pytest.fixture
def make(image: Path) -> Iterator[Make]:
    rigs: list[Rig] = []

    def make(*, features: int | None = None, **options: Any) -> Rig:
        rigs.append(Rig(Blk, {"path": str(image), **options}, features=features))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def sector(number: int) -> bytes:
    return struct.pack("<Q", number) * 64


def test_config_and_features_say_what_the_image_is(make: Make) -> None:
    rig = make(num_queues=3, queue_size=64)
    fields = virtio.BLK_CONFIG.unpack(rig.spec.config)
    assert fields[0] == SECTORS
    assert fields[2] == 62
    assert fields[6] == 512
    assert fields[12] == 3
    assert rig.spec.queues == (64, 64, 64)
    assert rig.spec.features & virtio.BLK_F_MQ
    assert rig.spec.features & virtio.BLK_F_DISCARD
    assert not rig.spec.features & virtio.BLK_F_RO


@pytest.mark.parametrize("direct", [False, True])
def test_read_and_write(make: Make, image: Path, direct: bool) -> None:
    rig = make(direct=direct)
    data = rig.request([header(IN, 5)], [512, 1024, 1])
    assert data == sector(5) + sector(6) + sector(7) + bytes([OK])
    assert rig.length == len(data)
    fresh = os.urandom(2048)
    assert rig.request([header(OUT, 9), fresh[:1024], fresh[1024:]], [1]) == bytes([OK])
    assert rig.length == 1
    assert image.read_bytes()[9 * 512 : 13 * 512] == fresh
    assert rig.request([header(FLUSH)], [1]) == bytes([OK])
    counted = rig.device.counters()
    assert counted.pop("busy_us") > 0
    assert counted == {"read_bytes": 1536, "write_bytes": 2048, "read_ops": 1, "write_ops": 1, "errors": 0,
                       "throttled": 0}


@pytest.mark.parametrize("direct", [False, True])
def test_any_split_of_header_data_and_status(make: Make, image: Path, direct: bool) -> None:
    rig = make(direct=direct)
    out = header(OUT, 3) + b"w" * 512
    pieces = [out[i : i + 7] for i in range(0, len(out), 7)]
    assert rig.request(pieces, [1]) == bytes([OK])
    assert image.read_bytes()[3 * 512 : 4 * 512] == b"w" * 512
    heads = [bytes([byte]) for byte in header(IN, 4)]
    assert rig.request(heads, [1] * 3 + [511, 1])[-1] == IOERR, "514 bytes are no whole sectors"
    assert rig.request(heads, [3, 500, 8, 1, 1]) == sector(4) + bytes([OK])
    assert rig.request([header(IN, 4)], [513]) == sector(4) + bytes([OK]), "status shares its buffer"


def test_more_buffers_than_one_system_call_takes(make: Make) -> None:
    rig = make(queue_size=2048)
    head = rig.drivers[0].add([header(IN, 1)], [1] * 1536 + [1])
    rig.kick()
    assert rig.drivers[0].used() == [(head, 1537)]
    assert rig.drivers[0].data(head) == sector(1) + sector(2) + sector(3) + bytes([OK])


def test_big_transfer_through_the_bounce_buffer(make: Make, image: Path) -> None:
    image.write_bytes(os.urandom(3 * CHUNK))
    rig = make(direct=True)
    size = CHUNK + 4096
    data = rig.request([header(IN, 8)], [1001, size - 1001, 1])
    assert data == image.read_bytes()[4096 : 4096 + size] + bytes([OK])
    fresh = os.urandom(size)
    assert rig.request([header(OUT, 16), fresh[:333], fresh[333:]], [1]) == bytes([OK])
    assert image.read_bytes()[8192 : 8192 + size] == fresh


@pytest.mark.parametrize(("readable", "writable", "status"), [
    ([header(IN, SECTORS)], [512, 1], IOERR),
    ([header(IN, SECTORS - 1)], [1024, 1], IOERR),
    ([header(IN, 1 << 63)], [512, 1], IOERR),
    ([header(IN, (1 << 64) - 1)], [1024, 1], IOERR),
    ([header(IN)], [511, 1], IOERR),
    ([header(OUT, SECTORS), b"x" * 512], [1], IOERR),
    ([header(OUT), b"x" * 513], [1], IOERR),
    ([header(virtio.BLK_T_SCSI_CMD), b"x" * 32], [96, 1], UNSUPP),
    ([header(77)], [1], UNSUPP),
    ([header(DISCARD)], [1], IOERR),
    ([header(DISCARD), b"x" * 15], [1], IOERR),
    ([header(DISCARD), segment(0, 0)], [1], IOERR),
    ([header(DISCARD), segment(0, 8) + segment(SECTORS, 1)], [1], IOERR),
    ([header(DISCARD), segment(0, MAX_DISCARD + 1)], [1], IOERR),
    ([header(DISCARD), segment(0, 8, 1)], [1], UNSUPP),
    ([header(DISCARD), segment(0, 1) * 33], [1], IOERR),
    ([header(ZEROES), segment(0, 8) * 2], [1], IOERR),
    ([header(ZEROES), segment(0, MAX_ZEROES + 1)], [1], IOERR),
    ([header(ZEROES), segment(0, 8, 2)], [1], UNSUPP),
])
def test_refused_requests_change_nothing(make: Make, image: Path, readable: list[bytes],
                                         writable: list[int], status: int) -> None:
    before = image.read_bytes()
    rig = make()
    assert rig.request(readable, writable)[-1] == status
    assert rig.length == 1
    assert image.read_bytes() == before


def test_readonly_disk_refuses_to_change(make: Make, image: Path) -> None:
    before = image.read_bytes()
    rig = make(readonly=True)
    assert rig.spec.features & virtio.BLK_F_RO
    assert not rig.spec.features & (virtio.BLK_F_DISCARD | virtio.BLK_F_WRITE_ZEROES)
    assert rig.request([header(OUT), b"x" * 512], [1]) == bytes([IOERR])
    assert rig.request([header(DISCARD), segment(0, 8)], [1]) == bytes([UNSUPP])
    assert rig.request([header(ZEROES), segment(0, 8)], [1]) == bytes([UNSUPP])
    assert rig.request([header(FLUSH)], [1]) == bytes([OK])
    assert rig.request([header(IN, 2)], [512, 1]) == sector(2) + bytes([OK])
    assert image.read_bytes() == before


@pytest.mark.parametrize(("readable", "writable"), [([b"short"], [1]), ([header(IN)], []), ([], [512])])
def test_request_without_header_or_status_breaks_the_rules(
        make: Make, readable: list[bytes], writable: list[int]) -> None:
    rig = make()
    rig.drivers[0].add(readable, writable)
    with pytest.raises(RingError):
        rig.kick()


def test_identity(make: Make) -> None:
    rig = make(serial="abc")
    assert rig.request([header(virtio.BLK_T_GET_ID)], [20, 1]) == b"abc".ljust(20, b"\0") + bytes([OK])


def test_identity_is_the_device_without_a_serial(make: Make) -> None:
    rig = make()
    assert rig.request([header(virtio.BLK_T_GET_ID)], [20, 1])[:5] == b"dev0\0"
    assert rig.request([header(virtio.BLK_T_GET_ID)], [3, 1]) == b"dev\0"


def test_discard_makes_holes_and_zeroes_read_as_zero(make: Make, image: Path) -> None:
    rig = make()
    before = os.stat(image).st_blocks
    both = segment(0, 1024) + segment(2048, 1024)
    assert rig.request([header(DISCARD), both], [1]) == bytes([OK])
    after = os.stat(image)
    assert after.st_size == SECTORS * 512
    assert after.st_blocks <= before - 1024, "no hole was made"
    for flags in (0, virtio.BLK_WRITE_ZEROES_UNMAP):
        rig.request([header(OUT, 1100), b"x" * 4096], [1])
        assert rig.request([header(ZEROES), segment(1100, 8, flags)], [1]) == bytes([OK])
        assert rig.request([header(IN, 1100)], [4096, 1]) == bytes(4096) + bytes([OK])
    assert rig.request([header(IN, 1108)], [512, 1])[:512] == sector(1108)


def test_dense_disk_offers_no_discard(make: Make) -> None:
    rig = make(sparse=False)
    assert not rig.spec.features & virtio.BLK_F_DISCARD
    assert rig.request([header(DISCARD), segment(0, 8)], [1]) == bytes([UNSUPP])


def test_zeroing_by_hand_where_the_file_system_cannot(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellvisor.devices.backends import disk as module

    class Unable:
        @staticmethod
        def cv_file_zero(*args: int) -> int:
            return -errno.EOPNOTSUPP

        cv_file_punch = cv_file_zero

    class Native:
        lib = Unable

    disk = Disk(str(image))
    monkeypatch.setattr(module, "_native", Native)
    disk.zero(512, CHUNK + 512, unmap=True)
    disk.discard(0, 512)
    disk.close()
    data = image.read_bytes()
    assert data[:512] == sector(0)
    assert not any(data[512 : CHUNK + 1024])
    assert data[CHUNK + 1024 : CHUNK + 1536] == sector((CHUNK + 1024) // 512)


def test_write_through_without_flush_feature(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    make(features=0).request([header(OUT), b"x" * 512], [1])
    assert len(flushed) == 1


def test_write_back_with_flush_feature(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    rig = make()
    rig.request([header(OUT), b"x" * 512], [1])
    assert not flushed
    rig.request([header(FLUSH)], [1])
    assert len(flushed) == 1


def test_truncated_image_is_an_io_error_not_a_crash(make: Make, image: Path) -> None:
    rig = make()
    os.truncate(image, 512)
    assert rig.request([header(IN, 100)], [512, 1])[-1] == IOERR
    assert rig.device.counters()["errors"] == 1
    assert "end of file" in rig.host.logged[0]


def fifo_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(("change", "message"), [
    (lambda path: os.truncate(path, 1000), "size 1000 is not a multiple of 512 bytes"),
    (lambda path: os.truncate(path, 0), "it is empty"),
    (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    (lambda path: path.unlink(), "No such file"),
    (fifo_instead, "neither a file nor a block device"),
])
def test_what_is_no_disk_is_refused(image: Path, change: Callable[[Path], object], message: str) -> None:
    change(image)
    with pytest.raises(UsageError) as caught:
        Disk(str(image))
    assert message in str(caught.value)
    assert str(image) in str(caught.value)


def test_affinity_names_an_unknown_queue(make: Make) -> None:
    with pytest.raises(UsageError, match="queue 1 of 1"):
        make(queue_affinity=[{"queue_index": 1, "host_cpus": [0]}])


def test_one_writer_or_many_readers(image: Path) -> None:
    writer = Disk(str(image))
    with pytest.raises(Conflict, match=f"is in use by .* \\(pid {os.getpid()}\\)"):
        Disk(str(image))
    with pytest.raises(Conflict):
        Disk(str(image), readonly=True)
    writer.close()
    readers = [Disk(str(image), readonly=True) for _ in range(2)]
    with pytest.raises(Conflict):
        Disk(str(image))
    for reader in readers:
        reader.close()
    Disk(str(image)).close()


def test_holder_in_another_process_is_named(image: Path) -> None:
    script = ("import sys; from cellvisor.devices.backends.disk import Disk; d = Disk(sys.argv[1]);"
              "print('locked', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", script, str(image)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(Conflict, match=f"\\(pid {other.pid}\\)"):
            Disk(str(image))
    Disk(str(image)).close()


def capacity(rig: Rig) -> int:
    return int(virtio.BLK_CONFIG.unpack(rig.host.configs[-1])[0])


def test_resize_goes_both_ways_and_is_told(make: Make, image: Path) -> None:
    rig = make()
    for sectors in (2 * SECTORS, SECTORS // 2, SECTORS // 2):
        assert rig.device.call("resize", {"size": sectors * 512}) == {"size": sectors * 512}
        assert (image.stat().st_size, capacity(rig)) == (sectors * 512, sectors)
        assert rig.request([header(IN, sectors - 1)], [512, 1])[-1] == OK
        assert rig.request([header(IN, sectors)], [512, 1])[-1] == IOERR
    assert len(rig.host.configs) == 2, "the size that it has is no news"


def test_a_dense_disk_grows_with_its_space(make: Make, image: Path) -> None:
    rig = make(sparse=False)
    rig.device.call("resize", {"size": 2 * SECTORS * 512})
    assert image.stat().st_blocks >= 2 * SECTORS
    free = os.statvfs(image)
    size = SECTORS * 512 + (free.f_bavail * free.f_frsize >> 20 << 20) + (1 << 30)
    with pytest.raises(Conflict, match=f"^desired_size={size}: the file system of .* is full"):
        rig.device.call("resize", {"size": size})
    assert image.stat().st_size == 2 * SECTORS * 512


@pytest.mark.parametrize(("options", "size", "message"), [
    ({}, 0, "desired_size=0: a disk cannot be empty"),
    ({}, 1000, "desired_size=1000 is not a multiple of 512"),
    ({}, 1 << 63, "is more than a file can have"),
    ({}, (1 << 63) - 512, "is more than the file system of"),
    ({}, "1M", "desired_size='1M' is no number of bytes"),
    ({"readonly": True}, 1 << 20, "was opened with readonly=on"),
])
def test_resize_refuses_and_changes_nothing(make: Make, image: Path, options: dict[str, Any], size: object,
                                            message: str) -> None:
    rig = make(**options)
    with pytest.raises(UsageError, match=message):
        rig.device.call("resize", {"size": size})
    assert image.stat().st_size == SECTORS * 512
    assert rig.host.configs == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_resize_on_a_full_disk(make: Make, image: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    rig = make()
    real, tried = os.truncate, []

    def full(fd: int, size: int) -> None:
        tried.append(size)
        if len(tried) == 1:
            raise OSError(error, os.strerror(error))
        real(fd, size)

    monkeypatch.setattr(os, "truncate", full)
    with pytest.raises(Conflict, match="is full") as caught:
        rig.device.call("resize", {"size": 1 << 30})
    assert caught.value.code == "no-space"
    assert tried == [1 << 30, SECTORS * 512]
    assert image.stat().st_size == SECTORS * 512
