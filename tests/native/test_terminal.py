"""`top`, `console` and `run` as somebody at a terminal has them: typed and looked at in tmux, with a VM that works."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native import cellvisor
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.steer import Steer, steer
from tests.native.tmux import Terminal

pytestmark = [pytest.mark.kvm, needs_kvm]

PROGRAM = str(Path(sys.executable).with_name("cellvisor"))
LOAD = "test=blk-write depth=4 span=1M bs=4096 reads=25 stoppable=1 count=100000000 gaps_us=1000"
PROMPT = re.compile(r"^left=(\d+)\n\$ *$", re.M)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    place = Path(cellvisor.runtime_dir(tmp_path))
    made = Terminal(place, {"XDG_RUNTIME_DIR": str(place)})
    yield made
    made.close()
    (place / "tmux").unlink(missing_ok=True)


@pytest.fixture
def loaded(vm: Vm, disk: Path) -> Iterator[Steer]:
    with steer(vm, LOAD, disks=[disk], extra=["--name", "web"]) as steered:
        yield steered


def command(terminal: Terminal, *words: str) -> None:
    """Run one of our commands; its exit status is shown after it."""
    terminal.type(["sh", "-c", '"$@"; echo left=$?', "sh", PROGRAM, *words])


def line(screen: str, name: str) -> list[str]:
    """Return the words of the line that tells of `name`."""
    return next((text.split() for text in screen.splitlines() if f" {name} " in text), [])


def is_working(screen: str) -> bool:
    """Tell whether the disk's rates are known and not 0."""
    words = line(screen, "_disk0")
    return len(words) == 11 and words[7].isdecimal() and int(words[7]) > 0


def test_top_shows_sorts_pauses_restarts_and_quits(loaded: Steer, terminal: Terminal) -> None:
    before = terminal.settings()
    command(terminal, "top", "--interval", "0.3")
    screen = terminal.wait(is_working)
    assert "1 VM: web Running" in screen and "sorted by VM" in screen
    vcpu, disk = line(screen, "vcpu0"), line(screen, "_disk0")
    assert vcpu[:4] == ["web", "vcpu0", "vcpu", "running"]
    assert disk[:4] == ["web", "_disk0", "blk", "serving"]
    assert [float(disk[number]) > 0 for number in (6, 8, 9)] == [True] * 3
    assert disk[10] == "0"
    terminal.keys("s")
    terminal.wait(lambda text: "sorted by CPU" in text)
    terminal.keys("a")
    terminal.wait(lambda text: line(text, "controlplane"))
    terminal.keys("p")
    terminal.wait(lambda text: "web Paused" in text and line(text, "vcpu0")[3] == "paused")
    assert loaded.client.call("info")["state"] == "Paused"
    terminal.keys("p")
    terminal.wait(lambda text: "web Running" in text and is_working(text))
    old = loaded.device()["pid"]
    terminal.keys("R")
    terminal.wait(lambda text: "_disk0 has a new process" in text and line(text, "_disk0")[10] == "1")
    assert loaded.device()["pid"] != old
    os.kill(int(loaded.device()["pid"]), signal.SIGKILL)
    terminal.wait(lambda text: line(text, "_disk0")[10:] == ["2"] and is_working(text))
    terminal.resize(50, 8)
    screen = terminal.wait(lambda text: "web Running" in text and "TYPE" not in text and "IOPS" in text)
    assert max(map(len, screen.splitlines())) <= 50
    terminal.resize(120, 30)
    terminal.wait(lambda text: "TYPE" in text and "RESTARTS" in text)
    terminal.keys("q")
    assert PROMPT.search(terminal.wait(PROMPT.search)).group(1) == "0"  # type: ignore[union-attr]
    assert "NAME" not in terminal.screen(), "the screen before top is back"
    assert terminal.settings() == before


@pytest.mark.parametrize(("how", "status"), [("C-c", "130"), (signal.SIGTERM, "143"), ("the VM ends", "3")])
def test_top_gives_the_terminal_back(loaded: Steer, terminal: Terminal, how: str | int, status: str) -> None:
    before = terminal.settings()
    command(terminal, "top", "web", "--interval", "0.3")
    terminal.wait(lambda text: line(text, "vcpu0"))
    assert terminal.settings() != before
    if how == "the VM ends":
        loaded.client.call("shutdown")
    elif isinstance(how, str):
        terminal.keys(how)
    else:
        os.kill(terminal.child(), how)
    found = PROMPT.search(terminal.wait(PROMPT.search))
    assert found is not None and found[1] == status
    assert terminal.settings() == before


def test_console_is_attached_typed_at_and_left(vm: Vm, terminal: Terminal) -> None:
    before = terminal.settings()
    with steer(vm, "test=console text=hello lines=3", console="pty", extra=["--name", "web"]) as steered:
        for _ in range(2):
            command(terminal, "console")
            terminal.wait(lambda text: "Ctrl-] leaves" in text)
            terminal.keys("s", "a", "y", "Enter")
            terminal.wait(lambda text: "SAY" in text)
            terminal.keys("C-]")
            found = PROMPT.search(terminal.wait(PROMPT.search))
            assert found is not None and found[1] == "0"
            assert terminal.settings() == before
            assert steered.client.call("info")["state"] == "Running"
            terminal.type(["clear"])
            terminal.wait(lambda text: "SAY" not in text)


@pytest.mark.usefixtures("loaded")
def test_ls_and_tree_draw(terminal: Terminal) -> None:
    for words in (["ls"], ["tree", "web"]):
        command(terminal, *words)
        screen = terminal.wait(PROMPT.search)
        assert "left=0" in screen
        assert re.search(r"web +Running" if words[0] == "ls" else r"└─|├─", screen)
        terminal.type(["clear"])
        terminal.wait(lambda text: "left=" not in text)
