"""The HTTP server: whatever a client sends, does not send or does not read, the others are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellvisor.controlplane import http, httpsocket, routes
from cellvisor.controlplane.desk import Desk
from cellvisor.core.errors import CellvisorError, Conflict, NotFound, TryAgain, UsageError
from cellvisor.core.wire.control import Request
from tests.fakes import ch_remote

PING = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"


class Server:
    """HttpApi on a loop in a thread of its own, as the controlplane has it; `serving` counts what was asked."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.asked: list[Request] = []
        self.release = threading.Event()
        self._api: http.HttpApi | None = None
        self._loop = uvloop.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,))
        self._thread.start()
        assert ready.wait(30)

    def _run(self, ready: threading.Event) -> None:
        async def start() -> None:
            self._api = http.HttpApi(*httpsocket.listen(self.path), Desk(self._serve))
            ready.set()

        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(start())
        self._loop.run_forever()

    async def _serve(self, request: Request) -> Any:
        self.asked.append(request)
        if request.verb == "pause":
            while not self.release.is_set():
                await asyncio.sleep(0.005)
        if request.verb == "resume":
            raise Conflict("resume: the VM is running", hint="only a paused VM resumes")
        if request.verb == "nmi":
            raise RuntimeError("a bug")
        return {"text": "ä€" * 200_000} if request.verb == "info" else {"verb": request.verb, "args": request.args}

    def connections(self) -> int:
        assert self._api is not None
        return len(self._api._open)

    def stop(self) -> None:
        async def close() -> None:
            assert self._api is not None
            await self._api.close()
            self._api.release()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(str(tmp_path / "http.sock"))
    yield server
    server.stop()
    assert not os.path.exists(server.path)


@contextlib.contextmanager
def raw(server: Server, data: bytes = b"") -> Iterator[socket.socket]:
    with ch_remote.connect(server.path) as sock:
        if data:
            sock.sendall(data)
        yield sock


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def exchange(server: Server, data: bytes) -> tuple[int, str | None]:
    with raw(server, data) as sock:
        return ch_remote.receive(sock)


def head_of(server: Server, data: bytes) -> str:
    with raw(server, data) as sock:
        seen = b""
        while b"\r\n\r\n" not in seen:
            seen += sock.recv(4096)
        return seen.partition(b"\r\n\r\n")[0].decode()


def put(path: str, body: bytes, *more: bytes) -> bytes:
    head = b"PUT /api/v1/%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % (path.encode(), len(body))
    return head + b"".join(line + b"\r\n" for line in more) + b"\r\n" + body


def test_as_ch_remote_speaks(server: Server) -> None:
    answer = ch_remote.call(server.path, "GET", "vmm.ping")
    assert answer is not None
    assert json.loads(answer)["verb"] == "ping"
    assert ch_remote.call(server.path, "PUT", "vm.power-button") is None
    big = ch_remote.call(server.path, "GET", "vm.info")  # every piece of 256 bytes is UTF-8
    assert big is not None
    assert json.loads(big)["text"] == "ä€" * 200_000
    with pytest.raises(ch_remote.Failed) as caught:
        ch_remote.call(server.path, "PUT", "vm.resume")
    assert caught.value.status == 409
    assert json.loads(caught.value.body or "") == ["resume: the VM is running", "only a paused VM resumes"]


def test_the_letters_of_the_head(server: Server) -> None:
    lines = head_of(server, PING).split("\r\n")
    assert lines[0] == "HTTP/1.1 200 "  # ch-remote wants a number and nothing else there
    assert "Content-Type: application/json" in lines
    assert any(line.startswith("Content-Length: ") for line in lines)
    assert not any("chunked" in line for line in lines)
    lines = head_of(server, b"PUT /api/v1/vm.reboot HTTP/1.1\r\nHost: x\r\n\r\n").split("\r\n")
    assert lines[0] == "HTTP/1.1 204 "
    assert not any("Content" in line for line in lines)
    lines = head_of(server, b"PUT /api/v1/vm.resume HTTP/1.1\r\nHost: x\r\n\r\n").split("\r\n")
    assert "X-Cellvisor-Error: conflict" in lines


def test_keep_alive_and_pipelining(server: Server) -> None:
    with raw(server) as sock:
        for _ in range(5):
            sock.sendall(PING)
            assert ch_remote.receive(sock)[0] == 200
        sock.sendall(b"PUT /api/v1/vm.reboot HTTP/1.1\r\nHost: x\r\n\r\n" * 20 + PING[:30])
        seen = b""
        while seen.count(b"HTTP/1.1 204 ") < 20:
            seen += sock.recv(65536)
        sock.sendall(PING[30:])
        assert ch_remote.receive(sock)[0] == 200
    assert len(server.asked) == 26


@pytest.mark.parametrize("data", [
    b"GET /api/v1/vmm.ping HTTP/1.0\r\n\r\n", PING.replace(b"Accept: */*", b"Connection: close")])
def test_it_closes_when_asked_to(server: Server, data: bytes) -> None:
    with raw(server, data) as sock:
        seen = b""
        while piece := sock.recv(65536):
            seen += piece
    assert seen.startswith(b"HTTP/1.1 200 ")
    assert b"close" in seen.partition(b"\r\n\r\n")[0]


def test_head_gets_no_body(server: Server) -> None:
    head = head_of(server, b"HEAD /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n")
    assert head.startswith("HTTP/1.1 400 ")


def test_bodies_up_to_4_mib(server: Server) -> None:
    text = "x" * ((4 << 20) - 10)
    body = json.dumps({"a": text}).encode()
    assert len(body) == (4 << 20) - 1
    assert exchange(server, put("vm.create", body)) == (204, None)
    assert server.asked[-1].args["a"] == text
    for data in (put("vm.create", body + b"  "),
                 b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"):
        status, answer = exchange(server, data)
        assert status == 400
        assert "at most 4194304" in str(answer)
    chunk = b"%x\r\n%s\r\n" % (1 << 20, b" " * (1 << 20))
    status, answer = exchange(server, b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                              + chunk * 5)
    assert (status, "at most 4194304" in str(answer)) == (400, True)
    assert len(server.asked) == 1


def test_chunked_and_expected_bodies(server: Server) -> None:
    data = (b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"6\r\n{\"a\": \r\n2\r\n1}\r\n0\r\n\r\n")
    assert exchange(server, data) == (204, None)
    assert server.asked[-1].args == {"a": 1}
    with raw(server, b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
                     b"Content-Length: 2\r\n\r\n") as sock:
        assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"{}")
        assert ch_remote.receive(sock)[0] == 204


@pytest.mark.parametrize(("data", "status", "words"), [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "not HTTP"),
    (b"GET\r\n\r\n", 400, "not HTTP"),
    (b"GET / HTTP/1.1\r\n\r\n", 400, "Host"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "not HTTP"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "not HTTP"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20000, 400, "not HTTP"),
    (b"GET /api/v1/vm.infos HTTP/1.1\r\nHost: x\r\n\r\n", 404, "did you mean /api/v1/vm.info?"),
    (b"GET /api/v2/vm.info HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no path '/api/v2/vm.info'"),
    (b"PUT /api/v1/vm.info HTTP/1.1\r\nHost: x\r\n\r\n", 400, "the method is GET"),
    (b"DELETE /api/v1/vm.delete HTTP/1.1\r\nHost: x\r\n\r\n", 400, "the method is PUT"),
    (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no path"),
    (put("vm.reboot", b"{}"), 400, "takes no body"),
    (put("vm.create", b"{"), 400, "is not JSON"),
    (put("vm.create", b"[]"), 400, "list instead of an object"),
    (put("vm.create", b'{"a": NaN}'), 400, "NaN is no number"),
    (put("vm.create", b'{"a": "\\ud800"}'), 400, "is not JSON"),
    (put("vm.create", b"\xff\xfe"), 400, "is not JSON"),
    (put("vm.create", b'{"a":' * 30000 + b"1" + b"}" * 30000), 400, "JSON"),
    (put("vm.create", b'{"a":' * 70 + b"1" + b"}" * 70), 400, "nested more than 64 deep"),
    (put("vm.create", b'{"a": ' + b"9" * 5000 + b"}"), 400, "is not JSON"),
    (put("vm.resize-disk", b'{"id": "a", "desired_size": 18446744073709551616}'), 400, "out of range"),
    (put("vm.resize-disk", b'{"id": "a", "size": 1}'), 400, "unknown key 'size'"),
    (put("vm.snapshot", b"{}"), 400, "snapshot: not supported yet"),
    (put("vm.create", b"{}", b"X-Cellvisor-Request: " + b"x" * 65), 400, "a request id of 65 characters"),
    (b"GET /api/v1/vm.events?since=x HTTP/1.1\r\nHost: x\r\n\r\n", 400, "since=x is not a whole number"),
    (b"GET /api/v1/vm.info?%ff=1 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "query"),
    (b"PUT /api/v1/vm.nmi HTTP/1.1\r\nHost: x\r\n\r\n", 500, "RuntimeError: a bug"),
])
def test_refusals(server: Server, data: bytes, status: int, words: str) -> None:
    found, body = exchange(server, data)
    assert found == status
    chain = json.loads(body or "")
    assert all(isinstance(entry, str) for entry in chain)
    assert words in " ".join(chain)
    assert exchange(server, PING)[0] == 200


def test_queries_of_ours(server: Server) -> None:
    status, body = exchange(server, b"GET /api/v1/vm.events?since=7 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, json.loads(body or "")["args"]) == (200, {"since": 7})


def test_the_same_request_id_twice_gives_the_same_answer(server: Server) -> None:
    for _ in range(2):
        assert exchange(server, put("vm.create", b"{}", b"X-Cellvisor-Request: one"))[0] == 204
    assert exchange(server, put("vm.create", b'{"a": 1}', b"X-Cellvisor-Request: one"))[0] == 409
    assert len(server.asked) == 1


def test_silent_slow_and_half_open_clients_stall_nobody(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(http.MAX_CONNECTIONS - 2):
            stack.enter_context(raw(server, PING[: number % 40]))
        reader = stack.enter_context(raw(server, PING.replace(b"vmm.ping", b"vm.info") * 5))  # reads nothing
        wait_for(lambda: server.connections() == http.MAX_CONNECTIONS - 1)
        for _ in range(3 * http.MAX_CONNECTIONS):
            assert exchange(server, PING)[0] == 200
        late = [stack.enter_context(raw(server)) for _ in range(http.MAX_CONNECTIONS)]
        late[-1].sendall(PING)
        assert ch_remote.receive(late[-1])[0] == 200
        assert server.connections() <= http.MAX_CONNECTIONS
        assert reader.recv(100).startswith(b"HTTP/1.1 200 ")


def test_too_slow_a_request_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_SECONDS", 0.3)
    with raw(server, PING[:40]) as slow, raw(server, PING) as kept:
        assert ch_remote.receive(kept)[0] == 200
        assert slow.recv(100) == b""
        kept.sendall(PING)  # waiting between requests is no crime
        assert ch_remote.receive(kept)[0] == 200
    with raw(server, PING) as idle:
        ch_remote.receive(idle)
        monkeypatch.setattr(http, "IDLE_SECONDS", 0.2)
        idle.sendall(PING)
        ch_remote.receive(idle)
        assert idle.recv(100) == b""


def test_all_places_taken_by_served_requests(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LINGER_SECONDS", 60.0)
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(raw(server, b"PUT /api/v1/vm.pause HTTP/1.1\r\nHost: x\r\n\r\n"))
                for _ in range(http.MAX_CONNECTIONS)]
        wait_for(lambda: len(server.asked) == http.MAX_CONNECTIONS)
        turned_away = [stack.enter_context(raw(server)) for _ in range(2 * http.MAX_CONNECTIONS)]
        for late in turned_away[-http.MAX_CONNECTIONS:]:
            late.sendall(PING)  # as it may be doing when it is turned away
            status, body = ch_remote.receive(late)
            assert (status, "64 requests are being served" in str(body)) == (429, True)
        server.release.set()
        assert {ch_remote.receive(sock)[0] for sock in busy} == {204}
    wait_for(lambda: server.connections() == 0)
    assert exchange(server, PING)[0] == 200


def test_a_client_that_goes_away_does_not_stop_what_it_asked_for(server: Server) -> None:
    with raw(server, b"PUT /api/v1/vm.pause HTTP/1.1\r\nHost: x\r\n\r\n"):
        wait_for(lambda: server.asked)
    server.release.set()
    wait_for(lambda: server.connections() == 0)
    assert exchange(server, PING)[0] == 200


def test_descriptors_are_refused_and_closed(server: Server) -> None:
    read, write = os.pipe()
    with pytest.raises(ch_remote.Failed) as caught:
        ch_remote.call(server.path, "PUT", "vm.reboot", fds=(write, write))
    assert (caught.value.status, "takes no descriptors, 2 came" in str(caught.value.body)) == (400, True)
    with ch_remote.connect(server.path) as sock:
        ch_remote.send(sock, "PUT", "vm.create", "{}", (write,) * 65)
        assert ch_remote.receive(sock)[0] == 400
    os.close(write)
    assert os.read(read, 1) == b""  # the server has none left
    os.close(read)


def test_descriptors_go_with_their_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellvisor.core.wire import control

    verb = control.VERBS["create"]
    taking = control.Verb(verb.name, verb.help, verb.args, path=verb.path, takes_fds=True)
    monkeypatch.setattr("cellvisor.controlplane.routes.PATHS", {"vm.create": taking})
    read, write = os.pipe()
    with ch_remote.connect(server.path) as sock:
        ch_remote.send(sock, "PUT", "vm.create", "{}", (write,))
        assert ch_remote.receive(sock)[0] == 204
        ch_remote.send(sock, "PUT", "vm.create", "{}")
        assert ch_remote.receive(sock)[0] == 204
    os.close(write)
    assert [len(request.fds) for request in server.asked] == [1, 0]
    assert os.read(read, 1) == b""
    os.close(read)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=200).map(lambda body: put("vm.create", body)),
    st.builds(lambda path, body: put(path, json.dumps(body).encode()),
              st.sampled_from(["vm.create", "vm.resize-disk", "vm.remove-device", "vm.add-disk", "vm.ops"]),
              st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False)
                           | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))))
def test_no_bytes_do_more_than_fail(server: Server, data: bytes) -> None:
    with raw(server, data) as sock:
        sock.shutdown(socket.SHUT_WR)
        seen = b""
        while piece := sock.recv(65536):
            seen += piece
    assert not seen or seen[9:12] in (b"200", b"204", b"400", b"404")


def test_the_socket_file(tmp_path: Path, server: Server) -> None:
    mode = stat.S_IMODE(os.stat(server.path).st_mode)
    assert mode == 0o600
    with pytest.raises(Conflict, match="another process listens there"):
        httpsocket.listen(server.path)
    plain = tmp_path / "plain"
    plain.write_text("")
    with pytest.raises(Conflict, match="is not a socket"):
        httpsocket.listen(str(plain))
    with pytest.raises(UsageError, match="/no/such/dir/x: No such file"):
        httpsocket.listen("/no/such/dir/x")
    stale = str(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(stale)
    sock, path = httpsocket.listen(stale)
    assert path == stale
    sock.close()


def test_an_inherited_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "x"))
        with pytest.raises(UsageError, match="not a listening Unix stream socket"):
            httpsocket.listen(f"fd={made.fileno()}")
        made.listen()
        copy = os.dup(made.fileno())
        sock, path = httpsocket.listen(f"fd={copy}")
        assert (sock.fileno(), path) == (copy, None)
        sock.close()
    with pytest.raises(UsageError, match="fd=999: Bad file descriptor"):
        httpsocket.listen("fd=999")


@pytest.mark.parametrize(("error", "status"), [
    (UsageError("x"), 400), (NotFound("x"), 404), (Conflict("x"), 409), (TryAgain("x"), 429),
    (CellvisorError("x"), 500)])
def test_status_codes(error: CellvisorError, status: int) -> None:
    assert routes.refusal(error).status == status
