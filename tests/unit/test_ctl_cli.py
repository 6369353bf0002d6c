"""The command: every verb has help and an example, exit statuses are what they say, nothing slow is imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.errors import Conflict, Internal, NotFound, TryAgain, UsageError
from cellvisor.core.wire import places
from cellvisor.core.wire.control import VERBS
from cellvisor.ctl import client, dispatch, render

RUN = Path(__file__).parents[1] / "fakes" / "control_run.py"
MAIN = "import sys; from cellvisor.ctl.cli import main; sys.exit(main())"


def cellvisor(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", MAIN, *argv], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One VM for the module, with fakes for core and nursery."""
    base = tmp_path_factory.mktemp("vm")
    (base / "kernel").write_bytes(b"kernel")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_RUNTIME_DIR", str(base))
    argv = [sys.executable, str(RUN), "--kernel", str(base / "kernel"), "--name", "web", "--disk", "path=a",
            "--api-socket", str(base / "http.sock")]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        while not places.running():
            assert process.poll() is None
        with client.Client("web") as caller:
            while caller.call("info")["state"] != "Running":
                assert process.poll() is None
        yield "web"
    finally:
        process.terminate()
        process.wait(60)
        patch.undo()


@pytest.fixture
def no_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_every_ready_verb_has_a_command_with_an_example() -> None:
    ready = {dispatch.ALIASES.get(verb.name, verb.name) for verb in VERBS.values() if verb.ready}
    assert ready <= set(dispatch.names())
    for name in dispatch.names():
        command = dispatch.load(name)
        assert command.EXAMPLE.startswith(f"cellvisor {name}"), name
        assert command.HELP.endswith("."), name


@pytest.mark.parametrize("verb", [name for name in dispatch.names() if name not in ("run", "adopt")])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch.run([verb, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "example:" in out
    assert "--json" in out
    assert "exit status:" in out


def test_general_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in dispatch.names())
    assert dispatch.run([]) == 2


def test_run_help_is_the_controlplanes() -> None:
    done = cellvisor("run", "--help")
    assert done.returncode == 0
    assert "--kernel PATH" in done.stdout
    assert "example:" in done.stdout
    done = cellvisor("run")
    assert (done.returncode, done.stderr) == (
        2, "cellvisor: --kernel is missing (give a bzImage or an uncompressed vmlinux)\n")


@pytest.mark.parametrize(("error", "status"), [
    (Conflict("x"), 1), (NotFound("x"), 1), (Internal("x"), 1), (UsageError("x"), 2),
    (NotFound("x", code="no-vm"), 3), (TryAgain("x"), 4)])
def test_exit_status(error: Exception, status: int) -> None:
    assert dispatch.exit_status(error) == status  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_vm")
@pytest.mark.parametrize(("argv", "status", "line"), [
    (["pnig"], 2, "unknown verb 'pnig' (did you mean ping?)"),
    (["--pnig"], 2, "unknown flag --pnig (see cellvisor --help)"),
    (["ping", "--frobnicate"], 2, "unknown flag --frobnicate (see cellvisor ping --help)"),
    (["ping", "--jsn"], 2, "unknown flag --jsn (did you mean --json? see cellvisor ping --help)"),
    (["resize-disk", "--dsk=_disk0"], 2, "unknown flag --dsk (did you mean --disk?"),
    (["ping", "web", "more"], 2, "unexpected argument 'more'"),
    (["logs", "-n", "-2"], 2, "-n/--lines: "),
    (["events", "--since", "x"], 2, "--since: 'x' is not a number from 0 on"),
    (["ops", "wait", "op1", "--timeout", "nan"], 2, "--timeout: 'nan' is not a number of seconds"),
    (["remove-device", "d", "--timeout=-1"], 2, "--timeout: '-1' is not a number of seconds"),
    (["upgrade-device", "d"], 3, "no VM is running"),
    (["ping"], 3, "no VM is running (start one with cellvisor run)"),
    (["ping", "web"], 3, "no VM 'web' is running (none is running; start one with cellvisor run)"),
    (["ping", "/no/such"], 3, "no VM is running in /no/such (see cellvisor ls)"),
    (["ping", "we b"], 2, "--name 'we b' cannot name a VM"),
    (["report", "/no/such"], 1, "/no/such: no such file"),
    (["report", "/proc/version"], 2, "/proc/version is not a report"),
])
def test_errors_are_one_line(argv: list[str], status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.run(argv) == status
    err = capsys.readouterr().err
    assert err.startswith(f"cellvisor: {line}")
    assert err.count("\n") == 1
    assert dispatch.run([*argv, "--json"]) == status
    assert json.loads(capsys.readouterr().err)["error"]["message"]


@pytest.fixture(params=["by name", "by socket"])
def reach(request: pytest.FixtureRequest, vm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the VM the one way or the other."""
    if request.param == "by socket":
        monkeypatch.setenv(client.ENVIRONMENT, os.path.join(os.environ["XDG_RUNTIME_DIR"], "http.sock"))


@pytest.mark.usefixtures("reach")
@pytest.mark.parametrize("verb", ["ping", "info", "devices", "tree", "ls", "events", "pause", "resume", "reset",
                                  "reboot", "power-button", "nmi", "counters", "logs"])
def test_each_verb_for_people_and_programs(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    if verb == "resume":
        dispatch.run(["resume"])
        dispatch.run(["pause"])
    capsys.readouterr()
    assert dispatch.run([verb]) == 0
    plain = capsys.readouterr().out
    assert plain
    assert "\x1b" not in plain
    dispatch.run(["resume"])
    if verb == "resume":
        dispatch.run(["pause"])
    capsys.readouterr()
    assert dispatch.run([verb, "--json"]) == 0
    out = capsys.readouterr().out
    for document in out.splitlines() if verb in ("events", "logs") else [out]:
        json.loads(document)
    dispatch.run(["resume"])


def test_by_name_path_and_socket(vm: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = places.vm_dir(vm)
    for where in (vm, path, os.path.join(path, places.API)):
        assert dispatch.run(["ping", where]) == 0
        assert capsys.readouterr().out.startswith("web: cellvisor")


def test_refusals_of_the_vm(vm: str, capsys: pytest.CaptureFixture[str]) -> None:
    dispatch.run(["pause"])
    assert dispatch.run(["pause"]) == 1
    assert "cellvisor: the VM is paused already" in capsys.readouterr().err
    dispatch.run(["resume"])


@pytest.mark.usefixtures("vm")
@pytest.mark.parametrize("verb", [verb.name for verb in VERBS.values() if not verb.ready])
def test_what_comes_later_says_so(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([verb, "tap=x"], [verb, "--help"], ["validate", verb, "tap=x"]):
        assert dispatch.run(argv) == 2
        assert capsys.readouterr().err == f"cellvisor: {verb}: not supported yet\n"


@pytest.mark.usefixtures("vm")
def test_a_dry_run_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.run(["capacity", "--json"]) == 0
    before = capsys.readouterr().out
    assert dispatch.run(["validate", "add-disk", "path=x,id=dry"]) == 0
    assert capsys.readouterr().out.startswith("would become dry (blk) at 0000:00:")
    assert dispatch.run(["validate", "add-disk", "pth=x"]) == 2
    assert "unknown key 'pth' (did you mean path?" in capsys.readouterr().err
    assert dispatch.run(["capacity", "--json"]) == 0
    assert capsys.readouterr().out == before


@pytest.mark.usefixtures("vm")
def test_ctrl_c_leaves_the_operation_and_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.run(["add-rng", "id=slow", "--no-wait", "--json"]) == 0
    operation = json.loads(capsys.readouterr().out)["operation"]
    assert dispatch.run(["ops", "show", operation]) == 0
    assert "guest-notified" in capsys.readouterr().out
    command = subprocess.Popen([sys.executable, "-c", MAIN, "add-rng", "id=slower"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None and "guest-notified" in command.stdout.readline()
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 130, err
    assert err.startswith("cellvisor: op") and "goes on (cellvisor ops wait op" in err
    assert err.count("\n") == 1
    assert dispatch.run(["ops", "show", "slower"]) == 0
    assert "guest-notified" in capsys.readouterr().out
    for device in ("slow", "slower"):
        assert dispatch.run(["ops", "cancel", device]) == 0


def test_nothing_slow_is_imported(vm: str) -> None:
    script = ("import sys; from cellvisor.ctl.cli import main; sys.argv[1:] = ['tree']; main(); "
              "print([n for n in ('rich', 'asyncio', 'uvloop', 'cellvisor.controlplane') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    script = "import sys, cellvisor.ctl.cli; print([n for n in ('argparse', 'zmq', 'json') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"


def test_several_vms_need_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "running", lambda: {"a": {"pid": 1}, "b": {"pid": 2}})
    with pytest.raises(UsageError, match="name one of: a, b"):
        client.find()


def test_tables_and_trees(capsys: pytest.CaptureFixture[str]) -> None:
    render.table(("NAME", "N "), [("a", "1"), ("long", "22")])
    assert capsys.readouterr().out == "NAME   N\na      1\nlong  22\n"
    render.table(("NAME", "N "), [])
    assert capsys.readouterr().out == "NAME  N\n"
    render.process_tree([
        {"role": "controlplane", "pid": 1, "parent": 0, "pss": 2048, "pss_shmem": 0},
        {"role": "nursery", "pid": 3, "parent": 1, "pss": 1024, "pss_shmem": 0},
        {"role": "worker", "pid": 4, "parent": 3, "pss": 512, "pss_shmem": 256, "device": "d", "type": "blk",
         "generation": 1},
        {"role": "passt", "pid": 5, "parent": 4, "pss": 1024, "pss_shmem": 0, "device": "d"},
        {"role": "core", "pid": 2, "parent": 1},
    ])
    out = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in out[:4]] == ["PROCESS", "controlplane", "├─ nursery", "│"]
    assert out[3].lstrip("│ ").startswith("└─ d (blk, generation 1)")
    assert out[4].lstrip("│ ").startswith("└─ passt (d) ")
    assert out[5].startswith("└─ core")
    assert out[5].split()[-2:] == ["?", "?"]
    assert out[6].split() == ["total", "4.5", "0.2"]


def test_a_terminal_gets_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(render, "is_fancy", lambda: True)
    render.table(("NAME", "N "), [("a", "1")])
    assert "NAME" in capsys.readouterr().out
