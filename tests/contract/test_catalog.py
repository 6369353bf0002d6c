"""Every device type of the catalog, as a real forked worker against a fake core and a fake driver.

A new file in devices/virtio is tested here before its author writes a test. A type whose options have no
usable defaults adds them to OPTIONS; EXCHANGE says how to see that it really serves.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.abi import virtio
from cellvisor.core.wire.messages import ToCore, ToWorker, pack, unpack
from cellvisor.core.wire.options import describe, validate
from cellvisor.core.wire.spec import spec_from_wire
from cellvisor.devices import catalog
from tests.fakes.core import FakeCore, FakeLink, NurseryProcess
from tests.fakes.driver import INDIRECT, NEXT, WRITE, FakeDriver
from tests.fakes.host import Rig

CATALOG = catalog.load()


def _disk(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(struct.pack("<Q", sector) * 64 for sector in range(2048)))
    return {"path": str(path), "num_queues": 2}


def _tap() -> dict[str, Any]:
    if os.geteuid() or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("a tap of its own needs root and /dev/net/tun")
    return {"num_queues": 4, "host_mac": "02:00:00:00:00:01"}


OPTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "blk": _disk,
    "console": lambda tmp_path: {"file": str(tmp_path / "console.log")},
    "net": lambda tmp_path: _tap(),
}


def options_of(kind: str, tmp_path: Path) -> dict[str, Any]:
    """Return options with which the type can be made on any machine."""
    return OPTIONS[kind](tmp_path) if kind in OPTIONS else {}


def _blk(link: FakeLink) -> None:
    for index in range(2):
        header = virtio.BLK_REQUEST.pack(virtio.BLK_T_IN, 0, 7)
        assert link.request([header], [512, 1], index) == struct.pack("<Q", 7) * 64 + b"\0"


def _rng(link: FakeLink) -> None:
    assert len(set(link.request([], [1024]))) > 100


def _console(link: FakeLink) -> None:
    assert link.request([b"said\n"], [], 1) == b""
    assert (link.core.run_dir / "console.log").read_bytes().endswith(b"said\n")


def _net(link: FakeLink) -> None:
    assert link.request([bytes(12), b"\xff" * 12 + b"\x88\xb5" + bytes(50)], [], 1) == b""
    assert link.request([b"\0\0\0"], [1], 4) == b"\0", "promiscuous mode off"


EXCHANGE: dict[str, Callable[[FakeLink], None]] = {"blk": _blk, "rng": _rng, "console": _console, "net": _net}


def exchange(link: FakeLink) -> None:
    """See that the device serves; a type without an entry is only looked at."""
    if link.kind in EXCHANGE:
        EXCHANGE[link.kind](link)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NurseryProcess]:
    with NurseryProcess(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.fixture(params=sorted(CATALOG.types))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[FakeCore]:
    with FakeCore(tmp_path) as core:
        yield core


@pytest.fixture
def link(core: FakeCore, nursery: NurseryProcess, kind: str, tmp_path: Path) -> Iterator[FakeLink]:
    yield core.start(nursery, kind, options_of(kind, tmp_path))
    pid = core.spawned["pid"]
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # the test has seen its end
    assert nursery.told()["pid"] == pid


def test_nothing_in_the_catalog_is_broken() -> None:
    assert not CATALOG.broken


def test_declaration(kind: str, tmp_path: Path) -> None:
    entry = CATALOG.types[kind]
    assert entry.cls.help
    options: type[Any] = entry.cls.Options
    assert dataclasses.is_dataclass(options)
    schema = describe(options)
    assert {"id", "pci_segment", "pci_device_id"} <= set(schema["keys"])
    assert [name for name, rule in schema["keys"].items() if not rule["help"]] == [], "options without help"
    assert unpack(pack(entry.as_wire())) == entry.as_wire()
    validate(options_of(kind, tmp_path), schema)


def test_spec_passes_cores_check(kind: str, tmp_path: Path) -> None:
    rig = Rig(CATALOG.types[kind].cls, options_of(kind, tmp_path))
    spec = rig.spec
    assert spec_from_wire(unpack(pack(spec.as_wire()))) == spec
    assert not spec.features & virtio.F_TRANSPORT, "transport bits are core's"
    assert tuple(rig.device.counters()) == spec.counters
    rig.device.on_pause()
    rig.device.on_resume()
    rig.device.on_reset()
    rig.close()


def test_life(link: FakeLink, nursery: NurseryProcess) -> None:
    link.activate()
    exchange(link)
    link.send(ToWorker.PAUSE)
    link.core.told(ToCore.PAUSED)
    link.send(ToWorker.RESUME)
    exchange(link)
    link.reset()
    link.activate()
    exchange(link)
    assert set(link.call("counters")["ok"]) == set(link.spec.counters)
    assert "has no verb 'dance'" in link.call("dance")["error"]["message"]
    link.send(ToWorker.END)
    assert nursery.told()["status"] == "exit 0"


def test_paused_device_fetches_nothing(link: FakeLink) -> None:
    link.activate()
    exchange(link)
    link.send(ToWorker.PAUSE)
    link.core.told(ToCore.PAUSED)
    heads = [driver.add([bytes(16)], [64]) for driver in link.drivers]
    for driver in link.drivers:
        os.eventfd_write(driver.kick_fd, 1)
        driver.offer()
    link.call("counters")  # the loop has turned
    assert all(driver.used() == [] for driver in link.drivers)
    assert len(heads) == len(link.spec.queues)


def test_ping_is_echoed(link: FakeLink) -> None:
    link.state.ping = 41
    os.eventfd_write(link.eventfds[1], 1)
    link.core.until(lambda: link.state.echo == 41)


def test_steady_state_sends_no_message(link: FakeLink) -> None:
    link.activate()
    exchange(link)
    link.core.messages.clear()
    for _ in range(20):
        exchange(link)
    assert link.core.messages == []


def _head_outside(driver: FakeDriver) -> None:
    driver.raw_offer(driver.size)


def _jump(driver: FakeDriver) -> None:
    driver.put16(driver.avail + 2, 0x8000)


def _loop(driver: FakeDriver) -> None:
    for index in (0, 1):
        driver.put_desc(driver.desc + 16 * index, 0x4000, 16, NEXT, 1 - index)
    driver.raw_offer(0)


def _next_outside(driver: FakeDriver) -> None:
    driver.put_desc(driver.desc, 0x4000, 16, NEXT, 0xFFFF)
    driver.raw_offer(0)


def _wild_address(driver: FakeDriver) -> None:
    driver.put_desc(driver.desc, (1 << 64) - 8, 16, 0, 0)
    driver.raw_offer(0)


def _hole(driver: FakeDriver) -> None:
    driver.put_desc(driver.desc, (16 << 20) - 8, 16, WRITE, 0)
    driver.raw_offer(0)


def _nested_indirect(driver: FakeDriver) -> None:
    table = driver.guest.alloc(32)
    driver.put_desc(table, table, 16, INDIRECT, 0)
    driver.put_desc(driver.desc, table, 16, INDIRECT, 0)
    driver.raw_offer(0)


def _odd_indirect(driver: FakeDriver) -> None:
    driver.put_desc(driver.desc, driver.guest.alloc(32), 17, INDIRECT, 0)
    driver.raw_offer(0)


def _twice(driver: FakeDriver) -> None:
    driver.put_desc(driver.desc, (16 << 20) - 16, 0xFFFFFFFF, WRITE, 0)
    driver.raw_offer(0, 0)


HOSTILE = (_head_outside, _jump, _loop, _next_outside, _wild_address, _hole, _nested_indirect, _odd_indirect,
           _twice)


def test_hostile_rings_end_in_needs_reset(link: FakeLink) -> None:
    for attack in HOSTILE:
        for index in range(len(link.spec.queues)):
            link.activate()
            attack(link.drivers[index])
            os.eventfd_write(link.drivers[index].kick_fd, 1)
            told = link.core.told(ToCore.NEEDS_RESET)
            assert told["reason"].startswith(f"queue {index}: "), (attack, told)
            link.reset()
    link.activate()
    exchange(link)


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize("where", [1 << 40, (1 << 64) - 16, 0x4001, (16 << 20) - 16])
def test_hostile_queue_setup_ends_in_needs_reset(link: FakeLink, part: str, where: int) -> None:
    driver = link.drivers[0]
    bad = {"index": 0, "size": driver.size, "desc": driver.desc, "avail": driver.avail,
           "used": driver.used_ring, part: where}
    link.send(ToWorker.ACTIVATE, epoch=1, features=link.spec.features, queues=[bad])
    link.core.told(ToCore.NEEDS_RESET)
    link.epoch = 1
    link.reset()
    link.activate()
    exchange(link)


def test_next_incarnation_takes_over(link: FakeLink, nursery: NurseryProcess, tmp_path: Path) -> None:
    """A killed worker's successor serves what was pending, under the same epoch."""
    link.activate()
    exchange(link)
    pid = link.core.spawned["pid"]
    os.kill(pid, signal.SIGKILL)
    assert nursery.told()["status"] == "signal 9"
    again = link.core.start(nursery, link.kind, options_of(link.kind, tmp_path), generation=2)
    assert again is link
    link.activate(again=True)
    exchange(link)
    assert link.state.generation == 2


def test_core_that_dies_ends_the_worker(link: FakeLink, nursery: NurseryProcess) -> None:
    link.activate()
    link.core.hang_up()
    assert nursery.told()["status"] == "exit 0"
