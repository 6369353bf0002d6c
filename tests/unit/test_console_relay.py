"""Consoles from afar: everybody sees every byte, who is slow costs nothing and is told so."""

from __future__ import annotations

import asyncio
import base64
import os
import select
import socket
import tty
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cellvisor.controlplane import relay
from cellvisor.core.errors import Conflict, NotFound, UsageError
from cellvisor.core.wire import ports
from cellvisor.core.wire.control import VERBS, check_args
from cellvisor.ctl import attach

SECONDS = 60.0


class Guest:
    """The far end of a pty, and a VM whose first console it is."""

    def __init__(self, generation: int = 1) -> None:
        self.fd, end = os.openpty()
        tty.setraw(end)
        self.path = os.ttyname(end)
        os.close(end)
        os.set_blocking(self.fd, False)
        self.config: dict[str, Any] = {"console": {"mode": "Pty", "file": self.path}}
        vm = SimpleNamespace(config=SimpleNamespace(as_json=lambda: self.config),
                             rundir=SimpleNamespace(name="web", generation=generation))
        self.relay = relay.Relay(vm)  # type: ignore[arg-type]

    async def ask(self, **args: Any) -> dict[str, Any]:
        return await self.relay.serve(check_args(VERBS["console"], args))

    async def type(self, data: bytes, timeout: float = 0.0) -> int:
        text = base64.b64encode(data).decode()
        return int((await self.ask(action="write", data=text, timeout=timeout))["written"])

    def is_watched(self) -> bool:
        """Tell whether anybody has its other end open."""
        poll = select.poll()
        poll.register(self.fd, 0)
        return not any(events & select.POLLHUP for _, events in poll.poll(0))

    async def say(self, data: bytes) -> None:
        """Say all of it: whoever watches has to take it."""
        async with asyncio.timeout(SECONDS):
            while data:
                try:
                    data = data[os.write(self.fd, data):]
                except BlockingIOError:
                    await asyncio.sleep(0)


class Viewer:
    """A client that reads."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self.since, self.seen, self.lost = -1, b"", 0

    async def look(self, timeout: float = 0.0) -> dict[str, Any]:
        answer = await self._guest.ask(since=self.since, timeout=timeout)
        self.since, self.lost = answer["next"], self.lost + answer["lost"]
        self.seen += base64.b64decode(answer["data"])
        return answer

    async def until(self, size: int) -> bytes:
        """Read until it has seen so many bytes."""
        async with asyncio.timeout(SECONDS):
            while len(self.seen) < size:
                await self.look(1.0)
        return self.seen


@contextmanager
def guest(generation: int = 1) -> Iterator[Guest]:
    made = Guest(generation)
    try:
        yield made
    finally:
        os.close(made.fd)


def run(test: Callable[[Guest], Coroutine[Any, Any, None]], generation: int = 1) -> None:
    with guest(generation) as made:
        asyncio.run(test(made))


@asynccontextmanager
async def waiting(viewer: Viewer) -> AsyncIterator[asyncio.Task[dict[str, Any]]]:
    """Have `viewer` wait for a byte."""
    task = asyncio.get_running_loop().create_task(viewer.look(SECONDS))
    await asyncio.sleep(0)
    yield task
    async with asyncio.timeout(SECONDS):
        await task


def test_all_viewers_see_all_and_a_late_one_what_nobody_saw() -> None:
    async def test(guest: Guest) -> None:
        one, two = Viewer(guest), Viewer(guest)
        async with waiting(one), waiting(two):
            await guest.say(b"hello")
        assert (one.seen, two.seen) == (b"hello", b"hello")
        late = Viewer(guest)
        async with waiting(one), waiting(late):
            await guest.say(b" again")
        assert (one.seen, late.seen) == (b"hello again", b" again")
        assert await two.until(11) == b"hello again"
        assert await guest.type(b"\0\x03keys") == 6
        assert os.read(guest.fd, 100) == b"\0\x03keys"
    run(test)


def test_a_slow_viewer_stalls_nobody_and_costs_a_known_amount() -> None:
    data = bytes(range(251)) * ((3 * relay.RING) // 251)

    async def test(guest: Guest) -> None:
        slow, fast = Viewer(guest), Viewer(guest)
        await slow.look()
        port = guest.relay._ports["__console"]
        saying = asyncio.get_running_loop().create_task(guest.say(data))
        async with asyncio.timeout(SECONDS):
            while len(fast.seen) < len(data):
                await fast.look(1.0)
                assert len(port._kept) <= relay.RING
        await saying
        assert fast.seen == data
        assert fast.lost == 0
        answer = await slow.look()
        assert answer["lost"] == len(data) - relay.RING
        assert len(base64.b64decode(answer["data"])) == relay.PIECE
        assert await slow.until(relay.RING) == data[-relay.RING:]
    run(test)


def test_nobody_looks_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "LEASE", 0.01)

    async def test(guest: Guest) -> None:
        viewer = Viewer(guest)
        await guest.ask()
        async with asyncio.timeout(SECONDS):
            while guest.is_watched():
                await asyncio.sleep(0.01)
        fd = os.open(guest.path, os.O_RDWR | os.O_NOCTTY)
        os.close(fd)
        async with waiting(viewer) as task:
            await asyncio.sleep(0.1)
            assert not task.done()
            assert guest.is_watched(), "as long as somebody waits"
            await guest.say(b"x")
        assert viewer.seen == b"x"
    run(test)


def test_one_at_a_time_here_and_afar() -> None:
    async def test(guest: Guest) -> None:
        fd = ports.take(("pty", guest.path))
        with pytest.raises(Conflict, match="somebody on its own machine is attached"):
            await guest.ask()
        os.close(fd)
        await guest.ask(timeout=0)
        with pytest.raises(Conflict, match="somebody else is attached"):
            attach.attach("pty", guest.path)
    run(test)


def test_keys_that_the_guest_does_not_take_stay_with_who_typed_them() -> None:
    async def test(guest: Guest) -> None:
        sent = 0
        async with asyncio.timeout(SECONDS):
            while taken := await guest.type(b"k" * 1000):
                sent += taken
        assert sent < 1 << 20
        task = asyncio.get_running_loop().create_task(guest.type(b"z", SECONDS))
        got = b""
        async with asyncio.timeout(SECONDS):
            while len(got) <= sent:
                with suppress(BlockingIOError):
                    got += os.read(guest.fd, 4096)
                await asyncio.sleep(0)
            assert await task == 1
        assert got == b"k" * sent + b"z"
        with pytest.raises(UsageError, match="not base64"):
            await guest.ask(action="write", data="?")
    run(test)


def test_a_console_that_ends_is_told_to_who_waits(tmp_path: Path) -> None:
    path = str(tmp_path / "console")

    async def test(guest: Guest) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            guest.config = {"serial": {"mode": "Socket", "socket": path}}
            viewer = Viewer(guest)
            async with waiting(viewer) as task:
                with listener.accept()[0] as end:
                    end.sendall(b"bye")
                    await task
                    assert viewer.seen == b"bye"
                    again = asyncio.get_running_loop().create_task(viewer.look(SECONDS))
                    await asyncio.sleep(0)
            async with asyncio.timeout(SECONDS):
                assert (await again)["closed"]
        with pytest.raises(NotFound, match=r"console: .*refused"):
            await guest.ask()
        guest.config = {}
        with pytest.raises(NotFound, match="web: console is neither a pty nor a socket"):
            await guest.ask()
    run(test)


def test_a_vm_that_is_booted_anew_has_another_pty() -> None:
    async def test(first: Guest) -> None:
        with guest() as second:
            viewer = Viewer(first)
            async with waiting(viewer):
                await first.say(b"one")
            first.config = second.config
            assert not (await viewer.look())["data"]
            await second.say(b"two")
            assert await viewer.until(6) == b"onetwo"
            assert not first.is_watched()
    run(test)


def test_a_successor_takes_nobody_at_his_predecessors_word() -> None:
    async def test(guest: Guest) -> None:
        viewer = Viewer(guest)
        viewer.since = relay.PER_GENERATION + 77
        async with waiting(viewer):
            await guest.say(b"on")
        assert (viewer.seen, viewer.lost, viewer.since) == (b"on", 0, 2 * relay.PER_GENERATION + 2)
    run(test, generation=2)
