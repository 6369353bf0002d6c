"""The verb table and its ZeroMQ server: same id, same answer; whatever clients send, it goes on serving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from cellvisor.controlplane.api import Api
from cellvisor.controlplane.desk import Desk
from cellvisor.controlplane.events import EventLog
from cellvisor.controlplane.rundir import RunDir, claim
from cellvisor.core.errors import Conflict, UsageError
from cellvisor.core.wire import control, places
from cellvisor.core.wire.control import VERBS, Request, parse_request, request
from cellvisor.core.wire.messages import pack, unpack

JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.floats() | st.text() | st.binary(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


def test_table_is_consistent() -> None:
    assert all(verb.alias in VERBS or not verb.alias for verb in VERBS.values())
    paths = [verb.path for verb in VERBS.values() if verb.path]
    assert len(paths) == len(set(paths))
    ready = {verb.name for verb in VERBS.values() if verb.ready}
    assert ready >= {"ping", "info", "pause", "resume", "reset", "power-button", "shutdown", "events", "devices"}


def test_defaults_and_aliases() -> None:
    assert parse_request(request("1", "info", {})) == Request("1", "info", {"processes": False})
    assert parse_request(request("1", "reboot", {})).verb == "reset"


@pytest.mark.parametrize(("change", "code", "message"), [
    ({"v": 2}, "bad-version", "v is missing or not 1"),
    ({"v": True}, "bad-version", "v is"),
    ({"id": 7}, "bad-request", "id is missing"),
    ({"id": ""}, "bad-request", "id is missing"),
    ({"id": "x" * 65}, "bad-request", "id is missing"),
    ({"more": 1}, "bad-request", "unknown key 'more'"),
    ({"verb": "pnig"}, "unknown-verb", "unknown verb 'pnig' .did you mean ping"),
    ({"verb": ["ping"]}, "unknown-verb", "unknown verb"),
    ({"verb": "snapshot"}, "not-supported", "snapshot: not supported yet"),
    ({"args": []}, "bad-request", "ping: list instead of an object"),
    ({"args": {"x": 1}}, "bad-request", "ping: unknown key 'x'"),
    ({"verb": "events", "args": {"since": -1}}, "bad-request", "events: since=-1 is below 0"),
    ({"verb": "info", "args": {"processes": 1}}, "bad-request", "info: processes=1"),
])
def test_refusals(change: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_request({**request("1", "ping", {}), **change})
    assert caught.value.code == code


@given(st.dictionaries(st.sampled_from(["v", "id", "verb", "args", "x"]) | st.text(), JSON))
def test_no_request_does_more_than_fail(body: dict[str, Any]) -> None:
    try:
        parse_request(body)
    except UsageError as error:
        pack(control.reply(control.request_id(body), error))


@settings(max_examples=200)
@given(st.sampled_from(sorted(VERBS)), st.dictionaries(st.sampled_from(["since", "processes"]), JSON))
def test_no_arguments_do_more_than_fail(verb: str, args: dict[str, Any]) -> None:
    try:
        parse_request(request("1", verb, args))
    except UsageError as error:
        pack(control.reply("1", error))


class Rig:
    """An Api with a handler of the test, and a client that speaks raw frames."""

    def __init__(self, rundir: RunDir, serve: Callable[[Request], Coroutine[Any, Any, Any]]) -> None:
        self.context = zmq.asyncio.Context()
        self.events = EventLog()
        self.api = Api(self.context, rundir, self.events, Desk(serve))
        self.rundir = rundir
        self._made: list[zmq.asyncio.Socket] = []

    def connect(self, kind: int, name: str = places.API) -> zmq.asyncio.Socket:
        sock = self.context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(f"ipc://{self.rundir.file(name)}")
        self._made.append(sock)
        return sock

    async def ask(self, sock: zmq.asyncio.Socket, body: dict[str, Any]) -> dict[str, Any]:
        await sock.send(pack(body))
        return unpack(await asyncio.wait_for(sock.recv(), 10))

    async def close(self) -> None:
        await self.api.close()
        for sock in self._made:
            sock.close()
        self.context.destroy(linger=0)


def run(tmp_path: Path, serve: Callable[[Request], Coroutine[Any, Any, Any]],
        body: Callable[[Rig], Coroutine[Any, Any, None]]) -> None:
    async def inside() -> None:
        rundir = claim("api", str(tmp_path))
        rig = Rig(rundir, serve)
        try:
            await body(rig)
        finally:
            await rig.close()
            rundir.remove()
    asyncio.run(inside())


def test_the_same_request_twice_gives_the_same_answer(tmp_path: Path) -> None:
    calls = []

    async def serve(what: Request) -> dict[str, Any]:
        calls.append(what)
        await asyncio.sleep(0.05)
        if what.verb == "pause":
            raise Conflict("paused already")
        return {"count": len(calls)}

    async def body(rig: Rig) -> None:
        one, two = rig.connect(zmq.DEALER), rig.connect(zmq.DEALER)
        asked = request("a", "reset", {})
        first, second = await asyncio.gather(rig.ask(one, asked), rig.ask(two, asked))
        assert first == second == await rig.ask(one, asked) == {"v": 1, "id": "a", "ok": {"count": 1}}
        refused = request("b", "pause", {})
        assert (await rig.ask(one, refused)) == (await rig.ask(two, refused))
        assert len(calls) == 2
        other = await rig.ask(one, request("a", "resume", {}))
        assert other["error"]["status"] == 409
        assert "'a' was used for another request" in other["error"]["message"]
        assert (await rig.ask(one, request("c", "reset", {})))["ok"] == {"count": 3}
        for count in (4, 5):  # nothing is kept of what changes nothing
            assert (await rig.ask(one, request("d", "info", {})))["ok"] == {"count": count}

    run(tmp_path, serve, body)


def test_hostile_bytes_do_not_stop_it(tmp_path: Path) -> None:
    async def serve(what: Request) -> Any:
        if what.verb == "info":
            raise RuntimeError("a bug")
        return {"huge": 2**70} if what.verb == "devices" else {}

    async def body(rig: Rig) -> None:
        sock = rig.connect(zmq.DEALER)
        for data in (b"", b"\xc1", b"\x93\x01\x02\x03", b"\xdf\xff\xff\xff\xff", b"\x81" * 2000, b"\xff" * 100,
                     pack({"v": 1, "id": "x", "verb": "ping", "args": {"a": {"b": [1] * 5000}}})):
            await sock.send(data)
            answer = unpack(await asyncio.wait_for(sock.recv(), 10))
            assert answer["error"]["status"] == 400, data[:10]
        for frames in ([b"a", b"b", b"c"], [b""] * 5, [b"x"] * 100):
            await sock.send_multipart(frames)  # dropped without an answer
        giant = rig.connect(zmq.DEALER)
        await giant.send(b"\0" * (5 << 20))  # above MAXMSGSIZE: hung up on
        gone = rig.connect(zmq.DEALER)
        for number in range(300):
            await gone.send(pack(request(f"gone{number}", "ping", {})))
        gone.close()  # answers have nowhere to go
        assert (await rig.ask(sock, request("1", "info", {})))["error"]["status"] == 500
        assert (await rig.ask(sock, request("2", "devices", {})))["error"]["status"] == 500
        assert (await rig.ask(sock, request("3", "ping", {})))["ok"] == {}

    run(tmp_path, serve, body)


def test_a_req_socket_works_too(tmp_path: Path) -> None:
    async def serve(what: Request) -> Any:
        return what.verb

    async def body(rig: Rig) -> None:
        sock = rig.connect(zmq.REQ)
        assert (await rig.ask(sock, request("1", "ping", {})))["ok"] == "ping"

    run(tmp_path, serve, body)


def test_too_many_at_once_are_told_to_come_back(tmp_path: Path) -> None:
    release: asyncio.Event | None = None

    async def serve(what: Request) -> Any:
        assert release is not None
        await release.wait()
        return {}

    async def body(rig: Rig) -> None:
        nonlocal release
        release = asyncio.Event()
        sock = rig.connect(zmq.DEALER)
        for number in range(300):
            await sock.send(pack(request(f"{number}", "ping", {})))
        busy = [unpack(await asyncio.wait_for(sock.recv(), 10)) for _ in range(300 - 256)]
        assert {answer["error"]["status"] for answer in busy} == {429}
        release.set()
        done = [unpack(await asyncio.wait_for(sock.recv(), 10)) for _ in range(256)]
        assert all(answer["ok"] == {} for answer in done)

    run(tmp_path, serve, body)


def test_events_are_published_and_kept(tmp_path: Path) -> None:
    async def serve(what: Request) -> Any:
        return {}

    async def body(rig: Rig) -> None:
        sock = rig.connect(zmq.SUB, places.EVENTS)
        sock.setsockopt(zmq.SUBSCRIBE, b"vm.")
        while not await sock.poll(20):
            rig.events.emit("vm.tick", name="x")
        topic, data = await sock.recv_multipart()
        event = unpack(data)
        assert (topic, event["event"], event["properties"]) == (b"vm.tick", "vm.tick", {"name": "x"})
        kept = [one.seq for one in rig.events.since(0)]
        assert event["seq"] in kept
        assert rig.events.since(kept[-1]) == []

    run(tmp_path, serve, body)
