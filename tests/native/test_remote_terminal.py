"""`console` and `logs` of a VM on another machine, as somebody at a terminal has them: over TCP, with keys, in tmux."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cellvisor.core.wire import keys
from cellvisor.ctl import remotes
from tests.native.guest import needs_kvm
from tests.native.owned import OwnedVm, wait_for
from tests.native.test_terminal import PROMPT, command
from tests.native.tmux import Terminal
from tests.unit.test_remote import free_ports

pytestmark = [pytest.mark.kvm, needs_kvm]


@dataclass
class Far:
    """A VM, and what a client has to know of it."""

    vm: OwnedVm
    where: Path
    port: int
    server: str

    def name(self, server: str = "", key: str = "laptop") -> None:
        """Write remotes.toml."""
        Path(remotes.path()).write_text(f'[moon]\naddress = "tcp://127.0.0.1:{self.port}"\n'
                                        f'server = "{server or self.server}"\nkey = "{key}"\n')

    def terminal(self) -> Terminal:
        """Return a terminal on a machine where no VM runs."""
        place = self.where / "near"
        place.mkdir(exist_ok=True)
        return Terminal(Path(self.vm.runtime), {"XDG_RUNTIME_DIR": str(place), "XDG_CONFIG_HOME": str(self.where)})


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    server, laptop, _ = (keys.make_pair(keys.key_file(name)).public for name in ("server", "laptop", "thief"))
    (tmp_path / "cellvisor" / "clients.toml").write_text(f'laptop = "{laptop}"\n')
    port = free_ports()
    with OwnedVm(tmp_path, "test=console text=hello lines=9999", (), "--console", "pty", "--api",
                 f"tcp://127.0.0.1:{port}") as vm:
        vm.running.wait_for("written=")
        found = Far(vm, tmp_path, port, server)
        found.name()
        yield found


@pytest.fixture
def terminal(far: Far) -> Iterator[Terminal]:
    made = far.terminal()
    yield made
    made.close()


def left(terminal: Terminal) -> str:
    """Wait until the command has ended; returns its exit status."""
    found = PROMPT.search(terminal.wait(PROMPT.search))
    assert found is not None
    return found[1]


def test_a_console_is_attached_typed_at_resized_and_left(far: Far, terminal: Terminal) -> None:
    before = terminal.settings()
    command(terminal, "console", "moon")
    terminal.wait(lambda text: "Ctrl-] leaves" in text and "hello" in text)
    terminal.keys("s", "a", "y", "Enter")
    terminal.wait(lambda text: "SAY" in text)
    far.vm.running.wait_for("size.0=120x30")
    terminal.resize(90, 20)
    lines = iter(range(1, 9999))

    def told() -> bool:
        line = next(lines)  # the size travels beside the keys
        terminal.keys("x", "Enter")
        return "=90x20\n" in far.vm.running.wait_for(f"size.{line}=")

    wait_for(told, "the new size")
    terminal.keys("C-]")
    assert left(terminal) == "0"
    assert terminal.settings() == before
    assert far.vm.call("info")["state"] == "Running"


def test_two_are_at_it_and_one_may_be_stopped(far: Far, terminal: Terminal) -> None:
    command(terminal, "console", "moon")
    terminal.wait(lambda text: "hello" in text)
    where = Path(far.vm.runtime) / "second"
    where.mkdir()
    other = Terminal(where, {"XDG_RUNTIME_DIR": str(far.where / "near"), "XDG_CONFIG_HOME": str(far.where)})
    try:
        command(other, "console", "moon", "--device", "console")
        other.wait(lambda text: "Ctrl-] leaves" in text)
        wait_for(lambda: _typed(terminal, other), "what is typed at the one to be seen at the other")
        os.kill(terminal.child(), signal.SIGSTOP)
        for word in ("one", "two", "three"):
            other.keys(word, "Enter")
            other.wait(lambda text, word=word: f"{word.upper()}\n" in text)  # type: ignore[misc]
        assert "THREE" not in terminal.screen()
        os.kill(terminal.child(), signal.SIGCONT)
        terminal.wait(lambda text: re.search(r"ONE\s+TWO\s+THREE\n", text))
        other.keys("C-]")
        assert left(other) == "0"
        terminal.keys("o", "n", "Enter")
        terminal.wait(lambda text: "ON\n" in text)
    finally:
        other.close()
    terminal.keys("C-]")
    assert left(terminal) == "0"


def _typed(one: Terminal, other: Terminal) -> bool:
    one.keys("t", "Enter")
    one.wait(lambda text: "T" in text)
    return "T\n" in other.screen()


@pytest.mark.parametrize("verb", ["console", "logs"])
def test_its_controlplane_dies_and_it_goes_on(far: Far, terminal: Terminal, verb: str) -> None:
    before = terminal.settings()
    command(terminal, *(["console", "moon"] if verb == "console" else ["logs", "-f", "-n", "3", "moon"]))
    terminal.wait(lambda text: ("hello" if verb == "console" else " controlplane ") in text)
    far.vm.kill_controlplane()
    terminal.wait(lambda text: "the connection to moon at" in text and "is lost" in text)
    far.vm.wait_adopted(2)
    if verb == "console":
        terminal.wait(lambda text: "connected again" in text)
        terminal.keys("s", "a", "y", "Enter")
        terminal.wait(lambda text: "SAY" in text)
        terminal.keys("C-]")
        assert left(terminal) == "0"
        assert terminal.settings() == before
    else:
        terminal.wait(lambda text: "vmm.adopted" in text)
        terminal.keys("C-c")
        terminal.wait(lambda text: text.rstrip().endswith("^C\n$"))


@pytest.mark.parametrize("verb", ["console", "logs"])
def test_the_vm_ends_and_one_line_says_so(far: Far, terminal: Terminal, verb: str) -> None:
    before = terminal.settings()
    command(terminal, *(["console", "moon"] if verb == "console" else ["logs", "-f", "moon"]))
    terminal.wait(lambda text: ("hello" if verb == "console" else " controlplane ") in text)
    far.vm.call("shutdown")
    status = left(terminal)
    screen = terminal.screen().replace("\n", "")
    if "the console was closed" in screen:
        assert status == "0"
    else:
        assert status == "4"
        assert len(re.findall("cellvisor: the connection to moon at .* is lost: ", screen)) == 1
    assert terminal.settings() == before


@pytest.mark.parametrize("verb", ["console", "logs"])
@pytest.mark.parametrize("whose", ["server", "client"])
def test_wrong_keys_are_refused(far: Far, terminal: Terminal, verb: str, whose: str) -> None:
    thief = keys.read_pair(keys.key_file("thief")).public
    if whose == "server":
        far.name(server=thief)
    else:
        far.name(key="thief")
    command(terminal, verb, "moon")
    assert left(terminal) == "1"
    screen = terminal.screen().replace("\n", "")
    assert screen.count("cellvisor: moon at tcp://127.0.0.1:") == 1
    assert "refused: it is not the server" in screen if whose == "server" else "refused: it does not know" in screen
    assert "hello" not in screen
