"""Completion: the words by themselves, and each shell really asking for them."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import UsageError
from cellvisor.core.wire import places
from cellvisor.ctl import client, complete, dispatch
from cellvisor.ctl.commands import completion

MAIN = "import sys; from cellvisor.ctl.cli import main; sys.exit(main())"


class _Vm:
    """A VM that answers with two devices and one operation."""

    asked: list[str | None] = []

    def __init__(self, where: str | None = None, timeout: float = 0.0) -> None:
        self.asked.append(where)

    def __enter__(self) -> _Vm:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def call(self, verb: str, **args: Any) -> Any:
        return {"devices": {"devices": [{"id": "_disk0"}, {"id": "data"}]},
                "ops": {"operations": [{"id": "op1"}]}}[verb]


@pytest.fixture
def vms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "running", lambda: {"db": {"pid": 1}, "web": {"pid": 2}})
    monkeypatch.setattr(client, "Client", _Vm)
    monkeypatch.setattr(_Vm, "asked", [])


@pytest.mark.usefixtures("vms")
@pytest.mark.parametrize(("line", "found"), [
    ("pi", ["ping"]),
    ("add-", ["add-console", "add-disk", "add-net", "add-rng", "add-virtio"]),
    ("--v", ["--version"]),
    ("--api-socket /tmp/x pi", ["ping"]),
    ("--api-socket ", []),
    ("pnig ", []),
    ("ping ", ["db", "web"]),
    ("ping w", ["web"]),
    ("ping web ", []),
    ("ping --j", ["--json"]),
    ("remove-device ", ["_disk0", "data", "db", "web"]),
    ("remove-device web d", ["data"]),
    ("remove-device web data ", []),
    ("remove-device web --timeout ", []),
    ("remove-device --host", ["--host-only"]),
    ("upgrade web ", ["_disk0", "all", "data"]),
    ("resize-disk web --disk ", ["_disk0", "data"]),
    ("set-link web --net ", ["_disk0", "data"]),
    ("resize-disk web --disk=d", ["--disk=data"]),
    ("resize-disk web --disk = d", ["data"]),  # bash
    ("add-disk ", ["db", "web"]),
    ("add-disk web path=", []),
    ("ops ", ["cancel", "list", "show", "wait"]),
    ("ops wait ", ["_disk0", "data", "op1"]),
    ("ops --vm ", ["db", "web"]),
    ("ops --vm web wait o", ["op1"]),
    ("validate ", ["add-console", "add-disk", "add-net", "add-rng", "add-virtio", "boot", "create", "remove-device",
                   "resize-disk", "set-link", "set-rate-limit", "swap-disk"]),
    ("validate remove-device web d", ["data"]),
    ("validate resize-disk web --disk ", ["_disk0", "data"]),
    ("completion ", ["bash", "fish", "words", "zsh"]),
])
def test_words(line: str, found: list[str]) -> None:
    assert complete.complete(line.split(" ")) == found


@pytest.mark.usefixtures("vms")
def test_devices_are_those_of_the_vm_that_was_named() -> None:
    complete.complete(["remove-device", "web", ""])
    complete.complete(["resize-disk", "db", "--disk", ""])
    complete.complete(["ops", "--vm", "web", "wait", ""])
    assert _Vm.asked == ["web", "db", "web", "web"]


def test_every_flag_of_every_verb_is_offered() -> None:
    for verb in set(dispatch.names()) - {"run"}:
        flags = {flag for action in dispatch.parser(verb, dispatch.load(verb))._actions
                 for flag in action.option_strings if flag.startswith("--")}
        assert set(complete.complete([verb, "--"])) == flags | {"--api-socket"}, verb
    assert {"--kernel", "--disk", "--api-socket", "--verbose"} <= set(complete.complete(["run", "--"]))


def test_no_word_is_a_mistake_of_the_script() -> None:
    with pytest.raises(UsageError, match="the word to complete is missing"):
        complete.complete([])


@pytest.fixture
def command(tmp_path: Path) -> dict[str, str]:
    """An environment in which `cellvisor` is this one, and no VM runs."""
    script = tmp_path / "cellvisor"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{MAIN}' \"$@\"\n")
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "XDG_RUNTIME_DIR": str(tmp_path),
            "HOME": str(tmp_path), "TERM": "dumb", "PS1": "> "}


def test_in_bash_with_the_tab_key(command: dict[str, str]) -> None:
    master, slave = pty.openpty()
    shell = subprocess.Popen(["bash", "--norc", "--noprofile", "-i"], stdin=slave, stdout=slave, stderr=slave,
                             env=command, start_new_session=True)
    os.close(slave)
    try:
        os.write(master, b'eval "$(cellvisor completion bash)"; echo rea"dy"\n')
        _until(master, b"ready")
        os.write(master, b"cellvisor completion ba\t | head -n 1; echo do\"ne\"\n")
        assert b"\r\n_cellvisor() {" in _until(master, b"\r\ndone")
        os.write(master, b"cellvisor report /proc/versio\t; echo e\"nd\"\n")  # nothing of ours: a file
        assert b"/proc/version is not a report" in _until(master, b"\r\nend")
    finally:
        shell.kill()
        shell.wait(60)
        os.close(master)


def _until(fd: int, mark: bytes) -> bytes:
    seen, end = b"", time.monotonic() + 60
    while mark not in seen:
        assert time.monotonic() < end, seen
        seen += os.read(fd, 4096)
    return seen


@pytest.mark.parametrize(("shell", "script"), [
    ("bash", 'source <(cellvisor completion bash); COMP_WORDS=(cellvisor power); COMP_CWORD=1; _cellvisor; '
             'printf "%s\\n" "${COMPREPLY[@]}"'),
    ("zsh", "compdef() { }; compadd() { shift; print -l -- $@ }; source <(cellvisor completion zsh); "
            "words=(cellvisor power); CURRENT=2; _cellvisor"),
    ("fish", "cellvisor completion fish | source; complete -C 'cellvisor power'"),
])
def test_in_each_shell(shell: str, script: str, command: dict[str, str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is missing")
    flags = {"zsh": ["-f"], "bash": ["--norc"], "fish": ["--no-config"]}[shell]
    done = subprocess.run([shell, *flags, "-c", script], capture_output=True, text=True, timeout=60, env=command)
    assert done.stdout.splitlines() == ["power-button"], done.stderr


def test_scripts_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    for shell, script in completion.SCRIPTS.items():
        assert dispatch.run(["completion", shell]) == 0
        assert capsys.readouterr().out == script
    assert dispatch.run(["completion", "tcsh"]) == 2
    assert dispatch.run(["completion", "bash", "more"]) == 2
