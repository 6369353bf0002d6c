"""The lab's own machinery, without an emulated machine: builds, archives, grouping, and pytest over the agent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

from tests.debian import Missing, need
from tests.lab import demo, image, initramfs, place, recipe, tree
from tests.lab.l1 import Hung
from tests.lab.recipe import CHECKOUT


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLVISOR_LAB_CACHE", str(tmp_path))

    def fill_the_disk(into: Path) -> None:
        (into / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupt(into: Path) -> None:
        (into / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "BUILD_BYTES", 1)
    with pytest.raises(Missing, match=f"no space left in {tmp_path}"):
        image._built("l1", fill_the_disk)
    with pytest.raises(KeyboardInterrupt):
        image._built("l1", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["l1.lock"]
    monkeypatch.setattr(recipe, "BUILD_BYTES", 1 << 62)
    with pytest.raises(Missing, match="MiB free"):
        image._built("l1", interrupt)


def test_a_build_happens_once_and_replaces_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLVISOR_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(recipe, "BUILD_BYTES", 1)
    for moment, name in enumerate(("l1-older", "l1-oldest", "guests-other")):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (10 - moment, 10 - moment))
    builds: list[Path] = []
    first = image._built("l1", builds.append)
    assert image._built("l1", builds.append) == first
    assert len(builds) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"l1.lock", "l1-older", "guests-other", first.name}


def test_archives_are_cpio_and_can_follow_each_other(tmp_path: Path) -> None:
    busybox = need("busybox", "busybox-static")
    first, second = initramfs.Archive(), initramfs.overlay({"init": b"#!/bin/sh\n", "a/b/odd": b"12345"})
    first.file("etc/name", b"one")
    first.link("etc/link", "name")
    for number, data in enumerate((first.to_bytes(), second)):
        assert len(data) % 4 == 0, "the kernel looks for the next archive at a multiple of four"
        folder = tmp_path / str(number)
        folder.mkdir()
        subprocess.run([busybox, "cpio", "-i", "-d"], input=data, cwd=folder, check=True, capture_output=True)
    assert (tmp_path / "0/etc/link").read_text() == "one"
    assert (tmp_path / "1/a/b/odd").read_bytes() == b"12345"
    assert os.access(tmp_path / "1/init", os.X_OK)


def test_modules_come_with_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("kernel/a-b.ko: kernel/c.ko kernel/d.ko.xz\nkernel/c.ko:\nkernel/x.ko:\n")
    (tmp_path / "modules.builtin").write_text("kernel/inside.ko\n")
    assert initramfs.closure(tmp_path, ["a_b", "inside"]) == ["kernel/a-b.ko", "kernel/c.ko", "kernel/d.ko.xz"]
    with pytest.raises(KeyError, match="nowhere"):
        initramfs.closure(tmp_path, ["nowhere"])


def test_the_tree_holds_sources_links_and_the_extension(tmp_path: Path) -> None:
    with tarfile.open(tree.pack(tmp_path / "tree.tar")) as tar:
        names = set(tar.getnames())
        assert tar.getmember("src/cellvisor/core").issym()
    assert {"tests/lab/agent.py", "pyproject.toml", "core/errors.py"} <= names
    assert any(name.startswith("core/_native/_native") and name.endswith(".so") for name in names)
    assert not any(part in name.split("/") for name in names for part in (".venv", ".git", ".lab", "build"))


@pytest.mark.parametrize(("wish", "direct"), [("nested", False), ("direct", True)])
def test_the_place_can_be_chosen(monkeypatch: pytest.MonkeyPatch, wish: str, direct: bool) -> None:
    monkeypatch.delenv("CELLVISOR_IN_LAB", raising=False)
    monkeypatch.setenv("CELLVISOR_LAB", wish)
    assert place.find().direct is direct
    monkeypatch.setenv("CELLVISOR_LAB", wish + "x")
    with pytest.raises(ValueError, match="write nested or direct"):
        place.find()


@pytest.mark.parametrize(("hangs", "status", "machines"), [(0, 0, 1), (1, 0, 2), (2, 2, 2)])
def test_a_demo_whose_machine_hangs_runs_once_more(monkeypatch: pytest.MonkeyPatch, hangs: int, status: int,
                                                   machines: int, capsys: pytest.CaptureFixture[str]) -> None:
    booted: list[Machine] = []

    class Machine:
        boot_seconds = 1.0

        def __enter__(self) -> Machine:
            booted.append(self)
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def run(self, *args: object, **more: object) -> tuple[int, str]:
            if len(booted) <= hangs:
                raise Hung("its heart stopped")
            return 0, ""

    monkeypatch.delenv("CELLVISOR_IN_LAB", raising=False)
    monkeypatch.setenv("CELLVISOR_LAB", "nested")
    monkeypatch.setattr(image, "l1", lambda: None)
    monkeypatch.setattr(demo, "L1", Machine)
    assert demo.main() == status
    assert len(booted) == machines
    assert capsys.readouterr().out.count("runs once more") == min(hangs, 1)


CONFTEST = """
import os, socket, sys, threading
from tests.lab import agent, farm, l1
from tests.lab.agent import Agent, Port
from tests.lab.conftest import pytest_report_collectionfinish, pytest_runtestloop
from tests.lab.l1 import L1

class Local(L1):
    '''The agent in a thread of this process in place of a machine.'''
    def start(self):
        if os.path.exists("stop-heart"):
            os.unlink("stop-heart")
        self._socket, theirs = socket.socketpair()
        threading.Thread(target=Agent(Port(theirs.detach())).serve, daemon=True).start()
        threading.Thread(target=self._read, args=(self._socket,), daemon=True).start()
        assert self._hello.wait(10)
    def job(self, argv, env=None, cwd="", channel=False):
        env = {**(env or {}), "CELLVISOR_IN_LAB": "1", "PYTHONPATH": os.environ["PYTHONPATH"]}
        return super().job([sys.executable, *argv[1:]], env=env, cwd=os.getcwd(), channel=channel)

farm.L1 = Local
agent.BEAT_SECONDS, l1.HANGS_AFTER = 0.2, 2.0
beat = Agent.send

def send(self, message):
    if "beat" in message and os.path.exists("stop-heart"):
        self.is_hung = True
    if not hasattr(self, "is_hung"):
        beat(self, message)

Agent.send = send
"""

TESTS = """
import os, signal, time, pytest

def test_here():
    assert "CELLVISOR_IN_LAB" not in os.environ

@pytest.mark.lab
def test_there():
    assert os.environ["CELLVISOR_IN_LAB"] == "1"

@pytest.mark.lab
def test_fails():
    print("printed there")
    wanted = 2
    assert wanted == 3

@pytest.mark.lab
@pytest.mark.skip(reason="not today")
def test_skipped(): pass

@pytest.fixture
def broken():
    raise OSError("fixture is broken")

@pytest.mark.lab
def test_error(broken): pass

@pytest.mark.lab
def test_kills_its_machine():
    os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.lab
def test_machine_hangs_once():
    if not os.path.exists("stopped-heart"):
        for name in ("stopped-heart", "stop-heart"):
            open(name, "x").close()
        time.sleep(60)

@pytest.mark.lab
def test_after_that(): pass
"""


def test_reports_come_back_as_if_run_here(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = lab\n")
    (tmp_path / "conftest.py").write_text(textwrap.dedent(CONFTEST))
    (tmp_path / "test_some.py").write_text(TESTS)
    environment = {key: value for key, value in os.environ.items() if key != "CELLVISOR_IN_LAB"} | {
        "CELLVISOR_LAB": "nested", "CELLVISOR_LAB_CACHE": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=120, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "2 failed, 4 passed, 1 skipped, 1 error" in text, text
    assert "7 tests run in the nested lab, not on this machine: CELLVISOR_LAB=nested says so" in text
    for line in ("PASSED test_some.py::test_here", "PASSED test_some.py::test_there",
                 "FAILED test_some.py::test_fails - assert 2 == 3", "printed there", "not today",
                 "ERROR test_some.py::test_error - OSError: fixture is broken",
                 "FAILED test_some.py::test_kills_its_machine - L1-0 died under this test",
                 "L1-0 hung under test_some.py::test_machine_hangs_once, which runs once more",
                 "PASSED test_some.py::test_machine_hangs_once", "PASSED test_some.py::test_after_that"):
        assert line in text, text
