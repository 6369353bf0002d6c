"""The command with `--api-socket`, as ch-remote is used; create from a file, and consoles on ptys and sockets."""

from __future__ import annotations

import io
import json
import os
import pty
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.errors import Conflict, NotFound
from cellvisor.core.wire import places, ports
from cellvisor.ctl import attach, client, dispatch

RUN = Path(__file__).parents[1] / "fakes" / "control_run.py"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An HTTP socket of a process that waits for vm.create."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv(client.ENVIRONMENT, "")
    path = str(tmp_path / "http.sock")
    process = subprocess.Popen([sys.executable, str(RUN), "--name", "web", "--api-socket", path],
                               stdin=subprocess.DEVNULL)
    while not os.path.exists(path):
        assert process.poll() is None
        time.sleep(0.02)
    yield path
    process.terminate()
    process.wait(60)


def test_a_vm_from_create_to_shutdown_vmm(empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.delenv(client.ENVIRONMENT, raising=False)
        status = dispatch.run(["--api-socket", empty, *argv])
        return (status, *capsys.readouterr())

    (tmp_path / "kernel").write_bytes(b"kernel")
    config = {"payload": {"kernel": str(tmp_path / "kernel")}, "disks": [{"path": "a"}]}
    (tmp_path / "vm.json").write_text(json.dumps(config))
    assert run("info") == (1, "", "cellvisor: info: no VM was created (create one first)\n")
    assert run("ls")[0] == 2
    assert (dispatch.run(["ls"]), capsys.readouterr().out.splitlines()[1].split()[:2]) == (0, ["web", "Empty"])
    assert run("create", str(tmp_path / "vm.json"))[:2] == (0, f"{empty}: created; cellvisor boot starts it\n")
    assert run("boot")[:2] == (0, f"{empty}: booted\n")
    assert run("resize-disk", "--disk", "_disk0", "--size", "1G")[:2] == (0, f"{empty}: _disk0 has 1073741824 bytes\n")
    assert run("resize-disk", "--disk", "_disk0", "--size", "1Q")[0] == 2
    status, out, _ = run("shutdown")
    assert (status, "its process waits" in out) == (0, True)
    assert run("delete")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(config)))
    assert run("create", "-", "--json")[:2] == (0, "{}\n")
    assert run("boot", "--json")[:2] == (0, "{}\n")
    status, out, _ = run("events", "--json")
    assert [json.loads(line)["event"] for line in out.splitlines()].count("vm.booted") == 2
    assert run("shutdown-vmm")[0] == 0
    assert not os.path.exists(empty)
    assert places.running() == {}
    status, _, err = run("ping")
    assert (status, err.startswith(f"cellvisor: --api-socket {empty}: No such file")) == (3, True)


@pytest.mark.parametrize(("argv", "status", "line"), [
    (["--api-socket", "/no/such", "ping"], 3, "--api-socket /no/such: No such file or directory (is the VM running"),
    (["ping", "--api-socket=/no/such"], 3, "--api-socket /no/such: No such file"),
    (["--api-socket", "path=/no/such", "ping"], 3, "--api-socket /no/such: No such file"),
    (["ping", "--api-socket"], 2, "--api-socket: no path is given"),
    (["--api-socket", "/no/such", "ping", "web"], 2, "both --api-socket and VM 'web' are given"),
    (["snapshot", "x"], 2, "snapshot: not supported yet"),
    (["create", "/no/such"], 1, "/no/such: no such file (write - for stdin)"),
    (["create", "/dev/null"], 2, "/dev/null is empty"),
    (["create", "a", "b", "c"], 2, "unexpected argument 'c'"),
])
def test_refusals(argv: list[str], status: int, line: str, capsys: pytest.CaptureFixture[str],
                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.ENVIRONMENT, "")
    assert dispatch.run(argv) == status
    err = capsys.readouterr().err
    assert err.startswith(f"cellvisor: {line}")
    assert err.count("\n") == 1


def test_which_consoles_can_be_attached_to() -> None:
    config = {"console": {"mode": "Pty", "file": "/dev/pts/1"}, "serial": {"mode": "Socket", "socket": "/tmp/s"},
              "virtio": [{"id": "c2", "type": "console", "mode": "socket", "socket": "/tmp/t"},
                         {"id": "r", "type": "rng", "src": "x"}, {"id": "c3", "mode": "file", "file": "/tmp/f"}]}
    assert ports.attachable(config) == {
        "__console": ("pty", "/dev/pts/1"), "__serial": ("socket", "/tmp/s"), "c2": ("socket", "/tmp/t")}
    assert ports.attachable({"console": {"mode": "Off"}, "serial": {"mode": "Null"}}) == {}


class Attached:
    """attach() in a thread, on a terminal of the test: what is typed at `keys` and seen there."""

    def __init__(self, kind: str, path: str) -> None:
        self.keys, self.terminal = pty.openpty()
        self.before = termios.tcgetattr(self.terminal)
        termios.tcsetwinsize(self.terminal, (30, 100))
        self.said: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self._thread = threading.Thread(target=lambda: self.said.append(attach.attach(
            kind, path, self.terminal, self.terminal, lambda columns, rows: self.sizes.append((columns, rows)))))
        self._thread.start()

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.terminal)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def end(self) -> str:
        self._thread.join(30)
        assert termios.tcgetattr(self.terminal) == self.before
        os.close(self.keys)
        os.close(self.terminal)
        return self.said[0]


def read(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += os.read(fd, size - len(data))
    return data


def test_a_pty_is_copied_both_ways_until_the_escape_key() -> None:
    guest, console_end = pty.openpty()
    import tty

    tty.setraw(console_end)
    attached = Attached("pty", os.ttyname(console_end))
    while not attached.is_raw():
        time.sleep(0.01)
    os.write(attached.keys, b"a\x03\x04\r")  # Ctrl-C and Ctrl-D are the guest's
    assert read(guest, 4) == b"a\x03\x04\r"
    os.write(guest, b"hello\r\n")
    assert read(attached.keys, 7) == b"hello\r\n"
    with pytest.raises(Conflict, match="somebody else is attached"):
        attach.attach("pty", os.ttyname(console_end))
    termios.tcsetwinsize(attached.terminal, (24, 80))
    while len(attached.sizes) < 2:
        time.sleep(0.01)
    assert attached.sizes == [(100, 30), (80, 24)]
    os.write(attached.keys, b"z\x1dnot sent")
    assert read(guest, 1) == b"z"
    assert attached.end() == "left"
    os.close(guest)
    os.close(console_end)


def test_a_socket_that_closes_ends_it(tmp_path: Path) -> None:
    path = str(tmp_path / "console")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        attached = Attached("socket", path)
        with listener.accept()[0] as guest:
            guest.sendall(b"x")
            assert read(attached.keys, 1) == b"x"
        assert attached.end() == "the console was closed"


def test_a_pipe_is_copied_to_its_end(tmp_path: Path) -> None:
    path = str(tmp_path / "console")
    take, give = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        os.write(give, b"command\n")
        os.close(give)
        assert attach.attach("socket", path, take, take) == "stdin ended"
        with listener.accept()[0] as guest:
            assert guest.recv(100) == b"command\n"
    os.close(take)
    with pytest.raises(NotFound, match="No such file"):
        attach.attach("socket", "/no/such")


def test_http_needs_neither_zmq_nor_h11(empty: str) -> None:
    script = (f"import sys; from cellvisor.ctl.cli import main; sys.argv[1:] = ['--api-socket', {empty!r}, 'ping']; "
              "main(); print([n for n in ('zmq', 'h11', 'rich', 'asyncio') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_controlplane_loads_h11_only_when_asked() -> None:
    script = ("import sys, cellvisor.controlplane.supervisor, cellvisor.controlplane.api; "
              "print([n for n in ('h11', 'cellvisor.controlplane.http') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"
