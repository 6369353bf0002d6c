"""The API over TCP: nothing without keys and an allow-list; right, wrong and missing keys; mistakes in files."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zmq

from cellvisor.controlplane import logtail, remote
from cellvisor.core.errors import CellvisorError, NotFound, UsageError
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
    assert dispatch.run(["ls", "--remote", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("["):])[0]["state"] == "Running"
    assert dispatch.run(["console", "moon"]) == 1
    assert "own machine" in capsys.readouterr().err


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


def test_what_is_asked_of_a_log_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthree")
    assert logtail.read(str(path), 0, None) == {"text": "one\ntwo\n", "rest": "three", "next": 8}
    assert logtail.read(str(path), 8, None) == {"text": "", "rest": "three", "next": 8}
    for lines, text in ((0, ""), (1, "two\n"), (2, "one\ntwo\n"), (9, "one\ntwo\n")):
        assert logtail.read(str(path), 0, lines)["text"] == text
    assert logtail.read(str(path), 4000, None)["text"] == "one\ntwo\n", "a file that began anew"
    path.write_bytes(b"\xff" * (3 << 20))
    assert logtail.read(str(path), 0, 5)["next"] == (2 << 20) + logtail.PIECE
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "none"):
        with pytest.raises(NotFound, match=name):
            logtail.read(str(tmp_path / name), 0, None)


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


def test_keys_are_private_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    old = os.umask(0)
    try:
        assert dispatch.run(["keys", "new", "laptop", "--json"]) == 0
    finally:
        os.umask(old)
    made = json.loads(capsys.readouterr().out)
    path = made["path"]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    assert "secret" not in made and len(made["public"]) == 40
    before = Path(path).read_text()
    assert dispatch.run(["keys", "new", "laptop"]) == 1
    assert Path(path).read_text() == before
    assert dispatch.run(["keys", "show", "laptop"]) == 0
    out = capsys.readouterr().out
    assert made["public"] in out and keys.read_pair(path).secret not in out
    assert keys.read_pair(path).secret not in repr(keys.read_pair(path))
    os.chmod(path, 0o640)
    assert dispatch.run(["keys", "show", "laptop"]) == 2
    assert "mode 0640 lets others read a secret" in capsys.readouterr().err
    os.chmod(path, 0o600)
    for text, said in (('public = "x"', "secret is missing"), ('public = 1\nsecret = ""', "public = 1 is not a string"),
                       ('more = 1', "unknown key 'more'"), ("public", "(at "), ("\xff", "(at "),
                       (before.replace("secret = ", 'secret = "x" # '), "the secret does not belong to public")):
        Path(path).write_text(text)
        with pytest.raises(UsageError) as caught:
            keys.read_pair(path)
        assert path in str(caught.value) and said in str(caught.value)
    for name in ("../x", "", ".x", "a b", "x" * 65):
        with pytest.raises(UsageError, match="no name"):
            keys.key_file(name)


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


def test_tcp_only_with_keys_and_an_allow_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    where = "tcp://[::1]:7300"
    with pytest.raises(UsageError, match=r"only with keys, and .*server.key: no such file .cellvisor keys new server"):
        remote.check(where)
    public = keys.make_pair(keys.key_file("server")).public
    with pytest.raises(UsageError, match=r"only with an allow-list, and .*clients.toml: no such file"):
        remote.check(where)
    clients = tmp_path / "cellvisor" / "clients.toml"
    for text, said in (("", "allows nobody"), ("x = 1", "x = 1 is no public key"), ("x", "(at ")):
        clients.write_text(text)
        with pytest.raises(UsageError) as caught:
            remote.check(where)
        assert said in str(caught.value)
    clients.write_text(f'x = "{public}"')
    odd = tmp_path / "a,b.key"
    odd.symlink_to(keys.key_file("server"))
    checked = remote.parse(remote.check(f'{where},key="{odd}"'))
    assert checked == remote.Remote("[::1]", 7300, 7301, str(odd), str(clients))
