"""Core's three sockets: workers (ZeroMQ ROUTER), the controlplane (ZeroMQ ROUTER), descriptors (AF_UNIX).

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
from cellvisor.core.custody import Custody
from cellvisor.core.errors import CellvisorError, Internal, UsageError
from cellvisor.core.fds import Connection, FdsServer
from cellvisor.core.link import Link, WorkerState
from cellvisor.core.store import Store
from cellvisor.core.wire import places
from cellvisor.core.wire.messages import MAX_MESSAGE, pack, unpack
from cellvisor.core.wire.reactor import Reactor

HIGH_WATER = 1000
TELL_SECONDS = 0.05
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
        self.store = Store()
        self._verbs: Serves | None = None
        self._devices: Devices | None = None
        self.custody = Custody(token)
        self._context = zmq.Context()
        self._workers = self._bind(os.path.join(run_dir, places.CORE), self._from_worker)
        self._control = self._bind(os.path.join(run_dir, places.CONTROL), self._from_controlplane)
        self.fds = FdsServer(os.path.join(run_dir, places.FDS), self.reactor, self.store, self)
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
        while self._posted:
            self._posted.popleft()()

    # ---- out

    def _send(self, sock: zmq.Socket[bytes], identity: str, body: dict[str, Any]) -> None:
        try:
            sock.send_multipart([identity.encode(), pack(body)], zmq.NOBLOCK)
        except zmq.Again:
            who = identity.rsplit("/", 1)[0]
            log.get("wire").warning("%s does not read: %s dropped", who, body.get("k", "message"))
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise

    def send(self, identity: str, body: dict[str, Any]) -> None:
        """Send to a worker; one that is gone is ignored."""
        self._send(self._workers, identity, body)

    def event(self, name: str, **properties: Any) -> None:
        """Tell the controlplane. While there is none nobody hears it: a successor asks how things are."""
        self._send(self._control, self.custody.identity, {"event": name, "properties": properties})

    # ---- in

    def _from_controlplane(self, frames: list[bytes]) -> None:
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
            self._send(self._control, identity, {"id": number, **answer})

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

    def _from_worker(self, frames: list[bytes]) -> None:
        link = self._link_of(frames[0].decode(errors="replace")) if len(frames) == 2 else None
        if link is None or link.worker is None or link.worker.state is WorkerState.DEAD:
            return  # a stranger or an earlier generation
        try:
            link.take(unpack(frames[1]))
        except CellvisorError as error:
            log.get("wire").warning("%s said something wrong: %s", link.device, error)
            self.expel(link, f"protocol violation: {error}")
        except Exception as error:  # whatever a worker says, the VM lives on
            log.get("wire").exception("serving %s", link.device)
            self.expel(link, f"core could not serve it: {type(error).__name__}: {error}")

    def expel(self, link: Link, reason: str) -> None:
        """Give up on a worker that lies: its process is killed, `reason` told."""
        link.failure = reason
        worker = link.worker
        self.event("device.expelled", device=link.device, generation=worker.generation if worker else 0, reason=reason)
        connection = worker.connection if worker else None
        if connection is not None and connection.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(connection.pidfd, signal.SIGKILL)
        else:
            link.died(reason)

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
        pidfd = os.dup(connection.pidfd)

        def gone(events: int) -> None:
            self.reactor.remove(pidfd)
            os.close(pidfd)
            self.fds.hang_up(connection)
            if link.worker is worker:
                link.died("its process died")

        self.reactor.add(pidfd, gone, select.EPOLLIN)

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
        connection = link.worker.connection
        return connection.pidfd if connection is not None and connection.pidfd >= 0 else None

    def offer(self, connection: Connection) -> None:
        """Answer a worker that waits for its descriptors."""
        self.fds.offer(connection)

    def close(self) -> None:
        """Send what is queued, then release every socket."""
        self.fds.close()
        self.store.close()
        self._workers.close()
        self._control.close()
        self._context.term()
        self.reactor.close()
        os.close(self._wake)
