"""A fake core for real workers: its ROUTER, its descriptor socket, a fake guest, and the nursery as a process.

    with FakeCore(run_dir) as core, NurseryProcess(core) as nursery:
        link = core.start(nursery, "rng", {})      spawned, HELLO seen, descriptors given, READY seen
        link.activate(); link.drivers[0].add(...)
Everything happens in the test's thread, while it waits for something.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from cellvisor.core.ring.state import StateMap, create_state
from cellvisor.core.wire import fdpass
from cellvisor.core.wire.messages import FromNursery, ToCore, ToNursery, ToWorker, pack, unpack
from cellvisor.core.wire.places import CORE, FDS, NURSERY
from cellvisor.core.wire.spec import Spec, spec_from_wire
from tests.fakes.driver import FakeDriver, FakeGuest

SECONDS = 30.0


class NurseryProcess:
    """The real nursery; `core_pidfd` is passed on. Requests go to its socket, reports come from it."""

    def __init__(self, run_dir: Path, core_pidfd: int = -1, environ: dict[str, str] | None = None) -> None:
        self.run_dir = run_dir
        ready, told = os.pipe()
        keep = [told] + ([core_pidfd] if core_pidfd >= 0 else [])
        argv = [sys.executable, "-m", "cellvisor.devices.nursery", "--socket", str(run_dir / NURSERY),
                "--ready-fd", str(told), "--log", str(run_dir / "log"), "--core-pidfd", str(core_pidfd)]
        self.process = subprocess.Popen(argv, pass_fds=keep, env={**os.environ, **(environ or {})},
                                        stderr=subprocess.DEVNULL)
        os.close(told)
        with open(ready, "rb") as pipe:
            assert pipe.read(1) == b"\n", "the nursery did not start"
        self.connect()
        self.pidfds: list[int] = []

    def connect(self) -> None:
        """Connect, as the next controlplane would."""
        self.sock = fdpass.connect(str(self.run_dir / NURSERY))
        self.sock.settimeout(SECONDS)

    def ask(self, kind: ToNursery, **body: Any) -> None:
        """Send a request."""
        fdpass.send(self.sock, {"k": kind, **body})

    def told(self) -> dict[str, Any]:
        """Wait for the next report. A SPAWNED one has its pidfd in "pidfd"."""
        packet = fdpass.receive(self.sock)
        assert packet is not None, "the nursery hung up"
        body, fds = packet
        self.pidfds += fds
        return {**body, "pidfd": fds[0]} if fds else body

    def spawn(self, run_dir: Path, kind: str, options: dict[str, Any], device: str = "dev0",
              generation: int = 1, **more: Any) -> dict[str, Any]:
        """Have a worker forked (`more`: suspect, drain); returns SPAWNED."""
        self.ask(ToNursery.SPAWN, device=device, generation=generation, type=kind, options=options,
                 token="token", run_dir=str(run_dir), **more)
        report = self.told()
        assert report["k"] == FromNursery.SPAWNED, report
        return report

    def log(self) -> str:
        """Return what the nursery and its workers logged."""
        return (self.run_dir / "log").read_text()

    def close(self) -> None:
        """End it with QUIT, or with force."""
        with contextlib.suppress(OSError):
            self.ask(ToNursery.QUIT)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.sock.close()  # not before: with reports unread it would take the QUIT along
        for fd in self.pidfds:
            os.close(fd)

    def __enter__(self) -> NurseryProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class FakeLink:
    """One device: the state memfd and the fake drivers, which outlive its workers."""

    def __init__(self, core: FakeCore, device: str, spec: Spec) -> None:
        self.core, self.device, self.spec = core, device, spec
        self.identity, self.kind = b"", ""
        self.state_fd = create_state(spec.queues, spec.private_size)
        self.state = StateMap(self.state_fd)
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.drivers: list[FakeDriver] = []
        self.epoch = 0
        self.renew()

    def renew(self) -> None:
        """Have fresh rings, as after a driver's reset; the eventfds stay."""
        old = self.drivers
        self.drivers = [FakeDriver(size, guest=self.core.guest) for size in self.spec.queues]
        for driver, before in zip(self.drivers, old, strict=False):
            for fd, kept in ((driver.kick_fd, before.kick_fd), (driver.call_fd, before.call_fd)):
                os.dup2(kept, fd)
                os.close(kept)

    def given(self) -> dict[str, int]:
        """Return the worker's descriptors by name."""
        given = {"ram": self.core.guest.ram_fd, "table": self.core.guest.table.fd, "state": self.state_fd,
                 "config": self.eventfds[0], "ping": self.eventfds[1]}
        for index, driver in enumerate(self.drivers):
            given |= {f"kick{index}": driver.kick_fd, f"call{index}": driver.call_fd}
        return given

    def send(self, kind: ToWorker, **body: Any) -> None:
        """Send to the worker."""
        self.core.router.send_multipart([self.identity, pack({"k": kind, **body})])

    def activate(self, *, again: bool = False, paused: bool = False) -> None:
        """Say DRIVER_OK: a new epoch, or `again` the present one to the next incarnation."""
        self.epoch += 0 if again else 1
        features = self.spec.features | self.drivers[0].features
        self.send(ToWorker.ACTIVATE, epoch=self.epoch, features=features, paused=paused, queues=[
            {"index": index, "size": driver.size, "desc": driver.desc, "avail": driver.avail,
             "used": driver.used_ring} for index, driver in enumerate(self.drivers)])

    def reset(self) -> None:
        """Reset the device and wait for RESET_DONE."""
        self.send(ToWorker.RESET, epoch=self.epoch)
        assert self.core.told(ToCore.RESET_DONE, self.device)["epoch"] == self.epoch
        self.renew()

    def call(self, verb: str, **args: Any) -> dict[str, Any]:
        """Have a verb served; returns REPLY."""
        self.send(ToWorker.CALL, id=7, verb=verb, args=args)
        reply = self.core.told(ToCore.REPLY, self.device)
        assert reply["id"] == 7
        return reply

    def used(self, count: int, index: int = 0) -> dict[int, int]:
        """Wait until `count` chains are used; returns head to length."""
        found: dict[int, int] = {}

        def enough() -> bool:
            found.update(self.drivers[index].used())
            return len(found) >= count

        self.core.until(enough)
        return found

    def request(self, readable: list[bytes], writable: list[int], index: int = 0) -> bytes:
        """Send one chain and return its writable part once it is used."""
        head = self.drivers[index].add(readable, writable)
        self.drivers[index].offer()
        length = self.used(1, index)[head]
        return self.drivers[index].data(head, length)

    def close(self) -> None:
        """Close all descriptors."""
        for driver in self.drivers:
            driver.close()
        self.state.close()
        for fd in (self.state_fd, *self.eventfds):
            os.close(fd)


class FakeCore:
    """core.sock and fds.sock in `run_dir`, served while something is awaited."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.guest = FakeGuest(16 << 20)
        self.context = zmq.Context()
        self.router: zmq.Socket[bytes] = self.context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.router.bind(f"ipc://{run_dir / CORE}")
        self.listener = fdpass.listen(str(run_dir / FDS))
        self.peers: list[socket.socket] = []
        self.links: dict[str, FakeLink] = {}
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.store: dict[str, int] = {}
        self.waiting: list[tuple[str, socket.socket]] = []

    def until(self, done: Callable[[], Any], seconds: float = SECONDS) -> None:
        """Serve until `done()`."""
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"nothing came; so far {self.messages}"
            self.serve()

    def serve(self) -> None:
        """Serve what is there, waiting a moment for it."""
        while self.router.poll(0):
            identity, data = self.router.recv_multipart()
            self._message(identity, unpack(data))
        poll = select.poll()
        poll.register(int(self.router.getsockopt(zmq.FD)), select.POLLIN)
        for sock in (self.listener, *self.peers):
            poll.register(sock, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(10)}
        for sock in [peer for peer in self.peers if peer.fileno() in ready]:
            self._descriptors(sock)
        if self.listener.fileno() in ready:
            self.peers.append(self.listener.accept()[0])

    def _message(self, identity: bytes, body: dict[str, Any]) -> None:
        device = identity.decode().split("/")[0]
        if body["k"] == ToCore.HELLO:
            spec = self.links[device].spec if body.get("drain") else spec_from_wire(body["spec"])
            link = self.links.setdefault(device, FakeLink(self, device, spec))
            assert link.spec == spec
            link.identity, link.kind = identity, body["type"]
        self.messages.append((device, body))
        for name, sock in list(self.waiting):
            if name in self.links:
                self.waiting.remove((name, sock))
                self._give(name, sock)

    def _give(self, device: str, sock: socket.socket) -> None:
        given = self.links[device].given()
        fdpass.send(sock, {"names": list(given)}, list(given.values()))

    def _descriptors(self, sock: socket.socket) -> None:
        packet = fdpass.receive(sock)
        if packet is None:
            self.peers.remove(sock)
            sock.close()
            return
        body, fds = packet
        device = body["identity"].split("/")[0]
        if "deposit" in body:
            self.store[f"{device}/{body['deposit']}"] = fds[0]
            fdpass.send(sock, {"ok": True})
        elif "get" in body:
            fd = self.store.get(f"{device}/{body['get']}")
            fdpass.send(sock, {"ok": fd is not None}, [] if fd is None else [fd])
        elif device in self.links and self.links[device].identity.decode() == body["identity"]:
            self._give(device, sock)
        else:
            self.waiting.append((device, sock))

    def told(self, kind: ToCore, device: str = "dev0") -> dict[str, Any]:
        """Wait for a message of `kind` and take it out."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            for item in self.messages:
                if item[0] == device and item[1]["k"] == kind:
                    self.messages.remove(item)
                    found.append(item[1])
                    return True
            return False

        self.until(there)
        return found[0]

    def start(self, nursery: NurseryProcess, kind: str, options: dict[str, Any], device: str = "dev0",
              generation: int = 1, **more: Any) -> FakeLink:
        """Spawn a worker and see it to READY."""
        self.spawned = nursery.spawn(self.run_dir, kind, options, device, generation, **more)
        self.told(ToCore.HELLO, device)
        self.told(ToCore.READY, device)
        return self.links[device]

    def hang_up(self) -> None:
        """Die, as far as workers can see."""
        for sock in (*self.peers, self.listener):
            sock.close()
        self.peers.clear()

    def close(self) -> None:
        """Close everything."""
        self.hang_up()
        self.router.close()
        self.context.term()
        for link in self.links.values():
            link.close()
        for fd in self.store.values():
            os.close(fd)
        self.guest.close()

    def __enter__(self) -> FakeCore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def gone(pid: int, seconds: float = 10) -> bool:
    """Wait until process `pid` does not exist any more (a zombie still does)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def kill(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)
