"""The API over TCP: nothing without keys and an allow-list; right, wrong and missing keys; mistakes in files."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zmq

from cellvisor.controlplane import remote
from cellvisor.core.errors import CellvisorError, NotFound, TryAgain, UsageError
from cellvisor.core.wire import keys
from cellvisor.core.wire.control import request
from cellvisor.core.wire.messages import pack
from cellvisor.ctl import dispatch, remotes
from cellvisor.ctl.client import Client

RUN = Path(__file__).parents[1] / "fakes" / "control_run.py"
MAIN = "import sys; from cellvisor.ctl.cli import main; sys.exit(main())"


def free_ports() -> int:
    """Return a port that is free, as is the next one."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@dataclass
class Far:
    """A VM with fakes for core and nursery that serves TCP; "laptop" may steer it, "thief" has keys of his own."""

    port: int
    server: str
    allow: Path
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    base = tmp_path_factory.mktemp("far")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CONFIG_HOME", str(base))
    made = {name: keys.make_pair(keys.key_file(name)) for name in ("server", "laptop", "thief")}
    allow = base / "cellvisor" / "clients.toml"
    allow.write_text(f'laptop = "{made["laptop"].public}"\n')
    (base / "kernel").write_bytes(b"kernel")
    port = free_ports()
    process = subprocess.Popen([sys.executable, str(RUN), "--kernel", str(base / "kernel"), "--name", "web", "--api",
                                f"tcp://127.0.0.1:{port}"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=dict(os.environ, XDG_RUNTIME_DIR=str(base)))
    patch.setenv("XDG_RUNTIME_DIR", str(base / "elsewhere"))
    try:
        yield Far(port, made["server"].public, allow, process)
    finally:
        process.terminate()
        process.wait(60)
        patch.undo()


def write_remotes(far: Far, **changes: object) -> None:
    table = {"address": f"tcp://127.0.0.1:{far.port}", "server": far.server, "key": "laptop", **changes}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items() if value is not None)
    Path(remotes.path()).write_text(f"[moon]\n{lines}")


def connect(timeout: float = 30.0) -> Client:
    """Connect to moon; it may be starting."""
    end = time.monotonic() + 60
    while True:
        try:
            return Client("moon", timeout)
        except NotFound:
            assert time.monotonic() < end


def test_a_right_key_steers(far: Far, capsys: pytest.CaptureFixture[str]) -> None:
    write_remotes(far)
    with connect() as client:
        assert client.call("ping")["name"] == "web"
        assert client.is_remote
        while client.call("info")["state"] != "Running":
            pass
        events = client.events()
        names = []
        while "vm.booted" not in names:
            names.append(next(events)["event"])
        client.call("pause")
        while names[-1] != "vm.paused":  # published, not only kept
            names.append(next(events)["event"])
        events.close()  # type: ignore[attr-defined]
    assert dispatch.run(["resume", "moon"]) == 0
    assert dispatch.run(["console", "moon"]) == 1
    assert "console is neither a pty nor a socket" in capsys.readouterr().err


def test_the_log_is_read_and_followed_from_afar(far: Far, capsys: pytest.CaptureFixture[str]) -> None:
    write_remotes(far)
    with connect() as client:
        path = Path(client.call("ping")["log_file"])
    ours = [f"12:00:{number:02d}.000 test INFO line {number}" for number in range(40)]
    with path.open("a") as log:
        log.write("".join(f"{line}\n" for line in ours))
    assert dispatch.run(["logs", "moon"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if " test " in line] == ours
    assert told == path.read_text().splitlines()[:len(told)]
    assert dispatch.run(["logs", "moon", "-n", "1", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.keys() for line in told] == [{"time", "process", "level", "text"}]
    follow = subprocess.Popen([sys.executable, "-c", MAIN, "logs", "-f", "-n", "1", "moon"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
    assert follow.stdout is not None
    try:
        assert follow.stdout.readline().decode() in path.read_text()
        with path.open("a") as log:
            log.write("x" * 300000 + "\n")
            log.write("half a")
            log.flush()
            assert follow.stdout.readline() == b"x" * 300000 + b"\n"
            log.write(" line\n")
        assert follow.stdout.readline() == b"half a line\n"
    finally:
        follow.terminate()
        follow.communicate(timeout=60)


@pytest.mark.parametrize(("changes", "said"), [
    ({"key": "thief"}, "refused: it does not know the public key"),
    ({"server": "thief"}, "refused: it is not the server with key"),
])
def test_a_wrong_key_is_refused_and_told_so(far: Far, changes: dict[str, str], said: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    write_remotes(far)
    connect().close()
    if "server" in changes:
        changes = {"server": keys.read_pair(keys.key_file("thief")).public}
    write_remotes(far, **changes)
    assert dispatch.run(["ping", "moon"]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_client_that_does_not_read_costs_a_known_amount(far: Far) -> None:
    write_remotes(far)
    laptop = keys.read_pair(keys.key_file("laptop"))

    def resident() -> int:
        return int(Path(f"/proc/{far.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    with connect() as client, zmq.Context() as context, context.socket(zmq.DEALER) as asks:
        with open(client.call("ping")["log_file"], "a") as log:
            log.write("x" * 200000 + "\n")
        for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 1), (zmq.SNDHWM, 0), (zmq.SNDTIMEO, 60000)):
            asks.setsockopt(option, value)
        for option, key in ((zmq.CURVE_SERVERKEY, far.server), (zmq.CURVE_PUBLICKEY, laptop.public),
                            (zmq.CURVE_SECRETKEY, laptop.secret)):
            asks.setsockopt_string(option, key)
        asks.connect(f"tcp://127.0.0.1:{far.port}")
        asks.send(pack(request("first", "ping", {})))
        assert asks.poll(60000)
        before = resident()
        for number in range(3000):
            asks.send(pack(request(str(number), "logs", {"since": 0})))
            while number % 50 == 49:  # until those have been served
                with contextlib.suppress(TryAgain):
                    client.call("ping")
                    break
        assert resident() - before < 32 << 20, "3000 answers are 190 MiB"


@contextlib.contextmanager
def stranger(far: Far, mechanism: str) -> Iterator[list[zmq.Socket[bytes]]]:
    """A DEALER and a SUB of somebody who is not allowed."""
    thief = keys.read_pair(keys.key_file("thief"))
    options = {"null": (), "plain": ((zmq.PLAIN_USERNAME, "laptop"), (zmq.PLAIN_PASSWORD, "x")), "thief": (
        (zmq.CURVE_SERVERKEY, far.server), (zmq.CURVE_PUBLICKEY, thief.public), (zmq.CURVE_SECRETKEY, thief.secret))}
    with zmq.Context() as context, context.socket(zmq.DEALER) as asks, context.socket(zmq.SUB) as hears:
        for sock, port in ((asks, far.port), (hears, far.port + 1)):
            sock.setsockopt(zmq.LINGER, 0)
            for option, value in options[mechanism]:
                sock.setsockopt_string(option, value)
            sock.connect(f"tcp://127.0.0.1:{port}")
        hears.setsockopt(zmq.SUBSCRIBE, b"")
        yield [asks, hears]


@pytest.mark.parametrize("mechanism", ["null", "plain", "thief"])
def test_strangers_hear_nothing(far: Far, mechanism: str) -> None:
    write_remotes(far)
    with stranger(far, mechanism) as (asks, hears), connect() as client:
        with contextlib.suppress(zmq.Again):  # no connection, nothing to send to
            asks.send(pack(request("stranger", "shutdown", {})), zmq.NOBLOCK)
        while client.call("info")["state"] not in ("Running", "Paused"):
            pass
        for verb in ("pause", "resume") * 2:
            client.call(verb)
        assert not asks.poll(500)
        assert not hears.poll(0)
        assert client.call("info")["state"] == "Running"


def test_the_allow_list_may_change_and_break(far: Far) -> None:
    write_remotes(far, key="thief")
    before = far.allow.read_text()
    try:
        far.allow.write_text(f'{before}thief = "{keys.read_pair(keys.key_file("thief")).public}"\n')
        with connect() as client:
            assert client.call("ping")["name"] == "web"
        for text in ("thief = nonsense", 'thief = "short"', before):
            far.allow.write_text(text)
            with pytest.raises(CellvisorError, match="refused: it does not know"):
                Client("moon")
    finally:
        far.allow.write_text(before)
    write_remotes(far)
    Client("moon").close()


def test_raw_bytes_and_half_open_connections_harm_nobody(far: Far) -> None:
    write_remotes(far)
    connect().close()
    left = []
    for data in (b"", b"\xff", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(48),
                 b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(48) + b"\x06\xff" + b"\xff" * 255,
                 b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(48) + b"\x04\xc8\x05HELLO" + bytes(194)):
        for port in (far.port, far.port + 1):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.sendall(data)
            left.append(sock)
    with Client("moon", 30) as client:
        assert client.call("ping")["name"] == "web"
    for sock in left:
        sock.close()


def test_a_flood_of_connections_costs_a_known_number_of_descriptors(far: Far) -> None:
    """libzmq itself would accept them all, and abort the controlplane when there are no descriptors left."""
    write_remotes(far)
    connect().close()

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{far.process.pid}/fd"))

    before = descriptors()
    with contextlib.ExitStack() as stack:
        for port in (far.port, far.port + 1):
            for _ in range(4 * remote.MAX_CLIENTS):
                sock = stack.enter_context(socket.socket())
                sock.settimeout(1.0)
                with contextlib.suppress(OSError):
                    sock.connect(("127.0.0.1", port))
        with Client(str(far.allow.parents[1] / "cellvisor" / "web")) as client:
            assert client.call("ping")["name"] == "web"
        assert descriptors() <= before + 2 * 3 * remote.MAX_CLIENTS + 10
    end = time.monotonic() + 60
    while descriptors() > before + 5:
        assert time.monotonic() < end, "what was opened for them stays open"
        time.sleep(0.05)
    with Client("moon", 30) as client:
        assert client.call("ping")["name"] == "web"


def test_long_frames_of_strangers_are_not_taken_in(far: Far) -> None:
    write_remotes(far)
    connect().close()
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15 + 1 + 31)
    with contextlib.ExitStack() as stack:
        for flags in (2, 6):  # a long message, a long command
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", far.port), 60))
            with contextlib.suppress(ConnectionError, BrokenPipeError):
                sock.sendall(greeting + bytes([flags]) + (4 << 20).to_bytes(8) + bytes(4 << 20))
            with contextlib.suppress(ConnectionError):
                while sock.recv(4096):
                    pass  # its greeting, then its end
    with Client("moon", 30) as client:
        assert client.call("ping")["name"] == "web"


@pytest.mark.parametrize(("changes", "said"), [
    ({"address": None}, "moon: address is missing"), ({"address": 7}, "moon: address = 7 is not a string"),
    ({"address": "ipc:///x"}, "moon: address = 'ipc:///x' is no address"),
    ({"address": "tcp://h:0"}, "moon: address = 'tcp://h:0' is no address"),
    ({"server": "short"}, "moon: server = 'short' is no public key"),
    ({"server": "~" * 40}, "moon: server = '~~~~"),
    ({"key": True}, "moon: key = True is not a string"), ({"key": "nobody"}, "nobody.key: no such file"),
    ({"events": "x"}, "moon: events = 'x' is no port"), ({"events": 65536}, "moon: events = 65536 is no port"),
    ({"adress": "x"}, "moon: unknown key 'adress'"),
])
def test_mistakes_in_remotes(far: Far, changes: dict[str, object], said: str,
                             capsys: pytest.CaptureFixture[str]) -> None:
    write_remotes(far, **changes)
    assert dispatch.run(["ping", "moon"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert "remotes.toml" in err or "key" in changes


@pytest.mark.parametrize(("text", "said"), [("moon = 1", "moon = 1 is no table"), ("[moon", "(at "),
                                            ("", "no VM 'moon' is running")])
def test_no_remotes(far: Far, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(remotes.path()).write_text(text)
    assert dispatch.run(["ping", "moon"]) in (2, 3)
    assert said in capsys.readouterr().err


def test_nobody_there(far: Far, capsys: pytest.CaptureFixture[str]) -> None:
    write_remotes(far, address=f"tcp://127.0.0.1:{free_ports()}")
    with pytest.raises(NotFound, match=r"moon: nobody answers at tcp://127.0.0.1:"):
        Client("moon", 0.5)


@pytest.mark.parametrize("text", ["", "tcp://x", "tcp://127.0.0.1", "tcp://127.0.0.1:0", "tcp://127.0.0.1:65535",
                                  "tcp://*:7300", "tcp://lo:7300", "tcp://::1:7300", "ipc:///x", "tcp://127.0.0.1:7,x=1",
                                  "tcp://127.0.0.1:7,events=70000"])
def test_wrong_flags(far: Far, text: str) -> None:
    with pytest.raises(UsageError, match=r"^--api") as caught:
        remote.check(text)
    assert "\n" not in str(caught.value)
