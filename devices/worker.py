"""The one main loop of every device process: plain epoll around rings, core's messages and the device.

    main() -> HELLO -> take descriptors -> READY -> idle <-> active <-> paused -> END
The nursery calls run() in a forked child; the ZeroMQ context is made here, after the fork. The loop ends with END,
with core, or with FAILED and exit status 1; a drain incarnation (devices/drain.py) with the reset it is there for.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Internal, RingError
from cellvisor.core.mem.view import GuestMemory
from cellvisor.core.ring.queue import Chain, Queue, QueueConfig
from cellvisor.core.ring.state import StateMap
from cellvisor.core.wire.messages import PROTOCOL, ToCore, ToWorker, unpack
from cellvisor.core.wire.options import build
from cellvisor.core.wire.reactor import Reactor
from cellvisor.devices.channel import Channel
from cellvisor.devices.device import DeviceBase
from cellvisor.devices.drain import Drain
from cellvisor.devices.poison import Quarantine, absolve


@dataclass(frozen=True, slots=True)
class Incarnation:
    """Who this process is: one life of one device.

    `suspect`: its predecessor brought its death on itself; `drain`: it answers for a device that is given up.
    """

    device: str
    generation: int
    token: str
    suspect: bool = False
    drain: bool = False

    @property
    def identity(self) -> str:
        """The ZeroMQ routing id."""
        return f"{self.device}/{self.generation}/{self.token}"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where core is and how to log; `core_pidfd` -1 if nobody passed one."""

    run_dir: str
    core_pidfd: int = -1
    verbosity: int = 0
    log_path: str | None = None


def reason_of(error: Exception) -> str:
    """Say why a device cannot serve: in its own words, if it refuses."""
    return str(error) if isinstance(error, CellvisorError) else f"{type(error).__name__}: {error}"


class Worker:
    """One device process; the Host of its device."""

    def __init__(self, kind: str, who: Incarnation, around: Surroundings) -> None:
        self.kind, self.who = kind, who
        self.device_id, self.generation, self.trial = who.device, who.generation, False
        self.status = 0
        self.reactor = Reactor()
        self._log = log.get("worker")
        self.activation = 0
        self._device: Any = None
        self._queues: dict[int, Queue] = {}
        self._kicks: list[int] = []
        self._calls: list[int] = []
        self._paused = False
        self._postponed: dict[str, Any] | None = None  # an ACTIVATE that waits for RESUME
        self._suspect = who.suspect
        self._quarantine: Quarantine | None = None
        self._config_size = 0
        self._memory: GuestMemory | None = None
        self._state: StateMap | None = None
        self._channel = Channel(who.identity, around.run_dir)
        self._send = self._channel.send
        if around.core_pidfd >= 0:
            self.reactor.add(around.core_pidfd, lambda events: self._core_is_gone())
        self._verbs: dict[str, Callable[[dict[str, Any]], None]] = {
            ToWorker.ACTIVATE: self._activate, ToWorker.RESET: self._reset, ToWorker.PAUSE: self._pause,
            ToWorker.RESUME: self._resume, ToWorker.CONFIG_WRITE: self._config_write,
            ToWorker.CALL: self._call, ToWorker.END: lambda body: self.reactor.stop(),
        }

    # ---- life

    def main(self, cls: type[Any], options: dict[str, Any]) -> int:
        """Serve until the end; returns the exit status."""
        try:
            wanted = build(cls.Options, options, self.who.device)
            self._device = Drain(cls, wanted, self) if self.who.drain else cls(wanted, self)
            self._greet()
            self.reactor.add_zmq(self._channel.messages, self._message)
            self.reactor.add(self._channel.fds.fileno(), self._fds_event, select.EPOLLIN | select.EPOLLRDHUP)
            self.reactor.run()
            if self._device is not None and self.status == 0:
                self._device.close()
        except Exception as error:
            self._fail(error)
        finally:
            self._channel.close()
        return self.status

    def _greet(self) -> None:
        about: dict[str, Any] = {"drain": True}
        if not self.who.drain:
            self._config_size = len(self._device.spec.config)
            about = {"spec": self._device.spec.as_wire()}
        self._send(ToCore.HELLO, **about, type=self.kind, pid=os.getpid(), protocol=PROTOCOL)
        body, fds = self._channel.ask({"take": True})
        given = dict(zip(body.get("names", ()), fds, strict=True))
        try:
            self._memory = GuestMemory(given["ram"], given["table"])
            self._state = StateMap(given["state"])
            queues = range(len(self._state.layout.queue_sizes))
            self._kicks = [given[f"kick{index}"] for index in queues]
            self._calls = [given[f"call{index}"] for index in queues]
            ping = given["ping"]
        except KeyError as error:
            raise Internal(f"core gave no descriptor {error.args[0]!r}") from None
        for name in ("ram", "table", "state"):
            os.close(given[name])
        self._state.generation = self.generation
        self._state.leave_syscall()  # a predecessor may have died in one
        self.reactor.add(ping, lambda events: self._ping(ping))
        self._send(ToCore.READY)

    def _fail(self, error: Exception) -> None:
        """Tell why and end with status 1. Only the first reason counts."""
        if self.status:
            return
        self.status = 1
        self.reactor.stop()
        if isinstance(error, CellvisorError):
            self._log.info("%s", error)  # whoever started us says it, in one line
        else:
            self._log.error("%s", traceback.format_exc().rstrip())
        reason = reason_of(error)
        refused = isinstance(error, CellvisorError) and self._state is None
        self._send(ToCore.FAILED, reason=reason, refused=refused)

    def _core_is_gone(self) -> None:
        self._log.info("core is gone")
        self._channel.forget()
        self.reactor.stop()

    def _fds_event(self, events: int) -> None:
        if not self._channel.is_open():
            self._core_is_gone()

    def _ping(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            if not os.read(fd, 512):
                self._core_is_gone()  # it closed its end
                return
        if self._state is not None:
            self._state.echo = self._state.ping

    # ---- messages

    def _message(self, frames: list[bytes]) -> None:
        try:
            body = unpack(frames[-1])
            self._guarded(lambda: self._verbs[body["k"]](body))
        except (CellvisorError, KeyError) as error:
            self._log.error("message of core: %s", error)

    def _guarded(self, action: Callable[[], Any]) -> None:
        """Run the device's code: the guest's mistakes end in NEEDS_RESET, ours in FAILED."""
        try:
            action()
        except RingError as error:
            self._needs_reset(error)
        except Exception as error:
            self._fail(error)

    def _needs_reset(self, error: RingError, index: int | None = None) -> None:
        for broken in list(self._queues) if index is None else [index]:
            self.reactor.remove(self._kicks[broken])
            self._queues.pop(broken).close()
            if self._quarantine is not None:
                self._quarantine.drop(broken)
        self._log.warning("the guest broke a rule: %s", error)
        self._send(ToCore.NEEDS_RESET, reason=str(error))

    def _activate(self, body: dict[str, Any]) -> None:
        assert self._memory is not None
        assert self._state is not None
        self._paused = body.get("paused") is True
        self._postponed = body if self._paused else None
        if self._paused:
            return  # recovery writes to guest memory
        self._drop_queues(forget=False)
        epoch, features = body["epoch"], body["features"]
        self._state.features = features
        self._state.epoch = self.activation = epoch
        self._device.on_activate(features)
        recovered: list[tuple[Queue, list[Chain]]] = []
        for one in body["queues"]:
            index = one["index"]
            config = QueueConfig(one["size"], one["desc"], one["avail"], one["used"])
            queue = Queue(index, self._state, self._memory, config, features, self._calls[index], epoch=epoch)
            self._queues[index] = queue
            recovered.append((queue, queue.recover()))
        if self._suspect:
            self._quarantine = Quarantine(recovered, self.kick, self._refuse)
        else:
            absolve(recovered)
        self._suspect = False  # what begins from now on is this incarnation's
        self._listen()

    def _refuse(self, queue: Queue, chain: Chain) -> None:
        """Fail a request that killed its process whenever it ran alone."""
        text = f"queue {queue.index}, head {chain.head}, begins {chain.read(16).hex(' ', 4)}"
        self._log.error("a request killed this device's process %d times and is refused: %s", chain.starts, text)
        queue.complete(chain, getattr(type(self._device), "drain", DeviceBase.drain)(queue.index, chain) or 0)
        queue.publish()
        self._send(ToCore.POISON, queue=queue.index, text=text)

    def _listen(self) -> None:
        """Watch the kicks and kick every queue: what was offered while nobody listened is waiting."""
        for index in self._queues:
            self.reactor.add(self._kicks[index], lambda events, index=index: self._kicked(index))  # type: ignore[misc]
            self.kick(index)

    def _kicked(self, index: int) -> None:
        _drain(self._kicks[index])
        queue = self._queues.get(index)
        if queue is None:
            return
        try:
            self._device.on_queue(index, queue)
            queue.publish()
        except RingError as error:
            self._needs_reset(error, index)
        except Exception as error:
            self._fail(error)

    def _drop_queues(self, *, forget: bool) -> None:
        for index in self._queues:
            self.reactor.remove(self._kicks[index])
        self._quarantine = None
        queues, self._queues = self._queues, {}
        for queue in queues.values():
            if forget:
                queue.release()
            queue.close()

    def _reset(self, body: dict[str, Any]) -> None:
        assert self._state is not None
        self._device.on_reset()
        self._drop_queues(forget=True)
        self._state.epoch = 0
        self._paused, self._postponed = False, None
        self._counters()
        self._send(ToCore.RESET_DONE, epoch=body["epoch"])
        if self.who.drain:
            self.reactor.stop()

    def _pause(self, body: dict[str, Any]) -> None:
        if not self._paused:
            self._paused = True
            self._device.on_pause()
            for index, queue in self._queues.items():
                self.reactor.remove(self._kicks[index])
                queue.publish()
        self._counters()
        self._send(ToCore.PAUSED)

    def _resume(self, body: dict[str, Any]) -> None:
        if self._postponed is not None:
            self._activate({**self._postponed, "paused": False})
        elif self._paused:
            self._paused = False
            self._device.on_resume()
            self._listen()

    def _config_write(self, body: dict[str, Any]) -> None:
        self._device.on_config(body["offset"], body["data"])

    def _call(self, body: dict[str, Any]) -> None:
        """Serve a verb; "counters" is every device's."""
        try:
            verb, args = body["verb"], body.get("args") or {}
            result = self._device.counters() if verb == "counters" else self._device.call(verb, args)
        except RingError:
            raise
        except CellvisorError as error:
            self._send(ToCore.REPLY, id=body["id"], error=error.as_wire())
        else:
            self._send(ToCore.REPLY, id=body["id"], ok=result)

    def _counters(self) -> None:
        # Only on life-cycle steps and on request: a running device sends no message at all.
        values = self._device.counters()
        if values:
            self._send(ToCore.COUNTERS, values=values)

    # ---- the Host of the device

    def watch(self, fd: int, callback: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        self.reactor.add(fd, lambda seen: self._guarded(lambda: callback(seen)), events)

    def unwatch(self, fd: int) -> None:
        self.reactor.remove(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> int:
        return self.reactor.after(seconds, lambda: self._guarded(callback))

    def cancel(self, timer: int) -> None:
        self.reactor.cancel(timer)

    def deposit(self, name: str, fd: int) -> None:
        body, _ = self._channel.ask({"deposit": name}, fd)
        if not body.get("ok"):
            raise Internal(f"core does not store descriptor {name!r}: {body.get('error')}")

    def take(self, name: str) -> int | None:
        body, fds = self._channel.ask({"get": name})
        return fds[0] if body.get("ok") and fds else None

    def set_config(self, data: bytes) -> None:
        if len(data) != self._config_size:
            raise Internal(f"config of {len(data)} bytes, Spec said {self._config_size}")
        self._send(ToCore.CONFIG, data=data)

    def queue(self, index: int) -> Queue | None:
        return self._queues.get(index)

    def kick(self, index: int) -> None:
        if index in self._queues:
            os.eventfd_write(self._kicks[index], 1)

    def enter_syscall(self) -> None:
        if self._state is not None:
            self._state.enter_syscall()

    def leave_syscall(self) -> None:
        if self._state is not None:
            self._state.leave_syscall()

    def save(self, data: bytes, version: int = 1) -> None:
        if self._state is not None:
            self._state.save_private(data, version)

    def load(self) -> tuple[int, bytes]:
        return self._state.load_private() if self._state is not None else (0, b"")

    def backend(self, change: str, text: str) -> None:
        self._log.warning("%s", text)
        self._send(ToCore.BACKEND, change=change, text=text)

    def log(self, text: str) -> None:
        self._log.warning("%s", text)


def _drain(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)


def run(kind: str, cls: type[Any], options: dict[str, Any], who: Incarnation, around: Surroundings) -> int:
    """Be the process of one device, in a freshly forked child. Returns the exit status."""
    settle_in(who.device, f"{who.device}/{who.generation}", around)
    try:
        worker = Worker(kind, who, around)
    except (OSError, zmq.ZMQError) as error:
        log.get("worker").error("cannot reach core in %s: %s", around.run_dir, error)
        return 1
    return worker.main(cls, options)


def settle_in(name: str, log_name: str, around: Surroundings) -> None:
    """Be a process of one's own after the fork: in a session, under a name, with a log."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for file_name, text in (("comm", f"cv-{name.lstrip('_')}"[:15]), ("oom_score_adj", "500")):
        try:
            with open(f"/proc/self/{file_name}", "w") as file:
                file.write(text)
        except OSError:
            pass  # a hardened /proc; only names and preferences depend on it
    log.setup(log_name, around.verbosity, around.log_path)
