"""Core's three sockets: workers (ZeroMQ, core/gate.py), the controlplane (ZeroMQ ROUTER), descriptors (AF_UNIX).

Everything here runs on core's main thread; vCPU threads hand work over with post().
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import signal
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from cellvisor.core import log
from cellvisor.core.closer import Closer
from cellvisor.core.custody import Custody
from cellvisor.core.errors import CellvisorError, Internal, UsageError
from cellvisor.core.fds import Connection, FdsServer
from cellvisor.core.gate import Gate
from cellvisor.core.link import Link, Worker, WorkerState
from cellvisor.core.store import Store
from cellvisor.core.wire import places
from cellvisor.core.wire.messages import MAX_MESSAGE, pack, plain, unpack
from cellvisor.core.wire.reactor import Reactor

HIGH_WATER = 1000
TELL_SECONDS = 0.05
LEAVE_SECONDS = 5.0  # from hanging up to the end of a worker
Reply = Callable[[dict[str, Any] | CellvisorError], None]


class Serves(Protocol):
    """What serves the controlplane's requests."""

    def serve(self, verb: str, args: dict[str, Any], reply: Reply) -> None:
        """Call `reply` once, now or later. May raise CellvisorError instead."""


class Devices(Protocol):
    """The machine, as far as its workers are concerned."""

    links: dict[str, Link]

    def shared_descriptors(self) -> dict[str, int]:
        """Return guest RAM and its table for a worker."""


class Server:
    """Routes messages between the machine, its workers and the controlplane."""

    def __init__(self, run_dir: str, token: str) -> None:
        self.reactor = Reactor()
        closer = Closer()
        self.store = Store(closer)
        self._verbs: Serves | None = None
        self._devices: Devices | None = None
        self.custody = Custody(token)
        self.messages = dict.fromkeys(("to_workers", "from_workers", "to_controlplane", "from_controlplane"), 0)
        self._context = zmq.Context()
        self._gate = Gate(os.path.join(run_dir, places.CORE), self.reactor, closer, self)
        self._control = self._bind(os.path.join(run_dir, places.CONTROL), self._from_controlplane)
        self.fds = FdsServer(os.path.join(run_dir, places.FDS), self.reactor, self.store, self, closer)
        self._posted: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.reactor.add(self._wake, self._run_posted)

    def bind(self, devices: Devices, verbs: Serves) -> None:
        """Say whom messages are for."""
        self._devices, self._verbs = devices, verbs

    def _bind(self, path: str, callback: Callable[[list[bytes]], None]) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.ROUTER)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        sock.setsockopt(zmq.LINGER, 200)
        sock.setsockopt(zmq.SNDHWM, HIGH_WATER)
        sock.setsockopt(zmq.RCVHWM, HIGH_WATER)
        sock.bind(f"ipc://{path}")
        self.reactor.add_zmq(sock, callback)
        return sock

    # ---- from vCPU threads

    def post(self, action: Callable[[], None]) -> None:
        """Have `action` run on the main thread; any thread may call this."""
        self._posted.append(action)
        os.eventfd_write(self._wake, 1)

    def _run_posted(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        for _ in range(len(self._posted)):  # what comes meanwhile waits for its turn
            self._posted.popleft()()

    # ---- out

    def _tell(self, identity: str, body: dict[str, Any]) -> None:
        """Send to the controlplane."""
        self.messages["to_controlplane"] += 1
        try:
            self._control.send_multipart([identity.encode(), pack(body)], zmq.NOBLOCK)
        except zmq.Again:
            self._dropped(identity, body)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise

    def _dropped(self, identity: str, body: dict[str, Any]) -> None:
        what = body.get("k") or body.get("event") or "an answer"
        log.get("wire").warning("%s does not read: %s dropped", identity.rsplit("/", 1)[0], what)

    def send(self, identity: str, body: dict[str, Any]) -> None:
        """Send to a worker; one that is gone is ignored."""
        self.messages["to_workers"] += 1
        if not self._gate.send(identity, pack(body)):
            self._dropped(identity, body)

    def event(self, name: str, **properties: Any) -> None:
        """Tell the controlplane. While there is none nobody hears it: a successor asks how things are."""
        self._tell(self.custody.identity, {"event": name, "properties": properties})

    # ---- in

    def _from_controlplane(self, frames: list[bytes]) -> None:
        self.messages["from_controlplane"] += 1
        identity = frames[0].decode(errors="replace")
        if len(frames) != 2 or not self.custody.admits(identity):
            log.get("wire").warning("message of a stranger on the control socket dropped")
            return
        number: object = None

        def reply(result: dict[str, Any] | CellvisorError) -> None:
            failed = isinstance(result, CellvisorError)
            answer = {"error": result.as_wire()} if isinstance(result, CellvisorError) else {"ok": result}
            if failed:
                log.get("wire").info("refused: %s", result)
            self._tell(identity, {"id": number, **answer})

        try:
            body = unpack(frames[1])
            number = body.get("id")
            verb, args = body.get("verb"), body.get("args") or {}
            if not isinstance(verb, str) or not isinstance(args, dict) or self._verbs is None:
                raise UsageError("verb or args missing")
            self._verbs.serve(verb, args, reply)
        except CellvisorError as error:
            reply(error)
        except Exception as error:
            log.get("wire").exception("serving %r", number)
            reply(Internal(f"{type(error).__name__}: {error}"))

    # ---- workers

    def expects(self, identity: str) -> bool:
        """Is `identity` a worker's of the day? Strangers and earlier generations have nothing to say."""
        link = self._link_of(identity)
        worker = link.worker if link else None
        return worker is not None and worker.state is not WorkerState.DEAD and not worker.expelled

    def heard(self, identity: str, data: bytes) -> None:
        """Serve a worker's message."""
        self.messages["from_workers"] += 1
        link = self._link_of(identity)
        if link is None or not self.expects(identity):
            self._gate.hang_up(identity)
            return
        try:
            link.take(unpack(data))
        except CellvisorError as error:
            self.broke(identity, error.message)
        except Exception as error:  # whatever a worker says, the VM lives on
            log.get("wire").exception("serving %s", link.device)
            self.expel(link, f"core could not serve it: {type(error).__name__}: {error}")

    def broke(self, identity: str, why: str) -> None:
        """A worker does not keep to the protocol."""
        link = self._link_of(identity)
        if link is not None and self.expects(identity):
            log.get("wire").warning("%s said something wrong: %s", link.device, plain(why))
            self.expel(link, f"protocol violation: {why}")

    def expel(self, link: Link, reason: str) -> None:
        """Give up on a worker that lies: its process is killed, `reason` told."""
        worker = link.worker
        link.failure = reason = plain(reason)
        self.event("device.expelled", device=link.device, generation=worker.generation if worker else 0, reason=reason)
        if worker is None:
            return
        worker.expelled = True
        self._gate.kill(link.identity)
        if worker.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
        else:
            link.died(reason)  # no pidfd yet that would tell of its end

    def hung(self, link: Link, reason: str) -> None:
        """Give up on a worker that hangs. There is time to tell before others see it die."""
        worker = link.worker
        self.event("device.expelled", device=link.device, generation=worker.generation if worker else 0, reason=reason)
        self.reactor.after(TELL_SECONDS, lambda: self.expel(link, reason) if link.worker is worker else None)

    # ---- who is who on the descriptor socket

    def _link_of(self, identity: str) -> Link | None:
        links = self._devices.links if self._devices else {}
        link = links.get(identity.split("/", 1)[0])
        return link if link is not None and link.identity == identity else None

    def owner_of(self, identity: str) -> str | None:
        """Return the device that `identity` speaks for ("" for the controlplane), or None for a stranger."""
        if identity == self.custody.identity:
            return ""
        link = self._link_of(identity)
        return link.device if link else None

    def connected(self, identity: str, connection: Connection) -> None:
        """A worker has come for its descriptors: from now on its pidfd tells of its death."""
        link = self._link_of(identity)
        if link is None or link.worker is None:
            return
        worker = link.worker
        if worker.connection is not None:
            raise UsageError("a second connection")
        worker.connection, worker.pid = connection, connection.pid
        worker.pidfd = pidfd = os.dup(connection.pidfd)

        def gone(events: int) -> None:
            self.reactor.remove(pidfd)
            os.close(pidfd)
            worker.pidfd = -1
            self.fds.hang_up(connection)
            if link.worker is worker:
                link.died("its process died")

        self.reactor.add(pidfd, gone, select.EPOLLIN)

    def left(self, connection: Connection) -> None:
        """A worker that ends hangs up; one that lives on without us serves nobody."""
        link = self._link_of(connection.identity)
        worker = link.worker if link else None
        if link is not None and worker is not None and worker.connection is connection:
            self.reactor.after(LEAVE_SECONDS, lambda: self._still_there(link, worker))

    def _still_there(self, link: Link, worker: Worker) -> None:
        if link.worker is worker and worker.state is not WorkerState.DEAD and not worker.expelled:
            self.expel(link, "hung up and lives on")

    def take(self, identity: str) -> tuple[list[str], list[int]] | None:
        """Return what a worker is given."""
        link = self._link_of(identity)
        if link is None or self._devices is None:
            return None
        return link.descriptors(self._devices.shared_descriptors())

    def pidfd_of(self, device: str) -> int | None:
        """Return the pidfd of the device's living worker, still ours; None if it has not come yet or is gone."""
        link = self._devices.links.get(device) if self._devices else None
        if link is None or link.worker is None or link.worker.state is WorkerState.DEAD:
            return None
        return link.worker.pidfd if link.worker.pidfd >= 0 else None

    def offer(self, connection: Connection) -> None:
        """Answer a worker that waits for its descriptors."""
        self.fds.offer(connection)

    def close(self) -> None:
        """Send what is queued, then release every socket."""
        self.fds.close()
        self.store.close()
        self._gate.close()
        self._control.close()
        self._context.term()
        self.reactor.close()
        os.close(self._wake)
