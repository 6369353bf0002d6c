"""A real core process with the test as its controlplane, a real nursery, and a worker that lies.

    with RealCore(tmp) as core:                   slot 1: an honest virtio-rng
        with Lying(core, "good"):                 slot 2: the liar's; each Lying is its next generation
            core.boot()
        with Lying(core, "deed") as liar:
            liar.served().go()
        core.check()              the VM runs, can be reset, and its guest is served by the honest device
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from cellvisor.core.errors import CellvisorError, from_wire
from cellvisor.core.virtio import transport
from cellvisor.core.wire import places
from cellvisor.core.wire.messages import CoreVerb, pack, unpack
from cellvisor.core.wire.spec import Spec
from tests.fakes.core import NurseryProcess
from tests.fakes.pci import Bench
from tests.native.guest import build

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 30.0
TOKEN = "token"
# The guest's script: bring the device in slot 2 to DRIVER_OK with queue 0, its rings at 32 MiB,
ACTIVATE = (
    "w8 2.common+20 1", "w8 2.common+20 3", "w32 2.common+8 1", "w32 2.common+12 1", "w8 2.common+20 11",
    "w16 2.common+22 0", "w32 2.common+32 0x2000000", "w32 2.common+40 0x2001000", "w32 2.common+48 0x2002000",
    "w16 2.common+28 1", "w8 2.common+20 15")


def kicks(spec: Spec) -> tuple[str, ...]:
    """Return a script that kicks that queue by its doorbell and through PCI configuration space (4.1.4.9), and masks
    and unmasks its interrupt."""
    bench = Bench(spec)
    window, msix = bench.driver.pci_cfg, bench.driver.msix
    bench.close()
    entry = f"2.bar0+{transport.MSIX_TABLE + 16}"
    return ("w16 2.notify 0", f"cw8 2 {window + 4} 0", f"cw32 2 {window + 8} {transport.NOTIFY}",
            f"cw32 2 {window + 12} 2", "loop 50", f"cw16 2 {window + 16} 0", "end",
            "w16 2.common+26 1", f"w32 {entry} 0xfee00000", f"w32 {entry}+8 0x55", f"cw16 2 {msix + 2} 0x8000",
            "loop 50", f"w32 {entry}+12 0", f"w32 {entry}+12 1", "end", f"cw16 2 {msix + 2} 0",
            "loop 50", "r8 2.isr", "end")


def rss(pid: int) -> int:
    """Return a process's resident memory in MiB, guest RAM and other shared mappings left out."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) >> 10


class RealCore:
    """The core process. `script` is run by the guest at each boot, before it uses the honest device."""

    def __init__(self, where: Path, script: tuple[str, ...] = ()) -> None:
        self.where = where
        self.log = where / "log"
        self.serial = where / "serial"
        self.events: list[dict[str, Any]] = []
        module = where / "script"
        module.write_text("".join(f"{line}\n" for line in script))
        ready, told = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cellvisor.core", "--run-dir", str(where), "--token", TOKEN, "--ready-fd", str(told),
             "--log-file", str(self.log)], pass_fds=[told], stderr=subprocess.DEVNULL)
        os.close(told)
        with open(ready, "rb") as pipe:
            assert pipe.read(1), "core did not start"
        self.context = zmq.Context()
        self.sock: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        self.sock.setsockopt(zmq.LINGER, 0)
        self.sock.setsockopt(zmq.IDENTITY, f"controlplane/1/{TOKEN}".encode())
        self.sock.connect(f"ipc://{where / places.CONTROL}")
        self._numbers = self.heard = 0
        self._answers: dict[int, dict[str, Any]] = {}
        tests = f"test={'script,' if script else ''}rng bytes=2000 end=stay"
        self.ask(CoreVerb.CONFIGURE, memory={"size": 64 << 20}, serial={"mode": "file", "file": str(self.serial)},
                 payload={"kernel": str(build()), "cmdline": tests, "initramfs": str(module) if script else ""})
        self.nursery = NurseryProcess(where)
        self.attach("honest", 1)
        self.honest = self.nursery.spawn(where, "rng", {"src": "/dev/urandom"}, "honest")["pid"]
        self.wait("device.ready", device="honest")
        self.boots = self.generation = self.at_first = 0

    # ---- the controlplane's part

    def ask(self, verb: CoreVerb, seconds: float = SECONDS, /, **args: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        self._numbers += 1
        number = self._numbers
        self.sock.send(pack({"id": number, "verb": str(verb), "args": args}))
        self.until(lambda: number in self._answers, seconds)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise from_wire(answer["error"])
        ok: dict[str, Any] = answer["ok"]
        return ok

    def until(self, done: Callable[[], Any], seconds: float = SECONDS) -> None:
        """Read core's messages until `done()`."""
        end = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None, f"core ended\n{self.text()}"
            assert time.monotonic() < end, f"nothing in {seconds} s, only {self.events[-20:]}\n{self.text()}"
            while self.sock.poll(10):
                data = self.sock.recv()
                self.heard = max(self.heard, len(data))
                body = unpack(data)
                if "event" in body:
                    self.events.append({"event": body["event"], **body["properties"]})
                else:
                    self._answers[body["id"]] = body

    def wait(self, name: str, seconds: float = SECONDS, **properties: Any) -> dict[str, Any]:
        """Wait for an event and forget it."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            for event in self.events:
                if event["event"] == name and all(event.get(key) == value for key, value in properties.items()):
                    self.events.remove(event)
                    found.append(event)
                    return True
            return False

        self.until(there, seconds)
        return found[0]

    def attach(self, device: str, slot: int, generation: int = 1, **limits: float) -> None:
        """Have core expect a worker."""
        self.ask(CoreVerb.ATTACH, device=device, type="rng", slot=slot, generation=generation, token=TOKEN, **limits)

    def boot(self) -> None:
        """Boot the guest and let it use the honest device."""
        self.ask(CoreVerb.BOOT)
        self._served()

    def _served(self) -> None:
        self.boots += 1
        self.until(lambda: len(re.findall(r"^result=.*\n", self.said(), re.M)) >= self.boots)
        assert self.said().count("result=ok\n") == self.boots, self.said()

    def said(self) -> str:
        """Return what the guest said."""
        return self.serial.read_text() if self.serial.exists() else ""

    def text(self) -> str:
        """Return what core and the workers logged."""
        return self.log.read_text()[-4000:] if self.log.exists() else ""

    def descriptors(self) -> int:
        """Return how many descriptors core has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def devices(self) -> dict[str, dict[str, Any]]:
        """Return what core knows of its devices."""
        return {one["device"]: one for one in self.ask(CoreVerb.DEVICES)["devices"]}

    def check(self, seconds: float = SECONDS) -> None:
        """The same core answers, nobody else's worker died, the guest can be reset and is served again."""
        assert self.ask(CoreVerb.INFO)["state"] == "running"
        honest = self.devices()["honest"]
        assert (honest["state"], honest["pid"], honest["failure"]) == ("serving", self.honest, "")
        assert self.ask(CoreVerb.CALL, device="honest", verb="counters")["result"]["bytes"] > 0
        self.ask(CoreVerb.RESET, seconds)
        self._served()

    def expelled(self) -> str:
        """Wait until core gave up on the liar of the day; returns why."""
        return str(self.wait("device.failed", device="liar", generation=self.generation)["reason"])

    def close(self) -> None:
        """End core and its workers."""
        with contextlib.suppress(CellvisorError, AssertionError):
            self.ask(CoreVerb.QUIT, 5)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.nursery.close()
        self.sock.close()
        self.context.term()

    def __enter__(self) -> RealCore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def booted(core: RealCore) -> None:
    """Boot with a liar that does not lie yet."""
    with Lying(core, "good") as good:
        good.served()
        core.boot()
        core.at_first = rss(core.process.pid)
    core.wait("device.failed", device="liar")


class Lying:
    """A process that runs `deed` of tests/fakes/lies_*.py as the worker of device "liar"."""

    def __init__(self, core: RealCore, deed: str, *arguments: str, **limits: float) -> None:
        self.core = core
        core.generation = generation = core.generation + 1
        core.attach("liar", 2, generation, **limits)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.lie", str(core.where), f"liar/{generation}/{TOKEN}", deed, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def served(self) -> Lying:
        """Wait until it has said READY."""
        self.core.wait("device.ready", device="liar", generation=self.core.generation)
        return self

    def go(self) -> None:
        """Let a deed that waits for it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def says(self) -> Any:
        """Return the next thing that it tells the test."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait()}\n{self.core.text()}"
        return json.loads(line)

    def is_killed(self) -> bool:
        """Wait until it is killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(SECONDS) == -signal.SIGKILL
        return False

    @property
    def is_alive(self) -> bool:
        """Has nobody killed it?"""
        return self.process.poll() is None

    def __enter__(self) -> Lying:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
