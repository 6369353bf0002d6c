"""One device as core sees it: its PCI function, what it shares with its worker, and the worker of the day.

    waiting --HELLO--> greeted --READY--> serving --(pidfd)--> dead --expect()--> waiting (next generation)
       |                  |                  |
       +------------------+-- FAILED, END ---+--> dead

The function, eventfds and state memfd belong to the device and outlive its workers; ACTIVATE is sent again
with the same epoch to the next incarnation, which resumes from the state memfd.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict, UsageError, from_wire
from cellvisor.core.fds import Connection
from cellvisor.core.ring.state import StateMap, create_state
from cellvisor.core.virtio.device import VirtioPciDevice
from cellvisor.core.wire.messages import MAX_REASON, PROTOCOL, ToCore, ToWorker, plain
from cellvisor.core.wire.spec import Spec, spec_from_wire

MAX_CONFIG = 4096
MAX_DEPTH = 64  # of an answer, which travels on inside others
MAX_POISON = 16  # reports of one incarnation that are passed on
MAX_BACKEND = 1000
HANG_SECONDS = 5.0
IO_SECONDS = 30.0


class WorkerState(Enum):
    WAITING = "waiting"
    GREETED = "greeted"
    SERVING = "serving"
    DEAD = "dead"


class Home(Protocol):
    """What a link asks of the machine and its server; all on core's main thread."""

    lock: threading.RLock  # the board's: vCPU threads use the function too

    @property
    def paused(self) -> bool:
        """Must workers stay quiet?"""

    def send(self, identity: str, body: dict[str, Any]) -> None:
        """Send to a worker; one that is gone is ignored."""

    def build(self, link: Link) -> VirtioPciDevice:
        """Make the PCI function from link.spec; the guest does not see it yet."""

    def ready(self, link: Link) -> None:
        """The worker serves: the function may be shown."""

    def answered(self, link: Link, what: str) -> None:
        """`what` ("reset-done", "paused") came from the worker."""

    def failed(self, link: Link, reason: str) -> None:
        """The worker cannot serve or is gone."""

    def told(self, link: Link, what: str, **more: Any) -> None:
        """The driver did `what`: "activated" or "reset" a device that was active. "reset-waits": somebody must start
        a worker to finish it; "poison": the worker refused a request that killed its predecessors;
        "backend": it lost or found what it stands on."""

    def offer(self, connection: Connection) -> None:
        """Answer a worker that waits for its descriptors."""


@dataclass(slots=True)
class Worker:
    """One incarnation. `pidfd` stands for its process from its first connection to its end, else -1."""

    generation: int
    token: str
    state: WorkerState = WorkerState.WAITING
    connection: Connection | None = None
    pid: int = 0
    pidfd: int = -1
    expelled: bool = False
    poisoned: int = 0
    backends: int = 0
    config: bytes = b""  # as it said HELLO
    calls: dict[int, Callable[[Any, CellvisorError | None], None]] = field(default_factory=dict)


def _is_shallow(value: Any, depth: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in items)


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class Link:
    """Device `device` (its id) of type `kind` in PCI slot `slot`."""

    def __init__(self, home: Home, device: str, kind: str, slot: int) -> None:
        self.home = home
        self.device, self.kind, self.slot = device, kind, slot
        self.spec: Spec | None = None
        self.function: VirtioPciDevice | None = None
        self.worker: Worker | None = None
        self.kick_fds: list[int] = []
        self.call_fds: list[int] = []
        self.config_fd = _eventfd()  # core's alone: a worker says CONFIG
        self._ping_end, self.ping_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # a worker could fill an eventfd
        self.state_fd = -1
        self.state: StateMap | None = None
        self.activation: dict[str, Any] | None = None
        self.pending_reset: int | None = None
        self.values: dict[str, int] = {}
        self.failure = ""
        self.refused = False
        self.hang_timeout, self.io_timeout = HANG_SECONDS, IO_SECONDS  # core/watchdog.py; 0: for ever
        self._calls = 0
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            ToCore.HELLO: self._hello, ToCore.READY: self._ready, ToCore.RESET_DONE: self._reset_done,
            ToCore.PAUSED: lambda body: self.home.answered(self, "paused"), ToCore.CONFIG: self._config,
            ToCore.NEEDS_RESET: self._needs_reset, ToCore.FAILED: self._failed,
            ToCore.COUNTERS: self._counters, ToCore.REPLY: self._reply, ToCore.POISON: self._poison,
            ToCore.BACKEND: self._backend,
        }

    # ---- the worker of the day

    def expect(self, generation: int, token: str) -> None:
        """Accept messages of this incarnation only, from now on."""
        if self.worker is not None and generation <= self.worker.generation:
            raise Conflict(f"{self.device}: generation {generation} is not newer than {self.worker.generation}")
        if self.worker is not None:
            self._dismiss(self.worker)
        self.worker = Worker(generation, token)
        if self.state is not None:
            self.state.repair()
        self.failure, self.refused = "", False

    @property
    def identity(self) -> str:
        """The ZeroMQ routing id of the present worker."""
        worker = self.worker
        return f"{self.device}/{worker.generation}/{worker.token}" if worker else ""

    @property
    def alive(self) -> bool:
        """Is there a worker that serves?"""
        return self.worker is not None and self.worker.state is WorkerState.SERVING

    def send(self, kind: ToWorker, **body: Any) -> None:
        """Tell the present worker, if one serves."""
        if self.alive:
            self.home.send(self.identity, {"k": kind, **body})

    def died(self, reason: str) -> None:
        """The worker's process is gone."""
        worker = self.worker
        if worker is None or worker.state is WorkerState.DEAD:
            return
        worker.state = WorkerState.DEAD
        self._drop_calls(worker)
        self.failure = self.failure or reason
        self.home.failed(self, self.failure)
        if self.pending_reset is not None:
            self.home.told(self, "reset-waits")

    def _dismiss(self, worker: Worker) -> None:
        """Never two processes on one ring: a nursery that died may have forked one more than it could tell."""
        self._drop_calls(worker)
        if worker.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)

    def _drop_calls(self, worker: Worker) -> None:
        calls, worker.calls = worker.calls, {}
        for done in calls.values():
            done(None, CellvisorError(f"{self.device}: the device's process died", hint="try again"))

    def call(self, verb: str, args: dict[str, Any], done: Callable[[Any, CellvisorError | None], None]) -> None:
        """Have the device serve a verb; `done(result, error)` is called later."""
        if self.worker is None or not self.alive:
            raise Conflict(f"{self.device}: no process serves it now", hint="see `cellvisor devices`")
        self._calls += 1
        self.worker.calls[self._calls] = done
        self.send(ToWorker.CALL, id=self._calls, verb=verb, args=args)

    def descriptors(self, shared: dict[str, int]) -> tuple[list[str], list[int]] | None:
        """Return names and descriptors for the worker; `shared` are RAM and its table. None before Hello."""
        if self.spec is None or self.worker is None or self.worker.state is not WorkerState.GREETED:
            return None
        given = dict(shared, state=self.state_fd, ping=self._ping_end)
        given.update({f"kick{index}": fd for index, fd in enumerate(self.kick_fds)})
        given.update({f"call{index}": fd for index, fd in enumerate(self.call_fds)})
        return list(given), list(given.values())

    # ---- what the driver does, posted here from vCPU threads

    def activate(self, epoch: int, queues: list[dict[str, int]], features: int) -> None:
        """The driver said DRIVER_OK."""
        self.activation = {"epoch": epoch, "queues": queues, "features": features}
        self.send(ToWorker.ACTIVATE, **self.activation, paused=self.home.paused)
        self.home.told(self, "activated")

    def reset(self, epoch: int) -> None:
        """The driver wrote 0 to device_status. A dead worker's I/O may still live: only a successor, which
        has passed the fence, can end the reset (on its READY)."""
        if self.activation is not None:
            self.home.told(self, "reset")
        self.activation = None
        self.pending_reset = epoch
        if self.alive:
            self.send(ToWorker.RESET, epoch=epoch)
        else:
            self.home.told(self, "reset-waits")

    def config_write(self, offset: int, data: bytes) -> None:
        """The driver wrote to device config space."""
        self.send(ToWorker.CONFIG_WRITE, offset=offset, data=data)

    def _finish_reset(self, epoch: int) -> None:
        if self.pending_reset != epoch:
            return
        self.pending_reset = None
        if self.function is not None:
            with self.home.lock:
                self.function.reset_done(epoch)
        self.home.answered(self, "reset-done")

    # ---- what the worker says; it may lie

    def take(self, body: dict[str, Any]) -> None:
        """Serve one message of the present worker. Raises UsageError for one that makes no sense."""
        kind = body.get("k")
        handler = self._handlers.get(kind) if isinstance(kind, str) else None
        if handler is None:
            raise UsageError(f"unknown kind {plain(kind, 40)!r}")
        handler(body)

    def _require(self, state: WorkerState) -> Worker:
        worker = self.worker
        if worker is None or worker.state is not state:
            raise UsageError(f"worker is {worker.state.value if worker else 'absent'}, not {state.value}")
        return worker

    def _hello(self, body: dict[str, Any]) -> None:
        worker = self._require(WorkerState.WAITING)
        if body.get("protocol") != PROTOCOL:
            raise UsageError(f"protocol {plain(body.get('protocol'), 40)}, core speaks {PROTOCOL}")
        drains = body.get("drain") is True and self.spec is not None
        spec = self.spec if drains and self.spec is not None else spec_from_wire(body.get("spec"))
        if self.spec is None:
            self._learn(spec)
        elif (spec.queues, spec.virtio_id, spec.private_size) != (
                self.spec.queues, self.spec.virtio_id, self.spec.private_size):
            raise UsageError("its shape differs from its predecessor's")
        worker.state = WorkerState.GREETED
        worker.config = spec.config
        if worker.connection is not None:
            self.home.offer(worker.connection)

    def _learn(self, spec: Spec) -> None:
        """Make what belongs to the device, all of it or nothing. Raises UsageError for a Spec that cannot be built."""
        self.spec = spec
        try:
            for fds in (self.kick_fds, self.call_fds):
                for _ in spec.queues:
                    fds.append(_eventfd())
            self.state_fd = create_state(spec.queues, spec.private_size)
            self.state = StateMap(self.state_fd)
            self.function = self.home.build(self)
        except BaseException:
            self._forget()
            raise

    def _forget(self) -> None:
        self.spec = None
        if self.state is not None:
            self.state.close()
            self.state = None
        for fd in (*self.kick_fds, *self.call_fds, self.state_fd):
            if fd >= 0:
                os.close(fd)
        self.kick_fds, self.call_fds, self.state_fd = [], [], -1

    def _ready(self, body: dict[str, Any]) -> None:
        worker = self._require(WorkerState.GREETED)
        if worker.connection is None:
            raise UsageError("READY without descriptors")
        worker.state = WorkerState.SERVING
        if self.spec is not None and len(worker.config) == len(self.spec.config):
            self._publish(worker.config)  # its predecessor may have died before it told
        if self.pending_reset is not None:
            self.send(ToWorker.RESET, epoch=self.pending_reset)
        elif self.activation is not None:
            self.send(ToWorker.ACTIVATE, **self.activation, paused=self.home.paused)
        self.home.ready(self)

    def _reset_done(self, body: dict[str, Any]) -> None:
        self._require(WorkerState.SERVING)
        epoch = body.get("epoch")
        if type(epoch) is int:
            self._finish_reset(epoch)

    def _config(self, body: dict[str, Any]) -> None:
        self._require(WorkerState.SERVING)
        data = body.get("data")
        if type(data) is not bytes or self.spec is None or len(data) != len(self.spec.config):
            raise UsageError("config bytes of the wrong type or length")
        self._publish(data)

    def _publish(self, data: bytes) -> None:
        """Show the guest other config bytes; the same ones are no news."""
        if self.spec is None or data == self.spec.config:
            return
        self.spec = replace(self.spec, config=data)
        if self.function is not None:
            with self.home.lock:
                self.function.set_config(data)

    def _needs_reset(self, body: dict[str, Any]) -> None:
        self._require(WorkerState.SERVING)
        log.get("device").warning("%s: needs reset: %s", self.device, plain(body.get("reason", ""), 200))
        if self.function is not None:
            with self.home.lock:
                self.function.needs_reset()

    def _failed(self, body: dict[str, Any]) -> None:
        self.failure, self.refused = plain(body.get("reason", ""), MAX_REASON), body.get("refused") is True
        if self.worker is not None and self.worker.connection is None:
            self.died(self.failure)  # no pidfd yet that would tell of its end

    def _poison(self, body: dict[str, Any]) -> None:
        worker = self._require(WorkerState.SERVING)
        queue = body.get("queue")
        worker.poisoned += 1
        if worker.poisoned <= MAX_POISON and type(queue) is int:
            self.home.told(self, "poison", generation=worker.generation, queue=queue,
                           text=plain(body.get("text", ""), 200))

    def _backend(self, body: dict[str, Any]) -> None:
        worker = self._require(WorkerState.SERVING)
        worker.backends += 1
        if worker.backends <= MAX_BACKEND and body.get("change") in ("lost", "found"):
            self.home.told(self, "backend", generation=worker.generation, change=body["change"],
                           text=plain(body.get("text", ""), 200))

    def _counters(self, body: dict[str, Any]) -> None:
        values = body.get("values")
        if not isinstance(values, dict) or len(values) > 64:
            raise UsageError("counters are no map")
        self.values = {str(key)[:64]: value for key, value in values.items() if type(value) is int}

    def _reply(self, body: dict[str, Any]) -> None:
        worker = self._require(WorkerState.SERVING)
        number, error = body.get("id"), body.get("error")
        if not _is_shallow(body, MAX_DEPTH):
            raise UsageError("answer is nested too deeply")
        done = worker.calls.pop(number, None) if type(number) is int else None
        if done is not None:
            done(body.get("ok"), from_wire(error) if isinstance(error, dict) else None)

    def close(self) -> None:
        """Release the eventfds and the state memfd; the function must be gone."""
        self._forget()
        for fd in (self.config_fd, self.ping_fd, self._ping_end):
            if fd >= 0:
                os.close(fd)
        self.config_fd = self.ping_fd = self._ping_end = -1
