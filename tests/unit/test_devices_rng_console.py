"""virtio-rng and virtio-console against a fake driver."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.abi.virtio import CONSOLE_CONFIG
from cellvisor.core.errors import RingError, UsageError
from cellvisor.devices.virtio.console import RX, TX, Console
from cellvisor.devices.virtio.rng import MAX_REQUEST, Rng
from tests.fakes.host import Rig


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def rig(stack: ExitStack, cls: type[Any], options: dict[str, Any], **more: Any) -> Rig:
    return stack.enter_context(closing(Rig(cls, options, **more)))


# --- rng


def test_rng_fills_buffers_from_its_source(stack: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(b"?" + bytes(range(100)))
    device = rig(stack, Rng, {"src": str(tmp_path / "src")})
    assert device.request([], [3, 20]) == bytes(range(23))
    assert device.length == 23
    assert device.device.counters() == {"bytes": 23, "requests": 1}


def test_rng_default_source_is_random(stack: ExitStack) -> None:
    device = rig(stack, Rng, {})
    assert len(set(device.request([], [4096]))) > 200


def test_rng_caps_a_request(stack: ExitStack) -> None:
    device = rig(stack, Rng, {})
    head = device.drivers[0].add([], [1 << 20, 1 << 20])
    device.kick()
    ((used, length),) = device.drivers[0].used()
    assert (used, length) == (head, MAX_REQUEST)


def test_rng_takes_a_request_without_room(stack: ExitStack) -> None:
    device = rig(stack, Rng, {})
    device.request([b"not for writing"], [])
    assert device.length == 0


def test_rng_waits_for_a_dry_source(stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    keep = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    device = rig(stack, Rng, {"src": str(path)})
    heads = [device.drivers[0].add([], [8]) for _ in range(2)]
    device.kick()
    assert device.drivers[0].used() == []
    os.write(keep, b"abcdefghABCDEFGH")
    done: dict[int, int] = {}
    device.until(lambda: done.update(device.drivers[0].used()) or len(done) == 2)
    assert done == {heads[0]: 8, heads[1]: 8}
    assert device.drivers[0].data(heads[0]) == b"abcdefgh"
    os.close(keep)


def test_rng_that_was_reset_forgets_what_waits(stack: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(b"?")
    device = rig(stack, Rng, {"src": str(tmp_path / "src")})
    device.drivers[0].add([], [8])
    device.kick()
    device.device.on_reset()
    device.host.reactor.turn(0.3)
    assert device.host.kicked == {0}
    device.device.on_queue(0, device.host.queues[0])
    assert device.drivers[0].used() == []


@pytest.mark.parametrize(("src", "why"), [("/nowhere", "No such file"), ("/", "Is a directory")])
def test_rng_names_a_source_that_cannot_be_read(stack: ExitStack, src: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"src={src}: {why}"):
        rig(stack, Rng, {"src": src})


# --- console


def test_console_output_goes_to_a_file(stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "log"
    device = rig(stack, Console, {"file": str(path)})
    assert device.request([b"hello ", b"world\n", b"x" * 9000], [], TX) == b""
    assert path.read_bytes() == b"hello world\n" + b"x" * 9000
    assert device.device.counters()["write_bytes"] == 9012


@pytest.mark.parametrize("mode", ["off", "null"])
def test_console_output_goes_nowhere(stack: ExitStack, mode: str) -> None:
    device = rig(stack, Console, {"mode": mode})
    device.request([b"x"], [], TX)
    device.drivers[RX].add([], [8])
    device.kick(RX)
    assert device.drivers[RX].used() == []


def test_console_on_a_pty_both_ways(stack: ExitStack) -> None:
    device = rig(stack, Console, {"mode": "pty"})
    path = device.device.call("where", {})["path"]
    device.request([b"login: "], [], TX)
    slave = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    stack.callback(os.close, slave)
    seen = bytearray()

    def shown() -> bool:
        with suppress(BlockingIOError):
            seen.extend(os.read(slave, 100))
        return bytes(seen) == b"login: "

    device.until(shown)
    os.write(slave, b"before any room")
    head = device.drivers[RX].add([], [4])
    more = device.drivers[RX].add([], [100])
    device.kick(RX)
    done: dict[int, int] = {}
    device.until(lambda: done.update(device.drivers[RX].used()) or len(done) == 2)
    got = device.drivers[RX].data(head, done[head]) + device.drivers[RX].data(more, done[more])
    assert got == b"before any room"


def test_console_goes_on_in_the_next_incarnation(stack: ExitStack) -> None:
    first = rig(stack, Console, {"mode": "pty"})
    path = first.device.call("where", {})["path"]
    second = rig(stack, Console, {"mode": "pty"}, store={"pty": os.dup(first.host.store["pty"])}, generation=2)
    assert second.device.call("where", {})["path"] == path


def test_console_resumes_after_the_bytes_that_left(stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "s"
    device = rig(stack, Console, {"socket": str(path)})
    client = stack.enter_context(socket.socket(socket.AF_UNIX))
    client.connect(str(path))
    device.until(lambda: "client" in device.host.store)
    total = b"".join(b"%09d\n" % number for number in range(300000))  # 3 MB: more than a socket takes
    head = device.drivers[TX].add([total], [])
    device.kick(TX)
    assert device.drivers[TX].used() == [], "the socket took everything: make the request bigger"
    device.host.queues[TX].close()
    queue = device.drivers[TX].queue(TX, epoch=1, state=device.state)
    (chain,) = queue.recover()
    assert 0 < chain.resume < len(total)
    queue.requeue([chain])
    device.host.queues[TX] = queue
    device.device.on_reset()  # what a new process would not know either
    got = bytearray()
    client.setblocking(False)

    def drained() -> bool:
        device.host.kicked.add(TX)
        with suppress(BlockingIOError):
            got.extend(client.recv(1 << 20))
        return len(got) >= len(total)

    device.until(drained)
    assert bytes(got) == total
    device.until(lambda: device.drivers[TX].used() == [(head, 0)])


def test_console_pauses_input(stack: ExitStack) -> None:
    device = rig(stack, Console, {"mode": "pty"})
    slave = os.open(device.device.call("where", {})["path"], os.O_RDWR | os.O_NOCTTY)
    stack.callback(os.close, slave)
    head = device.drivers[RX].add([], [100])
    device.kick(RX)
    device.device.on_pause()
    os.write(slave, b"typed")
    for _ in range(5):
        device.host.reactor.turn(0.1)
    assert device.drivers[RX].used() == []
    device.device.on_resume()
    done: dict[int, int] = {}
    device.until(lambda: done.update(device.drivers[RX].used()) or done)
    assert done == {head: 5}


def test_console_takes_the_users_terminal(stack: ExitStack) -> None:
    master, slave = os.openpty()
    stack.callback(os.close, master)
    stack.callback(os.close, slave)
    device = rig(stack, Console, {}, store={"tty": os.dup(slave)})
    device.request([b"raw\n"], [], TX)
    assert os.read(master, 100) == b"raw\r\n"
    assert CONSOLE_CONFIG.unpack(device.spec.config)[:2] == (80, 25)


def test_console_resize_is_published(stack: ExitStack) -> None:
    device = rig(stack, Console, {"mode": "null"})
    device.device.call("resize", {"columns": 132, "rows": 50})
    assert CONSOLE_CONFIG.unpack(device.host.configs[-1])[:2] == (132, 50)
    for bad in ({}, {"columns": 0, "rows": 1}, {"columns": 70000, "rows": 1}, {"columns": "a", "rows": 1}):
        with pytest.raises(UsageError, match="are no size"):
            device.device.call("resize", bad)
    with pytest.raises(UsageError, match="no verb 'dance'"):
        device.device.call("dance", {})


def test_console_refuses_an_input_buffer_that_is_not_writable(stack: ExitStack) -> None:
    device = rig(stack, Console, {"mode": "null"})
    device.drivers[RX].add([b"x"], [])
    with pytest.raises(RingError):
        device.kick(RX)


def test_console_refuses_two_places(stack: ExitStack) -> None:
    with pytest.raises(UsageError, match="together"):
        rig(stack, Console, {"file": "/a", "socket": "/b"})
