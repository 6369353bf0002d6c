"""The next incarnation of each device type, as a real process: what it settles, when, and how it tells the guest."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.abi import virtio
from cellvisor.core.wire.messages import ToCore, ToWorker
from tests.fakes.core import FakeCore, FakeLink, NurseryProcess, gone

OUT, IN = virtio.BLK_T_OUT, virtio.BLK_T_IN


@pytest.fixture
def core(tmp_path: Path) -> Iterator[FakeCore]:
    with FakeCore(tmp_path) as core:
        yield core


@pytest.fixture
def nursery(core: FakeCore) -> Iterator[NurseryProcess]:
    with NurseryProcess(core.run_dir) as nursery:
        yield nursery


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


def header(kind: int, sector: int = 0) -> bytes:
    return bytes(virtio.BLK_REQUEST.pack(kind, 0, sector))


def die(core: FakeCore, nursery: NurseryProcess) -> None:
    """Kill the present worker."""
    os.kill(core.spawned["pid"], signal.SIGKILL)
    assert nursery.told()["status"] == "signal 9"


def serve_for(core: FakeCore, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        core.serve()


def test_one_interrupt_per_queue_even_if_nothing_is_left(core: FakeCore, nursery: NurseryProcess,
                                                         image: Path) -> None:
    options = {"path": str(image), "num_queues": 2}
    link = core.start(nursery, "blk", options)
    link.activate()
    assert link.request([header(IN)], [512, 1])[-1] == virtio.BLK_S_OK
    for driver in link.drivers:
        driver.interrupts()
    die(core, nursery)
    core.start(nursery, "blk", options, generation=2)
    link.activate(again=True)
    link.call("counters")
    assert [driver.interrupts() for driver in link.drivers] == [1, 1]


def test_what_was_offered_while_nobody_listened_is_served(core: FakeCore, nursery: NurseryProcess, image: Path) -> None:
    """The kick was read by the one that died, or never written: the successor looks by itself, and is kicked later."""
    link = core.start(nursery, "blk", {"path": str(image)})
    link.activate()
    link.call("counters")
    die(core, nursery)
    driver = link.drivers[0]
    head = driver.add([header(OUT), b"y" * 512], [1])
    driver.offer()
    driver.kicks()
    core.start(nursery, "blk", {"path": str(image)}, generation=2)
    link.activate(again=True)
    assert link.used(1) == {head: 1}
    again = driver.add([header(IN)], [512, 1])
    assert driver.offer(), "event-idx was not armed again: the driver would not kick"
    assert link.used(1) == {again: 513}


def test_a_successor_is_quiet_until_resume(core: FakeCore, nursery: NurseryProcess, image: Path) -> None:
    link = core.start(nursery, "blk", {"path": str(image)})
    link.activate()
    link.call("counters")
    die(core, nursery)
    driver = link.drivers[0]
    head = driver.add([header(OUT), b"y" * 512], [1])
    driver.offer()
    core.start(nursery, "blk", {"path": str(image)}, generation=2)
    before = core.guest.ram[:]
    link.activate(again=True, paused=True)
    link.send(ToWorker.PAUSE)
    core.told(ToCore.PAUSED)
    serve_for(core, 0.2)
    assert core.guest.ram[:] == before
    assert driver.interrupts() == 0
    link.send(ToWorker.RESUME)
    assert link.used(1) == {head: 1}


def test_a_reset_instead_of_the_resume(core: FakeCore, nursery: NurseryProcess, image: Path) -> None:
    link = core.start(nursery, "blk", {"path": str(image)})
    link.activate()
    die(core, nursery)
    core.start(nursery, "blk", {"path": str(image)}, generation=2)
    link.activate(again=True, paused=True)
    link.reset()
    link.send(ToWorker.RESUME)
    link.activate()
    assert link.request([header(IN)], [512, 1])[-1] == virtio.BLK_S_OK


def test_a_drained_disk_fails_all_until_the_reset_and_ends(core: FakeCore, nursery: NurseryProcess,
                                                           image: Path) -> None:
    link = core.start(nursery, "blk", {"path": str(image)})
    link.activate()
    assert link.request([header(OUT), b"x" * 512], [1]) == bytes([virtio.BLK_S_OK])
    die(core, nursery)
    image.unlink()  # whatever it was given up for
    waiting = [link.drivers[0].add([header(kind), *data], room) for kind, data, room in
               ((OUT, [b"y" * 512], [1]), (IN, [], [512, 1]), (virtio.BLK_T_FLUSH, [], [1]))]
    link.drivers[0].offer()
    core.start(nursery, "blk", {"path": str(image)}, generation=2, drain=True)
    link.activate(again=True)
    assert link.used(3) == dict.fromkeys(waiting, 1)
    statuses = [link.drivers[0].data(head)[-1] for head in waiting]
    assert statuses == [virtio.BLK_S_IOERR] * 3
    assert link.request([header(IN)], [512, 1])[:1] != b""
    assert link.call("counters")["ok"] == {"drained": 4}
    assert "given up" in link.call("resize")["error"]["message"]
    link.reset()
    assert nursery.told()["status"] == "exit 0"
    assert gone(core.spawned["pid"])


def drain(core: FakeCore, nursery: NurseryProcess, kind: str, options: dict[str, str]) -> FakeLink:
    link = core.start(nursery, kind, options)
    link.activate()
    link.call("counters")
    die(core, nursery)
    core.start(nursery, kind, options, generation=2, drain=True)
    link.activate(again=True)
    return link


def test_a_drained_rng_gives_nothing(core: FakeCore, nursery: NurseryProcess) -> None:
    link = drain(core, nursery, "rng", {"src": "/dev/urandom"})
    assert link.request([], [16]) == b""


def test_a_drained_console_swallows_and_keeps_the_input_buffers(core: FakeCore, nursery: NurseryProcess,
                                                                tmp_path: Path) -> None:
    link = drain(core, nursery, "console", {"mode": "file", "file": str(tmp_path / "out")})
    link.drivers[0].add([], [64])
    link.drivers[0].offer()
    head = link.drivers[1].add([b"into the void"])
    link.drivers[1].offer()
    assert link.used(1, 1) == {head: 0}
    serve_for(core, 0.1)
    assert link.drivers[0].used() == []
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize("cut", [1, 5, 13])
def test_a_console_s_file_goes_on_where_it_was(core: FakeCore, nursery: NurseryProcess, tmp_path: Path,
                                               cut: int) -> None:
    """Killed before the file had all bytes of a line, whatever the progress says: the file's size tells."""
    out, text = tmp_path / "out", b"hello from hvc0\n"
    options = {"mode": "file", "file": str(out)}
    link = core.start(nursery, "console", options)
    link.activate()
    assert link.request([text], [], 1) == b""
    die(core, nursery)
    head = link.drivers[1].add([text])
    link.drivers[1].offer()
    core.start(nursery, "console", options, generation=2)
    link.activate(again=True)
    assert link.used(1, 1) == {head: 0}
    assert out.read_bytes() == text * 2
    # The next incarnation finds the head executing again with part of it in the file, as if killed in write(2).
    die(core, nursery)
    queue = link.drivers[1].queue(1, epoch=link.epoch, state=link.state)
    assert queue.recover() == []
    head = link.drivers[1].add([text])
    link.drivers[1].offer()
    (chain,) = queue.harvest()
    queue.begin(chain)
    link.state.save_private(chain.counter.to_bytes(8, "little") + (2 * len(text)).to_bytes(8, "little"), 1)
    with out.open("ab") as file:
        file.write(text[:cut])
    queue.progress(chain, len(text))
    queue.close()
    core.start(nursery, "console", options, generation=3)
    link.activate(again=True)
    assert link.used(1, 1) == {head: 0}
    assert out.read_bytes() == text * 3
