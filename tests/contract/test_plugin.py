"""Devices from outside of the tree: the documented example, and one that fails in every way it can."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.wire.messages import ToCore, ToNursery, ToWorker
from tests.fakes.core import FakeCore, NurseryProcess
from tests.fakes.site import install

EXAMPLE = Path(__file__).parents[2] / "deploy" / "example-device"

BOOM = '''
from dataclasses import dataclass
from cellvisor.devices.device import DeviceBase, DeviceOptions, Spec, option

class Boom(DeviceBase):
    help = "fails"
    spec = Spec(virtio_id=4, queues=(8,))

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options(DeviceOptions):
        at: str = option("queue", help="where")

    def __init__(self, options, host):
        super().__init__(options, host)
        if options.at == "init":
            raise RuntimeError("at init")

    def on_queue(self, index, queue):
        queue.harvest()
        if self.options.at == "timer":
            self.host.after(0.01, lambda: [][1])
        else:
            raise RuntimeError("at queue")
'''


@pytest.fixture
def core(tmp_path: Path) -> Iterator[FakeCore]:
    with FakeCore(tmp_path) as core:
        yield core


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example as a user would, but into a directory of its own."""
    # Not find_spec("pip"): setuptools' hook warns there when an earlier test has imported distutils.
    if not any(True for _ in importlib.metadata.distributions(name="pip")):
        pytest.skip("pip is not in this environment")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in EXAMPLE.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
                    "--target", str(site), str(source)], check=True)
    return site


def test_example_is_found_and_serves(core: FakeCore, site: Path, tmp_path: Path) -> None:
    with NurseryProcess(tmp_path, environ={"PYTHONPATH": str(site)}) as nursery:
        nursery.ask(ToNursery.CATALOG)
        entry = nursery.told()["types"]["pattern"]
        assert entry["schema"]["keys"]["start"]["max"] == 255
        assert Path(entry["file"]).parent == site
        link = core.start(nursery, "pattern", {"start": 65})
        link.activate()
        assert link.request([], [3, 5]) == b"ABCDEFGH"
        assert link.request([], [2]) == b"IJ"
        assert link.call("counters")["ok"] == {"bytes": 10}
        link.send(ToWorker.END)
        assert nursery.told()["status"] == "exit 0"


def test_example_is_as_small_as_promised() -> None:
    lines = (EXAMPLE / "cellvisor_pattern.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 35


@pytest.fixture
def boom(tmp_path: Path) -> Iterator[NurseryProcess]:
    site = install(tmp_path, "boom", BOOM)
    with NurseryProcess(tmp_path, environ={"PYTHONPATH": str(site)}) as nursery:
        yield nursery


@pytest.mark.parametrize(("at", "reason"), [
    ("queue", "RuntimeError: at queue"), ("timer", "IndexError: list index out of range"),
])
def test_exception_ends_the_process_with_a_traceback(core: FakeCore, boom: NurseryProcess, at: str,
                                                     reason: str) -> None:
    link = core.start(boom, "boom", {"at": at})
    link.activate()
    link.drivers[0].add([b"x"])
    link.drivers[0].offer()
    assert core.told(ToCore.FAILED)["reason"] == reason
    assert boom.told()["status"] == "exit 1"
    assert f"{reason}" in boom.log()
    assert "Traceback" in boom.log()
    assert "dev0/1 ERROR" in boom.log()


def test_exception_in_the_constructor(core: FakeCore, boom: NurseryProcess) -> None:
    boom.spawn(core.run_dir, "boom", {"at": "init"})
    assert core.told(ToCore.FAILED)["reason"] == "RuntimeError: at init"
    assert boom.told()["status"] == "exit 1"


def test_fetched_request_is_served_by_the_next_incarnation(core: FakeCore, tmp_path: Path) -> None:
    """Killed between fetching and completing: the successor runs it again, once."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    keep = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    with NurseryProcess(tmp_path) as nursery:
        link = core.start(nursery, "rng", {"src": str(fifo)})
        link.activate()
        heads = [link.drivers[0].add([], [4]) for _ in range(3)]
        link.drivers[0].offer()
        link.call("counters")  # the kick was served before: the requests are fetched
        link.call("counters")
        os.kill(core.spawned["pid"], signal.SIGKILL)
        assert nursery.told()["status"] == "signal 9"
        core.start(nursery, "rng", {"src": str(fifo)}, generation=2)
        link.activate(again=True)
        os.write(keep, b"aaaabbbbcccc")
        found = link.used(3)
        assert found == dict.fromkeys(heads, 4)
        assert [link.drivers[0].data(head) for head in heads] == [b"aaaa", b"bbbb", b"cccc"]
    os.close(keep)
