"""Every verb as somebody has it who is new to it, or has bad luck: each time one line that says what to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import zmq

from cellvisor.core.wire import keys, places
from cellvisor.ctl import curvelink, dispatch, remotes, zmqlink
from cellvisor.ctl.client import ENVIRONMENT

MAIN = "import sys; from cellvisor.ctl.cli import main; sys.exit(main())"

# What each verb needs besides a VM.
ARGS: dict[str, list[str]] = {
    "add-console": ["mode=null"], "add-disk": ["path=x"], "add-net": ["tap=x"], "add-rng": [],
    "add-virtio": ["rng,x=1"],
    "drain-device": ["d"], "restart-device": ["d"], "remove-device": ["d"], "upgrade": ["all"],
    "resize-disk": ["--disk", "d", "--size", "1M"], "swap-disk": ["--disk", "d", "--path", "x"],
    "set-link": ["--net", "d", "--link", "up"], "set-rate-limit": ["--disk", "d", "--limit", "bw_size=1"],
    "create": ["vm.json"], "validate": ["add-disk", "path=x"], "keys": ["show", "x"], "report": ["x"],
    "completion": ["bash"],
}
OF_NO_VM = {"adopt", "completion", "keys", "ls", "report", "run"}
FLAGGED = {"ops", "validate"}  # --vm, or whatever verb is tried
VERBS = [name for name in dispatch.names() if name not in OF_NO_VM]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without VMs, and a vm.json in the directory we are in."""
    for name in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv(ENVIRONMENT, "")  # which a run sets
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vm.json").write_text('{"payload": {"kernel": "x"}}')
    return tmp_path


@contextmanager
def silent(*names: str) -> Iterator[list[int]]:
    """VMs that live and never answer; their locks."""
    with ExitStack() as stack:
        held = []
        for name in names:
            os.makedirs(places.vm_dir(name))
            held.append(os.open(os.path.join(places.vm_dir(name), places.LOCK), os.O_RDWR | os.O_CREAT))
            stack.callback(os.close, held[-1])
            assert places.lock(held[-1])
        yield held


def words(verb: str, vm: str | None = None) -> list[str]:
    """Return a command line; for a VM that is named, or for the only one."""
    args = ARGS.get(verb, [])
    if vm is None:
        return [verb, *args]
    if verb == "ops":
        return [verb, "--vm", vm]
    return [verb, args[0], vm, *args[1:]] if verb == "validate" else [verb, vm, *args]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> tuple[int, str]:
    """Run it; returns the exit status and the one line."""
    capsys.readouterr()
    status = dispatch.run(argv)
    out, err = capsys.readouterr()
    assert err.startswith("cellvisor: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err and "Errno" not in err and "argument " not in err.replace("unexpected argument ", "")
    assert not out
    return status, err.removeprefix("cellvisor: ").strip()


@pytest.mark.parametrize("verb", [name for name in dispatch.names() if name not in ("adopt", "run", "validate")])
def test_a_typo_in_a_flag(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"unknown flag --jsno (did you mean --json? see cellvisor {verb} --help)"
    assert refused(capsys, [*words(verb), "--jsno"]) == (2, line)
    assert refused(capsys, [*words(verb), "-z"]) == (2, f"unknown flag -z (see cellvisor {verb} --help)")


@pytest.mark.parametrize("verb", [name for name in dispatch.names() if name not in ("adopt", "run")])
def test_a_missing_value(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    actions = dispatch.parser(verb, dispatch.load(verb))._actions
    for action in actions:
        flag = next((flag for flag in action.option_strings if flag.startswith("--")), None)
        if flag is not None and action.nargs is None:
            status, line = refused(capsys, [verb, flag])
            assert status == 2
            assert line == f"{flag} has no value: write {flag} {action.metavar or '...'} (see cellvisor {verb} --help)"
    if any(action.required and action.nargs != "*" for action in actions):
        status, line = refused(capsys, [verb])
        assert status == 2 and "missing (see cellvisor" in line


@pytest.mark.parametrize(("argv", "status", "line"), [
    (["ping", "web", "more"], 2, "unexpected argument 'more' (see cellvisor ping --help)"),
    (["ping", "--json=1"], 2, "--json takes no value"),
    (["set-link", "--net", "d", "--link", "sideways"], 2, "--link 'sideways' is none of up, down, announce"),
    (["ops", "frob"], 2, "'frob' is none of list, show, wait, cancel"),
    (["keys", "nwe", "x"], 2, "'nwe' is none of new, show"),
    (["completion", "tcsh"], 2, "'tcsh' is none of bash, zsh, fish"),
    (["completion"], 2, "bash|zsh|fish is missing"),
    (["keys"], 2, "new|show, NAME are missing"),
    (["set-rate-limit", "--limit", "bw_size=1"], 2, "one of --disk, --net, --group is missing"),
    (["set-rate-limit", "--disk", "d", "--limit", "bw=1"], 2, "--limit: unknown key 'bw' (known keys: "),
    (["top", "--interval", "x"], 2, "--interval: 'x' is not a number of seconds"),
    (["ops", "show"], 2, "ops show: ID is missing (an operation's, or a device's for its latest)"),
    (["ops", "cancel"], 2, "ops cancel: ID is missing"),
    (["remove-device", "a", "b", "c"], 2, "unexpected argument 'c'"),
    (["ping", ""], 2, "VM '' is no name (leave it out for the only VM that runs)"),
    (["pause", ""], 2, "VM '' is no name"), (["remove-device", "", "d"], 2, "VM '' is no name"),
    (["add-rng", ""], 2, "VM '' is no name"), (["ops", "--vm", ""], 2, "VM '' is no name"),
    (["--api-socket", "/no/such", "ls"], 2, "ls takes no --api-socket (leave it out)"),
    (["--api-socket", "/no/such", "ping"], 3, "--api-socket /no/such: No such file or directory (is the VM running"),
    (["create", "empty"], 2, 'empty is empty (it must be JSON: {"payload": {"kernel": PATH}, ...})'),
    (["create", "list"], 2, "list: list instead of an object (it must be JSON: "),
    (["create", "/"], 2, "/: Is a directory"),
    (["create", "/no/such"], 1, "/no/such: no such file (write - for stdin)"),
    (["report", "/"], 2, "/ is not a report: Is a directory"),
    (["report", "empty"], 2, "empty is not a report: "),
    (["keys", "show", "x"], 1, "{place}/cellvisor/keys/x.key: no such file (cellvisor keys new x makes it)"),
    (["ping", "./none"], 3, "no VM is running in {place}/none (see cellvisor ls)"),
])
def test_mistakes(argv: list[str], status: int, line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty").touch()
    (place / "list").write_text("[]")
    found = refused(capsys, argv)
    assert found[0] == status
    assert found[1].startswith(line.replace("{place}", str(place)))


@pytest.mark.parametrize("verb", VERBS)
def test_no_vm(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    if verb == "top":
        assert dispatch.run(["top", "--once", "--interval", "0.1"]) == 0
    else:
        assert refused(capsys, words(verb)) == (3, "no VM is running (start one with cellvisor run)")
    assert refused(capsys, words(verb, "web")) == (
        3, "no VM 'web' is running (none is running; start one with cellvisor run)")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "top"])
def test_two_vms(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with silent("db", "web"):
        assert refused(capsys, words(verb)) == (2, "several VMs are running: which one? (name one of: db, web)")
        assert refused(capsys, words(verb, "wbe")) == (3, "no VM 'wbe' is running (running: db, web)")


@pytest.mark.parametrize("verb", ["add-disk", "add-net"])
def test_a_vm_and_nothing_for_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with silent("web"):
        assert refused(capsys, [verb, "web"]) == (
            2, f"{verb}: web is a VM, and what it shall get is missing (see cellvisor {verb} --help)")


@pytest.mark.parametrize("verb", VERBS)
def test_a_vm_that_dies_over_it(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends while it is asked; afterwards its directory is still there."""
    monkeypatch.setattr(zmqlink, "POLL_MS", 10)
    argv = [*words(verb, "web"), *(["--once"] if verb == "top" else [])]
    with silent("web") as held, zmq.Context() as context, context.socket(zmq.ROUTER) as door:
        door.bind(f"ipc://{places.vm_dir('web')}/{places.API}")
        end = threading.Thread(target=lambda: door.poll(60000) and unlock(held[0]))
        end.start()
        if verb == "events":  # which shows events until there is nobody to have any
            assert dispatch.run(argv) == 0
        else:
            status, line = refused(capsys, argv)
            assert status == 3
            assert f"the VM in {places.vm_dir('web')} has ended" in line
        end.join()
    assert os.path.isdir(places.vm_dir("web"))
    assert refused(capsys, argv)[0] == 3
    for where in (places.vm_dir("web"), f"{places.vm_dir('web')}/"):
        assert refused(capsys, ["ping", where]) == (3, f"no VM is running in {places.vm_dir('web')} (see cellvisor ls)")


def unlock(fd: int) -> None:
    import fcntl

    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, places._FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


@pytest.mark.parametrize("verb", VERBS)
def test_a_remote_that_hangs(verb: str, place: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(curvelink, "CONNECT", 0.1)
    server = keys.make_pair(keys.key_file("laptop")).public
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        Path(remotes.path()).write_text(f'[moon]\naddress = "tcp://127.0.0.1:{port}"\nserver = "{server}"\n'
                                        'key = "laptop"\n')
        assert refused(capsys, [*words(verb, "moon"), *(["--once"] if verb == "top" else [])]) == (
            3, f"moon: nobody answers at tcp://127.0.0.1:{port} (is the VM running with --api, and the port open?)")


def test_a_log_is_there_when_nobody_answers(place: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    from cellvisor.ctl.commands import logs

    monkeypatch.setattr(logs, "TIMEOUT", 0.1)
    with silent("web"):
        assert refused(capsys, ["logs"]) == (4, "ping: no answer within 0.1 s (cellvisor logs may say why)")
        Path(places.vm_dir("web"), places.LOG).write_text("one\ntwo\n")
        assert dispatch.run(["logs", "-n", "1"]) == 0
        assert capsys.readouterr().out == "two\n"


def test_lines_are_whole_while_they_are_followed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with silent("web") as held:
        log = Path(places.vm_dir("web"), places.LOG)
        log.write_text("one\ntw")
        script = f"from cellvisor.ctl.commands import logs; logs.TIMEOUT = 0.1; {MAIN}"
        with subprocess.Popen([sys.executable, "-c", script, "logs", "-f"], stdout=subprocess.PIPE) as follow:
            assert follow.stdout is not None
            assert follow.stdout.readline() == b"one\n"
            with log.open("a") as file:
                file.write("o\nthree")
            assert follow.stdout.readline() == b"two\n"
            unlock(held[0])
            assert follow.stdout.readline() == b"three\n"
            assert follow.wait(60) == 0


@pytest.mark.parametrize(("argv", "status", "line"), [
    (["adopt"], 2, "VM is missing (see cellvisor adopt --help)"),
    (["adopt", "web"], 3, "no VM 'web' is running (see cellvisor ls)"),
    (["run", "--kernel"], 2, "--kernel: expected one argument (see cellvisor run --help)"),
    (["run", "--krenel", "x"], 2, "unknown flag --krenel (did you mean --kernel?"),
    (["run", "vmlinuz"], 2, "unexpected argument 'vmlinuz' (see cellvisor run --help)"),
    (["run", "--kernel", "/no/such"], 2, "--kernel /no/such: No such file or directory"),
])
def test_the_verbs_of_the_controlplane(argv: list[str], status: int, line: str) -> None:
    done = subprocess.run([sys.executable, "-c", MAIN, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert done.stderr.startswith(f"cellvisor: {line}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["ping", "ls", "info"])
def test_a_mistake_in_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.run([verb, "--jsno", "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "bad-request"
