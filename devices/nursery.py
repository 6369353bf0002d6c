"""The forker of device processes: preloaded, single-threaded, without a ZeroMQ context of its own.

    python -m cellvisor.devices.nursery --socket PATH [--core-pidfd N] [--ready-fd N] [--log PATH] [-v]
                                        [--controlplane-pidfd N --successor JSON]
Serves ToNursery/FromNursery (core/wire/messages.py) on a SOCK_SEQPACKET socket, one connection at a time;
what happens while nobody is connected is told to the next one. Ends with QUIT, or with core and all workers.
It starts a successor of the controlplane when that dies.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict, NotFound, UsageError
from cellvisor.core.wire import fdpass
from cellvisor.core.wire.messages import FromNursery, ToNursery
from cellvisor.core.wire.reactor import Reactor
from cellvisor.devices import catalog, trial, worker
from cellvisor.devices.guardian import Guardian

REAP_SECONDS = 0.8  # "within 1 s" of core's death
MAX_UNTOLD = 1000


@dataclass(frozen=True, slots=True)
class Child:
    """A worker that this nursery forked and has not reaped yet."""

    device: str
    generation: int
    pid: int
    pidfd: int


class Nursery:
    """The loop: requests, children's pidfds, core's pidfd. `successor` is the command line of a controlplane."""

    def __init__(self, path: str, core_pidfd: int, verbosity: int, log_path: str | None,
                 successor: list[str]) -> None:
        self._verbosity, self._log_path, self._core_pidfd = verbosity, log_path, core_pidfd
        self._log = log.get("nursery")
        self._path = path
        self._catalog = catalog.load()
        self._children: dict[tuple[str, int], Child] = {}
        self._wards: dict[int, int] = {}
        self._trials: dict[int, int] = {}  # pid -> pidfd
        self._untold: list[dict[str, Any]] = []
        self._peer: socket.socket | None = None
        self._reactor = Reactor()
        self.guardian = Guardian(self._reactor, successor, self._superseded)
        self._listener = fdpass.listen(path)
        self._reactor.add(self._listener.fileno(), lambda events: self._accept())
        if core_pidfd >= 0:
            self._reactor.add(core_pidfd, lambda events: self._core_died())

    def run(self) -> None:
        """Serve until QUIT or core's death."""
        gc.collect()
        gc.freeze()
        self._reactor.run()
        self._kill_all()
        self.guardian.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    # ---- the controlplane

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        self._hang_up()
        sock.settimeout(1.0)  # who does not read our reports for a second is hung up on
        self._peer = sock
        pid = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
        self.guardian.connected(pid)
        self._reactor.add(sock.fileno(), lambda events: self._request(events))
        untold, self._untold = self._untold, []
        for body in untold:
            self._tell(body)

    def _superseded(self) -> None:
        """Somebody steers the VM and may not know us: without workers we are of no use to anybody."""
        if self._peer is None and not self._children:
            self._reactor.stop()

    def _hang_up(self) -> None:
        if self._peer is not None:
            self._reactor.remove(self._peer.fileno())
            self._peer.close()
            self._peer = None

    def _tell(self, body: dict[str, Any], *fds: int) -> None:
        if self._peer is not None:
            try:
                fdpass.send(self._peer, body, fds)
                return
            except OSError:
                self._hang_up()
        self._untold = [*self._untold, body][-MAX_UNTOLD:]

    def _request(self, events: int) -> None:
        assert self._peer is not None
        try:
            packet = fdpass.receive(self._peer) if events & select.EPOLLIN else None
        except (OSError, UsageError) as error:
            self._log.warning("hanging up on the controlplane: %s", error)
            packet = None
        if packet is None:
            self._hang_up()
            return
        body, fds = packet
        try:
            self._serve(body, fds)
        except CellvisorError as error:
            about: dict[str, Any] = {key: body[key] for key in ("id", "device", "generation") if key in body}
            self._tell({"k": FromNursery.ERROR, **about, "error": error.as_wire()})
        finally:
            for fd in fds:
                os.close(fd)

    def _serve(self, body: dict[str, Any], fds: list[int]) -> None:
        """Answer one request. Descriptors that are not taken out of `fds` are closed."""
        kind = body.get("k")
        if kind == ToNursery.CATALOG:
            self._tell({"k": FromNursery.CATALOG, **self._catalog.as_wire()})
        elif kind == ToNursery.CHILDREN:
            children = list(self._children.values())[:fdpass.MAX_FDS]
            self._tell({"k": FromNursery.CHILDREN, "children": [[child.device, child.generation, child.pid]
                                                                for child in children]},
                       *(child.pidfd for child in children))
        elif kind == ToNursery.WARD:
            pids = body.get("pids")
            for pid in pids if isinstance(pids, list) and len(pids) == len(fds) else ():
                self._ward(pid, fds.pop(0))
        elif kind == ToNursery.SPAWN:
            self._spawn(body)
        elif kind == ToNursery.TRY:
            self._try(body, fds)
        elif kind == ToNursery.KILL:
            child = self._children.get((_text(body, "device"), _whole(body, "generation")))
            if child is None:
                raise NotFound(f"no worker {body.get('device')}/{body.get('generation')}")
            _kill(child)
        elif kind == ToNursery.QUIT:
            if body.get("spare") is True:
                self._release_wards()
            self._reactor.stop()
        else:
            raise UsageError(f"unknown request {str(kind)[:40]!r}", hint=f"known: {', '.join(ToNursery)}")

    # ---- children

    def _spawn(self, body: dict[str, Any]) -> None:
        entry = self._catalog.get(body.get("type"))
        who = worker.Incarnation(_text(body, "device"), _whole(body, "generation"), _text(body, "token"),
                                 suspect=body.get("suspect") is True, drain=body.get("drain") is True)
        around = worker.Surroundings(_text(body, "run_dir"), self._core_pidfd, self._verbosity,
                                     self._log_path)
        options = body.get("options")
        if not isinstance(options, dict):
            raise UsageError("spawn: options is no map")
        key = (who.device, who.generation)
        if key in self._children:
            raise Conflict(f"worker {who.device}/{who.generation} is running")
        pid = os.fork()
        if pid == 0:
            _become([self._core_pidfd], lambda: worker.run(entry.name, entry.cls, options, who, around))
        child = Child(who.device, who.generation, pid, os.pidfd_open(pid))
        self._children[key] = child
        self._reactor.add(child.pidfd, lambda events: self._reap(child))
        self._tell({"k": FromNursery.SPAWNED, "device": who.device, "generation": who.generation, "pid": pid},
                   child.pidfd)

    def _try(self, body: dict[str, Any], fds: list[int]) -> None:
        """Have a process find out whether a device can be made; it answers for itself, at the pipe that came along.

        Other descriptors are the device's.
        """
        entry, device, options = self._catalog.get(body.get("type")), _text(body, "device"), body.get("options")
        if not isinstance(options, dict) or not fds:
            raise UsageError("try: options is no map, or there is no pipe")
        pid = os.fork()
        if pid == 0:
            around = worker.Surroundings("", -1, self._verbosity, self._log_path)
            _become(fds, lambda: trial.run(entry.cls, options, device, fds, around))
        self._trials[pid] = pidfd = os.pidfd_open(pid)

        def ended(events: int) -> None:
            if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is not None:
                self._reactor.remove(pidfd)
                os.close(self._trials.pop(pid))

        self._reactor.add(pidfd, ended)

    def _ward(self, pid: int, pidfd: int) -> None:
        """Answer for a worker that another nursery forked."""
        if pid in self._wards or pid in {child.pid for child in self._children.values()}:
            os.close(pidfd)
            return
        self._wards[pid] = pidfd

        def ended(events: int) -> None:
            self._reactor.remove(pidfd)
            os.close(pidfd)
            del self._wards[pid]

        self._reactor.add(pidfd, ended)

    def _release_wards(self) -> None:
        for pidfd in self._wards.values():
            self._reactor.remove(pidfd)
            os.close(pidfd)
        self._wards.clear()

    def _reap(self, child: Child) -> None:
        """Collect a child that ended, if it did, and report it."""
        result = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOHANG)
        if result is None:
            return
        how = "exit" if result.si_code == os.CLD_EXITED else "signal"
        self._reactor.remove(child.pidfd)
        os.close(child.pidfd)
        del self._children[child.device, child.generation]
        self._log.info("%s/%d ended: %s %d", child.device, child.generation, how, result.si_status)
        self._tell({"k": FromNursery.EXITED, "device": child.device, "generation": child.generation,
                    "pid": child.pid, "status": f"{how} {result.si_status}"})

    def _core_died(self) -> None:
        self._log.warning("core is gone: killing %d workers", len(self._children))
        self._reactor.stop()

    def _kill_all(self) -> None:
        """Kill and reap every worker. One that hangs in the kernel is left to init."""
        for child in self._children.values():
            _kill(child)
        for pidfd in (*self._wards.values(), *self._trials.values()):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        end = time.monotonic() + REAP_SECONDS
        for child in list(self._children.values()):
            select.select([child.pidfd], [], [], max(0.0, end - time.monotonic()))
            self._reap(child)


def _kill(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)


def _become(keep: Iterable[int], work: Callable[[], int]) -> None:
    """Have the forked child do `work`, with these descriptors of ours, and end with its status; never returns."""
    status = 70  # EX_SOFTWARE: a mistake before the worker could say FAILED
    try:
        for handler in logging.getLogger("cellvisor").handlers:
            handler.close()
        # Objects that owned these numbers are referenced until os._exit and never close them again.
        first = 3
        for fd in sorted(fd for fd in keep if fd > 2):
            os.closerange(first, fd)
            first = fd + 1
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{key}={value!r} is not a string")
    return value


def _whole(body: dict[str, Any], key: str) -> int:
    value = body.get(key)
    if type(value) is not int or value < 0:
        raise UsageError(f"{key}={value!r} is not a number from 0 on")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the nursery."""
    parser = argparse.ArgumentParser(prog="cellvisor-nursery")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--core-pidfd", type=int, default=-1)
    parser.add_argument("--ready-fd", type=int, default=-1, help="gets one byte when the socket listens")
    parser.add_argument("--controlplane-pidfd", type=int, default=-1)
    parser.add_argument("--successor", type=json.loads, default=[], help="command line, as JSON")
    parser.add_argument("--log", default=None)
    parser.add_argument("-v", action="count", default=0, dest="verbosity")
    args = parser.parse_args(argv)
    log.setup("nursery", args.verbosity, args.log)
    with contextlib.suppress(PermissionError):  # a session leader already
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for fd in {args.core_pidfd, args.controlplane_pidfd} - {-1}:
        os.set_inheritable(fd, False)
    nursery = Nursery(args.socket, args.core_pidfd, args.verbosity, args.log, args.successor)
    if args.controlplane_pidfd >= 0:
        nursery.guardian.watch(args.controlplane_pidfd)
    if args.ready_fd >= 0:
        with contextlib.suppress(BrokenPipeError):  # the controlplane died meanwhile: a successor is to be started
            os.write(args.ready_fd, b"\n")
        os.close(args.ready_fd)
    nursery.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
